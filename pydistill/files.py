"""Files that are whole or not there: written and flushed under another name, then renamed."""

import os
from pathlib import Path


def unfinished_path(path) -> Path:
    """Where a file is until it is whole."""
    return path.with_name(f"{path.name}.new")


def write_through(path, data):
    """Write bytes; they are on disk when this returns."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_whole(path, data):
    """Write bytes under a name; a file that was there stays as it is if the new one cannot be written."""
    unfinished = unfinished_path(Path(path))
    try:
        write_through(unfinished, data)
        os.replace(unfinished, path)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise
