"""``DistilledClassifier``: a small network as a scikit-learn classifier, taught by a larger classifier."""

import inspect
import pickle
from collections.abc import Callable, Iterable, Sequence
from copy import copy, deepcopy
from numbers import Integral
from os import PathLike
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from pydistill._arguments import check_count, warn_caller
from pydistill._torch_modules import as_input, float_dtype
from pydistill.losses import DistillationLoss
from pydistill.targets import SoftTargets
from pydistill.teachers.estimators import (
    Estimator,
    EstimatorInput,
    check_classifier,
    fit_weighted,
    frozen_part,
    other_classes,
    poor_teacher_message,
    usable_weight,
)
from pydistill.teachers.folds import counted_folds
from pydistill.teachers.label_codes import for_labels
from pydistill.teachers.outputs import soft_targets, teacher_outputs
from pydistill.trainer.checks import check_lone_row
from pydistill.trainer.history import History
from pydistill.trainer.loop import Trainer

try:
    from sklearn.base import clone
    from sklearn.frozen import FrozenEstimator
    from sklearn.utils import _safe_indexing, check_array, check_consistent_length, check_random_state
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import _check_sample_weight, check_is_fitted, check_memory, validate_data
except ImportError as _error:
    raise ImportError("pydistill.sklearn needs scikit-learn: pip install 'pydistill-kd[sklearn]'") from _error

if TYPE_CHECKING:
    from pydistill._base_classes import BaseEstimator, ClassifierMixin
else:
    from sklearn.base import BaseEstimator, ClassifierMixin


_FLOATS = (np.float64, np.float32)  # features keep their precision for the teacher
_UNLABELED = -100
_PREDICT_ROWS = 4096


