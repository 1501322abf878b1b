"""Every divergence in the registry, on every backend and ISA: definitions, edges, parameters, weights, metrics."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import BACKENDS
from fuzz_loss.definitions import DEFINITIONS, kl
from reference import assert_accurate, loss_and_gradient, row_divergence, softened
from torch.autograd import gradcheck, gradgradcheck

import pydistill
from pydistill.formulas import DIVERGENCES

every_divergence = pytest.mark.parametrize("divergence", DIVERGENCES)
TEMPERED = [name for name, definition in DEFINITIONS.items() if not definition.of_logits]
BETA = {name: definition.beta for name, definition in DEFINITIONS.items() if definition.beta is not None}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# Students far from the teacher, near to it, flat, and with classes of very different sizes; C around vector widths
# and block edges.
CASES = [
    (1, 2.0, 1.0),
    (2, 1.0, 1.0),
    (7, 2.5, 3.0),
    (33, 4.0, 3.0),
    (130, 0.5, 2.0),
    (513, 20.0, 3.0),
    (1100, 2.0, 4.0),
]


def inputs(n, c, scale=3.0, dtype=torch.float32, near=False):
    teacher = scale * torch.randn(n, c)
    student = teacher + 0.01 * torch.randn(n, c) if near else scale * torch.randn(n, c)
    return student.to(dtype), teacher.to(dtype), torch.randint(c, (n,))


def computed(student, *args, **options):
    leaf = student.clone().requires_grad_()
    loss = pydistill.distillation_loss(leaf, *args, **options)
    loss.sum().backward()
    return loss.detach(), leaf.grad


@every_divergence
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("near", [False, True])
def test_value_and_gradient_are_as_defined(variant, divergence, dtype, near):
    for i, (c, temperature, scale) in enumerate(CASES):
        alpha = (0.7, 1.0)[(i + near) % 2]
        student, teacher, labels = inputs(3, c, scale, dtype, near)
        options = {"divergence": divergence, "temperature": temperature, "alpha": alpha}
        assert_accurate(*computed(student, teacher, labels, **options), student, teacher, labels, **options)


@every_divergence
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_and_ignored_rows_count_as_defined(variant, divergence, dtype):
    student, teacher, labels = inputs(6, 40, dtype=dtype)
    labels[1] = -100
    options = {"divergence": divergence, "temperature": 2.5, "alpha": 0.6, "label_smoothing": 0.1}
    options |= {"sample_weight": torch.tensor([1.0, 2, 0, 0.5, 3, 1]), "class_weight": torch.rand(40) + 0.5}
    for reduction in ("mean", "sum", "none"):
        got = computed(student, teacher, labels, reduction=reduction, **options)
        want, gradient = loss_and_gradient(student, teacher, labels, reduction=reduction, **options)
        tight = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-11, "atol": 1e-12}
        torch.testing.assert_close(got[0].double(), want, **tight)
        torch.testing.assert_close(got[1].double(), gradient, **tight)
        assert (got[1][1] == 0).all()
        assert (got[1][2] == 0).all()


@every_divergence
def test_metrics_of_the_same_pass(variant, divergence):
    student, teacher, labels = inputs(40, 12)
    teacher[:20] = student[:20] + 0.1
    options = {"divergence": divergence, "temperature": 2.0, "alpha": 0.7}
    loss, metrics = pydistill.distillation_loss(student, teacher, labels, return_metrics=True, **options)
    torch.testing.assert_close(loss, pydistill.distillation_loss(student, teacher, labels, **options))
    torch.testing.assert_close(loss, 0.7 * metrics.soft_loss + 0.3 * metrics.hard_loss)
    assert float(metrics.agreement) == pytest.approx((student.argmax(-1) == teacher.argmax(-1)).float().mean().item())
    assert float(metrics.accuracy) == pytest.approx((student.argmax(-1) == labels).float().mean().item())


@every_divergence
def test_equal_rows_are_exactly_0(variant, divergence):
    for c, temperature in ((2, 1.0), (50, 3.0), (1100, 2.0)):
        student, _, labels = inputs(4, c)
        options = {"divergence": divergence, "temperature": temperature, "alpha": 1.0}
        loss, gradient = computed(student, student.clone(), labels, **options)
        assert loss == 0
        assert gradient.abs().max() < 1e-6


@pytest.mark.parametrize("divergence", TEMPERED)
def test_huge_logits_are_finite_and_right(variant, divergence):
    """1e4 apart: finite, and right."""
    student, teacher, labels = inputs(3, 20)
    for shift in (1e4, -1e4):
        student[:, 3], teacher[:, 5] = shift, -shift
        options = {"divergence": divergence, "temperature": 2.0, "alpha": 1.0}
        loss, gradient = computed(student, teacher, labels, **options)
        want, exact = loss_and_gradient(student, teacher, labels, **options)
        assert gradient.isfinite().all()
        torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gradient.double(), exact, rtol=1e-4, atol=2e-4 * max(1, exact.abs().max().item()))


@every_divergence
def test_class_masked_in_both_does_not_exist(variant, divergence):
    student, teacher, labels = inputs(3, 9)
    labels[:] = 4
    options = {"divergence": divergence, "temperature": 2.0, "alpha": 1.0}
    student[:, 7] = teacher[:, 7] = -math.inf
    loss, gradient = computed(student, teacher, labels, **options)
    keep = [j for j in range(9) if j != 7]
    want, exact = computed(student[:, keep], teacher[:, keep], labels, **options)
    if DEFINITIONS[divergence].of_logits:  # the mean is over all classes
        want, exact = want * 8 / 9, exact * 8 / 9
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient[:, keep], exact, rtol=1e-5, atol=1e-6)
    assert (gradient[:, 7] == 0).all()


@every_divergence
def test_class_masked_in_the_student_alone(variant, divergence):
    """The loss is infinite or the limit, as defined; the gradient is finite, except that of an infinite square."""
    student, teacher, labels = inputs(3, 9)
    labels[:] = 4
    student[0, 7] = -math.inf
    options = {"divergence": divergence, "temperature": 2.0, "alpha": 1.0, "reduction": "none"}
    loss, gradient = computed(student, teacher, labels, **options)
    want, _ = loss_and_gradient(student, teacher, labels, **options)
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-5)
    assert gradient[DEFINITIONS[divergence].of_logits :].isfinite().all()


@every_divergence
@pytest.mark.parametrize("classes", [2, 3, 40, 1200])
def test_nan_and_infinity_spoil_their_row_alone(variant, divergence, classes):
    options = {"divergence": divergence, "temperature": 2.0, "alpha": 1.0, "reduction": "none"}
    for bad, spoiled, at in itertools.product((math.nan, math.inf), ("student", "teacher"), (0, classes - 1)):
        student, teacher, labels = inputs(3, classes)
        labels[:] = 0
        (student if spoiled == "student" else teacher)[1, at] = bad
        loss, gradient = computed(student, teacher, labels, **options)
        assert loss[[0, 2]].isfinite().all()
        assert gradient[[0, 2]].isfinite().all()
        if DEFINITIONS[divergence].of_logits and bad == math.inf:
            assert loss[1] == math.inf  # the square of an infinite difference, as in torch
        else:
            assert loss[1].isnan()
            assert gradient[1].isnan().any()
            assert classes == 2 or gradient[1].isnan().all()


@pytest.mark.parametrize("divergence", [n for n, entry in DIVERGENCES.items() if entry.zeros and entry.finite_at_zero])
def test_teacher_with_probabilities_of_0(variant, divergence):
    """The value is the limit, and finite."""
    student, _, labels = inputs(4, 6)
    probs = torch.tensor(
        [[0.5, 0.5, 0, 0, 0, 0], [1.0, 0, 0, 0, 0, 0], [0, 0.2, 0.2, 0.2, 0.2, 0.2], [0, 0, 0, 0, 0.1, 0.9]]
    )
    labels[:] = torch.tensor([0, 0, 1, 5])
    options = {"divergence": divergence, "temperature": 2.0, "alpha": 1.0, "reduction": "none"}
    loss, gradient = computed(student, pydistill.SoftTargets.from_probs(probs), labels, **options)
    want = row_divergence(divergence, student, probs.double().log(), 2.0, labels=labels)
    assert want.isfinite().all()
    torch.testing.assert_close(loss.double(), 4 * want, rtol=1e-5, atol=1e-5)
    assert gradient.isfinite().all()
    torch.testing.assert_close(gradient.sum(-1), torch.zeros(4), rtol=0, atol=1e-5)


def test_limits_in_one_class(variant):
    """A class with p = 0, by hand."""
    q = torch.tensor([0.25, 0.75])
    student, teacher = q.log().unsqueeze(0), torch.tensor([[-math.inf, 0.0]])
    p = torch.tensor([0.0, 1.0])

    def value(divergence, beta=None):
        return float(pydistill.distillation_loss(student, teacher, divergence=divergence, beta=beta, alpha=1.0))

    beta = 0.3
    m = beta * p + (1 - beta) * q
    assert value("forward_kl") == pytest.approx(math.log(1 / 0.75), rel=1e-6)
    first = (1 - beta) * 0.25 * math.log(1 / (1 - beta))
    rest = beta * math.log(1 / m[1]) + (1 - beta) * 0.75 * math.log(0.75 / m[1])
    assert value("jsd", beta) == pytest.approx(first + rest, rel=1e-6)
    assert value("skew_forward_kl", beta) == pytest.approx(math.log(1 / m[1]), rel=1e-6)
    skewed = (1 - beta) * p + beta * q
    want = 0.25 * math.log(1 / beta) + 0.75 * math.log(0.75 / skewed[1])
    assert value("skew_reverse_kl", beta) == pytest.approx(want, rel=1e-6)
    assert value("total_variation") == pytest.approx(0.25, rel=1e-6)
    assert value("reverse_kl") == math.inf


class TestBeta:
    """The parameter: defaults, ends, ranges."""

    @pytest.mark.parametrize("divergence", BETA)
    def test_default(self, variant, divergence):
        student, teacher, labels = inputs(4, 10)
        options = {"divergence": divergence, "alpha": 1.0}
        given = pydistill.distillation_loss(student, teacher, labels, beta=BETA[divergence], **options)
        assert pydistill.distillation_loss(student, teacher, labels, **options) == given
        assert pydistill.distillation_loss(student, teacher, labels, beta=BETA[divergence] / 2, **options) != given

    @pytest.mark.parametrize(
        ("divergence", "beta", "same"),
        [(name, beta, other) for name, entry in DEFINITIONS.items() for beta, other in entry.ends.items()],
    )
    def test_ends_are_other_divergences(self, variant, divergence, beta, same):
        student, teacher, _ = inputs(4, 10)
        got = computed(student, teacher, divergence=divergence, beta=beta, alpha=1.0)
        want = computed(student, teacher, divergence=same, alpha=1.0)
        assert got[0] == want[0]
        assert torch.equal(got[1], want[1])

    @pytest.mark.parametrize("divergence", [n for n, entry in DEFINITIONS.items() if entry.ends.keys() == {0}])
    def test_a_full_skew_is_0(self, variant, divergence):
        student, teacher, _ = inputs(4, 10)
        loss, gradient = computed(student, teacher, divergence=divergence, beta=1.0, alpha=1.0)
        assert float(loss) == pytest.approx(0, abs=1e-6)
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-6)

    @pytest.mark.parametrize("beta", [0.05, 0.3, 0.9])
    @pytest.mark.parametrize("divergence", BETA)
    def test_values_between(self, variant, divergence, beta):
        student, teacher, labels = inputs(5, 30)
        options = {"divergence": divergence, "temperature": 2.0, "alpha": 0.8, "beta": beta}
        assert_accurate(*computed(student, teacher, labels, **options), student, teacher, labels, **options)

    @pytest.mark.parametrize(
        ("divergence", "beta"),
        [("jsd", -0.1), ("jsd", 1.1), ("skew_forward_kl", math.nan), ("dkd", -1.0), ("dkd", math.inf), ("mse", 0.5)],
    )
    def test_outside_its_range(self, divergence, beta):
        student, teacher, labels = inputs(2, 3)
        with pytest.raises(ValueError, match=f"beta.*{divergence}"):
            pydistill.distillation_loss(student, teacher, labels, divergence=divergence, beta=beta)


class TestDkd:
    """TCKD + beta * NCKD."""

    def test_needs_labels_at_every_alpha(self):
        student, teacher, _ = inputs(2, 3)
        with pytest.raises(ValueError, match="labels must be given with divergence='dkd'"):
            pydistill.distillation_loss(student, teacher, divergence="dkd", alpha=1.0)

    def test_refuses_unlabelled_rows(self):
        with pytest.raises(ValueError, match=r"dkd.*, which needs the label"):
            pydistill.distillation_loss(*inputs(2, 3), divergence="dkd", unlabeled="distill")

    def test_beta_of_the_other_classes_mass_is_forward_kl(self, variant):
        """KL = TCKD + (1 - p_label) NCKD: with beta = 1 - p_label the two are one."""
        student, teacher, labels = inputs(1, 30)
        p_rest = 1 - float(softened(teacher, 1.0).exp()[0, labels[0]])
        got = computed(student, teacher, labels, divergence="dkd", beta=p_rest, alpha=1.0)
        want = computed(student, teacher, labels, alpha=1.0)
        torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=1e-6)

    def test_two_classes_have_no_second_part(self, variant):
        student, teacher, labels = inputs(5, 2)
        want = float(pydistill.distillation_loss(student, teacher, labels, alpha=1.0))
        for beta in (0.0, 8.0):
            got = pydistill.distillation_loss(student, teacher, labels, divergence="dkd", beta=beta, alpha=1.0)
            assert float(got) == pytest.approx(want, rel=1e-5)

    def test_a_confident_teacher_keeps_the_digits_of_the_others(self, variant):
        """1 - p_label is 1e-9: taken by subtraction it would be 0."""
        student, teacher, labels = inputs(3, 12)
        teacher[torch.arange(3), labels] += 25
        options = {"divergence": "dkd", "temperature": 1.0, "alpha": 1.0}
        loss, gradient = computed(student, teacher, labels, **options)
        want, exact = loss_and_gradient(student, teacher, labels, **options)
        torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradient.double(), exact, rtol=1e-4, atol=1e-6)


class TestMse:
    """Mean square of the logits' differences."""

    def test_neither_temperature_nor_its_square(self, variant):
        student, teacher, _ = inputs(4, 10)
        want = float(F.mse_loss(student, teacher))
        for options in ({}, {"temperature": 5.0}, {"temperature": 5.0, "t_squared": False}):
            got = pydistill.distillation_loss(student, teacher, divergence="mse", alpha=1.0, **options)
            assert float(got) == pytest.approx(want, rel=1e-5)

    def test_refuses_probabilities_of_0(self):
        probs = pydistill.SoftTargets.from_probs(torch.tensor([[0.5, 0.5, 0.0]]))
        with pytest.raises(ValueError, match="probability of 0"):
            pydistill.distillation_loss(torch.zeros(1, 3), probs, divergence="mse", alpha=1.0)


