"""Save and load students: a file is whole or not there, and a student is filled as a whole or not at all."""

import errno
import hashlib
import json
import os
import re
import shutil
from collections import Counter
from contextlib import contextmanager, suppress
from pathlib import Path

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
_UNFINISHED = "student.new"  # a folder: safetensors writes to a file with a name of its own, which a kill leaves behind
_DOCUMENT_FORM = {"class": str, "tensors": dict, "tied": [[str]]}  # what load_student reads, besides format and sha256
_TENSOR_FORM = {"dtype": str, "shape": [int]}


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
            ``state_dict`` holds is saved, tied parameters once; whether it is in training or eval mode is not. Of what
            ``torch.compile`` gives the plain module is saved, and loads into either.
        folder: made if need be.
        metadata: anything that JSON can hold, such as the names of the classes; read it with
            ``json.loads(Path(folder, "student.json").read_text())["metadata"]``.

    Returns:
        Path: the folder.

    Raises:
        ImportError: safetensors is not installed.
        TypeError: student is not a module, or its state is not of dense tensors alone, whose dtypes safetensors has;
            metadata that JSON cannot hold.
        ValueError: a student without numbers: on the meta device, or with lazy modules that have not run yet.
        OSError: the disk is full, or the folder cannot be written. The message says whether the old student is still
            there or the new one already; it is whole.

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
    save_file = safetensors_torch().save_file
    from safetensors import SafetensorError

    state = _state_of(student)
    document = _describe_student(student, state, metadata)
    content, others = _content(state, document["tied"])
    folder = Path(folder)
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
        unfinished.chmod(pending.stat().st_mode)  # that of an ordinary file; safetensors' own only its owner can read
        os.replace(unfinished, folder / _TENSORS)
    except (OSError, SafetensorError) as error:  # safetensors raises its own for a full disk
        shutil.rmtree(workplace, ignore_errors=True)
        with suppress(OSError):
            pending.unlink()
        message = f"the student was not written to {folder}, what was there is whole: {error}"
        raise OSError(_error_number(error), message) from error
    # From here on the new student counts: its document is found under either name. The flush keeps the order of the two
    # renames, also when the power fails.
    try:
        flush_names(folder)
        os.replace(pending, folder / _DOCUMENT)
        workplace.rmdir()
        flush_names(folder)
    except OSError as error:
        message = f"the new student is in {folder} and loads, but a power failure may undo that; save it again: {error}"
        raise OSError(_error_number(error), message) from error
    return folder


def load_student(folder, student):
    """Load what :func:`save_student` wrote into a module of the same make, for use: it is in eval mode afterwards.

    Everything is checked before the student is changed: the files against their checksum, the tensors in the file
    against the document, and both against the student. Nothing is converted. After any error the student is what it
    was, to the bit, and in the mode that it had; for this a copy of it is kept until it is filled.

    Args:
        folder: where the student was saved.
        student: a module with the same tensors. It is filled in place, on its own device; buffers that ``state_dict``
            does not hold are left alone. Of what ``torch.compile`` gives the plain module is filled.

    Returns:
        the student, in eval mode; call its ``train()`` to train it further.

    Raises:
        FileNotFoundError: no such folder, or a file is missing.
        ValueError: a damaged file, or two that do not belong together; a format that this version does not know; a
            student whose tensors are others, have other shapes or dtypes, or are not tied where the saved ones were:
            the first one is named; one on the meta device, or with lazy modules that have not run yet.
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
    module = _plain_module(student)
    safetensors_torch()
    state, folder = _state_of(module), Path(folder)
    document, tensors = _read_saved(folder)
    _check_content(folder, document, tensors)
    _check_fit(document, state)
    for names in document["tied"]:  # the file has one of them
        content = next(tensors[name] for name in names if name in tensors)
        tensors |= dict.fromkeys(names, content)
    with _unchanged_on_error(student):
        _fill(module, tensors, folder)
        student.eval()
    return student


def _state_of(student) -> dict:
    """The module's state, of which every tensor can be written and filled."""
    state = student.state_dict()
    for name, x in state.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"student must have a state of tensors alone; {name} is {type(x).__name__}")
        if is_lazy(x):
            raise ValueError(f"student must have run once, so that its lazy modules have shapes; {name} has none yet")
        if x.is_meta:
            raise ValueError(f"student must be on a device that holds numbers, such as the CPU; {name} is on meta")
        if x.layout is not torch.strided:
            raise TypeError(f"student must have a state of dense tensors; {name} is {x.layout}: use its to_dense()")
    known = {dtype: _is_storable(dtype) for dtype in {x.dtype for x in state.values()}}
    for name, x in state.items():
        if not known[x.dtype]:
            raise TypeError(f"student must have dtypes that safetensors can hold; {name} is {x.dtype}")
    return state


def _is_storable(dtype) -> bool:
    """Whether safetensors can write a dtype; it has no public list of them."""
    try:
        safetensors_torch().save({"x": torch.empty(0, dtype=dtype)})
    except (KeyError, ValueError, RuntimeError):
        return False
    return True


