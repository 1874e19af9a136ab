"""Steps: what is done to one document after another, before documents are compared.

A step is a @config class with a `make` that gives a function from a text to the text that goes on,
or to why it does not; of which nothing is left does not. A new step is one such class, here or in
the file of the recipe.
"""

import abc
import ipaddress
import re
import unicodedata
from collections.abc import Callable
from typing import ClassVar, Literal, NamedTuple

from bigtrain.config import Refused, config


class Rejected(NamedTuple):
  """A text that does not go on."""

  reason: str  # The same words for the same cause: what rejections are counted by.


Apply = Callable[[str], str | Rejected]


@config
class Step(abc.ABC):
  """One thing done to every text."""

  on: bool = True
  takes_lines: ClassVar[bool] = (
    False  # Whether it takes lines out, to be kept with what is rejected.
  )

  @abc.abstractmethod
  def make(self) -> Apply:
    """The function; loading what it needs happens here, once a task."""

  def check(self) -> None:
    """Refuses what cannot work, before any work, by raising `Refused`."""


@config
class Repair(Step):
  """Mojibake, HTML entities and broken characters put right by ftfy; then a normal form."""

  entities: bool = True  # `&amp;` becomes `&`, unless the text holds HTML tags.
  form: Literal["NFC", "NFKC"] = "NFC"  # Unicode normal form; NFKC also folds ligatures and widths.

  def make(self) -> Apply:
    import ftfy

    # What only changes how letters look stays: models shall know curly quotes and wide letters.
    settings = ftfy.TextFixerConfig(
      unescape_html="auto" if self.entities else False,
      uncurl_quotes=False,
      fix_latin_ligatures=False,
      fix_character_width=False,
      fix_line_breaks=False,
      remove_control_chars=False,
      normalization=None,
    )

    def apply(text: str) -> str:
      # Normalised as a whole: ftfy works in pieces, whose edges may lie within a character.
      return unicodedata.normalize(self.form, ftfy.fix_text(text, config=settings))

    return apply


@config
class ControlCharacters(Step):
  """Control and invisible characters are removed, line ends become one kind."""

  def make(self) -> Apply:
    # C0 and C1 controls, soft hyphens, zero-width spaces, byte-order marks, and what is no
    # character. Zero-width (non-)joiners stay: scripts of India and Persia, and emoji, need them.
    removed = re.compile(
      r"[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\xad\u200b\u2060\ufeff\ufffe\uffff]"
    )
    ends = re.compile(r"\r\n?|[\x0b\x0c\x85\u2028\u2029]")
    return lambda text: removed.sub("", ends.sub("\n", text))


@config
class Whitespace(Step):
  """White space is made one kind: a run of it one space, unless it indents a line."""

  blank_lines: int = 1  # At most so many in a row.

  def check(self) -> None:
    if self.blank_lines < 0:
      raise Refused(f"blank_lines is {self.blank_lines}: at least 0")

  def make(self) -> Apply:
    spaces = re.compile(r"[^\S\n]+")
    trailing = re.compile(r" (?=\n)")
    blank = re.compile(f"\n{{{self.blank_lines + 2},}}")

    def apply(text: str) -> str:
      # Indentation is meaning, in code and verse.
      text = "\n".join(
        line[: len(line) - len(line.lstrip(" \t"))].replace("\t", "  ")
        + spaces.sub(" ", line.strip())
        if line[:1] in " \t"
        else spaces.sub(" ", line)
        for line in text.split("\n")
      )
      return blank.sub("\n" * (self.blank_lines + 1), trailing.sub("", text)).strip()

    return apply


@config
class RepeatedLines(Step):
  """Lines that stood before in the same document are dropped: menus, footers, broken scrapes."""

  takes_lines: ClassVar[bool] = True
  min_chars: int = 20  # Shorter ones, such as refrains and brackets, may repeat.

  def check(self) -> None:
    if self.min_chars < 1:
      raise Refused(f"min_chars is {self.min_chars}: at least 1, for blank lines repeat")

  def make(self) -> Apply:
    def apply(text: str) -> str:
      seen: set[str] = set()
      kept = []
      for line in text.split("\n"):
        bare = line.strip()
        if len(bare) >= self.min_chars and bare in seen:
          continue
        seen.add(bare)
        kept.append(line)
      return "\n".join(kept).strip()

    return apply


@config
class Scrub(Step):
  """Personal data replaced by <email>, <ip> and <phone>."""

  emails: bool = True
  ips: bool = True  # Public ones: 127.0.0.1 tells of nobody.
  phones: bool = True  # With a country code, or in the groups of North America.

  def make(self) -> Apply:
    from datatrove.pipeline.formatters import PIIFormatter

    emails = PIIFormatter(remove_ips=False, email_replacement="<email>")
    ips = re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?!\.?\w)")
    phones = re.compile(
      r"(?<![\w.+-])(?:\+\d{1,3}(?:[ .()-]{0,2}\d){7,12}|\(?\d{3}\)?[ .-]\d{3}[.-]\d{4})(?![\w-])"
    )

    def public(found: re.Match) -> str:
      try:
        return "<ip>" if ipaddress.ip_address(found[0]).is_global else found[0]
      except ValueError:
        return found[0]

    def apply(text: str) -> str:
      if self.emails and "@" in text:  # The pattern is slow on what has none.
        text = emails.format(text)
      text = ips.sub(public, text) if self.ips else text
      return phones.sub("<phone>", text) if self.phones else text

    return apply
