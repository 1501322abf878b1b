"""A call of a loss function as data: it can be run, changed, and written as code."""

import math
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

import pydistill

# How a tensor x may lie in memory: code (also of the printed example), the least number of dimensions, and whether
# elements share memory. Memory around x holds NaN, or no class at all, so that reading it shows.
LAYOUTS = {
    "as it is": ("x", 0, False),
    "transposed": ("x.transpose(0, -1).contiguous().transpose(0, -1)", 2, False),
    "classes in dimension 1": ("x.movedim(-1, 1).contiguous().movedim(1, -1)", 3, False),
    "from the second element": ("F.pad(x.flatten(), (1, 0), value=filler)[1:].view(x.shape)", 1, False),
    "from the fourth element": ("F.pad(x.flatten(), (3, 0), value=filler)[3:].view(x.shape)", 1, False),
    "padded at the end": ("F.pad(x, (0, 3), value=filler)[..., :-3]", 1, False),
    "padded at the start": ("F.pad(x, (1, 4), value=filler)[..., 1:-4]", 1, False),
    "every second class": ("F.pad(x.unsqueeze(-1), (0, 1), value=filler)[..., 0]", 1, False),
    "every second row": ("torch.stack([x, torch.full_like(x, filler)], 1)[:, 0]", 1, False),
    "one row for all": ("x[:1].expand(x.shape)", 2, True),
    "one class for all": ("x[..., :1].expand(x.shape)", 1, True),
    "windows": ("torch.cat([x[0], x[1:, -1]]).unfold(0, x.shape[-1], 1)", 2, True),
}
_COMPILED = {name: compile(code, "layout", "eval") for name, (code, _, _) in LAYOUTS.items()}


@dataclass(frozen=True)
class Placed:
    """A tensor's values, contiguous, and how it lies in memory."""

    values: Tensor
    layout: str = "as it is"

    def tensor(self, values=None) -> Tensor:
        """The tensor in memory of its own; of other values, such as ones on an autograd graph, if given."""
        x = self.values.clone() if values is None else values
        filler = math.nan if x.is_floating_point() else 2**31 - 1
        return eval(_COMPILED[self.layout], {"x": x, "torch": torch, "F": F, "filler": filler})

    def holds(self) -> bool:
        """Whether the layout can hold a tensor of this shape."""
        dims, x = LAYOUTS[self.layout][1], self.values
        return x.dim() >= dims and (self.layout != "windows" or (x.dim() == 2 and x.numel() > 0))

    def fits(self) -> bool:
        """Whether the layout can hold these values."""
        if not self.holds():
            return False
        return not self.overlaps or torch.equal(self.tensor().nan_to_num(12.5), self.values.nan_to_num(12.5))

    @property
    def overlaps(self) -> bool:
        return LAYOUTS[self.layout][2]


@dataclass(frozen=True)
class Teacher:
    """A teacher of any form. ``form``: "logits", a constructor of SoftTargets, "top_k", or "LinearTeacher".

    values: the logits, probabilities or hidden states. num_classes, indices, partitions: of from_topk. k, temperatures:
    of top_k. weight, bias, softcap, logit_scale: of LinearTeacher.
    """

    form: str
    values: Placed
    indices: Placed | None = None
    num_classes: int = 0
    partitions: dict = field(default_factory=dict)
    tail: str = "renormalize"
    k: int = 0
    temperatures: tuple = (1.0,)
    weight: Placed | None = None
    bias: Placed | None = None
    softcap: float | None = None
    logit_scale: float = 1.0

    def make(self, given):
        """The teacher as it is passed to the loss; all of its tensors are appended to the list ``given``."""

        def take(placed):
            tensor = None if placed is None else placed.tensor()
            if tensor is not None:
                given.append(("teacher", tensor))
            return tensor

        values, targets = take(self.values), pydistill.SoftTargets
        if self.form == "logits":
            return values
        if self.form == "from_topk":
            partitions = {t: x.clone() for t, x in self.partitions.items()} or None
            return targets.from_topk(
                take(self.indices), values, self.num_classes, log_partitions=partitions, tail=self.tail
            )
        if self.form == "top_k":
            return pydistill.top_k(values, self.k, self.temperatures, tail=self.tail)
        if self.form == "LinearTeacher":
            options = {"softcap": self.softcap, "logit_scale": self.logit_scale}
            return pydistill.LinearTeacher(values, take(self.weight), take(self.bias), **options)
        return getattr(targets, self.form)(values)


@dataclass(frozen=True)
class Head:
    hidden: Placed
    weight: Placed
    bias: Placed | None = None


