"""Validation of the Trainer's arguments, with its error messages."""

import inspect
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from numbers import Integral, Real
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CyclicLR, LRScheduler, OneCycleLR

from pydistill._arguments import check_count, warn_caller
from pydistill._wording import describe
from pydistill.functional import LossMetrics
from pydistill.losses import DistillationLoss, LinearDistillationLoss
from pydistill.store import TeacherStore
from pydistill.targets import SoftTargets
from pydistill.trainer.data import PreparedData, row_count
from pydistill.trainer.history import EpochRecord

Loss: TypeAlias = DistillationLoss | Callable[..., tuple[Tensor, LossMetrics]]
Teacher: TypeAlias = nn.Module | SoftTargets | TeacherStore | Tensor
Callback: TypeAlias = Callable[[Any, EpochRecord], object]  # the first argument is the Trainer
Schedules: TypeAlias = Mapping[str, Callable[[int], Any]]

TEACHER_ROWS = (SoftTargets, TeacherStore, Tensor)  # teachers given as outputs, one row per training row
_BATCH_NORMS = (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d, torch.nn.BatchNorm3d)
_LOSSES = (DistillationLoss, LinearDistillationLoss)
_ORDER = "the order is Trainer(student, loss, teacher=teacher)"


def check_seed(seed: object) -> int | None:
    """Check that a seed is None or in the range of torch's generator, in which torch would wrap negative numbers."""
    if seed is None:
        return None
    if isinstance(seed, bool) or not isinstance(seed, Integral):
        raise TypeError(f"seed must be an integer or None, got {seed!r}")
    if not 0 <= int(seed) < 2**64:
        raise ValueError(f"seed must be in [0, 2**64), got {seed}")
    return int(seed)


def check_clip_norm(clip_norm: object) -> None:
    """Check that clip_norm is None or a positive number."""
    if clip_norm is None:
        return
    if isinstance(clip_norm, bool) or not isinstance(clip_norm, Real):
        raise TypeError(f"clip_norm must be a number or None, got {clip_norm!r}")
    if not float(clip_norm) > 0:
        raise ValueError(f"clip_norm must be positive, got {clip_norm!r}")


def check_checkpoints(folder: object, every: object) -> int | None:
    """Check checkpoint_dir and checkpoint_every. Returns the latter as int."""
    if folder is not None and not isinstance(folder, str | os.PathLike):
        raise TypeError(f"checkpoint_dir must be a path or None, got {folder!r}")
    if every is None:
        return None
    every = check_count("checkpoint_every", every)
    if folder is None:
        raise ValueError("checkpoint_every needs checkpoint_dir, the folder to write to")
    return every


def check_student(student: object) -> None:
    """Check that the student is a module with parameters, each of which has a shape."""
    if isinstance(student, _LOSSES):
        raise TypeError(f"student must be the model, got the loss {type(student).__name__}: {_ORDER}")
    if not isinstance(student, nn.Module):
        raise TypeError(f"student must be a torch.nn.Module, got {describe(student)}")
    parameters = list(student.parameters())
    if not parameters:
        raise ValueError(f"student must have parameters to train, got {type(student).__name__} without any")
    if any(map(is_lazy, parameters)):
        raise ValueError(
            f"student must have parameters with a shape, but the lazy ones of this {type(student).__name__} have none "
            "yet: call student(inputs) on a batch first"
        )


def check_teacher(teacher: object) -> None:
    """Check that the teacher is a module, outputs with a row per training row, or None."""
    if isinstance(teacher, _LOSSES):
        raise TypeError(f"teacher must be a model or its outputs, got the loss {type(teacher).__name__}: {_ORDER}")
    if teacher is not None and not isinstance(teacher, (nn.Module, *TEACHER_ROWS)):
        raise TypeError(
            f"teacher must be a torch.nn.Module, SoftTargets or a TeacherStore, got {describe(teacher)}; the "
            "outputs of other teachers go into the data: (inputs, targets, labels)"
        )


def check_teacher_rows(teacher: object, train: PreparedData) -> None:
    """Check that a teacher given as outputs has one row per training row."""
    if not isinstance(teacher, TEACHER_ROWS):
        return
    count = row_count(train)
    if count is None:
        raise ValueError(
            f"teacher: {type(teacher).__name__} has one row per training row, but the batches of an iterable have no "
            "row numbers; pass train as tensors or a Dataset"
        )
    if count != len(teacher):
        raise ValueError(f"teacher must have a row per row of train, got {len(teacher)} for {count}")


