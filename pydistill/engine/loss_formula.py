"""The loss as differentiable torch operations: for second derivatives, other devices, subclasses and transforms."""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pydistill.engine.batch import Batch
from pydistill.engine.counting import counted_rows, denominators, narrow_top_k
from pydistill.formulas import loss_dtype, soft_value


class Terms(NamedTuple):
    """The loss, ``alpha * soft + (1 - alpha) * hard``, and its terms, with the same reduction."""

    loss: Tensor
    soft: Tensor
    hard: Tensor


def loss_formula(batch: Batch) -> Terms:
    """Compute the loss of a batch by differentiable torch operations.

    It works on any device, with tensor subclasses, under functorch transforms and for every order of derivative.
    Autograd keeps several buffers of the logits' size for it. No operation reads a value, so it can be traced.
    """
    batch, options = narrow_top_k(batch), batch.options
    counted = counted_rows(batch)
    dtype = loss_dtype(batch.student)
    student = torch.where(counted.with_a_term.unsqueeze(-1), batch.student.to(dtype), 0)
    zero = student.new_zeros(student.shape[:-1])
    soft = hard = zero
    if batch.teacher is not None and batch.evaluates_soft:
        teacher = torch.where(counted.soft.unsqueeze(-1), batch.teacher.detach().to(dtype), 0)
        value = soft_value(student, teacher, counted.labels, options, batch.teacher_indices, batch.log_partitions)
        no_gradient = value.isnan() | (value == math.inf) if options.divergence == "reverse_kl" else value.isnan()
        value = value + _nan_gradient(student, no_gradient)
        soft = torch.where(counted.soft, counted.weight * value, zero)
    if counted.labels is not None and options.num_items.hard != 0:
        ce = F.cross_entropy(  # flattened, because with three dimensions torch takes the second for the classes
            student.reshape(-1, student.shape[-1]),
            counted.labels.reshape(-1),
            batch.class_weight,
            reduction="none",
            label_smoothing=options.label_smoothing,
        )
        hard = torch.where(counted.labelled, counted.weight * ce.reshape(zero.shape), zero)
    if options.reduction != "none":
        soft, hard = soft.sum(), hard.sum()
    if options.reduction == "mean":
        given = options.num_items
        items = denominators(counted, batch.class_weight)
        soft = mean(soft, items[0] if given.soft is None else given.soft, counted.soft)
        hard = mean(hard, items[1] if given.hard is None else given.hard, counted.labelled)
    loss = combine(options.alpha, soft, hard)
    if not batch.evaluates_soft and not batch.evaluates_hard:  # 0, of which a derivative can still be asked
        of_rows = 0 * student.sum(-1)
        loss = loss + (of_rows if options.reduction == "none" else of_rows.sum())
    return Terms(loss, soft, hard)


def _nan_gradient(student: Tensor, rows: Tensor) -> Tensor:
    """Return 0 per row, with a gradient that is NaN in every class of the given rows, and 0 in the others.

    Without it a row whose value is NaN may have a gradient that is NaN in some of its classes only, or 0, as the
    derivative of abs at NaN is.
    """
    x = torch.where(rows, student.logsumexp(-1), 0)
    return 0 * torch.where(rows, x - x.detach(), 1).sqrt()


def mean(total: Tensor, items: float | Tensor, rows: Tensor) -> Tensor:
    """``total / items``; 0 where no row counts, whatever the denominator."""
    items = torch.as_tensor(items, dtype=total.dtype, device=total.device)
    return total / torch.where(rows.any(), items, 1)


def combine(alpha: float, soft: Any, hard: Any) -> Any:
    """``alpha * soft + (1 - alpha) * hard``, where a term whose weight is 0 cannot put a NaN into the sum."""
    return (alpha * soft if alpha > 0 else 0) + ((1 - alpha) * hard if alpha < 1 else 0)
