"""Each divergence's value and derivative, and the whole loss, in plain array code: the specification.

The C++ core (csrc/divergences.hpp), the numba kernels and the torch backend compute the same values. For a pointwise
divergence ``D(p, q) = sum_j value_j`` with ``h_j = d value_j / d log q_j``, the gradient with respect to the
student's logits is ``(h_j - q_j * sum_k h_k) / T``; a divergence is therefore two expressions.

``p`` is the teacher, ``q`` the student. The same functions run on tensors and, compiled by numba, on scalars.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Point(NamedTuple):
    """Probabilities and log-probabilities of teacher (p) and student (q), elementwise."""

    p: Any
    q: Any
    log_p: Any
    log_q: Any


def times(weight, x):
    """``weight * x``, and 0 where the weight is 0, whatever x is: the limit of ``w log w``."""
    return weight * torch.where(weight == 0, 0, x)


class Divergence(NamedTuple):
    """``value(point, beta)`` and ``d_log_q(point, beta)``; ``beta`` is the default, None where there is none."""

    value: Callable
    d_log_q: Callable
    beta: float | None = None


DIVERGENCES = {
    "forward_kl": Divergence(
        value=lambda x, beta: times(x.p, x.log_p - x.log_q),
        d_log_q=lambda x, beta: -x.p,
    ),
    "reverse_kl": Divergence(
        value=lambda x, beta: times(x.q, x.log_q - x.log_p),
        d_log_q=lambda x, beta: times(x.q, x.log_q - x.log_p + 1),
    ),
}


def loss_formula(batch, soft_items=None, hard_items=None):
    """The loss of a batch as differentiable torch operations: ``(loss, soft, hard)``.

    Right for any device, for tensor subclasses, under functorch transforms and for every order of derivative. Its
    memory is autograd's, several buffers of the logits' size. Nothing here looks at a value: it can be traced.

    ``batch`` is an ``engine.checks.Batch``; temperature and alpha may be tensors. The two denominators replace the
    counted ones of ``reduction="mean"``.
    """
    options = batch.options
    soft_rows, labelled_rows, weight, labels = counted_rows(batch)
    dtype = loss_dtype(batch.student)
    student = torch.where(soft_rows.unsqueeze(-1), batch.student.to(dtype), 0)
    zero = student.new_zeros(student.shape[:-1])
    soft = hard = zero
    if batch.teacher is not None:
        teacher = torch.where(soft_rows.unsqueeze(-1), batch.teacher.detach().to(dtype), 0)
        divergence = DIVERGENCES[options.divergence]
        log_q, log_p = log_softened(student, options.temperature), log_softened(teacher, options.temperature)
        value = divergence.value(Point(log_p.exp(), log_q.exp(), log_p, log_q), options.beta).sum(-1)
        units = options.temperature**2 if options.t_squared else 1
        soft = torch.where(soft_rows, weight * units * value, zero)
    if batch.labels is not None:
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
        soft = soft / (counted[0] if soft_items is None else soft_items)
        hard = hard / (counted[1] if hard_items is None else hard_items)
    return combine(options.alpha, soft, hard), soft, hard


def combine(alpha, soft, hard):
    """``alpha * soft + (1 - alpha) * hard``, where a term whose weight is 0 cannot put a NaN into the sum."""
    if isinstance(alpha, Tensor):
        soft, hard = torch.where(alpha == 0, 0, soft), torch.where(alpha == 1, 0, hard)
        return alpha * soft + (1 - alpha) * hard
    return (alpha * soft if alpha > 0 else 0) + ((1 - alpha) * hard if alpha < 1 else 0)


def log_softened(logits, temperature):
    """``log_softmax(logits / T)``. Shifted before the division, which would round large logits: 1e-5 lost at 1e4."""
    return ((logits - logits.detach().amax(-1, keepdim=True)) / temperature).log_softmax(-1)


def loss_dtype(student):
    """float64 for float64 logits, float32 for all others."""
    return torch.float64 if student.dtype == torch.float64 else torch.float32


def counted_rows(batch):
    """Masks of the rows that count for the soft and for the hard term, the row weights, and labels fit to gather."""
    options = batch.options
    rows = batch.student.shape[:-1]
    weight = batch.sample_weight
    if weight is None:
        weight = batch.student.new_ones(rows, dtype=loss_dtype(batch.student))
    soft_rows = weight != 0
    labelled_rows, labels = soft_rows, None
    if batch.labels is not None:
        ignored = batch.labels == options.ignore_index
        labels = torch.where(ignored, 0, batch.labels).long()
        labelled_rows = soft_rows & ~ignored
        if options.unlabeled == "skip":
            soft_rows = labelled_rows
    return soft_rows, labelled_rows, weight, labels


def denominators(batch, soft_rows, labelled_rows, weight, labels):
    """What "mean" divides the two terms by; 1 for a term that no row counts for, so that it stays 0."""
    soft = torch.where(soft_rows, weight, 0).sum()
    hard_weight = weight
    if batch.class_weight is not None and labels is not None:
        hard_weight = weight * batch.class_weight[labels]
    hard = torch.where(labelled_rows, hard_weight, 0).sum()
    return torch.where(soft_rows.any(), soft, 1), torch.where(labelled_rows.any(), hard, 1)
