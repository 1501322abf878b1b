"""The smallest call that still fails: fewer options, rows and classes, simpler numbers."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from .case import DEFAULTS, Case, Placed

_LARGEST_BY_ELEMENT = 80  # elements of a tensor that are simplified one by one


def shrink(case: Case, fails: Callable[[Case], bool], seconds: float = 20.0) -> Case:
    """A case for which ``fails`` still holds, as small as the time allows."""
    deadline = time.monotonic() + seconds
    progress = True
    while progress:
        progress = False
        for step in (_plainer, _fewer_rows, _fewer_classes, _simpler_options, _simpler_numbers):
            smaller = _repeat(case, step, fails, deadline)
            progress |= smaller is not case
            case = smaller
            if time.monotonic() > deadline:
                return case
    return case


def _repeat(case, step, fails, deadline):
    """Take a step as often as it helps."""
    smaller = case
    while smaller is not None:
        case = smaller
        smaller = next((c for c in _valid(step(case)) if not _same(c, case) and _still(c, fails, deadline)), None)
    return case


def _valid(candidates):
    """Those before a change that this case does not allow."""
    try:
        yield from candidates
    except Exception:
        return


def _still(candidate, fails, deadline):
    try:
        return time.monotonic() < deadline and fails(candidate)
    except Exception:  # the change made no valid call
        return False


def _same(a, b):
    def equal(x, y):
        if isinstance(x, Tensor) and isinstance(y, Tensor):
            return x.dtype == y.dtype and x.shape == y.shape and torch.equal(x.nan_to_num(12.5), y.nan_to_num(12.5))
        if isinstance(x, Tensor) or isinstance(y, Tensor):
            return False
        if isinstance(x, dict) and isinstance(y, dict):
            return x.keys() == y.keys() and all(equal(x[k], y[k]) for k in x)
        if hasattr(x, "__dict__") and type(x) is type(y):
            return equal(vars(x), vars(y))
        return type(x) is type(y) and x == y

    return equal(a, b)


# --- Options --------------------------------------------------------------------------------------------------


def _plainer(case) -> Iterator[Case]:
    plain = {"DistillationLoss": "distillation_loss", "LinearDistillationLoss": "linear_distillation_loss"}
    if case.function in plain:
        yield replace(case, function=plain[case.function])
    if len(case.rows) != 1:
        yield _flat(case)
    if case.path != "engine":
        yield replace(case, path="engine")
    if not case.leaf:
        yield replace(case, leaf=True)
    if isinstance(case.grad_output, Tensor) or case.grad_output != 1:
        yield replace(case, grad_output=1.0)
    for name in ("sample_weight", "class_weight", "labels"):
        if getattr(case, name) is not None:
            yield replace(case, **{name: None})
    if case.head is not None and case.head.bias is not None:
        yield replace(case, head=replace(case.head, bias=None))
    one_term = case.function == "loss_items" or case.option("alpha") in (0, 1)
    for name in case.options:
        if name != "alpha" or not one_term:
            yield case.with_options(**{name: None})
    for alpha in (1.0, 0.0):  # one term is simpler than two
        if not one_term:
            changed = case.with_options(alpha=alpha)
            yield replace(changed, teacher=None) if alpha == 0 else replace(changed, labels=None)
            yield changed
    if case.option("alpha") == 0 and case.teacher is not None:
        yield replace(case, teacher=None)
    if case.teacher is not None and case.teacher.form not in ("logits", "LinearTeacher", "from_topk"):
        yield replace(case, teacher=type(case.teacher)("logits", case.teacher.values))
    for name, placed in case.placed():
        if placed.layout != "as it is":
            yield _with(case, name, Placed(placed.values))


def _flat(case):
    grad_output = case.grad_output
    if isinstance(grad_output, Tensor):
        grad_output = grad_output.reshape(-1)
    case = replace(case, grad_output=grad_output)
    for name, placed in case.placed():
        if name in ("labels", "sample_weight"):
            case = _with(case, name, Placed(placed.values.reshape(-1)))
        elif name not in ("class_weight", "weight", "bias", "teacher_weight", "teacher_bias"):
            case = _with(case, name, Placed(placed.values.reshape(-1, placed.values.shape[-1])))
    if case.teacher is not None:
        partitions = {t: x.reshape(-1) for t, x in case.teacher.partitions.items()}
        case = replace(case, teacher=replace(case.teacher, partitions=partitions))
    return case


def _with(case, name, placed):
    """The case with another tensor."""
    if not placed.fits():
        placed = Placed(placed.values)
    if name in ("hidden", "weight", "bias"):
        return replace(case, head=replace(case.head, **{name: placed}))
    of_teacher = {"teacher": "values", "indices": "indices", "teacher_weight": "weight", "teacher_bias": "bias"}
    if name in of_teacher:
        return replace(case, teacher=replace(case.teacher, **{of_teacher[name]: placed}))
    return replace(case, **{name: placed})


# --- Rows and classes -----------------------------------------------------------------------------------------


def _parts(n):
    """Subsets of n to keep: halves, quarters, all but one."""
    whole = list(range(n))
    size = n // 2
    while size >= 1:
        for start in range(0, n, size):
            if size < n:
                yield whole[start : start + size]
        if n > 64 and size < n // 16:
            break
        size //= 2
    if n <= 64:
        for i in whole:
            yield whole[:i] + whole[i + 1 :]
    elif n > 2:
        for size in (16, 4, 1):
            yield whole[:-size]


def _fewer_rows(case):
    if len(case.rows) != 1:
        return
    for keep in _parts(case.rows[0]):
        if keep:
            yield _rows(case, keep)


def _rows(case, keep):
    if isinstance(case.grad_output, Tensor):
        case = replace(case, grad_output=case.grad_output[keep])
    for name, placed in case.placed():
        if name not in ("class_weight", "weight", "bias", "teacher_weight", "teacher_bias"):
            case = _with(case, name, replace(placed, values=placed.values[keep]))
    if case.teacher is not None:
        partitions = {t: x[keep] for t, x in case.teacher.partitions.items()}
        case = replace(case, teacher=replace(case.teacher, partitions=partitions))
    return case


def _fewer_classes(case):
    if case.function == "loss_items" or len(case.rows) != 1:
        return
    for keep in _parts(case.classes):
        if keep:
            yield _classes(case, keep)
    if case.head is not None:
        size = case.head.hidden.values.shape[-1]
        for keep in _parts(size):
            changed = case
            for name in ("hidden", "weight"):
                placed = getattr(case.head, name)
                changed = _with(changed, name, replace(placed, values=placed.values[..., keep].contiguous()))
            if keep:
                yield changed


def _classes(case, keep):
    place = {c: i for i, c in enumerate(keep)}
    teacher = case.teacher
    for name, placed in case.placed():
        x = placed.values
        if name in ("student", "class_weight") or (
            name == "teacher" and teacher.form not in ("from_topk", "LinearTeacher")
        ):
            x = x[..., keep].contiguous()
        elif name in ("weight", "bias", "teacher_weight", "teacher_bias"):
            x = x[keep]
        elif name == "labels":
            ignore = case.option("ignore_index")
            moved = [y if y == ignore else place.get(y, 0) for y in x.tolist()]
            x = torch.tensor(moved, dtype=x.dtype)
        elif name == "indices":
            x = torch.tensor([[place[c] for c in row] for row in x.tolist()], dtype=x.dtype)
        case = _with(case, name, replace(placed, values=x))
    if teacher is not None and teacher.form == "from_topk":
        case = replace(case, teacher=replace(case.teacher, num_classes=len(keep)))
    if teacher is not None and teacher.form == "top_k":
        case = replace(case, teacher=replace(case.teacher, k=min(teacher.k, len(keep))))
    return case


# --- Numbers --------------------------------------------------------------------------------------------------


def _simpler_options(case):
    for name, simple in (
        ("temperature", (1.0, 2.0, 4.0, 0.5, 10.0, 100.0, 0.1)),
        ("alpha", (0.5,)),
        ("beta", (0.5, 0.1, 1e-3, 1e-6, 1e-9, 1e-12)),
        ("label_smoothing", (0.5, 0.1)),
        ("num_items", (1, 2)),
        ("chunk_rows", (1,)),
    ):
        value = case.options.get(name)
        if isinstance(value, Tensor):
            yield case.with_options(**{name: value.item()})
        if value is None or (name == "alpha" and case.option("alpha") in (0, 1)):
            continue
        for number in simple:
            if not isinstance(value, tuple | Tensor) and value not in simple and value != DEFAULTS.get(name):
                yield case.with_options(**{name: number})
        if isinstance(value, float) and value and math.isfinite(value):
            for digits in (1, 2):
                rounded = float(f"{value:.{digits}g}")
                if rounded != value:
                    yield case.with_options(**{name: rounded})


def _simpler_numbers(case):
    for name, placed in case.placed():
        x = placed.values
        if not x.is_floating_point():
            continue
        finite = x.isfinite()
        for digits in (0, 1, 2):
            yield _with(case, name, replace(placed, values=torch.where(finite, _rounded(x, digits), x)))
        if x.numel() > _LARGEST_BY_ELEMENT:
            continue
        flat = x.reshape(-1)
        for i, value in enumerate(flat.tolist()):
            if not math.isfinite(value):
                simple = ()
            else:
                simple = (0.0, 1.0, -1.0, float(round(value)), *(float(f"{value:.{d}g}") for d in (1, 2, 3)))
            for number in simple:
                if number == value:
                    break
                changed = flat.clone()
                changed[i] = number
                yield _with(case, name, replace(placed, values=changed.reshape(x.shape)))


def _rounded(x, digits):
    return (x.double() * 10**digits).round().div(10**digits).to(x.dtype)
