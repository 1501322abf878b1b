"""Soft targets from trained teachers: scikit-learn classifiers, XGBoost, torch modules."""

import warnings

import numpy as np
import torch
from torch import Tensor

from pydistill._torch_modules import float_dtype, mode
from pydistill._wording import few
from pydistill.targets import SoftTargets
from pydistill.teachers.estimators import (
    check_classifier,
    fit_weighted,
    for_labels,
    frozen_part,
    is_a,
    other_classes,
    usable_weight,
)

# Their decision values are logits: the softmax of them (of [0, d] for one column d) is predict_proba. Not so for
# SVC, whose decision values are distances or votes, nor for AdaBoost, whose are scaled.
_LOGIT_CLASSES = (
    "LogisticRegression",  # and LogisticRegressionCV, which derives from it
    "HistGradientBoostingClassifier",
    "GradientBoostingClassifier",
    "LinearDiscriminantAnalysis",
)
_XGBOOST_LOGITS = ("binary:logistic", "multi:softprob", "multi:softmax")
_IN_SAMPLE = (
    "in_sample=True: the teacher was fitted on these rows and is surer of them than of new ones (a random forest "
    "especially), so that its targets say little more than the labels do. Without in_sample each row's targets come "
    "from a refit that did not see it"
)


def soft_targets(estimator, X, y, *, cv=5, in_sample=False, sample_weight=None) -> SoftTargets:
    """A scikit-learn classifier's soft targets for the rows it learns from, each from a refit that did not see the row.

    The targets are logits where the classifier has them: the decision values of logistic regression, linear
    discriminant analysis and (Hist)GradientBoosting, the margins of XGBClassifier. Everything else gives
    ``log(predict_proba)``; an SVC's decision values are not logits. Of a Pipeline the last step decides, of a fitted
    search its best estimator. XGBClassifier, which takes no labels but 0, 1, ..., is fitted on their codes.

    A forest or BaggingClassifier made with ``oob_score=True`` is fitted once, on all rows, and a row's targets are
    those of the trees that did not see it; ``cv`` is not used then. Within a Pipeline the preprocessing would have
    seen the row: there the folds are used.

    Args:
        estimator: any classifier with ``predict_proba``, fitted or not. Clones are fitted, it is not touched.
        X: ``(N, ...)``, what the estimator takes: array, DataFrame, sparse matrix, list. Missing values are its affair.
        y: ``(N,)``, the labels: integers, strings, booleans.
        cv: number of folds, stratified and in the rows' order as in scikit-learn, or a splitter, or an iterable of
            ``(train, test)`` indices, as ``GroupKFold(5).split(X, y, groups)`` gives it.
        in_sample: take the fitted estimator's outputs for X as they are, although it has seen these rows. Warns.
        sample_weight: ``(N,)``, finite and >= 0. The weights are passed to ``fit`` if it takes weights: to every step
            of a Pipeline that does; with metadata routing enabled, to what requests them. If it does not, a warning
            says so, and the refits are on the rows of positive weight, without weights. Rows of weight 0 are removed
            before anything else: they are in no fold, their labels are not among the classes, and their targets are
            uniform. Row numbers in ``cv`` are still those of all rows.

    Returns:
        SoftTargets: ``(N, C)``, float32, on the CPU. Column j is class ``numpy.unique(y)[j]``, whatever the order of
        the estimator's ``classes_``.

    Raises:
        ValueError: an estimator without predict_proba once it is fitted; one that is frozen or holds a frozen
            classifier, which cannot be refitted; X and y of different lengths; y that is not 1-D or holds one class; a
            class with fewer rows than folds, or missing from a fold's training rows; a ``cv`` that does not hold out
            each row once; rows that were never out of bag; with ``in_sample`` an estimator whose classes are not those
            of y; weights of another length, negative, not finite, or all 0. And what the estimator raises.
        TypeError: an estimator that is a class, a torch module or no classifier at all; X without rows.

    Example:
        >>> from sklearn.datasets import load_iris
        >>> from sklearn.ensemble import RandomForestClassifier
        >>> from pydistill.teachers import soft_targets
        >>> X, y = load_iris(return_X_y=True)
        >>> targets = soft_targets(RandomForestClassifier(50, random_state=0), X, y)
        >>> targets, float((targets.logits.argmax(-1).numpy() == y).mean()) > 0.9
        (SoftTargets(shape=(150, 3), dtype=torch.float32), True)
    """
    check_classifier("estimator", estimator)
    X, y = _check_rows(X, y)
    frozen = None if in_sample else frozen_part(estimator)
    if frozen:
        raise ValueError(
            f"estimator cannot be refitted for out-of-fold targets: {frozen}. For rows that it was not fitted on use "
            "pydistill.teachers.teacher_outputs(estimator, X); in_sample=True takes its outputs for these"
        )
    if in_sample:
        warnings.warn(_IN_SAMPLE, UserWarning, stacklevel=2)
    weight, counts = _check_weight(sample_weight, X)
    if counts is None:
        return _as_targets(_targets(estimator, X, y, cv, in_sample, weight))
    rows = np.flatnonzero(counts)
    logits = _targets(estimator, _take(X, rows), y[rows], counted_folds(cv, counts), in_sample, weight[rows])
    return _as_targets(logits.new_zeros(len(y), logits.shape[1]).index_copy(0, torch.from_numpy(rows), logits))


