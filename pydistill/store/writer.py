"""Writes the rows of a store, one builder at a time. Rows are synced to disk before the manifest records them."""

import errno
import os
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pydistill.store.digests import as_bytes
from pydistill.store.layout import Layout, as_columns, file_specs, layout_of
from pydistill.store.manifest import FORMAT, Manifest, Placement, check_files, replace_manifest
from pydistill.store.request import Request
from pydistill.targets import SoftTargets

# A kill loses at most this much work. Syncing the files and the manifest took 20 to 40 ms; with a sync after every
# batch, building from a small teacher took twice as long.
_SECONDS_BETWEEN_SYNCS = 1.0


class _Progress(NamedTuple):
    """The number of rows appended so far, the files' checksums, and whether any probability was 0.

    All three are replaced in one assignment, because an interrupt between several assignments would leave checksums
    that do not belong to the rows.
    """

    rows: int
    checksums: dict[str, int]
    has_zeros: bool


class Writer:
    """Appends batches to the files of a store, and records in the manifest how many rows are on disk."""

    def __init__(self, folder: Path, manifest: Manifest | None, request: Request, rows: int) -> None:
        self._folder, self._request, self._rows = folder, request, rows
        self._layout: Layout | None = None
        self._files: dict[str, FileIO] = {}
        self._placements: dict[str, Placement] = {}
        self._progress = _Progress(0, {}, False)
        self._synced, self._sync_time = 0, time.monotonic()
        if manifest is None or not manifest["rows_written"]:
            return
        check_files(folder, manifest, checksums=True)
        entries = manifest["files"]
        self._layout, self._synced = manifest["layout"], manifest["rows_written"]
        for name, entry in entries.items():
            self._placements[name] = {"header": entry["header"], "row_bytes": entry["row_bytes"]}
        checksums = {name: entry["crc32"] for name, entry in entries.items()}
        self._progress = _Progress(self._synced, checksums, manifest["has_zeros"])
        self._files = {name: FileIO(folder / name, "r+") for name in entries}

    @property
    def written(self) -> int:
        """Rows appended so far, on disk or not."""
        return self._progress.rows

    def append(self, targets: SoftTargets) -> None:
        """Write a batch after the rows that are already there, and sync if the last sync was long ago."""
        shape = [self._rows, *targets.shape[1:]]
        layout = layout_of(targets, shape, self._request["dtype"])
        columns = as_columns(targets, layout["dtype"], self.written)
        with _write_errors(self._folder):
            if self._layout is None:
                self._create(layout)
            elif layout != self._layout:
                raise ValueError(
                    f"teacher must give outputs of one form; from row {self.written} on it is {layout}, before that "
                    f"{self._layout}"
                )
            rows, checksums, has_zeros = self._progress
            checksums = dict(checksums)
            for name, column in columns.items():
                place, content = self._placements[name], as_bytes(column).data
                _write_at(self._files[name], place["header"] + rows * place["row_bytes"], content)
                checksums[name] = zlib.crc32(content, checksums[name])
            self._progress = _Progress(rows + len(targets), checksums, has_zeros or targets.has_zeros)
        if time.monotonic() - self._sync_time >= _SECONDS_BETWEEN_SYNCS:
            self.sync()

    def sync(self) -> None:
        """Sync every row appended so far to disk, then record them in the manifest."""
        if self._layout is None or self.written == self._synced:
            return
        with _write_errors(self._folder):
            for file in self._files.values():
                os.fsync(file.fileno())
            self._write_manifest(self._layout)
        self._synced, self._sync_time = self.written, time.monotonic()

    def close(self) -> None:
        """Close the files without a sync."""
        for file in self._files.values():
            file.close()

    def _create(self, layout: Layout) -> None:
        """Create the files at their full size. The manifest is written first: it marks the folder as a store."""
        self._layout = layout
        self._write_manifest(layout)
        checksums = {}
        try:
            for name, (dtype, shape) in file_specs(layout).items():
                empty = np.lib.format.open_memmap(self._folder / name, mode="w+", dtype=dtype, shape=shape)
                header, row_bytes = empty.offset, empty[0].nbytes
                del empty
                file = self._files[name] = FileIO(self._folder / name, "r+")
                _reserve(file, header + shape[0] * row_bytes)
                file.seek(0)
                checksums[name] = zlib.crc32(file.read(header))
                self._placements[name] = {"header": header, "row_bytes": row_bytes}
        except OSError:
            for name in file_specs(layout):  # they hold no rows yet, and a full disk needs their space
                (self._folder / name).unlink(missing_ok=True)
            raise
        self._progress = _Progress(0, checksums, False)

    def _write_manifest(self, layout: Layout) -> None:
        rows, checksums, has_zeros = self._progress
        replace_manifest(
            self._folder,
            {
                "format": FORMAT,
                "request": self._request,
                "layout": layout,
                "rows_written": rows,
                "has_zeros": has_zeros,
                "files": {name: {**place, "crc32": checksums[name]} for name, place in self._placements.items()},
            },
        )


def _write_at(file: FileIO, offset: int, content: memoryview) -> None:
    file.seek(offset)
    while content:
        content = content[file.write(content) :]


def _reserve(file: FileIO, size: int) -> None:
    """Reserve space for the whole file, so that a full disk stops the build before the teacher has run for hours."""
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # a file system that cannot do it
            raise


@contextmanager
def _write_errors(folder: Path) -> Iterator[None]:
    """Add the folder, and how to continue, to the message of an OSError."""
    try:
        yield
    except OSError as error:
        raise OSError(
            error.errno,
            f"{error.strerror or error}, while writing the teacher store; the rows already recorded are safe, and "
            "TeacherStore.build with the same arguments continues after them",
            str(folder),
        ) from error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock the folder for one builder. The operating system releases the lock when the process ends, however it ends.

    Only POSIX has such locks; elsewhere nothing happens.
    """
    if os.name != "posix":
        yield
        return
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
