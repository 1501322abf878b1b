"""What a training run came to, epoch by epoch."""

import math
from typing import NamedTuple


class Scores(NamedTuple):
    """Means over one pass through some data; nan where nothing tells: a term not evaluated, no labels.

    Attributes:
        loss: the loss. Each batch weighs as many rows as it has rows that count for the soft term (for the
            hard one where only that is evaluated).
        soft_loss: the soft term, T^2 included.
        hard_loss: the hard term.
        accuracy: share of the labelled rows in which the student's argmax is the label.
        agreement: share of the rows in which student and teacher have the same argmax.
    """

    loss: float
    soft_loss: float
    hard_loss: float
    accuracy: float
    agreement: float


class EpochRecord(NamedTuple):
    """One epoch of :meth:`pydistill.Trainer.fit`.

    Attributes:
        epoch: its number; the first is 1.
        train: means over the training batches, each taken before its step: the student changes in the
            meantime.
        val: means over the validation data after the epoch's last step; None without validation data.
        seconds: how long the epoch took, validation included.
    """

    epoch: int
    train: Scores
    val: Scores | None
    seconds: float


class History(list):
    """The records of the epochs, in order: a list that plots itself."""

    def plot(self, path=None):
        """Loss, accuracy and agreement by epoch, as a matplotlib Figure; with ``path`` also as a file.

        Raises:
            ImportError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("a plot needs matplotlib: pip install 'pydistill-kd[demo]'") from error
        figure = Figure(figsize=(9, 3), layout="constrained")
        epochs = [record.epoch for record in self]
        for axes, name in zip(figure.subplots(1, 3), ("loss", "accuracy", "agreement"), strict=True):
            axes.plot(epochs, [getattr(record.train, name) for record in self], label="training")
            if self and self[0].val is not None:
                axes.plot(epochs, [getattr(record.val, name) for record in self], label="validation")
            axes.set(title=name, xlabel="epoch")
        axes.legend()
        if path is not None:
            figure.savefig(path)
        return figure


class Totals:
    """Sums of the batches' means times the rows that each is a mean of, in the order of Scores."""

    def __init__(self, batches=0, sums=(0.0,) * 5, rows=(0.0,) * 5):
        self.batches, self.sums, self.rows = batches, list(sums), list(rows)

    def add(self, loss, metrics, labelled, parts=1, rows=0):
        """One batch; or one of ``parts`` that share the denominators of their whole, with its own number of ``rows``.

        ``labelled``: its rows with a label, None for the hard term's denominator.
        """
        soft, hard, agreement, accuracy, (soft_items, hard_items) = metrics
        soft_items, hard_items = float(soft_items), float(hard_items)
        labelled = hard_items if labelled is None else labelled
        only_hard = math.isnan(soft) and hard_items > 0
        means = (float(loss), float(soft), float(hard), float(accuracy), float(agreement))
        counts = (
            hard_items if only_hard else soft_items,
            soft_items,
            hard_items,
            labelled,
            rows if parts > 1 else soft_items,
        )
        for i, (mean, count) in enumerate(zip(means, counts, strict=True)):
            if count > 0 and not (parts > 1 and i >= 3 and math.isnan(mean)):  # a mean of no rows may be nan
                self.sums[i] += mean * count
                self.rows[i] += count / parts if i < 3 else count
        self.batches += 1

    def scores(self) -> Scores | None:
        """Means over all; None for no batch."""
        if self.batches == 0:
            return None
        sums_and_rows = zip(self.sums, self.rows, strict=True)
        return Scores(*(total / rows if rows else math.nan for total, rows in sums_and_rows))
