"""Each divergence, written from its definition alone, for torch tensors and numpy arrays of any precision.

``DEFINITIONS`` is the only table of divergences in the tests. reference.py evaluates it in torch's float64, where
autograd gives the derivatives of every order; the fuzzer evaluates it in numpy's long double, with the first derivative
as it is written here. No code is shared with pydistill.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

INF = math.inf


class Outcomes:
    """Log-probabilities of the teacher (p) and the student (q) over the outcomes of each row, and beta.

    Both are (N, outcomes). A class of probability 0 has a log-probability of -inf.
    """

    def __init__(self, log_p, log_q, beta=None):
        self.log_p, self.log_q = log_p, log_q
        self.p, self.q = (library(x).exp(x) for x in (log_p, log_q))
        number = float if isinstance(log_p, torch.Tensor) else np.longdouble
        self.beta = None if beta is None else number(beta)


@dataclass(frozen=True)
class Definition:
    """A divergence D(p, q) as a sum over outcomes, or one of the two that are none: ``of_logits`` and ``of_label``.

    terms: the addends of D, from Outcomes. d_log_q: the derivative of D with respect to log q, up to a constant times
    q, which no gradient with respect to logits shows. beta: the default of the parameter, None where there is none;
    ends: the divergence that it is at an end of the parameter's range. kinked: d_log_q jumps where p = q.
    of_logits: the mean square of the differences of logits, without temperature. of_label: needs the row's label.
    """

    terms: Callable | None = None
    d_log_q: Callable | None = None
    beta: float | None = None
    ends: dict = field(default_factory=dict)
    kinked: bool = False
    of_logits: bool = False
    of_label: bool = False


def library(x):
    """torch or numpy: the functions used here have one name in both."""
    return torch if isinstance(x, torch.Tensor) else np


def product(weight, factor):
    """``weight * factor``, and 0 where the weight is 0: the limit of x log x."""
    where, none = library(weight).where, weight == 0
    return where(none, 0, weight * where(none, 0, factor))


def difference(a, b):
    """a - b of log-probabilities; 0 where both are -inf."""
    where, none = library(a).where, (a == -INF) & (b == -INF)
    return where(none, 0, a) - where(none, 0, b)


def kl(log_p, log_q):
    """The terms p (log p - log q) of KL(p, q).

    Infinite where q = 0 and p > 0, also for a p that is too small for its dtype.
    """
    p = library(log_p).exp(log_p)
    lost = (p == 0) & (log_p > -INF) & (log_q == -INF)
    return library(log_p).where(lost, INF, product(p, difference(log_p, log_q)))


def log_mixture(log_a, log_b, weight):
    """log(weight * a + (1 - weight) * b)."""
    if weight in (0, 1):
        return log_a if weight else log_b
    xp, none = library(log_a), (log_a == -INF) & (log_b == -INF)
    logs = [type(weight)(x) for x in (np.log(weight), np.log1p(-weight))]
    a, b = (xp.where(none, 0, x) + log for x, log in zip((log_a, log_b), logs, strict=True))
    return xp.where(none, -INF, xp.logaddexp(a, b))


def overlap(x, log_m):
    """p * q / m; 0 where m is 0, as it may be where p is not, if beta is 1."""
    where, none = library(log_m).where, log_m == -INF
    return library(log_m).exp(difference(x.log_p, where(none, 0, log_m)) + where(none, -INF, x.log_q))


def of_p(x):
    """log(beta * p + (1 - beta) * q)."""
    return log_mixture(x.log_p, x.log_q, x.beta)


def of_q(x):
    """log(beta * q + (1 - beta) * p)."""
    return log_mixture(x.log_q, x.log_p, x.beta)


def roots(x):
    return (library(log).exp(log / 2) for log in (x.log_p, x.log_q))


def squared_hellinger(x):
    p, q = roots(x)
    return (p - q) ** 2 / 2


def d_squared_hellinger(x):
    p, q = roots(x)
    return q * (q - p) / 2


DEFINITIONS = {
    "forward_kl": Definition(lambda x: kl(x.log_p, x.log_q), lambda x: -x.p),
    "reverse_kl": Definition(lambda x: kl(x.log_q, x.log_p), lambda x: kl(x.log_q, x.log_p)),
    "jsd": Definition(
        lambda x: x.beta * kl(x.log_p, of_p(x)) + (1 - x.beta) * kl(x.log_q, of_p(x)),
        lambda x: (1 - x.beta) * kl(x.log_q, of_p(x)),
        beta=0.5,
        ends={0: "forward_kl", 1: "reverse_kl"},
    ),
    "skew_forward_kl": Definition(
        lambda x: kl(x.log_p, of_p(x)),
        lambda x: -(1 - x.beta) * overlap(x, of_p(x)),
        beta=0.1,
        ends={0: "forward_kl"},
    ),
    "skew_reverse_kl": Definition(
        lambda x: kl(x.log_q, of_q(x)),
        lambda x: kl(x.log_q, of_q(x)) + (1 - x.beta) * overlap(x, of_q(x)),
        beta=0.1,
        ends={0: "reverse_kl"},
    ),
    "total_variation": Definition(
        lambda x: abs(x.p - x.q) / 2,
        lambda x: x.q * library(x.q).sign(difference(x.log_q, x.log_p)) / 2,
        kinked=True,
    ),
    "squared_hellinger": Definition(squared_hellinger, d_squared_hellinger),
    "mse": Definition(of_logits=True),
    "dkd": Definition(beta=8.0, of_label=True),
}


def resolve(name, beta):
    """``(name, beta)`` with the default filled in; at an end of its range a divergence is another one."""
    definition = DEFINITIONS[name]
    if definition.beta is None:
        return name, None
    beta = definition.beta if beta is None else beta
    return (definition.ends[beta], None) if beta in definition.ends else (name, beta)


# --- From logits ----------------------------------------------------------------------------------------------


def _largest(rows):
    return rows.detach().amax(-1) if isinstance(rows, torch.Tensor) else rows.max(-1)


def log_softmax(logits, temperature):
    """log_softmax of rows, shifted first so that large logits keep their digits; NaN where a row has no softmax."""
    xp, scaled = library(logits), (logits - _largest(logits)[..., None]) / temperature
    too_far = xp.isfinite(logits) & (scaled == -INF)  # a distance that the dtype cannot hold is not infinite
    scaled = xp.where(too_far, xp.finfo(logits.dtype).min, scaled)
    return scaled - xp.log(xp.exp(scaled).sum(-1))[..., None]


def log_sum(logs):
    """log(sum(exp(logs))) of rows; -inf, without a NaN in its gradient, for a row of -inf."""
    xp, top = library(logs), _largest(logs)
    safe = xp.where(xp.isfinite(top), top, 0)
    total = xp.exp(logs - safe[..., None]).sum(-1)
    return xp.where(total == 0, -INF, xp.log(xp.where(total == 0, 1, total))) + safe


def at_label(logits, labels):
    """A mask of the labels' classes, (N, C)."""
    return library(logits).arange(logits.shape[-1]) == labels[..., None]


