"""Secrets: tokens, keys and passwords are taken out of all that a run writes for people to read.

Environment, events, messages and the report go through `redacted`. What counts as a secret is the
value of an environment variable, flag or field that is named like one, whatever has the form of a
well-known token, and the password in a URL. config.json is not changed, for it is read back: a
secret does not belong in an experiment. Text may be of anyone: no pattern takes more than linear
time, so each begins where a word does, and none is tried again within what it has looked through.
"""

import functools
import os
import re
import sys
import traceback
from typing import Any

HIDDEN = "[hidden]"
LEAST = 6  # Characters of a variable's value that is looked for everywhere; "on" would be anywhere.
MOST = 256  # Characters at the beginning of a value that are asked whether they look random.

# A last word that says so, and words that do so only of what looks as random as a token is:
# a `mask_token` is "[MASK]".
SAYS = ("password", "passwd", "passphrase", "secret", "credential", "apikey")
KEYS = ("api", "access", "private", "secret", "signing", "encryption", "account")  # Before "key".
MAY = ("token", "key", "auth", "authorization", "bearer", "pat")
NO, PERHAPS, SURELY = range(3)  # Whether a name is that of a secret.
RANDOM = re.compile(  # Not a path's words.
  r"(?<![\w\-+=])(?=[\w\-+=]*\d)(?=[\w\-+=]*[A-Za-z])[\w\-+=]{12,}"
)

FORMS = re.compile(
  r"-----BEGIN [A-Z ]*PRIVATE KEY-----(?s:.*?)(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)"
  r"|\bhf_[A-Za-z0-9]{20,}"
  r"|\bgh[pousr]_\w{20,}|\bgithub_pat_\w{20,}|\bglpat-[\w-]{16,}"
  r"|\bsk-[\w-]{20,}"
  r"|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"
  r"|\bAIza[\w-]{35}|\bya29\.[\w.-]{20,}"
  r"|\bxox[abeprs]-[\w-]{10,}"
  r"|\b(?:npm_|pypi-|dop_v1_)[\w-]{20,}"
  r"|(?<![\w-])eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*"
)
HEADER = re.compile(r"(\bAuthorization[\"']?\s*[:=]\s*[\"']?(?:[A-Za-z]+\s+)?)[^\s\"']+", re.I)
IN_URL = re.compile(r"(://[^\s/@:]*:)[^\s/]+(?=@)")
ASSIGNED = re.compile(r"""(?<![\w.\-])([\w.\-]+)["']?\s*(=|:\s?)\s*["']?""")
VALUE = re.compile(r"""\[hidden\]|[^\s"'&,;)}\]]+""")


def redacted(value: Any) -> Any:
  """A string without its secrets; of lists, tuples and dicts all that is in them.

  In a list, what follows a flag such as `--api_key` is its value. What is within the field of a
  secret belongs to it, be it text or numbers.
  """
  return _named(NO, value)


def _named(secret: int, value: Any) -> Any:
  """The same of what has a name that is so surely that of a secret."""
  if isinstance(value, str):
    return HIDDEN if _is_hidden(secret, value) else _text(value)
  if isinstance(value, dict):
    named = ((str(name), kept) for name, kept in value.items())
    return {_text(name): _named(max(secret, _secrecy(name)), kept) for name, kept in named}
  if isinstance(value, (list, tuple)):
    before = ["", *value][: len(value)]
    flags = (_secrecy(word) if _is_flag(word) else NO for word in before)
    return [_named(max(secret, flag), kept) for flag, kept in zip(flags, value, strict=True)]
  is_number = value is not None and not isinstance(value, bool)
  return HIDDEN if is_number and secret == SURELY else value


def is_secret(name: str, value: str) -> bool:
  """Whether a variable of that name holds a secret: by its name, or by the form of its value."""
  return _is_secret(name, value) or _named(_secrecy(name), value) != value


def _is_flag(word: Any) -> bool:
  return isinstance(word, str) and word.startswith("-") and "=" not in word


def _is_hidden(secret: int, value: str) -> bool:
  if secret == PERHAPS:
    return RANDOM.search(value) is not None
  return secret == SURELY and bool(value)


def _secrecy(name: str) -> int:
  """Whether a field or flag of that name holds a secret."""
  *_, before, last = ["", "", *re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)]
  before, last = before.lower(), last.lower()
  one = last.removesuffix("s")
  if one.endswith(SAYS) or (one == "key" and before in KEYS):
    return SURELY
  return PERHAPS if last.endswith(MAY) else NO


def _text(text: str) -> str:
  for secret in _of_environment(tuple(os.environ.items())):
    text = text.replace(secret, HIDDEN)
  text = HEADER.sub(rf"\1{HIDDEN}", IN_URL.sub(rf"\1{HIDDEN}", FORMS.sub(HIDDEN, text)))
  kept, at = [], 0
  for found in ASSIGNED.finditer(text):  # A value may be an assignment: "error: password=x".
    value = VALUE.match(text, found.end(), found.end() + MOST)
    if value and found.start() >= at and _is_assigned(found[1], found[2], value[0]):
      kept += [text[at : found.end()], HIDDEN]
      at = VALUE.match(text, found.end()).end()  # pyright: ignore[reportOptionalMemberAccess]
  return "".join([*kept, text[at:]])


def _is_assigned(name: str, sign: str, value: str) -> bool:
  prose = sign.startswith(":") and name.isalpha() and value.isalpha()  # "A secret: nobody knew."
  return not prose and _is_hidden(_secrecy(name), value)


def first_line(error: BaseException) -> str:
  """Of its message, so much as fits a note; cut without its secrets, of which a half would stay."""
  return redacted(str(error)).partition("\n")[0][:300]


@functools.lru_cache(maxsize=2)
def _of_environment(variables: tuple[tuple[str, str], ...]) -> list[str]:
  """The values of variables that are named like secrets, the longest first."""
  found = {value for name, value in variables if len(value) >= LEAST and _is_secret(name, value)}
  return sorted(found, key=len, reverse=True)


def _is_secret(name: str, value: str) -> bool:
  secret = _secrecy(name)
  if secret != SURELY:  # A number of tokens, say.
    likely = name.lower().endswith(("_token", "_key", "_auth")) or _is_hidden(secret, value)
    if not likely or value.isdecimal():
      return False
  return not os.path.exists(value)


def excepthook(kind, error, trace) -> None:
  """A `sys.excepthook` that prints what Python's would, without secrets."""
  print(_text("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)
