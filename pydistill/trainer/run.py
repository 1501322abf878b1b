"""State of one call of fit: its progress, how it is saved, and how it is resumed."""

from dataclasses import asdict, dataclass, field
from os import PathLike
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pydistill.trainer import checkpoint
from pydistill.trainer.checks import Callback, Loss
from pydistill.trainer.history import EpochRecord, History, Scores
from pydistill.trainer.totals import Totals


class SavedParts(Protocol):
    """The attributes of a Trainer that Run uses: the parts that a checkpoint holds, their folder, and ``stop``."""

    student: nn.Module
    loss: Loss
    optimizer: Optimizer
    scheduler: LRScheduler | None
    callbacks: tuple[Callback, ...]
    checkpoint_dir: str | PathLike[str] | None
    stop: bool


@dataclass
class Run:
    """State of one call of fit. A checkpoint also holds the states of student, optimizer, scheduler and callbacks."""

    trainer: SavedParts
    setup: dict[str, int | None]  # options that must be the same when the run is resumed
    epochs: int  # number of epochs asked for
    epoch: int = 1  # the current epoch
    batch: int = 0  # number of batches done in this epoch
    one_thread: bool | None = None  # set at the first batch, kept on resume: the last bits depend on it
    steps: int = 0  # number of optimizer steps done in all epochs
    number: int = 0  # number of the latest checkpoint
    epoch_random: Tensor | None = None  # torch's random state at the start of the epoch; it gives the order of rows
    random: Tensor | None = None  # torch's random state at the checkpoint that was resumed from
    totals: Totals = field(default_factory=Totals)
    history: History = field(default_factory=History)

    def next_epoch(self) -> None:
        """Count an epoch as done."""
        self.epoch, self.batch, self.totals, self.epoch_random = self.epoch + 1, 0, Totals(), None

    def save(self) -> None:
        """Write a checkpoint, if the Trainer has a folder for them."""
        trainer = self.trainer
        if trainer.checkpoint_dir is None:
            return
        self.number += 1
        state = {
            "setup": self.setup,
            "run": {name: getattr(self, name) for name in checkpoint.RUN_FIELDS},
            "totals": asdict(self.totals),
            "history": self.history,
            "stopped": self.epochs if trainer.stop and self.batch == 0 else None,  # stop ends fit after a whole epoch
            "random": torch.get_rng_state(),
            "student": dict(trainer.student.state_dict()),
            "optimizer": trainer.optimizer.state_dict(),
            "scheduler": None if trainer.scheduler is None else trainer.scheduler.state_dict(),
            "callbacks": [x.state_dict() if hasattr(x, "state_dict") else None for x in trainer.callbacks],
            "loss": {name: getattr(trainer.loss, name, None) for name in ("alpha", "temperature")},
        }
        checkpoint.save(trainer.checkpoint_dir, self.number, state)


def new_or_resumed(trainer: SavedParts, setup: dict[str, int | None], epochs: int, *, resume: bool) -> Run:
    """Return a new run or, with ``resume``, load the newest checkpoint into the Trainer's parts and return its run."""
    folder = trainer.checkpoint_dir
    if folder is None:
        if resume:
            raise ValueError("resume=True needs checkpoint_dir, the folder with the checkpoints")
        return Run(trainer, setup, epochs)
    if not resume:
        if checkpoint.found(folder):
            raise ValueError(
                f"checkpoint_dir {folder} holds checkpoints of an earlier run: pass resume=True to continue from them, "
                "or another folder"
            )
        return Run(trainer, setup, epochs)
    state = checkpoint.load_run(folder, setup, trainer.student, trainer.scheduler, trainer.callbacks)
    if state is None:
        return Run(trainer, setup, epochs)
    for name, value in setup.items():
        if state["setup"][name] != value:
            raise ValueError(f"resume: the checkpoint was made with {name}={state['setup'][name]}, got {value}")
    _load_parts(trainer, state)
    trainer.stop = state["stopped"] is not None and epochs <= state["stopped"]
    torch.set_rng_state(state["random"])
    history = History(
        EpochRecord(epoch, Scores(*train), None if val is None else Scores(*val), seconds)
        for epoch, train, val, seconds in state["history"]
    )
    totals = Totals(**state["totals"])
    return Run(trainer, setup, epochs, **state["run"], random=state["random"], totals=totals, history=history)


def _load_parts(trainer: SavedParts, state: checkpoint.State) -> None:
    """Load student, optimizer, scheduler, callbacks and options of the loss from a checkpoint."""
    try:
        trainer.student.load_state_dict(state["student"])
    except RuntimeError as error:
        raise ValueError(f"resume: the checkpoint holds another student: {error}") from error
    with checkpoint.loading("optimizer"):
        trainer.optimizer.load_state_dict(state["optimizer"])
    if trainer.scheduler is not None:
        with checkpoint.loading("scheduler"):
            trainer.scheduler.load_state_dict(state["scheduler"])
    for callback, saved_state in zip(trainer.callbacks, state["callbacks"], strict=True):
        if saved_state is not None and hasattr(callback, "load_state_dict"):
            with checkpoint.loading(type(callback).__name__):
                callback.load_state_dict(saved_state)
    for name, value in state["loss"].items():
        if value is not None:
            setattr(trainer.loss, name, value)
