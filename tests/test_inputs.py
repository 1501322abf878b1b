"""The forms in which logits, teachers and labels may come: layouts, alignments, dtypes, shapes, SoftTargets."""

import math

import numpy as np
import pytest
import torch
from conftest import KINDS
from reference import assert_accurate, loss_and_gradient

import pydistill
from pydistill import SoftTargets

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
OPTIONS = {"temperature": 2.0, "alpha": 0.7}
N, C = 3, 37

both_kinds = pytest.mark.parametrize("divergence", KINDS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def make(dtype=torch.float32):
    """(student, teacher, labels)."""
    student, teacher = (2 * torch.randn(2, N, C)).to(dtype)
    return student, teacher, torch.randint(C, (N,))


def run(student, teacher, labels, **options):
    """(loss, gradient); the student keeps its strides."""
    student = student.detach().requires_grad_()
    loss = pydistill.distillation_loss(student, teacher, labels, **(OPTIONS | options))
    loss.sum().backward()
    return loss.detach(), student.grad


def padded(shape, dtype):
    """A matrix amid NaN: whatever is read beyond it shows."""
    return torch.full(shape, math.nan, dtype=dtype)


# Each gives the same (N, C) values another layout; whatever lies between them is NaN.
def transposed(x):
    return x.t().contiguous().t()


def long_rows(x):
    storage = padded((N, C + 11), x.dtype)
    return storage[:, 5 : 5 + C].copy_(x)


def every_second_class(x):
    return padded((N, 2 * C), x.dtype)[:, ::2].copy_(x)


def every_third_row(x):
    return padded((3 * N, C), x.dtype)[1::3].copy_(x)


def from_three_dimensions(x):
    return padded((N, 2, C), x.dtype)[:, 1].copy_(x)


LAYOUTS = (transposed, long_rows, every_second_class, every_third_row, from_three_dimensions)
every_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)


# --- Layouts --------------------------------------------------------------------------------------------------


@both_kinds
@every_dtype
@every_layout
def test_every_layout_is_accurate(variant, divergence, dtype, layout):
    student, teacher, labels = make(dtype)
    for s, t in ((layout(student), teacher), (student, layout(teacher))):
        assert not (s.is_contiguous() and t.is_contiguous())
        got = run(s, t, labels, divergence=divergence)
        assert_accurate(*got, student, teacher, labels, divergence=divergence, **OPTIONS)
        assert torch.equal(s, student)
        assert torch.equal(t, teacher)


@every_layout
def test_gradient_in_place_stays_within_the_rows(variant, layout):
    student, teacher, labels = make()
    want = run(student, teacher, labels)[1]
    leaf = student.clone().requires_grad_()
    logits = layout(student).detach().copy_(leaf)
    storage = torch.empty(0).set_(logits.untyped_storage())
    outside = torch.ones(len(storage), dtype=torch.bool)
    outside.as_strided(logits.shape, logits.stride(), logits.storage_offset()).fill_(False)
    pydistill.distillation_loss(logits, teacher, labels, inplace=True, **OPTIONS).backward()
    torch.testing.assert_close(leaf.grad, want, rtol=1e-6, atol=1e-8)
    assert storage[outside].isnan().all()


@both_kinds
def test_expanded_rows(variant, divergence):
    student, teacher, labels = make()
    s, t, y = student[:1].expand(N, C), teacher[1:2].expand(N, C), labels[:1].expand(N)
    for case in ((s, teacher, labels), (student, t, labels), (s, t, y)):
        got = run(*case, divergence=divergence)
        assert_accurate(*got, *case, divergence=divergence, **OPTIONS)


def test_gradient_through_views_reaches_the_leaf(variant):
    """One row for all; classes in dimension 1."""
    student, teacher, labels = make()
    row = student[:1].clone().requires_grad_()
    pydistill.distillation_loss(row.expand(N, C), teacher, labels, **OPTIONS).backward()
    _, want = loss_and_gradient(student[:1].expand(N, C), teacher, labels, **OPTIONS)
    torch.testing.assert_close(row.grad.double(), want.sum(0, keepdim=True), rtol=1e-5, atol=1e-7)

    images, targets = torch.randn(2, 2, C, 4), torch.randint(C, (2, 4))
    leaf = images[0].clone().requires_grad_()
    s, t = leaf.movedim(1, -1), images[1].movedim(1, -1)
    pydistill.distillation_loss(s, t, targets, **OPTIONS).backward()
    flat = [x.detach().reshape(-1, C) for x in (s, t)]
    _, want = loss_and_gradient(*flat, targets.reshape(-1), **OPTIONS)
    torch.testing.assert_close(leaf.grad.double(), want.view(2, 4, C).movedim(-1, 1), rtol=1e-5, atol=1e-7)


# --- Alignment ------------------------------------------------------------------------------------------------


