"""Each option against the float64 reference; the metrics; the module."""

import math

import pytest
import reference
import torch
import torch.nn.functional as F
from conftest import KINDS

import pydistill
from pydistill.engine import backend, options
from pydistill.engine.options import NAMES, LossKeywords

NAN = math.nan
N, C = 6, 9
REDUCTIONS = ("mean", "sum", "none")
DTYPES = (torch.float32, torch.float64, torch.float16)
both_kinds = pytest.mark.parametrize("divergence", KINDS)
every_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def make(dtype=torch.float32):
    """(student, teacher, labels); rows 1 and 4 are unlabelled."""
    student, teacher = (2 * torch.randn(2, N, C)).to(dtype)
    return student, teacher, torch.tensor([3, -100, 0, 8, -100, 3])


def run(student, teacher=None, labels=None, **options):
    """(loss, gradient) for a grad_output of 1.5, 2.5, ... per row, or of 1.5."""
    student = student.clone().requires_grad_()
    loss = pydistill.distillation_loss(student, teacher, labels, **options)
    loss.backward(grad_output_like(loss))
    return loss.detach(), student.grad


def grad_output_like(loss):
    return (torch.arange(loss.numel(), dtype=loss.dtype) + 1.5).reshape(loss.shape)


def assert_close(got, want, dtype):
    """A wrong option is wrong by far more than these; accuracy has tests of its own."""
    rtol = {torch.float32: 1e-5, torch.float64: 1e-11, torch.float16: 1e-3}[dtype]
    torch.testing.assert_close(got.double(), want, rtol=rtol, atol=rtol / 10)


def check(dtype, labels=None, **options):
    """Loss and gradient against the reference, on fresh logits."""
    student, teacher, own_labels = make(dtype)
    labels = own_labels if labels is None else labels
    loss, gradient = run(student, teacher, labels, **options)
    number = options.get("num_items")
    if isinstance(number, torch.Tensor):
        options["num_items"] = float(number)
    options |= {name: float(options[name]) for name in ("temperature", "alpha") if name in options}
    grad_output = grad_output_like(loss)
    want = reference.loss_and_gradient(student, teacher, labels, grad_output=grad_output, **options)
    assert_close(loss, want[0], dtype)
    assert_close(gradient, want[1], dtype)


SAMPLE_WEIGHT = torch.tensor([0.5, 2.0, 0.0, 1.5, 0.25, 3.0])
CLASS_WEIGHT = torch.tensor([2.0, 1.0, 0.5, 3.0, 0.0, 1.0, 1.0, 0.1, 0.7])

CASES = {
    "defaults": {},
    "temperature": {"temperature": 3.0},
    "integer temperature": {"temperature": 3},
    "tensor temperature and alpha": {"temperature": torch.tensor(2.5), "alpha": torch.tensor(0.25)},
    "alpha 0": {"alpha": 0.0, "temperature": 3.0},
    "alpha 1": {"alpha": 1.0, "temperature": 3.0},
    "integer alpha": {"alpha": 1, "temperature": 3.0},
    "t_squared": {"t_squared": False, "temperature": 3.0},
    "ignore_index, a class": {"ignore_index": 3, "labels": torch.tensor([3, 1, 0, 8, 2, 3])},
    "ignore_index, -1": {"ignore_index": -1, "labels": torch.tensor([3, -1, 0, 8, -1, -1])},
    "all labelled": {"labels": torch.arange(N)},
    "unlabeled": {"unlabeled": "distill"},
    "unlabeled, alpha 1": {"unlabeled": "distill", "alpha": 1.0},
    "unlabeled, alpha 0": {"unlabeled": "distill", "alpha": 0.0},
    "sample_weight": {"sample_weight": SAMPLE_WEIGHT},
    "sample_weight, unlabeled": {"sample_weight": SAMPLE_WEIGHT, "unlabeled": "distill"},
    "class_weight": {"class_weight": CLASS_WEIGHT},
    "class_weight, alpha 0": {"class_weight": CLASS_WEIGHT, "alpha": 0.0},
    "label_smoothing": {"label_smoothing": 0.1},
    "label_smoothing 1": {"label_smoothing": 1.0},
    "everything": {
        "temperature": 4.0,
        "alpha": 0.7,
        "sample_weight": SAMPLE_WEIGHT,
        "class_weight": CLASS_WEIGHT,
        "label_smoothing": 0.2,
        "unlabeled": "distill",
    },
}


