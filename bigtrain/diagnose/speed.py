"""Time that is lost: waiting for batches, compiling, a chip that has too little to do.

All of it is advice: what is learned is the same.
"""

from collections.abc import Iterator

import numpy as np

from bigtrain.diagnose.records import Finding, Records, late

WAITS, COMPILES = 0.2, 0.5  # Shares of the time.
LONG = 60.0  # Seconds of compiling that are worth a word.
MFU_LOW = 0.1
OVER = ("end", "left", "error")


def input_bound(r: Records) -> Iterator[Finding]:
  seconds, waited = (r.train.get(f"{name}_seconds") for name in ("step", "input_wait"))
  if seconds is None or waited is None:
    return
  share = np.nansum(waited) / max(np.nansum(seconds), 1e-9)
  if share > WAITS:
    yield Finding(
      "input-bound",
      f"steps wait for their batch {share:.0%} of the time",
      "Decode and augment less on the host, prepare the data ahead, or give it more cores",
      severity="advice",
      explains=("chip not filled",),
    )


def compile_bound(r: Records) -> Iterator[Finding]:
  starts = [i for i, event in enumerate(r.events) if event["event"] == "start"]
  events = r.events[starts[-1] :] if starts else []
  if not events or events[-1]["event"] not in OVER:  # What it was worth is known at the end.
    return
  whole = events[-1]["time"] - events[0]["time"]
  compiling = sum(event.get("seconds", 0.0) for event in events if event["event"] == "compile")
  if compiling > max(COMPILES * whole, LONG):
    yield Finding(
      "compile-bound",
      f"{compiling:.0f} of {whole:.0f} seconds went to compiling",
      "Scan over layers (a smaller model.unroll), keep batch shapes constant, or train for longer",
      severity="advice",
    )


def chip_not_filled(r: Records) -> Iterator[Finding]:
  mfu = late(r.train["mfu"]) if "mfu" in r.train else np.inf
  if mfu < MFU_LOW:
    yield Finding(
      "chip not filled",
      f"{mfu:.1%} of the chip's peak is used, and the input is not what it waits for",
      "Raise the batch (or lower microbatches), the row length or the width; use bfloat16",
      severity="advice",
    )
