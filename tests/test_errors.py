"""Bad inputs: the exception's type and words, the same on every backend, and nothing written before it."""

import math
import re
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from conftest import VARIANTS

import pydistill
from pydistill.engine import checks

INF, NAN = math.inf, math.nan
N, C = 4, 5


def good():
    """Arguments that are accepted; no label is ignored."""
    return {
        "student_logits": torch.randn(N, C),
        "teacher": torch.randn(N, C),
        "labels": torch.tensor([0, 1, 2, 3]),
    }


def weights(*values):
    return torch.tensor(values)


needs_gradient = torch.ones(N, requires_grad=True)
ONE, SPARSE, JSD = torch.ones(()), torch.eye(N, C).to_sparse(), {"divergence": "jsd"}

# (exception, what the message must say, the arguments that cause it)
BAD = [
    # options
    (ValueError, "divergence must be one of forward_kl, reverse_kl.* got 'kl'", {"divergence": "kl"}),
    (ValueError, "divergence must be one of .* got None", {"divergence": None}),
    (ValueError, "beta must be None with divergence='forward_kl', which has no parameter; got 0.5", {"beta": 0.5}),
    (ValueError, "beta must be None with divergence='forward_kl', which has no parameter; got 0", {"beta": 0}),
    (ValueError, "temperature must be positive and finite, got 0.0", {"temperature": 0}),
    (ValueError, "temperature must be positive and finite, got -2.0", {"temperature": -2.0}),
    (ValueError, "temperature must be positive and finite, got nan", {"temperature": torch.tensor(NAN)}),
    (ValueError, "temperature must be positive and finite, got inf", {"temperature": INF}),
    (ValueError, "temperature must be positive and finite, got -inf", {"temperature": -INF}),
    (ValueError, r"temperature must be a number or a 0-d tensor, got .*\(2,\)", {"temperature": torch.ones(2)}),
    (TypeError, "temperature must be a number or a 0-d tensor, got 'hot'", {"temperature": "hot"}),
    (TypeError, "temperature must be a number or a 0-d tensor, got None", {"temperature": None}),
    (TypeError, "temperature must not require a gradient", {"temperature": torch.tensor(2.0, requires_grad=True)}),
    (ValueError, r"alpha.* must be in \[0, 1\], got 1.5", {"alpha": 1.5}),
    (ValueError, r"alpha.* must be in \[0, 1\], got -0.5", {"alpha": torch.tensor(-0.5)}),
    (ValueError, r"alpha.* must be in \[0, 1\], got nan", {"alpha": NAN}),
    (ValueError, r"alpha.* must be in \[0, 1\], got inf", {"alpha": torch.tensor(INF)}),
    (TypeError, "alpha must be a number or a 0-d tensor, got True", {"alpha": True}),
    (TypeError, "alpha must not require a gradient", {"alpha": torch.tensor(0.5, requires_grad=True)}),
    (ValueError, r"label_smoothing must be in \[0, 1\], got 1.01", {"label_smoothing": 1.01}),
    (ValueError, r"label_smoothing must be in \[0, 1\], got -0.1", {"label_smoothing": -0.1}),
    (ValueError, r"label_smoothing must be in \[0, 1\], got nan", {"label_smoothing": NAN}),
    (ValueError, "unlabeled must be .*skip.* or .*distill.*, got 'drop'", {"unlabeled": "drop"}),
    (ValueError, '"mean", got "batchmean"; "mean" divides by the rows', {"reduction": "batchmean"}),
    (ValueError, "reduction must be .*, got 'max'", {"reduction": "max"}),
    (ValueError, "num_items must be None unless .*mean.* reduction='sum'", {"num_items": 8, "reduction": "sum"}),
    (ValueError, "num_items must be None unless .*mean.* reduction='none'", {"num_items": 8, "reduction": "none"}),
    (ValueError, "num_items must be >= 0 and finite, got -1.5", {"num_items": -1.5}),
    (ValueError, "num_items must be >= 0 and finite, got inf", {"num_items": INF}),
    (ValueError, "num_items must be >= 0 and finite, got nan", {"num_items": NAN}),
    (ValueError, r"num_items must be >= 0 and finite, got \(4, -1\)", {"num_items": (4, -1)}),
    (TypeError, "num_items must be a number or a 0-d tensor, got 'a'", {"num_items": "a"}),
    (ValueError, r"num_items must be a number or a pair .*, got \(1, 2, 3\)", {"num_items": (1, 2, 3)}),
    (ValueError, r"num_items must be a number or a 0-d tensor, got .*\(2,\)", {"num_items": torch.ones(2)}),
    (ValueError, "temperature must be a number that a float can hold", {"temperature": 10**400}),
    (TypeError, "temperature must be a real number, got a tensor of dtype torch.complex64", {"temperature": 1j * ONE}),
    (ValueError, r"temperature must be in \[1e-30, 1e30\], .*; got 1e-40", {"temperature": 1e-40}),
    (ValueError, r"temperature must be in \[1e-30, 1e30\], .*; got 1e\+308", {"temperature": 1e308}),
    (TypeError, "temperature must be a real number, got a tensor of dtype torch.bool", {"temperature": ONE.bool()}),
    (TypeError, r"alpha must be a number or a 0-d tensor, got \(0.5\+0j\)", {"alpha": 0.5 + 0j}),
    (TypeError, r"alpha must be a number or a 0-d tensor, got np.complex128", {"alpha": np.complex128(0.5)}),
    (TypeError, r"alpha must be a number or a 0-d tensor, got np.True_", {"alpha": np.True_}),
    (TypeError, "ignore_index must be an integer, got True", {"ignore_index": True}),
    (TypeError, "ignore_index must be an integer, got '0'", {"ignore_index": "0"}),
    (ValueError, f"ignore_index must fit in 64 bits, .* got {2**70}", {"ignore_index": 2**70}),
    (ValueError, "reduction must be .*, got array", {"reduction": np.array(["mean", "sum"])}),
    (ValueError, "reduction must be .*, got None", {"reduction": None}),
    (ValueError, "unlabeled must be .*, got array", {"unlabeled": np.array(["skip", "skip"])}),
    (TypeError, "return_metrics must be True or False, got 'x'", {"return_metrics": "x"}),
    (TypeError, "return_metrics must be True or False, got 1", {"return_metrics": 1}),
    (ValueError, "beta of 'jsd' must be 0, which is 'forward_kl', or at least 1e-30", {**JSD, "beta": 1e-31}),
    # types and dtypes
    (TypeError, "student_logits must be a tensor, got list", {"student_logits": [[0.0, 1.0]]}),
    (TypeError, r"student_logits must be float32.*, got torch\.int64", {"student_logits": torch.ones(N, C).long()}),
    (TypeError, r"student_logits must be float32.*, got torch\.complex64", {"student_logits": torch.ones(N, C) + 0j}),
    (
        TypeError,
        "teacher must be a tensor of logits or SoftTargets, got ndarray",
        {"teacher": torch.ones(N, C).numpy()},
    ),
    (TypeError, r"student_logits must be float32.*, got torch\.bool", {"student_logits": torch.ones(N, C).bool()}),
    (TypeError, r"teacher must be float32.*, got torch\.int64", {"teacher": torch.ones(N, C).long()}),
    (TypeError, "labels must be a tensor of class indices, got list", {"labels": [0, 1, 2, 3]}),
    (TypeError, r"labels must be .*int64 or int32, got torch\.float32", {"labels": torch.zeros(N)}),
    (TypeError, r"labels must be .*int64 or int32, got torch\.uint8", {"labels": torch.zeros(N, dtype=torch.uint8)}),
    (TypeError, r"student_logits must be a dense tensor, got layout torch.sparse_coo", {"student_logits": SPARSE}),
    (TypeError, r"student_logits must be a dense tensor.*sparse_csr", {"student_logits": SPARSE.to_sparse_csr()}),
    (TypeError, r"student_logits must be a dense tensor.*mkldnn", {"student_logits": SPARSE.to_dense().to_mkldnn()}),
    (TypeError, r"teacher must be a dense tensor.*; pass teacher.to_dense\(\)", {"teacher": SPARSE}),
    (TypeError, "labels must be a dense tensor", {"labels": torch.tensor([0, 1, 2, 3]).to_sparse()}),
    (TypeError, "sample_weight must be a dense tensor", {"sample_weight": torch.ones(N).to_sparse()}),
    (TypeError, "sample_weight must be real, got dtype torch.complex64", {"sample_weight": torch.ones(N) + 0j}),
    (TypeError, "class_weight must be real, got dtype torch.complex64", {"class_weight": torch.ones(C) + 0j}),
    (TypeError, r"labels must be .*int32, got torch\.float64\. Soft labels", {"labels": torch.ones(N, C).double()}),
    (TypeError, "sample_weight must be a tensor, got list", {"sample_weight": [1.0] * N}),
    (TypeError, "sample_weight must not require a gradient", {"sample_weight": needs_gradient}),
    (TypeError, "class_weight must be a tensor, got float", {"class_weight": 1.0}),
    (TypeError, "class_weight must not require a gradient", {"class_weight": torch.ones(C, requires_grad=True)}),
    # shapes and devices
    (ValueError, r"student_logits must have at least one class .*\(\)", {"student_logits": torch.tensor(1.0)}),
    (ValueError, r"student_logits must have at least one class .*\(4, 0\)", {"student_logits": torch.ones(4, 0)}),
    (ValueError, r"got teacher \(4, 6\) and student_logits \(4, 5\)", {"teacher": torch.ones(N, C + 1)}),
    (ValueError, r"got labels \(4, 1\) and student_logits \(4, 5\)", {"labels": torch.zeros(N, 1).long()}),
    (ValueError, r"got labels \(\) and student_logits \(4, 5\)", {"labels": torch.tensor(0)}),
    (ValueError, r"sample_weight must have shape \(4,\), got \(4, 1\)", {"sample_weight": torch.ones(N, 1)}),
    (ValueError, r"class_weight must have shape \(5,\), got \(4,\)", {"class_weight": torch.ones(N)}),
    (ValueError, "teacher on meta and student_logits on cpu", {"teacher": torch.ones(N, C, device="meta")}),
    # missing
    (ValueError, "teacher must be given unless alpha is 0", {"teacher": None}),
    (ValueError, "labels must be given unless alpha is 1", {"labels": None}),
    # values in rows: the first bad row is named
    (IndexError, r"labels must be in \[0, 5\) .*-100; row 1 holds 5$", {"labels": torch.tensor([0, 5, 2, -1])}),
    (IndexError, r"ignore_index=3; row 2 holds -100$", {"labels": torch.tensor([0, 3, -100, 9]), "ignore_index": 3}),
    (IndexError, "row 3 holds 5$", {"labels": torch.tensor([0, 1, 2, 5]), "alpha": 1.0, "unlabeled": "distill"}),
    (
        ValueError,
        "sample_weight must be >= 0 and finite; row 2 holds -1.0$",
        {"sample_weight": weights(1, 0, -1.0, NAN)},
    ),
    (ValueError, "sample_weight .*; row 1 holds nan$", {"sample_weight": weights(1, NAN, 1, 1)}),
    (ValueError, "sample_weight .*; row 3 holds inf$", {"sample_weight": weights(1, 1, 1, INF)}),
    (
        ValueError,
        "sample_weight .*; row 0 holds nan$",
        {"sample_weight": weights(NAN, 1, 1, 1), "labels": torch.tensor([-100, 9, 1, 1])},
    ),
    (
        IndexError,
        "row 0 holds 9$",
        {"sample_weight": weights(0, NAN, 1, 1), "labels": torch.tensor([9, 1, 1, 1])},
    ),
]
every_bad_input = pytest.mark.parametrize(
    ("exception", "words", "arguments"), BAD, ids=[re.sub(r"[^a-z0-9 ]", "", words.lower())[:50] for _, words, _ in BAD]
)


