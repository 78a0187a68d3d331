"""The report of an evaluation: one HTML file that stands alone, or its first tables as Markdown."""

from guard.evaluation.report.markdown import markdown
from guard.evaluation.report.page import render

__all__ = ["markdown", "render"]
