"""Logits of the reference mixtures of experts, kept in tests/golden.

Mixtral and Qwen3-MoE of `transformers` with random weights, tiny and in float32, as those of
make_decoders.py, whose environment and maker this uses:

  golden/bin/python tools/golden/make_mixtral.py tests/golden
"""

import pathlib
import sys
import tempfile

import numpy as np
import torch
import transformers
from make_decoders import GROUPED, SHAPE, record, save
from safetensors.numpy import load_file

MOE = {"num_experts_per_tok": 2, "bos_token_id": None, "eos_token_id": None}
CONFIGS = {
  "mixtral": transformers.MixtralConfig(
    num_local_experts=4,
    rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    **SHAPE,
    **GROUPED,
    **MOE,
  ),
  "qwen3_moe": transformers.Qwen3MoeConfig(
    num_experts=4,
    moe_intermediate_size=40,
    norm_topk_prob=True,
    rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    **SHAPE,
    **GROUPED,
    **MOE,
  ),
}


def published(config, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The same with weights as published files have them: in memory, experts are stacked."""
  model = transformers.AutoModelForCausalLM.from_config(config)
  model.load_state_dict({name: torch.tensor(arrays[name]) for name in model.state_dict()})
  with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    weights = load_file(pathlib.Path(folder) / "model.safetensors")
  return weights | {name: arrays[name] for name in ("tokens", "logits")}


def main(folder: pathlib.Path) -> None:
  for name, config in CONFIGS.items():
    save(folder / f"{name}.npz", published(config, record(config)))


if __name__ == "__main__":
  main(pathlib.Path(sys.argv[1]))
