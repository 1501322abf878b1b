"""The row kernel: one read of a row's logits, one write of its gradient; as csrc/kernels.cpp and gradient.hpp.

The gradient is a weighted sum of scratch. forward_kl and dkd need one pass over the exponentials; the other divergences
read them once more, in cache.
"""

import math
from functools import cache, partial
from typing import Any

import numba
import numpy as np

from pydistill.engine.numba.listed import dkd_term, scan_rest, topk_term
from pydistill.engine.numba.math import OPTIONS, SOURCES, Array, accumulate, cached_on_disk, compiled, multiply_add
from pydistill.engine.numba.scan import FORWARD_KL, MSE, TOPK, Scratch, Settings, Sums, argmax, forward_kl, scan
from pydistill.engine.numba.second_pass import second_pass


@compiled
def mean_squared_error(s: Array, t: Array, difference: Array) -> float:
    """The mean of (s - t)^2; a class that is masked in both adds nothing."""
    for j in range(len(s)):
        difference[j] = 0 if s[j] == -math.inf and t[j] == -math.inf else s[j] - t[j]
    total = 0.0
    for j in range(len(s)):
        total = accumulate(total, np.float64(difference[j]) * np.float64(difference[j]))
    return total / len(s)


@compiled
def cross_entropy(s: Array, label: int, whole: tuple[float, float], class_weight: Array, settings: Settings) -> float:
    """torch's value for this row under reduction="none", class weight and label smoothing included."""
    log_sum, shifted = math.log(whole[1]), 0.0
    nll = (whole[0] - np.float64(s[label]) + log_sum) * np.float64(class_weight[label])
    if settings.smoothing == 0:
        return nll
    for j in range(len(s)):
        shifted = accumulate(shifted, (np.float64(s[j]) - whole[0]) * np.float64(class_weight[j]))
    smooth = (settings.class_weight_sum * log_sum - shifted) / len(s)
    return (1 - settings.smoothing) * nll + settings.smoothing * smooth


@compiled
def write(
    out: Array,
    s: Array,
    index: Array,
    plan: Any,
    factors: tuple[float, float],
    h_sum: float,
    sums: Sums,
    whole: tuple[float, float],
    class_weight: Array,
    settings: Settings,
    scratch: Scratch,
    listed_gradient: Array,
) -> None:
    """The row's gradient; ``factors`` are those of student_exp and derivative. ``out`` may be ``s``."""
    real, labelled = out.dtype.type, plan.hard_scale != 0  # it is 0 without a label
    onehot = plan.hard_scale * (1 - settings.smoothing) * np.float64(class_weight[plan.label])
    uniform, by_hard = plan.hard_scale * settings.smoothing / len(out), 0.0
    if labelled:
        by_hard = (onehot + uniform * settings.class_weight_sum) / whole[1]
        for k in range(len(index)):
            j = index[k]
            listed_gradient[k] += by_hard * math.exp(np.float64(s[j]) - whole[0])
            listed_gradient[k] -= uniform * np.float64(class_weight[j]) + (onehot if j == plan.label else 0.0)
        by_hard *= math.exp(sums.student_max - whole[0])
    e, h, g = scratch.student_exp, scratch.derivative, scratch.hard_exp
    a, b, c, minus_h_sum = real(factors[0]), real(factors[1]), real(by_hard), real(-h_sum)
    for j in range(len(out)):
        centred = multiply_add(minus_h_sum, e[j], h[j])  # before any other factor: where q is 1, the two cancel
        out[j] = multiply_add(a, e[j], multiply_add(c, g[j], b * centred))
    if labelled and settings.smoothing > 0:
        for j in range(len(out)):
            out[j] -= real(uniform) * class_weight[j]
    if labelled:  # both sides rounded alike: at probability 1 they cancel
        out[plan.label] -= real(onehot)
    for k in range(len(index)):
        out[index[k]] = listed_gradient[k]


@cache
def row_loop(pointwise: bool, listed: bool) -> Any:
    """The loop over rows, compiled for pointwise divergences, for rows with listed classes, or for the other terms."""
    digest = SOURCES

    def run_rows(points, logits, strides, listed_classes, class_weight, plans, outcomes, settings, scratch, listed_row):
        digest  # noqa: B018
        term, classes, k = settings.soft_term, len(class_weight), len(listed_row.student_exp) - 1
        for row in range(len(plans)):
            plan, outcome = plans[row], outcomes[row]
            s = logits[0][row * strides[0] : row * strides[0] + classes]
            t = logits[1][row * strides[1] : row * strides[1] + (k if term == TOPK else classes)]
            out = logits[2][row * strides[2] : row * strides[2] + classes]
            index, log_partition = listed_classes[0][row * k : row * k + k], listed_classes[1][row : row + 1]
            if plan.weight == 0:
                if settings.write:
                    out[:] = 0
                continue
            value, h_sum, factors = 0.0, 0.0, (0.0, 0.0)
            scale = plan.soft_scale * settings.units / settings.temperature
            if listed:
                sums, whole = scan_rest(s, t, index, settings, scratch)
                rest = (index, whole[0], sums, scale, settings, listed_row)
                if term == TOPK:
                    value, factors = topk_term(points, s, t, log_partition, *rest)
                else:
                    value, factors = dkd_term(s, t, *rest)
            else:
                sums = scan(s, t, term == FORWARD_KL or pointwise, settings, scratch)
                whole = (sums.student_max, sums.hard)
                if pointwise:
                    value, h_sum = second_pass(points, s, t, sums, settings, scratch)
                    factors = (0.0, scale)
                elif term == FORWARD_KL:  # h is -p, its sum -1
                    value, factors = forward_kl(sums, settings), (scale / sums.student, -scale / sums.teacher)
                elif term == MSE:
                    value = mean_squared_error(s, t, scratch.derivative)
                    factors = (0.0, 2 * plan.soft_scale / classes)
            outcome.soft = settings.units * value
            if math.isnan(value):  # then so is the whole row's gradient, also where h does not see the NaN
                factors = (math.nan, math.nan)
                listed_row.gradient[:] = math.nan
            if settings.hard and plan.label >= 0:
                outcome.hard = cross_entropy(s, plan.label, whole, class_weight, settings)
            if settings.metrics:
                best, theirs = argmax(s), argmax(t)
                outcome.accuracy = best == plan.label and best >= 0
                outcome.agreement = theirs >= 0 and best == (index[theirs] if term == TOPK else theirs)
            if settings.write:
                gradient = listed_row.gradient
                write(out, s, index, plan, factors, h_sum, sums, whole, class_weight, settings, scratch, gradient)

    return cached_on_disk(partial(numba.njit, **OPTIONS), run_rows)
