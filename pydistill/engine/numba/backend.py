"""The numba backend: plans the rows of a batch, runs the row loop on its threads, and reduces what that found.

float32 and float64 are computed as they are. Rows of a half type, and rows whose teacher has another dtype, pass
through small buffers of converted rows. Denormal numbers are not flushed to zero as in the C++ core: rows whose
exponentials end there are slower.
"""

import dataclasses
import math
import os
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pydistill.engine.batch import Batch, Outcome
from pydistill.engine.checks import check_rows, check_storage, sums_to_one
from pydistill.engine.loss_formula import combine
from pydistill.engine.metrics import METRICS, is_defined
from pydistill.engine.numba import scan
from pydistill.engine.numba.rows import row_loop
from pydistill.engine.numba.second_pass import pointwise
from pydistill.formulas import loss_dtype

_CHUNK_ELEMENTS = 1 << 18  # of rows converted at a time: a megabyte of float32
_ELEMENTS_PER_THREAD = 32768  # below that, waking a thread costs more than it saves
_HUGE_PAGE_BYTES = 8 << 20  # below, the allocator's own reuse beats fresh huge pages
_NUMPY_DTYPE: dict[torch.dtype, Any] = {torch.float32: np.float32, torch.float64: np.float64}  # those computed in
_SOFT_TERM = {"forward_kl": scan.FORWARD_KL, "mse": scan.MSE, "dkd": scan.DKD}


