"""State of a training run."""

from dataclasses import dataclass, field

from torch import Tensor

from pydistill.trainer.history import History
from pydistill.trainer.totals import Totals


@dataclass
class Run:
    """Where a call of fit stands: all that a checkpoint holds besides student, optimizer, scheduler and callbacks."""

    epochs: int  # asked for
    epoch: int = 1
    batch: int = 0  # done in this epoch
    one_thread: bool | None = None  # told by the first batch of all, for the bits depend on it
    steps: int = 0
    number: int = 0  # of the latest checkpoint
    totals: Totals = field(default_factory=Totals)
    history: History = field(default_factory=History)
    epoch_random: Tensor | None = None  # torch's random state when the epoch began: its order follows from it
    random: Tensor | None = None  # where to go on from, after a resume
