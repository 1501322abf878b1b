"""float64 formulas written from the definitions, apart from the package's own: the oracle of the tests.

Rows are handled one by one in plain Python and torch float64; no code is shared with pydistill.
"""

import math

import torch
import torch.nn.functional as F


def softened(logits, temperature):
    """Log-probabilities of the row at a temperature, in float64; shifted first, or large logits lose digits."""
    z = logits.double()
    z = (z - z.detach().amax(-1, keepdim=True)) / temperature
    return z - torch.logsumexp(z, -1, keepdim=True)


BETA = {"jsd": 0.5, "skew_forward_kl": 0.1, "skew_reverse_kl": 0.1, "dkd": 8.0}  # the defaults of the contract


def kl(log_p, log_q):
    """sum p (log p - log q), 0 where p is 0."""
    p = log_p.exp()
    return (p * (log_p - log_q).masked_fill(p == 0, 0.0)).sum(-1)


def log_mixture(log_p, log_q, weight):
    """log(weight * p + (1 - weight) * q); -inf, without a NaN in its gradient, where both are."""
    if weight in (0, 1):
        return log_p if weight else log_q
    none = (log_p == -math.inf) & (log_q == -math.inf)
    pair = [x.masked_fill(none, 0.0) + math.log(w) for x, w in ((log_p, weight), (log_q, 1 - weight))]
    return torch.logaddexp(*pair).masked_fill(none, -math.inf)


def row_divergence(name, student, teacher, temperature, beta=None, labels=None):
    """D(p, q) per row in nats, from the definitions, with the limits 0 * log 0 = 0."""
    beta = BETA.get(name) if beta is None else beta
    if name == "mse":
        return (student.double() - teacher.double()).masked_fill(student == teacher, 0.0).square().mean(-1)
    log_q, log_p = softened(student, temperature), softened(teacher, temperature)
    p, q = log_p.exp(), log_q.exp()
    if name == "dkd":
        others = F.one_hot(labels.long(), student.shape[-1]) == 0
        if student.shape[-1] == 1:
            return q.sum(-1) * 0
        log_binary = [
            torch.stack([x.masked_fill(away, -math.inf).logsumexp(-1) for away in (others, ~others)], -1)
            for x in (log_p, log_q)
        ]
        binary = kl(*log_binary)
        rest_p, rest_q = (softened(x.double().masked_fill(~others, -math.inf), temperature) for x in (teacher, student))
        weight = rest_p.exp()
        nckd = (weight * (rest_p - rest_q).masked_fill(weight == 0, 0.0)).sum(-1)
        mass = (p * others).sum(-1)
        return binary + beta * torch.where(mass == 0, 0.0, nckd)  # no mass among the others: nothing to compare
    if name == "forward_kl":
        weight, difference = p, log_p - log_q
    elif name == "reverse_kl":
        weight, difference = q, log_q - log_p
    elif name == "jsd":
        log_m = log_mixture(log_p, log_q, beta)
        return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)
    elif name == "skew_forward_kl":
        return kl(log_p, log_mixture(log_p, log_q, beta))
    elif name == "skew_reverse_kl":
        return kl(log_q, log_mixture(log_q, log_p, beta))
    elif name == "total_variation":
        return (p - q).abs().sum(-1) / 2
    elif name == "squared_hellinger":
        return (1 - (log_p / 2 + log_q / 2).exp().sum(-1)).clamp(min=0)
    else:
        raise AssertionError(f"the reference does not know {name}")
    return (weight * difference.masked_fill(weight == 0, 0.0)).sum(-1)


def d_log_q(name, student, teacher, temperature):
    """(h, q): the gradient's soft term is h - q * sum(h), two parts that round on their own.

    Their norms are the size that an error is measured by. For forward_kl they are those of p and q. reverse_kl's h
    grows with the logarithms: rounding its exact gradient to float32 can already exceed 2e-6 of the norms of p and q.
    """
    log_q, log_p = softened(student, temperature), softened(teacher, temperature)
    q = log_q.exp()
    if name == "forward_kl":
        return -log_p.exp(), q
    assert name == "reverse_kl"
    return q * (log_q - log_p + 1).masked_fill(q == 0, 0.0), q


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
    student = student.double()
    n = student.shape[0]
    w = torch.ones(n, dtype=torch.float64) if sample_weight is None else sample_weight.double()
    soft_sum, hard_sum = [], []
    soft_items = hard_items = 0.0
    soft_counted = hard_counted = 0
    for i in range(n):
        labelled = labels is not None and int(labels[i]) != ignore_index
        zero = student[i].detach().new_zeros(())
        soft_i = hard_i = zero
        counts = float(w[i]) != 0 and (labelled or labels is None or unlabeled == "distill")
        if counts and alpha > 0:
            label = None if labels is None else labels[i : i + 1]
            d = row_divergence(divergence, student[i : i + 1], teacher[i : i + 1], temperature, beta, label)[0]
            soft_i = w[i] * d * (temperature**2 if t_squared and divergence != "mse" else 1)
        if counts:
            soft_items, soft_counted = soft_items + float(w[i]), soft_counted + 1
        if counts and labelled:
            y = labels[i : i + 1].long()
            cw = None if class_weight is None else class_weight.double()
            if alpha < 1:
                ce = F.cross_entropy(student[i : i + 1], y, cw, label_smoothing=label_smoothing, reduction="none")[0]
                hard_i = w[i] * ce
            hard_items += float(w[i]) * (1.0 if cw is None else float(cw[y]))
            hard_counted += 1
        soft_sum.append(soft_i)
        hard_sum.append(hard_i)
    if not soft_sum:
        return student.sum() * 0 if reduction != "none" else student.sum(-1)
    soft, hard = torch.stack(soft_sum), torch.stack(hard_sum)
    if reduction != "none":
        soft, hard = soft.sum(), hard.sum()
    if reduction == "mean":
        pair = num_items if isinstance(num_items, tuple) else (num_items, num_items)
        soft = soft / (pair[0] or (soft_items if soft_counted else 1))
        hard = hard / (pair[1] or (hard_items if hard_counted else 1))
    return (alpha * soft if alpha > 0 else 0) + ((1 - alpha) * hard if alpha < 1 else 0)


