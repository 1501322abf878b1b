"""A report that sets a student beside its teacher: accuracy, agreement, calibration, size and time of a call."""

import json
import math
import pickle
import statistics
import time
from contextlib import ExitStack
from dataclasses import dataclass, fields
from io import BytesIO
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from pydistill.data import describe
from pydistill.files import write_whole
from pydistill.modules import float_dtype, mode
from pydistill.shipping import count_parameters

_BINS = 15
_CHUNK = 1024  # rows per call when everything is predicted


class Bin(NamedTuple):
    """The rows of one bin of confidence; confidence and accuracy are their means, None where there are no rows."""

    rows: int
    confidence: float | None
    accuracy: float | None


class ClassScores(NamedTuple):
    """The student on one class: precision TP / (TP + FP), recall TP / (TP + FN), F1 2 TP / (2 TP + FP + FN).

    ``support`` is the number of its rows. A quotient of 0 / 0 is 0.
    """

    name: object
    precision: float
    recall: float
    f1: float
    support: int


class ModelScores(NamedTuple):
    """What is measured of a student, or of a teacher.

    Attributes:
        name: of its class.
        accuracy: share of the rows whose argmax is the label; ties go to the first class.
        ece: expected calibration error; None for a model without probabilities.
        parameters: how many numbers it learned; None for an estimator.
        bytes: of a module's parameters and buffers; of an estimator's pickle.
        seconds: median time of one call, by number of rows.
        reliability: the bins behind ``ece``, or None.
    """

    name: str
    accuracy: float
    ece: float | None
    parameters: int | None
    bytes: int
    seconds: dict[int, float]
    reliability: list[Bin] | None


