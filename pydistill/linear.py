"""The loss from hidden states and the weights of a linear head; the logits are never all in memory."""

import math
from collections.abc import Mapping
from typing import Any, Literal, Unpack, overload

import torch
from torch import Tensor

from pydistill._arguments import check_count, check_flag, lost_storage, no_storage
from pydistill.engine import autograd, backend
from pydistill.engine.checks import DTYPES, check_batch, check_dense, check_rows, warn_of_probabilities
from pydistill.engine.head import Head
from pydistill.engine.head_autograd import FusedHead, HeadCall
from pydistill.engine.options import LossKeywords, Number, Reduction, Unlabeled, check_options
from pydistill.engine.torch_private import is_dtensor, wants_op
from pydistill.formulas import DivergenceName
from pydistill.functional import LossMetrics, distillation_loss, make_metrics
from pydistill.targets import SoftTargets


class LinearTeacher:
    """A teacher given by its last hidden states and the weight of its head; its logits are never all in memory.

        logits = softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap)

    Args:
        hidden: ``(..., H)``; H need not be the student's. Kept without a copy, detached.
        weight: ``(C, H)``, of the same dtype, as in ``torch.nn.Linear``.
        bias: ``(C,)`` or None.
        softcap: limit of the logits' absolute value, as in Gemma 2; None: no limit.
        logit_scale: multiplies the logits before the limit is applied, as in Cohere's models.

    Raises:
        ValueError: shapes that disagree, a softcap or logit_scale that is not positive and finite.
        TypeError: not floating-point tensors of one dtype.

    Example:
        >>> import torch, pydistill
        >>> pydistill.LinearTeacher(torch.randn(4, 16), torch.randn(1000, 16))
        LinearTeacher(shape=(4, 1000), dtype=torch.float32)
    """

    __slots__ = ("head",)

    head: Head

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        softcap: float | None = None,
        logit_scale: float = 1.0,
    ) -> None:
        check_head_options(softcap, logit_scale)
        self.head = _check_head(hidden, weight, bias, softcap, logit_scale, ("hidden", "weight", "bias"))
        self.head = self.head._replace(
            hidden=hidden.detach(), weight=weight.detach(), bias=None if bias is None else bias.detach()
        )

    @property
    def shape(self) -> torch.Size:
        """Shape of the logits, ``(..., C)``."""
        return torch.Size((*self.head.hidden.shape[:-1], self.head.weight.shape[0]))

    def __getitem__(self, rows: int | slice | Tensor) -> "LinearTeacher":
        """Select rows by an index, a slice, a mask, or a tensor of indices, as in torch."""
        hidden, chosen = self.head.hidden[rows], object.__new__(type(self))
        if hidden.dim() == 0 or hidden.shape[-1] != self.head.hidden.shape[-1]:
            raise IndexError(
                f"rows must choose whole rows, got {rows!r}: hidden {tuple(self.head.hidden.shape)} would become "
                f"{tuple(hidden.shape)}"
            )
        chosen.head = self.head._replace(hidden=hidden)
        return chosen

    def __repr__(self) -> str:
        return f"LinearTeacher(shape={tuple(self.shape)}, dtype={self.head.hidden.dtype})"


