"""A model under evaluation: its rows in the form that it takes, its outputs, its network."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from pydistill._torch_modules import as_input, float_dtype
from pydistill._wording import about, describe
from pydistill.teachers.estimators import is_a, split_steps, take_rows

Model: TypeAlias = Any  # a torch module or a fitted classifier, which needs no base class
Rows: TypeAlias = Any  # a tensor, an array or a DataFrame

ROWS_PER_CALL = 1024  # when all rows are predicted
ORDER = "the order is report(student, teacher, X, y)"


class Subject(NamedTuple):
    """A student or teacher, with everything that is needed to run it.

    Attributes:
        role: "student" or "teacher", for error messages.
        model: as it was passed to the report.
        rows: X in the form that ``call`` takes.
        call: maps some of the rows to outputs.
        kind: what the outputs are.
    """

    role: str
    model: Model
    rows: Rows
    call: Callable[[Rows], Any]
    kind: Literal["logits", "probs", "scores"]

    def outputs(self) -> Tensor:
        """Compute the outputs of all rows: ``(N, C)``, float64, with columns in the model's own order."""
        parts = []
        for start in range(0, len(self.rows), ROWS_PER_CALL):
            rows = take_rows(self.rows, slice(start, start + ROWS_PER_CALL))
            with about(self.role):
                part = self.call(rows)
            part = part if isinstance(part, Tensor | list) else torch.from_numpy(np.array(part))
            if isinstance(part, Tensor) and part.dim() == 1 and self.kind == "scores":  # two classes in one column
                part = torch.stack([torch.zeros_like(part), part], -1)
            good = isinstance(part, Tensor) and part.is_floating_point() and part.dim() == 2 and len(part) == len(rows)
            if not good:
                raise TypeError(
                    f"{self.role} must map {len(rows)} rows to ({len(rows)}, C) floating-point numbers, got "
                    f"{describe(part)}"
                )
            parts.append(part.double())
        outputs = torch.cat(parts)
        bad = outputs.isnan().any(-1)
        if bad.any():
            raise ValueError(f"{self.role} must not give NaN, got NaN for row {int(bad.nonzero()[0])}")
        return outputs


def check_models(student: Model, teacher: Model | None) -> None:
    """Check that student and teacher are modules or classifiers, and not, for instance, rows in their place."""
    _check_model("student", student, "a torch.nn.Module or a fitted classifier with predict_proba")
    if teacher is not None:
        kinds = "a torch.nn.Module, a fitted classifier with predict_proba or decision_function, or None"
        _check_model("teacher", teacher, kinds)


def _check_model(role: str, model: Model, kinds: str) -> None:
    if isinstance(model, type):
        raise TypeError(f"{role} must be {kinds}, got {describe(model)}: pass an instance")
    if not isinstance(model, nn.Module) and _output_method(model) is None:
        raise TypeError(f"{role} must be {kinds}, got {describe(model)}; {ORDER}, and only teacher may be None")


def subject_of(role: str, model: Model, X: Rows) -> Subject:
    """Return the subject for a model, with X converted to the form that the model takes."""
    method = None if isinstance(model, nn.Module) else _output_method(model)
    if method is None:
        return Subject(role, model, _for_module(X, model), model, "logits")
    kind: Literal["probs", "scores"] = "probs" if method == "predict_proba" else "scores"
    return Subject(role, model, _for_classifier(X, model), getattr(model, method), kind)


def teacher_behind_steps(student: Model, teacher: Model, X: Rows) -> Subject | None:
    """Return the teacher as a subject that gets X transformed by the Pipeline steps before the student.

    None if there are no such steps, or if ``teacher`` is neither the student's own ``teacher_`` nor a copy of it.
    """
    steps, inner = split_steps(student)
    own = getattr(inner, "teacher_", None)
    if not steps or own is None:
        return None

    def transformed(rows: Rows) -> Rows:
        for step in steps:
            rows = step.transform(rows)
        return rows

    rows = _for_classifier(X, student)
    with about("student"):
        some = transformed(take_rows(rows, slice(ROWS_PER_CALL)))
    subject = subject_of("teacher", teacher, some)
    if not _is_same_model(teacher, own, subject.rows):
        return None
    convert = _for_module if isinstance(teacher, nn.Module) else _for_classifier
    return subject._replace(rows=rows, call=lambda x: subject.call(convert(transformed(x), teacher)))


def network_of(model: Model) -> nn.Module | None:
    """Return the module itself, or the module in a DistilledClassifier or skorch net; None for other estimators."""
    model = split_steps(model)[1]
    candidates = model, getattr(model, "student_", None), getattr(model, "module_", None)
    return next((x for x in candidates if isinstance(x, nn.Module)), None)


def _output_method(model: Model) -> str | None:
    return next((name for name in ("predict_proba", "decision_function") if hasattr(model, name)), None)


def _is_same_model(model: Model, own: Model, rows: Rows) -> bool:
    """Return whether a model is ``own``, the student's own teacher, or a copy of it.

    A copy is a module with equal tensors, or a classifier with equal outputs for these rows.
    """
    model = model.estimator if is_a(model, "sklearn", "FrozenEstimator") else model
    if model is own:
        return True
    if type(model) is not type(own):
        return False
    if isinstance(model, nn.Module):
        theirs, ours = model.state_dict(), own.state_dict()
        return theirs.keys() == ours.keys() and all(torch.equal(theirs[name], ours[name]) for name in ours)
    method = _output_method(own)
    if method is None:
        return False
    try:
        return np.array_equal(getattr(model, method)(rows), getattr(own, method)(rows))
    except (AttributeError, ValueError):  # a classifier of other features, or one that was never fitted
        return False


def _for_module(X: Rows, module: nn.Module) -> Tensor:
    rows = as_input(X.detach() if isinstance(X, Tensor) else np.asarray(X), None)
    return as_input(rows, float_dtype(module, rows.dtype))


def _for_classifier(X: Rows, model: Model) -> Rows:
    if hasattr(X, "iloc"):
        return X
    if isinstance(X, Tensor):
        X = X.detach()
        X = (X.float() if X.dtype is torch.bfloat16 else X).numpy()  # numpy has no bfloat16
    takes_images = isinstance(getattr(split_steps(model)[1], "module_", None), nn.Module)
    return X if takes_images else X.reshape(len(X), -1)