# --- Against the reference ------------------------------------------------------------------------------------


@both_kinds
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_options_agree_with_the_reference(variant, divergence, options):
    for reduction in REDUCTIONS:
        check(torch.float32, divergence=divergence, reduction=reduction, **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=["float64", "float16"])
@pytest.mark.parametrize("name", ["defaults", "everything"])
def test_options_of_other_dtypes(variant, dtype, name):
    for reduction in REDUCTIONS:
        check(dtype, reduction=reduction, **CASES[name])


@pytest.mark.parametrize(
    "num_items",
    [7, 2.5, torch.tensor(13), torch.tensor(3.5), (5.0, 4.0), (1, 100)],
    ids=["integer", "float", "integer tensor", "tensor", "pair", "integer pair"],
)
@pytest.mark.parametrize("name", ["defaults", "alpha 0", "alpha 1", "everything"])
def test_num_items_replaces_the_denominators(variant, num_items, name):
    check(torch.float32, num_items=num_items, **CASES[name])


def test_num_items_as_a_pair_of_tensors(variant):
    student, teacher, labels = make()
    loss = pydistill.distillation_loss(student, teacher, labels, num_items=(torch.tensor(5), torch.tensor(4.0)))
    assert_close(loss, reference.loss(student, teacher, labels, num_items=(5.0, 4.0)), torch.float32)


@both_kinds
def test_rows_that_do_not_count_are_not_looked_at(variant, divergence):
    """The other rows give, to the bit, what they give alone; NaN and inf in these do not show."""
    student, teacher, labels = make()
    weight = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0, 2.0])
    student[1], teacher[2], student[4, 0], teacher[4] = NAN, math.inf, -math.inf, NAN
    kept = torch.tensor([0, 3, 5])
    for reduction in REDUCTIONS:
        options = {"divergence": divergence, "reduction": reduction}
        loss, gradient = run(student, teacher, labels, sample_weight=weight, **options)
        alone = run(student[kept], teacher[kept], labels[kept], sample_weight=weight[kept], **options)
        if reduction == "none":
            assert loss[[1, 2, 4]].tolist() == [0, 0, 0]
            assert torch.equal(loss[kept], alone[0])
            continue  # here grad_output differs by row
        assert torch.equal(loss, alone[0])
        assert torch.equal(gradient[kept], alone[1])
        assert (gradient[[1, 2, 4]] == 0).all()


@both_kinds
def test_distill_keeps_the_soft_term_of_unlabelled_rows_alone(variant, divergence):
    student, teacher, labels = make()
    options = {"divergence": divergence, "reduction": "none", "temperature": 2.0}
    both = pydistill.distillation_loss(student, teacher, labels, unlabeled="distill", alpha=0.3, **options)
    soft = pydistill.distillation_loss(student, teacher, alpha=1.0, **options)
    torch.testing.assert_close(both[[1, 4]], 0.3 * soft[[1, 4]])
    assert (both[[0, 2, 3, 5]] > 0.3 * soft[[0, 2, 3, 5]]).all()


