"""Compare a result with the contract."""

import itertools
from dataclasses import dataclass, replace

import numpy as np
import torch

from . import expectation
from .case import Case
from .divergences import Real
from .expectation import Expectation
from .logits import real, wrong_targets
from .running import Result, run


@dataclass
class Finding:
    """kind: which rule was broken, in a word or two, the same for every form of one mistake."""

    kind: str
    text: str


def judge(case: Case, result: Result, wanted=None) -> Finding | None:
    """The first rule of the contract that the result breaks; ``wanted``: Readings, if they were computed before."""
    if result.error is not None:
        return Finding(f"error {type(result.error).__name__}", f"{type(result.error).__name__}: {result.error}")
    if result.written:
        return Finding("written", f"the call wrote to {', '.join(result.written)}")
    if case.function == "loss_items":
        return _items(case, result)
    finding = _form(case, result)
    if finding is not None:
        return finding
    if case.teacher is not None and (text := wrong_targets(case.teacher)) is not None:
        return Finding("targets", text)
    return _under_some_reading(case, result, wanted or Readings(case))


class Readings:
    """The readings of a case, computed on first use and kept for the next backend."""

    def __init__(self, case):
        self._made, self._others = [], expectation.readings(case)

    def __iter__(self):
        yield from self._made
        for want in self._others:
            self._made.append(want)
            yield want


def _under_some_reading(case, result, wanted):
    """All rules under one reading; of a second-order gradient, which the formula makes, under another.

    Or every row under its own: a probability may underflow in one row and not in the next, since exponentials are
    taken against the maximum so far, which in one row comes early and in the next late.
    """
    groups = [(_loss, _zero, _gradients, _metrics)]
    if case.path == "create_graph":
        groups = [(_loss, _zero, _metrics), (_gradients,)]
    for rules in groups:
        first = None
        for want in itertools.chain(wanted, _row_by_row(case, result, wanted, rules)):
            finding = _first(rules, case, result, want)
            first = first or finding
            if finding is None:
                break
        else:
            return first
    return None


def _first(rules, case, result, want):
    with np.errstate(all="ignore"):
        return next((f for f in (rule(case, result, want) for rule in rules) if f is not None), None)


def _row_by_row(case, result, wanted, rules):
    """Every reading with each row that does not fit it taken from the first reading that the row fits.

    Only what belongs to one row: not a reduced loss, not the gradient of a weight.
    """
    wanted = list(wanted)
    with np.errstate(all="ignore"):
        fits = np.array([_rows_that_fit(case, result, want, rules) for want in wanted])
    chosen = fits.argmax(0)
    for base, fitting in zip(wanted, fits, strict=True):
        rows = np.where(fitting, -1, chosen)
        mixed = base
        if case.option("reduction") == "none":
            mixed = _mixed(rows, base, wanted, ("loss", "loss_bound", "soft", "soft_bound"))
        for leaf in {"student", "hidden"} & set(base.gradients):
            of_leaf = [want.gradients[leaf] for want in wanted]
            gradient = _mixed(rows, base.gradients[leaf], of_leaf, ("values", "bound", "nan", "unchecked"))
            mixed = replace(mixed, gradients=mixed.gradients | {leaf: gradient})
        yield mixed


def _mixed(rows, base, others, names):
    """``base`` with the rows of the named arrays taken from the one of ``others`` that ``rows`` says, if any."""
    arrays = {name: getattr(base, name).copy() for name in names}
    for number, other in enumerate(others):
        for name, values in arrays.items():
            values[rows == number] = getattr(other, name)[rows == number]
    return replace(base, **arrays)


def _rows_that_fit(case, result, want, rules):
    fits = np.ones(case.rows.numel(), bool)
    if _loss in rules and case.option("reduction") == "none" and not want.open:
        fits &= close(real(result.loss).reshape(-1), want.loss, want.loss_bound, result.loss.dtype)
    if _gradients in rules:
        for leaf in {"student", "hidden"} & set(want.gradients):
            expected = want.gradients[leaf]
            got = real(result.gradients[leaf]).reshape(expected.values.shape)
            fits &= ~np.logical_or.reduce(_wrong_rows(got, expected, case.dtype)[:3])
    return fits


def check(case: Case, backend: str, isa: str | None, wanted=None) -> Finding | None:
    """Run and judge; on one thread and, where rows may be shared out, on two: the same to the bit."""
    result = run(case, backend, isa)
    finding = judge(case, result, wanted)
    if finding is None and case.student is not None and case.rows.numel() * case.classes >= 2 * 32768:
        other = run(case, backend, isa, threads=2)
        if other.error is not None or not result.same_bits(other):
            return Finding("threads", f"one thread gives {result.loss}, two give {other.loss} ({other.error})")
    return finding


def _items(case, result):
    want = expectation.loss_items(case)
    for name, got, exact in zip(("soft", "hard"), result.loss, want, strict=True):
        if not abs(Real(got) - exact) <= 1e-14 * exact:
            return Finding("items", f"{name} denominator {got!r}, expected {float(exact)!r}")
    return None


def _form(case, result):
    dtype = torch.float64 if case.dtype == torch.float64 else torch.float32
    shape = case.rows if case.option("reduction") == "none" else torch.Size()
    if (result.loss.dtype, result.loss.shape) != (dtype, shape):
        return Finding("form", f"loss {result.loss.dtype} {tuple(result.loss.shape)}, expected {dtype} {tuple(shape)}")
    leaves = {"student": case.student} if case.student is not None else vars(case.head)
    for name, gradient in result.gradients.items():
        like = leaves[name].values
        if (gradient.dtype, gradient.shape) != (like.dtype, like.shape):
            return Finding("form", f"gradient of {name}: {gradient.dtype} {tuple(gradient.shape)}")
    return None