def check_loss(loss: Any) -> None:
    """Check that the loss can be called as a DistillationLoss is and returns one number."""
    call = "loss(student_logits, targets, labels, return_metrics=True)"
    rule = f"loss must be a DistillationLoss, or a callable that is called as {call}"
    if isinstance(loss, type):
        raise TypeError(f"{rule}; got the class {loss.__name__}: pass an instance, {loss.__name__}(...)")
    if isinstance(loss, LinearDistillationLoss):
        raise TypeError(
            f"{rule}; got a LinearDistillationLoss, which takes hidden states and a head: use DistillationLoss"
        )
    if not callable(loss):
        raise TypeError(f"{rule}; got {describe(loss)}")
    if getattr(loss, "reduction", "mean") != "mean":
        raise ValueError(f'loss must have reduction="mean": the trainer steps on one number; got {loss.reduction!r}')
    if not _accepts(loss, None, None, None, return_metrics=True):
        hint = f". If it is the teacher: {_ORDER}" if isinstance(loss, nn.Module) else ""
        raise TypeError(f"{rule}; got {describe(loss)}, which does not take these arguments{hint}")


def check_result(loss: object, result: Any) -> tuple[Tensor, LossMetrics]:
    """Check the form of the loss function's result with return_metrics=True, and return it."""
    if not (isinstance(result, tuple | list) and len(result) == 2 and isinstance(result[0], Tensor)):
        raise TypeError(f"loss must return (loss, LossMetrics); {describe(loss)} returned {describe(result)}")
    value, metrics = result
    is_metrics = isinstance(metrics, tuple) and len(metrics) == len(LossMetrics._fields)
    if not is_metrics:
        raise TypeError(f"loss must return LossMetrics as second item; {describe(loss)} returned {describe(metrics)}")
    return value, metrics


def check_optimizer(optimizer: object, student: nn.Module) -> None:
    """Check that the optimizer steps without a closure and holds a parameter of the student."""
    made = "made of the student's parameters, such as torch.optim.SGD(student.parameters(), lr=0.1)"
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer {made}; got {describe(optimizer)}")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError("optimizer must step without a closure, which LBFGS needs to evaluate the loss several times")
    parameters = set(student.parameters())
    if not any(p in parameters for group in optimizer.param_groups for p in group["params"]):
        raise ValueError(f"optimizer must be {made}; this {type(optimizer).__name__} holds none of them")


def check_trainable(student: nn.Module, optimizer: Optimizer) -> None:
    """Check that a parameter of the student that the optimizer holds requires a gradient."""
    if not any(p.requires_grad for p in student.parameters()):
        raise ValueError(
            "student must have a parameter that requires a gradient, but all of them are frozen: call "
            "requires_grad_(True) on the student or on the part to train"
        )
    parameters = set(student.parameters())
    held = (p for group in optimizer.param_groups for p in group["params"])
    if not any(p.requires_grad and p in parameters for p in held):
        raise ValueError(
            "optimizer must hold a parameter of the student that requires a gradient; all those that this "
            f"{type(optimizer).__name__} holds are frozen"
        )


def check_scheduler(scheduler: object, optimizer: object) -> None:
    """Check that the scheduler is None or a learning-rate scheduler of the optimizer that was passed with it."""
    if scheduler is None:
        return
    made = "made of the optimizer, such as torch.optim.lr_scheduler.StepLR(optimizer, 10)"
    if optimizer is None:
        raise ValueError("scheduler must come with the optimizer that it was made for: pass optimizer= too")
    if not isinstance(scheduler, LRScheduler):
        raise TypeError(f"scheduler must be a scheduler of torch, {made}; got {describe(scheduler)}")
    if scheduler.optimizer is not optimizer:
        raise ValueError(
            f"scheduler must be {made}; this {type(scheduler).__name__} changes the learning rate of another "
            f"{type(scheduler.optimizer).__name__}"
        )


def check_horizon(scheduler: LRScheduler | None, epochs: int) -> None:
    """Check that the scheduler's length is in epochs: it is stepped once after each of the remaining ``epochs``."""
    for part in () if scheduler is None else _schedulers(scheduler):
        alone, name = part is scheduler, type(part).__name__
        if isinstance(part, OneCycleLR):
            left = part.total_steps - max(part.last_epoch, 0)
            taken = f", of which {part.last_epoch} were taken" if part.last_epoch > 0 else ""
            if epochs and (left > epochs or (alone and left < epochs)):
                raise ValueError(
                    f"scheduler: {name} is stepped once after each epoch, so total_steps must be the number of epochs, "
                    f"{epochs}; got total_steps={part.total_steps}{taken}. Make it with total_steps={epochs}, or train "
                    "in a loop of your own that steps it after each batch"
                )
            continue
        length, option = _length(part)
        done = max(getattr(x, "last_epoch", 0) for x in (scheduler, part))  # a ChainedScheduler has no last_epoch
        if not epochs or length <= epochs + done:
            continue
        if isinstance(part, CyclicLR):
            raise ValueError(
                f"scheduler: {name} is stepped once after each epoch, so a cycle must fit into the {epochs} epochs; "
                f"got {option}={length:g}. Give the steps in epochs, or train in a loop of your own that steps it "
                "after each batch"
            )
        warn_caller(
            f"scheduler: {name} is stepped once after each epoch, and with {option}={length:g} it will not be complete "
            f"after {epochs} epochs. If {option} was meant in batches, give it in epochs"
        )