class Subclass(torch.Tensor):
    """A tensor subclass: its loss is the differentiable torch formula."""


@every_bad_input
def test_bad_input_is_the_same_error_everywhere(exception, words, arguments):
    """Every backend, and the torch formula, raise one exception with one text."""
    call = good() | arguments
    texts = set()
    for name, isa in VARIANTS:
        with pydistill.use_backend(name, isa=isa), pytest.raises(exception, match=words) as caught:
            pydistill.distillation_loss(**call)
        assert caught.type is exception
        texts.add(str(caught.value))
    if isinstance(call["student_logits"], torch.Tensor) and call["student_logits"].layout is torch.strided:
        formula = call | {"student_logits": call["student_logits"].as_subclass(Subclass)}
        with pytest.raises(exception, match=words) as caught:
            pydistill.distillation_loss(**formula)
        texts.add(str(caught.value))
    assert len(texts) == 1


@every_bad_input
def test_nothing_is_written_before_the_error(variant, exception, words, arguments):
    call = good() | arguments
    student = call["student_logits"]
    dense = isinstance(student, torch.Tensor) and student.layout is torch.strided
    if not dense or not student.is_floating_point():
        call["student_logits"] = torch.randn(N, C + 1)  # then another argument is bad: the shapes disagree
        exception, words = ValueError, "student_logits"
    leaf = call["student_logits"].clone().requires_grad_()
    logits = leaf * 1.0
    before, version = logits.detach().clone(), logits._version
    with pytest.raises(exception, match=words):
        pydistill.distillation_loss(**(call | {"student_logits": logits}), inplace=True)
    assert torch.equal(logits, before)
    assert logits._version == version


