"""The forms in which a teacher can be given."""

import math
from collections.abc import Mapping
from numbers import Integral, Real

import torch
from torch import Tensor

from pydistill._arguments import lost_storage, no_storage

_SUM_TOLERANCE = {torch.float16: 1e-2, torch.bfloat16: 1e-2}


class SoftTargets:
    """A teacher's outputs, ready for :func:`pydistill.distillation_loss`, in any of the forms teachers give them.

    Make one with :meth:`from_logits`, :meth:`from_probs`, :meth:`from_log_probs`, :meth:`from_topk` or
    :func:`pydistill.top_k`. All of them end as logits, since the softmax of ``log(p) / T`` is ``p**(1/T)``
    renormalised: the teacher's distribution at temperature T. A probability of exactly 0 becomes a logit of -inf.

    Attributes:
        logits: tensor ``(..., C)``, or ``(..., k)`` for a top-k teacher; detached.
        indices: the classes of a top-k teacher's logits, int64 ``(..., k)``; else None.
        log_partitions: ``{temperature: log-sum-exp of all the logits / temperature}``, float64 ``(...)``.
        tail: what a top-k teacher's other classes are: "renormalize" or "bucket".
        has_zeros: whether these were probabilities, some of them exactly 0.

    Example:
        >>> import torch, pydistill
        >>> probs = torch.tensor([[0.7, 0.3, 0.0], [0.2, 0.2, 0.6]])  # a forest's predict_proba
        >>> teacher = pydistill.SoftTargets.from_probs(probs)
        >>> student_logits = torch.zeros(2, 3)
        >>> loss = pydistill.distillation_loss(student_logits, teacher, alpha=1.0, temperature=2.0)
        >>> bool(loss > 0), teacher
        (True, SoftTargets(shape=(2, 3), dtype=torch.float32))
    """

    __slots__ = ("_classes", "has_zeros", "indices", "log_partitions", "logits", "tail")

    def __init__(self, logits, *, indices=None, classes=None, log_partitions=None, tail=None, zeros=False):
        """Use one of the ``from_*`` constructors."""
        self.logits, self.indices, self.log_partitions, self.tail = logits, indices, log_partitions or {}, tail
        self._classes, self.has_zeros = classes, zeros

    @classmethod
    def from_logits(cls, logits) -> "SoftTargets":
        """From logits ``(..., C)`` of any floating dtype; kept as they are, without a copy.

        Raises:
            TypeError: not a floating-point tensor or array.
            ValueError: a scalar, which has no class dimension.
        """
        return cls(_as_float_tensor(logits, "logits").detach())

    @classmethod
    def from_probs(cls, probs, validate: bool = True) -> "SoftTargets":
        """From probabilities ``(..., C)``, as scikit-learn's ``predict_proba`` gives them; zeros are allowed.

        Args:
            probs: tensor or array. Stored as log-probabilities: one new buffer of its size, in float32 for half types.
            validate: check here, once, that every entry is >= 0 and every row sums to 1 within 1e-3 (1e-2 for half
                types). Turn it off only for data that was checked before.

        Raises:
            ValueError: a row with a negative entry or a wrong sum; the message names the row and its sum.
            TypeError: not a floating-point tensor or array.
        """
        probs = _as_float_tensor(probs, "probs").detach()
        if validate is not True and validate is not False:
            raise TypeError(f"validate must be True or False, got {validate!r}")
        if validate:
            _check_probs(probs)
        wide = probs if probs.dtype in (torch.float32, torch.float64) else probs.float()
        return cls(wide.log(), zeros=bool((wide == 0).any()))

    @classmethod
    def from_log_probs(cls, log_probs) -> "SoftTargets":
        """From log-probabilities ``(..., C)``, as ``log_softmax`` or ``predict_log_proba`` give them; -inf is allowed.

        A constant added to a row changes nothing: the rows are normalised at the temperature in use. Only mse sees it:
        it compares the student's logits with these numbers as they are.

        Raises:
            TypeError: not a floating-point tensor or array.
            ValueError: a scalar, which has no class dimension.
        """
        log_probs = _as_float_tensor(log_probs, "log_probs").detach()
        return cls(log_probs, zeros=bool((log_probs == -math.inf).any()))

    @classmethod
    def from_topk(cls, indices, logits, num_classes, *, log_partitions=None, tail="renormalize") -> "SoftTargets":
        """From the k largest logits of each row, as a cache of a language model's outputs holds them.

        Args:
            indices: the classes, int64 or int32 ``(..., k)``, in any order, none twice in a row.
            logits: their logits ``(..., k)``, of any floating dtype.
            num_classes: C, the number of classes that there are.
            log_partitions: ``{temperature: tensor (...)}``, the log-sum-exp of *all* the logits / temperature.
            tail: what the other classes are. "renormalize": nothing, the k classes are the teacher's whole
                distribution. "bucket": one more outcome, which holds the rest of the mass, for teacher and student
                alike; it needs the log-partition at the temperature of the loss.

        Raises:
            ValueError: shapes that disagree, a class outside [0, C) or twice in a row, an unknown tail, a log-partition
                that is less than the log-sum-exp of the row's k logits.
            TypeError: indices or num_classes that are no integers, logits that are no floating-point numbers.
        """
        logits = _as_float_tensor(logits, "logits").detach()
        num_classes = _whole_number("num_classes", num_classes)
        indices = _as_tensor(indices, "indices")
        if indices.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"indices must be int64 or int32, got {indices.dtype}")
        if indices.shape != logits.shape or not logits.shape[-1]:
            raise ValueError(
                f"indices and logits must have one shape (..., k) with k >= 1, got indices {tuple(indices.shape)} and "
                f"logits {tuple(logits.shape)}"
            )
        if tail not in ("renormalize", "bucket"):
            raise ValueError(f'tail must be "renormalize" or "bucket", got {tail!r}')
        if indices.device != logits.device:
            raise ValueError(f"indices and logits must be on one device, got {indices.device} and {logits.device}")
        indices, order = indices.long().sort(-1)  # ascending, as the kernels walk a row
        logits = logits.gather(-1, order)
        _check_indices(indices, num_classes)
        if log_partitions is not None and not isinstance(log_partitions, Mapping):
            raise TypeError(
                "log_partitions must be a dict {temperature: tensor of log-partitions}, got "
                f"{type(log_partitions).__name__}"
            )
        partitions = dict(_as_partition(t, x, logits) for t, x in (log_partitions or {}).items())
        return cls(logits, indices=indices, classes=num_classes, log_partitions=partitions, tail=tail)

    def select_classes(self, classes) -> "SoftTargets":
        """The targets over some of the classes, renormalised: for a teacher whose vocabulary is padded or larger.

        Padding the student with zeros instead would give it mass on classes that do not exist.

        Args:
            classes: a number, for the first so many, or a tensor or array of class indices in the student's order.

        Raises:
            ValueError: more classes than there are; top-k targets, which must be selected before the top k are taken.

        Example:
            >>> import torch, pydistill
            >>> teacher = pydistill.SoftTargets.from_logits(torch.zeros(2, 32064))
            >>> teacher.select_classes(32000)
            SoftTargets(shape=(2, 32000), dtype=torch.float32)
        """
        if self.indices is not None:
            raise ValueError("select_classes: top-k targets have lost the other classes; select first, then take top_k")
        have = self.logits.shape[-1]
        if isinstance(classes, Integral):
            classes = _whole_number("classes", classes)
            if not 0 < classes <= have:
                raise ValueError(f"classes must be in [1, {have}], the number that the targets have; got {classes}")
            logits = self.logits[..., :classes]
        else:
            classes = _as_tensor(classes, "classes")
            if classes.dtype not in (torch.int64, torch.int32) or classes.dim() != 1:
                raise TypeError(
                    f"classes must be a number or a 1-D tensor of indices, got {classes.dtype} {classes.dim()}-D"
                )
            outside = (classes < 0) | (classes >= have)
            if outside.any() or len(classes.unique()) < len(classes) or not len(classes):
                rule = f"be in [0, {have})" if outside.any() else "be at least one, and none twice"
                raise ValueError(f"classes must {rule}; got {classes.tolist()[:20]}")
            logits = self.logits[..., classes]
        return type(self)(logits, zeros=self.has_zeros)

    @property
    def shape(self) -> torch.Size:
        """Shape of the targets, classes last; for a top-k teacher all classes count."""
        if self.indices is None:
            return self.logits.shape
        return torch.Size((*self.logits.shape[:-1], self._classes))

    def __len__(self) -> int:
        return len(self.logits)

    def __getitem__(self, rows) -> "SoftTargets":
        """The targets of some rows: an index, a slice, a mask, or a tensor or array of indices, as in torch."""
        return type(self)(
            self.logits[rows],
            indices=None if self.indices is None else self.indices[rows],
            classes=self._classes,
            log_partitions={t: x[rows] for t, x in self.log_partitions.items()},
            tail=self.tail,
            zeros=self.has_zeros,
        )

    def __repr__(self) -> str:
        top = "" if self.indices is None else f", k={self.logits.shape[-1]}, tail={self.tail!r}"
        return f"SoftTargets(shape={tuple(self.shape)}, dtype={self.logits.dtype}{top})"


