"""Charts: what is kept of long curves, and that pictures belong to the page they stand in."""

import re

import numpy as np
import pytest

from bigtrain.report.figures import POINTS, Curve, Look, _thinned, chart, heat
from bigtrain.report.svg import BAD, THEME

pytest.importorskip("matplotlib")


def test_a_long_curve_keeps_its_peaks_and_its_ends():
  x = np.arange(100_000.0)
  y = np.sin(x / 9000)
  y[54_321], y[7] = 9.0, -9.0
  at, kept = _thinned(x, y)
  assert len(at) <= POINTS and (np.diff(at) > 0).all()
  assert kept.max() == 9.0 and at[kept.argmax()] == 54_321 and kept.min() == -9.0
  assert at[0] < 400 and at[-1] > 99_000


def test_colours_and_fonts_are_those_of_the_page():
  curve = Curve("loss", np.arange(50.0), np.linspace(5, 1, 50), smooth=True)
  made = chart([curve], Look(log=True), 50, "Loss", events=[(7, "incident")])
  assert not [colour for colour in THEME if colour in made]
  assert f"var(--{THEME[BAD]})" in made
  assert "font-size: 11px" in made and "font-family" not in made and "font:" not in made
  assert "DejaVu" not in made and "<style" not in made and "<metadata" not in made
  assert made.count("<svg") == made.count("</svg>") == 1 and "Loss" in made


def test_figures_of_one_page_do_not_share_their_names():
  curve = Curve("loss", np.arange(3.0), np.ones(3), marks=True)
  ids = [set(re.findall(r' id="([^"]*)"', chart([curve], Look(), 3, "Loss"))) for _ in range(2)]
  assert ids[0] and not ids[0] & ids[1]


def test_what_is_under_the_pointer_is_told():
  x = np.array([1.0, 5.0, 9.0])
  curves = [Curve("training", x, np.array([3.0, np.nan, 1.0])), Curve("held out", x[1:2], x[:1])]
  made = chart(curves, Look(), 9, "Loss", events=[(5, "incident: spike")])
  titles = re.findall(r"<title>([^<]*)</title></rect>", made)
  assert [t.split("\n") for t in titles] == [
    ["step 1", "training 3"],
    ["step 5", "held out 1", "incident: spike"],
    ["step 9", "training 1"],
  ]


@pytest.mark.parametrize("y", [[0.0, 0.0], [1e-30, 1e30], [-1.0, -2.0], [np.nan, np.inf], [5.0]])
@pytest.mark.parametrize("look", [Look(), Look(log=True), Look(percent=True, zero=True)])
def test_curves_of_any_values_are_drawn(y, look):
  values = np.array(y)
  made = chart([Curve("x", np.arange(len(y)) + 1.0, values)], look, 2, "x")
  assert made.endswith("</svg>") and "nan" not in made


@pytest.mark.parametrize("layers", [1, 3, 200])
def test_layers_of_any_number_and_values_are_drawn(layers):
  values = np.full((layers, 4), 1e-3)
  values[0] = [np.nan, 0, -1, np.inf]
  names = [f"decoder.{i:03}.a_very_long_name_of_a_module_indeed.{i}" for i in range(layers)]
  made = heat(names, np.arange(4.0), values, "Gradients")
  assert names[-1] in made  # In full, where it is pointed at.
  assert "data:image/png;base64," in made