@every_dtype
@pytest.mark.parametrize("classes", [5, 333])
def test_every_alignment_is_accurate(variant, dtype, classes):
    """Rows that begin off every boundary of 16, 32 and 64 bytes, next to NaN; another offset for the teacher."""
    labels = torch.randint(classes, (2,))
    for offset in (0, 1, 2, 3, 5, 8, 15, 16, 31):
        storage = padded((2, 40 + 2 * classes), dtype)
        values = torch.randn(2, 2, classes)
        student = storage[0, offset : offset + 2 * classes].view(2, classes).copy_(values[0])
        teacher = storage[1, 37 - offset : 37 - offset + 2 * classes].view(2, classes).copy_(values[1])
        got = run(student, teacher, labels)
        try:
            assert_accurate(*got, student, teacher, labels, **OPTIONS)
        except AssertionError as error:
            error.add_note(f"at offset {offset}")
            raise


# --- Shapes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("shape", [(), (6,), (2, 3), (1, 6), (2, 1, 3), (6, 1)])
def test_any_number_of_dimensions(variant, dtype, shape):
    """Bit for bit what the flattened batch gives."""
    rows = math.prod(shape)
    student, teacher = (2 * torch.randn(2, rows, C)).to(dtype)
    labels, weight = torch.randint(C, (rows,)), torch.rand(rows)
    views = [x.view((*shape, *x.shape[1:])) for x in (student, teacher, labels, weight)]
    for reduction in ("mean", "sum", "none"):
        want_loss, want_gradient = run(student, teacher, labels, sample_weight=weight, reduction=reduction)
        loss, gradient = run(*views[:3], sample_weight=views[3], reduction=reduction)
        assert loss.shape == (shape if reduction == "none" else ())
        assert gradient.shape == (*shape, C)
        assert torch.equal(loss.reshape(want_loss.shape), want_loss)
        assert torch.equal(gradient.view(rows, C), want_gradient)


class Subclass(torch.Tensor):
    """A tensor subclass: its loss is the differentiable torch formula."""


@both_kinds
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, C), (4, 0), (2, 1, 3)])
def test_torch_formula_takes_the_last_dimension_for_the_classes(divergence, shape):
    """(2, C, C) is where the wrong one would fit as well."""
    student, teacher = torch.randn(2, *shape, C, dtype=torch.float64)
    labels = torch.randint(C, shape)
    want = run(student, teacher, labels, divergence=divergence, label_smoothing=0.1)
    got = run(student.as_subclass(Subclass), teacher, labels, divergence=divergence, label_smoothing=0.1)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g.as_subclass(torch.Tensor), w, rtol=1e-10, atol=1e-12)


def test_three_dimensions_transposed(variant):
    """(batch, time, C) out of (time, batch, C), as recurrent models give it: no view flattens it."""
    student, teacher = 2 * torch.randn(2, 4, 2, C)
    labels, weight = torch.randint(C, (4, 2)), torch.rand(4, 2)
    s, t, y, w = (x.transpose(0, 1) for x in (student, teacher, labels, weight))
    loss, gradient = run(s, t, y, sample_weight=w, reduction="none")
    flat = [x.reshape(8, *x.shape[2:]) for x in (s, t, y, w)]
    want_loss, want_gradient = run(*flat[:3], sample_weight=flat[3], reduction="none")
    assert torch.equal(loss, want_loss.view(2, 4))
    assert torch.equal(gradient, want_gradient.view(2, 4, C))


def test_metrics_of_three_dimensions(variant):
    student, teacher = torch.randn(2, 2, 3, C)
    labels = torch.randint(C, (2, 3))
    options = {"reduction": "none", "return_metrics": True}
    loss, metrics = pydistill.distillation_loss(student, teacher, labels, **options)
    _, flat_metrics = pydistill.distillation_loss(student.view(6, C), teacher.view(6, C), labels.view(6), **options)
    assert loss.shape == metrics.soft_loss.shape == metrics.hard_loss.shape == (2, 3)
    assert torch.equal(metrics.soft_loss.view(6), flat_metrics.soft_loss)
    assert torch.equal(metrics.hard_loss.view(6), flat_metrics.hard_loss)
    assert metrics[2:] == flat_metrics[2:]


# --- dtypes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 0.7, 1.0])
def test_int32_labels(variant, alpha):
    student, teacher, labels = make()
    labels[1] = -100
    options = {"alpha": alpha, "label_smoothing": 0.1}
    want = run(student, teacher, labels, **options)
    strided = torch.stack([labels, labels + 1], 1).int()[:, 0]
    for form in (labels.int(), strided, strided.long()):
        got = run(student, teacher, form, **options)
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[1], want[1])


@every_dtype
@pytest.mark.parametrize("weight_dtype", DTYPES, ids=lambda dtype: f"weight {dtype}".replace("torch.", ""))
def test_weights_of_any_dtype_and_stride(variant, dtype, weight_dtype):
    student, teacher, labels = make(dtype)
    sample_weight, class_weight = (0.5 + torch.rand(n).to(weight_dtype) for n in (N, C))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    want = run(student, teacher, labels, sample_weight=sample_weight.to(wide), class_weight=class_weight.to(wide))
    strided = (torch.stack([w, -w], 1)[:, 0] for w in (sample_weight, class_weight))
    for weights in ((sample_weight, class_weight), strided):
        got = run(student, teacher, labels, **dict(zip(("sample_weight", "class_weight"), weights, strict=True)))
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[1], want[1])


