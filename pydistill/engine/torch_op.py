"""The loss as a torch.library op, for torch.compile and torch.export.

Numbers that a schedule changes (temperature, alpha, num_items) are tensor arguments: a float argument would compile
anew for every value. The gradient is an op of its own that runs in backward with grad_output folded in: one buffer,
and no product with a grad_output that a traced graph cannot compare to 1.
"""

import torch
from torch import Tensor

from pydistill.engine import backend
from pydistill.engine.autograd import flatten
from pydistill.engine.batch import Batch, Outcome
from pydistill.engine.checks import (
    check_options,
    check_reduction,
    check_teacher_form,
    check_tensors,
    warn_of_probabilities,
)
from pydistill.formulas import DIVERGENCES, loss_dtype
from pydistill.targets import SoftTargets

_ARGUMENTS = (
    "Tensor student, Tensor? teacher, Tensor? labels, Tensor? sample_weight, Tensor? class_weight, "
    "Tensor? teacher_indices, Tensor? log_partitions, Tensor temperature, Tensor alpha, Tensor? soft_items, "
    "Tensor? hard_items, str divergence, float? beta, bool t_squared, int ignore_index, str unlabeled, "
    "float label_smoothing, str reduction"
)


def traced_loss(
    student,
    teacher,
    labels,
    sample_weight,
    class_weight,
    *,
    divergence,
    beta,
    temperature,
    alpha,
    t_squared,
    ignore_index,
    unlabeled,
    label_smoothing,
    reduction,
    num_items,
    metrics,
) -> Outcome:
    """What :func:`pydistill.distillation_loss` does while it is traced. Values are checked when the graph runs."""
    check_reduction(reduction)
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence must be one of {', '.join(DIVERGENCES)}; got {divergence!r}")
    plain_teacher = isinstance(teacher, Tensor)
    if isinstance(teacher, SoftTargets) and teacher.has_zeros and not DIVERGENCES[divergence].zeros:
        raise ValueError(
            f"teacher: {divergence} compares logits, and a probability of 0 has none; use forward_kl or jsd"
        )
    partitions = _partitions(teacher, temperature)
    teacher, sample_weight, class_weight, indices = check_tensors(
        student, teacher, labels, sample_weight, class_weight, soft=teacher is not None, hard=False
    )
    pair = num_items if isinstance(num_items, tuple | list) else (num_items, num_items)
    soft_items, hard_items = (None if n is None else _scalar("num_items", n, student) for n in pair)
    outputs = torch.ops.pydistill.distillation_loss(
        student,
        teacher,
        labels,
        sample_weight,
        class_weight,
        indices,
        partitions,
        _scalar("temperature", temperature, student),
        _scalar("alpha", alpha, student),
        soft_items,
        hard_items,
        divergence,
        beta,
        t_squared,
        ignore_index,
        unlabeled,
        label_smoothing,
        reduction,
        metrics,
        plain_teacher,
    )
    loss, soft, hard, shares = outputs
    return Outcome(loss, soft, hard, *shares.unbind(), False)


def _partitions(teacher, temperature):
    """The log-partitions of a top-k teacher with a bucket; which ones must be known when the graph is made."""
    if not isinstance(teacher, SoftTargets) or teacher.tail != "bucket":
        return None
    if teacher.indices.shape[-1] == teacher.shape[-1]:
        return None
    if isinstance(temperature, Tensor):
        raise ValueError(
            'temperature must be a float with tail="bucket" under torch.compile: it chooses a log-partition'
        )
    if temperature not in teacher.log_partitions:
        stored = ", ".join(f"{t:g}" for t in teacher.log_partitions) or "none"
        raise ValueError(
            f'teacher: tail="bucket" needs the log-partition at temperature {temperature:g}; stored: {stored}'
        )
    return teacher.log_partitions[temperature]


