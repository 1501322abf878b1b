"""A thin training loop around the loss: batches, optimizer steps, and the scores of each epoch."""

import math
import time
import warnings
from contextlib import contextmanager
from dataclasses import asdict
from itertools import islice
from numbers import Real

import numpy as np
import torch
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from pydistill._arguments import check_count, check_flag
from pydistill._torch_modules import float_dtype, mode
from pydistill._wording import about, describe
from pydistill.functional import loss_items
from pydistill.losses import DistillationLoss
from pydistill.store import TeacherStore
from pydistill.targets import SoftTargets
from pydistill.trainer import checkpoint
from pydistill.trainer.checks import (
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
    check_trainable,
    check_weights,
    has_lone_last_row,
    no_batch,
    not_finite,
)
from pydistill.trainer.columns import check_weight, split_columns
from pydistill.trainer.data import (
    batch_count,
    batches,
    in_memory,
    is_map,
    prepare,
    row_count,
)
from pydistill.trainer.history import EpochRecord, History, Scores
from pydistill.trainer.progress import progress_bar, shown
from pydistill.trainer.run import Run
from pydistill.trainer.totals import Totals

# Multiply-adds of a step, about: parameters * rows. Two threads lost to one everywhere below this on a busy
# machine, by up to a factor of 10 for the smallest steps; above it a step lasts long enough for a second
# thread to pay.
_SMALL_STEP = 10_000_000


