"""The loss behind a linear head: the same loss and gradients as of whole logits, without whole logits."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import pydistill
from pydistill.engine import head as engine_head
from pydistill.formulas import DIVERGENCES

N, H, C, TEACHER_H = 37, 12, 50, 9
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


class Data:
    """A student's head, a teacher's head, labels; some rows do not count."""

    def __init__(self, dtype=torch.float64, bias=True, rows=N, classes=C):
        torch.manual_seed(0)
        self.hidden = torch.randn(rows, H).to(dtype).requires_grad_()
        self.weight = torch.randn(classes, H).to(dtype).requires_grad_()
        self.bias = torch.randn(classes).to(dtype).requires_grad_() if bias else None
        self.teacher = pydistill.LinearTeacher(
            torch.randn(rows, TEACHER_H).to(dtype), torch.randn(classes, TEACHER_H).to(dtype)
        )
        self.labels = torch.randint(classes, (rows,))
        self.labels[[3, rows // 2, rows - 1]] = -100
        self.sample_weight = torch.rand(rows)
        self.sample_weight[5] = 0

    @property
    def leaves(self):
        return [x for x in (self.hidden, self.weight, self.bias) if x is not None]

    def loss(self, teacher=None, **options):
        teacher = self.teacher if teacher is None else teacher
        options = {"chunk_rows": 8, "temperature": 2.0} | options
        labels = options.pop("labels", self.labels)
        return pydistill.linear_distillation_loss(
            self.hidden, self.weight, teacher, labels, student_bias=self.bias, **options
        )

    def gradients(self, grad_output=None, **options):
        loss = self.loss(**options)
        return loss.detach(), *torch.autograd.grad(loss, self.leaves, grad_output)

    def unfused(self, grad_output=None, teacher=None, softcap=None, logit_scale=1.0, labels=None, **options):
        """In float64, by the function that takes logits."""
        leaves = [x.detach().double().requires_grad_() for x in self.leaves]
        head = self.teacher.head
        if teacher is None or isinstance(teacher, pydistill.LinearTeacher):
            head = self.teacher.head if teacher is None else teacher.head
            teacher = F.linear(head.hidden.double(), head.weight.double())
        logits = F.linear(leaves[0], leaves[1], leaves[2] if self.bias is not None else None) * logit_scale
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        labels = self.labels if labels is None else labels
        if options.get("sample_weight") is not None:
            options["sample_weight"] = options["sample_weight"].double()
        loss = pydistill.distillation_loss(logits, teacher, labels, **({"temperature": 2.0} | options))
        grad_output = None if grad_output is None else grad_output.double()
        return loss.detach(), *torch.autograd.grad(loss, leaves, grad_output)


def assert_equal(got, want, tolerance):
    for a, b in zip(got, want, strict=True):
        assert float((a.double() - b).norm()) <= tolerance * float(b.norm())


def teacher_of(data, kind):
    head = data.teacher.head
    logits = (head.hidden @ head.weight.T).detach()
    return {
        "linear": data.teacher,
        "logits": logits,
        "probs": pydistill.SoftTargets.from_probs(logits.double().softmax(-1)),
        "topk": pydistill.top_k(logits, 5, temperatures=(2.0,), tail="bucket"),
    }[kind]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("kind", ["linear", "logits", "probs", "topk"])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("native", [False, True])
def test_equals_the_unfused_loss(dtype, kind, reduction, native, monkeypatch):
    monkeypatch.setattr(engine_head, "has_native_products", lambda dtype: native)
    data = Data(dtype)
    grad_output = torch.randn(N) if reduction == "none" else torch.tensor(-1.7)
    grad_output = grad_output.to(torch.float64 if dtype == torch.float64 else torch.float32)
    options = {"teacher": teacher_of(data, kind), "reduction": reduction, "sample_weight": data.sample_weight}
    got = data.gradients(grad_output, **options)
    assert [x.dtype for x in got[1:]] == [dtype] * 3
    tolerance = TOLERANCE[dtype] * (4 if native and dtype in (torch.bfloat16, torch.float16) else 1)
    assert_equal(got, data.unfused(grad_output, **options), tolerance)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_every_divergence_on_every_backend(variant, divergence):
    data = Data()
    options = {"divergence": divergence, "class_weight": torch.rand(C).double(), "label_smoothing": 0.1}
    assert_equal(data.gradients(**options), data.unfused(**options), 1e-11)


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_softcap_and_scale(dtype, native, monkeypatch):
    monkeypatch.setattr(engine_head, "has_native_products", lambda dtype: native)
    data = Data(dtype)
    options = {"softcap": 5.0, "logit_scale": 0.7}
    tolerance = TOLERANCE[dtype] * (4 if native and dtype == torch.bfloat16 else 1)
    assert_equal(data.gradients(**options), data.unfused(**options), tolerance)

    hidden, weight = data.teacher.head[:2]
    capped = pydistill.LinearTeacher(hidden, weight, softcap=5.0, logit_scale=0.7)
    logits = 5 * torch.tanh(0.7 * F.linear(hidden.double(), weight.double()) / 5)
    assert_equal(data.gradients(teacher=capped), data.unfused(teacher=logits), tolerance)


@pytest.mark.parametrize("chunk_rows", [1, 5, N, 1000, None])
def test_the_chunk_size_changes_nothing(chunk_rows):
    data = Data()
    assert_equal(data.gradients(chunk_rows=chunk_rows), data.unfused(), 1e-12)


@pytest.mark.parametrize("unlabeled", ["skip", "distill"])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_metrics_and_rows_that_do_not_count(alpha, unlabeled):
    data = Data()
    options = {"alpha": alpha, "unlabeled": unlabeled, "sample_weight": data.sample_weight}
    loss, metrics = data.loss(return_metrics=True, **options)
    head = data.teacher.head
    logits = F.linear(data.hidden, data.weight, data.bias).detach()
    want_loss, want = pydistill.distillation_loss(
        logits,
        head.hidden @ head.weight.T,
        data.labels,
        temperature=2.0,
        return_metrics=True,
        **options | {"sample_weight": data.sample_weight.double()},
    )
    torch.testing.assert_close(loss.detach(), want_loss)
    torch.testing.assert_close(metrics, want, equal_nan=True)
    assert_equal(data.gradients(**options), data.unfused(**options), 1e-12)


def test_rows_that_do_not_count_may_hold_anything():
    data = Data()
    with torch.no_grad():
        data.hidden[3] = float("nan")
    _, of_hidden, of_weight, _ = data.gradients()
    assert of_weight.isfinite().all()
    assert (of_hidden[3] == 0).all()


def test_nothing_counts():
    data = Data()
    assert all((x == 0).all() for x in data.gradients(labels=torch.full((N,), -100)))
    hidden = torch.zeros(0, H, requires_grad=True)
    weight = torch.zeros(C, H, requires_grad=True)
    pydistill.linear_distillation_loss(hidden, weight, torch.zeros(0, C), alpha=1.0).backward()
    assert hidden.grad.shape == (0, H)
    assert (weight.grad == 0).all()


@pytest.mark.parametrize("frozen", [("hidden",), ("weight", "bias"), ("bias",)])
def test_frozen_parts(frozen):
    data = Data()
    want = dict(zip(("hidden", "weight", "bias"), data.gradients()[1:], strict=True))
    for name in frozen:
        getattr(data, name).requires_grad_(False)
    data.loss().backward()
    for name, gradient in want.items():
        got = getattr(data, name).grad
        assert (got is None) == (name in frozen)
        if got is not None:
            torch.testing.assert_close(got, gradient)


def test_tied_weights():
    data = Data(bias=False)
    tokens = torch.arange(N) % C
    data.hidden = data.weight[tokens] * 1.5
    (tied,) = torch.autograd.grad(data.loss(), data.weight)
    head = data.teacher.head
    logits = (data.weight[tokens] * 1.5) @ data.weight.T
    loss = pydistill.distillation_loss(logits, head.hidden @ head.weight.T, data.labels, temperature=2.0)
    torch.testing.assert_close(tied, torch.autograd.grad(loss, data.weight)[0])


def test_backward_twice_and_its_errors():
    data = Data()
    loss = data.loss()
    first = torch.autograd.grad(loss, data.leaves, torch.tensor(3.0).double(), retain_graph=True)
    second = torch.autograd.grad(loss, data.leaves)
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, 3 * b)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_gradcheck_and_second_derivatives():
    data = Data(rows=6, classes=9)

    def loss(*leaves):
        data.hidden, data.weight, data.bias = leaves
        return data.loss(softcap=3.0, chunk_rows=4)

    leaves = tuple(data.leaves)
    assert torch.autograd.gradcheck(loss, leaves)
    assert torch.autograd.gradgradcheck(loss, leaves)


def test_no_grad_makes_no_gradient():
    data = Data()
    with torch.no_grad():
        loss = data.loss()
    assert not loss.requires_grad
    torch.testing.assert_close(loss, data.loss().detach())


def test_a_teacher_from_inference_mode():
    data = Data()
    with torch.inference_mode():
        teacher = pydistill.LinearTeacher(*(x.clone() for x in data.teacher.head[:2]))
    assert_equal(data.gradients(teacher=teacher), data.unfused(), 1e-12)
    assert_equal(data.gradients(teacher=teacher, reduction="sum"), data.unfused(reduction="sum"), 1e-12)


def test_micro_batches_with_num_items_equal_one_batch():
    data = Data()
    want = data.gradients(alpha=0.3)
    items = int((data.labels != -100).sum())
    total = [torch.zeros_like(x) for x in want]
    head = data.teacher.head
    for part in torch.arange(N).split(10):
        loss = pydistill.linear_distillation_loss(
            data.hidden[part],
            data.weight,
            pydistill.LinearTeacher(head.hidden[part], head.weight),
            data.labels[part],
            student_bias=data.bias,
            temperature=2.0,
            alpha=0.3,
            num_items=items,
        )
        for sum_, x in zip(total, (loss.detach(), *torch.autograd.grad(loss, data.leaves)), strict=True):
            sum_ += x
    assert_equal(total, want, 1e-12)


def test_three_dimensions():
    data = Data(rows=36)
    want = data.gradients(reduction="none", grad_output=torch.ones(36).double())
    head = data.teacher.head
    loss = pydistill.linear_distillation_loss(
        data.hidden.view(4, 9, H),
        data.weight,
        pydistill.LinearTeacher(head.hidden.view(4, 9, -1), head.weight),
        data.labels.view(4, 9),
        student_bias=data.bias,
        temperature=2.0,
        reduction="none",
    )
    assert loss.shape == (4, 9)
    got = torch.autograd.grad(loss.sum(), data.leaves)
    assert_equal((loss.detach().flatten(), *got), want, 1e-12)


@pytest.mark.parametrize("native", [False, True])
def test_small_updates_of_a_half_weight_are_not_lost(native, monkeypatch):
    """Each chunk adds a 500th of the first one's share: in bfloat16, of 8 bits, that sum would stand still."""
    monkeypatch.setattr(engine_head, "has_native_products", lambda dtype: native)
    rows = 1024
    hidden = torch.full((rows, 1), 1 / 512, dtype=torch.bfloat16)
    hidden[0] = 1
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.zeros(rows, dtype=torch.long)
    loss = pydistill.linear_distillation_loss(hidden, weight, None, labels, alpha=0.0, reduction="sum", chunk_rows=1)
    (gradient,) = torch.autograd.grad(loss, weight)
    assert abs(float(gradient[0, 0]) + 0.5 * (1 + (rows - 1) / 512)) < 0.01


