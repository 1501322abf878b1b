"""Peak memory of forward and backward in buffers of N x C; resident sets are read from /proc: Linux only."""

import gc
import json
import re
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from conftest import VARIANTS

import pydistill

SCRIPT = """
import json, sys, torch, pydistill
from pathlib import Path

def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024

n, c = 1024, 32000
leaf, dense, labels = torch.randn(n, c, requires_grad=True), torch.randn(n, c), torch.randint(c, (n,))
small, few = torch.randn(8, 10, requires_grad=True), torch.randn(8, 10)
peaks = {}
for mode in ("in place", "top-k in place", "new memory"):  # the last keeps its memory for the next step
    teacher = pydistill.top_k(dense, 64) if "top-k" in mode else dense
    targets = pydistill.top_k(few, 3) if "top-k" in mode else few
    pydistill.distillation_loss(small, targets, torch.randint(10, (8,))).backward()  # what is loaded once
    logits = leaf.clone()
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    options = {"temperature": 4.0, "alpha": 0.7, "inplace": "in place" in mode}
    loss = pydistill.distillation_loss(logits, teacher, labels, **options)
    torch.autograd.grad(loss, logits)
    peaks[mode] = (status("VmHWM") - before) / (4 * n * c)
print(json.dumps(peaks))
"""


def test_peak_memory_in_buffers_of_the_logits_size():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=200, check=True)
    peaks = json.loads(done.stdout)
    assert 0.88 <= peaks["new memory"] <= 1.1
    assert -0.02 <= peaks["in place"] <= 0.1
    assert -0.02 <= peaks["top-k in place"] <= 0.1


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_memory_is_freed_with_the_loss(variant, reduction, backward):
    """By counting references, at once: a cycle would hold the gradient and the logits until Python looks for them."""
    gc.disable()
    try:
        student, teacher = torch.randn(8, 10, requires_grad=True), torch.randn(8, 10)
        freed = weakref.ref(teacher)
        loss = pydistill.distillation_loss(student, teacher, alpha=1.0, reduction=reduction)
        if backward:
            loss.sum().backward()
        del loss, teacher
        assert freed() is None
    finally:
        gc.enable()


def flags(address):
    """The kernel's flags of the memory mapping that holds the address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if match := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(match[1], 16) <= address < int(match[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise AssertionError(f"no mapping at {address:#x}")


@pytest.mark.skipif(VARIANTS[0][0] != "compiled", reason="the compiled core asks for them")
def test_large_gradients_ask_for_huge_pages():
    """The compiled backend, from 8 MiB on: pages of 4 KiB cost more than the kernel."""
    student = torch.randn(256, 32000, requires_grad=True)
    with pydistill.use_backend("compiled"):
        pydistill.distillation_loss(student, torch.randn(1, 32000).expand(256, -1), alpha=1.0).backward()
    assert "hg" in flags(student.grad.data_ptr() + student.grad.nbytes // 2)
