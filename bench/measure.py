"""Measurement of a case: inputs, validation against float64, paired times, and peak memory."""

import ctypes
import random
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from bench.cases import README_SHAPES, Case
from bench.contestants import TopkTeacher, formulas, release_kept_memory
from pydistill import top_k

TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 2e-2}
_CHECKED_ROWS = 64
_MEMORY_ELEMENTS = 1 << 22  # in smaller cases the peak is less than the memory that allocators keep
_LARGE_ELEMENTS = 1 << 23  # larger cases have few rounds


def make_inputs(case: Case) -> tuple[tuple, tuple]:
    """Make the ``(leaves, constants)`` of a case.

    The leaves are the student's logits, or its hidden states and weight if the case has a head. The constants are
    the same tensors of the teacher, and the labels.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(rows, columns, scale):
        return (torch.randn(rows, columns, generator=generator) * scale).to(case.torch_dtype)

    labels = torch.randint(case.classes, (case.rows,), generator=generator)
    if case.hidden:
        student, teacher = (
            (normal(case.rows, case.hidden, 1.0), normal(case.classes, case.hidden, 3 * case.hidden**-0.5))
            for _ in range(2)
        )
        return tuple(x.requires_grad_() for x in student), (*teacher, labels)
    student, teacher = (normal(case.rows, case.classes, 3.0) for _ in range(2))
    if case.k:
        teacher = TopkTeacher(top_k(teacher, case.k, temperatures=(case.temperature,), tail="bucket"), teacher)
    return (student.requires_grad_(),), (teacher, labels)


def fresh(leaves: tuple) -> tuple:
    """Copy the leaves. The copies are not leaves, like a model's outputs, so that inplace=True may overwrite them."""
    return tuple(x.clone() for x in leaves)


class Exact(NamedTuple):
    """Float64 reference of a case.

    ``gradients`` holds the gradients of the first rows, or of all rows if the case has a linear head. If the case is
    forward only, ``kl`` and ``cross_entropy`` are the loss with and without the teacher's entropy.
    """

    gradients: tuple = ()
    kl: float = 0.0
    cross_entropy: float = 0.0


def exact(case: Case, leaves: tuple, constants: tuple) -> Exact:
    """Compute the reference with which every contestant of the case is compared."""
    if not case.backward:
        return Exact((), *(_exact_loss(case, *leaves, *constants, is_kl) for is_kl in (True, False)))
    if case.hidden:
        hidden, weight, teacher_hidden, teacher_weight = (x.detach().double() for x in (*leaves, *constants[:2]))
        of_logits = _exact_gradient(case, hidden @ weight.T, teacher_hidden @ teacher_weight.T, constants[-1])
        return Exact((of_logits @ weight, of_logits.T @ hidden))
    if case.k or case.divergence != "forward_kl":
        return Exact((_gradient_of_eager(case, leaves[0], *constants),))
    rows = slice(_CHECKED_ROWS)
    s, t, y = leaves[0].detach()[rows].double(), constants[0][rows].double(), constants[1][rows]
    return Exact((_exact_gradient(case, s, t, y),))


def error(case, contestant, leaves, constants, want: Exact) -> float:
    """Compute the relative error against float64: of the gradients in norm, or of the loss if there are none."""
    with contestant.context():
        loss, gradients = contestant.step(fresh(leaves), constants)
    if gradients is None and (case.backward or loss is None):
        return 0.0  # no loss was computed, as by the memory limit
    if not case.backward:
        value = want.kl if contestant.value_is_kl else want.cross_entropy
        return abs(float(loss) - value) / abs(value)
    return max(
        float((got[: len(x)].double() - x).norm() / x.norm()) for got, x in zip(gradients, want.gradients, strict=True)
    )


def _exact_gradient(case, s, t, y):
    T, alpha = case.temperature, case.alpha
    soft = (s / T).softmax(-1) - (t / T).softmax(-1)
    hard = s.softmax(-1) - F.one_hot(y, case.classes)
    return (alpha * T * soft + (1 - alpha) * hard) / case.rows


