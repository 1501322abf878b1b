"""Fixtures of all tests: each backend and ISA of this machine, a fixed seed, and a folder that every user can enter."""

import os
import tempfile
from pathlib import Path

import pytest
import torch

import pydistill
from pydistill.engine import compiled
from pydistill.formulas import DIVERGENCES

# The oracles are many small operations, which gain nothing from threads; test_threads.py asks for more.
torch.set_num_threads(1)


def _variants():
    """(backend, isa) for every way in which this machine can run the loss."""
    try:
        isas = compiled.load_core().ISAS
    except ImportError:
        # A build without a compiler is tested on purpose; anywhere else a missing core must not pass unseen.
        assert os.environ.get("PYDISTILL_TEST_WITHOUT_CORE") == "1", "the compiled core is missing"
        isas = ()
    return [("compiled", isa) for isa in isas] + [("numba", None), ("torch", None)]


VARIANTS = _variants()
BACKENDS = tuple(dict.fromkeys(name for name, _ in VARIANTS))
# One divergence for each of the row kernel's two ways through a plain teacher: without a reference number of the row,
# and with one, which are also those that are finite at p = 0 and that are not. test_divergences.py tests them all.
KINDS = tuple(next(n for n, d in DIVERGENCES.items() if d.finite_at_zero is finite) for finite in (True, False))


_NAMES = [f"{name}-{isa}" if isa else name for name, isa in VARIANTS]


@pytest.hookimpl(trylast=True)
def pytest_generate_tests(metafunc):
    """The variants come last, so that a case runs on all of them in turn and the oracle answers it once."""
    if "variant" in metafunc.fixturenames:
        metafunc.parametrize("variant", VARIANTS, ids=_NAMES, indirect=True)


@pytest.fixture
def variant(request):
    """Run the test once on every backend and ISA; the value is (backend, isa)."""
    name, isa = request.param
    with pydistill.use_backend(name, isa=isa):
        yield request.param


def every_path(*others):
    """Parametrizes ``path``: "engine" on every variant, and the others, which do not depend on the backend, once."""
    return pytest.mark.parametrize("path", [*VARIANTS, *others], ids=[*_NAMES, *others], indirect=True)


@pytest.fixture
def path(request):
    """Which of the ways through the loss the test takes."""
    if isinstance(request.param, str):
        yield request.param
    else:
        with pydistill.use_backend(request.param[0], isa=request.param[1]):
            yield "engine"


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def shared_folder():
    """A folder whose parents every user can enter, unlike those of tmp_path."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        yield folder
