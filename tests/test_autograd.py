"""The autograd boundary: derivatives of both orders, what is saved, and the gradient written in place."""

import pytest
import torch
from conftest import KINDS
from reference import assert_accurate, loss, loss_and_gradient
from torch.autograd import gradcheck, gradgradcheck

import pydistill

N, C = 4, 5
LABELS = torch.tensor([1, 4, -100, 0])
OPTIONS = {
    "plain": {},
    "soft alone": {"alpha": 1.0, "temperature": 2.5},
    "hard alone": {"alpha": 0.0},
    "no t_squared": {"t_squared": False, "temperature": 4.0},
    "unlabelled": {"unlabeled": "distill", "temperature": 2.0},
    "weights": {
        "sample_weight": torch.tensor([1.0, 0.5, 2.0, 0.0], dtype=torch.float64),
        "class_weight": torch.tensor([1.0, 3.0, 0.5, 0.0, 2.0], dtype=torch.float64),
        "label_smoothing": 0.2,
        "temperature": 0.5,
    },
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
both_kinds = pytest.mark.parametrize("divergence", KINDS)
every_reduction = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
every_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:]
)


def logits(dtype=torch.float64, n=N, c=C):
    """A student that requires a gradient, and a teacher."""
    return torch.randn(n, c, dtype=dtype, requires_grad=True), torch.randn(n, c, dtype=dtype)


def computed(leaf):
    """Logits as a network gives them: not a leaf, with memory of their own."""
    return leaf * 1


def distill(student, teacher, **options):
    return pydistill.distillation_loss(student, teacher, LABELS, **options)


def close(got, want):
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[got.dtype]
    torch.testing.assert_close(got, want.to(got.dtype), rtol=tolerance, atol=tolerance)


class TestDerivatives:
    @both_kinds
    @every_reduction
    @every_option
    def test_first_order(self, variant, divergence, reduction, options):
        student, teacher = logits()
        assert gradcheck(lambda s: distill(s, teacher, divergence=divergence, reduction=reduction, **options), student)

    @both_kinds
    @every_reduction
    @every_option
    def test_second_order(self, divergence, reduction, options):
        student, teacher = logits()
        assert gradgradcheck(
            lambda s: distill(s, teacher, divergence=divergence, reduction=reduction, **options), student
        )

    @both_kinds
    @every_reduction
    @every_dtype
    def test_gradient_penalty(self, variant, divergence, reduction, dtype):
        """A loss with the norm of its own gradient, which once silently lost the second derivative."""
        student, teacher = logits(dtype)

        def penalised(value, s):
            (g,) = torch.autograd.grad(value.sum(), s, create_graph=True)
            return value.sum() + g.square().sum()

        options = {"divergence": divergence, "reduction": reduction, "temperature": 2.0, "alpha": 0.7}
        penalised(distill(student, teacher, **options), student).backward()
        exact = student.detach().double().requires_grad_()
        penalised(loss(exact, teacher, LABELS, **options), exact).backward()
        close(student.grad, exact.grad)

    def test_third_order(self):
        student, teacher = logits()
        exact = student.detach().clone().requires_grad_()
        thirds = []
        for s, value in ((student, distill(student, teacher)), (exact, loss(exact, teacher, LABELS))):
            for _ in range(3):
                (value,) = torch.autograd.grad(value.square().sum(), s, create_graph=True)
            thirds.append(value)
        close(*thirds)


