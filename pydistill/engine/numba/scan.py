"""The first pass over a row, and what the steps of the row kernel hand to one another; as csrc/scan.hpp.

Inner loops are plain, so that LLVM makes vectors of them: no branch, no call. A loop that sums does not store: with a
store in it LLVM's code compares addresses at run time and takes another loop if they are close, and the order of the
additions, the last bit, would depend on where memory lies.

In compiled code ``float(x)`` of a float32 is a float32; what must be float64 says ``np.float64(x)``.
"""

import math
from typing import NamedTuple

import numpy as np
from numba.extending import overload

from pydistill.engine.metrics import METRICS
from pydistill.engine.numba.math import FORMAT, LN2, LOG2E, Array, accumulate, compiled, exp2
from pydistill.formulas import times

BLOCK = 512  # elements that are summed in the row's dtype; four arrays of a block fit in L1 together
NONE, FORWARD_KL, POINTWISE, MSE, TOPK, DKD = range(6)  # how the soft term is computed

ROW_PLAN = np.dtype([("label", "i8"), ("weight", "f8"), ("soft_scale", "f8"), ("hard_scale", "f8")], align=True)
ROW_OUTCOME = np.dtype([(name, "f8") for name in ("soft", "hard", *METRICS)])


class Settings(NamedTuple):
    """The same for every row of a batch."""

    soft_term: int
    hard: bool  # whether the hard term is evaluated
    write: bool
    metrics: bool
    temperature: float
    units: float  # T^2, or 1
    beta: float
    smoothing: float
    class_weight_sum: float


class Scratch(NamedTuple):
    """One thread's memory for a row."""

    student_exp: Array  # exp((s - max) / T); then q of a pointwise divergence
    derivative: Array  # exp((t - max) / T); then p and h of a pointwise divergence; s - t of mse
    hard_exp: Array  # exp(s - max)
    log_ratio: Array  # log q - log p; then each class's value
    student_rest: Array  # a row without the listed classes, or these and the rest as one more class
    teacher_rest: Array
    gradient: Array  # of listed classes


class Sums(NamedTuple):
    """Sums over a row, and the maxima that they refer to, in float64."""

    student: float  # exp((s - max) / T)
    teacher: float  # exp((t - max) / T)
    cross: float  # exp((t - max) / T) times the difference of the shifted logits, teacher - student
    hard: float  # exp(s - max)
    student_max: float
    teacher_max: float


def maximum(x: Array) -> float:
    """The largest of a row, in float64, or the lowest number. A NaN may be passed over: it reaches the sums."""


@overload(maximum)
def _maximum(x):
    real, integer, _, _, _ = FORMAT[x.dtype]
    lowest, sign, rest = float(np.finfo(real).min), np.iinfo(integer).bits - 1, np.iinfo(integer).max
    first = integer(np.iinfo(integer).min)

    def maximum(x):
        best = first  # integers in the order of the floats: LLVM makes no vectors of floats' maximum
        for j in range(len(x)):
            bits = real(x[j]).view(integer)
            ordered = integer(bits ^ ((bits >> sign) & rest))
            best = ordered if ordered > best else best
        largest = np.float64(integer(best ^ ((best >> sign) & rest)).view(real))
        return largest if largest > lowest else lowest

    return maximum


@compiled
def first_at(x: Array, value: float) -> int:
    """Where the value is first found; the length where it is not."""
    first = len(x)
    for j in range(len(x)):
        found = j if x[j] == value else len(x)
        first = found if found < first else first
    return first


@compiled
def argmax(x: Array) -> int:
    """The first maximum; -1 for a row without one: NaN, +inf, or -inf throughout."""
    largest = maximum(x)
    first = first_at(x, largest)
    return first if first < len(x) and largest < math.inf and not math.isnan(total(x)) else -1


@compiled
def total(x: Array) -> float:
    """Sum of an array."""
    result = 0.0
    for begin in range(0, len(x), BLOCK):
        block, partial = x[begin : begin + BLOCK], x.dtype.type(0)
        for j in range(len(block)):
            partial = accumulate(partial, block[j])
        result += np.float64(partial)
    return result


@compiled
def scan(s: Array, t: Array, scan_teacher: bool, settings: Settings, scratch: Scratch) -> Sums:
    """Exponentials of a row into scratch, and their sums."""
    real, temperature = s.dtype.type, settings.temperature
    c, period, hard_c, hard_period = real(LOG2E / temperature), real(LN2 * temperature), real(LOG2E), real(LN2)
    student_max, teacher_max = maximum(s), maximum(t) if scan_teacher else 0.0
    student = teacher = cross = hard = 0.0
    ms, mt = real(student_max), real(teacher_max)
    for begin in range(0, len(s), BLOCK):
        end = min(begin + BLOCK, len(s))
        x, y, n = s[begin:end], t[begin:end], end - begin
        e, f, g = scratch.student_exp[begin:end], scratch.derivative[begin:end], scratch.hard_exp[begin:end]
        for j in range(n):
            e[j] = exp2(x[j] - ms, c, period)
        student += total(e)
        if scan_teacher:
            for j in range(n):
                f[j] = exp2(y[j] - mt, c, period)
            teacher += total(f)
            block_cross = real(0)
            for j in range(n):
                block_cross = accumulate(block_cross, times(f[j], (y[j] - mt) - (x[j] - ms)))
            cross += np.float64(block_cross)
        if settings.hard:
            if temperature in (1, 2, 4):
                for j in range(n):
                    square = e[j] * e[j]
                    g[j] = square * square if temperature == 4 else square if temperature == 2 else e[j]
            else:
                for j in range(n):
                    g[j] = exp2(x[j] - ms, hard_c, hard_period)
            hard += total(g)
    return Sums(student, teacher, cross, hard, student_max, teacher_max)


@compiled
def forward_kl(sums: Sums, settings: Settings) -> float:
    """KL(p, q) from the sums over a row."""
    return sums.cross / (sums.teacher * settings.temperature) + math.log(sums.student) - math.log(sums.teacher)