# --- SoftTargets ----------------------------------------------------------------------------------------------


@both_kinds
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_soft_targets_agree(variant, divergence, temperature):
    """Logits, log-probabilities up to a constant and probabilities of one teacher, at any temperature."""
    student, teacher, labels = make(torch.float64)
    log_probs = teacher.log_softmax(-1)
    options = {"divergence": divergence, "temperature": temperature, "alpha": 0.7}
    for targets in (
        SoftTargets.from_logits(teacher),
        SoftTargets.from_log_probs(log_probs),
        SoftTargets.from_log_probs(log_probs - 3),
        SoftTargets.from_probs(log_probs.exp()),
        SoftTargets.from_probs(log_probs.exp().numpy()),
    ):
        got = run(student, targets, labels, **options)
        assert_accurate(*got, student, teacher, labels, **options)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_probabilities_are_tempered_again(variant, temperature):
    """p**(1/T) renormalised, a zero stays a zero."""
    probs = torch.tensor([[0.7, 0.3, 0.0], [0.2, 0.2, 0.6], [0.0, 1.0, 0.0]])
    tempered = probs.double() ** (1 / temperature)
    tempered /= tempered.sum(-1, keepdim=True)
    student = torch.randn(3, 3)
    log_q = (student.double() / temperature).log_softmax(-1)
    want = (torch.xlogy(tempered, tempered) - tempered * log_q).sum(-1).mean() * temperature**2
    got = pydistill.distillation_loss(student, SoftTargets.from_probs(probs), alpha=1.0, temperature=temperature)
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6 * temperature**2)


@every_dtype
def test_soft_targets_hold_logits(dtype):
    logits = torch.randn(4, 3).to(dtype).requires_grad_()
    targets = SoftTargets.from_logits(logits)
    assert targets.logits.data_ptr() == logits.data_ptr()
    assert not targets.logits.requires_grad
    assert (targets.shape, len(targets)) == ((4, 3), 4)
    assert repr(targets) == f"SoftTargets(shape=(4, 3), dtype={dtype})"
    for rows in (1, slice(1, 3), torch.tensor([3, 0]), [True, False, True, False], np.array([2, 2])):
        assert torch.equal(targets[rows].logits, logits.detach()[rows])
    probs = SoftTargets.from_probs(logits.detach().softmax(-1))
    assert probs.logits.dtype == (dtype if dtype.itemsize >= 4 else torch.float32)


@pytest.mark.parametrize("name", ["logits", "probs", "log_probs"])
def test_soft_targets_reject(name):
    make = getattr(SoftTargets, f"from_{name}")
    with pytest.raises(TypeError, match=rf"{name} must be floating-point, got dtype torch\.int64"):
        make(torch.tensor([[1, 0]]))
    if name == "probs":
        with pytest.raises(TypeError, match="validate must be True or False, got 'no'"):
            make(torch.ones(1, 1), validate="no")
    with pytest.raises(ValueError, match=rf"{name} must have the classes as its last dimension, got a scalar"):
        make(torch.tensor(1.0))


def test_address_that_is_no_multiple_of_the_element_size():
    """Past the caches too, where aligned vectors are streamed: no such address can be reached from this one."""
    n, c = 270, 32000  # a gradient of more than 32 MiB
    memory = bytearray(4 * n * c + 4)
    leaf = torch.zeros(c, requires_grad=True)
    student = torch.frombuffer(memory, dtype=torch.float32, offset=1, count=n * c).view(n, c).add_(leaf)
    loss = pydistill.distillation_loss(student, torch.randn(1, c).expand(n, c), alpha=1.0, inplace=True)
    loss.backward()
    assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 2, 7, 8, 9])
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_rows_that_overlap_in_memory(variant, divergence, rows, dtype):
    """Windows over one vector, strides (1, 1): a gradient with the same strides as such rows would be wrong."""
    student = torch.randn(rows + 7).to(dtype).unfold(0, 8, 1)
    teacher = torch.randn(rows + 7).unfold(0, 8, 1)
    assert student.stride() == teacher.stride() == (1, 1)
    labels = torch.arange(rows) % 8
    found = []
    for s, t in ((student, teacher), (student.clone(memory_format=torch.contiguous_format), teacher.contiguous())):
        leaf = s.detach().requires_grad_()  # detach keeps the strides
        loss = pydistill.distillation_loss(leaf, t, labels, divergence=divergence, temperature=2.0)
        found.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
    (loss, gradient), (want, of_want) = found
    assert torch.equal(loss, want)
    assert torch.equal(gradient, of_want)
    assert gradient.is_contiguous()