class TestBackward:
    @every_reduction
    @every_dtype
    def test_grad_output_other_than_one(self, variant, reduction, dtype):
        student, teacher = logits(dtype)
        value = distill(student, teacher, reduction=reduction)
        grad_output = torch.tensor([3.0, -2.0, 5.0, 0.5]) if reduction == "none" else torch.tensor(-2.5)
        value.backward(grad_output.to(value.dtype))
        _, want = loss_and_gradient(student, teacher, LABELS, reduction=reduction, grad_output=grad_output)
        close(student.grad, want)

    @pytest.mark.parametrize(
        "make", [lambda g: g.expand(4), lambda g: torch.stack([g] * 8)[::2]], ids=["expanded", "strided"]
    )
    def test_grad_output_of_any_strides(self, variant, make):
        student, teacher = logits(torch.float32)
        distill(student, teacher, reduction="none").backward(make(torch.tensor(3.0)))
        close(student.grad, 3 * loss_and_gradient(student, teacher, LABELS, reduction="sum")[1])

    @every_reduction
    @every_dtype
    @pytest.mark.parametrize("inplace", [False, True])
    def test_twice_without_retain_graph(self, variant, reduction, dtype, inplace):
        leaf, teacher = logits(dtype)
        value = distill(computed(leaf), teacher, reduction=reduction, inplace=inplace).sum()
        value.backward()
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            value.backward()

    def test_two_losses_add_up(self, variant):
        student, teacher = logits()
        (distill(student, teacher) + 2 * distill(student, teacher, divergence="reverse_kl")).backward()
        _, first = loss_and_gradient(student, teacher, LABELS)
        _, second = loss_and_gradient(student, teacher, LABELS, divergence="reverse_kl")
        close(student.grad, first + 2 * second)

    def test_hooks_that_modify(self, variant):
        student, teacher = logits()
        value = distill(student, teacher)
        value.register_hook(lambda g: 3 * g)
        student.register_hook(lambda g: g + 1)
        value.backward()
        close(student.grad, 3 * loss_and_gradient(student, teacher, LABELS)[1] + 1)

    @pytest.mark.parametrize("inplace", [False, True])
    def test_upstream_layers(self, variant, inplace):
        net = torch.nn.Sequential(torch.nn.Linear(7, 6), torch.nn.Tanh(), torch.nn.Linear(6, C)).double()
        inputs, teacher = torch.randn(N, 7, dtype=torch.float64), torch.randn(N, C, dtype=torch.float64)
        parameters = list(net.parameters())
        got = torch.autograd.grad(distill(net(inputs), teacher, inplace=inplace), parameters)
        want = torch.autograd.grad(loss(net(inputs), teacher, LABELS), parameters)
        for g, w in zip(got, want, strict=True):
            close(g, w)

    @pytest.mark.parametrize("inplace", [False, True])
    def test_logits_of_any_shape_and_strides(self, variant, inplace):
        """Classes in dimension 1, moved last: a non-unit inner stride."""
        leaf = torch.randn(2, C, 2, dtype=torch.float64, requires_grad=True)
        teacher = torch.randn(2, C, 2, dtype=torch.float64)
        student = computed(leaf).movedim(1, -1)
        value = pydistill.distillation_loss(student, teacher.movedim(1, -1), LABELS.reshape(2, 2), inplace=inplace)
        value.backward()
        rows = [x.detach().movedim(1, -1).reshape(4, C) for x in (leaf, teacher)]
        close(leaf.grad.movedim(1, -1).reshape(4, C), loss_and_gradient(*rows, LABELS)[1])


class TestNoGradient:
    def test_no_grad(self, variant):
        student, teacher = logits()
        with torch.no_grad():
            value = distill(student, teacher)
        assert not value.requires_grad
        close(value, loss(student, teacher, LABELS))

    def test_student_without_a_gradient(self, variant):
        student, teacher = logits()
        value = distill(student.detach(), teacher.requires_grad_())
        assert not value.requires_grad
        close(value, loss(student, teacher, LABELS))

    @every_reduction
    @pytest.mark.parametrize("create_graph", [False, True])
    def test_teacher_gets_none(self, variant, reduction, create_graph):
        student, teacher = logits()
        teacher.requires_grad_()
        value = distill(student, 2 * teacher, reduction=reduction).sum()
        got, nothing = torch.autograd.grad(value, (student, teacher), create_graph=create_graph, allow_unused=True)
        assert nothing is None
        close(got.detach(), loss_and_gradient(student, 2 * teacher.detach(), LABELS, reduction=reduction)[1])

    def test_metrics_are_detached(self, variant):
        student, teacher = logits()
        _, metrics = distill(student, teacher, return_metrics=True)
        assert not any(x.requires_grad for x in (*metrics[:4], *metrics.num_items))


