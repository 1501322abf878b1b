"""Checks of the tensors of a call, made once. Every backend relies on them."""

import dataclasses
from collections.abc import Iterable

import torch
from torch import Size, Tensor

from pydistill._arguments import lost_storage, no_storage, warn_caller
from pydistill.engine.batch import TENSORS, Batch
from pydistill.engine.options import Options
from pydistill.engine.torch_private import is_dtensor, loss_parallel_is_active
from pydistill.formulas import DIVERGENCES
from pydistill.targets import PROBABILITIES_TAKEN_AS_LOGITS, SoftTargets, looks_like_probabilities

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_SOFT_LABELS = (
    ". Soft labels, as of mixup, are targets: distillation_loss(logits, SoftTargets.from_probs(labels), alpha=1.0) is "
    "their cross-entropy up to a constant; add it to the teacher's term, each multiplied by its weight"
)


def check_batch(
    student: Tensor,
    teacher: Tensor | SoftTargets | None,
    labels: Tensor | None,
    sample_weight: Tensor | None,
    class_weight: Tensor | None,
    options: Options,
) -> Batch:
    """Check the tensors of a call against each other and against the options."""
    soft, hard = options.alpha > 0, options.alpha < 1
    logits, indices, sample_weight, class_weight = check_tensors(
        student, teacher, labels, sample_weight, class_weight, soft=soft, hard=hard
    )
    return Batch(
        student=student,
        teacher=logits,
        labels=labels,
        sample_weight=sample_weight,
        class_weight=class_weight,
        teacher_indices=indices,
        log_partitions=_check_teacher_form(teacher, labels, options),
        options=options,
    )


