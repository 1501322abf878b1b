"""Scores of a training run, epoch by epoch."""

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
