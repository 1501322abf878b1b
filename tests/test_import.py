"""What ``import pydistill`` loads besides torch: nothing that takes long, nothing that is an extra."""

import json
import subprocess
import sys

import pytest

_LOADED = """
import json, sys
import torch
before = set(sys.modules)
{statement}
print(json.dumps(sorted(set(sys.modules) - before)))
"""


@pytest.mark.parametrize(
    "statement",
    [
        "import pydistill",
        "import pydistill.callbacks, pydistill.cli, pydistill.demo",
        # A loss and a gradient, too: the first step of a training should not wait for a compiler that it does not use.
        "import pydistill as p; x = torch.zeros(2, 3, requires_grad=True); p.distillation_loss(x, x.detach() + 1, "
        "torch.zeros(2, dtype=torch.long)).backward(); p.linear_distillation_loss(x, x.detach(), None, "
        "torch.zeros(2, dtype=torch.long), alpha=0).backward()",
    ],
    ids=["pydistill", "submodules", "losses"],
)
def test_import_is_light(statement):
    """torch._dynamo takes as long to import as torch itself, numba and scikit-learn a second each."""
    program = [sys.executable, "-W", "ignore", "-c", _LOADED.format(statement=statement)]
    done = subprocess.run(program, capture_output=True, text=True, check=True, timeout=120)
    loaded = set(json.loads(done.stdout))
    assert "pydistill.linear" in loaded
    heavy = {"torch._dynamo", "torch._inductor", "sklearn", "skorch", "xgboost", "pandas", "scipy", "matplotlib"}
    if "pydistill._core" in loaded:  # without it numba is the backend, and compiles on import
        heavy.add("numba")
    assert not heavy & loaded
