"""The progress bar of a training run."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pydistill.trainer.history import EpochRecord

# The line fits into a terminal of 80 columns, for up to 999 epochs and 99 hours left.
_FORMAT = "{desc} |{bar}| {remaining} left{postfix}"


class ProgressBar:
    """A line with the epochs done, the time left and the latest scores. If ``bar`` is None, nothing is shown."""

    def __init__(self, bar: Any, epochs: int) -> None:
        self._bar, self._epochs = bar, epochs

    def start(self, epochs: int, batches: int) -> None:
        """Set how many epochs and batches were done before a resume; they do not count for the estimated time left."""
        if self._bar is not None:
            self._bar.initial = self._bar.n = batches
            self._bar.set_description_str(f"epoch {epochs}/{self._epochs}")

    def advance(self, batches: int) -> None:
        """Count batches as done."""
        if self._bar is not None:
            self._bar.update(batches)

    def show(self, record: EpochRecord, batches: int) -> None:
        """Show the scores of an epoch: the training loss; accuracy and agreement of the validation data, if any.

        ``batches`` is the number of batches in the epoch; for an iterable without a length it is known only now.
        """
        if self._bar is None:
            return
        shares = record.val or record.train
        numbers = {
            "loss": f"{record.train.loss:.3g}",
            "accuracy": f"{shares.accuracy:.3f}",
            "agreement": f"{shares.agreement:.3f}",
        }
        self._bar.total = self._bar.n + (self._epochs - record.epoch) * batches
        self._bar.set_description_str(f"epoch {record.epoch}/{self._epochs}", refresh=False)
        self._bar.set_postfix_str(", ".join(f"{name}={x}" for name, x in numbers.items() if x != "nan"))


@contextmanager
def progress_bar(wanted: bool, epochs: int, batches: int | None) -> Iterator[ProgressBar]:
    """Make a bar over all batches, if it is wanted and tqdm is installed; ``batches`` is None if unknown."""
    if not wanted or importlib.util.find_spec("tqdm") is None:
        yield ProgressBar(None, epochs)
        return
    from tqdm import tqdm

    with tqdm(total=batches, desc=f"epoch 0/{epochs}", bar_format=_FORMAT) as bar:
        yield ProgressBar(bar, epochs)
