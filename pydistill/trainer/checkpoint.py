"""Checkpoints of a training run: one safetensors file each, written atomically; no pickle.

A file's name holds its number and the SHA-256 of its bytes, so that a damaged file is detected before anything in it is
used.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from pydistill._arguments import warn_caller
from pydistill._files import form_problem, parse_json, safetensors_torch, unfinished_path, write_whole
from pydistill.trainer.history import Scores
from pydistill.trainer.totals import Totals

State: TypeAlias = dict[str, Any]  # a tree of values; load_run checks its form
Folder: TypeAlias = str | PathLike[str]

_NAME = re.compile(r"checkpoint-\d{8}-[0-9a-f]{32}\.safetensors")
_KEPT = 2
_KEYS = str | bool | int | float | None  # keys of dicts: JSON keeps their types in a list of pairs

_NUMBER = int | float
_NUMBERS = (_NUMBER,) * len(Scores._fields)
# The fields that the Trainer reads itself, with their types. The states of the callbacks, and most entries in those of
# the optimizer and the scheduler, are checked by their own load_state_dict.
RUN_FIELDS: dict[str, Any] = {
    "epoch": int,
    "batch": int,
    "one_thread": bool | None,
    "steps": int,
    "number": int,
    "epoch_random": Tensor | None,
}
_STATE: State = {
    "setup": dict,
    "run": RUN_FIELDS,
    "totals": {field.name: _NUMBER for field in fields(Totals)},
    "history": [(int, _NUMBERS, object, _NUMBER)],  # the third item: the validation scores, or None
    "stopped": int | None,
    "random": Tensor,
    "student": dict,
    "optimizer": {"state": dict, "param_groups": [{"params": list}]},
    "scheduler": dict | None,
    "callbacks": list,
    "loss": dict,
}


def save(folder: Folder, number: int, state: State) -> Path:
    """Write a checkpoint, and delete all but the two newest ones.

    Args:
        folder: the folder of the checkpoints, created if it does not exist.
        number: the number of the checkpoint, which becomes part of the file's name.
        state: a tree of dicts, lists, tuples, numbers, strings and tensors.

    Returns:
        Path: the file.

    Raises:
        OSError: the disk is full, or the folder cannot be written; earlier checkpoints are untouched.
        TypeError: the state holds a value of another type.
    """
    tensors: dict[str, Tensor] = {}
    tree = json.dumps(_encode(state, tensors, "state"))
    try:
        data = safetensors_torch().save(tensors, metadata={"state": tree})
    except KeyError as error:
        raise TypeError(f"a checkpoint holds tensors of dtypes that safetensors has; one is {error.args[0]}") from None
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"checkpoint-{number:08d}-{hashlib.sha256(data).hexdigest()[:32]}.safetensors"
    try:
        write_whole(path, data)
    except OSError as error:
        outcome = "was written, but a power failure may undo that" if path.exists() else "was not written"
        raise OSError(error.errno, f"checkpoint {number} {outcome}; earlier ones are intact: {error}") from error
    # A second file with this number is damaged, because the run was resumed from the checkpoint before it. It is sorted
    # to the end, so that it is deleted first.
    others = sorted((x for x in found(folder) if x != path), key=lambda x: _name_parts(x)[0] == number)
    left_by_killed_runs = folder.glob(unfinished_path(Path("checkpoint-*.safetensors")).name)
    for old in [*others[_KEPT - 1 :], *left_by_killed_runs]:
        old.unlink(missing_ok=True)
    return path


def load_newest(folder: Folder) -> State | None:
    """Return the state of the newest intact checkpoint, or None if there are no checkpoints.

    A warning is given for each newer checkpoint that is damaged.

    Raises:
        ValueError: there are checkpoints, and all of them are damaged; or the newest intact file was not written by
            :func:`save`.
    """
    newest = _load_newest(folder)
    return None if newest is None else newest[1]


def load_run(
    folder: Folder, setup: Mapping[str, object], student: nn.Module, scheduler: object, callbacks: Sequence[object]
) -> State | None:
    """Return the newest state in a folder, checked for use by a Trainer with these parts; None if there is none.

    The state must have the options that are named in ``setup``; their values are not compared. Nothing is loaded into
    the parts.

    Raises:
        ValueError: as for :func:`load_newest`; the state lacks a field, or a field has the wrong type; it was saved
            with another student or other callbacks; it has the state of a scheduler and ``scheduler`` is None, or it
            has none and ``scheduler`` is not None.
    """
    newest = _load_newest(folder)
    if newest is None:
        return None
    path, state = newest
    problem = _state_problem(state, setup)
    if problem:
        raise ValueError(f"checkpoint {path} is damaged, or not one of this version of pydistill: it {problem}")
    problem = _other_parts(state, student, scheduler, callbacks)
    if problem:
        raise ValueError(f"resume: the checkpoint {problem}")
    return state


def _state_problem(state: State, setup: Mapping[str, object]) -> str | None:
    """Describe how the form of a state differs from that of the states that the Trainer writes; None if it does not."""
    problem = form_problem(state, _STATE | {"setup": dict.fromkeys(setup, object)})
    if problem:
        return problem
    strange = state["run"].keys() - RUN_FIELDS.keys()
    if strange:
        return f"has run.{min(strange, key=str)}, which this version does not have"
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


def _other_parts(state: State, student: nn.Module, scheduler: object, callbacks: Sequence[object]) -> str | None:
    """Describe how the parts that were saved in a checkpoint differ from the Trainer's; None if they do not."""
    saved, own = state["student"], student.state_dict()
    for name in sorted(saved.keys() ^ own.keys(), key=str):
        return f"holds another student: {name} is only in the {'checkpoint' if name in saved else 'student'}"
    for name, x in own.items():
        if is_lazy(x):  # gets its shape and dtype when the state is loaded
            continue
        forms = [f"{y.dtype} {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__ for y in (saved[name], x)]
        if forms[0] != forms[1]:
            return f"holds another student: {name} is {forms[0]} in the checkpoint and {forms[1]} in the student"
    if (state["scheduler"] is None) != (scheduler is None):
        return f"was made with{'out' if state['scheduler'] is None else ''} a scheduler; pass the same arguments again"
    if len(state["callbacks"]) != len(callbacks):
        return f"was made with {len(state['callbacks'])} callbacks, got {len(callbacks)}; pass the same callbacks"
    for i, (saved_state, callback) in enumerate(zip(state["callbacks"], callbacks, strict=True)):
        if (saved_state is None) == hasattr(callback, "load_state_dict"):
            return f"was made with other callbacks: number {i} is now {type(callback).__name__}; pass the same ones"
    return None


@contextmanager
def loading(part: str) -> Iterator[None]:
    """Turn errors of ``load_state_dict`` into one that names the part; the original may consist of a missing key."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise ValueError(
            f"resume: the checkpoint's {part} cannot be loaded into the one given: {type(error).__name__}: {error}"
        ) from error


def _load_newest(folder: Folder) -> tuple[Path, State] | None:
    paths = found(folder)
    for path in paths:
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest()[:32] == _name_parts(path)[1]:
            return path, _decode_file(path, data)
        warn_caller(f"checkpoint {path} is damaged: its SHA-256 is not the one in its name")
    if paths:
        raise ValueError(f"checkpoint_dir: none of the {len(paths)} checkpoints in {folder} is intact")
    return None


def found(folder: Folder) -> list[Path]:
    """Return the folder's checkpoints, damaged ones too, newest first."""
    folder = Path(folder)
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if _NAME.fullmatch(p.name)), reverse=True)


