"""The loss as differentiable torch operations: for second derivatives, other devices, subclasses and transforms."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from pydistill.engine.counting import counted_rows, denominators, narrow_top_k, rows_with_a_term
from pydistill.formulas import loss_dtype, soft_value


def loss_formula(batch):
    """The loss of a batch as differentiable torch operations: ``(loss, soft, hard)``.

    Right for any device, for tensor subclasses, under functorch transforms and for every order of derivative. Its
    memory is autograd's, several buffers of the logits' size. Nothing here looks at a value: it can be traced.

    ``batch`` is an ``engine.batch.Batch``; temperature and alpha may be tensors.
    """
    batch, options = narrow_top_k(batch), batch.options
    soft_rows, labelled_rows, weight, labels = counted_rows(batch)
    dtype = loss_dtype(batch.student)
    with_a_term = rows_with_a_term(batch, soft_rows, labelled_rows)
    student = torch.where(with_a_term.unsqueeze(-1), batch.student.to(dtype), 0)
    zero = student.new_zeros(student.shape[:-1])
    soft = hard = zero
    if batch.evaluates_soft:
        teacher = torch.where(soft_rows.unsqueeze(-1), batch.teacher.detach().to(dtype), 0)
        value = soft_value(student, teacher, labels, options, batch.teacher_indices, batch.log_partitions)
        no_gradient = value.isnan() | (value == math.inf) if options.divergence == "reverse_kl" else value.isnan()
        value = value + spoiled_gradient(student, no_gradient)
        soft = torch.where(soft_rows, weight * value, zero)
    if batch.labels is not None and options.hard_items != 0:
        ce = F.cross_entropy(  # flattened: from three dimensions on it takes the second one for the classes
            student.reshape(-1, student.shape[-1]),
            labels.reshape(-1),
            batch.class_weight,
            reduction="none",
            label_smoothing=options.label_smoothing,
        )
        hard = torch.where(labelled_rows, weight * ce.reshape(zero.shape), zero)
    if options.reduction != "none":
        soft, hard = soft.sum(), hard.sum()
    if options.reduction == "mean":
        counted = denominators(batch, soft_rows, labelled_rows, weight, labels)
        soft = mean(soft, counted[0] if options.soft_items is None else options.soft_items, soft_rows)
        hard = mean(hard, counted[1] if options.hard_items is None else options.hard_items, labelled_rows)
    loss = combine(options.alpha, soft, hard)
    if not batch.evaluates_soft and not batch.evaluates_hard:  # 0, of which a derivative can still be asked
        of_rows = 0 * student.sum(-1)
        loss = loss + (of_rows if options.reduction == "none" else of_rows.sum())
    return loss, soft, hard


def spoiled_gradient(student, rows):
    """0 per row, whose gradient is NaN in the given rows, in every class, and 0 in the others.

    Of itself a row whose value is NaN has a gradient that is NaN in some of its classes only, or 0: the derivative of
    abs at NaN.
    """
    x = torch.where(rows, student.logsumexp(-1), 0)
    return 0 * torch.where(rows, x - x.detach(), 1).sqrt()


def mean(total, items, rows):
    """``total / items``; 0 where no row counts, whatever the denominator."""
    items = torch.as_tensor(items, dtype=total.dtype, device=total.device)
    return total / torch.where(rows.any(), items, 1)


def combine(alpha, soft, hard):
    """``alpha * soft + (1 - alpha) * hard``, where a term whose weight is 0 cannot put a NaN into the sum."""
    if isinstance(alpha, Tensor):
        soft, hard = torch.where(alpha == 0, 0, soft), torch.where(alpha == 1, 0, hard)
        return alpha * soft + (1 - alpha) * hard
    return (alpha * soft if alpha > 0 else 0) + ((1 - alpha) * hard if alpha < 1 else 0)
