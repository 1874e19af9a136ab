"""Engines: where the tasks of a preparation run. All of it is datatrove's; chosen by one setting.

A stage is a list of datatrove steps that so many tasks go through; a stage begins when the one
before it is done. A finished task leaves a mark and is never done again.
"""

import functools
import os
import pathlib
import resource
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from bigtrain.config import Refused, config
from bigtrain.data.prepare.files import read_json, write_json


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


def executor(kind: Callable, stage: Stage, out: pathlib.Path, **settings: Any) -> Any:
  """datatrove's executor of that kind for a stage."""
  measuring = functools.partial(_measured, stage.pipeline, str(out), stage.name)
  folder = str(marks(out, stage))
  return kind([measuring], tasks=stage.tasks, logging_dir=folder, **settings)


def _measured(pipeline: list[Any], out: str, name: str, documents: Any, rank: int, tasks: int):
  """A stage's steps as datatrove runs them; writes down what time and memory they took."""
  started = time.perf_counter()
  for step in pipeline:
    documents = step(documents, rank, tasks)
  deque(documents or (), maxlen=0)
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
  spent = {"seconds": time.perf_counter() - started, "peak_bytes": peak}
  write_json(pathlib.Path(out) / "work" / "spent" / name / f"{rank:05}.json", spent)


@config
class Local:
  """This machine."""

  workers: int = 0  # Processes at a time; 0 for one a CPU, 1 for none beside the command's own.

  def check(self) -> None:
    if self.workers < 0:
      raise Refused(f"engine.workers is {self.workers}: at least 0")

  def at_work(self, out: pathlib.Path) -> bool:
    """Whether tasks run although no command waits for them."""
    return False

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
        return super()._run_for_rank(rank, local_rank, node_rank)

    os.register_at_fork(after_in_child=end_with_parent)  # datatrove's manager of queues.
    logger.disable("datatrove")
    server = multiprocess.get_context("forkserver")  # pyright: ignore
    server.set_forkserver_preload(["bigtrain.data.prepare.worker", "datatrove.executor"])
    workers = self.workers or len(os.sched_getaffinity(0))
    for stage in stages:
      if done(out, stage) < stage.tasks:
        executor(Quiet, stage, out, workers=min(workers, stage.tasks)).run()


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
  venv: str | None = None  # The folder of the Python environment on the nodes, with bin/activate.
  options: tuple[tuple[str, str], ...] = ()  # More of sbatch, such as ("account", "project").

  def at_work(self, out: pathlib.Path) -> bool:
    """Whether the jobs that were queued before are still in the queue."""
    if not (jobs := _jobs(out)):
      return False
    # It fails where Slurm remembers none of them.
    queue = _slurm("squeue", "--noheader", f"--jobs={','.join(jobs)}")
    return queue.returncode == 0 and bool(queue.stdout.strip())

  def run(self, stages: Sequence[Stage], out: pathlib.Path) -> None:
    """Queues what is not done, each stage depending on the one before it."""
    from datatrove.executor import SlurmPipelineExecutor
    from loguru import logger

    logger.disable("datatrove")
    todo = [stage for stage in stages if done(out, stage) < stage.tasks]
    before, made = None, []
    for stage in todo:
      before = executor(
        SlurmPipelineExecutor,
        stage,
        out,
        time=self.time,
        partition=self.partition,
        workers=self.workers,
        cpus_per_task=self.cpus,
        mem_per_cpu_gb=self.memory_gb,
        venv_path=f"{self.venv}/bin/activate" if self.venv else None,
        job_name=f"prepare-{stage.name}",
        slurm_logs_folder=str(marks(out, stage) / "slurm"),
        qos="",
        # A stage whose predecessor failed would wait for ever.
        sbatch_args={"kill-on-invalid-dep": "yes"} | dict(self.options),
        depends=before,
      )
      made.append(before)
    try:
      made[-1].run()
    except (OSError, subprocess.CalledProcessError) as error:
      raise Refused(f"Slurm's sbatch did not take the job: {error}") from error
    finally:
      write_json(out / "work" / "slurm.json", [str(job.job_id) for job in made if job.job_id])


def _jobs(out: pathlib.Path) -> list[str]:
  path = out / "work" / "slurm.json"
  return read_json(path) if path.exists() else []


def _slurm(*command: str) -> subprocess.CompletedProcess:
  try:
    return subprocess.run(command, capture_output=True, text=True)
  except OSError as error:
    raise Refused(f"engine=Slurm needs Slurm's commands on this machine: {error}") from error


@config
class Ray:
  """The Ray cluster that this process is part of or reaches (RAY_ADDRESS), else this machine."""

  workers: int = -1  # Tasks at a time; -1 for any number.
  cpus: int = 1  # Of a task.
  memory_gb: float = 2  # Of a CPU.

  def at_work(self, out: pathlib.Path) -> bool:
    """Ray ends the tasks of a command that has ended."""
    return False

  def run(self, stages: Sequence[Stage], out: pathlib.Path) -> None:
    """Runs the stages one after another; returns when all is done."""
    try:
      import ray  # pyright: ignore[reportMissingImports]
      from datatrove.executor import RayPipelineExecutor
      from loguru import logger
    except ImportError as error:
      raise Refused(f"engine=Ray needs another package: pip install ray ({error})") from error
    logger.disable("datatrove")
    if not ray.is_initialized():
      ray.init(log_to_driver=False)
    settings = {"cpus_per_task": self.cpus, "mem_per_cpu_gb": self.memory_gb}
    for stage in stages:
      if done(out, stage) < stage.tasks:
        executor(RayPipelineExecutor, stage, out, workers=self.workers, **settings).run()
      if (n := done(out, stage)) < stage.tasks:  # datatrove only logs it.
        raise OSError(
          f"{stage.tasks - n} of {stage.tasks} tasks of the stage {stage.name} failed; their logs "
          f"are in {marks(out, stage)}/logs"
        )


class Watch:
  """Tells how many tasks are done, twice a second and in the end, from a thread of its own."""

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
    over = False
    while not over:
      over = self._over.wait(0.5)
      counts = [done(self._out, stage) for stage in self._stages]
      now = next((s.name for s, n in zip(self._stages, counts, strict=True) if n < s.tasks), "")
      self._tell(now, sum(counts))


_watched: set[int] = set()  # Processes that end with their parent.


def end_with_parent() -> None:
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
