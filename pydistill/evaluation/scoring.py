"""A report that sets a student beside its teacher: accuracy, agreement, calibration, size and time of a call."""

import pickle
import statistics
import time
import warnings
from contextlib import ExitStack
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from pydistill._torch_modules import count_parameters, float_dtype, mode
from pydistill._wording import about, describe, few
from pydistill.evaluation.result import Bin, ClassScores, ModelScores, Report
from pydistill.teachers.estimators import is_a, split_steps

_BINS = 15
_CHUNK = 1024  # rows per call when everything is predicted


def report(student, teacher, X, y, *, batch_sizes=(1, 256)) -> Report:
    """Set a student beside its teacher on rows that neither was trained on.

    Expected calibration error, over B = 15 bins of equal width, where bin b holds the n_b rows whose confidence (the
    largest probability) lies in ((b - 1) / B, b / B], of N rows in all::

        ECE = sum_b n_b / N * abs(accuracy_b - confidence_b)

    Times are medians of repeated calls after a warm-up, on torch's number of threads, for the first rows of X (repeated
    where X has fewer). They include what the model does on the way from X to its outputs, steps of a Pipeline too, not
    the conversion of X.

    Args:
        student: a module that maps rows to logits ``(rows, C)``, run in eval mode under ``torch.inference_mode()``;
            each of its submodules gets its own mode back. Or a fitted classifier with ``predict_proba``; of a
            DistilledClassifier or a skorch net, and of a Pipeline or search that ends in one, parameters and bytes are
            those of the network.
        teacher: a module, a fitted classifier with ``predict_proba`` or, failing that, ``decision_function``; or None.
            It gets X as it is, with one exception: if the student is a Pipeline, or a search over one, that ends in a
            DistilledClassifier, and this is that classifier's ``teacher_`` or a copy of it, it gets what the steps
            before the classifier make of X, as it did in ``fit``. Put any other teacher of such rows behind the steps:
            ``make_pipeline(*student[:-1], teacher)``.
        X: ``(N, ...)``, tensor, array or DataFrame. Modules get a tensor, floating-point ones in their own dtype;
            classifiers an array, a row of more than one dimension flattened; not for a skorch net, which takes images
            as they are. Nothing is moved between devices.
        y: ``(N,)``, integer labels: the column of a module. Where student or teacher is a classifier: its classes, and
            column j of a module then is class ``sorted(classes_)[j]``.
        batch_sizes: the numbers of rows to time.

    Returns:
        Report: a table by ``str``, JSON by ``to_json``, a PNG by ``plot``. A teacher that is right no more often than a
        constant answer is warned of: it may have got rows in another form than it was fitted on.

    Raises:
        ValueError: X and y of different lengths or without rows; NaN or infinity in X; a label that is not among the
            student's classes; a teacher with other classes; a model that gives NaN.
        TypeError: a student or teacher of another kind, or outputs that are not ``(rows, C)``.

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

        A Pipeline is set beside the teacher of the DistilledClassifier at its end:

        >>> from sklearn.pipeline import make_pipeline
        >>> from sklearn.preprocessing import StandardScaler
        >>> from pydistill.sklearn import DistilledClassifier
        >>> p = make_pipeline(StandardScaler(), DistilledClassifier(forest, random_state=0)).fit(X[::2], y[::2])
        >>> result = report(p, p[-1].teacher_, X[1::2], y[1::2])
        >>> result.student.parameters, result.student.accuracy > 0.9, result.teacher.accuracy > 0.9
        (259, True, True)
    """
    X, y = _check_rows(X, y)
    sizes = _check_sizes(batch_sizes)
    subjects = {"student": _subject("student", student, X)}
    if teacher is not None:
        subjects["teacher"] = _behind_steps(student, teacher, X) or _subject("teacher", teacher, X)
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        for subject in subjects.values():
            if isinstance(subject.model, nn.Module):
                stack.enter_context(mode(subject.model, training=False))
        outputs = {role: _outputs(subject) for role, subject in subjects.items()}
        classes = _check_classes(student, teacher, outputs)
        labels = _encode(y, classes)
        found = {}
        for role, subject in subjects.items():
            outputs[role] = _in_columns(outputs[role], subject.model, classes)
            found[role] = _score(subject, outputs[role], labels, sizes)
        predicted = {role: scores.argmax(-1) for role, scores in outputs.items()}
    ours, theirs = found["student"], found.get("teacher")
    if theirs:
        _warn_of_a_poor_teacher(student, theirs, labels)
    return Report(
        rows=len(y),
        threads=torch.get_num_threads(),
        classes=classes,
        student=ours,
        teacher=theirs,
        agreement=theirs and _share(predicted["student"] == predicted["teacher"]),
        compression=theirs.bytes / ours.bytes if theirs and ours.bytes else None,
        speedup=theirs and {size: theirs.seconds[size] / ours.seconds[size] for size in sizes},
        per_class=_per_class(predicted["student"], labels, classes),
    )


