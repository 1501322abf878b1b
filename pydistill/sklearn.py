"""``DistilledClassifier``: a small network as a scikit-learn classifier, taught by a larger classifier."""

import inspect
import pickle
import warnings
from copy import copy, deepcopy
from numbers import Integral

import numpy as np
import torch
from torch import nn

from pydistill._torch_modules import float_dtype
from pydistill.losses import DistillationLoss
from pydistill.targets import SoftTargets
from pydistill.teachers.estimators import (
    check_classifier,
    fit_weighted,
    frozen_part,
    other_classes,
    usable_weight,
)
from pydistill.teachers.folds import counted_folds
from pydistill.teachers.label_codes import for_labels
from pydistill.teachers.outputs import soft_targets, teacher_outputs
from pydistill.trainer.checks import check_lone_row
from pydistill.trainer.loop import Trainer

try:
    from sklearn.base import BaseEstimator, ClassifierMixin, clone
    from sklearn.frozen import FrozenEstimator
    from sklearn.utils import _safe_indexing, check_array, check_consistent_length, check_random_state
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import _check_sample_weight, check_is_fitted, check_memory, validate_data
except ImportError as error:
    raise ImportError("pydistill.sklearn needs scikit-learn: pip install 'pydistill-kd[sklearn]'") from error

_FLOATS = (np.float64, np.float32)  # the teacher gets the features in the precision that they have
_UNLABELED = -100
_PREDICT_ROWS = 4096


