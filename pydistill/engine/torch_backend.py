"""The torch backend: evaluates the values and derivatives of formulas.py over chunks of rows, without autograd.

It is slower than the other two, but runs wherever torch runs, with the same results. It computes in float64. In
float32 torch's log_softmax would exceed the error bounds of the other backends by a factor of seven in a peaked row of
130,000 classes: it shifts after the division by T and sums in float32.
"""

import dataclasses
import math

import torch
from torch import Tensor

from pydistill.engine.batch import Batch, Outcome
from pydistill.engine.checks import check_rows, check_storage, sums_to_one
from pydistill.engine.counting import CountedRows, counted_rows, denominators
from pydistill.engine.loss_formula import combine, mean
from pydistill.engine.metrics import METRICS, is_defined, mean_over, rows_of
from pydistill.engine.options import Options
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

_CHUNK_ELEMENTS = 1 << 17  # a megabyte of float64: the memory of a chunk stays in cache


class TorchBackend:
    """Evaluates batches with torch operations, on torch's threads."""

    name = "torch"
    isa = None

    @property
    def threads(self) -> int:
        """Torch's number of threads."""
        return torch.get_num_threads()

    @torch.no_grad()
    def evaluate(
        self,
        batch: Batch,
        gradient: Tensor | None = None,
        grad_output: float | Tensor = 1.0,
        metrics: bool = False,
    ) -> Outcome:
        """See :meth:`pydistill.engine.backend.Backend.evaluate`."""
        check_storage(batch)
        check_rows(batch)
        options, dtype, rows = batch.options, loss_dtype(batch.student), len(batch.student)
        counted = counted_rows(batch)
        items = _items(batch, counted)
        averaged = options.reduction == "mean"
        scale = counted.weight.double() * grad_output
        soft_scale = torch.where(counted.soft, options.alpha * scale / (items[0] if averaged else 1), 0)
        hard_scale = torch.where(counted.labelled, (1 - options.alpha) * scale / (items[1] if averaged else 1), 0)
        soft, hard = torch.zeros(2, rows, dtype=torch.float64)
        defined = {name: metric for name, metric in METRICS.items() if metrics and is_defined(metric, batch)}
        of_rows = {name: torch.zeros(rows, dtype=torch.float64) for name in defined}

        def run_chunk(part: slice) -> None:
            chunk = _chunk(batch, counted, part)
            g = torch.zeros_like(chunk.student)
            if batch.evaluates_soft:
                value, h = _soft_term(chunk)
                h = torch.where(value.isnan().unsqueeze(-1), math.nan, h)  # h may not depend on the NaN
                soft[part] = torch.where(counted.soft[part], counted.weight[part] * value, 0)
                g += torch.where(counted.soft[part].unsqueeze(-1), soft_scale[part].unsqueeze(-1) * h, 0)
            if batch.evaluates_hard:
                value, h = _hard_term(chunk)
                hard[part] = torch.where(counted.labelled[part], counted.weight[part] * value, 0)
                g += torch.where(counted.labelled[part].unsqueeze(-1), hard_scale[part].unsqueeze(-1) * h, 0)
            for name, metric in defined.items():
                of_rows[name][part] = metric.of_rows(chunk).double()
            if gradient is not None:
                gradient[part] = torch.where(counted.with_a_term[part].unsqueeze(-1), g, 0)

        step = max(1, _CHUNK_ELEMENTS // max(1, batch.student.shape[-1]))
        for start in range(0, rows, step):
            # A function, whose memory is free before the next chunk: if memory suffices for the first chunk, it
            # suffices for all. So no logits are lost because memory runs out while the gradient is written over them.
            run_chunk(slice(start, start + step))

        if options.reduction != "none":
            soft, hard = soft.sum(), hard.sum()
        if averaged:
            soft, hard = mean(soft, items[0], counted.soft), mean(hard, items[1], counted.labelled)
        loss = torch.as_tensor(combine(options.alpha, soft, hard), dtype=dtype)
        soft = soft if batch.teacher is not None else torch.full_like(soft, math.nan)
        hard = hard if options.alpha < 1 else torch.full_like(hard, math.nan)
        shares = {name: float(mean_over(rows_of(METRICS[name], counted), x, x.dtype)) for name, x in of_rows.items()}
        return Outcome(
            loss=loss,
            soft=soft if options.reduction == "none" else float(soft),
            hard=hard if options.reduction == "none" else float(hard),
            soft_items=items[0],
            hard_items=items[1],
            metrics={name: shares.get(name, math.nan) for name in METRICS},
            teacher_sums_to_one=sums_to_one(batch),
        )

    def new_gradient(self, student: Tensor) -> Tensor:
        """Allocate a buffer for the gradient; its values are arbitrary."""
        return torch.empty(student.shape, dtype=student.dtype)


def _chunk(batch: Batch, counted: CountedRows, part: slice) -> Batch:
    """Return some rows in float64, 0 in rows without a term; all labels are valid class indices."""
    counts = counted.with_a_term[part].unsqueeze(-1)

    def some(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[part]

    return Batch(
        student=torch.where(counts, batch.student[part].double(), 0),
        teacher=None if batch.teacher is None else torch.where(counts, batch.teacher[part].double(), 0),
        labels=some(counted.labels),
        sample_weight=None,
        class_weight=batch.class_weight,
        teacher_indices=some(batch.teacher_indices),
        log_partitions=some(batch.log_partitions),
        options=batch.options,
    )


def _soft_term(chunk: Batch) -> tuple[Tensor, Tensor]:
    """Value per row with T^2, and its gradient with respect to the student's logits."""
    s, t, options = chunk.student, chunk.teacher, chunk.options
    assert t is not None
    value = soft_value(s, t, chunk.labels, options, chunk.teacher_indices, chunk.log_partitions)
    if options.divergence == "mse":
        difference = torch.where((s == -math.inf) & (t == -math.inf), 0, s - t)
        return value, difference * (2 / s.shape[-1])
    units = options.temperature**2 if options.t_squared else 1.0
    scale = units / options.temperature
    if options.divergence == "dkd":
        assert chunk.labels is not None
        return value, scale * _dkd_gradient(s, t, chunk.labels, options)
    if chunk.teacher_indices is not None:
        return value, scale * _topk_gradient(s, t, chunk.teacher_indices, chunk.log_partitions, options)
    x = point(log_softened(t, options.temperature), log_softened(s, options.temperature), options.beta)
    h = DIVERGENCES[options.divergence].d_log_q(x)
    return value, scale * (h - x.q * _sum_of(h))


def _sum_of(h: Tensor) -> Tensor:
    h_sum = h.sum(-1, keepdim=True)
    return torch.where(h_sum.isfinite(), h_sum, math.nan)  # with an infinite h the whole row's gradient is NaN


def _topk_gradient(s: Tensor, t: Tensor, indices: Tensor, partitions: Tensor | None, options: Options) -> Tensor:
    """Gradient for a top-k teacher: h of the k classes and of the rest.

    The rest's share is distributed over its classes in proportion to the student's probabilities.
    """
    log_p, log_q, log_q_all = outcomes(s, t, indices, partitions, options.temperature)
    x = point(log_p, log_q, options.beta)
    h = DIVERGENCES[options.divergence].d_log_q(x)
    h_sum = _sum_of(h)
    within_rest = torch.where(log_q_all == -math.inf, 0, (log_q_all - log_q[..., -1:]).exp())
    gradient: Tensor = times(within_rest, h[..., -1:]) - log_q_all.exp() * h_sum
    return gradient.scatter(-1, indices, (h - x.q * h_sum)[..., :-1])


def _dkd_gradient(s: Tensor, t: Tensor, labels: Tensor, options: Options) -> Tensor:
    """Gradient of dkd: q - p for the label; for the others a share of p - q, and beta times forward_kl's."""
    assert options.beta is not None
    if s.shape[-1] == 1:
        return s * 0
    of_label = torch.nn.functional.one_hot(labels, s.shape[-1]).bool()
    share, conditional = [], []
    for logits in (t, s):
        share.append(log_softened(logits, options.temperature).exp().gather(-1, labels.unsqueeze(-1)))
        conditional.append(log_within_others(logits, of_label, options.temperature).exp())
    (p_label, q_label), (p, q) = share, conditional
    within = torch.where(p.sum(-1, keepdim=True) == 0, 0, q - p)  # without mass among the others: nothing to compare
    rest = (p_label - q_label) * q + options.beta * within
    return torch.where(of_label, q_label - p_label, rest)


def _hard_term(chunk: Batch) -> tuple[Tensor, Tensor]:
    """torch's cross-entropy per row, and its gradient with respect to the student's logits."""
    s, labels, smoothing = chunk.student, chunk.labels, chunk.options.label_smoothing
    assert labels is not None
    log_q = s.log_softmax(-1)
    weight = s.new_ones(s.shape[-1]) if chunk.class_weight is None else chunk.class_weight
    target = torch.zeros_like(s).scatter_(-1, labels.unsqueeze(-1), 1 - smoothing) * weight[labels].unsqueeze(-1)
    value = -(1 - smoothing) * weight[labels] * log_q.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    if smoothing > 0:
        value = value - smoothing / s.shape[-1] * (log_q * weight).sum(-1)
        target = target + smoothing / s.shape[-1] * weight
    return value, log_q.exp() * target.sum(-1, keepdim=True) - target


def _items(batch: Batch, counted: CountedRows) -> tuple[float, float]:
    """The denominators: the given ones, or the sums of weights in float64."""
    wide = dataclasses.replace(counted, weight=counted.weight.double())
    soft, hard = denominators(wide, None if batch.class_weight is None else batch.class_weight.double())
    given = batch.options.num_items
    return (
        float(soft) if given.soft is None else given.soft,
        float(hard) if given.hard is None else given.hard,
    )
