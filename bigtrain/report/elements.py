"""Elements of HTML. Text that goes in is escaped unless it was made here.

Names of files may hold bytes that are no text: in a page there are none.
"""

import html
import math
from collections.abc import Iterable
from typing import Any

EMPTY = frozenset({"meta", "img"})  # Written without an end.


class Html(str):
  """A piece of a page that is safe as it is."""


def el(name: str, /, *inside: Any, **attributes: Any) -> Html:
  """An element: `el("p", text, class_="lead")`.

  Args:
    name: of the element.
    *inside: Html, or what is written as text.
    **attributes: None and False leave one out. A last underscore is none of the name's, others
      become hyphens.
  """
  given = "".join(
    f" {key.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{_escaped(value)}"')
    for key, value in attributes.items()
    if value is not None and value is not False
  )
  if name in EMPTY and not inside:
    return Html(f"<{name}{given}>")
  return Html(f"<{name}{given}>{joined(inside)}</{name}>")


def joined(pieces: Iterable[Any], between: str = "") -> Html:
  """Pieces one after the other, each escaped unless it is Html."""
  return Html(between.join(p if isinstance(p, Html) else _escaped(p) for p in pieces))


def _escaped(value: Any) -> str:
  return html.escape(str(value)).encode(errors="replace").decode()


def table(
  head: list[Any], rows: Iterable[list[Any]], *, numbers: Iterable[int] = (), kind: str = ""
) -> Html:
  """A table that scrolls by itself where it is too wide.

  Args:
    head: the titles of its columns; empty for none, as where each row is a name and a value.
    rows: the cells.
    numbers: columns to be set to the right.
    kind: a class for the page's CSS.
  """
  class_ = lambda i: "n" if i in set(numbers) else None
  title = lambda i: head[i] if head and head[i] else None  # Which a phone shows beside the cell.
  cell = lambda i, inside: el("td", inside, class_=class_(i), data_title=title(i))
  parts = [el("thead", el("tr", *(el("th", t, class_=class_(i)) for i, t in enumerate(head))))]
  parts = parts if head else []
  parts.append(el("tbody", *(el("tr", *(cell(i, c) for i, c in enumerate(row))) for row in rows)))
  kind = kind if head else f"pairs {kind}".strip()
  return el("div", el("table", *parts, class_=kind or None), class_="scroll")


def number(value: Any) -> str:
  """A number as people read it: 4 digits, 3.2e-05 where it is tiny, 12,345 where it is large."""
  if value is None or isinstance(value, bool) or not isinstance(value, int | float):
    return "–" if value is None else str(value)
  if not math.isfinite(value):
    return "–" if math.isnan(value) else str(value)
  if isinstance(value, int) or (abs(value) >= 1000 and value == round(value)):
    return f"{int(value):,}" if abs(value) < 1e15 else f"{value:.3e}"
  size = abs(value)
  if size >= 1e6 or 0 < size < 1e-3:
    return f"{value:.2e}"
  return f"{value:,.0f}" if size >= 1e4 else f"{value:,.4g}"


def span(seconds: float) -> str:
  """A length of time in the unit that fits: 340 ms, 12.3 s, 4:05 min, 3:20:15 h, 2 d 7 h."""
  if seconds < 1:
    return f"{1000 * seconds:.0f} ms" if seconds > 0 else "0 s"
  if seconds < 60:
    return f"{seconds:.1f} s"
  minutes, rest = divmod(round(seconds), 60)
  if minutes < 60:
    return f"{minutes}:{rest:02} min"
  hours, minutes = divmod(minutes, 60)
  if hours < 48:
    return f"{hours}:{minutes:02}:{rest:02} h"
  return f"{hours // 24} d {hours % 24} h"
