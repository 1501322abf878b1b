"""The torch backend: values and h of formulas.py over chunks of rows. No autograd, first order, small buffers.

Slower than the other two, but the same results wherever torch runs; and the plainest statement of what they do.
Everything is float64: torch's float32 log_softmax, shifted only after the division by T and summed in float32, misses
the bounds that the other two keep, seven times over in a peaked row of 130,000 classes.
"""

import math

import torch

from pydistill.engine.batch import Outcome
from pydistill.engine.checks import check_rows, sums_to_one
from pydistill.formulas import DIVERGENCES, Point, combine, counted_rows, denominators, loss_dtype

_CHUNK_ELEMENTS = 1 << 17  # a megabyte of float64: what a chunk allocates stays in cache


class TorchBackend:
    """Runs batches with torch operations, on torch's threads."""

    name = "torch"
    isa = None

    @property
    def threads(self) -> int:
        """Torch's number of threads."""
        return torch.get_num_threads()

    @torch.no_grad()
    def evaluate(self, batch, gradient=None, grad_output=1.0, metrics=False) -> Outcome:
        """See :func:`pydistill.engine.backend.evaluate`."""
        check_rows(batch)
        options, student = batch.options, batch.student
        soft_on, hard_on = batch.teacher is not None, options.alpha < 1
        dtype = loss_dtype(student)
        soft_rows, labelled_rows, weight, labels = counted_rows(batch)
        soft_items, hard_items = _items(batch, soft_rows, labelled_rows, weight, labels)
        mean = options.reduction == "mean"
        scale = weight * grad_output
        soft_scale = options.alpha * scale / (soft_items if mean else 1)
        hard_scale = (1 - options.alpha) * scale / (hard_items if mean else 1)
        soft, hard = torch.zeros(2, len(student), dtype=dtype)
        agree, correct = torch.zeros(2, len(student), dtype=torch.bool)

        step = max(1, _CHUNK_ELEMENTS // max(1, student.shape[-1]))
        for start in range(0, len(student), step):
            rows = slice(start, start + step)
            counted = (soft_rows | labelled_rows)[rows].unsqueeze(-1)
            s = torch.where(counted, student[rows].double(), 0)
            g = torch.zeros_like(s)
            if soft_on:
                t = torch.where(counted, batch.teacher[rows].double(), 0)
                value, h = _soft_term(s, t, options)
                soft[rows] = torch.where(soft_rows[rows], weight[rows] * value, 0)
                g += torch.where(soft_rows[rows], soft_scale[rows], 0).unsqueeze(-1) * h
                agree[rows] = (s.argmax(-1) == t.argmax(-1)) & _ordered(s) & _ordered(t)
            if hard_on:
                value, h = _hard_term(s, labels[rows], batch.class_weight, options.label_smoothing)
                hard[rows] = torch.where(labelled_rows[rows], weight[rows] * value, 0)
                g += torch.where(labelled_rows[rows], hard_scale[rows], 0).unsqueeze(-1) * h
            if metrics and labels is not None:
                correct[rows] = (s.argmax(-1) == labels[rows]) & _ordered(s)
            if gradient is not None:
                gradient[rows] = torch.where(counted, g, 0)

        agreement = _share(agree, soft_rows) if metrics and soft_on else math.nan
        accuracy = _share(correct, labelled_rows) if metrics and labels is not None else math.nan
        if options.reduction != "none":
            soft, hard = soft.sum(dtype=torch.float64), hard.sum(dtype=torch.float64)
        if mean:
            soft = soft / soft_items if soft_rows.any() else soft
            hard = hard / hard_items if labelled_rows.any() else hard
        loss = torch.as_tensor(combine(options.alpha, soft, hard), dtype=dtype)
        soft = soft if soft_on else torch.full_like(soft, math.nan)
        hard = hard if hard_on else torch.full_like(hard, math.nan)
        if options.reduction != "none":
            soft, hard = float(soft), float(hard)
        return Outcome(loss, soft, hard, agreement, accuracy, soft_items, hard_items, sums_to_one(batch.teacher))

    def new_gradient(self, student):
        """An uninitialised buffer for the gradient."""
        return torch.empty(student.shape, dtype=student.dtype)


def _soft_term(s, t, options):
    """Value per row with T^2, and its gradient with respect to s."""
    divergence = DIVERGENCES[options.divergence]
    log_q = (s / options.temperature).log_softmax(-1)
    log_p = (t / options.temperature).log_softmax(-1)
    point = Point(log_p.exp(), log_q.exp(), log_p, log_q)
    units = options.temperature**2 if options.t_squared else 1.0
    h = divergence.d_log_q(point, options.beta)
    h_sum = h.sum(-1, keepdim=True)
    h_sum = torch.where(h_sum.isfinite(), h_sum, math.nan)  # an infinite h: the whole row's gradient is NaN
    gradient = (h - point.q * h_sum) * (units / options.temperature)
    return units * divergence.value(point, options.beta).sum(-1), gradient


def _hard_term(s, labels, class_weight, smoothing):
    """torch's cross-entropy per row, and its gradient with respect to s. Labels of other rows are 0, any class."""
    log_q = s.log_softmax(-1)
    weight = s.new_ones(s.shape[-1]) if class_weight is None else class_weight
    target = torch.zeros_like(s).scatter_(-1, labels.unsqueeze(-1), 1 - smoothing) * weight[labels].unsqueeze(-1)
    value = -(1 - smoothing) * weight[labels] * log_q.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    if smoothing > 0:
        value = value - smoothing / s.shape[-1] * (log_q * weight).sum(-1)
        target = target + smoothing / s.shape[-1] * weight
    return value, log_q.exp() * target.sum(-1, keepdim=True) - target


def _ordered(x):
    """Rows that have an argmax: no NaN, no +inf, not -inf throughout."""
    return x.amax(-1).isfinite()


def _share(flags, rows) -> float:
    return float(flags[rows].double().mean()) if rows.any() else math.nan


def _items(batch, soft_rows, labelled_rows, weight, labels):
    options = batch.options
    weights = [w.double() if w is not None else None for w in (weight, batch.class_weight)]
    counted = denominators(batch._replace(class_weight=weights[1]), soft_rows, labelled_rows, weights[0], labels)
    soft = float(counted[0]) if soft_rows.any() else 0.0
    hard = float(counted[1]) if labelled_rows.any() and labels is not None else 0.0
    return options.soft_items or soft, options.hard_items or hard
