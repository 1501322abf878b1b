"""Loss and gradient against float64, within the contract's bounds, on every backend, ISA, dtype and divergence."""

import pytest
import torch
import torch.nn.functional as F
from conftest import KINDS
from reference import GRADIENT_BOUND, assert_accurate, loss_and_gradient, remembers, softened

import pydistill

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
TEMPERATURES = (0.5, 1.0, 2.0, 4.0, 2.5, 20.0)
# Around every vector width (4, 8, 16, in pairs 8 to 32) and every block edge (256, 512, 1024), twice over.
SIZES = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 255, 256, 257, 511, 512, 513)
SIZES += (1023, 1024, 1025, 2047, 2048, 2049)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Small operations of the oracle would wait for threads most of the time; test_threads.py has the rest."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def randn(n, c):
    return torch.randn(n, c, dtype=torch.float64)


def near(noise):
    def make(n, c):
        teacher = 2 * randn(n, c)
        return teacher + noise * randn(n, c), teacher

    return make


def with_peaks(logits, height):
    """One class per row, or one in fifty, far from the others."""
    n, c = logits.shape
    at = torch.randint(c, (n, 1 + c // 50))
    return logits.scatter(1, at, height)


def ramp(n, c):
    """A maximum that moves in every block."""
    return torch.linspace(-30, 30, c, dtype=torch.float64) + 0.1 * randn(n, c)


# (student, teacher) in float64, before they are rounded to the dtype of the test.
CONTENTS = {
    "normal": lambda n, c: (2 * randn(n, c), 2 * randn(n, c)),
    "near": near(1e-3),
    "nearer": near(1e-5),
    "far": lambda n, c: (8 * randn(n, c), 8 * randn(n, c) - 20),
    "peaked": lambda n, c: (with_peaks(randn(n, c), 40.0), with_peaks(randn(n, c), 40.0)),
    "both peaked": lambda n, c: tuple(F.pad(randn(n, c - 1), (1, 0), value=90.0) for _ in range(2)),
    "outliers": lambda n, c: (with_peaks(randn(n, c), -300.0), with_peaks(randn(n, c), 12.0)),
    "flat": lambda n, c: (torch.full((n, c), -3.0), torch.full((n, c), 5.0)),
    "flat teacher": lambda n, c: (randn(n, c), torch.zeros(n, c)),
    "tied": lambda n, c: (torch.randint(3, (n, c)), torch.randint(3, (n, c))),
    "shifted": lambda n, c: (2 * randn(n, c) + 1e4, 2 * randn(n, c) - 1e4),
    "huge": lambda n, c: (1e4 * randn(n, c).clamp(-6, 6), 1e4 * randn(n, c).clamp(-6, 6)),
    "rising": lambda n, c: (ramp(n, c), ramp(n, c)),
    "falling": lambda n, c: (ramp(n, c).flip(1), ramp(n, c).flip(1)),
    "crossing": lambda n, c: (ramp(n, c), ramp(n, c).flip(1)),
}


def make(content, n, c, dtype, teacher_dtype=None):
    """(student, teacher, labels)."""
    student, teacher = CONTENTS[content](n, c)
    return student.to(dtype), teacher.to(teacher_dtype or dtype), torch.randint(c, (n,))


def run(student, teacher, labels, **options):
    """(loss, gradient) of the function under test."""
    student = student.clone().requires_grad_()
    loss = pydistill.distillation_loss(student, teacher, labels, **options)
    loss.backward(torch.ones_like(loss))
    assert loss.dtype == (torch.float64 if student.dtype == torch.float64 else torch.float32)
    assert student.grad.dtype == student.dtype
    return loss.detach(), student.grad


def check(case, student, teacher, labels, *, size_of_parts=False, **options):
    """Within the bounds; a failure says for which case of the loop."""
    try:
        got = run(student, teacher, labels, **options)
        assert_accurate(*got, student, teacher, labels, size_of_parts=size_of_parts, **options)
    except AssertionError as error:
        error.add_note(f"in the case {case}")
        raise


def name(parameter):
    """A readable test id: float32 and not dtype0."""
    return str(parameter).removeprefix("torch.")


both_kinds = pytest.mark.parametrize("divergence", KINDS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=name)


def some_temperatures(number, step=2):
    """Every second or third temperature: neighbours in a loop take turns, so that each meets a part of the loop."""
    return TEMPERATURES[number % step :: step]


@both_kinds
@every_dtype
def test_rows_of_every_size_are_accurate(variant, divergence, dtype):
    for i, c in enumerate(SIZES):
        for temperature in some_temperatures(i, step=3):
            case = make("normal", 1, c, dtype)
            check((c, temperature), *case, divergence=divergence, temperature=temperature, alpha=0.7)


@both_kinds
@every_dtype
@pytest.mark.parametrize("content", CONTENTS)
def test_every_kind_of_logits_is_accurate(variant, divergence, dtype, content):
    wide = (content, divergence) == ("huge", "reverse_kl")  # float32 cannot hold even the exact gradient so well
    for i, c in enumerate((10, 2500), start=list(CONTENTS).index(content)):
        for temperature in some_temperatures(i):
            case = make(content, 2, c, dtype)
            check(
                (c, temperature), *case, divergence=divergence, temperature=temperature, alpha=0.7, size_of_parts=wide
            )


@both_kinds
@every_dtype
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_each_term_alone_is_accurate(variant, divergence, dtype, alpha):
    for i, content in enumerate(("normal", "near", "peaked", "shifted")):
        for temperature in some_temperatures(i):
            case = make(content, 2, 1100, dtype)
            check(
                (content, temperature),
                *case,
                divergence=divergence,
                temperature=temperature,
                alpha=alpha,
            )


@both_kinds
@every_dtype
@pytest.mark.parametrize("teacher_dtype", DTYPES, ids=name)
def test_teacher_of_any_dtype_is_accurate(variant, divergence, dtype, teacher_dtype):
    options = {"divergence": divergence, "temperature": 2.0, "alpha": 0.7}
    for c in (5, 33, 1500):
        student, teacher, labels = make("normal", 3, c, dtype, teacher_dtype)
        check(c, student, teacher, labels, **options)
    strided = teacher.t().contiguous().t()
    for form in (strided, pydistill.SoftTargets.from_logits(strided)):
        assert_accurate(*run(student, form, labels, **options), student, teacher, labels, **options)


@both_kinds
@pytest.mark.parametrize(
    ("classes", "dtype"),
    [(32000, torch.float32), (32000, torch.bfloat16), (130000, torch.float32), (130001, torch.float64)],
    ids=name,
)
def test_large_rows_are_accurate(variant, divergence, classes, dtype):
    for content in ("normal", "peaked", "rising"):
        case = make(content, 2, classes, dtype)
        check(content, *case, divergence=divergence, temperature=4.0, alpha=0.7)


def test_gradient_larger_than_the_cache(variant):
    """Past 32 MiB the compiled core writes with streaming stores; the odd row length moves every row's alignment."""
    student, teacher, labels = make("normal", 3, 130001, torch.float32)
    options = {"temperature": 2.5, "alpha": 0.7}
    loss, gradient = run(student.repeat(22, 1), teacher.repeat(22, 1), labels.repeat(22), **options)
    first, *others = gradient.split(3)
    assert_accurate(loss, 22 * first, student, teacher, labels, **options)
    assert all(torch.equal(rows, first) for rows in others)


@both_kinds
@every_dtype
@pytest.mark.parametrize("content", ["normal", "peaked", "huge", "rising", "falling"])
def test_identical_inputs_have_a_loss_of_0(variant, divergence, dtype, content):
    """The loss is exactly 0; the gradient, a difference of two roundings, is within its bound."""
    for i, c in enumerate((1, 7, 40, 900, 4000)):
        for temperature in some_temperatures(i, step=3):
            student, _, _ = make(content, 2, c, dtype)
            options = {"divergence": divergence, "temperature": temperature, "alpha": 1.0}
            loss, gradient = run(student, student.clone(), None, **options)
            assert loss.item() == 0, f"{c} classes, T={temperature}"
            size = 2 * temperature * softened(student, temperature).exp().norm(dim=-1)
            bound = GRADIENT_BOUND[dtype] * size / 2
            assert (gradient.double().norm(dim=-1) <= bound).all(), f"{c} classes, T={temperature}"


@both_kinds
@every_dtype
def test_divergence_is_not_negative(variant, divergence, dtype):
    for i, noise in enumerate((1e-2, 1e-4, 1e-6, 1e-7)):
        for j, c in enumerate((3, 100, 3000)):
            for temperature in some_temperatures(i + j, step=3):
                student, teacher = (x.to(dtype) for x in near(noise)(16, c))
                options = {"divergence": divergence, "temperature": temperature, "alpha": 1.0}
                rows = pydistill.distillation_loss(student, teacher, reduction="none", **options)
                assert rows.min() >= -1e-6 * temperature**2, f"{c} classes, T={temperature}, noise {noise}"


def torch_loss(student, teacher, labels, divergence, temperature, alpha):
    """The loss per row in torch's own operations, in the dtype of the inputs."""
    log_q, log_p = ((x / temperature).log_softmax(-1) for x in (student, teacher))
    if divergence == "forward_kl":
        soft = F.kl_div(log_q, log_p, log_target=True, reduction="none")
    elif divergence == "reverse_kl":
        soft = F.kl_div(log_p, log_q, log_target=True, reduction="none")
    else:
        raise AssertionError(f"no torch formula here for {divergence}")
    hard = F.cross_entropy(student, labels, reduction="none")
    return alpha * temperature**2 * soft.sum(-1) + (1 - alpha) * hard


ULP = 2.0**-23  # of float32


@both_kinds
@pytest.mark.parametrize("content", CONTENTS)
def test_at_most_twice_torchs_own_error(variant, divergence, content):
    """The root mean square of the error over rows and temperatures, each in the contract's unit, beside torch's.

    The floor is two ulp of that unit, a quarter of what the contract allows for the loss and an eighth for the
    gradient: below it torch's error is at times 0 by luck, such as where one class has all of the mass.
    """
    for c, rows in ((10, 24), (3000, 6)):
        ours, theirs = [], []
        for temperature in TEMPERATURES:
            case = make(content, rows, c, torch.float32)
            options = {"divergence": divergence, "temperature": temperature, "alpha": 0.7}
            want = loss_and_gradient(*case, reduction="none", **options)
            ours.append(errors(run(*case, reduction="none", **options), want, *case, **options))
            theirs.append(errors(run_torch(*case, **options), want, *case, **options))
        ours, theirs = (torch.cat(x, 1).square().mean(1).sqrt() for x in (ours, theirs))
        assert (ours <= (2 * theirs).clamp(min=2 * ULP)).all(), f"{c} classes: {ours}, torch's {theirs}"


@remembers
def run_torch(student, teacher, labels, **options):
    """(loss, gradient) per row."""
    student = student.clone().requires_grad_()
    loss = torch_loss(student, teacher, labels, **options)
    loss.sum().backward()
    return loss.detach(), student.grad


def errors(got, want, *case, **options):
    """Errors of each row's loss and gradient, in the units of the contract's bounds: (2, rows)."""
    loss_unit, gradient_unit = units(*case, **options)
    loss_unit = want[0].abs() + loss_unit
    return torch.stack([(got[0] - want[0]) / loss_unit, (got[1] - want[1]).norm(dim=1) / gradient_unit])


@remembers
def units(student, teacher, labels, *, temperature, alpha, **options):
    """Units of the contract's bounds: of the loss, without the loss's own size, and of the gradient."""
    q, p, once = (softened(x, t).exp() for x, t in ((student, temperature), (teacher, temperature), (student, 1)))
    gradient_unit = alpha * temperature * (q.norm(dim=1) + p.norm(dim=1))
    gradient_unit += (1 - alpha) * (once - F.one_hot(labels, student.shape[1])).norm(dim=1)
    return alpha * temperature**2, gradient_unit