def _content(state, tied) -> tuple[dict, dict]:
    """The tensors for the file, those that are tied once; and, as its metadata, under which names the others are."""
    others = {name: min(names) for names in tied for name in names if name != min(names)}
    kept = {name: x for name, x in state.items() if name not in others}
    sharing = Counter(x.untyped_storage().data_ptr() for x in kept.values())
    tensors = {}
    for name, x in kept.items():
        shares = sharing[x.untyped_storage().data_ptr()] > 1  # safetensors refuses views of the same memory
        x = x.detach().resolve_conj().resolve_neg().contiguous()
        tensors[name] = x.clone() if shares else x
    return tensors, others


def _describe_student(student, state, metadata) -> dict:
    try:
        json.dumps(metadata, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(f"metadata must be what JSON can hold (arrays as lists): {error}") from error
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
            memory = x.device, x.untyped_storage().data_ptr(), x.storage_offset(), x.shape, x.stride()
            key = *memory, x.dtype, x.is_conj(), x.is_neg()
            groups.setdefault(key, []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def _read_saved(folder) -> tuple[dict, dict]:
    """The document and the tensors that belong together, also while another process saves a new student."""
    if not folder.is_dir():
        raise FileNotFoundError(f"folder must hold a saved student, and there is no folder {folder}")
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
            if _is_same(file, path):  # what was hashed is what was read
                return document, tensors


def _is_same(file, path) -> bool:
    return os.path.samestat(os.fstat(file.fileno()), os.stat(path))


def _matching_document(folder, digest) -> dict:
    """The document of the tensors with this digest: the one in place, or one whose rename was interrupted."""
    path = folder / _DOCUMENT
    # A save can rename the second one while the first is read: then the third is it.
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


def _parse(path) -> dict:
    try:
        document = parse_json(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):  # no JSON, or no UTF-8
        return {}
    return document if isinstance(document, dict) else {}


def _read_tensors(path) -> dict:
    from safetensors import SafetensorError

    try:
        return safetensors_torch().load_file(path)
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:  # KeyError: a dtype that it does not know
        raise ValueError(f"folder: {path} is damaged, or not a safetensors file: {error}") from error


def _settle(folder):
    """Finish a save that was killed between its two renames; the next one would write over its document."""
    pending, tensors = unfinished_path(folder / _DOCUMENT), folder / _TENSORS
    if pending.exists() and tensors.exists() and _parse(pending).get("sha256") == _sha256(tensors):
        os.replace(pending, folder / _DOCUMENT)


def _check_content(folder, document, tensors):
    """The tensors in the file are those that the document speaks of; of tied ones there is one."""
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


def _check_fit(document, state):
    saved, own, kind = document["tensors"], _layout(state), document["class"]
    for name in saved:
        if name not in own:
            raise ValueError(f"student must have every tensor of the saved one ({kind}); it has no {name!r}")
        if saved[name] != own[name]:
            hint = ""
            if saved[name]["shape"] == own[name]["shape"]:
                hint = f": load into student.to(torch.{saved[name]['dtype']}) and convert it afterwards"
            raise ValueError(
                f"student must have the shapes and dtypes of the saved one ({kind}): {name!r} was "
                f"{_form(saved[name])}, here it is {_form(own[name])}{hint}"
            )
    for name in own:
        if name not in saved:
            raise ValueError(f"student must have no other tensors than the saved one ({kind}); it has {name!r}")
    if set(map(frozenset, _ties(state))) != set(map(frozenset, document["tied"])):
        raise ValueError(
            f"student must tie the same tensors as the saved one ({kind}): tied there are "
            f"{document['tied'] or 'none'}, here {_ties(state) or 'none'}"
        )


@contextmanager
def _unchanged_on_error(student):
    """If something fails inside, the student has its numbers and its modes back."""
    modes = [(m, m.training) for m in student.modules()]
    registered = [(owner, dict(owner)) for m in student.modules() for owner in (m._parameters, m._buffers)]
    tensors = [(x, x.detach().clone()) for x in (*student.parameters(), *student.buffers())]
    try:
        yield
    except BaseException:
        for owner, before in registered:
            owner.clear()
            owner.update(before)
        for x, before in tensors:
            with suppress(RuntimeError), torch.no_grad():  # what cannot be written to has not changed
                x.copy_(before)
        for m, training in modes:
            m.training = training
        raise


def _fill(module, tensors, folder):
    try:
        module.load_state_dict(tensors)
    except Exception as error:
        raise ValueError(f"student could not be filled from {folder}, and is as it was: {error}") from error
    state = module.state_dict()
    for name, x in tensors.items():  # a module's own loading may change numbers, and views of one memory overwrite them
        if not np.array_equal(as_bytes(state[name]), as_bytes(x)):
            raise ValueError(
                f"student must hold what is loaded into it, and is as it was: {name!r} became something else. Does it "
                "share memory with another tensor, or does the module change what it loads?"
            )


def _form(layout) -> str:
    return f"{layout['dtype']} {tuple(layout['shape'])}"


def _sha256(path) -> str:
    with open(path, "rb") as file:
        return _digest(file)


def _digest(file) -> str:
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