class TestDerivatives:
    """Derivatives of the engine in float64 by finite differences, and of the formula to the second order."""

    @every_divergence
    @pytest.mark.parametrize("backend", BACKENDS)
    def test_gradcheck(self, divergence, backend):
        student, teacher, labels = inputs(3, 5, dtype=torch.float64)
        with pydistill.use_backend(backend):
            assert gradcheck(
                lambda s: pydistill.distillation_loss(
                    s, teacher, labels, divergence=divergence, temperature=2.0, alpha=0.7
                ),
                student.requires_grad_(),
            )

    @every_divergence
    def test_second_order(self, divergence):
        student, teacher, labels = inputs(3, 5, dtype=torch.float64)
        options = {"divergence": divergence, "temperature": 2.0, "alpha": 0.7}
        assert gradgradcheck(
            lambda s: pydistill.distillation_loss(s, teacher, labels, **options), student.requires_grad_()
        )

    @pytest.mark.parametrize("divergence", [name for name, entry in DEFINITIONS.items() if not entry.kinked])
    def test_second_order_at_the_teacher(self, divergence):
        """Nothing has a kink where p = q that is not defined to have one."""
        _, teacher, labels = inputs(2, 4, dtype=torch.float64)
        student = teacher.clone().requires_grad_()
        hessian = torch.autograd.functional.hessian(
            lambda s: pydistill.distillation_loss(s, teacher, labels, divergence=divergence, alpha=1.0), student
        ).reshape(8, 8)
        step, columns = 1e-5, []
        for j in range(8):
            moved = torch.zeros(8, dtype=torch.float64)
            moved[j] = step
            moved = moved.reshape(2, 4)
            up, down = (
                computed(teacher + sign * moved, teacher, labels, divergence=divergence, alpha=1.0)[1]
                for sign in (1, -1)
            )
            columns.append(((up - down) / (2 * step)).reshape(-1))
        torch.testing.assert_close(hessian, torch.stack(columns), rtol=1e-4, atol=1e-7)

    @pytest.mark.parametrize(
        ("divergence", "content"),
        [*itertools.product(DIVERGENCES, ["plain", "masked"]), *((name, "far") for name in TEMPERED)],
    )
    def test_formula_equals_the_engine(self, divergence, content):
        student, teacher, labels = inputs(4, 20)
        if content == "masked":
            labels[:] = 0
            student[:, 7] = teacher[:, 7] = -math.inf
        if content == "far":
            student[:, 3], teacher[:, 3] = 300, -300
        options = {"divergence": divergence, "temperature": 2.0, "alpha": 0.7}
        gradient = torch.func.grad(lambda s: pydistill.distillation_loss(s, teacher, labels, **options))(student)
        torch.testing.assert_close(gradient, computed(student, teacher, labels, **options)[1], rtol=1e-4, atol=1e-6)


