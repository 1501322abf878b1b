"""The layout of a store: its files, their dtypes and shapes, and the conversion of a batch to the arrays they hold."""

from typing import Any, Literal, TypeAlias, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray

from pydistill.targets import SoftTargets, Tail

DTypeName: TypeAlias = Literal["float32", "float16", "bfloat16"]

DTYPES: dict[DTypeName, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
_NUMPY_DTYPES: dict[DTypeName, type[np.generic]] = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": np.uint16,  # numpy has no bfloat16; the bits are stored
}


class Layout(TypedDict):
    """The form of the teacher's outputs, as the manifest records it; ``shape`` counts all rows and classes."""

    shape: list[int]
    dtype: DTypeName
    k: int | None
    temperatures: list[float]
    tail: Tail | None


def layout_of(targets: SoftTargets, shape: list[int], dtype: DTypeName) -> Layout:
    """Return the layout of a store that holds targets of this form."""
    return {
        "shape": shape,
        "dtype": dtype,
        "k": None if targets.indices is None else targets.indices.shape[-1],
        "temperatures": list(targets.log_partitions),
        "tail": targets.tail,
    }


def file_specs(layout: Layout) -> dict[str, tuple[type[np.generic], tuple[int, ...]]]:
    """Return the dtype and shape of each file of a layout, by file name."""
    shape, k, dtype = tuple(layout["shape"]), layout["k"], _NUMPY_DTYPES[layout["dtype"]]
    if k is None:
        return {"logits.npy": (dtype, shape)}
    specs: dict[str, tuple[type[np.generic], tuple[int, ...]]] = {
        "logits.npy": (dtype, (*shape[:-1], k)),
        "indices.npy": (np.int32, (*shape[:-1], k)),
    }
    for i in range(len(layout["temperatures"])):
        specs[f"log_partition_{i}.npy"] = (np.float64, shape[:-1])
    return specs


def as_columns(targets: SoftTargets, dtype: DTypeName, first: int) -> dict[str, NDArray[Any]]:
    """Convert a batch to the arrays that are written, by file name; ``first`` is the number of its first row."""
    logits = targets.logits.cpu()
    if targets.indices is not None and dtype != "float32":
        logits = logits - logits.amax(-1, keepdim=True)
    rounded = logits.to(DTYPES[dtype])
    lost = rounded.isinf() & logits.isfinite()
    if lost.any():
        at = tuple(lost.nonzero()[0])
        raise ValueError(
            f"dtype must hold the teacher's logits: {logits[at]:g} in row {first + int(at[0])} is infinite in {dtype}; "
            'use "bfloat16" or "float32"'
        )
    bits = rounded.contiguous().view(torch.uint16) if dtype == "bfloat16" else rounded.contiguous()
    columns = {"logits.npy": bits.numpy()}
    if targets.indices is None:
        return columns
    columns["indices.npy"] = targets.indices.cpu().to(torch.int32).contiguous().numpy()
    for i, (t, partition) in enumerate(targets.log_partitions.items()):
        # The probability outside the top k is -expm1(logsumexp(top k) - log-partition). Rounding changed the first
        # term; the same change is added to the second, so that the difference stays exact.
        exact, stored = ((x.double() / t).logsumexp(-1) for x in (targets.logits.cpu(), rounded))
        columns[f"log_partition_{i}.npy"] = (partition.cpu() + (stored - exact)).contiguous().numpy()
    return columns
