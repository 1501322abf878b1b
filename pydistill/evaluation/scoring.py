"""Report: accuracy, agreement, calibration, size and latency of a student and its teacher."""

import pickle
import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pydistill._arguments import warn_caller
from pydistill._torch_modules import count_parameters, mode
from pydistill._wording import describe, few
from pydistill.evaluation.result import Bin, ClassScores, ModelScores, Report
from pydistill.evaluation.subject import (
    ORDER,
    Model,
    Rows,
    Subject,
    check_models,
    network_of,
    subject_of,
    teacher_behind_steps,
)
from pydistill.teachers.estimators import poor_teacher_message, split_steps, take_rows

_BINS = 15


def report(student: Model, teacher: Model | None, X: Rows, y: Any, *, batch_sizes: Sequence[int] = (1, 256)) -> Report:
    """Compare a student with its teacher on rows that neither was trained on.

    The expected calibration error sorts the N rows into B = 15 bins of equal width: bin b holds the n_b rows whose
    confidence (the largest probability) lies in ((b - 1) / B, b / B]. With the mean confidence and the accuracy of each
    bin::

        ECE = sum_b n_b / N * abs(accuracy_b - confidence_b)

    Times are medians of repeated calls after a warm-up, with torch's current number of threads, on the first rows of X
    (X is repeated if it has fewer rows). They include all that the model does to get from X to its outputs, such as the
    steps of a Pipeline, but not the conversion of X into a tensor or an array.

    Args:
        student: a module that maps rows to logits ``(rows, C)``. It runs in eval mode under
            ``torch.inference_mode()``; the mode of each submodule is restored. Or a fitted classifier with
            ``predict_proba``. For a DistilledClassifier or a skorch net, and for a Pipeline or a search that ends in
            one, ``parameters`` and ``bytes`` are those of the network.
        teacher: a module, a fitted classifier with ``predict_proba`` (or, without that, ``decision_function``), or
            None. The teacher gets X unchanged, with one exception: if the student is a Pipeline, or a search over one,
            that ends in a DistilledClassifier, and the teacher is that classifier's ``teacher_`` or a copy of it, then
            it gets X transformed by the steps before the classifier, as in ``fit``. Wrap any other teacher that needs
            transformed rows: ``make_pipeline(*student[:-1], teacher)``.
        X: ``(N, ...)``, tensor, array or DataFrame. Modules get a tensor, converted to the module's dtype if it is
            floating-point. Classifiers get an array, with rows of more than one dimension flattened, except for a
            skorch net, which takes images. Nothing is moved between devices.
        y: ``(N,)``, the labels. If student or teacher is a classifier: its classes; column j of a module is then class
            ``sorted(classes_)[j]``. If both are modules: integers, the numbers of the columns.
        batch_sizes: the numbers of rows per call to time.

    Returns:
        Report: ``str`` formats it as a table, ``to_json`` as JSON, ``plot`` draws it. A warning is given if the teacher
        is correct no more often than a constant prediction: X may not be in the form of the rows that the teacher was
        fitted on.

    Raises:
        ValueError: X and y have different lengths or no rows; X holds NaN or infinity; a label is not among the
            student's classes; the teacher has other classes; a model returns NaN.
        TypeError: student or teacher is neither a module nor a classifier; outputs are not ``(rows, C)``.

    Example:
        >>> import torch
        >>> from sklearn.datasets import load_iris
        >>> from sklearn.ensemble import RandomForestClassifier
        >>> from pydistill.evaluation import report
        >>> X, y = load_iris(return_X_y=True)
        >>> forest = RandomForestClassifier(10, random_state=0).fit(X[::2], y[::2])
        >>> result = report(torch.nn.Linear(4, 3), forest, X[1::2], y[1::2])
        >>> result.student.parameters, result.student.bytes, result.teacher.accuracy > 0.9
        (15, 60, True)
        >>> for line in str(result).splitlines()[2:4]:
        ...     print(line.strip())
        student   teacher
        model                     Linear    RandomForestClassifier

        A Pipeline is compared with the teacher of the DistilledClassifier at its end:

        >>> from sklearn.pipeline import make_pipeline
        >>> from sklearn.preprocessing import StandardScaler
        >>> from pydistill.sklearn import DistilledClassifier
        >>> p = make_pipeline(StandardScaler(), DistilledClassifier(forest, random_state=0)).fit(X[::2], y[::2])
        >>> result = report(p, p[-1].teacher_, X[1::2], y[1::2])
        >>> result.student.parameters, result.student.accuracy > 0.9, result.teacher.accuracy > 0.9
        (259, True, True)
    """
    check_models(student, teacher)
    X, y = _check_rows(X, y)
    sizes = _check_sizes(batch_sizes)
    subjects = {"student": subject_of("student", student, X)}
    if teacher is not None:
        subjects["teacher"] = teacher_behind_steps(student, teacher, X) or subject_of("teacher", teacher, X)
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        for subject in subjects.values():
            if isinstance(subject.model, nn.Module):
                stack.enter_context(mode(subject.model, training=False))
        outputs = {role: subject.outputs() for role, subject in subjects.items()}
        classes = _check_classes(student, teacher, outputs)
        labels = _encode(y, classes)
        outputs = {role: _in_columns(x, subjects[role].model, classes) for role, x in outputs.items()}
        found = {role: _score(subject, outputs[role], labels, sizes) for role, subject in subjects.items()}
        predicted = {role: x.argmax(-1) for role, x in outputs.items()}

    ours, theirs = found["student"], found.get("teacher")
    agreement: float | None = None
    compression: float | None = None
    speedup: dict[int, float] | None = None
    if theirs is not None:
        _warn_of_a_poor_teacher(student, theirs, labels)
        agreement = _share(predicted["student"] == predicted["teacher"])
        compression = theirs.bytes / ours.bytes if ours.bytes else None
        speedup = {size: theirs.seconds[size] / ours.seconds[size] for size in sizes}
    return Report(
        rows=len(y),
        threads=torch.get_num_threads(),
        classes=classes,
        student=ours,
        teacher=theirs,
        agreement=agreement,
        compression=compression,
        speedup=speedup,
        per_class=_per_class(predicted["student"], labels, classes),
    )


