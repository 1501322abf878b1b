"""Rows of which some classes are listed: the k of a top-k teacher, or dkd's label; as csrc/listed.hpp.

The scan leaves the listed classes out, so that its sums are those of the rest: by subtraction from a whole row's sums
they would lose their digits where the listed classes hold nearly all of the mass. The listed classes, and the rest as
one more class, are then a row of their own, in float64.
"""

import math
from typing import Any

import numpy as np

from pydistill.engine.numba.math import Array, compiled
from pydistill.engine.numba.scan import DKD, Scratch, Settings, Sums, forward_kl, maximum, scan
from pydistill.engine.numba.second_pass import second_pass
from pydistill.formulas import times


@compiled
def scan_rest(
    s: Array, t: Array, listed: Array, settings: Settings, scratch: Scratch
) -> tuple[Sums, tuple[float, float]]:
    """The sums without the listed classes; the row's maximum, and its sum of exp(s - maximum)."""
    for j in range(len(s)):
        scratch.student_rest[j] = s[j]
    for j in range(len(t)):
        scratch.teacher_rest[j] = t[j]
    for j in listed:
        scratch.student_rest[j] = scratch.teacher_rest[j] = -math.inf
    sums = scan(scratch.student_rest, scratch.teacher_rest, settings.soft_term == DKD, settings, scratch)
    whole_max = sums.student_max  # float64: a difference from it is not rounded to float32
    for j in listed:
        whole_max = max(whole_max, np.float64(s[j]))
    whole_sum = sums.hard * math.exp(sums.student_max - whole_max)
    for j in listed:
        whole_sum += math.exp(np.float64(s[j]) - whole_max)
    return sums, (whole_max, whole_sum)


@compiled
def log_mass(total: float, shift: float, temperature: float) -> float:
    """The logit of one class that has the mass of several, whose exponentials add up to ``total``."""
    return shift + temperature * math.log(total)


@compiled
def dkd_term(
    s: Array, t: Array, listed: Array, whole_max: float, sums: Sums, scale: float, settings: Settings, row: Scratch
) -> tuple[float, tuple[float, float]]:
    """KL of (label, rest), and beta times the KL within the rest."""
    temperature, label, beta = settings.temperature, listed[0], 0.0  # without mass in the rest nothing is compared
    x, y, teacher_max = row.student_rest, row.teacher_rest, max(sums.teacher_max, np.float64(t[label]))
    x[0], x[1] = np.float64(s[label]) - whole_max, log_mass(sums.student, sums.student_max - whole_max, temperature)
    y[0], y[1] = np.float64(t[label]) - teacher_max, log_mass(sums.teacher, sums.teacher_max - teacher_max, temperature)
    pair = scan(x, y, True, settings, row)
    value, q, p = forward_kl(pair, settings), row.student_exp[0] / pair.student, row.derivative[0] / pair.teacher
    by_student = by_teacher = 0.0
    if sums.teacher != 0:
        beta = settings.beta if len(s) > 2 else 0.0  # a rest of one class has no gradient within itself
        value += times(settings.beta, forward_kl(sums, settings) if sums.student != 0 else math.inf)
        by_teacher = -scale * beta / sums.teacher
    if sums.student != 0:
        by_student = scale * (p - q + beta) / sums.student
    row.gradient[0] = scale * (q - p)
    return value, (by_student, by_teacher)


@compiled
def topk_term(
    points: Any,
    s: Array,
    t: Array,
    log_partition: Array,
    listed: Array,
    whole_max: float,
    sums: Sums,
    scale: float,
    settings: Settings,
    row: Scratch,
) -> tuple[float, tuple[float, float]]:
    """The divergence of the k classes, and of the rest as one more.

    Without a log-partition, which is an empty array, the rest has p = 0: every divergence that is finite there is
    proportional to q then, so one class stands for all of the rest.
    """
    temperature, k, teacher_max = settings.temperature, len(listed), maximum(t)
    x, y = row.student_rest, row.teacher_rest
    for j in range(k):
        x[j], y[j] = np.float64(s[listed[j]]) - whole_max, np.float64(t[j]) - teacher_max
    x[k], y[k] = log_mass(sums.student, sums.student_max - whole_max, temperature), -math.inf
    if len(log_partition) > 0:
        log_all = log_partition[0] - teacher_max / temperature
        share = math.log(scan(x, y, True, settings, row).teacher) - log_all  # of the k classes; its log
        y[k] = temperature * (log_all + math.log(-math.expm1(share if share < 0 else share * 0)))
    outcomes = scan(x, y, True, settings, row)
    value, h_sum = second_pass(points, x, y, outcomes, settings, row)
    for j in range(k):
        row.gradient[j] = scale * (row.derivative[j] - row.student_exp[j] * h_sum)
    by_rest = scale * (row.derivative[k] - row.student_exp[k] * h_sum)
    by_student = by_rest / sums.student if sums.student != 0 else 0.0
    return value, (by_student, 0.0)
