"""The manifest of a store: its contents and the number of rows written. The files are checked against it."""

import json
import math
import tokenize
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from numpy.typing import DTypeLike, NDArray

from pydistill._files import form_problem, parse_json, unfinished_path, write_whole
from pydistill.store.digests import file_crc
from pydistill.store.layout import DTYPES, Layout, file_specs
from pydistill.store.request import Request

_MANIFEST = "manifest.json"
FORMAT = 1


class Placement(TypedDict):
    """Where the rows of a file lie: the bytes of its header, and the bytes of each row."""

    header: int
    row_bytes: int


class FileEntry(Placement):
    """A file of the store, with the checksum of its header and of the rows written so far."""

    crc32: int


class Manifest(TypedDict):
    """The contents of ``manifest.json`` without its own checksum."""

    format: int
    request: Request
    layout: Layout
    rows_written: int
    has_zeros: bool
    files: dict[str, FileEntry]


_LAYOUT = {"shape": [int], "dtype": str, "k": int | None, "temperatures": [int | float], "tail": str | None}
_REQUEST = {"k": int | None, "temperatures": list | None, "tail": str | None, "dtype": str, "data": str, "teacher": str}
_FORM = {"request": _REQUEST, "layout": _LAYOUT, "rows_written": int, "has_zeros": bool, "files": dict}
_FILE = {"header": int, "row_bytes": int, "crc32": int}


def manifest_crc(manifest: Mapping[str, object]) -> int:
    """Return the checksum that is stored with the manifest; it also distinguishes one store from another."""
    return zlib.crc32(json.dumps(manifest, sort_keys=True).encode())


def read_manifest(folder: Path) -> Manifest | None:
    """Read and check the folder's manifest; return None if there is none."""
    try:
        content = (folder / _MANIFEST).read_bytes()
    except FileNotFoundError:
        return None
    try:
        found: Any = parse_json(content)
        checksum = found.pop("checksum") if isinstance(found, dict) else None
        unchanged = checksum is not None and checksum == manifest_crc(found)
    except (ValueError, KeyError, RecursionError):  # RecursionError: nested too deeply to be written again
        unchanged = False
    if not unchanged:
        raise _damaged(folder, _MANIFEST, "is not a manifest, or was changed")
    problem = form_problem(found, {"format": object})
    if problem is None and found["format"] != FORMAT:
        raise ValueError(f"the store in {folder} has format {found['format']!r}; this version reads {FORMAT}")
    problem = problem or form_problem(found, _FORM)
    if problem is None:
        manifest: Manifest = found
        problem = _contradiction(manifest)
        if problem is None:
            return manifest
    raise _damaged(folder, _MANIFEST, problem)


def _contradiction(manifest: Manifest) -> str | None:
    """Describe an impossible value in a manifest of the right form; None if there is none."""
    layout, written, files = manifest["layout"], manifest["rows_written"], manifest["files"]
    shape, dtype, k, temperatures = layout["shape"], layout["dtype"], layout["k"], layout["temperatures"]
    if len(shape) < 2 or min(shape) < 1:
        return f"has {shape} as layout.shape"
    if dtype not in DTYPES:
        return f"has {dtype!r} as layout.dtype"
    if k is not None and not 1 <= k <= shape[-1]:
        return f"has {k} as layout.k, of {shape[-1]} classes"
    if layout["tail"] not in ((None,) if k is None else ("renormalize", "bucket")):
        return f"has {layout['tail']!r} as layout.tail"
    if not all(0 < t < math.inf for t in temperatures) or (k is None and temperatures):
        return f"has {temperatures} as layout.temperatures"
    if not 0 <= written <= shape[0]:
        return f"has {written} as rows_written, of {shape[0]} rows"
    specs = file_specs(layout)
    if files.keys() != specs.keys() and (files or written):  # before the first row there may be no files
        return f"has {', '.join(files) or 'nothing'} as files, which must be {', '.join(specs)}"
    for name, entry in files.items():
        problem = form_problem(entry, _FILE, f"files.{name}")
        if problem:
            return problem
        of_dtype, of_shape = specs[name]
        row_bytes = np.dtype(of_dtype).itemsize * math.prod(of_shape[1:])
        if entry["row_bytes"] != row_bytes or entry["header"] < 0:
            return f"has {entry} as files.{name}, whose rows have {row_bytes} bytes"
    return None


def replace_manifest(folder: Path, manifest: Manifest) -> None:
    """Replace the manifest atomically; it is on disk when this returns."""
    content = json.dumps({**manifest, "checksum": manifest_crc(manifest)}, indent=1)
    write_whole(folder / _MANIFEST, content.encode())


def check_holds_nothing(folder: Path) -> None:
    """Check that a folder without a manifest is empty, because any file in it does not belong to a store."""
    unfinished = unfinished_path(folder / _MANIFEST)
    others = sorted(path.name for path in folder.iterdir() if path != unfinished)
    if others:
        raise ValueError(f"folder must be empty or hold a teacher store; {folder} holds {', '.join(others[:5])}")


def check_files(folder: Path, manifest: Manifest, *, checksums: bool) -> None:
    """Check the sizes of the files and, with ``checksums``, the bytes of their headers and of the rows written."""
    written, rows = manifest["rows_written"], manifest["layout"]["shape"][0]
    for name, entry in manifest["files"].items():
        try:
            size = (folder / name).stat().st_size
        except FileNotFoundError:
            raise _damaged(folder, name, "is missing") from None
        expected = entry["header"] + rows * entry["row_bytes"]
        if size != expected:
            raise _damaged(folder, name, f"has {size} bytes instead of {expected}")
        if checksums and file_crc(folder / name, entry["header"] + written * entry["row_bytes"]) != entry["crc32"]:
            raise _damaged(folder, name, "does not have the bytes that were written (CRC-32)")


def _damaged(folder: Path, name: str, problem: str) -> ValueError:
    return ValueError(f"the store in {folder} is damaged: {name} {problem}. Delete the folder and build it again")


def open_map(path: Path, header: int, dtype: DTypeLike, shape: tuple[int, ...]) -> NDArray[Any]:
    """Memory-map a file of the store as a read-only array, without reading it; its rows begin at byte ``header``."""
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except (ValueError, TypeError, SyntaxError, tokenize.TokenError):  # numpy parses the header as Python
        raise _damaged(path.parent, path.name, "has no .npy header") from None
    expected = np.dtype(dtype), shape, header, True
    if (array.dtype, array.shape, array.offset, array.flags.c_contiguous) != expected:
        raise _damaged(path.parent, path.name, f"holds {array.dtype} {array.shape} from {array.offset} on")
    return np.asarray(array)  # indexing a plain array is faster than indexing a memmap
