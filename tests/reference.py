"""The whole loss in torch's float64, written from the definitions, apart from the package: the oracle of the tests.

The divergences are those of fuzz_loss/definitions.py; no code is shared with pydistill.
"""

import functools
import hashlib
import math

import torch
import torch.nn.functional as F
from fuzz_loss.definitions import (
    DEFINITIONS,
    INF,
    Outcomes,
    decoupled,
    log_softmax,
    log_softmax_of_others,
    log_sum,
    mean_square,
    resolve,
)


def softened(logits, temperature):
    """Log-probabilities at a temperature, in float64."""
    return log_softmax(logits.double(), temperature)


def row_divergence(name, student, teacher, temperature, beta=None, labels=None):
    """D(p, q) per row in nats."""
    name, beta = resolve(name, beta)
    definition, student, teacher = DEFINITIONS[name], student.double(), teacher.double()
    if definition.of_logits:
        return mean_square(student, teacher)
    log_q, log_p = softened(student, temperature), softened(teacher, temperature)
    if definition.of_label:
        within_q, within_p = (log_softmax_of_others(x, temperature, labels) for x in (student, teacher))
        return decoupled(log_p, log_q, within_p, within_q, labels, beta)
    return definition.terms(Outcomes(log_p, log_q, beta)).sum(-1)


def loss(
    student,
    teacher=None,
    labels=None,
    *,
    divergence="forward_kl",
    beta=None,
    temperature=1.0,
    alpha=0.5,
    t_squared=True,
    ignore_index=-100,
    unlabeled="skip",
    sample_weight=None,
    class_weight=None,
    label_smoothing=0.0,
    reduction="mean",
    num_items=None,
):
    """The loss of ``(N, C)`` logits in float64, differentiable in the student."""
    student, n = student.double(), len(student)
    w = torch.ones(n, dtype=torch.float64) if sample_weight is None else sample_weight.double()
    labelled = torch.zeros(n, dtype=torch.bool) if labels is None else labels.long() != ignore_index
    soft_rows, hard_rows = [], []  # numbers of the rows that count
    for i in range(n):
        if float(w[i]) != 0 and (labelled[i] or labels is None or unlabeled == "distill"):
            soft_rows.append(i)
        if float(w[i]) != 0 and labelled[i]:
            hard_rows.append(i)
    cw = None if class_weight is None else class_weight.double()
    y = None if labels is None else labels[hard_rows].long()
    soft_items = float(w[soft_rows].sum()) if soft_rows else 1
    hard_items = float((w[hard_rows] * (1 if cw is None else cw[y])).sum()) if hard_rows else 1
    soft, hard = (student.new_zeros(n) for _ in range(2))
    if alpha > 0 and soft_rows:
        own = None if labels is None else labels[soft_rows].long()
        d = row_divergence(divergence, student[soft_rows], teacher[soft_rows], temperature, beta, own)
        units = temperature**2 if t_squared and not DEFINITIONS[divergence].of_logits else 1
        soft = soft.index_put((torch.tensor(soft_rows),), w[soft_rows] * d * units)
    if alpha < 1 and hard_rows:
        ce = F.cross_entropy(student[hard_rows], y, cw, label_smoothing=label_smoothing, reduction="none")
        hard = hard.index_put((torch.tensor(hard_rows),), w[hard_rows] * ce)
    if not soft.requires_grad and not hard.requires_grad and student.requires_grad:
        soft = soft + 0 * student[:0].sum()  # on the graph, with a gradient of 0
    if reduction != "none":
        soft, hard = soft.sum(), hard.sum()
    if reduction == "mean":
        pair = num_items if isinstance(num_items, tuple) else (num_items, num_items)
        soft, hard = soft / (pair[0] or soft_items), hard / (pair[1] or hard_items)
    return (alpha * soft if alpha > 0 else 0) + ((1 - alpha) * hard if alpha < 1 else 0)


def remembers(function, results=128):
    """A function of tensors and options that keeps its last results: the variants ask for the same one in turn."""
    kept = {}

    def key(x):
        if isinstance(x, tuple | list):
            return tuple(map(key, x))
        if not isinstance(x, torch.Tensor):
            return x
        digits = x.detach().contiguous().view(-1).view(torch.uint8).numpy()
        return x.dtype, x.shape, hashlib.sha1(digits).digest()

    @functools.wraps(function)
    def remembering(*args, **options):
        asked = tuple(map(key, args)), tuple((name, key(x)) for name, x in sorted(options.items()))
        if asked not in kept:
            if len(kept) == results:
                del kept[next(iter(kept))]
            kept[asked] = function(*args, **options)
        return tuple(x.clone() if isinstance(x, torch.Tensor) else x for x in kept[asked])

    return remembering


