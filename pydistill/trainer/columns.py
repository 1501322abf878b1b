"""The columns of a batch: which of them are inputs, targets, labels and sample weights."""

from typing import Any, NamedTuple

from torch import Tensor

from pydistill._wording import describe
from pydistill.targets import SoftTargets


class Columns(NamedTuple):
    """One batch, or all rows of data in memory; None for a column that the data do not have.

    Attributes:
        inputs: what the student takes as its one argument.
        targets: the teacher's logits ``(..., C)``, or :class:`SoftTargets`.
        labels: class indices ``(...)``; for a loss that is not a DistillationLoss, of any form.
        weight: sample weights, floating-point, of the shape of the labels.
    """

    inputs: Any
    targets: Tensor | SoftTargets | None = None
    labels: Tensor | None = None
    weight: Tensor | None = None


def split_columns(columns: object, *, with_teacher: bool, float_labels: bool = False) -> Columns:
    """Determine which column is which from the number of columns, their dtypes and their shapes.

    Args:
        columns: a tuple or list of one to four columns.
        with_teacher: the targets are made by the teacher, so that there is no column of targets.
        float_labels: accept labels of a floating-point dtype, for a loss that is not a DistillationLoss.

    Raises:
        TypeError: ``columns`` is not a tuple or list; labels are floating-point where they must not be.
        ValueError: another number of columns, or sample weights of another shape or dtype.
    """
    if not isinstance(columns, tuple | list):
        raise TypeError(
            f"a batch must be a tuple or list of columns, got {describe(columns)}; data in memory is a tuple of tensors"
        )
    match columns:
        case (inputs,) if with_teacher:
            found = Columns(inputs)
        case (inputs, labels) if with_teacher or _is_labels(labels) or _is_vector(labels):
            found = Columns(inputs, labels=labels)
        case (inputs, labels, weight) if with_teacher or _is_labels(labels):
            found = Columns(inputs, labels=labels, weight=weight)
        case (inputs, targets):
            found = Columns(inputs, targets)
        case (inputs, targets, labels):
            found = Columns(inputs, targets, labels)
        case (inputs, targets, labels, weight) if not with_teacher:
            found = Columns(inputs, targets, labels, weight)
        case _:
            raise _bad_form(columns, with_teacher)
    if found.weight is not None and not _is_weight(found.weight, found.labels):
        raise _bad_form(columns, with_teacher)
    if isinstance(found.labels, Tensor) and found.labels.is_floating_point() and not float_labels:
        raise _no_labels(found.labels)
    return found


def _bad_form(columns: tuple[Any, ...] | list[Any], with_teacher: bool) -> ValueError:
    if with_teacher:
        forms = (
            "(inputs, labels) or (inputs,) with teacher=, which makes the targets, or (inputs, labels, sample_weight)"
        )
    else:
        forms = (
            "(inputs, targets, labels), with sample_weight as a fourth column, (inputs, targets) or, with alpha = 0 or "
            "teacher=, (inputs, labels), with sample_weight as a third"
        )
    return ValueError(
        f"a batch must be {forms}; sample_weight is floating-point and has the shape of labels; got {describe(columns)}"
    )


def check_weight(weight: object) -> None:
    """Check all sample weights before training: an error of the loss could name only a row of a shuffled batch."""
    if isinstance(weight, Tensor) and weight.is_floating_point():
        bad = ~((weight >= 0) & weight.isfinite())
        if bad.any():
            place = bad.nonzero()[0].tolist()
            raise ValueError(
                f"sample_weight must be >= 0 and finite; row {place[0]} holds {float(weight[tuple(place)])}"
            )


def _is_labels(column: object) -> bool:
    return isinstance(column, Tensor) and not column.is_floating_point()


def _is_vector(column: object) -> bool:
    """Return whether a column has one number per row: logits have one per class."""
    return isinstance(column, Tensor) and column.dim() == 1


def _is_weight(column: object, labels: object) -> bool:
    return isinstance(column, Tensor) and column.is_floating_point() and column.shape == getattr(labels, "shape", None)


def _no_labels(column: Tensor) -> TypeError:
    """Return the error for floating-point numbers where labels are expected."""
    if column.dim() == 1:
        hint = "if they are whole numbers, pass labels.long()"
    else:
        hint = (
            "class probabilities are targets, not labels: pass (inputs, SoftTargets.from_probs(probabilities)) with "
            "alpha=1, without teacher="
        )
    return TypeError(f"labels must be class indices of an integer dtype, got {describe(column)}; {hint}")