def top_k(teacher_logits, k, temperatures=(1.0,), *, tail="renormalize") -> SoftTargets:
    """The k largest logits of each row as :class:`SoftTargets`: a teacher's output in k / C of its memory.

    Args:
        teacher_logits: ``(..., C)``, of any floating dtype.
        k: how many to keep, at most C.
        temperatures: those at which log-partitions are stored, for ``tail="bucket"``.
        tail: as in :meth:`SoftTargets.from_topk`.

    Example:
        >>> import torch, pydistill
        >>> teacher = pydistill.top_k(torch.randn(4, 1000), 16, temperatures=(1.0, 2.0), tail="bucket")
        >>> teacher, sorted(teacher.log_partitions)
        (SoftTargets(shape=(4, 1000), dtype=torch.float32, k=16, tail='bucket'), [1.0, 2.0])
        >>> student_logits = torch.randn(4, 1000, requires_grad=True)
        >>> pydistill.distillation_loss(student_logits, teacher, alpha=1.0, temperature=2.0).backward()
    """
    logits = _as_float_tensor(teacher_logits, "teacher_logits").detach()
    k = _whole_number("k", k)
    if not 0 < k <= logits.shape[-1]:
        raise ValueError(f"k must be a whole number in [1, {logits.shape[-1]}], the number of classes; got {k!r}")
    indices = logits.topk(k, dim=-1, sorted=False).indices.sort(-1).values
    values = logits.gather(-1, indices)  # in the order of the classes, which is the kernel's
    if isinstance(temperatures, Real | Tensor):
        raise TypeError(f"temperatures must be a sequence of numbers, such as (1.0, 2.0); got {temperatures!r}")
    partitions = {float(t): _log_partition(logits, t) for t in temperatures}
    if tail not in ("renormalize", "bucket"):
        raise ValueError(f'tail must be "renormalize" or "bucket", got {tail!r}')
    return SoftTargets(values, indices=indices, classes=logits.shape[-1], log_partitions=partitions, tail=tail)


