"""Properties that hold for all inputs, on inputs that hypothesis looks for; every backend against every other."""

import math

import torch
from conftest import BACKENDS, KINDS
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import pydistill
from pydistill.formulas import DIVERGENCES

SHIFTED = [name for name in DIVERGENCES if name != "mse"]
numbers = st.floats(-20, 20, width=32)
temperatures = st.sampled_from([0.5, 1.0, 2.0, 2.5, 4.0, 20.0])


@st.composite
def batches(draw, least=1):
    n, c = draw(st.integers(1, 3)), draw(st.integers(least, 40))
    seed = draw(st.integers(0, 2**16))
    generator = torch.Generator().manual_seed(seed)
    scale = draw(st.sampled_from([0.01, 1.0, 10.0]))
    student, teacher = (scale * torch.randn(n, c, generator=generator, dtype=torch.float64) for _ in range(2))
    for logits in (student, teacher):  # some numbers that randn does not give
        for value in draw(st.lists(numbers, max_size=3)):
            logits[draw(st.integers(0, n - 1)), draw(st.integers(0, c - 1))] = value
    return student, teacher, torch.randint(c, (n,), generator=generator)


def run(backend, student, teacher, labels, **options):
    leaf = student.clone().requires_grad_()
    with pydistill.use_backend(backend):
        loss = pydistill.distillation_loss(leaf, teacher, labels, **{"alpha": 1.0} | options)
        loss.sum().backward()
    return loss.detach(), leaf.grad


def close(got, want, scale=1.0):
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10 * scale)


every = settings(max_examples=25, deadline=None)


@every
@given(batches(), st.sampled_from(list(DIVERGENCES)), temperatures, st.sampled_from(BACKENDS))
def test_not_negative_and_0_at_the_teacher(batch, divergence, temperature, backend):
    student, teacher, labels = batch
    options = {"divergence": divergence, "temperature": temperature, "t_squared": False}
    assert run(backend, student, teacher, labels, **options)[0] >= -1e-12
    assert run(backend, teacher, teacher, labels, **options)[0] == 0
    single = student.float()
    assert run(backend, single, teacher.float(), labels, **options)[0] >= -1e-6
    assert run(backend, single, single.clone(), labels, **options)[0] == 0


@every
@given(batches(), st.sampled_from(SHIFTED), temperatures, st.sampled_from(BACKENDS), numbers)
def test_shifts_change_nothing_and_gradients_sum_to_0(batch, divergence, temperature, backend, shift):
    student, teacher, labels = batch
    options = {"divergence": divergence, "temperature": temperature}
    loss, gradient = run(backend, student, teacher, labels, **options)
    moved = run(backend, student + shift, teacher - shift, labels, **options)
    size = max(1.0, float(loss))
    close(moved[0], loss, size)
    close(moved[1], gradient, size)
    close(gradient.sum(-1), torch.zeros(len(gradient), dtype=torch.float64), size)


@every
@given(batches(), st.sampled_from(list(DIVERGENCES)), temperatures, st.sampled_from(BACKENDS), st.randoms())
def test_the_order_of_classes_does_not_matter(batch, divergence, temperature, backend, random):
    student, teacher, labels = batch
    order = list(range(student.shape[-1]))
    random.shuffle(order)
    place = torch.tensor(order).argsort()
    options = {"divergence": divergence, "temperature": temperature}
    loss, gradient = run(backend, student, teacher, labels, **options)
    permuted = run(backend, student[:, order], teacher[:, order], place[labels], **options)
    close(permuted[0], loss, max(1.0, float(loss)))
    close(permuted[1], gradient[:, order], max(1.0, float(loss)))


@every
@given(batches(), st.sampled_from(list(DIVERGENCES)), temperatures)
def test_every_backend_equals_every_other(batch, divergence, temperature):
    student, teacher, labels = batch
    results = [run(b, student, teacher, labels, divergence=divergence, temperature=temperature) for b in BACKENDS]
    for loss, gradient in results[1:]:
        close(loss, results[0][0], max(1.0, float(loss)))
        close(gradient, results[0][1], max(1.0, float(loss)))


@every
@given(
    batches(), st.sampled_from([n for n, e in DIVERGENCES.items() if e.top_k]), temperatures, st.sampled_from(BACKENDS)
)
def test_all_classes_as_top_k_equal_the_dense_teacher(batch, divergence, temperature, backend):
    student, teacher, labels = batch
    tail = DIVERGENCES[divergence].top_k[0]
    targets = pydistill.top_k(teacher, teacher.shape[-1], temperatures=(temperature,), tail=tail)
    options = {"divergence": divergence, "temperature": temperature}
    loss, gradient = run(backend, student, teacher, labels, **options)
    sparse = run(backend, student, targets, labels, **options)
    close(sparse[0], loss, max(1.0, float(loss)))
    close(sparse[1], gradient, max(1.0, float(loss)))


@every
@given(batches(), st.sampled_from(SHIFTED), temperatures, st.sampled_from(BACKENDS))
def test_probabilities_equal_logits(batch, divergence, temperature, backend):
    student, teacher, labels = batch
    options = {"divergence": divergence, "temperature": temperature}
    loss, gradient = run(backend, student, teacher, labels, **options)
    probs = run(backend, student, pydistill.SoftTargets.from_probs(teacher.softmax(-1)), labels, **options)
    torch.testing.assert_close(probs[0], loss, rtol=1e-6, atol=1e-9 * temperature**2)
    torch.testing.assert_close(probs[1], gradient, rtol=1e-5, atol=1e-8 * temperature)


@every
@given(batches(2), st.floats(0.01, 0.99), temperatures, st.sampled_from(BACKENDS))
def test_jsd_is_bounded(batch, beta, temperature, backend):
    student, teacher, labels = batch
    options = {"divergence": "jsd", "beta": beta, "temperature": temperature, "t_squared": False}
    loss, _ = run(backend, student, teacher, labels, **options)
    assert -1e-12 <= loss <= -beta * math.log(beta) - (1 - beta) * math.log(1 - beta) + 1e-12


@every
@given(batches(2), st.sampled_from(BACKENDS))
def test_temperature_towards_infinity(batch, backend):
    """T^2 KL becomes half the variance of the logits' difference: T^2 is what keeps it from vanishing."""
    student, teacher, labels = batch
    difference = student - teacher
    want = (difference - difference.mean(-1, keepdim=True)).square().mean(-1) / 2
    for divergence in KINDS:
        loss, _ = run(backend, student, teacher, labels, divergence=divergence, temperature=1e5, reduction="none")
        torch.testing.assert_close(loss, want, rtol=1e-2, atol=1e-4)


@every
@given(batches(2), st.sampled_from(BACKENDS))
def test_temperature_towards_0(batch, backend):
    """Both become one-hot: total variation says whether they agree on the largest class."""
    student, teacher, labels = batch
    for logits in (student, teacher):
        top = logits.topk(2).values
        assume(float((top[:, 0] - top[:, 1]).min()) >= 1e-3)
    loss, _ = run(
        backend,
        student,
        teacher,
        labels,
        divergence="total_variation",
        temperature=1e-5,
        t_squared=False,
        reduction="none",
    )
    torch.testing.assert_close(loss, (student.argmax(-1) != teacher.argmax(-1)).double())
