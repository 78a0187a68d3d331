"""Text without what looks like a secret or a person. Pure.

What is found: e-mail addresses, numbers of payment cards (with a right check digit), of phones and of bank accounts
(IBAN), IP addresses, keys and tokens of well-known shapes, and long runs of letters and digits, as keys are.
What is not: names, addresses, dates, and everything that only its meaning makes private. Redacted is not anonymous.
"""

from __future__ import annotations

import re
from collections.abc import Callable

_LONGEST_CARD = 19


def _card(match: re.Match[str]) -> str:
    digits = [int(letter) for letter in match[0] if letter.isdigit()]
    doubled = [digit if place % 2 == 0 else sum(divmod(2 * digit, 10)) for place, digit in enumerate(reversed(digits))]
    good = 13 <= len(digits) <= _LONGEST_CARD and sum(doubled) % 10 == 0
    return "[card]" if good else match[0]


def _says(name: str) -> Callable[[re.Match[str]], str]:
    return lambda _: f"[{name}]"


_PATTERNS: tuple[tuple[re.Pattern[str], Callable[[re.Match[str]], str]], ...] = (
    (
        re.compile(r"-----BEGIN [A-Z ]{1,40}-----.*?(?:-----END [A-Z ]{1,40}-----|\Z)", re.DOTALL),
        _says("private key"),
    ),
    (re.compile(r"\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*"), _says("token")),
    (
        re.compile(
            r"\b(?:sk|pk|rk|ghp|gho|ghs|ghu|github_pat|glpat|xox[abprs]|hf|utk|AKIA|ASIA|AIza)[-_]?[A-Za-z0-9_-]{12,}"
        ),
        _says("key"),
    ),
    (re.compile(r"(?i)\b(?:bearer|basic) [A-Za-z0-9._~+/-]{12,}=*"), _says("key")),
    (re.compile(r"\b[A-Za-z0-9._%+-]{1,64}@[A-Za-z0-9-]{1,63}(?:\.[A-Za-z0-9-]{1,63})+"), _says("email")),
    (re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){3,7}(?: ?[A-Z0-9]{1,3})?\b"), _says("account")),
    (re.compile(r"\b(?:\d[ -]?){12,18}\d\b"), _card),
    (re.compile(r"\b(?:\d{1,3}\.){3}\d{1,3}\b"), _says("address")),
    (
        re.compile(
            r"(?<![\w:])(?:(?:[0-9A-Fa-f]{1,4}:){3,7}[0-9A-Fa-f]{1,4}|"
            r"(?:[0-9A-Fa-f]{1,4}:){1,6}(?::[0-9A-Fa-f]{1,4}){1,6})(?![\w:])"
        ),
        _says("address"),
    ),
    (re.compile(r"(?<![\w+])(?:\+|00)?\d(?:[ ()./-]{0,2}\d){8,14}(?!\w)"), _says("number")),
    (re.compile(r"\b(?=[A-Za-z0-9_-]*\d)(?=[A-Za-z0-9_-]*[A-Za-z])[A-Za-z0-9_-]{28,}"), _says("key")),
)


def redact(text: str) -> str:
    """The text with a name in brackets in the place of each thing that was found."""
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    return text