@overload
def linear_distillation_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher: Tensor | SoftTargets | LinearTeacher | None = None,
    labels: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_rows: int | None = None,
    return_metrics: Literal[False] = False,
    **options: Unpack[LossKeywords],
) -> Tensor: ...
@overload
def linear_distillation_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher: Tensor | SoftTargets | LinearTeacher | None = None,
    labels: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_rows: int | None = None,
    return_metrics: Literal[True],
    **options: Unpack[LossKeywords],
) -> tuple[Tensor, LossMetrics]: ...
@overload
def linear_distillation_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher: Tensor | SoftTargets | LinearTeacher | None = None,
    labels: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_rows: int | None = None,
    return_metrics: bool,
    **options: Unpack[LossKeywords],
) -> Tensor | tuple[Tensor, LossMetrics]: ...
def linear_distillation_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher: Tensor | SoftTargets | LinearTeacher | None = None,
    labels: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_rows: int | None = None,
    divergence: DivergenceName = "forward_kl",
    beta: float | None = None,
    temperature: Number = 1.0,
    alpha: Number = 0.5,
    t_squared: bool = True,
    ignore_index: int = -100,
    unlabeled: Unlabeled = "skip",
    sample_weight: Tensor | None = None,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
    num_items: Number | tuple[Number, Number] | None = None,
    return_metrics: bool = False,
) -> Tensor | tuple[Tensor, LossMetrics]:
    r"""Compute :func:`distillation_loss` from hidden states in chunks of rows; the logits are never all in memory.

    .. math::
        \text{student\_logits} = c \tanh(a\,(\text{hidden}\,\text{weight}^\top + \text{bias}) / c)

    with a = ``logit_scale`` and c = ``softcap``; without a softcap the logits are the scaled product. The loss and the
    gradients of hidden states, weight and bias are computed in forward, chunk by chunk. For each chunk the logits are
    computed, then the loss and the gradient of the logits, which overwrites them, then the products that give the three
    gradients. Loss, options, errors and numerics are those of :func:`distillation_loss`.

    Args:
        student_hidden: the student's last hidden states, ``(..., H)``.
        student_weight: the head's weight ``(C, H)``, as in ``torch.nn.Linear``. It may be tied to an embedding. Weight
            and hidden states may be frozen; their gradients are then not computed.
        teacher: :class:`LinearTeacher`; or logits ``(..., C)`` or :class:`SoftTargets` as in
            :func:`distillation_loss`. Top-k targets avoid the teacher's matrix product. May be None if alpha is 0.
        labels: ``(...)``. Language models shift them before the call: the label of a position is the next token,
            ``labels[:, 1:]`` for the hidden states ``[:, :-1]``.
        student_bias: ``(C,)`` or None.
        softcap, logit_scale: of the student's head; the teacher has its own.
        chunk_rows: rows per chunk; by default as many as 64 MiB of scratch memory hold. A chunk needs memory for the
            student's logits, for those of a LinearTeacher, and with a softcap for a third such array. The products of
            few rows are slower.
        num_items: for micro-batches, the count over all of them; the gradients then add up to those of one batch.
        return_metrics: also return :class:`LossMetrics`.

    The other options are those of :func:`distillation_loss`.

    Returns:
        Tensor: the loss, float32 (float64 for float64 weights); or ``(loss, LossMetrics)``.

    Raises:
        The errors of :func:`distillation_loss`, in whose messages "student_logits" are ``(..., C)``; ValueError for a
        head whose shapes disagree; TypeError for hidden states and weight of two dtypes outside ``torch.autocast``.

    Numerics: products are computed in the weight's dtype, or in that of autocast. bfloat16 and float16 are used only on
    a CPU with instructions for them, else float32, which is faster than emulation. From the logits on the arithmetic is
    float32. The gradient of a bfloat16 or float16 weight is accumulated in float32, so that small contributions of a
    chunk are kept.

    Memory: the scratch memory, and the gradients, which exist from forward on. The gradient of a bfloat16 or float16
    weight has a float32 accumulator in addition, and 8 MiB of the weight are converted to float32 at a time; under
    autocast the weight has a copy in autocast's dtype if the CPU multiplies in it. If the teacher is given as logits,
    chunks of it are copied if some rows do not count, and all of it if its rows are not evenly spaced (``logits[:,
    :-1]``). Rows that do not count (ignored label, sample weight 0) are left out of the products. With reduction="none"
    the gradients are computed in backward. Second derivatives, functorch transforms, other devices and graph recorders
    use the logits of all rows. torch.compile runs this function uncompiled, between its graphs (not with
    ``fullgraph=True``).

    Source: chunking as in Liger Kernel (arXiv:2410.10989); the loss as in :func:`distillation_loss`.

    Example:
        >>> import torch, pydistill
        >>> hidden, head = torch.randn(2, 8, 16, requires_grad=True), torch.nn.Linear(16, 1000, bias=False)
        >>> teacher = pydistill.LinearTeacher(torch.randn(2, 8, 32), torch.randn(1000, 32))
        >>> labels = torch.randint(1000, (2, 8))
        >>> loss = pydistill.linear_distillation_loss(hidden, head.weight, teacher, labels, temperature=2.0)
        >>> loss.backward()
        >>> hidden.grad.shape, head.weight.grad.shape
        (torch.Size([2, 8, 16]), torch.Size([1000, 16]))
    """
    arguments = locals()  # by name, so that an option is added to this signature and to engine/options.py only
    # Not a decorator of _loss: torch.compiler.disable imports torch._dynamo, which takes as long as torch itself.
    if torch.compiler.is_dynamo_compiling():
        from pydistill.engine import between_graphs

        loss: Tensor | tuple[Tensor, LossMetrics] = between_graphs.run(_loss, arguments)
        return loss
    return _loss(arguments)


