"""Scores of a training run, epoch by epoch, and their plot."""

import math
from os import PathLike
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class Scores(NamedTuple):
    """Means over one pass through some data, equal to those of a single batch of all rows.

    Each term is the sum over the rows that count for it, divided by the sum of their weights. The loss's option
    ``num_items`` changes the training steps, but not the scores. A score is nan if there is nothing to average: if the
    term is not evaluated, or no row counts.

    Attributes:
        loss: the loss in nats, alpha * soft_loss + (1 - alpha) * hard_loss. Any further part of a loss is averaged over
            the batches, and so is the whole value of a loss that has no attribute ``alpha``. In this average the weight
            of a batch is its denominator of the soft term, or of the hard term if only the hard term is evaluated.
        soft_loss: the soft term in nats, T^2 included.
        hard_loss: the hard term in nats.
        accuracy: share of the labelled rows in which the student's argmax is the label. Accuracy and agreement are
            unweighted; rows of weight 0 do not count.
        agreement: share of the rows that count for the soft term in which student and teacher have the same argmax.
    """

    loss: float
    soft_loss: float
    hard_loss: float
    accuracy: float
    agreement: float


class EpochRecord(NamedTuple):
    """One epoch of :meth:`pydistill.Trainer.fit`.

    Attributes:
        epoch: number of the epoch; the first is 1.
        train: means over the training batches, each computed before its step; the student changes from batch to batch.
        val: means over the validation data after the epoch's last step; None without validation data.
        seconds: duration of the epoch, validation included.
    """

    epoch: int
    train: Scores
    val: Scores | None
    seconds: float


class History(list[EpochRecord]):
    """The records of the epochs, in order: a list with a method ``plot()``."""

    def plot(self, path: str | PathLike[str] | None = None) -> "Figure":
        """Plot the scores by epoch: loss, soft and hard term in nats; accuracy and agreement as shares of the rows.

        A score that is nan in every epoch, such as the soft term if alpha = 0, has a note instead of curves.

        Args:
            path: a file to save the figure to, in a format that matplotlib derives from its name; or None.

        Returns:
            matplotlib.figure.Figure: the figure; it is not connected to pyplot, and need not be closed.

        Raises:
            ImportError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
            from matplotlib.ticker import MaxNLocator
        except ImportError as error:
            raise ImportError("a plot needs matplotlib: pip install 'pydistill-kd[demo]'") from error
        figure = Figure(figsize=(9, 5))
        figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.1)
        *panels, legend = figure.subplots(2, 3).flat
        for axes, (name, title) in zip(panels, _TITLES.items(), strict=True):
            axes.set_title(title)
            axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
            self._draw(axes, name)
        legend.axis("off")
        lines = {line.get_label(): line for axes in panels for line in axes.lines}
        legend.legend(lines.values(), lines.keys(), loc="center", fontsize="large", frameon=False)
        if path is not None:
            figure.savefig(path, dpi=120)
        return figure

    def _draw(self, axes: "Axes", name: str) -> None:
        """Draw one score as a curve for each kind of data that has it."""
        curves = {
            "training": [getattr(record.train, name) for record in self],
            "validation": [getattr(record.val, name, math.nan) for record in self],
        }
        numbers = [x for values in curves.values() for x in values if not math.isnan(x)]
        if not numbers:
            axes.text(0.5, 0.5, "not evaluated", ha="center", color="gray", transform=axes.transAxes)
            axes.set(xticks=[], yticks=[])
            return
        epochs = [record.epoch for record in self]
        marker = "o" if len(self) <= _MOST_MARKED else None  # without a marker, a single epoch would be invisible
        for (label, values), style in zip(curves.items(), ("C0-", "C1--"), strict=True):
            if not all(map(math.isnan, values)):
                axes.plot(epochs, values, style, marker=marker, markersize=3, label=label)
        axes.set(xlabel="epoch", xlim=(epochs[0] - 0.5, epochs[-1] + 0.5))
        if name in _SHARES:
            bottom = max(0.0, math.floor(10 * min(numbers) - 0.2) / 10)  # a tenth, with room for the lowest point
            axes.set(ylabel="share of rows", ylim=(bottom, 1 + (1 - bottom) / 50))
        else:
            axes.set_ylabel("nats")


_TITLES = {
    "loss": "loss",
    "soft_loss": "soft term, T² included",
    "hard_loss": "hard term",
    "accuracy": "accuracy",
    "agreement": "agreement with the teacher",
}
_SHARES = ("accuracy", "agreement")
_MOST_MARKED = 30  # epochs; the markers of more would cover the curves
