"""A skorch classifier with the distillation loss; the teacher's outputs are an argument of ``fit``."""

from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pydistill.losses import DistillationLoss
from pydistill.store import TeacherStore
from pydistill.targets import SoftTargets

try:
    from skorch import NeuralNetClassifier
    from skorch.dataset import Dataset as SkorchDataset
    from skorch.utils import data_from_dataset, is_skorch_dataset, to_tensor
except ImportError as error:
    raise ImportError("pydistill.skorch needs skorch: pip install 'pydistill-kd[skorch]'") from error

_softmax = partial(torch.softmax, dim=-1)


class DistilledNeuralNetClassifier(NeuralNetClassifier):
    """skorch's ``NeuralNetClassifier`` with :class:`pydistill.DistillationLoss` as its criterion.

    ``fit(X, y, teacher=targets)`` takes the teacher's outputs for the rows of X beside the labels, which stay what
    skorch and scikit-learn expect. Each batch, of the training and of the validation split, gets its own rows of them.
    Prediction knows no teacher. In a Pipeline it is ``pipeline.fit(X, y, net__teacher=targets)``; a search and
    ``cross_val_score(..., params={"teacher": targets})`` split the targets like X. Sample weights are not supported.

    Validation rows that are not rows of X, as ``predefined_split(valid)`` gives them, have no targets: a
    DistillationLoss scores them on their labels (alpha = 0).

    Args:
        module: maps inputs to logits ``(rows, C)``, without a softmax; ``predict_proba`` applies it.
        criterion: DistillationLoss. Its options are ``criterion__temperature``, ``criterion__alpha`` and so on. Another
            class is called in the same way: ``criterion(logits, targets, labels)``.
        predict_nonlinearity: makes probabilities of logits; the softmax at T = 1.
        *args, **kwargs: everything else that ``NeuralNetClassifier`` takes.

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

    def __init__(self, module, *args, criterion=DistillationLoss, predict_nonlinearity=_softmax, **kwargs):
        super().__init__(module, *args, criterion=criterion, predict_nonlinearity=predict_nonlinearity, **kwargs)

    def fit(self, X, y, teacher=None, **fit_params):
        """Initialise and fit, as in skorch.

        Args:
            X: inputs, in any form that skorch takes.
            y: labels, int64; None where X is a Dataset that holds them.
            teacher: the teacher's outputs for the rows of X: SoftTargets, a TeacherStore, or logits ``(N, C)`` as a
                tensor or array. None only for ``criterion__alpha=0``.
            **fit_params: go to the module's forward and to the train_split, as in skorch.

        Raises:
            TypeError: a teacher that is no outputs, but what makes them.
            ValueError: a teacher with another number of rows; a train_split whose training rows are not rows of X. And
                what the loss raises.
        """
        return super().fit(X, y, teacher=teacher, **fit_params)

    def fit_loop(self, X, y=None, epochs=None, teacher=None, **fit_params):
        """As in skorch, with ``teacher`` as in :meth:`fit`."""
        teacher = torch.from_numpy(teacher) if isinstance(teacher, np.ndarray) else teacher
        if teacher is not None and not isinstance(teacher, SoftTargets | TeacherStore | Tensor):
            raise TypeError(
                "teacher must be its outputs for the rows of X: SoftTargets, a TeacherStore, or logits as a tensor or "
                f"array; got {type(teacher).__name__}. pydistill.teachers makes them: soft_targets(estimator, X, y) of "
                "a classifier, teacher_outputs(module, X) of a torch module"
            )
        return super().fit_loop(X, y, epochs, teacher=teacher, **fit_params)

    def get_split_datasets(self, X, y=None, teacher=None, **fit_params):
        """The training and validation datasets; with a teacher their rows are numbered."""
        if teacher is None:
            return super().get_split_datasets(X, y, **fit_params)
        dataset = self.get_dataset(X, y)
        if len(teacher) != len(dataset):
            raise ValueError(f"teacher must have the {len(dataset)} rows of X, got {len(teacher)}")
        numbered = _NumberedData if is_skorch_dataset(dataset) else _Numbered
        return super().get_split_datasets(numbered(dataset), y, **fit_params)

    def train_step(self, batch, teacher=None, **fit_params):
        """One step on a batch and its rows of the teacher."""
        if teacher is not None and not isinstance(batch[0], _Row):
            raise ValueError("train_split must take its training rows from X: the teacher has no outputs for others")
        return super().train_step(_with_targets(batch, teacher), **fit_params)

    def validation_step(self, batch, teacher=None, **fit_params):
        """The loss of a batch and its rows of the teacher."""
        return super().validation_step(_with_targets(batch, teacher), **fit_params)

    def infer(self, x, **fit_params):
        """The module's output; it sees the inputs alone."""
        return super().infer(x.inputs if isinstance(x, _Row | _Taught) else x, **fit_params)

    def get_loss(self, y_pred, y_true, X=None, training=False):
        """The criterion of logits, the batch's targets, and labels."""
        targets = X.targets if isinstance(X, _Taught) else None
        unknown = targets is None and not training and isinstance(self.criterion_, DistillationLoss)
        options = {"alpha": 0.0} if unknown else {}
        return self.criterion_(y_pred, targets, to_tensor(y_true, device=self.device), **options)


class _Row(NamedTuple):
    """Inputs and the numbers of their rows; collating a list of them gives one of a batch."""

    inputs: Any
    row: Any


class _Taught(NamedTuple):
    inputs: Any
    targets: Any


class _Numbered(Dataset):
    """A dataset that says which row it gives: the split and the shuffling come after it."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, row):
        inputs, label = self.dataset[row]
        return _Row(inputs, int(row)), label


class _NumberedData(_Numbered, SkorchDataset):
    """One whose X and y skorch's scoring callbacks find: they look for them in datasets of skorch's own class."""

    def __init__(self, dataset):
        super().__init__(dataset)
        self.X, self.y = data_from_dataset(dataset)


def _with_targets(batch, teacher):
    """The batch with its rows of the teacher; as it is where there is none, or none for these rows."""
    if teacher is None or not isinstance(batch[0], _Row):
        return batch
    inputs, labels = batch
    return _Taught(inputs.inputs, teacher[inputs.row]), labels
