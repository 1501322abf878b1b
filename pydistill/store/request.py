"""The request for a store: its options, its data and its teacher. Later calls for the same folder must repeat it."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypedDict

from pydistill._arguments import check_count, warn_caller
from pydistill.store.fingerprints import UNCHECKED_CALLABLE
from pydistill.store.layout import DTYPES, DTypeName
from pydistill.targets import Tail, check_tail


class StoreOptions(TypedDict):
    """The options of a store; temperatures and tail are None if all logits are stored."""

    k: int | None
    temperatures: list[float] | None
    tail: Tail | None
    dtype: DTypeName


class Request(StoreOptions):
    """The options of a store and the fingerprints of its data and teacher, as the manifest records them."""

    data: str
    teacher: str


def check_options(k: int | None, temperatures: Iterable[float], tail: Tail, dtype: DTypeName) -> StoreOptions:
    """Check the options of a store."""
    k = None if k is None else check_count("k", k)
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be {', '.join(map(repr, DTYPES))}; got {dtype!r}")
    check_tail(tail)
    try:
        distinct = list(dict.fromkeys(map(float, temperatures)))
    except TypeError:
        raise TypeError(f"temperatures must be a sequence of numbers, got {temperatures!r}") from None
    if not all(0 < t < math.inf for t in distinct):
        raise ValueError(f"temperatures must be positive and finite, got {distinct!r}")
    if tail == "bucket" and not distinct:
        raise ValueError('temperatures must name at least one with tail="bucket", got none')
    if k is None:  # temperatures and tail make no difference
        return {"k": None, "temperatures": None, "tail": None, "dtype": dtype}
    return {"k": k, "temperatures": distinct, "tail": tail, "dtype": dtype}


def check_same(folder: Path, recorded: Request, given: Mapping[str, object]) -> None:
    """Check that the options and fingerprints given now are those that the store was built with."""
    there: Mapping[str, object] = recorded
    differ = [name for name, value in given.items() if there[name] != value]
    if differ:
        details = "; ".join(f"{name}: {there[name]!r} there, {given[name]!r} here" for name in differ)
        raise ValueError(
            f"the store in {folder} was built with other {' and '.join(differ)}: {details}. Build into another folder, "
            "or delete this one"
        )
    if given.get("teacher") == UNCHECKED_CALLABLE:
        warn_caller(
            f"the store in {folder} was built with a callable too, but pydistill cannot check that it was the same "
            'one. Pass fingerprint="..." to build and open, with a different string for each teacher; or pass a '
            "module, a fitted classifier or SoftTargets as the teacher"
        )
