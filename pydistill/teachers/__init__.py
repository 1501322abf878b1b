"""Soft targets of trained teachers, and the rules for fitting scikit-learn's and XGBoost's classifiers as teachers."""

from pydistill.teachers.outputs import soft_targets, teacher_outputs

__all__ = ["soft_targets", "teacher_outputs"]
