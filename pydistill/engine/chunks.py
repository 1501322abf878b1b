"""The loss of a linear head's outputs in chunks of rows. The logits of a chunk are overwritten by their gradient."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pydistill.engine.backend import Backend
from pydistill.engine.batch import CONSTANTS, Batch, Outcome, batch_of
from pydistill.engine.counting import CountedRows, counted_rows, denominators
from pydistill.engine.head import HALVES, Head, Products
from pydistill.engine.metrics import METRICS, rows_of
from pydistill.engine.options import Items
from pydistill.formulas import loss_dtype

SCRATCH_BYTES = 64 << 20


class Pass(NamedTuple):
    """Result of one run over the rows: an Outcome, and the gradients of hidden, weight and bias, None if not wanted.

    They are in the inputs' dtypes; for float16 inputs they are float32, and are rounded after the product with
    grad_output.
    """

    outcome: Outcome
    gradients: tuple[Tensor | None, ...]


@dataclass(slots=True, eq=False)
class HeadSetup:
    """What a run over the rows needs beside the batch, whose student is a stand-in ``(N, C)``.

    ``teacher`` is None if the batch has the teacher's logits, or the soft term is not evaluated. ``dtypes`` are those
    of the two heads' products.
    """

    student: Head
    teacher: Head | None
    engine: Backend
    chunk_rows: int | None
    dtypes: tuple[torch.dtype, torch.dtype | None]
    wanted: tuple[bool, ...] = (False, False, False)
    metrics: bool = False


def run(batch: Batch, setup: HeadSetup, grad_output: float | Tensor = 1.0) -> Pass:
    """Compute the loss of checked rows, and the wanted gradients of the student's head."""
    student, teacher, options, want_gradient = setup.student, setup.teacher, batch.options, True in setup.wanted
    counted = counted_rows(batch)
    soft_items, hard_items = map(float, denominators(counted, batch.class_weight))
    given = options.num_items
    if (
        options.reduction == "mean"
    ):  # a count of 0 stays None: the chunks then give 0, or NaN for rows of class weight 0
        of_all = Items(
            (soft_items or None) if given.soft is None else given.soft,
            (hard_items or None) if given.hard is None else given.hard,
        )
        options = dataclasses.replace(options, num_items=of_all)
    items = (
        soft_items if given.soft is None else given.soft,
        hard_items if given.hard is None else given.hard,
    )
    counts = counted.with_a_term
    kept = None if bool(counts.all()) else counts.nonzero().squeeze(1)
    rows = len(counts) if kept is None else len(kept)
    size = _chunk_size(setup, rows, batch.student.shape[1])
    ours = Products(student, setup.dtypes[0], size, want_gradient)
    theirs = None
    if teacher is not None and setup.dtypes[1] is not None:
        theirs = Products(teacher, setup.dtypes[1], size, False)
    unit = 1.0
    if setup.dtypes[0] is torch.float16 and options.reduction != "none":
        unit = _unit(batch, items, counted.weight)
    gradients: Sequence[Tensor | None] = _new_gradients(setup, kept is not None)
    totals = _Totals(batch, counted, setup.metrics)
    for start in range(0, rows, size):
        part: slice | Tensor = slice(start, min(start + size, rows))
        part = kept[part] if kept is not None else part
        hidden = student.hidden[part].to(setup.dtypes[0])
        logits, gradient = ours.logits(hidden)
        chunk = batch_of(
            logits, [_rows_of(name, x, part) for name, x in zip(CONSTANTS, batch.constants, strict=True)], options
        )
        if theirs is not None and teacher is not None:
            chunk.teacher, _ = theirs.logits(teacher.hidden[part].to(theirs.dtype))
        scale = grad_output[part].contiguous() if isinstance(grad_output, Tensor) else grad_output * unit
        totals.add(part, setup.engine.evaluate(chunk, gradient if want_gradient else None, scale, setup.metrics))
        if want_gradient:
            gradient = ours.before_softcap(logits, gradient)
            _add_gradients(gradients, ours, gradient, hidden, part, first=start == 0)
    if rows == 0:
        gradients = tuple(None if x is None else x.zero_() for x in gradients)
    return Pass(totals.outcome(items), tuple(_finished(gradients, student, unit)))


def _rows_of(name: str, tensor: Tensor | None, part: slice | Tensor) -> Tensor | None:
    return tensor if tensor is None or name == "class_weight" else tensor[part]


def _unit(batch: Batch, items: tuple[float, float], weight: Tensor) -> float:
    """Factor of a float16 gradient during the products; the sums, which are wider, are divided by it.

    Divided by N the gradient would underflow, and multiplied by a large weight overflow. With this factor the row of
    the largest weight has the gradient of its own loss.
    """
    largest = float(weight.max()) if weight.numel() else 1.0
    if batch.class_weight is not None:
        largest *= max(1.0, float(batch.class_weight.max()))
    if not 0 < largest < math.inf:
        return 1.0
    return min((n for n in items if n > 0), default=1.0) / largest if batch.options.reduction == "mean" else 1 / largest


