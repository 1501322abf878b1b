"""The loss as a torch.library op, for torch.compile and torch.export.

Numbers that a schedule changes (temperature, alpha, num_items) are tensor arguments: with a float argument
each new value would recompile. The gradient is an op of its own, which backward calls with grad_output. It allocates
one buffer; otherwise a product with grad_output would always be needed, since a graph cannot test whether it is 1.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from pydistill.engine import backend
from pydistill.engine.autograd import flatten
from pydistill.engine.batch import CONSTANTS, Batch, Outcome
from pydistill.engine.checks import (
    check_batch,
    check_tensors,
    check_zeros,
    has_bucket,
    partitions_at,
    warn_of_probabilities,
)
from pydistill.engine.metrics import METRICS
from pydistill.engine.options import OPTIONS, check_options
from pydistill.formulas import loss_dtype
from pydistill.targets import SoftTargets, Tail


def _option_arguments() -> Iterator[tuple[str, str]]:
    for name, option in OPTIONS.items():
        if option.op == "Items":
            yield "Tensor?", "soft_items"
            yield "Tensor?", "hard_items"
        else:
            yield option.op, name


# (type, name) of every argument after the student's logits; tensors come first, for save_for_backward.
_ARGUMENTS = sorted(
    [*(("Tensor?", name) for name in CONSTANTS), *_option_arguments()], key=lambda argument: argument[0][:6] != "Tensor"
)
_TENSORS = sum(kind.startswith("Tensor") for kind, _ in _ARGUMENTS)
_SCHEMA = ", ".join(["Tensor student", *(f"{kind} {name}" for kind, name in _ARGUMENTS)])
_NAMES = [name for _, name in _ARGUMENTS]


def traced_loss(arguments: Mapping[str, Any]) -> Outcome:
    """Record the call of the op for :func:`pydistill.distillation_loss`. Values are checked when the graph runs."""
    student, teacher, divergence = arguments["student_logits"], arguments["teacher"], arguments["divergence"]
    for name in ("divergence", "reduction"):  # they decide the graph
        OPTIONS[name].check(name, arguments[name])
    if isinstance(teacher, SoftTargets):
        check_zeros(teacher, divergence)
    labels, weights = arguments["labels"], (arguments["sample_weight"], arguments["class_weight"])
    given = arguments["num_items"]
    pair = given if isinstance(given, (tuple, list)) else (given, given)
    values = dict(arguments)
    values["teacher"], values["teacher_indices"], values["sample_weight"], values["class_weight"] = check_tensors(
        student, teacher, labels, *weights, soft=teacher is not None, hard=False
    )
    for name, option in OPTIONS.items():
        if option.op == "Tensor":
            values[name] = _scalar(name, arguments[name], student)
    values["soft_items"], values["hard_items"] = (None if n is None else _scalar("num_items", n, student) for n in pair)
    values["log_partitions"] = _partitions(teacher, arguments["temperature"])
    loss, soft, hard, rest = torch.ops.pydistill.distillation_loss(
        student, *[values[name] for name in _NAMES], arguments["return_metrics"], isinstance(teacher, Tensor)
    )
    soft_items, hard_items, *metrics = rest.unbind()
    return Outcome(
        loss=loss,
        soft=soft,
        hard=hard,
        soft_items=soft_items,
        hard_items=hard_items,
        metrics=dict(zip(METRICS, metrics, strict=True)),
    )


def _partitions(teacher: Tensor | SoftTargets | None, temperature: float | Tensor) -> Tensor | None:
    """Choose the log-partitions of a top-k teacher with a bucket. The choice is fixed when the graph is recorded."""
    if not isinstance(teacher, SoftTargets) or not has_bucket(teacher):
        return None
    if isinstance(temperature, Tensor):
        raise ValueError(
            'temperature must be a float with tail="bucket" under torch.compile: it chooses a log-partition'
        )
    return partitions_at(teacher, temperature)


def _scalar(name: str, value: float | Tensor, student: Tensor) -> Tensor:
    if isinstance(value, Tensor):
        if value.requires_grad:
            raise TypeError(f"{name} must not require a gradient, since none flows into it; pass {name}.detach()")
        return value.to(torch.float64)
    # A product, because torch.full and torch.tensor record a float as a constant, and each new value would recompile.
    return torch.ones((), dtype=torch.float64, device=student.device) * value


def _batch(student: Tensor, arguments: tuple[Any, ...]) -> Batch:
    """Check and flatten the op's arguments when the graph runs and their values are available."""
    values = dict(zip(_NAMES, arguments, strict=True))
    soft_items, hard_items = values["soft_items"], values["hard_items"]
    options = check_options(values | {"num_items": None if soft_items is None else (soft_items, hard_items)})
    teacher, indices, partitions = values["teacher"], values["teacher_indices"], values["log_partitions"]
    if indices is not None:
        tail: Tail = "renormalize" if partitions is None else "bucket"
        stored = {} if partitions is None else {options.temperature: partitions}
        teacher = SoftTargets(teacher, indices=indices, classes=student.shape[-1], log_partitions=stored, tail=tail)
    weights = values["sample_weight"], values["class_weight"]
    return flatten(check_batch(student.detach(), teacher, values["labels"], *weights, options))


