"""Shipping: a student on disk that is whole whatever happens."""

import errno
import hashlib
import json
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from torch import nn

import pydistill
from pydistill.shipping import load_student, save_student

safetensors_torch = pytest.importorskip("safetensors.torch")
SafetensorError = pytest.importorskip("safetensors").SafetensorError


def mlp():
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))


class Tied(nn.Module):
    """A head that shares the embedding's weight, as in language models."""

    def __init__(self, tied=True):
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        if tied:
            self.head.weight = self.embed.weight


def same_state(one, other):
    states = one.state_dict(), other.state_dict()
    assert states[0].keys() == states[1].keys()
    return all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def document(folder):
    return json.loads((folder / "student.json").read_text())


class TestSaveAndLoad:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    def test_every_bit_comes_back(self, tmp_path, dtype):
        student, other = mlp().to(dtype), mlp().to(dtype)
        student[1].num_batches_tracked += 3
        assert not same_state(student, other)
        assert save_student(student, tmp_path / "a" / "b") == tmp_path / "a" / "b"
        assert load_student(tmp_path / "a" / "b", other) is other
        assert same_state(student, other)

    def test_document(self, tmp_path):
        student = mlp()
        save_student(student, tmp_path, metadata={"classes": ["x", "y"]})
        data, found = (tmp_path / "student.safetensors").read_bytes(), document(tmp_path)
        assert found.pop("tensors")["0.weight"] == {"dtype": "float32", "shape": [5, 6]}
        assert found == {
            "format": 1,
            "class": "torch.nn.modules.container.Sequential",
            "parameters": 35 + 10 + 18,
            "tied": [],
            "pydistill": pydistill.__version__,
            "torch": torch.__version__,
            "metadata": {"classes": ["x", "y"]},
            "bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
        }

    def test_the_tensors_are_a_plain_safetensors_file(self, tmp_path):
        student = mlp()
        save_student(student, tmp_path)
        tensors = safetensors_torch.load_file(tmp_path / "student.safetensors")
        assert tensors.keys() == student.state_dict().keys()
        assert sorted(p.name for p in tmp_path.iterdir()) == ["student.json", "student.safetensors"]

    def test_tied_parameters_are_saved_once_and_stay_tied(self, tmp_path):
        student, other = Tied(), Tied()
        save_student(student, tmp_path)
        load_student(tmp_path, other)
        assert len(safetensors_torch.load_file(tmp_path / "student.safetensors")) == 1
        assert document(tmp_path)["parameters"] == 28
        assert other.head.weight is other.embed.weight
        assert torch.equal(other.head.weight, student.embed.weight)

    @pytest.mark.parametrize("tied", [True, False])
    def test_a_student_that_ties_other_tensors_is_refused_untouched(self, tmp_path, tied):
        save_student(Tied(tied), tmp_path)
        other = Tied(not tied)
        before = {name: x.clone() for name, x in other.state_dict().items()}
        with pytest.raises(
            ValueError, match=r"student must tie the same tensors .*embed.weight.*none|none.*embed.weight"
        ):
            load_student(tmp_path, other)
        assert all(torch.equal(x, before[name]) for name, x in other.state_dict().items())

    def test_other_buffers_modes_and_transposed_weights(self, tmp_path):
        student = mlp()
        student[0].weight.data = torch.randn(6, 5).t()  # not contiguous
        save_student(student, tmp_path)
        other = mlp().eval()
        other.register_buffer("scratch", torch.full((2,), 9.0), persistent=False)
        load_student(tmp_path, other)
        assert other.scratch.tolist() == [9.0, 9.0]
        assert not any(m.training for m in other.modules())
        assert torch.equal(other[0].weight, student[0].weight)

    def test_a_compiled_student_is_saved_as_the_plain_one(self, tmp_path):
        student, other = mlp(), torch.compile(mlp())
        save_student(torch.compile(student), tmp_path)  # nothing runs, and so nothing is compiled
        assert document(tmp_path)["class"] == "torch.nn.modules.container.Sequential"
        assert same_state(load_student(tmp_path, mlp()), student)
        assert load_student(tmp_path, other) is other
        assert same_state(other._orig_mod, student)

    def test_a_new_student_replaces_the_old_one(self, tmp_path):
        save_student(mlp(), tmp_path)
        student = nn.Linear(2, 3)
        save_student(student, tmp_path)
        assert same_state(load_student(tmp_path, nn.Linear(2, 3)), student)