def test_float16_gradients_do_not_underflow_before_the_scaler():
    data = Data(torch.float16)
    scale = torch.tensor(65536.0)
    got = data.gradients(scale, num_items=1e6)
    assert_equal(got, data.unfused(scale, num_items=1e6), 3e-3)


@pytest.mark.parametrize("native", [False, True])
def test_autocast(native, monkeypatch):
    monkeypatch.setattr(engine_head, "has_native_products", lambda dtype: native)
    data = Data(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = F.linear(data.hidden, torch.eye(H))
        assert hidden.dtype == torch.bfloat16
        loss = pydistill.linear_distillation_loss(
            hidden, data.weight, data.teacher, data.labels, student_bias=data.bias, temperature=2.0
        )
    assert loss.dtype == torch.float32
    got = torch.autograd.grad(loss, data.leaves)
    assert {x.dtype for x in got} == {torch.float32}
    assert_equal((loss.detach(), *got), data.unfused(), 2e-2)


def test_torch_compile_of_a_model_around_it():
    data = Data()

    def step(hidden, weight):
        return 2 * data_loss(torch.relu(hidden), weight)

    def data_loss(hidden, weight):
        return pydistill.linear_distillation_loss(hidden, weight, data.teacher, data.labels, temperature=2.0)

    want = torch.autograd.grad(step(data.hidden, data.weight), (data.hidden, data.weight))
    got = torch.autograd.grad(torch.compile(step)(data.hidden, data.weight), (data.hidden, data.weight))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_torch_compile_runs_it_between_graphs():
    """A graph before it and a graph after it; nothing of its Python is traced. One graph for all is an error."""
    data = Data()
    options = {"temperature": 2.0, "alpha": 0.3}

    def step(hidden, weight):
        return 2 * pydistill.linear_distillation_loss(2 * hidden, weight, data.teacher, data.labels, **options)

    explained = torch._dynamo.explain(step)(data.hidden, data.weight)
    assert (explained.graph_count, explained.graph_break_count, explained.op_count) == (2, 1, 2)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"linear_distillation_loss runs between graphs"):
        torch.compile(step, fullgraph=True, backend="eager")(data.hidden, data.weight)


