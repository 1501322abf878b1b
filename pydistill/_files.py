"""Atomic writing of files, and checks of the form of what was read from them.

A file is written under another name, flushed to the disk and then renamed; the rename is flushed too. At any moment,
and after a power failure, the path holds the complete old file or the complete new one.
"""

import errno
import json
import os
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias, get_args

Form: TypeAlias = Any  # a type, a union of types, or a list, tuple or dict of forms: see form_problem


def unfinished_path(path: Path) -> Path:
    """Return the path under which a file is written before it is renamed."""
    return path.with_name(f"{path.name}.new")


def write_through(path: str | os.PathLike[str], data: bytes) -> None:
    """Write bytes to a file and flush them: they are on the disk when this returns."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_whole(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file atomically. If the new content cannot be written, the file that was there stays as it is.

    Raises:
        OSError: the content could not be written; or, if the file has the new content, its rename could not be flushed.
    """
    path = Path(path)
    unfinished = unfinished_path(path)
    try:
        write_through(unfinished, data)
        os.replace(unfinished, path)
    except OSError:
        with suppress(OSError):
            unfinished.unlink()
        raise
    flush_names(path.parent)


def flush_names(folder: str | os.PathLike[str]) -> None:
    """Flush a folder's renames to the disk. Only POSIX has a call for this; elsewhere nothing happens."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # the file system cannot flush folders
            raise
    finally:
        os.close(descriptor)


def parse_json(text: str | bytes) -> Any:
    """Parse JSON. For JSON that is nested too deeply, raise a ValueError instead of a RecursionError."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("JSON that is nested too deeply") from None


def form_problem(value: Any, form: Form, key: str = "") -> str | None:
    """Describe how a value that was read from a file differs from the form that it must have; None if it does not.

    ``form`` is a type or a union of types, where ``object`` stands for anything; ``[form]`` for a list of any length;
    ``(form, form)`` for a list or tuple of this length; or ``{key: form}`` for a dict that has at least these keys.
    Types are compared exactly, so that True is not an integer.
    """
    kind = type(form) if isinstance(form, dict | list) else list | tuple if isinstance(form, tuple) else form
    kinds = get_args(kind) or (kind,)
    if object not in kinds and type(value) not in kinds:
        names = " or ".join(x.__name__ for x in kinds)
        return f"has {type(value).__name__} where {key or 'all of it'} must be {names}"
    if isinstance(form, list | tuple):
        if isinstance(form, tuple) and len(value) != len(form):
            return f"has {len(value)} items where {key} must have {len(form)}"
        forms = form if isinstance(form, tuple) else form * len(value)
        inner = [(f"{key}[{i}]", item, part) for i, (item, part) in enumerate(zip(value, forms, strict=True))]
    elif isinstance(form, dict):
        missing = [name for name in form if name not in value]
        if missing:
            return f"has no {_join(key, missing[0])}"
        inner = [(_join(key, name), value[name], part) for name, part in form.items()]
    else:
        return None
    return next((problem for at, item, part in inner if (problem := form_problem(item, part, at))), None)


def _join(key: str, name: object) -> str:
    return f"{key}.{name}" if key else str(name)


def safetensors_torch() -> ModuleType:
    """Import the optional library safetensors."""
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "checkpoints and saved students need safetensors: pip install 'pydistill-kd[ship]'"
        ) from error
    return safetensors.torch