def _warn_of_a_poor_teacher(student: Model, scores: ModelScores, labels: Tensor) -> None:
    constant = float(labels.bincount().max()) / len(labels)
    if scores.accuracy > constant or scores.accuracy == 1:
        return
    hint = ". If it was fitted on rows transformed by the student's steps, pass make_pipeline(*student[:-1], teacher)"
    message = poor_teacher_message(scores.accuracy, constant) + (hint if split_steps(student)[0] else "")
    warn_caller(message)


def _check_classes(student: Model, teacher: Model | None, outputs: dict[str, Tensor]) -> list[Any]:
    """All classes, in the order of a module's columns."""
    width = outputs["student"].shape[-1]
    if "teacher" in outputs and outputs["teacher"].shape[-1] != width:
        raise ValueError(f"teacher must have the student's {width} classes, got {outputs['teacher'].shape[-1]}")
    own, taught = _own_classes(student), _own_classes(teacher)
    if own and taught and set(own) != set(taught):
        raise ValueError(f"teacher must have the student's classes, {few(sorted(own))}, got {few(sorted(taught))}")
    return sorted(own or taught or range(width))


def _own_classes(model: Model | None) -> list[Any] | None:
    if model is None or isinstance(model, nn.Module) or not hasattr(model, "classes_"):
        return None
    return list(np.asarray(model.classes_).tolist())


def _in_columns(scores: Tensor, model: Model, classes: list[Any]) -> Tensor:
    """Reorder the columns of the scores, so that column j belongs to ``classes[j]``."""
    own = _own_classes(model)
    return scores if own is None else scores[:, [own.index(name) for name in classes]]


def _encode(y: NDArray[Any], classes: list[Any]) -> Tensor:
    number = {name: k for k, name in enumerate(classes)}
    labels = y.tolist()
    for row, label in enumerate(labels):
        if label not in number:
            raise ValueError(f"y must hold the student's classes, {few(classes)}; row {row} holds {label!r}")
    return torch.tensor([number[label] for label in labels])


def _score(subject: Subject, scores: Tensor, labels: Tensor, sizes: list[int]) -> ModelScores:
    ece, bins = None, None
    if subject.kind != "scores":
        ece, bins = _calibration(scores.softmax(-1) if subject.kind == "logits" else scores, labels)
    network = network_of(subject.model)
    return ModelScores(
        name=type(subject.model).__name__,
        accuracy=_share(scores.argmax(-1) == labels),
        ece=ece,
        parameters=None if network is None else count_parameters(network),
        bytes=len(pickle.dumps(subject.model)) if network is None else _tensor_bytes(network),
        seconds={size: _median_seconds(subject, size) for size in sizes},
        reliability=bins,
    )


