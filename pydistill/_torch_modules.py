"""Operations on torch modules: mode, dtype of the inputs, number of parameters."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

_Default = TypeVar("_Default")


@contextmanager
def mode(module: nn.Module, *, training: bool) -> Iterator[None]:
    """Put a module into train or eval mode, and afterwards each of its submodules back into the mode that it had."""
    before = [(m, m.training) for m in module.modules()]
    module.train(training)
    try:
        yield
    finally:
        for m, was_training in before:
            m.training = was_training


def float_dtype(module: nn.Module, default: _Default) -> torch.dtype | _Default:
    """Return the dtype of the module's first floating-point parameter, or ``default`` if it has none."""
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), default)


def as_input(rows: Any, dtype: torch.dtype | None) -> Tensor:
    """Convert a batch to a tensor; floating-point numbers become ``dtype``, unless it is None."""
    tensor = rows if isinstance(rows, Tensor) else torch.tensor(rows)  # a copy: the array may not be writable
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def count_parameters(module: nn.Module) -> int:
    """Count the elements of all parameters; shared parameters count once."""
    return sum(p.numel() for p in module.parameters())
