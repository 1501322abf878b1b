"""Threads and processes: the same bits for every number of threads, concurrent calls, forked children."""

import multiprocessing
import threading

import numba
import numpy as np
import pytest
import torch
from conftest import KINDS
from reference import loss_and_gradient
from torch.utils.data import DataLoader, TensorDataset

import pydistill
from pydistill.engine.batch import batch_of
from pydistill.engine.numba.backend import make_settings, new_scratch
from pydistill.engine.numba.scan import scan
from pydistill.engine.numba.second_pass import pointwise, second_pass
from pydistill.engine.options import check_options

FORK = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def _restored_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def batch(n, c, dtype=torch.float32):
    return torch.randn(n, c, dtype=dtype), torch.randn(n, c, dtype=dtype), torch.randint(c, (n,))


def run(student, teacher, labels, **options):
    """(loss, gradient)"""
    student = student.clone().requires_grad_()
    loss = pydistill.distillation_loss(student, teacher, labels, temperature=2.0, **options)
    loss.sum().backward()
    return loss.detach(), student.grad


def check(got, student, teacher, labels):
    want = loss_and_gradient(student, teacher, labels, temperature=2.0)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g.double(), w, rtol=1e-5, atol=1e-8)


# Of 32,768 elements a thread; the number of rows is no multiple of the threads, or fewer than they are.
@pytest.mark.timeout(60)
@pytest.mark.parametrize(("n", "c"), [(67, 4099), (2001, 100), (3, 130000), (1, 300000)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_same_bits_for_every_number_of_threads(variant, n, c, reduction):
    case = batch(n, c)
    results = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        results.append(run(*case, reduction=reduction))
    for loss, gradient in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(gradient, results[0][1])


@pytest.mark.timeout(60)
def test_same_bits_for_numbas_own_threads():
    case = batch(67, 4099)
    results = []
    for threads in (1, 2, 4):
        with pydistill.use_backend("numba", threads=threads):
            assert pydistill.backend_info().threads == threads
            results.append(run(*case))
    for loss, gradient in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(gradient, results[0][1])


@pytest.mark.timeout(60)
def test_four_python_threads_at_once(variant):
    name, isa = variant
    cases = [batch(40 + i, 3000) for i in range(4)]
    want = [run(*case) for case in cases]
    results, barrier = [[] for _ in cases], threading.Barrier(4)

    def work(i):
        with pydistill.use_backend(name, isa=isa):  # the choice belongs to a thread
            barrier.wait()
            for _ in range(20):
                results[i].append((*run(*cases[i]), pydistill.backend_info().last_call))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    check(want[0], *cases[0])
    for got, (loss, gradient) in zip(results, want, strict=True):
        assert len(got) == 20
        for got_loss, got_gradient, last_call in got:
            assert torch.equal(got_loss, loss)
            assert torch.equal(got_gradient, gradient)
            assert last_call == name


def in_child(function, timeout=30):
    """The result of the function in a forked child; a child that hangs is killed and fails the test."""
    receiver, sender = FORK.Pipe(duplex=False)
    child = FORK.Process(target=lambda: sender.send(function()))
    child.start()
    try:
        assert receiver.poll(timeout), "the forked child hangs"
        return receiver.recv()
    finally:
        child.kill()
        child.join()


@pytest.mark.timeout(90)
def test_forked_child_after_the_parent_used_two_threads(variant):
    """The pool's threads do not survive the fork: whoever waits for them waits for ever."""
    torch.set_num_threads(2)
    case = batch(67, 4099)
    loss, gradient = run(*case)

    def child():
        torch.set_num_threads(1)  # torch's own operations, of which the torch backend is made, hang without
        loss, gradient = run(*case)
        return loss.item(), gradient.numpy().tobytes(), pydistill.backend_info().name

    assert in_child(child) == (loss.item(), gradient.numpy().tobytes(), variant[0])


@pytest.mark.timeout(90)
@pytest.mark.parametrize("backend", ["compiled", "numba"])
def test_forked_child_that_keeps_torchs_number_of_threads(backend):
    torch.set_num_threads(2)
    student, teacher, labels = batch(67, 4099)
    with pydistill.use_backend(backend):
        want = pydistill.distillation_loss(student, teacher, labels).item()
        got = in_child(lambda: pydistill.distillation_loss(student, teacher, labels).item())
        threads = in_child(lambda: pydistill.backend_info().threads)
    assert got == want
    assert threads == 1


@pytest.mark.timeout(90)
def test_training_loop_around_forked_workers(variant):
    """DataLoader forks in every epoch, after the loss has run on two threads."""
    torch.set_num_threads(2)
    inputs = torch.randn(256, 20)
    teacher = torch.nn.Linear(20, 1000)(inputs).detach()
    data = TensorDataset(inputs, teacher, teacher.argmax(1))

    def train(workers):
        torch.manual_seed(1)
        student = torch.nn.Linear(20, 1000)
        optimizer = torch.optim.SGD(student.parameters(), lr=1.0)
        context = "fork" if workers else None
        losses = []
        for _ in range(2):
            for x, t, y in DataLoader(data, batch_size=128, num_workers=workers, multiprocessing_context=context):
                loss = pydistill.distillation_loss(student(x), t, y, temperature=2.0)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
        return losses, student.weight.detach()

    losses, weight = train(workers=2)
    want_losses, want_weight = train(workers=0)
    assert losses == pytest.approx(want_losses, rel=1e-5)
    torch.testing.assert_close(weight, want_weight)
    assert losses[-1] < losses[0]


@numba.njit
def _scan_twice(points, s, t, settings, scratch):
    sums = scan(s, t, True, settings, scratch)
    return sums, second_pass(points, s, t, sums, settings, scratch)


@pytest.mark.parametrize("divergence", KINDS)
def test_numba_does_not_depend_on_where_its_memory_lies(divergence):
    """The bits of a short row, with the scratch at every distance behind the logits: LLVM's loops look at it."""
    buffer = np.zeros(1000, np.float32)
    options = check_options(
        pydistill.distillation_loss.__kwdefaults__ | {"divergence": divergence, "temperature": 2.0, "alpha": 0.7}
    )
    points = pointwise(divergence, np.float32)
    for classes in (5, 9, 21, 40):
        row = torch.zeros(1, classes)
        settings = make_settings(batch_of(row, [row, row[0, :1].long(), None, None, None, None], options), True, False)
        s, t = (3 * torch.randn(2, classes)).numpy()
        logits = buffer[:classes]
        logits[:] = s
        found = set()
        for distance in range(80):
            scratch = new_scratch(classes, np.float32)._replace(
                student_exp=buffer[classes + distance :][:classes],
                derivative=buffer[2 * classes + 2 * distance :][:classes],
                hard_exp=buffer[3 * classes + 3 * distance :][:classes],
                log_ratio=buffer[4 * classes + 4 * distance :][:classes],
            )
            found.add(_scan_twice(points, logits, t, settings, scratch))
        assert len(found) == 1
