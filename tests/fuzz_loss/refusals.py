"""Calls with one argument that must be refused: the error's type, the name in its message, inputs left as they are."""

import math
import random
from dataclasses import dataclass

import torch

import pydistill

from .judging import Finding

NAN, INF = math.nan, math.inf
ROWS, CLASSES, HIDDEN = 3, 5, 2


def _call():
    """A valid call of distillation_loss; each refusal changes one argument."""
    return {
        "student_logits": torch.randn(ROWS, CLASSES),
        "teacher": torch.randn(ROWS, CLASSES),
        "labels": torch.tensor([0, 3, -100]),
        "temperature": 2.0,
    }


def _linear():
    call = _call()
    del call["student_logits"]
    return {"student_hidden": torch.randn(ROWS, HIDDEN), "student_weight": torch.randn(CLASSES, HIDDEN)} | call


def _items():
    return {"labels": torch.tensor([0, 3, -100]), "sample_weight": torch.rand(ROWS)}


def _topk():
    return {"indices": torch.tensor([[0, 2]]), "logits": torch.tensor([[1.0, 2.0]]), "num_classes": CLASSES}


def _probs():
    return {"probs": torch.tensor([[0.25, 0.75]])}


# (argument, code of bad values, errors). None where an option's default is None is no mistake, so it is not listed.
_OPTIONS = [
    ("divergence", ["'kl'", "None", "3", "''", "('forward_kl',)"], ValueError),
    ("temperature", ["0", "0.0", "-1.0", "inf", "nan", "-inf", "1e31", "1e-31", "torch.tensor(0.0)"], ValueError),
    ("temperature", ["'2'", "None", "True", "1j", "torch.tensor(2.0, requires_grad=True)", "[2.0]"], TypeError),
    ("temperature", ["torch.ones(1)", "torch.ones(2, 2)", "10**400"], ValueError),
    ("alpha", ["-0.1", "1.0001", "nan", "inf", "-5", "torch.tensor(2.0)", "torch.ones(2)"], ValueError),
    ("alpha", ["'0.5'", "None", "True", "torch.tensor(0.5, requires_grad=True)"], TypeError),
    ("label_smoothing", ["-0.1", "1.1", "nan", "inf"], ValueError),
    ("label_smoothing", ["'0.1'", "None", "False"], TypeError),
    ("beta", ["0.5", "0", "nan"], ValueError),
    ("t_squared", ["1", "0", "None", "'yes'"], TypeError),
    ("ignore_index", ["1.5", "None", "True", "'-100'"], TypeError),
    ("ignore_index", ["2**63", "2**70", "-2**63 - 1"], ValueError),
    ("unlabeled", ["'keep'", "None", "True", "1"], ValueError),
    ("reduction", ["'batchmean'", "'avg'", "None", "0", "['mean']"], ValueError),
    ("num_items", ["-1", "nan", "inf", "(1, 2, 3)", "(1,)", "torch.tensor(-1.0)", "torch.ones(2)"], ValueError),
    ("num_items", ["'3'", "True", "(1, 'x')", "{}"], TypeError),
    ("return_metrics", ["1", "None", "'x'"], TypeError),
]
_TENSORS = [
    ("sample_weight", ["-torch.ones(3)", "torch.tensor([1, nan, 1])", "torch.tensor([1, inf, 1])"], ValueError),
    (
        "sample_weight",
        ["torch.ones(2)", "torch.ones(3, 1)", "torch.ones(())", "torch.ones(3, device='meta')"],
        ValueError,
    ),
    ("sample_weight", ["[1.0, 1.0, 1.0]", "1.0", "torch.ones(3, dtype=torch.complex64)"], TypeError),
    ("sample_weight", ["torch.ones(3, requires_grad=True)", "torch.ones(3).to_sparse()"], TypeError),
    ("class_weight", ["torch.ones(4)", "torch.ones(5, 1)", "torch.ones(())"], ValueError),
    ("class_weight", ["[1.0] * 5", "torch.ones(5, requires_grad=True)", "torch.ones(5).to_sparse()"], TypeError),
    ("class_weight", ["torch.ones(5, dtype=torch.complex128)"], TypeError),
]
_LABELS = [
    ("labels", ["torch.tensor([0, 5, 1])", "torch.tensor([0, -1, 1])", "torch.tensor([0, -101, 7])"], IndexError),
    ("labels", ["torch.tensor([0, 2**31 - 1, 1], dtype=torch.int32)", "torch.tensor([0, 2**40, 1])"], IndexError),
    ("labels", ["torch.ones(3)", "torch.tensor([True, False, True])", "[0, 1, 2]", "torch.ones(3, 5)"], TypeError),
    ("labels", ["torch.tensor([0, 1, 2]).to_sparse()", "torch.tensor([0, 1, 2]).byte()", "1"], TypeError),
    ("labels", ["None", "torch.tensor([0, 1])", "torch.tensor(0)", "torch.tensor([[0], [1], [2]])"], ValueError),
    ("labels", ["torch.zeros(3, dtype=torch.int64, device='meta')"], ValueError),
]
_TEACHER = [
    ("teacher", ["None", "torch.randn(3, 4)", "torch.randn(3, 6)", "torch.randn(5)", "torch.randn(1, 5)"], ValueError),
    (
        "teacher",
        ["torch.randn(3, 5, device='meta')", "pydistill.SoftTargets.from_logits(torch.randn(2, 5))"],
        ValueError,
    ),
    ("teacher", ["torch.ones(3, 5, dtype=torch.int64)", "[[1.0] * 5] * 3", "'teacher'", "1.0"], TypeError),
    ("teacher", ["torch.randn(3, 5).to_sparse()", "torch.randn(3, 5, dtype=torch.complex64)"], TypeError),
]
_STUDENT = [
    (
        "student_logits",
        ["torch.ones(3, 5, dtype=torch.int64)", "None", "[[1.0] * 5] * 3", "torch.ones(3, 5).bool()"],
        TypeError,
    ),
    ("student_logits", ["torch.randn(3, 5).to_sparse()", "torch.randn(3, 5, dtype=torch.complex64)"], TypeError),
    ("student_logits", ["torch.zeros(3, 0)", "torch.tensor(1.0)"], ValueError),
    ("inplace", ["'no'", "1", "None"], TypeError),
]
_HEAD = [
    ("student_hidden", ["torch.randn(3, 3)", "torch.tensor(1.0)"], ValueError),
    (
        "student_hidden",
        ["torch.ones(3, 2, dtype=torch.int64)", "None", "[[1.0] * 2] * 3", "torch.randn(3, 2).double()"],
        TypeError,
    ),
    ("student_weight", ["torch.randn(5)", "torch.randn(1, 5, 2)", "torch.randn(5, 3)"], ValueError),
    ("student_weight", ["None", "torch.ones(5, 2, dtype=torch.int64)", "torch.ones(5, 2).to_sparse()"], TypeError),
    ("student_bias", ["torch.ones(4)", "torch.ones(5, 1)"], ValueError),
    ("student_bias", ["[1.0] * 5", "torch.ones(5, dtype=torch.int64)", "1.0"], TypeError),
    ("softcap", ["0", "-1.0", "inf", "nan", "'1'", "True"], ValueError),
    ("logit_scale", ["0", "-1.0", "inf", "nan", "None", "True"], ValueError),
    ("chunk_rows", ["0", "-1"], ValueError),
    ("chunk_rows", ["2.5", "True", "'8'"], TypeError),
]
_OF_ITEMS = [
    ("labels", ["torch.tensor([0, -3, 1])", "torch.tensor([0, -1, 1], dtype=torch.int32)"], IndexError),
    ("labels", ["torch.ones(3)", "[0, 1, 2]", "torch.tensor([True, False, True])"], TypeError),
    ("sample_weight", ["torch.ones(2)", "-torch.ones(3)", "torch.tensor([1, nan, 1])"], ValueError),
    ("sample_weight", ["[1.0] * 3", "torch.ones(3, requires_grad=True)"], TypeError),
    ("class_weight", ["torch.ones(5, 1)"], ValueError),
    ("ignore_index", ["1.5", "None", "True"], TypeError),
    ("unlabeled", ["'keep'", "None"], ValueError),
]
_OF_TOPK = [
    (
        "indices",
        ["torch.tensor([[0, 0]])", "torch.tensor([[0, 5]])", "torch.tensor([[-1, 2]])", "torch.tensor([[1]])"],
        ValueError,
    ),
    ("indices", ["torch.ones(1, 2)", "'ab'", "None"], TypeError),
    ("logits", ["torch.ones(1, 3)", "torch.tensor(1.0)"], ValueError),
    ("logits", ["torch.ones(1, 2, dtype=torch.int64)", "None"], TypeError),
    ("num_classes", ["5.5", "'5'", "True", "None"], TypeError),
    ("tail", ["'drop'", "None"], ValueError),
    ("log_partitions", ["torch.ones(1)", "{'a': [3.0]}", "{1.0: [3]}", "{1.0: 'x'}"], TypeError),
    ("log_partitions", ["{inf: [3.0]}", "{0.0: [3.0]}", "{1.0: [3.0, 4.0]}", "{1.0: [0.5]}"], ValueError),
]
_OF_PROBS = [
    ("probs", ["torch.tensor([[0.5, 0.6]])", "torch.tensor([[1.5, -0.5]])", "torch.tensor([[nan, 1.0]])"], ValueError),
    ("probs", ["torch.tensor([[1, 0]])", "None", "torch.tensor([[1.0, 0.0]]).to_sparse()"], TypeError),
    ("validate", ["1", "None"], TypeError),
]
_FUNCTIONS = {
    "distillation_loss": (_call, _OPTIONS + _TENSORS + _LABELS + _TEACHER + _STUDENT),
    "linear_distillation_loss": (_linear, _OPTIONS + _TENSORS + _LABELS + _TEACHER + _HEAD),
    "loss_items": (_items, _OF_ITEMS),
    "SoftTargets.from_topk": (_topk, _OF_TOPK),
    "SoftTargets.from_probs": (_probs, _OF_PROBS),
}
_WEIGHTS = (10, 6, 2, 2, 1)


