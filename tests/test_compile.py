"""torch.compile, torch.export, functorch, tensor subclasses and other devices."""

import warnings

import pytest
import torch
from conftest import BACKENDS
from reference import loss, loss_and_gradient
from torch._dynamo.testing import CompileCounter

import pydistill
from pydistill.engine import checks
from pydistill.formulas import DIVERGENCES

C = 6
# What a traced call hands to the op; the second set uses every argument.
OPTION_SETS = {
    "plain": {},
    "all": {
        "alpha": 0.3,
        "temperature": 2.5,
        "sample_weight": torch.tensor([1.0, 0.5, 0.0, 2.0]),
        "class_weight": torch.tensor([1.0, 2.0, 0.5, 1.0, 3.0, 0.0]),
        "label_smoothing": 0.1,
        "num_items": (7.0, 5.0),
        "t_squared": False,
        "unlabeled": "distill",
    },
    "soft alone": {"alpha": 1.0},
    "hard alone": {"alpha": 0.0},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "reverse": {"divergence": "reverse_kl"},
}
every_option_set = pytest.mark.parametrize("options", OPTION_SETS.values(), ids=OPTION_SETS)


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()


def batch(n=4, dtype=torch.float32):
    labels = torch.randint(C, (n,))
    labels[1] = -100
    return torch.randn(n, C, dtype=dtype, requires_grad=True), torch.randn(n, C, dtype=dtype), labels


def last_call():
    return pydistill.backend_info().last_call


