"""Outputs of the reference T5, kept in tests/golden.

T5ForConditionalGeneration of `transformers` with random weights, tiny and in float32: `t5.npz` of
version 1.1 (gated GELU, an output table of its own), `t5_tied.npz` of version 1.0 (ReLU, tied):
weights, sources and targets of unequal lengths, longer than the largest distance of a bucket, their
logits, and what is decoded greedily for the sources. `t5.npz` also has the bucket of every
distance. The environment is that of make_decoders.py:

  golden/bin/python tools/golden/make_t5.py tests/golden
"""

import pathlib
import sys

import numpy as np
import torch
import transformers
from make_decoders import SEED, save
from transformers.models.t5.modeling_t5 import T5Attention

SOURCES, TARGETS = (60, 33), (37, 24)  # Tokens of each row that are no padding.
DECODED = 12  # Tokens.
SHAPE = {
  "vocab_size": 64,
  "d_model": 24,
  "d_kv": 8,
  "d_ff": 40,
  "num_layers": 3,
  "num_decoder_layers": 2,
  "num_heads": 4,
  "relative_attention_num_buckets": 8,
  "relative_attention_max_distance": 20,
}
CONFIGS = {
  "t5": transformers.T5Config(feed_forward_proj="gated-gelu", tie_word_embeddings=False, **SHAPE),
  "t5_tied": transformers.T5Config(feed_forward_proj="relu", **SHAPE),
}
BUCKETS = {"published": (32, 128), "tiny": (8, 20), "odd": (24, 100)}  # Number, distance.


def record(config, *, tied: bool) -> dict[str, np.ndarray]:
  """Weights, rows, logits and greedy tokens of a random model."""
  torch.manual_seed(SEED)
  model = transformers.T5ForConditionalGeneration(config).float().eval()
  assert config.scale_decoder_outputs == tied
  if not tied:  # This version of the library makes even these one, and splits them when it loads.
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
  with torch.no_grad():
    for name, weight in model.named_parameters():
      # So that every term is seen and what is decoded varies, but no score is so large that its
      # rounding shows.
      if weight.ndim == 1:
        weight.add_(torch.randn_like(weight) * 0.2)
      elif "relative" in name:
        weight.copy_(torch.randn_like(weight))
      elif "shared" in name or "lm_head" in name:
        weight.copy_(torch.randn_like(weight) * (1.0 if tied else 0.3))
      else:
        weight.mul_(1.5 if ".q." in name or ".k." in name else 4.0)
    tokens = torch.randint(2, config.vocab_size, (len(SOURCES), max(SOURCES)))
    inputs = torch.randint(2, config.vocab_size, (len(TARGETS), max(TARGETS)))
    inputs[:, 0] = config.pad_token_id
    mask, target_mask = of_lengths(SOURCES), of_lengths(TARGETS)
    logits = model(
      tokens, attention_mask=mask, decoder_input_ids=inputs, decoder_attention_mask=target_mask
    ).logits
    decoded = model.generate(
      tokens,
      attention_mask=mask,
      decoder_start_token_id=0,
      eos_token_id=None,
      do_sample=False,
      max_new_tokens=DECODED,
      min_new_tokens=DECODED,
    )[:, 1:]
  skipped = {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}
  skipped |= {"lm_head.weight"} if tied else set()
  arrays = {
    "tokens": tokens.int(),
    "mask": mask.int(),
    "inputs": inputs.int(),
    "target_mask": target_mask.int(),
    "logits": logits,
    "decoded": decoded.int(),
  }
  state = {name: x for name, x in model.state_dict().items() if name not in skipped}
  return {name: x.numpy() for name, x in (state | arrays).items()}


def of_lengths(lengths: tuple[int, ...]) -> torch.Tensor:
  return (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()


def buckets() -> dict[str, np.ndarray]:
  """The bucket of each distance from -300 to 300, by name and direction."""
  after = torch.arange(-300, 301)
  of = T5Attention._relative_position_bucket
  return {
    f"buckets_{name}_{'both' if both else 'causal'}": of(
      after, bidirectional=both, num_buckets=n, max_distance=distance
    )
    .int()
    .numpy()
    for name, (n, distance) in BUCKETS.items()
    for both in (False, True)
  }


def main(folder: pathlib.Path) -> None:
  save(folder / "t5.npz", record(CONFIGS["t5"], tied=False) | buckets())
  save(folder / "t5_tied.npz", record(CONFIGS["t5_tied"], tied=True))


if __name__ == "__main__":
  main(pathlib.Path(sys.argv[1]))
