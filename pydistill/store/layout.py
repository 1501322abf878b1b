"""The form of a store's files: which there are, their dtypes and shapes, and a batch as what each of them gets."""

import numpy as np
import torch

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_NUMPY_DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}  # numpy has no bfloat16: its bits


def layout_of(targets, shape, dtype) -> dict:
    """What the manifest says about the form of the outputs."""
    return {
        "shape": shape,
        "dtype": dtype,
        "k": None if targets.indices is None else targets.indices.shape[-1],
        "temperatures": list(targets.log_partitions),
        "tail": targets.tail,
    }


def file_specs(layout) -> dict:
    """The files that a layout has: their dtypes and shapes."""
    shape, k, dtype = tuple(layout["shape"]), layout["k"], _NUMPY_DTYPES[layout["dtype"]]
    if k is None:
        return {"logits.npy": (dtype, shape)}
    specs = {"logits.npy": (dtype, (*shape[:-1], k)), "indices.npy": (np.int32, (*shape[:-1], k))}
    for i in range(len(layout["temperatures"])):
        specs[f"log_partition_{i}.npy"] = (np.float64, shape[:-1])
    return specs


def as_columns(targets, dtype, first) -> dict:
    """A batch as the arrays that the files get."""
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
        # The rest of the mass is -expm1(log-sum-exp of the k - log-partition): move both by what rounding did to one.
        exact, stored = ((x.double() / t).logsumexp(-1) for x in (targets.logits.cpu(), rounded))
        columns[f"log_partition_{i}.npy"] = (partition.cpu() + (stored - exact)).contiguous().numpy()
    return columns