class DistilledClassifier(ClassifierMixin, BaseEstimator):
    r"""A small torch network that learns from a larger classifier and from the labels; a scikit-learn classifier.

    ``fit`` gets the teacher's soft targets for each row from a refit that did not see the row
    (:func:`pydistill.teachers.soft_targets`), fits the teacher on all rows, and trains the student on

    .. math::
        \text{alpha}\, T^2\, \mathrm{KL}(\text{teacher}_T, \text{student}_T)
        + (1 - \text{alpha})\, \mathrm{CE}(\text{student}, y)

    with Adam. The student that is made of ``hidden_layer_sizes`` learns in float64, so that rounding does not depend on
    the order of the rows, and is kept in float32; a student of your own learns in its own precision. ``predict``,
    ``predict_proba`` (the student's softmax at T = 1) and ``score`` use the student alone.

    The features are not scaled: put a ``StandardScaler`` before it in a Pipeline; the teacher then gets scaled features
    too. The teacher gets DataFrames as they are, everything else as an array, and the labels as they are; only
    XGBClassifier gets their codes, where they are not 0, 1, ... already.

    Args:
        teacher: any classifier with ``predict_proba``; clones of it are fitted. Two kinds are used as they are, for all
            rows, and should not have been fitted on those of ``fit``: a ``FrozenEstimator`` around a whole fitted
            classifier or Pipeline, and a torch module that maps float rows to logits, one per class in sorted order;
            with a warning if they are right no more often than a constant answer.
        hidden_layer_sizes: widths of the student's hidden layers, with ReLU between them; () is a linear student.
        student: another student than that: a function of ``(n_features, n_classes)`` that makes a torch module, or a
            module, which is copied with its weights. It maps ``(rows, n_features)`` to logits ``(rows, n_classes)``;
            for images begin with ``torch.nn.Unflatten``.
        temperature: T, at which teacher and student are compared. A forest's probabilities are soft as they are: search
            from T = 1 on, and for alpha too.
        alpha: weight of the soft term in [0, 1]; with 0 the student learns from the labels alone.
        epochs: passes over the rows.
        batch_size: rows per step. A student with BatchNorm cannot train on a last batch of one row.
        learning_rate: of Adam.
        cv: folds of the soft targets: a number, a splitter, or an iterable of ``(train, test)`` indices.
        memory: a folder, or a joblib.Memory, where fitted teachers and their targets are kept: with an int for
            ``random_state``, a search over temperature and alpha then fits the teacher once per split of its data, not
            once per candidate.
        random_state: an int makes ``fit`` the same to the bit every time; it also seeds whatever in the teacher has
            ``random_state=None``. torch's global random state is never touched.

    Attributes:
        classes_: the labels, sorted; the columns of ``predict_proba``.
        teacher_: the teacher, fitted on all rows.
        student_: the trained module, in eval mode. To ship it, save this; a pickle of the classifier holds the teacher.
        agreement_: share of the labelled rows of ``fit`` for which the student has the class that the teacher's targets
            have: out of fold, since ``teacher_`` itself has seen these rows and their labels.
        compression_: bytes of the pickled teacher / bytes of the student's parameters and buffers.
        history_: what :meth:`pydistill.Trainer.fit` returned, a record per epoch.
        n_features_in_, feature_names_in_: as everywhere in scikit-learn.

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

        What ships is ``student_``, a plain module; unless ``student=`` was given it is ``Sequential(Linear, ReLU, ...,
        Linear)``, with a ReLU after each hidden layer. A file holds its weights, and ``metadata`` what it takes to make
        the module again and to read its outputs. The scaler is not part of it: keep it yourself.

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

    def __init__(
        self,
        teacher,
        *,
        hidden_layer_sizes=(32,),
        student=None,
        temperature=2.0,
        alpha=0.7,
        epochs=40,
        batch_size=64,
        learning_rate=1e-2,
        cv=5,
        memory=None,
        random_state=None,
    ):
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

    def fit(self, X, y, sample_weight=None, X_unlabeled=None):
        """Fit the teacher, then the student.

        Args:
            X: ``(N, n_features)``, array, list or DataFrame of numbers, all of them finite.
            y: ``(N,)``, integers, strings or booleans.
            sample_weight: ``(N,)``, finite and >= 0. The weights are on both terms of the student's loss. The teacher's
                ``fit`` gets them if it takes weights: every step of a Pipeline that does; with metadata routing
                enabled, what requests them. If it does not, a warning says so, and the teacher is fitted on the rows of
                positive weight without weights. Rows of weight 0 are removed before anything else: they may hold any
                values and labels, and are in no fold (row numbers in ``cv`` are still those of all rows). Integer
                weights are equivalent to repeated rows, up to rounding, if they are so for the teacher and
                ``batch_size`` is at least the number of rows. In smaller batches they are so on average only: a row of
                weight 2 is drawn once per epoch, and counts twice.
            X_unlabeled: ``(M, n_features)``, more rows, of which the student learns what the fitted teacher says; each
                weighs 1. In a Pipeline they pass the steps before only with ``transform_input=["X_unlabeled"]``.

        Returns:
            DistilledClassifier: itself.

        Raises:
            ValueError, TypeError: rows, labels, weights or an option that cannot be used; a teacher whose classes are
                not those of y; a loss that ceased to be finite. Options are checked before the teacher is fitted.
        """
        fitted = copy(self)  # a fit that fails leaves this one as it was, its number of features too
        fitted._fit(X, y, sample_weight, X_unlabeled)
        self.__dict__ = fitted.__dict__
        return self

    def _fit(self, X, y, sample_weight, X_unlabeled):
        X, y, weight, counts = _rows_that_count(X, y, sample_weight)
        features, y = validate_data(self, X, y, dtype=_FLOATS)
        check_classification_targets(y)
        classes, codes = np.unique(y, return_inverse=True)
        if len(classes) < 2:
            where = "" if counts is None else " in rows whose sample_weight is not 0"
            raise ValueError(f"y must hold at least two classes{where}, got {len(classes)} class")
        unlabeled = None if X_unlabeled is None else self._check_unlabeled(X_unlabeled)
        cv = self.cv if counts is None else counted_folds(self.cv, counts)

        epochs, batch_size = _count("epochs", self.epochs), _count("batch_size", self.batch_size)
        self._check_teacher()
        rng = check_random_state(self.random_state)
        student, trainer = self._make_trainer(features, len(classes), rng)
        inputs = _inputs(student, features)
        students_weight = None if weight is None else _in_precision(weight, inputs.dtype)
        row_count = len(inputs) + (0 if unlabeled is None else len(unlabeled))
        if (row_count - 1) % batch_size == 0:  # the trainer would find it, when the teacher has been fitted
            check_lone_row(student, inputs[:1], row_count, batch_size)

        rows = _as_teacher_takes_them(X, features)
        teacher, targets = self._teach(rows, y, classes, cv, weight, rng)
        data = (inputs, targets, torch.from_numpy(codes))
        if unlabeled is not None:
            more = teacher_outputs(teacher, _as_teacher_takes_them(X_unlabeled, unlabeled))
            data = _append(data, _inputs(student, unlabeled), more)
        if weight is not None:
            ones = students_weight.new_ones(len(data[0]) - len(weight))
            data = (*data, torch.cat([students_weight, ones]))
        try:
            history = trainer.fit(data, epochs=epochs, batch_size=batch_size)
        except ValueError as error:
            error.add_note(f"Where the loss ceased to be finite: {self._hint()}")
            raise

        if self.student is None:
            student.float()
        logits = _logits(student.eval(), _inputs(student, features))
        if not logits.isfinite().all():
            raise ValueError(f"student must give finite logits for X, and does not in {logits.dtype}: {self._hint()}")
        self.classes_, self.teacher_, self.student_, self.history_ = classes, teacher, student, history
        agrees = logits.argmax(-1) == targets.logits.argmax(-1)
        self.agreement_ = float(agrees.double().mean())

    def _hint(self) -> str:
        return f"scale the features (StandardScaler), or lower learning_rate, which is {self.learning_rate}"

    def predict(self, X):
        """The student's classes ``(N,)``."""
        probs = self.predict_proba(X)  # first: it says so if this was never fitted
        return self.classes_[probs.argmax(1)]

    def predict_proba(self, X):
        """The student's probabilities ``(N, n_classes)`` at T = 1, float32; columns in the order of ``classes_``.

        float64 for a float64 student.
        """
        check_is_fitted(self)
        X = validate_data(self, X, reset=False, dtype=_FLOATS)
        logits = _logits(self.student_, _inputs(self.student_, X))
        return logits.softmax(-1, dtype=_precision(logits.dtype)).numpy()

    @property
    def compression_(self):
        """Bytes of the pickled teacher / bytes of the student's parameters and buffers."""
        check_is_fitted(self)
        return len(pickle.dumps(self.teacher_)) / sum(x.nbytes for x in self.student_.state_dict().values())

    def _check_unlabeled(self, X_unlabeled):
        rows = check_array(X_unlabeled, dtype=_FLOATS, input_name="X_unlabeled", ensure_min_samples=0)
        if len(rows) == 0:
            raise ValueError("X_unlabeled must hold at least one row, got none; without such rows it is None")
        if rows.shape[1] != self.n_features_in_:
            raise ValueError(f"X_unlabeled must have the {self.n_features_in_} features of X, got {rows.shape[1]}")
        validate_data(self, X_unlabeled, reset=False, skip_check_array=True)  # the names of a DataFrame's columns
        return rows

    def _check_teacher(self):
        if isinstance(self.teacher, nn.Module | FrozenEstimator):
            return
        check_classifier("teacher", self.teacher)
        frozen = frozen_part(self.teacher)
        if frozen:
            raise ValueError(
                f"teacher cannot be refitted for out-of-fold targets: {frozen}. If it was fitted on other rows than "
                "these, freeze it as a whole, a Pipeline too: FrozenEstimator(teacher)"
            )

    def _make_trainer(self, features, n_classes, rng):
        """Student and trainer. Made before the teacher is fitted, which may take long, to find errors first."""
        loss = DistillationLoss(temperature=self.temperature, alpha=self.alpha, unlabeled="distill")
        weights_seed, seed = (int(x) for x in rng.randint(2**31 - 1, size=2))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(weights_seed)
            student = self._make_student(features.shape[1], n_classes)
            inputs = _inputs(student, features[:2])
            outputs = _logits(student.eval(), inputs)  # lazy layers get their parameters here
        if outputs.shape != (len(inputs), n_classes):
            raise ValueError(
                f"student must map (rows, {inputs.shape[1]}) to logits (rows, {n_classes}), one for each class; it "
                f"maps {tuple(inputs.shape)} to {tuple(outputs.shape)}"
            )
        optimizer = torch.optim.Adam(student.parameters(), lr=self.learning_rate, fused=True)
        return student, Trainer(student, loss, optimizer=optimizer, seed=seed, progress=False)

    def _make_student(self, n_features, n_classes) -> nn.Module:
        if isinstance(self.student, nn.Module):
            return deepcopy(self.student)
        if self.student is None:
            return _mlp(n_features, self.hidden_layer_sizes, n_classes).double()
        if not callable(self.student):
            raise TypeError(
                "student must be a torch module or a function of (n_features, n_classes) that makes one, got "
                f"{type(self.student).__name__}"
            )
        try:
            inspect.signature(self.student).bind(n_features, n_classes)
        except TypeError as error:
            name = getattr(self.student, "__name__", type(self.student).__name__)
            raise TypeError(
                "student must be a torch module, such as MyNet(), or a function of (n_features, n_classes) that makes "
                f"one; {name} does not take these two: {error}"
            ) from error
        student = self.student(n_features, n_classes)
        if not isinstance(student, nn.Module):
            raise TypeError(f"student(n_features, n_classes) must give a torch module, got {type(student).__name__}")
        return student

    def _teach(self, rows, y, classes, cv, weight, rng):
        """The fitted teacher, and its targets for the rows."""
        if isinstance(self.teacher, nn.Module | FrozenEstimator):
            teacher = self.teacher if isinstance(self.teacher, nn.Module) else self.teacher.estimator
            targets = teacher_outputs(teacher, rows)
            _check_prefit(teacher, targets, y, classes)
            return teacher, targets
        teacher = _seed(clone(self.teacher), rng)
        weight = usable_weight("teacher", teacher, weight, stacklevel=4)
        return check_memory(self.memory).cache(_fit_teacher)(teacher, rows, y, cv, weight)


