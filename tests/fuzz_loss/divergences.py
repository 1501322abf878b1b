"""The soft term of the loss and its gradient in long double.

Rows of logits (N, C) are numpy arrays of long double: 64 bits of mantissa on x86, where 1e-12 of beta or of a
probability still leaves seven digits, and an exponent that holds any float64 squared.
"""

from dataclasses import dataclass

import numpy as np

from .definitions import (
    DEFINITIONS,
    Outcomes,
    at_label,
    decoupled,
    difference,
    log_softmax,
    log_softmax_of_others,
    log_sum,
    mean_square,
)

Real = np.longdouble
INF = Real(np.inf)


@dataclass
class Soft:
    """The soft term of every row, without alpha, T^2 and weights. All but ``direction`` are (N,).

    direction: T times the gradient with respect to the logits, (N, C). base: the norms that the contract's bound of the
    gradient adds up. parts: the norms of h and q sum(h), whose difference the gradient is; what of h is more than q,
    a probability times a large difference of logarithms, counts with the relative error of its exponential. mass: sum
    of abs(h), the largest change of the value for a change of 1 in all log-probabilities. unsettled: how far the
    gradient may be off since a sign of q - p is not settled by the rounded logits. unchecked: rows whose gradient
    the contract leaves open. exponents: of the value, the probabilities times a large difference of logarithms, each
    times its exponential's argument, with whose roundings it is off. lost: what of the value stems from probabilities
    that may be flushed to 0. unit: what the loss's bound multiplies T^2 with.
    """

    value: np.ndarray
    direction: np.ndarray
    base: np.ndarray
    parts: np.ndarray
    mass: np.ndarray
    unsettled: np.ndarray
    unchecked: np.ndarray
    exponents: np.ndarray | int = 0
    lost: np.ndarray | int = 0
    unit: Real | int = 1


def _within(logs, largest):
    return np.where(logs < -largest, -INF, logs)


def soft_term(
    divergence, beta, temperature, student, teacher, labels=None, *, rounding=0.0, normal=0.0, smallest=0.0, largest=INF
) -> Soft:
    """D(p, q) and its gradient for a teacher over all classes; -inf in its logits is a probability of 0.

    Args:
        rounding: relative error of the arithmetic under test, which decides how close p and q are undecided.
        normal: a probability below this may be flushed to 0, or have few digits.
        smallest: a probability below this counts as 0 beside an exact 0 of the other distribution. A float32 kernel
            cannot tell e^-200 from 0, so that an infinite term and none are both right there.
        largest: a logit further than this below its row's maximum counts as -inf: the dtype cannot hold the difference.
    """
    if DEFINITIONS[divergence].of_logits:
        return _mse(student, teacher)
    log_q, log_p = (_within(log_softmax(x, temperature), largest) for x in (student, teacher))
    # Where the rows lie differently in memory, numpy sums them in another order: equal ones would differ by a rounding.
    equal = (student == teacher).all(-1)
    log_p = np.where(equal[:, None], log_q, log_p)
    log_q = np.where((log_p == -INF) & (np.exp(log_q) < smallest), -INF, log_q)
    log_p = np.where((log_q == -INF) & (np.exp(log_p) < smallest), -INF, log_p)
    if DEFINITIONS[divergence].of_label:
        within = (log_softmax_of_others(x, temperature, labels) for x in (student, teacher))
        within_q, within_p = (_within(x, largest) for x in within)
        within_p = np.where((within_q == -INF) & (np.exp(within_p) < smallest), -INF, within_p)
        return _dkd(Real(beta), log_p, log_q, within_p, within_q, labels)
    value, h = _pointwise(divergence, beta, log_p, log_q)
    unsettled = _unsettled(divergence, log_p, log_q, rounding, np.exp(log_q))
    return _soft(value, h, np.exp(log_q), np.exp(log_p), np.where(equal, 0, unsettled), normal)


def bucket_term(
    divergence,
    beta,
    temperature,
    student,
    indices,
    logits,
    partition,
    *,
    rounding=0.0,
    normal=0.0,
    smallest=0.0,
    largest=INF,
):
    """D over the k classes of a top-k teacher and one outcome for all others.

    ``partition``: log-sum-exp of all of the teacher's logits / temperature, (N,).
    """
    n, classes = student.shape
    kept = np.zeros((n, classes), bool)
    np.put_along_axis(kept, indices, True, -1)
    log_q = _within(log_softmax(student, temperature), largest)
    others = np.where(kept, -INF, log_q)
    log_rest_q = log_sum(others)
    top = logits.max(-1, keepdims=True) / temperature
    log_kept = np.log(np.exp(logits / temperature - top).sum(-1)) + top[:, 0] - partition
    log_kept = np.minimum(log_kept, 0)  # the clamp at a rest of 0
    log_p = np.concatenate([log_softmax(logits, temperature) + log_kept[:, None], _log1mexp(log_kept)[:, None]], -1)
    log_outcomes = np.concatenate([np.take_along_axis(log_q, indices, -1), log_rest_q[:, None]], -1)
    cut = (log_p == -INF) & (np.exp(log_outcomes) < smallest)
    log_outcomes = np.where(cut, -INF, log_outcomes)
    log_p = np.where((log_outcomes == -INF) & (np.exp(log_p) < smallest), -INF, log_p)
    value, h = _pointwise(divergence, beta, log_p, log_outcomes)
    # Each of the others has its share of the rest's derivative.
    share = np.where(others == -INF, 0, np.exp(log_softmax(np.where(kept, -INF, student), temperature)))
    wide = share * h[:, -1:]
    np.put_along_axis(wide, indices, h[:, :-1], -1)
    unsettled = _unsettled(divergence, log_p, log_outcomes, rounding, np.exp(log_outcomes))
    soft = _soft(value, wide, np.exp(log_q), np.exp(log_p), unsettled, normal, h.sum(-1))
    spoiled = np.isnan(log_outcomes).any(-1) | np.isnan(log_p).any(-1)
    soft.value[spoiled], soft.direction[spoiled] = np.nan, np.nan
    return soft


