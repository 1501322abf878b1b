"""Losses as modules: they store the options and call the functions."""

import torch
from torch import Tensor

from pydistill.engine.checks import check_options
from pydistill.functional import distillation_loss


class DistillationLoss(torch.nn.Module):
    """:func:`pydistill.distillation_loss` with its options stored; the options are its keyword arguments.

    ``alpha``, ``temperature`` and every other option is an attribute that may be changed between calls, for instance
    by a schedule. ``class_weight``, a tensor, is a buffer: ``.to()`` moves it, ``state_dict()`` leaves it out.
    Options that belong to one batch (sample_weight, num_items, ...) can also be given to the call.

    Shapes: ``forward(student_logits, teacher, labels=None)`` takes ``(..., C)``, ``(..., C)`` or
    :class:`SoftTargets`, and ``(...)``.

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

    def __init__(
        self,
        *,
        divergence="forward_kl",
        beta=None,
        temperature=1.0,
        alpha=0.5,
        t_squared=True,
        ignore_index=-100,
        unlabeled="skip",
        sample_weight=None,
        class_weight=None,
        label_smoothing=0.0,
        reduction="mean",
        num_items=None,
        inplace=False,
        return_metrics=False,
    ):
        super().__init__()
        options = {name: value for name, value in locals().items() if name in _DEFAULTS}
        check_options(*(options[name] for name in _CHECKED))
        for name, value in options.items():
            if name in _WEIGHTS and value is not None and not isinstance(value, Tensor):
                raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
            if name in _WEIGHTS or isinstance(value, Tensor):
                self.register_buffer(name, value, persistent=False)
            else:
                setattr(self, name, value)

    def forward(self, student_logits, teacher=None, labels=None, **options):
        """The loss of one batch; ``options`` override the stored ones for this call."""
        stored = {name: getattr(self, name) for name in _DEFAULTS}
        return distillation_loss(student_logits, teacher, labels, **(stored | options))

    def extra_repr(self) -> str:
        """The options that differ from their defaults."""
        shown = {name: getattr(self, name) for name in _DEFAULTS}
        return ", ".join(f"{k}={v!r}" for k, v in shown.items() if isinstance(v, Tensor) or v != _DEFAULTS[k])


_DEFAULTS = distillation_loss.__kwdefaults__
_WEIGHTS = ("sample_weight", "class_weight")
_CHECKED = (
    "divergence",
    "beta",
    "temperature",
    "alpha",
    "t_squared",
    "ignore_index",
    "unlabeled",
    "label_smoothing",
    "reduction",
    "num_items",
)
