"""Soft targets from trained teachers: scikit-learn classifiers, XGBoost, torch modules."""

from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from pydistill._arguments import check_count, warn_caller
from pydistill._torch_modules import as_input, float_dtype, mode
from pydistill._wording import about
from pydistill.targets import PROBABILITIES_TAKEN_AS_LOGITS, SoftTargets, looks_like_probabilities
from pydistill.teachers.estimators import (
    Estimator,
    EstimatorInput,
    check_classifier,
    fit_weighted,
    frozen_part,
    is_a,
    other_classes,
    split_steps,
    take_rows,
    usable_weight,
)
from pydistill.teachers.folds import Folds, counted_folds, fold_indices

# Classifiers whose decision values are logits: the softmax of these values (of [0, d] for one column d) is
# predict_proba. SVC is not listed, because its decision values are distances or votes, and AdaBoost is not listed,
# because it scales its decision values.
_LOGIT_CLASSES = (
    "LogisticRegression",  # and LogisticRegressionCV, which derives from it
    "HistGradientBoostingClassifier",
    "GradientBoostingClassifier",
    "LinearDiscriminantAnalysis",
)
_XGBOOST_LOGITS = ("binary:logistic", "multi:softprob", "multi:softmax")
_IN_SAMPLE = (
    "in_sample=True: the teacher was fitted on these rows and is more confident about them than about new ones (a "
    "random forest especially), so its targets add little to the labels. Without in_sample each row's targets come "
    "from a refit that did not see the row"
)