class _Subject(NamedTuple):
    """A model, the rows in the form that it takes, and how to call it; ``kind`` is logits, probs or scores."""

    role: str
    model: object
    rows: object
    call: object
    kind: str


def _subject(role, model, X) -> _Subject:
    if isinstance(model, nn.Module):
        return _Subject(role, model, _for_module(X, model), model, "logits")
    for method, kind in (("predict_proba", "probs"), ("decision_function", "scores")):
        if hasattr(model, method):
            return _Subject(role, model, _for_classifier(X, model), getattr(model, method), kind)
    raise TypeError(f"{role} must be a torch.nn.Module or have predict_proba, got {describe(model)}")


def _behind_steps(student, teacher, X) -> _Subject | None:
    """The student's own teacher, which learned from what the steps before the student make of X; None for another."""
    steps, inner = split_steps(student)
    own = getattr(inner, "teacher_", None)
    if not steps or own is None:
        return None

    def transformed(rows):
        for step in steps:
            rows = step.transform(rows)
        return rows

    rows = _for_classifier(X, student)
    with about("student"):
        some = transformed(_take(rows, slice(_CHUNK)))
    subject = _subject("teacher", teacher, some)
    if not _is_same_model(teacher, own, subject.rows):
        return None
    in_its_form = _for_module if isinstance(teacher, nn.Module) else _for_classifier
    return subject._replace(rows=rows, call=lambda x: subject.call(in_its_form(transformed(x), teacher)))


def _is_same_model(model, own, rows) -> bool:
    """Whether it is this very model, or a copy: of an estimator, pickled or not, one that says the same of all rows."""
    model = model.estimator if is_a(model, "sklearn", "FrozenEstimator") else model
    if model is own:
        return True
    if type(model) is not type(own):
        return False
    if isinstance(model, nn.Module):
        theirs, ours = model.state_dict(), own.state_dict()
        return theirs.keys() == ours.keys() and all(torch.equal(theirs[name], ours[name]) for name in ours)
    method = "predict_proba" if hasattr(own, "predict_proba") else "decision_function"
    try:
        return np.array_equal(getattr(model, method)(rows), getattr(own, method)(rows))
    except (AttributeError, ValueError):  # one of other features, or that was never fitted
        return False


def _warn_of_a_poor_teacher(student, scores, labels):
    right, constant = scores.accuracy, float(labels.bincount().max()) / len(labels)
    if right > constant or right == 1:
        return
    hint = ". A teacher of what the student's steps make of X is given as make_pipeline(*student[:-1], teacher)"
    warnings.warn(
        f"teacher is right for {right:.3f} of the rows, always answering the most frequent class for {constant:.3f}: X "
        "may not have the form (scale, order of columns) of the rows that it was fitted on"
        + (hint if split_steps(student)[0] else ""),
        UserWarning,
        stacklevel=3,
    )


