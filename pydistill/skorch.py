"""A skorch classifier with the distillation loss; ``fit`` takes the teacher's outputs as an argument."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Self, TypeAlias

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn
from torch.utils.data import Dataset

from pydistill.losses import DistillationLoss
from pydistill.store import TeacherStore
from pydistill.targets import SoftTargets

try:
    from skorch.dataset import Dataset as SkorchDataset
    from skorch.utils import data_from_dataset, is_skorch_dataset, to_tensor
except ImportError as _error:
    raise ImportError("pydistill.skorch needs skorch: pip install 'pydistill-kd[skorch]'") from _error

if TYPE_CHECKING:
    from pydistill._base_classes import NeuralNetClassifier
else:
    from skorch import NeuralNetClassifier

Inputs: TypeAlias = Any  # what skorch takes as X: an array, a tensor, a list, a dict, a Dataset
Teacher: TypeAlias = SoftTargets | TeacherStore | Tensor

_softmax = partial(torch.softmax, dim=-1)


class DistilledNeuralNetClassifier(NeuralNetClassifier):
    """skorch's ``NeuralNetClassifier`` with :class:`pydistill.DistillationLoss` as its criterion.

    ``fit(X, y, teacher=targets)`` takes the teacher's outputs for the rows of X as an extra argument, so that y remains
    the labels that skorch and scikit-learn expect. Each batch of the training and of the validation split gets the
    targets of its own rows. Prediction needs no teacher. In a Pipeline, call
    ``pipeline.fit(X, y, net__teacher=targets)``; a search and ``cross_val_score(..., params={"teacher": targets})``
    split the targets like X. Sample weights are not supported.

    Validation rows that are not rows of X, such as those of ``predefined_split(valid)``, have no targets: with a
    DistillationLoss their validation loss is computed from the labels alone (alpha = 0).

    Args:
        module: maps inputs to logits ``(rows, C)``, without a softmax; ``predict_proba`` applies it.
        criterion: DistillationLoss. Its options are ``criterion__temperature``, ``criterion__alpha`` and so on. Another
            class is called in the same way: ``criterion(logits, targets, labels)``.
        predict_nonlinearity: maps logits to probabilities; by default the softmax at T = 1.
        *args, **kwargs: all other arguments of ``NeuralNetClassifier``.

    Example:
        >>> import torch
        >>> from sklearn.datasets import load_digits
        >>> from sklearn.ensemble import RandomForestClassifier
        >>> from pydistill.skorch import DistilledNeuralNetClassifier
        >>> from pydistill.teachers import soft_targets
        >>> X, y = load_digits(return_X_y=True)
        >>> X = (X / 16).astype("float32")
        >>> targets = soft_targets(RandomForestClassifier(20, random_state=0), X, y)
        >>> net = DistilledNeuralNetClassifier(
        ...     torch.nn.Linear, module__in_features=64, module__out_features=10, max_epochs=20, verbose=0,
        ...     optimizer=torch.optim.Adam, lr=0.01, criterion__temperature=2.0, criterion__alpha=0.7)
        >>> net.fit(X, y, teacher=targets).score(X, y) > 0.9
        True
    """

    def __init__(
        self,
        module: nn.Module | Callable[..., nn.Module],
        *args: Any,
        criterion: nn.Module | Callable[..., nn.Module] = DistillationLoss,
        predict_nonlinearity: Callable[[Tensor], Tensor] | str | None = _softmax,
        **kwargs: Any,
    ) -> None:
        super().__init__(module, *args, criterion=criterion, predict_nonlinearity=predict_nonlinearity, **kwargs)

    def fit(
        self,
        X: Inputs,
        y: ArrayLike | None,
        teacher: Teacher | NDArray[Any] | None = None,
        **fit_params: Any,
    ) -> Self:
        """Initialise and fit, as in skorch.

        Args:
            X: inputs, in any form that skorch takes.
            y: labels, int64; None if X is a Dataset that holds them.
            teacher: the teacher's outputs for the rows of X: SoftTargets, a TeacherStore, or logits ``(N, C)`` as a
                tensor or array. None is allowed only with ``criterion__alpha=0``.
            **fit_params: passed to the module's forward and to the train_split, as in skorch.

        Returns:
            DistilledNeuralNetClassifier: the fitted net itself.

        Raises:
            TypeError: teacher is a model instead of its outputs.
            ValueError: teacher has another number of rows than X; the train_split's training rows are not rows of X;
                any error of the loss.
        """
        super().fit(X, y, teacher=teacher, **fit_params)
        return self

    def fit_loop(
        self,
        X: Inputs,
        y: ArrayLike | None = None,
        epochs: int | None = None,
        teacher: Teacher | NDArray[Any] | None = None,
        **fit_params: Any,
    ) -> Self:
        """Fit without initialising, as in skorch, with ``teacher`` as in :meth:`fit`."""
        teacher = torch.from_numpy(teacher) if isinstance(teacher, np.ndarray) else teacher
        if teacher is not None and not isinstance(teacher, Teacher):
            raise TypeError(
                "teacher must be the teacher's outputs for the rows of X: SoftTargets, a TeacherStore, or logits as a "
                f"tensor or array; got {type(teacher).__name__}. pydistill.teachers computes them: "
                "soft_targets(estimator, X, y) for a classifier, teacher_outputs(module, X) for a torch module"
            )
        super().fit_loop(X, y, epochs, teacher=teacher, **fit_params)
        return self

    def get_split_datasets(
        self, X: Inputs, y: ArrayLike | None = None, teacher: Teacher | None = None, **fit_params: Any
    ) -> Any:
        """Return the training and validation datasets, as in skorch; with a teacher, rows carry their row numbers."""
        if teacher is None:
            return super().get_split_datasets(X, y, **fit_params)
        dataset = self.get_dataset(X, y)
        if len(teacher) != len(dataset):
            raise ValueError(f"teacher must have the {len(dataset)} rows of X, got {len(teacher)}")
        numbered = _NumberedData if is_skorch_dataset(dataset) else _Numbered
        return super().get_split_datasets(numbered(dataset), y, **fit_params)

    def train_step(self, batch: Any, teacher: Teacher | None = None, **fit_params: Any) -> Any:
        """Take one training step on a batch, with the targets of its rows."""
        if teacher is not None and not isinstance(batch[0], _Row):
            raise ValueError("train_split must take its training rows from X: the teacher has no outputs for others")
        return super().train_step(_with_targets(batch, teacher), **fit_params)

    def validation_step(self, batch: Any, teacher: Teacher | None = None, **fit_params: Any) -> Any:
        """Compute the validation loss of a batch, with the targets of its rows."""
        return super().validation_step(_with_targets(batch, teacher), **fit_params)

    def infer(self, x: Any, **fit_params: Any) -> Any:
        """Compute the module's output for a batch's inputs; row numbers and targets are not passed to the module."""
        return super().infer(x.inputs if isinstance(x, _Row | _Taught) else x, **fit_params)

    def get_loss(self, y_pred: Tensor, y_true: Any, X: Any = None, training: bool = False) -> Tensor:
        """Compute the criterion from the logits, the batch's targets and the labels."""
        targets = X.targets if isinstance(X, _Taught) else None
        unknown = targets is None and not training and isinstance(self.criterion_, DistillationLoss)
        options = {"alpha": 0.0} if unknown else {}
        loss: Tensor = self.criterion_(y_pred, targets, to_tensor(y_true, device=self.device), **options)
        return loss


class _Row(NamedTuple):
    """The inputs and the number of a row; collating a list of rows gives the inputs and numbers of a batch."""

    inputs: Any
    row: Any


class _Taught(NamedTuple):
    """The inputs of a batch with the targets of its rows."""

    inputs: Any
    targets: Any


class _Numbered(Dataset[tuple[_Row, Any]]):
    """A dataset whose items hold their row numbers, so that these are known after a split or a shuffle."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> tuple[_Row, Any]:
        inputs, label = self.dataset[row]
        return _Row(inputs, int(row)), label


class _NumberedData(_Numbered, SkorchDataset):  # type: ignore[misc]  # skorch has no types
    """Numbered rows with X and y as attributes, which skorch's scoring callbacks read from skorch's own Dataset."""

    def __init__(self, dataset: Any) -> None:
        super().__init__(dataset)
        self.X, self.y = data_from_dataset(dataset)


def _with_targets(batch: Any, teacher: Teacher | None) -> Any:
    """Return the batch with the targets of its rows; unchanged if there is no teacher, or the rows have no numbers."""
    if teacher is None or not isinstance(batch[0], _Row):
        return batch
    inputs, labels = batch
    return _Taught(inputs.inputs, teacher[inputs.row]), labels
