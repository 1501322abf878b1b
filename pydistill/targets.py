"""Soft targets: a teacher's outputs in each form that the loss accepts."""

import math
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, Literal, Self, SupportsIndex, TypeAlias, get_args

import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from pydistill._arguments import check_flag, check_integer, lost_storage, no_storage

Tail: TypeAlias = Literal["renormalize", "bucket"]
# The indices that a tensor accepts: a row, a slice, a mask, row numbers, or a tuple of them for several dimensions.
RowIndex: TypeAlias = SupportsIndex | slice | Tensor | NDArray[Any] | Sequence[int] | tuple[Any, ...]

SUM_TOLERANCE = 1e-3  # for the sum of a row of probabilities; sums_to_one in csrc/evaluate.cpp has the same limits
_HALF_SUM_TOLERANCE = 1e-2  # the same for half types
PROBABILITIES_TAKEN_AS_LOGITS = (
    "teacher looks like probabilities (its first row is >= 0 and sums to 1), but a plain tensor is taken as logits. "
    "Use pydistill.SoftTargets.from_probs(probabilities), or remove the softmax from the teacher"
)


class SoftTargets:
    """A teacher's outputs for :func:`pydistill.distillation_loss`: logits, probabilities, or the k largest logits.

    Use :meth:`from_logits`, :meth:`from_probs`, :meth:`from_log_probs`, :meth:`from_topk` or :func:`pydistill.top_k`
    to make one. Every form is stored as logits: the softmax of ``log(p) / T`` is ``p**(1/T)``, renormalised, which is
    the teacher's distribution at temperature T. A probability of exactly 0 becomes a logit of -inf.

    Attributes:
        logits: tensor ``(..., C)``, or ``(..., k)`` for top-k targets; detached.
        indices: the classes of the k logits, int64 ``(..., k)``; None unless the targets are top-k targets.
        log_partitions: ``{temperature: log-sum-exp of all the logits / temperature}``, float64 ``(...)``.
        tail: how top-k targets treat the classes outside the k, "renormalize" or "bucket"; else None.
        has_zeros: True if the targets were given as (log-)probabilities and some probability is exactly 0.

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

    logits: Tensor
    indices: Tensor | None
    log_partitions: dict[float, Tensor]
    tail: Tail | None
    has_zeros: bool
    _classes: int | None

    def __init__(
        self,
        logits: Tensor,
        *,
        indices: Tensor | None = None,
        classes: int | None = None,
        log_partitions: dict[float, Tensor] | None = None,
        tail: Tail | None = None,
        zeros: bool = False,
    ) -> None:
        """Use one of the ``from_*`` constructors."""
        self.logits, self.indices, self.log_partitions, self.tail = logits, indices, log_partitions or {}, tail
        self._classes, self.has_zeros = classes, zeros

    @classmethod
    def from_logits(cls, logits: Tensor | ArrayLike) -> Self:
        """Make targets from logits ``(..., C)`` of any floating-point dtype. They are not copied.

        Raises:
            TypeError: if ``logits`` is not a floating-point tensor or array.
            ValueError: if ``logits`` is a scalar, which has no class dimension.
        """
        return cls(_as_float_tensor(logits, "logits").detach())

    @classmethod
    def from_probs(cls, probs: Tensor | ArrayLike, validate: bool = True) -> Self:
        """Make targets from probabilities ``(..., C)``, such as scikit-learn's ``predict_proba``. Zeros are allowed.

        Args:
            probs: tensor or array. Log-probabilities are stored: one new buffer of its size, in float32 for half types.
            validate: check once, here, that every entry is >= 0 and that every row sums to 1 within 1e-3 (1e-2 for half
                types). Turn this off only for data that have been checked already.

        Raises:
            ValueError: if a row has a negative entry or a wrong sum; the message names the row and its sum.
            TypeError: if ``probs`` is not a floating-point tensor or array.
        """
        probs = _as_float_tensor(probs, "probs").detach()
        if check_flag("validate", validate):
            _check_probs(probs)
        wide = probs if probs.dtype in (torch.float32, torch.float64) else probs.float()
        return cls(wide.log(), zeros=bool((wide == 0).any()))

    @classmethod
    def from_log_probs(cls, log_probs: Tensor | ArrayLike) -> Self:
        """Make targets from log-probabilities ``(..., C)``, such as ``predict_log_proba``. Entries may be -inf.

        Adding a constant to a row changes nothing, because the rows are normalised at the temperature of the loss. The
        exception is mse, which compares the student's logits with these numbers as they are.

        Raises:
            TypeError: if ``log_probs`` is not a floating-point tensor or array.
            ValueError: if ``log_probs`` is a scalar, which has no class dimension.
        """
        log_probs = _as_float_tensor(log_probs, "log_probs").detach()
        return cls(log_probs, zeros=bool((log_probs == -math.inf).any()))

    @classmethod
    def from_topk(
        cls,
        indices: Tensor | ArrayLike,
        logits: Tensor | ArrayLike,
        num_classes: int,
        *,
        log_partitions: Mapping[float, Tensor | ArrayLike] | None = None,
        tail: Tail = "renormalize",
    ) -> Self:
        """Make targets from the k largest logits of each row, as in a cache of a language model's outputs.

        Args:
            indices: the classes, int64 or int32 ``(..., k)``, in any order, each at most once in a row.
            logits: the logits of these classes ``(..., k)``, of any floating-point dtype.
            num_classes: C, the number of all classes.
            log_partitions: ``{temperature: tensor (...)}``, the log-sum-exp of *all* the logits / temperature.
            tail: how the classes outside the k are treated. "renormalize": they have probability 0, and the k classes
                are the teacher's whole distribution. "bucket": they form one more outcome, which holds the remaining
                probability, for teacher and student; this needs the log-partition at the temperature of the loss.

        Raises:
            ValueError: if shapes disagree, a class is outside [0, C) or occurs twice in a row, ``tail`` is unknown, or
                a log-partition is less than the log-sum-exp of the row's k logits.
            TypeError: if ``indices`` or ``num_classes`` are not integers, or ``logits`` are not floating-point numbers.
        """
        logits = _as_float_tensor(logits, "logits").detach()
        num_classes = check_integer("num_classes", num_classes)
        indices = _as_tensor(indices, "indices")
        if indices.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"indices must be int64 or int32, got {indices.dtype}")
        if indices.shape != logits.shape or not logits.shape[-1]:
            raise ValueError(
                f"indices and logits must have one shape (..., k) with k >= 1, got indices {tuple(indices.shape)} and "
                f"logits {tuple(logits.shape)}"
            )
        check_tail(tail)
        if indices.device != logits.device:
            raise ValueError(f"indices and logits must be on one device, got {indices.device} and {logits.device}")
        indices, order = indices.long().sort(-1)  # the kernels need ascending classes
        logits = logits.gather(-1, order)
        _check_indices(indices, num_classes)
        if log_partitions is not None and not isinstance(log_partitions, Mapping):
            raise TypeError(
                "log_partitions must be a dict {temperature: tensor of log-partitions}, got "
                f"{type(log_partitions).__name__}"
            )
        partitions = dict(_as_partition(t, x, logits) for t, x in (log_partitions or {}).items())
        return cls(logits, indices=indices, classes=num_classes, log_partitions=partitions, tail=tail)

    def select_classes(self, classes: int | Tensor | ArrayLike) -> Self:
        """Keep some of the classes and renormalise, for a teacher whose vocabulary is padded or larger.

        Padding the student with zeros instead would give probability to classes that do not exist.

        Args:
            classes: a number n, which keeps the first n classes, or a 1-D tensor or array of class indices in the
                student's order.

        Raises:
            ValueError: if there are fewer classes, a class is given twice, or the targets are top-k targets, whose
                other classes are lost: select the classes before taking the top k.
            TypeError: if ``classes`` is neither an integer nor a 1-D tensor or array of integers.

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
            count = check_integer("classes", classes)
            if not 0 < count <= have:
                raise ValueError(f"classes must be in [1, {have}], since the targets have {have} classes; got {count}")
            return type(self)(self.logits[..., :count], zeros=self.has_zeros)
        form = "an integer, or a 1-D tensor or array of class indices"
        chosen = _as_tensor(classes, "classes", form)
        if chosen.dtype not in (torch.int64, torch.int32) or chosen.dim() != 1:
            raise TypeError(f"classes must be {form}; got {chosen.dtype} {chosen.dim()}-D")
        outside = (chosen < 0) | (chosen >= have)
        if outside.any() or len(set(chosen.tolist())) < len(chosen) or not len(chosen):
            rule = f"be in [0, {have})" if outside.any() else "hold at least one class, and none twice"
            raise ValueError(f"classes must {rule}; got {reprlib.repr(chosen.tolist())}")
        return type(self)(self.logits[..., chosen], zeros=self.has_zeros)

    @property
    def shape(self) -> torch.Size:
        """Shape of the targets, classes last; top-k targets count all C classes, not k."""
        return self.logits.shape if self._classes is None else torch.Size((*self.logits.shape[:-1], self._classes))

    def __len__(self) -> int:
        return len(self.logits)

    def __getitem__(self, rows: RowIndex) -> Self:
        """Select rows by an index, a slice, a mask, or a tensor or array of indices, as in torch."""
        index: Any = rows  # torch takes arrays as indices; its annotations lack them
        return type(self)(
            self.logits[index],
            indices=None if self.indices is None else self.indices[index],
            classes=self._classes,
            log_partitions={t: x[index] for t, x in self.log_partitions.items()},
            tail=self.tail,
            zeros=self.has_zeros,
        )

    def __repr__(self) -> str:
        top = "" if self.indices is None else f", k={self.logits.shape[-1]}, tail={self.tail!r}"
        return f"SoftTargets(shape={tuple(self.shape)}, dtype={self.logits.dtype}{top})"