def _targets(estimator, X, y, cv, in_sample, weight) -> Tensor:
    """The logits of rows that all count."""
    classes = _check_labels(y)
    if in_sample:
        return _in_columns(_logits(estimator, X), estimator, classes)
    weight = usable_weight("estimator", estimator, weight, stacklevel=3)
    if getattr(estimator, "oob_score", False):
        return _out_of_bag(estimator, X, y, classes, weight)
    return _out_of_fold(for_labels(estimator, classes), X, y, classes, cv, weight)


def teacher_outputs(teacher, X, *, batch_size=256) -> SoftTargets:
    """A fitted teacher's soft targets for rows that it was **not** fitted on: unlabelled data, validation rows.

    For its own training rows use :func:`soft_targets`: a teacher is far surer of those than of any others.

    Args:
        teacher: a fitted classifier, whose outputs are taken as in :func:`soft_targets`; or a torch module that maps
            inputs to logits ``(rows, ..., C)``. It runs in eval mode under ``torch.inference_mode()``; each of its
            submodules gets its own mode back.
        X: what the teacher takes. For a module a tensor or an array, whose floats get the dtype of the module's.
            Nothing is moved between devices.
        batch_size: rows per batch of a module. A classifier gets all rows at once.

    Returns:
        SoftTargets: ``(N, ..., C)``, float32; normal tensors, which autograd can save. Columns are in the order of the
        classifier's ``classes_``.

    Raises:
        ValueError: no rows, batch_size below 1, a classifier without predict_proba, outputs that hold NaN.
        TypeError: a module that gives something else than a floating-point tensor with a row per input; a teacher that
            is a class, or no classifier at all; X that is neither a tensor nor an array, such as a DataLoader.

    Example:
        >>> import torch
        >>> from pydistill.teachers import teacher_outputs
        >>> cnn = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Flatten(), torch.nn.Linear(144, 10))
        >>> teacher_outputs(cnn, torch.randn(1000, 1, 8, 8))
        SoftTargets(shape=(1000, 10), dtype=torch.float32)
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if isinstance(teacher, torch.nn.Module):
        return _as_targets(_module_logits(teacher, X, batch_size))
    check_classifier("teacher", teacher)
    return _as_targets(_logits(teacher, _as_rows(X)))


def _out_of_fold(estimator, X, y, classes, cv, weight):
    from sklearn.base import clone

    logits = torch.empty(len(y), len(classes))
    for train, test in _splits(X, y, classes, cv):
        fitted = fit_weighted(clone(estimator), _take(X, train), y[train], None if weight is None else weight[train])
        logits[test] = _in_columns(_logits(fitted, _take(X, test)), fitted, classes)
    return logits


def _out_of_bag(estimator, X, y, classes, weight):
    from sklearn.base import clone

    fitted = fit_weighted(clone(estimator), X, y, weight)
    probs = fitted.oob_decision_function_
    never = ~(probs.sum(1) > 0)  # forests leave 0 there, BaggingClassifier NaN
    if never.any():
        raise ValueError(
            f"estimator has no out-of-bag targets for {never.sum()} of {len(y)} rows (the first is row "
            f"{never.argmax()}): all of its {len(fitted.estimators_)} members saw them. Use more members, or "
            "oob_score=False for targets out of fold"
        )
    return _in_columns(_log(probs), fitted, classes)


def counted_folds(cv, counts):
    """The folds of the rows that count: splits that name rows by their numbers among all rows get the new numbers."""
    from sklearn.model_selection import PredefinedSplit

    if isinstance(cv, PredefinedSplit):
        splits = cv.split()
    elif hasattr(cv, "split") or not np.iterable(cv):
        return cv  # it will be shown the rows that count, and no others
    else:
        splits = cv
    places = np.cumsum(counts) - 1
    return [tuple(_renumbered(part, counts, places) for part in split) for split in splits]


def _renumbered(rows, counts, places):
    rows = np.asarray(rows)
    if rows.size and not (rows.dtype.kind in "iu" and rows.min() >= 0 and rows.max() < len(counts)):
        raise ValueError(f"cv must hold numbers of rows, from 0 to {len(counts) - 1}, got {few(rows.tolist())}")
    rows = rows.astype(np.intp)
    return places[rows[counts[rows]]]


def _splits(X, y, classes, cv):
    """The folds as a list of (train, test) indices; every rule is checked before anything is fitted."""
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


def _logits(estimator, X) -> Tensor:
    """A fitted classifier's logits, or log-probabilities: float32 (N, C), columns in the order of its classes_."""
    from sklearn.frozen import FrozenEstimator
    from sklearn.pipeline import Pipeline

    if isinstance(estimator, Pipeline):
        steps = estimator[:-1]
        return _logits(estimator[-1], steps.transform(X) if len(steps) else X)
    if isinstance(estimator, FrozenEstimator):
        return _logits(estimator.estimator, X)
    if hasattr(estimator, "best_estimator_"):
        return _logits(estimator.best_estimator_, X)
    if is_a(estimator, "pydistill", "OnLabelCodes"):
        return _logits(estimator.estimator_, X)
    if is_a(estimator, "xgboost", "XGBClassifier") and estimator.objective in _XGBOOST_LOGITS:
        return _expand(estimator.predict(X, output_margin=True))
    if _has_logits(estimator):
        return _expand(estimator.decision_function(X))
    _check_probabilities(estimator)
    probs = estimator.predict_proba(X)
    if isinstance(probs, list):
        raise ValueError(f"the teacher must have one output, got a {type(estimator).__name__} with {len(probs)}")
    return _log(probs)


