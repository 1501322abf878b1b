"""The memory of large gradients, which the compiled core keeps for the next step."""

import os
import subprocess
import sys
import threading

import pytest
import torch

import pydistill
from pydistill.engine.compiled import load_core

pytestmark = pytest.mark.skipif(
    pydistill.backend_info().name != "compiled" or sys.platform != "linux", reason="the compiled core on Linux"
)
ROWS, CLASSES = 128, 32768  # 16 MiB
TIMEOUT = 60


@pytest.fixture(autouse=True)
def nothing_kept():
    load_core().GradientMemory.release()


def gradient(rows=ROWS, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(rows, CLASSES, generator=generator).to(dtype).requires_grad_()
    teacher = torch.randn(rows, CLASSES, generator=generator).to(dtype)
    loss = pydistill.distillation_loss(student, teacher, alpha=1.0)
    return torch.autograd.grad(loss, student)[0]


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_next_step_gets_it(dtype):
    first = gradient(2 * ROWS, dtype)
    expected, address = first.clone(), first.data_ptr()
    del first
    second = gradient(2 * ROWS, dtype, seed=1)
    assert second.data_ptr() == address
    assert not torch.equal(second, expected)
    del second
    assert torch.equal(gradient(2 * ROWS, dtype), expected)


def test_a_smaller_one_gets_it_and_a_larger_does_not():
    first = gradient(2 * ROWS)
    address = first.data_ptr()
    del first
    smaller = gradient(ROWS)
    assert smaller.data_ptr() == address
    del smaller
    larger = gradient(4 * ROWS)
    assert larger.data_ptr() != address
    assert gradient(ROWS).data_ptr() == address  # the smaller one has been kept


def test_two_at_once_do_not_share():
    first = gradient()
    expected = first.clone()
    second = gradient(seed=1)
    assert second.data_ptr() != first.data_ptr()
    assert torch.equal(first, expected)


def test_a_view_holds_it():
    part = gradient()[5:7]
    expected = part.clone()
    gradient(seed=1)
    assert torch.equal(part, expected)


def test_one_buffer_is_kept_the_largest_and_release_gives_it_back():
    torch.randn(1)
    sizes = [ROWS, 4 * ROWS, 2 * ROWS]
    before = resident()
    memories = [load_core().GradientMemory(rows * CLASSES * 4) for rows in sizes]
    for memory in memories:
        torch.frombuffer(memory, dtype=torch.float32).fill_(1)
    largest = 4 * ROWS * CLASSES * 4
    del memory, memories
    assert abs(resident() - before - largest) < 8 << 20
    load_core().GradientMemory.release()
    assert resident() - before < 8 << 20


def test_it_starts_at_an_address_of_a_huge_page():
    assert gradient().data_ptr() % (2 << 20) == 0


def test_an_impossible_size_is_an_error():
    with pytest.raises(MemoryError):
        load_core().GradientMemory(1 << 60)


def test_threads():
    expected = [gradient(seed=k) for k in range(4)]
    wrong = []

    def work(seed):
        for _ in range(8):
            if not torch.equal(gradient(seed=seed), expected[seed]):
                wrong.append(seed)

    workers = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(TIMEOUT)
    assert not any(worker.is_alive() for worker in workers)
    assert wrong == []


SCRIPT = """
import os, torch, pydistill

def gradient():
    student = torch.full((128, 32768), 0.5, requires_grad=True)
    teacher = torch.arange(32768.0).expand(128, -1) / 32768
    return torch.autograd.grad(pydistill.distillation_loss(student, teacher, alpha=1.0), student)[0]

torch.set_num_threads(1)
expected = gradient()
gradient()  # kept when the process forks
child = os.fork()
same = torch.equal(gradient(), expected) and torch.equal(gradient(), expected)
if child == 0:
    os._exit(0 if same else 1)
assert same and os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""


def test_a_forked_child_has_its_own():
    subprocess.run([sys.executable, "-c", SCRIPT], check=True, timeout=TIMEOUT)
