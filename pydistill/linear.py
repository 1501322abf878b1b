"""The loss behind a linear head: from hidden states and weights, without the logits of all rows."""

import math

import torch
from torch import Tensor

from pydistill._arguments import lost_storage, no_storage
from pydistill.engine import autograd, backend
from pydistill.engine.batch import Batch
from pydistill.engine.checks import (
    DTYPES,
    check_dense,
    check_flags,
    check_options,
    check_rows,
    check_teacher_form,
    check_tensors,
    is_dtensor,
    wants_op,
    warn_of_probabilities,
)
from pydistill.engine.head import Call, FusedHead, Head
from pydistill.functional import distillation_loss, make_metrics


class LinearTeacher:
    """A teacher given by its last hidden states and the weight of its head, so that its logits never exist as a whole.

        logits = softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap)

    Args:
        hidden: ``(..., H)``; H is the teacher's own, any size. Kept without a copy, detached.
        weight: ``(C, H)``, of the same dtype, as in ``torch.nn.Linear``.
        bias: ``(C,)`` or None.
        softcap: the soft cap of the logits, as Gemma 2 has; None: none.
        logit_scale: multiplies the logits before the cap, as in Cohere's models.

    Raises:
        ValueError: shapes that disagree, a softcap or logit_scale that is not positive and finite.
        TypeError: not floating-point tensors of one dtype.

    Example:
        >>> import torch, pydistill
        >>> pydistill.LinearTeacher(torch.randn(4, 16), torch.randn(1000, 16))
        LinearTeacher(shape=(4, 1000), dtype=torch.float32)
    """

    __slots__ = ("head",)

    def __init__(self, hidden, weight, bias=None, *, softcap=None, logit_scale=1.0):
        check_head_options(softcap, logit_scale)
        self.head = _check_head(hidden, weight, bias, softcap, logit_scale, ("hidden", "weight", "bias"))
        self.head = self.head._replace(
            hidden=hidden.detach(), weight=weight.detach(), bias=None if bias is None else bias.detach()
        )

    @property
    def shape(self) -> torch.Size:
        """Shape of the logits that are never made, ``(..., C)``."""
        return torch.Size((*self.head.hidden.shape[:-1], self.head.weight.shape[0]))

    def __getitem__(self, rows) -> "LinearTeacher":
        """The teacher of some rows: an index, a slice, a mask, or a tensor of indices, as in torch."""
        hidden, chosen = self.head.hidden[rows], object.__new__(type(self))
        if hidden.dim() == 0 or hidden.shape[-1] != self.head.hidden.shape[-1]:
            raise IndexError(
                f"rows must choose rows, not elements of them: hidden {tuple(self.head.hidden.shape)} would become "
                f"{tuple(hidden.shape)}"
            )
        chosen.head = self.head._replace(hidden=hidden)
        return chosen

    def __repr__(self) -> str:
        return f"LinearTeacher(shape={tuple(self.shape)}, dtype={self.head.hidden.dtype})"