MISFITS = {
    "shape": (
        lambda: nn.Sequential(nn.Linear(6, 4), *mlp()[1:]),
        r"'0.weight' was float32 \(5, 6\).* float32 \(4, 6\)",
    ),
    "dtype": (lambda: mlp().half(), r"'0.weight' was float32 \(5, 6\).* float16 \(5, 6\)"),
    "missing": (lambda: nn.Sequential(*mlp()[:3]), r"it has no '3.weight'"),
    "another": (lambda: nn.Sequential(*mlp(), nn.Linear(3, 3)), r"no other tensors .*; it has '4.weight'"),
}


class TestRefusals:
    @pytest.mark.parametrize("kind", MISFITS)
    def test_misfits_are_named_and_left_untouched(self, tmp_path, kind):
        make, message = MISFITS[kind]
        save_student(mlp(), tmp_path)
        student = make()
        before = {name: x.clone() for name, x in student.state_dict().items()}
        with pytest.raises(ValueError, match=message):
            load_student(tmp_path, student)
        assert all(torch.equal(x, before[name]) for name, x in student.state_dict().items())

    @pytest.mark.parametrize("place", [10, 300, -1])
    def test_a_flipped_bit_in_the_tensors(self, tmp_path, place):
        save_student(mlp(), tmp_path)
        data = bytearray((tmp_path / "student.safetensors").read_bytes())
        data[place] ^= 1
        (tmp_path / "student.safetensors").write_bytes(data)
        with pytest.raises(ValueError, match=r"student.safetensors is damaged: its SHA-256"):
            load_student(tmp_path, mlp())

    @pytest.mark.parametrize("text", [b"", b"{", b"[1]", b"\xff\xfe", b'{"format": 1, "sha'])
    def test_a_damaged_document(self, tmp_path, text):
        save_student(mlp(), tmp_path)
        (tmp_path / "student.json").write_bytes(text)
        with pytest.raises(ValueError, match=r"student.json is damaged"):
            load_student(tmp_path, mlp())

    def test_another_format(self, tmp_path):
        save_student(mlp(), tmp_path)
        (tmp_path / "student.json").write_text(json.dumps(document(tmp_path) | {"format": 2}))
        with pytest.raises(ValueError, match=r"format 2; pydistill .* reads format 1"):
            load_student(tmp_path, mlp())

    @pytest.mark.parametrize("name", ["student.json", "student.safetensors"])
    def test_missing_files(self, tmp_path, name):
        with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere"):
            load_student(tmp_path / "nowhere", mlp())
        save_student(mlp(), tmp_path)
        (tmp_path / name).unlink()
        with pytest.raises(FileNotFoundError, match=f"there is no {name}"):
            load_student(tmp_path, mlp())

    def test_bad_arguments_write_nothing(self, tmp_path):
        class Extra(nn.Linear):
            def get_extra_state(self):
                return {"a": 1}

        folder = tmp_path / "new"
        with pytest.raises(TypeError, match=r"student must be a torch.nn.Module, got dict"):
            save_student({}, folder)
        for name in ("student_", "module_"):
            estimator = type("Classifier", (), {name: mlp()})()
            for call in (lambda model: save_student(model, folder), lambda model: load_student(folder, model)):
                with pytest.raises(TypeError, match=rf"torch.nn.Module, got Classifier: pass its {name}$"):
                    call(estimator)
        with pytest.raises(TypeError, match=r"metadata must be what JSON can hold"):
            save_student(mlp(), folder, metadata={"classes": np.arange(3)})
        with pytest.raises(TypeError, match=r"metadata must be what JSON can hold"):
            save_student(mlp(), folder, metadata=float("nan"))
        with pytest.raises(TypeError, match=r"a state of tensors alone; _extra_state is dict"):
            save_student(Extra(2, 2), folder)
        assert not folder.exists()

    def test_without_safetensors_the_extra_is_named(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "safetensors.torch", None)
        monkeypatch.setitem(sys.modules, "safetensors", None)
        with pytest.raises(ImportError, match=r"pydistill-kd\[ship\]"):
            save_student(mlp(), tmp_path)


class Killed(BaseException):
    """What no except clause of the library catches: the process is gone at this point."""