def _schedulers(scheduler: LRScheduler) -> Iterator[LRScheduler]:
    """Yield a scheduler and those that it is made of."""
    yield scheduler
    for part in getattr(scheduler, "_schedulers", ()):
        yield from _schedulers(part)


def _length(scheduler: LRScheduler) -> tuple[float, str | None]:
    """Return ``(steps, option)``: the number of steps until it is complete, and the option that sets this number."""
    if isinstance(scheduler, CyclicLR):
        return scheduler.total_size, "step_size_up + step_size_down"
    for option in ("T_max", "total_iters"):
        steps = getattr(scheduler, option, None)
        if isinstance(steps, Real):
            return float(steps), option
    return 0, None


def check_callbacks(callbacks: Any) -> tuple[Callback, ...]:
    """Check that the callbacks are functions of (trainer, record), and return them."""
    rule = "callbacks must be a sequence of functions of (trainer, record)"
    if not isinstance(callbacks, Iterable) or isinstance(callbacks, str | type):
        hint = ": put it into a list" if callable(callbacks) else ""
        raise TypeError(f"{rule}; got {describe(callbacks)}{hint}")
    checked = tuple(callbacks)
    for callback in checked:
        if isinstance(callback, type):
            raise TypeError(f"{rule}; got {describe(callback)}: pass an instance, {callback.__name__}()")
        if not callable(callback):
            raise TypeError(f"{rule}; got {describe(callback)}, which cannot be called")
        if not _accepts(callback, None, None):
            raise TypeError(f"{rule}; got {describe(callback)}, which does not take these two arguments")
    return checked


def check_schedules(schedules: object, loss: Loss) -> dict[str, Callable[[int], Any]]:
    """Check that schedules map options of the loss to functions of the epoch, and return them."""
    rule = "schedules must map options of the loss to functions of the epoch"
    if schedules is None:
        return {}
    if not isinstance(schedules, Mapping):
        raise TypeError(f'{rule}, such as {{"alpha": lambda epoch: 1 / epoch}}; got {describe(schedules)}')
    for name, schedule in schedules.items():
        if not isinstance(name, str) or not hasattr(loss, name):
            raise ValueError(f"{rule}; got {name!r}, which {describe(loss)} does not have")
        if not callable(schedule) or not _accepts(schedule, 1):
            raise ValueError(f"{rule}; got {name!r}: {schedule!r}")
    return dict(schedules)


def _accepts(function: Callable[..., Any], *args: object, **kwargs: object) -> bool:
    """Return whether a function can be called with these arguments; True where its signature is unknown."""
    try:
        signature = inspect.signature(function.forward if isinstance(function, nn.Module) else function)
    except (TypeError, ValueError):  # some functions of compiled modules have no signature
        return True
    try:
        signature.bind(*args, **kwargs)
    except TypeError:
        return False
    return True


def has_lone_last_row(data: PreparedData, batch_size: int) -> bool:
    """Return whether the last batch has a single row; False for an iterable, whose batches are not known."""
    count = row_count(data)
    return count is not None and (count - 1) % batch_size == 0


def check_lone_row(student: nn.Module, inputs: Any, count: int | None, batch_size: int) -> None:
    """Check that a student with batch norm can train on a batch of one row.

    Batch norm needs more than one value per channel. torch raises its error only in the last step of an epoch;
    this check is made before the first step.
    """
    if not any(isinstance(m, _BATCH_NORMS) for m in student.modules()):
        return
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            deepcopy(student).train()(inputs)
    except ValueError as error:
        raise ValueError(
            f"batch_size must not leave a last batch of one row to a student with batch norm, as {count} rows in "
            f"batches of {batch_size} do: {error}"
        ) from error


@torch.no_grad()
def check_weights(student: nn.Module, loss: Loss, epoch: int, step: int) -> None:
    """Check that the weights are finite, so that no checkpoint of other weights replaces the last good one."""
    doubtful = (p for p in student.parameters() if not math.isfinite(p.sum()))  # a cheap first test; a sum may overflow
    if not all(p.isfinite().all() for p in doubtful):
        raise not_finite("the student's weights", loss, epoch, step)


def not_finite(what: str, loss: Loss, epoch: int, step: int) -> ValueError:
    """Return the error for a training run that has diverged."""
    return ValueError(
        f"{what} must stay finite, but became nan or infinite in epoch {epoch}, step {step}, under {loss}. Likely "
        "causes: a learning rate that is too large (lower it, or set clip_norm); NaN in inputs or targets; a teacher "
        "with zero probabilities under reverse_kl (use forward_kl, jsd or skew_reverse_kl)"
    )


def no_batch(name: str, epoch: int) -> str:
    """Return the message for an iterable that gave no batch."""
    hint = "; an iterator runs out after one epoch: pass a DataLoader or a list" if epoch > 1 else ""
    return f"{name} must give at least one batch, got none in epoch {epoch}{hint}"
