"""Out of memory is a MemoryError, with any number of threads: the process lives, nothing leaks, no logits are lost.

The address space of a process is limited to a little more than it has, and then to ever more: each time another
allocation is the one that fails, until none does.
"""

import os
import subprocess
import sys

import pytest
from conftest import VARIANTS

SCRIPT = """
import gc, itertools, resource, sys, torch, pydistill
from pathlib import Path

ROWS, CLASSES, STEP = 40, 60000, 640 << 10  # a gradient that is large enough to be kept for the next step

def address_space():
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()

def limit(size):
    resource.setrlimit(resource.RLIMIT_AS, (size, resource.RLIM_INFINITY))

def loss_and_gradient(case, leaf, teacher, labels):
    if case == "head":
        loss = pydistill.linear_distillation_loss(leaf, weight, teacher, labels, temperature=2.0)
    else:
        options = {"divergence": case} if case in ("reverse_kl", "dkd", "mse") else {}
        options |= {"inplace": case == "in place", "reduction": "none" if case == "none" else "mean"}
        loss = pydistill.distillation_loss(leaf, teacher, labels, temperature=2.0, **options).mean()
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]

def fail_until_it_works(case, rows, teacher, labels):
    failures, first_size = 0, None
    gc.collect()
    gc.freeze()  # what was imported need not be looked through at every step: that took most of the time
    for step in itertools.count():
        gc.collect()
        release()
        leaf = (rows.clone().requires_grad_() if case == "head" else rows.requires_grad_()) * 1  # no leaf: in place
        size = address_space()
        first_size = first_size or size
        limit(size + step * STEP)
        try:
            found = loss_and_gradient(case, leaf, teacher, labels)
        except MemoryError as error:
            assert str(error), "a MemoryError without a word"
            assert torch.equal(leaf, rows), "the logits are lost"
            failures += 1
        else:
            break
        finally:
            limit(resource.RLIM_INFINITY)
    return failures, size - first_size, found

release = lambda: None  # of the memory that is kept for the next step
torch.manual_seed(0)
backend, isa, threads, cases = sys.argv[1], sys.argv[2] or None, int(sys.argv[3]), sys.argv[4].split(",")
torch.set_num_threads(1)
if backend == "compiled":
    from pydistill.engine.compiled import load_core
    release = load_core().GradientMemory.release
with pydistill.use_backend(backend, isa=isa):
    weight, hidden = torch.randn(CLASSES, 64), torch.randn(ROWS, 64)
    logits, dense, labels = torch.randn(ROWS, CLASSES), torch.randn(ROWS, CLASSES), torch.randint(CLASSES, (ROWS,))
    for case in cases:
        rows, teacher = hidden if case == "head" else logits, dense
        if case == "top-k":
            teacher = pydistill.top_k(dense, 20)
        if case == "strided":
            teacher = dense.T.contiguous().T
        torch.set_num_threads(1)  # what is loaded or compiled at a first call; the pool is not started yet
        loss_and_gradient(case, rows[:1].clone().requires_grad_() * 1, teacher[:1], labels[:1])
        torch.set_num_threads(threads)
        if case == "head":
            torch.randn(1 << 20).exp()  # torch's products start the pool themselves, and end the process if they cannot
        failures, growth, found = fail_until_it_works(case, rows, teacher, labels)
        expected = loss_and_gradient(case, rows.clone().requires_grad_() * 1, teacher, labels)
        tolerance = 1e-5 if case == "head" else 0  # torch's products depend on where their memory lies
        for x, y in zip(found, expected):
            assert (x - y).norm() <= tolerance * y.norm(), case
        print(case, failures, growth >> 20, sep=",", flush=True)
"""


CASES = ("mean", "in place", "none", "strided", "reverse_kl", "dkd", "mse", "top-k", "head")
# Torch's operations share one pool of threads, whatever they compute.
OF_TORCHS_POOL = ("mean", "in place", "head")


@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_AS and /proc")
@pytest.mark.parametrize("threads", [1, 2])
# One ISA: what is allocated, and where, is the same for all; tests/core lets each allocation fail on each of them.
@pytest.mark.parametrize(("backend", "isa"), [VARIANTS[0], *(v for v in VARIANTS[1:] if v[0] != "compiled")])
def test_out_of_memory(backend, isa, threads):
    cases = OF_TORCHS_POOL if backend == "torch" and threads > 1 else CASES
    command = [sys.executable, "-c", SCRIPT, backend, isa or "", str(threads), ",".join(cases)]
    # Freed memory leaves the address space; a thread that waits does not spin.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.split(",") for line in done.stdout.splitlines()]
    assert [case for case, *_ in lines] == [*cases]
    for case, failures, growth in lines:
        assert int(failures) >= 1, case
        assert int(growth) < 64, case  # MiB: a kept gradient and a thread's stack, not one for each failure