def soft_targets(
    estimator: Estimator,
    X: EstimatorInput,
    y: ArrayLike,
    *,
    cv: Folds = 5,
    in_sample: bool = False,
    sample_weight: ArrayLike | None = None,
) -> SoftTargets:
    """Compute a classifier's soft targets for its training rows, each from a refit that did not see the row.

    The targets are logits if the classifier has them: the decision values of logistic regression, linear
    discriminant analysis and (Hist)GradientBoosting, and the margins of XGBClassifier. For every other classifier they
    are ``log(predict_proba)``; the decision values of an SVC are not logits. For a Pipeline the last step decides, for
    a fitted search its best estimator. XGBClassifier accepts only the labels 0, 1, ..., so it is fitted on the codes of
    the labels.

    A forest or BaggingClassifier made with ``oob_score=True`` is fitted once, on all rows. A row's targets are then
    those of the trees that did not see the row, and ``cv`` is not used. Inside a Pipeline the folds are used instead,
    because the preprocessing would have seen the row.

    Args:
        estimator: any classifier with ``predict_proba``, fitted or not. Only clones of it are fitted.
        X: ``(N, ...)``, as the estimator takes it: array, DataFrame, sparse matrix, list. Missing values are passed
            through to the estimator.
        y: ``(N,)``, the labels: integers, strings, booleans.
        cv: number of folds, stratified and in the rows' order as in scikit-learn, or a splitter, or an iterable of
            ``(train, test)`` indices, as ``GroupKFold(5).split(X, y, groups)`` gives it.
        in_sample: take the fitted estimator's outputs for X as they are, although it has seen these rows. A warning is
            given.
        sample_weight: ``(N,)``, finite and >= 0. The weights are passed to ``fit`` if it takes weights: in a Pipeline
            to every step that takes them; with metadata routing enabled, to every object that requests them. If ``fit``
            takes no weights, a warning is given, and the estimator is refitted on the rows of positive weight, without
            weights. Rows of weight 0 are removed before anything else: they are in no fold, their labels are not among
            the classes, and their targets are uniform. Row numbers in ``cv`` still count all rows.

    Returns:
        SoftTargets: ``(N, C)``, float32, on the CPU. Column j is class ``numpy.unique(y)[j]``, whatever the order of
        the estimator's ``classes_``.

    Raises:
        ValueError: if the estimator has no predict_proba once it is fitted, or is frozen or holds a frozen classifier,
            which cannot be refitted; if X and y have different lengths, y is not 1-D, or y holds one class; if a class
            has fewer rows than there are folds, or is missing from a fold's training rows; if ``cv`` does not hold out
            each row once; if some rows were never out of bag; if, with ``in_sample``, the estimator's classes are not
            those of y; if the weights have another length, are negative, not finite, or all 0. Errors that the
            estimator raises are passed on.
        TypeError: if the estimator is a class, a torch module or not a classifier, or if X is not an array of rows.

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
    X, labels = _check_rows(X, y)
    frozen = None if in_sample else frozen_part(estimator)
    if frozen:
        raise ValueError(
            f"estimator cannot be refitted for out-of-fold targets: {frozen}. For rows that it was not fitted on use "
            "pydistill.teachers.teacher_outputs(estimator, X); in_sample=True takes its outputs for these rows"
        )
    if in_sample:
        warn_caller(_IN_SAMPLE)
    weight = _check_weight(sample_weight, X)
    if weight is None or (weight > 0).all():
        return _as_targets(_targets(estimator, X, labels, cv, in_sample, weight))
    kept = weight > 0
    rows = np.flatnonzero(kept)
    folds = counted_folds(cv, kept)
    logits = _targets(estimator, take_rows(X, rows), labels[rows], folds, in_sample, weight[rows])
    uniform = logits.new_zeros(len(labels), logits.shape[1])
    return _as_targets(uniform.index_copy(0, torch.from_numpy(rows), logits))


def _targets(
    estimator: Estimator, X: EstimatorInput, y: NDArray[Any], cv: Folds, in_sample: bool, weight: NDArray[Any] | None
) -> Tensor:
    """Return the logits of rows whose weights are all positive."""
    from pydistill.teachers.label_codes import for_labels  # it imports scikit-learn

    classes = _check_labels(y)
    if in_sample:
        return _in_columns(_logits(estimator, X), estimator, classes)
    weight = usable_weight("estimator", estimator, weight)
    if getattr(estimator, "oob_score", False):
        return _out_of_bag(estimator, X, y, classes, weight)
    return _out_of_fold(for_labels(estimator, classes), X, y, classes, cv, weight)


def teacher_outputs(teacher: nn.Module | Estimator, X: EstimatorInput, *, batch_size: int = 256) -> SoftTargets:
    """Compute a fitted teacher's soft targets for rows that it was **not** fitted on, such as unlabelled rows.

    For its training rows use :func:`soft_targets`: a teacher is far more confident about those than about others.

    Args:
        teacher: a fitted classifier, whose outputs are taken as in :func:`soft_targets`; or a torch module that maps
            inputs to logits ``(rows, ..., C)``. It runs in eval mode under ``torch.inference_mode()``; the mode of each
            of its submodules is restored.
        X: the teacher's inputs. For a module a tensor or an array, whose floating-point numbers are converted to the
            module's dtype. Nothing is moved between devices.
        batch_size: rows per batch of a module. A classifier gets all rows at once.

    Returns:
        SoftTargets: ``(N, ..., C)``, float32; normal tensors, which autograd can save. Columns are in the order of the
        classifier's ``classes_``.

    Raises:
        ValueError: if there are no rows, batch_size is below 1, a classifier has no predict_proba, or outputs hold NaN.
        TypeError: if a module's output is not a floating-point tensor with one row per input; if the teacher is a
            class, or not a classifier; if X is neither a tensor nor an array, such as a DataLoader.

    Example:
        >>> import torch
        >>> from pydistill.teachers import teacher_outputs
        >>> cnn = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Flatten(), torch.nn.Linear(144, 10))
        >>> teacher_outputs(cnn, torch.randn(1000, 1, 8, 8))
        SoftTargets(shape=(1000, 10), dtype=torch.float32)
    """
    batch_size = check_count("batch_size", batch_size)
    if isinstance(teacher, nn.Module):
        logits = _module_logits(teacher, X, batch_size)
        if looks_like_probabilities(logits):
            warn_caller(PROBABILITIES_TAKEN_AS_LOGITS)
        return _as_targets(logits)
    check_classifier("teacher", teacher)
    return _as_targets(_logits(teacher, _as_rows(X)))


def _out_of_fold(
    estimator: Estimator,
    X: EstimatorInput,
    y: NDArray[Any],
    classes: NDArray[Any],
    cv: Folds,
    weight: NDArray[Any] | None,
) -> Tensor:
    from sklearn.base import clone

    logits = torch.empty(len(y), len(classes))
    for train, test in fold_indices(X, y, classes, cv):
        fitted = fit_weighted(
            clone(estimator), take_rows(X, train), y[train], None if weight is None else weight[train]
        )
        logits[test] = _in_columns(_logits(fitted, take_rows(X, test)), fitted, classes)
    return logits


def _out_of_bag(
    estimator: Estimator, X: EstimatorInput, y: NDArray[Any], classes: NDArray[Any], weight: NDArray[Any] | None
) -> Tensor:
    from sklearn.base import clone

    fitted = fit_weighted(clone(estimator), X, y, weight)
    probs = fitted.oob_decision_function_
    never = ~(probs.sum(1) > 0)  # such rows hold 0 in forests and NaN in BaggingClassifier
    if never.any():
        raise ValueError(
            f"estimator has no out-of-bag targets for {never.sum()} of {len(y)} rows (the first is row "
            f"{never.argmax()}): all of its {len(fitted.estimators_)} members saw them. Use more members, or "
            "oob_score=False for targets out of fold"
        )
    return _in_columns(_log(probs), fitted, classes)


def _logits(estimator: Estimator, X: EstimatorInput) -> Tensor:
    """A fitted classifier's logits, or log-probabilities: float32 (N, C), columns in the order of its classes_."""
    steps, classifier = split_steps(estimator)
    for step in steps:
        X = step.transform(X)
    if is_a(classifier, "pydistill", "OnLabelCodes"):
        return _logits(classifier.estimator_, X)
    if is_a(classifier, "xgboost", "XGBClassifier") and classifier.objective in _XGBOOST_LOGITS:
        return _expand(classifier.predict(X, output_margin=True))
    if _has_logits(classifier):
        return _expand(classifier.decision_function(X))
    _check_probabilities(classifier)
    probs = classifier.predict_proba(X)
    if isinstance(probs, list):
        raise ValueError(f"the teacher must have one output, got a {type(classifier).__name__} with {len(probs)}")
    return _log(probs)


