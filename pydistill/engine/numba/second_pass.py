"""The second pass over a row, whose exponentials and sums are known: pointwise divergences; as csrc/second_pass.hpp."""

import math
from functools import cache, partial
from typing import Any

import numba
import numpy as np
from numba import types
from numba.extending import register_jitable

from pydistill.engine.numba.math import SOURCES, Array, cached_on_disk, compiled
from pydistill.engine.numba.scan import Scratch, Settings, Sums, first_at, total
from pydistill.formulas import DIVERGENCES, Point


@cache
def pointwise(divergence: str, real: Any) -> Any:
    """A divergence as a C function of some classes: h replaces p, and each class's value replaces log q - log p.

    The row loop calls it by its address, so that the loop is compiled once for all divergences.
    """
    of, digest = DIVERGENCES[divergence], SOURCES
    value_of, h_of = map(register_jitable, (of.value, of.d_log_q))

    def points(p, q, log_ratio, count, best, beta):
        digest  # noqa: B018
        p, q, log_ratio = numba.carray(p, count), numba.carray(q, count), numba.carray(log_ratio, count)
        beta, one_minus_beta, reference = real(beta), real(1 - beta), real(0)
        if best < count:
            reference = h_of(Point(p[best], q[best], log_ratio[best], beta, one_minus_beta, reference)) / q[best]
        for j in range(count):
            x = Point(p[j], q[j], log_ratio[j], beta, one_minus_beta, reference)
            log_ratio[j], p[j] = value_of(x), h_of(x)

    array = types.CPointer(numba.from_dtype(np.dtype(real)))
    signature = types.void(array, array, array, types.intp, types.intp, types.float64)
    return cached_on_disk(partial(numba.cfunc, signature, error_model="numpy"), points).ctypes


@compiled
def second_pass(
    points: Any, s: Array, t: Array, sums: Sums, settings: Settings, scratch: Scratch
) -> tuple[float, float]:
    """Value of a pointwise divergence, and the sum of h. q and h replace the exponentials."""
    real, temperature, log_sum_ratio = s.dtype.type, settings.temperature, math.log(sums.student / sums.teacher)
    ms, mt, inverse, shift = real(sums.student_max), real(sums.teacher_max), real(1 / temperature), real(log_sum_ratio)
    q, p, log_ratio = scratch.student_exp, scratch.derivative, scratch.log_ratio
    by_student, by_teacher = real(1 / sums.student), real(1 / sums.teacher)
    for j in range(len(s)):
        q[j] *= by_student
        p[j] *= by_teacher
        log_ratio[j] = ((s[j] - ms) - (t[j] - mt)) * inverse - shift  # of logits: logarithms would lose digits
    points(p.ctypes, q.ctypes, log_ratio.ctypes, len(s), first_at(s, sums.student_max), settings.beta)
    h_sum = total(p[: len(s)])
    # An infinite h (reverse_kl where p is 0): the whole row's gradient is NaN, not a mixture of NaN and inf.
    return total(log_ratio[: len(s)]), h_sum if math.isfinite(h_sum) else math.nan
