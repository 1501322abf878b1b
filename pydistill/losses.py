"""Losses as modules: they store the options and call the functions."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pydistill._arguments import check_flag
from pydistill.engine.options import Number, Reduction, Unlabeled, check_options
from pydistill.formulas import DivergenceName
from pydistill.functional import LossMetrics, distillation_loss
from pydistill.linear import LinearTeacher, check_head_options, linear_distillation_loss
from pydistill.targets import SoftTargets

_PER_CALL = ("student_bias",)
_TENSORS = ("sample_weight", "class_weight")


class _Loss(torch.nn.Module):
    """Stores a loss function's keyword arguments. ``_defaults`` are that function's defaults."""

    _defaults: dict[str, Any]

    if TYPE_CHECKING:  # every option is an attribute that may be set; torch.nn.Module takes tensors and modules only

        def __getattr__(self, name: str) -> Any: ...
        def __setattr__(self, name: str, value: Any) -> None: ...

    def _store(self, arguments: dict[str, Any]) -> None:
        options = {name: value for name, value in arguments.items() if name in self._defaults}
        check_options(options)
        for name in ("inplace", "return_metrics"):
            check_flag(name, options.get(name, False))
        for name, value in options.items():
            if name in _TENSORS and value is not None and not isinstance(value, Tensor):
                raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
            if name in _TENSORS or isinstance(value, Tensor):
                self.register_buffer(name, value, persistent=False)
            else:
                setattr(self, name, value)

    def _stored(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._defaults if name not in _PER_CALL}

    def extra_repr(self) -> str:
        """List the options that differ from their defaults."""
        defaults = self._defaults
        return ", ".join(f"{k}={v!r}" for k, v in self._stored().items() if isinstance(v, Tensor) or v != defaults[k])


class DistillationLoss(_Loss):
    """:func:`pydistill.distillation_loss` with its options stored; the options are its keyword arguments.

    ``alpha``, ``temperature`` and every other option is an attribute that may be changed between calls, for instance
    by a schedule. ``class_weight``, a tensor, is a buffer: ``.to()`` moves it, ``state_dict()`` leaves it out.
    Options that belong to one batch (sample_weight, num_items, ...) can also be given to the call.

    Shapes: ``forward(student_logits, teacher, labels=None)`` takes student_logits ``(..., C)``, a teacher
    ``(..., C)`` or :class:`SoftTargets`, and labels ``(...)``.

    Raises:
        ValueError, TypeError: an option outside its range, at construction.

    Example:
        >>> import torch, pydistill
        >>> criterion = pydistill.DistillationLoss(temperature=4.0, alpha=0.7)
        >>> student_logits = torch.randn(8, 10, requires_grad=True)
        >>> loss = criterion(student_logits, torch.randn(8, 10), torch.randint(10, (8,)))
        >>> loss.backward()
        >>> criterion
        DistillationLoss(temperature=4.0, alpha=0.7)
    """

    _defaults = distillation_loss.__kwdefaults__ or {}

    def __init__(
        self,
        *,
        divergence: DivergenceName = "forward_kl",
        beta: float | None = None,
        temperature: Number = 1.0,
        alpha: Number = 0.5,
        t_squared: bool = True,
        ignore_index: int = -100,
        unlabeled: Unlabeled = "skip",
        sample_weight: Tensor | None = None,
        class_weight: Tensor | None = None,
        label_smoothing: float = 0.0,
        reduction: Reduction = "mean",
        num_items: Number | tuple[Number, Number] | None = None,
        inplace: bool = False,
        return_metrics: bool = False,
    ) -> None:
        super().__init__()
        self._store(locals())

    def forward(
        self,
        student_logits: Tensor,
        teacher: Tensor | SoftTargets | None = None,
        labels: Tensor | None = None,
        **options: Any,
    ) -> Tensor | tuple[Tensor, LossMetrics]:
        """Compute the loss of one batch; ``options`` override the stored ones for this call."""
        given = self._stored() | options
        loss: Tensor | tuple[Tensor, LossMetrics] = distillation_loss(student_logits, teacher, labels, **given)
        return loss


class LinearDistillationLoss(_Loss):
    """:func:`pydistill.linear_distillation_loss` with its options stored; the options are its keyword arguments.

    Shapes: ``forward(student_hidden, student_weight, teacher, labels=None, *, student_bias=None)`` takes
    student_hidden ``(..., H)``, student_weight ``(C, H)``, a teacher (:class:`LinearTeacher`, logits or
    :class:`SoftTargets`), and labels ``(...)``. The head's weight and bias are
    not stored here. Options of one batch (sample_weight, num_items, ...) can also be given to the call.

    Raises:
        ValueError, TypeError: an option outside its range, at construction.

    Example:
        >>> import torch, pydistill
        >>> criterion = pydistill.LinearDistillationLoss(temperature=2.0, alpha=0.7)
        >>> head = torch.nn.Linear(16, 1000)
        >>> teacher = pydistill.top_k(torch.randn(8, 1000), 10)
        >>> loss = criterion(torch.randn(8, 16), head.weight, teacher, torch.arange(8), student_bias=head.bias)
        >>> loss.backward()
        >>> criterion
        LinearDistillationLoss(temperature=2.0, alpha=0.7)
    """

    _defaults = linear_distillation_loss.__kwdefaults__ or {}

    def __init__(
        self,
        *,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        chunk_rows: int | None = None,
        divergence: DivergenceName = "forward_kl",
        beta: float | None = None,
        temperature: Number = 1.0,
        alpha: Number = 0.5,
        t_squared: bool = True,
        ignore_index: int = -100,
        unlabeled: Unlabeled = "skip",
        sample_weight: Tensor | None = None,
        class_weight: Tensor | None = None,
        label_smoothing: float = 0.0,
        reduction: Reduction = "mean",
        num_items: Number | tuple[Number, Number] | None = None,
        return_metrics: bool = False,
    ) -> None:
        super().__init__()
        check_head_options(softcap, logit_scale, chunk_rows)
        self._store(locals())

    def forward(
        self,
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher: Tensor | SoftTargets | LinearTeacher | None = None,
        labels: Tensor | None = None,
        *,
        student_bias: Tensor | None = None,
        **options: Any,
    ) -> Tensor | tuple[Tensor, LossMetrics]:
        """Compute the loss of one batch; ``options`` override the stored ones for this call."""
        given = self._stored() | options
        loss: Tensor | tuple[Tensor, LossMetrics] = linear_distillation_loss(
            student_hidden, student_weight, teacher, labels, student_bias=student_bias, **given
        )
        return loss
