"""What the trainer, the teachers and the report ask of a torch module."""

from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def mode(module, *, training):
    """Train or eval mode for a while; every submodule gets its own mode back, also one that was frozen."""
    before = [(m, m.training) for m in module.modules()]
    module.train(training)
    try:
        yield
    finally:
        for m, of_module in before:
            m.training = of_module


def float_dtype(module, default):
    """Of the module's first floating-point parameter, in which it wants its inputs."""
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), default)


def as_input(rows, dtype) -> Tensor:
    """A batch as a module takes it: a tensor, its floating-point numbers in ``dtype`` (None: as they are)."""
    tensor = rows if isinstance(rows, Tensor) else torch.tensor(rows)  # a copy: the array may not be writable
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def count_parameters(module) -> int:
    """How many numbers a module learns, tied ones once."""
    return sum(p.numel() for p in module.parameters())
