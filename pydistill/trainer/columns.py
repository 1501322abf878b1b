"""Which column of a batch is what."""

from torch import Tensor

from pydistill._wording import describe


def split_columns(columns, *, with_teacher, float_labels=False):
    """A batch, or all rows, as ``(inputs, targets, labels, sample_weight)``; None for what is not among them.

    ``with_teacher``: the targets are made from the inputs. ``float_labels``: the loss may take such labels.
    """
    if not isinstance(columns, tuple | list):
        raise TypeError(
            f"a batch must be a tuple or list of columns, got {describe(columns)}; data in memory is a tuple of tensors"
        )
    match columns:
        case (inputs,) if with_teacher:
            found = inputs, None, None, None
        case (inputs, labels) if with_teacher or _is_labels(labels) or _is_vector(labels):
            found = inputs, None, labels, None
        case (inputs, labels, weight) if with_teacher or _is_labels(labels):
            found = inputs, None, labels, weight
        case (inputs, targets):
            found = inputs, targets, None, None
        case (inputs, targets, labels):
            found = inputs, targets, labels, None
        case (inputs, targets, labels, weight) if not with_teacher:
            found = columns
        case _:
            raise _bad_form(columns, with_teacher)
    _, _, labels, weight = found
    if weight is not None and not _is_weight(weight, labels):
        raise _bad_form(columns, with_teacher)
    if isinstance(labels, Tensor) and labels.is_floating_point() and not float_labels:
        raise _no_labels(labels)
    return found


def _bad_form(columns, with_teacher) -> ValueError:
    if with_teacher:
        forms = (
            "(inputs, labels) or (inputs,) under teacher=, which makes the targets, or (inputs, labels, sample_weight)"
        )
    else:
        forms = (
            "(inputs, targets, labels), with sample_weight as a fourth column, (inputs, targets) or, with alpha = 0 or "
            "teacher=, (inputs, labels), with sample_weight as a third"
        )
    return ValueError(
        f"a batch must be {forms}; sample_weight is floating-point and has the shape of labels; got {describe(columns)}"
    )


def check_weight(weight):
    """Sample weights of all rows, before the first of them is used: the loss sees a shuffled batch."""
    if isinstance(weight, Tensor) and weight.is_floating_point():
        bad = ~((weight >= 0) & weight.isfinite())
        if bad.any():
            place = bad.nonzero()[0].tolist()
            raise ValueError(
                f"sample_weight must be >= 0 and finite; row {place[0]} holds {float(weight[tuple(place)])}"
            )


def _is_labels(column) -> bool:
    return isinstance(column, Tensor) and not column.is_floating_point()


def _is_vector(column) -> bool:
    """One number per row, which logits are not."""
    return isinstance(column, Tensor) and column.dim() == 1


def _is_weight(column, labels) -> bool:
    return isinstance(column, Tensor) and column.is_floating_point() and column.shape == getattr(labels, "shape", None)


def _no_labels(column) -> TypeError:
    """The error for floating-point numbers where labels are expected."""
    if column.dim() == 1:
        hint = "if they are whole numbers, pass labels.long()"
    else:
        hint = (
            "class probabilities are targets, not labels: pass (inputs, SoftTargets.from_probs(probabilities)) with "
            "alpha=1, without teacher="
        )
    return TypeError(f"labels must be class indices of an integer dtype, got {describe(column)}; {hint}")
