"""The batch that a backend evaluates, and the outcome that it returns. Fields are read by name, never by position."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from operator import attrgetter

from torch import Tensor

from pydistill.engine.options import Options

CONSTANTS = ("teacher", "labels", "sample_weight", "class_weight", "teacher_indices", "log_partitions")
TENSORS = ("student", *CONSTANTS)
_constants = attrgetter(*CONSTANTS)
_tensors = attrgetter(*TENSORS)


@dataclass(slots=True, eq=False)
class Batch:
    """The tensors of a call, checked.

    student and teacher are ``(N, C)``, or ``(..., C)`` for the formula; labels and sample_weight ``(N,)``; class_weight
    ``(C,)``. teacher is None if the soft term is not evaluated; labels may be None if the hard term is not evaluated.
    The weights have the dtype of the loss.

    A top-k teacher is ``(N, k)``, with ``teacher_indices`` ``(N, k)``, int64. With ``log_partitions`` ``(N,)``,
    float64, at the temperature in use, the classes outside the k are one more outcome, which has the rest of the mass.
    """

    student: Tensor
    teacher: Tensor | None
    labels: Tensor | None
    sample_weight: Tensor | None
    class_weight: Tensor | None
    teacher_indices: Tensor | None
    log_partitions: Tensor | None
    options: Options

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The tensors, in the order of ``TENSORS``."""
        return _tensors(self)

    @property
    def constants(self) -> tuple[Tensor | None, ...]:
        """The tensors that get no gradient, in the order of ``CONSTANTS``."""
        return _constants(self)

    @property
    def evaluates_soft(self) -> bool:
        """Whether there is a teacher, and the soft term has a weight and a denominator."""
        return self.teacher is not None and self.options.evaluates_soft

    @property
    def evaluates_hard(self) -> bool:
        """Whether the hard term has a weight and a denominator."""
        return self.options.evaluates_hard


def batch_of(student: Tensor, constants: Iterable[Tensor | None], options: Options) -> Batch:
    """Make a batch from its constants in the order of ``CONSTANTS``, as saved by autograd."""
    return Batch(student=student, options=options, **dict(zip(CONSTANTS, constants, strict=True)))


@dataclass(slots=True, eq=False)
class Outcome:
    """What a backend computed for a batch.

    Attributes:
        loss: tensor, 0-d or ``(N,)``.
        soft, hard: the terms: numbers, or tensors ``(N,)`` with reduction="none". NaN for a term that is not evaluated.
        soft_items, hard_items: the denominators of "mean", also with another reduction.
        metrics: the metrics by name; NaN if no row counts for one; empty if they were not asked for.
        teacher_sums_to_one: whether the teacher's first row is >= 0 and sums to 1, so that it may hold probabilities
            that were passed as logits.
    """

    loss: Tensor
    soft: float | Tensor
    hard: float | Tensor
    soft_items: float | Tensor
    hard_items: float | Tensor
    metrics: Mapping[str, float | Tensor] = field(default_factory=dict)
    teacher_sums_to_one: bool = False
