"""The public loss function, and the denominators of its mean."""

from typing import Any, Literal, NamedTuple, Unpack, overload

import torch
from torch import Tensor

from pydistill._arguments import check_flag
from pydistill.engine import autograd, torch_op
from pydistill.engine.batch import Batch, Outcome
from pydistill.engine.checks import check_batch, check_dense, check_rows, check_tensors, warn_of_probabilities
from pydistill.engine.counting import counted_rows, denominators
from pydistill.engine.options import LossKeywords, Number, Reduction, Unlabeled, check_options
from pydistill.engine.torch_private import is_dtensor, wants_op
from pydistill.formulas import DIVERGENCES, DivergenceName, loss_dtype
from pydistill.targets import SoftTargets

_MOST_CLASSES = 2**31  # the number of classes if class_weight is None: larger than any label


class LossMetrics(NamedTuple):
    """Metrics computed in the same pass as the loss; detached, in the loss's dtype.

    Attributes:
        soft_loss: the soft term, T^2 included, reduced like the loss: ``loss = alpha * soft + (1 - alpha) * hard``.
        hard_loss: the hard term, reduced like the loss.
        agreement: share of the rows that count for the soft term in which student and teacher have the same argmax;
            unweighted. Ties go to the lowest class; a row with NaN disagrees.
        accuracy: share of the labelled rows that count in which the student's argmax is the label; unweighted.
        num_items: the denominators (soft, hard) of "mean": those that were used, or, for "sum" and "none", those that
            "mean" would have used.

    A term that is not evaluated is NaN, and so is a share if there is no row to average over.
    """

    soft_loss: Tensor
    hard_loss: Tensor
    agreement: Tensor
    accuracy: Tensor
    num_items: tuple[Tensor, Tensor]


