"""Deadlines: how long each phase of a run may last (phases.py). Who sees to that is watchdog.py."""

from bigtrain.config import Refused, at_least_0, config


@config
class Deadlines:
  """Seconds that a phase may last before the run ends with code 5; 0 for no limit."""

  start: float = 600.0  # Before there is data: imports, devices, a trace of the model.
  data: float = 21_600.0  # Preparing the data.
  initialise: float = 1800.0  # Making the first weights, with their compilation.
  restore: float = 1800.0  # Reading a checkpoint.
  compile: float = 3600.0  # Compiling a step.
  input: float = 600.0  # Waiting for the next batch.
  step: float = 300.0  # A step; or `step_times` of the usual step, if that is longer.
  step_times: float = 20.0  # As many times the median step.
  agree: float = 600.0  # Meeting the other processes.
  save: float = 1800.0  # Saving a checkpoint, and at the end waiting for it to be durable.
  evaluate: float = 1800.0  # Between two batches of an evaluation.
  end: float = 300.0  # From the last word to the end of the process.
  other: float = 1800.0  # Any other phase.
  silence: float = 80.0  # Without a heartbeat; after 100 s jax itself ends all processes.

  def check(self) -> None:
    at_least_0(self, "deadlines")

  def check_save(self, within: float) -> None:
    """Refuses a save that may take longer than the run waits for it at its end."""
    if 0 < self.save < within:
      raise Refused(
        f"checkpoints.within lets a save take {within:g} s, and deadlines.save ends the run after "
        f"{self.save:g}: give --deadlines.save {within:g}, or a smaller --checkpoints.within"
      )


def setting(phase: str) -> str:
  """The field that limits a phase."""
  name = "step" if phase == "loop" else phase
  return name if hasattr(Deadlines, name) else "other"


def limit(deadlines: Deadlines, phase: str, median: float) -> float:
  """The seconds that a phase may last; `median` are those of a step."""
  if phase == "join":  # BIGTRAIN_TIMEOUT limits it.
    return 0
  most = getattr(deadlines, setting(phase))
  if setting(phase) == "step":
    return most and max(most, deadlines.step_times * median)
  return most
