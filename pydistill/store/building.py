"""The teacher runs over the data, batch by batch; what it says is checked and handed to the writer."""

import warnings
from contextlib import contextmanager, suppress

import numpy as np
import torch
from torch import Tensor

from pydistill._torch_modules import as_input, float_dtype, mode
from pydistill.store.sources import batches
from pydistill.store.writer import Writer
from pydistill.targets import SoftTargets, top_k
from pydistill.teachers.outputs import teacher_outputs


def fill(folder, manifest, request, rows, source, teacher, batch_size):
    """All rows that the folder does not hold yet; an error leaves those before it recorded."""
    if isinstance(teacher, SoftTargets) and len(teacher) != rows:
        raise ValueError(f"teacher must have a row per row of data, got {len(teacher)} for {rows}")
    writer = Writer(folder, manifest, request, rows)
    try:
        with _runnable(teacher) as run:
            for inputs in batches(source, writer.written, batch_size):
                if writer.written + len(inputs) > rows:
                    raise ValueError(f"data must give the {rows} rows that it has, got more")
                targets = _as_targets(run(inputs, writer.written), writer.written, len(inputs))
                writer.append(_cut(targets, request))
        if writer.written < rows:
            raise ValueError(f"data must give the {rows} rows that it has, got {writer.written}")
        writer.sync()
    except BaseException:
        with suppress(OSError):  # what was recorded before stays valid, and the first error tells more
            writer.sync()
        raise
    finally:
        writer.close()


@contextmanager
def _runnable(teacher):
    """The teacher as a function of a batch and of the number of its first row."""

    def run_module(inputs, first):  # inference mode here only: a Dataset that keeps tensors must not get such ones
        with torch.inference_mode():
            return teacher(as_input(inputs, dtype))

    def run_classifier(inputs, first):
        return teacher_outputs(teacher, inputs.numpy() if isinstance(inputs, Tensor) else inputs)

    def run_callable(inputs, first):
        with torch.no_grad():
            return teacher(inputs)

    if isinstance(teacher, torch.nn.Module):
        dtype = float_dtype(teacher, None)
        with mode(teacher, training=False):
            yield run_module
    elif isinstance(teacher, SoftTargets):
        yield lambda inputs, first: teacher[first : first + len(inputs)]
    else:
        yield run_classifier if hasattr(teacher, "predict_proba") else run_callable


def _as_targets(output, first, rows) -> SoftTargets:
    """A batch's output, checked; ``first`` is the number of its first row."""
    if not isinstance(output, SoftTargets | Tensor | np.ndarray):
        raise TypeError(f"teacher must return logits or SoftTargets, got {type(output).__name__}")
    targets = output if isinstance(output, SoftTargets) else SoftTargets.from_logits(output)
    shape = tuple(targets.shape)
    if len(shape) < 2 or shape[0] != rows or 0 in shape:
        raise ValueError(f"teacher must give (rows, ..., classes) for a batch of {rows} rows, got shape {shape}")
    largest = targets.logits.amax(-1)
    if not largest.isfinite().all():
        at = tuple((~largest.isfinite()).nonzero()[0])
        raise ValueError(
            f"teacher must give a finite largest logit in every row; that of row {first + int(at[0])} is {largest[at]}"
        )
    if first == 0 and targets is not output and _look_like_probabilities(targets.logits):
        warnings.warn(
            "the teacher's outputs look like probabilities (>= 0, and their rows sum to 1), but are stored as logits; "
            "return pydistill.SoftTargets.from_probs(...) instead",
            UserWarning,
            stacklevel=4,
        )
    return targets


def _look_like_probabilities(logits) -> bool:
    return bool((logits >= 0).all() and ((logits.double().sum(-1) - 1).abs() < 1e-2).all() and logits.shape[-1] > 1)


def _cut(targets, request) -> SoftTargets:
    k = request["k"]
    if k is None:
        return targets
    if targets.indices is None:
        return top_k(targets.logits, k, request["temperatures"], tail=request["tail"])
    if targets.indices.shape[-1] != k:
        raise ValueError(f"k must be None or the teacher's own {targets.indices.shape[-1]}, got {k}")
    return targets
