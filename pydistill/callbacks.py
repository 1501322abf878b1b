"""Ready-made callbacks of a Trainer. A callback is a function of (trainer, record), called after each epoch.

One that has ``state_dict`` and ``load_state_dict`` is part of the checkpoints; one that has ``finish(trainer)`` is
called at the end of ``fit``, one with ``start()`` at its beginning.
"""

import math
from numbers import Real

from pydistill._arguments import check_count
from pydistill._files import form_problem


class EarlyStopping:
    """Ends ``fit`` when a score has not improved for ``patience`` epochs.

    Args:
        patience: epochs without improvement that are endured, at least 1.
        monitor: a field of :class:`pydistill.trainer.Scores`, of the validation data where there is some: "loss" (less
            is better), "accuracy" or "agreement" (more is better).
        min_delta: what counts as an improvement, at least.

    Raises:
        TypeError, ValueError: an argument out of range; after the first epoch, a share that the data do not give: an
            accuracy without labels, an agreement without targets.

    Example:
        >>> import torch, pydistill
        >>> from pydistill.callbacks import BestModel, EarlyStopping
        >>> student, x = torch.nn.Linear(4, 3), torch.randn(64, 4)
        >>> trainer = pydistill.Trainer(student, pydistill.DistillationLoss(alpha=0.0), seed=0, progress=False,
        ...                             callbacks=[EarlyStopping(patience=3), BestModel()])
        >>> history = trainer.fit((x, x[:, :3].argmax(-1)), epochs=5)
    """

    def __init__(self, patience=5, monitor="loss", min_delta=0.0):
        if isinstance(min_delta, bool) or not isinstance(min_delta, Real):
            raise TypeError(f"min_delta must be a number, got {min_delta!r}")
        if not min_delta >= 0:
            raise ValueError(f"min_delta must be at least 0, got {min_delta!r}")
        self.patience, self.monitor = check_count("patience", patience), check_monitor(monitor)
        self.min_delta = min_delta
        self.start()

    def start(self):
        """A new run begins: nothing is known of it."""
        self._best, self._waited = -math.inf, 0

    def __call__(self, trainer, record):
        """After an epoch."""
        score = score_of(record, self.monitor, first=self._best == -math.inf)
        if score > self._best + self.min_delta:
            self._best, self._waited = score, 0
        else:
            self._waited += 1
            trainer.stop = trainer.stop or self._waited >= self.patience

    def state_dict(self):
        """What a resumed run must know."""
        return {"best": self._best, "waited": self._waited}

    def load_state_dict(self, state):
        """Go on from there."""
        _check_state(state, {"best": int | float, "waited": int})
        self._best, self._waited = state["best"], state["waited"]


class BestModel:
    """Keeps the weights of the best epoch, and puts them back into the student at the end of ``fit``.

    Args:
        monitor: as in :class:`EarlyStopping`.

    Attributes:
        epoch: number of the best epoch; None before the first.
    """

    def __init__(self, monitor="loss"):
        self.monitor = check_monitor(monitor)
        self.start()

    def start(self):
        """A new run begins: nothing is known of it."""
        self.epoch, self._best, self._weights = None, -math.inf, None

    def __call__(self, trainer, record):
        """After an epoch."""
        score = score_of(record, self.monitor, first=self._weights is None)
        if self._weights is None or score > self._best:
            self._best, self.epoch = score, record.epoch
            self._weights = {name: x.detach().clone() for name, x in trainer.student.state_dict().items()}

    def finish(self, trainer):
        """The student gets its best weights."""
        if self._weights is not None:
            trainer.student.load_state_dict(self._weights)

    def state_dict(self):
        """What a resumed run must know."""
        return {"best": self._best, "epoch": self.epoch, "weights": self._weights}

    def load_state_dict(self, state):
        """Go on from there."""
        _check_state(state, {"best": int | float, "epoch": int | None, "weights": dict | None})
        self._best, self.epoch, self._weights = state["best"], state["epoch"], state["weights"]


def _check_state(state, form):
    problem = form_problem(state, form)
    if problem:
        raise ValueError(f"state must be what state_dict gave; it {problem}")


def check_monitor(monitor):
    """One of the scores that say how good a student is."""
    if monitor not in ("loss", "accuracy", "agreement"):
        raise ValueError(f'monitor must be "loss", "accuracy" or "agreement", got {monitor!r}')
    return monitor


def score_of(record, monitor, *, first) -> float:
    """More is better; NaN is worst. A share that is NaN at ``first``, before any other, is no score to go by."""
    value = getattr(record.val or record.train, monitor)
    if first and math.isnan(value) and monitor != "loss":
        data = "training data" if record.val is None else "validation data"
        lack = "labelled row that counts" if monitor == "accuracy" else "row that counts with targets of a teacher"
        raise ValueError(
            f"monitor must be a score that the data have, got {monitor!r}, which is nan after epoch {record.epoch}: "
            f'the {data} have no {lack}; monitor="loss" needs none'
        )
    value = -value if monitor == "loss" else value
    return -math.inf if math.isnan(value) else value