def top_k(
    teacher_logits: Tensor | ArrayLike,
    k: int,
    temperatures: Iterable[float] = (1.0,),
    *,
    tail: Tail = "renormalize",
) -> SoftTargets:
    """Keep the k largest logits of each row as :class:`SoftTargets`, in k / C of the memory of all logits.

    Args:
        teacher_logits: ``(..., C)``, of any floating-point dtype.
        k: how many logits of each row to keep, at most C.
        temperatures: the temperatures at which log-partitions are stored, for ``tail="bucket"``.
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
    k = check_integer("k", k)
    if not 0 < k <= logits.shape[-1]:
        raise ValueError(f"k must be an integer in [1, {logits.shape[-1]}], the number of classes; got {k!r}")
    indices = logits.topk(k, dim=-1, sorted=False).indices.sort(-1).values  # the kernels need ascending classes
    values = logits.gather(-1, indices)
    if isinstance(temperatures, Real | Tensor):
        raise TypeError(f"temperatures must be a sequence of numbers, such as (1.0, 2.0); got {temperatures!r}")
    partitions = {float(t): _log_partition(logits, t) for t in temperatures}
    check_tail(tail)
    return SoftTargets(values, indices=indices, classes=logits.shape[-1], log_partitions=partitions, tail=tail)


def check_tail(tail: str) -> None:
    """Check the treatment of the classes outside a teacher's top k."""
    if tail not in get_args(Tail):
        raise ValueError(f'tail must be "renormalize" or "bucket", got {tail!r}')


