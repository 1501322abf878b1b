"""What every test can ask for: each backend and ISA that this machine has, and float64 references."""

import os
import tempfile
from pathlib import Path

import pytest
import torch

import pydistill
from pydistill.engine import compiled

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
# The row kernel's two ways through a plain teacher; test_divergences.py tests every divergence in the registry.
KINDS = ("forward_kl", "reverse_kl")


@pytest.fixture(params=VARIANTS, ids=[f"{name}-{isa}" if isa else name for name, isa in VARIANTS])
def variant(request):
    """Run the test once on every backend and ISA; the value is (backend, isa)."""
    name, isa = request.param
    with pydistill.use_backend(name, isa=isa):
        yield request.param


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