def _has_logits(estimator: Estimator) -> bool:
    if is_a(estimator, "sklearn", "GradientBoostingClassifier") and estimator.loss != "log_loss":
        return False
    return any(is_a(estimator, "sklearn", name) for name in _LOGIT_CLASSES)


def _expand(scores: ArrayLike) -> Tensor:
    """Return logits (N, C). For two classes scikit-learn gives one column d, their difference, which becomes [0, d]."""
    logits = torch.as_tensor(np.ascontiguousarray(scores), dtype=torch.float32)
    return torch.stack([torch.zeros_like(logits), logits], -1) if logits.dim() == 1 else logits


def _log(probs: ArrayLike) -> Tensor:
    """Take logarithms before converting to float32, in which 1e-50 would become 0 and its logarithm -inf."""
    return SoftTargets.from_probs(np.ascontiguousarray(probs)).logits.float()


def _in_columns(logits: Tensor, estimator: Estimator, classes: NDArray[Any]) -> Tensor:
    """Return the logits with their columns in the order of ``classes``."""
    have, want = np.asarray(estimator.classes_).tolist(), classes.tolist()
    if have == want:
        return logits
    if set(have) != set(want):
        raise other_classes("estimator", have, want)
    return logits[:, [have.index(c) for c in want]]


def _module_logits(module: nn.Module, X: EstimatorInput, batch_size: int) -> Tensor:
    X = X if isinstance(X, Tensor) else np.asarray(_as_rows(X))  # this does not read a memory map
    if X.ndim == 0 or not len(X):
        raise ValueError(f"X must hold at least one row, got shape {tuple(X.shape)}")
    dtype = float_dtype(module, torch.float32)
    logits = torch.empty(0)
    with mode(module, training=False):
        for start in range(0, len(X), batch_size):
            rows = as_input(X[start : start + batch_size], dtype)
            with torch.inference_mode(), about_batch("X", start, rows):
                outputs = module(rows)
            outputs = _check_outputs(outputs, len(rows))
            if start == 0:  # autograd cannot save a tensor made in inference mode, but it can save a copy of one
                logits = torch.empty(len(X), *outputs.shape[1:])
            logits[start : start + batch_size] = outputs
    return logits


