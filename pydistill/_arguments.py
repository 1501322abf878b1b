"""Checks of arguments that several public functions share."""

import sys
import warnings
from numbers import Integral

from torch import Tensor


def check_integer(name: str, value: object) -> int:
    """Check that a value is an integer, of Python or of numpy, and return it as int; bool is refused."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    return int(value)


def check_count(name: str, value: object) -> int:
    """Check that a value is an integer of at least 1, and return it as int."""
    count = check_integer(name, value)
    if count < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return count


def check_flag(name: str, value: object) -> bool:
    """Check that a value is True or False, and return it; 0, 1 and other equal values are refused."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


def lost_storage(tensor: Tensor) -> bool:
    """Return whether the storage of a tensor with elements was freed."""
    return tensor.data_ptr() == 0 and tensor.numel() > 0


def no_storage(name: str, tensor: Tensor) -> ValueError:
    """Return the error for a tensor whose storage was freed."""
    name = "student_logits" if name == "student" else name
    return ValueError(
        f"{name} must have memory; its shape is {tuple(tensor.shape)}, but its storage was freed (resized to 0). Is it "
        "a parameter that FSDP has resharded?"
    )


def warn_caller(message: str, category: type[Warning] = UserWarning) -> None:
    """Give a warning that shows the line which called the package, through any number of its and torch's functions."""
    level, frame = 2, sys._getframe(1)  # level 1 is this function
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(("pydistill.", "torch.")):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)
