"""Students are saved and loaded atomically, whatever interrupts it."""

import copy
import errno
import hashlib
import json
import os
import stat
import subprocess
import sys
import textwrap
from contextlib import contextmanager
from multiprocessing import get_context

import killing
import numpy as np
import pytest
import torch
from stores import read_only
from torch import nn

import pydistill
from pydistill.shipping import load_student, save_student
from pydistill.store.digests import as_bytes

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


def snapshot(student):
    """Everything that a refused load must leave alone: bytes, which objects they are in, and modes."""
    names = [*student.named_parameters(remove_duplicate=False), *student.named_buffers(remove_duplicate=False)]
    tensors = [(name, id(x), x.dtype, x.shape, as_bytes(x).tobytes()) for name, x in names]
    return tensors, [(name, m.training) for name, m in student.named_modules()]


@contextmanager
def refused(student, error, match):
    """Loading fails in this way, and the student is as it was, to the bit and in its mode."""
    student.train()
    list(student.modules())[-1].training = len(list(student.modules())) == 1  # the modules' modes differ
    before = snapshot(student)
    with pytest.raises(error, match=match):
        yield
    assert snapshot(student) == before


def rewrite(folder, tensors, **changes):
    """Another file and document, with the checksum that belongs to them."""
    path = folder / "student.safetensors"
    safetensors_torch.save_file(tensors, path)
    changes |= {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    (folder / "student.json").write_text(json.dumps(document(folder) | changes))


def read(folder):
    return {name: x.clone() for name, x in safetensors_torch.load_file(folder / "student.safetensors").items()}


def document(folder):
    return json.loads((folder / "student.json").read_text())


def module(**tensors):
    """A module that holds these tensors, as parameters where they are such."""
    result = nn.Module()
    for name, x in tensors.items():
        if isinstance(x, nn.Parameter):
            result.register_parameter(name, x)
        else:
            result.register_buffer(name, x)
    return result


def tied_in_a_flat_buffer():
    flat = torch.randn(20)
    first = nn.Parameter(flat[:6].view(2, 3))
    return module(a=first, b=first, c=nn.Parameter(flat[6:10]))


def transposed():
    weight = nn.Parameter(torch.randn(4, 2))
    return module(encoder=weight, decoder=nn.Parameter(weight.detach().t()))


def of_several_dtypes():
    numbers = torch.randn(5)
    return module(numbers=numbers, bits=numbers.view(torch.int32))


def conjugate():
    numbers = torch.randn(5, dtype=torch.complex64)
    return module(numbers=numbers, conjugate=numbers.conj())


def overlapping():
    numbers = torch.randn(10)
    return module(whole=numbers, part=numbers[2:5])


SHARED = {
    "tied in a flat buffer": tied_in_a_flat_buffer,
    "transposed": transposed,
    "of several dtypes": of_several_dtypes,
    "conjugate": conjugate,
    "overlapping": overlapping,
}


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
        modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
        (tmp_path / "other").touch()
        assert modes == {stat.S_IMODE((tmp_path / "other").stat().st_mode)}
        (tmp_path / "other").unlink()
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

    def test_other_buffers_eval_mode_and_transposed_weights(self, tmp_path):
        student = mlp()
        student[0].weight.data = torch.randn(6, 5).t()  # not contiguous
        save_student(student, tmp_path)
        assert student.training
        other = mlp()
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
        assert not any(m.training for m in other.modules())
        assert not any(m.training for m in other._orig_mod.modules())

    def test_a_module_that_was_compiled_in_place(self, tmp_path):
        student, other = mlp(), mlp()
        other.compile()
        save_student(student, tmp_path)
        assert same_state(load_student(tmp_path, other), student)

    @pytest.mark.parametrize("kind", SHARED)
    def test_views_of_one_memory(self, tmp_path, kind):
        torch.manual_seed(1)
        student = SHARED[kind]()
        torch.manual_seed(2)
        other = SHARED[kind]()
        assert not same_state(student, other)
        save_student(student, tmp_path)
        load_student(tmp_path, other)
        assert same_state(student, other)
        assert document(tmp_path)["tied"] == ([["a", "b"]] if kind == "tied in a flat buffer" else [])

    def test_numbers_without_dimensions_and_tensors_without_numbers(self, tmp_path):
        def make(value):
            return module(scalar=torch.tensor(value), empty=torch.zeros(0, 3), flag=torch.tensor([value > 2]))

        save_student(make(3.0), tmp_path)
        other = load_student(tmp_path, make(1.0))
        assert (other.scalar.item(), other.flag.item(), other.empty.shape) == (3.0, True, (0, 3))
        for change in ({"scalar": torch.zeros(1)}, {"empty": torch.zeros(3, 0)}):
            student = make(1.0)
            for name, x in change.items():
                setattr(student, name, x)
            with refused(student, ValueError, rf"'{next(iter(change))}' was saved as float32 \("):
                load_student(tmp_path, student)
        save_student(module(empty=torch.zeros(0)), tmp_path)
        load_student(tmp_path, module(empty=torch.zeros(0)))

    def test_tied_names_in_another_order(self, tmp_path):
        student = Tied()
        save_student(student, tmp_path)
        found = document(tmp_path)
        (tmp_path / "student.json").write_text(json.dumps(found | {"tied": [found["tied"][0][::-1]]}))
        assert same_state(load_student(tmp_path, Tied()), student)

    @pytest.mark.timeout(60)
    @pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
    def test_a_reader_never_sees_half_of_a_replacement(self, tmp_path):
        def save_often():
            for i in range(100):
                save_student(module(x=torch.full((1000,), float(i))), tmp_path, metadata=i)

        save_student(module(x=torch.zeros(1000)), tmp_path)
        writer = get_context("fork").Process(target=save_often, daemon=True)
        writer.start()
        seen = set()
        while writer.is_alive():
            values = load_student(tmp_path, module(x=torch.zeros(1000))).x.unique()
            assert len(values) == 1
            seen.add(values.item())
        writer.join()
        assert writer.exitcode == 0
        assert len(seen) > 5

    def test_a_new_student_replaces_the_old_one(self, tmp_path):
        save_student(mlp(), tmp_path)
        student = nn.Linear(2, 3)
        save_student(student, tmp_path)
        assert same_state(load_student(tmp_path, nn.Linear(2, 3)), student)


MISFITS = {
    "shape": (
        lambda: nn.Sequential(nn.Linear(6, 4), *mlp()[1:]),
        r"'0.weight' was saved as float32 \(5, 6\).* float32 \(4, 6\)$",
    ),
    "dtype": (
        lambda: mlp().half(),
        r"'0.weight' was saved as float32 \(5, 6\).* float16 \(5, 6\): load into student.to\(torch.float32\) and",
    ),
    "missing": (lambda: nn.Sequential(*mlp()[:3]), r"it has no '3.weight'"),
    "another": (
        lambda: nn.Sequential(*mlp(), nn.Linear(3, 3)),
        r"no tensors that .* lacks; it has '4.weight'",
    ),
}


def without(name):
    return lambda tensors: tensors.pop(name)


CHANGED_FILES = {
    "shape": (
        lambda x: x.update({"3.weight": torch.ones(9, 9)}),
        r"3.weight is float32 \(9, 9\) in the file and float32 \(3, 5\)",
    ),
    "shape of as many numbers": (lambda x: x.update({"3.weight": torch.ones(5, 3)}), r"3.weight is float32 \(5, 3\)"),
    "dtype": (
        lambda x: x.update({name: tensor.half() for name, tensor in x.items()}),
        r"is float16 \(.*\) in the file and (float32|int64) .* Save the student again",
    ),
    "dtype of the last": (lambda x: x.update({"3.bias": x["3.bias"].double()}), r"3.bias is float64"),
    "missing": (without("3.bias"), r"the file has no 3.bias"),
    "another": (lambda x: x.update(other=torch.ones(1)), "the file has other, which the document does not have"),
}


class TestChangedFiles:
    """Files whose checksum is right, and which do not hold what the document says."""

    @pytest.mark.parametrize("kind", CHANGED_FILES)
    def test_is_refused_before_anything_changes(self, tmp_path, kind):
        change, message = CHANGED_FILES[kind]
        save_student(mlp(), tmp_path)
        tensors = read(tmp_path)
        change(tensors)
        rewrite(tmp_path, tensors)
        student = mlp()
        with refused(student, ValueError, rf"student.safetensors and student.json do not belong together.*{message}"):
            load_student(tmp_path, student)
        compiled = torch.compile(mlp())
        with refused(compiled, ValueError, message):
            load_student(tmp_path, compiled)

    def test_tied_ones_are_in_the_file_once(self, tmp_path):
        save_student(Tied(), tmp_path)
        weight = read(tmp_path)["embed.weight"]
        for tensors, message in (
            ({"embed.weight": weight, "head.weight": weight + 1}, "the file has embed.weight and head.weight"),
            ({}, "the file has no embed.weight"),
        ):
            rewrite(tmp_path, tensors)
            student = Tied()
            with refused(student, ValueError, message):
                load_student(tmp_path, student)
        rewrite(tmp_path, {"head.weight": weight})  # the other name will do
        assert torch.equal(load_student(tmp_path, Tied()).embed.weight, weight)

    @pytest.mark.parametrize(
        "content",
        [b"", b"\0" * 7, b"\xff" * 64, b"\x02\0\0\0\0\0\0\0[]", "unknown dtype", "deep"],
        ids=["empty", "short", "a header that is too long", "a list", "unknown dtype", "deep"],
    )
    def test_is_no_safetensors_file(self, tmp_path, content):
        save_student(mlp(), tmp_path)
        if isinstance(content, str):
            header = '{"x":{"dtype":"Q9","shape":[2],"data_offsets":[0,1]}}' if content != "deep" else "[" * 10**5
            content = len(header).to_bytes(8, "little") + header.encode() + b"\0"
        (tmp_path / "student.safetensors").write_bytes(content)
        found = document(tmp_path) | {"sha256": hashlib.sha256(content).hexdigest()}
        (tmp_path / "student.json").write_text(json.dumps(found))
        student = mlp()
        with refused(student, ValueError, r"student.safetensors is damaged, or not a safetensors file: "):
            load_student(tmp_path, student)

    def test_a_half_student_is_not_cast(self, tmp_path):
        student = mlp().half()
        save_student(student, tmp_path)
        other = mlp()
        message = r"'0.weight' was saved as float16 .* float32 \(5, 6\): load into student.to\(torch.float16\) and conv"
        with refused(other, ValueError, message):
            load_student(tmp_path, other)
        assert same_state(load_student(tmp_path, other.to(torch.float16)), student)


DOCUMENT_CHANGES = [
    ({"format": None}, "has NoneType where format must be int"),
    ({"sha256": None}, "has NoneType where sha256 must be str"),
    ({"class": 3}, "has int where class must be str"),
    ({"tensors": []}, "has list where tensors must be dict"),
    ({"tensors": {"w": 3}}, "has int where tensors.w must be dict"),
    ({"tensors": {"w": {"dtype": "float32"}}}, "has no tensors.w.shape"),
    ({"tensors": {"w": {"shape": [2]}}}, "has no tensors.w.dtype"),
    ({"tensors": {"w": {"dtype": "float32", "shape": [2, "2"]}}}, r"has str where tensors.w.shape\[1\] must be int"),
    ({"tensors": {"w": {"dtype": "float32", "shape": [True]}}}, r"has bool where tensors.w.shape\[0\] must be int"),
    ({"tied": {}}, "has dict where tied must be list"),
    ({"tied": [3]}, r"has int where tied\[0\] must be list"),
    ({"tied": [["0.weight", None]]}, r"has NoneType where tied\[0\]\[1\] must be str"),
]


class TestRefusals:
    @pytest.mark.parametrize("kind", MISFITS)
    def test_misfits_are_named_and_left_untouched(self, tmp_path, kind):
        make, message = MISFITS[kind]
        save_student(mlp(), tmp_path)
        student = make()
        with refused(student, ValueError, message):
            load_student(tmp_path, student)

    @pytest.mark.parametrize("key", ["format", "sha256", "class", "tensors", "tied"])
    def test_a_document_that_lacks_a_key(self, tmp_path, key):
        save_student(mlp(), tmp_path)
        found = document(tmp_path)
        del found[key]
        (tmp_path / "student.json").write_text(json.dumps(found))
        with pytest.raises(ValueError, match=rf"student.json is damaged, or not the .*: it has no {key}$"):
            load_student(tmp_path, mlp())

    @pytest.mark.parametrize(("change", "message"), DOCUMENT_CHANGES)
    def test_a_document_with_values_of_other_types(self, tmp_path, change, message):
        save_student(mlp(), tmp_path)
        (tmp_path / "student.json").write_text(json.dumps(document(tmp_path) | change))
        with pytest.raises(ValueError, match=rf"student.json.* {message}" if "format" not in change else "format None"):
            load_student(tmp_path, mlp())

    @pytest.mark.parametrize("names", [[["0.weight", "nowhere"]], [[]]])
    def test_a_document_that_ties_what_is_not_there(self, tmp_path, names):
        save_student(mlp(), tmp_path)
        (tmp_path / "student.json").write_text(json.dumps(document(tmp_path) | {"tied": names}))
        with pytest.raises(ValueError, match=r"student.json is damaged: tied has (\['nowhere'\]|a group) without"):
            load_student(tmp_path, mlp())

    @pytest.mark.parametrize("opening", ["[", '{"format":'])
    def test_a_document_that_is_nested_deeply(self, tmp_path, opening):
        save_student(mlp(), tmp_path)
        (tmp_path / "student.json").write_text(opening * 200_000)
        with pytest.raises(ValueError, match=r"student.json is damaged"):
            load_student(tmp_path, mlp())

    def test_students_without_numbers(self, tmp_path):
        with torch.device("meta"):
            meta = mlp()
        lazy = nn.Sequential(nn.LazyLinear(5), nn.Linear(5, 3))
        for student, message in ((meta, "0.weight is on meta"), (lazy, "0.weight has none yet")):
            with pytest.raises(ValueError, match=message):
                save_student(student, tmp_path / "new")
            save_student(mlp(), tmp_path)
            with pytest.raises(ValueError, match=message):
                load_student(tmp_path, student)
            assert student.training
        assert not (tmp_path / "new").exists()

    @pytest.mark.parametrize(
        ("x", "message"),
        [
            (torch.zeros(2, dtype=torch.complex128), "dtypes that safetensors can store; x is torch.complex128"),
            (torch.eye(3).to_sparse(), r"dense tensors; x is torch.sparse_coo: use its to_dense\(\)"),
        ],
    )
    def test_tensors_that_the_file_cannot_hold(self, tmp_path, x, message):
        for call in (lambda student: save_student(student, tmp_path / "new"), lambda s: load_student(tmp_path, s)):
            with pytest.raises(TypeError, match=message):
                call(module(x=x))
        assert not (tmp_path / "new").exists()

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
        with pytest.raises(TypeError, match=r"must be a torch.nn.Module, got the class Linear: pass an instance"):
            save_student(nn.Linear, folder)
        with pytest.raises(TypeError, match=r"metadata must be what JSON can hold"):
            save_student(mlp(), folder, metadata={"classes": np.arange(3)})
        with pytest.raises(TypeError, match=r"metadata must be what JSON can hold"):
            save_student(mlp(), folder, metadata=float("nan"))
        with pytest.raises(TypeError, match=r"only tensors in its state_dict; _extra_state is dict"):
            save_student(Extra(2, 2), folder)
        assert not folder.exists()

    def test_arguments_in_the_wrong_order(self, tmp_path):
        save_student(mlp(), tmp_path)
        student = mlp()
        with refused(student, TypeError, r"^folder must be a path, got Sequential; the order is load_student\(folder"):
            load_student(student, tmp_path)
        with refused(student, TypeError, r"^folder must be a path, got Sequential; the order is save_student\(student"):
            save_student(tmp_path, student)
        with pytest.raises(TypeError, match=r"^folder must be a path, got NoneType; the order is save_student"):
            save_student(student, None)

    def test_without_safetensors_the_extra_is_named(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "safetensors.torch", None)
        monkeypatch.setitem(sys.modules, "safetensors", None)
        with pytest.raises(ImportError, match=r"pydistill-kd\[ship\]"):
            save_student(mlp(), tmp_path)


class Breaking(nn.Module):
    """Its second part does something at the end of its loading, when the first one has been filled."""

    def __init__(self, change=lambda part: None):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout()
        self.second.register_load_state_dict_post_hook(lambda part, keys: change(part))


def raise_error(error):
    def change(part):
        raise error

    return change


def swap_buffer(part):
    part.running_mean = torch.zeros(7)
    raise RuntimeError("after a buffer was replaced")


def add_one(part):
    with torch.no_grad():
        part.weight += 1


class TestUnchangedOnError:
    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            (raise_error(RuntimeError("broken")), ValueError, "could not be filled from .*is unchanged: broken"),
            (raise_error(KeyboardInterrupt()), KeyboardInterrupt, "^$"),
            (swap_buffer, ValueError, "after a buffer was replaced"),
            (add_one, ValueError, "must keep the values that are loaded into it: 'second.weight' got other values"),
        ],
    )
    def test_the_students_own_loading(self, tmp_path, change, error, message):
        save_student(Breaking(), tmp_path)
        student = Breaking(change)
        with refused(student, error, message):
            load_student(tmp_path, student)

    def test_a_student_that_cannot_change_its_mode(self, tmp_path):
        class Stubborn(nn.Sequential):
            def train(self, mode=True):
                super().train(mode)
                if not mode:
                    raise RuntimeError("always in training")
                return self

        save_student(Stubborn(*mlp()), tmp_path)
        student = Stubborn(*mlp())
        with refused(student, RuntimeError, "always in training"):
            load_student(tmp_path, student)

    def test_an_expanded_buffer_cannot_be_filled(self, tmp_path):
        def make():
            return module(first=torch.randn(3), x=torch.randn(1).expand(3))

        save_student(make(), tmp_path)
        student = make()
        with refused(student, ValueError, "could not be filled"):
            load_student(tmp_path, student)

    def test_different_numbers_for_overlapping_tensors(self, tmp_path):
        student = overlapping()
        apart = copy.deepcopy(student)
        apart.part = torch.full((3,), 5.0)
        save_student(apart, tmp_path)
        with refused(student, ValueError, "'(whole|part)' got other values, .* Does the tensor share memory"):
            load_student(tmp_path, student)


