"""Edge cases that the documentation promises: zeros, infinities, NaN, masks, rows that do not count, large offsets."""

import math
import warnings
from itertools import product

import pytest
import reference
import torch
import torch.nn.functional as F
from conftest import KINDS
from reference import assert_accurate, loss_and_gradient

import pydistill
from pydistill.engine import checks

INF, NAN = math.inf, math.nan
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

both_kinds = pytest.mark.parametrize("divergence", KINDS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
# One block of a kernel and its tail; several blocks, which may be masked as a whole.
every_size = pytest.mark.parametrize("classes", [5, 2500])
every_input = pytest.mark.parametrize(
    ("classes", "dtype"),
    [(5, dtype) for dtype in DTYPES] + [(2500, torch.float32), (2500, torch.float64)],
    ids=lambda value: str(value).removeprefix("torch."),
)


def make(n, classes, dtype=torch.float32):
    """(student, teacher, labels); the last class is every row's label, so that any other may be masked."""
    student, teacher = (2 * torch.randn(2, n, classes)).to(dtype)
    return student, teacher, torch.full((n,), classes - 1)


def run(student, teacher=None, labels=None, *, grad_output=None, **options):
    """(loss, gradient) of the function under test."""
    student = student.clone().requires_grad_()
    loss = pydistill.distillation_loss(student, teacher, labels, **options)
    loss.backward(torch.ones_like(loss) if grad_output is None else grad_output)
    return loss.detach(), student.grad


def classes_to_mask(classes):
    """Single classes, all but both ends, all but the last: in long rows whole blocks, also the first, of -inf."""
    return torch.tensor([1, classes - 2]), torch.arange(1, classes - 3), torch.arange(classes - 1)


# --- p_j = 0, q_j > 0 -----------------------------------------------------------------------------------------


@every_input
def test_teacher_without_mass_on_a_class_adds_nothing_to_forward_kl(variant, classes, dtype):
    for masked, temperature in product(classes_to_mask(classes), (1.0, 2.5)):
        options = {"divergence": "forward_kl", "temperature": temperature, "alpha": 0.7}
        student, teacher, labels = make(2, classes, dtype)
        teacher[:, masked] = -INF
        got = run(student, teacher, labels, **options)
        assert got[0].isfinite()
        assert_accurate(*got, student, teacher, labels, **options)


def test_forward_kl_against_a_one_hot_teacher_is_the_negative_log_likelihood(variant):
    student, _, labels = make(3, 7)
    for teacher in (F.one_hot(labels, 7).log(), pydistill.SoftTargets.from_probs(F.one_hot(labels, 7).float())):
        loss = pydistill.distillation_loss(student, teacher, alpha=1.0)
        torch.testing.assert_close(loss, F.cross_entropy(student, labels), rtol=1e-6, atol=0)


@every_input
def test_teacher_without_mass_on_a_class_makes_reverse_kl_infinite(variant, classes, dtype):
    options = {"divergence": "reverse_kl", "temperature": 2.5, "reduction": "none"}
    student, teacher, labels = make(3, classes, dtype)
    whole = run(student, teacher, labels, **options)
    for at in (1, classes - 1):
        masked = teacher.clone()
        masked[1, at] = -INF
        loss, gradient = run(student, masked, labels, **options)
        assert loss[1] == INF
        assert gradient[1].isnan().all()
        assert torch.equal(loss[[0, 2]], whole[0][[0, 2]])
        assert torch.equal(gradient[[0, 2]], whole[1][[0, 2]])


# --- Student and teacher both -inf on a class -----------------------------------------------------------------


@both_kinds
@every_input
def test_class_masked_in_both_does_not_exist(variant, divergence, classes, dtype):
    for masked, temperature in product(classes_to_mask(classes), (1.0, 2.5)):
        options = {"divergence": divergence, "temperature": temperature, "alpha": 0.7}
        student, teacher, labels = make(2, classes, dtype)
        student[:, masked] = teacher[:, masked] = -INF
        loss, gradient = run(student, teacher, labels, **options)
        assert (gradient[:, masked] == 0).all()
        kept = torch.ones(classes, dtype=torch.bool)
        kept[masked] = False
        last = torch.full_like(labels, int(kept.sum()) - 1)
        assert_accurate(loss, gradient[:, kept], student[:, kept], teacher[:, kept], last, **options)


# --- Student -inf where the teacher has mass ------------------------------------------------------------------


@every_input
def test_student_without_mass_makes_forward_kl_infinite_with_a_finite_gradient(variant, classes, dtype):
    student, teacher, labels = make(2, classes, dtype)
    student[1, 1] = -INF
    loss, gradient = run(student, teacher, labels, alpha=1.0, temperature=2.0)
    assert loss == INF
    want = 2.0 * ((student.double() / 2).softmax(-1) - (teacher.double() / 2).softmax(-1)) / 2  # T (q - p) / N
    tolerance = 1e-6 + torch.finfo(dtype).eps
    torch.testing.assert_close(gradient.double(), want, rtol=tolerance, atol=1e-7)
    assert gradient[1, 1] < 0


@every_input
def test_student_without_mass_adds_nothing_to_reverse_kl(variant, classes, dtype):
    for masked, temperature in product(classes_to_mask(classes), (1.0, 2.5)):
        options = {"divergence": "reverse_kl", "temperature": temperature, "alpha": 0.7}
        student, teacher, labels = make(2, classes, dtype)
        student[:, masked] = -INF
        loss, gradient = run(student, teacher, labels, **options)
        assert (gradient[:, masked] == 0).all()
        assert_accurate(loss, gradient, student, teacher, labels, **options)


# --- +inf, rows of -inf, NaN ----------------------------------------------------------------------------------


SPOILED = ("inf first", "inf last", "-inf only", "nan first", "nan middle", "nan last")


def spoil(row, how):
    """Make a row of logits unusable."""
    value, position = how.split(" ")
    at = {"first": 0, "middle": len(row) // 2, "last": -1, "only": slice(None)}[position]
    row[at] = float(value)


@both_kinds
@every_input
@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_row_that_has_no_softmax_is_nan_and_the_others_untouched(variant, divergence, classes, dtype, whose):
    student, teacher, labels = make(2 * len(SPOILED) + 1, classes, dtype)
    options = {"divergence": divergence, "temperature": 2.0, "reduction": "none"}
    whole_loss, whole_gradient = run(student, teacher, labels, **options)
    bad, good = slice(1, None, 2), slice(0, None, 2)
    for row, how in zip((student if whose == "student" else teacher)[bad], SPOILED, strict=True):
        spoil(row, how)
    loss, gradient = run(student, teacher, labels, **options)
    assert loss[bad].isnan().all()
    assert gradient[bad].isnan().all()
    assert torch.equal(loss[good], whole_loss[good])
    assert torch.equal(gradient[good], whole_gradient[good])


@every_size
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_cross_entropy_of_a_row_that_has_no_softmax_is_nan_as_in_torch(variant, classes, label_smoothing):
    student, _, labels = make(len(SPOILED) + 1, classes)
    for row, how in zip(student[1:], SPOILED, strict=True):
        spoil(row, how)
    leaf = student.clone().requires_grad_()
    want = F.cross_entropy(leaf, labels, label_smoothing=label_smoothing, reduction="none")
    want.sum().backward()
    options = {"alpha": 0.0, "label_smoothing": label_smoothing, "reduction": "none"}
    loss, gradient = run(student, None, labels, **options)
    assert loss[1:].isnan().all()
    torch.testing.assert_close(loss, want.detach(), equal_nan=True)
    torch.testing.assert_close(gradient, leaf.grad, equal_nan=True)


def test_nan_row_makes_the_mean_nan_but_no_other_row_of_its_gradient(variant):
    student, teacher, labels = make(3, 5)
    student[1, 2] = NAN
    loss, gradient = run(student, teacher, labels)
    assert loss.isnan()
    assert gradient.isnan().any(-1).tolist() == [False, True, False]


# --- Nothing counts -------------------------------------------------------------------------------------------


@both_kinds
@every_dtype
@pytest.mark.parametrize("why", ["ignored", "weight 0", "no rows", "no rows, 3-D"])
def test_no_row_counts(variant, divergence, dtype, why):
    student, teacher, labels = make(0 if why.startswith("no rows") else 3, 5, dtype)
    weight = None
    if why == "ignored":
        labels[:] = -100
    elif why == "weight 0":
        weight = torch.zeros(3)
    elif why == "no rows, 3-D":
        student, teacher, labels = student.view(4, 0, 5), teacher.view(4, 0, 5), labels.view(4, 0)
    student[..., 2] = NAN
    teacher[..., 0] = INF
    for reduction, alpha in product(("mean", "sum", "none"), (0.0, 0.5, 1.0)):
        options = {"divergence": divergence, "reduction": reduction, "alpha": alpha}
        loss, gradient = run(student, teacher, labels, sample_weight=weight, **options)
        assert loss.shape == (labels.shape if reduction == "none" else ())
        assert (loss == 0).all()
        assert gradient.shape == student.shape
        assert (gradient == 0).all()


def test_cross_entropy_where_only_the_soft_term_has_rows(variant):
    """unlabeled="distill" without a single label: the hard mean is 0, not 0 / 0."""
    student, teacher, _ = make(3, 5)
    labels = torch.full((3,), -100)
    got = run(student, teacher, labels, unlabeled="distill", alpha=0.3)
    want = loss_and_gradient(student, teacher, labels, unlabeled="distill", alpha=0.3)
    torch.testing.assert_close(got[0].double(), want[0])
    torch.testing.assert_close(got[1].double(), want[1])


# --- Large logits, one class ----------------------------------------------------------------------------------


@both_kinds
@every_input
def test_large_logits(variant, divergence, classes, dtype):
    student, teacher, labels = make(4, classes, dtype)
    student[0] += 1e4  # both far from 0, on different sides
    teacher[0] -= 1e4
    student[1, 1], teacher[1, 2] = 1e4, 1e4  # each has another peak
    student[2, 1], teacher[2, 1] = 1e4, 1e4  # the same peak
    student[3, -1], teacher[3, -1] = -1e4, -1e4
    for alpha, temperature in ((0.0, 1.0), (0.5, 4.0), (0.5, 2.5), (1.0, 0.5)):
        options = {"divergence": divergence, "temperature": temperature, "alpha": alpha}
        got = run(student, teacher, labels, **options)
        assert got[0].isfinite()
        assert got[1].isfinite().all()
        assert_accurate(*got, student, teacher, labels, **options)


@both_kinds
@every_dtype
def test_one_class(variant, divergence, dtype):
    student, teacher, labels = make(3, 1, dtype)
    for temperature, label_smoothing in product((1.0, 2.5), (0.0, 0.1)):
        options = {"temperature": temperature, "label_smoothing": label_smoothing, "reduction": "none"}
        loss, gradient = run(student, teacher, labels, divergence=divergence, **options)
        assert loss.tolist() == [0, 0, 0]
        # With smoothing the target's parts, 0.9 and 0.1, may round to other than 1.
        assert (gradient.abs() <= (2.0**-23 if label_smoothing else 0)).all()


# --- Labels and smoothing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=["int64", "int32"])
@pytest.mark.parametrize("label", [5, -1, -101, 2**31 - 1])
def test_label_out_of_range(variant, dtype, label):
    student, teacher, _ = make(4, 5)
    labels = torch.tensor([0, -100, label, 77], dtype=dtype)  # the first bad row is the one named
    for alpha in (0.0, 0.5, 1.0):
        with pytest.raises(IndexError, match=rf"labels must be in \[0, 5\).*-100.*row 2 holds {label}$"):
            pydistill.distillation_loss(student, teacher, labels, alpha=alpha)


def test_label_out_of_range_is_an_error_in_a_row_of_weight_0_too(variant):
    student, teacher, _ = make(2, 5)
    with pytest.raises(IndexError, match="row 1 holds 9"):
        pydistill.distillation_loss(student, teacher, torch.tensor([0, 9]), sample_weight=torch.tensor([1.0, 0.0]))


@every_size
@pytest.mark.parametrize("weighted", [False, True])
def test_label_smoothing_with_a_masked_class_is_infinite_as_in_torch(variant, classes, weighted):
    student, _, labels = make(3, classes)
    student[1, 1] = -INF
    class_weight = torch.rand(classes) + 0.5 if weighted else None
    leaf = student.clone().requires_grad_()
    want = F.cross_entropy(leaf, labels, class_weight, label_smoothing=0.1, reduction="none")
    want.sum().backward()
    options = {"alpha": 0.0, "class_weight": class_weight, "label_smoothing": 0.1, "reduction": "none"}
    loss, gradient = run(student, None, labels, **options)
    assert loss[1] == INF
    torch.testing.assert_close(loss, want.detach())
    torch.testing.assert_close(gradient, leaf.grad)


# --- Probabilities --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "total"),
    [([0.5, 0.502], "1.002"), ([0.5, 0.498], "0.998"), ([1.5, -0.5], "1"), ([0.0, 0.0], "0"), ([NAN, 1.0], "nan")],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_bad_probabilities(row, total, dtype):
    probs = torch.tensor([[0.2, 0.8], [1.0, 0.0], row], dtype=dtype)
    with pytest.raises(ValueError, match=rf"row 2 sums to {total} .*Are these logits\?"):
        pydistill.SoftTargets.from_probs(probs)
    assert pydistill.SoftTargets.from_probs(probs, validate=False).shape == (3, 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_probabilities_of_half_types_have_a_wider_tolerance(dtype):
    good, bad = (torch.tensor([[0.5, 0.5 + excess]], dtype=dtype) for excess in (2.0**-7, 2.0**-6))
    assert pydistill.SoftTargets.from_probs(good).logits.dtype == torch.float32
    with pytest.raises(ValueError, match=r"row 0 sums to 1\.01562"):
        pydistill.SoftTargets.from_probs(bad)


@every_dtype
def test_probabilities_given_as_logits_warn_once(variant, dtype, monkeypatch):
    monkeypatch.setattr(checks, "_probability_warning_given", False)
    student, _, labels = make(2, 4, dtype)
    probs = torch.tensor([[0.5, 0.25, 0.25, 0.0], [0.0, 0.0, 0.0, 1.0]], dtype=dtype)
    with pytest.warns(UserWarning, match=r"teacher looks like probabilities.*SoftTargets\.from_probs") as caught:
        pydistill.distillation_loss(student, probs.mT.contiguous().mT, labels)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pydistill.distillation_loss(student, probs, labels)


@every_dtype
@pytest.mark.parametrize(
    "case", ["logits", "sum 1.002", "negative", "one class", "SoftTargets", "alpha 0", "second row", "no rows"]
)
def test_no_warning_without_probabilities(variant, dtype, case, monkeypatch):
    monkeypatch.setattr(checks, "_probability_warning_given", False)
    rows = {
        "logits": [[0.5, 0.5, 0.5]],
        "sum 1.002": [[0.5, 0.5, 0.002]],
        "negative": [[1.5, -0.25, -0.25]],
        "one class": [[1.0]],
        "second row": [[0.5, 2.0, 0.0], [0.5, 0.5, 0.0]],
    }.get(case, [[0.5, 0.5, 0.0]])
    teacher = torch.tensor(rows, dtype=dtype)[: 0 if case == "no rows" else None]
    student, labels = torch.zeros_like(teacher), torch.zeros(len(teacher), dtype=torch.int64)
    if case == "SoftTargets":
        teacher = pydistill.SoftTargets.from_logits(teacher)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pydistill.distillation_loss(student, teacher, labels, alpha=0.0 if case == "alpha 0" else 0.5)


# --- Arguments ------------------------------------------------------------------------------------------------

logits = torch.randn


@pytest.mark.parametrize(
    ("student", "others", "words"),
    [
        (logits(3, 5), {"teacher": logits(3, 4)}, ["teacher (3, 4)", "student_logits (3, 5)"]),
        (logits(3, 5), {"teacher": logits(5)}, ["teacher (5,)", "student_logits (3, 5)"]),
        (logits(3, 5), {"labels": torch.zeros(4).long()}, ["labels (4,)", "student_logits (3, 5)"]),
        (logits(3, 5), {"sample_weight": torch.ones(2)}, ["sample_weight", "(3,)", "(2,)", "student_logits (3, 5)"]),
        (logits(3, 5), {"class_weight": torch.ones(3)}, ["class_weight", "(5,)", "(3,)", "student_logits (3, 5)"]),
        (logits(2, 5, 3), {"labels": torch.zeros(2, 3).long()}, ["labels (2, 3)", "movedim(1, -1)"]),
        (logits(2, 5, 3, 4), {"labels": torch.zeros(2, 3, 4).long()}, ["(2, 5, 3, 4)", "movedim(1, -1)"]),
        (logits(3, 5), {"teacher": logits(3, 5, device="meta")}, ["teacher on meta", "student_logits on cpu"]),
        (logits(3, 5), {"labels": torch.zeros(3, device="meta").long()}, ["labels on meta", "student_logits on cpu"]),
        (
            logits(3, 5),
            {"sample_weight": torch.ones(3, device="meta")},
            ["sample_weight on meta", "student_logits on cpu"],
        ),
    ],
)
def test_shapes_and_devices_that_disagree(variant, student, others, words):
    rest = {"teacher": torch.zeros_like(student), "labels": torch.zeros(student.shape[:-1], dtype=torch.int64)}
    with pytest.raises(ValueError, match="student_logits") as caught:
        pydistill.distillation_loss(student, **(rest | others))
    message = str(caught.value)
    assert [word for word in words if word not in message] == []
    assert ("movedim" in message) == ("movedim(1, -1)" in words)


@both_kinds
def test_missing_teacher_or_labels(variant, divergence):
    student, teacher, labels = make(2, 5)
    for alpha in (0.0, 0.5, 0.999):
        with pytest.raises(ValueError, match="labels must be given unless alpha is 1"):
            pydistill.distillation_loss(student, teacher, None, divergence=divergence, alpha=alpha)
    for alpha in (1.0, 0.5, 0.001):
        with pytest.raises(ValueError, match="teacher must be given unless alpha is 0"):
            pydistill.distillation_loss(student, None, labels, divergence=divergence, alpha=alpha)
    assert pydistill.distillation_loss(student, teacher, None, divergence=divergence, alpha=1.0) > 0
    assert pydistill.distillation_loss(student, None, labels, divergence=divergence, alpha=0.0) > 0


# --- Derivatives ----------------------------------------------------------------------------------------------


@both_kinds
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_second_derivative(variant, divergence, reduction, dtype):
    """A Hessian times a vector, and the gradient's own derivative with respect to grad_output."""
    student, teacher, labels = make(3, 5, dtype)
    labels[1] = -100
    options = {"divergence": divergence, "temperature": 2.0, "alpha": 0.7, "reduction": reduction}
    tolerance = {"rtol": 1e-10, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-6}
    vector = torch.randn(3, 5, dtype=torch.float64)

    def derivatives(loss_of, dtype):
        leaf = student.detach().to(dtype).requires_grad_()
        loss = loss_of(leaf, teacher, labels, **options)
        grad_output = torch.linspace(1, 2, loss.numel()).reshape(loss.shape).to(dtype).requires_grad_()
        (first,) = torch.autograd.grad(loss, leaf, grad_output, create_graph=True)
        second = torch.autograd.grad((first * vector.to(dtype)).sum(), (leaf, grad_output))
        return [x.detach().double() for x in (first, *second)]

    got = derivatives(pydistill.distillation_loss, dtype)
    want = derivatives(reference.loss, torch.float64)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, **tolerance)
    assert got[1].abs().max() > 1e-3


@both_kinds
@every_dtype
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_backward_twice_with_a_retained_graph(variant, divergence, dtype, reduction):
    student, teacher, labels = make(3, 5, dtype)
    options = {"divergence": divergence, "temperature": 2.0, "reduction": reduction}
    leaf = student.clone().requires_grad_()
    loss = pydistill.distillation_loss(leaf, teacher, labels, **options)
    ones = torch.ones_like(loss)
    scales = (ones, -2.5 * ones, 0 * ones, ones)
    gradients = [torch.autograd.grad(loss, leaf, scale, retain_graph=True)[0] for scale in scales]
    _, want = loss_and_gradient(student, teacher, labels, **options)
    tolerance = {"rtol": 2 * torch.finfo(dtype).eps + 1e-6, "atol": 1e-6}
    for scale, gradient in zip((1, -2.5, 0, 1), gradients, strict=True):
        torch.testing.assert_close(gradient.double(), scale * want, **tolerance)
    assert torch.equal(gradients[0], gradients[3])


# --- Offsets beyond 2^31 --------------------------------------------------------------------------------------


@both_kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_rows_more_than_2_to_the_31_elements_apart(variant, divergence, dtype, tmp_path):
    """Student, teacher and the gradient in place; the storage is a sparse file, of which a few pages exist."""
    stride, n, classes = 2**30 + 3, 4, 37
    start = {"student": 0, "teacher": 64}
    size = stride * (n - 1) + 128
    memory = torch.from_file(str(tmp_path / "logits"), shared=True, size=size, dtype=dtype)
    views = {name: memory.as_strided((n, classes), (stride, 1), at).detach() for name, at in start.items()}
    student, teacher, labels = make(n, classes, dtype)
    options = {"divergence": divergence, "temperature": 2.0, "alpha": 0.7}
    far_teacher = views["teacher"].copy_(teacher)
    far_student = views["student"].copy_(student)
    got = run(far_student, far_teacher, labels, **options)
    assert_accurate(*got, student, teacher, labels, **options)

    leaf = student.clone().requires_grad_()
    far_student = views["student"].copy_(leaf)
    loss = pydistill.distillation_loss(far_student, teacher, labels, inplace=True, **options)
    loss.backward()
    assert torch.equal(leaf.grad, got[1])
    assert torch.equal(far_teacher, teacher)
