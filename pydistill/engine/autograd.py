"""The autograd boundary: which path a call takes, and the gradient computed ahead of backward."""

from functools import wraps

import torch
from torch import Tensor

from pydistill.engine import backend
from pydistill.engine.batch import Batch, Outcome
from pydistill.engine.checks import check_dtensors, check_rows, in_forward_mode, in_functorch, is_batched
from pydistill.engine.counting import counted_rows, denominators, narrow_top_k, rows_with_a_term
from pydistill.engine.loss_formula import loss_formula


class _Call:
    """One call of the loss on its way through autograd, which takes tensors and opaque objects only."""

    __slots__ = ("batch", "engine", "inference", "inplace", "metrics", "outcome")

    def __init__(self, batch, engine, inplace, metrics):
        self.batch, self.engine, self.inplace, self.metrics = batch, engine, inplace, metrics


def raises_memory_error(function):
    """Out of memory is a MemoryError, whoever notices it: torch's allocator raises a RuntimeError of its own."""

    @wraps(function)
    def call(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "DefaultCPUAllocator: " not in str(error):
                raise
            raise MemoryError(f"no memory for the loss or its gradient: {error}") from error

    return call


@raises_memory_error
def run(batch: Batch, inplace: bool, metrics: bool):
    """Loss of a checked batch of any number of dimensions: ``(loss, Outcome)``, differentiable in the student."""
    why = why_formula(batch[:7])
    if why is not None:
        check_dtensors(zip(("student_logits", *batch._fields[1:7]), batch[:7], strict=True))
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
        del call.outcome  # it holds the loss, whose graph holds the call: a cycle would keep their memory for long
    else:
        outcome = engine.evaluate(flat, None, 1.0, metrics)
        loss = outcome.loss
    backend.last_call.text = engine.name + _inplace_note(wants_gradient, batch, flat) if inplace else engine.name
    if batch.options.reduction == "none" and student.dim() != 2:
        loss = loss.reshape(student.shape[:-1])
    return loss, outcome


class _FusedLoss(torch.autograd.Function):
    """Loss and gradient in one pass, in forward; float16 and reduction="none" run the gradient's pass in backward.

    The old style, forward with ctx: with setup_context a small batch takes 1.7 times as long.
    """

    @staticmethod
    def forward(ctx, student, call):
        batch, engine = call.batch, call.engine
        ctx.call = call
        # float16: divided by N the gradient underflows before a loss scaler can help; "none": not known yet.
        ctx.deferred = student.dtype is torch.float16 or batch.options.reduction == "none"
        gradient = None
        if not ctx.deferred:
            gradient = student.detach() if call.inplace else engine.new_gradient(student)
        outcome = call.outcome = engine.evaluate(batch, gradient, 1.0, call.metrics)
        if call.inplace and gradient is not None:
            torch.autograd.graph.increment_version(student)
            student = None
        # Tensors go through save_for_backward: attributes of ctx escape torch's check for a freed graph. It refuses
        # those of inference_mode, which nobody can change without it.
        constants = batch[1:7]
        call.inference = None
        if True in [x is not None and x.is_inference() for x in constants]:
            call.inference, constants = split_inference(constants)
        ctx.save_for_backward(gradient, student, *constants)
        call.batch = batch.options
        return outcome.loss

    @staticmethod
    @raises_memory_error
    def backward(ctx, grad_output):
        gradient, student, *others = ctx.saved_tensors
        call = ctx.call
        if call.inference is not None:
            others = [saved if kept is None else kept for saved, kept in zip(others, call.inference, strict=True)]
        if torch.is_grad_enabled() or is_batched(grad_output):  # create_graph, is_grads_batched
            if call.inplace:
                raise RuntimeError(
                    "inplace=True: no second derivative and no batched one, the logits are overwritten by the gradient"
                )
            return _second_order(Batch(student, *others, call.batch), grad_output), None
        if call.inplace:
            if call.engine is None:
                raise RuntimeError("inplace=True allows one backward: the gradient was handed out already")
            engine, call.engine = call.engine, None
        else:
            engine = call.engine
        if ctx.deferred:
            gradient = student.detach() if call.inplace else engine.new_gradient(student)
            scale = float(grad_output) if grad_output.dim() == 0 else grad_output.contiguous()
            engine.evaluate(Batch(student.detach(), *others, call.batch), gradient, scale)
            if call.inplace:
                torch.autograd.graph.increment_version(student)
        elif grad_output.item() != 1:
            gradient = gradient.mul_(grad_output) if call.inplace else gradient * grad_output
        return gradient, None


# Function.apply less its look for functorch, which run() has had: a twentieth of a small batch's time.
_apply = super(torch.autograd.Function, _FusedLoss).apply


def split_inference(tensors):
    """``(those of inference_mode, the others)``, each with None in the other's places."""
    kept = [x if x is not None and x.is_inference() else None for x in tensors]
    return kept, [None if k is not None else x for k, x in zip(kept, tensors, strict=True)]


def _second_order(batch, grad_output):
    """The gradient as differentiable operations: the fused pass has none, and dropping them silently is wrong."""
    with torch.enable_grad():
        loss, _, _ = loss_formula(batch)
        return torch.autograd.grad(loss, batch.student, grad_output, create_graph=True)[0]


def flatten(batch: Batch) -> Batch:
    """Rows in one dimension, classes next to each other. The reshapes are autograd's business."""
    return flatten_constants(batch)._replace(student=_as_rows(batch.student))


def flatten_constants(batch: Batch) -> Batch:
    """All of a batch but the student's logits as :func:`flatten` does; these only get one dimension of rows."""
    student, teacher, labels, sample_weight, class_weight, indices, partitions, options = narrow_top_k(batch)
    return Batch(
        student if student.dim() == 2 else student.reshape(-1, student.shape[-1]),
        None if teacher is None else _as_rows(teacher),
        None if labels is None else labels.reshape(-1).contiguous(),
        None if sample_weight is None else sample_weight.reshape(-1),
        class_weight,
        None if indices is None else _as_rows(indices).contiguous(),
        None if partitions is None else partitions.reshape(-1).contiguous(),
        options,
    )


def _is_flat(batch) -> bool:
    """The common case, told quickly."""
    student, teacher, labels = batch[:3]
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


def _inplace_note(wants_gradient, batch, flat) -> str:
    if not wants_gradient:
        return "; inplace ignored: no gradient is wanted"
    if flat.student.data_ptr() != batch.student.data_ptr():
        return "; inplace ignored: these strides of student_logits cost a copy, which holds the gradient"
    return ", gradient in place"


_PLAIN = (Tensor, torch.nn.Parameter)


def why_formula(tensors) -> str | None:
    """Why the differentiable formula must run instead of the engine; None where it need not."""
    for tensor in tensors:
        if tensor is not None and not (type(tensor) in _PLAIN and tensor.is_cpu):
            return f"device {tensor.device}" if type(tensor) in _PLAIN else f"tensor subclass {type(tensor).__name__}"
    if in_functorch():
        return "functorch transform"
    if in_forward_mode():
        return "forward-mode differentiation"
    return None


def _run_formula(batch, metrics):
    options = batch.options
    soft_rows, labelled_rows, weight, labels = counted_rows(batch)
    if not in_functorch() and not batch.student.is_meta:  # neither has values to look at
        check_rows(batch)
    loss, soft, hard = loss_formula(batch)
    nan = float("nan")
    if not metrics:
        return loss, Outcome(loss, nan, nan, nan, nan, nan, nan, False)
    items = denominators(batch, soft_rows, labelled_rows, weight, labels)
    best = _first_maximum(batch.student)
    agreement = accuracy = nan
    if batch.teacher is not None:
        theirs = _first_maximum(batch.teacher)
        if batch.teacher_indices is not None:
            of_all = batch.teacher_indices.gather(-1, theirs.clamp(min=0).unsqueeze(-1)).squeeze(-1)
            theirs = torch.where(theirs < 0, -1, of_all)
        agreement = _share((best == theirs) & (best >= 0), soft_rows, loss.dtype)
    if batch.labels is not None:
        with_a_term = rows_with_a_term(batch, soft_rows, labelled_rows)
        accuracy = _share(best == batch.labels, labelled_rows & with_a_term, loss.dtype)
    return loss, Outcome(
        loss,
        soft if options.alpha > 0 else torch.full_like(soft, nan),
        hard if options.alpha < 1 else torch.full_like(hard, nan),
        agreement,
        accuracy,
        items[0] if options.soft_items is None else options.soft_items,
        items[1] if options.hard_items is None else options.hard_items,
        False,
    )


def _first_maximum(logits):
    """Index of the first maximum; -1 for a row without one (NaN, +inf, -inf throughout)."""
    logits = logits.detach()
    return torch.where(logits.amax(-1).isfinite(), logits.argmax(-1), -1)


def _share(flags, rows, dtype):
    return (flags & rows).sum().to(dtype) / rows.sum()


def _check_inplace(batch):
    student = batch.student
    base = student._base  # of a view
    if student.is_leaf or (base is not None and base.is_leaf and base.requires_grad):
        raise ValueError(
            "inplace=True would overwrite student_logits, a leaf (or a view of one) that requires a gradient"
        )
    if _overlaps_itself(student):
        raise ValueError(
            f"inplace=True needs rows that do not overlap in memory, got student_logits of shape "
            f"{tuple(student.shape)} with strides {student.stride()}"
        )
    start, end = _memory(student)
    for name, other in zip(batch._fields[1:7], batch[1:7], strict=True):
        if other is None:
            continue
        first, last = _memory(other)
        if start < last and first < end:
            raise ValueError(f"inplace=True would overwrite the {name}: {name} and student_logits overlap in memory")


def _overlaps_itself(tensor) -> bool:
    """Whether two indices may share an address: some dimension's stride lies within what the smaller ones span."""
    if tensor.is_contiguous():
        return False
    span = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride < span:
            return True
        span += stride * max(0, size - 1)
    return False


def _memory(tensor):
    """First byte, and one past the last."""
    if tensor.is_contiguous():
        return tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    span = 1 + sum(stride * max(0, size - 1) for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
    start = tensor.data_ptr()
    return start, start + span * tensor.element_size()