def _gradient_of_eager(case, student, teacher, labels):
    """Compute the gradient of the eager formula by autograd in float64."""
    rows = slice(_CHECKED_ROWS)
    leaf = student.detach()[rows].double().requires_grad_()
    teacher = TopkTeacher(teacher.targets[rows], None) if case.k else teacher[rows].double()
    loss = formulas(case)["best eager"](leaf, teacher, labels[rows])
    return torch.autograd.grad(loss, leaf)[0] * len(leaf) / case.rows


def _exact_loss(case, s, t, y, value_is_kl):
    T, alpha, total = case.temperature, case.alpha, 0.0
    for rows in torch.arange(case.rows).split(_CHECKED_ROWS):
        log_p, log_q = ((x.detach()[rows].double() / T).log_softmax(-1) for x in (t, s))
        soft = (log_p.exp() * ((log_p if value_is_kl else 0) - log_q)).sum()
        hard = F.cross_entropy(s.detach()[rows].double(), y[rows], reduction="sum")
        total += float(alpha * T**2 * soft + (1 - alpha) * hard)
    return total / case.rows


def seconds(contestant, leaves, constants) -> float:
    """Time one step on a fresh copy of the leaves; the contestant's backend is chosen before the clock starts."""
    leaves = fresh(leaves)
    with contestant.context():
        start = time.perf_counter()
        result = contestant.step(leaves, constants)
        elapsed = time.perf_counter() - start
    del result
    return elapsed


def paired_times(contestants, inputs, pairs, progress):
    """Time all contestants. Every round runs each of them once, so that a slow moment affects all of them alike.

    The order changes in every round, because a small step is a sixth faster after a step that ran the same code.
    """
    times = {name: [] for name in contestants}
    order, shuffle = list(contestants), random.Random(0).shuffle
    for _ in progress(range(pairs)):
        shuffle(order)
        for name in order:
            times[name].append(seconds(contestants[name], *inputs))
    return times


def number_of_pairs(case, contestants, inputs, budget) -> int:
    """Choose the number of rounds: as many as fit into ``budget`` seconds, at least 30 if a round takes under a second.

    Large cases have 3 rounds. Large cases of the README, which shows their quartiles, have as many as fit into 10
    budgets.
    """
    large = case.elements > _LARGE_ELEMENTS
    if large and case.name not in README_SHAPES:
        return 3
    round_ = sum(seconds(c, *inputs) for c in contestants.values())  # validation has warmed the contestants up
    if large:
        return max(3, int(10 * budget / round_))
    return max(30 if round_ < 1 else 5, min(2000, int(budget / round_)))


def median_and_quartiles(values) -> tuple[float, float, float]:
    """Return the median, and the first and third quartile."""
    low, middle, high = statistics.quantiles(values, n=4)
    return middle, low, high


def ratio(times, slow, fast) -> tuple[float, float, float]:
    """Return the median and quartiles of the paired ratios ``slow / fast``."""
    return median_and_quartiles([a / b for a, b in zip(times[slow], times[fast], strict=True)])


def peak_buffers(case, contestant, leaves, constants) -> float | None:
    """Measure by how much one step raises the peak resident memory, in buffers of the size of the logits.

    Return None for small cases, and on systems other than Linux.
    """
    resets = Path("/proc/self/clear_refs")
    if case.elements < _MEMORY_ELEMENTS or not resets.exists():
        return None
    leaves = fresh(leaves)
    _return_free_memory()
    with contestant.context():
        resets.write_text("5")
        before = _status("VmRSS")
        contestant.step(leaves, constants)
    return (_status("VmHWM") - before) / (case.elements * torch.finfo(case.torch_dtype).bits // 8)


def _return_free_memory():
    """Return to the system the memory that allocators keep for reuse: up to 32 MB would otherwise not be counted."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)
    release_kept_memory()


def _status(field):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise KeyError(field)
