"""Scores of a student beside those of its teacher."""

from pydistill.evaluation.result import Report
from pydistill.evaluation.scoring import report

__all__ = ["Report", "report"]
