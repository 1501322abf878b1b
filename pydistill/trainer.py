"""A thin training loop around the loss: batches, optimizer steps, and what an epoch came to."""

import importlib.util
import math
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from pydistill import checkpoint
from pydistill.data import batch_count, batches, describe, prepare, row_count
from pydistill.history import EpochRecord, History, Scores, Totals
from pydistill.losses import DistillationLoss
from pydistill.modules import float_dtype, mode
from pydistill.store import TeacherStore
from pydistill.targets import SoftTargets
from pydistill.training_checks import (
    about,
    check_count,
    check_lone_row,
    check_optimizer,
    check_weights,
    has_lone_last_row,
    no_batch,
    not_finite,
)

# Multiply-adds of a step, about: parameters * rows. Two threads lost to one everywhere below this on a busy
# machine, by up to a factor of 10 for the smallest steps; above it a step lasts long enough for a second
# thread to pay.
_SMALL_STEP = 10_000_000


@dataclass
class _Run:
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


class Trainer:
    """Trains a student with a distillation loss: a loop over inputs, teacher outputs and labels, no more.

    **Data**, wherever an argument is called ``train``, ``val`` or ``data``, is one of

    - a tuple of columns in memory, tensors or numpy arrays: ``(inputs, targets, labels)``, ``(inputs, targets,
      labels, sample_weight)`` or ``(inputs, targets)``, where ``targets`` are the teacher's logits or
      :class:`SoftTargets`; ``(inputs, labels)`` for a loss with alpha = 0. Of two, the second is labels if it
      holds integers. float64 inputs, as numpy makes them, are converted to the student's dtype;
    - with ``teacher=``: ``(inputs, labels)``, ``(inputs, labels, sample_weight)`` or ``(inputs,)``; the teacher
      gives the targets;
    - a Dataset of such rows;
    - an iterable of such batches, tuples or lists, that can be gone through once per epoch: a DataLoader, a
      list.

    Columns in memory are shuffled and indexed directly; a DataLoader over the same tensors costs 20 times as
    much per batch. Nothing is moved between devices. Inputs in memory are one tensor; batches of an iterable
    may hold anything that the student takes as its one argument.

    Threads: a step of a small student gains nothing from several threads and can lose a factor of 10 to them.
    While the parameters (student and teacher) times the rows of a batch are at most 10 million, ``fit``
    therefore runs on one torch thread, and restores the number afterwards. For inputs that are not a
    floating-point matrix, such as images and token ids, every element counts as a row: layers that share
    parameters over positions do more work.

    **Checkpoints** hold student, optimizer, scheduler, callbacks, loss numbers, history and torch's random state.
    A run that was killed at any moment and is started again with ``resume=True`` ends with the same weights to the
    bit, if student and data take their randomness from torch's generator on the CPU, on the same machine and
    number of threads. A damaged file is warned of, and the one before it used. No checkpoint holds weights that are
    not finite.

    Args:
        student: a module that maps inputs to logits ``(..., C)``.
        loss: :class:`DistillationLoss` with reduction="mean", or any callable with its call signature: it is
            called as ``loss(student_logits, targets, labels, return_metrics=True)`` and returns ``(loss,
            LossMetrics)``. Default: ``DistillationLoss()``.
        teacher: a module that maps inputs to logits ``(..., C)``; it runs in eval mode and without gradients. Or
            :class:`SoftTargets` or a ``TeacherStore`` with a row per row of ``train``, which must then be in memory
            or a Dataset.
        optimizer: a torch optimizer of the student's parameters. Default: ``Adam(fused=True, lr=1e-3)``. It
            keeps its state between calls of ``fit``.
        scheduler: a torch learning-rate scheduler of this optimizer; stepped once after each epoch
            (ReduceLROnPlateau with the validation loss, or the training loss without validation data).
        callbacks: functions of ``(trainer, record)``, called after each epoch with an :class:`EpochRecord`; one that
            sets ``trainer.stop = True`` ends ``fit``. ``pydistill.callbacks`` has EarlyStopping and BestModel.
        schedules: options of the loss that change, ``{"alpha": f, "temperature": g}``: functions of the epoch's
            number, called before each epoch.
        accumulate: batches per optimizer step. Their loss is that of one batch of all their rows; with a loss that is
            not a DistillationLoss, the mean of the batches' losses.
        clip_norm: largest norm of the gradient of all parameters; None: any.
        autocast: torch.bfloat16 runs the student's forward under ``torch.autocast``; the loss stays in float32.
        seed: an integer: shuffling, dropout and DataLoaders then give the same result to the bit in every
            ``fit``, and torch's global random state is left as it was. The student's first weights are the
            caller's. None: torch's global random state.
        progress: show a progress bar, if tqdm is installed.
        checkpoint_dir: a folder for checkpoints, made if needed; the two newest are kept.
        checkpoint_every: optimizer steps between checkpoints, besides the one after each epoch; None: no others.

    Attributes:
        stop: set it to end ``fit`` after the running epoch. The run is then over: a resume returns its history, unless
            it asks for more epochs. To pause one, interrupt it.

    Raises:
        TypeError: student or teacher is not a module, optimizer not an optimizer.
        ValueError: a loss whose reduction is not "mean"; an optimizer of another model; a scheduler without its
            optimizer; a number out of range.

    Example:
        >>> import torch, pydistill
        >>> _ = torch.manual_seed(0)
        >>> inputs, teacher = torch.randn(256, 8), torch.nn.Linear(8, 3)
        >>> labels = teacher(inputs).argmax(-1)
        >>> student = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
        >>> optimizer = torch.optim.Adam(student.parameters(), lr=1e-2)
        >>> trainer = pydistill.Trainer(student, pydistill.DistillationLoss(temperature=2.0), teacher=teacher,
        ...                             optimizer=optimizer, seed=0, progress=False)
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
        schedules=None,
        accumulate=1,
        clip_norm=None,
        autocast=None,
        seed=None,
        progress=True,
        checkpoint_dir=None,
        checkpoint_every=None,
    ):
        """See the class."""
        if not isinstance(student, torch.nn.Module):
            raise TypeError(f"student must be a torch.nn.Module, got {describe(student)}")
        self._teacher_rows = isinstance(teacher, SoftTargets | TeacherStore | Tensor)
        if teacher is not None and not isinstance(teacher, torch.nn.Module) and not self._teacher_rows:
            raise TypeError(
                f"teacher must be a torch.nn.Module, SoftTargets or a TeacherStore, got {describe(teacher)}; the "
                "outputs of other teachers go into the data: (inputs, targets, labels)"
            )
        loss = DistillationLoss() if loss is None else loss
        if getattr(loss, "reduction", "mean") != "mean":
            raise ValueError(
                f'loss must have reduction="mean": the trainer steps on one number; got {loss.reduction!r}'
            )
        if scheduler is not None and optimizer is None:
            raise ValueError("scheduler must come with the optimizer that it was made for: pass optimizer= too")
        if optimizer is None:
            optimizer = torch.optim.Adam(student.parameters(), lr=1e-3, fused=True)
        check_optimizer(optimizer, student)
        for name in schedules or ():
            if not hasattr(loss, name) or not callable(schedules[name]):
                raise ValueError(f"schedules must map options of the loss to functions of the epoch; got {name!r}")
        check_count("accumulate", accumulate)
        if clip_norm is not None and not clip_norm > 0:
            raise ValueError(f"clip_norm must be positive, got {clip_norm!r}")
        if autocast not in (None, torch.bfloat16):
            raise ValueError(f"autocast must be None or torch.bfloat16, got {autocast!r}")
        if checkpoint_every is not None:
            check_count("checkpoint_every", checkpoint_every)
            if checkpoint_dir is None:
                raise ValueError("checkpoint_every needs checkpoint_dir, the folder to write to")
        self.student, self.loss, self.teacher = student, loss, teacher
        self.optimizer, self.scheduler = optimizer, scheduler
        self.callbacks, self.schedules = tuple(callbacks), dict(schedules or {})
        self.accumulate, self.clip_norm, self.autocast = accumulate, clip_norm, autocast
        self.seed, self.progress = seed, progress
        self.checkpoint_dir, self.checkpoint_every = checkpoint_dir, checkpoint_every
        self.stop = False

    def fit(self, train, val=None, *, epochs, batch_size=64, resume=False) -> History:
        """Train for some epochs; the student's train and eval modes are restored at the end.

        Args:
            train: data, in one of the forms above. Rows in memory or of a Dataset are shuffled for each epoch; an
                iterable comes in its own order. The last batch may be smaller.
            val: data to evaluate after each epoch, or None. Without targets, and without a teacher module to make
                them, a DistillationLoss scores them on their labels (alpha = 0). Their first batch is tried before
                the training, so that data which do not fit cost no epoch (not of an iterator, which would lose it).
            epochs: how many, at least 1; with ``resume`` those before the interruption count.
            batch_size: rows per batch; iterables bring their own.
            resume: go on from the newest whole checkpoint in ``checkpoint_dir``, if there is one.

        Returns:
            History: one record per epoch; a list, with ``plot()``.

        Raises:
            TypeError, ValueError: data of another form, columns of different lengths, no rows, inputs that are not
                finite, epochs or batch_size below 1; a resume from the checkpoints of another model, data or
                batch_size, or of none that is whole; a new run into a folder with checkpoints; a last batch of one
                row for a student with BatchNorm; a loss or weights that are no longer finite (before such a step, or
                before a checkpoint is written); what the loss raises.
            OSError: a checkpoint could not be written; the ones before are whole.
        """
        check_count("epochs", epochs)
        check_count("batch_size", batch_size)
        dtype = float_dtype(self.student, torch.float32)
        train = prepare("train", train, dtype)
        val = None if val is None else prepare("val", val, dtype)
        self._check_teacher_rows(train)
        if has_lone_last_row(train, batch_size):
            rows, columns = next(batches(train, 1, shuffle=False))
            check_lone_row(self.student, self._columns(columns, rows)[0], row_count(train), batch_size)
        if val is not None and batch_count(val, batch_size) is not None:
            with torch.random.fork_rng(devices=[]):
                self._evaluate("val", val, batch_size, most=1)
        setup = {"rows": row_count(train), "batch_size": batch_size, "accumulate": self.accumulate, "seed": self.seed}
        self.stop = False
        for callback in self.callbacks:
            if hasattr(callback, "start"):
                callback.start()
        count = batch_count(train, batch_size)
        with (
            mode(self.student, training=True),
            threads_restored(),
            _seeded(self.seed),
            _progress_bar(self.progress, count and epochs * count) as bar,
        ):
            run = self._first_or_resumed(resume, setup, epochs)
            if bar is not None:
                bar.update((run.epoch - 1) * (count or 0) + run.batch)
            if run.one_thread:
                torch.set_num_threads(1)
            while run.epoch <= epochs and not self.stop:
                start = time.perf_counter()
                for name, schedule in self.schedules.items():
                    setattr(self.loss, name, schedule(run.epoch))
                self._train_epoch(train, batch_size, run, setup, bar)
                trained = run.totals.scores()
                if trained is None:
                    raise ValueError(no_batch("train", run.epoch))
                check_weights(self.student, self.loss, run.epoch, run.steps)
                validated = None if val is None else self._validate(val, batch_size, run, setup)
                record = EpochRecord(run.epoch, trained, validated, time.perf_counter() - start)
                self._step_scheduler(record)
                run.history.append(record)
                if bar is not None:
                    bar.set_postfix(_shown(record))
                for callback in self.callbacks:
                    callback(self, record)
                run.epoch, run.batch, run.totals, run.epoch_random = run.epoch + 1, 0, Totals(), None
                if self.checkpoint_dir is not None:
                    self._save(run, setup)
            for callback in self.callbacks:
                if hasattr(callback, "finish"):
                    callback.finish(self)
        return run.history

    def evaluate(self, data, *, batch_size=256) -> Scores:
        """Loss, accuracy and agreement on some data, in eval mode, without gradients; the mode is restored.

        Args:
            data: in one of the forms above, in its own order.
            batch_size: rows per batch of tensors in memory. It changes the result by rounding only, except
                for the loss where class weights or unlabelled rows give its two terms different denominators.

        Raises:
            TypeError, ValueError: as for :meth:`fit`.
        """
        check_count("batch_size", batch_size)
        dtype = float_dtype(self.student, torch.float32)
        return self._evaluate("data", prepare("data", data, dtype), batch_size)

    @torch.no_grad()
    def predict(self, inputs, *, batch_size=256) -> Tensor:
        """The student's logits ``(N, ..., C)``, in eval mode and without gradients; the mode is restored.

        Args:
            inputs: a tensor or array with a row per item, or an iterable of batches, of which the first column is
                used.
            batch_size: rows per batch of a tensor.

        Raises:
            ValueError: an iterable without batches, or batch_size below 1.
        """
        check_count("batch_size", batch_size)
        if hasattr(inputs, "__array__") and len(inputs):
            dtype = float_dtype(self.student, torch.float32)
            inputs = prepare("inputs", (inputs,), dtype)[0]
        found = inputs.split(batch_size) if isinstance(inputs, Tensor) else inputs
        with mode(self.student, training=False):
            logits = [self.student(b[0] if isinstance(b, tuple | list) else b) for b in found]
        if not logits:
            raise ValueError("inputs must hold at least one batch, got none")
        return torch.cat(logits)

    def _train_epoch(self, train, batch_size, run, setup, bar):
        if run.epoch_random is None:
            run.epoch_random = torch.get_rng_state()
        torch.set_rng_state(run.epoch_random)
        found = batches(train, batch_size, shuffle=True)
        for _ in range(run.batch):  # done before the interruption
            next(found)
        if run.batch and run.random is not None:
            torch.set_rng_state(run.random)
        for group in _groups(found, self.accumulate):
            columns = [self._columns(x, rows) for rows, x in group]
            if run.one_thread is None:
                run.one_thread = self._is_small_step(columns[0][0])
                if run.one_thread:
                    torch.set_num_threads(1)
            self._step(columns, run)
            run.batch += len(group)
            run.steps += 1
            if bar is not None:
                bar.update(len(group))
            if self.checkpoint_every is not None and run.steps % self.checkpoint_every == 0:
                check_weights(self.student, self.loss, run.epoch, run.steps)
                self._save(run, setup)

    def _step(self, group, run):
        """One optimizer step on the batches of a group, whose loss is that of one batch of all their rows."""
        parts = len(group)
        whole = self._num_items(group) if parts > 1 and isinstance(self.loss, DistillationLoss) else None
        for parameters in self.optimizer.param_groups:  # as zero_grad, which took 8 of a small step's 350 us
            for parameter in parameters["params"]:
                parameter.grad = None
        for inputs, targets, labels, weight in group:
            options = {} if weight is None else {"sample_weight": weight}
            if whole is not None:
                options["num_items"] = whole
            if self.autocast is None:
                logits = self.student(inputs)
            else:
                with torch.autocast("cpu", self.autocast):
                    logits = self.student(inputs)
            loss, metrics = self.loss(logits, targets, labels, return_metrics=True, **options)
            (loss if whole is not None or parts == 1 else loss / parts).backward()
            of_whole = {} if whole is None else {"parts": parts, "rows": math.prod(logits.shape[:-1])}
            run.totals.add(loss.detach(), metrics, self._labelled(labels, weight), **of_whole)
        if not math.isfinite(run.totals.sums[0]):
            raise not_finite("the loss", self.loss, run.epoch, run.steps + 1)
        if self.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.student.parameters(), self.clip_norm)
        self.optimizer.step()

    def _num_items(self, group):
        """Both terms' denominators over several batches."""
        soft = hard = 0.0
        for _, targets, labels, weight in group:
            if labels is None:
                soft += float(math.prod(targets.shape[:-1]) if weight is None else weight.sum())
                continue
            weight = torch.ones(labels.shape) if weight is None else weight
            labelled = labels != self.loss.ignore_index
            soft += float((weight if self.loss.unlabeled == "distill" else weight * labelled).sum())
            if self.loss.class_weight is not None:
                weight = weight * self.loss.class_weight[torch.where(labelled, labels, 0)]
            hard += float((weight * labelled).sum())
        return soft or 1.0, hard or 1.0

    def _validate(self, val, batch_size, run, setup) -> Scores:
        """The scores after an epoch, whose training is not lost if they cannot be had."""
        try:
            with torch.random.fork_rng(devices=[]):  # the saved state is that at the end of the training
                return self._evaluate("val", val, batch_size, run.epoch)
        except BaseException:
            if self.checkpoint_dir is not None:
                self._save(run, setup)
            raise

    @torch.no_grad()
    def _evaluate(self, name, data, batch_size, epoch=1, most=None) -> Scores:
        """The scores of all batches, or of so many as ``most``."""
        totals = Totals()
        with mode(self.student, training=False), about(name):
            for _, columns in islice(batches(data, batch_size, shuffle=False), most):
                inputs, targets, labels, weight = self._columns(columns)
                options = {} if weight is None else {"sample_weight": weight}
                if targets is None and isinstance(self.loss, DistillationLoss):
                    options["alpha"] = 0.0
                loss, metrics = self.loss(self.student(inputs), targets, labels, return_metrics=True, **options)
                totals.add(loss, metrics, self._labelled(labels, weight))
        scores = totals.scores()
        if scores is None:
            raise ValueError(no_batch(name, epoch))
        return scores

    def _columns(self, columns, rows=None):
        """One batch as (inputs, targets, labels, sample_weight). ``rows``: which rows of train they are."""
        if not isinstance(columns, tuple | list):
            raise TypeError(
                f"a batch must be a tuple or list of columns, got {describe(columns)}; data in memory is a "
                "tuple of tensors"
            )
        if self.teacher is not None and (rows is not None or not self._teacher_rows):
            inputs, labels, weight = _without_targets(columns)
            if self._teacher_rows:
                return inputs, self.teacher[rows], labels, weight
            with torch.no_grad(), mode(self.teacher, training=False):
                return inputs, self.teacher(inputs), labels, weight
        match columns:
            case (inputs, second) if _is_labels(second):
                return inputs, None, second, None
            case (inputs, targets):
                return inputs, targets, None, None
            case (inputs, targets, labels):
                return inputs, targets, labels, None
            case (inputs, targets, labels, weight) if not _is_labels(weight):
                return inputs, targets, labels, weight
        raise ValueError(
            "a batch must be (inputs, targets, labels), with sample_weight as a fourth column, (inputs, targets) or, "
            f"with alpha = 0 or teacher=, (inputs, labels); got {describe(columns)}"
        )

    def _check_teacher_rows(self, train):
        if not self._teacher_rows:
            return
        count = row_count(train)
        if count is None:
            raise ValueError(
                f"teacher: {type(self.teacher).__name__} has a row per training row, and an iterable does not say "
                "which rows its batches are; pass tensors or a Dataset"
            )
        if count != len(self.teacher):
            raise ValueError(f"teacher must have a row per row of train, got {len(self.teacher)} for {count}")

    def _labelled(self, labels, weight) -> int | None:
        """Rows with a label; None where the hard term's denominator says it, which a small step notices."""
        if labels is None:
            return 0
        plain = weight is None and self.accumulate == 1 and isinstance(self.loss, DistillationLoss)
        if plain and self.loss.alpha < 1 and self.loss.class_weight is self.loss.num_items is None:
            return None
        return int((labels != getattr(self.loss, "ignore_index", -100)).sum())

    def _is_small_step(self, inputs) -> bool:
        if not isinstance(inputs, Tensor):
            return False
        modules = [m for m in (self.student, self.teacher) if isinstance(m, torch.nn.Module)]
        parameters = sum(p.numel() for module in modules for p in module.parameters())
        rows = len(inputs) if inputs.dim() == 2 and inputs.is_floating_point() else inputs.numel()
        return parameters * rows <= _SMALL_STEP

    def _step_scheduler(self, record):
        if isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step((record.val or record.train).loss)
        elif self.scheduler is not None:
            self.scheduler.step()

    def _save(self, run, setup):
        run.number += 1
        state = {
            "setup": setup,
            "run": {
                name: getattr(run, name) for name in ("epoch", "batch", "one_thread", "steps", "number", "epoch_random")
            },
            "totals": [run.totals.batches, run.totals.sums, run.totals.rows],
            "history": run.history,
            "stopped": run.epochs if self.stop and run.batch == 0 else None,  # stop ends fit after a whole epoch
            "random": torch.get_rng_state(),
            "student": dict(self.student.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "callbacks": [x.state_dict() if hasattr(x, "state_dict") else None for x in self.callbacks],
            "loss": {name: getattr(self.loss, name, None) for name in ("alpha", "temperature")},
        }
        checkpoint.save(self.checkpoint_dir, run.number, state)

    def _first_or_resumed(self, resume, setup, epochs) -> _Run:
        if self.checkpoint_dir is None:
            if resume:
                raise ValueError("resume=True needs checkpoint_dir, the folder with the checkpoints")
            return _Run(epochs)
        if not resume:
            if checkpoint.found(self.checkpoint_dir):
                raise ValueError(
                    f"checkpoint_dir {self.checkpoint_dir} holds checkpoints of an earlier run: pass resume=True to go "
                    "on from them, or another folder"
                )
            return _Run(epochs)
        state = checkpoint.load_newest(self.checkpoint_dir)
        if state is None:
            return _Run(epochs)
        for name, value in setup.items():
            if state["setup"][name] != value:
                raise ValueError(f"resume: the checkpoint was made with {name}={state['setup'][name]}, got {value}")
        try:
            self.student.load_state_dict(state["student"])
        except RuntimeError as error:
            raise ValueError(f"resume: the checkpoint holds another student: {error}") from error
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        for callback, of_callback in zip(self.callbacks, state["callbacks"], strict=True):
            if of_callback is not None:
                callback.load_state_dict(of_callback)
        for name, value in state["loss"].items():
            if value is not None:
                setattr(self.loss, name, value)
        self.stop = state["stopped"] is not None and epochs <= state["stopped"]
        torch.set_rng_state(state["random"])
        history = History(
            EpochRecord(epoch, Scores(*train), None if val is None else Scores(*val), seconds)
            for epoch, train, val, seconds in state["history"]
        )
        return _Run(epochs, **state["run"], totals=Totals(*state["totals"]), history=history, random=state["random"])


def _without_targets(columns):
    match columns:
        case (inputs,):
            return inputs, None, None
        case (inputs, labels) if _is_labels(labels):
            return inputs, labels, None
        case (inputs, labels, weight) if (
            _is_labels(labels) and isinstance(weight, Tensor) and weight.shape == labels.shape
        ):
            return inputs, labels, weight
    raise ValueError(
        "a batch must be (inputs, labels) or (inputs,) under teacher=, which makes the targets, or (inputs, labels, "
        f"sample_weight); got {describe(columns)}"
    )


def _groups(found, size):
    """Lists of ``size`` batches; the last may be shorter."""
    group = []
    for batch in found:
        group.append(batch)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def _shown(record):
    """The numbers beside the progress bar."""
    train = record.train
    shown = {"epoch": record.epoch, "loss": train.loss, "soft": train.soft_loss, "hard": train.hard_loss}
    best = record.val or train
    return shown | {"accuracy": best.accuracy, "agreement": best.agreement}


def _is_labels(column) -> bool:
    return isinstance(column, Tensor) and not column.is_floating_point()


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