@overload
def distillation_loss(
    student_logits: Tensor,
    teacher: Tensor | SoftTargets | None = None,
    labels: Tensor | None = None,
    *,
    inplace: bool = False,
    return_metrics: Literal[False] = False,
    **options: Unpack[LossKeywords],
) -> Tensor: ...
@overload
def distillation_loss(
    student_logits: Tensor,
    teacher: Tensor | SoftTargets | None = None,
    labels: Tensor | None = None,
    *,
    inplace: bool = False,
    return_metrics: Literal[True],
    **options: Unpack[LossKeywords],
) -> tuple[Tensor, LossMetrics]: ...
@overload
def distillation_loss(
    student_logits: Tensor,
    teacher: Tensor | SoftTargets | None = None,
    labels: Tensor | None = None,
    *,
    inplace: bool = False,
    return_metrics: bool,
    **options: Unpack[LossKeywords],
) -> Tensor | tuple[Tensor, LossMetrics]: ...
def distillation_loss(
    student_logits: Tensor,
    teacher: Tensor | SoftTargets | None = None,
    labels: Tensor | None = None,
    *,
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
    inplace: bool = False,
    return_metrics: bool = False,
) -> Tensor | tuple[Tensor, LossMetrics]:
    r"""Knowledge-distillation loss: a divergence from the teacher's softened outputs plus cross-entropy.

    With p = softmax(teacher / T) and q = softmax(student / T), per row, in nats:

    .. math::
        \text{loss} = \alpha\, T^2 D(p, q) + (1 - \alpha)\, \mathrm{CE}(\mathrm{softmax}(\text{student}), y)

    Cross-entropy is always at T = 1. **alpha weighs the soft term** (torchdistill's alpha weighs the hard one).
    Loss and gradient come from one pass over the logits. The teacher is a constant: no gradient flows into it.

    The divergences D, with the default of ``beta`` in parentheses:

    <divergences>

    docs/losses.md in the repository says when to use which, and how other libraries' losses are written with this one.

    Args:
        student_logits: ``(..., C)``, classes last; float32, float64, bfloat16 or float16. Any strides; a non-unit
            stride of the last dimension costs a copy. For classes in dimension 1 pass ``logits.movedim(1, -1)``.
        teacher: logits ``(..., C)`` of any of these dtypes, or :class:`SoftTargets` (which also takes
            probabilities, and the k largest logits of each row). May be None if alpha is 0. Tensors made under
            ``torch.inference_mode()`` are allowed, except under torch.compile: a compiled graph cannot save them, so
            make them under ``torch.no_grad()``.
        labels: class indices ``(...)``, int64 or int32. May be None if alpha is 1.
        divergence: one of the names above.
        beta: the divergence's parameter, in [0, 1] (dkd: at least 0).
        temperature: T > 0, a float or a 0-d tensor without gradient. It chooses the log-partition of a top-k teacher
            with ``tail="bucket"``; for such a teacher it must be a float under torch.compile.
        alpha: weight of the soft term in [0, 1], a float or a 0-d tensor without gradient. A term whose weight,
            alpha or 1 - alpha, is 0 is not evaluated.
        t_squared: multiply the soft term by T^2, so that its gradient stays at the same order of magnitude when T
            changes.
        ignore_index: rows with this label do not count: their loss is 0 and their gradient exactly 0, whatever values
            they hold, NaN included.
        unlabeled: "skip", or "distill" to learn from unlabelled rows: rows with the ignored label then keep their soft
            term and lose only the hard term. Give padding the sample weight 0 in this case.
        sample_weight: ``(...)``, finite and >= 0; multiplies both terms of a row. A row of weight 0 does not count.
        class_weight: ``(C,)``, on the hard term, as ``weight`` in torch's cross_entropy.
        label_smoothing: in [0, 1], on the hard term, as in torch's cross_entropy.
        reduction: "mean", "sum" or "none". Each term has its own weighted mean: the soft one divides by
            sum w_i, the hard one by sum w_i class_weight[y_i], over the rows that count for it; never by N * C.
            "none" gives ``(...)``. The loss is 0 if no row counts.
        num_items: replaces the denominators of "mean": a number >= 0, a 0-d tensor, or a pair (soft, hard);
            :func:`loss_items` counts them. For gradient accumulation it is the count over all micro-batches; under
            DistributedDataParallel, which averages over the ranks, the global count divided by the number of ranks.
            0 says that no row counts for the term in the whole step; the term is then 0.
        inplace: if True, the gradient may overwrite student_logits, which saves a buffer of their size. The
            logits must not be needed afterwards: they hold the gradient then, and a second loss or an argmax would read
            it. Autograd raises an error only if an earlier operation saved them for its backward. Only one backward is
            possible. The
            permission is not used if no gradient is wanted, under torch.compile, other recorders and functorch;
            ``backend_info().last_call`` says what was done.
        return_metrics: also return :class:`LossMetrics`, from the same pass.

    Returns:
        Tensor: the loss, float32 (float64 for float64 logits); or ``(loss, LossMetrics)``.

    Raises:
        ValueError: shapes or devices that disagree, an option outside its range, a missing teacher or labels, a
            negative or infinite sample weight, a tensor whose storage was freed, DTensors beside plain tensors or
            under ``loss_parallel()``; with ``inplace``, a leaf, overlapping rows, or a tensor that shares memory with
            student_logits.
        TypeError: integer or complex logits, sparse tensors, labels or an option of another type, a temperature, alpha
            or weight that requires a gradient.
        MemoryError: no memory for the gradient or for scratch; nothing has been written then.
        IndexError: a label that is neither in [0, C) nor ignore_index; the message names the first such row. Nothing
            has been written then.

    Numerics: the arithmetic is float32 within blocks of a row, and float64 across blocks and rows, in log space
    throughout. The result is the same to the bit for every number of threads. A class with p = 0 (a teacher logit of
    -inf) contributes the limit of the divergence. The limit is finite, except for reverse_kl
    and mse: +inf unless q = 0 too.
    For teachers with exact zeros, such as forests, use forward_kl, jsd or skew_reverse_kl. If the student has a logit
    of -inf where the teacher has mass, forward_kl is +inf with a finite gradient. A logit of NaN or +inf makes its row
    NaN.

    Memory: one buffer of the logits' size for the gradient, none with ``inplace``. The compiled backend keeps the
    largest buffer of 8 MiB or more for the next step when it is freed, because touching new pages takes as long as the
    loss; Linux may reclaim it under memory pressure. A backward that starts from a gradient other than 1
    makes one more buffer; scale with ``num_items`` instead. Logits and teacher are kept until backward, for a second
    derivative; changing them in place before that is an error. For float16 logits and reduction="none" the gradient is
    computed in backward, so that a loss scaler acts before anything is rounded to float16. Second derivatives, forward
    mode, functorch transforms, tensor subclasses and other devices go through a formula of torch operations, which is
    correct but has autograd's usual memory.

    Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015, arXiv:1503.02531; those of the
    other divergences are in docs/losses.md.

    Example:
        >>> import torch, pydistill
        >>> student_logits = torch.tensor([[1.0, 2.0, 0.5], [0.1, 0.2, 0.3]], requires_grad=True)
        >>> teacher_logits = torch.tensor([[0.5, 3.0, 0.0], [1.0, 0.0, 2.0]])
        >>> labels = torch.tensor([1, 2])
        >>> loss = pydistill.distillation_loss(student_logits, teacher_logits, labels, temperature=2.0, alpha=0.7)
        >>> loss.backward()
        >>> print(f"{loss.item():.4f}", student_logits.grad.shape)
        0.4104 torch.Size([2, 3])
    """
    arguments = locals()  # by name, so that an option is added to this signature and to engine/options.py only
    check_flag("inplace", inplace)
    check_flag("return_metrics", return_metrics)
    if wants_op(student_logits):
        outcome = torch_op.traced_loss(arguments)
    else:
        options = check_options(arguments)
        batch = check_batch(student_logits, teacher, labels, sample_weight, class_weight, options)
        outcome = autograd.run(batch, inplace, return_metrics)
        if outcome.teacher_sums_to_one and type(teacher) is Tensor:
            warn_of_probabilities()
    return (outcome.loss, make_metrics(outcome, student_logits)) if return_metrics else outcome.loss