def _for_module(X, module) -> Tensor:
    rows = X.detach() if isinstance(X, Tensor) else torch.tensor(np.asarray(X))
    dtype = float_dtype(module, rows.dtype)
    return rows.to(dtype) if rows.is_floating_point() else rows


def _for_classifier(X, model):
    if hasattr(X, "iloc"):
        return X
    if isinstance(X, Tensor):
        X = X.detach()
        X = (X.float() if X.dtype is torch.bfloat16 else X).numpy()  # numpy has no bfloat16
    takes_images = isinstance(getattr(split_steps(model)[1], "module_", None), nn.Module)
    return X if takes_images else X.reshape(len(X), -1)


def _outputs(subject) -> Tensor:
    """Logits, probabilities or scores ``(N, C)`` in float64, in the model's own order of columns."""
    parts = []
    for start in range(0, len(subject.rows), _CHUNK):
        rows = _take(subject.rows, slice(start, start + _CHUNK))
        with about(subject.role):
            part = subject.call(rows)
        part = part if isinstance(part, Tensor | list) else torch.from_numpy(np.array(part))
        if isinstance(part, Tensor) and part.dim() == 1 and subject.kind == "scores":  # of two classes
            part = torch.stack([torch.zeros_like(part), part], -1)
        good = isinstance(part, Tensor) and part.is_floating_point() and part.dim() == 2 and len(part) == len(rows)
        if not good:
            raise TypeError(
                f"{subject.role} must map {len(rows)} rows to ({len(rows)}, C) numbers, got {describe(part)}"
            )
        parts.append(part.double())
    scores = torch.cat(parts)
    bad = scores.isnan().any(-1)
    if bad.any():
        raise ValueError(f"{subject.role} must not give NaN, as it does for row {int(bad.nonzero()[0])}")
    return scores


def _check_classes(student, teacher, outputs) -> list:
    """All classes, in the order of a module's columns."""
    width = outputs["student"].shape[-1]
    if "teacher" in outputs and outputs["teacher"].shape[-1] != width:
        raise ValueError(f"teacher must have the student's {width} classes, it has {outputs['teacher'].shape[-1]}")
    own, taught = _own_classes(student), _own_classes(teacher)
    if own and taught and set(own) != set(taught):
        raise ValueError(f"teacher must have the student's classes, {few(sorted(own))}; it has {few(sorted(taught))}")
    return sorted(own or taught or range(width))


def _own_classes(model) -> list | None:
    if isinstance(model, nn.Module) or not hasattr(model, "classes_"):
        return None
    return np.asarray(model.classes_).tolist()


def _in_columns(scores, model, classes) -> Tensor:
    own = _own_classes(model)
    return scores if own is None else scores[:, [own.index(name) for name in classes]]


def _encode(y, classes) -> Tensor:
    number = {name: k for k, name in enumerate(classes)}
    labels = y.tolist()
    for row, label in enumerate(labels):
        if label not in number:
            raise ValueError(f"y must hold the student's classes, {few(classes)}; row {row} holds {label!r}")
    return torch.tensor([number[label] for label in labels])


def _score(subject, scores, labels, sizes) -> ModelScores:
    bins = None
    if subject.kind != "scores":
        bins = _reliability(scores.softmax(-1) if subject.kind == "logits" else scores, labels)
    network = _network(subject.model)
    return ModelScores(
        name=type(subject.model).__name__,
        accuracy=_share(scores.argmax(-1) == labels),
        ece=bins and sum(b.rows * abs(b.accuracy - b.confidence) for b in bins if b.rows) / len(labels),
        parameters=None if network is None else count_parameters(network),
        bytes=len(pickle.dumps(subject.model)) if network is None else _tensor_bytes(network),
        seconds={size: _median_seconds(subject, size) for size in sizes},
        reliability=bins,
    )