@every_reduction
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
def test_alpha_0_is_torchs_cross_entropy(variant, reduction, weighted, label_smoothing):
    student, _, labels = make()
    class_weight = CLASS_WEIGHT if weighted else None
    options = {"label_smoothing": label_smoothing, "reduction": reduction}
    leaf = student.clone().requires_grad_()
    want = F.cross_entropy(leaf, labels, class_weight, **options)
    want.backward(grad_output_like(want))
    for teacher in (None, torch.full((1,), NAN)):  # not evaluated, not looked at
        loss, gradient = run(student, teacher, labels, alpha=0.0, class_weight=class_weight, **options)
        torch.testing.assert_close(loss, want.detach())
        torch.testing.assert_close(gradient, leaf.grad)


def test_class_weights_of_0_are_0_over_0_as_in_torch(variant):
    student, _, _ = make()
    labels = torch.full((N,), 4)
    leaf = student.clone().requires_grad_()
    want = F.cross_entropy(leaf, labels, CLASS_WEIGHT)
    want.backward()
    assert want.isnan()
    loss, gradient = run(student, None, labels, alpha=0.0, class_weight=CLASS_WEIGHT)
    assert loss.isnan()
    torch.testing.assert_close(gradient, leaf.grad, equal_nan=True)


def test_a_schedule_changes_the_result_at_every_step():
    """Also with more values than the compiled backend's table of options keeps."""
    student, teacher, labels = make()
    for step in range(300):
        alpha = step / 299
        loss = pydistill.distillation_loss(student, teacher, labels, alpha=alpha, temperature=1 + alpha)
        if step % 60 == 0 or step == 299:
            want = reference.loss(student, teacher, labels, alpha=alpha, temperature=1 + alpha)
            assert_close(loss, want, torch.float32)


# --- Metrics --------------------------------------------------------------------------------------------------


def metrics_of(*args, **options):
    loss, metrics = pydistill.distillation_loss(*args, return_metrics=True, **options)
    return loss, metrics


def numbers(metrics):
    """agreement, accuracy and the two denominators."""
    return [float(metrics.agreement), float(metrics.accuracy), *map(float, metrics.num_items)]


@both_kinds
@every_reduction
@pytest.mark.parametrize("name", ["defaults", "temperature", "everything", "alpha 0", "alpha 1", "t_squared"])
def test_metrics_hold_the_terms_of_the_loss(variant, divergence, reduction, name):
    student, teacher, labels = make()
    options = CASES[name] | {"divergence": divergence, "reduction": reduction}
    alpha = options.get("alpha", 0.5)
    leaf = student.clone().requires_grad_()
    loss, metrics = metrics_of(leaf, teacher, labels, **options)
    loss.backward(grad_output_like(loss))
    plain, gradient = run(student, teacher, labels, **options)
    assert torch.equal(loss, plain)
    assert torch.equal(leaf.grad, gradient)
    for term, share in ((metrics.soft_loss, 1.0), (metrics.hard_loss, 0.0)):
        assert term.shape == loss.shape
        assert term.dtype == loss.dtype
        assert not term.requires_grad
        if alpha == 1 - share:
            assert term.isnan().all()
        else:
            want = reference.loss(student, teacher, labels, **(options | {"alpha": share}))
            assert_close(term, want, torch.float32)
    soft, hard = (x.nan_to_num() for x in metrics[:2])
    epsilon = torch.finfo(loss.dtype).eps
    torch.testing.assert_close(alpha * soft + (1 - alpha) * hard, loss.detach(), rtol=4 * epsilon, atol=4 * epsilon)


