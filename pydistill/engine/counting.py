"""Which rows count for which term, and the denominators of "mean"."""

import torch

from pydistill.formulas import loss_dtype


def counted_rows(batch):
    """Masks of the rows that count for the soft and for the hard term, the row weights, and labels fit to gather."""
    options = batch.options
    rows = batch.student.shape[:-1]
    weight = batch.sample_weight
    if weight is None:
        weight = batch.student.new_ones(rows, dtype=loss_dtype(batch.student))
    soft_rows = weight != 0
    labelled_rows, labels = torch.zeros_like(soft_rows), None
    if batch.labels is not None:
        labels = batch.labels.long()  # first: compared with int32 labels, an index beyond 32 bits would wrap around
        ignored = labels == options.ignore_index
        labels = torch.where(ignored, 0, labels)
        labelled_rows = soft_rows & ~ignored
        if options.unlabeled == "skip":
            soft_rows = labelled_rows
    # A given denominator of 0 says that no row counts for the term anywhere.
    if options.soft_items == 0:
        soft_rows = torch.zeros_like(soft_rows)
    if options.hard_items == 0:
        labelled_rows = torch.zeros_like(labelled_rows)
    return soft_rows, labelled_rows, weight, labels


def rows_with_a_term(batch, soft_rows, labelled_rows):
    """Mask of the rows that count for a term that is evaluated; the gradient of the others is 0, whatever they hold."""
    none = torch.zeros_like(soft_rows)
    return (soft_rows if batch.options.alpha > 0 else none) | (labelled_rows if batch.options.alpha < 1 else none)


def denominators(batch, soft_rows, labelled_rows, weight, labels):
    """What "mean" divides the two terms by; 0 for a term that no row counts for."""
    hard_weight = weight
    if batch.class_weight is not None and labels is not None:
        hard_weight = weight * batch.class_weight[labels]
    return torch.where(soft_rows, weight, 0).sum(), torch.where(labelled_rows, hard_weight, 0).sum()


def narrow_top_k(batch):
    """A float64 top-k teacher beside a narrower student, relative to its largest logit and then rounded.

    Its log-partitions are those of the logits as they were: rounded at 10,000, the logits would be 5e-4 off them.
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
    return batch._replace(teacher=(teacher - largest).float(), log_partitions=partitions)