def log_softmax_of_others(logits, temperature, labels):
    """Over all classes but the label; -inf throughout where these have no mass.

    From the logits, since log-probabilities of -1e30 differ by nothing.
    """
    where = library(logits).where
    others = where(at_label(logits, labels), -INF, logits)
    nothing = (others == -INF).all(-1)[..., None]
    return where(nothing, -INF, log_softmax(where(nothing, 0, others), temperature))


def mean_square(student, teacher):
    """mse of rows; a class that is masked in both differs by 0."""
    return (difference(student, teacher) ** 2).sum(-1) / student.shape[-1]


def decoupled(log_p, log_q, within_p, within_q, labels, beta):
    """dkd of rows: KL of (label, all others), and beta times the KL within the others."""
    xp, label = library(log_q), at_label(log_q, labels)
    binary_p, binary_q = (
        xp.stack([log_sum(xp.where(away, -INF, x)) for away in (~label, label)], -1) for x in (log_p, log_q)
    )
    first, within = kl(binary_p, binary_q).sum(-1), kl(within_p, within_q).sum(-1)
    nothing = (binary_p[..., 1] == -INF) | (log_q.shape[-1] == 2) | (beta == 0)  # among the others, nothing to compare
    return first + xp.where(nothing, 0, beta * xp.where(nothing, 0, within))