@pytest.mark.parametrize("row", [0, 700, 1399])
def test_no_row_is_written_when_a_late_one_is_bad(variant, row):
    """Enough rows for several threads: the check must come before the first of them starts."""
    leaf = torch.randn(1400, 100, requires_grad=True)
    logits = leaf * 1.0
    before = logits.detach().clone()
    labels = torch.randint(100, (1400,))
    labels[row] = 100
    with pytest.raises(IndexError, match=f"row {row} holds 100"):
        pydistill.distillation_loss(logits, torch.randn(1400, 100), labels, inplace=True)
    assert torch.equal(logits, before)


def test_row_of_more_dimensions_is_counted_in_order(variant):
    student, teacher = torch.randn(2, 2, 3, C)
    labels, weight = torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 3)
    labels[1, 1], weight[1, 0] = 77, -2.0
    for subclass in (False, True):
        logits = student.as_subclass(Subclass) if subclass else student
        with pytest.raises(IndexError, match="row 4 holds 77"):
            pydistill.distillation_loss(logits, teacher, labels)
        with pytest.raises(ValueError, match=r"row 3 holds -2\.0"):
            pydistill.distillation_loss(logits, teacher, labels, sample_weight=weight)


# --- Warnings -------------------------------------------------------------------------------------------------


