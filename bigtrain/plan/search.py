"""The best layout: every candidate in closed form, then the compiler's word on the best few.

A candidate divides the chips that the experiment's other axes leave among data, fsdp and tensor,
and chooses a remat policy, a number of microbatches and a batch. Pruned is what cannot divide, what
cannot fit and what cannot be the fastest if closed forms are wrong by `MARGIN` at most. Of what is
left a `few` are compiled, each by a process of its own: those that differ, since a closed form is
wrong about near twins alike.
"""

import copy
import dataclasses
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, get_args

from bigtrain import hints
from bigtrain.config import Refused
from bigtrain.console import say
from bigtrain.experiment import Experiment
from bigtrain.models.remat import KEPT, Remat
from bigtrain.models.transformer import TransformerConfig
from bigtrain.plan.closed import Guess, Sizes, guess
from bigtrain.plan.network import Network
from bigtrain.plan.topologies import Topology
from bigtrain.validate import check_mesh

MARGIN = 1.5  # By how much a closed form may be wrong.
MICROBATCHES = (1, 2, 4, 8, 16, 32)


@dataclasses.dataclass
class Candidate:
  """Some settings of an experiment, and what is known about them."""

  settings: dict[str, Any]  # {flag: value}.
  guess: Guess
  plan: dict[str, Any] | None = None  # What the compiler made of it, once that was asked.

  def line(self) -> str:
    """The overrides to paste."""
    return pasted(self.settings)

  @property
  def rate(self) -> float:
    """Rows a second, which compare at any batch; by the compiler once it was asked."""
    seconds = self.plan["step_seconds"] if self.plan else self.guess.seconds
    return self.settings["batch"] / seconds

  @property
  def fits(self) -> bool:
    if self.plan is None or "step_seconds" not in self.plan:
      return False
    return self.plan["memory"]["peak"] <= self.plan["memory"]["chip"]


@dataclasses.dataclass
class Found:
  """What a search left, in the order to ask the compiler in, and what it dropped, by reason."""

  candidates: list[Candidate]
  dropped: Counter