def _divergences() -> str:
    """List the registry's divergences for the docstring."""
    return "\n    ".join(
        f"- ``{name}``{'' if entry.beta is None else f' ({entry.beta})'}: {entry.formula}"
        for name, entry in DIVERGENCES.items()
    )


if distillation_loss.__doc__ is not None:  # None under python -OO
    distillation_loss.__doc__ = distillation_loss.__doc__.replace("<divergences>", _divergences())
DEFAULTS: dict[str, Any] = distillation_loss.__kwdefaults__ or {}  # of the keyword arguments, by name


def make_metrics(outcome: Outcome, student_logits: Tensor) -> LossMetrics:
    """Convert an outcome's numbers to tensors; ``student_logits`` give the rows' shape, the dtype and the device."""
    dtype, rows = loss_dtype(student_logits), student_logits.shape[:-1]
    values = [outcome.soft, outcome.hard, outcome.soft_items, outcome.hard_items, *outcome.metrics.values()]
    if any(isinstance(x, Tensor) for x in values):
        found = [torch.as_tensor(x, dtype=dtype, device=student_logits.device).detach() for x in values]
        found = [x.reshape(rows) if x.dim() == 1 and x.shape != rows else x for x in found]
    else:  # one tensor for all numbers: the time matters for small batches
        found = list(torch.tensor(values, dtype=dtype).unbind())
    soft, hard, soft_items, hard_items, *metrics = found
    by_name = dict(zip(outcome.metrics, metrics, strict=True))
    return LossMetrics(soft_loss=soft, hard_loss=hard, num_items=(soft_items, hard_items), **by_name)