def _fit_teacher(teacher, rows, y, cv, weight):
    targets = soft_targets(teacher, rows, y, cv=cv, sample_weight=weight)
    return fit_weighted(for_labels(teacher, np.unique(y)), rows, y, weight), targets


def _seed(teacher, rng):
    """Numbers for whatever in the teacher has no random_state of its own."""
    names = (name for name in teacher.get_params() if name == "random_state" or name.endswith("__random_state"))
    unset = sorted(name for name in names if teacher.get_params()[name] is None)
    return teacher.set_params(**{name: int(rng.randint(2**31 - 1)) for name in unset})


def _mlp(n_features, hidden, n_classes) -> nn.Module:
    hidden = tuple(hidden) if np.iterable(hidden) else (hidden,)
    if not all(isinstance(width, Integral) and width > 0 for width in hidden):
        raise ValueError(f"hidden_layer_sizes must be whole numbers of at least 1, got {hidden}")
    layers, width = [], n_features
    for size in hidden:
        layers += [nn.Linear(width, int(size)), nn.ReLU()]
        width = int(size)
    return nn.Sequential(*layers, nn.Linear(width, n_classes))


def _inputs(student, features) -> torch.Tensor:
    """The features in the student's own precision."""
    return torch.tensor(features, dtype=float_dtype(student, torch.float32))


