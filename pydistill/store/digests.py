"""The bytes of tensors, arrays and files, a few megabytes at a time, and CRC-32 checksums of files."""

import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_CHUNK = 1 << 24  # bytes read or hashed at a time


def byte_chunks(rows: Tensor | NDArray[Any]) -> Iterator[memoryview]:
    """Yield the bytes of a tensor or array of at least one dimension, in order."""
    if rows.dtype == object:
        raise TypeError("data must be numbers, got an array of Python objects")
    row_bytes = max(1, math.prod(rows.shape[1:]) * rows.itemsize)
    step = max(1, _CHUNK // row_bytes)
    for start in range(0, len(rows), step):
        yield as_bytes(rows[start : start + step]).data


def as_bytes(values: Tensor | NDArray[Any]) -> NDArray[np.uint8]:
    """Return the bytes of a tensor or array as a flat array."""
    if isinstance(values, Tensor):
        values = values.detach().cpu().resolve_conj().resolve_neg()
        values = values.contiguous().reshape(-1).view(torch.uint8).numpy()
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8)


def file_crc(path: Path, count: int) -> int:
    """Compute the CRC-32 of the first ``count`` bytes of a file."""
    crc = 0
    with open(path, "rb", buffering=0) as file:
        while count and (chunk := file.read(min(count, _CHUNK))):
            crc, count = zlib.crc32(chunk, crc), count - len(chunk)
    return crc
