"""Peak memory of forward and backward in buffers of N x C; resident sets are read from /proc: Linux only."""

import subprocess
import sys

import pytest

SCRIPT = """
import sys, torch, pydistill
from pathlib import Path

def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024

n, c = 1024, 32000
leaf = torch.randn(n, c, requires_grad=True)
logits, teacher, labels = leaf.clone(), torch.randn(n, c), torch.randint(c, (n,))
small = torch.randn(8, 10, requires_grad=True)
pydistill.distillation_loss(small, torch.randn(8, 10), torch.randint(10, (8,))).backward()  # what is loaded once
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
inplace = sys.argv[1] == "inplace"
loss = pydistill.distillation_loss(logits, teacher, labels, temperature=4.0, alpha=0.7, inplace=inplace)
torch.autograd.grad(loss, logits)
print((status("VmHWM") - before) / (4 * n * c))
"""


@pytest.mark.parametrize(("mode", "most", "least"), [("fresh", 1.1, 0.9), ("inplace", 0.1, 0.0)])
def test_peak(mode, most, least):
    done = subprocess.run([sys.executable, "-c", SCRIPT, mode], capture_output=True, text=True, timeout=200, check=True)
    assert least <= float(done.stdout) + 0.02
    assert float(done.stdout) <= most
