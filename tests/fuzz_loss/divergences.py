"""Each divergence and its gradient in long double, written from the definitions alone.

Rows of logits (N, C) are numpy arrays of long double: 64 bits of mantissa on x86, where 1e-12 of beta or of a
probability still leaves seven digits, and an exponent that holds any float64 squared.
"""

from dataclasses import dataclass

import numpy as np

Real = np.longdouble
INF = Real(np.inf)
DEFAULT_BETA = {"jsd": 0.5, "skew_forward_kl": 0.1, "skew_reverse_kl": 0.1, "dkd": 8.0}
# At the ends of its range a divergence is another one; full skews compare a distribution with itself.
ENDS = {("jsd", 0): "forward_kl", ("jsd", 1): "reverse_kl"}
ENDS |= {("skew_forward_kl", 0): "forward_kl", ("skew_reverse_kl", 0): "reverse_kl"}


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


def log_softmax(logits, temperature):
    """Of rows; NaN throughout for a row with NaN or +inf, or of -inf only."""
    scaled = (logits - logits.max(-1, keepdims=True)) / temperature
    return scaled - np.log(np.exp(scaled).sum(-1, keepdims=True))


def _within(logs, largest):
    return np.where(logs < -largest, -INF, logs)


def resolve(divergence, beta):
    """``(divergence, beta)`` with the default filled in, and the ends of the range as what they are."""
    if divergence not in DEFAULT_BETA:
        return divergence, None
    beta = DEFAULT_BETA[divergence] if beta is None else beta
    return (ENDS[divergence, beta], None) if (divergence, beta) in ENDS else (divergence, beta)


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
    if divergence == "mse":
        return _mse(student, teacher)
    log_q, log_p = (_within(log_softmax(x, temperature), largest) for x in (student, teacher))
    # Where the rows lie differently in memory, numpy sums them in another order: equal ones would differ by a rounding.
    equal = (student == teacher).all(-1)
    log_p = np.where(equal[:, None], log_q, log_p)
    log_q = np.where((log_p == -INF) & (np.exp(log_q) < smallest), -INF, log_q)
    log_p = np.where((log_q == -INF) & (np.exp(log_p) < smallest), -INF, log_p)
    if divergence == "dkd":
        within_q, within_p = (_within(_others_log_softmax(x, temperature, labels), largest) for x in (student, teacher))
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
    log_rest_q = _log_sum(others)
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


def _others_log_softmax(logits, temperature, labels):
    """Over all classes but the label; from the logits, since log-probabilities of -1e30 differ by nothing."""
    others = logits.copy()
    np.put_along_axis(others, labels[:, None], -INF, -1)
    without = (others == -INF).all(-1)
    return np.where(without[:, None], -INF, log_softmax(others, temperature))


def _log_sum(logs):
    top = logs.max(-1, keepdims=True)
    safe = np.where(np.isfinite(top), top, 0)
    return np.log(np.exp(logs - safe).sum(-1)) + safe[..., 0]


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


def _product(weight, factor):
    """Weight * factor with 0 * inf = 0, the limit of x log x."""
    return np.where(weight == 0, 0, weight * np.where(weight == 0, 0, factor))


def _difference(a, b):
    """Of log-probabilities: 0 where both are -inf."""
    none = (a == -INF) & (b == -INF)
    return np.where(none, 0, a) - np.where(none, 0, b)


def _pointwise(divergence, beta, log_p, log_q):
    """``(D, h)`` with h the derivative with respect to log q."""
    p, q = np.exp(log_p), np.exp(log_q)
    if divergence == "forward_kl":
        # -inf for q is infinite for any p, also one too small for a long double
        terms = np.where((log_p > -INF) & (log_q == -INF), INF, _product(p, _difference(log_p, log_q)))
        return terms.sum(-1), -p
    if divergence == "reverse_kl":
        ratio = _difference(log_q, log_p)
        terms = np.where((log_q > -INF) & (log_p == -INF), INF, _product(q, ratio))
        h = np.where((terms == INF).any(-1, keepdims=True), np.nan, _product(q, ratio))
        return terms.sum(-1), h
    if divergence == "total_variation":
        return np.abs(p - q).sum(-1) / 2, q * np.sign(_difference(log_q, log_p)) / 2
    if divergence == "squared_hellinger":
        root_p, root_q = np.exp(log_p / 2), np.exp(log_q / 2)
        return ((root_p - root_q) ** 2).sum(-1) / 2, root_q * (root_q - root_p) / 2
    beta = Real(beta)
    if beta == 1:  # of a skew: a distribution and itself
        zero = 0 * (p + q)
        return zero.sum(-1), zero
    log_beta, log_rest = np.log(beta), np.log1p(-beta)
    if divergence == "jsd":
        log_m = np.logaddexp(log_beta + log_p, log_rest + log_q)
        of_q = _product(q, _difference(log_q, log_m))
        value = beta * _product(p, _difference(log_p, log_m)).sum(-1) + (1 - beta) * of_q.sum(-1)
        return value, (1 - beta) * of_q
    if divergence == "skew_forward_kl":
        log_m = np.logaddexp(log_beta + log_p, log_rest + log_q)
        both = _difference(log_p, log_m) + np.where(log_m == -INF, -INF, log_q)
        return _product(p, _difference(log_p, log_m)).sum(-1), -(1 - beta) * np.exp(both)
    if divergence == "skew_reverse_kl":
        log_m = np.logaddexp(log_rest + log_p, log_beta + log_q)
        terms = _product(q, _difference(log_q, log_m))
        both = _difference(log_p, log_m) + np.where(log_m == -INF, -INF, log_q)
        return terms.sum(-1), terms + (1 - beta) * np.exp(both)
    raise AssertionError(f"no definition of {divergence}")


