"""The report of runs whose records are made by hand: what it shows, and what it never does."""

import html.parser
import json
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bigtrain import cli
from bigtrain.config import Refused
from bigtrain.exit_codes import Exit
from bigtrain.report.command import report
from bigtrain.report.elements import Html, el, number, span
from bigtrain.report.records import names, read
from bigtrain.run_directory import RunDirectory
from tests import toys

pytest.importorskip("matplotlib")

HOSTILE = "<script>alert('x')</script>\"><img src=x onerror=alert(1)> $\\frac{ &amp; <!-- ]]>"
ELEMENTS = {
  *("html", "head", "meta", "title", "style", "body", "header", "section", "footer", "nav", "div"),
  *("h1", "h2", "h3", "a", "p", "b", "i", "small", "span", "code", "pre", "details", "summary"),
  *("figure", "figcaption", "table", "thead", "tbody", "tr", "th", "td", "img"),
  *("svg", "g", "defs", "path", "use", "rect", "text", "line", "image", "clippath"),
}


class Parsed(html.parser.HTMLParser):
  """A page as a browser takes it: its elements, its attributes and its text."""

  def __init__(self, page: str):
    super().__init__()
    self.elements: set[str] = set()
    self.attributes: list[tuple[str, str | None]] = []
    self.text = ""
    self.open: list[str] = []
    self.feed(page)

  def handle_starttag(self, tag, attrs):
    self.elements.add(tag)
    self.attributes += attrs
    if tag not in ("meta", "img"):
      self.open.append(tag)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    if self.open and self.open[-1] != "style":
      self.text += data