def _calibration(probs: Tensor, labels: Tensor) -> tuple[float, list[Bin]]:
    """Compute the expected calibration error, and the bins from which it is computed."""
    confidence, predicted = probs.max(-1)
    places = (confidence * _BINS).ceil().long().sub(1).clamp(0, _BINS - 1)
    rows = torch.bincount(places, minlength=_BINS).tolist()
    confidences, hits = (
        torch.bincount(places, x.double(), minlength=_BINS).tolist() for x in (confidence, predicted == labels)
    )
    bins = [
        Bin(n, c / n, hit / n) if n else Bin(0, None, None) for n, c, hit in zip(rows, confidences, hits, strict=True)
    ]
    return sum(abs(hit - c) for c, hit in zip(confidences, hits, strict=True)) / len(labels), bins


def _per_class(predicted: Tensor, labels: Tensor, classes: list[Any]) -> list[ClassScores]:
    # Not computed by scikit-learn, because it need not be installed.
    width = len(classes)
    confusion = torch.bincount(labels * width + predicted, minlength=width**2).view(width, width)
    correct, predictions, support = confusion.diag().tolist(), confusion.sum(0).tolist(), confusion.sum(1).tolist()
    return [
        ClassScores(name, _ratio(tp, p), _ratio(tp, n), _ratio(2 * tp, p + n), n)
        for name, tp, p, n in zip(classes, correct, predictions, support, strict=True)
    ]


def _median_seconds(subject: Subject, size: int) -> float:
    """Return the median time of a call, over at least 5 calls and at least 0.2 seconds."""
    batch = take_rows(subject.rows, np.arange(size) % len(subject.rows))
    for _ in range(2):
        subject.call(batch)
    times: list[float] = []
    end = time.perf_counter() + 0.2
    while len(times) < 5 or time.perf_counter() < end:
        start = time.perf_counter()
        subject.call(batch)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _tensor_bytes(module: nn.Module) -> int:
    return sum(x.nbytes for tensors in (module.parameters(), module.buffers()) for x in tensors)


def _check_rows(X: Rows, y: Any) -> tuple[Rows, NDArray[Any]]:
    rows = X if isinstance(X, Tensor) or hasattr(X, "iloc") else np.asarray(X)
    if rows.ndim == 0:
        raise ValueError(f"X must be a tensor, an array or a DataFrame with one row per item, got {describe(X)}")
    labels = y.numpy() if isinstance(y, Tensor) else np.asarray(y)
    if labels.ndim != 1:
        got = f"shape {labels.shape}" if labels.ndim else describe(y)
        raise ValueError(f"y must be 1-D, one label per row, got {got}; {ORDER}")
    if len(rows) != len(labels):
        raise ValueError(f"X and y must have the same number of rows, got {len(rows)} and {len(labels)}")
    if len(rows) == 0:
        raise ValueError("X must hold at least one row, got none")
    bad = _not_finite(rows)
    if bad.any():
        raise ValueError(f"X must be finite; row {int(bad.argmax())} holds a NaN or an infinity")
    return rows, labels


def _not_finite(X: Rows) -> NDArray[np.bool_]:
    """Which rows hold NaN or infinity."""
    if hasattr(X, "iloc"):
        bad: NDArray[np.bool_] = (X.isna() | X.isin([np.inf, -np.inf])).to_numpy().any(1)
        return bad
    if isinstance(X, Tensor):
        return (~X.detach().reshape(len(X), -1).isfinite().all(-1)).numpy()
    return ~np.isfinite(X.reshape(len(X), -1)).all(-1) if X.dtype.kind == "f" else np.zeros(len(X), bool)


def _check_sizes(sizes: Sequence[int]) -> list[int]:
    if not np.iterable(sizes):
        raise ValueError(f"batch_sizes must be a sequence of integers, such as (1, 256), got {sizes!r}")
    sizes = list(sizes)
    for size in sizes:
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"batch_sizes must be integers of at least 1, got {size!r}")
    return sizes


def _share(flags: Tensor) -> float:
    return float(flags.double().mean())


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
