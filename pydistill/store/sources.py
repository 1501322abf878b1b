"""The forms that data may have, and their batches of inputs."""

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

_SHUFFLING = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)


def as_source(data, batch_size=256):
    """What data stands for: a tensor or array, a Dataset, or an iterable of batches that starts anew each time."""
    if isinstance(data, tuple) and data and not isinstance(data[0], tuple | list):
        _check_columns(data)
        data = data[0]
    if hasattr(data, "to_numpy"):
        raise TypeError(f"data must hold a tensor or an array, got a {type(data).__name__}: pass its .to_numpy()")
    if isinstance(data, DataLoader):
        _check_order(data)
    elif isinstance(data, IterableDataset):
        return DataLoader(data, batch_size=batch_size, generator=torch.Generator())
    data = in_memory(data)
    if isinstance(data, Tensor | np.ndarray):
        if data.ndim == 0 or len(data) == 0:
            raise ValueError(f"data must have at least one row, got shape {tuple(data.shape)}")
    elif isinstance(data, Dataset):
        if len(data) == 0:
            raise ValueError("data must have at least one item, got an empty Dataset")
    elif not hasattr(data, "__iter__"):
        raise TypeError(
            f"data must be a tensor, an array, a Dataset or an iterable of batches, got {type(data).__name__}"
        )
    elif hasattr(data, "__next__"):
        raise ValueError(
            f"data must be an iterable that starts anew each time, such as a DataLoader or a list of batches; got the "
            f"iterator {type(data).__name__}, which runs out"
        )
    return data


def _check_columns(columns):
    lengths = {len(x) for x in columns if isinstance(x, Tensor | np.ndarray) and x.ndim}
    if len(lengths) > 1:
        raise ValueError(
            f"data that is a tuple must hold columns of one length, such as (inputs, labels); got lengths "
            f"{', '.join(map(str, sorted(lengths)))}. Pass batches as a list"
        )


def in_memory(data):
    """The tensor that a TensorDataset has as its inputs; other data as they are."""
    return data.tensors[0] if isinstance(data, TensorDataset) else data


def _check_order(loader):
    for sampler in (loader.sampler, getattr(loader.batch_sampler, "sampler", None)):
        if isinstance(sampler, _SHUFFLING) or getattr(sampler, "shuffle", False) is True:
            raise ValueError(
                f"data must come in one order, in which the rows of the store are counted; this DataLoader shuffles "
                f"(its sampler is a {type(sampler).__name__}): pass one with shuffle=False"
            )


def reads_in_order(loader) -> bool:
    """Whether a loader's rows are its dataset's items, each once and in their order."""
    batch_sampler = loader.batch_sampler
    return (
        type(batch_sampler) is BatchSampler
        and not batch_sampler.drop_last
        and type(batch_sampler.sampler) is SequentialSampler
        and batch_sampler.sampler.data_source is loader.dataset
    )


def batch_inputs(source):
    """The inputs of every batch of an iterable."""
    collated = isinstance(source, DataLoader) and source.batch_sampler is not None  # the first dimension is the rows
    for number, batch in enumerate(source):
        inputs = batch[0] if isinstance(batch, tuple | list) and batch else batch
        if not isinstance(inputs, Tensor | np.ndarray) or inputs.ndim == 0:
            raise TypeError(
                f"data must give batches whose first column is a tensor or array of rows, got {type(inputs).__name__}"
            )
        if inputs.ndim == 1 and not collated:
            raise ValueError(
                f"data must give batches of rows, of at least two dimensions; its batch {number} has shape "
                f"{tuple(inputs.shape)}. If every item is one row, such as the tokens of a text: stack or pad them to "
                "one tensor (rows, length), or pass a Dataset of them or a list of batches (rows, length). If every "
                "item is a batch of rows that are single numbers: pass them as one tensor (rows,) or as a Dataset"
            )
        yield inputs


def batches(source, start, batch_size):
    """The batches of inputs from row ``start`` on."""
    if isinstance(source, Tensor | np.ndarray):
        for first in range(start, len(source), batch_size):
            yield source[first : first + batch_size]
        return
    if isinstance(source, Dataset):
        rest = Subset(source, range(start, len(source)))
        source, start = DataLoader(rest, batch_size=batch_size, generator=torch.Generator()), 0
    for inputs in batch_inputs(source):
        skipped = min(start, len(inputs))
        start -= skipped
        if skipped < len(inputs):
            yield inputs[skipped:] if skipped else inputs
