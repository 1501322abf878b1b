"""Logits of student and teacher in long double, from whatever form they are given in."""

from dataclasses import dataclass

import numpy as np
import torch

from .divergences import INF, Real

# Relative error of one rounding.
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24, torch.float64: 2.0**-53}
_DIGITS = 2.0**6  # numbers that are whole multiples of 1 / _DIGITS have exact products


@dataclass
class Logits:
    """Rows of logits, and how far the package's own may be from them.

    values: (N, C); of a teacher with a bucket (N, k), with their classes ``indices`` and the log-partitions
    ``partition``, (N,), whose rounding is ``partition_rounding``. disturbance: (N,). best: the first class with the
    largest logit, -1 for a row with NaN; ``clear`` says whether that is beyond doubt. slopes: of a head, the
    derivative of the logits with respect to the product.
    """

    values: np.ndarray
    disturbance: np.ndarray
    best: np.ndarray
    clear: np.ndarray
    slopes: np.ndarray | None = None
    indices: np.ndarray | None = None
    partition: np.ndarray | None = None
    partition_rounding: np.ndarray | None = None


def real(tensor) -> np.ndarray:
    """A tensor's values as long double, exactly."""
    return tensor.detach().double().numpy().astype(Real)


def rows_of(tensor):
    return tensor.reshape(-1, tensor.shape[-1])


def student_logits(case) -> Logits:
    if case.student is not None:
        return _given(rows_of(real(case.student.values)))
    head = case.head
    bias = None if head.bias is None else head.bias.values
    return _of_head(head.hidden.values, head.weight.values, bias, case.option("softcap"), case.option("logit_scale"))


def teacher_logits(case, dtype) -> Logits:
    """Converted to ``dtype`` at the load."""
    teacher = case.teacher
    if teacher.form == "LinearTeacher":
        bias = None if teacher.bias is None else teacher.bias.values
        head = teacher.values.values, teacher.weight.values, bias
        made = _of_head(*head, teacher.softcap, teacher.logit_scale)
        if teacher.weight.values.dtype == torch.float64 != dtype:  # the product is converted too
            made.disturbance = made.disturbance + ROUNDING[dtype] * np.abs(made.values).max(-1)
            made.clear[:] = False
        return made
    targets = teacher.make([])
    given = targets if teacher.form == "logits" else targets.logits
    original, converted = rows_of(real(given)), rows_of(real(given.to(dtype)))
    indices = None if teacher.form not in ("from_topk", "top_k") else rows_of(targets.indices).numpy()
    made = _given(converted)
    best = [made.best, *(_first_maximum(x)[0] for x in (original, _flushed(converted, dtype, given.dtype)))]
    if indices is not None:
        best = [np.where(b < 0, -1, np.take_along_axis(indices, np.maximum(b, 0)[:, None], -1)[:, 0]) for b in best]
    made.best = best[0]
    made.clear &= (best[1] == made.best) & (best[2] == made.best) & _first_maximum(original)[1]
    if indices is None:
        return made
    if targets.tail == "renormalize" or indices.shape[1] == case.classes:
        dense = np.full((len(indices), case.classes), -INF)
        np.put_along_axis(dense, indices, converted, -1)
        made.values = dense
        return made
    temperature = case.option("temperature")
    made.indices, made.partition = indices, real(targets.log_partitions[temperature]).reshape(-1)
    size = np.where(np.isfinite(converted), np.abs(converted), 0).max(-1) / temperature
    made.partition_rounding = 8 * ROUNDING[torch.float64] * (1 + size + np.abs(made.partition))
    if given.dtype != dtype:
        made.partition_rounding = made.partition_rounding + ROUNDING[dtype] * size
    return made


def _flushed(converted, dtype, given):
    """A conversion between dtypes may make a denormal 0, and so two classes equal."""
    return converted if dtype == given else np.where(np.abs(converted) < np.finfo(np.float32).tiny, 0, converted)


def _given(values):
    return Logits(values, np.zeros(len(values), Real), *_first_maximum(values))


