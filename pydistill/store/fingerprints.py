"""What tells a stale store: digests of the data and of the teacher."""

import hashlib
import pickle

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pydistill.store.digests import as_bytes, hash_rows
from pydistill.store.sources import batch_inputs, in_memory, reads_in_order
from pydistill.targets import SoftTargets

CALLABLE = "a callable"  # of which nothing is known
_SAMPLED_ITEMS = 64


def measure(source) -> tuple[int, str]:
    """The number of rows, and the fingerprint."""
    if isinstance(source, DataLoader) and reads_in_order(source):
        source = in_memory(source.dataset)
    if isinstance(source, Dataset):
        first, second = _sample_digest(source), _sample_digest(source)
        if first != second:
            raise ValueError(
                "data must give the same items each time; this Dataset does not. Does it augment at random? A stored "
                "target belongs to one input"
            )
        return len(source), f"a sample of {len(source)} items, sha256 {first}"
    digest, rows, form = hashlib.sha256(), 0, None
    for inputs in [source] if isinstance(source, Tensor | np.ndarray) else batch_inputs(source):
        if form not in (None, _form(inputs)):
            raise ValueError(f"data must have rows of one dtype and shape, got {_form(inputs)} after {form}")
        form = _form(inputs)
        hash_rows(digest, inputs)
        rows += len(inputs)
    if rows == 0:
        raise ValueError("data must give at least one row, got none")
    digest.update(form.encode())
    return rows, f"all of {rows} rows, sha256 {digest.hexdigest()[:32]}"


def _sample_digest(dataset) -> str:
    digest, last = hashlib.sha256(), len(dataset) - 1
    for i in sorted({j * last // (_SAMPLED_ITEMS - 1) for j in range(_SAMPLED_ITEMS)}):
        item = dataset[i]
        item = item[0] if isinstance(item, tuple | list) else item
        item = item if isinstance(item, Tensor) else np.asarray(item)
        digest.update(f"{i} {tuple(item.shape)} {_form(item[None])} ".encode())
        hash_rows(digest, item[None])
    return digest.hexdigest()[:32]


def _form(inputs) -> str:
    return f"{str(inputs.dtype).removeprefix('torch.')} {tuple(inputs.shape[1:])}"


def teacher_fingerprint(teacher, given=None) -> str:
    """Of a module's state, a classifier's pickle, the bytes of targets; of a callable only what its user says it is."""
    named = isinstance(teacher, torch.nn.Module | SoftTargets) or hasattr(teacher, "predict_proba")
    if not named and not callable(teacher):
        raise TypeError(
            f"teacher must be a module, a fitted classifier, SoftTargets or a callable, got {type(teacher).__name__}"
        )
    if given is not None and (named or not isinstance(given, str)):
        raise TypeError(f"fingerprint must be a string that stands for a callable teacher, got {given!r}")
    if isinstance(teacher, torch.nn.Module):
        return f"a module, sha256 {_parts_digest(teacher.state_dict())}"
    if isinstance(teacher, SoftTargets):
        parts = {"logits": teacher.logits, "indices": teacher.indices}
        parts |= {f"log_partition {t:g}": x for t, x in teacher.log_partitions.items()}
        return f"SoftTargets, sha256 {_parts_digest(parts)} {teacher.tail} {tuple(teacher.shape)}"
    if named:
        import joblib  # scikit-learn needs it

        # A pickle's bytes change when it is loaded and written again; those of a loaded one stay.
        return f"a {type(teacher).__name__}, {joblib.hash(pickle.loads(pickle.dumps(teacher)))}"
    return CALLABLE if given is None else f"a callable, {given}"


def _parts_digest(parts) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(parts.items()):
        if isinstance(value, Tensor):  # a module's extra state can be anything
            digest.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
            digest.update(as_bytes(value))
    return digest.hexdigest()[:32]
