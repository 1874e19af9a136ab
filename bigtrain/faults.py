"""What is done about a step whose numbers went wrong: its settings."""

from typing import Literal

from bigtrain.config import Refused, config


@config
class Faults:
  """What happens at a step whose loss or gradient is not finite, or spikes.

  Its update is never applied; the step counts, and the data go on. Whether it is one is decided in
  the compiled step, so that all processes agree; what was found is kept under incidents/.
  """

  # `skip` does no more; `lower_rate` also lowers the learning rate; `roll_back` goes on from an
  # earlier checkpoint with the data behind the fault; `stop` ends the run.
  policy: Literal["skip", "lower_rate", "roll_back", "stop"] = "skip"
  # Robust standard deviations of the last `window` losses, or of the logarithms of gradient norms,
  # that make a spike; None for no judgement by size. Losses that come near zero have long tails.
  spike: float | None = None
  window: int = 64  # Steps that are remembered; before so many there are no spikes.
  patience: int = 8  # Faults in a row after which spikes are the new normal, and NaN ends the run.
  back: int = 0  # Steps before the fault from which `roll_back` goes on, at least.
  factor: float = 0.5  # By which `lower_rate` lowers the learning rate.
  recovery: int = 1000  # Good steps in a row that take one lowering back.
  examine: int = 3  # Faults of one start whose cause is looked for; that compiles other programs.
  # Whether devices prove at the start and before each save that they compute right (self_check.py).
  self_check: bool = True

  def check(self) -> None:
    if self.spike is not None and self.spike <= 0:
      raise Refused(f"faults.spike is {self.spike}; give standard deviations above 0, or None")
    if not 0 < self.factor < 1:
      raise Refused(f"faults.factor is {self.factor}; give a number between 0 and 1")
