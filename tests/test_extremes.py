"""The ends of every range: beta, temperature, sizes of logits and loss; which rows a NaN makes NaN."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import every_path
from fuzz_loss.definitions import DEFINITIONS
from reference import assert_accurate, loss_and_gradient, softened

import pydistill
from pydistill.formulas import DIVERGENCES

INF, NAN = math.inf, math.nan
MIXTURES = [name for name, entry in DIVERGENCES.items() if entry.beta is not None and entry.largest_beta == 1]
SKEWS = [name for name in MIXTURES if DEFINITIONS[name].ends.keys() == {0}]
# Their gradient is bounded in the norms of p and q: that of reverse_kl grows with the logarithms.
BOUNDED = [
    n for n, entry in DIVERGENCES.items() if entry.finite_at_zero and entry.zeros and not DEFINITIONS[n].of_label
]
BETAS = (1e-30, 1e-12, 1e-8, 1e-4, 1e-3, 0.5, 0.999, 1 - 1e-9, 1 - 1e-12)
wide = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


def run(student, teacher=None, labels=None, **options):
    leaf = student.clone().requires_grad_()
    loss = pydistill.distillation_loss(leaf, teacher, labels, **options)
    loss.sum().backward()
    return loss.detach(), leaf.grad


def by_formula(student, teacher=None, labels=None, **options):
    """The same by the differentiable formula, which a functorch transform needs."""

    def loss(s):
        value = pydistill.distillation_loss(s, teacher, labels, **options)
        return value.sum(), value

    gradient, value = torch.func.grad(loss, has_aux=True)(student)
    return value, gradient


both_paths = every_path("formula")


@pytest.fixture
def compute(path):
    return {"engine": run, "formula": by_formula}[path]


# --- beta -----------------------------------------------------------------------------------------------------


@both_paths
@wide
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("divergence", MIXTURES)
def test_beta_near_its_ends_is_accurate(compute, divergence, beta, dtype):
    """1 - (1 - beta) had been 88.03 instead of 18.42 at beta = 1e-8, and NaN for jsd near 1."""
    far = torch.tensor([[0.0, 30.0], [30.0, 0.0], [0.0, -1e4], [0.0, 0.0]], dtype=dtype)
    cases = [(far, far.flip(0)), (far, far.flip(1)), (torch.zeros(1, 2, dtype=dtype), far[2:3])]
    cases += [tuple(scale * torch.randn(2, 3, 700, dtype=dtype)) for scale in (0.5, 3.0, 20.0)]
    tied = torch.zeros(2, 1031, dtype=dtype)
    cases.append((tied, 3 * torch.randn(2, 1031, dtype=dtype)))
    for student, teacher in cases:
        options = {"divergence": divergence, "beta": beta, "alpha": 1.0}
        got = compute(student, teacher, **options)
        if compute is run:
            assert_accurate(*got, student, teacher, **options)
        else:  # in float32 it is torch's own arithmetic
            want, exact = loss_and_gradient(student, teacher, **options)
            tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 1e-12, "atol": 1e-12}
            torch.testing.assert_close(got[0].double(), want, **tolerance)
            torch.testing.assert_close(got[1].double(), exact, **tolerance)


def test_beta_of_1e_8_by_hand(variant):
    student, teacher = torch.tensor([[0.0, 30.0]]), torch.tensor([[30.0, 0.0]])
    for divergence in SKEWS:
        loss = pydistill.distillation_loss(student, teacher, alpha=1.0, divergence=divergence, beta=1e-8)
        assert float(loss) == pytest.approx(8 * math.log(10), rel=1e-5)  # log(1 / beta)


@wide
@both_paths
@pytest.mark.parametrize("divergence", SKEWS)
def test_skew_of_1_is_0(compute, divergence, dtype):
    """The mixture is then one of the two: D is 0, also where the other has no mass."""
    student, teacher = 20 * torch.randn(2, 6, 40, dtype=dtype)
    student[0, 3] = teacher[1, 4] = student[2, 5] = teacher[2, 5] = -INF
    student[3], teacher[3] = torch.linspace(-800, 800, 40), torch.linspace(800, -800, 40)
    options = {"divergence": divergence, "alpha": 1.0, "beta": 1.0, "reduction": "none"}
    loss, gradient = compute(student, teacher, **options)
    bound = 1e-6 if dtype is torch.float32 else 1e-12
    assert loss.abs().max() <= bound * (20 if compute is by_formula else 1)
    assert gradient.abs().max() <= bound


@pytest.mark.parametrize("divergence", MIXTURES)
def test_mixture_of_equal_rows_is_exactly_0(variant, divergence):
    logits = 5 * torch.randn(3, 1100)
    for beta in BETAS:
        loss, gradient = run(logits, logits, alpha=1.0, divergence=divergence, beta=beta)
        assert float(loss) == 0
        assert gradient.abs().max() <= 1e-7


def test_beta_that_float32_cannot_hold():
    for divergence in MIXTURES:
        with pytest.raises(ValueError, match=r"must be 0, which is '.*', or at least 1e-30"):
            pydistill.distillation_loss(
                torch.zeros(1, 2), torch.zeros(1, 2), alpha=1.0, divergence=divergence, beta=1e-31
            )
    tiny = {"divergence": "dkd", "beta": 1e-31, "alpha": 1.0}
    assert pydistill.distillation_loss(torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([0]), **tiny) == 0


# --- Temperature and size -------------------------------------------------------------------------------------


@wide
@pytest.mark.parametrize("temperature", [0.05, 0.3, 20.0, 1000.0])
@pytest.mark.parametrize("divergence", BOUNDED)
def test_extreme_temperatures_are_accurate(variant, divergence, temperature, dtype):
    for scale in (0.1, 3.0, 100.0):
        student, teacher = scale * torch.randn(2, 3, 600, dtype=dtype)
        options = {"divergence": divergence, "temperature": temperature, "alpha": 1.0}
        assert_accurate(*run(student, teacher, **options), student, teacher, **options)


@wide
@pytest.mark.parametrize("temperature", [0.05, 1.0, 4.0, 1000.0])
def test_logits_up_to_the_largest_number(variant, temperature, dtype):
    largest = torch.finfo(dtype).max
    student = torch.tensor([[largest, 0.0, -largest], [0.0, 1.0, 2.0], [-largest] * 3, [1e4, -1e4, 0.0]], dtype=dtype)
    teacher = torch.tensor([[largest, 1.0, 0.0], [3.0, 1.0, -largest], [-largest] * 3, [1e4, 0.0, -1e4]], dtype=dtype)
    labels = torch.tensor([0, 2, 1, 0])
    options = {"temperature": temperature, "t_squared": False, "reduction": "none"}
    loss, gradient = run(student, teacher, labels, **options)
    want, exact = loss_and_gradient(student, teacher, labels, **options)
    rounding = 1e-6 if dtype is torch.float32 else 1e-12
    torch.testing.assert_close(loss.double(), want, rtol=rounding, atol=rounding)
    torch.testing.assert_close(gradient.double(), exact, rtol=10 * rounding, atol=rounding)


@both_paths
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_loss_beyond_float32_is_inf(compute, reduction):
    """finfo.min as a mask: it had been a RuntimeError, after the logits were overwritten in place."""
    student = torch.tensor([[0.0, torch.finfo(torch.float32).min]] * 2)
    teacher, labels = torch.zeros(2, 2), torch.zeros(2, dtype=torch.int64)
    options = {"temperature": 4.0, "alpha": 0.9, "reduction": reduction}
    loss, gradient = compute(student, teacher, labels, **options)
    assert (loss == INF).all()
    assert gradient.isfinite().all()
    assert gradient.abs().max() > 0


def test_metrics_and_gradient_in_place_of_a_loss_beyond_float32(variant):
    student = torch.tensor([[0.0, torch.finfo(torch.float32).min]] * 2)
    teacher, labels = torch.zeros(2, 2), torch.zeros(2, dtype=torch.int64)
    options = {"temperature": 4.0, "alpha": 0.9}
    leaf = student.clone().requires_grad_()
    loss, metrics = pydistill.distillation_loss(leaf * 1, teacher, labels, inplace=True, return_metrics=True, **options)
    assert (float(loss.detach()), float(metrics.soft_loss), float(metrics.hard_loss)) == (INF, INF, 0.0)
    loss.backward()
    assert torch.equal(leaf.grad, run(student, teacher, labels, **options)[1])


def test_sum_over_chunks_beyond_float32_is_inf(variant):
    hidden, weight = torch.eye(2, requires_grad=True), torch.tensor([[0.0, 0.0], [-3e38, -3e38]])
    loss = pydistill.linear_distillation_loss(
        hidden, weight, torch.zeros(2, 2), alpha=1.0, temperature=2.0, reduction="sum", chunk_rows=1
    )
    assert float(loss.detach()) == INF


# --- NaN, and masked classes ----------------------------------------------------------------------------------


@both_paths
@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_dkd_without_its_second_term_and_a_masked_class(compute, alpha):
    """beta = 0 times the infinite KL of a class that only the teacher has: it had been NaN on torch."""
    student, teacher = torch.tensor([[1.0, -INF, 0.5, 0.0]]), torch.tensor([[0.3, 1.0, 0.2, 2.0]])
    options = {"divergence": "dkd", "beta": 0.0, "alpha": alpha}
    loss, gradient = compute(student, teacher, torch.tensor([3]), **options)
    log_p, log_q = softened(teacher, 1.0), softened(student, 1.0)
    p, q = (torch.stack([x[0, 3].exp(), 1 - x[0, 3].exp()]) for x in (log_p, log_q))
    soft = (p * (p / q).log()).sum()
    want = alpha * soft + (1 - alpha) * F.cross_entropy(student.double(), torch.tensor([3]))
    assert float(loss) == pytest.approx(float(want), rel=1e-5)
    assert gradient.isfinite().all()
    assert float(gradient[0, 1]) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("divergence", "tail"), [(name, tail) for name, entry in DIVERGENCES.items() for tail in entry.top_k]
)
@pytest.mark.parametrize(("where", "k"), [("student", 1), ("student", 6), ("teacher", 3), ("teacher", 6)])
def test_top_k_row_without_a_softmax_is_nan_throughout(variant, divergence, tail, dtype, where, k):
    """A student's row of -inf had a gradient of [0, nan], a teacher's NaN none where the student has no mass."""
    student, teacher = torch.randn(2, 3, 6).to(dtype)
    targets = pydistill.top_k(teacher, k, tail=tail)
    whole = run(student, targets, alpha=1.0, divergence=divergence, reduction="none")
    if where == "student":
        student[1] = -INF
    else:
        targets.logits[1] = NAN
        student[1, targets.indices[1]] = -INF
        if k == 6:
            student[1, 0] = 0.0
    loss, gradient = run(student, targets, alpha=1.0, divergence=divergence, reduction="none")
    assert loss[1].isnan()
    assert gradient[1].isnan().all()
    for row in (0, 2):
        assert torch.equal(loss[row], whole[0][row])
        assert torch.equal(gradient[row], whole[1][row])
