"""What leaves: a student on disk, whole or not there."""

import errno
import hashlib
import json
import os
import re
from pathlib import Path

import torch
from torch import Tensor, nn

import pydistill
from pydistill.checkpoint import flush_names, safetensors_torch
from pydistill.data import describe
from pydistill.files import unfinished_path, write_through
from pydistill.modules import count_parameters

_FORMAT = 1
_TENSORS, _DOCUMENT = "student.safetensors", "student.json"


def save_student(student, folder, *, metadata=None) -> Path:
    """Write a student as ``student.safetensors`` and ``student.json``, without pickle.

    The JSON holds the format's version, the class's name, the shapes and dtypes of all tensors, the number of
    parameters, the file's bytes and SHA-256, the versions of pydistill and torch, and ``metadata``. It describes the
    student and does not build it: :func:`load_student` needs a module of the same make.

    A student that is already in the folder is replaced as a whole. Both files are written and flushed under other names
    and then renamed; until then the old student is untouched, and one that is killed in between leaves a student that
    loads, the old or the new.

    Args:
        student: a module; of a DistilledClassifier its ``student_``, of a skorch net its ``module_``. What its
            ``state_dict`` holds is saved, tied parameters once; its mode is not. Of what ``torch.compile`` gives the
            plain module is saved, and loads into either.
        folder: made if need be.
        metadata: anything that JSON can hold, such as the names of the classes; read it with
            ``json.loads(Path(folder, "student.json").read_text())["metadata"]``.

    Returns:
        Path: the folder.

    Raises:
        ImportError: safetensors is not installed.
        TypeError: student is not a module, or its state is not of tensors alone; metadata that JSON cannot hold.
        OSError: the disk is full, or the folder cannot be written; what was there is whole.

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
    student = _plain_module(student)
    document = _describe_student(student, metadata)
    save_model = safetensors_torch().save_model
    from safetensors import SafetensorError

    folder = Path(folder)
    tensors, unfinished = folder / _TENSORS, unfinished_path(folder / _TENSORS)
    pending = unfinished_path(folder / _DOCUMENT)
    folder.mkdir(parents=True, exist_ok=True)
    _settle(folder)
    try:
        save_model(student, str(unfinished))
        with open(unfinished, "rb+") as file:
            os.fsync(file.fileno())
        document |= {"bytes": unfinished.stat().st_size, "sha256": _sha256(unfinished)}
        write_through(pending, json.dumps(document, indent=2).encode())
        os.replace(unfinished, tensors)
    except (OSError, SafetensorError) as error:  # safetensors raises its own for a full disk
        unfinished.unlink(missing_ok=True)
        pending.unlink(missing_ok=True)
        message = f"the student was not written to {folder}, what was there is whole: {error}"
        raise OSError(_error_number(error), message) from error
    # From here on the new student counts: its document is found under either name. The flush keeps the order of the two
    # renames, also when the power fails.
    flush_names(folder)
    os.replace(pending, folder / _DOCUMENT)
    flush_names(folder)
    return folder


def load_student(folder, student):
    """Load what :func:`save_student` wrote into a module of the same make; everything is checked first.

    Args:
        folder: where the student was saved.
        student: a module with the same tensors. It is filled in place, on its own device; its mode, and buffers that
            ``state_dict`` does not hold, are left alone.

    Returns:
        the student.

    Raises:
        FileNotFoundError: no such folder, or a file is missing.
        ValueError: a damaged file; a format that this version does not know; a student whose tensors are others, have
            other shapes or dtypes, or are not tied where the saved ones were: the first one is named. The student is
            then as it was.
        ImportError, TypeError: as for :func:`save_student`.

    Example:
        >>> import tempfile, torch, pydistill
        >>> student, copy = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = pydistill.save_student(student, folder)
        ...     copy = pydistill.load_student(folder, copy)
        >>> torch.equal(copy.weight, student.weight)
        True
    """
    module = _plain_module(student)
    load_model = safetensors_torch().load_model
    folder = Path(folder)
    document = _read_document(folder)
    _check_fit(document, module)
    load_model(module, folder / _TENSORS)
    return student


def _describe_student(student, metadata) -> dict:
    state = student.state_dict()
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"student must have a state of tensors alone; {name} is {type(value).__name__}")
    try:
        json.dumps(metadata, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise TypeError(f"metadata must be what JSON can hold (arrays as lists): {error}") from error
    kind = type(student)
    return {
        "format": _FORMAT,
        "class": f"{kind.__module__}.{kind.__qualname__}",
        "parameters": count_parameters(student),
        "tensors": _layout(state),
        "tied": _ties(state),
        "pydistill": pydistill.__version__,
        "torch": str(torch.__version__),
        "metadata": metadata,
    }


def _layout(state) -> dict:
    return {
        name: {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}
        for name, tensor in state.items()
    }


def _ties(state) -> list:
    """Groups of names that stand for one tensor."""
    groups = {}
    for name, x in state.items():
        if x.numel():  # empty ones have no memory to share
            key = x.device, x.untyped_storage().data_ptr(), x.storage_offset(), x.shape, x.stride()
            groups.setdefault(key, []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def _read_document(folder) -> dict:
    """The document that belongs to the tensors: the one in place, or one whose rename was interrupted."""
    if not folder.is_dir():
        raise FileNotFoundError(f"folder must hold a saved student, and there is no folder {folder}")
    for name in (_TENSORS, _DOCUMENT):
        if not (folder / name).exists() and not (name == _DOCUMENT and unfinished_path(folder / name).exists()):
            raise FileNotFoundError(f"folder must hold {_TENSORS} and {_DOCUMENT}; there is no {name} in {folder}")
    document = _matching_document(folder)
    if document.get("format") != _FORMAT:
        raise ValueError(
            f"folder holds a student in format {document.get('format')!r}; pydistill {pydistill.__version__} reads "
            f"format {_FORMAT}"
        )
    return document


def _matching_document(folder) -> dict:
    digest, readable = _sha256(folder / _TENSORS), False
    for path in (folder / _DOCUMENT, unfinished_path(folder / _DOCUMENT)):
        document = _parse(path)
        if document.get("sha256") == digest:
            return document
        readable = readable or bool(document)
    if not readable:
        raise ValueError(f"folder: {folder / _DOCUMENT} is damaged: it is not the JSON of a student")
    raise ValueError(f"folder: {folder / _TENSORS} is damaged: its SHA-256 is not the one in {_DOCUMENT}")


def _parse(path) -> dict:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):  # no JSON, or no UTF-8
        return {}
    return document if isinstance(document, dict) else {}


def _settle(folder):
    """Finish a save that was killed between its two renames; the next one would write over its document."""
    pending, tensors = unfinished_path(folder / _DOCUMENT), folder / _TENSORS
    if pending.exists() and tensors.exists() and _parse(pending).get("sha256") == _sha256(tensors):
        os.replace(pending, folder / _DOCUMENT)


def _check_fit(document, student):
    state = student.state_dict()
    saved, own, kind = document["tensors"], _layout(state), document["class"]
    for name in saved:
        if name not in own:
            raise ValueError(f"student must have every tensor of the saved one ({kind}); it has no {name!r}")
        if saved[name] != own[name]:
            raise ValueError(
                f"student must have the shapes and dtypes of the saved one ({kind}): {name!r} was "
                f"{_form(saved[name])}, here it is {_form(own[name])}"
            )
    for name in own:
        if name not in saved:
            raise ValueError(f"student must have no other tensors than the saved one ({kind}); it has {name!r}")
    if _ties(state) != document["tied"]:
        raise ValueError(
            f"student must tie the same tensors as the saved one ({kind}): tied there are "
            f"{document['tied'] or 'none'}, here {_ties(state) or 'none'}"
        )


def _form(layout) -> str:
    return f"{layout['dtype']} {tuple(layout['shape'])}"


def _sha256(path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _plain_module(student) -> nn.Module:
    """A compiled module keeps the plain one; its own tensors' names begin with ``_orig_mod.``."""
    if isinstance(student, nn.Module):
        return getattr(student, "_orig_mod", student)
    inside = [name for name in ("student_", "module_") if isinstance(getattr(student, name, None), nn.Module)]
    hint = f": pass its {inside[0]}" if inside else ""
    raise TypeError(f"student must be a torch.nn.Module, got {describe(student)}{hint}")


def _error_number(error) -> int:
    """safetensors gives the number in its text alone, as "(os error 28)" for a full disk."""
    told = re.search(r"\(os error (\d+)\)", str(error))
    return getattr(error, "errno", None) or (int(told[1]) if told else errno.EIO)
