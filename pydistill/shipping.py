"""Save and load students atomically: each file is replaced as a whole, a module is filled completely or not at all."""

import errno
import hashlib
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from os import PathLike
from pathlib import Path
from typing import Any, TypedDict, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from pydistill._files import flush_names, form_problem, parse_json, safetensors_torch, unfinished_path, write_through
from pydistill._torch_modules import count_parameters
from pydistill._version import __version__
from pydistill._wording import describe
from pydistill.store.digests import as_bytes

_FORMAT = 1
_TENSORS, _DOCUMENT = "student.safetensors", "student.json"
_UNFINISHED = "student.new"  # a folder: safetensors writes to a temporary file of its own, which a kill leaves behind
_DOCUMENT_FORM = {"class": str, "tensors": dict, "tied": [[str]]}  # fields read besides format and sha256
_TENSOR_FORM = {"dtype": str, "shape": [int]}

_Module = TypeVar("_Module", bound=nn.Module)


class _Layout(TypedDict):
    """The shape and dtype of one tensor, as in the document."""

    dtype: str
    shape: list[int]


def save_student(student: nn.Module, folder: str | PathLike[str], *, metadata: object = None) -> Path:
    """Write a student as ``student.safetensors`` and ``student.json``, without pickle.

    The JSON document holds the version of the format, the name of the student's class, the shapes and dtypes of all
    tensors, the number of parameters, the size and SHA-256 of the tensor file, the versions of pydistill and torch, and
    ``metadata``. It describes the student but cannot build it: :func:`load_student` needs a module of the same
    architecture.

    A student that is already in the folder is replaced atomically. Both files are written and flushed under other names
    and then renamed. Until then the old student is unchanged; if the process is killed in between, the folder holds a
    student that can be loaded, the old one or the new one.

    Args:
        student: a module. For a DistilledClassifier pass its ``student_``, for a skorch net its ``module_``. The
            contents of its ``state_dict`` are saved, tied parameters once. Training or eval mode is not saved. For a
            module from ``torch.compile`` the original module is saved, and can be loaded into either.
        folder: it is created if it does not exist.
        metadata: anything that JSON can hold, such as the names of the classes. Read it with
            ``json.loads(Path(folder, "student.json").read_text())["metadata"]``.

    Returns:
        Path: the folder.

    Raises:
        ImportError: safetensors is not installed.
        TypeError: student is not a module, or its state holds something other than dense tensors of dtypes that
            safetensors supports; folder is not a path; metadata cannot be written as JSON.
        ValueError: student has tensors without data: on the meta device, or in lazy modules that have not run yet.
        OSError: the disk is full, or the folder cannot be written. The message says whether the folder holds the old
            student or the new one; that student is complete.

    Example:
        >>> import tempfile, torch, pydistill
        >>> from pydistill.shipping import load_student, save_student
        >>> folder = tempfile.TemporaryDirectory()
        >>> student = torch.nn.Linear(4, 3)
        >>> path = save_student(student, folder.name, metadata={"classes": ["a", "b", "c"]})
        >>> sorted(file.name for file in path.iterdir())
        ['student.json', 'student.safetensors']
        >>> torch.equal(load_student(path, torch.nn.Linear(4, 3)).weight, student.weight)
        True
        >>> folder.cleanup()
    """
    folder, student = _check_folder(folder, "save_student(student, folder)"), _plain_module(student)
    save_file = safetensors_torch().save_file
    from safetensors import SafetensorError

    state = _state_of(student)
    document = _describe_student(student, state, metadata)
    content, others = _content(state, document["tied"])
    pending, workplace = unfinished_path(folder / _DOCUMENT), folder / _UNFINISHED
    unfinished = workplace / _TENSORS
    folder.mkdir(parents=True, exist_ok=True)
    _settle(folder)
    try:
        if workplace.exists():
            shutil.rmtree(workplace)
        workplace.mkdir()
        save_file(content, str(unfinished), metadata=others)
        with open(unfinished, "rb+") as file:
            os.fsync(file.fileno())
        document |= {"bytes": unfinished.stat().st_size, "sha256": _sha256(unfinished)}
        write_through(pending, json.dumps(document, indent=2).encode())
        unfinished.chmod(pending.stat().st_mode)  # as for other files: safetensors lets only the owner read its file
        os.replace(unfinished, folder / _TENSORS)
    except (OSError, SafetensorError) as error:  # on a full disk safetensors raises its own error
        shutil.rmtree(workplace, ignore_errors=True)
        with suppress(OSError):
            pending.unlink()
        message = f"the student was not written to {folder}; a student that was there is unchanged: {error}"
        raise OSError(_error_number(error), message) from error
    # From here on the folder holds the new student: load_student finds its document under either name. The flush keeps
    # the two renames in order even if the power fails.
    try:
        flush_names(folder)
        os.replace(pending, folder / _DOCUMENT)
        workplace.rmdir()
        flush_names(folder)
    except OSError as error:
        message = (
            f"the new student is in {folder} and can be loaded, but a power failure could undo this; save it again: "
            f"{error}"
        )
        raise OSError(_error_number(error), message) from error
    return folder


