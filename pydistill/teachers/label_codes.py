"""Classifiers that take no labels but 0, 1, ... C-1, fitted on the codes of any labels."""

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin, clone

from pydistill.teachers.estimators import fit_weighted


class OnLabelCodes(ClassifierMixin, BaseEstimator):
    """Fits a classifier on the codes of the labels, and speaks of the labels themselves.

    Attributes:
        classes_: the labels, sorted; the columns of ``predict_proba``.
        estimator_: the classifier, fitted on their places in ``classes_``.
    """

    def __init__(self, estimator):
        self.estimator = estimator

    def fit(self, X, y, sample_weight=None):
        """Fit a clone of the classifier."""
        self.classes_, codes = np.unique(y, return_inverse=True)
        self.estimator_ = fit_weighted(clone(self.estimator), X, codes, sample_weight)
        return self

    def predict(self, X):
        """The labels that the classifier means."""
        return self.classes_[self.estimator_.predict(X)]

    def predict_proba(self, X):
        """The classifier's probabilities."""
        return self.estimator_.predict_proba(X)