def _has_logits(estimator):
    if is_a(estimator, "sklearn", "GradientBoostingClassifier") and estimator.loss != "log_loss":
        return False
    return any(is_a(estimator, "sklearn", name) for name in _LOGIT_CLASSES)


def _expand(scores) -> Tensor:
    """Two classes have one column d, the difference of their logits: [0, d]."""
    scores = torch.as_tensor(np.ascontiguousarray(scores), dtype=torch.float32)
    return torch.stack([torch.zeros_like(scores), scores], -1) if scores.dim() == 1 else scores


def _log(probs) -> Tensor:
    """Logarithms in the probabilities' own precision: 1e-50 is 0 in float32, its logarithm is not."""
    return SoftTargets.from_probs(np.ascontiguousarray(probs)).logits.float()


def _in_columns(logits, estimator, classes) -> Tensor:
    have, want = np.asarray(estimator.classes_).tolist(), classes.tolist()
    if have == want:
        return logits
    if set(have) != set(want):
        raise other_classes("estimator", have, want)
    return logits[:, [have.index(c) for c in want]]


def _module_logits(module, X, batch_size) -> Tensor:
    X = X if isinstance(X, Tensor) else np.asarray(_as_rows(X))  # a memory map stays one
    if X.ndim == 0 or not len(X):
        raise ValueError(f"X must hold at least one row, got shape {tuple(X.shape)}")
    dtype = float_dtype(module, torch.float32)
    logits = None
    with mode(module, training=False):
        for start in range(0, len(X), batch_size):
            rows = _as_tensor(X[start : start + batch_size], dtype)
            with torch.inference_mode():
                outputs = module(rows)
            _check_outputs(outputs, len(rows))
            if logits is None:  # a tensor made in inference mode could not be trained with; copying into this one can
                logits = torch.empty(len(X), *outputs.shape[1:])
            logits[start : start + batch_size] = outputs
    _warn_of_probabilities(logits)
    return logits


