"""Denominators of the mean: as counted by loss_items, as given by num_items, and where no row counts."""

import math

import pytest
import torch
from conftest import KINDS, every_path

import pydistill
from pydistill.formulas import DIVERGENCES

N, C = 6, 9
LABELS = torch.tensor([3, -100, 0, 8, 2, -100])
SAMPLE_WEIGHT = torch.tensor([0.5, 2.0, 0.0, 1.5, 0.25, 3.0])
CLASS_WEIGHT = torch.tensor([2.0, 1.0, 0.5, 3.0, 0.0, 1.0, 1.0, 0.1, 0.7])
# (options, soft, hard), by hand.
COUNTED = {
    "labels": ({}, 4, 4),
    "distill": ({"unlabeled": "distill"}, 6, 4),
    "sample_weight": ({"sample_weight": SAMPLE_WEIGHT}, 2.25, 2.25),
    "sample_weight, distill": ({"sample_weight": SAMPLE_WEIGHT, "unlabeled": "distill"}, 7.25, 2.25),
    "class_weight": ({"class_weight": CLASS_WEIGHT}, 4, 3 + 2 + 0.7 + 0.5),
    "both": ({"sample_weight": SAMPLE_WEIGHT, "class_weight": CLASS_WEIGHT}, 2.25, 1.5 + 1.05 + 0.125),
    "ignore_index": ({"ignore_index": 0, "labels": LABELS.clamp(min=0)}, 3, 3),
}
counted = pytest.mark.parametrize(("options", "soft", "hard"), COUNTED.values(), ids=COUNTED)


def run(student, teacher=None, labels=None, *, formula=False, **options):
    """(loss, gradient, LossMetrics), on the current backend or by the differentiable formula."""
    student = student.clone().requires_grad_()
    options["return_metrics"] = True
    if formula:  # a functorch transform needs it
        gradient, (loss, metrics) = torch.func.grad(
            lambda s: (lambda loss, m: (loss, (loss, m)))(*pydistill.distillation_loss(s, teacher, labels, **options)),
            has_aux=True,
        )(student.detach())
        return loss, gradient, metrics
    loss, metrics = pydistill.distillation_loss(student, teacher, labels, **options)
    loss.backward()
    return loss.detach(), student.grad, metrics


both_paths = every_path("formula")


@pytest.fixture
def formula(path):
    return path == "formula"


@counted
def test_loss_items_counts_what_the_loss_divides_by(variant, options, soft, hard):
    labels = options.get("labels", LABELS)
    options = {name: value for name, value in options.items() if name != "labels"}
    items = pydistill.loss_items(labels, **options)
    assert items == pytest.approx((soft, hard), rel=1e-7)
    student, teacher = torch.randn(2, N, C, dtype=torch.float64)
    _, metrics = pydistill.distillation_loss(student, teacher, labels, **options, return_metrics=True)
    assert tuple(map(float, metrics.num_items)) == pytest.approx(items, rel=1e-15)


@counted
@both_paths
def test_metrics_of_every_path_name_the_same_denominators(formula, options, soft, hard):
    options = {"labels": LABELS, "alpha": 0.5} | options
    student, teacher = torch.randn(2, N, C)
    for alpha in (0.0, 0.5, 1.0):
        _, _, metrics = run(student, teacher, formula=formula, **options | {"alpha": alpha})
        assert tuple(map(float, metrics.num_items)) == pytest.approx((soft, hard), rel=1e-6)


@pytest.mark.parametrize("divergence", KINDS)
@pytest.mark.parametrize("unlabeled", ["skip", "distill"])
def test_loss_items_add_up_over_micro_batches(variant, divergence, unlabeled):
    student, teacher = torch.randn(2, N, C, dtype=torch.float64)
    parts = (slice(0, 1), slice(1, 2), slice(2, N))  # the second has no row that counts
    counted = {"class_weight": CLASS_WEIGHT, "unlabeled": unlabeled}
    options = counted | {"divergence": divergence, "temperature": 2.0}
    pairs = [pydistill.loss_items(LABELS[part], **counted) for part in parts]
    items = tuple(map(sum, zip(*pairs, strict=True)))
    whole, of_whole, _ = run(student, teacher, LABELS, **options)
    found = [run(student[p], teacher[p], LABELS[p], num_items=items, **options)[:2] for p in parts]
    torch.testing.assert_close(sum(loss for loss, _ in found), whole, rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.cat([g for _, g in found]), of_whole, rtol=1e-12, atol=1e-15)


