"""What a scikit-learn estimator must be to teach, and what is asked of one; scikit-learn is imported on use."""

import numpy as np
from torch import nn


def check_classifier(name, estimator):
    """Refuse what cannot become a teacher by ``fit``; whether it has probabilities may show only when it is fitted."""
    kind = type(estimator).__name__
    if isinstance(estimator, nn.Module):
        raise TypeError(
            f"{name} must be a classifier that can be refitted, got the torch module {kind}. For rows that it was "
            "not trained on use pydistill.teachers.teacher_outputs(module, X)"
        )
    try:
        from sklearn.base import is_classifier
    except ImportError as error:
        raise ImportError("pydistill.teachers needs scikit-learn: pip install 'pydistill-kd[sklearn]'") from error
    if isinstance(estimator, type):
        raise TypeError(f"{name} must be a classifier, got the class {estimator.__name__}: pass an instance of it")
    if hasattr(estimator, "predict_proba"):
        return
    if not hasattr(estimator, "__sklearn_tags__"):
        raise TypeError(f"{name} must be a classifier with predict_proba, got {kind}")
    if not is_classifier(estimator):
        raise ValueError(f"{name} must be a classifier, which {kind} is not: it has no classes")


def frozen_part(estimator) -> str | None:
    """What is frozen, in words: a fitted classifier, or one in the estimator, that ``fit`` would leave as it is.

    A frozen transformer that is no classifier or regressor has not learned the labels, and may stay.
    """
    from sklearn.base import is_classifier, is_regressor
    from sklearn.frozen import FrozenEstimator

    if not hasattr(estimator, "get_params"):
        return None
    for name, value in {"": estimator, **estimator.get_params(deep=True)}.items():
        if isinstance(value, FrozenEstimator) and (is_classifier(value) or is_regressor(value)):
            return f"its {name!r} is frozen" if name else "it is frozen"
        if name.split("__")[-1] == "cv" and isinstance(value, str) and value == "prefit":
            return f"its {name!r} is 'prefit'"
    return None


def for_labels(estimator, classes):
    """The estimator, or one around it that fits it on codes, where these classes are labels that it would not take."""
    needs_codes = is_a(_innermost(estimator), "xgboost", "XGBClassifier")
    if not needs_codes or classes.tolist() == list(range(len(classes))):
        return estimator
    from pydistill.label_codes import OnLabelCodes

    return OnLabelCodes(estimator)


def other_classes(name, have, want) -> ValueError:
    """The error for a fitted classifier whose classes are not those of y."""
    have, want = np.asarray(have).tolist(), np.asarray(want).tolist()
    codes = len(have) == len(want) and have == list(range(len(want)))
    hint = ". It was fitted on codes: pass them as y too, LabelEncoder().fit_transform(y)" if codes else ""
    return ValueError(f"{name} must have the classes of y, {few(want)}; it was fitted on {few(have)}{hint}")


def _innermost(estimator):
    """The classifier that sees the labels at the end of pipelines, searches and calibrations."""
    from sklearn.pipeline import Pipeline

    while isinstance(estimator, Pipeline) or hasattr(estimator, "estimator"):
        estimator = estimator[-1] if isinstance(estimator, Pipeline) else estimator.estimator
    return estimator


def is_a(estimator, package, name) -> bool:
    """Whether it is of this class or derives from it, without importing the package."""
    return any(c.__name__ == name and c.__module__.split(".")[0] == package for c in type(estimator).__mro__)


def few(classes) -> str:
    """A list of classes for a message; of many the first ten."""
    return repr(classes) if len(classes) <= 10 else f"{str(classes[:10])[:-1]}, ...] ({len(classes)})"