def _log1mexp(x):
    """log(1 - e^x) for x <= 0."""
    return np.where(x > -0.5, np.log(-np.expm1(x)), np.log1p(-np.exp(x)))


def _soft(value, h, q, p, unsettled, normal, h_sum=None):
    """``h_sum`` where it is not that of ``h``: a rest without classes has a derivative, but no class to take it."""
    pull = q * (h.sum(-1) if h_sum is None else h_sum)[:, None]
    # exp(u) is off by u roundings, which matters where a probability of e^-20 is multiplied by 1e30
    excess = np.maximum(np.abs(h) - 4 * q, 0) * (1 + np.where(q > 0, np.abs(np.log(np.where(q > 0, q, 1))), 0))
    # ... and a probability of e^-88 may be none: times 1e38 it is all of the loss
    lost = np.where(q < normal, np.maximum(np.abs(h) - 4 * q, 0), 0)
    unsettled = unsettled + norm(lost) + norm(q) * lost.sum(-1)
    return Soft(
        value,
        h - pull,
        base=norm(q) + norm(p),
        parts=norm(h) + norm(pull) + norm(excess) + norm(q) * excess.sum(-1),
        mass=np.abs(h).sum(-1),
        unsettled=unsettled,
        unchecked=np.zeros(len(value), bool),
        exponents=excess.sum(-1),
        lost=lost.sum(-1),
    )


def norm(rows):
    """Euclidean, of the last dimension; scaled, for squares of the largest numbers would overflow."""
    size = np.abs(rows).max(-1, keepdims=True) if rows.shape[-1] else np.zeros((*rows.shape[:-1], 1), Real)
    size = np.where((size > 0) & np.isfinite(size), size, 1)
    return np.sqrt(((rows / size) ** 2).sum(-1)) * size[..., 0]


def _pointwise(divergence, beta, log_p, log_q):
    """``(D, h)`` with h the derivative with respect to log q; NaN throughout a row where it is infinite."""
    definition, x = DEFINITIONS[divergence], Outcomes(log_p, log_q, beta)
    h = definition.d_log_q(x)
    return definition.terms(x).sum(-1), np.where(np.isinf(h).any(-1, keepdims=True), np.nan, h)


def _unsettled(divergence, log_p, log_q, rounding, q):
    """Where D has a kink at p = q and rounding decides on the sign of q - p, h may be off by q."""
    if not DEFINITIONS[divergence].kinked:
        return np.zeros(len(q), Real)
    size = np.where(np.isfinite(log_p), np.abs(log_p), 0) + np.where(np.isfinite(log_q), np.abs(log_q), 0)
    close = np.abs(difference(log_q, log_p)) <= 8 * Real(rounding) * (1 + size)
    doubtful = np.where(close, q, 0)
    return norm(doubtful) + norm(q) * doubtful.sum(-1)


def _mse(student, teacher):
    classes = student.shape[-1]
    gradient = 2 * difference(student, teacher) / classes
    value = mean_square(student, teacher)
    zero = np.zeros(len(value), Real)
    # An infinite logit has an infinite loss, as in torch; of its gradient the contract says nothing.
    unchecked = (np.isinf(student) | np.isinf(teacher)).any(-1) & ~np.isnan(value)
    broken = np.isnan(value)
    gradient[broken] = np.nan
    return Soft(value, gradient, norm(gradient), norm(gradient), zero, zero, unchecked)


def _dkd(beta, log_p, log_q, within_p, within_q, labels):
    """KL of (label, all others) + beta KL within the others. Gradients by hand: see the comments."""
    n, classes = log_q.shape
    label = at_label(log_q, labels)
    value = decoupled(log_p, log_q, within_p, within_q, labels, beta)
    rest_p, rest_q = (log_sum(np.where(label, -INF, x)) for x in (log_p, log_q))
    nothing = (rest_p == -INF) | (classes == 2) | (beta == 0)  # no mass among the others: nothing to compare
    q, p = np.exp(log_q), np.exp(log_p)
    # d log q_label = [label] - q and d log q_rest = q_within - q, so the first KL has q_label - p_label at the label
    # and (q_rest - p_rest) q_within at the others; the second has q_within - p_within.
    q_within, p_within = np.exp(within_q), np.exp(within_p)
    gradient = (np.exp(rest_q) - np.exp(rest_p))[:, None] * q_within
    gradient += np.where(nothing, 0, beta)[:, None] * (q_within - p_within)
    gradient = np.where(label, q - p, gradient)
    broken = np.isnan(log_q).any(-1) | np.isnan(log_p).any(-1)
    value[broken], gradient[broken] = np.nan, np.nan
    inner_base = np.where(nothing, 0, beta) * (norm(q_within) + norm(p_within))
    base = norm(q) + norm(p) + inner_base
    # A student without mass among the others has no distribution there.
    unchecked = (rest_q == -INF) & (rest_p > -INF)
    zero = np.zeros(n, Real)
    return Soft(
        value, gradient, base, base, np.abs(gradient).sum(-1), zero, unchecked, unit=1 + (beta if classes > 2 else 0)
    )
