"""Before the first compilation: can these processes, together, run at all?

A fault that shows on one host after an hour of start-up, or as a hang of all the others, is found
here in a second, and all processes are told of it with the host's name. What only the launching
machine can ask, whether the step fits the chips, is in launch/fits.py.
"""

import contextlib
import os
import platform
import secrets
import socket
import statistics
import sys
import sysconfig
import time
import zlib
from importlib import metadata
from pathlib import Path

import jax
from etils import epath

from bigtrain import files, processes
from bigtrain.config import FILE_MODULE, Refused, listed
from bigtrain.launch.job import DEVICES, LAUNCH
from bigtrain.lines import add_event, read_events
from bigtrain.processes import called, differences, gather, together
from bigtrain.run_directory import PACKAGES, PASSING

# Besides what a run records: what compiles, and what saves.
FURTHER = ("libtpu", "jax-cuda13-plugin", "tensorstore", "ml-dtypes", "tokamax")
FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")  # Programs that differ by these wait for each other.
SKEW = 1.0  # Seconds between clocks that are worth a word; nothing computed depends on them.


def check_devices(begun: bool = False) -> None:
  """Meets all processes, if they were launched with chips, before anything is laid over these.

  Args:
    begun: the run began on other devices and may go on with these, whatever was launched.

  Raises:
    Refused: on all processes, where jax found other devices than the job was described to have.
  """
  if not (meant := os.environ.get(DEVICES)):
    return
  platform, _, count = meant.partition(" ")
  if not count.isdecimal():
    raise Refused(f"{DEVICES} is {meant!r}; give a platform and how many devices, as in 'gpu 16'")
  here = f"{jax.local_device_count()} {jax.local_devices()[0].platform}"
  own = {"facts": {"devices": here}, "begun": begun}
  told = gather({"host": socket.gethostname()} | own)
  found = [each["facts"]["devices"].split() for each in told]
  as_meant = {name for _, name in found} == {platform}
  if told[0]["begun"] or (as_meant and sum(int(n) for n, _ in found) == int(count)):
    return
  raise Refused(
    f"the job was launched to have {count} {platform} devices, and jax found: "
    f"{_versions('devices', told)}; where they are fewer, see whether the driver shows all to a "
    "process there, and what CUDA_VISIBLE_DEVICES and JAX_LOCAL_DEVICE_IDS say; where they are "
    f"cpu, install jax for {platform} and see JAX_PLATFORMS; or launch with the --chips, --slices "
    "and --hosts that are there"
  )


def check(run_dir: epath.Path) -> list[str]:
  """Meets all processes, where there are several; counts the starts of a launch.

  Returns:
    Remarks for people.

  Raises:
    Refused: on all processes, where hosts have different packages or code, or one of them cannot
      write the run directory, or too many starts in a row made no progress.
    OSError: on all of them, where one cannot see it, or not write it just now.
  """
  with together("the run directory"):
    if processes.is_first():
      _count(run_dir)
  if jax.process_count() == 1:
    return []
  nonce = secrets.token_hex(8)  # The first one's is that of all.
  own = {"facts": installed(), "code": _own_code(), "nonce": nonce}
  told = gather({"host": socket.gethostname()} | own)
  times = gather(time.time())  # On all of them as soon as the last had told.
  # What only some have loaded, as a debugger, is no other version of anything.
  everywhere = set.intersection(*(set(each["code"]) for each in told))
  for each in told:
    each["facts"] |= {name: each["code"][name] for name in sorted(everywhere)}
  if differ := differences(told):
    lines = [f"  {name}: {_versions(name, told)}" for name in differ]
    raise Refused("\n".join(["the hosts differ; have the same on all of them:", *lines]))
  # A start that is killed here leaves what the run directory knows to be nothing (_foreign).
  probe = run_dir / f"preflight-{told[0]['nonce']}.unfinished"
  try:
    with together("the run directory"):
      if processes.is_first():
        _write(probe)
    with together("the run directory"):
      if not processes.is_first():
        _see(probe)
  finally:
    if processes.is_first():
      with contextlib.suppress(OSError):
        probe.unlink(missing_ok=True)
  middle = statistics.median_low(times)
  return [
    f"the clock of {called(i, told[i]['host'])} is {abs(t - middle):.1f} s "
    f"{'ahead of' if t > middle else 'behind'} that of most"
    for i, t in enumerate(times)
    if abs(t - middle) > SKEW
  ]