class NumbaBackend:
    """Runs batches on numba's code; serial unless asked for threads, which are Python's and not numba's."""

    name = "numba"
    isa = None

    def __init__(self, threads: int = 1) -> None:
        """``threads``: how many share the rows of a large batch."""
        self._threads = threads

    @property
    def threads(self) -> int:
        """Threads that a large batch runs on."""
        return self._threads

    def evaluate(
        self,
        batch: Batch,
        gradient: Tensor | None = None,
        grad_output: float | Tensor = 1.0,
        metrics: bool = False,
    ) -> Outcome:
        """See :meth:`pydistill.engine.backend.Backend.evaluate`."""
        check_storage(batch)
        # Grad mode belongs to a thread: the tensors of other threads must not require a gradient.
        teacher = None if batch.teacher is None else batch.teacher.detach()
        batch = dataclasses.replace(batch, student=batch.student.detach(), teacher=teacher)
        gradient = None if gradient is None else gradient.detach()
        rows, classes = batch.student.shape
        counted = _plan_rows(batch, grad_output)
        outcomes = np.zeros(rows, scan.ROW_OUTCOME)
        settings = make_settings(batch, gradient is not None, metrics)

        parts = min(self._threads, rows, max(1, rows * classes // _ELEMENTS_PER_THREAD))
        shares = [range(rows * i // parts, rows * (i + 1) // parts) for i in range(parts)]
        run = partial(_run_range, batch, gradient, plans=counted.plans, outcomes=outcomes, settings=settings)
        list((_thread_pool(os.getpid(), self._threads).map if parts > 1 else map)(run, shares))
        return _reduce(batch, counted, outcomes, metrics)

    def new_gradient(self, student: Tensor) -> Tensor:
        """An uninitialised buffer for the gradient; a large one from numpy, which asks for huge pages."""
        size = student.numel() * student.element_size()
        if size < _HUGE_PAGE_BYTES:
            return torch.empty(student.shape, dtype=student.dtype)
        return torch.from_numpy(np.empty(size, np.uint8)).view(student.dtype).view(student.shape)


@lru_cache(maxsize=1)
def _thread_pool(process: int, threads: int) -> ThreadPoolExecutor:
    """One pool per process: a forked child inherits the pool but not its threads."""
    return ThreadPoolExecutor(threads, thread_name_prefix="pydistill")


class _Rows(NamedTuple):
    """What the rows count for: their plans, masks for the two terms, and the denominators of "mean"."""

    plans: NDArray[Any]
    soft: NDArray[np.bool_]
    labelled: NDArray[np.bool_]
    items: list[float]


def _plan_rows(batch: Batch, grad_output: float | Tensor) -> _Rows:
    """The rules of engine/counting.py in numpy, which takes a third of torch's time for a small batch."""
    options, given = batch.options, batch.options.num_items
    plans, ignored = np.zeros(len(batch.student), scan.ROW_PLAN), np.zeros(len(batch.student), np.bool_)
    label, weight = plans["label"], plans["weight"]
    weight[:] = 1 if batch.sample_weight is None else batch.sample_weight.numpy()
    usable = (weight >= 0) & (weight < math.inf)
    if batch.labels is None:
        label[:] = -1
    else:
        label[:] = batch.labels.numpy()
        ignored = label == options.ignore_index
        usable &= ignored | ((label >= 0) & (label < batch.student.shape[1]))
        label[ignored] = -1
    if not usable.all():
        check_rows(batch)
    if options.unlabeled == "skip":
        weight[ignored] = 0
    soft = (weight != 0) & (given.soft != 0)
    labelled = (weight != 0) & (label >= 0) & (given.hard != 0)
    hard_weight = weight if batch.class_weight is None else weight * batch.class_weight.numpy()[label]
    sums = np.where(soft, weight, 0).sum(), np.where(labelled, hard_weight, 0).sum()
    items = [float(total if number is None else number) for total, number in zip(sums, given, strict=True)]

    weight[~((soft & (options.alpha > 0)) | (labelled & (options.alpha < 1)))] = 0
    scale = weight * (grad_output.detach().numpy() if isinstance(grad_output, Tensor) else grad_output)
    soft_items, hard_items = np.array(items if options.reduction == "mean" else [1, 1])
    with np.errstate(all="ignore"):  # 0 / 0 if no row counts for a term
        plans["soft_scale"] = np.where(soft, options.alpha * scale / soft_items, 0)
        if batch.evaluates_hard:
            plans["hard_scale"] = np.where(labelled, (1 - options.alpha) * scale / hard_items, 0)
    return _Rows(plans, soft, labelled & (weight != 0), items)


def make_settings(batch: Batch, write: bool, metrics: bool) -> scan.Settings:
    """The batch's constants as the row loop takes them."""
    options, term, class_weight_sum = batch.options, scan.NONE, float(batch.student.shape[1])
    if batch.evaluates_soft:
        term = _SOFT_TERM.get(options.divergence, scan.POINTWISE) if batch.teacher_indices is None else scan.TOPK
    if batch.class_weight is not None:
        class_weight_sum = float(batch.class_weight.numpy().sum(dtype=np.float64))
    temperature = 1.0 if term in (scan.NONE, scan.MSE) else options.temperature
    return scan.Settings(
        soft_term=term,
        hard=batch.evaluates_hard,
        write=write,
        metrics=metrics,
        temperature=temperature,
        units=temperature**2 if options.t_squared else 1.0,
        beta=options.beta or 0.0,
        smoothing=float(options.label_smoothing),
        class_weight_sum=class_weight_sum,
    )


def new_scratch(classes: int, real: type[np.floating[Any]]) -> scan.Scratch:
    """One thread's memory for rows of some classes."""
    return scan.Scratch(*np.zeros((len(scan.Scratch._fields), classes), real))


def _run_range(
    batch: Batch,
    gradient: Tensor | None,
    rows: range,
    plans: NDArray[Any],
    outcomes: NDArray[Any],
    settings: scan.Settings,
) -> None:
    """One thread's rows: all at once, or in converted chunks if a dtype is not the one computed in."""
    student, term, dtype = batch.student, settings.soft_term, loss_dtype(batch.student)
    teacher = student if term == scan.NONE or batch.teacher is None else batch.teacher
    real, classes, is_listed = _NUMPY_DTYPE[dtype], student.shape[1], term in (scan.TOPK, scan.DKD)
    divergence = batch.options.divergence if term in (scan.POINTWISE, scan.TOPK) else "forward_kl"
    points = pointwise(divergence, np.float64 if is_listed else real)  # listed classes are compared in float64
    run_rows = row_loop(pointwise=term == scan.POINTWISE, listed=is_listed)
    class_weight = np.ones(classes, real) if batch.class_weight is None else batch.class_weight.numpy()
    listed = teacher.shape[1] if term == scan.TOPK else int(is_listed)
    scratch, listed_row = new_scratch(classes, real), new_scratch(listed + 1, np.float64)
    converted = student.dtype != dtype or teacher.dtype != dtype
    step = max(1, _CHUNK_ELEMENTS // classes) if converted else len(rows)
    for start in rows[::step]:
        part = slice(start, min(start + step, rows.stop))
        # Converted rows are contiguous, also if the given ones overlap in memory.
        s, t = (x[part].to(dtype, memory_format=torch.contiguous_format) for x in (student, teacher))
        out, indices, partitions = s, plans["label"][part].copy(), np.empty(0)
        if gradient is not None:
            out = gradient[part] if gradient.dtype == dtype else torch.empty_like(s)
        if batch.teacher_indices is not None:
            indices = batch.teacher_indices[part].reshape(-1).numpy()
        if batch.log_partitions is not None:
            partitions = batch.log_partitions[part].numpy()
        logits, strides = (_flat(s), _flat(t), _flat(out)), (s.stride(0), t.stride(0), out.stride(0))
        of_rows = (class_weight, plans[part], outcomes[part], settings, scratch, listed_row)
        run_rows(points, logits, strides, (indices, partitions), *of_rows)
        if gradient is not None and gradient.dtype != dtype:
            gradient[part] = out


def _flat(x: Tensor) -> NDArray[Any]:
    """The memory of a matrix as one array, whose type tells numba that it is contiguous."""
    rows, classes = x.shape
    return x.as_strided(((rows - 1) * x.stride(0) + classes,), (1,)).numpy()


def _reduce(batch: Batch, counted: _Rows, outcomes: NDArray[Any], metrics: bool) -> Outcome:
    """The batch's outcome from its rows', in their order: the number of threads cannot change a bit."""
    options, dtype, per_row = batch.options, loss_dtype(batch.student), batch.options.reduction == "none"
    evaluated = {"soft": batch.teacher is not None, "hard": options.alpha < 1}
    terms: dict[str, Any] = {}
    for term, rows, denominator in zip(evaluated, (counted.soft, counted.labelled), counted.items, strict=True):
        values = counted.plans["weight"] * outcomes[term]
        terms[term] = values if per_row else values.sum()
        if options.reduction == "mean":
            with np.errstate(all="ignore"):
                terms[term] = terms[term] / denominator if rows.any() else 0.0
    loss = torch.as_tensor(combine(options.alpha, terms["soft"], terms["hard"]), dtype=dtype)
    for term, is_evaluated in evaluated.items():
        values = terms[term] if is_evaluated else np.full_like(terms[term], math.nan)
        terms[term] = torch.as_tensor(values, dtype=dtype) if per_row else float(values)

    means = dict.fromkeys(METRICS, math.nan)
    for name, metric in METRICS.items() if metrics else ():
        rows = counted.soft if metric.term == "soft" else counted.labelled
        if is_defined(metric, batch) and rows.any():
            means[name] = float(outcomes[name].sum() / rows.sum())
    return Outcome(
        loss=loss,
        **terms,
        soft_items=counted.items[0],
        hard_items=counted.items[1],
        metrics=means,
        teacher_sums_to_one=sums_to_one(batch),
    )