def test_probability_warning_is_given_once_in_a_process(monkeypatch):
    """Over all backends; errors come before it and do not use it up."""
    monkeypatch.setattr(checks, "_probability_warning_given", False)
    call = good() | {"teacher": torch.randn(N, C).softmax(-1)}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(IndexError, match="row 0 holds 5"):
            pydistill.distillation_loss(**(call | {"labels": torch.full((N,), C)}))
        for name, isa in VARIANTS * 2:
            with pydistill.use_backend(name, isa=isa):
                pydistill.distillation_loss(**call)
    assert [str(w.message)[:35] for w in caught] == ["teacher looks like probabilities (i"]
    assert caught[0].category is UserWarning


def test_unknown_options_and_positions_are_pythons_errors():
    with pytest.raises(TypeError, match="unexpected keyword argument 'temprature'"):
        pydistill.distillation_loss(**good(), temprature=2.0)
    with pytest.raises(TypeError, match="positional"):
        pydistill.distillation_loss(*good().values(), "forward_kl")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ignore_index", -100.5),
        ("ignore_index", None),
        ("t_squared", "no"),
        ("label_smoothing", "0.1"),
        ("label_smoothing", None),
        ("temperature", np.array([4.0])),
        ("divergence", ["forward_kl"]),
    ],
)
def test_option_of_another_type(name, value):
    """The error names the argument."""
    with pytest.raises((TypeError, ValueError), match=name):
        pydistill.distillation_loss(torch.randn(2, 3), torch.randn(2, 3), alpha=1.0, **{name: value})


