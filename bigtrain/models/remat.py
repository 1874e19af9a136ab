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
  for name in offload:
    if remat == "none":
      raise Refused(f"model: offload has {name!r}, but remat='none' keeps all, and nothing by name")
    if name not in (INPUT, *KEPT[remat]):
      kept = ", ".join((INPUT, *KEPT[remat]))
      raise Refused(f"model: offload has {name!r}, but remat={remat!r} keeps {kept} alone")


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
