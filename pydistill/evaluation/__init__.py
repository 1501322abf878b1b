"""Reports that compare a student with its teacher."""

from pydistill.evaluation.result import Report
from pydistill.evaluation.scoring import report

__all__ = ["Report", "report"]
