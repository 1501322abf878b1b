"""The result of a report, as a table, as JSON and as a plot."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields
from io import BytesIO
from os import PathLike
from typing import TYPE_CHECKING, Any, NamedTuple

from pydistill._files import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class Bin(NamedTuple):
    """One bin of the reliability diagram.

    Attributes:
        rows: number of rows in the bin.
        confidence: mean confidence of these rows; None if there are none.
        accuracy: their accuracy; None if there are none.
    """

    rows: int
    confidence: float | None
    accuracy: float | None


class ClassScores(NamedTuple):
    """The student's scores on one class. A quotient of 0 / 0 is 0.

    Attributes:
        name: the class, as in the labels.
        precision: TP / (TP + FP).
        recall: TP / (TP + FN).
        f1: 2 TP / (2 TP + FP + FN).
        support: number of rows of this class.
    """

    name: object
    precision: float
    recall: float
    f1: float
    support: int


class ModelScores(NamedTuple):
    """The scores of one model, student or teacher.

    Attributes:
        name: the name of the model's class.
        accuracy: share of the rows whose argmax is the label; ties go to the first class.
        ece: expected calibration error; None for a model without probabilities.
        parameters: number of trained parameters; None for an estimator.
        bytes: size of a module's parameters and buffers, or of an estimator's pickle.
        seconds: median time of one call, by number of rows.
        reliability: the bins from which ``ece`` is computed; None for a model without probabilities.
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
    """The comparison of a student with its teacher, made by :func:`pydistill.report`; ``str`` formats it as a table.

    Attributes:
        rows: number of rows that were scored.
        threads: torch's number of threads while the times were measured.
        classes: the classes, in the order of the student's columns.
        student: the student's scores.
        teacher: the teacher's scores. Without a teacher, this and the next three attributes are None.
        agreement: share of the rows in which student and teacher have the same argmax.
        compression: the teacher's bytes / the student's bytes; None for a student of 0 bytes.
        speedup: the teacher's time / the student's time, by number of rows.
        per_class: the student's scores on each class.
    """

    rows: int
    threads: int
    classes: list[Any]
    student: ModelScores
    teacher: ModelScores | None
    agreement: float | None
    compression: float | None
    speedup: dict[int, float] | None
    per_class: list[ClassScores]

    def __repr__(self) -> str:
        models = list(self._models().values())
        table = [
            ["", *self._models()],
            ["model", *(m.name for m in models)],
            ["accuracy", *(f"{m.accuracy:.4f}" for m in models)],
            ["agreement", _number(self.agreement, ".4f")],
            ["calibration error (ECE)", *(_number(m.ece, ".4f") for m in models)],
            ["parameters", *(_number(m.parameters, ",") for m in models)],
            ["bytes", *(f"{m.bytes:,}" for m in models)],
        ]
        if self.teacher is not None:
            table[-1].append(f"{_times(self.compression)} smaller")
        for size in self.student.seconds:
            row = [f"ms, batch of {size}", *(f"{1e3 * m.seconds[size]:.3f}" for m in models)]
            if self.speedup is not None:
                row.append(f"{_times(self.speedup[size])} faster")
            table.append(row)
        classes = [
            ["class", "precision", "recall", "F1", "rows"],
            *([str(c.name), *(f"{x:.3f}" for x in c[1:4]), str(c.support)] for c in self.per_class),
        ]
        title = f"{self.rows} rows, {len(self.classes)} classes; torch threads: {self.threads}"
        return "\n".join([title, "", *align_columns(table), "", *align_columns(classes)])

    def to_json(self, path: str | PathLike[str] | None = None) -> str:
        """Return all figures as JSON; with ``path`` also write them to a file, atomically.

        Raises:
            OSError: the file cannot be written; an existing file is left unchanged.
        """
        text = json.dumps({field.name: _plain(getattr(self, field.name)) for field in fields(self)}, indent=2)
        if path is not None:
            write_whole(path, text.encode())
        return text

    def plot(self, path: str | PathLike[str]) -> Figure:
        """Draw accuracy, calibration, F1 per class and latency; write them to one PNG file, atomically.

        Returns:
            matplotlib.figure.Figure: the figure. pyplot's global state is not touched.

        Raises:
            ImportError: matplotlib is not installed.
            OSError: the file cannot be written; an existing file is left unchanged.
        """
        figure = new_figure(10, 7.5)
        shares, calibration, f1, latency = figure.subplots(2, 2).flat
        self._draw_shares(shares)
        self._draw_calibration(calibration)
        self._draw_f1(f1)
        self._draw_latency(latency)
        write_png(figure, path)
        return figure

    def _models(self) -> dict[str, ModelScores]:
        both = {"student": self.student, "teacher": self.teacher}
        return {role: scores for role, scores in both.items() if scores is not None}

    def _draw_shares(self, axes: Axes) -> None:
        shares = {f"accuracy,\n{role}": scores.accuracy for role, scores in self._models().items()}
        if self.agreement is not None:
            shares["agreement of\nstudent and teacher"] = self.agreement
        bars = axes.bar(list(shares), list(shares.values()), 0.6, color=["C0", "C1", "C7"][: len(shares)])
        axes.bar_label(bars, fmt="%.3f")
        axes.set(
            title=f"Accuracy and agreement on {self.rows:,} rows"
            if self.teacher
            else f"Accuracy on {self.rows:,} rows",
            ylabel="share of the rows",
            xlim=(-0.6, len(shares) - 0.4),
            ylim=(0, 1.1),
        )

    def _draw_calibration(self, axes: Axes) -> None:
        axes.plot([0, 1], [0, 1], color="grey", linestyle="--", linewidth=1, label="perfect calibration")
        for (role, scores), color, marker in zip(self._models().items(), ("C0", "C1"), "os", strict=False):
            if scores.reliability is not None:
                bins = [b for b in scores.reliability if b.rows]
                confidence, accuracy = zip(*((b.confidence, b.accuracy) for b in bins), strict=True)
                area = [12 + 200 * b.rows / self.rows for b in bins]
                axes.plot(confidence, accuracy, color=color, linewidth=1)
                axes.scatter(
                    confidence, accuracy, area, color=color, marker=marker, label=f"{role}, ECE {scores.ece:.3f}"
                )
        axes.set(
            title="Calibration: a marker per bin, larger for more rows",
            xlabel="mean confidence in the bin (largest probability)",
            ylabel="accuracy in the bin",
            xlim=(-0.03, 1.03),
            ylim=(-0.05, 1.05),
        )
        axes.legend(loc="best", fontsize="small")

    def _draw_f1(self, axes: Axes) -> None:
        axes.bar(range(len(self.classes)), [c.f1 for c in self.per_class])
        if len(self.classes) <= 20:
            names = [str(name) for name in self.classes]
            axes.set_xticks(range(len(names)), names)
            if max(map(len, names)) > 3:
                axes.tick_params(axis="x", labelrotation=45)
                for label in axes.get_xticklabels():
                    label.set(horizontalalignment="right", rotation_mode="anchor")
        numbered = "class" if len(self.classes) <= 20 else "class, by its position in classes"
        axes.set(title="The student's F1 score per class", xlabel=numbered, ylabel="F1", ylim=(0, 1.05))

    def _draw_latency(self, axes: Axes) -> None:
        models, sizes = self._models(), list(self.student.seconds)
        for (role, scores), color, marker in zip(models.items(), ("C0", "C1"), "os", strict=False):
            milliseconds = [1e3 * scores.seconds[size] for size in sizes]
            axes.plot(milliseconds, marker, color=color, label=f"{role}, {scores.bytes:,} bytes")
            for place, size in enumerate(sizes):
                slowest = scores.seconds[size] == max(other.seconds[size] for other in models.values())
                axes.annotate(
                    f"{milliseconds[place]:.3g}",
                    (place, milliseconds[place]),
                    (0, 8 if slowest else -8),  # on the far side of the other model's marker
                    textcoords="offset points",
                    horizontalalignment="center",
                    verticalalignment="bottom" if slowest else "top",
                )
        everything = [1e3 * seconds for scores in models.values() for seconds in scores.seconds.values()]
        axes.set_xticks(range(len(sizes)), [f"{size:,}" for size in sizes])
        axes.set(
            title="Latency: median time of a call",
            xlabel="rows per call",
            ylabel="ms per call (logarithmic)",
            yscale="log",
            xlim=(-0.5, len(sizes) - 0.5),
        )
        if everything:
            axes.set_ylim(min(everything) / 5, max(everything) * 20)  # with room for labels and legend
        axes.yaxis.set_major_formatter("{x:g}")
        axes.legend(loc="upper left", fontsize="small")


def new_figure(width: float, height: float) -> Figure:
    """Make an empty figure of this size in inches, without a window and without pyplot's global state."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("a plot needs matplotlib: pip install 'pydistill-kd[demo]'") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def write_png(figure: Figure, path: str | PathLike[str]) -> None:
    """Write a figure as a PNG file, atomically."""
    file = BytesIO()
    figure.savefig(file, format="png", dpi=120)
    write_whole(path, file.getvalue())


def align_columns(rows: list[list[str]]) -> list[str]:
    """Format the rows of a table as lines with aligned columns; rows may have different numbers of cells."""
    widths = [max(len(row[k]) for row in rows if k < len(row)) for k in range(max(map(len, rows)))]
    return ["   ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip() for row in rows]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def _times(ratio: float | None) -> str:
    """Format a ratio with three significant digits, or with all digits of its integer part."""
    if ratio is None or not math.isfinite(ratio):
        return "- x"
    return f"{ratio:.3g} x" if ratio < 1000 else f"{ratio:,.0f} x"


def _plain(value: object) -> object:
    """Convert a value to types that JSON has: named tuples become dictionaries, at any depth."""
    if hasattr(value, "_asdict"):
        return {name: _plain(item) for name, item in value._asdict().items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value