@dataclass(frozen=True)
class Report:
    """A student beside its teacher; ``print(report)`` shows a table. Made by :func:`report`.

    Attributes:
        rows: how many rows were scored.
        threads: torch's number of threads while the times were taken.
        classes: the classes, in the order of the student's columns.
        student: its figures.
        teacher: its figures; None without one, and so are the next three.
        agreement: share of the rows in which both have the same argmax.
        compression: the teacher's bytes over the student's; None for a student without any.
        speedup: the teacher's time over the student's, by number of rows.
        per_class: the student on each class.
    """

    rows: int
    threads: int
    classes: list
    student: ModelScores
    teacher: ModelScores | None
    agreement: float | None
    compression: float | None
    speedup: dict[int, float] | None
    per_class: list[ClassScores]

    def __str__(self):
        models = [self.student] if self.teacher is None else [self.student, self.teacher]
        table = [
            ["", "student", "teacher"][: len(models) + 1],
            ["model", *(m.name for m in models)],
            ["accuracy", *(f"{m.accuracy:.4f}" for m in models)],
            ["agreement", _number(self.agreement, ".4f")],
            ["calibration error (ECE)", *(_number(m.ece, ".4f") for m in models)],
            ["parameters", *(_number(m.parameters, ",") for m in models)],
            ["bytes", *(f"{m.bytes:,}" for m in models)],
        ]
        for size in self.student.seconds:
            table.append([f"ms, batch of {size}", *(f"{1e3 * m.seconds[size]:.3f}" for m in models)])
        if self.teacher is not None:
            table[6].append(f"{_times(self.compression)} smaller")
            for row, ratio in zip(table[7:], self.speedup.values(), strict=True):
                row.append(f"{_times(ratio)} faster")
        classes = [
            ["class", "precision", "recall", "F1", "rows"],
            *([str(c.name), *(f"{x:.3f}" for x in c[1:4]), str(c.support)] for c in self.per_class),
        ]
        title = f"{self.rows} rows, {len(self.classes)} classes; torch threads: {self.threads}"
        return "\n".join([title, "", *_aligned(table), "", *_aligned(classes)])

    def to_json(self, path=None) -> str:
        """All figures as JSON; with ``path`` also as a file, which is replaced as a whole.

        Raises:
            OSError: the file cannot be written; one that was there is as it was.
        """
        text = json.dumps({field.name: _plain(getattr(self, field.name)) for field in fields(self)}, indent=2)
        if path is not None:
            write_whole(path, text.encode())
        return text

    def plot(self, path):
        """Accuracy, calibration, F1 per class, cost: one PNG, replaced as a whole. Returns the matplotlib Figure.

        Raises:
            ImportError: matplotlib is not installed.
            OSError: the file cannot be written; one that was there is as it was.
        """
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg  # no window, and no global pyplot state
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("a plot needs matplotlib: pip install 'pydistill-kd[demo]'") from error
        figure = Figure(figsize=(10, 7), layout="constrained")
        FigureCanvasAgg(figure)
        shares, calibration, f1, cost = figure.subplots(2, 2).flat
        self._draw_shares(shares)
        self._draw_calibration(calibration)
        self._draw_f1(f1)
        self._draw_cost(cost)
        file = BytesIO()
        figure.savefig(file, format="png", dpi=120)
        write_whole(path, file.getvalue())
        return figure

    def _models(self):
        both = {"student": self.student, "teacher": self.teacher}
        return {role: scores for role, scores in both.items() if scores is not None}

    def _draw_shares(self, axes):
        shares = {f"{role},\naccuracy": scores.accuracy for role, scores in self._models().items()}
        if self.teacher is not None:
            shares["agreement"] = self.agreement
        bars = axes.bar(list(shares), list(shares.values()), color=["C0", "C1", "C7"][: len(shares)])
        axes.bar_label(bars, fmt="%.3f")
        axes.set(title=f"{self.rows} rows", ylim=(0, 1.1))

    def _draw_calibration(self, axes):
        axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
        for role, scores in self._models().items():
            if scores.reliability is not None:
                bins = [b for b in scores.reliability if b.rows]
                label = f"{role}, ECE {scores.ece:.3f}"
                axes.plot([b.confidence for b in bins], [b.accuracy for b in bins], "o-", label=label)
                axes.legend()
        axes.set(title="calibration", xlabel="confidence", ylabel="accuracy")

    def _draw_f1(self, axes):
        axes.bar(range(len(self.classes)), [c.f1 for c in self.per_class])
        if len(self.classes) <= 20:
            names = [str(name) for name in self.classes]
            axes.set_xticks(range(len(names)), names, rotation=45 if max(map(len, names)) > 3 else 0)
        axes.set(title="student, F1 per class", ylim=(0, 1.05))

    def _draw_cost(self, axes):
        sizes = list(self.student.seconds)
        for k, (role, scores) in enumerate(self._models().items()):
            places = [x + 0.4 * k for x in range(len(sizes))]
            milliseconds = [1e3 * scores.seconds[size] for size in sizes]
            axes.bar_label(axes.bar(places, milliseconds, 0.4, label=f"{role}, {scores.bytes:,} bytes"), fmt="%.3g")
        axes.set_xticks(
            [x + 0.2 * (len(self._models()) - 1) for x in range(len(sizes))], [f"batch of {s}" for s in sizes]
        )
        axes.set(title="time of a call, ms", yscale="log")
        axes.margins(y=0.5)  # room for the legend
        axes.legend(loc="upper left")


def report(student, teacher, X, y, *, batch_sizes=(1, 256)) -> Report:
    """Set a student beside its teacher on rows that neither was trained on.

    Expected calibration error, over B = 15 bins of equal width, where bin b holds the n_b rows whose confidence (the
    largest probability) lies in ((b - 1) / B, b / B], of N rows in all::

        ECE = sum_b n_b / N * abs(accuracy_b - confidence_b)

    Times are medians of repeated calls after a warm-up, on torch's number of threads, for the first rows of X (repeated
    where X has fewer). They include what the model does on the way from X to its outputs, not the conversion of X.

    Args:
        student: a module that maps rows to logits ``(rows, C)``, run in eval mode under ``torch.inference_mode()``;
            each of its submodules gets its own mode back. Or a fitted classifier with ``predict_proba``; of a
            DistilledClassifier parameters and bytes are those of its network.
        teacher: a module, a fitted classifier with ``predict_proba`` or, failing that, ``decision_function``; or None.
        X: ``(N, ...)``, tensor, array or DataFrame. Modules get a tensor, floating-point ones in their own dtype;
            classifiers an array, a row of more than one dimension flattened. Nothing is moved between devices.
        y: ``(N,)``, integer labels: the column of a module. Where student or teacher is a classifier: its classes.
            Column j of a module then is class ``sorted(classes_)[j]``; if these are strings, y may also hold the j.
        batch_sizes: the numbers of rows to time.

    Returns:
        Report: a table by ``str``, JSON by ``to_json``, a PNG by ``plot``.

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
    """
    X, y = _check_rows(X, y)
    sizes = [_check_size(size) for size in batch_sizes]
    subjects = {"student": _subject("student", student, X)}
    if teacher is not None:
        subjects["teacher"] = _subject("teacher", teacher, X)
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
            return _Subject(role, model, _for_classifier(X), getattr(model, method), kind)
    raise TypeError(f"{role} must be a torch.nn.Module or have predict_proba, got {describe(model)}")