def linear_distillation_loss(
    student_hidden,
    student_weight,
    teacher=None,
    labels=None,
    *,
    student_bias=None,
    softcap=None,
    logit_scale=1.0,
    chunk_rows=None,
    divergence="forward_kl",
    beta=None,
    temperature=1.0,
    alpha=0.5,
    t_squared=True,
    ignore_index=-100,
    unlabeled="skip",
    sample_weight=None,
    class_weight=None,
    label_smoothing=0.0,
    reduction="mean",
    num_items=None,
    return_metrics=False,
):
    r""":func:`distillation_loss` of a linear head's logits, in chunks of rows: they never exist as a whole.

    .. math::
        \text{student\_logits} = c \tanh(a\,(\text{hidden}\,\text{weight}^\top + \text{bias}) / c)

    with a = ``logit_scale`` and c = ``softcap`` (without one: the scaled product itself). Loss and gradients of hidden,
    weight and bias come from one run over the chunks, in forward: product, loss with its gradient over the chunk's
    logits, products for the gradients. The loss itself, its options, errors and numerics are those of
    :func:`distillation_loss`.

    Args:
        student_hidden: the student's last hidden states, ``(..., H)``.
        student_weight: the head's weight ``(C, H)``, as in ``torch.nn.Linear``; it may be tied to an embedding, or
            frozen (its gradient is then not computed), as may be the hidden states.
        teacher: :class:`LinearTeacher`; or logits ``(..., C)`` or :class:`SoftTargets` as in
            :func:`distillation_loss` (top-k targets spare the teacher's product). May be None at alpha = 0.
        labels: ``(...)``, shifted by the caller: row i's label is the token after it.
        student_bias: ``(C,)`` or None.
        softcap, logit_scale: of the student; the teacher has its own.
        chunk_rows: rows per chunk. By default as many as 64 MiB of scratch hold: a chunk's student logits, those of
            a LinearTeacher, and with a softcap one more. Fewer rows are slower products.
        num_items: for micro-batches, the count over all of them; the gradients then add up to one batch's.
        return_metrics: also return :class:`LossMetrics`.

    The other options are those of :func:`distillation_loss`.

    Returns:
        Tensor: the loss, float32 (float64 for float64 weights); or ``(loss, LossMetrics)``.

    Raises:
        As :func:`distillation_loss`, whose "student_logits" are ``(..., C)`` here; ValueError for a head whose shapes
        disagree; TypeError for hidden and weight of two dtypes outside ``torch.autocast``.

    Numerics: products run in the weight's dtype, or in autocast's; in bfloat16 and float16 only where the CPU computes
    them natively, else in float32, which is faster than an emulation. From the logits on everything is float32. The
    gradient of a half weight is accumulated in float32, so that a chunk's small share is not lost.

    Memory: the scratch, and the gradients, which exist from forward on. A half weight's gradient has a float32
    accumulator beside it, and 8 MiB of the weight are widened at a time; under autocast, the weight has a copy in that
    dtype where products in it are native. A teacher given as logits exists already; a chunk of it is copied where rows
    do not count, and all of it where its rows are not evenly spaced (``logits[:, :-1]``). Rows that do not count
    (ignored label, sample weight 0) are dropped before the product. With reduction="none" the gradients' run is in
    backward. Second derivatives, functorch transforms, other devices and graph recorders go through the whole logits.
    torch.compile runs this function as it is, between its graphs (not with ``fullgraph=True``).

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
    options = {
        "divergence": divergence,
        "beta": beta,
        "temperature": temperature,
        "alpha": alpha,
        "t_squared": t_squared,
        "ignore_index": ignore_index,
        "unlabeled": unlabeled,
        "label_smoothing": label_smoothing,
        "reduction": reduction,
        "num_items": num_items,
    }
    weights = {"sample_weight": sample_weight, "class_weight": class_weight}
    student = (student_hidden, student_weight, student_bias, softcap, logit_scale)
    arguments = (student, teacher, labels, weights, options, chunk_rows, return_metrics)
    # Not as a decorator of _loss: torch.compiler.disable imports torch._dynamo, which takes as long as torch itself.
    if torch.compiler.is_dynamo_compiling():
        from pydistill.engine import between_graphs

        return between_graphs.run(_loss, *arguments)
    return _loss(*arguments)


def _loss(student, teacher, labels, weights, options, chunk_rows, return_metrics):
    names = ("student_hidden", "student_weight", "student_bias")
    check_head_options(*student[3:], chunk_rows)
    check_flags(False, return_metrics)
    student = _check_head(*student, names)
    head = teacher.head if isinstance(teacher, LinearTeacher) else None
    tensors = [*student[:3], *(head or ())[:3], labels, *weights.values()]
    why = autograd.why_formula([x for x in tensors if isinstance(x, Tensor)])
    if why is not None or wants_op(student.hidden):
        if head is not None:
            with torch.no_grad():
                teacher = head.logits()
        counts = (
            None
            if wants_op(student.hidden)
            else _rows_that_count(student.hidden, labels, weights["sample_weight"], options)
        )
        loss = distillation_loss(
            student.logits(counts), teacher, labels, **weights, **options, return_metrics=return_metrics
        )
        backend.last_call.text += "; on the whole logits: " + (why or "another recorder than torch.compile")
        return loss
    in_memory = dict(zip(names, student[:3], strict=True))
    if head is not None:
        in_memory |= {"the teacher's hidden": head.hidden, "the teacher's weight": head.weight}
    for name, tensor in in_memory.items():
        if tensor is not None and lost_storage(tensor):
            raise no_storage(name, tensor)
    checked = check_options(**options)
    logits = student.stand_in()
    targets = teacher if head is None else head.stand_in()
    targets, sample_weight, class_weight, indices = check_tensors(
        logits,
        targets,
        labels,
        *weights.values(),
        soft=checked.alpha > 0,
        hard=checked.alpha < 1,
    )
    partitions = check_teacher_form(teacher, labels, checked)
    if checked.alpha == 0:
        head = None
    if head is not None:
        head, targets = head._replace(hidden=_rows(head.hidden)), None
    batch = autograd.flatten_constants(
        Batch(logits, targets, labels, sample_weight, class_weight, indices, partitions, checked)
    )
    check_rows(batch)
    student = student._replace(hidden=_rows(student.hidden))
    call = Call(student, head, batch, backend.current(), chunk_rows, return_metrics)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in student[:3]):
        loss = FusedHead.apply(*student[:3], call)
        outcome, call.outcome = call.outcome, None  # it holds the loss, whose graph holds the call
    else:
        outcome = call.run(metrics=return_metrics).outcome
        loss = outcome.loss
    backend.last_call.text = f"{backend.current().name}, in chunks of rows"
    if checked.reduction == "none":
        loss = loss.reshape(logits.shape[:-1])
    if outcome.teacher_sums_to_one and type(teacher) is Tensor:
        warn_of_probabilities()
    return (loss, make_metrics(outcome, logits)) if return_metrics else loss


def _rows_that_count(hidden, labels, sample_weight, options):
    """Mask of the rows with a term, as far as the tensors, which are checked later, fit each other."""
    checked = check_options(**options)

    def fits(rows):
        return isinstance(rows, Tensor) and rows.shape == hidden.shape[:-1] and rows.device == hidden.device

    every = torch.ones(hidden.shape[:-1], dtype=torch.bool, device=hidden.device)
    labelled = labels.long() != checked.ignore_index if fits(labels) else every
    counts = ~every
    if checked.alpha > 0 and checked.soft_items != 0:
        counts = counts | (every if checked.unlabeled == "distill" else labelled)
    if checked.alpha < 1 and checked.hard_items != 0:
        counts = counts | labelled
    return counts & (sample_weight != 0) if fits(sample_weight) else counts


def _rows(hidden):
    return hidden.reshape(-1, hidden.shape[-1])


def _check_head(hidden, weight, bias, softcap, scale, names) -> Head:
    """The rules for a head's tensors; ``names`` is what the caller calls them."""
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
            f"{names[0]}, {names[1]} and the bias must have one dtype, or be under torch.autocast, got "
            f"{', '.join(sorted(map(str, dtypes)))}"
        )
    return Head(hidden, weight, bias, None if softcap is None else float(softcap), float(scale))


def check_head_options(softcap, logit_scale, chunk_rows=None):
    """The rules for a head's numbers."""
    for name, value in (("softcap", softcap), ("logit_scale", logit_scale)):
        if name == "softcap" and value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ValueError(f"{name} must be a positive, finite number, got {value!r}")
    if chunk_rows is not None and (type(chunk_rows) is not int or chunk_rows < 1):
        raise ValueError(f"chunk_rows must be a whole number of at least 1, got {chunk_rows!r}")
