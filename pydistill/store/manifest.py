"""The manifest says what a store holds and how far it is; the files are checked against it."""

import json
import math
import os
import tokenize
import zlib

import numpy as np

from pydistill._files import flush_names, form_problem, parse_json, write_through
from pydistill.store.digests import file_crc
from pydistill.store.layout import DTYPES, file_specs

_MANIFEST, _PARTIAL_MANIFEST = "manifest.json", "manifest.json.partial"
FORMAT = 1

_LAYOUT = {"shape": [int], "dtype": str, "k": int | None, "temperatures": [int | float], "tail": str | None}
_REQUEST = {"k": int | None, "temperatures": list | None, "tail": str | None, "dtype": str, "data": str, "teacher": str}
_FORM = {"request": _REQUEST, "layout": _LAYOUT, "rows_written": int, "has_zeros": bool, "files": dict}
_FILE = {"header": int, "row_bytes": int, "crc32": int}


def manifest_crc(manifest) -> int:
    """The manifest's own checksum, in its file; it also tells one store from another."""
    return zlib.crc32(json.dumps(manifest, sort_keys=True).encode())


def read_manifest(folder) -> dict | None:
    """The folder's manifest, checked; None if there is none."""
    try:
        content = (folder / _MANIFEST).read_bytes()
    except FileNotFoundError:
        return None
    try:
        manifest = parse_json(content)
        checksum = manifest.pop("checksum") if isinstance(manifest, dict) else None
        whole = checksum is not None and checksum == manifest_crc(manifest)
    except (ValueError, KeyError, RecursionError):  # the last: JSON so deep that it can be read, but not written
        whole = False
    if not whole:
        raise ValueError(_damaged(folder, _MANIFEST, "is no manifest, or was changed"))
    problem = form_problem(manifest, {"format": object})
    if problem is None and manifest["format"] != FORMAT:
        raise ValueError(f"the store in {folder} has format {manifest['format']!r}; this version reads {FORMAT}")
    problem = problem or form_problem(manifest, _FORM) or _contradiction(manifest)
    if problem:
        raise ValueError(_damaged(folder, _MANIFEST, problem))
    return manifest


def _contradiction(manifest) -> str | None:
    """What in a manifest of the right form cannot be."""
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
    if files.keys() != specs.keys() and (files or written):  # before the first row there may be none
        return f"has {', '.join(files) or 'nothing'} as files, which must be {', '.join(specs)}"
    for name, entry in files.items():
        problem = form_problem(entry, _FILE, f"files.{name}")
        if problem:
            return problem
        of_dtype, of_shape = specs[name]
        row_bytes = np.dtype(of_dtype).itemsize * math.prod(of_shape[1:])
        if entry["row_bytes"] != row_bytes or entry["header"] < 0:
            return f"has {entry} as files.{name}, of {row_bytes} bytes a row"
    return None


def replace_manifest(folder, manifest):
    """Whole or not at all, and on disk when this returns."""
    content = json.dumps(manifest | {"checksum": manifest_crc(manifest)}, indent=1)
    write_through(folder / _PARTIAL_MANIFEST, content.encode())
    os.replace(folder / _PARTIAL_MANIFEST, folder / _MANIFEST)
    flush_names(folder)


def check_holds_nothing(folder):
    """Without a manifest a folder with files is somebody else's."""
    others = sorted(path.name for path in folder.iterdir() if path.name != _PARTIAL_MANIFEST)
    if others:
        raise ValueError(f"folder must be empty or hold a teacher store; {folder} holds {', '.join(others[:5])}")


def check_files(folder, manifest, *, checksums):
    """The sizes of the files, and, if wanted, the checksums of the rows written so far."""
    written, rows = manifest["rows_written"], manifest["layout"]["shape"][0]
    for name, entry in manifest["files"].items():
        try:
            size = (folder / name).stat().st_size
        except FileNotFoundError:
            raise ValueError(_damaged(folder, name, "is missing")) from None
        expected = entry["header"] + rows * entry["row_bytes"]
        if size != expected:
            raise ValueError(_damaged(folder, name, f"has {size} bytes instead of {expected}"))
        if checksums and file_crc(folder / name, entry["header"] + written * entry["row_bytes"]) != entry["crc32"]:
            raise ValueError(_damaged(folder, name, "does not have the bytes that were written (CRC-32)"))


def _damaged(folder, name, how) -> str:
    return f"the store in {folder} is damaged: {name} {how}. Delete the folder and build it again"


def open_map(path, header, dtype, shape) -> np.ndarray:
    """A file of the store as a read-only array, not read yet; ``header`` is where its rows begin."""
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except (ValueError, TypeError, SyntaxError, tokenize.TokenError):  # numpy reads it as Python
        raise ValueError(_damaged(path.parent, path.name, "has no .npy header")) from None
    expected = np.dtype(dtype), shape, header, True
    if (array.dtype, array.shape, array.offset, array.flags.c_contiguous) != expected:
        raise ValueError(_damaged(path.parent, path.name, f"holds {array.dtype} {array.shape} from {array.offset} on"))
    return np.asarray(array)  # without memmap's own indexing, which is slower
