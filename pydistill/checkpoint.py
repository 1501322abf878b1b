"""Checkpoints of a training run: one safetensors file each, whole or not there, never pickle.

A file's name holds its number and the SHA-256 of its bytes, so that a torn or damaged one is told without trusting
anything in it. It is written under another name, flushed to the disk and then renamed.
"""

import hashlib
import json
import os
import re
import warnings
from collections import Counter
from pathlib import Path

from torch import Tensor

from pydistill.files import flush_names, write_through

_NAME = re.compile(r"checkpoint-(\d{8})-([0-9a-f]{32})\.safetensors")
_KEPT = 2


def save(folder, number, state):
    """Write the state, a tree of dicts, lists, tuples, numbers, strings and tensors; the two newest files are kept.

    Raises:
        OSError: the disk is full, or the folder cannot be written; earlier checkpoints are untouched.
        TypeError: something in the state that is none of these.
    """
    tensors = {}
    tree = json.dumps(_encode(state, tensors, "state"))
    data = safetensors_torch().save(tensors, metadata={"state": tree})
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"checkpoint-{number:08d}-{hashlib.sha256(data).hexdigest()[:32]}.safetensors"
    unfinished = folder / f"unfinished-{path.name}"
    try:
        write_through(unfinished, data)
        os.replace(unfinished, path)
        flush_names(folder)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise OSError(error.errno, f"checkpoint {number} was not written, earlier ones are whole: {error}") from error
    for old in [*found(folder)[_KEPT:], *(x for x in folder.glob("unfinished-*") if x != unfinished)]:
        old.unlink(missing_ok=True)
    return path


def load_newest(folder):
    """The state of the newest whole checkpoint; None if there is none yet.

    A damaged one is warned of, and the one before it taken.

    Raises:
        ValueError: there are checkpoints, and none is whole.
    """
    paths = found(folder)
    for path in paths:
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest()[:32] == _NAME.fullmatch(path.name)[2]:
            return _decode_file(data)
        warnings.warn(f"checkpoint {path} is torn or damaged: its SHA-256 is not the one in its name", stacklevel=3)
    if paths:
        raise ValueError(f"checkpoint_dir: none of the {len(paths)} checkpoints in {folder} is whole")
    return None


def found(folder):
    """The folder's checkpoints, whole or not, newest first."""
    folder = Path(folder)
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if _NAME.fullmatch(p.name)), reverse=True)


def _decode_file(data):
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return _decode(json.loads(header["__metadata__"]["state"]), safetensors_torch().load(data))


def safetensors_torch():
    """The optional library."""
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "checkpoints and saved students need safetensors: pip install 'pydistill-kd[ship]'"
        ) from error
    return safetensors.torch


def _encode(value, tensors, path):
    """JSON for a tree; its tensors go to ``tensors``, under their paths."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        tensors[path] = value.detach().clone().contiguous()  # no two may share memory
        return {"tensor": path}
    if isinstance(value, dict):
        kind = "counter" if isinstance(value, Counter) else "dict"
        return {kind: [[k, _encode(v, tensors, f"{path}.{k}")] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        items = [_encode(v, tensors, f"{path}.{k}") for k, v in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    raise TypeError(f"a checkpoint holds numbers, strings, lists, dicts and tensors; {path} is {type(value).__name__}")


def _decode(value, tensors):
    if isinstance(value, list):
        return [_decode(v, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "tuple":
        return tuple(_decode(v, tensors) for v in content)
    pairs = {k: _decode(v, tensors) for k, v in content}
    return Counter(pairs) if kind == "counter" else pairs
