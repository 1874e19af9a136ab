"""Secrets: tokens, keys and passwords are taken out of all that a run writes for people to read.

Environment, events, messages and the report go through `redacted`. What counts as a secret is the
value of an environment variable, flag or field that is named like one, whatever has the form of a
well-known token, and the password in a URL. config.json is not changed, for it is read back: a
secret does not belong in an experiment.
"""

import functools
import os
import re
import sys
import traceback
from typing import Any

HIDDEN = "[hidden]"
LEAST = 6  # Characters of a variable's value that is looked for everywhere; "on" would be anywhere.

# A last word that says so, and words that do so only of what looks as random as a token is:
# a `mask_token` is "[MASK]".
SAYS = ("password", "passwd", "passphrase", "secret", "credential", "credentials", "apikey")
KEYS = ("api", "access", "private", "secret", "signing", "encryption", "account")  # Before "key".
MAY = ("token", "key", "auth", "authorization", "bearer", "pat")
RANDOM = re.compile(r"(?=[\w\-+=]*\d)(?=[\w\-+=]*[A-Za-z])[\w\-+=]{12,}")  # Not a path's words.

FORMS = re.compile(
  r"-----BEGIN [A-Z ]*PRIVATE KEY-----(?:.|\n)*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)"
  r"|\bhf_[A-Za-z0-9]{20,}"
  r"|\bgh[pousr]_\w{20,}|\bgithub_pat_\w{20,}|\bglpat-[\w-]{16,}"
  r"|\bsk-[\w-]{20,}"
  r"|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"
  r"|\bAIza[\w-]{35}|\bya29\.[\w.-]{20,}"
  r"|\bxox[abeprs]-[\w-]{10,}"
  r"|\b(?:npm_|pypi-|dop_v1_)[\w-]{20,}"
  r"|\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*"
)
HEADER = re.compile(r"(\bAuthorization[\"']?\s*[:=]\s*[\"']?(?:[A-Za-z]+\s+)?)[^\s\"']+", re.I)
IN_URL = re.compile(r"(://[^\s/@:]*:)[^\s/@]+(?=@)")
ASSIGNED = re.compile(r"""([\w.\-]+)(["']?\s*(?:=|:\s?)\s*["']?)([^\s"'&,;)}\]]+)""")


def redacted(value: Any) -> Any:
  """A string without its secrets; of lists, tuples and dicts all that is in them.

  In a list, what follows a flag such as `--api_key` is its value.
  """
  if isinstance(value, str):
    return _text(value)
  if isinstance(value, dict):
    return {_text(str(name)): _field(str(name), kept) for name, kept in value.items()}
  if isinstance(value, (list, tuple)):
    before = ["", *value][: len(value)]
    pairs = zip(before, value, strict=True)
    return [_field(flag if _is_flag(flag) else "", item) for flag, item in pairs]
  return value


def is_secret(name: str, value: str) -> bool:
  """Whether a variable of that name holds a secret: by its name, or by the form of its value."""
  return _is_secret(name, value) or _field(name, value) != value


def _is_flag(word: Any) -> bool:
  return isinstance(word, str) and word.startswith("-") and "=" not in word


def _field(name: str, value: Any) -> Any:
  return HIDDEN if isinstance(value, str) and _holds(name, value) else redacted(value)


def _holds(name: str, value: str) -> bool:
  """Whether a field or flag of that name holds a secret."""
  *_, before, last = ["", "", *re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)]
  before, last = before.lower(), last.lower()
  if last.endswith(SAYS) or (last == "key" and before in KEYS):
    return bool(value)
  return last.endswith(MAY) and RANDOM.search(value) is not None


def _text(text: str) -> str:
  for secret in _of_environment(tuple(os.environ.items())):
    text = text.replace(secret, HIDDEN)
  text = HEADER.sub(rf"\1{HIDDEN}", IN_URL.sub(rf"\1{HIDDEN}", FORMS.sub(HIDDEN, text)))
  return ASSIGNED.sub(_assigned, text)


def _assigned(found: re.Match[str]) -> str:
  name, sign, value = found.groups()
  prose = sign.strip() == ":" and name.isalpha() and value.isalpha()  # "A secret: nobody knew."
  return found[0] if prose or not _holds(name, value) else f"{name}{sign}{HIDDEN}"


@functools.lru_cache(maxsize=2)
def _of_environment(variables: tuple[tuple[str, str], ...]) -> list[str]:
  """The values of variables that are named like secrets, the longest first."""
  found = {value for name, value in variables if len(value) >= LEAST and _is_secret(name, value)}
  return sorted(found, key=len, reverse=True)


def _is_secret(name: str, value: str) -> bool:
  named = _holds(name, value) or name.lower().endswith(("_token", "_key", "_auth"))
  return named and not os.path.exists(value) and not re.fullmatch(r"\d+|true|false", value, re.I)


def excepthook(kind, error, trace) -> None:
  """A `sys.excepthook` that prints what Python's would, without secrets."""
  print(_text("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)
