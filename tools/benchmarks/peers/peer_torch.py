"""The decoder of step_speed.py in PyTorch, compiled: serves steps over stdin and stdout.

It is run by step_speed.py with a Python that has torch. It reads the settings as one line of JSON,
and then, line by line, how many steps to take; it answers each with seconds, CPU seconds and the
loss.

Written as one would write it there: LayerNorm, one product for q, k and v,
scaled_dot_product_attention with its causal flag, GELU (tanh), a tied output table, AdamW fused and
clipped gradients, torch.compile over forward, loss and backward.
"""

import json
import sys
import time

import torch
from torch import nn
from torch.nn import functional


class Block(nn.Module):
  def __init__(self, dim: int, heads: int):
    super().__init__()
    self.heads = heads
    self.attention_norm, self.feed_forward_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
    self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
    self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

  def forward(self, x):
    rows, length, dim = x.shape
    q, k, v = (
      part.view(rows, length, self.heads, -1).transpose(1, 2)
      for part in self.qkv(self.attention_norm(x)).chunk(3, dim=-1)
    )
    y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    x = x + self.out(y.transpose(1, 2).reshape(rows, length, dim))
    hidden = functional.gelu(self.up(self.feed_forward_norm(x)), approximate="tanh")
    return x + self.down(hidden)


class Decoder(nn.Module):
  def __init__(self, c: dict):
    super().__init__()
    dim = c["dim"]
    self.embed, self.position = nn.Embedding(c["vocab"], dim), nn.Embedding(c["length"], dim)
    self.blocks = nn.ModuleList(Block(dim, c["heads"]) for _ in range(c["layers"]))
    self.norm = nn.LayerNorm(dim)
    for table in (self.embed, self.position):
      nn.init.normal_(table.weight, std=0.02)

  def forward(self, tokens, targets):
    x = self.embed(tokens) + self.position.weight
    for block in self.blocks:
      x = block(x)
    logits = self.norm(x) @ self.embed.weight.T
    return functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def main() -> None:
  c = json.loads(sys.stdin.readline())
  torch.manual_seed(0)
  model = Decoder(c)
  forward = torch.compile(model)
  optimizer = torch.optim.AdamW(
    model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True
  )
  tokens = torch.randint(0, c["vocab"], (c["rows"], c["length"] + 1))
  dtype = getattr(torch, c["dtype"])

  def step():
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
      loss = forward(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss

  for line in sys.stdin:
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(int(line)):
      loss = step()
    value = float(loss.detach())
    seconds = time.perf_counter() - wall, time.process_time() - cpu
    print(json.dumps([*seconds, value]), flush=True)


if __name__ == "__main__":
  main()