def load_student(folder: str | PathLike[str], student: _Module) -> _Module:
    """Load a student that :func:`save_student` wrote into a module of the same architecture, and set it to eval mode.

    Everything is checked before the student is changed: the tensor file against its checksum, its tensors against the
    document, and both against the student. Dtypes are not converted. After any error the student is unchanged to the
    bit, and so is its mode; for this, a copy of the student is kept until it is filled.

    Args:
        folder: where the student was saved.
        student: a module with the same tensors. It is filled in place, on its own device. Buffers outside its
            ``state_dict`` are not changed. For a module from ``torch.compile`` the original module is filled.

    Returns:
        torch.nn.Module: the same student, in eval mode; call its ``train()`` to train it further.

    Raises:
        FileNotFoundError: the folder does not exist, or a file is missing.
        ValueError: a file is damaged, or the two do not belong together; the format is unknown to this version; the
            student has other tensors, shapes or dtypes than the saved one, or ties other tensors (the message names the
            first difference); the student is on the meta device, or has lazy modules that have not run yet.
        ImportError, TypeError: as for :func:`save_student`.

    Example:
        >>> import tempfile, torch, pydistill
        >>> student, copy = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = pydistill.save_student(student, folder)
        ...     copy = pydistill.load_student(folder, copy)
        >>> torch.equal(copy.weight, student.weight), copy.training
        (True, False)
    """
    folder, module = _check_folder(folder, "load_student(folder, student)"), _plain_module(student)
    safetensors_torch()
    state = _state_of(module)
    document, tensors = _read_saved(folder)
    _check_content(folder, document, tensors)
    _check_fit(document, state)
    for names in document["tied"]:  # the file holds one tensor per group
        content = next(tensors[name] for name in names if name in tensors)
        tensors |= dict.fromkeys(names, content)
    with _unchanged_on_error(student):
        _fill(module, tensors, folder)
        student.eval()
    return student


def _state_of(student: nn.Module) -> dict[str, Tensor]:
    """Return the module's state dict; check that every tensor in it can be saved and filled."""
    state = student.state_dict()
    for name, x in state.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"student must have only tensors in its state_dict; {name} is {type(x).__name__}")
        if is_lazy(x):
            raise ValueError(f"student must have run once, so that its lazy modules have shapes; {name} has none yet")
        if x.is_meta:
            raise ValueError(f"student must be on a device that holds data, such as the CPU; {name} is on meta")
        if x.layout is not torch.strided:
            raise TypeError(f"student must have dense tensors; {name} is {x.layout}: use its to_dense()")
    storable = {dtype: _is_storable(dtype) for dtype in {x.dtype for x in state.values()}}
    for name, x in state.items():
        if not storable[x.dtype]:
            raise TypeError(f"student must have dtypes that safetensors can store; {name} is {x.dtype}")
    return state


def _is_storable(dtype: torch.dtype) -> bool:
    """Return whether safetensors can store a dtype; it has no public list of them."""
    try:
        safetensors_torch().save({"x": torch.empty(0, dtype=dtype)})
    except (KeyError, ValueError, RuntimeError):
        return False
    return True