def close(got, want, bound, dtype):
    """Whether each number is within its bound; NaN for NaN, and inf where the dtype ends."""
    largest = Real(torch.finfo(dtype).max)
    near_the_end = np.abs(want) > largest * (1 - 2 * Real(torch.finfo(dtype).eps) - 4e-6)
    right = np.abs(got - want) <= bound
    right |= np.isnan(got) & np.isnan(want)
    beyond = np.isinf(got) | (np.abs(got) > largest * (1 - 4 * Real(torch.finfo(dtype).eps) - 8e-6))
    right |= near_the_end & beyond & (np.sign(got) == np.sign(want))
    return right | np.isinf(bound) | np.isnan(bound)


def _show(values):
    return np.array2string(np.asarray(values, np.float64), threshold=20, precision=9)


def _loss(case, result, want):
    if want.open:
        return None
    got = real(result.loss).reshape(-1)
    dtype = result.loss.dtype
    if close(got, want.loss, want.loss_bound, dtype).all():
        return None
    error = np.abs(got - want.loss)
    return Finding(
        "loss" if np.isfinite(error).all() else "loss's NaN or infinity",
        f"loss {_show(got)}, expected {_show(want.loss)}: error {_show(error)}, allowed {_show(want.loss_bound)}",
    )


def _zero(case, result, want):
    """The soft term of a student that equals its teacher to the bit is exactly 0."""
    if want.rows_of_zero is None or case.option("alpha") != 1 or not want.rows_of_zero.any():
        return None
    got = real(result.loss).reshape(-1)
    if case.option("reduction") == "none":
        wrong = want.rows_of_zero & (got != 0)
    else:
        wrong = want.rows_of_zero.all() & (got != 0)
    if not wrong.any():
        return None
    return Finding("not exactly 0", f"loss {_show(got)} of rows that equal their teacher to the bit")


def _gradients(case, result, want):
    for name, expected in want.gradients.items():
        got = real(result.gradients[name])
        finding = _gradient(name, got.reshape(expected.values.shape), expected, case.dtype)
        if finding is not None:
            return finding
    return None


def _gradient(name, got, want, dtype):
    not_nan, is_nan, wrong, size = _wrong_rows(got, want, dtype)
    if not_nan.any():
        row = int(not_nan.argmax())
        return Finding("gradient not NaN", f"gradient of {name}, row {row}: {_show(got[row])}, expected NaN throughout")
    if is_nan.any():
        row = int(is_nan.argmax())
        return Finding(
            "gradient NaN", f"gradient of {name}, row {row}: {_show(got[row])}, expected {_show(want.values[row])}"
        )
    if not wrong.any():
        return None
    row = int(wrong.argmax())
    return Finding(
        "gradient" if np.isfinite(size[row]) else "gradient's infinity",
        f"gradient of {name}, row {row}: {_show(got[row])}, expected {_show(want.values[row])}: norm of the error "
        f"{float(size[row]):.3g}, allowed {float(want.bound[row]):.3g}",
    )


def _wrong_rows(got, want, dtype):
    """Masks of rows that lack a NaN, that have one too many, that are beyond their bound; and the size of the error."""
    rows_nan = np.isnan(got)
    not_nan = want.nan & ~rows_nan.all(-1)
    checked = ~(want.nan | want.unchecked)
    is_nan = checked & rows_nan.any(-1) & ~np.isnan(want.values).any(-1)
    error = got - want.values
    largest = Real(torch.finfo(dtype).max)
    beyond = np.abs(want.values) > largest * (1 - 4 * Real(torch.finfo(dtype).eps))
    error = np.where(beyond & (np.abs(got) >= largest * 0.99), 0, error)
    size = expectation.norm(error)
    return not_nan, is_nan, checked & ~(size <= want.bound) & np.isfinite(want.bound), size


def _metrics(case, result, want: Expectation):
    metrics = result.metrics
    if metrics is None:
        return None
    dtype = result.loss.dtype
    for name, wanted, bound in (
        ("soft_loss", want.soft, want.soft_bound),
        ("hard_loss", want.hard, want.hard_bound),
    ):
        got = getattr(metrics, name)
        shape = result.loss.shape
        if got.shape != shape and not (got.dim() == 0 and np.isnan(wanted).all()):
            return Finding("metrics' form", f"{name} has shape {tuple(got.shape)}, loss {tuple(shape)}")
        if got.dtype != dtype or got.requires_grad:
            return Finding("metrics' form", f"{name} has dtype {got.dtype}, requires_grad {got.requires_grad}")
        got = real(got).reshape(-1)
        if not want.open and not close(got, wanted, bound, dtype).all():
            return Finding(name, f"{name} {_show(got)}, expected {_show(wanted)}, allowed {_show(bound)}")
    for name, (least, most) in (("agreement", want.agreement), ("accuracy", want.accuracy)):
        got = float(getattr(metrics, name))
        if not (np.isnan(got) and np.isnan(least)) and not least - 1e-6 <= got <= most + 1e-6:
            return Finding(
                name, f"{name} {got}, expected {float(least)}" + (f" to {float(most)}" if least < most else "")
            )
    rounding = 1e-14 if dtype == torch.float64 else 2e-7
    for name, got, exact in zip(("soft", "hard"), metrics.num_items, want.items, strict=True):
        if not close(real(got), exact, rounding * exact, dtype):
            return Finding("num_items", f"num_items says {float(got)} for the {name} term, expected {float(exact)}")
    return None
