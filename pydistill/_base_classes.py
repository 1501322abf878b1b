"""Types of the base classes of scikit-learn and skorch, for type checkers: these libraries have no type information.

Nothing imports this module when the package runs.
"""

from typing import Any, Self


class BaseEstimator:
    """sklearn.base.BaseEstimator."""

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Return the constructor's parameters by name."""
        raise NotImplementedError

    def set_params(self, **params: Any) -> Self:
        """Set constructor parameters."""
        raise NotImplementedError


class ClassifierMixin:
    """sklearn.base.ClassifierMixin."""

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Return the accuracy on the given rows."""
        raise NotImplementedError


class NeuralNetClassifier(BaseEstimator, ClassifierMixin):
    """skorch.NeuralNetClassifier."""

    criterion_: Any
    device: Any
    module_: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError

    def fit(self, *args: Any, **kwargs: Any) -> Self:
        """Initialise the module and fit it."""
        raise NotImplementedError

    def fit_loop(self, *args: Any, **kwargs: Any) -> Self:
        """Run the epochs."""
        raise NotImplementedError

    def get_dataset(self, *args: Any, **kwargs: Any) -> Any:
        """Return the data as a dataset."""
        raise NotImplementedError

    def get_split_datasets(self, *args: Any, **kwargs: Any) -> Any:
        """Return the training and the validation dataset."""
        raise NotImplementedError

    def train_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run one training step."""
        raise NotImplementedError

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run one validation step."""
        raise NotImplementedError

    def infer(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module on a batch of inputs."""
        raise NotImplementedError
