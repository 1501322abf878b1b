"""A thin training loop around the loss: batches, one optimizer step each, and what an epoch came to."""

import importlib.util
import math
import time
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from pydistill.losses import DistillationLoss
from pydistill.soft_targets import SoftTargets

# Multiply-adds of a step, about: parameters * rows. Two threads lost to one everywhere below this on a busy
# machine, by up to a factor of 10 for the smallest steps; above it a step lasts long enough for a second
# thread to pay.
_SMALL_STEP = 10_000_000


class Scores(NamedTuple):
    """Means over one pass through some data; nan where nothing tells: a term not evaluated, no labels.

    Attributes:
        loss: the loss. Each batch weighs as many rows as it has rows that count for the soft term (for the
            hard one where only that is evaluated).
        soft_loss: the soft term, T^2 included.
        hard_loss: the hard term.
        accuracy: share of the labelled rows in which the student's argmax is the label.
        agreement: share of the rows in which student and teacher have the same argmax.
    """

    loss: float
    soft_loss: float
    hard_loss: float
    accuracy: float
    agreement: float


class EpochRecord(NamedTuple):
    """One epoch of :meth:`Trainer.fit`.

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


class Trainer:
    """Trains a student with a distillation loss: a loop over inputs, teacher outputs and labels, no more.

    **Data**, wherever an argument is called ``train``, ``val`` or ``data``, is one of

    - a tuple of tensors in memory: ``(inputs, targets, labels)`` or ``(inputs, targets)``, where ``targets``
      are the teacher's logits or :class:`SoftTargets`; ``(inputs, labels)`` for a loss with alpha = 0. Of
      two, the second is labels if it holds integers;
    - with ``teacher=``: ``(inputs, labels)`` or ``(inputs,)``; the teacher computes the targets;
    - an iterable of such batches, tuples or lists, that can be gone through once per epoch: a DataLoader, a
      list.

    Tensors in memory are shuffled and indexed directly; a DataLoader over the same tensors costs 20 times as
    much per batch. Nothing is moved between devices. Inputs in memory are one tensor; batches of an iterable
    may hold anything that the student takes as its one argument.

    Threads: a step of a small student gains nothing from several threads and can lose a factor of 10 to them.
    While the parameters (student and teacher) times the rows of a batch are at most 10 million, ``fit``
    therefore runs on one torch thread, and restores the number afterwards. For inputs that are not a
    floating-point matrix, such as images and token ids, every element counts as a row: layers that share
    parameters over positions do more work.

    Args:
        student: a module that maps inputs to logits ``(..., C)``.
        loss: :class:`DistillationLoss` with reduction="mean", or any callable with its call signature: it is
            called as ``loss(student_logits, targets, labels, return_metrics=True)`` and returns ``(loss,
            LossMetrics)``. Default: ``DistillationLoss()``.
        teacher: a module that maps inputs to logits ``(..., C)``. It runs in eval mode and without gradients.
        optimizer: a torch optimizer of the student's parameters. Default: ``Adam(fused=True, lr=1e-3)``. It
            keeps its state between calls of ``fit``.
        scheduler: a torch learning-rate scheduler of this optimizer; stepped once after each epoch
            (ReduceLROnPlateau with the validation loss, or the training loss without validation data).
        callbacks: callables that are called with ``(trainer, record)`` after each epoch, ``record`` an
            :class:`EpochRecord`. A schedule of alpha is one: it sets ``trainer.loss.alpha``.
        seed: an integer: shuffling, dropout and DataLoaders then give the same result to the bit in every
            ``fit``, and torch's global random state is left as it was. The student's first weights are the
            caller's. None: torch's global random state.
        progress: show a progress bar, if tqdm is installed.

    Raises:
        TypeError: student or teacher is not a module.
        ValueError: a loss whose reduction is not "mean"; a scheduler without its optimizer.

    Example:
        >>> import torch, pydistill
        >>> from pydistill.trainer import Trainer
        >>> _ = torch.manual_seed(0)
        >>> inputs, teacher = torch.randn(256, 8), torch.nn.Linear(8, 3)
        >>> labels = teacher(inputs).argmax(-1)
        >>> student = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
        >>> optimizer = torch.optim.Adam(student.parameters(), lr=1e-2)
        >>> trainer = Trainer(student, pydistill.DistillationLoss(temperature=2.0), teacher=teacher,
        ...                   optimizer=optimizer, seed=0, progress=False)
        >>> history = trainer.fit((inputs, labels), epochs=20)
        >>> history[-1].epoch, history[-1].train.loss < history[0].train.loss
        (20, True)
        >>> trainer.evaluate((inputs, labels)).accuracy > 0.8
        True
        >>> trainer.predict(inputs).shape
        torch.Size([256, 3])
    """

    def __init__(
        self,
        student,
        loss=None,
        *,
        teacher=None,
        optimizer=None,
        scheduler=None,
        callbacks=(),
        seed=None,
        progress=True,
    ):
        """See the class."""
        _check_module("student", student)
        if teacher is not None:
            _check_module("teacher", teacher)
        loss = DistillationLoss() if loss is None else loss
        if getattr(loss, "reduction", "mean") != "mean":
            raise ValueError(
                f'loss must have reduction="mean": the trainer steps on one number; got {loss.reduction!r}'
            )
        if scheduler is not None and optimizer is None:
            raise ValueError("scheduler must come with the optimizer that it was made for: pass optimizer= too")
        if optimizer is None:
            optimizer = torch.optim.Adam(student.parameters(), lr=1e-3, fused=True)
        self.student, self.loss, self.teacher = student, loss, teacher
        self.optimizer, self.scheduler = optimizer, scheduler
        self.callbacks, self.seed, self.progress = tuple(callbacks), seed, progress

    def fit(self, train, val=None, *, epochs, batch_size=64) -> list[EpochRecord]:
        """Train for some epochs; the student's train and eval modes are restored at the end.

        Args:
            train: data, in one of the forms above. Tensors in memory are shuffled for each epoch; an iterable
                comes in its own order. The last batch may be smaller.
            val: data to evaluate after each epoch, or None.
            epochs: how many, at least 1.
            batch_size: rows per batch of tensors in memory; iterables bring their own.

        Returns:
            list[EpochRecord]: one record per epoch of this call.

        Raises:
            TypeError, ValueError: data of another form, columns of different lengths, no rows, epochs or
                batch_size below 1; and what the loss raises.
        """
        _check_count("epochs", epochs)
        _check_count("batch_size", batch_size)
        _check_data("train", train)
        if val is not None:
            _check_data("val", val)
        steps = _batch_count(train, batch_size)
        history = []
        with (
            _mode(self.student, training=True),
            threads_restored(),
            _seeded(self.seed),
            _progress_bar(self.progress, steps and epochs * steps) as bar,
        ):
            for epoch in range(1, epochs + 1):
                start = time.perf_counter()
                trained = self._train_epoch(_batches(train, batch_size, shuffle=True), bar)
                if trained is None:
                    raise ValueError(_no_batch("train", epoch))
                validated = None if val is None else self._evaluate("val", val, batch_size, epoch)
                record = EpochRecord(epoch, trained, validated, time.perf_counter() - start)
                self._step_scheduler(record)
                history.append(record)
                if bar is not None:
                    bar.set_postfix(epoch=epoch, loss=trained.loss)
                for callback in self.callbacks:
                    callback(self, record)
        return history

    def evaluate(self, data, *, batch_size=256) -> Scores:
        """Loss, accuracy and agreement on some data, in eval mode, without gradients; the mode is restored.

        Args:
            data: in one of the forms above, in its own order.
            batch_size: rows per batch of tensors in memory. It changes the result by rounding only, except
                for the loss where class weights or unlabelled rows give its two terms different denominators.

        Raises:
            TypeError, ValueError: as for :meth:`fit`.
        """
        _check_count("batch_size", batch_size)
        _check_data("data", data)
        return self._evaluate("data", data, batch_size)

    @torch.no_grad()
    def predict(self, inputs, *, batch_size=256) -> Tensor:
        """The student's logits ``(N, ..., C)``, in eval mode and without gradients; the mode is restored.

        Args:
            inputs: a tensor with a row per item, or an iterable of batches, of which the first column is
                used.
            batch_size: rows per batch of a tensor.

        Raises:
            ValueError: an iterable without batches, or batch_size below 1.
        """
        _check_count("batch_size", batch_size)
        batches = inputs.split(batch_size) if isinstance(inputs, Tensor) else inputs
        with _mode(self.student, training=False):
            logits = [self.student(b[0] if isinstance(b, tuple | list) else b) for b in batches]
        if not logits:
            raise ValueError("inputs must hold at least one batch, got none")
        return torch.cat(logits)

    def _train_epoch(self, batches, bar) -> Scores | None:
        totals = _Totals()
        for columns in batches:
            inputs, targets, labels = self._columns(columns)
            if totals.batches == 0 and self._is_small_step(inputs):
                torch.set_num_threads(1)
            loss, metrics = self.loss(self.student(inputs), targets, labels, return_metrics=True)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            totals.add(loss, metrics, self._labelled(labels))
            if bar is not None:
                bar.update()
        return totals.scores()

    @torch.no_grad()
    def _evaluate(self, name, data, batch_size, epoch=1) -> Scores:
        totals = _Totals()
        with _mode(self.student, training=False):
            for columns in _batches(data, batch_size, shuffle=False):
                inputs, targets, labels = self._columns(columns)
                loss, metrics = self.loss(self.student(inputs), targets, labels, return_metrics=True)
                totals.add(loss, metrics, self._labelled(labels))
        scores = totals.scores()
        if scores is None:
            raise ValueError(_no_batch(name, epoch))
        return scores

    def _columns(self, columns):
        """One batch as (inputs, targets, labels)."""
        if not isinstance(columns, tuple | list):
            raise TypeError(
                f"a batch must be a tuple or list of columns, got {_describe(columns)}; data in memory is a "
                "tuple of tensors"
            )
        if self.teacher is not None:
            return self._columns_with_teacher(columns)
        match columns:
            case (inputs, second) if _is_labels(second):
                return inputs, None, second
            case (inputs, targets):
                return inputs, targets, None
            case (inputs, targets, labels):
                return inputs, targets, labels
        raise ValueError(
            "a batch must be (inputs, targets, labels), (inputs, targets) or, with alpha = 0 or teacher=, "
            f"(inputs, labels); got {_describe(columns)}"
        )

    def _columns_with_teacher(self, columns):
        match columns:
            case (inputs,):
                labels = None
            case (inputs, labels) if _is_labels(labels):
                pass
            case _:
                raise ValueError(
                    "a batch must be (inputs, labels) or (inputs,) under teacher=, which makes the targets; "
                    f"got {_describe(columns)}"
                )
        with torch.no_grad(), _mode(self.teacher, training=False):
            return inputs, self.teacher(inputs), labels

    def _labelled(self, labels) -> int:
        if labels is None:
            return 0
        return int((labels != getattr(self.loss, "ignore_index", -100)).sum())

    def _is_small_step(self, inputs) -> bool:
        if not isinstance(inputs, Tensor):
            return False
        modules = (self.student,) if self.teacher is None else (self.student, self.teacher)
        parameters = sum(p.numel() for module in modules for p in module.parameters())
        rows = len(inputs) if inputs.dim() == 2 and inputs.is_floating_point() else inputs.numel()
        return parameters * rows <= _SMALL_STEP

    def _step_scheduler(self, record):
        if isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step((record.val or record.train).loss)
        elif self.scheduler is not None:
            self.scheduler.step()


class _Totals:
    """Sums of the batches' means times the rows that each is a mean of, in the order of Scores."""

    def __init__(self):
        self.batches = 0
        self._sums, self._rows = [0.0] * 5, [0.0] * 5

    def add(self, loss, metrics, labelled):
        soft, hard, agreement, accuracy, (soft_items, hard_items) = metrics
        soft_items, hard_items = float(soft_items), float(hard_items)
        only_hard = math.isnan(soft) and hard_items > 0
        means = (loss.item(), float(soft), float(hard), float(accuracy), float(agreement))
        rows = (hard_items if only_hard else soft_items, soft_items, hard_items, labelled, soft_items)
        for i, (mean, count) in enumerate(zip(means, rows, strict=True)):
            if count > 0:  # a mean of no rows may be nan
                self._sums[i] += mean * count
                self._rows[i] += count
        self.batches += 1

    def scores(self) -> Scores | None:
        if self.batches == 0:
            return None
        sums_and_rows = zip(self._sums, self._rows, strict=True)
        return Scores(*(total / rows if rows else math.nan for total, rows in sums_and_rows))