_NAMES = ("student_hidden", "student_weight", "student_bias")
_OF_HEAD = (*_NAMES, "softcap", "logit_scale", "chunk_rows")


def _loss(arguments: Mapping[str, Any]) -> Tensor | tuple[Tensor, LossMetrics]:
    teacher, labels, metrics = arguments["teacher"], arguments["labels"], arguments["return_metrics"]
    softcap, logit_scale, chunk_rows = arguments["softcap"], arguments["logit_scale"], arguments["chunk_rows"]
    check_head_options(softcap, logit_scale, chunk_rows)
    check_flag("return_metrics", metrics)
    hidden, weight, bias = (arguments[name] for name in _NAMES)
    student = _check_head(hidden, weight, bias, softcap, logit_scale, _NAMES)
    head = teacher.head if isinstance(teacher, LinearTeacher) else None
    weights = arguments["sample_weight"], arguments["class_weight"]
    tensors = [*student.tensors, *(() if head is None else head.tensors), labels, *weights]
    why = autograd.why_formula([x for x in tensors if isinstance(x, Tensor)])
    if why is not None or wants_op(student.hidden):
        return _of_whole_logits(student, head, arguments, why or "a graph recorder other than torch.compile")
    _check_memory(student, head)
    options = check_options(arguments)
    logits = student.stand_in()
    batch = check_batch(logits, teacher if head is None else head.stand_in(), labels, *weights, options)
    if options.alpha == 0:
        head = None
    if head is not None:
        head = head._replace(hidden=_rows(head.hidden))
        batch.teacher = None
    batch = autograd.flatten_constants(batch)
    check_rows(batch)
    student = student._replace(hidden=_rows(student.hidden))
    call = HeadCall(student, head, batch, backend.current(), chunk_rows, metrics)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in student.tensors):
        loss: Tensor = FusedHead.apply(*student.tensors, call)  # type: ignore[no-untyped-call]  # torch has no type
        outcome = call.take_outcome()
    else:
        outcome = call.run(metrics=metrics).outcome
        loss = outcome.loss
    backend.last_call.text = f"{backend.current().name}, in chunks of rows"
    if options.reduction == "none":
        loss = loss.reshape(logits.shape[:-1])
    if outcome.teacher_sums_to_one and type(teacher) is Tensor:
        warn_of_probabilities()
    return (loss, make_metrics(outcome, logits)) if metrics else loss


