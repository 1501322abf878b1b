"""Cross-validation folds: checked, and renumbered when rows of weight 0 are left out."""

from collections.abc import Iterable, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pydistill._wording import few
from pydistill.teachers.estimators import EstimatorInput


class Splitter(Protocol):
    """A cross-validation splitter of scikit-learn, such as KFold."""

    def split(self, X: Any, y: Any, groups: Any = ...) -> Iterable[Any]:
        """Yield pairs (train, test) of arrays of row numbers."""
        ...


Folds: TypeAlias = int | Splitter | Iterable[Sequence[ArrayLike]]


def counted_folds(cv: Folds, kept: NDArray[np.bool_]) -> Folds:
    """Return folds over the rows that are kept. Row numbers in ``cv``, which count all rows, are renumbered."""
    from sklearn.model_selection import PredefinedSplit

    if isinstance(cv, PredefinedSplit):
        splits = cv.split()
    elif not isinstance(cv, Iterable) or hasattr(cv, "split"):
        return cv  # it is called with the kept rows only
    else:
        splits = cv
    places: NDArray[np.intp] = np.cumsum(kept) - 1
    return [tuple(_renumbered(part, kept, places) for part in split) for split in splits]


def _renumbered(rows: ArrayLike, kept: NDArray[np.bool_], places: NDArray[np.intp]) -> NDArray[np.intp]:
    numbers = np.asarray(rows)
    if numbers.size and not (numbers.dtype.kind in "iu" and numbers.min() >= 0 and numbers.max() < len(kept)):
        raise ValueError(f"cv must hold numbers of rows, from 0 to {len(kept) - 1}, got {few(numbers.tolist())}")
    numbers = numbers.astype(np.intp)
    new: NDArray[np.intp] = places[numbers[kept[numbers]]]
    return new


def fold_indices(
    X: EstimatorInput, y: NDArray[Any], classes: NDArray[Any], cv: Folds
) -> list[tuple[NDArray[Any], NDArray[Any]]]:
    """Return the folds as a list of (train, test) indices; all of them are checked before anything is fitted."""
    from sklearn.model_selection import StratifiedKFold, check_cv

    folds = check_cv(cv, y, classifier=True)
    if isinstance(folds, StratifiedKFold):
        counts = np.unique(y, return_counts=True)[1]
        if counts.min() < folds.n_splits:
            raise ValueError(
                f"y must hold at least {folds.n_splits} rows of each class, one for each fold; it holds {counts.min()} "
                f"of class {classes.tolist()[counts.argmin()]!r}. Use fewer folds (cv=)"
            )
    splits = list(folds.split(X, y))
    held_out = np.sort(np.concatenate([test for _, test in splits]))
    if not np.array_equal(held_out, np.arange(len(y))):
        raise ValueError(
            f"cv must hold out each of the {len(y)} rows once; it holds out {len(held_out)}, of which "
            f"{len(np.unique(held_out))} are different"
        )
    for number, (train, test) in enumerate(splits):
        if np.intersect1d(train, test).size:
            raise ValueError(f"cv must not train on the rows that it holds out, as fold {number} does")
        missing = np.setdiff1d(classes, y[train])
        if missing.size:
            raise ValueError(
                f"cv must leave every class in the training rows; fold {number} has none of class "
                f"{missing.tolist()[0]!r}"
            )
    return splits