class TestInPlace:
    @every_reduction
    @every_dtype
    @both_kinds
    def test_equals_the_other_and_shares_the_storage(self, variant, reduction, dtype, divergence):
        leaf, teacher = logits(dtype)
        grad_output = torch.tensor([1.0, -2.0, 3.0, 0.5]) if reduction == "none" else torch.tensor(2.0)
        gradients = []
        for inplace in (False, True):
            student = computed(leaf)
            value = distill(student, teacher, reduction=reduction, divergence=divergence, inplace=inplace)
            gradients += torch.autograd.grad(value, student, grad_output.to(value.dtype))
            assert (gradients[-1].data_ptr() == student.data_ptr()) is inplace
        assert pydistill.backend_info().last_call == f"{variant[0]}, gradient in place"
        torch.testing.assert_close(*gradients, rtol=2 * torch.finfo(dtype).eps, atol=0)
        assert torch.equal(student, gradients[1])

    @every_reduction
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_autograd_notices_that_another_operation_needed_the_logits(self, variant, reduction, dtype):
        leaf, teacher = logits(dtype)
        student = computed(leaf)
        version, other = student._version, student.square().sum()
        value = distill(student, teacher, reduction=reduction, inplace=True).sum()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            # Deferred to backward for float16 and "none": there the other operation must come second to notice.
            torch.autograd.backward([value, other])
        assert student._version > version

    def test_producer_that_needs_its_result(self, variant):
        leaf, teacher = logits(torch.float32)
        value = distill(leaf.exp(), teacher, inplace=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            value.backward()

    @every_reduction
    @every_dtype
    def test_one_backward_only(self, variant, reduction, dtype):
        leaf, teacher = logits(dtype)
        value = distill(computed(leaf), teacher, reduction=reduction, inplace=True).sum()
        value.backward(retain_graph=True)
        first = leaf.grad.clone()
        # The second message is torch's own, where the logits were saved for the pass in backward.
        with pytest.raises(RuntimeError, match=r"inplace=True allows one backward|modified by an inplace operation"):
            value.backward()
        assert torch.equal(leaf.grad, first)

    @every_reduction
    @every_dtype
    def test_no_second_derivative(self, variant, reduction, dtype):
        leaf, teacher = logits(dtype)
        value = distill(computed(leaf), teacher, reduction=reduction, inplace=True).sum()
        with pytest.raises(RuntimeError, match="inplace must be False for a second"):
            torch.autograd.grad(value, leaf, create_graph=True)

    @pytest.mark.parametrize(
        ("student", "teacher", "message"),
        [
            (lambda x: x.detach().requires_grad_(), None, "must not be a leaf, or a view of a leaf"),
            (lambda x: x.detach().requires_grad_()[1:], None, "must not be a leaf, or a view of a leaf"),
            (lambda x: x[:1].expand(N, C), None, r"do not overlap in memory.*strides \(0, 1\)"),
            (lambda x: x.as_strided((N, C), (1, 1)), None, r"do not overlap in memory.*strides \(1, 1\)"),
            (lambda x: x.as_strided((N, C), (C - 1, 1)), None, r"do not overlap in memory.*strides \(4, 1\)"),
            (lambda x: x, lambda x: x.detach(), "teacher must not share memory"),
            (lambda x: x[:N], lambda x: x.detach()[1 : N + 1], "teacher must not share memory"),
            (lambda x: x[:N], lambda x: pydistill.SoftTargets.from_logits(x[:N]), "teacher must not share memory"),
        ],
    )
    @pytest.mark.parametrize(("dtype", "reduction"), [(torch.float32, "mean"), (torch.float16, "none")])
    def test_memory_that_must_not_be_written(self, variant, dtype, reduction, student, teacher, message):
        """At once, also where the gradient is written in backward: for float16 and "none"."""
        buffer = computed(torch.randn(N if teacher is None else N + 1, C, dtype=dtype, requires_grad=True))
        kept = buffer.detach().clone()
        student = student(buffer)
        teacher = torch.randn(student.shape) if teacher is None else teacher(buffer)
        labels = torch.zeros(len(student), dtype=torch.int64)
        with pytest.raises(ValueError, match=message):
            pydistill.distillation_loss(student, teacher, labels, inplace=True, reduction=reduction)
        assert torch.equal(buffer, kept)

    def test_neighbours_in_memory_are_left_alone(self, variant):
        """Rows of a wider buffer, whose other columns and next rows belong to others."""
        leaf = torch.randn(N + 1, C + 3, requires_grad=True)
        buffer, teacher = computed(leaf), torch.randn(N, C)
        inside = (slice(N), slice(1, C + 1))
        distill(buffer[inside], teacher, inplace=True).backward()
        want = torch.zeros_like(leaf)
        want[inside] = loss_and_gradient(leaf[inside], teacher, LABELS)[1].float()
        close(leaf.grad, want)
        written = leaf.detach().clone()
        written[inside] = leaf.grad[inside]
        assert torch.equal(buffer, written)

    def test_nothing_is_written_before_everything_was_checked(self, variant):
        leaf, teacher = logits(torch.float32)
        student = computed(leaf)
        with pytest.raises(IndexError, match="row 3 holds 7"):
            pydistill.distillation_loss(student, teacher, torch.tensor([0, 1, 2, 7]), inplace=True)
        assert torch.equal(student, leaf)
        assert student._version == 0

    @pytest.mark.parametrize("grad", [True, False])
    def test_ignored_where_no_gradient_is_wanted(self, variant, grad):
        leaf, teacher = logits(torch.float32)
        student = computed(leaf.requires_grad_(not grad))
        with torch.set_grad_enabled(grad):
            distill(student, teacher, inplace=True)
        assert torch.equal(student, leaf)
        assert pydistill.backend_info().last_call == f"{variant[0]}; inplace ignored: no gradient is wanted"


@pytest.fixture(scope="module")
def large_half_case():
    torch.manual_seed(1)
    student, teacher = torch.randn(2, 64, 32000).half()
    options = {"temperature": 1.0, "alpha": 1.0}
    return student, teacher, options, loss_and_gradient(student, teacher, **options)[1]


class TestLossScaler:
    """float16 at 64 x 32000, where most entries of a gradient divided by N are below float16's smallest number."""

    SCALE = 65536.0

    def error(self, gradient, want):
        """Relative error of the scaled gradient after the optimizer has divided it by the scale, in float32."""
        return (gradient.double() / self.SCALE - want).norm() / want.norm()

    @pytest.mark.parametrize("inplace", [False, True])
    def test_as_good_as_float32_within_float16_rounding(self, variant, large_half_case, inplace):
        student, teacher, options, want = large_half_case
        leaf = student.clone().requires_grad_()
        value = pydistill.distillation_loss(computed(leaf), teacher, inplace=inplace, **options)
        (self.SCALE * value).backward()
        assert leaf.grad.dtype == torch.float16
        assert self.error(leaf.grad, want) < 2.0**-11
        assert (leaf.grad == 0).double().mean() < 1e-3
        assert_accurate(value.detach(), None, student, teacher, None, **options)

    def test_rounding_before_the_scaler_would_have_lost_it(self, large_half_case):
        """The same gradient, rounded to float16 before it is scaled: what the deferral is for."""
        *_, want = large_half_case
        naive = want.half().float() * self.SCALE
        assert self.error(naive, want) > 20 * 2.0**-11
        assert (naive == 0).double().mean() > 0.05


def test_float16_without_a_scaler_is_rounded_once(variant):
    student, teacher = logits(torch.float16, 8, 300)
    labels = torch.randint(300, (8,))
    pydistill.distillation_loss(student, teacher, labels, temperature=4.0).backward()
    _, want = loss_and_gradient(student, teacher, labels, temperature=4.0)
    assert (student.grad.double() - want).abs().max() <= 2.0**-11 * want.abs().max() + 2.0**-24


def test_teacher_from_inference_mode():
    """The usual way to run a teacher; autograd refuses to save such tensors."""
    for options in ({}, {"reduction": "none"}):
        student = torch.randn(6, 5, requires_grad=True)
        plain = torch.randn(6, 5)
        with torch.inference_mode():
            teacher = plain * 1
        for create_graph in (False, True):
            want, got = (
                torch.autograd.grad(
                    pydistill.distillation_loss(student, t, alpha=1.0, **options).sum(),
                    student,
                    create_graph=create_graph,
                )[0]
                for t in (plain, teacher)
            )
            assert torch.equal(want, got)


def test_forward_mode_takes_the_formula():
    """The tangent is used, and not dropped silently."""
    import torch.autograd.forward_ad as forward_ad

    student, teacher, tangent = torch.randn(6, 5), torch.randn(6, 5), torch.randn(6, 5)
    leaf = student.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(pydistill.distillation_loss(leaf, teacher, alpha=1.0), leaf)
    with forward_ad.dual_level():
        loss = pydistill.distillation_loss(forward_ad.make_dual(student, tangent), teacher, alpha=1.0)
        got = forward_ad.unpack_dual(loss).tangent
        labels = torch.tensor([0, 5, 0, 0, 0, 0])
        with pytest.raises(IndexError, match="row 1 holds 5"):
            pydistill.distillation_loss(forward_ad.make_dual(student, tangent), teacher, labels)
    torch.testing.assert_close(got.float(), (gradient * tangent).sum())


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_batched_backward(reduction):
    """is_grads_batched: one backward for several grad_outputs, through the formula."""
    student, teacher, labels = torch.randn(6, 5, requires_grad=True), torch.randn(6, 5), torch.randint(5, (6,))
    loss = pydistill.distillation_loss(student, teacher, labels, reduction=reduction)
    outputs = torch.eye(6) if reduction == "none" else torch.tensor([1.0, 3.0])
    got = torch.autograd.grad(loss, student, outputs, is_grads_batched=True, retain_graph=True)[0]
    for grad_output, gradient in zip(outputs, got, strict=True):
        want = torch.autograd.grad(loss, student, grad_output, retain_graph=True)[0]
        torch.testing.assert_close(gradient, want)


@pytest.mark.parametrize("name", ["class_weight", "labels"])
def test_inplace_refuses_logits_that_overlap_another_input(name):
    """Any other input, not only the teacher."""
    student = torch.rand(8, 8, dtype=torch.float64, requires_grad=True) * 1
    shared = student.detach()[0] if name == "class_weight" else student.detach().view(torch.int64)[:, 0]
    others = {"labels": torch.zeros(8, dtype=torch.int64)} | {name: shared}
    with pytest.raises(ValueError, match=f"{name} must not share memory"):
        pydistill.distillation_loss(student, torch.randn(8, 8), inplace=True, **others)


def test_backend_info_says_when_inplace_had_to_copy():
    """backend_info says when the logits' storage could not be used."""
    student = (torch.randn(5, 6, requires_grad=True) * 1).T
    pydistill.distillation_loss(student, torch.randn(6, 5), alpha=1.0, inplace=True).backward()
    assert "inplace ignored" in pydistill.backend_info().last_call
