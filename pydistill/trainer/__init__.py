"""The training loop around the loss."""

from pydistill.trainer.history import EpochRecord, History, Scores
from pydistill.trainer.loop import Trainer

__all__ = ["EpochRecord", "History", "Scores", "Trainer"]