def _of_whole_logits(
    student: Head, head: Head | None, arguments: Mapping[str, Any], why: str
) -> Tensor | tuple[Tensor, LossMetrics]:
    """The loss of all logits at once, where the formula of torch operations or the op must run."""
    rest = {name: value for name, value in arguments.items() if name not in _OF_HEAD}
    if head is not None:
        with torch.no_grad():
            rest["teacher"] = head.logits()
    counts = None if wants_op(student.hidden) else _rows_that_count(student.hidden, arguments)
    loss: Tensor | tuple[Tensor, LossMetrics] = distillation_loss(student.logits(counts), **rest)
    backend.last_call.text += f"; on the whole logits: {why}"
    return loss


def _check_memory(student: Head, teacher: Head | None) -> None:
    named = dict(zip(_NAMES, student.tensors, strict=True))
    if teacher is not None:
        named |= {"teacher.hidden": teacher.hidden, "teacher.weight": teacher.weight}
    for name, tensor in named.items():
        if tensor is not None and lost_storage(tensor):
            raise no_storage(name, tensor)


def _rows_that_count(hidden: Tensor, arguments: Mapping[str, Any]) -> Tensor:
    """Mask of the rows with a term. Labels or weights of the wrong shape are ignored; later checks refuse them."""
    options = check_options(arguments)
    labels, sample_weight = arguments["labels"], arguments["sample_weight"]

    def fits(rows: Any) -> bool:
        return isinstance(rows, Tensor) and rows.shape == hidden.shape[:-1] and rows.device == hidden.device

    every = torch.ones(hidden.shape[:-1], dtype=torch.bool, device=hidden.device)
    labelled = labels.long() != options.ignore_index if fits(labels) else every
    counts = ~every
    if options.evaluates_soft:
        counts = counts | (every if options.unlabeled == "distill" else labelled)
    if options.evaluates_hard:
        counts = counts | labelled
    return counts & (sample_weight != 0) if fits(sample_weight) else counts


def _rows(hidden: Tensor) -> Tensor:
    return hidden.reshape(-1, hidden.shape[-1])


def _check_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    scale: float,
    names: tuple[str, str, str],
) -> Head:
    """Check a head's tensors; ``names`` are the caller's names for them."""
    for name, tensor in zip(names, (hidden, weight, bias), strict=True):
        if tensor is None and name == names[2]:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {tensor.dtype}")
        check_dense(name, tensor)
        if is_dtensor(tensor):
            raise TypeError(
                f"{name} must be a plain tensor, got a DTensor; let the sharded module compute the logits and pass "
                f"them to distillation_loss ({name}.full_tensor() here would give a wrong gradient)"
            )
    if weight.dim() != 2 or not hidden.dim() or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{names[0]} must be (..., H) and {names[1]} (C, H), got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if weight.shape[1] == 0:
        raise ValueError(f"{names[1]} must be (C, H) with H of at least 1, got {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{names[2]} must be ({weight.shape[0]},), one per class, got {tuple(bias.shape)}")
    for name, tensor in ((names[1], weight), (names[2], bias)):
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(
                f"{name} and {names[0]} must be on one device, got {name} on {tensor.device} and {names[0]} on "
                f"{hidden.device}"
            )
    dtypes = {x.dtype for x in (hidden, weight, bias) if x is not None}
    if len(dtypes) > 1 and (not torch.is_autocast_enabled("cpu") or torch.float64 in dtypes):
        raise TypeError(
            f"{names[0]}, {names[1]} and {names[2]} must have one dtype, or be under torch.autocast, got "
            f"{', '.join(sorted(map(str, dtypes)))}"
        )
    return Head(hidden, weight, bias, None if softcap is None else float(softcap), float(scale))


def check_head_options(softcap: float | None, logit_scale: float, chunk_rows: int | None = None) -> None:
    """Check a head's numbers."""
    for name, value in (("softcap", softcap), ("logit_scale", logit_scale)):
        if name == "softcap" and value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ValueError(f"{name} must be a positive, finite int or float, got {value!r}")
    if chunk_rows is not None:
        check_count("chunk_rows", chunk_rows)