class Trainer:
    """Trains a student with a distillation loss: a loop over inputs, teacher outputs and labels, no more.

    **Data**, wherever an argument is called ``train``, ``val`` or ``data``, is one of

    - a tuple of columns in memory, tensors or numpy arrays: ``(inputs, targets, labels)``, ``(inputs, targets,
      labels, sample_weight)`` or ``(inputs, targets)``, where ``targets`` are the teacher's logits or
      :class:`SoftTargets`; ``(inputs, labels)`` or ``(inputs, labels, sample_weight)`` for a loss with alpha = 0.
      The second column is labels if it holds integers. float64 inputs, as numpy makes them, are converted to the
      student's dtype;
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
            called as ``loss(student_logits, targets, labels, return_metrics=True)``, with ``sample_weight`` where the
            data have one, and returns ``(loss, LossMetrics)``. Its attributes ``alpha``, ``ignore_index`` and
            ``unlabeled``, where it has them, tell which rows count. A subclass of DistillationLoss also gets
            ``num_items``. Default: ``DistillationLoss()``.
        teacher: a module that maps inputs to logits ``(..., C)``; it runs in eval mode and without gradients. Or
            :class:`SoftTargets` or a ``TeacherStore`` with a row per row of ``train``, which must then be in memory
            or a Dataset.
        optimizer: a torch optimizer of the student's parameters. Default: ``Adam(fused=True, lr=1e-3)``. It
            keeps its state between calls of ``fit``.
        scheduler: a torch learning-rate scheduler of this optimizer; stepped once after each epoch
            (ReduceLROnPlateau with the validation loss, or the training loss without validation data). One that was
            planned in batches is refused where that shows: OneCycleLR unless its steps are the epochs, CyclicLR whose
            cycle is longer than the training; a T_max or total_iters beyond the epochs is warned of.
        callbacks: functions of ``(trainer, record)``, called after each epoch with an :class:`EpochRecord`; one that
            sets ``trainer.stop = True`` ends ``fit``. ``pydistill.callbacks`` has EarlyStopping and BestModel.
        schedules: options of the loss that change, ``{"alpha": f, "temperature": g}``: functions of the epoch's
            number, called before each epoch.
        accumulate: batches per optimizer step. Their loss is that of one batch of all their rows, by
            :func:`pydistill.loss_items`; with a loss that is not a DistillationLoss, the mean of the batches' losses.
            ``num_items`` of the loss, if set, stays the denominator of the whole step.
        clip_norm: largest norm of the gradient of all parameters; None: any.
        autocast: torch.bfloat16 runs the student's forward under ``torch.autocast``; the loss stays in float32.
        seed: an integer in [0, 2**64): shuffling, dropout and DataLoaders then give the same result to the bit in every
            ``fit``, and torch's global random state is left as it was. The student's first weights are the
            caller's. None: torch's global random state.
        progress: show a progress bar, if tqdm is installed.
        checkpoint_dir: a folder for checkpoints, made if needed; the two newest are kept.
        checkpoint_every: optimizer steps between checkpoints, besides the one after each epoch; None: no others.

    Attributes:
        stop: set it to end ``fit`` after the running epoch. The run is then over: a resume returns its history, unless
            it asks for more epochs. To pause one, interrupt it.

    Raises:
        TypeError: student or teacher is not a module, optimizer not an optimizer, scheduler not a scheduler; a loss or
            a callback that cannot be called as it will be; a number or switch of another type.
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
        check_student(student)
        self._teacher_rows = isinstance(teacher, SoftTargets | TeacherStore | Tensor)
        check_teacher(teacher, rows=self._teacher_rows)
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
                finite, epochs or batch_size below 1; a student that is frozen; a scheduler planned for another number
                of steps; a resume from the checkpoints of another model, data or batch_size, or of none that is whole;
                a new run into a folder with checkpoints; a last batch of one row for a student with BatchNorm; a loss
                or weights that are no longer finite (before such a step, or before a checkpoint is written). What
                student, teacher and loss raise is raised with the name of the data before it.
            OSError: a checkpoint could not be written; the ones before are whole.
        """
        epochs, batch_size = check_count("epochs", epochs), check_count("batch_size", batch_size)
        check_flag("resume", resume)
        check_trainable(self.student, self.optimizer)
        train = self._prepared("train", train, with_teacher=self.teacher is not None)
        val = None if val is None else self._prepared("val", val)
        self._check_teacher_rows(train)
        if has_lone_last_row(train, batch_size):
            rows, columns = next(batches(train, 1, shuffle=False))
            check_lone_row(self.student, self._columns(columns, rows)[0], row_count(train), batch_size)
        if val is not None and batch_count(val, batch_size) is not None:
            with torch.random.fork_rng(devices=[]):
                self._evaluate("val", val, batch_size, epoch=0, most=1)
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
            progress_bar(self.progress, count and epochs * count) as bar,
        ):
            run = self._first_or_resumed(resume, setup, epochs)
            check_horizon(self.scheduler, epochs - run.epoch + 1)
            if bar is not None:
                bar.update((run.epoch - 1) * (count or 0) + run.batch)
            if run.one_thread:
                torch.set_num_threads(1)
            while run.epoch <= epochs and not self.stop:
                start = time.perf_counter()
                for name, schedule in self.schedules.items():
                    setattr(self.loss, name, schedule(run.epoch))
                self._train_epoch(train, batch_size, run, setup, bar)
                trained = self._scores(run.totals, "train", run.epoch)
                check_weights(self.student, self.loss, run.epoch, run.steps)
                validated = None if val is None else self._validate(val, batch_size, run, setup)
                record = EpochRecord(run.epoch, trained, validated, time.perf_counter() - start)
                self._step_scheduler(record)
                run.history.append(record)
                if bar is not None:
                    bar.set_postfix(shown(record))
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
            batch_size: rows per batch of tensors in memory. It changes the result by rounding only.

        Raises:
            TypeError, ValueError: as for :meth:`fit`.
        """
        batch_size = check_count("batch_size", batch_size)
        return self._evaluate("data", self._prepared("data", data), batch_size)

    @torch.no_grad()
    def predict(self, inputs, *, batch_size=256) -> Tensor:
        """The student's logits ``(N, ..., C)``, in eval mode and without gradients; the mode is restored.

        Args:
            inputs: a tensor or array with a row per item, a Dataset, or an iterable of batches; of rows and batches
                with several columns the first is used.
            batch_size: rows per batch; iterables bring their own.

        Raises:
            TypeError: inputs of another form.
            ValueError: an iterable without batches, a student whose output has not a row per row, or batch_size
                below 1.
        """
        found = self._input_batches(inputs, check_count("batch_size", batch_size))
        with mode(self.student, training=False), about("inputs"):
            logits = [self._predicted(x) for x in found]
        if not logits:
            raise ValueError("inputs must hold at least one batch, got none")
        return torch.cat(logits)

    def _input_batches(self, inputs, batch_size):
        """The student's inputs, in batches."""
        if in_memory(inputs) and len(inputs) != 1:
            raise TypeError(
                f"inputs must be one tensor, a Dataset or an iterable of batches; got the tuple {describe(inputs)}: of "
                "data for fit or evaluate, pass the first column"
            )
        rows = isinstance(inputs, Tensor | np.ndarray) or hasattr(inputs, "to_numpy")
        if isinstance(inputs, Tensor) and inputs.dim() and len(inputs) == 0:
            return [inputs]
        if not (rows or is_map(inputs) or (hasattr(inputs, "__iter__") and not isinstance(inputs, str | dict))):
            raise TypeError(
                f"inputs must be a tensor, an array, a Dataset or an iterable of batches; got {describe(inputs)}"
            )
        dtype = float_dtype(self.student, torch.float32)
        found = batches(prepare("inputs", (inputs,) if rows else inputs, dtype), batch_size, shuffle=False)
        return (x[0] if isinstance(x, tuple | list) else x for _, x in found)

    def _predicted(self, inputs):
        logits = self._call(self.student, inputs)
        if not isinstance(logits, Tensor):
            raise TypeError(f"the student must return a tensor of logits, got {describe(logits)}")
        if isinstance(inputs, Tensor) and (logits.dim() == 0 or len(logits) != len(inputs)):
            raise ValueError(
                f"the student must return a row of logits per row, got {describe(logits)} for {describe(inputs)}; a "
                "single row goes in as inputs[None]"
            )
        return logits

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
            with about("train"):
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
        items = [None] * parts
        shared = {}
        if parts > 1 and isinstance(self.loss, DistillationLoss) and self.loss.num_items is None:
            with about("train"):
                items = [self._items(*batch[1:]) for batch in group]
            shared["num_items"] = tuple(map(sum, zip(*items, strict=True)))
        for parameters in self.optimizer.param_groups:  # as zero_grad, which took 8 of a small step's 350 us
            for parameter in parameters["params"]:
                parameter.grad = None
        total = 0.0
        for batch, of_batch in zip(group, items, strict=True):
            with about("train"):
                loss, metrics = self._forward(batch, shared, self.autocast)
            adds_up = parts == 1 or isinstance(self.loss, DistillationLoss)
            (loss if adds_up else loss / parts).backward()
            total += float(loss.detach())
            self._add(run.totals, loss.detach(), metrics, batch, of_batch)
        if not math.isfinite(total):
            raise not_finite("the loss", self.loss, run.epoch, run.steps + 1)
        if self.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.student.parameters(), self.clip_norm)
        self.optimizer.step()

    def _forward(self, batch, options, autocast=None):
        """``(loss, metrics)`` of a batch; ``options`` of the loss are those of this call."""
        inputs, targets, labels, weight = batch
        if weight is not None:
            options = options | {"sample_weight": weight}
        if autocast is None:
            logits = self._call(self.student, inputs)
        else:
            with torch.autocast("cpu", autocast):
                logits = self._call(self.student, inputs)
        return check_result(self.loss, self.loss(logits, targets, labels, return_metrics=True, **options))

    def _call(self, module, inputs):
        """The module's outputs; what goes wrong inside is said with the form of the inputs."""
        try:
            return module(inputs)
        except (TypeError, ValueError, IndexError, RuntimeError) as error:
            who = "the student" if module is self.student else "the teacher"
            error.args = (f"{error}; {who}'s inputs were {describe(inputs)}", *error.args[1:])
            raise

    def _items(self, targets, labels, weight, class_weight=True) -> tuple[float, float]:
        """Denominators of a batch; without ``class_weight``, and with weights of 0 and 1, they are numbers of rows."""
        if labels is None and weight is None:
            return float(math.prod(targets.shape[:-1])), 0.0
        return loss_items(
            labels,
            sample_weight=weight,
            class_weight=getattr(self.loss, "class_weight", None) if class_weight else None,
            ignore_index=getattr(self.loss, "ignore_index", -100),
            unlabeled=getattr(self.loss, "unlabeled", "skip"),
        )

    def _add(self, totals, loss, metrics, batch, items=None, alpha=None):
        """Count a batch. ``items``: its denominators, where known; ``alpha``: that of this call, if it had its own."""
        _, targets, labels, weight = batch
        counts = None if weight is None else weight != 0
        divisors = tuple(map(float, metrics.num_items))
        ours = isinstance(self.loss, DistillationLoss)
        if ours:
            if items is None:
                items = divisors if self.loss.num_items is None else self._items(targets, labels, weight)
            plain = weight is None and self.loss.class_weight is None  # a small step notices the counting
            rows = items if plain else self._items(targets, labels, counts, class_weight=False)
        else:
            items = rows = divisors
            if isinstance(labels, Tensor) and not labels.is_floating_point():
                soft, labelled = self._items(targets, labels, counts, class_weight=False)
                rows = (rows[0] if weight is None else soft), labelled
        alpha = getattr(self.loss, "alpha", None) if alpha is None else alpha
        known = isinstance(alpha, Real) or (isinstance(alpha, Tensor) and alpha.dim() == 0)
        alpha = float(alpha) if known and 0 <= alpha <= 1 else None
        sums_terms = ours and type(self.loss).forward is DistillationLoss.forward
        totals.add(loss, metrics, alpha=alpha, items=items, rows=rows, sums_terms=sums_terms)

    def _scores(self, totals, name, epoch) -> Scores:
        if totals.batches == 0:
            raise ValueError(no_batch(name, epoch))
        if not totals.counted and epoch > 0:
            warnings.warn(
                f"{name}: no row counts: each has the label that is ignored or a sample weight of 0, so that the loss "
                "is 0 and its mean nan",
                UserWarning,
                stacklevel=3,
            )
        return totals.scores()

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
        """The scores of all batches, or of so many as ``most``; ``epoch`` is 0 for a trial before the first."""
        totals = Totals()
        with mode(self.student, training=False), about(name):
            for _, columns in islice(batches(data, batch_size, shuffle=False), most):
                batch = self._columns(columns)
                options = {}
                if isinstance(self.loss, DistillationLoss):
                    if self.loss.num_items is not None:  # which is that of a training step
                        options["num_items"] = None
                    if batch[1] is None:
                        options["alpha"] = 0.0
                loss, metrics = self._forward(batch, options)
                items = tuple(map(float, metrics.num_items))
                self._add(totals, loss, metrics, batch, items, options.get("alpha"))
        return self._scores(totals, name, epoch)

    def _prepared(self, name, data, *, with_teacher=None):
        """Data as batches are made from it, checked as far as it is in memory."""
        data = prepare(name, data, float_dtype(self.student, torch.float32))
        if in_memory(data):
            with_teacher = self._makes_targets if with_teacher is None else with_teacher
            with about(name):
                check_weight(self._split(data, with_teacher)[-1])
        return data

    def _split(self, columns, with_teacher):
        float_labels = not isinstance(self.loss, DistillationLoss)
        return split_columns(columns, with_teacher=with_teacher, float_labels=float_labels)

    @property
    def _makes_targets(self) -> bool:
        """Whether the teacher gives targets for any inputs, not only for the rows of train."""
        return self.teacher is not None and not self._teacher_rows

    def _columns(self, columns, rows=None):
        """One batch as (inputs, targets, labels, sample_weight). ``rows``: which rows of train they are."""
        of_rows = self._teacher_rows and rows is not None
        inputs, targets, labels, weight = self._split(columns, of_rows or self._makes_targets)
        if weight is None and isinstance(self.loss, DistillationLoss):
            weight = self.loss.sample_weight
        if of_rows:
            targets = self.teacher[rows]
        elif self._makes_targets:
            with torch.no_grad(), mode(self.teacher, training=False):
                targets = self._call(self.teacher, inputs)
        return inputs, targets, labels, weight

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
            "totals": asdict(run.totals),
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

    def _first_or_resumed(self, resume, setup, epochs) -> Run:
        if self.checkpoint_dir is None:
            if resume:
                raise ValueError("resume=True needs checkpoint_dir, the folder with the checkpoints")
            return Run(epochs)
        if not resume:
            if checkpoint.found(self.checkpoint_dir):
                raise ValueError(
                    f"checkpoint_dir {self.checkpoint_dir} holds checkpoints of an earlier run: pass resume=True to go "
                    "on from them, or another folder"
                )
            return Run(epochs)
        state = checkpoint.load_run(self, setup)
        if state is None:
            return Run(epochs)
        for name, value in setup.items():
            if state["setup"][name] != value:
                raise ValueError(f"resume: the checkpoint was made with {name}={state['setup'][name]}, got {value}")
        try:
            self.student.load_state_dict(state["student"])
        except RuntimeError as error:
            raise ValueError(f"resume: the checkpoint holds another student: {error}") from error
        with checkpoint.loading("optimizer"):
            self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None:
            with checkpoint.loading("scheduler"):
                self.scheduler.load_state_dict(state["scheduler"])
        for callback, of_callback in zip(self.callbacks, state["callbacks"], strict=True):
            if of_callback is not None:
                with checkpoint.loading(type(callback).__name__):
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
        return Run(epochs, **state["run"], totals=Totals(**state["totals"]), history=history, random=state["random"])


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
