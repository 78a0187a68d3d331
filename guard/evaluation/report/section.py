"""A section of the report, or the line that says why it is not there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from guard.evaluation.report.markup import Html
from guard.evaluation.report.view import View


@dataclass(frozen=True)
class Section:
    """`body` gives None when there is nothing to show; then the report says `missing`."""

    anchor: str
    title: str
    body: Callable[[View], Html | None]
    missing: str
