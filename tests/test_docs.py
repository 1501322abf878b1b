"""The examples in the docstrings and in the README run, and every public name documents itself."""

import contextlib
import doctest
import importlib
import io
import pkgutil
import re
import tomllib
from pathlib import Path

import pytest
import torch

import pydistill

ROOT = Path(__file__).parents[1]
# numba's module is imported only where that backend is used; _core is not Python.
MODULES = [m.name for m in pkgutil.walk_packages(pydistill.__path__, "pydistill.") if "_core" not in m.name]


@pytest.mark.parametrize("name", [m for m in MODULES if not m.endswith("__main__")])
def test_docstring_examples(name):
    failed, _ = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert failed == 0


@pytest.mark.parametrize(
    "name", [n for n in pydistill.__all__ if n not in ("BackendInfo", "LossMetrics", "__version__")]
)
def test_public_names_have_examples(name):
    assert ">>>" in getattr(pydistill, name).__doc__


def run_readme_block(number):
    """Run one of the README's three code blocks; returns its namespace and its output."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 3
    namespace, printed = {}, io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(blocks[number], "README.md", "exec"), namespace)
    return namespace, printed.getvalue()


@pytest.fixture(scope="module")
def readme_loop():
    return run_readme_block(1)


def test_readme_loss():
    namespace, _ = run_readme_block(0)
    assert torch.isfinite(namespace["student_logits"].grad).all()


def test_readme_estimator(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace, printed = run_readme_block(2)
    assert namespace["model"].score(namespace["X_test"], namespace["y_test"]) > 0.93
    assert "x smaller" in printed
    layers = torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10)
    pydistill.load_student("digits-student", torch.nn.Sequential(*layers))


def test_readme_code_runs(readme_loop):
    namespace, printed = readme_loop
    assert torch.isfinite(namespace["trainer"].predict(torch.tensor(namespace["X_test"]))).all()
    assert 0.8 < float(re.search(r"0\.\d+", printed)[0]) <= 1.0


def test_readme_figures_of_the_tutorial(readme_loop):
    """Mean maximum of the softmax of probabilities, and of a forest's on rows it has and has not seen."""
    namespace, _ = readme_loop
    probs, forest = namespace["targets"].logits.exp(), namespace["forest"]
    forest.fit(namespace["X"], namespace["y"])
    seen, unseen = (forest.predict_proba(namespace[rows]).max(1).mean() for rows in ("X", "X_test"))
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert f"the mean maximum is {(probs / 4).softmax(1).amax(1).mean():.3f}, and 0.1" in readme
    assert f"the mean maximum is {seen:.2f}, and {unseen:.2f} on rows" in readme


def test_readme_commands_install_what_they_need():
    readme = (ROOT / "README.md").read_text()
    assert "pip install -c constraints.txt '.[demo]' && pydistill demo" in readme
    assert "pip install -c constraints.txt '.[test]' && pytest" in readme
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {"demo", "test"} <= project["optional-dependencies"].keys()
    pinned = {line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    wanted = {*project["dependencies"], *project["optional-dependencies"]["demo"]}
    assert {re.split(r"[<>=]", name)[0] for name in wanted} <= pinned