def looks_like_probabilities(logits: Tensor) -> bool:
    """Return whether a tensor ``(..., C)``, which is taken as logits, probably holds probabilities.

    This is assumed if its first row is >= 0 and sums to 1 within ``SUM_TOLERANCE``. The logit of a single class may
    well be 1, so C = 1 never looks like probabilities.
    """
    if logits.numel() == 0 or logits.shape[-1] == 1:
        return False
    row = logits.reshape(-1, logits.shape[-1])[0]
    total = float(row.sum(dtype=torch.float64))
    return bool((row >= 0).all()) and 1 - SUM_TOLERANCE <= total <= 1 + SUM_TOLERANCE


def _log_partition(logits: Tensor, temperature: object) -> Tensor:
    """Compute the log-sum-exp of logits / temperature, in float64, because the mass outside the top k may be tiny."""
    if not isinstance(temperature, Real) or isinstance(temperature, bool):
        raise TypeError(f"temperatures must be numbers, got {temperature!r}")
    value = float(temperature)
    if not 0 < value < math.inf:
        raise ValueError(f"temperatures must be positive and finite, got {temperature!r}")
    rows = logits.reshape(-1, logits.shape[-1])
    step = max(1, (1 << 20) // rows.shape[-1])  # a float64 copy of a few megabytes at a time
    parts = [(part.double() / value).logsumexp(-1) for part in torch.split(rows, step)]
    return torch.cat(parts).reshape(logits.shape[:-1])


def _as_partition(temperature: object, values: Tensor | ArrayLike, logits: Tensor) -> tuple[float, Tensor]:
    """Convert a temperature to float and its log-partitions to float64; check them against the top-k logits."""
    if not isinstance(temperature, Real) or isinstance(temperature, bool):
        raise TypeError(f"log_partitions must have temperatures, which are numbers, as keys; got {temperature!r}")
    key = float(temperature)
    if not 0 < key < math.inf:
        raise ValueError(f"log_partitions must have temperatures > 0 and finite as keys, got {temperature!r}")
    given = _as_tensor(values, "log_partitions")
    if not given.is_floating_point():
        raise TypeError(f"log_partitions must be floating-point, got dtype {given.dtype}")
    if given.shape != logits.shape[:-1]:
        raise ValueError(
            f"log_partitions must have the shape of logits without its last dimension, got {tuple(given.shape)} at "
            f"temperature {key:g} and logits {tuple(logits.shape)}"
        )
    partitions = given.detach().double()
    # Logits and log-partitions may have been rounded to different dtypes; both are about as large as the largest logit.
    kept = (logits.double() / key).logsumexp(-1)
    precision = max(torch.finfo(logits.dtype).eps, torch.finfo(given.dtype).eps)
    slack = 1e-3 + 2 * precision * (logits.double().abs().amax(-1) / key)
    below = (partitions < kept - slack).reshape(-1)
    if below.any():
        row = int(below.nonzero()[0])
        raise ValueError(
            "log_partitions must be at least the log-sum-exp of the row's k logits / temperature, since these logits "
            f"are some of all; at temperature {key:g} row {row} holds {float(partitions.reshape(-1)[row]):.6g}, which "
            f"is less than {float(kept.reshape(-1)[row]):.6g}"
        )
    return key, partitions


def _check_indices(indices: Tensor, num_classes: int) -> None:
    rows = indices.reshape(-1, indices.shape[-1])
    if indices.shape[-1] > num_classes:
        raise ValueError(
            f"indices must have at most num_classes = {num_classes} classes per row, got {indices.shape[-1]}"
        )
    outside = ((rows < 0) | (rows >= num_classes)).any(-1)
    twice = (rows[:, 1:] == rows[:, :-1]).any(-1)
    if (outside | twice).any():
        row = int((outside | twice).nonzero()[0])
        rule = f"be in [0, {num_classes})" if outside[row] else "not repeat within a row"
        raise ValueError(f"indices must {rule}; row {row} holds {rows[row].tolist()}")


def _as_tensor(values: Tensor | ArrayLike, name: str, form: str = "a tensor or an array of numbers") -> Tensor:
    if isinstance(values, Tensor):
        return values
    try:
        return torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be {form}; got {reprlib.repr(values)}: {error}") from error


def _as_float_tensor(values: Tensor | ArrayLike, name: str) -> Tensor:
    """Convert values to a tensor; check that it is dense and floating-point and has a class dimension."""
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


def _has_address(tensor: Tensor) -> bool:
    try:
        tensor.data_ptr()
    except RuntimeError:  # inside a functorch transform
        return False
    return True


def _check_probs(probs: Tensor) -> None:
    if probs.numel() == 0:
        return
    tolerance = _HALF_SUM_TOLERANCE if probs.dtype in (torch.float16, torch.bfloat16) else SUM_TOLERANCE
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