def _name_parts(path: Path) -> tuple[int, str]:
    """Number and digest in the name of a checkpoint."""
    _, number, digest = path.stem.split("-")
    return int(number), digest


def _decode_file(path: Path, data: bytes) -> State:
    from safetensors import SafetensorError

    problem: object
    try:
        tensors = safetensors_torch().load(data)  # this also checks the header, which is read again below
        header = parse_json(data[8 : 8 + int.from_bytes(data[:8], "little")])
        tree = (header.get("__metadata__") or {}).get("state")
        if tree is None:
            raise ValueError("its header has no __metadata__.state")
        state: State = _decode(parse_json(tree), tensors, "state")
        return state
    except RecursionError:
        problem = "its state is nested too deeply"
    except KeyError as error:
        problem = f"it has the dtype {error.args[0]}, which is unknown"
    except (SafetensorError, ValueError) as error:
        problem = error
    raise ValueError(f"checkpoint {path} is damaged, or not one of pydistill: {problem}")


def _encode(value: Any, tensors: dict[str, Tensor], path: str) -> Any:
    """Convert a tree to a form that JSON can hold. Its tensors are put into ``tensors``, with their paths as keys."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        if value.layout is not torch.strided:
            raise TypeError(f"a checkpoint holds dense tensors; {path} is {value.layout}")
        name = path if path not in tensors else f"{path} {len(tensors)}"  # "a.b" may be one key or two
        tensors[name] = value.detach().clone().contiguous()  # safetensors refuses tensors that share memory
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


def _decode(value: Any, tensors: Mapping[str, Tensor], path: str) -> Any:
    """Convert a result of :func:`_encode` back to the tree."""
    if isinstance(value, list):
        return [_decode(v, tensors, f"{path}.{k}") for k, v in enumerate(value)]
    if not isinstance(value, dict):
        return value
    kind, content = next(iter(value.items())) if len(value) == 1 else (None, None)
    if kind == "tensor" and isinstance(content, str) and content in tensors:
        return tensors[content]
    if kind == "tuple" and isinstance(content, list):
        return tuple(_decode(content, tensors, path))
    if kind in ("dict", "counter") and isinstance(content, list) and all(map(_is_pair, content)):
        decoded = {k: _decode(v, tensors, f"{path}.{k}") for k, v in content}
        return Counter(decoded) if kind == "counter" else decoded
    raise ValueError(f"{path} is neither a tensor of the file, a tuple nor a dict")


def _is_pair(item: object) -> bool:
    return isinstance(item, list) and len(item) == 2 and isinstance(item[0], _KEYS)