class TestCompile:
    @every_option_set
    @pytest.mark.parametrize("backend", BACKENDS)  # the op calls the backend; its ISA is the backend's own choice
    def test_equals_eager(self, backend, options):
        student, teacher, labels = batch()

        def call(s):
            value, metrics = pydistill.distillation_loss(s, teacher, labels, return_metrics=True, **options)
            return value, torch.stack([*metrics[:4], *metrics.num_items]) if value.dim() == 0 else metrics[0]

        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        results = []
        for function in (call, compiled):
            with pydistill.use_backend(backend):
                value, metrics = function(student)
                weights = torch.arange(1.0, 1 + value.numel()).reshape(value.shape)
                results += [value.detach(), metrics, *torch.autograd.grad(value, student, weights)]
                last = last_call()
        assert last == f"{backend}, through the torch.library op (compile, export, or another recorder)"
        for eager, got in zip(results[:3], results[3:], strict=True):
            torch.testing.assert_close(got, eager, rtol=1e-6, atol=1e-7, equal_nan=True)

    @pytest.mark.parametrize(("kind", "graphs"), [(torch.tensor, 1), (float, 2)], ids=["0-d tensor", "float"])
    @pytest.mark.parametrize("name", ["alpha", "temperature"])
    def test_a_schedule_does_not_compile_anew(self, kind, graphs, name):
        counter = CompileCounter()
        student, teacher, labels = batch()
        compiled = torch.compile(pydistill.distillation_loss, fullgraph=True, backend=counter)
        for step in range(20):
            value = 0.1 + step / 25
            got = compiled(student, teacher, labels, **{name: kind(value)})
            want = loss(student, teacher, labels, **{name: value})
            torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)
        assert counter.frame_count <= graphs

    def test_alpha_reaches_both_ends(self):
        """A term of weight 0 is not evaluated, which is decided when the graph runs."""
        student, teacher, labels = batch()
        compiled = torch.compile(pydistill.distillation_loss, fullgraph=True, backend="aot_eager")
        teacher[0, 0] = torch.nan
        value = compiled(student, teacher, labels, alpha=torch.tensor(0.0))
        torch.testing.assert_close(value.double(), loss(student, None, labels, alpha=0.0), rtol=1e-6, atol=1e-6)
        assert compiled(student, teacher, labels, alpha=torch.tensor(0.5)).isnan()

    def test_dynamic_shapes(self):
        counter = CompileCounter()
        compiled = torch.compile(pydistill.distillation_loss, fullgraph=True, dynamic=True, backend=counter)
        for n in (4, 7, 32, 5):
            student, teacher, labels = batch(n)
            got = compiled(student, teacher, labels, temperature=2.0)
            torch.testing.assert_close(got.double(), loss(student, teacher, labels, temperature=2.0))
        assert counter.frame_count == 1

    @pytest.mark.timeout(200)
    def test_training_step(self):
        """The default compiler of torch, over model and loss; inplace is ignored there."""
        torch.manual_seed(1)
        inputs, (_, teacher, labels) = torch.randn(4, 8), batch()
        models = [torch.nn.Linear(8, C) for _ in range(2)]
        models[1].load_state_dict(models[0].state_dict())
        criterion = pydistill.DistillationLoss(temperature=2.0, inplace=True)

        def step(model):
            value = criterion(model(inputs), teacher, labels)
            value.backward()
            return value.detach()

        compiled = torch.compile(lambda model: criterion(model(inputs), teacher, labels), fullgraph=True)
        for _ in range(3):
            eager = step(models[0])
            value = compiled(models[1])
            value.backward()
            torch.testing.assert_close(value.detach(), eager)
            for model in models:
                with torch.no_grad():
                    for p in model.parameters():
                        p -= 0.5 * p.grad
                        p.grad = None
        torch.testing.assert_close(models[1].weight, models[0].weight)

    def test_errors_name_the_rule(self):
        student, teacher, labels = batch()
        compiled = torch.compile(pydistill.distillation_loss, backend="aot_eager")
        with pytest.raises(IndexError, match="row 0 holds 99"):
            compiled(student, teacher, torch.full_like(labels, 99))
        with pytest.raises(ValueError, match="alpha, the weight of the soft term"):
            compiled(student, teacher, labels, alpha=torch.tensor(1.5))

    def test_export_with_a_dynamic_batch(self, tmp_path):
        class Evaluation(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.student = torch.nn.Linear(8, C)
                self.loss = pydistill.DistillationLoss(temperature=4.0, alpha=0.7)

            def forward(self, inputs, teacher, labels):
                return self.loss(self.student(inputs), teacher, labels)

        def arguments(n):
            return torch.randn(n, 8), *batch(n)[1:]

        module = Evaluation()
        rows = torch.export.Dim("rows", min=2)
        exported = torch.export.export(module, arguments(4), dynamic_shapes=({0: rows}, {0: rows}, {0: rows}))
        torch.export.save(exported, tmp_path / "loss.pt2")
        loaded = torch.export.load(tmp_path / "loss.pt2").module()
        for n in (2, 4, 19):
            case = arguments(n)
            torch.testing.assert_close(loaded(*case), module(*case))


@every_option_set
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_opcheck(options, dtype):
    """Schema, fake implementation, autograd registration and tracing of the op, against its real results."""
    student, teacher, labels = batch(dtype=dtype)

    def number(x):
        return None if x is None else torch.tensor(x, dtype=torch.float64)

    # opcheck takes two NaN for different results, and a term that is not evaluated is NaN: then less is checked.
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    if 0 < options.get("alpha", 0.5) < 1:
        utils += ("test_aot_dispatch_dynamic",)
    tensors = [options.get("sample_weight"), options.get("class_weight")]
    items = options.get("num_items", (None, None))
    torch.library.opcheck(
        torch.ops.pydistill.distillation_loss.default,
        (
            student,
            teacher,
            labels,
            *(x if x is None or dtype != torch.float64 else x.double() for x in tensors),
            None,
            None,
            number(options.get("temperature", 1.0)),
            number(options.get("alpha", 0.5)),
            *map(number, items),
            options.get("divergence", "forward_kl"),
            None,
            options.get("t_squared", True),
            -100,
            options.get("unlabeled", "skip"),
            options.get("label_smoothing", 0.0),
            options.get("reduction", "mean"),
            True,
            True,
        ),
        test_utils=utils,
    )


class TestFunctorch:
    """Transforms run through the formula in torch operations."""

    @pytest.mark.parametrize("divergence", DIVERGENCES)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_grad(self, divergence, dtype):
        student, teacher, labels = batch(dtype=dtype)
        options = {"divergence": divergence, "temperature": 2.0}
        got = torch.func.grad(lambda s: pydistill.distillation_loss(s, teacher, labels, **options))(student)
        assert last_call() == "torch formula: functorch transform"
        _, want = loss_and_gradient(student, teacher, labels, **options)
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)

    def test_vmap(self):
        students = torch.randn(3, 4, C, dtype=torch.float64)
        _, teacher, labels = batch(dtype=torch.float64)
        got = torch.func.vmap(lambda s: pydistill.distillation_loss(s, teacher, labels, alpha=0.7))(students)
        want = torch.stack([loss(s, teacher, labels, alpha=0.7) for s in students])
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)

    def test_gradients_per_sample(self):
        student, teacher, labels = batch(dtype=torch.float64)
        labels[1] = 0
        one = torch.func.grad(lambda s, t, y: pydistill.distillation_loss(s[None], t[None], y[None], inplace=True))
        got = torch.func.vmap(one)(student.detach(), teacher, labels)
        assert last_call() == "torch formula: functorch transform; inplace ignored"
        torch.testing.assert_close(got, loss_and_gradient(student, teacher, labels, reduction="sum")[1])

    def test_jacrev(self):
        student, teacher, labels = batch(dtype=torch.float64)
        got = torch.func.jacrev(
            lambda s: pydistill.distillation_loss(s, teacher, labels, reduction="none"), chunk_size=1
        )(student.detach())
        want = torch.autograd.functional.jacobian(
            lambda s: loss(s, teacher, labels, reduction="none"), student.detach()
        )
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)

    def test_hessian(self):
        student, teacher, labels = batch(2, dtype=torch.float64)
        got = torch.func.hessian(lambda s: pydistill.distillation_loss(s, teacher, labels))(student.detach())
        want = torch.autograd.functional.hessian(lambda s: loss(s, teacher, labels), student.detach())
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


