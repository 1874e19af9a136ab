"""Engines: where the tasks of a preparation run. All of it is datatrove's; chosen by one setting.

A stage is a list of datatrove steps that so many tasks go through; a stage begins when the one
before it is done. A finished task leaves a mark and is never done again.
"""

import os
import pathlib
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from bigtrain.config import Refused, config


class Stage(NamedTuple):
  """A step of the whole work."""

  name: str
  pipeline: list[Any]  # datatrove's steps, or functions of (documents, rank, world_size).
  tasks: int


def marks(out: pathlib.Path, stage: Stage) -> pathlib.Path:
  """Where the marks and logs of a stage are."""
  return out / "work" / "stages" / stage.name


def done(out: pathlib.Path, stage: Stage) -> int:
  """How many tasks of a stage are finished."""
  folder = marks(out, stage) / "completions"
  return len(os.listdir(folder)) if folder.is_dir() else 0


@config
class Local:
  """This machine."""

  workers: int = 0  # Processes at a time; 0 for one a CPU, 1 for none beside the command's own.

  def check(self) -> None:
    if self.workers < 0:
      raise Refused(f"engine.workers is {self.workers}: at least 0")

  def run(self, stages: Sequence[Stage], out: pathlib.Path) -> None:
    """Runs the stages one after another; returns when all is done."""
    import multiprocess
    from datatrove.executor import LocalPipelineExecutor
    from loguru import logger

    class Quiet(LocalPipelineExecutor):
      """Without datatrove's log on the console: an error is raised here anyway."""

      def _run_for_rank(self, rank, local_rank=0, node_rank=-1):
        from loguru import logger  # This process's own.

        logger.disable("datatrove")
        if self.workers > 1:
          _end_with_parent()
        return super()._run_for_rank(rank, local_rank, node_rank)

    os.register_at_fork(after_in_child=_end_with_parent)  # datatrove's manager of queues.
    logger.disable("datatrove")
    # Imported once in the server that all workers of all stages are forked from.
    server = multiprocess.get_context("forkserver")  # pyright: ignore
    server.set_forkserver_preload(["bigtrain.data.prepare.run", "datatrove.executor"])
    workers = self.workers or len(os.sched_getaffinity(0))
    for stage in stages:
      if done(out, stage) < stage.tasks:
        Quiet(
          stage.pipeline,
          tasks=stage.tasks,
          workers=min(workers, stage.tasks),
          logging_dir=str(marks(out, stage)),
        ).run()


@config
class Slurm:
  """Job arrays on a Slurm cluster. The folder must be on a file system that all nodes share.

  The command returns when all is queued; given again it says how far the work is, and queues what
  has failed.
  """

  partition: str
  time: str = "20:00:00"  # Limit of a task.
  workers: int = -1  # Tasks at a time; -1 for any number.
  cpus: int = 1  # Of a task.
  memory_gb: int = 4  # Of a CPU.
  venv: str | None = None  # Of the Python environment on the nodes.

  def run(self, stages: Sequence[Stage], out: pathlib.Path) -> None:
    """Queues what is not done, each stage depending on the one before it."""
    from datatrove.executor import SlurmPipelineExecutor

    before = None
    for stage in stages:
      if done(out, stage) == stage.tasks:
        continue
      before = SlurmPipelineExecutor(
        stage.pipeline,
        tasks=stage.tasks,
        time=self.time,
        partition=self.partition,
        workers=self.workers,
        cpus_per_task=self.cpus,
        mem_per_cpu_gb=self.memory_gb,
        venv_path=self.venv,  # pyright: ignore[reportArgumentType]
        job_name=f"prepare-{stage.name}",
        logging_dir=str(marks(out, stage)),
        slurm_logs_folder=str(marks(out, stage) / "slurm"),
        depends=before,
      )
    if before is not None:
      before.run()


@config
class Ray:
  """The Ray cluster that this process is part of or reaches (RAY_ADDRESS)."""

  workers: int = -1  # Tasks at a time; -1 for any number.
  cpus: int = 1  # Of a task.
  memory_gb: float = 2  # Of a CPU.

  def run(self, stages: Sequence[Stage], out: pathlib.Path) -> None:
    """Runs the stages one after another; returns when all is done."""
    try:
      from datatrove.executor import RayPipelineExecutor
    except ImportError as error:
      raise Refused("engine=Ray needs another package: pip install ray") from error
    for stage in stages:
      if done(out, stage) < stage.tasks:
        RayPipelineExecutor(
          stage.pipeline,
          tasks=stage.tasks,
          workers=self.workers,
          cpus_per_task=self.cpus,
          mem_per_cpu_gb=self.memory_gb,
          logging_dir=str(marks(out, stage)),
        ).run()


class Watch:
  """Tells how many tasks are done, about twice a second, from a thread of its own."""

  def __init__(self, stages: Sequence[Stage], out: pathlib.Path, tell: Callable[[str, int], None]):
    self._stages, self._out, self._tell = stages, out, tell
    self._over = threading.Event()
    self._thread = threading.Thread(target=self._run, daemon=True)

  def __enter__(self) -> "Watch":
    self._thread.start()
    return self

  def __exit__(self, *error) -> None:
    self._over.set()
    self._thread.join()

  def _run(self) -> None:
    while not self._over.wait(0.5):
      counts = [done(self._out, stage) for stage in self._stages]
      now = next((s.name for s, n in zip(self._stages, counts, strict=True) if n < s.tasks), "")
      self._tell(now, sum(counts))


_watched: set[int] = set()  # Processes that end with their parent.


def _end_with_parent() -> None:
  """Ends this process soon after its parent: a killed command must leave nobody at work."""
  if os.getpid() in _watched:
    return
  _watched.add(os.getpid())
  parent = os.getppid()

  def watch() -> None:
    while os.getppid() == parent:
      time.sleep(0.2)
    os._exit(1)

  threading.Thread(target=watch, daemon=True).start()
