"""The forms in which a teacher can be given."""

import torch
from torch import Tensor

_SUM_TOLERANCE = {torch.float16: 1e-2, torch.bfloat16: 1e-2}


class SoftTargets:
    """A teacher's outputs, ready for :func:`pydistill.distillation_loss`, in any of the forms teachers give them.

    Make one with :meth:`from_logits`, :meth:`from_probs` or :meth:`from_log_probs`. All of them end as logits, since
    the softmax of ``log(p) / T`` is ``p**(1/T)`` renormalised: the teacher's distribution at temperature T.
    A probability of exactly 0 becomes a logit of -inf.

    Attributes:
        logits: tensor ``(..., C)``; detached.

    Example:
        >>> import torch, pydistill
        >>> probs = torch.tensor([[0.7, 0.3, 0.0], [0.2, 0.2, 0.6]])  # a forest's predict_proba
        >>> teacher = pydistill.SoftTargets.from_probs(probs)
        >>> student_logits = torch.zeros(2, 3)
        >>> loss = pydistill.distillation_loss(student_logits, teacher, alpha=1.0, temperature=2.0)
        >>> bool(loss > 0), teacher
        (True, SoftTargets(shape=(2, 3), dtype=torch.float32))
    """

    __slots__ = ("logits",)

    def __init__(self, logits):
        """Use one of the ``from_*`` constructors."""
        self.logits = logits

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
        if validate:
            _check_probs(probs)
        wide = probs if probs.dtype in (torch.float32, torch.float64) else probs.float()
        return cls(wide.log())

    @classmethod
    def from_log_probs(cls, log_probs) -> "SoftTargets":
        """From log-probabilities ``(..., C)``, as ``log_softmax`` or ``predict_log_proba`` give them; -inf is allowed.

        A constant added to a row changes nothing: the rows are normalised at the temperature in use.

        Raises:
            TypeError: not a floating-point tensor or array.
            ValueError: a scalar, which has no class dimension.
        """
        return cls(_as_float_tensor(log_probs, "log_probs").detach())

    @property
    def shape(self) -> torch.Size:
        """Shape of the logits, classes last."""
        return self.logits.shape

    def __len__(self) -> int:
        return len(self.logits)

    def __getitem__(self, rows) -> "SoftTargets":
        """The targets of some rows: an index, a slice, a mask, or a tensor or array of indices, as in torch."""
        return type(self)(self.logits[rows])

    def __repr__(self) -> str:
        return f"SoftTargets(shape={tuple(self.logits.shape)}, dtype={self.logits.dtype})"


def _as_float_tensor(values, name) -> Tensor:
    tensor = values if isinstance(values, Tensor) else torch.as_tensor(values)
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be floating-point, got dtype {tensor.dtype}")
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
