"""Teachers: their outputs for the rows of a data set, and what the package knows about scikit-learn's estimators."""

from pydistill.teachers.outputs import soft_targets, teacher_outputs

__all__ = ["soft_targets", "teacher_outputs"]