@dataclass(frozen=True)
class Case:
    """A call.

    function: a name in pydistill. path: "engine" (backward), "functorch" (torch.func.grad), "create_graph", or "no
    gradient". leaf: the logits themselves are the leaf of the autograd graph; else the leaf is contiguous, and the
    logits are made from it. options: those that are not the defaults.
    """

    function: str
    path: str = "engine"
    student: Placed | None = None
    head: Head | None = None
    teacher: Teacher | None = None
    labels: Placed | None = None
    sample_weight: Placed | None = None
    class_weight: Placed | None = None
    options: dict = field(default_factory=dict)
    grad_output: float | Tensor = 1.0
    leaf: bool = True

    def option(self, name):
        """An option, or its default, as a plain number where it is a tensor."""
        value = self.options.get(name, DEFAULTS.get(name))
        return value.item() if isinstance(value, Tensor) and value.dim() == 0 else value

    def with_options(self, **changes):
        """The same call with other options; None takes one out."""
        options = {n: v for n, v in (self.options | changes).items() if v is not None}
        return replace(self, options=options)

    @property
    def dtype(self):
        """The student's dtype."""
        return (self.student or self.head.weight).values.dtype

    @property
    def rows(self) -> torch.Size:
        """Shape of the rows."""
        if self.function == "loss_items":
            return (self.sample_weight if self.labels is None else self.labels).values.shape
        return (self.student or self.head.hidden).values.shape[:-1]

    @property
    def classes(self) -> int:
        return self.student.values.shape[-1] if self.student is not None else self.head.weight.values.shape[0]

    def placed(self):
        """``(name, Placed)`` of every tensor, names as the functions' own."""
        named = {name: getattr(self, name) for name in ("student", "labels", "sample_weight", "class_weight")}
        if self.head is not None:
            named |= {"hidden": self.head.hidden, "weight": self.head.weight, "bias": self.head.bias}
        if self.teacher is not None:
            t = self.teacher
            named |= {"teacher": t.values, "indices": t.indices, "teacher_weight": t.weight, "teacher_bias": t.bias}
        return [(name, x) for name, x in named.items() if x is not None]


DEFAULTS = {
    "divergence": "forward_kl",
    "beta": None,
    "temperature": 1.0,
    "alpha": 0.5,
    "t_squared": True,
    "ignore_index": -100,
    "unlabeled": "skip",
    "label_smoothing": 0.0,
    "reduction": "mean",
    "num_items": None,
    "inplace": False,
    "return_metrics": False,
    "softcap": None,
    "logit_scale": 1.0,
    "chunk_rows": None,
}


# --- As code --------------------------------------------------------------------------------------------------


def written(case: Case, backend: str, isa: str | None) -> str:
    """A script that makes the call and prints what comes out."""
    lines = ["from math import inf, nan", "import torch, pydistill", "import torch.nn.functional as F", ""]
    for name, code in _layouts_of(case):
        lines.append(f"def {_function_name(name)}(x):")
        if "filler" in code:
            lines.append("    filler = nan if x.is_floating_point() else 2**31 - 1")
        lines.append(f"    return {code}\n")
    leaves = _make_tensors(case, lines)
    lines.append("")
    choice = f'"{backend}"' + (f', isa="{isa}"' if isa else "")
    lines.append(f"with pydistill.use_backend({choice}):")
    call = _call(case)
    body = []
    result = "loss, metrics" if case.option("return_metrics") else "loss"
    grad_output = _value(case.grad_output)
    if case.function == "loss_items" or case.path == "no gradient":
        body += [f"{result} = {call}"]
    elif case.path == "functorch":
        body += [f"def summed({', '.join(leaves)}):", f"    {result} = {call}"]
        body += [f"    return (loss * {grad_output}).sum(), loss"]
        numbers = ", ".join(map(str, range(len(leaves))))
        body += [f"gradients, loss = torch.func.grad(summed, argnums=({numbers},), has_aux=True)({', '.join(leaves)})"]
    else:
        body += [f"{result} = {call}"]
        graph = ", create_graph=True" if case.path == "create_graph" else ""
        output = grad_output if isinstance(case.grad_output, Tensor) else f"torch.full_like(loss, {grad_output})"
        body += [f"gradients = torch.autograd.grad(loss, [{', '.join(leaves)}], {output}{graph})"]
    lines += ["    " + line for line in body]
    lines.append("print(loss)")
    if case.option("return_metrics") and case.path != "functorch":
        lines.append("print(metrics)")
    if "gradients" in "".join(body):
        lines.append("print(*gradients)")
    return "\n".join(lines)