def candidates(
  e: Experiment, topology: Topology, batches: tuple[int, ...]
) -> Iterator[dict[str, Any]]:
  """The settings that are looked at, whether or not they can be."""
  model: Any = e.model
  fixed = e.mesh.context * e.mesh.expert * e.mesh.pipeline * topology.slices
  chips = topology.chips // fixed
  divisors = [n for n in range(1, chips + 1) if chips % n == 0]
  for batch in batches or (e.batch,):
    for tensor in divisors:
      for data in (n for n in divisors if chips // tensor % n == 0):
        mesh = {"mesh.data": data, "mesh.fsdp": chips // tensor // data, "mesh.tensor": tensor}
        mesh |= {"mesh.slices": topology.slices} if topology.slices > 1 else {}
        for remat in get_args(Remat):
          if any(name not in KEPT.get(remat, ()) for name in model.recompute):
            continue
          for microbatches in MICROBATCHES:
            rest = {"batch": batch, "model.remat": remat, "microbatches": microbatches}
            yield mesh | rest


def pasted(settings: dict[str, Any]) -> str:
  """Settings as the command line takes them."""
  return " ".join(_words(settings))


def _words(settings: dict[str, Any]) -> list[str]:
  return [word for field, value in settings.items() for word in hints.flag(field, value)]


def applied(e: Experiment, settings: dict[str, Any]) -> Experiment:
  """A copy of the experiment with these settings."""
  made = copy.deepcopy(e)
  for flag, value in settings.items():
    *path, name = flag.split(".")
    node = made
    for part in path:
      node = getattr(node, part)
    setattr(node, name, value)
  return made


def prune(e: Experiment, topology: Topology, batches: tuple[int, ...] = ()) -> Found:
  """The candidates that closed forms do not rule out, near twins behind those that differ.

  Raises:
    Refused: there are no closed forms of this model, or nothing can be.
  """
  if not isinstance(e.model, TransformerConfig):
    raise Refused(f"--search knows transformers, not {type(e.model).__name__}; plan without it")
  devices, sizes, dropped, left = topology.devices(), Sizes.of(e), Counter(), []
  networks: dict[Any, Network] = {}
  for settings in candidates(e, topology, batches):
    if not can_be(made := applied(e, settings), topology.chips):
      # It may be the batch of evaluation alone that does not divide.
      settings["evaluation.batch"] = settings["batch"]
      if not can_be(made := applied(e, settings), topology.chips):
        dropped["its sizes do not divide"] += 1
        continue
    if made.mesh not in networks:
      networks[made.mesh] = Network.of(topology, made.mesh.make(devices))
    left.append(Candidate(settings, guess(made, topology, sizes, networks[made.mesh])))
  found = kept(left, topology.chip.hbm, dropped)
  if not found:
    said = ", ".join(f"{n} because {why}" for why, n in dropped.items())
    raise Refused(f"--search: nothing is left of what was looked at ({said}): take more chips")
  return Found(apart(found, topology.chip.hbm), dropped)


def can_be(e: Experiment, chips: int) -> bool:
  """Whether the mesh divides everything that it shards."""
  try:
    check_mesh(e, chips)
  except Refused:
    return False
  return e.batch % e.microbatches == 0


def kept(found: list[Candidate], hbm: float, dropped: Counter) -> list[Candidate]:
  """Those that may be the best one that fits if closed forms are wrong by `MARGIN` at most."""
  room = [c for c in found if c.guess.memory <= MARGIN * hbm]
  dropped["memory would not do"] += len(found) - len(room)
  safe = [c.rate for c in room if c.guess.memory * MARGIN <= hbm]
  fast = [c for c in room if c.rate * MARGIN**2 >= max(safe, default=0.0)]
  dropped[f"another is {MARGIN**2:.2f} times as fast in closed form"] += len(room) - len(fast)
  return sorted(fast, key=lambda c: (c.guess.memory > hbm, -c.rate))


def apart(found: list[Candidate], hbm: float) -> list[Candidate]:
  """The same, first those of a mesh, a remat policy or a batch that none before them has.

  What only has more microbatches, or joins a mesh and a policy that were there, comes behind these,
  as does what should not fit or be the fastest. Either way the order is as it was given.
  """
  seen: set[Any] = set()
  first, behind = [], []
  for c in found:
    mesh = tuple((name, size) for name, size in c.settings.items() if name.startswith("mesh."))
    traits = {mesh, *((k, c.settings[k]) for k in ("model.remat", "batch"))} - seen
    may_be = c.guess.memory <= hbm and c.rate * MARGIN >= found[0].rate
    (first if traits and may_be else behind).append(c)
    seen |= traits if may_be else set()
  return first + behind


def search(
  found: Found, few: int, workers: int, compile: Callable[[Candidate], dict[str, Any]]
) -> list[Candidate]:
  """Has the first `few` compiled. Returns them, those that fit first, then by speed."""

  def ask(candidate: Candidate) -> Candidate:
    candidate.plan = compile(candidate)
    return candidate

  with ThreadPoolExecutor(workers) as pool:
    asked = list(pool.map(ask, found.candidates[:few]))
  return sorted(asked, key=lambda c: (not c.fits, -c.rate if c.fits else 0.0))


def by_process(target: str, arguments: list[str]) -> Callable[[Candidate], dict[str, Any]]:
  """Plans a candidate by this same command in another process; a plan made before is found again.

  `arguments` are those of the user, which the candidate's come after.
  """

  def compile(candidate: Candidate) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", "-m", "bigtrain.cli", "plan", target, *arguments]
    command += _words(candidate.settings)
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, env=os.environ)
    try:
      plan = json.loads(done.stdout)
    except json.JSONDecodeError:  # It was refused, or the compiler failed.
      plan = {"problem": (done.stderr.strip().splitlines() or ["no answer"])[-1]}
    took = plan.get("step_seconds")
    say(f"{candidate.line()}: {f'{took:.4f} s' if took else plan['problem'].splitlines()[0]}")
    return plan

  return compile