def _of_head(hidden, weight, bias, softcap, scale):
    """Products in the dtype of the weight; of numbers with few digits they are exact."""
    h, w = rows_of(real(hidden)), real(weight)
    b = np.zeros(len(w), Real) if bias is None else real(bias)
    half = weight.dtype in (torch.bfloat16, torch.float16)
    single = ROUNDING[torch.float32 if half else weight.dtype]
    product, size = h @ w.T + b, np.abs(h) @ np.abs(w).T + np.abs(b)
    rounded = single * (h.shape[1] + 1) * size
    whole = all((x * _DIGITS == np.round(x * _DIGITS)).all() for x in (h, w, b))
    if whole and (size * _DIGITS**2 < 2.0**24).all():
        rounded = rounded * 0
    if half:  # where the CPU multiplies in these, what comes out is rounded to them
        exact = real(torch.from_numpy(product.astype(np.float64)).to(weight.dtype)) == product
        rounded = np.where(exact, rounded, rounded + 2 * ROUNDING[weight.dtype] * size)
    values = scale * product
    rounded = scale * rounded + (0 if scale == 1 else single * np.abs(values))
    slopes = np.full_like(values, scale)
    if softcap is not None:
        ratio = np.tanh(values / softcap)
        values, slopes = softcap * ratio, slopes * (1 - ratio**2)
        rounded = rounded + 4 * single * softcap
    if half and (scale != 1 or softcap is not None):
        rounded = rounded + 4 * ROUNDING[weight.dtype] * np.abs(values)
    disturbance = np.where(np.isfinite(rounded), rounded, 0).max(-1)
    best, clear = _first_maximum(values)
    return Logits(values, disturbance, best, clear & (disturbance == 0), slopes)


def _first_maximum(values):
    """``(index, whether it is beyond doubt)``; -1 for a row with NaN, which agrees with nothing.

    Of rows with +inf, or of -inf only, the contract does not say which class they mean.
    """
    nan = np.isnan(values).any(-1)
    best = np.where(nan, -1, np.where(np.isnan(values), -INF, values).argmax(-1))
    return best, nan | np.isfinite(values.max(-1))


def wrong_targets(teacher) -> str | None:
    """A message if the SoftTargets differ from the teacher that they were made of, else None."""
    if teacher.form in ("logits", "LinearTeacher"):
        return None
    targets, given = teacher.make([]), teacher.values.values
    if teacher.form in ("from_logits", "from_log_probs"):
        return None if _equal(targets.logits, given) else f"{teacher.form} changed the logits"
    if teacher.form == "from_probs":
        with np.errstate(divide="ignore"):
            exact = np.log(real(given))
        dtype = torch.float64 if given.dtype == torch.float64 else torch.float32
        bound = 4 * ROUNDING[dtype] * (np.abs(exact) + torch.finfo(dtype).tiny)
        right = (real(targets.logits) == exact) | (np.abs(real(targets.logits) - exact) <= bound)
        return None if right.all() else "from_probs: the logits are not the logarithms"
    if teacher.form == "from_topk":
        order = teacher.indices.values.long().argsort(-1)
        same = _equal(targets.indices, teacher.indices.values.long().gather(-1, order))
        return None if same and _equal(targets.logits, given.gather(-1, order)) else "from_topk changed a class's logit"
    return _wrong_top_k(teacher, targets, given)


def _wrong_top_k(teacher, targets, given):
    largest = given.nan_to_num(np.nan, None, None).topk(teacher.k).values.sort(-1).values
    if not _equal(targets.logits, given.gather(-1, targets.indices)):
        return "top_k: the logits are not those of the indices"
    if not given.isnan().any() and not _equal(targets.logits.sort(-1).values, largest):
        return f"top_k: the logits are not the {teacher.k} largest"
    if bool((targets.indices.diff(dim=-1) <= 0).any()):
        return "top_k: a class is there twice"
    for temperature, partition in targets.log_partitions.items():
        with np.errstate(all="ignore"):
            scaled = real(given) / temperature
            top = scaled.max(-1, keepdims=True)
            exact = np.log(np.exp(scaled - top).sum(-1)) + top[..., 0]
        # The logarithm of the sum and its addition to the maximum are rounded at the size of what comes out.
        bound = 8 * ROUNDING[torch.float64] * (1 + np.abs(top[..., 0]) + np.abs(exact))
        if not (~np.isfinite(exact) | (np.abs(real(partition) - exact) <= bound)).all():
            return f"top_k: the log-partition at temperature {temperature:g} is {partition}, expected {exact}"
    return None


def _equal(a, b):
    return a.dtype == b.dtype and torch.equal(a.nan_to_num(12.5), b.nan_to_num(12.5))
