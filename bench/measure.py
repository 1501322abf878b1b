"""Inputs, validation against float64, paired timing, peak memory."""

import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from bench.contestants import ALPHA, TEMPERATURE, forward_backward


def make_inputs(rows, classes, dtype):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(rows, classes, generator=generator) * 3 for _ in range(2))
    labels = torch.randint(classes, (rows,), generator=generator)
    return student.to(dtype).requires_grad_(), teacher.to(dtype), labels


def gradient_error(gradient, student, teacher, labels, rows=64):
    """Relative error of the gradient's first rows against float64."""
    s, t, y = student.detach()[:rows].double(), teacher[:rows].double(), labels[:rows]
    onehot = F.one_hot(y, s.shape[-1])
    soft = (s / TEMPERATURE).softmax(-1) - (t / TEMPERATURE).softmax(-1)
    exact = (ALPHA * TEMPERATURE * soft + (1 - ALPHA) * (s.softmax(-1) - onehot)) / len(student)
    return float((gradient[:rows].double() - exact).norm() / exact.norm())


def fresh_logits(student):
    """A copy that is not a leaf, as a model's logits are: inplace=True may overwrite it."""
    return student.clone()


def seconds(contestant, student, teacher, labels):
    """One forward and backward."""
    logits = fresh_logits(student)
    start = time.perf_counter()
    gradient = forward_backward(contestant, logits, teacher, labels)
    elapsed = time.perf_counter() - start
    del gradient
    return elapsed


def paired_times(contestants, inputs, pairs):
    """Times per contestant, one of each per round, so that a slow moment of the machine meets all of them."""
    times = {name: [] for name in contestants}
    for round_ in range(pairs + 2):  # two to warm up
        for name, contestant in contestants.items():
            elapsed = seconds(contestant, *inputs)
            if round_ >= 2:
                times[name].append(elapsed)
    return times


def ratio(times, slow, fast):
    """Median and quartiles of the paired ratios."""
    ratios = [a / b for a, b in zip(times[slow], times[fast], strict=True)]
    if len(ratios) < 2:
        return ratios[0], ratios[0], ratios[0]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return middle, low, high


def peak_buffers(contestant, student, teacher, labels):
    """Peak resident memory above the start of one forward and backward, in buffers of N x C. Linux only."""
    forward_backward(contestant, fresh_logits(student), teacher, labels)
    logits = fresh_logits(student)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    forward_backward(contestant, logits, teacher, labels)
    return (_status("VmHWM") - before) / (student.numel() * student.element_size())


def _status(field):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise KeyError(field)