@remembers
def loss_and_gradient(student, *args, grad_output=None, **options):
    """(loss, gradient) in float64."""
    leaf = student.detach().double().requires_grad_()
    value = loss(leaf, *args, **options)
    value.backward(torch.ones_like(value) if grad_output is None else grad_output.double())
    return value.detach(), leaf.grad


# The contract's bounds, per dtype of the student: of the loss, and of the gradient before its own rounding.
LOSS_BOUND = {torch.float32: 1e-6, torch.bfloat16: 1e-6, torch.float16: 1e-6, torch.float64: 1e-12}
GRADIENT_BOUND = {torch.float32: 2e-6, torch.bfloat16: 2e-6, torch.float16: 2e-6, torch.float64: 1e-12}
ROUNDING = {torch.float32: 0.0, torch.float64: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SMALLEST = {torch.float32: 0.0, torch.float64: 0.0, torch.bfloat16: 0.0, torch.float16: 2.0**-24}


def assert_accurate(got_loss, got_gradient, student, teacher, labels=None, **options):
    """Loss and mean-reduced gradient within the bounds of the contract; every row has a weight of 1 / N."""
    want_loss, want_gradient, loss_bound, gradient_bound = _within(student, teacher, labels, **options)
    error = abs(float(got_loss) - float(want_loss))
    assert error <= loss_bound, f"loss {float(got_loss)} instead of {float(want_loss)}, off by more than {loss_bound}"
    if got_gradient is not None:
        error = float((got_gradient.double() - want_gradient).norm())
        assert error <= gradient_bound, f"gradient off by {error:.3g}, allowed {gradient_bound:.3g}"


@remembers
def _within(student, teacher, labels, *, temperature=1.0, alpha=0.5, size_of_parts=False, **options):
    """(loss, gradient, bound of the loss, bound of the gradient).

    ``size_of_parts``: the soft gradient is measured by the two parts whose difference it is, which round on their own.
    """
    loss, gradient = loss_and_gradient(student, teacher, labels, temperature=temperature, alpha=alpha, **options)
    dtype, size, unsettled = student.dtype, 0.0, 0.0
    definition, beta = DEFINITIONS[options.get("divergence", "forward_kl")], options.get("beta")
    if definition.of_logits:
        temperature = 1.0
    if alpha > 0 and definition.of_logits:
        size = alpha * 2 * float((student.double() - teacher.double()).norm()) / student.shape[-1]
    elif alpha > 0:
        log_q, log_p = softened(student, temperature), softened(teacher, temperature)
        parts = [log_q.exp(), log_p.exp()]
        if size_of_parts:
            h = definition.d_log_q(Outcomes(log_p, log_q, beta))
            parts = [h, log_q.exp() * h.sum(-1, keepdim=True)]
        size = alpha * temperature * sum(float(part.norm()) for part in parts)
        if definition.kinked:
            unsettled = alpha * temperature * float(_of_unsettled_sign(log_p, log_q, dtype).norm())
        if definition.of_label:  # the second term has a distribution of its own
            size *= 1 + (definition.beta if beta is None else beta)
    if alpha < 1:
        onehot = F.one_hot(labels.long(), student.shape[1]).double()
        size += (1 - alpha) * float((softened(student, 1.0).exp() - onehot).norm())
    loss_bound = LOSS_BOUND[dtype] * (abs(float(loss)) + alpha * temperature**2)
    rounding = ROUNDING[dtype] * float(gradient.norm()) + SMALLEST[dtype] * math.sqrt(gradient.numel())
    return loss, gradient, loss_bound, (GRADIENT_BOUND[dtype] * size + unsettled) / len(student) + rounding


def _of_unsettled_sign(log_p, log_q, dtype):
    """q where p and q are so close that rounding the logarithms decides on the sign of q - p, and 0 elsewhere."""
    ulp = 2.0**-53 if dtype == torch.float64 else 2.0**-24
    size = 1 + log_p.abs() + log_q.abs()
    return log_q.exp() * ((log_q - log_p).abs() <= 8 * ulp * size)


def topk_divergence(name, student, logits, indices, temperature, *, partition=None, beta=None):
    """D over a top-k teacher's classes and the rest, per row: its k classes alone, or with one outcome for the rest."""
    name, beta = resolve(name, beta)
    log_q = softened(student, temperature)
    listed = torch.zeros_like(student, dtype=torch.bool).scatter(-1, indices, True)
    rest = log_sum(log_q.masked_fill(listed, -INF)).unsqueeze(-1)
    log_q = torch.cat([log_q.gather(-1, indices), rest], -1)
    kept = torch.ones_like(rest)
    if partition is not None:
        kept = (torch.logsumexp(logits.double() / temperature, -1) - partition).exp().clamp(max=1).unsqueeze(-1)
    log_p = torch.cat([softened(logits, temperature) + kept.log(), (1 - kept).log()], -1)
    return DEFINITIONS[name].terms(Outcomes(log_p, log_q, beta)).sum(-1)
