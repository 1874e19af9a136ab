"""The field test's harness: a second valid value of every leaf must change what some probe sees.

A probe is a function of an experiment that returns what it would compute or write, as text or
bytes: the jaxpr of a training step, a batch, a schedule of saves. Printing, validating or dumping a
field is no probe. Probes look by tracing where they can; nothing here runs a training step.
"""

import copy
import dataclasses
import hashlib
import re
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import jax
import numpy as np

from bigtrain.config import Refused, configs, join
from bigtrain.experiment import Experiment
from bigtrain.validate import validate

Probe = Callable[[Experiment], str | bytes]


@dataclasses.dataclass(frozen=True)
class Leaf:
  """A field that holds a value, not configs."""

  path: str
  owner: type
  name: str
  kind: Any  # Its annotation.
  key: tuple  # Leaves of several experiments with one key need one look.

  @property
  def field(self) -> str:
    return f"{self.owner.__name__}.{self.name}"


def leaves(experiment: Experiment) -> Iterator[Leaf]:
  """Every leaf; a None that could be a config is one too."""
  for path, node in configs(experiment):
    kinds = get_type_hints(type(node))
    values = {f.name: getattr(node, f.name) for f in dataclasses.fields(node)}
    # Which branch of the code runs depends on these neighbours.
    branch = tuple((n, v) for n, v in values.items() if v is None or isinstance(v, str | bool))
    for name, value in values.items():
      if not any(True for _ in configs(value)):
        place = re.sub(r"\.\d+", "", join(path, name))
        others = tuple(pair for pair in branch if pair[0] != name)
        yield Leaf(join(path, name), type(node), name, kinds[name], (place, type(node), others))


def second_values(value: Any, kind: Any) -> Iterator[Any]:
  """Values other than `value` that the annotation allows, likelier ones first."""
  origin, args = get_origin(kind), get_args(kind)
  if origin in (Union, types.UnionType):
    for arg in args:
      if arg is type(None) and value is not None:
        yield None
      elif value is None or _is_of(value, arg):
        yield from second_values(value, arg)
  elif origin is Literal:
    yield from (arg for arg in args if arg != value)
  elif origin is tuple:
    yield from _tuples(value, args)
  elif kind is bool:
    yield not value
  elif kind is int:
    yield from dict.fromkeys(n for n in _ints(value) if n != value)
  elif kind is float:
    yield from dict.fromkeys(x for x in _floats(value) if x != value)
  elif kind is str:
    yield f"{value or ''}x"
  elif dataclasses.is_dataclass(kind) and value is None:
    required = (f.default is f.default_factory for f in dataclasses.fields(kind))
    if not any(required):
      yield kind()