def _batches(data, batch_size, *, shuffle):
    if not _in_memory(data):
        yield from data
    elif shuffle:
        for rows in torch.randperm(len(data[0])).split(batch_size):
            yield tuple(column[rows] for column in data)
    else:
        for start in range(0, len(data[0]), batch_size):
            yield tuple(column[start : start + batch_size] for column in data)


def _batch_count(data, batch_size) -> int | None:
    if _in_memory(data):
        return math.ceil(len(data[0]) / batch_size)
    try:
        return len(data)
    except TypeError:  # an iterator, or a DataLoader over an iterable dataset
        return None


def _in_memory(data) -> bool:
    return isinstance(data, tuple) and not (data and isinstance(data[0], tuple | list))


def _check_data(name, data):
    if _in_memory(data):
        _check_columns(name, data)
    elif isinstance(data, Tensor | SoftTargets) or not hasattr(data, "__iter__"):
        raise TypeError(
            f"{name} must be a tuple of tensors such as (inputs, targets, labels), or an iterable of such "
            f"batches; got {_describe(data)}"
        )


def _check_columns(name, columns):
    for i, column in enumerate(columns):
        if not isinstance(column, Tensor | SoftTargets) or len(column.shape) == 0:
            raise TypeError(
                f"{name} must hold tensors or SoftTargets with a row per item; its element {i} is "
                f"{_describe(column)}. Use torch.as_tensor for arrays, SoftTargets.from_probs for a "
                "teacher's probabilities"
            )
    lengths = [len(column) for column in columns]
    if not lengths or lengths[0] == 0:
        raise ValueError(f"{name} must hold at least one row, got {_describe(columns)}")
    if len(set(lengths)) > 1:
        raise ValueError(f"{name} must hold tensors of one length, got lengths {', '.join(map(str, lengths))}")


