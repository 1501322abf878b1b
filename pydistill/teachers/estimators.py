"""What a scikit-learn estimator must be to teach, and how it is fitted; scikit-learn is imported on use."""

import inspect
import warnings

import numpy as np
from torch import nn

from pydistill._wording import few


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


def fit_weighted(estimator, X, y, weight):
    """Fit an estimator; where there are weights of the rows, with them."""
    names = () if weight is None else weight_names(estimator)
    return estimator.fit(X, y, **dict.fromkeys(names, weight))


def weight_names(estimator) -> list[str]:
    """The keywords through which ``fit`` takes the rows' weights; none where they would not reach the classifier.

    In a Pipeline each step that takes weights gets them: to its scaler, too, a row of weight 2 is two rows.
    """
    from sklearn import get_config
    from sklearn.pipeline import Pipeline
    from sklearn.utils.metadata_routing import get_routing_for_object

    if _takes_weight(estimator):
        return ["sample_weight"]
    if get_config()["enable_metadata_routing"]:
        return list(get_routing_for_object(estimator).consumes("fit", ["sample_weight"]))
    if isinstance(estimator, Pipeline):
        steps = [(name, weight_names(step)) for name, step in estimator.steps if hasattr(step, "fit")]
        reached = steps[-1][0] == estimator.steps[-1][0] and steps[-1][1]
        return [f"{step}__{name}" for step, names in steps for name in names] if reached else []
    if is_a(estimator, "sklearn", "BaseSearchCV"):
        return weight_names(estimator.estimator)
    if any(is_a(estimator, "sklearn", name) for name in ("VotingClassifier", "StackingClassifier")):
        # Their fit passes sample_weight on to every member, and raises where one does not take it.
        members = [member for _, member in estimator.estimators] + [getattr(estimator, "final_estimator", None)]
        return ["sample_weight"] if all(_takes_weight(x) for x in members if hasattr(x, "fit")) else []
    return []


def usable_weight(name, estimator, weight, *, stacklevel):
    """The weights for the estimator's ``fit``. Where it takes none: None, and a warning if they differ."""
    if weight is None or weight_names(estimator):
        return weight
    if weight.min() < weight.max():
        warnings.warn(
            f"sample_weight cannot reach {name}: {type(estimator).__name__}.fit takes none that would get to the "
            "classifier. It is fitted on the rows whose weight is not 0, and each of them counts once",
            UserWarning,
            stacklevel=stacklevel + 1,
        )
    return None


def _takes_weight(estimator) -> bool:
    if "sample_weight" not in inspect.signature(estimator.fit).parameters:
        return False
    if not hasattr(estimator, "fit_transform"):
        return True
    parameters = inspect.signature(estimator.fit_transform).parameters  # what a Pipeline calls of all but its last step
    return "sample_weight" in parameters or any(x.kind is x.VAR_KEYWORD for x in parameters.values())


def for_labels(estimator, classes):
    """The estimator, or one around it that fits it on codes, where these classes are labels that it would not take."""
    needs_codes = is_a(_innermost(estimator), "xgboost", "XGBClassifier")
    if not needs_codes or classes.tolist() == list(range(len(classes))):
        return estimator
    from pydistill.teachers.label_codes import OnLabelCodes

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
