"""Checks that arguments of several public functions share."""

import sys
import warnings
from numbers import Integral


def check_count(name, value) -> int:
    """A whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return int(value)


def check_flag(name, value) -> bool:
    """True or False, and nothing that merely counts as one of them."""
    if value is not True and value is not False:
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


def lost_storage(tensor) -> bool:
    """Whether a plain tensor with elements has no memory."""
    return tensor.data_ptr() == 0 and tensor.numel() > 0


def no_storage(name, tensor):
    """The error for a tensor whose storage was freed."""
    name = "student_logits" if name == "student" else name
    return ValueError(
        f"{name} must have memory; its shape is {tuple(tensor.shape)}, but its storage was freed (resized to 0). Is it "
        "a parameter that FSDP has resharded?"
    )


def warn_caller(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn with the line that called the package, however many functions of the package and of torch.nn lie between."""
    level, frame = 2, sys._getframe(1)  # level 1 is this function
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(("pydistill", "torch.nn")):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)