@every_reduction
@every_dtype
def test_shares_and_denominators(variant, reduction, dtype):
    """Ties go to the lowest class; a NaN disagrees, but counts; what does not count is not counted."""
    rows = [  # student, teacher, label, sample weight
        ([0, 5, 1], [1, 9, 2], 1, 0.5),  # agree, correct
        ([5, 5, 0], [7, 0, 7], 0, 2.0),  # ties: both 0; correct
        ([0, 5, 5], [0, 0, 7], 2, 1.0),  # a tie: 1 against 2; wrong
        ([-1, -1, -1], [3, 3, 3], 0, 1.5),  # ties throughout
        ([NAN, 5, 1], [1, 9, 2], 1, 1.0),  # NaN in the student: neither
        ([0, 5, 1], [1, 9, NAN], 1, 1.0),  # NaN in the teacher: correct only
        ([0, 5, 1], [1, 9, 2], -100, 4.0),  # unlabelled; agree
        ([0, 5, 1], [1, 9, 2], 1, 0.0),  # of no weight
    ]
    student, teacher = (torch.tensor([row[k] for row in rows], dtype=dtype) for k in (0, 1))
    labels, weight = (torch.tensor([row[k] for row in rows]) for k in (2, 3))
    options = {"reduction": reduction, "sample_weight": weight, "class_weight": torch.tensor([1.0, 2.0, 4.0])}
    hard_items = 0.5 * 2 + 2.0 * 1 + 1.0 * 4 + 1.5 * 1 + 1.0 * 2 + 1.0 * 2
    for unlabeled, want in (
        ("skip", [3 / 6, 4 / 6, 7.0, hard_items]),
        ("distill", [4 / 7, 4 / 6, 11.0, hard_items]),
    ):
        loss, metrics = metrics_of(student, teacher, labels, unlabeled=unlabeled, **options)
        assert numbers(metrics) == pytest.approx(want, rel=1e-6)
        assert {x.dtype for x in (metrics.agreement, metrics.accuracy, *metrics.num_items)} == {loss.dtype}


def test_ties_between_distant_classes(variant):
    """Equal maxima in different blocks of a kernel, and at different places of a vector."""
    for first, second in ((0, 2999), (1023, 1024), (511, 512), (17, 2047), (2990, 2998)):
        student, teacher = torch.zeros(2, 1, 3000)
        student[0, [first, second]] = 1.0
        teacher[0, first] = 2.0
        _, metrics = metrics_of(student, teacher, torch.tensor([first]))
        assert numbers(metrics) == [1, 1, 1, 1]
        _, metrics = metrics_of(teacher, student, torch.tensor([second]))
        assert numbers(metrics) == [1, 0, 1, 1]


@both_kinds
def test_terms_that_are_not_evaluated_are_nan(variant, divergence):
    student, teacher, labels = make()
    right = (student.argmax(-1) == labels)[labels >= 0].double().mean().item()
    same = (student.argmax(-1) == teacher.argmax(-1))[labels >= 0].double().mean().item()
    _, metrics = metrics_of(student, None, labels, divergence=divergence, alpha=0.0)
    assert metrics.soft_loss.isnan()
    assert metrics.agreement.isnan()
    assert metrics.hard_loss.isfinite()
    assert float(metrics.accuracy) == pytest.approx(right)
    _, metrics = metrics_of(student, teacher, labels, divergence=divergence, alpha=1.0)
    assert metrics.hard_loss.isnan()
    assert metrics.soft_loss.isfinite()
    assert float(metrics.agreement) == pytest.approx(same)
    _, metrics = metrics_of(student, teacher, divergence=divergence, alpha=1.0)
    assert metrics.hard_loss.isnan()
    assert metrics.accuracy.isnan()
    assert float(metrics.num_items[0]) == N


@every_reduction
@pytest.mark.parametrize("why", ["ignored", "weight 0", "no rows"])
def test_shares_of_no_rows_are_nan(variant, reduction, why):
    rows = 0 if why == "no rows" else 2
    student, teacher = torch.randn(2, rows, C)
    labels = torch.full((rows,), -100 if why == "ignored" else 1)
    weight = torch.zeros(rows) if why == "weight 0" else None
    loss, metrics = metrics_of(student, teacher, labels, reduction=reduction, sample_weight=weight)
    assert metrics.agreement.isnan()
    assert metrics.accuracy.isnan()
    assert torch.equal(metrics.soft_loss, torch.zeros_like(loss))
    assert torch.equal(metrics.hard_loss, torch.zeros_like(loss))