def _precision(dtype):
    """That of the loss: float32, or float64 for a float64 student."""
    return torch.promote_types(dtype, torch.float32)


def _in_precision(weight, dtype) -> torch.Tensor:
    """The weights as the student's loss takes them; none may turn into 0 or infinity."""
    limits = torch.finfo(_precision(dtype))
    bad = (weight < limits.tiny) | (weight > limits.max)
    if bad.any():
        raise ValueError(
            f"sample_weight must be 0 or from {limits.tiny:.0e} to {limits.max:.0e}, as {limits.dtype} is, got "
            f"{weight[bad.argmax()]}; multiply all of them with one number"
        )
    return torch.from_numpy(weight).to(_precision(dtype))


@torch.no_grad()
def _logits(student, inputs):
    return torch.cat([student(part) for part in inputs.split(_PREDICT_ROWS)])


def _append(data, inputs, targets):
    """More rows, without labels."""
    columns, soft, labels = data
    none = torch.full((len(inputs),), _UNLABELED)
    soft = SoftTargets.from_log_probs(torch.cat([soft.logits, targets.logits]))
    return torch.cat([columns, inputs]), soft, torch.cat([labels, none])


def _as_teacher_takes_them(X, features):
    """A DataFrame as it is, since a teacher may choose columns by their names; else the validated array."""
    return X if hasattr(X, "columns") else features


def _rows_that_count(X, y, sample_weight):
    """X, y and weights less the rows of weight 0, and which rows those are: None where all count."""
    if sample_weight is None:
        return X, y, None, None
    weight = _check_sample_weight(sample_weight, X, ensure_non_negative=True)
    counts = weight > 0
    if y is None or counts.all():
        return X, y, weight, None
    check_consistent_length(X, y)
    rows = np.flatnonzero(counts)
    X = X.tocsr() if hasattr(X, "tocsr") else X
    return _safe_indexing(X, rows), _safe_indexing(y, rows), weight[rows], counts


def _check_prefit(teacher, targets, y, classes):
    if isinstance(teacher, nn.Module):
        if targets.shape[1:] != (len(classes),):
            raise ValueError(
                f"teacher must have one output for each of the {len(classes)} classes of y, got outputs of shape "
                f"{tuple(targets.shape)}"
            )
    elif not np.array_equal(teacher.classes_, classes):
        raise other_classes("teacher", teacher.classes_, classes)
    right = np.mean(classes[targets.logits.argmax(-1)] == y)
    constant = np.unique(y, return_counts=True)[1].max() / len(y)
    if right <= constant:
        warnings.warn(
            f"teacher is right for {right:.3f} of the rows, always answering the most frequent class for "
            f"{constant:.3f}: X may not have the form (scale, order of columns) of the rows that it was fitted on, or "
            "its outputs may not be in the order of the classes",
            UserWarning,
            stacklevel=5,
        )


def _count(name, value) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):  # a search gives numpy's integers
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return int(value)
