"""Rows that rows.py does not treat alike: top-k teachers, dkd, and mse. As in csrc/listed.hpp.

With a top-k teacher, and for dkd, some classes stand apart. The scan over a row leaves them out, so that the sums, and
the maximum they refer to, are those of the rest: taken from a whole row's by subtraction they would be lost where the
classes apart hold nearly all of the mass. The classes apart are computed one by one in float64.
"""

import math
from functools import cache

import numba
import numpy as np

from pydistill.engine.numba.rows import _njit, cross_entropy, first_at, scan, write_gradient
from pydistill.formulas import DIVERGENCES, Point


def teacher_arrays(batch, rows):
    """The indices and log-partitions of some rows as flat arrays; empty ones where there are none."""
    indices, partitions = batch.teacher_indices, batch.log_partitions
    return (
        np.empty(0, np.int64) if indices is None else indices[rows].reshape(-1).numpy(),
        np.empty(0) if partitions is None else partitions[rows].numpy(),
    )


@_njit
def log_sigmoid(x):
    """log(1 / (1 + exp(-x)))."""
    return min(x, 0.0) - math.log1p(math.exp(-abs(x)))


@_njit
def weighted(weight, x):
    """weight * x, and 0 where the weight is 0."""
    return 0.0 if weight == 0 else weight * x


@_njit
def log_odds(logit, maximum, total, temperature):
    """Of one class against the others, whose exponentials add up to ``total``."""
    if logit == math.inf or (total == 0 and not math.isfinite(logit)):
        return math.nan
    if total == 0:
        return math.inf
    return (logit - maximum) / temperature - math.log(total)


@_njit
def mse_row(s, t, soft_scale, settings, scratch):
    """Value, factors; the difference goes where the teacher's exponentials would be."""
    total = 0.0
    for j in range(len(s)):
        d = np.float64(s[j]) - np.float64(t[j])
        if s[j] == -math.inf and t[j] == -math.inf:
            d = 0.0
        total += d * d
        scratch.teacher[j] = d
    return total / len(s), (0.0, 2 * soft_scale / len(s))


@_njit
def dkd_row(logit_s, logit_t, classes, sums, scale, settings):
    """Value, factors, and the label's gradient: KL of (label, others), and beta times the KL within the others."""
    temperature, beta = settings.temperature, 0.0  # without mass among the others there is nothing to compare
    student = log_odds(logit_s, sums.student_max, sums.student, temperature)
    teacher = log_odds(logit_t, sums.teacher_max, sums.teacher, temperature)
    q, p, p_rest = 1 / (1 + math.exp(-student)), 1 / (1 + math.exp(-teacher)), 1 / (1 + math.exp(teacher))
    value = weighted(p, log_sigmoid(teacher) - log_sigmoid(student))
    value += weighted(p_rest, log_sigmoid(-teacher) - log_sigmoid(-student))
    by_student = by_teacher = 0.0
    if sums.teacher != 0:
        beta = settings.beta if classes > 2 else 0.0  # a single other class has no gradient within itself
        within = math.inf
        if sums.student != 0:
            within = sums.cross / (sums.teacher * temperature) + math.log(sums.student / sums.teacher)
        value += weighted(settings.beta, within)
        by_teacher = -scale * beta / sums.teacher
    if sums.student != 0:
        by_student = scale * (p - q + beta) / sums.student
    return value, (by_student, by_teacher), scale * (q - p), math.isnan(student), math.isnan(teacher)


def _topk_row(divergence):
    value_of, h_of = numba.njit(divergence.value), numba.njit(divergence.d_log_q)
    reference_of = numba.njit(divergence.reference)

    def topk_row(s, t, index, partition, whole_max, sums, scale, settings, gradient):
        """Value and factors; the gradient of the classes apart goes into ``gradient``."""
        temperature, beta, rest, k = settings.temperature, settings.beta, settings.rest, len(index)
        teacher_max = -math.inf
        for j in range(k):
            teacher_max = max(teacher_max, np.float64(t[j]))
        student_sum = sums.student * math.exp((sums.student_max - whole_max) / temperature)
        teacher_sum = 0.0
        for j in range(k):
            student_sum += math.exp((np.float64(s[index[j]]) - whole_max) / temperature)
            teacher_sum += math.exp((np.float64(t[j]) - teacher_max) / temperature)
        if not (student_sum > 0 and teacher_sum > 0):  # no softmax
            return math.nan, (math.nan, 0.0), not student_sum > 0, not teacher_sum > 0
        log_student_sum, log_teacher_sum = math.log(student_sum), math.log(teacher_sum)
        log_partition, rest_mass = log_teacher_sum, 0.0
        if len(partition) > 0:
            log_partition = partition[0] - teacher_max / temperature
            rest_mass = -math.expm1(log_teacher_sum - log_partition)
            if rest_mass < 0:
                rest_mass = 0.0
        p, q, log_ratio = np.empty(k + 1), np.empty(k + 1), np.empty(k + 1)
        for j in range(k):
            log_q = (np.float64(s[index[j]]) - whole_max) / temperature - log_student_sum
            log_p = (np.float64(t[j]) - teacher_max) / temperature - log_partition
            p[j], q[j], log_ratio[j] = math.exp(log_p), math.exp(log_q), log_q - log_p
        log_q = (sums.student_max - whole_max) / temperature + math.log(sums.student) - log_student_sum
        p[k], q[k], log_ratio[k] = rest_mass, math.exp(log_q), log_q - math.log(rest_mass)
        reference = reference_of(log_ratio[np.argmax(q)], beta, rest)
        value = h_sum = 0.0
        for j in range(k + 1):
            x = Point(p[j], q[j], log_ratio[j], beta, rest, reference)
            value += value_of(x)
            p[j] = h_of(x)
            h_sum += p[j]
        if not math.isfinite(h_sum):
            h_sum = math.nan
        for j in range(k):
            gradient[j] = scale * (p[j] - q[j] * h_sum)
        by_student = 0.0
        if sums.student != 0:
            by_student = scale * (p[k] - q[k] * h_sum) / sums.student
        return value, (by_student, 0.0), not student_sum > 0, not teacher_sum > 0

    return _njit(topk_row, on_disk=False)


