"""The losses of other libraries, by the formulas in their documentation, against the conversions in docs/losses.md."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import pydistill

T = 2.0


def batch(n=6, c=15, dtype=torch.float64):
    student, teacher = (3 * torch.randn(2, n, c)).to(dtype)
    labels = torch.randint(c, (n,))
    labels[1] = -100
    return student.requires_grad_(), teacher, labels


def assert_same(ours, theirs, student, entropy=0.0):
    got, want = (torch.autograd.grad(loss, student, retain_graph=True)[0] for loss in (ours, theirs))
    torch.testing.assert_close(ours, theirs - entropy, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


def test_torchdistill_weighs_the_hard_term(variant):
    student, teacher, labels = batch()
    labels[1] = 0  # its reduction "batchmean" counts every row
    soft = F.kl_div((student / T).log_softmax(-1), (teacher / T).softmax(-1), reduction="batchmean")
    theirs = 0.3 * F.cross_entropy(student, labels) + 0.7 * T**2 * soft
    ours = pydistill.distillation_loss(student, teacher, labels, temperature=T, alpha=1 - 0.3)
    assert_same(ours, theirs, student)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_trl_generalized_jsd(variant, beta):
    student, teacher, labels = batch()
    log_q, log_p = (student / T).log_softmax(-1), (teacher / T).log_softmax(-1)
    if beta == 0:
        rows = F.kl_div(log_q, log_p, reduction="none", log_target=True)
    elif beta == 1:
        rows = F.kl_div(log_p, log_q, reduction="none", log_target=True)
    else:
        weights = torch.tensor([1 - beta, beta], dtype=torch.float64)
        log_m = torch.logsumexp(torch.stack([log_q + weights[0].log(), log_p + weights[1].log()]), 0)
        rows = beta * F.kl_div(log_m, log_p, reduction="none", log_target=True)
        rows = rows + (1 - beta) * F.kl_div(log_m, log_q, reduction="none", log_target=True)
    kept = labels != -100
    theirs = rows[kept].sum() / kept.sum()
    options = {"divergence": "jsd", "beta": beta, "temperature": T, "t_squared": False, "alpha": 1.0}
    assert_same(pydistill.distillation_loss(student, teacher, labels, **options), theirs, student)


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_liger_fused_linear_jsd(beta):
    """Against the library itself, if it is installed. Its loss takes hidden states."""
    chunked = pytest.importorskip("liger_kernel.chunked_loss")
    hidden = torch.randn(6, 8, requires_grad=True)
    weight, teacher_hidden, teacher_weight = torch.randn(15, 8), torch.randn(6, 8), torch.randn(15, 8)
    labels = torch.randint(15, (6,))
    labels[1] = -100
    loss = chunked.LigerFusedLinearJSDLoss(
        weight_hard_loss=0.5, weight_soft_loss=1.5, beta=beta, temperature=T, compiled=False
    )
    theirs = loss(hidden, weight, teacher_hidden, teacher_weight, labels)
    options = {"divergence": "jsd", "beta": beta, "temperature": T, "t_squared": False, "alpha": 0.75}
    ours = 2 * pydistill.distillation_loss(hidden @ weight.T, teacher_hidden @ teacher_weight.T, labels, **options)
    got, want = (torch.autograd.grad(x, hidden)[0] for x in (ours, theirs))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)


def test_liger_formula(variant):
    student, teacher, labels = batch()
    log_q, log_p = (student / T).log_softmax(-1), (teacher / T).log_softmax(-1)
    m = ((log_q.exp() + log_p.exp()) / 2).log()
    jsd = (log_p.exp() * (log_p - m) + log_q.exp() * (log_q - m)).sum(-1) / 2
    kept = labels != -100
    theirs = (0.5 * F.cross_entropy(student, labels, reduction="sum") + 1.5 * jsd[kept].sum()) / kept.sum()
    options = {"divergence": "jsd", "beta": 0.5, "temperature": T, "t_squared": False, "alpha": 1.5 / 2}
    assert_same(2 * pydistill.distillation_loss(student, teacher, labels, **options), theirs, student)


def test_torchtune_leaves_the_entropy_out(variant):
    student, teacher, labels = batch()
    p = teacher.softmax(-1)
    kept = labels != -100
    theirs = -(p * student.log_softmax(-1)).sum(-1)[kept].sum() / kept.sum()
    entropy = -(p * p.log()).sum(-1)[kept].mean()
    ours = pydistill.distillation_loss(student, teacher, labels, alpha=1.0)
    assert_same(ours, theirs, student, entropy)


def test_distilbert_first_two_terms(variant):
    student, teacher, labels = batch()
    kept = labels != -100
    soft = F.kl_div((student[kept] / T).log_softmax(-1), (teacher[kept] / T).softmax(-1), reduction="batchmean")
    theirs = 5 * T**2 * soft + 2 * F.cross_entropy(student, labels)
    ours = 7 * pydistill.distillation_loss(student, teacher, labels, temperature=T, alpha=5 / 7)
    assert_same(ours, theirs, student)


def test_the_tutorial_divides_by_the_classes_too(variant):
    """It also treats probabilities as logits: its loss is that of pydistill with the probabilities passed as logits."""
    student, teacher, _ = batch()
    probs = teacher.softmax(-1)
    theirs = F.kl_div((student / T).log_softmax(-1), (probs / T).softmax(-1), reduction="mean")
    options = {"temperature": T, "t_squared": False, "alpha": 1.0}
    as_logits = pydistill.SoftTargets.from_logits(probs)
    assert_same(pydistill.distillation_loss(student, as_logits, **options) / student.shape[-1], theirs, student)
    right = pydistill.distillation_loss(student, pydistill.SoftTargets.from_probs(probs), **options)
    torch.testing.assert_close(right, pydistill.distillation_loss(student, teacher, **options), rtol=1e-9, atol=1e-12)


def test_every_divergence_is_on_the_page():
    page = (Path(__file__).parents[1] / "docs" / "losses.md").read_text()
    for name in pydistill.formulas.DIVERGENCES:
        assert f"| `{name}`" in page
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(compile(block, "docs/losses.md", "exec"), {})