class DistilledClassifier(ClassifierMixin, BaseEstimator):
    r"""A scikit-learn classifier: a small torch network trained with a larger classifier as teacher and with labels.

    ``fit`` computes the teacher's soft targets for each row with a refit that did not see the row
    (:func:`pydistill.teachers.soft_targets`), fits the teacher on all rows, and trains the student with Adam on

    .. math::
        \text{alpha}\, T^2\, \mathrm{KL}(\text{teacher}_T, \text{student}_T)
        + (1 - \text{alpha})\, \mathrm{CE}(\text{student}, y)

    ``predict``, ``predict_proba`` (the student's softmax at T = 1) and ``score`` use only the student. The student that
    is built from ``hidden_layer_sizes`` is trained in float64, so that rounding does not depend on the order of the
    rows, and stored in float32. A student passed as ``student`` is trained in its own precision.

    The features are not scaled: put a ``StandardScaler`` before the classifier in a Pipeline; the teacher then gets
    scaled features too. The teacher gets DataFrames unchanged and all other rows as an array. It gets the labels
    unchanged, except for XGBClassifier, which gets codes if the labels are not 0, 1, ... already.

    Args:
        teacher: any classifier with ``predict_proba``; clones of it are fitted. Two kinds are used without a refit, and
            should not have been fitted on the rows of ``fit``: a ``FrozenEstimator`` around a complete fitted
            classifier or Pipeline, and a torch module that maps floating-point rows to logits, one per class in sorted
            order. A warning is given if such a teacher is correct no more often than a constant prediction.
        hidden_layer_sizes: widths of the student's hidden layers, with ReLU between them; () gives a linear student.
        student: the student to use instead: a function of ``(n_features, n_classes)`` that returns a torch module, or
            a module, which is copied with its weights. The module maps ``(rows, n_features)`` to logits
            ``(rows, n_classes)``; for images begin with ``torch.nn.Unflatten``.
        temperature: T, applied to teacher and student in the soft term. A forest's probabilities are already soft:
            search over temperatures from T = 1 on, and over alpha.
        alpha: weight of the soft term in [0, 1]; with 0 the student learns from the labels alone.
        epochs: passes over the rows.
        batch_size: rows per step. A student with BatchNorm cannot train on a last batch of one row.
        learning_rate: Adam's learning rate.
        cv: the folds for the soft targets: a number, a splitter, or an iterable of ``(train, test)`` indices.
        memory: a folder, or a joblib.Memory, that caches fitted teachers and their targets. With an int as
            ``random_state``, a search over temperature and alpha then fits the teacher once per split of its data, not
            once per candidate.
        random_state: with an int, ``fit`` gives the same result to the bit every time; it also seeds every part of the
            teacher that has ``random_state=None``. torch's global random state is never changed.

    Attributes:
        classes_: the sorted labels, in the order of the columns of ``predict_proba``.
        teacher_: the teacher, fitted on all rows.
        student_: the trained module, in eval mode. Save this to deploy it; a pickle of the classifier also holds the
            teacher.
        agreement_: share of the labelled rows of ``fit`` for which the student's class is the class of the teacher's
            targets, which are out of fold: ``teacher_`` itself has seen these rows and their labels.
        compression_: bytes of the pickled teacher / bytes of the student's parameters and buffers.
        history_: the result of :meth:`pydistill.Trainer.fit`, one record per epoch.
        n_features_in_, feature_names_in_: as in every scikit-learn estimator.

    Example:
        >>> from sklearn.datasets import load_digits
        >>> from sklearn.ensemble import RandomForestClassifier
        >>> from sklearn.model_selection import train_test_split
        >>> from sklearn.pipeline import make_pipeline
        >>> from sklearn.preprocessing import StandardScaler
        >>> from pydistill.sklearn import DistilledClassifier
        >>> X, X_test, y, y_test = train_test_split(*load_digits(return_X_y=True), random_state=0)
        >>> model = DistilledClassifier(RandomForestClassifier(50), temperature=1.0, alpha=0.3, random_state=0)
        >>> pipeline = make_pipeline(StandardScaler(), model).fit(X, y)
        >>> pipeline.score(X_test, y_test) > 0.95, model.agreement_ > 0.95, model.compression_ > 100
        (True, True, True)

        Deploy ``student_``, a plain module. Unless ``student`` was given, it is ``Sequential(Linear, ReLU, ...,
        Linear)``, with a ReLU after each hidden layer. The saved file holds its weights; put into ``metadata`` all that
        is needed to rebuild the module and to interpret its outputs. The scaler is not saved with it.

        >>> import json, tempfile, torch, pydistill
        >>> from pathlib import Path
        >>> folder, scaler = tempfile.TemporaryDirectory(), pipeline[0]
        >>> metadata = {"sizes": [64, 32, 10], "classes": model.classes_.tolist()}
        >>> path = pydistill.save_student(model.student_, folder.name, metadata=metadata)
        >>> metadata = json.loads(Path(path, "student.json").read_text())["metadata"]
        >>> n_features, hidden, n_classes = metadata["sizes"]
        >>> student = torch.nn.Sequential(
        ...     torch.nn.Linear(n_features, hidden), torch.nn.ReLU(), torch.nn.Linear(hidden, n_classes))
        >>> student = pydistill.load_student(path, student)
        >>> with torch.inference_mode():
        ...     columns = student(torch.tensor(scaler.transform(X_test), dtype=torch.float32)).argmax(-1)
        >>> predicted = [metadata["classes"][column] for column in columns]
        >>> predicted == pipeline.predict(X_test).tolist()
        True
        >>> folder.cleanup()
    """

    classes_: NDArray[Any]
    teacher_: Estimator
    student_: nn.Module
    agreement_: float
    history_: History
    n_features_in_: int
    feature_names_in_: NDArray[Any]

    def __init__(
        self,
        teacher: Estimator,
        *,
        hidden_layer_sizes: int | Sequence[int] = (32,),
        student: nn.Module | Callable[[int, int], nn.Module] | None = None,
        temperature: float = 2.0,
        alpha: float = 0.7,
        epochs: int = 40,
        batch_size: int = 64,
        learning_rate: float = 1e-2,
        cv: int | Iterable[Any] | Any = 5,
        memory: str | PathLike[str] | Any | None = None,
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.teacher = teacher
        self.hidden_layer_sizes = hidden_layer_sizes
        self.student = student
        self.temperature = temperature
        self.alpha = alpha
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.cv = cv
        self.memory = memory
        self.random_state = random_state

    def fit(
        self,
        X: EstimatorInput,
        y: ArrayLike,
        sample_weight: ArrayLike | None = None,
        X_unlabeled: EstimatorInput | None = None,
    ) -> Self:
        """Fit the teacher, then the student.

        Args:
            X: ``(N, n_features)``, array, list or DataFrame of finite numbers.
            y: ``(N,)``, integers, strings or booleans.
            sample_weight: ``(N,)``, finite and >= 0. The weights apply to both terms of the student's loss. They are
                also passed to the teacher's ``fit`` if it takes weights: in a Pipeline to every step that takes them;
                with metadata routing enabled, to every step that requests them. If it does not take weights, a warning
                is given, and the teacher is fitted without weights on the rows of positive weight. Rows of weight 0 are
                removed first: they may hold any values and labels, and are in no fold (the row numbers in ``cv`` still
                refer to all rows). Integer weights are equivalent to repeated rows, up to rounding, if this holds for
                the teacher and ``batch_size`` is at least the number of rows. In smaller batches the equivalence holds
                on average only: a row of weight 2 is drawn once per epoch, and counts twice.
            X_unlabeled: ``(M, n_features)``, rows without labels, for which the student learns the outputs of the
                fitted teacher; each has weight 1. In a Pipeline they are transformed by the earlier steps only with
                ``transform_input=["X_unlabeled"]``.

        Returns:
            DistilledClassifier: the fitted classifier itself.

        Raises:
            ValueError, TypeError: rows, labels, weights or options are invalid; the teacher's classes are not those of
                y; the loss is no longer finite. Options are checked before the teacher is fitted.
        """
        fitted = copy(self)  # if this fit fails, the results of the previous one are kept
        fitted._fit(X, y, sample_weight, X_unlabeled)
        self.__dict__ = fitted.__dict__
        return self

    def _fit(
        self, X: EstimatorInput, y: ArrayLike, sample_weight: ArrayLike | None, X_unlabeled: EstimatorInput | None
    ) -> None:
        X, y, weight, kept = _rows_that_count(X, y, sample_weight)
        features, labels = validate_data(self, X, y, dtype=_FLOATS)
        check_classification_targets(labels)
        classes, codes = np.unique(labels, return_inverse=True)
        if len(classes) < 2:
            where = "" if kept is None else " in rows whose sample_weight is not 0"
            raise ValueError(f"y must hold at least two classes{where}, got {len(classes)} class")
        unlabeled = None if X_unlabeled is None else self._check_unlabeled(X_unlabeled)
        cv = self.cv if kept is None else counted_folds(self.cv, kept)

        epochs, batch_size = check_count("epochs", self.epochs), check_count("batch_size", self.batch_size)
        self._check_teacher()
        rng = check_random_state(self.random_state)
        student, trainer = self._make_trainer(features, len(classes), rng)
        inputs = _inputs(student, features)
        students_weight = None if weight is None else _in_precision(weight, inputs.dtype)
        row_count = len(inputs) + (0 if unlabeled is None else len(unlabeled))
        if (row_count - 1) % batch_size == 0:  # the trainer checks this too, but only after the teacher was fitted
            check_lone_row(student, inputs[:1], row_count, batch_size)

        rows = _as_teacher_takes_them(X, features)
        teacher, targets = self._teach(rows, labels, classes, cv, weight, rng)
        data: tuple[Tensor | SoftTargets, ...] = inputs, targets, torch.from_numpy(codes)
        if unlabeled is not None:
            more = teacher_outputs(teacher, _as_teacher_takes_them(X_unlabeled, unlabeled))
            data = _with_unlabeled(inputs, targets, torch.from_numpy(codes), _inputs(student, unlabeled), more)
        if students_weight is not None:
            ones = students_weight.new_ones(row_count - len(students_weight))
            data = (*data, torch.cat([students_weight, ones]))
        try:
            history = trainer.fit(data, epochs=epochs, batch_size=batch_size)
        except ValueError as error:
            error.add_note(f"If the loss is no longer finite: {self._hint()}")
            raise

        if self.student is None:
            student.float()
        logits = _logits(student.eval(), _inputs(student, features))
        if not logits.isfinite().all():
            raise ValueError(
                f"student must give finite logits for X, got NaN or infinity in {logits.dtype}: {self._hint()}"
            )
        self.classes_, self.teacher_, self.student_, self.history_ = classes, teacher, student, history
        agrees = logits.argmax(-1) == targets.logits.argmax(-1)
        self.agreement_ = float(agrees.double().mean())

    def _hint(self) -> str:
        return f"scale the features (StandardScaler), or lower learning_rate, which is {self.learning_rate}"

    def predict(self, X: EstimatorInput) -> NDArray[Any]:
        """Predict the class of each row with the student: ``(N,)``."""
        probs = self.predict_proba(X)  # before classes_ is read: it checks that the classifier is fitted
        classes: NDArray[Any] = self.classes_[probs.argmax(1)]
        return classes

    def predict_proba(self, X: EstimatorInput) -> NDArray[Any]:
        """Predict the student's probabilities ``(N, n_classes)`` at T = 1; columns in the order of ``classes_``.

        They are float32, or float64 for a float64 student.
        """
        check_is_fitted(self)
        X = validate_data(self, X, reset=False, dtype=_FLOATS)
        logits = _logits(self.student_, _inputs(self.student_, X))
        probs: NDArray[Any] = logits.softmax(-1, dtype=_precision(logits.dtype)).numpy()
        return probs

    @property
    def compression_(self) -> float:
        """Bytes of the pickled teacher / bytes of the student's parameters and buffers."""
        check_is_fitted(self)
        student_bytes: int = sum(x.nbytes for x in self.student_.state_dict().values())
        return len(pickle.dumps(self.teacher_)) / student_bytes

    def _check_unlabeled(self, X_unlabeled: EstimatorInput) -> NDArray[Any]:
        rows: NDArray[Any] = check_array(X_unlabeled, dtype=_FLOATS, input_name="X_unlabeled", ensure_min_samples=0)
        if len(rows) == 0:
            raise ValueError("X_unlabeled must hold at least one row, got none; pass None if there are no such rows")
        if rows.shape[1] != self.n_features_in_:
            raise ValueError(f"X_unlabeled must have the {self.n_features_in_} features of X, got {rows.shape[1]}")
        validate_data(self, X_unlabeled, reset=False, skip_check_array=True)  # the names of a DataFrame's columns
        return rows

    def _check_teacher(self) -> None:
        if isinstance(self.teacher, nn.Module | FrozenEstimator):
            return
        check_classifier("teacher", self.teacher)
        frozen = frozen_part(self.teacher)
        if frozen:
            raise ValueError(
                f"teacher cannot be refitted for out-of-fold targets: {frozen}. If it was fitted on other rows than "
                "these, freeze all of it, including a Pipeline: FrozenEstimator(teacher)"
            )

    def _make_trainer(
        self, features: NDArray[Any], n_classes: int, rng: np.random.RandomState
    ) -> tuple[nn.Module, Trainer]:
        """Make student and trainer. This comes before the slow fit of the teacher, so that errors are raised early."""
        loss = DistillationLoss(temperature=self.temperature, alpha=self.alpha, unlabeled="distill")
        weights_seed, seed = (int(x) for x in rng.randint(2**31 - 1, size=2))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(weights_seed)
            student = self._make_student(features.shape[1], n_classes)
            inputs = _inputs(student, features[:2])
            outputs = _logits(student.eval(), inputs)  # this call creates the parameters of lazy layers
        if outputs.shape != (len(inputs), n_classes):
            raise ValueError(
                f"student must map (rows, {inputs.shape[1]}) to logits (rows, {n_classes}), one for each class; it "
                f"maps {tuple(inputs.shape)} to {tuple(outputs.shape)}"
            )
        optimizer = torch.optim.Adam(student.parameters(), lr=self.learning_rate, fused=True)
        return student, Trainer(student, loss, optimizer=optimizer, seed=seed, progress=False)

    def _make_student(self, n_features: int, n_classes: int) -> nn.Module:
        if isinstance(self.student, nn.Module):
            return deepcopy(self.student)
        if self.student is None:
            return _mlp(n_features, self.hidden_layer_sizes, n_classes).double()
        if not callable(self.student):
            raise TypeError(
                "student must be a torch module or a function of (n_features, n_classes) that returns one, got "
                f"{type(self.student).__name__}"
            )
        try:
            inspect.signature(self.student).bind(n_features, n_classes)
        except TypeError as error:
            name = getattr(self.student, "__name__", type(self.student).__name__)
            raise TypeError(
                "student must be a torch module, such as MyNet(), or a function of (n_features, n_classes) that "
                f"returns one; {name} does not take these two arguments: {error}"
            ) from error
        student = self.student(n_features, n_classes)
        if not isinstance(student, nn.Module):
            raise TypeError(f"student(n_features, n_classes) must return a torch module, got {type(student).__name__}")
        return student

    def _teach(
        self,
        rows: EstimatorInput,
        y: NDArray[Any],
        classes: NDArray[Any],
        cv: Any,
        weight: NDArray[Any] | None,
        rng: np.random.RandomState,
    ) -> tuple[Estimator, SoftTargets]:
        """Return the fitted teacher and its targets for the rows."""
        if isinstance(self.teacher, nn.Module | FrozenEstimator):
            teacher = self.teacher if isinstance(self.teacher, nn.Module) else self.teacher.estimator
            targets = teacher_outputs(teacher, rows)
            _check_prefit(teacher, targets, y, classes)
            return teacher, targets
        teacher = _seed(clone(self.teacher), rng)
        weight = usable_weight("teacher", teacher, weight)
        found: tuple[Estimator, SoftTargets]
        found = check_memory(self.memory).cache(_fit_teacher)(teacher, rows, y, cv, weight)
        return found


def _fit_teacher(
    teacher: Estimator, rows: EstimatorInput, y: NDArray[Any], cv: Any, weight: NDArray[Any] | None
) -> tuple[Estimator, SoftTargets]:
    targets = soft_targets(teacher, rows, y, cv=cv, sample_weight=weight)
    return fit_weighted(for_labels(teacher, np.unique(y)), rows, y, weight), targets


def _seed(teacher: Estimator, rng: np.random.RandomState) -> Estimator:
    """Set every ``random_state`` in the teacher that is None."""
    names = (name for name in teacher.get_params() if name == "random_state" or name.endswith("__random_state"))
    unset = sorted(name for name in names if teacher.get_params()[name] is None)
    return teacher.set_params(**{name: int(rng.randint(2**31 - 1)) for name in unset})


def _mlp(n_features: int, hidden: int | Sequence[int], n_classes: int) -> nn.Module:
    sizes: tuple[Any, ...] = tuple(hidden) if np.iterable(hidden) else (hidden,)
    if not all(isinstance(size, Integral) and int(size) > 0 for size in sizes):
        raise ValueError(f"hidden_layer_sizes must be integers of at least 1, got {sizes}")
    layers: list[nn.Module] = []
    width = n_features
    for size in sizes:
        layers += [nn.Linear(width, int(size)), nn.ReLU()]
        width = int(size)
    return nn.Sequential(*layers, nn.Linear(width, n_classes))


def _inputs(student: nn.Module, features: NDArray[Any]) -> Tensor:
    """Convert the features to a tensor in the student's own precision."""
    return as_input(features, float_dtype(student, torch.float32))


def _precision(dtype: torch.dtype) -> torch.dtype:
    """Return the precision of the loss: float32, or float64 for a float64 student."""
    return torch.promote_types(dtype, torch.float32)


def _in_precision(weight: NDArray[Any], dtype: torch.dtype) -> Tensor:
    """Convert the weights to the precision of the student's loss; raise an error if one becomes 0 or infinite."""
    limits = torch.finfo(_precision(dtype))
    bad = (weight < limits.tiny) | (weight > limits.max)
    if bad.any():
        raise ValueError(
            f"sample_weight must be 0 or from {limits.tiny:.0e} to {limits.max:.0e}, the range of {limits.dtype}, got "
            f"{weight[bad.argmax()]}; multiply all weights by the same number"
        )
    return torch.from_numpy(weight).to(_precision(dtype))


@torch.no_grad()
def _logits(student: nn.Module, inputs: Tensor) -> Tensor:
    return torch.cat([student(part) for part in torch.split(inputs, _PREDICT_ROWS)])


def _with_unlabeled(
    inputs: Tensor, targets: SoftTargets, labels: Tensor, more_inputs: Tensor, more_targets: SoftTargets
) -> tuple[Tensor, SoftTargets, Tensor]:
    """Append the rows without labels to inputs, targets and labels."""
    no_labels = torch.full((len(more_inputs),), _UNLABELED)
    soft = SoftTargets.from_log_probs(torch.cat([targets.logits, more_targets.logits]))
    return torch.cat([inputs, more_inputs]), soft, torch.cat([labels, no_labels])


def _as_teacher_takes_them(X: EstimatorInput, features: NDArray[Any]) -> EstimatorInput:
    """Return a DataFrame unchanged, because a teacher may select columns by name; else the validated array."""
    return X if hasattr(X, "columns") else features


def _rows_that_count(
    X: EstimatorInput, y: Any, sample_weight: ArrayLike | None
) -> tuple[EstimatorInput, Any, NDArray[Any] | None, NDArray[np.bool_] | None]:
    """Remove rows of weight 0 from X, y and weights; also return a mask of the rows kept, None if all are kept."""
    if sample_weight is None:
        return X, y, None, None
    weight = _check_sample_weight(sample_weight, X, ensure_non_negative=True)
    kept = weight > 0
    if y is None or kept.all():
        return X, y, weight, None
    check_consistent_length(X, y)
    rows = np.flatnonzero(kept)
    X = X.tocsr() if hasattr(X, "tocsr") else X
    return _safe_indexing(X, rows), _safe_indexing(y, rows), weight[rows], kept


def _check_prefit(teacher: Estimator, targets: SoftTargets, y: NDArray[Any], classes: NDArray[Any]) -> None:
    """Check that the classes are those of y; warn if the teacher is no better than a constant prediction."""
    if isinstance(teacher, nn.Module):
        if targets.shape[1:] != (len(classes),):
            raise ValueError(
                f"teacher must have one output for each of the {len(classes)} classes of y, got outputs of shape "
                f"{tuple(targets.shape)}"
            )
    elif not np.array_equal(teacher.classes_, classes):
        raise other_classes("teacher", teacher.classes_, classes)
    accuracy = np.mean(classes[targets.logits.argmax(-1).numpy()] == y)
    constant = np.unique(y, return_counts=True)[1].max() / len(y)
    if accuracy <= constant:
        warn_caller(
            poor_teacher_message(accuracy, constant)
            + ", or the teacher's outputs may not be in the order of the classes"
        )
