"""Which rows count for which term, and the denominators of "mean"."""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from pydistill.engine.batch import Batch
from pydistill.formulas import loss_dtype


@dataclass(slots=True, eq=False)
class CountedRows:
    """Which rows of a batch count; every tensor has the rows' shape.

    Attributes:
        soft, labelled: masks of the rows that count for the soft and for the hard term.
        with_a_term: mask of the rows that count for a term with a weight. The gradient of the others is 0.
        weight: the sample weights, 1 if none are given; in the loss's dtype.
        labels: int64, with 0 in place of the ignored label, so that all are valid indices; None if none are given.
    """

    soft: Tensor
    labelled: Tensor
    with_a_term: Tensor
    weight: Tensor
    labels: Tensor | None


def counted_rows(batch: Batch) -> CountedRows:
    """Apply the rules for ignored labels, sample weights of 0 and given denominators of 0."""
    options = batch.options
    weight = batch.sample_weight
    if weight is None:
        weight = batch.student.new_ones(batch.student.shape[:-1], dtype=loss_dtype(batch.student))
    soft = weight != 0
    labelled, labels = torch.zeros_like(soft), None
    if batch.labels is not None:
        labels = batch.labels.long()  # before the comparison, in which int32 labels would wrap an index beyond 32 bits
        ignored = labels == options.ignore_index
        labels = torch.where(ignored, 0, labels)
        labelled = soft & ~ignored
        if options.unlabeled == "skip":
            soft = labelled
    none = torch.zeros_like(soft)
    if options.num_items.soft == 0:
        soft = none
    if options.num_items.hard == 0:
        labelled = none
    with_a_term = (soft if options.alpha > 0 else none) | (labelled if options.alpha < 1 else none)
    return CountedRows(soft=soft, labelled=labelled, with_a_term=with_a_term, weight=weight, labels=labels)


def denominators(rows: CountedRows, class_weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """The denominators (soft, hard) of "mean": sums of the counted rows' weights, 0 for a term without a row."""
    hard_weight = rows.weight
    if class_weight is not None and rows.labels is not None:
        hard_weight = rows.weight * class_weight[rows.labels]
    return torch.where(rows.soft, rows.weight, 0).sum(), torch.where(rows.labelled, hard_weight, 0).sum()


def narrow_top_k(batch: Batch) -> Batch:
    """Round a float64 top-k teacher to float32 relative to its largest logit, unless the student is float64.

    Its log-partitions were computed from the exact logits. Logits near 10,000, rounded as they are, would differ from
    these by up to 5e-4.
    """
    teacher = batch.teacher
    if batch.teacher_indices is None or teacher is None or teacher.dtype is not torch.float64:
        return batch
    if batch.student.dtype is torch.float64:
        return batch
    teacher = teacher.detach()
    largest = teacher.amax(-1, keepdim=True)
    partitions = batch.log_partitions
    if partitions is not None:
        partitions = partitions - largest.squeeze(-1) / batch.options.temperature
    return dataclasses.replace(batch, teacher=(teacher - largest).float(), log_partitions=partitions)