def _chunk_size(setup: HeadSetup, rows: int, classes: int) -> int:
    """Rows per chunk: as given, or as many as the scratch memory holds. All chunks but the last have as many."""
    student, teacher, dtypes, chunk_rows = setup.student, setup.teacher, setup.dtypes, setup.chunk_rows
    want_gradient = True in setup.wanted
    if chunk_rows is None:
        of_engine = (
            setup.engine.threads * 3 * classes * max(4, dtypes[0].itemsize)
        )  # each thread's rows of exponentials
        scratch = SCRATCH_BYTES - min(of_engine, SCRATCH_BYTES // 4)
        wide = 0
        if student.softcap is not None:
            wide = (4 if dtypes[0] in HALVES else 0) + (max(4, dtypes[0].itemsize) if want_gradient else 0)
        per_row = dtypes[0].itemsize + wide
        if teacher is not None and dtypes[1] is not None:
            per_row += dtypes[1].itemsize + (4 if teacher.softcap is not None and dtypes[1] in HALVES else 0)
        chunk_rows = max(1, scratch // (classes * per_row))
    chunks = max(1, -(-rows // chunk_rows))
    return max(1, -(-rows // chunks))


def _new_gradients(setup: HeadSetup, has_gaps: bool) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Allocate the wanted gradients: that of hidden in its dtype, those of weight and bias in float32 or wider."""
    student, dtype, wanted = setup.student, setup.dtypes[0], setup.wanted
    wide = torch.float32 if dtype in HALVES else dtype
    hidden_dtype = wide if student.hidden.dtype is torch.float16 else student.hidden.dtype
    new_hidden = student.hidden.new_zeros if has_gaps else student.hidden.new_empty
    return (
        new_hidden(student.hidden.shape, dtype=hidden_dtype) if wanted[0] else None,
        student.weight.new_empty(student.weight.shape, dtype=wide) if wanted[1] else None,
        student.bias.new_zeros(student.bias.shape, dtype=wide) if wanted[2] and student.bias is not None else None,
    )


def _add_gradients(
    gradients: Sequence[Tensor | None],
    products: Products,
    gradient: Tensor,
    hidden: Tensor,
    part: slice | Tensor,
    first: bool,
) -> None:
    of_hidden, of_weight, of_bias = gradients
    if of_hidden is not None:
        of_hidden[part] = products.of_hidden(gradient).to(of_hidden.dtype)
    if of_weight is not None:
        products.add_to_weight(of_weight, gradient, hidden, first)
    if of_bias is not None:
        of_bias.add_(gradient.sum(0, dtype=of_bias.dtype), alpha=products.head.scale)


def _finished(gradients: Sequence[Tensor | None], student: Head, unit: float) -> Iterator[Tensor | None]:
    for gradient, value in zip(gradients, student.tensors, strict=True):
        if gradient is not None and unit != 1:
            gradient = gradient.div_(unit)
        if gradient is not None and value is not None and value.dtype is not torch.float16:
            gradient = gradient.to(value.dtype)
        yield gradient


class _Totals:
    """Adds up the outcomes of chunks. A metric is multiplied by the number of rows that it is a mean over."""

    def __init__(self, batch: Batch, counted: CountedRows, metrics: bool) -> None:
        self._batch, self._counted, self._metrics = batch, counted, metrics
        self._dtype = loss_dtype(batch.student)
        self._per_row = batch.options.reduction == "none"
        self._terms: dict[str, Any] = {name: self._zero() for name in ("loss", "soft", "hard")}
        self._sums = dict.fromkeys(METRICS, 0.0)
        self._sums_to_one: bool | None = None

    def _zero(self) -> float | Tensor:
        rows = self._batch.student.shape[0]
        return self._batch.student.new_zeros(rows, dtype=self._dtype) if self._per_row else 0.0

    def add(self, part: slice | Tensor, outcome: Outcome) -> None:
        """Add the outcome of one chunk, whose rows are ``part``."""
        if self._sums_to_one is None:
            self._sums_to_one = outcome.teacher_sums_to_one
        for name in self._terms:
            value = getattr(outcome, name)
            if self._per_row:
                self._terms[name][part] = torch.as_tensor(value, dtype=self._dtype)
            elif name == "loss" or self._metrics:
                self._terms[name] += float(value)
        if self._metrics:
            for name, metric in METRICS.items():
                rows = int(rows_of(metric, self._counted)[part].sum())
                if rows:
                    self._sums[name] += float(outcome.metrics[name]) * rows

    def outcome(self, items: tuple[float, float]) -> Outcome:
        """Return the outcome of all chunks."""
        terms, options, nan = self._terms, self._batch.options, float("nan")
        if self._metrics and options.alpha == 0:
            terms["soft"] = terms["soft"] + nan
        if self._metrics and options.alpha == 1:
            terms["hard"] = terms["hard"] + nan
        metrics = {}
        for name, metric in METRICS.items() if self._metrics else ():
            rows = int(rows_of(metric, self._counted).sum())
            defined = rows and (metric.term == "hard" or options.alpha > 0)
            metrics[name] = self._sums[name] / rows if defined else nan
        return Outcome(
            # scalar_tensor would refuse a sum beyond float32
            loss=terms["loss"] if self._per_row else torch.tensor(terms["loss"], dtype=self._dtype),
            soft=terms["soft"],
            hard=terms["hard"],
            soft_items=items[0],
            hard_items=items[1],
            metrics=metrics,
            teacher_sums_to_one=bool(self._sums_to_one),
        )