def _log_partition(logits, temperature):
    """Log-sum-exp of logits / temperature in float64: what the top k lack of it may be little."""
    if not isinstance(temperature, Real) or isinstance(temperature, bool):
        raise TypeError(f"temperatures must be numbers, got {temperature!r}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperatures must be positive and finite, got {temperature!r}")
    rows = logits.reshape(-1, logits.shape[-1])
    step = max(1, (1 << 20) // rows.shape[-1])  # in float64, a few megabytes at a time
    parts = [(part.double() / temperature).logsumexp(-1) for part in rows.split(step)]
    return torch.cat(parts).reshape(logits.shape[:-1])


def _as_partition(temperature, values, logits):
    if not isinstance(temperature, Real) or isinstance(temperature, bool):
        raise TypeError(f"log_partitions must be keyed by temperatures, numbers; got {temperature!r}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"log_partitions must be keyed by temperatures > 0 and finite, got {temperature!r}")
    values = _as_tensor(values, "log_partitions")
    if not values.is_floating_point():
        raise TypeError(f"log_partitions must be floating-point, got dtype {values.dtype}")
    if values.shape != logits.shape[:-1]:
        raise ValueError(
            f"log_partitions must have the shape of logits without its last dimension, got {tuple(values.shape)} at "
            f"temperature {temperature:g} and logits {tuple(logits.shape)}"
        )
    values_dtype, values = values.dtype, values.detach().double()
    # Both may have been rounded, at the size of the logits: to the logits' dtype, or the log-partition to its own.
    kept = (logits.double() / temperature).logsumexp(-1)
    precision = max(torch.finfo(logits.dtype).eps, torch.finfo(values_dtype).eps)
    slack = 1e-3 + 2 * precision * (logits.double().abs().amax(-1) / temperature)
    below = (values < kept - slack).reshape(-1)
    if below.any():
        row = int(below.nonzero()[0])
        raise ValueError(
            f"log_partitions must be at least the log-sum-exp of the row's logits / temperature, a part of theirs; at "
            f"temperature {temperature:g} row {row} holds {float(values.reshape(-1)[row]):.6g}, less than "
            f"{float(kept.reshape(-1)[row]):.6g}"
        )
    return float(temperature), values


def _check_indices(indices, num_classes):
    rows = indices.reshape(-1, indices.shape[-1])
    if indices.shape[-1] > num_classes:
        raise ValueError(f"indices has {indices.shape[-1]} classes per row, of {num_classes} that there are")
    outside = ((rows < 0) | (rows >= num_classes)).any(-1)
    twice = (rows[:, 1:] == rows[:, :-1]).any(-1)
    if (outside | twice).any():
        row = int((outside | twice).nonzero()[0])
        rule = f"be in [0, {num_classes})" if outside[row] else "not repeat within a row"
        raise ValueError(f"indices must {rule}; row {row} holds {rows[row].tolist()}")


def _whole_number(name, value) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    return int(value)


def _as_tensor(values, name) -> Tensor:
    if isinstance(values, Tensor):
        return values
    try:
        return torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"{name} must be a tensor or an array of numbers, got {type(values).__name__}: {error}"
        ) from error


def _has_address(tensor) -> bool:
    try:
        tensor.data_ptr()
    except RuntimeError:  # inside a functorch transform
        return False
    return True


def _as_float_tensor(values, name) -> Tensor:
    tensor = _as_tensor(values, name)
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be floating-point, got dtype {tensor.dtype}")
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {tensor.layout}; pass {name}.to_dense()")
    if type(tensor) is Tensor and tensor.is_cpu and _has_address(tensor) and lost_storage(tensor):
        raise no_storage(name, tensor)
    if tensor.dim() == 0:
        raise ValueError(f"{name} must have the classes as its last dimension, got a scalar")
    return tensor


def _check_probs(probs):
    if probs.numel() == 0:
        return
    tolerance = _SUM_TOLERANCE.get(probs.dtype, 1e-3)
    rows = probs.reshape(-1, probs.shape[-1])
    sums = rows.sum(-1, dtype=torch.float64)
    bad = ~((sums - 1).abs() <= tolerance) | ~(rows >= 0).all(-1)
    if bad.any():
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"probs must be >= 0 and sum to 1 within {tolerance:g} in every row; row {row} sums to "
            f"{float(sums[row]):.6g} and its smallest entry is {float(rows[row].min()):.6g}. Are these logits? "
            "Then use SoftTargets.from_logits"
        )