class Killed(BaseException):
    """Stands for the end of the process: no except clause of the library catches it."""


class Interrupt:
    """Raises at the n-th call of any of the functions that touch the disk."""

    def __init__(self, monkeypatch, number, error):
        self.left, self.error = number, error
        for name in ("fsync", "replace"):
            monkeypatch.setattr(os, name, self.wrap(getattr(os, name)))
        monkeypatch.setattr(safetensors_torch, "save_file", self.wrap(safetensors_torch.save_file))

    def wrap(self, function):
        def wrapped(*args, **kwargs):
            self.left -= 1
            if self.left == 0:
                raise self.error
            return function(*args, **kwargs)

        return wrapped


FULL = OSError(errno.ENOSPC, "No space left on device")
CALLS = 7  # save_file, fsync, fsync, replace, fsync, replace, fsync


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

    def test_a_read_only_folder(self, shared_folder):
        old, new = mlp(), mlp()
        save_student(old, shared_folder)
        with read_only(shared_folder):
            with pytest.raises(
                PermissionError,
                match=r"not written to .* that was there is unchanged: .*[Pp]ermission denied",
            ):
                save_student(new, shared_folder)
            assert same_state(load_student(shared_folder, mlp()), old)
        save_student(new, shared_folder)
        assert same_state(load_student(shared_folder, mlp()), new)

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
    def test_killed_while_safetensors_writes(self, tmp_path):
        """It writes to a file with a name of its own, as large as the student, and renames that."""
        old = module(x=torch.zeros(2_000_000))
        save_student(old, tmp_path)
        left = set()
        for slowness in (1, 2, 4, 8):  # on a busy machine the child writes later
            for i in range(1, 21):
                after = 0.00075 * i * slowness
                killing.run_child(lambda: save_student(module(x=torch.ones(2_000_000)), tmp_path), after)
                left |= {path.name for path in tmp_path.rglob(".tmp*")}
                assert load_student(tmp_path, module(x=torch.full((2_000_000,), 7.0))).x.unique().item() in (0, 1)
            if left:
                break
        assert left  # or the kills came too early or too late
        save_student(old, tmp_path)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["student.json", "student.safetensors"]

    @pytest.mark.parametrize("number", [5, 6, 7])
    def test_the_message_says_that_the_new_one_is_there(self, tmp_path, monkeypatch, number):
        save_student(mlp(), tmp_path)
        Interrupt(monkeypatch, number, FULL)
        with pytest.raises(OSError, match=r"the new student is in .* and can be loaded, but .*No space left") as caught:
            save_student(mlp(), tmp_path)
        assert caught.value.errno == errno.ENOSPC

    def test_the_count_of_calls_is_right(self, tmp_path, monkeypatch):
        Interrupt(monkeypatch, CALLS + 1, FULL)
        save_student(mlp(), tmp_path)

    def test_the_message_says_that_nothing_is_lost(self, tmp_path, monkeypatch):
        save_student(mlp(), tmp_path)
        Interrupt(monkeypatch, 2, FULL)
        with pytest.raises(OSError, match=r"not written to .* that was there is unchanged: .*No space left") as caught:
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
        assert "a student that was there is unchanged" in done.stdout
        assert f"errno {errno.EFBIG}" in done.stdout
        assert same_state(load_student(tmp_path, nn.Linear(8, 8)), old)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["student.json", "student.safetensors"]
