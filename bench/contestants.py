"""Who is compared: functions of (student, teacher, labels) that return the loss, T and alpha fixed.

The first two are what people write. Soft cross-entropy has the gradient of the KL divergence without kl_div's xlogy:
it is the best form of eager torch, so every claim of speed is made against it too.
"""

import torch
import torch.nn.functional as F

import pydistill

TEMPERATURE, ALPHA = 4.0, 0.7
WEIGHT = ALPHA * TEMPERATURE**2


def kl_div(s, t, y):
    log_q, p = F.log_softmax(s / TEMPERATURE, -1), F.softmax(t / TEMPERATURE, -1)
    return WEIGHT * F.kl_div(log_q, p, reduction="batchmean") + (1 - ALPHA) * F.cross_entropy(s, y)


def soft_cross_entropy(s, t, y):
    soft = F.cross_entropy(s / TEMPERATURE, F.softmax(t / TEMPERATURE, -1))
    return WEIGHT * soft + (1 - ALPHA) * F.cross_entropy(s, y)


def fused(s, t, y):
    return pydistill.distillation_loss(s, t, y, temperature=TEMPERATURE, alpha=ALPHA)


def fused_inplace(s, t, y):
    return pydistill.distillation_loss(s, t, y, temperature=TEMPERATURE, alpha=ALPHA, inplace=True)


CONTESTANTS = {
    "kl_div + cross_entropy": kl_div,
    "soft cross_entropy + cross_entropy": soft_cross_entropy,
    "torch.compile(kl_div + cross_entropy)": torch.compile(kl_div),
    "torch.compile(soft + cross_entropy)": torch.compile(soft_cross_entropy),
    "pydistill": fused,
    "pydistill, inplace=True": fused_inplace,
}


def forward_backward(loss, logits, teacher, labels):
    """The gradient with respect to the logits, into fresh memory where the contestant allocates it."""
    return torch.autograd.grad(loss(logits, teacher, labels), logits)[0]