def _ints(value: int | None) -> tuple[int, ...]:
  if value is None:
    return (1, 2, 4, 8)
  return (value * 2, value + 1, value // 2, value - 1, 1, 2, 3, 0)


def _floats(value: float | None) -> tuple[float, ...]:
  return (0.5, 1.5, 0.1) if value is None else (value * 2, value / 2, 0.25, 0.5, 1.5, 0.0)


def _tuples(value: tuple | None, args: tuple) -> Iterator[tuple]:
  value = value or ()
  if args[-1:] != (...,):
    for i, (item, arg) in enumerate(zip(value, args, strict=True)):
      for other in second_values(item, arg):
        yield (*value[:i], other, *value[i + 1 :])
  elif value:
    for other in second_values(value[-1], args[0]):
      yield (*value[:-1], other)
    yield value[:-1]
  elif args[0] is str:
    yield ("x",)
  elif args[0] in (int, float):
    yield (args[0](1),)
  elif get_origin(args[0]) is Literal:
    yield from ((arg,) for arg in get_args(args[0]))
  elif get_origin(args[0]) is tuple and set(get_args(args[0])) == {int}:
    yield ((1,) * len(get_args(args[0])),)


def _is_of(value: Any, kind: Any) -> bool:
  if get_origin(kind) is Literal:
    return value in get_args(kind)
  kind = get_origin(kind) or kind
  return type(value) in ((int, float) if kind is float else (kind,))


def changed(experiment: Experiment, path: str, value: Any) -> Experiment:
  """A copy of the experiment with another value at `path`."""

  def put(node: Any, names: list[str]) -> Any:
    if not names:
      return value
    if isinstance(node, tuple):
      i = int(names[0])
      return (*node[:i], put(node[i], names[1:]), *node[i + 1 :])
    setattr(node, names[0], put(getattr(node, names[0]), names[1:]))
    return node

  return put(copy.deepcopy(experiment), path.split("."))


def second_experiments(
  experiment: Experiment, leaf: Leaf, values: Mapping[str, tuple], devices: int
) -> Iterator[tuple[Any, Experiment]]:
  """(value, experiment) for each valid second value of the leaf.

  One of `values` may be valid only beside a change of another field, as with the classes of model
  and data: the probes look at each of these alone.
  """
  node: Any = experiment
  for name in leaf.path.split("."):
    node = node[int(name)] if isinstance(node, tuple) else getattr(node, name)
  given = values.get(leaf.field, ())
  for value in given or second_values(node, leaf.kind):
    value = value(experiment) if callable(value) else value
    other = changed(experiment, leaf.path, value)
    try:
      validate(other, devices)
    except Refused:
      if not given:
        continue
    if value != node:
      yield value, other


class FieldTest:
  """Looks for fields that no probe sees, over many experiments, at each kind of place once.

  Args:
    probes: by name, cheap ones first.
    values: second values to take, by "Class.field", where the generic ones would not do; each
      may be a function of the experiment.
    exempt: why no probe can see a field, by "Class.field".
    first: the probe to ask first, by the first name of a leaf's path.
    devices: how many the mesh is over.
  """

  def __init__(
    self,
    probes: Mapping[str, Probe],
    values: Mapping[str, tuple] | None = None,
    exempt: Mapping[str, str] | None = None,
    first: Mapping[str, str] | None = None,
    devices: int = 1,
  ):
    self.probes, self.values, self.exempt = probes, values or {}, exempt or {}
    self.first, self.devices = first or {}, devices
    self.seen: set[tuple] = set()
    self.fields: set[str] = set()  # Every "Class.field" that was met.
    self.untried: dict[tuple, str] = {}  # Leaves that had no second valid value in any experiment.

  def dead(self, experiment: Experiment, under: str = "") -> list[str]:
    """A line for each leaf that changes nothing, or that is exempt although it changes something.

    Leaves whose path does not begin with `under` are left out.

    Raises:
      AssertionError: a probe sees a difference between two equal experiments.
    """
    base: dict[str, str | bytes] = {}
    looked = [leaf for leaf in leaves(experiment) if leaf.path.startswith(under)]
    lines = (self._look(experiment, leaf, base) for leaf in looked)
    return [line for line in lines if line is not None]

  def _look(self, experiment: Experiment, leaf: Leaf, base: dict) -> str | None:
    if leaf.key in self.seen:
      return None
    self.fields.add(leaf.field)
    self.untried[leaf.key] = f"{leaf.path} ({leaf.field}): no second value; give one in `values`"
    tried = []
    for value, other in second_experiments(experiment, leaf, self.values, self.devices):
      tried.append(value)
      self.seen.add(leaf.key)
      self.untried.pop(leaf.key, None)
      for name in self._order(leaf):
        if name not in base:
          base[name] = self.probes[name](copy.deepcopy(experiment))
          again = self.probes[name](copy.deepcopy(experiment))
          assert again == base[name], f"the probe {name!r} sees a difference between equals"
        if self.probes[name](copy.deepcopy(other)) != base[name]:
          used = f"{leaf.path}: exempt ({self.exempt.get(leaf.field)}), but {name} sees it"
          return used if leaf.field in self.exempt else None
      if len(tried) == 2:  # One value may by chance be worth what the first one is.
        break
    if leaf.field in self.exempt:
      self.untried.pop(leaf.key, None)
    if leaf.field in self.exempt or not tried:
      return None
    return f"{leaf.path} ({leaf.field}): {tried} changed none of {', '.join(self.probes)}"

  def _order(self, leaf: Leaf) -> list[str]:
    first = self.first.get(leaf.path.split(".")[0])
    return sorted(self.probes, key=lambda name: name != first)


def jaxpr(function: Callable, *args) -> str:
  """What `function` computes, as text: its jaxpr, and a digest of every constant in it."""
  closed = jax.make_jaxpr(function)(*args)
  digest = hashlib.sha256()
  for const in closed.consts:
    if not isinstance(const, jax.core.Tracer):
      digest.update(np.asarray(const).tobytes())
  # A function's address differs between equal programs.
  return re.sub(r" at 0x[0-9a-f]+", "", str(closed)) + digest.hexdigest()


def batch_bytes(batch: dict[str, np.ndarray]) -> bytes:
  """A batch as one value to compare: names, dtypes, shapes and contents."""
  digest = hashlib.sha256()
  for name, x in sorted(batch.items()):
    digest.update(f"{name} {x.dtype} {x.shape}".encode() + np.ascontiguousarray(x).tobytes())
  return digest.digest()
