"""The soft term of each divergence in plain torch, in the fastest formula found: the baseline for pydistill.

Each function takes (student_logits, teacher_logits, labels, T, beta) and returns the mean over rows, without the
factor T^2.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from pydistill.formulas import DIVERGENCES, log_softened, point


def soft_term(divergence: str) -> Callable[..., torch.Tensor]:
    """Return this module's function for a divergence, or else one made of its definition in pydistill.formulas."""
    return globals().get(divergence) or partial(_defined, DIVERGENCES[divergence].value)


def _defined(value, s, t, y, T, beta):
    return value(point(log_softened(t, T), log_softened(s, T), beta)).sum(-1).mean()


def reverse_kl(s, t, y, T, beta):
    log_q, log_p = F.log_softmax(s / T, -1), F.log_softmax(t / T, -1)
    return (log_q.exp() * (log_q - log_p)).sum(-1).mean()


def _both(s, t, T):
    log_q, log_p = F.log_softmax(s / T, -1), F.log_softmax(t / T, -1)
    return log_p, log_q, log_p.exp(), log_q.exp()


def jsd(s, t, y, T, beta):
    log_p, log_q, p, q = _both(s, t, T)
    log_m = torch.lerp(q, p, beta).log()
    return (beta * p * (log_p - log_m) + (1 - beta) * q * (log_q - log_m)).sum(-1).mean()


def skew_forward_kl(s, t, y, T, beta):
    log_p, _, p, q = _both(s, t, T)
    return (p * (log_p - torch.lerp(q, p, beta).log())).sum(-1).mean()


def skew_reverse_kl(s, t, y, T, beta):
    _, log_q, p, q = _both(s, t, T)
    return (q * (log_q - torch.lerp(p, q, beta).log())).sum(-1).mean()


def total_variation(s, t, y, T, beta):
    return (F.softmax(s / T, -1) - F.softmax(t / T, -1)).abs().sum(-1).mean() / 2


def squared_hellinger(s, t, y, T, beta):
    log_q, log_p = F.log_softmax(s / T, -1), F.log_softmax(t / T, -1)
    return 1 - ((log_q + log_p) / 2).exp().sum(-1).mean()


def mse(s, t, y, T, beta):
    return F.mse_loss(s, t)


def dkd(s, t, y, T, beta):
    label = y.unsqueeze(-1)
    q_label, p_label = (F.softmax(x / T, -1).gather(-1, label) for x in (s, t))
    binary_q, binary_p = (torch.cat([x, 1 - x], -1) for x in (q_label, p_label))
    first = F.kl_div(binary_q.log(), binary_p, reduction="batchmean")
    others_s, others_t = ((x / T).scatter(-1, label, -1000.0) for x in (s, t))
    p = F.softmax(others_t, -1)
    log_q = F.log_softmax(others_s, -1)
    within = (p * (F.log_softmax(others_t, -1) - log_q)).sum(-1).mean()
    return first + beta * within
