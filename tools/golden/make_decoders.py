"""Logits of the reference decoders, kept in tests/golden.

GPT-2, Llama and Qwen3 of `transformers` with random weights, tiny and in float32: the weights under
the reference's own names, token ids, and the logits they give. Run in an environment of its own:

  python3.11 -m venv golden && golden/bin/pip install torch==2.13.0 transformers==5.23.0
  golden/bin/python tools/golden/make_decoders.py tests/golden
"""

import hashlib
import json
import pathlib
import sys

import numpy as np
import torch
import transformers

SEED = 20
ROWS, LENGTH = 2, 40
# Every initial weight is multiplied by this (0.02 becomes 0.2): logits then lie far apart, and no
# term of the model is too small to be seen.
SCALE = 10.0
SHAPE = {"vocab_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 24}
GROUPED = {"num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 40}
ROPE = {
  "rope_type": "llama3",
  "rope_theta": 10_000.0,
  "factor": 8.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  # Of the four wavelengths of a head of 8, one is then kept, one partly stretched, two wholly.
  "original_max_position_embeddings": 128,
}
CONFIGS = {
  "gpt2": transformers.GPT2Config(
    vocab_size=64, n_layer=2, n_head=3, n_embd=24, n_positions=LENGTH
  ),
  "llama": transformers.LlamaConfig(rms_norm_eps=1e-5, rope_parameters=ROPE, **SHAPE, **GROUPED),
  "qwen3": transformers.Qwen3Config(
    rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    tie_word_embeddings=True,
    **SHAPE,
    **GROUPED,
  ),
}


def record(config) -> dict[str, np.ndarray]:
  """Weights, tokens and logits of a model with that config."""
  torch.manual_seed(SEED)
  model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
  model = model.float().eval()
  with torch.no_grad():
    for weight in model.parameters():
      # Scales and biases too must differ from 1 and 0, and from each other.
      noise = torch.randn_like(weight) * 0.2
      weight.copy_(weight + noise if weight.ndim == 1 else weight * SCALE)
    tokens = torch.randint(config.vocab_size, (ROWS, LENGTH))
    logits = model(tokens).logits
  tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
  state = {name: x.numpy() for name, x in model.state_dict().items() if name not in tied}
  return state | {"tokens": tokens.int().numpy(), "logits": logits.numpy()}


def digest(arrays: dict[str, np.ndarray]) -> str:
  """Of every name, shape and value."""
  found = hashlib.sha256()
  for name in sorted(arrays):
    found.update(f"{name} {arrays[name].shape}".encode() + arrays[name].tobytes())
  return found.hexdigest()


def save(path: pathlib.Path, arrays: dict[str, np.ndarray], **versions: str) -> None:
  """Writes a golden file, with the versions of what made it and a digest."""
  about = {
    "transformers": transformers.__version__,
    "torch": torch.__version__,
    **versions,
    "seed": SEED,
    "sha256": digest(arrays),
  }
  np.savez(path, about=json.dumps(about), **arrays)
  print(path.stem, about)


def main(folder: pathlib.Path) -> None:
  for name, config in CONFIGS.items():
    save(folder / f"{name}.npz", record(config))


if __name__ == "__main__":
  main(pathlib.Path(sys.argv[1]))