@torch.library.custom_op(
    "pydistill::distillation_loss",
    mutates_args=(),
    schema=f"({_SCHEMA}, bool metrics, bool plain_teacher) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _loss_op(student: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, soft term, hard term; and the denominators (soft, hard) followed by the metrics."""
    *arguments, metrics, plain_teacher = arguments  # type: ignore[assignment]  # a list from a tuple
    outcome = backend.current().evaluate(_batch(student, tuple(arguments)), metrics=metrics)
    backend.last_call.text = (
        f"{backend.current().name}, through the torch.library op (compile, export, or another recorder)"
    )
    if outcome.teacher_sums_to_one and plain_teacher:
        warn_of_probabilities()
    dtype = loss_dtype(student)
    rows = outcome.loss.dim() == 1

    def own(x: float | Tensor) -> Tensor:  # the results of an op must not share memory with each other
        x = x.clone() if isinstance(x, Tensor) else torch.tensor(x)
        return x.to(dtype).reshape(student.shape[:-1]) if rows else x.to(dtype)

    found = [outcome.soft_items, outcome.hard_items, *(outcome.metrics.get(name, float("nan")) for name in METRICS)]
    return own(outcome.loss), own(outcome.soft), own(outcome.hard), torch.tensor(found, dtype=dtype)


@_loss_op.register_fake
def _(student: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    shape = student.shape[:-1] if arguments[_NAMES.index("reduction")] == "none" else ()
    results = (student.new_empty(shape, dtype=loss_dtype(student)) for _ in range(3))
    return *results, student.new_empty(2 + len(METRICS), dtype=loss_dtype(student))


@torch.library.custom_op(
    "pydistill::distillation_loss_backward",
    mutates_args=(),
    schema=f"(Tensor grad_output, {_SCHEMA}) -> Tensor",
)
def _gradient_op(grad_output: Tensor, student: Tensor, *arguments: Any) -> Tensor:
    """The gradient of the loss with respect to the student's logits, times grad_output."""
    batch = _batch(student, arguments)
    engine = backend.current()
    gradient = engine.new_gradient(batch.student)
    scale = float(grad_output) if batch.options.reduction != "none" else grad_output.reshape(-1).contiguous()
    engine.evaluate(batch, gradient, scale)
    return gradient.reshape(student.shape)


@_gradient_op.register_fake
def _(grad_output: Tensor, student: Tensor, *arguments: Any) -> Tensor:
    return student.new_empty(student.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    student, *arguments = inputs
    ctx.save_for_backward(student, *arguments[:_TENSORS])
    ctx.choices = arguments[_TENSORS : len(_NAMES)]


def _backward(ctx: Any, grad_output: Tensor, *unused: Any) -> tuple[Tensor | None, ...]:
    gradient = torch.ops.pydistill.distillation_loss_backward(grad_output, *ctx.saved_tensors, *ctx.choices)
    return gradient, *(None for _ in _NAMES), None, None  # the last two: metrics, plain_teacher


_loss_op.register_autograd(_backward, setup_context=_setup_context)
