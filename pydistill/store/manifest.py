"""The manifest says what a store holds and how far it is; the files are checked against it."""

import json
import os
import zlib

import numpy as np

from pydistill.files import flush_names, write_through
from pydistill.store.digests import file_crc

_MANIFEST, _PARTIAL_MANIFEST = "manifest.json", "manifest.json.partial"
FORMAT = 1


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
        manifest = json.loads(content)
        checksum = manifest.pop("checksum")
    except (ValueError, LookupError, TypeError, AttributeError):
        manifest = checksum = None
    if manifest is None or checksum != manifest_crc(manifest):
        raise ValueError(_damaged(folder, _MANIFEST, "is no manifest, or was changed"))
    if manifest["format"] != FORMAT:
        raise ValueError(f"the store in {folder} has format {manifest['format']}; this version reads {FORMAT}")
    return manifest


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


def open_map(path, dtype, shape) -> np.ndarray:
    """A file of the store as a read-only array, not read yet."""
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except ValueError:
        raise ValueError(_damaged(path.parent, path.name, "has no .npy header")) from None
    if array.dtype != dtype or array.shape != shape:
        raise ValueError(_damaged(path.parent, path.name, f"holds {array.dtype} {array.shape}"))
    return np.asarray(array)  # without memmap's own indexing, which is slower
