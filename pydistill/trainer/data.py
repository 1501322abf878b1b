"""The Trainer's data in batches: tensors and arrays in memory, a Dataset, or an iterable of batches."""

import math

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, TensorDataset, default_collate

from pydistill._wording import describe
from pydistill.store import TeacherStore
from pydistill.targets import SoftTargets


def prepare(name, data, dtype):
    """Arrays as tensors, floating-point ones of the inputs in the student's ``dtype``; checked where it can be."""
    if isinstance(data, TensorDataset):
        data = tuple(data.tensors)
    if in_memory(data):
        data = tuple(_as_tensor(column) for column in data)
        _check_columns(name, data)
        inputs = data[0]
        if isinstance(inputs, Tensor) and inputs.is_floating_point():
            if inputs.dtype is torch.float64:  # what numpy makes of everything
                inputs = inputs.to(dtype)
            _check_finite(name, inputs)
        return (inputs, *data[1:])
    rows_alone = isinstance(data, Tensor | SoftTargets | np.ndarray) or hasattr(data, "to_numpy")
    if rows_alone or not (is_map(data) or hasattr(data, "__iter__")):
        raise TypeError(
            f"{name} must be a tuple of tensors or arrays such as (inputs, targets, labels), a Dataset, or an iterable "
            f"of such batches; got {describe(data)}{_hint(data)}"
        )
    if is_map(data) and len(data) == 0:
        raise ValueError(f"{name} must hold at least one row, got an empty {type(data).__name__}")
    return data


def row_count(data) -> int | None:
    """Rows of data whose rows can be chosen; None for an iterable, which brings its own batches."""
    if in_memory(data):
        return len(data[0])
    return len(data) if is_map(data) else None


def batches(data, batch_size, *, shuffle):
    """``(rows, columns)`` of each batch; ``rows`` is None where an iterable decides."""
    count = row_count(data)
    if count is None:
        for columns in data:
            yield None, columns
    elif shuffle:
        for rows in torch.randperm(count).split(batch_size):
            yield rows, _take(data, rows)
    else:
        for start in range(0, count, batch_size):
            rows = slice(start, min(start + batch_size, count))
            yield rows, _take(data, rows)


def batch_count(data, batch_size) -> int | None:
    """How many batches an epoch has, where that is known."""
    count = row_count(data)
    if count is not None:
        return math.ceil(count / batch_size)
    try:
        return len(data)
    except TypeError:  # an iterator, or a DataLoader over an iterable dataset
        return None


def _take(data, rows):
    if in_memory(data):
        return tuple(_rows_of(column, rows) for column in data)
    indices = range(rows.start, rows.stop) if isinstance(rows, slice) else rows.tolist()
    return default_collate([data[i] for i in indices])


def _rows_of(column, rows):
    # index_select takes half the time of column[rows], which is 5 us for a batch of 64: a hundredth of a small step.
    chosen = isinstance(column, Tensor) and isinstance(rows, Tensor)
    return column.index_select(0, rows) if chosen else column[rows]


def in_memory(data) -> bool:
    """Whether data is a tuple of columns, not of batches."""
    return isinstance(data, tuple) and not (data and isinstance(data[0], tuple | list))


def is_map(data) -> bool:
    """Whether data is a Dataset whose rows can be chosen."""
    return isinstance(data, Dataset) and not isinstance(data, IterableDataset) and hasattr(data, "__len__")


def _as_tensor(column):
    return torch.from_numpy(np.ascontiguousarray(column)) if _is_numeric(column) else column


def _is_numeric(column) -> bool:
    return isinstance(column, np.ndarray) and column.dtype.kind in "fiub"


def _check_columns(name, columns):
    for i, column in enumerate(columns):
        if not isinstance(column, Tensor | SoftTargets) or len(column.shape) == 0:
            raise TypeError(
                f"{name} must hold tensors, arrays of numbers or SoftTargets with a row per item; its element {i} is "
                f"{describe(column)}{_hint(column)}"
            )
    lengths = [len(column) for column in columns]
    if not lengths or lengths[0] == 0:
        raise ValueError(f"{name} must hold at least one row, got {describe(columns)}")
    if len(set(lengths)) > 1:
        raise ValueError(f"{name} must hold columns of one length, got lengths {', '.join(map(str, lengths))}")


def _hint(column) -> str:
    """What to do with a column, or data, of another form."""
    if hasattr(column, "to_numpy"):
        return ": pass its .to_numpy()"
    if isinstance(column, TeacherStore):
        return ": pass it to the Trainer, as teacher=store"
    if isinstance(column, np.ndarray) and column.dtype.kind in "OUS":
        return f" of dtype {column.dtype}: sklearn.preprocessing.LabelEncoder makes whole numbers of labels"
    if isinstance(column, list):
        return ": pass it as a tensor or an array"
    return ""


def _check_finite(name, inputs):
    rows = inputs.reshape(len(inputs), -1)
    if not torch.isfinite(rows.sum()):  # one pass; a sum that overflows is told from a NaN below
        bad = ~rows.isfinite().all(-1)
        if bad.any():
            row = int(bad.nonzero()[0])
            raise ValueError(f"{name}: the inputs must be finite; row {row} holds a NaN or an infinity")