def _scalar(name, value, student) -> Tensor:
    if isinstance(value, Tensor):
        if value.requires_grad:
            raise TypeError(f"{name} must not require a gradient: none flows into it; pass {name}.detach()")
        return value.to(torch.float64)
    # A product, since a float in torch.full or torch.tensor is burnt into the graph and compiles anew at each value.
    return torch.ones((), dtype=torch.float64, device=student.device) * value


def _batch(student, teacher, labels, sample_weight, class_weight, indices, partitions, temperature, alpha, *rest):
    """The op's arguments, now that they have values, checked and flattened."""
    soft_items, hard_items, *rest = rest
    divergence, beta, t_squared, ignore_index, unlabeled, label_smoothing, reduction = rest
    num_items = None if soft_items is None else (soft_items, hard_items)
    options = check_options(
        divergence, beta, temperature, alpha, t_squared, ignore_index, unlabeled, label_smoothing, reduction, num_items
    )
    targets = teacher
    if indices is not None:
        tail = "renormalize" if partitions is None else "bucket"
        stored = {} if partitions is None else {options.temperature: partitions}
        targets = SoftTargets(teacher, indices=indices, classes=student.shape[-1], log_partitions=stored, tail=tail)
    teacher, sample_weight, class_weight, indices = check_tensors(
        student,
        targets,
        labels,
        sample_weight,
        class_weight,
        soft=options.alpha > 0,
        hard=options.alpha < 1,
    )
    partitions = check_teacher_form(targets, labels, options)
    return flatten(Batch(student.detach(), teacher, labels, sample_weight, class_weight, indices, partitions, options))


@torch.library.custom_op(
    "pydistill::distillation_loss",
    mutates_args=(),
    schema=f"({_ARGUMENTS}, bool metrics, bool plain_teacher) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _loss_op(student, *arguments):
    """Loss, soft term, hard term, and (agreement, accuracy, soft items, hard items)."""
    *arguments, metrics, plain_teacher = arguments
    outcome = backend.evaluate(_batch(student, *arguments), metrics=metrics)
    backend.last_call.text = (
        f"{backend.current().name}, through the torch.library op (compile, export, or another recorder)"
    )
    if outcome.teacher_sums_to_one and plain_teacher:
        warn_of_probabilities()
    dtype = loss_dtype(student)
    rows = outcome.loss.dim() == 1

    def own(x):  # an op's results share no memory
        x = x.clone() if isinstance(x, Tensor) else torch.tensor(x)
        return x.to(dtype).reshape(student.shape[:-1]) if rows else x.to(dtype)

    return own(outcome.loss), own(outcome.soft), own(outcome.hard), torch.tensor(outcome[3:7], dtype=dtype)


@_loss_op.register_fake
def _(student, *arguments):
    shape = student.shape[:-1] if arguments[-3] == "none" else ()
    results = (student.new_empty(shape, dtype=loss_dtype(student)) for _ in range(3))
    return *results, student.new_empty(4, dtype=loss_dtype(student))


@torch.library.custom_op(
    "pydistill::distillation_loss_backward",
    mutates_args=(),
    schema=f"(Tensor grad_output, {_ARGUMENTS}) -> Tensor",
)
def _gradient_op(grad_output, student, *arguments):
    """The gradient of the loss with respect to the student's logits, times grad_output."""
    batch = _batch(student, *arguments)
    engine = backend.current()
    gradient = engine.new_gradient(batch.student)
    scale = float(grad_output) if batch.options.reduction != "none" else grad_output.reshape(-1).contiguous()
    engine.evaluate(batch, gradient, scale)
    return gradient.reshape(student.shape)


@_gradient_op.register_fake
def _(grad_output, student, *arguments):
    return student.new_empty(student.shape)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:11])
    ctx.choices = inputs[11:-2]


def _backward(ctx, grad_output, *unused):
    gradient = torch.ops.pydistill.distillation_loss_backward(grad_output, *ctx.saved_tensors, *ctx.choices)
    others = len(ctx.saved_tensors) - 1 + len(ctx.choices) + 2  # and the op's last two arguments
    return gradient, *(None,) * others


_loss_op.register_autograd(_backward, setup_context=_setup_context)
