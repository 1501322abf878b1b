"""Scores of a training run, epoch by epoch."""

import math
from dataclasses import dataclass
from typing import NamedTuple


class Scores(NamedTuple):
    """Means over one pass through some data: those of one batch of all its rows, however they were batched.

    Each term is the sum over the rows that count for it, divided by the sum of their weights; ``num_items`` of the
    loss changes the steps, not the scores. nan where there is nothing to average: a term that is not evaluated, no row
    that counts.

    Attributes:
        loss: the loss, alpha * soft_loss + (1 - alpha) * hard_loss. What a loss of another form adds to that, or the
            loss itself if it has no attribute ``alpha``, is averaged over the batches: each weighs as much as its
            denominator of the soft term (of the hard one where only that is evaluated).
        soft_loss: the soft term, T^2 included.
        hard_loss: the hard term.
        accuracy: share of the labelled rows in which the student's argmax is the label. Unweighted, as is agreement; a
            row of weight 0 does not count.
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


@dataclass
class Totals:
    """Numerators and denominators of the scores, summed over batches: the scores are those of one batch of all rows."""

    batches: int = 0
    soft: float = 0.0
    hard: float = 0.0
    soft_items: float = 0.0  # denominators of the two terms
    hard_items: float = 0.0
    weighted_soft: float = 0.0  # the terms times their weights in the loss
    weighted_hard: float = 0.0
    other: float = 0.0  # what the loss holds besides the two weighted terms
    other_items: float = 0.0
    agreeing: float = 0.0
    correct: float = 0.0
    soft_rows: float = 0.0  # rows that count for the soft term, whatever their weights
    labelled_rows: float = 0.0

    def add(self, loss, metrics, *, alpha, items, rows, sums_terms):
        """One batch.

        ``alpha`` is None where it is not known. ``items`` are the batch's own denominators, soft and hard, which under
        ``num_items`` are not those that it was divided by; ``rows`` how many rows count for the two terms.
        ``sums_terms``: the loss is the sum of its two weighted terms, to the bit.
        """
        loss, soft, hard, agreement, accuracy = map(float, (loss, *metrics[:4]))
        soft_divisor, hard_divisor = map(float, metrics.num_items)
        if alpha is not None:
            explained = (alpha * soft if alpha > 0 else 0.0) + ((1 - alpha) * hard if alpha < 1 else 0.0)
            if math.isnan(explained) and not math.isnan(loss):  # a loss of another form, which has no such term
                alpha = None
        if alpha is None or alpha > 0:
            self.soft += _times(soft, soft_divisor)
            self.soft_items += items[0]
        if alpha is None or alpha < 1:
            self.hard += _times(hard, hard_divisor)
            self.hard_items += items[1]
        if alpha is not None and alpha > 0:
            self.weighted_soft += _times(alpha * soft, soft_divisor)
        if alpha is not None and alpha < 1:
            self.weighted_hard += _times((1 - alpha) * hard, hard_divisor)
        if not sums_terms:
            other = loss if alpha is None else (0.0 if loss == explained else loss - explained)
            term = 1 if math.isnan(soft) and items[1] > 0 else 0
            self.other += _times(other, (soft_divisor, hard_divisor)[term])
            self.other_items += items[term]
        self.agreeing += _times(agreement, rows[0])
        self.correct += _times(accuracy, rows[1])
        self.soft_rows += rows[0]
        self.labelled_rows += rows[1]
        self.batches += 1

    def scores(self) -> Scores:
        """Means over all rows that count."""
        parts = (
            (self.weighted_soft, self.soft_items),
            (self.weighted_hard, self.hard_items),
            (self.other, self.other_items),
        )
        return Scores(
            loss=sum(_mean(*part) for part in parts if part[1]) if self.counted else math.nan,
            soft_loss=_mean(self.soft, self.soft_items),
            hard_loss=_mean(self.hard, self.hard_items),
            accuracy=_mean(self.correct, self.labelled_rows),
            agreement=_mean(self.agreeing, self.soft_rows),
        )

    @property
    def counted(self) -> bool:
        """Whether any row counted for a term that was evaluated."""
        return any((self.soft_items, self.hard_items, self.other_items))


def _times(mean, count):
    """A numerator; the mean of no rows may be nan."""
    return mean * count if count else 0.0


def _mean(total, count):
    return total / count if count else math.nan