def installed() -> dict[str, str]:
  """What has to be the same everywhere, by name."""
  found = {}
  for name in (*PACKAGES, *FURTHER):
    with contextlib.suppress(metadata.PackageNotFoundError):
      found[name] = metadata.version(name)
  found["python"] = ".".join(platform.python_version_tuple()[:2])
  found["bigtrain's code"] = f"{_code():08x}"
  for name in FLAGS:
    # Where a dump goes may well depend on the host.
    words = [w for w in os.environ.get(name, "").split() if not w.startswith("--xla_dump")]
    found[name] = " ".join(sorted(words))
  return found


def _code() -> int:
  """A digest of the package's own files: a checkout may be newer than its version says."""
  folder, digest = Path(__file__).parent, 0
  for path in sorted(folder.rglob("*.py")):
    digest = zlib.crc32(path.relative_to(folder).as_posix().encode() + path.read_bytes(), digest)
  return digest


def _own_code() -> dict[str, str]:
  """Of what was loaded beside bigtrain and installed packages: by module, its file and a digest.

  The experiment's file is one name, whatever it is called. What a config says of a function or a
  class is where it is, and not what it does.
  """
  found: dict[str, list[str]] = {}
  for name, module in list(sys.modules.items()):
    file = Path(str(getattr(module, "__file__", "")))
    if file.suffix == ".py" and not _is_installed(file) and file.is_file():
      known = "the experiment's file" if name.startswith(FILE_MODULE) else f"module {name}"
      found.setdefault(known, []).append(f"{file.name} {zlib.crc32(file.read_bytes()):08x}")
  return {name: ", ".join(sorted(files)) for name, files in found.items()}


def _is_installed(file: Path) -> bool:
  """Whether a file belongs to Python, to a package, or to bigtrain, whose code _code() tells."""
  if {"site-packages", "dist-packages"} & set(file.parts):
    return True
  kept = ("stdlib", "platstdlib", "purelib", "platlib", "scripts")
  folders = [*(sysconfig.get_path(name) for name in kept), os.path.dirname(__file__)]
  return str(file).startswith(tuple(f"{folder}{os.sep}" for folder in folders))


def _count(run_dir: epath.Path) -> None:
  """Records a start of a launch; refuses one too many that goes on from no newer checkpoint."""
  if not (said := os.environ.get(LAUNCH)):
    return
  launch, restarts = said.split()
  with contextlib.suppress(OSError):  # A directory that cannot be written is refused elsewhere.
    saved = (path.name for path in (run_dir / "checkpoints").glob("*"))
    newest = max((int(name) for name in saved if name.isdecimal()), default=0)
    starts = [e for e in read_events(run_dir / "events.jsonl") if e.get("launch") == launch]
    in_vain = sum((start.get("step") or 0) >= newest for start in starts)
    if in_vain > int(restarts):
      raise Refused(
        f"{in_vain} starts in a row went on from step {newest} and saved nothing newer "
        f"(--restarts {restarts}): mend what {run_dir / 'events.jsonl'} and the logs tell, then "
        "launch it again"
      )
    add_event(run_dir, "launched", launch=launch, step=newest)


def _versions(name: str, told: list[dict]) -> str:
  """`0.10.2 on a, b; 0.12.0 on c`, the rarest last."""
  values = [each["facts"].get(name) for each in told]
  groups = sorted(dict.fromkeys(values), key=values.count, reverse=True)
  where = {v: [t["host"] for x, t in zip(values, told, strict=True) if x == v] for v in groups}
  return "; ".join(f"{v or 'none'} on {listed(hosts)}" for v, hosts in where.items())


def _see(probe: epath.Path) -> None:
  """Finds the first process's file, and writes one: checkpoints are written by all processes."""
  until = time.monotonic() + files.VISIBLE
  while not probe.exists():
    if time.monotonic() > until:
      # No refusal: a file system that is late today may not be when all are started again.
      raise OSError(
        f"{probe.parent} is not what the first process sees there; name a folder that all hosts "
        "share, or a bucket"
      )
    time.sleep(0.5)
  own = probe.with_name(f"{probe.stem}-{jax.process_index()}.unfinished")
  _write(own)
  own.unlink()


def _write(path: epath.Path) -> None:
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("")
  except OSError as error:
    if error.errno in PASSING:
      raise
    raise Refused(f"{path.parent} cannot be written: {error.strerror or error}") from error