def test_metrics_say_which_num_items_were_used(variant):
    student, teacher, labels = make()
    for given, want in ((7, (7, 7)), (torch.tensor(2.5), (2.5, 2.5)), ((3, 4.5), (3, 4.5))):
        _, metrics = metrics_of(student, teacher, labels, num_items=given)
        assert tuple(map(float, metrics.num_items)) == want


@every_dtype
@pytest.mark.parametrize("classes", [1, 5, 16, 37, 1100])
def test_argmax_at_every_place(variant, classes, dtype):
    """The first of equal maxima, in every lane, in tails and beyond a block."""
    places = torch.arange(classes) if classes < 100 else torch.randint(classes, (60,))
    from_place_on = torch.arange(classes) >= places.unsqueeze(1)
    student = torch.where(from_place_on, 2.0, -1.0).to(dtype)
    teacher = F.one_hot(places, classes).to(dtype)
    _, metrics = metrics_of(student, teacher * 3 - 1, places)
    assert (metrics.agreement, metrics.accuracy) == (1, 1)
    if classes > 1:
        _, metrics = metrics_of(student, teacher * 3 - 1, (places + 1) % classes)
        assert metrics.accuracy == 0


class Subclass(torch.Tensor):
    """A tensor subclass: its loss is the differentiable torch formula."""


@both_kinds
@every_reduction
@pytest.mark.parametrize("name", CASES)
def test_torch_formula_agrees(divergence, reduction, name):
    """The formula for subclasses, other devices and functorch has the same options and metrics as the engine."""
    student, teacher, labels = make(torch.float64)
    options = CASES[name] | {"divergence": divergence, "reduction": reduction}
    labels = options.pop("labels", labels)
    leaf, formula_leaf = (student.clone().requires_grad_() for _ in range(2))
    loss, metrics = metrics_of(leaf, teacher, labels, **options)
    formula_loss, formula_metrics = metrics_of(formula_leaf.as_subclass(Subclass), teacher, labels, **options)
    assert pydistill.backend_info().last_call == "torch formula: tensor subclass Subclass"
    loss.backward(grad_output_like(loss))
    formula_loss.backward(grad_output_like(loss))
    got = (formula_loss, *formula_metrics[:4], *formula_metrics.num_items, formula_leaf.grad)
    want = (loss, *metrics[:4], *metrics.num_items, leaf.grad)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(torch.Tensor(g.detach()), w.detach(), rtol=1e-10, atol=1e-12, equal_nan=True)


# --- DistillationLoss -----------------------------------------------------------------------------------------


@every_reduction
@pytest.mark.parametrize("name", ["defaults", "temperature", "unlabeled", "class_weight", "everything"])
def test_module_is_the_function(variant, reduction, name):
    student, teacher, labels = make()
    options = CASES[name] | {"reduction": reduction}
    criterion = pydistill.DistillationLoss(**options)
    want = run(student, teacher, labels, **options)
    leaf = student.clone().requires_grad_()
    loss = criterion(leaf, teacher, labels)
    loss.backward(grad_output_like(loss))
    assert torch.equal(loss, want[0])
    assert torch.equal(leaf.grad, want[1])
    soft_targets = pydistill.SoftTargets.from_logits(teacher)
    assert torch.equal(criterion(student, soft_targets, labels), want[0])


