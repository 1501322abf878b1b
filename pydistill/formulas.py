"""The divergences: value and derivative of each, in plain array code. This is their specification.

The C++ core (csrc/divergences.hpp), the numba kernels and the torch backend compute the same values. For a pointwise
divergence ``D(p, q) = sum_j value_j`` with ``h_j = d value_j / d log q_j``, the gradient with respect to the
student's logits is ``(h_j - q_j * sum_k h_k) / T``; a divergence therefore needs two expressions.

``p`` is the teacher, ``q`` the student. The same functions run on tensors and, compiled by numba, on scalars.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

DivergenceName = Literal[
    "forward_kl",
    "reverse_kl",
    "jsd",
    "skew_forward_kl",
    "skew_reverse_kl",
    "total_variation",
    "squared_hellinger",
    "mse",
    "dkd",
]


class Point(NamedTuple):
    """Probabilities of teacher (p) and student (q), elementwise, and log q - log p, from the logits.

    ``one_minus_beta`` is rounded once. ``reference`` is a number of the row: the factor of q in h where q is largest. h
    may differ from the derivative by a constant times q, which does not change the gradient.
    """

    p: Any
    q: Any
    log_ratio: Any
    beta: Any
    one_minus_beta: Any
    reference: Any


def point(log_p: Tensor, log_q: Tensor, beta: float | None) -> Point:
    """Make a point from log-probabilities. Where both are -inf (a masked class) the ratio is 1: nothing is NaN."""
    masked = (log_p == -math.inf) & (log_q == -math.inf)
    beta = 0.0 if beta is None else beta
    return Point(log_p.exp(), log_q.exp(), torch.where(masked, 0, log_q - log_p), beta, 1 - beta, 0.0)


def times(weight: Any, x: Any) -> Any:
    """``weight * x``, and 0 where the weight is 0, whatever x is: the limit of ``w log w``."""
    return weight * torch.where(weight == 0, 0, x)


def root(x: Any) -> Any:
    """Square root. Its derivative at 0, which is infinite, is taken as 0: a class with q = 0 gets no gradient."""
    return torch.where(x == 0, 0, torch.where(x == 0, 1, x).sqrt())


class Mixture(NamedTuple):
    """p and q relative to ``m = of_p * p + of_q * q``: log(p / m), log(q / m), p * q / m."""

    log_p: Any
    log_q: Any
    overlap: Any


def mixture(x: Point, of_p: Any, of_q: Any) -> Mixture:
    """p and q relative to their mixture m, from the ratio of the smaller to the larger, so that nothing overflows.

    The weights add up to 1. m divided by the larger of p and q is a sum of two numbers >= 0, so that nothing cancels
    when a weight is tiny. Where p = q the result is exactly 0, 0 and p.
    """
    above = x.log_ratio > 0
    difference = torch.where(above, -x.log_ratio, x.log_ratio)  # log of the smaller of p and q over the larger
    of_larger = torch.where(above, torch.full_like(difference, of_q), torch.full_like(difference, of_p))
    m = difference.exp() - of_larger * torch.expm1(difference)
    larger = -m.clamp(min=torch.finfo(m.dtype).tiny).log()  # clamped, since m is 0 if a weight and p or q are 0
    log_p = larger + torch.where(above, difference, 0)
    log_q = larger + torch.where(above, 0, difference)
    return Mixture(log_p, log_q, times(torch.minimum(x.p, x.q), larger.exp()))


class Softening(Protocol):
    """The options that a divergence depends on."""

    @property
    def divergence(self) -> str:
        """A key of ``DIVERGENCES``."""

    @property
    def beta(self) -> float | None:
        """The divergence's parameter."""

    @property
    def temperature(self) -> float:
        """T > 0."""

    @property
    def t_squared(self) -> bool:
        """Whether the value is multiplied by T^2."""


def _no_sum(x: Point) -> Any:
    raise NotImplementedError("mse and dkd are not sums over classes of a function of p and q")


