"""What the Trainer refuses, and in which words."""

import math
from contextlib import contextmanager
from copy import deepcopy

import torch

from pydistill.data import describe, row_count

_BATCH_NORMS = (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d, torch.nn.BatchNorm3d)


def check_count(name, value):
    """A whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def check_optimizer(optimizer, student):
    """An optimizer that can train this student."""
    made = "made of the student's parameters, such as torch.optim.SGD(student.parameters(), lr=0.1)"
    if not isinstance(optimizer, torch.optim.Optimizer):
        got = f"the class {optimizer.__name__}" if isinstance(optimizer, type) else describe(optimizer)
        raise TypeError(f"optimizer must be a torch.optim.Optimizer {made}; got {got}")
    parameters = set(student.parameters())
    if not any(p in parameters for group in optimizer.param_groups for p in group["params"]):
        raise ValueError(f"optimizer must be {made}; this {type(optimizer).__name__} holds none of them")


def has_lone_last_row(data, batch_size) -> bool:
    """Whether the last batch is one row, as far as that is known."""
    count = row_count(data)
    return bool(count) and (count - 1) % batch_size == 0


def check_lone_row(student, inputs, count, batch_size):
    """Batch norm cannot learn from one value per channel; torch says so only in the last step of an epoch."""
    if not any(isinstance(m, _BATCH_NORMS) for m in student.modules()):
        return
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            deepcopy(student).train()(inputs)
    except ValueError as error:
        raise ValueError(
            f"batch_size must not leave a last batch of one row to a student with batch norm; {count} rows in "
            f"batches of {batch_size} do: {error}"
        ) from error


@torch.no_grad()
def check_weights(student, loss, epoch, step):
    """A checkpoint of weights that are not finite would push out those that are."""
    doubtful = (p for p in student.parameters() if not math.isfinite(p.sum()))  # one pass; a sum may overflow
    if not all(p.isfinite().all() for p in doubtful):
        raise not_finite("the student's weights", loss, epoch, step)


def not_finite(what, loss, epoch, step) -> ValueError:
    """The error of a training that has gone wrong."""
    return ValueError(
        f"{what} must stay finite, but became nan or infinite in epoch {epoch}, step {step}, under {loss}. Likely "
        "causes: a learning rate that is too large (lower it, or set clip_norm); NaN in inputs or targets; a teacher "
        "with zero probabilities under reverse_kl (use forward_kl, jsd or skew_reverse_kl)"
    )


def no_batch(name, epoch) -> str:
    """The message for data that turned out empty."""
    hint = "; an iterator runs out after one epoch: pass a DataLoader or a list" if epoch > 1 else ""
    return f"{name} must give at least one batch, got none in epoch {epoch}{hint}"


@contextmanager
def about(name):
    """What goes wrong inside is said of these data: the loss and the student do not know whose batch it is."""
    try:
        yield
    except (TypeError, ValueError, IndexError, RuntimeError) as error:
        error.args = (f"{name}: {error}", *error.args[1:])
        raise