@dataclass
class Refusal:
    """A call whose ``argument`` is bad. ``random``: seeds the rest of the call."""

    function: str
    argument: str
    value: str
    error: type
    seed: str

    @property
    def name(self):
        return f"{self.function}({self.argument}={self.value}, ...)"

    @property
    def code(self):
        make, _ = _FUNCTIONS[self.function]
        others = ", ".join(name for name in make() if name != self.argument)
        return f"pydistill.{self.name}  # with valid {others}; expected {self.error.__name__}"

    def check(self, backend, isa) -> Finding | None:
        """Whether it is refused as it must be."""
        torch.manual_seed(hash(self.seed) % 2**31)
        make, _ = _FUNCTIONS[self.function]
        call = make()
        leaves = [x.requires_grad_() for n, x in call.items() if n.startswith("student") and x.is_floating_point()]
        call[self.argument] = eval(self.value, {"torch": torch, "nan": NAN, "inf": INF, "pydistill": pydistill})
        before = {n: x.detach().clone() for n, x in call.items() if _is_dense(x)}
        function = pydistill
        for part in self.function.split("."):
            function = getattr(function, part)
        try:
            with pydistill.use_backend(backend, isa=isa):
                result = function(**call)
        except (ValueError, TypeError, IndexError) as error:
            return self._judge(error, call, before)
        except Exception as error:
            return Finding(
                "refusal of another type", f"{type(error).__name__}: {error}; expected {self.error.__name__}"
            )
        del leaves
        return Finding("not refused", f"returned {result!r:.200}")

    def _judge(self, error, call, before):
        if not isinstance(error, self.error):
            return Finding(
                "refusal of another type", f"{type(error).__name__}: {error}; expected {self.error.__name__}"
            )
        if self.argument not in str(error):
            return Finding("refusal without a name", f"{type(error).__name__}: {error}")
        written = [
            n for n, x in before.items() if not torch.equal(x.nan_to_num(12.5), call[n].detach().nan_to_num(12.5))
        ]
        return Finding("written", f"a refused call wrote to {', '.join(written)}") if written else None


def _is_dense(x):
    return isinstance(x, torch.Tensor) and x.layout is torch.strided and x.device.type == "cpu" and not x.is_complex()


def draw(seed: str) -> Refusal:
    """The refused call of a seed."""
    chosen = random.Random(seed)
    function = chosen.choices(list(_FUNCTIONS), _WEIGHTS)[0]
    argument, values, error = chosen.choice(_FUNCTIONS[function][1])
    return Refusal(function, argument, chosen.choice(values), error, seed)


def every():
    """All refused calls."""
    for function, (_, rules) in _FUNCTIONS.items():
        for argument, values, error in rules:
            for value in values:
                yield Refusal(function, argument, value, error, "every")
