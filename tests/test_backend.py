"""Which backend runs, how it is chosen, and that nothing falls back in silence."""

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from conftest import BACKENDS

import pydistill
from pydistill.engine import backend, compiled

ROOT = Path(__file__).parents[1]


def python(code, cwd, **environment):
    """(exit status, output) of a fresh process."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PYDISTILL_")}
    done = subprocess.run(
        [sys.executable, "-u", "-W", "always", "-c", code],
        cwd=cwd,
        env=clean | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )
    return done.returncode, done.stdout


def test_info(variant):
    info = pydistill.backend_info()
    assert (info.name, info.isa) == variant
    assert info.threads >= 1
    assert info.reason == "chosen with use_backend"
    pydistill.distillation_loss(torch.randn(2, 3), torch.randn(2, 3), alpha=1.0)
    assert pydistill.backend_info().last_call == info.name


def test_use_backend_nests_and_restores():
    before = pydistill.backend_info()
    with pydistill.use_backend("torch"):
        with suppress(ZeroDivisionError), pydistill.use_backend("numba", threads=2):
            assert pydistill.backend_info().threads == 2
            raise ZeroDivisionError
        assert pydistill.backend_info().name == "torch"
    assert pydistill.backend_info().name == before.name


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("cuda", {}, "name must be a backend, one of compiled, numba, torch; got 'cuda'"),
        ("torch", {"isa": "avx2"}, "isa must be None with the torch backend, got 'avx2'"),
        ("torch", {"threads": 2}, "threads must be None with the torch backend, got 2"),
        ("numba", {"threads": 0}, "threads must be at least 1, got 0"),
    ],
)
def test_bad_choices(name, options, message):
    with pytest.raises(ValueError, match=message), pydistill.use_backend(name, **options):
        pass


@pytest.fixture
def choose(monkeypatch):
    """A function that reads the environment anew and returns ``(backend, reason)``."""

    def choose(**environment):
        for name in ("PYDISTILL_BACKEND", "PYDISTILL_ISA"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return backend._default.__wrapped__()

    return choose


@pytest.fixture
def no_core(monkeypatch):
    def missing():
        raise ImportError("no compiled module")

    monkeypatch.setattr(backend, "_core", missing)
    monkeypatch.setattr(backend, "_make", backend._make.__wrapped__)


needs_core = pytest.mark.skipif("compiled" not in BACKENDS, reason="a build without the compiled core")


def test_environment_chooses_the_backend(choose):
    chosen, reason = choose(PYDISTILL_BACKEND="torch")
    assert (chosen.name, chosen.isa, reason) == ("torch", None, "PYDISTILL_BACKEND=torch")


@needs_core
def test_environment_chooses_the_isa(choose):
    chosen, reason = choose(PYDISTILL_ISA="portable")
    assert (chosen.name, chosen.isa, reason) == ("compiled", "portable", "PYDISTILL_ISA=portable")


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"PYDISTILL_BACKEND": "fortran"}, "PYDISTILL_BACKEND=fortran in the environment: .*got 'fortran'"),
        (
            {"PYDISTILL_BACKEND": "torch", "PYDISTILL_ISA": "avx2"},
            "isa must be None with the torch backend, got 'avx2'",
        ),
        pytest.param({"PYDISTILL_ISA": "mmx"}, "PYDISTILL_ISA=mmx in the environment: .*got 'mmx'", marks=needs_core),
    ],
)
def test_bad_environment_is_named(choose, environment, message):
    with pytest.raises(ValueError, match=message):
        choose(**environment)


def test_fresh_process_reads_the_environment(tmp_path):
    code = """if True:
        import os, torch, pydistill
        try:
            pydistill.distillation_loss(torch.zeros(1, 2), torch.zeros(1, 2), alpha=1.0)
        except ValueError as error:
            print(error)
        os.environ["PYDISTILL_BACKEND"] = "torch"
        print(pydistill.backend_info().name)
    """
    status, output = python(code, tmp_path, PYDISTILL_BACKEND="fortran")
    first, second = output.splitlines()
    assert status == 0
    assert first.startswith("PYDISTILL_BACKEND=fortran in the environment")
    assert second == "torch"


@pytest.mark.skipif("compiled" in BACKENDS, reason="a build with the compiled core")
def test_build_without_the_core_says_so():
    with pytest.raises(ImportError, match="without a working C"):
        compiled.load_core()


def test_isa_without_the_core(choose, no_core):
    with pytest.raises(ImportError, match="PYDISTILL_ISA=avx2 needs the compiled backend: no compiled module"):
        choose(PYDISTILL_ISA="avx2")


def test_without_the_core_the_fallback_is_announced(choose, no_core):
    with pytest.warns(RuntimeWarning, match="slower numba backend: no compiled module"):
        chosen, reason = choose()
    assert (chosen.name, reason) == ("numba", "no compiled module")


def test_name_clash_is_an_error(tmp_path):
    folder = tmp_path / "pydistill-0.4.1.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: pydistill\nVersion: 0.4.1\n")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    status, output = python("import pydistill", tmp_path, PYTHONPATH=path)
    assert status != 0
    assert "pip uninstall pydistill pydistill-kd" in output


def test_sources_in_a_checkout_use_the_installed_core():
    """python -m pytest and python -m bench put the checkout first on the path, ahead of the installed package."""
    code = "import pydistill as p; print(p.__file__); print(p.backend_info().name)"
    status, output = python(code, ROOT, PYTHONPATH=os.environ.get("PYTHONPATH", ""))
    file, *_, name = output.split()
    assert status == 0
    assert Path(file) == ROOT / "pydistill" / "__init__.py"
    assert name == BACKENDS[0]


def test_sources_that_have_moved_on_are_noticed(tmp_path):
    source = tmp_path / "csrc"
    source.mkdir()
    for path in (ROOT / "csrc").iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    same = compiled._hash_of_sources(source)
    assert same == compiled._hash_of_sources(ROOT / "csrc")
    (source / "scan.hpp").write_text("// changed")
    assert compiled._hash_of_sources(source) != same


@needs_core
def test_core_was_made_of_these_sources():
    assert compiled._hash_of_sources(ROOT / "csrc") == compiled.load_core().SOURCE_HASH
