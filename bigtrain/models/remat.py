"""What the forward pass keeps for the backward pass, and where it waits.

Layers give names to what is worth keeping (`jax.ad_checkpoint.checkpoint_name`); all else is
computed again. What is kept may wait in the memory of the host: it is sent there behind what is
computed next, and is back when its layer's backward pass begins.
"""

from collections.abc import Callable
from typing import Literal, get_args

import jax

from bigtrain.config import Refused

Remat = Literal["none", "full", "attention", "qkv", "products"]
Name = Literal["input", "q", "k", "v", "attention", "received", "up", "gate"]
INPUT = "input"  # Of a block; it is kept by every policy.
KEPT: dict[str, tuple[Name, ...]] = {
  "full": (),  # Only the input of each block; all else is computed again.
  "attention": ("attention",),
  "qkv": ("q", "k", "v", "attention"),
  "products": ("q", "k", "v", "attention", "received", "up", "gate"),
}
assert set(KEPT) | {"none"} == set(get_args(Remat))


def refuse(remat: Remat, offload: tuple[Name, ...]) -> None:
  """Refuses to send to the host what is not kept by name."""
  kept = () if remat == "none" else (INPUT, *KEPT[remat])
  for name in offload:
    if name not in kept:
      names = f"{', '.join(kept[:-1])} and {kept[-1]}" if kept[1:] else "input"
      said = f"keeps {names}" if kept else "keeps everything, and nothing by name"
      raise Refused(f"model: offload has {name!r}, but remat={remat!r} {said}")


def policy(remat: Remat, offload: tuple[Name, ...]) -> Callable[..., bool] | None:
  """For `jax.checkpoint`, of a function that begins by naming its input; None where all is kept."""
  if remat == "none":
    return None
  policies = jax.checkpoint_policies
  if not offload:
    return policies.save_only_these_names(*KEPT[remat])
  return policies.save_and_offload_only_these_names(
    names_which_can_be_saved=[name for name in KEPT[remat] if name not in offload],
    names_which_can_be_offloaded=list(offload),
    offload_src="device",
    offload_dst="pinned_host",
  )