def test_loss_items_of_square_labels_warn_of_nothing(recwarn):
    assert pydistill.loss_items(torch.tensor([[0, 1], [1, 0]]), sample_weight=torch.ones(2, 2)) == (4, 4)
    assert not recwarn.list


def test_loss_items_of_rows_without_labels():
    assert pydistill.loss_items(None, sample_weight=SAMPLE_WEIGHT) == (7.25, 0.0)
    assert pydistill.loss_items(torch.empty(0, dtype=torch.int64)) == (0.0, 0.0)
    assert pydistill.loss_items(torch.full((2, 3), -100)) == (0.0, 0.0)
    assert pydistill.loss_items(torch.ones(2, 3, dtype=torch.int32)) == (6.0, 6.0)
    assert pydistill.loss_items(torch.tensor(4)) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("exception", "words", "arguments"),
    [
        (ValueError, "labels must be given unless sample_weight", {"labels": None}),
        (TypeError, "labels must be a tensor, got list", {"labels": [1, 2]}),
        (TypeError, "labels must be class indices", {"labels": torch.ones(3)}),
        (IndexError, "row 1 holds -3", {"labels": torch.tensor([0, -3])}),
        (IndexError, r"\[0, 9\).*row 0 holds 9", {"labels": torch.tensor([9]), "class_weight": CLASS_WEIGHT}),
        (ValueError, "sample_weight must have the shape of labels", {"sample_weight": torch.ones(2)}),
        (ValueError, "sample_weight must be >= 0 and finite; row 2", {"sample_weight": torch.arange(4, -2, -1) - 2.5}),
        (ValueError, r"class_weight must have shape \(C,\)", {"class_weight": torch.ones(2, 2)}),
        (TypeError, "sample_weight must be a tensor, got list", {"sample_weight": [1.0]}),
        (ValueError, 'unlabeled must be "skip" or "distill"', {"unlabeled": "keep"}),
        (TypeError, "ignore_index must be an integer", {"ignore_index": 1.5}),
        (TypeError, "labels must be a dense tensor", {"labels": torch.ones(2, 2, dtype=torch.int64).to_sparse()}),
        (IndexError, "row 0 holds 9223372036854775807", {"labels": torch.tensor([2**63 - 1])}),
        (ValueError, r"class_weight must have shape \(C,\), got \(0,\)", {"class_weight": torch.ones(0)}),
    ],
)
def test_loss_items_refuses(exception, words, arguments):
    with pytest.raises(exception, match=words):
        pydistill.loss_items(**{"labels": LABELS} | arguments)


# --- No row counts --------------------------------------------------------------------------------------------


@both_paths
@pytest.mark.parametrize("why", ["ignored", "weight 0", "no rows"])
@pytest.mark.parametrize("divergence", KINDS)
def test_denominators_of_no_rows_are_0(formula, divergence, why):
    rows = 0 if why == "no rows" else 2
    student, teacher = torch.randn(2, rows, C)
    labels = torch.full((rows,), -100 if why == "ignored" else 1)
    weight = torch.zeros(rows) if why == "weight 0" else None
    options = {"divergence": divergence, "sample_weight": weight}
    loss, gradient, metrics = run(student, teacher, labels, formula=formula, **options)
    assert tuple(map(float, metrics.num_items)) == (0.0, 0.0)
    assert (float(loss), float(metrics.soft_loss), float(metrics.hard_loss)) == (0.0, 0.0, 0.0)
    assert not gradient.any()