def _function_name(layout):
    return layout.replace(" ", "_")


def _layouts_of(case):
    names = {placed.layout for _, placed in case.placed()} - {"as it is"}
    return [(name, LAYOUTS[name][0]) for name in sorted(names)]


def _make_tensors(case, lines):
    """Add the lines that make the tensors; the names of the leaves."""

    def define(name, placed):
        literal = _value(placed.values)
        lines.append(f"{name} = {literal if placed.layout == 'as it is' else _apply(placed.layout, literal)}")

    leaves = []
    engine = case.path in ("engine", "create_graph")
    if case.student is not None:
        if case.leaf or not engine:
            define("student", case.student)
            if engine:
                lines.append("student.requires_grad_()")
            leaves.append("student")
        else:
            lines.append(f"leaf = {_value(case.student.values)}.requires_grad_()")
            made = "leaf * 1" if case.student.layout == "as it is" else _apply(case.student.layout, "leaf * 1")
            lines.append(f"student = {made}")
            leaves.append("leaf")
    if case.head is not None:
        for name in ("hidden", "weight", "bias"):
            placed = getattr(case.head, name)
            if placed is not None:
                define(name, placed)
                if engine:
                    lines.append(f"{name}.requires_grad_()")
                leaves.append(name)
    if case.teacher is not None:
        lines.append(f"teacher = {_teacher(case.teacher)}")
    for name in ("labels", "sample_weight", "class_weight"):
        if getattr(case, name) is not None:
            define(name, getattr(case, name))
    return leaves


def _apply(layout, argument):
    return f"{_function_name(layout)}({argument})"


def _teacher(teacher):
    def of(placed):
        literal = _value(placed.values)
        return literal if placed.layout == "as it is" else _apply(placed.layout, literal)

    values = of(teacher.values)
    if teacher.form == "logits":
        return values
    if teacher.form == "from_topk":
        partitions = ", ".join(f"{t!r}: {_value(x)}" for t, x in teacher.partitions.items())
        return (
            f"pydistill.SoftTargets.from_topk({of(teacher.indices)}, {values}, {teacher.num_classes}, "
            f"log_partitions={{{partitions}}}, tail={teacher.tail!r})"
        )
    if teacher.form == "top_k":
        return f"pydistill.top_k({values}, {teacher.k}, {teacher.temperatures!r}, tail={teacher.tail!r})"
    if teacher.form == "LinearTeacher":
        bias = "" if teacher.bias is None else f", {of(teacher.bias)}"
        cap = f", softcap={teacher.softcap!r}, logit_scale={teacher.logit_scale!r}"
        return f"pydistill.LinearTeacher({values}, {of(teacher.weight)}{bias}{cap})"
    return f"pydistill.SoftTargets.{teacher.form}({values})"


def _call(case):
    options = {name: _value(value) for name, value in case.options.items()}
    options |= {name: name for name in ("sample_weight", "class_weight") if getattr(case, name) is not None}
    if case.function == "loss_items":
        labels = "None" if case.labels is None else "labels"
        return f"pydistill.loss_items({', '.join([labels, *(f'{n}={v}' for n, v in options.items())])})"
    tensors = ["student"] if case.head is None else ["hidden", "weight"]
    tensors.append("None" if case.teacher is None else "teacher")
    if case.labels is not None:
        tensors.append("labels")
    bias = ["student_bias=bias"] if case.head is not None and case.head.bias is not None else []
    given = [f"{n}={v}" for n, v in options.items()]
    if case.function[0].isupper():
        return f"pydistill.{case.function}({', '.join(given)})({', '.join(tensors + bias)})"
    return f"pydistill.{case.function}({', '.join(tensors + bias + given)})"


def _value(value):
    if isinstance(value, Tensor):
        return f"torch.tensor({_numbers(value)}, dtype={value.dtype})" + _shape_of_empty(value)
    if isinstance(value, tuple):
        return f"({', '.join(map(_value, value))})"
    return repr(value)


def _shape_of_empty(tensor):
    return f".reshape({tuple(tensor.shape)})" if tensor.numel() == 0 else ""


def _numbers(tensor):
    """Nested lists; floats in the fewest digits that give the same number in the tensor's dtype."""
    if tensor.dim():
        return "[" + ", ".join(map(_numbers, tensor)) + "]"
    if not tensor.is_floating_point():
        return str(int(tensor))
    if tensor.dtype == torch.float64 or not bool(tensor.isfinite()):
        return repr(float(tensor))
    return str(tensor.float().numpy())
