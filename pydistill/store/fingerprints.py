"""Fingerprints of data and teachers, which detect a stale store."""

import hashlib
import pickle
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pydistill.store.digests import as_bytes, byte_chunks
from pydistill.store.sources import (
    Inputs,
    Source,
    dataset_length,
    inputs_of_batches,
    inputs_of_tensor_dataset,
    reads_in_order,
)
from pydistill.targets import SoftTargets
from pydistill.teachers.estimators import Estimator

Teacher: TypeAlias = torch.nn.Module | SoftTargets | Estimator | Callable[[Any], Tensor | NDArray[Any] | SoftTargets]

UNCHECKED_CALLABLE = "a callable"  # the fingerprint of a callable without fingerprint=
_SAMPLED_ITEMS = 64


def data_fingerprint(source: Source) -> tuple[int, str]:
    """Return the number of rows of the data, and the fingerprint of the data."""
    if isinstance(source, DataLoader) and reads_in_order(source):
        source = inputs_of_tensor_dataset(source.dataset)
    if isinstance(source, Dataset):
        length, first, second = dataset_length(source), _sample_digest(source), _sample_digest(source)
        if first != second:
            raise ValueError(
                "data must give the same items each time; this Dataset does not. Does it augment at random? A stored "
                "target belongs to one input"
            )
        return length, f"a sample of {length} items, sha256 {first}"
    digest, rows, form = hashlib.sha256(), 0, ""
    for inputs in [source] if isinstance(source, Tensor | np.ndarray) else inputs_of_batches(source):
        if form not in ("", _form(inputs)):
            raise ValueError(f"data must have rows of one dtype and shape, got {_form(inputs)} after {form}")
        form = _form(inputs)
        for chunk in byte_chunks(inputs):
            digest.update(chunk)
        rows += len(inputs)
    if rows == 0:
        raise ValueError("data must give at least one row, got none")
    digest.update(form.encode())
    return rows, f"all of {rows} rows, sha256 {digest.hexdigest()[:32]}"


def _sample_digest(dataset: Dataset[Any]) -> str:
    digest, last = hashlib.sha256(), dataset_length(dataset) - 1
    for i in sorted({j * last // (_SAMPLED_ITEMS - 1) for j in range(_SAMPLED_ITEMS)}):
        item = dataset[i]
        item = item[0] if isinstance(item, tuple | list) else item
        item = item if isinstance(item, Tensor) else np.asarray(item)
        digest.update(f"{i} {tuple(item.shape)} {_form(item[None])} ".encode())
        for chunk in byte_chunks(item[None]):
            digest.update(chunk)
    return digest.hexdigest()[:32]


def _form(inputs: Inputs) -> str:
    """Return the dtype and shape of a row."""
    return f"{str(inputs.dtype).removeprefix('torch.')} {tuple(inputs.shape[1:])}"


def teacher_fingerprint(teacher: Teacher, given: str | None = None) -> str:
    """Return the fingerprint of a module's state, a classifier's pickle, the bytes of soft targets, or a callable.

    A callable cannot be inspected. Its fingerprint is ``given``, the string that the caller gives for it.
    """
    known = isinstance(teacher, torch.nn.Module | SoftTargets) or hasattr(teacher, "predict_proba")
    if not known and not callable(teacher):
        raise TypeError(
            f"teacher must be a module, a fitted classifier, SoftTargets or a callable, got {type(teacher).__name__}"
        )
    if given is not None and (known or not isinstance(given, str)):
        raise TypeError(f"fingerprint must be a string that stands for a callable teacher, got {given!r}")
    if isinstance(teacher, torch.nn.Module):
        return f"a module, sha256 {_parts_digest(teacher.state_dict())}"
    if isinstance(teacher, SoftTargets):
        parts = {"logits": teacher.logits, "indices": teacher.indices}
        parts |= {f"log_partition {t:g}": x for t, x in teacher.log_partitions.items()}
        return f"SoftTargets, sha256 {_parts_digest(parts)} {teacher.tail} {tuple(teacher.shape)}"
    if known:
        import joblib  # a dependency of scikit-learn

        # The pickle of an object can differ from that of its unpickled copy, so the hash is always that of a copy.
        return f"a {type(teacher).__name__}, {joblib.hash(pickle.loads(pickle.dumps(teacher)))}"
    return UNCHECKED_CALLABLE if given is None else f"a callable, {given}"


def _parts_digest(parts: Mapping[str, object]) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(parts.items()):
        if isinstance(value, Tensor):  # extra state of a module, which can have any type, is left out
            digest.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
            digest.update(as_bytes(value).data)
    return digest.hexdigest()[:32]