@both_paths
@pytest.mark.parametrize("num_items", [0, 0.0, torch.tensor(0), (0, 0)], ids=["0", "0.0", "tensor", "pair"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_num_items_of_0_gives_0_whatever_the_rows_hold(formula, divergence, num_items):
    student, teacher = torch.randn(2, N, C)
    student[0], teacher[3, 2] = math.nan, math.inf
    options = {"divergence": divergence, "num_items": num_items}
    loss, gradient, metrics = run(student, teacher, LABELS, formula=formula, **options)
    assert (float(loss), float(metrics.soft_loss), float(metrics.hard_loss)) == (0.0, 0.0, 0.0)
    assert torch.equal(gradient, torch.zeros_like(student))
    assert tuple(map(float, metrics.num_items)) == (0.0, 0.0)


@both_paths
def test_num_items_of_0_for_the_hard_term_leaves_the_soft_one(formula):
    student, teacher = torch.randn(2, N, C)
    labels = torch.full((N,), -100)
    options = {"unlabeled": "distill", "temperature": 2.0, "formula": formula}
    loss, gradient, metrics = run(student, teacher, labels, num_items=(4, 0), **options)
    want, of_want, _ = run(student, teacher, labels, num_items=(4, 1), **options)
    assert torch.equal(loss, want)
    assert torch.equal(gradient, of_want)
    assert tuple(map(float, metrics.num_items)) == (4.0, 0.0)


def test_num_items_of_0_behind_a_head(variant):
    hidden, weight = torch.randn(N, 4, requires_grad=True), torch.randn(C, 4, requires_grad=True)
    loss, metrics = pydistill.linear_distillation_loss(
        hidden, weight, torch.randn(N, C), LABELS, num_items=0, return_metrics=True
    )
    loss.backward()
    assert float(loss.detach()) == 0
    assert tuple(map(float, metrics.num_items)) == (0.0, 0.0)
    assert not hidden.grad.any()
    assert not weight.grad.any()


# --- A row without a term -------------------------------------------------------------------------------------


@both_paths
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("spoiled", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_row_without_a_term_has_gradient_0_whatever_it_holds(formula, dtype, spoiled, reduction):
    student = torch.randn(N, C).to(dtype)
    labels = LABELS.clone()
    spoiled_row = labels == -100
    student[spoiled_row] = spoiled
    options = {"alpha": 0.0, "unlabeled": "distill", "reduction": reduction}
    if reduction == "none":
        leaf = student.clone().requires_grad_()
        if formula:
            loss = pydistill.distillation_loss(student, None, labels, **options)
            gradient = torch.func.grad(lambda s: pydistill.distillation_loss(s, None, labels, **options).sum())(student)
        else:
            loss = pydistill.distillation_loss(leaf, None, labels, **options)
            loss.sum().backward()
            gradient = leaf.grad
        assert not loss[spoiled_row].any()
    else:
        loss, gradient, _ = run(student, None, labels, formula=formula, **options)
    assert loss.isfinite().all()
    assert torch.equal(gradient[spoiled_row], torch.zeros_like(gradient[spoiled_row]))
    assert gradient[~spoiled_row].abs().sum(-1).gt(0).all()


def test_row_without_a_term_behind_a_head(variant):
    hidden = torch.randn(N, 4)
    hidden[LABELS == -100] = math.nan
    hidden.requires_grad_()
    weight = torch.randn(C, 4, requires_grad=True)
    pydistill.linear_distillation_loss(hidden, weight, labels=LABELS, alpha=0.0, unlabeled="distill").backward()
    assert not hidden.grad[LABELS == -100].any()
    assert weight.grad.isfinite().all()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_term_that_is_not_evaluated_has_no_denominator(variant, reduction):
    """With alpha = 1 the labels' class weights do not matter, also if all of them are 0."""
    student, teacher, labels = torch.randn(3, 5, requires_grad=True), torch.randn(3, 5), torch.tensor([0, 1, 0])
    options = {"alpha": 1.0, "temperature": 2.0, "reduction": reduction}
    weighted = pydistill.distillation_loss(student, teacher, labels, class_weight=torch.zeros(5), **options)
    plain = pydistill.distillation_loss(student, teacher, labels, **options)
    assert weighted == plain
    torch.testing.assert_close(*(torch.autograd.grad(loss, student)[0] for loss in (weighted, plain)), rtol=0, atol=0)