def test_functorch_goes_through_the_whole_logits():
    data = Data(bias=False)
    got = torch.func.grad(lambda w: pydistill.linear_distillation_loss(data.hidden, w, data.teacher, data.labels))(
        data.weight
    )
    assert "whole logits: functorch" in pydistill.backend_info().last_call
    assert_equal([got.detach()], [data.unfused(temperature=1.0)[2]], 1e-12)


def test_the_module():
    data = Data()
    criterion = pydistill.LinearDistillationLoss(temperature=2.0, alpha=0.3, chunk_rows=8, softcap=4.0)
    assert repr(criterion) == "LinearDistillationLoss(softcap=4.0, chunk_rows=8, temperature=2.0, alpha=0.3)"
    got = criterion(data.hidden, data.weight, data.teacher, data.labels, student_bias=data.bias, alpha=0.4)
    torch.testing.assert_close(got, data.loss(alpha=0.4, softcap=4.0))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"student_hidden": torch.zeros(N, 5)}, ValueError, r"student_hidden must be \(\.\.\., H\)"),
        ({"student_weight": torch.zeros(C, H, dtype=torch.long)}, TypeError, "student_weight must be float32"),
        ({"student_weight": torch.zeros(C, H)}, TypeError, "one dtype"),
        ({"student_bias": torch.zeros(3).double()}, ValueError, r"student_bias must be \(50,\)"),
        ({"softcap": 0.0}, ValueError, "softcap must be a positive"),
        ({"logit_scale": float("inf")}, ValueError, "logit_scale must be a positive"),
        ({"chunk_rows": 0}, ValueError, "chunk_rows must be at least 1"),
        ({"labels": torch.full((N,), C)}, IndexError, "row 0 holds 50"),
        ({"labels": torch.tensor([0] * 20 + [-3] * (N - 20))}, IndexError, "row 20 holds -3"),
        ({"teacher": torch.zeros(N, C + 6).double()}, ValueError, "select_classes"),
        ({"teacher": None}, ValueError, "teacher must be given"),
        ({"sample_weight": -torch.ones(N)}, ValueError, "row 0 holds -1"),
        ({"temperature": 0.0}, ValueError, "temperature must be positive"),
    ],
)
def test_errors(change, error, message):
    data = Data()
    arguments = {
        "student_hidden": data.hidden,
        "student_weight": data.weight,
        "teacher": data.teacher,
        "labels": data.labels,
    }
    with pytest.raises(error, match=message):
        pydistill.linear_distillation_loss(**arguments | change)