def test_module_options_may_be_overridden_and_changed():
    student, teacher, labels = make()
    criterion = pydistill.DistillationLoss(temperature=2.0, alpha=0.7)

    def function(**options):
        return pydistill.distillation_loss(student, teacher, labels, **options)

    once = {"sample_weight": SAMPLE_WEIGHT, "num_items": 3, "temperature": 5.0}
    assert torch.equal(criterion(student, teacher, labels, **once), function(alpha=0.7, **once))
    assert torch.equal(criterion(student, teacher, labels), function(alpha=0.7, temperature=2.0))
    criterion.alpha, criterion.temperature = 0.2, 4.0
    assert torch.equal(criterion(student, teacher, labels), function(alpha=0.2, temperature=4.0))
    loss, metrics = criterion(student, teacher, labels, return_metrics=True)
    assert torch.equal(loss, function(alpha=0.2, temperature=4.0))
    assert isinstance(metrics, pydistill.LossMetrics)
    criterion.alpha = 1.0
    assert torch.equal(criterion(student, teacher), criterion(student, teacher, None))
    criterion.alpha = 2.0
    with pytest.raises(ValueError, match=r"alpha.*2\.0"):
        criterion(student, teacher, labels)


@pytest.mark.parametrize(
    ("valid", "wrong"),
    [
        ({"alpha": 1.0}, {"alpha": True}),
        ({"t_squared": True}, {"t_squared": 1}),
        ({"ignore_index": 1}, {"ignore_index": True}),
        ({"label_smoothing": 0.0}, {"label_smoothing": False}),
        ({"temperature": 1.0}, {"temperature": True}),
    ],
)
def test_a_value_that_equals_a_checked_one_is_checked_too(valid, wrong):
    """The checked options are kept, and True == 1 == 1.0."""
    student, teacher, labels = torch.randn(3, 5), torch.randn(3, 5), torch.tensor([0, 1, 2])
    pydistill.distillation_loss(student, teacher, labels, **valid)
    with pytest.raises(TypeError, match=next(iter(wrong))):
        pydistill.distillation_loss(student, teacher, labels, **wrong)


def test_a_schedule_does_not_fill_memory(variant):
    """Every step has another alpha, and what is kept for each is thrown away now and then."""
    student, teacher = torch.randn(1, 5), torch.randn(1, 5)
    for alpha in torch.linspace(0.5, 1, 600).tolist():
        pydistill.distillation_loss(student, teacher, torch.tensor([1]), alpha=alpha)
    assert len(options._checked) <= 256
    assert len(getattr(backend.current(), "_options", ())) <= 256


def test_the_four_signatures_agree():
    functions = (pydistill.distillation_loss, pydistill.linear_distillation_loss)
    modules = (pydistill.DistillationLoss.__init__, pydistill.LinearDistillationLoss.__init__)
    first, *others = ({k: v for k, v in f.__kwdefaults__.items() if k in NAMES} for f in (*functions, *modules))
    assert all(list(other.items()) == list(first.items()) for other in others)
    assert set(first) == set(NAMES)
    for function, module in zip(functions, modules, strict=True):  # student_bias belongs to a call
        assert module.__kwdefaults__ == {k: v for k, v in function.__kwdefaults__.items() if k != "student_bias"}
    hints = LossKeywords.__annotations__
    assert {name: hints[name] for name in NAMES} == {name: functions[0].__annotations__[name] for name in NAMES}


def test_module_repr_and_buffers():
    assert repr(pydistill.DistillationLoss()) == "DistillationLoss()"
    criterion = pydistill.DistillationLoss(
        divergence="reverse_kl", temperature=4, reduction="sum", class_weight=torch.ones(2)
    )
    assert repr(criterion) == (
        "DistillationLoss(divergence='reverse_kl', temperature=4, class_weight=tensor([1., 1.]), reduction='sum')"
    )
    assert criterion.state_dict() == {}
    assert criterion.double().class_weight.dtype == torch.float64


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"alpha": 1.5}, "alpha.*1.5"),
        ({"temperature": 0.0}, "temperature.*0.0"),
        ({"divergence": "kl"}, "divergence.*'kl'"),
        ({"beta": 0.5}, "beta.*0.5"),
        ({"reduction": "batchmean"}, "mean"),
        ({"num_items": 2, "reduction": "sum"}, "num_items"),
    ],
)
def test_module_checks_options_when_it_is_made(option, words):
    with pytest.raises(ValueError, match=words):
        pydistill.DistillationLoss(**option)
