"""A wrapper for classifiers that accept only the labels 0, 1, ..., C-1: it fits them on the codes of any labels."""

from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import clone

from pydistill.teachers.estimators import Estimator, EstimatorInput, classifier_to_fit, fit_weighted, is_a

if TYPE_CHECKING:
    from pydistill._base_classes import BaseEstimator, ClassifierMixin
else:
    from sklearn.base import BaseEstimator, ClassifierMixin


class OnLabelCodes(ClassifierMixin, BaseEstimator):
    """Fits a classifier on the codes of the labels, and predicts the labels themselves.

    Attributes:
        classes_: the labels, sorted; they are the columns of ``predict_proba``.
        estimator_: the classifier, fitted on the labels' positions in ``classes_``.
    """

    classes_: NDArray[Any]
    estimator_: Estimator

    def __init__(self, estimator: Estimator) -> None:
        self.estimator = estimator

    def fit(self, X: EstimatorInput, y: ArrayLike, sample_weight: NDArray[Any] | None = None) -> Self:
        """Fit a clone of the classifier."""
        self.classes_, codes = np.unique(y, return_inverse=True)
        self.estimator_ = fit_weighted(clone(self.estimator), X, codes, sample_weight)
        return self

    def predict(self, X: EstimatorInput) -> NDArray[Any]:
        """Predict labels: those whose codes the classifier predicts."""
        labels: NDArray[Any] = self.classes_[self.estimator_.predict(X)]
        return labels

    def predict_proba(self, X: EstimatorInput) -> NDArray[Any]:
        """Return the classifier's probabilities, with columns in the order of ``classes_``."""
        probs: NDArray[Any] = self.estimator_.predict_proba(X)
        return probs


def for_labels(estimator: Estimator, classes: NDArray[Any]) -> Estimator:
    """Return the estimator or, if it does not accept these labels, a wrapper that fits it on their codes."""
    needs_codes = is_a(classifier_to_fit(estimator), "xgboost", "XGBClassifier")
    if not needs_codes or classes.tolist() == list(range(len(classes))):
        return estimator
    return OnLabelCodes(estimator)
