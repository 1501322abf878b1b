"""Losses as modules: they store the options and call the functions."""

import torch
from torch import Tensor

from pydistill.engine.checks import check_flags, check_options
from pydistill.functional import distillation_loss
from pydistill.linear import check_head_options, linear_distillation_loss


class _Loss(torch.nn.Module):
    """A loss function's keyword arguments, stored. ``_function`` is the function."""

    def _store(self, options):
        super().__init__()
        check_options(*(options[name] for name in _CHECKED))
        check_flags(options.get("inplace", False), options["return_metrics"])
        for name, value in options.items():
            if name in _TENSORS and value is not None and not isinstance(value, Tensor):
                raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
            if name in _TENSORS or isinstance(value, Tensor):
                self.register_buffer(name, value, persistent=False)
            else:
                setattr(self, name, value)

    def _stored(self):
        return {name: getattr(self, name) for name in self._function.__kwdefaults__ if name not in _PER_CALL}

    def extra_repr(self) -> str:
        """The options that differ from their defaults."""
        defaults = self._function.__kwdefaults__
        return ", ".join(f"{k}={v!r}" for k, v in self._stored().items() if isinstance(v, Tensor) or v != defaults[k])


class DistillationLoss(_Loss):
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
        self._store({name: value for name, value in locals().items() if name in distillation_loss.__kwdefaults__})

    _function = staticmethod(distillation_loss)

    def forward(self, student_logits, teacher=None, labels=None, **options):
        """The loss of one batch; ``options`` override the stored ones for this call."""
        return distillation_loss(student_logits, teacher, labels, **(self._stored() | options))


class LinearDistillationLoss(_Loss):
    """:func:`pydistill.linear_distillation_loss` with its options stored; the options are its keyword arguments.

    Shapes: ``forward(student_hidden, student_weight, teacher, labels=None, *, student_bias=None)`` takes ``(..., H)``,
    ``(C, H)``, a :class:`LinearTeacher`, logits or :class:`SoftTargets`, and ``(...)``. The head's weight and bias stay
    the model's. Options of one batch (sample_weight, num_items, ...) can also be given to the call.

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

    def __init__(
        self,
        *,
        softcap=None,
        logit_scale=1.0,
        chunk_rows=None,
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
        return_metrics=False,
    ):
        check_head_options(softcap, logit_scale, chunk_rows)
        names = linear_distillation_loss.__kwdefaults__
        self._store({name: value for name, value in locals().items() if name in names})

    _function = staticmethod(linear_distillation_loss)

    def forward(self, student_hidden, student_weight, teacher=None, labels=None, *, student_bias=None, **options):
        """The loss of one batch; ``options`` override the stored ones for this call."""
        options = self._stored() | options
        return linear_distillation_loss(
            student_hidden, student_weight, teacher, labels, student_bias=student_bias, **options
        )


_PER_CALL = ("student_bias",)
_TENSORS = ("sample_weight", "class_weight")
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
