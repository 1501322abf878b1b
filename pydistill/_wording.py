"""Words for error messages: the form of a value, lists of classes, and the name of the data that an error is about."""

from contextlib import contextmanager
from types import BuiltinFunctionType, FunctionType

from torch import Tensor


def describe(value) -> str:
    """The form of a value, for messages: types, shapes and dtypes, never the numbers."""
    if type(value) in (tuple, list) and len(value) <= 8:
        return f"({', '.join(map(describe, value))})"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, FunctionType | BuiltinFunctionType):
        return f"the function {value.__name__}"
    shape = f" of shape {tuple(value.shape)} and dtype {value.dtype}" if isinstance(value, Tensor) else ""
    return type(value).__name__ + shape


def few(classes) -> str:
    """A list of classes for a message; of many the first ten."""
    return repr(classes) if len(classes) <= 10 else f"{str(classes[:10])[:-1]}, ...] ({len(classes)})"


@contextmanager
def about(name):
    """Prefixes errors with the name of the data: the loss and the student do not know whose batch it is."""
    try:
        yield
    except (TypeError, ValueError, IndexError, RuntimeError) as error:
        error.args = (f"{name}: {error}", *error.args[1:])
        raise
