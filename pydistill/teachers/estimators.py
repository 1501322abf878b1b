"""scikit-learn and XGBoost estimators as teachers: validation, nesting, weighted fits. Neither is imported here."""

import inspect
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import nn

from pydistill._arguments import warn_caller
from pydistill._wording import few

Estimator: TypeAlias = Any  # an estimator of scikit-learn or XGBoost, which have no type information
EstimatorInput: TypeAlias = Any  # rows as estimators take them: an array, a DataFrame, a sparse matrix, a list


def check_classifier(name: str, estimator: Estimator) -> None:
    """Check that ``estimator`` is a classifier that ``fit`` can turn into a teacher.

    Some classifiers, such as a StackingClassifier, have ``predict_proba`` only once they are fitted; they pass here.
    """
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


def frozen_part(estimator: Estimator) -> str | None:
    """Describe a fitted classifier or regressor in an estimator that ``fit`` would not refit; None if there is none.

    A frozen transformer is allowed: it has not learned from the labels.
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


def split_steps(model: Estimator) -> tuple[list[Estimator], Estimator]:
    """``(steps, last)``: the preprocessing of a fitted Pipeline, and its last step. Other models have no steps.

    Nested Pipelines are followed. A fitted search is replaced by its best estimator, and a FrozenEstimator by the
    estimator in it.
    """
    if isinstance(model, nn.Module):
        return [], model
    if is_a(model, "sklearn", "FrozenEstimator"):
        return split_steps(model.estimator)
    if hasattr(model, "best_estimator_"):
        return split_steps(model.best_estimator_)
    if not is_a(model, "sklearn", "Pipeline"):
        return [], model
    steps, last = split_steps(model[-1])
    return ([model[:-1], *steps] if len(model) > 1 else steps), last


def classifier_to_fit(estimator: Estimator) -> Estimator:
    """Return the classifier to which ``fit`` passes the labels, inside Pipelines, searches and calibrations."""
    from sklearn.pipeline import Pipeline

    while isinstance(estimator, Pipeline) or hasattr(estimator, "estimator"):
        estimator = estimator[-1] if isinstance(estimator, Pipeline) else estimator.estimator
    return estimator


def fit_weighted(estimator: Estimator, X: EstimatorInput, y: ArrayLike, weight: NDArray[Any] | None) -> Estimator:
    """Fit an estimator, with the weights of the rows if there are any."""
    names = () if weight is None else weight_names(estimator)
    return estimator.fit(X, y, **dict.fromkeys(names, weight))


def weight_names(estimator: Estimator) -> list[str]:
    """Return the keywords of ``fit`` that pass weights to the classifier; an empty list if it takes no weights.

    In a Pipeline every step that takes weights gets them, so that a row of weight 2 also counts twice for a scaler.
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
        # Their fit passes sample_weight to every member, and raises if one of them does not take it.
        members = [member for _, member in estimator.estimators] + [getattr(estimator, "final_estimator", None)]
        return ["sample_weight"] if all(_takes_weight(x) for x in members if hasattr(x, "fit")) else []
    return []


def usable_weight(name: str, estimator: Estimator, weight: NDArray[Any] | None) -> NDArray[Any] | None:
    """Return the weights if the estimator's ``fit`` takes weights; else None, and warn if they are not all equal."""
    if weight is None or weight_names(estimator):
        return weight
    if weight.min() < weight.max():
        warn_caller(
            f"sample_weight cannot reach {name}: {type(estimator).__name__}.fit does not pass weights to the "
            "classifier. It is fitted on the rows whose weight is not 0, and each of them counts once"
        )
    return None


def other_classes(name: str, have: ArrayLike, want: ArrayLike) -> ValueError:
    """Return the error for a fitted classifier whose classes are not those of y."""
    fitted, given = np.asarray(have).tolist(), np.asarray(want).tolist()
    codes = len(fitted) == len(given) and fitted == list(range(len(given)))
    hint = ". It was fitted on codes: pass them as y too, LabelEncoder().fit_transform(y)" if codes else ""
    return ValueError(f"{name} must have the classes of y, {few(given)}; it was fitted on {few(fitted)}{hint}")


def poor_teacher_message(accuracy: float, constant: float) -> str:
    """Return the warning for a teacher that is no better than a constant prediction, whose accuracy is ``constant``."""
    return (
        f"teacher has an accuracy of {accuracy:.3f}; always predicting the most frequent class has {constant:.3f}. X "
        "may differ in form (scale, order of columns) from the rows that the teacher was fitted on"
    )


def take_rows(X: EstimatorInput, index: Any) -> EstimatorInput:
    """Select rows by position; ``index`` is a slice or an array of integers."""
    return X.iloc[index] if hasattr(X, "iloc") else X[index]


def is_a(estimator: Estimator, package: str, name: str) -> bool:
    """Return whether an estimator's class, or a base class of it, has this name and package. Nothing is imported."""
    return any(c.__name__ == name and c.__module__.split(".")[0] == package for c in type(estimator).__mro__)


def _takes_weight(estimator: Estimator) -> bool:
    if "sample_weight" not in inspect.signature(estimator.fit).parameters:
        return False
    if not hasattr(estimator, "fit_transform"):
        return True
    parameters = inspect.signature(estimator.fit_transform).parameters  # a Pipeline calls it for all but the last step
    return "sample_weight" in parameters or any(x.kind is x.VAR_KEYWORD for x in parameters.values())
