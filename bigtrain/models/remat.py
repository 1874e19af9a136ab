"""What the forward pass keeps for the backward pass, and where it waits.

Layers give names to what is worth keeping (`jax.ad_checkpoint.checkpoint_name`); all else is
computed again. What is kept may wait in the memory of the host: it is sent there behind what is
computed next, and is back when its layer's backward pass begins.
"""

from collections.abc import Callable, Collection
from typing import Literal, get_args

import jax

from bigtrain.config import Refused

Remat = Literal["none", "full", "attention", "qkv", "products"]
Name = Literal["input", "q", "k", "v", "attention", "residual", "received", "up", "gate"]
INPUT = "input"  # Of a block; it is kept by every policy.
OF_ALL: tuple[Name, ...] = (INPUT, "q", "k", "v", "attention", "residual")  # What every block has.
KEPT: dict[str, tuple[Name, ...]] = {
  "full": (),  # Only the input of each block; all else is computed again.
  "attention": ("attention",),
  "qkv": ("q", "k", "v", "attention"),
  "products": ("q", "k", "v", "attention", "residual", "received", "up", "gate"),
}
assert set(KEPT) | {"none"} == set(get_args(Remat))


def kept(remat: Remat, recompute: tuple[Name, ...]) -> tuple[Name, ...] | None:
  """The names of what is kept besides the input of each block; None where all is."""
  return None if remat == "none" else tuple(n for n in KEPT[remat] if n not in recompute)


def refuse(
  remat: Remat, recompute: tuple[Name, ...], offload: tuple[Name, ...], made: Collection[str]
) -> None:
  """Refuses to compute again, or to send to the host, what is not kept by name, or not `made`."""
  for field, names in (("recompute", recompute), ("offload", offload)):
    for name in names:
      if name not in made:
        raise Refused(
          f"model: {field} has {name!r}, which none of its blocks makes; of what can be kept they "
          f"make {', '.join(n for n in get_args(Name) if n in made)}"
        )
      if remat == "none":
        raise Refused(
          f"model: {field} has {name!r}, but remat='none' keeps all, and nothing by name; "
          f"set remat to {next(kind for kind, kept in KEPT.items() if name in (INPUT, *kept))!r}"
        )
      if name not in KEPT[remat] and (name, field) != (INPUT, "offload"):
        known = ", ".join((*[INPUT] * (field == "offload"), *KEPT[remat]))
        raise Refused(f"model: {field} has {name!r}, but remat={remat!r} keeps {known} alone")
  if both := set(recompute) & set(offload):
    raise Refused(f"model: {min(both)!r} is computed again, so it cannot wait on the host too")


def policy(names: tuple[Name, ...] | None, offload: tuple[Name, ...]) -> Callable[..., bool] | None:
  """For `jax.checkpoint`, of a function that begins by naming its input; None where all is kept."""
  if names is None:
    return None
  policies = jax.checkpoint_policies
  if not offload:
    return policies.save_only_these_names(*names)
  return policies.save_and_offload_only_these_names(
    names_which_can_be_saved=[name for name in names if name not in offload],
    names_which_can_be_offloaded=list(offload),
    offload_src="device",
    offload_dst="pinned_host",
  )