@dataclass(frozen=True)
class Divergence:
    """One divergence, and what it allows.

    Attributes:
        formula: D(p, q) in words, for the documentation.
        value, d_log_q: value and derivative of a class, functions of its :class:`Point`. mse and dkd are not sums over
            classes of such values.
        beta: default of the parameter; None if there is none. It may be at most ``largest_beta``.
        ends: the divergences that it equals at beta = 0 and at beta = 1, if it equals another one there.
        zeros: whether the teacher's probabilities may be 0.
        pointwise: whether D is a sum over classes of ``value``.
        finite_at_zero: whether D is finite where p = 0 and q > 0; found by evaluating ``value`` there.
        top_k: the values of a top-k teacher's ``tail`` that it supports. With "renormalize" most classes have p = 0.
    """

    formula: str
    value: Callable[[Point], Any]
    d_log_q: Callable[[Point], Any]
    beta: float | None = None
    largest_beta: float = 1.0
    ends: tuple[DivergenceName | None, DivergenceName | None] = (None, None)
    zeros: bool = True
    pointwise: bool = field(init=False, default=False)
    finite_at_zero: bool = field(init=False, default=True)
    top_k: tuple[Literal["renormalize", "bucket"], ...] = field(init=False, default=())

    def __post_init__(self) -> None:
        if self.value is _no_sum:
            return
        object.__setattr__(self, "pointwise", True)
        at_zero = self.value(point(torch.tensor(-math.inf), torch.tensor(0.5).log(), self.beta))
        object.__setattr__(self, "finite_at_zero", math.isfinite(at_zero))
        object.__setattr__(self, "top_k", ("renormalize", "bucket") if self.finite_at_zero else ("bucket",))


DIVERGENCES: dict[str, Divergence] = {
    "forward_kl": Divergence(
        "sum p (log p - log q), the loss of Hinton et al.",
        value=lambda x: -times(x.p, x.log_ratio),
        d_log_q=lambda x: -x.p,
    ),
    "reverse_kl": Divergence(
        "sum q (log q - log p)",
        value=lambda x: times(x.q, x.log_ratio),
        d_log_q=lambda x: times(x.q, x.log_ratio - x.reference),
    ),
    "jsd": Divergence(
        "beta KL(p, m) + (1 - beta) KL(q, m), m = beta p + (1 - beta) q; forward_kl at beta = 0, reverse_kl at 1",
        value=lambda x: (
            x.beta * times(x.p, mixture(x, x.beta, x.one_minus_beta).log_p)
            + x.one_minus_beta * times(x.q, mixture(x, x.beta, x.one_minus_beta).log_q)
        ),
        d_log_q=lambda x: x.one_minus_beta * times(x.q, mixture(x, x.beta, x.one_minus_beta).log_q),
        beta=0.5,
        ends=("forward_kl", "reverse_kl"),
    ),
    "skew_forward_kl": Divergence(
        "KL(p, beta p + (1 - beta) q)",
        value=lambda x: times(x.p, mixture(x, x.beta, x.one_minus_beta).log_p),
        d_log_q=lambda x: -x.one_minus_beta * mixture(x, x.beta, x.one_minus_beta).overlap,
        beta=0.1,
        ends=("forward_kl", None),
    ),
    "skew_reverse_kl": Divergence(
        "KL(q, (1 - beta) p + beta q)",
        value=lambda x: times(x.q, mixture(x, x.one_minus_beta, x.beta).log_q),
        d_log_q=lambda x: (
            times(x.q, mixture(x, x.one_minus_beta, x.beta).log_q - x.reference)
            + x.one_minus_beta * mixture(x, x.one_minus_beta, x.beta).overlap
        ),
        beta=0.1,
        ends=("reverse_kl", None),
    ),
    "total_variation": Divergence(
        "sum abs(p - q) / 2",
        value=lambda x: abs(x.q - x.p) / 2,
        d_log_q=lambda x: times(x.q - x.p, x.q / abs(x.q - x.p)) / 2,
    ),
    "squared_hellinger": Divergence(
        "sum (sqrt p - sqrt q)^2 / 2",
        value=lambda x: (root(x.q) - root(x.p)) ** 2 / 2,
        d_log_q=lambda x: root(x.q) * (root(x.q) - root(x.p)) / 2,
    ),
    "mse": Divergence(
        "mean over classes of (student - teacher)^2 of the logits, without T and T^2",
        _no_sum,
        _no_sum,
        zeros=False,
    ),
    "dkd": Divergence(
        "KL of (label, all others) + beta KL within the others; needs labels at every alpha",
        _no_sum,
        _no_sum,
        beta=8.0,
        largest_beta=math.inf,
    ),
}