class Interrupt:
    """Raises at the n-th call of any of the functions that touch the disk."""

    def __init__(self, monkeypatch, number, error):
        self.left, self.error = number, error
        for name in ("fsync", "replace"):
            monkeypatch.setattr(os, name, self.wrap(getattr(os, name)))
        monkeypatch.setattr(safetensors_torch, "save_model", self.wrap(safetensors_torch.save_model))

    def wrap(self, function):
        def wrapped(*args, **kwargs):
            self.left -= 1
            if self.left == 0:
                raise self.error
            return function(*args, **kwargs)

        return wrapped


FULL = OSError(errno.ENOSPC, "No space left on device")
CALLS = 7  # save_model, fsync, fsync, replace, fsync, replace, fsync


class TestInterruptions:
    @pytest.mark.parametrize("number", range(1, CALLS + 1))
    @pytest.mark.parametrize("error", [FULL, Killed()], ids=["full", "killed"])
    def test_the_old_student_or_the_new_one(self, tmp_path, monkeypatch, number, error):
        old, new, third = mlp(), mlp(), mlp()
        save_student(old, tmp_path, metadata="old")
        with monkeypatch.context() as patch:
            Interrupt(patch, number, error)
            with pytest.raises(type(error)):
                save_student(new, tmp_path, metadata="new")
        committed = number > 4
        assert same_state(load_student(tmp_path, mlp()), new if committed else old)
        if error is FULL and not committed:
            assert sorted(p.name for p in tmp_path.iterdir()) == ["student.json", "student.safetensors"]
            assert document(tmp_path)["metadata"] == "old"
        for again in (1, 2, CALLS):  # interrupted once more, and then not
            with monkeypatch.context() as patch:
                Interrupt(patch, again, Killed())
                with pytest.raises(Killed):
                    save_student(third, tmp_path)
            assert same_state(load_student(tmp_path, mlp()), third if again == CALLS else (new if committed else old))
        save_student(third, tmp_path, metadata="third")
        assert document(tmp_path)["metadata"] == "third"
        assert sorted(p.name for p in tmp_path.iterdir()) == ["student.json", "student.safetensors"]

    @pytest.mark.parametrize("again", range(1, 5))
    def test_interrupted_between_the_renames_and_then_again(self, tmp_path, monkeypatch, again):
        new, third = mlp(), mlp()
        save_student(mlp(), tmp_path)
        for student, number in ((new, 6), (third, again)):  # 6: the document still has its other name
            with monkeypatch.context() as patch:
                Interrupt(patch, number, Killed())
                with pytest.raises(Killed):
                    save_student(student, tmp_path)
        assert same_state(load_student(tmp_path, mlp()), new)

    def test_the_count_of_calls_is_right(self, tmp_path, monkeypatch):
        Interrupt(monkeypatch, CALLS + 1, FULL)
        save_student(mlp(), tmp_path)

    def test_the_message_says_that_nothing_is_lost(self, tmp_path, monkeypatch):
        save_student(mlp(), tmp_path)
        Interrupt(monkeypatch, 2, FULL)
        with pytest.raises(OSError, match=r"not written to .*, what was there is whole: .*No space left") as caught:
            save_student(mlp(), tmp_path)
        assert caught.value.errno == errno.ENOSPC

    @pytest.mark.parametrize(
        ("text", "number"),
        [("I/O error: No space left on device (os error 28)", errno.ENOSPC), ("invalid header", errno.EIO)],
    )
    def test_safetensors_says_the_number_in_its_text(self, tmp_path, monkeypatch, text, number):
        Interrupt(monkeypatch, 1, SafetensorError(text))
        with pytest.raises(OSError, match="was not written") as caught:
            save_student(mlp(), tmp_path)
        assert caught.value.errno == number

    @pytest.mark.timeout(120)
    def test_a_disk_that_is_really_full(self, tmp_path):
        """Files may not grow beyond 20 kB in the child, as if the disk had no more."""
        old = nn.Linear(8, 8)
        save_student(old, tmp_path)
        program = """
            import resource, signal, sys
            import torch
            from pydistill.shipping import save_student
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
            try:
                save_student(torch.nn.Linear(100, 100), sys.argv[1])
            except OSError as error:
                print("refused:", error, "errno", error.errno)
        """
        command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=100)
        assert "refused:" in done.stdout, done.stderr
        assert "what was there is whole" in done.stdout
        assert f"errno {errno.EFBIG}" in done.stdout
        assert same_state(load_student(tmp_path, nn.Linear(8, 8)), old)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["student.json", "student.safetensors"]