def kernel(batch):
    """The loop over rows for a batch's form of teacher and divergence."""
    return _kernel(batch.options.divergence, batch.teacher_indices is not None)


@cache
def _kernel(name, topk):
    topk_row = _topk_row(DIVERGENCES[name]) if topk else None
    mse = name == "mse"

    def run_rows(
        student, teacher, gradient, indices, partitions, strides, classes, class_weight, plan, found, settings, scratch
    ):
        rows = len(plan.label)
        k = len(indices) // max(rows, 1) if topk else (0 if mse else 1)
        width = k if topk else classes
        without_s, without_t = np.empty(classes, student.dtype), np.empty(classes, student.dtype)
        apart = np.empty(k)
        index = np.empty(k, np.int64)
        scratch.teacher[:] = 0
        for row in range(rows):
            s = student[row * strides[0] : row * strides[0] + classes]
            t = teacher[row * strides[1] : row * strides[1] + width]
            out = gradient[row * strides[2] : row * strides[2] + classes]
            label = plan.label[row]
            if plan.weight[row] == 0:
                if settings.write:
                    out[:] = 0
                continue
            without_s[:] = s
            if topk:
                index[:] = indices[row * k : (row + 1) * k]
            elif not mse:
                index[0] = label
                without_t[:] = t
                without_t[label] = -math.inf
            for j in range(k):
                without_s[index[j]] = -math.inf
            sums = scan(without_s, without_t, settings, scratch)
            whole_max = sums.student_max  # float64, as scan gives it: differences from it are not rounded to float32
            for j in range(k):
                whole_max = max(whole_max, np.float64(s[index[j]]))
            whole_sum = sums.hard * math.exp(sums.student_max - whole_max)
            for j in range(k):
                whole_sum += math.exp(np.float64(s[index[j]]) - whole_max)
            whole = (whole_max, whole_sum)
            scale = plan.soft_scale[row] * settings.units / settings.temperature
            no_student, no_teacher = not sums.student > 0, False
            if topk_row is not None:
                partition = partitions[row : row + 1]
                value, factors, no_student, no_teacher = topk_row(
                    s, t, index, partition, whole_max, sums, scale, settings, apart
                )
            elif mse:
                value, factors = mse_row(s, t, plan.soft_scale[row], settings, scratch)
            else:
                value, factors, apart[0], no_student, no_teacher = dkd_row(
                    np.float64(s[label]), np.float64(t[label]), classes, sums, scale, settings
                )
            found.soft[row] = settings.units * value
            if math.isnan(value):  # then so is the whole row's gradient, also where h does not see the NaN
                factors = (math.nan, math.nan)
                apart[:] = math.nan
            if settings.hard and label >= 0:
                found.hard[row] = cross_entropy(s, label, whole, class_weight, settings)
            if settings.metrics and not no_student:
                best = first_at(s, 0, whole_max)
                found.correct[row] = best == label
                if not no_teacher:
                    theirs = np.argmax(t)
                    if math.isfinite(t[theirs]):
                        found.agree[row] = best == (index[theirs] if topk else theirs)
            if settings.write:
                hard_scale = plan.hard_scale[row]
                for j in range(k):  # before the row is written: out may be s
                    apart[j] += _hard_gradient(s, index[j], label, hard_scale, whole, class_weight, settings)
                write_gradient(
                    out, label, hard_scale, sums, whole, factors, False, 0.0, class_weight, settings, scratch
                )
                for j in range(k):
                    out[index[j]] = apart[j]

    return _njit(run_rows, on_disk=False)


@_njit
def _hard_gradient(s, j, label, hard_scale, whole, class_weight, settings):
    """Cross-entropy's part of the gradient at one class."""
    if not settings.hard or label < 0:
        return 0.0
    weight_of_label, weight_of_class = 1.0, 1.0
    if len(class_weight) > 0:
        weight_of_label, weight_of_class = np.float64(class_weight[label]), np.float64(class_weight[j])
    smoothing = settings.smoothing
    uniform = smoothing / len(s)
    total = (1 - smoothing) * weight_of_label + uniform * settings.class_weight_sum
    softmax = math.exp(np.float64(s[j]) - whole[0]) / whole[1]
    onehot = (1 - smoothing) * weight_of_label if j == label else 0.0
    return hard_scale * (total * softmax - uniform * weight_of_class - onehot)
