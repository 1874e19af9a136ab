"""Logits of the reference vision transformer, kept in tests/golden.

ViT of `transformers` with random weights, tiny and in float32: the weights under the names of its
files, images, and the logits they give. Run in the environment that make_decoders.py describes:

  golden/bin/python tools/golden/make_vit.py tests/golden
"""

import pathlib
import sys
import tempfile

import numpy as np
import torch
import transformers
from make_decoders import SCALE, SEED, save
from safetensors.numpy import load_file

CONFIG = transformers.ViTConfig(
  hidden_size=24,
  num_hidden_layers=2,
  num_attention_heads=3,
  intermediate_size=40,
  image_size=12,
  patch_size=4,
  num_channels=2,
  num_labels=7,
)
ROWS = 3


def record() -> dict[str, np.ndarray]:
  """Weights, images (height, width, channels) and logits."""
  torch.manual_seed(SEED)
  model = transformers.ViTForImageClassification(CONFIG).float().eval()
  with torch.no_grad():
    for weight in model.parameters():
      # Scales and biases too must differ from 1 and 0, and from each other.
      noise = torch.randn_like(weight) * 0.2
      weight.copy_(weight + noise if weight.ndim == 1 else weight * SCALE)
    images = torch.randn(ROWS, 2, 12, 12)
    logits = model(images).logits
  with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    weights = load_file(pathlib.Path(folder) / "model.safetensors")
  return weights | {"images": images.permute(0, 2, 3, 1).numpy(), "logits": logits.numpy()}


def main(folder: pathlib.Path) -> None:
  arrays = {name: np.ascontiguousarray(x) for name, x in record().items()}
  save(folder / "vit.npz", arrays)


if __name__ == "__main__":
  main(pathlib.Path(sys.argv[1]))