def loss_and_gradient(student, *args, grad_output=None, **options):
    """(loss, gradient) in float64."""
    leaf = student.detach().double().requires_grad_()
    value = loss(leaf, *args, **options)
    value.backward(torch.ones_like(value) if grad_output is None else grad_output.double())
    return value.detach(), leaf.grad


# DESIGN's bounds, per input dtype of the student: of the loss, of the gradient (before the output's own rounding).
LOSS_BOUND = {torch.float32: 1e-6, torch.bfloat16: 1e-6, torch.float16: 1e-6, torch.float64: 1e-12}
GRADIENT_BOUND = {torch.float32: 2e-6, torch.bfloat16: 2e-6, torch.float16: 2e-6, torch.float64: 1e-12}
ROUNDING = {torch.float32: 0.0, torch.float64: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SMALLEST = {torch.float32: 0.0, torch.float64: 0.0, torch.bfloat16: 0.0, torch.float16: 2.0**-24}


def assert_accurate(
    got_loss, got_gradient, student, teacher, labels, *, temperature, alpha, size_of_parts=False, **options
):
    """Loss and mean-reduced gradient within the bounds of the contract: every row counts once in the scale."""
    want_loss, want_gradient = loss_and_gradient(
        student, teacher, labels, temperature=temperature, alpha=alpha, **options
    )
    dtype = student.dtype
    error = abs(float(got_loss) - float(want_loss))
    assert error <= LOSS_BOUND[dtype] * (abs(float(want_loss)) + alpha * temperature**2), (
        f"loss off by {error:.3g}: {float(got_loss)} instead of {float(want_loss)}"
    )
    if got_gradient is None:
        return
    n = student.shape[0]
    size = 0.0
    if alpha > 0:
        h, q = d_log_q(options.get("divergence", "forward_kl"), student, teacher, temperature)
        parts = (h, q * h.sum(-1, keepdim=True)) if size_of_parts else (q, softened(teacher, temperature).exp())
        size += alpha * temperature * sum(float(part.norm()) for part in parts)
    if alpha < 1:
        onehot = F.one_hot(labels.long(), student.shape[1]).double()
        size += (1 - alpha) * float((softened(student, 1.0).exp() - onehot).norm())
    bound = GRADIENT_BOUND[dtype] * size / n
    rounding = ROUNDING[dtype] * float(want_gradient.norm()) + SMALLEST[dtype] * math.sqrt(want_gradient.numel())
    error = float((got_gradient.double() - want_gradient).norm())
    assert error <= bound + rounding, f"gradient off by {error:.3g}, allowed {bound + rounding:.3g}"


def topk_divergence(name, student, logits, indices, temperature, *, partition=None, beta=None):
    """D over a top-k teacher's classes and the rest, per row: its k classes alone, or with one outcome for the rest."""
    log_q = softened(student, temperature)
    apart = torch.zeros_like(student, dtype=torch.bool).scatter(-1, indices, True)
    rest = log_q.masked_fill(apart, -math.inf).logsumexp(-1, keepdim=True)
    log_q = torch.cat([log_q.gather(-1, indices), rest], -1)
    kept = torch.ones_like(rest)
    if partition is not None:
        kept = (torch.logsumexp(logits.double() / temperature, -1) - partition).exp().clamp(max=1).unsqueeze(-1)
    log_p = torch.cat([softened(logits, temperature) + kept.log(), (1 - kept).log()], -1)
    beta = BETA.get(name) if beta is None else beta
    p, q = log_p.exp(), log_q.exp()
    if name == "forward_kl":
        return kl(log_p, log_q)
    if name == "reverse_kl":
        return kl(log_q, log_p)
    if name == "jsd":
        log_m = log_mixture(log_p, log_q, beta)
        return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)
    if name == "skew_forward_kl":
        return kl(log_p, log_mixture(log_p, log_q, beta))
    if name == "skew_reverse_kl":
        return kl(log_q, log_mixture(log_q, log_p, beta))
    if name == "total_variation":
        return (p - q).abs().sum(-1) / 2
    assert name == "squared_hellinger"
    return (p.sqrt() - q.sqrt()).square().sum(-1) / 2
