"""Peak memory of forward and backward in buffers of N x C; resident sets are read from /proc: Linux only."""

import gc
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
import sys, torch, pydistill
from pathlib import Path

def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024

n, c = 1024, 32000
leaf = torch.randn(n, c, requires_grad=True)
logits, teacher, labels = leaf.clone(), torch.randn(n, c), torch.randint(c, (n,))
topk, inplace = "topk" in sys.argv[1], "inplace" in sys.argv[1]
teacher = pydistill.top_k(teacher, 64) if topk else teacher
small = torch.randn(8, 10, requires_grad=True)
targets = torch.randn(8, 10)
targets = pydistill.top_k(targets, 3) if topk else targets
pydistill.distillation_loss(small, targets, torch.randint(10, (8,))).backward()  # what is loaded once
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
loss = pydistill.distillation_loss(logits, teacher, labels, temperature=4.0, alpha=0.7, inplace=inplace)
torch.autograd.grad(loss, logits)
print((status("VmHWM") - before) / (4 * n * c))
"""


@pytest.mark.parametrize(
    ("mode", "most", "least"),
    [("fresh", 1.1, 0.9), ("inplace", 0.1, 0.0), ("topk inplace", 0.1, 0.0)],
)
def test_peak(mode, most, least):
    done = subprocess.run([sys.executable, "-c", SCRIPT, mode], capture_output=True, text=True, timeout=200, check=True)
    assert least <= float(done.stdout) + 0.02
    assert float(done.stdout) <= most


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
    """What the kernel was told about the pages there."""
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
