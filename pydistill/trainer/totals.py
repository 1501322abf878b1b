"""Sums over batches, of which the scores are made."""

import math
from dataclasses import dataclass

from pydistill.trainer.history import Scores


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
