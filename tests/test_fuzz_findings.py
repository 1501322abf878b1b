"""The smallest calls that tests/fuzz_loss has found wrong, on every backend and by the differentiable formula."""

import math

import pytest
import torch
from conftest import every_path

import pydistill
from pydistill.formulas import DIVERGENCES

INF, NAN = math.inf, math.nan
MIXTURES = [name for name, entry in DIVERGENCES.items() if entry.beta is not None and entry.largest_beta == 1]
LOWEST = torch.finfo(torch.float32).min


def by_engine(student, *arguments, **options):
    """(loss, gradient)"""
    student = student.clone().requires_grad_()
    loss = pydistill.distillation_loss(student, *arguments, **options)
    loss.backward()
    return loss.detach(), student.grad


def by_formula(student, *arguments, **options):
    return torch.func.grad_and_value(lambda s: pydistill.distillation_loss(s, *arguments, **options))(student)[::-1]


def by_second_order(student, *arguments, **options):
    student = student.clone().requires_grad_()
    loss = pydistill.distillation_loss(student, *arguments, **options)
    return loss.detach(), torch.autograd.grad(loss, student, create_graph=True)[0].detach()


paths = every_path("formula", "second order")


@pytest.fixture
def compute(path):
    return {"engine": by_engine, "formula": by_formula, "second order": by_second_order}[path]


@paths
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("ignore_index", [2**40, 2**32 + 1, -(2**33)])
def test_ignore_index_beyond_32_bits_is_no_label(compute, dtype, ignore_index):
    labels = torch.tensor([0, 1], dtype=dtype)
    loss, gradient = compute(torch.zeros(2, 2), None, labels, alpha=0.0, ignore_index=ignore_index)
    assert float(loss) == pytest.approx(math.log(2))
    assert gradient.abs().min() > 0
    assert pydistill.loss_items(labels, ignore_index=ignore_index) == (2, 2)
    hidden, weight = torch.ones(2, 1, requires_grad=True), torch.zeros(2, 1)
    loss = pydistill.linear_distillation_loss(hidden, weight, None, labels, alpha=0.0, ignore_index=ignore_index)
    assert float(loss.detach()) == pytest.approx(math.log(2))


def test_negative_label_is_not_an_ignore_index_of_33_bits(variant):
    labels = torch.tensor([-1], dtype=torch.int32)
    with pytest.raises(IndexError, match="row 0 holds -1"):
        pydistill.distillation_loss(torch.zeros(1, 2), None, labels, alpha=0.0, ignore_index=2**32 - 1)


