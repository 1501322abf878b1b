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
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from pydistill._files import flush_names, form_problem, parse_json, safetensors_torch, write_through
from pydistill.trainer.history import Scores
from pydistill.trainer.totals import Totals

_NAME = re.compile(r"checkpoint-(\d{8})-([0-9a-f]{32})\.safetensors")
_KEPT = 2
_KEYS = str | bool | int | float | None  # of dicts, as JSON can hold them in a list

_NUMBER = int | float
_NUMBERS = (_NUMBER,) * len(Scores._fields)
# What a Trainer reads. The callbacks' states are their own affair, as are most of the optimizer's and the scheduler's.
_RUN = {
    "epoch": int,
    "batch": int,
    "one_thread": bool | None,
    "steps": int,
    "number": int,
    "epoch_random": Tensor | None,
}
_STATE = {
    "setup": dict,
    "run": _RUN,
    "totals": {field.name: _NUMBER for field in fields(Totals)},
    "history": [(int, _NUMBERS, object, _NUMBER)],  # the third: numbers, or None without validation data
    "stopped": int | None,
    "random": Tensor,
    "student": dict,
    "optimizer": {"state": dict, "param_groups": [{"params": list}]},
    "scheduler": dict | None,
    "callbacks": list,
    "loss": dict,
}


def save(folder, number, state):
    """Write the state, a tree of dicts, lists, tuples, numbers, strings and tensors; the two newest files are kept.

    Raises:
        OSError: the disk is full, or the folder cannot be written; earlier checkpoints are untouched.
        TypeError: something in the state that is none of these.
    """
    tensors = {}
    tree = json.dumps(_encode(state, tensors, "state"))
    try:
        data = safetensors_torch().save(tensors, metadata={"state": tree})
    except KeyError as error:
        raise TypeError(f"a checkpoint holds tensors of dtypes that safetensors has; one is {error.args[0]}") from None
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"checkpoint-{number:08d}-{hashlib.sha256(data).hexdigest()[:32]}.safetensors"
    unfinished = folder / f"unfinished-{path.name}"
    try:
        write_through(unfinished, data)
        os.replace(unfinished, path)
        flush_names(folder)
    except OSError as error:
        with suppress(OSError):
            unfinished.unlink()
        outcome = "is there, but a power failure may undo that" if path.exists() else "was not written"
        raise OSError(error.errno, f"checkpoint {number} {outcome}; earlier ones are whole: {error}") from error
    # One of the same number is damaged: a run went on from the one before it.
    others = sorted((x for x in found(folder) if x != path), key=lambda x: _number(x) == number)
    for old in [*others[_KEPT - 1 :], *(x for x in folder.glob("unfinished-*") if x != unfinished)]:
        old.unlink(missing_ok=True)
    return path


def load_newest(folder):
    """The state of the newest whole checkpoint; None if there is none yet.

    A damaged one is warned of, and the one before it taken.

    Raises:
        ValueError: there are checkpoints, and none is whole; or the newest whole one holds something else.
    """
    return _load_newest(folder)[1]


def load_run(trainer, setup):
    """The newest state in a Trainer's folder, checked so far that the Trainer can go on from it; None if there is none.

    ``setup`` holds what must be the same as when the checkpoint was made. Nothing of the Trainer is changed.

    Raises:
        ValueError: as for :func:`load_newest`; a state that lacks something or has it in another form; one of another
            student, of other callbacks, or with a scheduler where there is none now, or none where there is one.
    """
    path, state = _load_newest(trainer.checkpoint_dir)
    if path is None:
        return None
    problem = _state_problem(state, setup)
    if problem:
        raise ValueError(f"checkpoint {path} is damaged, or not one of this version of pydistill: it {problem}")
    problem = _other_parts(state, trainer)
    if problem:
        raise ValueError(f"resume: the checkpoint {problem}")
    return state


def _state_problem(state, setup) -> str | None:
    """What keeps a state from being one that the Trainer wrote."""
    problem = form_problem(state, _STATE | {"setup": dict.fromkeys(setup, object)})
    if problem:
        return problem
    strange = state["run"].keys() - _RUN.keys()
    if strange:
        return f"has run.{min(strange, key=str)}, which this version does not know"
    if not isinstance((state["scheduler"] or {}).get("last_epoch", 0), int):
        return "has no whole number in scheduler.last_epoch"
    for i, (_, _, validated, _) in enumerate(state["history"]):
        problem = None if validated is None else form_problem(validated, _NUMBERS, f"history[{i}][2]")
        if problem:
            return problem
    for key, random in (("random", state["random"]), ("run.epoch_random", state["run"]["epoch_random"])):
        try:
            if random is not None:
                torch.Generator().set_state(random)
        except (RuntimeError, TypeError) as error:
            return f"has no state of torch's random generator in {key}: {error}"
    return None