def loss_items(
    labels: Tensor | None,
    *,
    sample_weight: Tensor | None = None,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    unlabeled: Unlabeled = "skip",
) -> tuple[float, float]:
    r"""Denominators by which :func:`distillation_loss` divides with ``reduction="mean"``, for the rows of a batch.

    .. math::
        \text{soft} = \sum_i w_i \qquad \text{hard} = \sum_i w_i\, \text{class\_weight}[y_i]

    each over the rows that count for the term. Add the pairs of all micro-batches and pass the sum as ``num_items`` to
    each of them: losses and gradients then add up to those of one batch. Under DistributedDataParallel, which averages
    over the ranks, pass the sum over all ranks divided by the number of ranks.

    Args:
        labels: class indices ``(...)``, int64 or int32. May be None if ``sample_weight`` is given: then no row
            has a label, and every row counts for the soft term.
        sample_weight: ``(...)``, finite and >= 0.
        class_weight: ``(C,)``.
        ignore_index, unlabeled: as in :func:`distillation_loss`.

    Returns:
        tuple[float, float]: the soft and the hard denominator, each 0 where no row counts.

    Raises:
        ValueError, TypeError: as :func:`distillation_loss`.
        IndexError: a negative label, or one outside ``class_weight``, that is not ignore_index.

    Numerics: sums in float64.

    Example:
        >>> import torch, pydistill
        >>> labels = [torch.tensor([2, -100, 1]), torch.tensor([0])]  # of two micro-batches
        >>> soft, hard = (sum(items) for items in zip(*map(pydistill.loss_items, labels)))
        >>> soft, hard
        (3.0, 3.0)
        >>> logits, teacher = torch.randn(4, 5), torch.randn(4, 5)
        >>> parts = [
        ...     pydistill.distillation_loss(s, t, y, num_items=(soft, hard))
        ...     for s, t, y in zip(logits.split([3, 1]), teacher.split([3, 1]), labels)
        ... ]
        >>> torch.allclose(sum(parts), pydistill.distillation_loss(logits, teacher, torch.cat(labels)))
        True
    """
    given = {"ignore_index": ignore_index, "unlabeled": unlabeled}
    options = check_options(DEFAULTS | given)
    if labels is None and sample_weight is None:
        raise ValueError("labels must be given unless sample_weight says how many rows there are")
    for name, tensor in (("labels", labels), ("sample_weight", sample_weight), ("class_weight", class_weight)):
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        check_dense(name, tensor)
        if is_dtensor(tensor):
            raise TypeError(
                f"{name} must be a plain tensor, got a DTensor: count each rank's own rows, {name}.to_local(), and add "
                "up over the ranks"
            )
    rows = sample_weight if labels is None else labels
    assert rows is not None
    if sample_weight is not None and sample_weight.shape != rows.shape:
        raise ValueError(
            f"sample_weight must have the shape of labels, got {tuple(sample_weight.shape)} and {tuple(rows.shape)}"
        )
    if class_weight is not None and (class_weight.dim() != 1 or len(class_weight) == 0):
        raise ValueError(f"class_weight must have shape (C,), got {tuple(class_weight.shape)}")
    classes = _MOST_CLASSES if class_weight is None else len(class_weight)
    stand_in = torch.empty((), dtype=torch.float64, device=rows.device).expand(rows.numel(), classes)
    labels = None if labels is None else labels.reshape(-1)
    sample_weight = None if sample_weight is None else sample_weight.reshape(-1)
    _, _, sample_weight, class_weight = check_tensors(
        stand_in, None, labels, sample_weight, class_weight, soft=False, hard=False
    )
    batch = Batch(
        student=stand_in,
        teacher=None,
        labels=labels,
        sample_weight=sample_weight,
        class_weight=class_weight,
        teacher_indices=None,
        log_partitions=None,
        options=options,
    )
    check_rows(batch)
    soft, hard = denominators(counted_rows(batch), batch.class_weight)
    return float(soft), float(hard)
