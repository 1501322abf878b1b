"""Runs the teacher over the data batch by batch, checks its outputs and passes them to the writer."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pydistill._arguments import warn_caller
from pydistill._torch_modules import as_input, float_dtype, mode
from pydistill.store.fingerprints import Teacher
from pydistill.store.manifest import Manifest
from pydistill.store.request import Request
from pydistill.store.sources import Inputs, Source, inputs_from_row
from pydistill.store.writer import Writer
from pydistill.targets import PROBABILITIES_TAKEN_AS_LOGITS, SoftTargets, looks_like_probabilities, top_k
from pydistill.teachers.outputs import about_batch, teacher_outputs


def fill(
    folder: Path,
    manifest: Manifest | None,
    request: Request,
    rows: int,
    source: Source,
    teacher: Teacher,
    batch_size: int,
) -> None:
    """Write all rows that the folder lacks. If an error stops this, the rows before it are recorded."""
    if isinstance(teacher, SoftTargets) and len(teacher) != rows:
        raise ValueError(f"teacher must have one row for each of the {rows} rows of data, got {len(teacher)} rows")
    writer = Writer(folder, manifest, request, rows)
    try:
        with _as_function(teacher) as run:
            for inputs in inputs_from_row(source, writer.written, batch_size):
                first = writer.written
                if first + len(inputs) > rows:
                    raise ValueError(f"data must give the same {rows} rows each time, got more")
                with about_batch("data", first, inputs):
                    output = run(inputs, first)
                writer.append(_keep_k(_as_targets(output, first, len(inputs)), request))
        if writer.written < rows:
            raise ValueError(f"data must give the same {rows} rows each time, got {writer.written}")
        writer.sync()
    except BaseException:
        with suppress(OSError):  # recorded rows stay valid; the first error is more useful
            writer.sync()
        raise
    finally:
        writer.close()


@contextmanager
def _as_function(teacher: Teacher) -> Iterator[Callable[[Inputs, int], object]]:
    """Yield the teacher as a function of a batch of inputs and the number of the batch's first row."""
    if isinstance(teacher, torch.nn.Module):
        with mode(teacher, training=False):
            yield _module_function(teacher)
    elif isinstance(teacher, SoftTargets):
        yield lambda inputs, first: teacher[first : first + len(inputs)]
    elif hasattr(teacher, "predict_proba"):
        yield lambda inputs, first: teacher_outputs(teacher, inputs.numpy() if isinstance(inputs, Tensor) else inputs)
    else:
        yield _without_gradients(teacher)


def _module_function(module: torch.nn.Module) -> Callable[[Inputs, int], object]:
    dtype = float_dtype(module, None)

    def run(inputs: Inputs, first: int) -> object:
        # Inference mode is for the module only, because tensors that a Dataset makes and keeps must be ordinary ones.
        with torch.inference_mode():
            return module(as_input(inputs, dtype))

    return run


def _without_gradients(function: Callable[[Inputs], object]) -> Callable[[Inputs, int], object]:
    def run(inputs: Inputs, first: int) -> object:
        with torch.no_grad():
            return function(inputs)

    return run


def _as_targets(output: object, first: int, rows: int) -> SoftTargets:
    """Convert a batch's output to soft targets, and check them; ``first`` is the number of the batch's first row."""
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
    if first == 0 and targets is not output and looks_like_probabilities(targets.logits):
        warn_caller(PROBABILITIES_TAKEN_AS_LOGITS)
    return targets


def _keep_k(targets: SoftTargets, request: Request) -> SoftTargets:
    """Reduce targets to their top k if the request has a k. Targets that are top-k already must have the same k."""
    k, temperatures, tail = request["k"], request["temperatures"], request["tail"]
    if k is None or temperatures is None or tail is None:  # all three are None, or none of them
        return targets
    if targets.indices is None:
        return top_k(targets.logits, k, temperatures, tail=tail)
    if targets.indices.shape[-1] != k:
        raise ValueError(f"k must be None or the teacher's own {targets.indices.shape[-1]}, got {k}")
    return targets
