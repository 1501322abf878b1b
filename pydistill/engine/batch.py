"""What goes into a backend and what comes out of it."""

from typing import NamedTuple

from torch import Tensor


class Options(NamedTuple):
    """The loss's numbers and choices, checked. ``soft_items`` and ``hard_items`` are None where they are counted."""

    divergence: str
    beta: float | None
    temperature: float
    alpha: float
    t_squared: bool
    ignore_index: int
    unlabeled: str
    label_smoothing: float
    reduction: str
    soft_items: float | None
    hard_items: float | None


class Batch(NamedTuple):
    """The loss's tensors, checked.

    student and teacher ``(N, C)``, or ``(..., C)`` for the formula; labels and sample_weight ``(N,)``; class_weight
    ``(C,)``. teacher is None where the soft term is not evaluated, labels may be None where the hard term is not.
    The weights have the dtype of the loss.

    A top-k teacher is ``(N, k)``, with ``teacher_indices`` ``(N, k)``, int64. With ``log_partitions`` ``(N,)``,
    float64, at the temperature in use, the rest of its mass is one more outcome.
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
    def evaluates_soft(self) -> bool:
        """Whether the soft term has a weight; a given denominator of 0 says that no row counts for it anywhere."""
        return self.teacher is not None and self.options.soft_items != 0

    @property
    def evaluates_hard(self) -> bool:
        """Whether the hard term has a weight and a denominator."""
        return self.options.alpha < 1 and self.options.hard_items != 0


class Outcome(NamedTuple):
    """What a backend found out about a batch. Tensors ``(N,)`` under reduction="none", where else numbers stand.

    soft and hard are NaN where the term is not evaluated; agreement and accuracy where no row tells, or where they
    were not asked for. The items are the denominators of "mean". teacher_sums_to_one: the teacher's first row is >= 0
    and sums to 1, so that perhaps probabilities were passed as logits.
    """

    loss: Tensor
    soft: float | Tensor
    hard: float | Tensor
    agreement: float
    accuracy: float
    soft_items: float
    hard_items: float
    teacher_sums_to_one: bool