def _other_parts(state, trainer) -> str | None:
    """How the parts that a checkpoint is of differ from those that the Trainer has."""
    saved, own = state["student"], trainer.student.state_dict()
    for name in sorted(saved.keys() ^ own.keys(), key=str):
        return f"holds another student: {name} is only in {'it' if name in saved else 'the student'}"
    for name, x in own.items():
        if is_lazy(x):  # takes the shape and dtype of what is loaded
            continue
        forms = [f"{y.dtype} {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__ for y in (saved[name], x)]
        if forms[0] != forms[1]:
            return f"holds another student: {name} is {forms[0]} in it and {forms[1]} in the student"
    if (state["scheduler"] is None) != (trainer.scheduler is None):
        return f"was made with{'out' if state['scheduler'] is None else ''} a scheduler; pass the same ones again"
    if len(state["callbacks"]) != len(trainer.callbacks):
        return f"was made with {len(state['callbacks'])} callbacks, got {len(trainer.callbacks)}; pass the same ones"
    for i, (of_callback, callback) in enumerate(zip(state["callbacks"], trainer.callbacks, strict=True)):
        if (of_callback is None) == hasattr(callback, "load_state_dict"):
            return f"was made with other callbacks: number {i} is now {type(callback).__name__}; pass the same ones"
    return None


@contextmanager
def loading(part):
    """What goes wrong inside is said of this part of the checkpoint: its own loading says only which key it lacks."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise ValueError(
            f"resume: the checkpoint's {part} cannot be loaded into the one given: {type(error).__name__}: {error}"
        ) from error


def _load_newest(folder):
    paths = found(folder)
    for path in paths:
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest()[:32] == _NAME.fullmatch(path.name)[2]:
            return path, _decode_file(path, data)
        warnings.warn(f"checkpoint {path} is torn or damaged: its SHA-256 is not the one in its name", stacklevel=4)
    if paths:
        raise ValueError(f"checkpoint_dir: none of the {len(paths)} checkpoints in {folder} is whole")
    return None, None


def found(folder):
    """The folder's checkpoints, whole or not, newest first."""
    folder = Path(folder)
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if _NAME.fullmatch(p.name)), reverse=True)


def _number(path) -> int:
    return int(_NAME.fullmatch(path.name)[1])


def _decode_file(path, data):
    from safetensors import SafetensorError

    try:
        tensors = safetensors_torch().load(data)  # which checks the header, read again below
        header = parse_json(data[8 : 8 + int.from_bytes(data[:8], "little")])
        tree = (header.get("__metadata__") or {}).get("state")
        if tree is None:
            raise ValueError("its header has no __metadata__.state")
        return _decode(parse_json(tree), tensors, "state")
    except RecursionError:
        problem = "its state is nested too deeply"
    except KeyError as error:
        problem = f"it has the dtype {error.args[0]}, which is unknown"
    except (SafetensorError, ValueError) as error:
        problem = error
    raise ValueError(f"checkpoint {path} is damaged, or not one of pydistill: {problem}")


def _encode(value, tensors, path):
    """JSON for a tree; its tensors go to ``tensors``, under their paths."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        if value.layout is not torch.strided:
            raise TypeError(f"a checkpoint holds dense tensors; {path} is {value.layout}")
        name = path if path not in tensors else f"{path} {len(tensors)}"  # "a.b" may be one key or two
        tensors[name] = value.detach().clone().contiguous()  # no two may share memory
        return {"tensor": name}
    if isinstance(value, dict):
        strange = [key for key in value if not isinstance(key, _KEYS)]
        if strange:
            raise TypeError(
                f"a checkpoint holds dicts with keys that are strings or numbers; {path} has {strange[0]!r}"
            )
        kind = "counter" if isinstance(value, Counter) else "dict"
        return {kind: [[k, _encode(v, tensors, f"{path}.{k}")] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        items = [_encode(v, tensors, f"{path}.{k}") for k, v in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    raise TypeError(f"a checkpoint holds numbers, strings, lists, dicts and tensors; {path} is {type(value).__name__}")


def _decode(value, tensors, path):
    """The tree that _encode made JSON of."""
    if isinstance(value, list):
        return [_decode(v, tensors, f"{path}.{k}") for k, v in enumerate(value)]
    if not isinstance(value, dict):
        return value
    kind, content = next(iter(value.items())) if len(value) == 1 else (None, None)
    if kind == "tensor" and isinstance(content, str) and content in tensors:
        return tensors[content]
    if kind == "tuple" and isinstance(content, list):
        return tuple(_decode(content, tensors, path))
    pairs = isinstance(content, list) and all(isinstance(x, list) and len(x) == 2 for x in content)
    if kind in ("dict", "counter") and pairs and all(isinstance(k, _KEYS) for k, _ in content):
        decoded = {k: _decode(v, tensors, f"{path}.{k}") for k, v in content}
        return Counter(decoded) if kind == "counter" else decoded
    raise ValueError(f"{path} is neither a tensor of the file, a tuple nor a dict")