def _as_rows(X):
    """X, or a list of rows as an array."""
    if hasattr(X, "shape"):
        return X
    rows = np.asarray(X)
    if rows.ndim == 0:
        raise TypeError(
            f"X must be a tensor or an array with a row per item, got {type(X).__name__}; of a DataLoader concatenate "
            "the inputs: torch.cat([batch[0] for batch in loader])"
        )
    return rows


def _as_tensor(rows, dtype) -> Tensor:
    tensor = rows if isinstance(rows, Tensor) else torch.tensor(rows)
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _check_outputs(outputs, rows):
    good = isinstance(outputs, Tensor) and outputs.is_floating_point() and outputs.dim() > 1 and len(outputs) == rows
    if not good:
        got = f"{outputs.dtype} {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else type(outputs).__name__
        raise TypeError(f"teacher must map {rows} rows to floating-point logits ({rows}, ..., C), got {got}")


def _warn_of_probabilities(logits):
    if logits.shape[-1] > 1 and (logits >= 0).all() and ((logits.sum(-1) - 1).abs() < 1e-3).all():
        warnings.warn(
            "teacher looks as if it gave probabilities (its outputs are >= 0 and sum to 1), but a module's outputs are "
            "taken as logits: leave out its softmax, or use SoftTargets.from_probs on its outputs",
            UserWarning,
            stacklevel=4,
        )


def _as_targets(logits) -> SoftTargets:
    rows = torch.isnan(logits).flatten(1).any(1)
    if rows.any():
        raise ValueError(f"teacher must not give NaN, as it does for row {int(rows.nonzero()[0])}")
    return SoftTargets.from_log_probs(logits)  # logits are log-probabilities but for a constant per row; sees -inf


def _check_probabilities(estimator):
    from sklearn.utils.validation import check_is_fitted

    if hasattr(estimator, "predict_proba"):
        return
    check_is_fitted(estimator)  # a StackingClassifier has it from then on
    raise ValueError(
        f"the teacher must have predict_proba, got {type(estimator).__name__} without it; its decision values, if any, "
        "are no logits. Calibrate it: sklearn.calibration.CalibratedClassifierCV(estimator, ensemble=False)"
    )


def _check_rows(X, y):
    X, y = _as_rows(X), np.asarray(y)
    X = X.tocsr() if hasattr(X, "tocsr") else X  # of the sparse forms not all have rows to take
    if y.ndim != 1:
        raise ValueError(f"y must be 1-D, a label per row; got shape {y.shape}")
    if X.shape[0] != len(y):
        raise ValueError(f"X and y must have the same number of rows, got {X.shape[0]} and {len(y)}")
    return X, y


def _check_labels(y):
    """The classes of rows that all count."""
    from sklearn.utils.multiclass import check_classification_targets

    check_classification_targets(y)
    classes = np.unique(y)
    if len(classes) < 2:
        raise ValueError(f"y must hold at least two classes, got {classes.tolist()}")
    return classes


def _check_weight(sample_weight, X):
    """Weights, and which rows count: None where all do."""
    from sklearn.utils.validation import _check_sample_weight

    if sample_weight is None:
        return None, None
    weight = _check_sample_weight(sample_weight, X, ensure_non_negative=True)
    counts = weight > 0
    return weight, None if counts.all() else counts


def _take(X, rows):
    return X.iloc[rows] if hasattr(X, "iloc") else X[rows]