def _check_module(name, module):
    if not isinstance(module, torch.nn.Module):
        hint = (
            "; the outputs of other teachers go into the data: (inputs, targets, labels)" if name == "teacher" else ""
        )
        raise TypeError(f"{name} must be a torch.nn.Module, got {_describe(module)}{hint}")


def _check_count(name, value):
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def _no_batch(name, epoch) -> str:
    hint = "; an iterator runs out after one epoch: pass a DataLoader or a list" if epoch > 1 else ""
    return f"{name} must give at least one batch, got none in epoch {epoch}{hint}"


def _is_labels(column) -> bool:
    return isinstance(column, Tensor) and not column.is_floating_point()


def _describe(value) -> str:
    """The form of a value, for messages: types, shapes and dtypes, never the numbers."""
    if isinstance(value, tuple | list) and len(value) <= 8:
        return f"({', '.join(map(_describe, value))})"
    shape = f" of shape {tuple(value.shape)} and dtype {value.dtype}" if isinstance(value, Tensor) else ""
    return type(value).__name__ + shape


@contextmanager
def _mode(module, *, training):
    """Train or eval mode for a while; every submodule gets its own mode back, also one that was frozen."""
    before = [(m, m.training) for m in module.modules()]
    module.train(training)
    try:
        yield
    finally:
        for m, mode in before:
            m.training = mode


@contextmanager
def threads_restored():
    """Whatever happens inside, torch's number of threads is the same afterwards."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _seeded(seed):
    """torch's CPU generator from a seed, and back to where it was afterwards."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def _progress_bar(wanted, steps):
    if not wanted or importlib.util.find_spec("tqdm") is None:
        return nullcontext()
    from tqdm import tqdm

    return tqdm(total=steps, desc="fit", unit="step")