def test_hint_when_the_classes_are_dimension_1():
    """For the teacher as for the labels."""
    with pytest.raises(ValueError, match=r"teacher\.movedim\(1, -1\)"):
        pydistill.distillation_loss(torch.randn(2, 5, 7), torch.randn(2, 7, 5), alpha=1.0)


@pytest.mark.parametrize("value", ["no", 1, None])
def test_inplace_that_is_no_bool(variant, value):
    logits = torch.randn(N, C, requires_grad=True) * 1.0
    before = logits.detach().clone()
    with pytest.raises(TypeError, match=f"inplace must be True or False, got {value!r}"):
        pydistill.distillation_loss(logits, torch.randn(N, C), alpha=1.0, inplace=value)
    assert torch.equal(logits, before)


# --- Memory that is gone --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["student_logits", "teacher", "labels", "sample_weight", "class_weight", "indices", "log_partitions"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_tensor_whose_storage_was_freed(variant, name, dtype):
    """FSDP frees parameters like this; without the check the kernel would read at address 0."""
    call = {
        "student_logits": torch.randn(N, C, dtype=dtype),
        "teacher": torch.randn(N, C, dtype=dtype),
        "labels": torch.tensor([0, 1, 2, 3]),
        "sample_weight": torch.ones(N, dtype=dtype),
        "class_weight": torch.ones(C, dtype=dtype),
    }
    freed = call.get(name)
    if freed is None:
        call["teacher"] = pydistill.top_k(call["teacher"], 2, tail="bucket")
        call["divergence"] = "forward_kl"
        freed = call["teacher"].indices if name == "indices" else call["teacher"].log_partitions[1.0]
    freed.untyped_storage().resize_(0)
    shown = {"indices": "teacher_indices"}.get(name, name)
    for student in (call["student_logits"], call["student_logits"].detach().requires_grad_()):
        with pytest.raises(ValueError, match=f"{shown} must have memory; .*storage was freed"):
            pydistill.distillation_loss(**call | {"student_logits": student})


@pytest.mark.parametrize("name", ["student_hidden", "student_weight", "student_bias", "teacher.hidden"])
def test_head_whose_storage_was_freed(variant, name):
    tensors = {
        "student_hidden": torch.randn(N, 3),
        "student_weight": torch.randn(C, 3),
        "student_bias": torch.randn(C),
        "teacher.hidden": torch.randn(N, 6),
    }
    teacher = pydistill.LinearTeacher(tensors["teacher.hidden"], torch.randn(C, 6))
    tensors[name].untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=f"{name} must have memory"):
        pydistill.linear_distillation_loss(
            tensors["student_hidden"],
            tensors["student_weight"],
            teacher,
            torch.tensor([0, 1, 2, 3]),
            student_bias=tensors["student_bias"],
        )


def test_classes_that_may_be_either_dimension_are_warned_of(variant):
    """(N, C, H, W) logits with C = H = W fit (N, H, W) labels in both readings."""
    for shape in ((2, 4, 4, 4), (2, 4, 4)):
        logits, labels = torch.randn(shape), torch.zeros(shape[:-1], dtype=torch.int64)
        with pytest.warns(UserWarning, match=r"dimension 1 or the last one.*movedim\(1, -1\)"):
            pydistill.distillation_loss(logits, logits, labels)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for shape in ((2, 4, 5, 4), (2, 5, 4), (4, 4), (3, 4, 4, 5)):
            logits, labels = torch.randn(shape), torch.zeros(shape[:-1], dtype=torch.int64)
            pydistill.distillation_loss(logits, logits, labels)


def test_targets_whose_storage_was_freed():
    for make in (
        pydistill.SoftTargets.from_logits,
        pydistill.SoftTargets.from_probs,
        pydistill.SoftTargets.from_log_probs,
        lambda logits: pydistill.top_k(logits, 2),
    ):
        freed = torch.randn(N, C)
        freed.untyped_storage().resize_(0)
        with pytest.raises(ValueError, match=r"must have memory; .*storage was freed"):
            make(freed)


