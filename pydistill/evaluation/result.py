"""What a report found, and its forms: a table, JSON, a plot."""

import json
import math
from dataclasses import dataclass, fields
from io import BytesIO
from typing import NamedTuple

from pydistill._files import write_whole


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
    """A student beside its teacher; shown as a table. Made by :func:`pydistill.report`.

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

    def __repr__(self):
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
