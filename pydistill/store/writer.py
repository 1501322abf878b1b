"""Rows on their way to disk: one builder at a time, and what the manifest speaks of is there before it speaks."""

import errno
import os
import time
import zlib
from contextlib import contextmanager
from io import FileIO

import numpy as np

from pydistill.store.digests import as_bytes
from pydistill.store.layout import as_columns, file_specs, layout_of
from pydistill.store.manifest import FORMAT, check_files, replace_manifest

# A kill loses at most this much work. Syncing the files and the manifest took 20 to 40 ms: after every batch, a small
# teacher's build took twice as long.
_SECONDS_BETWEEN_SYNCS = 1.0


class Writer:
    """Appends batches to the files of a store, and records in the manifest how far they are on disk."""

    def __init__(self, folder, manifest, request, rows):
        self._folder, self._request, self._rows = folder, request, rows
        self._files, self._layout, self._entries = {}, None, {}
        self._state = (0, {}, False)  # rows, checksums, zeros: one assignment, so that no interrupt can split them
        self._synced, self._sync_time = 0, time.monotonic()
        if manifest is None or not manifest["rows_written"]:
            return
        check_files(folder, manifest, checksums=True)
        self._layout, self._entries = manifest["layout"], manifest["files"]
        self._synced = manifest["rows_written"]
        self._state = (
            self._synced,
            {name: entry["crc32"] for name, entry in self._entries.items()},
            manifest["has_zeros"],
        )
        self._files = {name: FileIO(folder / name, "r+") for name in self._entries}

    @property
    def written(self) -> int:
        """Rows appended so far, on disk or not."""
        return self._state[0]

    def append(self, targets):
        """Write a batch behind the rows that are there; now and then everything is synced."""
        shape = [self._rows, *targets.shape[1:]]
        layout = layout_of(targets, shape, self._request["dtype"])
        columns = as_columns(targets, layout["dtype"], self.written)
        with _write_errors(self._folder):
            if self._layout is None:
                self._create(layout)
            elif layout != self._layout:
                raise ValueError(
                    f"teacher must give outputs of one form; at row {self.written} they became {layout}, after "
                    f"{self._layout}"
                )
            written, checksums, zeros = self._state
            checksums = dict(checksums)
            for name, column in columns.items():
                entry, content = self._entries[name], memoryview(as_bytes(column))
                _write_at(self._files[name], entry["header"] + written * entry["row_bytes"], content)
                checksums[name] = zlib.crc32(content, checksums[name])
            self._state = (written + len(targets), checksums, zeros or targets.has_zeros)
        if time.monotonic() - self._sync_time >= _SECONDS_BETWEEN_SYNCS:
            self.sync()

    def sync(self):
        """Everything appended so far to disk, then the manifest that says so."""
        if self.written == self._synced:
            return
        with _write_errors(self._folder):
            for file in self._files.values():
                os.fsync(file.fileno())
            self._write_manifest()
        self._synced, self._sync_time = self.written, time.monotonic()

    def close(self):
        """Close the files; nothing is synced."""
        for file in self._files.values():
            file.close()

    def _create(self, layout):
        """The files, at their full size. The manifest comes first, as the sign that the folder is a store's."""
        self._layout = layout
        self._write_manifest()
        checksums = {}
        try:
            for name, (dtype, shape) in file_specs(layout).items():
                empty = np.lib.format.open_memmap(self._folder / name, mode="w+", dtype=dtype, shape=shape)
                header, row_bytes = empty.offset, empty[0].nbytes
                del empty
                file = self._files[name] = FileIO(self._folder / name, "r+")
                _claim(file, header + shape[0] * row_bytes)
                file.seek(0)
                checksums[name] = zlib.crc32(file.read(header))
                self._entries[name] = {"header": header, "row_bytes": row_bytes}
        except OSError:
            for name in file_specs(layout):  # they hold nothing yet, and their space may be what others lack
                (self._folder / name).unlink(missing_ok=True)
            raise
        self._state = (0, checksums, False)

    def _write_manifest(self):
        written, checksums, zeros = self._state
        replace_manifest(
            self._folder,
            {
                "format": FORMAT,
                "request": self._request,
                "layout": self._layout,
                "rows_written": written,
                "has_zeros": zeros,
                "files": {name: entry | {"crc32": checksums[name]} for name, entry in self._entries.items()},
            },
        )


def _write_at(file, offset, content):
    file.seek(offset)
    while content:
        content = content[file.write(content) :]


def _claim(file, size):
    """Space for the whole file, now: a full disk should stop the build before the teacher has run for hours."""
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # a file system that cannot do it
            raise


@contextmanager
def _write_errors(folder):
    try:
        yield
    except OSError as error:
        raise OSError(
            error.errno,
            f"{error.strerror or error}, while writing the teacher store; what was recorded is safe, and "
            "TeacherStore.build with the same arguments goes on from there",
            str(folder),
        ) from error


@contextmanager
def locked(folder):
    """One builder at a time. The system drops the lock with the process, however it ends."""
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
