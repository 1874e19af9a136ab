"""Work beside training, in a thread."""

import threading
import time
from collections.abc import Callable


class Background(threading.Thread):
  """Work that has so many seconds; a process that ends does not wait for it."""

  def __init__(self, work: Callable[[], None], within: float):
    super().__init__(daemon=True)
    self._work, self._until, self._within = work, time.monotonic() + within, within
    self._error: BaseException | None = None
    self.start()

  def run(self) -> None:
    try:
      self._work()
    except BaseException as error:
      self._error = error

  def is_over(self) -> bool:
    """Whether it has ended, or should have."""
    return not self.is_alive() or time.monotonic() > self._until

  def result(self) -> None:
    self.join(max(self._until - time.monotonic(), 0))
    if self.is_alive():
      raise TimeoutError(f"it was not durable and verified in {self._within:.0f} s")
    if self._error is not None:
      raise self._error