def write(path: Path, *, steps: int = 60, rate: float = 0.01, layer: str = "stack.0.up_DF") -> Path:
  """A run with rows, evaluations, layers and events, that was killed once and went on."""
  directory = RunDirectory(path)
  experiment = toys.experiment(steps=steps)
  experiment.optimizer.lr = rate
  directory.begin(experiment, None, allow_changes=False)
  directory.close()
  rows, at = [], 1_700_000_000.0
  for step in range(1, steps + 1):
    values = {"loss": 5 / step**0.3, "gradient_norm": 1 + 1 / step, "learning_rate": rate}
    values |= {"step_seconds": 1.0, "input_wait_seconds": 0.1, "tokens_per_second": 1000.0 + step}
    rows.append({"step": step, "kind": "train", "time": at + 20 + step} | values)
    if step % 20 == 0:
      rows.append({"step": step, "kind": "eval", "eval/validation/loss": 5.5 / step**0.3})
      of = {f"gradient/{layer}": 1e-3, f"update/{layer}": 1e-5, f"parameter/{layer}": 0.1}
      rows.append({"step": step, "kind": "layers"} | of)
  events = [
    {"time": at, "event": "start", "processes": 2, "devices": 8, "seconds": 1.0},
    {"time": at + 10, "event": "initialise", "seconds": 5.0},
    {"time": at + 20, "event": "compile", "seconds": 10.0},
    {"time": at + 50, "event": "text", "step": 30, "prompt": "It was", "text": " a truth"},
    {"time": at + 80, "event": "save", "step": steps, "seconds": 0.1},
    {"time": at + 81, "event": "end"},
  ]
  (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  (path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
  return path


def add(path: Path, **event) -> None:
  with (path / "events.jsonl").open("a") as file:
    file.write(json.dumps({"time": 1_700_000_081.0} | event) + "\n")


def incident(path: Path, step: int, **about) -> Path:
  folder = path / "incidents" / f"{step:08}"
  folder.mkdir(parents=True)
  about = {"step": step, "kind": "spike", "cause": "data", "loss": 9.75} | about
  (folder / "incident.json").write_text(json.dumps(about))
  return folder


def page(*runs: Path) -> str:
  return Path(report([str(run) for run in runs], str(runs[0] / "out.html"))).read_text()


def test_a_run_is_reported_from_its_records_alone(tmp_path):
  """With its experiment's file, which is not run, and none of its data or weights."""
  run = write(tmp_path / "run")
  (run / "experiment.py").write_text("raise SystemExit('it was run')")
  assert report([str(run)]) == run / "report.html"
  parsed = Parsed((run / "report.html").read_text())
  assert not parsed.open  # Every element ends where it should.
  for said in ("60/60", "1.464", "1.61", "It was a truth", "8 in 2 processes", "Goodput", "done"):
    assert said in parsed.text, said
  for title in ("Training", "Optimizer", "Speed", "Time", "Layers", "Samples", "Data", "Config"):
    assert title in parsed.text
  assert "Gradients by layer" in parsed.text and "up_DF" in parsed.text


def test_text_of_data_and_names_is_text_wherever_it_comes_from(tmp_path):
  run = write(tmp_path / "<b>run&", layer=f"stack.0.{HOSTILE}")
  tree = json.loads((run / "config.json").read_text())
  tree["data"]["files"] = [HOSTILE]
  tree[HOSTILE] = HOSTILE
  (run / "config.json").write_text(json.dumps(tree))
  (run / "environment.json").write_text(json.dumps({"command": ["x", HOSTILE], HOSTILE: HOSTILE}))
  (run / "data.json").write_text(json.dumps({"digest": HOSTILE}))
  add(run, event="text", step=7, prompt=HOSTILE, text=HOSTILE)
  add(run, event="kept_out", found=HOSTILE)
  add(run, event="rollback", step=9, to=3, why=HOSTILE)
  add(run, event="hang", phase=HOSTILE, seconds=1.0, missing=[HOSTILE])
  add(run, event="error", error=HOSTILE)
  about = {"first_bad": HOSTILE, "layers": {HOSTILE: 1.0}, HOSTILE: HOSTILE, "kind": HOSTILE}
  (incident(run, 7, **about) / "batch.txt").write_text(HOSTILE)
  (run / "hangs").mkdir()
  (run / "hangs" / "<i>.txt").write_text(HOSTILE)
  made = page(run, write(tmp_path / "other"))
  parsed = Parsed(made)
  assert parsed.text.count(HOSTILE) > 12 and "<b>run&" in parsed.text
  check_is_harmless(parsed, made)


def check_is_harmless(parsed: Parsed, made: str) -> None:
  """It runs nothing and asks for nothing, also where a browser knew no policy."""
  assert not parsed.open and parsed.elements <= ELEMENTS, parsed.elements - ELEMENTS
  for name, value in parsed.attributes:
    assert not name.startswith("on")
    if name in ("href", "xlink:href", "src"):
      assert re.match(r"#|data:image/png;base64,", value or ""), value
    if name == "style":
      assert "url(" not in (value or "").replace("url(#", "")
  (policy,) = [v for n, v in parsed.attributes if n == "content" and "default-src" in (v or "")]
  assert "default-src 'none'" in str(policy) and "script" not in str(policy)
  addresses = set(re.findall(r"https?://[\w./]+", re.sub(r'xmlns(:\w+)?="[^"]*"', "", made)))
  assert not addresses


def test_secrets_do_not_show(tmp_path, monkeypatch):
  token, value = "hf_" + "aB3dE5fG7hJ9kL1mN3pQ5rS7", "correct-horse"
  monkeypatch.setenv("STORE_PASSWORD", value)
  run = write(tmp_path / "run")
  tree = json.loads((run / "config.json").read_text())
  tree["data"] |= {"files": [f"https://me:{value}@host/x"], "api_key": "x1y2"}
  (run / "config.json").write_text(json.dumps(tree))
  (run / "environment.json").write_text(json.dumps({"command": ["train", "--token", token]}))
  add(run, event="error", error=f"denied: {token}")
  add(run, event="text", step=8, prompt="", text=token)
  (incident(run, 7, first_bad=token) / "batch.txt").write_text(f"key {token}")
  made = page(run)
  assert token not in made and value not in made and "x1y2" not in made and "[hidden]" in made


def test_several_runs_stand_beside_each_other_with_what_differs(tmp_path):
  made = page(write(tmp_path / "a"), write(tmp_path / "b", rate=0.02, steps=80))
  parsed = Parsed(made)
  section = made[made.index('id="differences"') : made.index('id="training"')]
  assert re.findall(r'data-title="Field">([^<]*)<', section) == ["optimizer.lr", "steps"]
  for said in ("0.01", "0.02", "60", "80"):
    assert f">{said}<" in section
  check_is_harmless(parsed, made)


def test_runs_of_one_name_are_told_apart(tmp_path):
  runs = [read(write(tmp_path / folder / "run")) for folder in ("a", "b")]
  assert names(runs) == ["a/run", "b/run"]
  assert names([runs[0], runs[0]]) == ["run (1)", "run (2)"]


def test_incidents_show_their_batches(tmp_path):
  run = write(tmp_path / "run")
  folder = incident(run, 7)
  Image.fromarray(np.zeros((4, 4), np.uint8)).save(folder / "batch-00.png")
  (folder / "batch-01.png").write_text("<svg onload=alert(1)>")
  (folder / "batch.txt").write_text("a document, " * 1000)
  made = page(run)
  parsed = Parsed(made)
  images = [v for n, v in parsed.attributes if n == "src"]
  assert len(images) == 1 and str(images[0]).startswith("data:image/png;base64,")
  assert "Step 7: spike" in parsed.text and "9.75" in parsed.text
  assert 300 < parsed.text.count("a document, ") < 400 and "…" in parsed.text


@pytest.mark.parametrize(
  ("name", "content"),
  [
    ("metrics.jsonl", ""),
    ("metrics.jsonl", '{"step": "x", "kind": "train"}\n[1]\n3\n{"step": 1, "kind": "train"}\n{"s'),
    ("metrics.jsonl", '{"step": 1, "kind": "train", "loss": null, "gradient_norm": "high"}\n'),
    ("metrics.jsonl", '{"step": 1, "kind": "layers", "gradient/x": null, "gradient/y": -1}\n'),
    ("events.jsonl", ""),
    ("events.jsonl", '{"event": 3}\n{"event": "start"}\n{"time": "now", "event": "start"}\n[]\n'),
    ("events.jsonl", '{"time": 1e400, "event": "end"}\n{"time": 5, "event": "start"}\n'),
    ("events.jsonl", '{"time": 5, "event": "save", "step": [1]}\n{"time": 6, "event": "text"}\n'),
    ("events.jsonl", '{"time": 5, "event": "start"}\n{"time": 4, "event": "end", "seconds": 9}\n'),
    ("metrics.jsonl", '{"step": 1, "kind": "train", "gradient_norm": 1.7e308, "loss": -1.7e308}\n'),
    ("metrics.jsonl", f'{{"step": 1{"0" * 30}, "kind": "train", "loss": 1}}\n'),
    ("metrics.jsonl", f'{{"step": 1, "kind": "train", "loss": 1{"0" * 400}}}\n'),
    ("metrics.jsonl", r'{"step": 1, "kind": "layers", "gradient/\ud800": 1.0}'),
    ("events.jsonl", '{"time": 1e18, "event": "start"}\n{"time": 5, "event": "start"}\n'),
    ("events.jsonl", '{"time": 5, "event": "start"}\n{"time": 6, "event": "rollback"}\n'),
    (
      "events.jsonl",
      '{"time": 5, "event": "hang", "phase": [1]}\n'
      '{"time": 5, "event": "straggler", "process": [1]}\n'
      '{"time": 5, "event": "incident", "cause": [1]}\n',
    ),
    ("events.jsonl", r'{"time": 5, "event": "text", "prompt": "\ud800", "text": "\udfff"}'),
    ("config.json", r'{"steps": 3, "\udc00": "\udcff"}'),
    ("config.json", '{"data": {"class": "x:PreparedText", "path": "gs://nobodys-bucket/x"}}'),
    ("config.json", '{"data": {"class": "x:PreparedText", "path": "s3://nobodys-bucket/x"}}'),
    ("config.json", "{"),
    ("config.json", '["x"]'),
    ("config.json", '{"class": 3, "steps": [], "data": {"class": "x:PreparedText", "path": 5}}'),
    ("environment.json", '{"command": "x", "packages": [], "devices": 3}'),
    ("data.json", "null"),
  ],
)
def test_records_that_are_not_what_they_should_be_leave_a_report(name, content, tmp_path):
  run = write(tmp_path / "run")
  (run / name).write_text(content)
  bad = {"step": "x", "kind": 3, "layers": [1], "examples": None}
  (incident(run, 7) / "incident.json").write_text(json.dumps(bad))
  (incident(run, 8) / "incident.json").write_text("[]")
  deep = '{"kind": ' * 800 + r'"\ud800"' + "}" * 800
  (incident(run, 9) / "incident.json").write_text(deep)
  odd = '{"kind": "\\ud800", "step": 1%s}' % ("0" * 400)
  (incident(run, 10) / "incident.json").write_text(odd)
  parsed = Parsed(page(run))
  assert not parsed.open and "Incidents" in parsed.text


def test_names_that_are_no_text_leave_a_report(tmp_path):
  run = write(tmp_path / os.fsdecode(b"run\xff"))
  (run / "hangs").mkdir()
  (run / "hangs" / os.fsdecode(b"\xfe.txt")).write_text("stacks")
  assert "stacks" in Parsed(page(run)).text and (run / "out.html").exists()


def test_no_link_leads_out_of_a_run(tmp_path):
  run, secret = write(tmp_path / "run"), tmp_path / "elsewhere"
  secret.mkdir()
  (secret / "x.txt").write_text("of my home")
  (secret / "incident.json").write_text('{"step": 8, "kind": "of my home"}')
  Image.fromarray(np.zeros((4, 4), np.uint8)).save(secret / "x.png")
  folder = incident(run, 7)
  (folder / "batch.txt").symlink_to(secret / "x.txt")
  (folder / "batch-00.png").symlink_to(secret / "x.png")
  (run / "incidents" / "00000008").symlink_to(secret)
  (run / "hangs").symlink_to(secret)
  os.mkfifo(folder / "batch-01.png")  # Who reads it waits for ever.
  made = page(run)
  assert "of my home" not in made and "<img" not in made and "Step 7" in made
  within = tmp_path / "link"  # A run may lie anywhere, and have links within.
  within.symlink_to(run)
  (folder / "batch.txt").unlink()
  (run / "text").write_text("of the run")
  (folder / "batch.txt").symlink_to("../../text")
  assert "of the run" in page(within)


@pytest.mark.parametrize("name", ["config.json", "events.jsonl", "data.json"])
def test_a_run_whose_records_are_links_out_of_it_is_refused(name, tmp_path):
  run = write(tmp_path / "run")
  (tmp_path / "x.json").write_text('{"password": "x", "home": "mine"}')
  (run / name).unlink(missing_ok=True)
  (run / name).symlink_to(tmp_path / "x.json")
  with pytest.raises(Refused, match=f"{name} is not a file in .*/run, but a link out of it"):
    report([str(run)])
  (run / name).unlink()
  os.mkfifo(run / name)
  with pytest.raises(Refused, match=f"{name} is not a file in .*/run"):
    report([str(run)])


def test_a_report_is_not_written_through_a_link(tmp_path):
  run, mine = write(tmp_path / "run"), tmp_path / "mine"
  mine.write_text("mine")
  for name in ("report.html", "report.html.unfinished"):
    (run / name).symlink_to(mine)
  assert Parsed(report([str(run)]).read_text()).text and mine.read_text() == "mine"


def test_of_prepared_data_that_the_config_names_the_amounts_are_shown(tmp_path):
  run, data = write(tmp_path / "run"), tmp_path / "data"
  data.mkdir()
  tree = {"data": {"class": "bigtrain.data.sources:PreparedText", "path": str(data)}}
  (run / "config.json").write_text(json.dumps(tree))
  split = {"documents": 1234, "bytes": 5000, "of my home": 1}
  inputs = [{"file": "of my home", "bytes": 3000}, {"file": "x", "bytes": "of my home"}]
  manifest = {"inputs": inputs, "splits": {"train": split, "of my home": split}}
  (data / "manifest.json").write_text(json.dumps(manifest | {"code": {"revision": "of my home"}}))
  made = page(run)
  assert "of my home" not in made
  for said in ("2 files, 3K bytes", "1.23K documents, 5K bytes"):
    assert said in Parsed(made).text


def test_of_many_incidents_the_first_and_the_last_have_their_batches(tmp_path):
  run, noise = write(tmp_path / "run"), np.random.default_rng(0).integers(0, 255, (64, 64, 3))
  for step in range(300):
    folder = incident(run, step, first_bad=f"tensor {step}")
    Image.fromarray(noise.astype(np.uint8)).save(folder / "batch-00.png")
    for i in range(1, 32):
      shutil.copy(folder / "batch-00.png", folder / f"batch-{i:02}.png")
    (folder / "batch.txt").write_text(f"text of {step}. ")
  made = page(run)
  parsed = Parsed(made)
  shown = [int(step) for step in re.findall(r"text of (\d+)\. ", parsed.text)]
  assert shown == [0, 1, 2, 297, 298, 299] and len(made) < 5e6
  assert "tensor 150" in parsed.text and "tensor 250" not in parsed.text
  assert "94 more are not shown" in parsed.text and "Incidents300" in parsed.text


def test_a_run_that_has_not_logged_yet_is_reported(tmp_path):
  run = write(tmp_path / "run")
  (run / "metrics.jsonl").unlink()
  text = Parsed(page(run)).text
  assert "No step has been logged" in text and "Starts" in text


def test_what_is_no_run_is_refused(tmp_path, capsys):
  (tmp_path / "empty").mkdir()
  for path, said in (("nowhere", "there is no run directory"), ("empty", "is no run directory")):
    with pytest.raises(Refused, match=said):
      report([str(tmp_path / path)])
  assert cli.main(["report"]) == Exit.REFUSED
  assert "takes run directories first" in capsys.readouterr().err
  (tmp_path / "file").touch()
  with pytest.raises(Refused, match=r"cannot write .*choose --out"):
    report([str(write(tmp_path / "run"))], str(tmp_path / "file" / "x.html"))


def test_without_the_library_its_extra_is_named(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "matplotlib", None)
  with pytest.raises(Refused, match=r"reports need matplotlib: .*--extra report"):
    report([str(write(tmp_path / "run"))])


def test_the_command_writes_where_it_is_told_and_says_so(tmp_path, capsys):
  run, out = write(tmp_path / "run"), tmp_path / "new" / "x.html"
  assert cli.main(["report", str(run), "--out", str(out)]) == Exit.DONE
  assert capsys.readouterr().out == f"{out}\n" and out.exists()
  assert sorted(p.name for p in out.parent.iterdir()) == ["x.html"]


def test_elements_escape_all_but_elements():
  made = el("p", "<b>", Html("<i></i>"), el("b", "&"), title='"x"', class_="c", hidden=False)
  assert made == '<p title="&quot;x&quot;" class="c">&lt;b&gt;<i></i><b>&amp;</b></p>'


@pytest.mark.parametrize(
  ("value", "shown"),
  [
    (None, "–"), (float("nan"), "–"), (0, "0"), (0.0, "0"), (1234567, "1,234,567"),
    (4.34215, "4.342"), (0.000012345, "1.23e-05"), (98765.4, "98,765"), (12e9, "12,000,000,000"),
    (1.5e6 + 0.5, "1.50e+06"), (0.1962890625, "0.1963"), (-2.5, "-2.5"),
  ],
)  # fmt: skip
def test_numbers_are_written_for_people(value, shown):
  assert number(value) == shown


@pytest.mark.parametrize(
  ("seconds", "shown"),
  [
    (0, "0 s"), (0.34, "340 ms"), (12.34, "12.3 s"), (245, "4:05 min"), (12015, "3:20:15 h"),
    (200_000, "2 d 7 h"), (400_000, "4 d 15 h"),
  ],
)  # fmt: skip
def test_lengths_of_time_are_written_in_the_unit_that_fits(seconds, shown):
  assert span(seconds) == shown