def test_head_that_is_not_where_its_hidden_states_are():
    """A weight on the meta device had given a loss of unwritten memory."""
    hidden, weight = torch.randn(N, 3), torch.randn(C, 3, device="meta")
    with pytest.raises(ValueError, match="weight and hidden must be on one device, got weight on meta"):
        pydistill.LinearTeacher(hidden, weight)
    with pytest.raises(ValueError, match="student_weight and student_hidden must be on one device"):
        pydistill.linear_distillation_loss(hidden, weight, torch.randn(N, C), alpha=1.0)
    with pytest.raises(TypeError, match="weight must be a dense tensor"):
        pydistill.LinearTeacher(hidden, torch.randn(C, 3).to_sparse())


def test_rows_of_a_linear_teacher_are_rows():
    teacher = pydistill.LinearTeacher(torch.randn(N, 3), torch.randn(C, 3))
    assert teacher[1].shape == (C,)
    assert teacher[1:, :].shape == (N - 1, C)
    for rows in ((0, 0), (slice(None), slice(2))):
        with pytest.raises(IndexError, match="rows must choose whole rows"):
            teacher[rows]


@pytest.mark.parametrize("option", [{"inplace": "no"}, {"return_metrics": "x"}, {"ignore_index": True}])
def test_modules_refuse_what_the_functions_refuse(option):
    with pytest.raises(TypeError, match=next(iter(option))):
        pydistill.DistillationLoss(**option)


# --- DTensors -------------------------------------------------------------------------------------------------

_DTENSORS = """
import sys, torch, torch.distributed as dist
dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=0, world_size=1)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import loss_parallel
import pydistill
from pydistill import distillation_loss

mesh = init_device_mesh("cpu", (1,))
student, teacher, labels = torch.randn(4, 6), torch.randn(4, 6), torch.tensor([0, 1, 2, 3])
leaf = student.clone().requires_grad_()
distillation_loss(leaf, teacher, labels, temperature=2.0).backward()

def distributed(placement):
    of_labels = Replicate() if placement == Shard(1) else placement
    tensors = (student, placement), (teacher, placement), (labels, of_labels)
    return [distribute_tensor(x, mesh, [where]) for x, where in tensors]

def refused(error, words, call, *arguments, **options):
    try:
        call(*arguments, **options)
    except error as caught:
        assert words in str(caught), str(caught)
    else:
        raise AssertionError(f"not refused: {words}")

for placement in (Replicate(), Shard(0), Shard(1)):
    s, t, y = distributed(placement)
    s.requires_grad_()
    distillation_loss(s, t, y, temperature=2.0).backward()
    torch.testing.assert_close(s.grad.full_tensor(), leaf.grad)
s, t, y = distributed(Shard(1))
rule = "all tensors must be DTensors or none"
refused(ValueError, f"{rule}: student_logits distributed, teacher, labels plain", distillation_loss, s, teacher, labels)
refused(ValueError, f"{rule}: teacher distributed, student_logits plain", distillation_loss, student, t, alpha=1.0)
with loss_parallel():
    refused(ValueError, "loss_parallel", distillation_loss, s, t, y)
weight, hidden = distribute_tensor(torch.randn(6, 3), mesh, [Shard(0)]), torch.randn(4, 3)
plain = "weight must be a plain tensor, got a DTensor"
refused(TypeError, f"student_{plain}", pydistill.linear_distillation_loss, hidden, weight, teacher, labels)
refused(TypeError, plain, pydistill.LinearTeacher, hidden, weight)
dist.destroy_process_group()
print("done")
"""


def test_dtensors_are_right_or_refused(tmp_path):
    """In a process of its own, which torch.distributed needs. loss_parallel() gave a gradient that was 100 % off."""
    command = [sys.executable, "-c", _DTENSORS, str(tmp_path / "rendezvous")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.stdout.splitlines()[-1:] == ["done"], done.stderr