def _reliability(probs, labels) -> list[Bin]:
    confidence, predicted = probs.max(-1)
    places = (confidence * _BINS).ceil().long().sub(1).clamp(0, _BINS - 1)
    rows = torch.bincount(places, minlength=_BINS)
    sums = [torch.bincount(places, x.double(), minlength=_BINS) for x in (confidence, predicted == labels)]
    return [
        Bin(n, c / n, right / n) if n else Bin(0, None, None)
        for n, c, right in zip(rows.tolist(), *(x.tolist() for x in sums), strict=True)
    ]


def _per_class(predicted, labels, classes) -> list[ClassScores]:
    # A few lines on a confusion matrix: scikit-learn is an extra, and the table is not.
    width = len(classes)
    confusion = torch.bincount(labels * width + predicted, minlength=width**2).view(width, width)
    right, said, support = confusion.diag().tolist(), confusion.sum(0).tolist(), confusion.sum(1).tolist()
    return [
        ClassScores(name, _ratio(tp, p), _ratio(tp, n), _ratio(2 * tp, p + n), n)
        for name, tp, p, n in zip(classes, right, said, support, strict=True)
    ]


def _median_seconds(subject, size) -> float:
    """Of at least 5 calls, and of as many as go into a fifth of a second."""
    batch = _take(subject.rows, np.arange(size) % len(subject.rows))
    for _ in range(2):
        subject.call(batch)
    times, end = [], time.perf_counter() + 0.2
    while len(times) < 5 or time.perf_counter() < end:
        start = time.perf_counter()
        subject.call(batch)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _network(model) -> nn.Module | None:
    """The module itself, or that of a DistilledClassifier or of a skorch net."""
    model = split_steps(model)[1]
    candidates = model, getattr(model, "student_", None), getattr(model, "module_", None)
    return next((x for x in candidates if isinstance(x, nn.Module)), None)


def _tensor_bytes(module) -> int:
    return sum(x.numel() * x.element_size() for tensors in (module.parameters(), module.buffers()) for x in tensors)


def _check_rows(X, y):
    if not isinstance(X, Tensor) and not hasattr(X, "iloc"):
        X = np.asarray(X)
    if X.ndim == 0:
        raise ValueError(f"X must be a tensor, an array or a DataFrame with a row per item, got {describe(X)}")
    y = y.numpy() if isinstance(y, Tensor) else np.asarray(y)
    if y.ndim != 1:
        raise ValueError(f"y must be 1-D, a label per row; got shape {y.shape}")
    if len(X) != len(y):
        raise ValueError(f"X and y must have the same number of rows, got {len(X)} and {len(y)}")
    if len(X) == 0:
        raise ValueError("X must hold at least one row, got none")
    bad = _not_finite(X)
    if bad.any():
        raise ValueError(f"X must be finite; row {int(bad.argmax())} holds a NaN or an infinity")
    return X, y


def _not_finite(X):
    if hasattr(X, "iloc"):
        return (X.isna() | X.isin([np.inf, -np.inf])).to_numpy().any(1)
    if isinstance(X, Tensor):
        return ~X.detach().reshape(len(X), -1).isfinite().all(-1).numpy()
    return ~np.isfinite(X.reshape(len(X), -1)).all(-1) if X.dtype.kind == "f" else np.zeros(1, bool)


def _check_sizes(sizes) -> list[int]:
    if not np.iterable(sizes):
        raise ValueError(f"batch_sizes must be a sequence of integers, such as (1, 256), got {sizes!r}")
    sizes = list(sizes)
    for size in sizes:
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"batch_sizes must be integers of at least 1, got {size!r}")
    return sizes


def _take(rows, index):
    return rows.iloc[index] if hasattr(rows, "iloc") else rows[index]


def _share(flags) -> float:
    return float(flags.double().mean())


def _ratio(part, whole) -> float:
    return part / whole if whole else 0.0
