"""Names in `pydistill`: functions, and submodules that are imported when they are first used."""

import subprocess
import sys

import pytest
import torch

import pydistill


@pytest.mark.timeout(120)
def test_submodules_are_there_and_their_libraries_are_imported_on_use(tmp_path):
    pytest.importorskip("sklearn")
    pytest.importorskip("skorch")
    program = (
        "import sys, pydistill\n"
        "pydistill.teachers, pydistill.store, pydistill.callbacks.EarlyStopping\n"
        "assert 'sklearn' not in sys.modules and 'skorch' not in sys.modules\n"
        "pydistill.sklearn.DistilledClassifier\n"
        "from pydistill import skorch"
    )
    # from another folder: in the checkout Python would take the package that lies there
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_other_names_are_missing():
    with pytest.raises(AttributeError, match="module 'pydistill' has no attribute 'teacher'"):
        _ = pydistill.teacher
    assert not hasattr(pydistill, "nothing")


def test_soft_targets_is_the_function():
    from pydistill import soft_targets

    assert soft_targets is pydistill.teachers.soft_targets
    outputs = pydistill.teacher_outputs(torch.nn.Linear(3, 2), torch.zeros(4, 3))
    assert isinstance(outputs, pydistill.SoftTargets)
    assert outputs.shape == (4, 2)