def _content(state: dict[str, Tensor], tied: list[list[str]]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors to save, one of each tied group, and a dict from the other names of a group to its name."""
    others = {name: min(names) for names in tied for name in names if name != min(names)}
    kept = {name: x for name, x in state.items() if name not in others}
    sharing = Counter(x.untyped_storage().data_ptr() for x in kept.values())
    tensors = {}
    for name, x in kept.items():
        shares = sharing[x.untyped_storage().data_ptr()] > 1  # safetensors refuses tensors that share memory
        x = x.detach().resolve_conj().resolve_neg().contiguous()
        tensors[name] = x.clone() if shares else x
    return tensors, others


def _describe_student(student: nn.Module, state: dict[str, Tensor], metadata: object) -> dict[str, Any]:
    """Make the document, without the size and checksum of the tensor file."""
    try:
        json.dumps(metadata, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(f"metadata must be what JSON can hold (arrays as lists, no NaN): {error}") from error
    kind = type(student)
    return {
        "format": _FORMAT,
        "class": f"{kind.__module__}.{kind.__qualname__}",
        "parameters": count_parameters(student),
        "tensors": _layout(state),
        "tied": _ties(state),
        "pydistill": __version__,
        "torch": str(torch.__version__),
        "metadata": metadata,
    }


def _layout(state: dict[str, Tensor]) -> dict[str, _Layout]:
    return {
        name: {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}
        for name, tensor in state.items()
    }


def _ties(state: dict[str, Tensor]) -> list[list[str]]:
    """Return the groups of names that stand for the same tensor."""
    groups: dict[Any, list[str]] = {}
    for name, x in state.items():
        if x.numel():  # empty tensors have no memory to share
            memory = x.device, x.untyped_storage().data_ptr(), x.storage_offset(), x.shape, x.stride()
            key = *memory, x.dtype, x.is_conj(), x.is_neg()
            groups.setdefault(key, []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def _read_saved(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a document and the tensors that belong to it, even while another process saves a new student."""
    if not folder.is_dir():
        raise FileNotFoundError(f"folder must hold a saved student, but there is no folder {folder}")
    for name in (_TENSORS, _DOCUMENT):
        if not (folder / name).exists() and not (name == _DOCUMENT and unfinished_path(folder / name).exists()):
            raise FileNotFoundError(f"folder must hold {_TENSORS} and {_DOCUMENT}; there is no {name} in {folder}")
    path = folder / _TENSORS
    while True:
        with open(path, "rb") as file:
            try:
                document = _matching_document(folder, _digest(file))
                tensors = _read_tensors(path)
            except ValueError:
                if _is_same(file, path):
                    raise
                continue
            if _is_same(file, path):  # the file that was hashed is the file that was read
                return document, tensors


def _is_same(file: BufferedReader, path: Path) -> bool:
    """Return whether the open file is still the one at this path."""
    return os.path.samestat(os.fstat(file.fileno()), os.stat(path))


def _matching_document(folder: Path, digest: str) -> dict[str, Any]:
    """Return the document of the tensors with this digest: the one in place, or one whose rename was interrupted."""
    path = folder / _DOCUMENT
    # The first path is read again, because another process may rename the second file to it in the meantime.
    documents = [_parse(x) for x in (path, unfinished_path(path), path)]
    readable = [document for document in documents if document]
    if not readable:
        raise ValueError(f"folder: {path} is damaged: it is not the JSON of a student")
    document = next((x for x in readable if x.get("sha256") == digest), readable[0])
    if "format" in document and document["format"] != _FORMAT:
        raise ValueError(
            f"folder holds a student in format {document['format']!r}; pydistill {__version__} reads format {_FORMAT}"
        )
    problem = form_problem(document, {"format": int, "sha256": str} | _DOCUMENT_FORM)
    problem = problem or form_problem(document["tensors"], dict.fromkeys(document["tensors"], _TENSOR_FORM), "tensors")
    if problem:
        raise ValueError(f"folder: {path} is damaged, or not the document of a student: it {problem}")
    for names in document["tied"]:
        strange = [name for name in names if name not in document["tensors"]]
        if strange or not names:
            raise ValueError(f"folder: {path} is damaged: tied has {strange or 'a group'} without tensors")
    if document["sha256"] != digest:
        raise ValueError(f"folder: {folder / _TENSORS} is damaged: its SHA-256 is not the one in {_DOCUMENT}")
    return document


def _parse(path: Path) -> dict[str, Any]:
    """Read a document; return an empty one if the file is missing or does not hold a JSON object in UTF-8."""
    try:
        document = parse_json(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}


def _read_tensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError

    try:
        tensors: dict[str, Tensor] = safetensors_torch().load_file(path)
        return tensors
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:  # KeyError: a dtype unknown to safetensors
        raise ValueError(f"folder: {path} is damaged, or not a safetensors file: {error}") from error


def _settle(folder: Path) -> None:
    """Finish a save that was killed between its two renames; otherwise the next save would overwrite its document."""
    pending, tensors = unfinished_path(folder / _DOCUMENT), folder / _TENSORS
    if pending.exists() and tensors.exists() and _parse(pending).get("sha256") == _sha256(tensors):
        os.replace(pending, folder / _DOCUMENT)
        flush_names(folder)


def _check_content(folder: Path, document: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Check that the file holds the tensors that the document lists, one of each tied group."""
    there, described = _layout(tensors), document["tensors"]
    groups = [*document["tied"], *([name] for name in described.keys() - set().union(*document["tied"]))]
    problem = None
    for names in groups:
        found = [name for name in names if name in there]
        if len(found) != 1:
            problem = f"the file has {' and '.join(found) or f'no {names[0]}'}"
    for name in there:
        if name not in described:
            problem = f"the file has {name}, which the document does not have"
        elif there[name] != described[name]:
            problem = f"{name} is {_form(there[name])} in the file and {_form(described[name])} in the document"
    if problem:
        raise ValueError(
            f"folder: {folder / _TENSORS} and {_DOCUMENT} do not belong together, or one was changed: {problem}. Save "
            "the student again"
        )


def _check_fit(document: dict[str, Any], state: dict[str, Tensor]) -> None:
    """Check that the student has the tensors, shapes, dtypes and ties of the saved one."""
    saved, own, kind = document["tensors"], _layout(state), document["class"]
    for name in saved:
        if name not in own:
            raise ValueError(f"student must have every tensor of the saved one ({kind}); it has no {name!r}")
        if saved[name] != own[name]:
            hint = ""
            if saved[name]["shape"] == own[name]["shape"]:
                hint = f": load into student.to(torch.{saved[name]['dtype']}) and convert it afterwards"
            raise ValueError(
                f"student must have the shapes and dtypes of the saved one ({kind}): {name!r} was saved as "
                f"{_form(saved[name])}, got {_form(own[name])}{hint}"
            )
    for name in own:
        if name not in saved:
            raise ValueError(f"student must have no tensors that the saved one ({kind}) lacks; it has {name!r}")
    if set(map(frozenset, _ties(state))) != set(map(frozenset, document["tied"])):
        raise ValueError(
            f"student must tie the same tensors as the saved one ({kind}): saved with {document['tied'] or 'none'}, "
            f"got {_ties(state) or 'none'}"
        )


@contextmanager
def _unchanged_on_error(student: nn.Module) -> Iterator[None]:
    """Restore the student's tensors and modes if an error is raised inside."""
    modes = [(m, m.training) for m in student.modules()]
    registered: list[tuple[dict[str, Any], dict[str, Any]]]
    registered = [(owner, dict(owner)) for m in student.modules() for owner in (m._parameters, m._buffers)]
    tensors = [(x, x.detach().clone()) for x in (*student.parameters(), *student.buffers())]
    try:
        yield
    except BaseException:
        for owner, before in registered:
            owner.clear()
            owner.update(before)
        for x, copied in tensors:
            with suppress(RuntimeError), torch.no_grad():  # a tensor that cannot be written to has not changed
                x.copy_(copied)
        for m, training in modes:
            m.training = training
        raise


def _fill(module: nn.Module, tensors: dict[str, Tensor], folder: Path) -> None:
    try:
        module.load_state_dict(tensors)
    except Exception as error:
        raise ValueError(f"student could not be filled from {folder} and is unchanged: {error}") from error
    state = module.state_dict()
    for name, x in tensors.items():  # a module's own loading hooks or shared memory may have changed the values
        if not np.array_equal(as_bytes(state[name]), as_bytes(x)):
            raise ValueError(
                f"student must keep the values that are loaded into it: {name!r} got other values, and the student is "
                "unchanged. Does the tensor share memory with another one, or does the module change values on loading?"
            )


def _form(layout: _Layout) -> str:
    return f"{layout['dtype']} {tuple(layout['shape'])}"


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return _digest(file)


def _digest(file: BufferedReader) -> str:
    return hashlib.file_digest(file, "sha256").hexdigest()


def _check_folder(folder: object, order: str) -> Path:
    if not isinstance(folder, str | PathLike):
        raise TypeError(f"folder must be a path, got {describe(folder)}; the order is {order}")
    return Path(folder)


def _plain_module(student: object) -> nn.Module:
    """Return the student, or the original of a compiled module, whose own names begin with ``_orig_mod.``."""
    if isinstance(student, nn.Module):
        original: nn.Module = getattr(student, "_orig_mod", student)
        return original
    inside = [name for name in ("student_", "module_") if isinstance(getattr(student, name, None), nn.Module)]
    hint = f": pass its {inside[0]}" if inside else ": pass an instance" if isinstance(student, type) else ""
    raise TypeError(f"student must be a torch.nn.Module, got {describe(student)}{hint}")


def _error_number(error: Exception) -> int:
    """Return the error's errno; safetensors gives it only in its text, as "(os error 28)" for a full disk."""
    in_text = re.search(r"\(os error (\d+)\)", str(error))
    return getattr(error, "errno", None) or (int(in_text[1]) if in_text else errno.EIO)