def soft_value(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    options: Softening,
    indices: Tensor | None = None,
    log_partitions: Tensor | None = None,
) -> Tensor:
    """Compute the divergence per row, T^2 included, by differentiable torch operations.

    ``teacher`` has the logits of all classes or, with ``indices``, of these classes. Only dkd uses ``labels``.
    """
    if options.divergence == "mse":
        masked = (student == -math.inf) & (teacher == -math.inf)
        return torch.where(masked, 0, student - teacher).square().mean(-1)
    units = options.temperature**2 if options.t_squared else 1
    if options.divergence == "dkd":
        assert labels is not None
        assert options.beta is not None
        return units * dkd(student, teacher, labels, options.temperature, options.beta)
    if indices is None:
        log_p, log_q = log_softened(teacher, options.temperature), log_softened(student, options.temperature)
    else:
        log_p, log_q, _ = outcomes(student, teacher, indices, log_partitions, options.temperature)
    values: Tensor = DIVERGENCES[options.divergence].value(point(log_p, log_q, options.beta))
    return units * values.sum(-1)


def outcomes(
    student: Tensor, teacher: Tensor, indices: Tensor, log_partitions: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of a top-k teacher's classes and, last, of the rest: ``(log_p, log_q, log_q of each class)``.

    Without a log-partition the rest has p = 0. At p = 0 every finite divergence is proportional to q, so one outcome
    stands for all of its classes.
    """
    log_q = log_softened(student, temperature)
    apart = torch.zeros_like(student, dtype=torch.bool).scatter(-1, indices, True)
    rest = log_q.masked_fill(apart, -math.inf) if indices.shape[-1] < student.shape[-1] else log_q[..., :0] - math.inf
    rest = _log_sum_exp(rest)
    log_p = log_softened(teacher, temperature)
    log_p_rest = torch.where(log_p.isnan().any(-1), math.nan, torch.full_like(rest, -math.inf))
    if log_partitions is not None:
        top = (teacher / temperature).logsumexp(-1)
        less = (top.double() - log_partitions).clamp(max=0)
        log_p_rest = torch.log(-torch.expm1(less)).to(rest.dtype)
        log_p = log_p + (top.double() - log_partitions).to(rest.dtype).unsqueeze(-1)
    of_top = torch.cat([log_p, log_p_rest.unsqueeze(-1)], -1)
    return of_top, torch.cat([log_q.gather(-1, indices), rest.unsqueeze(-1)], -1), log_q


def dkd(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float, beta: float) -> Tensor:
    """KL divergence of (label, all others), plus beta times the one within the others, in log space."""
    if student.shape[-1] == 1:  # 0, but NaN for a logit that is not finite
        return (log_softened(student, temperature) * log_softened(teacher, temperature)).sum(-1)
    of_label = F.one_hot(labels, student.shape[-1]).bool()
    parts = []
    for logits in (teacher, student):
        shifted = (logits - logits.detach().amax(-1, keepdim=True)) / temperature
        others = shifted.masked_fill(of_label, -math.inf)
        odds = shifted.gather(-1, labels.unsqueeze(-1)).squeeze(-1) - _log_sum_exp(others)
        parts.append((odds, log_within_others(logits, of_label, temperature)))
    (p_odds, log_p), (q_odds, log_q) = parts
    first: Tensor = sum(
        -times(torch.sigmoid(sign * p_odds), F.logsigmoid(sign * q_odds) - F.logsigmoid(sign * p_odds))
        for sign in (1, -1)
    )
    if beta == 0:  # 0 times the infinite KL of a masked class would be NaN
        return first
    within = point(log_p, log_q, None)
    second: Tensor = times(within.p, within.log_ratio).sum(-1)
    return first - beta * second


def log_within_others(logits: Tensor, of_label: Tensor, temperature: float) -> Tensor:
    """Log-probabilities among the classes other than the label; all -inf where those have no mass."""
    others = logits.masked_fill(of_label, -math.inf)
    nothing = (others == -math.inf).all(-1, keepdim=True)
    return torch.where(nothing, -math.inf, log_softened(torch.where(nothing, 0, others), temperature))


def _log_sum_exp(x: Tensor) -> Tensor:
    """Return logsumexp; -inf, without a gradient, where there is nothing to sum."""
    if x.shape[-1] == 0:
        return x.sum(-1) - math.inf
    nothing = (x == -math.inf).all(-1)
    return torch.where(nothing, -math.inf, torch.where(nothing.unsqueeze(-1), 0, x).logsumexp(-1))


def log_softened(logits: Tensor, temperature: float) -> Tensor:
    """``log_softmax(logits / T)``. Shifted before the division, whose rounding error would be 1e-5 at 10,000."""
    return ((logits - logits.detach().amax(-1, keepdim=True)) / temperature).log_softmax(-1)


def loss_dtype(student: Tensor) -> torch.dtype:
    """Return the loss's dtype: float64 for float64 logits, float32 for all others."""
    return torch.float64 if student.dtype == torch.float64 else torch.float32
