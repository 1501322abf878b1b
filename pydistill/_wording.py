"""Parts of error messages: descriptions of values, lists of classes, and the name of the data."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import BuiltinFunctionType, FunctionType
from typing import Any

from torch import Tensor


def describe(value: object) -> str:
    """Describe a value for a message by its type, and a tensor also by its shape and dtype; never by its numbers."""
    if (type(value) is tuple or type(value) is list) and len(value) <= 8:
        return f"({', '.join(map(describe, value))})"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, FunctionType | BuiltinFunctionType):
        return f"the function {value.__name__}"
    shape = f" of shape {tuple(value.shape)} and dtype {value.dtype}" if isinstance(value, Tensor) else ""
    return type(value).__name__ + shape


def few(classes: Sequence[Any]) -> str:
    """Format a list of classes for a message: all of them, or the first ten and their number."""
    return repr(classes) if len(classes) <= 10 else f"{str(classes[:10])[:-1]}, ...] ({len(classes)})"


@contextmanager
def about(name: str) -> Iterator[None]:
    """Prefix the errors that are raised inside with a name, such as that of the data to which a batch belongs."""
    try:
        yield
    except (TypeError, ValueError, IndexError, RuntimeError) as error:
        error.args = (f"{name}: {error}", *error.args[1:])
        raise
