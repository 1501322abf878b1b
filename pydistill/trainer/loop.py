"""The Trainer: a training loop around the loss, with the scores of each epoch."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from os import PathLike
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from pydistill._arguments import check_count, check_flag, warn_caller
from pydistill._torch_modules import count_parameters, float_dtype, mode
from pydistill._wording import about, describe
from pydistill.functional import LossMetrics
from pydistill.losses import DistillationLoss
from pydistill.trainer.checks import (
    TEACHER_ROWS,
    Callback,
    Loss,
    Schedules,
    Teacher,
    check_callbacks,
    check_checkpoints,
    check_clip_norm,
    check_horizon,
    check_lone_row,
    check_loss,
    check_optimizer,
    check_result,
    check_scheduler,
    check_schedules,
    check_seed,
    check_student,
    check_teacher,
    check_teacher_rows,
    check_trainable,
    check_weights,
    has_lone_last_row,
    no_batch,
    not_finite,
)
from pydistill.trainer.columns import Columns, check_weight, split_columns
from pydistill.trainer.data import (
    Data,
    Inputs,
    PreparedData,
    Rows,
    batch_count,
    input_batches,
    is_columns,
    iterate_batches,
    prepare,
    row_count,
)
from pydistill.trainer.history import EpochRecord, History, Scores
from pydistill.trainer.progress import ProgressBar, progress_bar
from pydistill.trainer.run import Run, new_or_resumed
from pydistill.trainer.totals import Totals, batch_items

_Item = TypeVar("_Item")

# Parameters * rows, about the number of multiply-adds of a step. On a busy machine two threads were slower than one
# everywhere below this number, by up to a factor of 10 for the smallest steps. Above it a step takes long enough that a
# second thread makes it faster.
_SMALL_STEP = 10_000_000


class Trainer:
    """Train a student with a distillation loss: a small loop over inputs, teacher outputs and labels.

    **Data** (the arguments ``train``, ``val`` and ``data``) can be any of these:

    - a tuple of columns in memory, tensors or numpy arrays: ``(inputs, targets, labels)``, ``(inputs, targets,
      labels, sample_weight)`` or ``(inputs, targets)``, where ``targets`` are the teacher's logits or
      :class:`SoftTargets`; ``(inputs, labels)`` or ``(inputs, labels, sample_weight)`` for a loss with alpha = 0.
      The second column is taken as labels if it holds integers. float64 inputs, numpy's default, are converted to
      the student's dtype;
    - with ``teacher=``: ``(inputs, labels)``, ``(inputs, labels, sample_weight)`` or ``(inputs,)``; the teacher
      makes the targets;
    - a Dataset of such rows;
    - an iterable of such batches, tuples or lists, that can be iterated once per epoch: a DataLoader, a list.

    Columns in memory are shuffled and indexed directly; a DataLoader over the same tensors takes 20 times as long
    per batch. Nothing is moved between devices. Inputs in memory are one tensor; batches of an iterable may hold
    anything that the student takes as its one argument.

    **Threads.** A step of a small student is not faster on several threads, and can be 10 times slower. ``fit``
    therefore runs on one torch thread if the number of parameters (of student and teacher) times the rows of a batch
    is at most 10 million, and restores the number of threads afterwards. For inputs that are not a floating-point
    matrix, such as images and token ids, every element counts as a row, because layers that share parameters over
    positions do more work.

    **Checkpoints** hold student, optimizer, scheduler, callbacks, alpha and temperature of the loss, history and
    torch's random state. A run that was killed at any moment and is started again with ``resume=True`` ends with
    exactly the same weights, provided that student and data take their random numbers from torch's generator on the
    CPU, and that machine and number of threads are the same. If a checkpoint is damaged, a warning is given and the
    checkpoint before it is used. Weights that are not finite are never written to a checkpoint.

    Args:
        student: a module that maps inputs to logits ``(..., C)``.
        loss: :class:`DistillationLoss` with reduction="mean", or any callable with its call signature: it is
            called as ``loss(student_logits, targets, labels, return_metrics=True)``, with ``sample_weight`` if the
            data have one, and returns ``(loss, LossMetrics)``. Its attributes ``alpha``, ``ignore_index`` and
            ``unlabeled``, if it has them, determine which rows count. A subclass of DistillationLoss also gets
            ``num_items``. Default: ``DistillationLoss()``.
        teacher: a module that maps inputs to logits ``(..., C)``; it runs in eval mode and without gradients. Or
            its outputs, with one row per row of ``train``: :class:`SoftTargets`, a ``TeacherStore`` or a tensor of
            logits; ``train`` must then be in memory or a Dataset.
        optimizer: a torch optimizer of the student's parameters. Default: ``Adam(fused=True, lr=1e-3)``. It
            keeps its state between calls of ``fit``.
        scheduler: a torch learning-rate scheduler of this optimizer; stepped once after each epoch
            (ReduceLROnPlateau with the validation loss, or the training loss without validation data). Schedulers
            whose length was given in batches are refused where this can be detected: OneCycleLR unless its steps are
            the epochs, CyclicLR with a cycle longer than the training. A T_max or total_iters larger than the
            number of epochs causes a warning.
        callbacks: functions of ``(trainer, record)``, called after each epoch with an :class:`EpochRecord`; one that
            sets ``trainer.stop = True`` ends ``fit``. ``pydistill.callbacks`` has EarlyStopping and BestModel.
        schedules: options of the loss that change during training, ``{"alpha": f, "temperature": g}``: functions of
            the epoch's number, called before each epoch.
        accumulate: number of batches per optimizer step. Their loss is that of one batch of all their rows, by
            :func:`pydistill.loss_items`; with a loss that is not a DistillationLoss, the mean of the batches' losses.
            ``num_items`` of the loss, if set, stays the denominator of the whole step.
        clip_norm: gradients are scaled down so that the norm over all parameters is at most this; None: no limit.
        autocast: torch.bfloat16 runs the student's forward under ``torch.autocast``; the loss stays in float32.
        seed: an integer in [0, 2**64). Every ``fit`` then uses the same random numbers, for shuffling, dropout and
            DataLoaders, and torch's global random state is restored afterwards. The student's initial weights do not
            depend on it. None: torch's global random state is used.
        progress: show a progress bar, if tqdm is installed. It shows the epochs done, the time left, and the training
            loss, accuracy and agreement of the latest epoch (the last two on the validation data, if there are any).
        checkpoint_dir: a folder for checkpoints, created if needed; the two newest are kept.
        checkpoint_every: number of optimizer steps between checkpoints, in addition to the one after each epoch. None:
            checkpoints are written only after each epoch.

    Attributes:
        stop: set it to True to end ``fit`` after the current epoch. The run is then complete: a resume returns its
            history, unless ``epochs`` is larger. To pause a run, interrupt it.

    Raises:
        TypeError: student is not a module, teacher is neither a module nor outputs, optimizer is not an optimizer, or
            scheduler is not a scheduler; the loss or a callback does not take the arguments with which it is called; a
            number or switch has another type.
        ValueError: a loss whose reduction is not "mean"; a student without parameters; an optimizer of another model; a
            scheduler without its optimizer; a number out of range.

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

    student: nn.Module
    loss: Loss
    teacher: Teacher | None
    optimizer: Optimizer
    scheduler: LRScheduler | None
    callbacks: tuple[Callback, ...]
    schedules: dict[str, Callable[[int], Any]]
    accumulate: int
    clip_norm: float | None
    autocast: torch.dtype | None
    seed: int | None
    progress: bool
    checkpoint_dir: str | PathLike[str] | None
    checkpoint_every: int | None
    stop: bool

    def __init__(
        self,
        student: nn.Module,
        loss: Loss | None = None,
        *,
        teacher: Teacher | None = None,
        optimizer: Optimizer | None = None,
        scheduler: LRScheduler | None = None,
        callbacks: Iterable[Callback] = (),
        schedules: Schedules | None = None,
        accumulate: int = 1,
        clip_norm: float | None = None,
        autocast: torch.dtype | None = None,
        seed: int | None = None,
        progress: bool = True,
        checkpoint_dir: str | PathLike[str] | None = None,
        checkpoint_every: int | None = None,
    ) -> None:
        check_student(student)
        check_teacher(teacher)
        loss = DistillationLoss() if loss is None else loss
        check_loss(loss)
        check_scheduler(scheduler, optimizer)
        if optimizer is None:
            optimizer = torch.optim.Adam(student.parameters(), lr=1e-3, fused=True)
        check_optimizer(optimizer, student)
        check_clip_norm(clip_norm)
        if autocast is not None and autocast is not torch.bfloat16:
            raise ValueError(f"autocast must be None or torch.bfloat16, got {autocast!r}")
        self.student, self.loss, self.teacher = student, loss, teacher
        self.optimizer, self.scheduler = optimizer, scheduler
        self.callbacks, self.schedules = check_callbacks(callbacks), check_schedules(schedules, loss)
        self.accumulate, self.clip_norm, self.autocast = check_count("accumulate", accumulate), clip_norm, autocast
        self.seed, self.progress = check_seed(seed), check_flag("progress", progress)
        self.checkpoint_dir = checkpoint_dir
        self.checkpoint_every = check_checkpoints(checkpoint_dir, checkpoint_every)
        self.stop = False

    def fit(
        self, train: Data, val: Data | None = None, *, epochs: int, batch_size: int = 64, resume: bool = False
    ) -> History:
        """Train the student. The train or eval mode of each of its submodules is restored afterwards.

        Args:
            train: data, in one of the forms above. Rows in memory or of a Dataset are shuffled for each epoch; an
                iterable is used in its own order. The last batch may be smaller.
            val: data to evaluate after each epoch, or None. If they have no targets, and the teacher is not a module
                that makes them, a DistillationLoss evaluates them on their labels (alpha = 0). Their first batch is
                also evaluated before the training, so that unsuitable data raise an error at once. This is not done
                for an iterable without a length, because an iterator would lose that batch.
            epochs: number of epochs, at least 1; with ``resume`` those before the interruption count.
            batch_size: rows per batch; an iterable brings its own batches.
            resume: continue from the newest intact checkpoint in ``checkpoint_dir``, if there is one.

        Returns:
            History: one record per epoch; a list with a method ``plot()``.

        Raises:
            TypeError, ValueError: data in a wrong form, columns of different lengths, no rows, inputs that are not
                finite, epochs or batch_size below 1; a student all of whose parameters are frozen; a scheduler made
                for another number of steps; a resume from checkpoints of another model, data or batch_size, or if
                all checkpoints are damaged; a new run into a folder with checkpoints; a last batch of one row for a
                student with BatchNorm; a loss or weights that are no longer finite (raised before such a step is
                taken, or such a checkpoint is written). Errors of student, teacher and loss begin with the name of the
                data.
            OSError: a checkpoint could not be written; earlier ones are intact.
        """
        epochs, batch_size = check_count("epochs", epochs), check_count("batch_size", batch_size)
        check_flag("resume", resume)
        check_trainable(self.student, self.optimizer)
        train_data = self._prepared("train", train, with_teacher=self.teacher is not None)
        val_data = None if val is None else self._prepared("val", val)
        self._check_before_training(train_data, val_data, batch_size)
        rows = row_count(train_data)
        setup = {"rows": rows, "batch_size": batch_size, "accumulate": self.accumulate, "seed": self.seed}
        self.stop = False
        for callback in self.callbacks:
            if hasattr(callback, "start"):
                callback.start()
        count = batch_count(train_data, batch_size)
        with (
            mode(self.student, training=True),
            threads_restored(),
            _seeded(self.seed),
            progress_bar(self.progress, epochs, count and epochs * count) as bar,
        ):
            run = new_or_resumed(self, setup, epochs, resume=resume)
            check_horizon(self.scheduler, epochs - run.epoch + 1)
            bar.start(run.epoch - 1, (run.epoch - 1) * (count or 0) + run.batch)
            if run.one_thread:
                torch.set_num_threads(1)
            while run.epoch <= epochs and not self.stop:
                start = time.perf_counter()
                for name, schedule in self.schedules.items():
                    setattr(self.loss, name, schedule(run.epoch))
                self._train_epoch(train_data, batch_size, run, bar)
                trained = self._scores(run.totals, "train", run.epoch)
                check_weights(self.student, self.loss, run.epoch, run.steps)
                validated = None if val_data is None else self._validate(val_data, batch_size, run)
                record = EpochRecord(run.epoch, trained, validated, time.perf_counter() - start)
                self._step_scheduler(record)
                run.history.append(record)
                bar.show(record, run.batch)
                for callback in self.callbacks:
                    callback(self, record)
                run.next_epoch()
                run.save()
            for callback in self.callbacks:
                if hasattr(callback, "finish"):
                    callback.finish(self)
        return run.history

    def evaluate(self, data: Data, *, batch_size: int = 256) -> Scores:
        """Compute loss, accuracy and agreement on some data, in eval mode and without gradients.

        The student's mode is restored afterwards.

        Args:
            data: in one of the forms above; not shuffled.
            batch_size: rows per batch of data in memory or of a Dataset. It changes the result by rounding only.

        Raises:
            TypeError, ValueError: as for :meth:`fit`.
        """
        batch_size = check_count("batch_size", batch_size)
        return self._evaluate("data", self._prepared("data", data), batch_size)

    @torch.no_grad()
    def predict(self, inputs: Inputs, *, batch_size: int = 256) -> Tensor:
        """Compute the student's logits ``(N, ..., C)``, in eval mode and without gradients.

        The student's mode is restored afterwards.

        Args:
            inputs: a tensor or array with a row per item, a Dataset, or an iterable of batches; if its rows or
                batches have several columns, the first one is used.
            batch_size: rows per batch; an iterable brings its own batches.

        Raises:
            TypeError: inputs in a form that is not accepted.
            ValueError: an iterable without batches, a student that does not return a row of logits for each row of
                inputs, or batch_size below 1.
        """
        dtype = float_dtype(self.student, torch.float32)
        batches = input_batches(inputs, check_count("batch_size", batch_size), dtype)
        with mode(self.student, training=False), about("inputs"):
            logits = [self._predicted(x) for x in batches]
        if not logits:
            raise ValueError("inputs must hold at least one batch, got none")
        return torch.cat(logits)

    def _predicted(self, inputs: Any) -> Tensor:
        logits = self._call(self.student, inputs)
        if not isinstance(logits, Tensor):
            raise TypeError(f"the student must return a tensor of logits, got {describe(logits)}")
        if isinstance(inputs, Tensor) and (logits.dim() == 0 or len(logits) != len(inputs)):
            raise ValueError(
                f"the student must return a row of logits for each row of inputs, got {describe(logits)} for "
                f"{describe(inputs)}; pass a single row as inputs[None]"
            )
        return logits

    def _check_before_training(self, train: PreparedData, val: PreparedData | None, batch_size: int) -> None:
        """Raise the errors that would otherwise be raised only at the end of the first epoch."""
        check_teacher_rows(self.teacher, train)
        if has_lone_last_row(train, batch_size):
            rows, columns = next(iterate_batches(train, 1, shuffle=False))
            check_lone_row(self.student, self._columns(columns, rows).inputs, row_count(train), batch_size)
        if val is not None and batch_count(val, batch_size) is not None:
            with torch.random.fork_rng(devices=[]):
                self._evaluate("val", val, batch_size, epoch=0, max_batches=1)

    def _train_epoch(self, train: PreparedData, batch_size: int, run: Run, bar: ProgressBar) -> None:
        if run.epoch_random is None:
            run.epoch_random = torch.get_rng_state()
        torch.set_rng_state(run.epoch_random)
        batches = iterate_batches(train, batch_size, shuffle=True)
        for _ in range(run.batch):  # done before the interruption
            next(batches)
        if run.batch and run.random is not None:
            torch.set_rng_state(run.random)
        for group in _groups(batches, self.accumulate):
            with about("train"):
                columns = [self._columns(batch, rows) for rows, batch in group]
            if run.one_thread is None:
                run.one_thread = self._is_small_step(columns[0].inputs)
                if run.one_thread:
                    torch.set_num_threads(1)
            self._step(columns, run)
            run.batch += len(group)
            run.steps += 1
            bar.advance(len(group))
            if self.checkpoint_every is not None and run.steps % self.checkpoint_every == 0:
                check_weights(self.student, self.loss, run.epoch, run.steps)
                run.save()

    def _step(self, group: Sequence[Columns], run: Run) -> None:
        """Take one optimizer step on a group of batches; their loss is that of one batch of all their rows."""
        parts = len(group)
        items: list[tuple[float, float] | None] = [None] * parts
        shared: dict[str, Any] = {}
        if parts > 1 and isinstance(self.loss, DistillationLoss) and self.loss.num_items is None:
            with about("train"):
                counted = [batch_items(self.loss, columns) for columns in group]
            items = [*counted]
            shared["num_items"] = tuple(map(sum, zip(*counted, strict=True)))
        for parameters in self.optimizer.param_groups:  # zero_grad does the same, but takes 8 of a small step's 350 us
            for parameter in parameters["params"]:
                parameter.grad = None
        total = 0.0
        for columns, own_items in zip(group, items, strict=True):
            with about("train"):
                loss, metrics = self._forward(columns, shared, self.autocast)
            adds_up = parts == 1 or isinstance(self.loss, DistillationLoss)
            torch.autograd.backward(loss if adds_up else loss / parts)
            total += float(loss.detach())
            run.totals.add_batch(self.loss, loss.detach(), metrics, columns, own_items)
        if not math.isfinite(total):
            raise not_finite("the loss", self.loss, run.epoch, run.steps + 1)
        if self.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.student.parameters(), self.clip_norm)
        self.optimizer.step()

    def _forward(
        self, columns: Columns, options: Mapping[str, Any], autocast: torch.dtype | None = None
    ) -> tuple[Tensor, LossMetrics]:
        """Compute ``(loss, metrics)`` of a batch; ``options`` replace options of the loss in this call only."""
        if columns.weight is not None:
            options = {**options, "sample_weight": columns.weight}
        if autocast is None:
            logits = self._call(self.student, columns.inputs)
        else:
            with torch.autocast("cpu", autocast):
                logits = self._call(self.student, columns.inputs)
        result = self.loss(logits, columns.targets, columns.labels, return_metrics=True, **options)
        return check_result(self.loss, result)

    def _call(self, module: nn.Module, inputs: Any) -> Any:
        """Call a module; if it raises an error, add the form of the inputs to the message."""
        try:
            return module(inputs)
        except (TypeError, ValueError, IndexError, RuntimeError) as error:
            who = "the student" if module is self.student else "the teacher"
            error.args = (f"{error}; {who}'s inputs were {describe(inputs)}", *error.args[1:])
            raise

    def _scores(self, totals: Totals, name: str, epoch: int) -> Scores:
        if totals.batches == 0:
            raise ValueError(no_batch(name, epoch))
        if not totals.counted and epoch > 0:
            warn_caller(
                f"{name}: no row counts: each has the label that is ignored or a sample weight of 0, so that the loss "
                "is 0 and its mean nan"
            )
        return totals.scores()

    def _validate(self, val: PreparedData, batch_size: int, run: Run) -> Scores:
        """Compute the scores after an epoch. If this fails, a checkpoint of the epoch is written before the error."""
        try:
            with torch.random.fork_rng(devices=[]):  # a checkpoint must save the state at the end of the training
                return self._evaluate("val", val, batch_size, run.epoch)
        except BaseException:
            run.save()
            raise

    @torch.no_grad()
    def _evaluate(
        self, name: str, data: PreparedData, batch_size: int, epoch: int = 1, max_batches: int | None = None
    ) -> Scores:
        """Compute the scores of the first ``max_batches`` batches, or all; ``epoch`` is 0 before the training."""
        totals = Totals()
        with mode(self.student, training=False), about(name):
            for _, batch in islice(iterate_batches(data, batch_size, shuffle=False), max_batches):
                columns = self._columns(batch)
                options: dict[str, Any] = {}
                if isinstance(self.loss, DistillationLoss):
                    if self.loss.num_items is not None:  # the denominator of a training step, not of this batch
                        options["num_items"] = None
                    if columns.targets is None:
                        options["alpha"] = 0.0
                loss, metrics = self._forward(columns, options)
                items = float(metrics.num_items[0]), float(metrics.num_items[1])
                totals.add_batch(self.loss, loss, metrics, columns, items, options.get("alpha"))
        return self._scores(totals, name, epoch)

    def _prepared(self, name: str, data: Data, *, with_teacher: bool | None = None) -> PreparedData:
        """Convert data to the form from which batches are made; data in memory are also checked."""
        prepared = prepare(name, data, float_dtype(self.student, torch.float32))
        if is_columns(prepared):
            with_teacher = self._makes_targets if with_teacher is None else with_teacher
            with about(name):
                check_weight(self._split(prepared, with_teacher).weight)
        return prepared

    def _split(self, columns: object, with_teacher: bool) -> Columns:
        float_labels = not isinstance(self.loss, DistillationLoss)
        return split_columns(columns, with_teacher=with_teacher, float_labels=float_labels)

    @property
    def _makes_targets(self) -> bool:
        """Whether the teacher is a module, which makes targets for any inputs, not only for the rows of train."""
        return isinstance(self.teacher, nn.Module)

    def _columns(self, batch: object, rows: Rows | None = None) -> Columns:
        """Return the columns of one batch, with the teacher's targets; ``rows`` are its row numbers in train."""
        teacher = self.teacher
        has_stored_targets = isinstance(teacher, TEACHER_ROWS) and rows is not None
        columns = self._split(batch, has_stored_targets or self._makes_targets)
        if columns.weight is None and isinstance(self.loss, DistillationLoss):
            columns = columns._replace(weight=self.loss.sample_weight)
        if isinstance(teacher, TEACHER_ROWS) and rows is not None:
            columns = columns._replace(targets=teacher[rows])
        elif isinstance(teacher, nn.Module):
            with torch.no_grad(), mode(teacher, training=False):
                columns = columns._replace(targets=self._call(teacher, columns.inputs))
        return columns

    def _is_small_step(self, inputs: object) -> bool:
        if not isinstance(inputs, Tensor):
            return False
        modules = [m for m in (self.student, self.teacher) if isinstance(m, nn.Module)]
        rows = len(inputs) if inputs.dim() == 2 and inputs.is_floating_point() else inputs.numel()
        return sum(map(count_parameters, modules)) * rows <= _SMALL_STEP

    def _step_scheduler(self, record: EpochRecord) -> None:
        if isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step((record.val or record.train).loss)
        elif self.scheduler is not None:
            self.scheduler.step()


def _groups(items: Iterable[_Item], size: int) -> Iterator[list[_Item]]:
    """Yield lists of ``size`` items; the last may be shorter."""
    iterator = iter(items)
    while group := list(islice(iterator, size)):
        yield group


@contextmanager
def threads_restored() -> Iterator[None]:
    """Restore torch's number of threads afterwards, also after an error."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    """Seed torch's CPU generator, and restore its state afterwards."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
