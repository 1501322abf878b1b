"""Top-k teachers: values, gradients, the rest, what is refused; and the vocabulary that does not fit."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import KINDS
from reference import topk_divergence

import pydistill
from pydistill import SoftTargets
from pydistill.formulas import DIVERGENCES

FORMS = [(name, tail) for name, entry in DIVERGENCES.items() for tail in entry.top_k]
every_form = pytest.mark.parametrize(("divergence", "tail"), FORMS)


def batch(n, c, dtype=torch.float32):
    student, teacher = (3 * torch.randn(2, n, c)).to(dtype)
    return student, teacher, torch.randint(c, (n,))


def computed(student, *args, **options):
    leaf = student.clone().requires_grad_()
    loss = pydistill.distillation_loss(leaf, *args, **options)
    loss.sum().backward()
    return loss.detach(), leaf.grad


def wanted(student, targets, labels, divergence, temperature, alpha, weight=None):
    leaf = student.double().requires_grad_()
    partition = targets.log_partitions[temperature] if targets.tail == "bucket" else None
    soft = topk_divergence(divergence, leaf, targets.logits, targets.indices, temperature, partition=partition)
    weight = torch.ones(len(student)).double() if weight is None else weight.double()
    soft = (weight * soft).sum() / weight.sum() * temperature**2
    hard = (weight * F.cross_entropy(leaf, labels, reduction="none")).sum() / weight.sum()
    loss = alpha * soft + (1 - alpha) * hard
    loss.backward()
    return loss.detach(), leaf.grad


@every_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_value_and_gradient_are_as_defined(variant, divergence, tail, dtype):
    tolerance = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 6e-3, torch.float16: 8e-4}[dtype]
    for n, c, k, temperature, alpha in ((3, 7, 1, 1.0, 0.7), (4, 40, 8, 2.5, 1.0), (2, 1300, 64, 4.0, 0.6)):
        student, teacher, labels = batch(n, c, dtype)
        targets = pydistill.top_k(teacher, k, temperatures=(temperature,), tail=tail)
        weight = torch.rand(n) + 0.5
        options = {"divergence": divergence, "temperature": temperature, "alpha": alpha}
        loss, gradient = computed(student, targets, labels, sample_weight=weight, **options)
        want, exact = wanted(student, targets, labels, weight=weight, **options)
        assert abs(float(loss) - float(want)) <= min(tolerance, 3e-6) * (abs(float(want)) + temperature**2)
        assert float((gradient.double() - exact).norm()) <= tolerance * float(exact.norm()) + 1e-6 * (
            dtype.itemsize == 2
        )


@every_form
def test_all_classes_are_the_dense_teacher(variant, divergence, tail):
    student, teacher, labels = batch(4, 11)
    targets = pydistill.top_k(teacher, 11, temperatures=(2.0,), tail=tail)
    options = {"divergence": divergence, "temperature": 2.0, "alpha": 0.7, "label_smoothing": 0.1}
    options["class_weight"] = torch.rand(11) + 0.5
    for got, want in zip(
        computed(student, targets, labels, **options), computed(student, teacher, labels, **options), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("divergence", [n for n, tail in FORMS if tail == "bucket" and DIVERGENCES[n].finite_at_zero])
def test_rounding_does_not_make_the_rest_negative(divergence):
    """By the formula, in float32: nearly all of the mass may round to a log-sum-exp above the log-partition."""
    student, teacher, _ = batch(200, 11)
    teacher[:, 10] = -60
    targets = pydistill.top_k(teacher, 10, temperatures=(3.0,), tail="bucket")
    options = {"divergence": divergence, "temperature": 3.0, "alpha": 1.0}
    gradient, loss = torch.func.grad_and_value(lambda s: pydistill.distillation_loss(s, targets, **options))(student)
    want = computed(student, targets, **options)
    torch.testing.assert_close((loss, gradient), want, rtol=1e-3, atol=1e-3)


def test_order_and_type_of_indices_do_not_matter(variant):
    student, teacher, labels = batch(5, 30)
    targets = pydistill.top_k(teacher, 6)
    order = torch.randperm(6)
    shuffled = SoftTargets.from_topk(targets.indices[:, order].int(), targets.logits[:, order], 30)
    for a, b in zip(computed(student, targets, labels), computed(student, shuffled, labels), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_three_dimensions_strides_and_metrics(variant):
    student, teacher, labels = batch(6, 20)
    targets = pydistill.top_k(teacher, 4, temperatures=(2.0,), tail="bucket")
    options = {"temperature": 2.0, "alpha": 0.7, "return_metrics": True}
    loss, metrics = pydistill.distillation_loss(student, targets, labels, **options)
    cube = SoftTargets.from_topk(
        targets.indices.view(2, 3, 4),
        targets.logits.view(2, 3, 4),
        20,
        log_partitions={2.0: targets.log_partitions[2.0].view(2, 3)},
        tail="bucket",
    )
    strided = student.view(2, 3, 20).transpose(1, 2).contiguous().transpose(1, 2)
    same, others = pydistill.distillation_loss(strided, cube, labels.view(2, 3), **options)
    torch.testing.assert_close(same, loss)
    assert others.agreement == metrics.agreement
    assert float(metrics.agreement) == pytest.approx((student.argmax(-1) == teacher.argmax(-1)).float().mean().item())
    assert float(metrics.accuracy) == pytest.approx((student.argmax(-1) == labels).float().mean().item())


def test_ignored_rows_hold_anything(variant):
    student, teacher, labels = batch(3, 20)
    targets = pydistill.top_k(teacher, 4, temperatures=(1.0,), tail="bucket")
    want, exact = computed(student[:2], targets[:2], labels[:2])
    labels[2] = -100
    student[2] = math.nan
    targets.logits[2], targets.log_partitions[1.0][2] = math.nan, math.nan
    loss, gradient = computed(student, targets, labels)
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(gradient[:2], exact)
    assert (gradient[2] == 0).all()


@pytest.mark.parametrize("divergence", [name for name, tail in FORMS if tail == "bucket"])
def test_a_peaked_row_keeps_its_rest(variant, divergence):
    """The student's rest is 1e-9 of its mass: 1 - sum would be 0, and the loss infinite. The teacher's is 1e-7."""
    student, teacher, _ = batch(2, 16, torch.float64)
    student[:, 3] = 25
    teacher[:, 3], teacher[:, 9] = 20, 20
    student, teacher = student.float(), teacher.float()
    targets = pydistill.top_k(teacher, 2, tail="bucket")
    options = {"divergence": divergence, "alpha": 1.0}
    got = computed(student, targets, **options)
    want = computed(student.double(), targets, **options)
    torch.testing.assert_close(got[0].double(), want[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got[1].double(), want[1], rtol=1e-5, atol=1e-6)
    far = student.clone()
    far[:, 3] = 1e4
    loss, gradient = computed(far, targets, **options)
    assert loss.isfinite()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("spoiled", [0, 2])
def test_nan_in_the_only_class_of_the_rest(variant, spoiled):
    student, teacher, _ = batch(3, 3)
    student[:, spoiled], teacher[:, spoiled] = -50, -50
    targets = pydistill.top_k(teacher, 2, tail="bucket")
    student[1, spoiled] = math.nan
    loss, gradient = computed(student, targets, alpha=1.0, reduction="none")
    assert loss[1].isnan()
    assert gradient[1].isnan().all()
    assert loss[[0, 2]].isfinite().all()


def test_ties_go_to_the_lowest_class(variant):
    targets = SoftTargets.from_topk(torch.tensor([[5, 2]]), torch.ones(1, 2), 8)
    student = torch.zeros(1, 8)
    student[0, 2] = 1.0
    _, metrics = pydistill.distillation_loss(student, targets, alpha=1.0, return_metrics=True)
    assert metrics.agreement == 1


def test_equals_the_dense_teacher_with_minus_infinity_elsewhere(variant):
    student, teacher, labels = batch(4, 50)
    targets = pydistill.top_k(teacher, 5)
    dense = torch.full_like(teacher, -math.inf).scatter(-1, targets.indices, targets.logits)
    for divergence in (name for name, tail in FORMS if tail == "renormalize"):
        options = {"divergence": divergence, "temperature": 3.0, "alpha": 0.7}
        got, want = computed(student, targets, labels, **options), computed(student, dense, labels, **options)
        torch.testing.assert_close(got[0], want[0], rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(got[1], want[1], rtol=1e-4, atol=1e-6)


@every_form
def test_second_order(divergence, tail):
    student, teacher, labels = batch(2, 6, torch.float64)
    targets = pydistill.top_k(teacher, 3, temperatures=(2.0,), tail=tail)
    options = {"divergence": divergence, "temperature": 2.0, "alpha": 0.7}
    assert torch.autograd.gradcheck(
        lambda s: pydistill.distillation_loss(s, targets, labels, **options), student.requires_grad_()
    )
    assert torch.autograd.gradgradcheck(
        lambda s: pydistill.distillation_loss(s, targets, labels, **options), student.requires_grad_()
    )


@pytest.mark.parametrize("tail", ["renormalize", "bucket"])
def test_under_compile_in_place_and_inference_mode(tail):
    student, teacher, labels = batch(6, 40)
    targets = pydistill.top_k(teacher, 4, temperatures=(2.0,), tail=tail)
    want = computed(student, targets, labels, temperature=2.0)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(student, labels):
        return pydistill.distillation_loss(student, targets, labels, temperature=2.0)

    leaf = student.clone().requires_grad_()
    loss = compiled(leaf, labels)
    loss.backward()
    torch.testing.assert_close((loss.detach(), leaf.grad), want)

    leaf = student.clone().requires_grad_()
    pydistill.distillation_loss(leaf * 1, targets, labels, temperature=2.0, inplace=True).backward()
    torch.testing.assert_close(leaf.grad, want[1])

    with torch.inference_mode():
        targets = pydistill.top_k(teacher.clone(), 4, temperatures=(2.0,), tail=tail)
    torch.testing.assert_close(computed(student, targets, labels, temperature=2.0), want)


class TestRefused:
    """Errors say which rule was broken, by what."""

    @pytest.mark.parametrize(
        ("indices", "message"),
        [
            ([[0, 0]], "not repeat within a row; row 0"),
            ([[0, 5]], r"be in \[0, 5\); row 0"),
            ([[-1, 2]], "row 0 holds"),
        ],
    )
    def test_indices(self, indices, message):
        with pytest.raises(ValueError, match=message):
            SoftTargets.from_topk(torch.tensor(indices), torch.zeros(1, 2), 5)

    def test_types_and_shapes(self):
        with pytest.raises(TypeError, match="indices must be int64 or int32"):
            SoftTargets.from_topk(torch.zeros(1, 2), torch.zeros(1, 2), 5)
        with pytest.raises(ValueError, match="one shape"):
            SoftTargets.from_topk(torch.zeros(1, 3, dtype=torch.long), torch.zeros(1, 2), 5)
        with pytest.raises(ValueError, match="tail must be"):
            SoftTargets.from_topk(torch.tensor([[0, 1]]), torch.zeros(1, 2), 5, tail="drop")
        with pytest.raises(ValueError, match="at most num_classes = 1 classes per row, got 2"):
            SoftTargets.from_topk(torch.tensor([[0, 1]]), torch.zeros(1, 2), 1)
        with pytest.raises(ValueError, match="log_partitions must have the shape"):
            SoftTargets.from_topk(torch.tensor([[0, 1]]), torch.zeros(1, 2), 5, log_partitions={1.0: torch.zeros(2)})
        with pytest.raises(ValueError, match="k must be an integer in"):
            pydistill.top_k(torch.zeros(2, 5), 6)

    @pytest.mark.parametrize("divergence", [n for n, d in DIVERGENCES.items() if "renormalize" not in d.top_k])
    def test_divergences_that_have_no_value(self, divergence):
        student, teacher, labels = batch(2, 10)
        with pytest.raises(ValueError, match=f"{divergence} takes"):
            pydistill.distillation_loss(student, pydistill.top_k(teacher, 3), labels, divergence=divergence)

    def test_missing_log_partition(self):
        student, teacher, labels = batch(2, 10)
        targets = pydistill.top_k(teacher, 3, temperatures=(1.0, 4.0), tail="bucket")
        with pytest.raises(ValueError, match="at temperature 2; stored: 1, 4"):
            pydistill.distillation_loss(student, targets, labels, temperature=2.0)

    def test_another_number_of_classes(self):
        student, teacher, labels = batch(2, 10)
        with pytest.raises(ValueError, match="teacher must have the shape"):
            pydistill.distillation_loss(student[:, :9], pydistill.top_k(teacher, 3), labels)


class TestVocabulary:
    """A teacher with more classes than the student."""

    def test_the_error_says_what_to_do(self):
        with pytest.raises(ValueError, match=r"select_classes\(8\)"):
            pydistill.distillation_loss(torch.zeros(2, 8), torch.zeros(2, 10), alpha=1.0)

    @pytest.mark.parametrize("divergence", KINDS)
    def test_select_is_the_conditional_distribution(self, divergence):
        student, teacher, _ = batch(3, 10)
        order = torch.tensor([4, 1, 9])
        options = {"divergence": divergence, "temperature": 2.0, "alpha": 1.0}
        for classes, kept in ((6, torch.arange(6)), (order, order)):
            selected = SoftTargets.from_logits(teacher).select_classes(classes)
            probs = (teacher / 2).softmax(-1)[:, kept]
            probs = probs / probs.sum(-1, keepdim=True)
            want = pydistill.distillation_loss(student[:, : probs.shape[-1]], probs.log() * 2, **options)
            got = pydistill.distillation_loss(student[:, : probs.shape[-1]], selected, **options)
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)

    def test_refused(self):
        targets = SoftTargets.from_logits(torch.zeros(2, 10))
        for classes in ([1, 1], [-1], [10], []):
            with pytest.raises(ValueError, match="classes must"):
                targets.select_classes(torch.tensor(classes, dtype=torch.long))
        with pytest.raises(TypeError, match="classes must be an integer, or a 1-D tensor or array"):
            targets.select_classes(torch.ones(10, dtype=torch.bool))
        with pytest.raises(ValueError, match=r"in \[1, 10\]"):
            targets.select_classes(11)
        with pytest.raises(ValueError, match="select first"):
            pydistill.top_k(torch.zeros(2, 10), 2).select_classes(5)


@pytest.mark.parametrize(
    ("exception", "words", "change"),
    [
        (TypeError, "num_classes must be an integer, got 5.5", {"num_classes": 5.5}),
        (TypeError, "num_classes must be an integer, got '5'", {"num_classes": "5"}),
        (TypeError, "num_classes must be an integer, got True", {"num_classes": True}),
        (TypeError, r"log_partitions must be a dict .* got Tensor", {"log_partitions": torch.ones(1)}),
        (
            TypeError,
            "log_partitions must have temperatures, which are numbers, as keys; got 'a'",
            {"log_partitions": {"a": [3.0]}},
        ),
        (ValueError, "temperatures > 0 and finite as keys, got inf", {"log_partitions": {math.inf: [3.0]}}),
        (TypeError, "log_partitions must be a tensor or an array", {"log_partitions": {1.0: "x"}}),
        (TypeError, "log_partitions must be floating-point", {"log_partitions": {1.0: [3]}}),
        (TypeError, "indices must be a tensor or an array", {"indices": "ab"}),
        (TypeError, "logits must be a tensor or an array", {"logits": None}),
    ],
)
def test_from_topk_refuses(exception, words, change):
    call = {"indices": torch.tensor([[0, 2]]), "logits": torch.tensor([[1.0, 2.0]]), "num_classes": 5}
    with pytest.raises(exception, match=words):
        SoftTargets.from_topk(**call | change)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_log_partition_below_that_of_the_kept_logits(dtype):
    """The kept classes are a part of the row: less than their own log-sum-exp is a mistake, such as a log-mean-exp."""
    whole = (8 * torch.randn(5, 4, 300)).to(dtype)
    kept = pydistill.top_k(whole, 10, temperatures=(1.0, 4.0))
    for t in (1.0, 4.0):
        exact = kept.log_partitions[t]
        good = {t: exact}, {t: exact.to(dtype)}, {t: (kept.logits.double() / t).logsumexp(-1)}
        for partitions in good:
            SoftTargets.from_topk(kept.indices, kept.logits, 300, log_partitions=partitions, tail="bucket")
        low = exact.clone()
        low[2, 1] -= 3 + (kept.logits[2, 1].double().abs().max() / t) * 4 * torch.finfo(dtype).eps + 2
        with pytest.raises(ValueError, match=f"log_partitions must be at least .* temperature {t:g} row 9 holds"):
            SoftTargets.from_topk(kept.indices, kept.logits, 300, log_partitions={t: low}, tail="bucket")
    with pytest.raises(ValueError, match="log_partitions must be at least"):
        SoftTargets.from_topk(torch.tensor([[0]]), torch.tensor([[5.0]]), 3, log_partitions={1.0: torch.tensor([4.0])})


def test_top_k_refuses():
    logits = torch.randn(2, 5)
    for k in (True, 2.0, "2", None):
        with pytest.raises(TypeError, match=f"k must be an integer, got {k!r}"):
            pydistill.top_k(logits, k)
    for temperatures in (1.0, torch.tensor(1.0)):
        with pytest.raises(TypeError, match=r"temperatures must be a sequence of numbers, such as \(1.0, 2.0\)"):
            pydistill.top_k(logits, 2, temperatures=temperatures)
    with pytest.raises(TypeError, match="temperatures must be numbers, got '1'"):
        pydistill.top_k(logits, 2, temperatures="1")


def test_select_classes_refuses():
    targets = SoftTargets.from_logits(torch.randn(2, 5))
    with pytest.raises(TypeError, match="classes must be an integer, got True"):
        targets.select_classes(True)
    rule = "classes must be an integer, or a 1-D tensor or array of class indices; got "
    for classes, got in (
        (None, "None"),
        ("ab", "'ab'"),
        (2.5, "torch.float32 0-D"),
        (torch.tensor(2), "torch.int64 0-D"),
    ):
        with pytest.raises(TypeError, match=rule + got):
            targets.select_classes(classes)
    assert targets.select_classes(np.int64(3)).shape == (2, 3)