def test_errors_of_a_linear_teacher():
    with pytest.raises(ValueError, match=r"hidden must be \(\.\.\., H\) and weight \(C, H\)"):
        pydistill.LinearTeacher(torch.zeros(3, 4), torch.zeros(10, 5))
    with pytest.raises(ValueError, match="softcap"):
        pydistill.LinearTeacher(torch.zeros(3, 4), torch.zeros(10, 4), softcap=-1)
    with pytest.raises(ValueError, match=r"got teacher \(36, 50\)"):
        Data().loss(teacher=Data(rows=36).teacher)


MEMORY = """
import ctypes, torch, pydistill
from pathlib import Path
torch.set_num_threads({threads})
rows, classes, width = {rows}, {classes}, 64
hidden, weight = torch.randn(rows, width, requires_grad=True), torch.randn(classes, width, requires_grad=True)
teacher = pydistill.LinearTeacher(torch.randn(rows, width), torch.randn(classes, width))
labels = torch.randint(classes, (rows,))

def status(field):
    return next(int(x.split()[1]) * 1024 for x in open("/proc/self/status") if x.startswith(field))

def step():
    hidden.grad = weight.grad = None
    pydistill.linear_distillation_loss(hidden, weight, teacher, labels, temperature=2.0).backward()

step()
hidden.grad = weight.grad = None
getattr(ctypes.CDLL(None), "malloc_trim", lambda x: x)(0)
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
step()
print((status("VmHWM") - before - hidden.nbytes - weight.nbytes) / 2**20)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(("rows", "classes", "threads"), [(512, 30000, 1), (2048, 30000, 1), (256, 262144, 2)])
def test_memory_is_the_scratch_whatever_the_rows(rows, classes, threads, tmp_path):
    """All logits of 2048 rows would be 234 MiB, twice. With many classes the engine's rows, one a thread, count too."""
    script = MEMORY.format(rows=rows, classes=classes, threads=threads)
    result = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert 20 < float(result.stdout) < 80


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_metrics_of_terms_without_rows(alpha, reduction):
    data = Data()
    head = data.teacher.head
    logits, teacher = F.linear(data.hidden, data.weight, data.bias).detach(), head.hidden @ head.weight.T
    for labels in (data.labels, torch.full((N,), -100), *([None] if alpha == 1 else [])):
        options = {"alpha": alpha, "temperature": 2.0, "reduction": reduction, "return_metrics": True}
        _, got = data.loss(**options | {"labels": labels})
        _, want = pydistill.distillation_loss(logits, teacher, labels, **options)
        torch.testing.assert_close(got.num_items, want.num_items)
        for a, b, weighs in ((got.soft_loss, want.soft_loss, alpha > 0), (got.hard_loss, want.hard_loss, alpha < 1)):
            if weighs:
                torch.testing.assert_close(a, b)
            else:
                assert a.isnan().all()


def test_second_derivative_of_what_autocast_mixed():
    data = Data(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = F.linear(data.hidden, torch.eye(H))
        loss = pydistill.linear_distillation_loss(hidden, data.weight, data.teacher, data.labels)
    (gradient,) = torch.autograd.grad(loss, data.weight, create_graph=True)
    torch.autograd.grad(gradient.sum(), data.weight)
    torch.testing.assert_close(
        gradient, torch.autograd.grad(data.loss(temperature=1.0), data.weight)[0], rtol=0.1, atol=0.1
    )
