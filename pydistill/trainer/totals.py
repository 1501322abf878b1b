"""Sums over batches, from which the scores of an epoch are computed."""

import math
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

from pydistill.functional import LossMetrics, loss_items
from pydistill.losses import DistillationLoss
from pydistill.trainer.checks import Loss
from pydistill.trainer.columns import Columns
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
    other: float = 0.0  # the rest of the loss, beyond the two weighted terms
    other_items: float = 0.0
    agreeing: float = 0.0
    correct: float = 0.0
    soft_rows: float = 0.0  # rows that count for the soft term, whatever their weights
    labelled_rows: float = 0.0

    def add_batch(
        self,
        loss_function: Loss,
        loss: Tensor,
        metrics: LossMetrics,
        columns: Columns,
        items: tuple[float, float] | None = None,
        alpha: float | None = None,
    ) -> None:
        """Add the results of one batch.

        Args:
            loss_function: the loss; its options determine which rows count.
            loss: the value of the loss for the batch.
            metrics: the metrics of the batch.
            columns: the batch.
            items: the batch's own denominators (soft, hard), if they are already known.
            alpha: the alpha that was used, if it is not the loss's own.
        """
        divisors = float(metrics.num_items[0]), float(metrics.num_items[1])
        sums_terms = False
        if isinstance(loss_function, DistillationLoss):
            if items is None:
                items = divisors if loss_function.num_items is None else batch_items(loss_function, columns)
            plain = columns.weight is None and loss_function.class_weight is None  # saves time in a small step
            rows = items if plain else counted_rows(loss_function, columns)
            sums_terms = type(loss_function).forward is DistillationLoss.forward
        else:
            items = rows = divisors
            if isinstance(columns.labels, Tensor) and not columns.labels.is_floating_point():
                soft, labelled = counted_rows(loss_function, columns)
                rows = (rows[0] if columns.weight is None else soft), labelled
        self._add(
            loss=float(loss),
            metrics=metrics,
            alpha=_known_alpha(getattr(loss_function, "alpha", None) if alpha is None else alpha),
            items=items,
            rows=rows,
            sums_terms=sums_terms,
        )

    def _add(
        self,
        *,
        loss: float,
        metrics: LossMetrics,
        alpha: float | None,
        items: tuple[float, float],
        rows: tuple[float, float],
        sums_terms: bool,
    ) -> None:
        """Add one batch.

        ``alpha`` is None where it is not known. ``items`` are the batch's own denominators, soft and hard; under
        ``num_items`` the loss was divided by others. ``rows`` are the numbers of rows that count for the two terms.
        ``sums_terms``: the loss is exactly the sum of its two weighted terms.
        """
        soft, hard = float(metrics.soft_loss), float(metrics.hard_loss)
        soft_divisor, hard_divisor = map(float, metrics.num_items)
        explained = 0.0
        if alpha is not None:
            explained = (alpha * soft if alpha > 0 else 0.0) + ((1 - alpha) * hard if alpha < 1 else 0.0)
            if math.isnan(explained) and not math.isnan(loss):  # a loss of another form, which does not use that term
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
        self.agreeing += _times(float(metrics.agreement), rows[0])
        self.correct += _times(float(metrics.accuracy), rows[1])
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


def batch_items(loss_function: Loss, columns: Columns) -> tuple[float, float]:
    """Return the denominators (soft, hard) of a batch, by :func:`pydistill.loss_items`."""
    return _items(loss_function, columns, columns.weight, getattr(loss_function, "class_weight", None))


def counted_rows(loss_function: Loss, columns: Columns) -> tuple[float, float]:
    """Count the rows that count for the soft and the hard term: the denominators with all weights 0 or 1."""
    weight = None if columns.weight is None else columns.weight != 0
    return _items(loss_function, columns, weight, None)


def _items(
    loss_function: Loss, columns: Columns, weight: Tensor | None, class_weight: Tensor | None
) -> tuple[float, float]:
    if columns.labels is None and weight is None and columns.targets is not None:
        weight = torch.ones(columns.targets.shape[:-1])  # loss_items counts rows by their labels or weights
    return loss_items(
        columns.labels,
        sample_weight=weight,
        class_weight=class_weight,
        ignore_index=getattr(loss_function, "ignore_index", -100),
        unlabeled=getattr(loss_function, "unlabeled", "skip"),
    )


def _known_alpha(alpha: object) -> float | None:
    """Return alpha as a number, or None if it is not a number in [0, 1]: another loss may use the name otherwise."""
    if not isinstance(alpha, Real) and not (isinstance(alpha, Tensor) and alpha.dim() == 0):
        return None
    return float(alpha) if 0 <= float(alpha) <= 1 else None


def _times(mean: float, count: float) -> float:
    """Return mean * count; 0 if no row counts, because the mean may then be nan."""
    return mean * count if count else 0.0


def _mean(total: float, count: float) -> float:
    return total / count if count else math.nan