class TestOtherTensors:
    class Tagged(torch.Tensor):
        pass

    @pytest.mark.parametrize("position", [0, 1, 2])
    def test_subclass(self, position):
        case = list(batch(dtype=torch.float64))
        case[position] = case[position].detach().as_subclass(self.Tagged)
        case[0].requires_grad_()
        value = pydistill.distillation_loss(*case, temperature=2.0, inplace=True)
        assert last_call() == "torch formula: tensor subclass Tagged; inplace ignored"
        (gradient,) = torch.autograd.grad(value, case[0])
        plain = [x.detach().as_subclass(torch.Tensor) for x in case]
        for got, want in zip((value, gradient), loss_and_gradient(*plain, temperature=2.0), strict=True):
            torch.testing.assert_close(got.detach().as_subclass(torch.Tensor), want, rtol=1e-12, atol=1e-12)

    def test_parameter_takes_the_fused_path(self, variant):
        student, teacher, labels = batch()
        pydistill.distillation_loss(torch.nn.Parameter(student.detach()), teacher, labels).backward()
        assert last_call() == variant[0]

    @pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"alpha": 1.0}, {"label_smoothing": 0.1}])
    def test_meta_device(self, options):
        """Shapes and dtypes without data: the only other device that every machine has."""
        student, teacher, labels = (x.detach().to("meta") for x in batch())
        value, metrics = pydistill.distillation_loss(
            student.requires_grad_(), teacher, labels, return_metrics=True, **options
        )
        assert last_call() == "torch formula: device meta"
        value.sum().backward()
        shape = (4,) if options.get("reduction") == "none" else ()
        assert (value.device.type, value.shape, value.dtype) == ("meta", shape, torch.float32)
        assert (student.grad.device.type, student.grad.shape) == ("meta", student.shape)
        assert metrics.soft_loss.device.type == "meta"

    def test_one_device_for_all(self):
        student, teacher, labels = batch()
        with pytest.raises(ValueError, match=r"teacher and student_logits must be on one device.*meta.*cpu"):
            pydistill.distillation_loss(student, teacher.to("meta"), labels)


def test_fake_tensors_take_the_op():
    """Shapes and dtypes only: nothing is computed, forward and backward."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        student = torch.randn(6, 10, dtype=torch.float16, requires_grad=True)
        teacher, labels = torch.randn(6, 10), torch.zeros(6, dtype=torch.int64)
        loss = pydistill.distillation_loss(student, teacher, labels, reduction="none")
        assert loss.shape == (6,)
        assert loss.dtype == torch.float32
        assert loss.grad_fn is not None
        assert "pydistill" in type(loss.grad_fn).__name__
        loss.sum().backward()
        assert student.grad.shape == (6, 10)
        assert student.grad.dtype == torch.float16


def test_recorders_take_the_op():
    """jit.trace and make_fx record the op, not the number that came out."""
    from torch.fx.experimental.proxy_tensor import make_fx

    first, second, teacher = torch.randn(6, 5), torch.randn(6, 5), torch.randn(6, 5)

    def loss(student):
        return pydistill.distillation_loss(student, teacher, alpha=1.0)

    for recorded in (torch.jit.trace(loss, (first,)), make_fx(loss)(first)):
        torch.testing.assert_close(recorded(second), loss(second))


def test_probability_warning_under_compile(monkeypatch):
    """For a plain tensor; SoftTargets say what they are."""
    monkeypatch.setattr(checks, "_probability_warning_given", False)
    student, probs = torch.randn(4, 3), torch.full((4, 3), 1 / 3)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss(teacher):
        return pydistill.distillation_loss(student, teacher, alpha=1.0)

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="teacher looks like probabilities")
        loss(pydistill.SoftTargets.from_logits(probs))
        with pytest.raises(UserWarning, match="teacher looks like probabilities"):
            loss(probs)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_formula_keeps_the_digits_of_large_logits(divergence):
    """Softened after their maximum is gone: divided by T as they are, logits of 1e4 lose the fourth digit."""
    student, teacher = 1e4 + 3 * torch.randn(2, 8, 50)
    labels = torch.randint(50, (8,))
    options = {"divergence": divergence, "temperature": 3.0, "alpha": 1.0}
    value, gradient = loss_and_gradient(student, teacher, labels, **options)
    got, got_gradient = torch.func.grad_and_value(
        lambda x: pydistill.distillation_loss(x, teacher, labels, **options), has_aux=False
    )(student)[::-1]
    torch.testing.assert_close(got.double(), value.double(), rtol=1e-5, atol=0)
    torch.testing.assert_close(
        got_gradient.double(), gradient.double(), rtol=0, atol=1e-5 * gradient.abs().max().item()
    )


def test_tensor_options_keep_float64_under_compile():
    """A temperature and an alpha of float64 are not rounded on their way into the op."""
    student, teacher, labels = batch(dtype=torch.float64)
    options = {"temperature": torch.tensor(2.3, dtype=torch.float64), "alpha": torch.tensor(0.3, dtype=torch.float64)}

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(student):
        return pydistill.distillation_loss(student, teacher, labels, **options)

    want = pydistill.distillation_loss(student, teacher, labels, **options)
    torch.testing.assert_close(compiled(student), want, rtol=1e-13, atol=0)