def test_reference_of_the_skews():
    """The oracle itself, by hand: KL(p, m) with m a mixture."""
    p, q = torch.tensor([[0.9, 0.1]]).double(), torch.tensor([[0.5, 0.5]]).double()
    want = 0.9 * math.log(0.9 / 0.54) + 0.1 * math.log(0.1 / 0.46)
    assert float(kl(p.log(), (0.1 * p + 0.9 * q).log()).sum()) == pytest.approx(want)
    assert float(row_divergence("skew_forward_kl", q.log(), p.log(), 1.0)) == pytest.approx(want)


@pytest.mark.parametrize(
    ("divergence", "tail"),
    [(name, tail) for name, entry in DIVERGENCES.items() for tail in (None, *entry.top_k[-1:])],
)
@pytest.mark.parametrize("alpha", [0.6, 1.0])
def test_in_place_gives_the_same_gradient(variant, divergence, alpha, tail):
    """No class of a row is read after the row's gradient was written over it."""
    student, teacher, labels = inputs(9, 50)
    targets = teacher if tail is None else pydistill.top_k(teacher, 4, temperatures=(2.0,), tail=tail)
    options = {"divergence": divergence, "temperature": 2.0, "alpha": alpha, "label_smoothing": 0.1}
    options["class_weight"] = torch.rand(50)
    want = computed(student, targets, labels, **options)[1]
    leaf = student.clone().requires_grad_()
    pydistill.distillation_loss(leaf * 1, targets, labels, inplace=True, **options).backward()
    torch.testing.assert_close(leaf.grad, want, rtol=0, atol=0)
