"""Ready-made callbacks of a Trainer. A callback is a function of (trainer, record), called after each epoch.

A callback may have more methods: ``start()`` is called at the beginning of ``fit`` and ``finish(trainer)`` at its end;
``state_dict()`` and ``load_state_dict(state)`` save its state in the checkpoints and restore it.
"""

import math
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from torch import Tensor

from pydistill._arguments import check_count
from pydistill._files import Form, form_problem

if TYPE_CHECKING:
    from pydistill.trainer import EpochRecord, Trainer

Monitor: TypeAlias = Literal["loss", "accuracy", "agreement"]


class EarlyStopping:
    """End ``fit`` when a score has not improved for ``patience`` epochs.

    Args:
        patience: number of epochs in a row without an improvement after which training ends, at least 1.
        monitor: a field of :class:`pydistill.trainer.Scores`: "loss" (less is better), "accuracy" or "agreement" (more
            is better). The score of the validation data is used if there are any, else that of the training data.
        min_delta: the score must improve by more than this.

    Raises:
        TypeError, ValueError: an argument has the wrong type or is out of range; or, after the first epoch, the data do
            not give the score: an accuracy needs labels, and an agreement needs targets.

    Example:
        >>> import torch, pydistill
        >>> from pydistill.callbacks import BestModel, EarlyStopping
        >>> student, x = torch.nn.Linear(4, 3), torch.randn(64, 4)
        >>> trainer = pydistill.Trainer(student, pydistill.DistillationLoss(alpha=0.0), seed=0, progress=False,
        ...                             callbacks=[EarlyStopping(patience=3), BestModel()])
        >>> history = trainer.fit((x, x[:, :3].argmax(-1)), epochs=5)
    """

    patience: int
    monitor: Monitor
    min_delta: float

    def __init__(self, patience: int = 5, monitor: Monitor = "loss", min_delta: float = 0.0) -> None:
        if isinstance(min_delta, bool) or not isinstance(min_delta, Real):
            raise TypeError(f"min_delta must be a number, got {min_delta!r}")
        if not min_delta >= 0:
            raise ValueError(f"min_delta must be at least 0, got {min_delta!r}")
        self.patience, self.monitor = check_count("patience", patience), check_monitor(monitor)
        self.min_delta = min_delta
        self.start()

    def start(self) -> None:
        """Forget the scores of an earlier run."""
        self._best, self._waited = -math.inf, 0

    def __call__(self, trainer: "Trainer", record: "EpochRecord") -> None:
        """Set ``trainer.stop`` if the score has not improved for ``patience`` epochs."""
        score = score_of(record, self.monitor, first=self._best == -math.inf)
        if score > self._best + self.min_delta:
            self._best, self._waited = score, 0
        else:
            self._waited += 1
            trainer.stop = trainer.stop or self._waited >= self.patience

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint: the best score, and the number of epochs since."""
        return {"best": self._best, "waited": self._waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state from :meth:`state_dict`."""
        _check_state(state, {"best": int | float, "waited": int})
        self._best, self._waited = state["best"], state["waited"]


class BestModel:
    """Keep a copy of the weights of the best epoch, and load it into the student at the end of ``fit``.

    Args:
        monitor: as in :class:`EarlyStopping`.

    Attributes:
        epoch: number of the best epoch; None before the first.
    """

    monitor: Monitor
    epoch: int | None

    def __init__(self, monitor: Monitor = "loss") -> None:
        self.monitor = check_monitor(monitor)
        self.start()

    def start(self) -> None:
        """Forget the weights of an earlier run."""
        self.epoch, self._best = None, -math.inf
        self._weights: dict[str, Tensor] | None = None

    def __call__(self, trainer: "Trainer", record: "EpochRecord") -> None:
        """Copy the student's weights if the score has improved."""
        score = score_of(record, self.monitor, first=self._weights is None)
        if self._weights is None or score > self._best:
            self._best, self.epoch = score, record.epoch
            self._weights = {name: x.detach().clone() for name, x in trainer.student.state_dict().items()}

    def finish(self, trainer: "Trainer") -> None:
        """Load the best weights into the student."""
        if self._weights is not None:
            trainer.student.load_state_dict(self._weights)

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint: the best score, its epoch and the weights."""
        return {"best": self._best, "epoch": self.epoch, "weights": self._weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state from :meth:`state_dict`."""
        _check_state(state, {"best": int | float, "epoch": int | None, "weights": dict | None})
        self._best, self.epoch, self._weights = state["best"], state["epoch"], state["weights"]


def _check_state(state: object, form: Form) -> None:
    problem = form_problem(state, form)
    if problem:
        raise ValueError(f"state must be what state_dict returned; it {problem}")


def check_monitor(monitor: Monitor) -> Monitor:
    """Check that monitor is a score by which students can be compared, and return it."""
    if monitor not in ("loss", "accuracy", "agreement"):
        raise ValueError(f'monitor must be "loss", "accuracy" or "agreement", got {monitor!r}')
    return monitor


def score_of(record: "EpochRecord", monitor: Monitor, *, first: bool) -> float:
    """Return the monitored score, as a number that is better if it is larger; nan becomes -inf.

    Raises:
        ValueError: ``first`` is True, so that there is no earlier score, and the accuracy or agreement is nan.
    """
    value: float = getattr(record.val or record.train, monitor)
    if first and math.isnan(value) and monitor != "loss":
        data = "training data" if record.val is None else "validation data"
        lack = "labelled row that counts" if monitor == "accuracy" else "row that counts with targets of a teacher"
        raise ValueError(
            f"monitor must be a score that the data have, got {monitor!r}, which is nan after epoch {record.epoch}: "
            f'the {data} have no {lack}; monitor="loss" needs none'
        )
    value = -value if monitor == "loss" else value
    return -math.inf if math.isnan(value) else value
