"""The inputs that a store is built from: the accepted forms of data, and batches of their inputs."""

from collections.abc import Iterable, Iterator
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
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

Inputs: TypeAlias = Tensor | NDArray[Any]  # of shape (rows, ...)
Source: TypeAlias = Inputs | Dataset[Any] | Iterable[Any]  # all inputs, a Dataset of rows, or an iterable of batches
Data: TypeAlias = Source | tuple[Any, ...]

_SHUFFLING = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)


def as_source(data: Data, batch_size: int = 256) -> Source:
    """Check the data and take their inputs: a tensor or array, a Dataset, or a repeatable iterable of batches."""
    if isinstance(data, tuple) and data and not isinstance(data[0], tuple | list):
        _check_columns(data)
        data = data[0]
    if hasattr(data, "to_numpy"):
        raise TypeError(f"data must hold a tensor or an array, got a {type(data).__name__}: pass its .to_numpy()")
    if isinstance(data, DataLoader):
        _check_order(data)
    elif isinstance(data, IterableDataset):
        return DataLoader(data, batch_size=batch_size, generator=torch.Generator())
    data = inputs_of_tensor_dataset(data)
    if isinstance(data, Tensor | np.ndarray):
        if data.ndim == 0 or len(data) == 0:
            raise ValueError(f"data must have at least one row, got shape {tuple(data.shape)}")
    elif isinstance(data, Dataset):
        if dataset_length(data) == 0:
            raise ValueError("data must have at least one item, got an empty Dataset")
    elif not hasattr(data, "__iter__"):
        raise TypeError(
            f"data must be a tensor, an array, a Dataset or an iterable of batches, got {type(data).__name__}"
        )
    elif hasattr(data, "__next__"):
        raise ValueError(
            "data must be an iterable that can be iterated several times, such as a DataLoader or a list of batches; "
            f"got the iterator {type(data).__name__}, which can be iterated only once"
        )
    return data


def _check_columns(columns: tuple[Any, ...]) -> None:
    lengths = {len(x) for x in columns if isinstance(x, Tensor | np.ndarray) and x.ndim}
    if len(lengths) > 1:
        raise ValueError(
            f"data that is a tuple must hold columns of one length, such as (inputs, labels); got lengths "
            f"{', '.join(map(str, sorted(lengths)))}. Pass batches as a list"
        )


def _check_order(loader: DataLoader[Any]) -> None:
    for sampler in (loader.sampler, getattr(loader.batch_sampler, "sampler", None)):
        if isinstance(sampler, _SHUFFLING) or getattr(sampler, "shuffle", False) is True:
            raise ValueError(
                "data must come in the same order each time, because row i of the store belongs to row i of the data; "
                f"this DataLoader shuffles (its sampler is a {type(sampler).__name__}): pass one with shuffle=False"
            )


def inputs_of_tensor_dataset(data: Any) -> Any:
    """Return the inputs of a TensorDataset, its first tensor. Other data are returned unchanged."""
    return data.tensors[0] if isinstance(data, TensorDataset) else data


def dataset_length(dataset: Dataset[Any]) -> int:
    """Return the number of items of a map-style Dataset."""
    return len(dataset)  # type: ignore[arg-type]  # torch's base class does not declare __len__


def reads_in_order(loader: DataLoader[Any]) -> bool:
    """Return whether a loader's rows are its dataset's items, each once and in their order."""
    batch_sampler = loader.batch_sampler
    dataset: object = loader.dataset
    return (
        type(batch_sampler) is BatchSampler
        and not batch_sampler.drop_last
        and type(batch_sampler.sampler) is SequentialSampler
        and batch_sampler.sampler.data_source is dataset
    )


def inputs_of_batches(source: Iterable[Any]) -> Iterator[Inputs]:
    """Yield the inputs of each batch of an iterable: the batch itself, or its first column."""
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


def inputs_from_row(source: Source, start: int, batch_size: int) -> Iterator[Inputs]:
    """Yield batches of the inputs from row ``start`` on; ``batch_size`` is not used for an iterable of batches."""
    if isinstance(source, Tensor | np.ndarray):
        for first in range(start, len(source), batch_size):
            yield source[first : first + batch_size]
        return
    if isinstance(source, Dataset):
        rest = Subset(source, range(start, dataset_length(source)))
        source, start = DataLoader(rest, batch_size=batch_size, generator=torch.Generator()), 0
    for inputs in inputs_of_batches(source):
        skipped = min(start, len(inputs))
        start -= skipped
        if skipped < len(inputs):
            yield inputs[skipped:] if skipped else inputs
