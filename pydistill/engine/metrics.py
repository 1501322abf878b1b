"""The metrics of a batch, computed with torch operations, for the torch backend and the differentiable formula.

csrc/metrics.def lists the same metrics for the C++ core, and the numba backend computes them too.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pydistill.engine.batch import Batch
from pydistill.engine.counting import CountedRows


class Metric(NamedTuple):
    """A value per row, ``of_rows(batch)``, and the term whose rows it is averaged over, without weights."""

    of_rows: Callable[[Batch], Tensor]
    term: Literal["soft", "hard"]


def _agreement(batch: Batch) -> Tensor:
    """Whether student and teacher have the same first maximum."""
    assert batch.teacher is not None
    student, teacher = _first_maximum(batch.student), _first_maximum(batch.teacher)
    if batch.teacher_indices is not None:
        of_all = batch.teacher_indices.gather(-1, teacher.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        teacher = torch.where(teacher < 0, -1, of_all)
    return (student == teacher) & (student >= 0)


def _accuracy(batch: Batch) -> Tensor:
    """Whether the student's first maximum is the label."""
    assert batch.labels is not None
    return _first_maximum(batch.student) == batch.labels


def _first_maximum(logits: Tensor) -> Tensor:
    """Index of the first maximum; -1 for a row without one (NaN, +inf, -inf throughout)."""
    logits = logits.detach()
    return torch.where(logits.amax(-1).isfinite(), logits.argmax(-1), -1)


METRICS = {"agreement": Metric(_agreement, "soft"), "accuracy": Metric(_accuracy, "hard")}


def rows_of(metric: Metric, counted: CountedRows) -> Tensor:
    """Mask of the rows over which the metric is averaged."""
    return counted.soft if metric.term == "soft" else counted.labelled & counted.with_a_term


def is_defined(metric: Metric, batch: Batch) -> bool:
    """Whether the batch has the tensor that the metric needs."""
    return (batch.teacher if metric.term == "soft" else batch.labels) is not None


def mean_over(rows: Tensor, values: Tensor, dtype: torch.dtype) -> Tensor:
    """Mean of the values in the masked rows; NaN if there is none."""
    return torch.where(rows, values, 0).sum(dtype=dtype) / rows.sum()