def _for_module(X, module) -> Tensor:
    rows = X.detach() if isinstance(X, Tensor) else torch.tensor(np.asarray(X))
    dtype = float_dtype(module, rows.dtype)
    return rows.to(dtype) if rows.is_floating_point() else rows


def _for_classifier(X):
    if hasattr(X, "iloc"):
        return X
    if isinstance(X, Tensor):
        X = X.detach()
        X = (X.float() if X.dtype is torch.bfloat16 else X).numpy()  # numpy has no bfloat16
    return X.reshape(len(X), -1)


def _outputs(subject) -> Tensor:
    """Logits, probabilities or scores ``(N, C)`` in float64, in the model's own order of columns."""
    parts = []
    for start in range(0, len(subject.rows), _CHUNK):
        rows = _take(subject.rows, slice(start, start + _CHUNK))
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
        raise ValueError(f"teacher must have the student's classes, {_few(sorted(own))}; it has {_few(sorted(taught))}")
    return sorted(own or taught or range(width))


def _own_classes(model) -> list | None:
    if isinstance(model, nn.Module) or not hasattr(model, "classes_"):
        return None
    return np.asarray(model.classes_).tolist()


def _in_columns(scores, model, classes) -> Tensor:
    own = _own_classes(model)
    return scores if own is None else scores[:, [own.index(name) for name in classes]]


def _encode(y, classes) -> Tensor:
    named = isinstance(classes[0], str) and y.dtype.kind in "iu"  # y holds numbers of columns
    number = {name: k for k, name in enumerate(range(len(classes)) if named else classes)}
    labels = y.tolist()
    for row, label in enumerate(labels):
        if label not in number:
            raise ValueError(f"y must hold the student's classes, {_few(list(number))}; row {row} holds {label!r}")
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
        return X.isna().to_numpy().any(1)
    if isinstance(X, Tensor):
        return ~X.detach().reshape(len(X), -1).isfinite().all(-1).numpy()
    return ~np.isfinite(X.reshape(len(X), -1)).all(-1) if X.dtype.kind == "f" else np.zeros(1, bool)


def _check_size(size) -> int:
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"batch_sizes must be integers of at least 1, got {size!r}")
    return size


def _take(rows, index):
    return rows.iloc[index] if hasattr(rows, "iloc") else rows[index]


def _share(flags) -> float:
    return float(flags.double().mean())


def _ratio(part, whole) -> float:
    return part / whole if whole else 0.0


def _few(classes) -> str:
    return repr(classes) if len(classes) <= 10 else f"{str(classes[:10])[:-1]}, ...] ({len(classes)})"


def _number(value, form) -> str:
    return "-" if value is None else f"{value:{form}}"


def _times(ratio) -> str:
    """Three digits, or all before the point."""
    if ratio is None or not math.isfinite(ratio):
        return "- x"
    return f"{ratio:.3g} x" if ratio < 1000 else f"{ratio:,.0f} x"


def _aligned(rows) -> list[str]:
    widths = [max(len(row[k]) for row in rows if k < len(row)) for k in range(max(map(len, rows)))]
    return ["   ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip() for row in rows]


def _plain(value):
    """Named tuples as dictionaries, at any depth."""
    if hasattr(value, "_asdict"):
        return {name: _plain(item) for name, item in value._asdict().items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value
