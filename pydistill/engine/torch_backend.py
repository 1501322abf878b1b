"""The torch backend: values and h of formulas.py over chunks of rows. No autograd, first order, small buffers.

Slower than the other two, but the same results wherever torch runs; and the plainest statement of what they do.
Everything is float64: torch's float32 log_softmax, shifted only after the division by T and summed in float32, misses
the bounds that the other two keep, seven times over in a peaked row of 130,000 classes.
"""

import math

import torch

from pydistill.engine.batch import Outcome
from pydistill.engine.checks import check_rows, check_storage, sums_to_one
from pydistill.engine.counting import counted_rows, denominators, rows_with_a_term
from pydistill.engine.loss_formula import combine, mean
from pydistill.formulas import (
    DIVERGENCES,
    log_softened,
    log_within_others,
    loss_dtype,
    outcomes,
    point,
    soft_value,
    times,
)

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
        check_storage(batch)
        check_rows(batch)
        options, student = batch.options, batch.student
        soft_on, hard_on = batch.teacher is not None, options.alpha < 1
        dtype = loss_dtype(student)
        soft_rows, labelled_rows, weight, labels = counted_rows(batch)
        soft_items, hard_items = _items(batch, soft_rows, labelled_rows, weight, labels)
        with_a_term = rows_with_a_term(batch, soft_rows, labelled_rows)
        averaged = options.reduction == "mean"
        scale = weight.double() * grad_output
        soft_scale = options.alpha * scale / (soft_items if averaged else 1)
        hard_scale = (1 - options.alpha) * scale / (hard_items if averaged else 1)
        soft, hard = torch.zeros(2, len(student), dtype=torch.float64)
        agree, correct = torch.zeros(2, len(student), dtype=torch.bool)

        def run_rows(rows):
            counted = with_a_term[rows].unsqueeze(-1)
            s = torch.where(counted, student[rows].double(), 0)
            g = torch.zeros_like(s)
            if batch.evaluates_soft:
                t = torch.where(counted, batch.teacher[rows].double(), 0)
                others = (None if x is None else x[rows] for x in (labels, batch.teacher_indices, batch.log_partitions))
                value, h = _soft_term(s, t, options, *others)
                h = torch.where(value.isnan().unsqueeze(-1), math.nan, h)  # also where h does not see the NaN
                soft[rows] = torch.where(soft_rows[rows], weight[rows] * value, 0)
                g += torch.where(soft_rows[rows], soft_scale[rows], 0).unsqueeze(-1) * h
                theirs = t.argmax(-1)
                if batch.teacher_indices is not None:
                    theirs = batch.teacher_indices[rows].gather(-1, theirs.unsqueeze(-1)).squeeze(-1)
                agree[rows] = (s.argmax(-1) == theirs) & _ordered(s) & _ordered(t)
            if batch.evaluates_hard:
                value, h = _hard_term(s, labels[rows], batch.class_weight, options.label_smoothing)
                hard[rows] = torch.where(labelled_rows[rows], weight[rows] * value, 0)
                g += torch.where(labelled_rows[rows], hard_scale[rows], 0).unsqueeze(-1) * h
            if metrics and labels is not None:
                correct[rows] = (s.argmax(-1) == labels[rows]) & _ordered(s)
            if gradient is not None:
                gradient[rows] = torch.where(counted, g, 0)

        step = max(1, _CHUNK_ELEMENTS // max(1, student.shape[-1]))
        for start in range(0, len(student), step):
            # A function, whose memory is free before the next chunk: what sufficed for the first suffices for all, so
            # that no logits are lost when memory runs out while the gradient is written over them.
            run_rows(slice(start, start + step))

        agreement = _share(agree, soft_rows) if metrics and soft_on else math.nan
        accuracy = _share(correct, labelled_rows & with_a_term) if metrics and labels is not None else math.nan
        if options.reduction != "none":
            soft, hard = soft.sum(dtype=torch.float64), hard.sum(dtype=torch.float64)
        if averaged:
            soft, hard = mean(soft, soft_items, soft_rows), mean(hard, hard_items, labelled_rows)
        loss = torch.as_tensor(combine(options.alpha, soft, hard), dtype=dtype)
        soft = soft if soft_on else torch.full_like(soft, math.nan)
        hard = hard if hard_on else torch.full_like(hard, math.nan)
        if options.reduction != "none":
            soft, hard = float(soft), float(hard)
        return Outcome(loss, soft, hard, agreement, accuracy, soft_items, hard_items, sums_to_one(batch))

    def new_gradient(self, student):
        """An uninitialised buffer for the gradient."""
        return torch.empty(student.shape, dtype=student.dtype)


def _soft_term(s, t, options, labels, indices, partitions):
    """Value per row with T^2, and its gradient with respect to s."""
    value = soft_value(s, t, labels, options, indices, partitions)
    if options.divergence == "mse":
        difference = torch.where((s == -math.inf) & (t == -math.inf), 0, s - t)
        return value, difference * (2 / s.shape[-1])
    units = options.temperature**2 if options.t_squared else 1.0
    scale = units / options.temperature
    if options.divergence == "dkd":
        return value, scale * _dkd_gradient(s, t, labels, options)
    divergence = DIVERGENCES[options.divergence]
    if indices is not None:
        return value, scale * _topk_gradient(s, t, indices, partitions, options)
    x = point(log_softened(t, options.temperature), log_softened(s, options.temperature), options.beta)
    h = divergence.d_log_q(x)
    return value, scale * (h - x.q * _sum_of(h))


def _sum_of(h):
    h_sum = h.sum(-1, keepdim=True)
    return torch.where(h_sum.isfinite(), h_sum, math.nan)  # an infinite h: the whole row's gradient is NaN


def _topk_gradient(s, t, indices, partitions, options):
    """h of the k classes and of the rest, whose share is spread over its classes as the student spreads it."""
    log_p, log_q, log_q_all = outcomes(s, t, indices, partitions, options.temperature)
    x = point(log_p, log_q, options.beta)
    h = DIVERGENCES[options.divergence].d_log_q(x)
    h_sum = _sum_of(h)
    within_rest = torch.where(log_q_all == -math.inf, 0, (log_q_all - log_q[..., -1:]).exp())
    gradient = times(within_rest, h[..., -1:]) - log_q_all.exp() * h_sum
    return gradient.scatter(-1, indices, (h - x.q * h_sum)[..., :-1])


def _dkd_gradient(s, t, labels, options):
    """Of the label: q - p. Of the others: the rest of that, and beta times forward_kl's gradient within them."""
    if s.shape[-1] == 1:
        return s * 0
    of_label = torch.nn.functional.one_hot(labels, s.shape[-1]).bool()
    share, conditional = [], []
    for logits in (t, s):
        share.append(log_softened(logits, options.temperature).exp().gather(-1, labels.unsqueeze(-1)))
        conditional.append(log_within_others(logits, of_label, options.temperature).exp())
    (p_label, q_label), (p, q) = share, conditional
    within = torch.where(p.sum(-1, keepdim=True) == 0, 0, q - p)  # no mass among the others: nothing to compare
    rest = (p_label - q_label) * q + options.beta * within
    return torch.where(of_label, q_label - p_label, rest)


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
    given = (options.soft_items, options.hard_items)
    return [float(c) if g is None else g for c, g in zip(counted, given, strict=True)]
