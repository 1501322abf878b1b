"""``import pydistill`` loads no module besides torch that takes long or belongs to an extra."""

import json
import subprocess
import sys

_PROGRAM = """
import json, sys
import torch
before = set(sys.modules)
loaded = {}
for name, statement in json.loads(sys.argv[1]).items():
    exec(statement)
    loaded[name] = sorted(set(sys.modules) - before)
print(json.dumps(loaded))
"""
STATEMENTS = {
    "pydistill": "import pydistill",
    "submodules": "import pydistill.callbacks, pydistill.cli, pydistill.demo",
    # A loss and a gradient, too: the first step of a training should not wait for a compiler that it does not use.
    "losses": "import pydistill as p; x = torch.zeros(2, 3, requires_grad=True); y = torch.zeros(2, dtype=torch.long); "
    "p.distillation_loss(x, x.detach() + 1, y).backward(); "
    "p.linear_distillation_loss(x, x.detach(), None, y, alpha=0).backward()",
}


def test_import_is_light():
    """torch._dynamo takes as long to import as torch itself, numba and scikit-learn a second each."""
    program = [sys.executable, "-W", "ignore", "-c", _PROGRAM, json.dumps(STATEMENTS)]
    done = subprocess.run(program, capture_output=True, text=True, check=True, timeout=120)
    loaded = {name: set(modules) for name, modules in json.loads(done.stdout).items()}
    assert loaded.keys() == STATEMENTS.keys()
    heavy = {"torch._dynamo", "torch._inductor", "sklearn", "skorch", "xgboost", "pandas", "scipy", "matplotlib"}
    for name, modules in loaded.items():
        assert "pydistill.linear" in modules
        # Without the core numba is the backend, and compiles on import.
        assert not (heavy | ({"numba"} if "pydistill._core" in modules else set())) & modules, name