def check_tensors(
    student: Tensor,
    teacher: Tensor | SoftTargets | None,
    labels: Tensor | None,
    sample_weight: Tensor | None,
    class_weight: Tensor | None,
    *,
    soft: bool,
    hard: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Check types, dtypes, devices and shapes. ``soft`` and ``hard`` say which terms are evaluated.

    Returns the teacher's logits, the indices of a top-k teacher, and the two weights in the loss's dtype.
    """
    if not isinstance(student, Tensor):
        raise TypeError(f"student_logits must be a tensor, got {type(student).__name__}")
    if student.dtype not in DTYPES:
        raise TypeError(f"student_logits must be float32, float64, bfloat16 or float16, got {student.dtype}")
    check_dense("student_logits", student)
    shape = student.shape
    if not shape or shape[-1] == 0:
        raise ValueError(f"student_logits must have at least one class in its last dimension, got shape {tuple(shape)}")
    logits = indices = None
    if soft:
        if teacher is None:
            raise ValueError("teacher must be given unless alpha is 0 (alpha is the weight of the soft term); got None")
        logits, indices = _check_teacher(teacher, student)
    if labels is not None:
        _check_labels(labels, student)
    elif hard:
        raise ValueError("labels must be given unless alpha is 1 (1 - alpha is the weight of the hard term); got None")
    if sample_weight is not None:
        sample_weight = _check_weight("sample_weight", sample_weight, student, shape[:-1])
    if class_weight is not None:
        class_weight = _check_weight("class_weight", class_weight, student, shape[-1:])
    return logits, indices, sample_weight, class_weight


def _check_teacher(teacher: Tensor | SoftTargets, student: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the teacher's logits, and the indices of a top-k teacher."""
    indices, targets = None, "SoftTargets.from_logits(teacher)"
    shape: tuple[int, ...]
    if isinstance(teacher, SoftTargets):
        targets = "teacher" if teacher.indices is None else "the targets, before the top k are taken,"
        indices, shape, logits = teacher.indices, teacher.shape, teacher.logits
    elif isinstance(teacher, Tensor):
        shape, logits = teacher.shape, teacher
    else:
        raise TypeError(f"teacher must be a tensor of logits or SoftTargets, got {type(teacher).__name__}")
    if logits.dtype not in DTYPES:
        raise TypeError(f"teacher must be float32, float64, bfloat16 or float16, got {logits.dtype}")
    check_dense("teacher", logits)
    if shape != student.shape:
        raise ValueError(
            f"teacher must have the shape of student_logits, got teacher {tuple(shape)} and "
            f"student_logits {tuple(student.shape)}{_shape_hint(shape, student.shape, targets)}"
        )
    _check_device("teacher", logits, student)
    return logits, indices


def _shape_hint(teacher: tuple[int, ...], student: tuple[int, ...], targets: str) -> str:
    """Suggest a call that would fit, if the classes seem to be dimension 1, or the teacher has more of them."""

    def moved(shape: tuple[int, ...]) -> tuple[int, ...]:
        return (shape[0], *shape[2:], shape[1])

    if len(teacher) > 2 and moved(teacher) == student:
        return "; if the teacher's classes are dimension 1, pass teacher.movedim(1, -1)"
    if len(student) > 2 and moved(student) == teacher:
        return "; if the student's classes are dimension 1, pass student_logits.movedim(1, -1)"
    if len(teacher) and teacher[:-1] == student[:-1] and teacher[-1] > student[-1]:
        return (
            f"; if the teacher's last classes are padding, or not the student's, pass "
            f"{targets}.select_classes({student[-1]}), or the indices of the student's classes"
        )
    return ""


def _check_teacher_form(teacher: Tensor | SoftTargets | None, labels: Tensor | None, options: Options) -> Tensor | None:
    """Check the rules about a teacher's form that depend on the options; return the log-partitions if needed."""
    if options.alpha == 0:
        return None
    divergence, entry = options.divergence, DIVERGENCES[options.divergence]
    if divergence == "dkd" and labels is None:
        raise ValueError(
            "labels must be given with divergence='dkd', which treats the label and the other classes "
            "differently; got None"
        )
    if not isinstance(teacher, SoftTargets):
        return None
    check_zeros(teacher, divergence)
    if teacher.indices is None:
        return None
    if teacher.tail not in entry.top_k:
        forms = " or ".join(f'tail="{tail}"' for tail in entry.top_k)
        rule = f"takes a top-k teacher with {forms} only" if forms else "takes no top-k teacher"
        raise ValueError(f'teacher: {divergence} {rule}, got tail="{teacher.tail}"')
    return partitions_at(teacher, options.temperature) if has_bucket(teacher) else None


def check_zeros(teacher: SoftTargets, divergence: str) -> None:
    """Refuse probabilities of exactly 0 for a divergence that compares logits."""
    if teacher.has_zeros and not DIVERGENCES[divergence].zeros:
        raise ValueError(
            f"teacher: {divergence} compares logits, and a probability of 0 has none; use forward_kl, jsd or "
            "skew_reverse_kl"
        )


def has_bucket(teacher: SoftTargets) -> bool:
    """Whether one more outcome holds the rest of a top-k teacher's mass.

    Not if k is the number of classes: a rounding error would give the rest mass that the student's lacks.
    """
    return teacher.tail == "bucket" and teacher.logits.shape[-1] < teacher.shape[-1]


def partitions_at(teacher: SoftTargets, temperature: float) -> Tensor:
    """Return a top-k teacher's log-partitions at the temperature."""
    if temperature not in teacher.log_partitions:
        stored = ", ".join(f"{t:g}" for t in teacher.log_partitions) or "none"
        raise ValueError(
            f'teacher: tail="bucket" needs the log-partition at temperature {temperature:g}; stored: {stored}'
        )
    return teacher.log_partitions[temperature]


def _check_labels(labels: Tensor, student: Tensor) -> None:
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be a tensor of class indices, got {type(labels).__name__}")
    if labels.dtype not in (torch.int64, torch.int32):
        hint = _SOFT_LABELS if labels.is_floating_point() else ""
        raise TypeError(f"labels must be class indices of dtype int64 or int32, got {labels.dtype}{hint}")
    check_dense("labels", labels)
    if labels.shape != student.shape[:-1]:
        hint = ""
        if student.dim() > 2 and labels.shape == student.shape[:1] + student.shape[2:]:
            hint = "; if the classes are dimension 1, pass student_logits.movedim(1, -1), and the teacher's likewise"
        raise ValueError(
            f"labels must have the shape of student_logits without its last dimension, got labels "
            f"{tuple(labels.shape)} and student_logits {tuple(student.shape)}{hint}"
        )
    if student.dim() > 2 and labels.shape == student.shape[:1] + student.shape[2:]:
        warn_caller(
            f"student_logits {tuple(student.shape)} with labels {tuple(labels.shape)}: the classes may be dimension 1 "
            "or the last one, and are taken from the last. If they are dimension 1, pass "
            "student_logits.movedim(1, -1), and the teacher's likewise"
        )
    _check_device("labels", labels, student)


def check_dense(name: str, tensor: Tensor) -> None:
    """Refuse sparse tensors and other layouts, which have no rows in memory."""
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {tensor.layout}; pass {name}.to_dense()")


def _check_weight(name: str, weight: Tensor, student: Tensor, shape: Size) -> Tensor:
    if not isinstance(weight, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(weight).__name__}")
    if weight.requires_grad:
        raise TypeError(f"{name} must not require a gradient: none flows into it; pass {name}.detach()")
    if weight.is_complex():
        raise TypeError(f"{name} must be real, got dtype {weight.dtype}")
    check_dense(name, weight)
    if weight.shape != shape:
        raise ValueError(
            f"{name} must have shape {tuple(shape)}, got {tuple(weight.shape)} with student_logits "
            f"{tuple(student.shape)}"
        )
    _check_device(name, weight, student)
    return weight.to(torch.float64 if student.dtype == torch.float64 else torch.float32).contiguous()


def _check_device(name: str, tensor: Tensor, student: Tensor) -> None:
    if not (tensor.is_cpu and student.is_cpu) and tensor.device != student.device:
        raise ValueError(
            f"{name} and student_logits must be on one device, got {name} on {tensor.device} and student_logits on "
            f"{student.device}"
        )


_probability_warning_given = False


def warn_of_probabilities() -> None:
    """Warn once that a plain tensor is taken as logits although its values look like probabilities."""
    global _probability_warning_given
    if not _probability_warning_given:
        _probability_warning_given = True
        warn_caller(PROBABILITIES_TAKEN_AS_LOGITS)


def sums_to_one(batch: Batch) -> bool:
    """Whether the teacher has logits of all classes that look like probabilities."""
    teacher = batch.teacher
    return teacher is not None and batch.teacher_indices is None and looks_like_probabilities(teacher.detach())


def check_storage(batch: Batch) -> None:
    """Refuse tensors whose memory was freed, as FSDP does; their address is 0."""
    for name, tensor in zip(TENSORS, batch.tensors, strict=True):
        if tensor is not None and lost_storage(tensor):
            raise no_storage(name, tensor)


def check_dtensors(named_tensors: Iterable[tuple[str, Tensor | None]]) -> None:
    """Refuse DTensors together with plain tensors, and under loss_parallel(), where torch's gradients are wrong."""
    given = [(name, tensor) for name, tensor in named_tensors if tensor is not None]
    distributed = [name for name, tensor in given if is_dtensor(tensor)]
    if not distributed:
        return
    plain = [name for name, tensor in given if name not in distributed and tensor.dim() > 0]
    if plain:
        raise ValueError(
            f"all tensors must be DTensors or none: {', '.join(distributed)} distributed, {', '.join(plain)} plain. "
            "Distribute all of them over the same mesh, or pass each rank's own rows as plain tensors (x.to_local())"
        )
    if loss_parallel_is_active():
        raise ValueError(
            f"{', '.join(distributed)} must not be used under torch.distributed.tensor.parallel.loss_parallel(): there "
            "the gradient of torch's log_softmax is that of cross_entropy alone. Call the loss outside of it; "
            "logits that are sharded over the classes are then gathered"
        )


def check_rows(batch: Batch) -> None:
    """Refuse labels out of range and unusable weights, naming the first such row. Computed with torch operations."""
    labels, weight = (None if x is None else x.reshape(-1) for x in (batch.labels, batch.sample_weight))
    bad_labels = bad_weights = torch.zeros((), dtype=torch.bool)
    if labels is not None:
        labels = labels.long()  # compared with int32 labels, an ignore_index beyond 32 bits would wrap around
        outside = (labels < 0) | (labels >= batch.student.shape[-1])
        bad_labels = outside & (labels != batch.options.ignore_index)
    if weight is not None:
        bad_weights = ~((weight >= 0) & weight.isfinite())
    bad = bad_labels | bad_weights
    if bad.any():
        row = int(bad.nonzero()[0])
        flat = dataclasses.replace(batch, labels=labels, sample_weight=weight)
        raise bad_label(flat, row) if labels is not None and bad_labels[row] else bad_weight(flat, row)


def bad_label(batch: Batch, row: int) -> IndexError:
    """The error for a label that is neither a class nor ignore_index; ``row`` is the first such row."""
    assert batch.labels is not None
    classes, label = batch.student.shape[-1], int(batch.labels[row])
    return IndexError(
        f"labels must be in [0, {classes}) or ignore_index={batch.options.ignore_index}; row {row} holds {label}"
    )


def bad_weight(batch: Batch, row: int) -> ValueError:
    """The error for a sample weight that is negative or not finite."""
    assert batch.sample_weight is not None
    return ValueError(f"sample_weight must be >= 0 and finite; row {row} holds {float(batch.sample_weight[row])}")
