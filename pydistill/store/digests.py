"""The bytes of tensors, arrays and files, into digests some megabytes at a time."""

import math
import zlib

import numpy as np
import torch
from torch import Tensor

_CHUNK = 1 << 24  # bytes read or hashed at a time


def hash_rows(digest, rows):
    """The bytes of a tensor or array into a digest, some megabytes at a time."""
    if rows.dtype == object:
        raise TypeError("data must be numbers, got an array of Python objects")
    width = max(1, math.prod(rows.shape[1:]) * rows.itemsize)
    step = max(1, _CHUNK // width)
    for start in range(0, len(rows), step):
        digest.update(as_bytes(rows[start : start + step]))


def as_bytes(values):
    """A tensor or array as a flat array of its bytes."""
    if isinstance(values, Tensor):
        values = values.detach().cpu().resolve_conj().resolve_neg()
        return values.contiguous().reshape(-1).view(torch.uint8).numpy()
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8)


def file_crc(path, count) -> int:
    """CRC-32 of the first ``count`` bytes."""
    crc = 0
    with open(path, "rb", buffering=0) as file:
        while count and (chunk := file.read(min(count, _CHUNK))):
            crc, count = zlib.crc32(chunk, crc), count - len(chunk)
    return crc
