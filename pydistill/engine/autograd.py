"""Chooses the path of a call, and connects the fused pass with autograd: forward computes the gradient for backward."""

from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from pydistill.engine import backend
from pydistill.engine.batch import CONSTANTS, Batch, Outcome, batch_of
from pydistill.engine.checks import check_dtensors, check_rows
from pydistill.engine.counting import counted_rows, denominators, narrow_top_k
from pydistill.engine.loss_formula import loss_formula
from pydistill.engine.metrics import METRICS, is_defined, mean_over, rows_of
from pydistill.engine.options import Options
from pydistill.engine.torch_private import apply_of, base_of, in_forward_mode, in_functorch, is_batched

_P = ParamSpec("_P")
_R = TypeVar("_R")


def raises_memory_error(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Decorate a function to raise MemoryError when torch's allocator raises its RuntimeError."""

    @wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return function(*args, **kwargs)
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "DefaultCPUAllocator: " not in str(error):
                raise
            raise MemoryError(f"no memory for the loss or its gradient: {error}") from error

    return call


@raises_memory_error
def run(batch: Batch, inplace: bool, metrics: bool) -> Outcome:
    """Evaluate a checked batch of any number of dimensions. The loss is differentiable in the student's logits."""
    why = why_formula(batch.tensors)
    if why is not None:
        check_dtensors(zip(("student_logits", *CONSTANTS), batch.tensors, strict=True))
        backend.last_call.text = f"torch formula: {why}" + ("; inplace ignored" if inplace else "")
        return _run_formula(batch, metrics)
    student = batch.student
    wants_gradient = student.requires_grad and torch.is_grad_enabled()
    if inplace and wants_gradient:
        _check_inplace(batch)
    flat = batch if _is_flat(batch) else flatten(batch)
    engine = backend.current()
    if wants_gradient:
        call = _Call(flat, engine, inplace, metrics)
        loss = _apply(flat.student, call)
        outcome = call.outcome
        del call.outcome  # its loss refers to the graph, and the graph to the call: the cycle would keep their memory
    else:
        outcome = engine.evaluate(flat, None, 1.0, metrics)
        loss = outcome.loss
    backend.last_call.text = engine.name + _inplace_note(wants_gradient, batch, flat) if inplace else engine.name
    if batch.options.reduction == "none" and student.dim() != 2:
        loss = loss.reshape(student.shape[:-1])
    outcome.loss = loss
    return outcome


class _Call:
    """One call of the loss, passed to the autograd function, whose other arguments must be tensors."""

    __slots__ = ("batch", "engine", "inference", "inplace", "metrics", "options", "outcome")

    batch: Batch | None
    engine: backend.Backend | None
    inference: list[Tensor | None] | None
    outcome: Outcome

    def __init__(self, batch: Batch, engine: backend.Backend, inplace: bool, metrics: bool) -> None:
        self.batch, self.engine, self.inplace, self.metrics = batch, engine, inplace, metrics
        self.options: Options = batch.options


class _FusedLoss(torch.autograd.Function):
    """Loss and gradient in one pass, in forward. float16 and reduction="none" compute the gradient in backward.

    Uses ``forward(ctx, ...)`` without ``setup_context``, with which a small batch takes 1.7 times as long.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, call: _Call) -> Tensor:
        batch, engine = call.batch, call.engine
        assert batch is not None
        assert engine is not None
        ctx.call = call
        # float16: divided by N the gradient underflows before a loss scaler can act. "none": grad_output is not known.
        ctx.deferred = student.dtype is torch.float16 or batch.options.reduction == "none"
        gradient = None
        if not ctx.deferred:
            gradient = student.detach() if call.inplace else engine.new_gradient(student)
        outcome = call.outcome = engine.evaluate(batch, gradient, 1.0, call.metrics)
        kept: Tensor | None = student
        if call.inplace and gradient is not None:
            torch.autograd.graph.increment_version(student)
            kept = None
        # Tensors go through save_for_backward, because torch does not notice that a graph was freed if they are
        # attributes of ctx. save_for_backward refuses tensors of inference_mode, which nobody can change anyway.
        constants: Iterable[Tensor | None] = batch.constants
        call.inference = None
        if True in [x is not None and x.is_inference() for x in constants]:
            call.inference, constants = split_inference(constants)
        ctx.save_for_backward(gradient, kept, *constants)
        call.batch = None
        return outcome.loss

    @staticmethod
    @raises_memory_error
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        gradient, student, *constants = ctx.saved_tensors
        call = ctx.call
        if call.inference is not None:
            constants = join_inference(constants, call.inference)
        if torch.is_grad_enabled() or is_batched(grad_output):  # create_graph, is_grads_batched
            if call.inplace:
                raise RuntimeError(
                    "inplace must be False for a second or a batched derivative, got True: the gradient has "
                    "overwritten the logits"
                )
            return _second_order(batch_of(student, constants, call.options), grad_output), None
        engine = call.engine
        if call.inplace:
            if engine is None:
                raise RuntimeError(
                    "inplace=True allows one backward, got a second one: the gradient was returned already"
                )
            call.engine = None
        if ctx.deferred:
            gradient = student.detach() if call.inplace else engine.new_gradient(student)
            scale = float(grad_output) if grad_output.dim() == 0 else grad_output.contiguous()
            engine.evaluate(batch_of(student.detach(), constants, call.options), gradient, scale)
            if call.inplace:
                torch.autograd.graph.increment_version(student)
        elif grad_output.item() != 1:
            gradient = gradient.mul_(grad_output) if call.inplace else gradient * grad_output
        return gradient, None


_apply = apply_of(_FusedLoss)


def split_inference(tensors: Iterable[Tensor | None]) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """``(those of inference_mode, the others)``, each with None in the other's places."""
    kept = [x if x is not None and x.is_inference() else None for x in tensors]
    return kept, [None if k is not None else x for k, x in zip(kept, tensors, strict=True)]


def join_inference(saved: Iterable[Tensor | None], kept: Iterable[Tensor | None]) -> list[Tensor | None]:
    """The list that :func:`split_inference` split."""
    return [s if k is None else k for s, k in zip(saved, kept, strict=True)]


def _second_order(batch: Batch, grad_output: Tensor) -> Tensor:
    """The gradient as differentiable operations, because the fused pass has no derivative of its own."""
    with torch.enable_grad():
        return torch.autograd.grad(loss_formula(batch).loss, batch.student, grad_output, create_graph=True)[0]


def flatten(batch: Batch) -> Batch:
    """Bring a batch into the form that backends take: rows in one dimension, classes next to each other in memory.

    The reshapes are recorded by autograd.
    """
    flat = flatten_constants(batch)
    flat.student = _as_rows(batch.student)
    return flat


def flatten_constants(batch: Batch) -> Batch:
    """Like :func:`flatten`, but the student's logits only get one dimension of rows; their classes may stay apart."""
    batch = narrow_top_k(batch)

    def rows(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.reshape(-1)

    def contiguous(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.contiguous()

    student, teacher, indices = batch.student, batch.teacher, batch.teacher_indices
    return Batch(
        student=student if student.dim() == 2 else student.reshape(-1, student.shape[-1]),
        teacher=None if teacher is None else _as_rows(teacher),
        labels=contiguous(rows(batch.labels)),
        sample_weight=rows(batch.sample_weight),
        class_weight=batch.class_weight,
        teacher_indices=None if indices is None else _as_rows(indices).contiguous(),
        log_partitions=contiguous(rows(batch.log_partitions)),
        options=batch.options,
    )


def _is_flat(batch: Batch) -> bool:
    """Whether :func:`flatten` would change nothing; decided quickly for the common case."""
    student, teacher, labels = batch.student, batch.teacher, batch.labels
    return (
        student.dim() == 2
        and student.is_contiguous()
        and (teacher is None or teacher.is_contiguous())
        and (labels is None or labels.is_contiguous())
        and batch.teacher_indices is None
    )


def _as_rows(logits: Tensor) -> Tensor:
    if logits.dim() != 2:
        logits = logits.reshape(-1, logits.shape[-1])
    return logits if logits.stride(1) == 1 else logits.contiguous()


def _inplace_note(wants_gradient: bool, batch: Batch, flat: Batch) -> str:
    if not wants_gradient:
        return "; inplace ignored: no gradient is wanted"
    if flat.student.data_ptr() != batch.student.data_ptr():
        return "; inplace ignored: student_logits was copied because of its strides, and the copy holds the gradient"
    return ", gradient in place"


_PLAIN = (Tensor, torch.nn.Parameter)


def why_formula(tensors: Iterable[Tensor | None]) -> str | None:
    """Return why the differentiable formula must run instead of the engine; None if the engine can."""
    for tensor in tensors:
        if tensor is not None and not (type(tensor) in _PLAIN and tensor.is_cpu):
            return f"device {tensor.device}" if type(tensor) in _PLAIN else f"tensor subclass {type(tensor).__name__}"
    if in_functorch():
        return "functorch transform"
    if in_forward_mode():
        return "forward-mode differentiation"
    return None


def _run_formula(batch: Batch, metrics: bool) -> Outcome:
    given, nan = batch.options.num_items, float("nan")
    if not in_functorch() and not batch.student.is_meta:  # neither has values to read
        check_rows(batch)
    terms = loss_formula(batch)
    outcome = Outcome(loss=terms.loss, soft=nan, hard=nan, soft_items=nan, hard_items=nan)
    if not metrics:
        return outcome
    counted = counted_rows(batch)
    soft_items, hard_items = denominators(counted, batch.class_weight)
    outcome.soft = terms.soft if batch.options.alpha > 0 else torch.full_like(terms.soft, nan)
    outcome.hard = terms.hard if batch.options.alpha < 1 else torch.full_like(terms.hard, nan)
    outcome.soft_items = soft_items if given.soft is None else given.soft
    outcome.hard_items = hard_items if given.hard is None else given.hard
    outcome.metrics = {
        name: mean_over(rows_of(metric, counted), metric.of_rows(batch), terms.loss.dtype)
        if is_defined(metric, batch)
        else nan
        for name, metric in METRICS.items()
    }
    return outcome


def _check_inplace(batch: Batch) -> None:
    student = batch.student
    base = base_of(student)
    if student.is_leaf or (base is not None and base.is_leaf and base.requires_grad):
        raise ValueError(
            f"student_logits must not be a leaf, or a view of a leaf, that requires a gradient with inplace=True, "
            f"which "
            f"would overwrite it; got such a tensor of shape {tuple(student.shape)}"
        )
    if _overlaps_itself(student):
        raise ValueError(
            f"student_logits must have rows that do not overlap in memory with inplace=True, got shape "
            f"{tuple(student.shape)} with strides {student.stride()}"
        )
    start, end = _memory(student)
    for name, other in zip(CONSTANTS, batch.constants, strict=True):
        if other is None:
            continue
        first, last = _memory(other)
        if start < last and first < end:
            raise ValueError(
                f"{name} must not share memory with student_logits with inplace=True, which would overwrite it"
            )


def _overlaps_itself(tensor: Tensor) -> bool:
    """Whether two indices may share an address: some dimension's stride lies within the span of the smaller ones."""
    if tensor.is_contiguous():
        return False
    span = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride < span:
            return True
        span += stride * max(0, size - 1)
    return False


def _memory(tensor: Tensor) -> tuple[int, int]:
    """Address of the first byte, and of the byte after the last."""
    start = tensor.data_ptr()
    if tensor.is_contiguous():
        return start, start + tensor.nbytes
    span = 1 + sum(stride * max(0, size - 1) for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
    return start, start + span * tensor.element_size()