def _unsettled(divergence, log_p, log_q, rounding, q):
    """Total variation has a kink where p = q: where rounding decides on the sign, h may be off by q."""
    if divergence != "total_variation":
        return np.zeros(len(q), Real)
    size = np.where(np.isfinite(log_p), np.abs(log_p), 0) + np.where(np.isfinite(log_q), np.abs(log_q), 0)
    close = np.abs(_difference(log_q, log_p)) <= 8 * Real(rounding) * (1 + size)
    doubtful = np.where(close, q, 0)
    return norm(doubtful) + norm(q) * doubtful.sum(-1)


def _mse(student, teacher):
    classes = student.shape[-1]
    difference = _difference(student, teacher)
    gradient = 2 * difference / classes
    value = (difference**2).sum(-1) / classes
    zero = np.zeros(len(value), Real)
    # An infinite logit has an infinite loss, as in torch; of its gradient the contract says nothing.
    unchecked = (np.isinf(student) | np.isinf(teacher)).any(-1) & ~np.isnan(value)
    broken = np.isnan(value)
    gradient[broken] = np.nan
    return Soft(value, gradient, norm(gradient), norm(gradient), zero, zero, unchecked)


def _dkd(beta, log_p, log_q, within_p, within_q, labels):
    """KL of (label, all others) + beta KL within the others. Gradients by hand: see the comments."""
    n, classes = log_q.shape
    at = labels[:, None]
    log_label_p, log_label_q = (np.take_along_axis(x, at, -1)[:, 0] for x in (log_p, log_q))
    others_p, others_q = log_p.copy(), log_q.copy()
    for x in (others_p, others_q):
        np.put_along_axis(x, at, -INF, -1)
    rest_p, rest_q = _log_sum(others_p), _log_sum(others_q)
    binary_p, binary_q = (np.stack(x, -1) for x in ((log_label_p, rest_p), (log_label_q, rest_q)))
    value, _ = _pointwise("forward_kl", None, binary_p, binary_q)
    inner, _ = _pointwise("forward_kl", None, within_p, within_q)
    nothing = (rest_p == -INF) | (classes == 2) | (beta == 0)  # no mass among the others: nothing to compare
    value = value + np.where(nothing, 0, beta * np.where(nothing, 0, inner))
    # d log q_label = [label] - q and d log q_rest = q_within - q, so the first KL has q_label - p_label at the label
    # and (q_rest - p_rest) q_within at the others; the second has q_within - p_within.
    q_within, p_within = np.exp(within_q), np.exp(within_p)
    gradient = (np.exp(rest_q) - np.exp(rest_p))[:, None] * q_within
    gradient += np.where(nothing, 0, beta)[:, None] * (q_within - p_within)
    np.put_along_axis(gradient, at, (np.exp(log_label_q) - np.exp(log_label_p))[:, None], -1)
    broken = np.isnan(log_q).any(-1) | np.isnan(log_p).any(-1)
    value[broken], gradient[broken] = np.nan, np.nan
    q, p = np.exp(log_q), np.exp(log_p)
    inner_base = np.where(nothing, 0, beta) * (norm(q_within) + norm(p_within))
    base = norm(q) + norm(p) + inner_base
    # A student without mass among the others has no distribution there.
    unchecked = (rest_q == -INF) & (rest_p > -INF)
    zero = np.zeros(n, Real)
    return Soft(
        value, gradient, base, base, np.abs(gradient).sum(-1), zero, unchecked, unit=1 + (beta if classes > 2 else 0)
    )
