"""A case, run on the package."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

import pydistill

from .case import Case


@dataclass
class Result:
    """Outputs of a call. gradients: by the leaf's name; written: names of inputs that were written to."""

    loss: Tensor | tuple | None = None
    gradients: dict = field(default_factory=dict)
    metrics: object = None
    written: tuple = ()
    error: Exception | None = None

    def same_bits(self, other) -> bool:
        """Whether loss and gradients are the same to the bit; any NaN equals any other."""
        pairs = [(self.loss, other.loss), *((g, other.gradients[n]) for n, g in self.gradients.items())]
        return all(torch.equal(_bits(a), _bits(b)) for a, b in pairs)


def _bits(tensor):
    return torch.where(tensor.isnan(), torch.nan, tensor).contiguous().view(-1).view(torch.uint8)


def run(case: Case, backend: str, isa: str | None = None, threads: int = 1) -> Result:
    """The call on a backend, with that many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        options = {"threads": threads} if backend == "numba" else {}
        with pydistill.use_backend(backend, isa=isa, **options):
            return _run(case)
    finally:
        torch.set_num_threads(before)


def _run(case):
    given, written = [], []

    def take(name, placed):
        tensor = None if placed is None else placed.tensor()
        if tensor is not None:
            given.append((name, tensor))
        return tensor

    wants_gradient = case.path in ("engine", "create_graph") and case.function != "loss_items"
    leaves, student, made = {}, None, None
    if case.student is not None:
        if case.leaf or not wants_gradient:
            student = leaves["student"] = take("student_logits", case.student).detach().requires_grad_(wants_gradient)
        else:
            leaf = leaves["student"] = case.student.values.clone().requires_grad_()
            made = leaf * 1
            student = case.student.tensor(made)
            given.append(("the leaf", leaf))
            if not case.option("inplace"):
                given.append(("student_logits", student))
    if case.head is not None:
        for name in ("hidden", "weight", "bias"):
            tensor = take(f"student_{name}", getattr(case.head, name))
            if tensor is not None:
                leaves[name] = tensor.detach().requires_grad_(wants_gradient)
    try:
        teacher = None if case.teacher is None else case.teacher.make(given)
    except Exception as error:
        return Result(error=error)
    labels = take("labels", case.labels)
    weights = {name: take(name, getattr(case, name)) for name in ("sample_weight", "class_weight")}
    weights = {name: tensor for name, tensor in weights.items() if tensor is not None}
    memory = [(name, tensor, _storage(tensor).clone()) for name, tensor in given]
    around = _storage(student).clone() if case.option("inplace") and student is not None else None

    def call(*tensors):
        return _call(case, tensors, teacher, labels, weights)

    result = Result()
    try:
        if case.function == "loss_items":
            result.loss = pydistill.loss_items(labels, **weights, **case.options)
        else:
            tensors = [student] if case.student is not None else [leaves.get(n) for n in ("hidden", "weight", "bias")]
            _differentiate(case, call, tensors, leaves, result)
    except Exception as error:
        result.error = error
    written += [name for name, tensor, bits in memory if not torch.equal(_storage(tensor), bits)]
    if around is not None and _written_around(student, around):
        written.append("the memory around student_logits")
    result.written = tuple(written)
    return result


def _storage(tensor):
    """All bytes of the tensor's memory, around it too."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.detach().untyped_storage())


def _written_around(student, before):
    outside = torch.ones(len(before) // student.element_size(), dtype=torch.bool)
    outside.as_strided(student.shape, student.stride(), student.storage_offset()).fill_(False)
    changed = (_storage(student) != before).view(-1, student.element_size()).any(-1)
    return bool((changed & outside).any())


def _call(case, tensors, teacher, labels, weights):
    options = dict(case.options)
    if case.head is not None and tensors[2] is not None:
        bias = {"student_bias": tensors[2]}
    else:
        bias = {}
    tensors = tensors[:2]
    if case.function[0].islower():
        return getattr(pydistill, case.function)(*tensors, teacher, labels, **bias, **weights, **options)
    later = {name: options.pop(name) for name in ("num_items", "reduction") if name in options and len(options) % 2}
    module = getattr(pydistill, case.function)(**options, **weights)
    return module(*tensors, teacher, labels, **bias, **later)


def _differentiate(case, call, tensors, leaves, result):
    grad_output = case.grad_output

    def split(value):
        return value if case.option("return_metrics") else (value, None)

    if case.path == "no gradient":
        loss, result.metrics = split(call(*tensors))
    elif case.path == "functorch":
        given = [x for x in tensors if x is not None]

        def summed(*differentiated):
            loss, metrics = split(call(*differentiated, *[None] * (len(tensors) - len(given))))
            return (loss * grad_output).sum(), (loss,) if metrics is None else (loss, metrics)

        numbers = tuple(range(len(given)))
        gradients, (loss, *rest) = torch.func.grad(summed, numbers, has_aux=True)(*given)
        result.metrics = rest[0] if rest else None
        result.gradients = dict(zip(leaves, gradients, strict=True))
    else:
        loss, result.metrics = split(call(*tensors))
        output = grad_output if isinstance(grad_output, Tensor) else torch.full_like(loss, grad_output)
        gradients = torch.autograd.grad(loss, list(leaves.values()), output, create_graph=case.path == "create_graph")
        result.gradients = {name: g.detach() for name, g in zip(leaves, gradients, strict=True)}
    result.loss = loss.detach()