def about_batch(name: str, first: int, rows: Tensor | NDArray[Any]) -> AbstractContextManager[None]:
    """Prefix a teacher's errors with the rows of the batch and their shape; ``first`` is the number of its first row.

    torch's own error, for instance for inputs of the wrong width, does not name the caller's data.
    """
    last = first + len(rows) - 1
    return about(
        f"teacher, called with rows {first} to {last} of {name}, of shape {tuple(rows.shape)} and dtype {rows.dtype}"
    )


def _as_rows(X: EstimatorInput) -> EstimatorInput:
    """X, or a list of rows as an array."""
    if hasattr(X, "shape"):
        return X
    rows = np.asarray(X)
    if rows.ndim == 0:
        raise TypeError(
            f"X must be a tensor or an array with a row per item, got {type(X).__name__}; for a DataLoader, "
            "concatenate its inputs: torch.cat([batch[0] for batch in loader])"
        )
    return rows


def _check_outputs(outputs: object, rows: int) -> Tensor:
    if isinstance(outputs, Tensor) and outputs.is_floating_point() and outputs.dim() > 1 and len(outputs) == rows:
        return outputs
    got = f"{outputs.dtype} {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else type(outputs).__name__
    raise TypeError(f"teacher must map {rows} rows to floating-point logits ({rows}, ..., C), got {got}")


def _as_targets(logits: Tensor) -> SoftTargets:
    rows = torch.isnan(logits).flatten(1).any(1)
    if rows.any():
        raise ValueError(f"teacher must not give NaN, as it does for row {int(rows.nonzero()[0])}")
    return SoftTargets.from_log_probs(logits)  # logits are log-probabilities plus a constant per row


def _check_probabilities(estimator: Estimator) -> None:
    from sklearn.utils.validation import check_is_fitted

    if hasattr(estimator, "predict_proba"):
        return
    check_is_fitted(estimator)  # a StackingClassifier has predict_proba only once it is fitted
    raise ValueError(
        f"the teacher must have predict_proba, got {type(estimator).__name__} without it; its decision values, if any, "
        "are not logits. Calibrate it: sklearn.calibration.CalibratedClassifierCV(estimator, ensemble=False)"
    )


def _check_rows(X: EstimatorInput, y: ArrayLike) -> tuple[EstimatorInput, NDArray[Any]]:
    X, labels = _as_rows(X), np.asarray(y)
    X = X.tocsr() if hasattr(X, "tocsr") else X  # not every sparse format can be indexed by rows
    if labels.ndim != 1:
        raise ValueError(f"y must be 1-D, a label per row; got shape {labels.shape}")
    if X.shape[0] != len(labels):
        raise ValueError(f"X and y must have the same number of rows, got {X.shape[0]} and {len(labels)}")
    return X, labels


def _check_labels(y: NDArray[Any]) -> NDArray[Any]:
    """Return the classes of the labels, sorted."""
    from sklearn.utils.multiclass import check_classification_targets

    check_classification_targets(y)
    classes = np.unique(y)
    if len(classes) < 2:
        raise ValueError(f"y must hold at least two classes, got {classes.tolist()}")
    return classes


def _check_weight(sample_weight: ArrayLike | None, X: EstimatorInput) -> NDArray[Any] | None:
    from sklearn.utils.validation import _check_sample_weight

    if sample_weight is None:
        return None
    weight: NDArray[Any] = _check_sample_weight(sample_weight, X, ensure_non_negative=True)
    return weight
