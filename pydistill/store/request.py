"""What a store is to hold: the options, checked. A later call for the same folder must ask for the same."""

import math
import warnings

from pydistill.store.fingerprints import CALLABLE
from pydistill.store.layout import DTYPES


def check_request(k, temperatures, tail, dtype, batch_size) -> dict:
    """The options as the manifest holds them."""
    for name, value in (("k", k), ("batch_size", batch_size)):
        if value is None and name == "k":
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an integer, got {value!r}")
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be {', '.join(map(repr, DTYPES))}; got {dtype!r}")
    if tail not in ("renormalize", "bucket"):
        raise ValueError(f'tail must be "renormalize" or "bucket", got {tail!r}')
    try:
        temperatures = list(dict.fromkeys(map(float, temperatures)))
    except TypeError:
        raise TypeError(f"temperatures must be a sequence of numbers, got {temperatures!r}") from None
    if not all(0 < t < math.inf for t in temperatures):
        raise ValueError(f"temperatures must be positive and finite, got {temperatures!r}")
    if tail == "bucket" and not temperatures:
        raise ValueError('temperatures must name at least one with tail="bucket", got none')
    if k is None:  # all the logits: the other two change nothing
        temperatures = tail = None
    return {"k": k, "temperatures": temperatures, "tail": tail, "dtype": dtype}


def check_same(folder, manifest, given):
    """What is given now must be what the store was built with."""
    there = manifest["request"]
    differ = [name for name, value in given.items() if there[name] != value]
    if differ:
        details = "; ".join(f"{name}: {there[name]!r} there, {given[name]!r} here" for name in differ)
        raise ValueError(
            f"the store in {folder} was built with other {' and '.join(differ)}: {details}. Build into another folder, "
            "or delete this one"
        )
    if given.get("teacher") == CALLABLE:
        warnings.warn(
            f"the store in {folder} was built with a callable too, but whether it was this one cannot be told. Pass "
            'fingerprint="..." to build and open, another string for another teacher; or pass a module, a fitted '
            "classifier or SoftTargets as the teacher",
            UserWarning,
            stacklevel=3,
        )