@pytest.mark.parametrize("tail", ["renormalize", "bucket"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_top_k_teacher_of_any_dtype(variant, dtype, tail):
    student, teacher = torch.randn(2, 5), torch.randn(2, 5).to(dtype)
    got = by_engine(student, pydistill.top_k(teacher, 2, tail=tail), alpha=1.0)
    want = by_engine(student, pydistill.top_k(teacher.float(), 2, tail=tail), alpha=1.0)
    torch.testing.assert_close(got, want)


@paths
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_top_k_teacher_in_float64_of_large_logits(compute, dtype):
    """Rounded to float32 the logits had been 5e-4 off their log-partitions, which are float64."""
    student = torch.zeros(1, 3).to(dtype)
    teacher = pydistill.top_k(torch.tensor([[0.0, 9256.9, 9250.1]], dtype=torch.float64), 1, (2.0,))
    options = {"alpha": 1.0, "temperature": 2.0}
    got = compute(student, teacher, **options)
    want = compute(student.double(), teacher, **options)
    tolerance = 1e-5 if dtype is torch.float32 else 1e-2
    torch.testing.assert_close(tuple(x.double() for x in got), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_float16_head_with_large_weights(variant, monkeypatch, reduction):
    """As where products in float16 are native: its gradient had been infinite in them."""
    monkeypatch.setattr("pydistill.engine.head.has_native_products", lambda dtype: True)
    hidden, weight = (torch.randn(shape).half().requires_grad_() for shape in ((3, 4), (5, 4)))
    teacher, labels, w = torch.randn(3, 5), torch.tensor([1, 4, 0]), torch.tensor([9e5, 5e5, 2e3])
    options = {"sample_weight": w, "class_weight": torch.tensor([1.0, 75.0, 0.0, 1.0, 3.0]), "reduction": reduction}
    divisor = w.sum() if reduction == "sum" else 1  # what comes out fits into float16
    loss = pydistill.linear_distillation_loss(hidden, weight, teacher, labels, **options)
    got = torch.autograd.grad(loss / divisor, (hidden, weight))
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    loss = pydistill.distillation_loss(wide[0] @ wide[1].T, teacher, labels, **options)
    for x, y in zip(got, torch.autograd.grad(loss / divisor, wide), strict=True):
        assert (x.double() - y).norm() < 0.01 * y.norm()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_derivative_of_no_items_anywhere(variant, reduction, alpha):
    student = torch.randn(2, 3, requires_grad=True)
    options = (
        {"alpha": alpha, "num_items": 0} if reduction == "mean" else {"alpha": alpha, "sample_weight": torch.zeros(2)}
    )
    loss = pydistill.distillation_loss(student, torch.randn(2, 3), torch.tensor([0, 1]), reduction=reduction, **options)
    assert not torch.autograd.grad(loss.sum(), student, create_graph=True)[0].any()


@paths
@pytest.mark.parametrize("value", [INF, -INF, NAN])
@pytest.mark.parametrize("side", [0, 1])
def test_dkd_of_one_class_without_a_softmax_is_nan(compute, side, value):
    logits = [torch.zeros(1, 1), torch.zeros(1, 1)]
    logits[side].fill_(value)
    loss, gradient = compute(*logits, torch.tensor([0]), divergence="dkd", alpha=1.0)
    assert loss.isnan()
    assert gradient.isnan().all()


@paths
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("side", [0, 1])
def test_row_that_is_nan_is_nan_in_every_class(compute, divergence, side):
    """By the formula the derivative at NaN had been 0 in some classes, or in all."""
    logits = list(torch.randn(2, 3, 4))
    good = compute(*logits, torch.tensor([0, 1, 2]), divergence=divergence, alpha=1.0, reduction="sum")[1]
    logits[side][1, 2] = NAN
    loss, gradient = compute(*logits, torch.tensor([0, 1, 2]), divergence=divergence, alpha=1.0, reduction="sum")
    assert loss.isnan()
    assert gradient[1].isnan().all()
    assert torch.equal(gradient[[0, 2]], good[[0, 2]])


@paths
def test_reverse_kl_of_a_zero_probability(compute):
    student, teacher = torch.zeros(2, 2), torch.tensor([[0.0, -INF], [0.0, 1.0]])
    loss, gradient = compute(student, teacher, divergence="reverse_kl", alpha=1.0)
    assert loss == INF
    assert gradient[0].isnan().all()
    assert gradient[1].isfinite().all()


@paths
@pytest.mark.parametrize("teacher", [[0.0, LOWEST, LOWEST], [LOWEST] * 3, [1.0, LOWEST, 0.0], [LOWEST, 0.0, LOWEST]])
@pytest.mark.parametrize("student", [[0.0, 1.0, 2.0], [LOWEST] * 3])
def test_dkd_of_lowest_logits(compute, teacher, student):
    """finfo.min is a common mask; beside the label it had been taken for no class at all."""
    options = {"divergence": "dkd", "alpha": 1.0, "beta": 2.0, "temperature": 2.0}
    student, teacher, label = torch.tensor([student]), torch.tensor([teacher]), torch.tensor([0])
    loss, gradient = compute(student, teacher, label, **options)
    with pydistill.use_backend("torch"):
        want, exact = by_engine(student.double(), teacher.double(), label, **options)
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tail", ["renormalize", "bucket"])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_total_variation_of_equal_logits_in_top_k(variant, temperature, tail):
    """numba had rounded the student's distances from its maximum to float32, and the teacher's not."""
    logits = torch.randn(50, 4)
    options = {"divergence": "total_variation", "alpha": 1.0, "temperature": temperature}
    loss, gradient = by_engine(logits, pydistill.top_k(logits, 4, (temperature,), tail=tail), **options)
    assert loss == 0
    assert not gradient.any()


def test_cross_entropy_beyond_float32_times_its_weight_within(variant):
    """A row's term is in float64: on numba 4e38, before it was multiplied by 0.1, had been infinite."""
    student, label = torch.tensor([[1e38, -3e38, 0.0]]), torch.tensor([1])
    options = {"alpha": 0.9, "divergence": "jsd"}
    loss, _ = by_engine(student, student.flip(-1), label, **options)
    want, _ = by_engine(student.double(), student.flip(-1).double(), label, **options)
    torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_top_k_of_lowest_logits(variant, k):
    student, teacher = torch.full((1, 4), LOWEST), torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    loss, gradient = by_engine(student, pydistill.top_k(teacher, k), alpha=1.0)
    want, exact = by_engine(torch.zeros(1, 4), pydistill.top_k(teacher, k), alpha=1.0)
    torch.testing.assert_close((loss, gradient), (want, exact))


@paths
def test_dkd_of_two_classes_has_no_gradient_within_the_other(compute):
    """Also for a large beta: a gradient of beta * 2^-24 was left there."""
    student, teacher, label = torch.tensor([[0.3, -0.2]]), torch.tensor([[1.0, 0.4]]), torch.tensor([0])
    want = compute(student, teacher, label, divergence="dkd", alpha=1.0, beta=0.0)
    got = compute(student, teacher, label, divergence="dkd", alpha=1.0, beta=1e6)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_total_variation_of_equal_logits_of_all_classes_in_top_k(variant, dtype):
    logits = torch.randn(200, 7).to(dtype) * 3
    loss, gradient = by_engine(logits, pydistill.top_k(logits, 7), divergence="total_variation", alpha=1.0)
    assert loss == 0
    assert not gradient.any()


def test_mse_of_lowest_logits_agrees(variant):
    student, teacher = torch.zeros(1, 1), torch.full((1, 1), LOWEST)
    _, metrics = pydistill.distillation_loss(student, teacher, divergence="mse", alpha=1.0, return_metrics=True)
    assert metrics.agreement == 1
    student, teacher = torch.full((1, 1500), LOWEST), torch.full((1, 1500), -INF)
    _, metrics = pydistill.distillation_loss(student, teacher, divergence="mse", alpha=1.0, return_metrics=True)
    assert metrics.agreement == 0  # a row of -inf only has no argmax


@paths
@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_term_whose_denominator_is_0_holds_anything(compute, divergence, value):
    student, labels = torch.randn(2, 3), torch.tensor([0, 2])
    teacher = torch.randn(2, 3)
    teacher[0, 1] = value
    got = compute(student, teacher, labels, divergence=divergence, num_items=(0, 7))
    want = compute(student, None, labels, alpha=0.0, num_items=14)
    torch.testing.assert_close(got, want)


@paths
def test_dkd_needs_the_label_of_a_hard_term_without_denominator(compute):
    student, teacher, labels = *torch.randn(2, 2, 5), torch.tensor([2, 1])
    options = {"divergence": "dkd", "temperature": 2.0}
    got = compute(student, teacher, labels, alpha=0.5, num_items=(2, 0), **options)
    want = compute(student, teacher, labels, alpha=1.0, **options)
    torch.testing.assert_close(got, tuple(x / 2 for x in want))


def test_accuracy_of_rows_without_a_term_is_nan(variant):
    options = {"alpha": 1.0, "num_items": (0, 11.5), "return_metrics": True}
    _, metrics = pydistill.distillation_loss(torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([0]), **options)
    assert metrics.accuracy.isnan()
    arguments = (torch.zeros(1, 1), torch.zeros(2, 1), torch.zeros(1, 2), torch.tensor([0]))
    assert pydistill.linear_distillation_loss(*arguments, **options)[1].accuracy.isnan()


@every_path("formula")
def test_row_with_nan_disagrees(path):
    teacher = pydistill.SoftTargets.from_topk(torch.tensor([[0, 1]]), torch.tensor([[0.0, NAN]]), 3)

    def agreement(student):
        return pydistill.distillation_loss(student, teacher, alpha=1.0, return_metrics=True)[1].agreement

    student = torch.zeros(1, 3)
    assert (torch.vmap(agreement)(student.unsqueeze(0)) if path == "formula" else agreement(student)) == 0


@pytest.mark.parametrize("divergence", MIXTURES)
@pytest.mark.parametrize("height", [80.0, 88.0, 89.0, 95.0, 103.0, 110.0])
@pytest.mark.parametrize("beta", [0.1, 0.9, 1.0])
def test_mixtures_of_denormal_probabilities(variant, divergence, height, beta):
    """Two blocks whose maxima differ by so much that a probability is a denormal, or 0, in one of two equal classes."""
    student, teacher = torch.zeros(2, 1, 2049)
    student[0, -1] = teacher[0, 0] = height
    options = {"divergence": divergence, "alpha": 1.0, "beta": beta}
    loss, gradient = by_engine(student, teacher, **options)
    with pydistill.use_backend("torch"):
        want, exact = by_engine(student.double(), teacher.double(), **options)
    torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(gradient.double(), exact, rtol=0, atol=2e-6)


# --- Behind a head --------------------------------------------------------------------------------------------


def test_agreement_of_a_head_without_a_soft_term_is_nan(variant):
    arguments = (torch.zeros(1, 1), torch.zeros(2, 1), None, torch.tensor([-100]))
    options = {"alpha": 0.0, "unlabeled": "distill", "return_metrics": True}
    _, metrics = pydistill.linear_distillation_loss(*arguments, **options)
    assert metrics.agreement.isnan()


@pytest.mark.parametrize("skipped", ["label", "weight", "no term"])
def test_hidden_states_of_a_row_that_does_not_count_hold_anything(variant, skipped):
    hidden, weight = torch.tensor([[NAN], [1.0]], requires_grad=True), torch.zeros(3, 1, requires_grad=True)
    teacher, labels, options = torch.randn(2, 3), torch.tensor([-100, 1]), {}
    if skipped == "weight":
        labels, options = torch.tensor([0, 1]), {"sample_weight": torch.tensor([0.0, 1.0])}
    if skipped == "no term":
        options = {"unlabeled": "distill", "alpha": 0.0}

    def loss(hidden, weight):
        return pydistill.linear_distillation_loss(hidden, weight, teacher, labels, **options)

    want = torch.autograd.grad(loss(hidden, weight), (hidden, weight))
    second = torch.autograd.grad(loss(hidden, weight), (hidden, weight), create_graph=True)
    formula = torch.func.grad(loss, (0, 1))(hidden.detach(), weight.detach())
    for got in (second, formula):
        for x, y in zip(got, want, strict=True):
            assert y.isfinite().all()
            torch.testing.assert_close(x.detach(), y)


@pytest.mark.parametrize("teacher_dtype", [torch.float16, torch.float32, torch.float64])
def test_rows_of_a_head_of_which_some_do_not_count(variant, teacher_dtype):
    hidden, weight = torch.randn(3, 2), torch.randn(4, 2)
    teacher, labels = torch.randn(3, 4).to(teacher_dtype), torch.tensor([-100, 0, 3])
    got = pydistill.linear_distillation_loss(hidden, weight, teacher, labels, reduction="none")
    want = pydistill.distillation_loss(hidden @ weight.T, teacher, labels, reduction="none")
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num_items", [0, (0, 0)])
def test_no_items_anywhere_and_nan_behind_a_head(variant, num_items):
    hidden, weight = torch.tensor([[NAN]], requires_grad=True), torch.zeros(2, 1, requires_grad=True)
    teacher, labels = torch.zeros(1, 2), torch.tensor([1])

    def loss(hidden, weight):
        return pydistill.linear_distillation_loss(hidden, weight, teacher, labels, num_items=num_items)

    for got in (
        torch.autograd.grad(loss(hidden, weight), (hidden, weight)),
        torch.autograd.grad(loss(hidden, weight), (hidden, weight), create_graph=True),
        torch.func.grad(loss, (0, 1))(hidden.detach(), weight.detach()),
    ):
        assert not any(x.any() for x in got)


def test_labels_of_a_head_on_another_device():
    with pytest.raises(ValueError, match="labels and student_logits must be on one device, got labels on meta"):
        pydistill.linear_distillation_loss(
            torch.zeros(1, 1), torch.zeros(2, 1), torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64, device="meta")
        )


def test_head_without_features_is_refused():
    with pytest.raises(ValueError, match=r"student_weight must be \(C, H\) with H of at least 1, got \(2, 0\)"):
        pydistill.linear_distillation_loss(torch.zeros(1, 0), torch.zeros(2, 0), torch.zeros(1, 2), alpha=1.0)
