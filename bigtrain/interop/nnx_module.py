"""Anyone's own NNX module, trained as it is: nnx.Linear, nnx.BatchNorm, nnx.Dropout, rngs and all.

Such a module mutates itself and knows nothing of meshes. It is kept taken apart: its structure is
static, its `nnx.Param` leaves are the model's parameters, and its other variables (running means)
its variables. For a batch it is put together, called, and taken apart again, on automatic mesh
axes. Its random streams are no state: each call makes them anew from the key of the step.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from bigtrain import sharding
from bigtrain.config import Refused, config
from bigtrain.experiment import ModelConfig, ObjectiveConfig
from bigtrain.objectives.classification import Classification
from bigtrain.objectives.output import Output
from bigtrain.state import partition

# Folding in a small number gives a key that an objective may have split off.
STREAMS, AGAIN = 2**32 - 1, 2**32 - 2


class NNXModule(ModelConfig):
  """The base of a config whose fields are the arguments of someone's module."""

  __slots__ = ()

  @abc.abstractmethod
  def module(self, rngs: nnx.Rngs) -> nnx.Module:
    """The module, fresh; it is called with the inputs of a batch alone."""

  def check_objective(self, objective: ObjectiveConfig) -> None:
    if not isinstance(objective, WithNNXModule):
      raise Refused(
        f"{type(self).__name__} is an NNXModule, which another objective trains by way of "
        f"WithNNXModule: write objective=WithNNXModule(objective={type(objective).__name__}(...))"
      )

  def classes_of(self, shape: tuple[int, ...]) -> int | None:
    """The last dim of what it gives, if that is one array; nothing is computed."""

    def call():
      module = self.module(nnx.Rngs(0))
      module.eval()
      return module(jnp.zeros((1, *shape)))

    try:
      found = jax.eval_shape(call)
    except (TypeError, ValueError) as error:
      said = str(error).strip().split("\n")[0]
      raise Refused(f"the module cannot take inputs of shape {(1, *shape)}: {said}") from error
    return found.shape[-1] if isinstance(found, jax.ShapeDtypeStruct) and found.ndim else None

  def make(self, key: jax.Array) -> "Apart":
    return Apart(lambda key: self.module(nnx.Rngs(key)), key)


class Apart(nnx.Module):
  """A module taken apart: each parameter is laid over fsdp by its largest dim that divides."""

  def __init__(self, module: Callable[[jax.Array], nnx.Module], key: jax.Array):
    self.structure, self.streams, *_ = _split(nnx.eval_shape(lambda: module(key)))
    parameters, variables = _by_itself(lambda key: _split(module(key))[2:], key)
    self.parameters = nnx.data(jax.tree.map(sharding.spread, parameters))
    self.variables = nnx.data(variables)

  def __call__(self, *inputs) -> Any:
    """What the module returns in evaluation."""
    return Live(self, None)(*map(jnp.asarray, inputs))


class Live:
  """The module during one batch; an objective may call it, or ask it for `logits`."""

  def __init__(self, apart: Apart, key: jax.Array | None):
    self.apart, self.key, self.variables = apart, key, apart.variables

  def logits(self, inputs: jax.Array, key: jax.Array | None) -> jax.Array:
    return self(inputs)

  def __call__(self, *inputs) -> Any:
    apart, train = self.apart, self.key is not None
    key = self.key if self.key is not None else jax.random.key(0)
    if self.key is not None:
      self.key = jax.random.fold_in(self.key, AGAIN)  # A second call draws other numbers.

    def call(parameters, variables, key, *inputs):
      streams = _streams(apart.streams, key)
      module = nnx.merge(apart.structure, streams, parameters, variables, copy=True)
      module.train() if train else module.eval()
      out = module(*inputs)
      return out, _split(module)[3]

    auto: Any = jax.sharding.auto_axes(call)
    place = (sharding.act("B"), sharding.act(""))  # Outputs by row; variables on every device.
    out, self.variables = auto(apart.parameters, self.variables, key, *inputs, out_sharding=place)
    return out


@config
class WithNNXModule(ObjectiveConfig):
  """Another objective, whose model is an NNXModule's."""

  takes: ClassVar[str] = "a config of your own that is an NNXModule"

  objective: ObjectiveConfig = Classification()

  def __call__(self, model: Any, batch: dict[str, jax.Array], key: jax.Array | None) -> Output:
    live: Any = Live(model, key)  # It stands for a module.
    output = self.objective(live, batch, key)
    after = jax.tree.unflatten(
      jax.tree.structure(partition(model)[1]), jax.tree.leaves(live.variables)
    )
    return dataclasses.replace(output, variables=after)

  def derived(self, means: dict[str, float]) -> dict[str, float]:
    return self.objective.derived(means)


def _split(module: nnx.Module) -> tuple[Any, tuple, nnx.State, nnx.State]:
  """Structure, random streams (their paths and tags), parameters and other variables."""
  structure, streams, parameters, variables = nnx.split(module, nnx.RngState, nnx.Param, ...)
  flat = nnx.to_flat_state(streams)
  return structure, tuple((path, type(v), v.tag) for path, v in flat), parameters, variables


def _by_itself(make: Callable[[jax.Array], Any], key: jax.Array) -> Any:
  """`make(key)`, compiled apart from what follows it: the same bits on any mesh.

  Fused with the slicing of its result, a product and a sum may be rounded once in place of twice,
  as it happens with truncated normal numbers on CPU. A branch is compiled by itself, as long as
  the compiler does not know that it is always taken; an optimization barrier is not enough.
  """
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(make, key))
  return jax.lax.cond(jax.random.uniform(key) < 2, make, lambda _: zeros, key)


def _streams(streams: tuple, key: jax.Array) -> nnx.State:
  """Random streams as at their beginning, each with a key of its own."""
  flat, key = [], jax.random.fold_in(key, STREAMS)
  for i, (path, kind, tag) in enumerate(streams):
    count = kind is nnx.RngCount
    value = jnp.zeros((), jnp.uint32) if count else jax.random.fold_in(key, i)
    flat.append((path, kind(value, tag=tag)))
  return nnx.from_flat_state(flat)
