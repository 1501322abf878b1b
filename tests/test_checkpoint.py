"""Checkpoints: a run that is killed and resumed ends as if it had not been; what is damaged is refused."""

import hashlib
import itertools
import os
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import killing
import pytest
import torch
from stores import read_only

import pydistill
from pydistill.callbacks import BestModel, EarlyStopping
from pydistill.trainer import checkpoint

pytest.importorskip("safetensors")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.timeout(killing.TIMEOUT + 30)
def test_killed_at_random_moments_and_resumed_is_bit_identical(tmp_path):
    script, package = Path(__file__).with_name("kill_trainer.py"), Path(pydistill.__file__).parents[1]
    path = os.pathsep.join([str(package), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, script, tmp_path],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=killing.TIMEOUT,
    )
    assert done.returncode == 0, done.stderr
    assert f"{killing.KILLS} kills in " in done.stdout
    print(done.stdout)


@pytest.fixture
def data():
    inputs, targets = torch.randn(40, 5), torch.randn(40, 3)
    return inputs, targets, targets.argmax(-1)


def trainer_in(folder, student=None, **options):
    torch.manual_seed(0)
    student = torch.nn.Linear(5, 3) if student is None else student
    return pydistill.Trainer(student, seed=0, progress=False, checkpoint_dir=folder, **options)


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.student.parameters()])


def test_resume_from_the_one_before_a_torn_checkpoint(tmp_path, data):
    whole = trainer_in(tmp_path / "whole")
    whole.fit(data, epochs=4, batch_size=16)
    trainer_in(tmp_path / "torn").fit(data, epochs=3, batch_size=16)
    newest, before = checkpoint.found(tmp_path / "torn")
    newest.write_bytes(newest.read_bytes()[:-10])
    resumed = trainer_in(tmp_path / "torn")
    with pytest.warns(UserWarning, match=f"{newest.name} is damaged"):
        history = resumed.fit(data, epochs=4, batch_size=16, resume=True)
    assert len(history) == 4
    assert torch.equal(weights(resumed), weights(whole))
    assert before.exists() is False  # two are kept


def test_no_whole_checkpoint_is_an_error(tmp_path, data):
    trainer_in(tmp_path).fit(data, epochs=2)
    for path in checkpoint.found(tmp_path):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    with (
        pytest.warns(UserWarning, match="damaged"),
        pytest.raises(ValueError, match="none of the 2 checkpoints"),
    ):
        trainer_in(tmp_path).fit(data, epochs=3, resume=True)


def test_a_full_disk_leaves_the_earlier_ones(tmp_path, data, monkeypatch):
    trainer_in(tmp_path).fit(data, epochs=2)
    before = checkpoint.found(tmp_path)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=r"checkpoint 3 was not written; earlier ones are intact.*No space left"):
        trainer_in(tmp_path).fit(data, epochs=3, resume=True)
    assert checkpoint.found(tmp_path) == before
    assert not list(tmp_path.glob("*.new"))


@pytest.mark.parametrize(
    ("name", "number", "message"),
    [
        ("fsync", 1, "was not written"),
        ("replace", 1, "was not written"),
        ("fsync", 2, "was written, but a power failure may undo that"),
    ],
)
def test_a_disk_that_fails_at_every_step(tmp_path, data, monkeypatch, name, number, message):
    trainer_in(tmp_path).fit(data, epochs=2)
    calls, works = [], getattr(os, name)

    def fail(*args):
        calls.append(args)
        if len(calls) == number:
            raise OSError(28, "No space left on device")
        return works(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, name, fail)
        with pytest.raises(OSError, match=rf"checkpoint 3 {message}; earlier ones are intact.*No space left"):
            trainer_in(tmp_path).fit(data, epochs=3, resume=True)
    assert not list(tmp_path.glob("*.new"))
    assert checkpoint.load_newest(tmp_path)["run"]["number"] == (2 if "not" in message else 3)
    assert len(trainer_in(tmp_path).fit(data, epochs=4, resume=True)) == 4


def test_a_read_only_folder(shared_folder, data):
    whole = trainer_in(shared_folder / "whole")
    whole.fit(data, epochs=3)
    folder = shared_folder / "run"
    trainer_in(folder).fit(data, epochs=2)
    (folder / "checkpoint-of-a-run-that-was-killed.safetensors.new").write_bytes(b"")
    with (
        read_only(folder),
        pytest.raises(PermissionError, match=r"checkpoint 3 was not written; earlier ones are intact"),
    ):
        trainer_in(folder).fit(data, epochs=3, resume=True)
    again = trainer_in(folder)
    again.fit(data, epochs=3, resume=True)
    assert torch.equal(weights(again), weights(whole))
    assert len(list(folder.iterdir())) == 2


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (
            {"student": torch.nn.Linear(5, 4)},
            {},
            r"another student: weight is torch.float32 \(3, 5\) in the checkpoint and .* \(4, 5\)",
        ),
        ({"student": torch.nn.Linear(5, 3, bias=False)}, {}, "another student: bias is only in the checkpoint"),
        ({"student": torch.nn.Linear(5, 3).double()}, {}, "another student: weight is torch.float32 .* torch.float64"),
        ({"callbacks": [BestModel()]}, {}, "made with 0 callbacks, got 1; pass the same callbacks"),
        ({}, {"batch_size": 8}, "made with batch_size=16, got 8"),
        ({"accumulate": 2}, {}, "made with accumulate=1, got 2"),
    ],
)
def test_another_run_is_refused(tmp_path, data, change, options, message):
    trainer_in(tmp_path).fit(data, epochs=1, batch_size=16)
    with pytest.raises(ValueError, match=message):
        trainer_in(tmp_path, **change).fit(data, **{"epochs": 2, "batch_size": 16, "resume": True} | options)
    with pytest.raises(ValueError, match="holds checkpoints of an earlier run"):
        trainer_in(tmp_path).fit(data, epochs=2, batch_size=16)
    assert len(checkpoint.found(tmp_path)) == 1


def test_resume_without_checkpoints_starts_anew(tmp_path, data):
    assert len(trainer_in(tmp_path / "new").fit(data, epochs=2, resume=True)) == 2
    with pytest.raises(ValueError, match="resume=True needs checkpoint_dir"):
        pydistill.Trainer(torch.nn.Linear(5, 3), progress=False).fit(data, epochs=1, resume=True)


def test_an_early_stop_stays_stopped(tmp_path, data):
    def make():
        options = {"callbacks": [EarlyStopping(patience=1, min_delta=1e9), BestModel()]}
        return trainer_in(tmp_path, **options)

    first = make()
    assert len(first.fit(data, epochs=9)) == 2  # the first epoch improves on nothing, the second does not
    again = make()
    assert len(again.fit(data, epochs=9, resume=True)) == 2
    assert torch.equal(weights(again), weights(first))


def test_more_epochs_go_on_after_a_stop(tmp_path, data):
    def stop(trainer, record):
        trainer.stop = record.epoch == 2

    whole = trainer_in(tmp_path / "whole")
    whole.fit(data, epochs=5)
    assert len(trainer_in(tmp_path / "stopped", callbacks=[stop]).fit(data, epochs=4)) == 2
    assert len(trainer_in(tmp_path / "stopped", callbacks=[stop]).fit(data, epochs=4, resume=True)) == 2
    longer = trainer_in(tmp_path / "stopped", callbacks=[stop])
    assert len(longer.fit(data, epochs=5, resume=True)) == 5
    assert torch.equal(weights(longer), weights(whole))


class Failing(torch.utils.data.Dataset):
    """Items that cannot be read from the second pass on, unless ``mended``."""

    def __init__(self, data):
        self.data, self.reads, self.mended = data, 0, False

    def __len__(self):
        return 40

    def __getitem__(self, row):
        self.reads += 1
        if self.reads > 60 and not self.mended:  # 10 are tried before the training
            raise RuntimeError("the disk is gone")
        return tuple(column[row] for column in self.data)


def test_a_validation_that_fails_does_not_lose_the_epoch(tmp_path, data):
    val = Failing(data)
    whole = trainer_in(tmp_path / "whole")
    loader = torch.utils.data.DataLoader(val, batch_size=10, shuffle=True)  # takes from torch's random numbers
    val.mended = True
    whole.fit(data, loader, epochs=4, batch_size=16)
    val.reads, val.mended = 0, False
    with pytest.raises(RuntimeError, match="the disk is gone"):
        trainer_in(tmp_path / "failed").fit(data, loader, epochs=4, batch_size=16)
    assert checkpoint.load_newest(tmp_path / "failed")["run"]["batch"] == 3  # all of the second epoch
    val.mended = True
    resumed = trainer_in(tmp_path / "failed")
    assert len(resumed.fit(data, loader, epochs=4, batch_size=16, resume=True)) == 4
    assert torch.equal(weights(resumed), weights(whole))


@pytest.mark.parametrize("every", [None, 1])
def test_the_last_finite_checkpoint_stays(tmp_path, data, every):
    class Breaks(torch.nn.Linear):
        """Finite outputs with a gradient of NaN, in the last of the 6 steps."""

        calls = 0

        def forward(self, x):
            self.calls += 1
            root = (self.weight.sum() * 0).sqrt() if self.calls == 6 else 0.0
            return super().forward(x) + root

    trainer = trainer_in(tmp_path, Breaks(5, 3), checkpoint_every=every)
    with pytest.raises(ValueError, match=r"weights must stay finite.*in epoch 2, step 6, under DistillationLoss\(\)"):
        trainer.fit(data, epochs=2, batch_size=16)
    assert not weights(trainer).isfinite().all()
    state = checkpoint.load_newest(tmp_path)
    assert state["run"]["steps"] == (5 if every else 3)
    assert state["student"]["weight"].isfinite().all()


def test_every_kind_of_value(tmp_path):
    state = {
        "a": [1, 2.5, None, True, "x"],
        "b": {3: (torch.arange(3), float("inf"))},
        "c": torch.zeros((), dtype=torch.bfloat16),
    }
    checkpoint.save(tmp_path, 1, state)
    got = checkpoint.load_newest(tmp_path)
    assert got["a"] == state["a"]
    assert list(got["b"]) == [3]
    assert isinstance(got["b"][3], tuple)
    assert torch.equal(got["b"][3][0], torch.arange(3))
    assert got["b"][3][1] == float("inf")
    assert got["c"].dtype == torch.bfloat16
    with pytest.raises(TypeError, match=r"state\.f is function"):
        checkpoint.save(tmp_path, 2, {"f": lambda: 0})


def run_state(folder, data):
    """A function that makes a Trainer with everything that a checkpoint can hold, and the state of its checkpoint."""

    def make():
        torch.manual_seed(0)
        student = torch.nn.Linear(5, 3)
        optimizer = torch.optim.Adam(student.parameters())
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        callbacks = [EarlyStopping(), BestModel(), lambda trainer, record: None]
        return pydistill.Trainer(
            student,
            optimizer=optimizer,
            scheduler=scheduler,
            callbacks=callbacks,
            seed=0,
            progress=False,
            checkpoint_dir=folder,
        )

    make().fit(data, data, epochs=2, batch_size=16)
    return make, checkpoint.load_newest(folder)


def save_alone(folder, state):
    for path in checkpoint.found(folder):
        path.unlink()
    return checkpoint.save(folder, 1, state)


def places(value, path=()):
    """The paths of all values in a tree."""
    if path:
        yield path
    if isinstance(value, dict | list | tuple):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(inner, (*path, key))


def changed(value, path, change):
    """A copy of a tree in which the parent of a place was changed there."""
    if len(path) > 1:
        inner = changed(value[path[0]], path[1:], change)
        path = path[:1]

        def change(parent, key):
            parent[key] = inner

    parent = dict(value) if isinstance(value, dict) else list(value)
    change(parent, path[0])
    return tuple(parent) if isinstance(value, tuple) else parent


def remove(parent, key):
    del parent[key]


CHANGED_STATES = [
    (("setup",), "has no setup"),
    (("setup", "seed"), "has no setup.seed"),
    (("run", "epoch"), "has no run.epoch"),
    (("run", "epoch_random"), "has no run.epoch_random"),
    (("totals", "soft_items"), "has no totals.soft_items"),
    (("history", 1, 2), r"has 3 items where history\[1\] must have 4"),
    (("history", 0, 2, 0), r"has 4 items where history\[0\]\[2\] must have 5"),
    (("optimizer", "param_groups", 0, "params"), r"has no optimizer.param_groups\[0\].params"),
    (("loss",), "has no loss"),
]


class TestChangedStates:
    """Checkpoints that are whole, and do not hold what a Trainer writes."""

    @pytest.mark.parametrize(("path", "message"), CHANGED_STATES)
    def test_what_is_missing_is_named(self, tmp_path, data, path, message):
        make, state = run_state(tmp_path, data)
        file = save_alone(tmp_path, changed(state, path, remove))
        trainer = make()
        before = deepcopy(trainer.student.state_dict())
        with pytest.raises(ValueError, match=rf"checkpoint {file} is damaged, or not one of this .*: it {message}$"):
            trainer.fit(data, data, epochs=3, batch_size=16, resume=True)
        assert all(torch.equal(x, before[name]) for name, x in trainer.student.state_dict().items())

    @pytest.mark.parametrize(
        ("path", "value", "message"),
        [
            (("run", "epoch"), "3", "has str where run.epoch must be int"),
            (("run", "batch"), True, "has bool where run.batch must be int"),
            (("run", "pages"), 3, "has run.pages, which this version does not have"),
            (("stopped",), 1.0, "has float where stopped must be int or NoneType"),
            (("history", 0, 2), "x", r"has str where history\[0\]\[2\] must be list or tuple"),
            (("random",), torch.zeros(7, dtype=torch.uint8), "has no state of torch's random generator in random: "),
            (("run", "epoch_random"), torch.zeros(7), "has no state of torch's random generator in run.epoch_random: "),
            (("callbacks",), {}, "has dict where callbacks must be list"),
        ],
    )
    def test_values_of_other_kinds_are_named(self, tmp_path, data, path, value, message):
        make, state = run_state(tmp_path, data)
        file = save_alone(
            tmp_path,
            changed(
                state,
                path,
                lambda parent, key: (
                    parent.update({key: value}) if isinstance(parent, dict) else parent.__setitem__(key, value)
                ),
            ),
        )
        with pytest.raises(ValueError, match=rf"checkpoint {file} is damaged, or not one of .*: it {message}"):
            make().fit(data, data, epochs=3, batch_size=16, resume=True)

    def test_any_place_of_the_state(self, tmp_path, data, monkeypatch):
        """If any entry is missing or of another type, the run goes on or a ValueError says what is wrong."""
        make, state = run_state(tmp_path, data)
        outcomes = []
        monkeypatch.setattr("os.fsync", lambda descriptor: None)  # of 5 seconds it would take 3
        for path, value in itertools.product(places(state), (remove, 3, None, {})):
            # What is inside Adam's state and the best weights is trusted: torch reads it without a check, in a step.
            if path[0] == "optimizer" and (path[1:2] == ("state",) or len(path) > 3):
                continue
            if path[0] == "callbacks" and (len(path) > 3 or value == {}):
                continue

            def change(parent, key, value=value):
                if value is remove:
                    del parent[key]
                else:
                    parent[key] = value

            save_alone(tmp_path, changed(state, path, change))
            try:
                make().fit(data, data, epochs=2, batch_size=16, resume=True)
                outcomes.append("goes on")
            except ValueError as error:
                outcomes.append("refused" if "checkpoint" in str(error) else f"{path}, {value}: {error}")
        assert set(outcomes) == {"goes on", "refused"}
        assert outcomes.count("refused") > 200

    @pytest.mark.parametrize(
        ("metadata", "message"),
        [
            (None, "its header has no __metadata__.state"),
            ({"other": "{}"}, "its header has no __metadata__.state"),
            ({"state": "{"}, "Expecting property name"),
            ({"state": "[" * 200_000}, "nested too deeply"),
            ({"state": '{"dict":[["a",' * 400 + "3" + "]]}" * 400}, "nested too deeply"),
            ({"state": '{"tensor": "nowhere"}'}, "state is neither a tensor of the file, a tuple nor a dict"),
            ({"state": '{"tensor": []}'}, "state is neither"),
            ({"state": '{"tuple": 3}'}, "state is neither"),
            ({"state": '{"dict": [["a", {"dict": [["b"]]}]]}'}, r"state\.a is neither"),
            ({"state": '{"dict": [[[1], 2]]}'}, "state is neither"),
            ({"state": '{"list": [], "dict": []}'}, "state is neither"),
            ({"state": "{}"}, "state is neither"),
            ({"state": "3"}, "has int where all of it must be dict"),
            ({"state": "null"}, "has NoneType where all of it must be dict"),
        ],
    )
    def test_files_with_the_right_checksum(self, tmp_path, data, metadata, message):
        content = checkpoint.safetensors_torch().save({"x": torch.zeros(1)}, metadata=metadata)
        self.check_refused(tmp_path, data, content, message)

    @pytest.mark.parametrize(
        "content",
        [b"", b"\0" * 8, b"\xff" * 64, b"\x02\0\0\0\0\0\0\0[]", "null", "unknown dtype"],
        ids=["empty", "short", "a header that is too long", "a list", "null", "unknown dtype"],
    )
    def test_other_files_with_the_right_checksum(self, tmp_path, data, content):
        if isinstance(content, str):
            dtype = '{"x":{"dtype":"F4","shape":[2],"data_offsets":[0,1]}}'
            header = dtype if content != "null" else '{"__metadata__":null}'
            content = len(header).to_bytes(8, "little") + header.encode() + b"\0" * (content != "null")
        self.check_refused(tmp_path, data, content, "pydistill: ")

    def check_refused(self, folder, data, content, message):
        digest = hashlib.sha256(content).hexdigest()[:32]
        path = folder / f"checkpoint-00000001-{digest}.safetensors"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"checkpoint {path} is damaged, or not one of .*{message}"):
            trainer_in(folder).fit(data, epochs=2, resume=True)

    def test_other_parts_of_the_trainer(self, tmp_path, data):
        make, _ = run_state(tmp_path, data)
        trainer = make()
        trainer.callbacks = trainer.callbacks[1:] + trainer.callbacks[:1]
        with pytest.raises(ValueError, match="other callbacks: number 1 is now function; pass the same ones"):
            trainer.fit(data, data, epochs=3, batch_size=16, resume=True)
        trainer = make()
        trainer.scheduler = None
        with pytest.raises(ValueError, match="was made with a scheduler; pass the same arguments"):
            trainer.fit(data, data, epochs=3, batch_size=16, resume=True)
        trainer = make()
        trainer.optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))]})
        with pytest.raises(
            ValueError, match="the checkpoint's optimizer cannot be loaded into the one given: ValueError"
        ):
            trainer.fit(data, data, epochs=3, batch_size=16, resume=True)
        trainer_in(tmp_path / "plain").fit(data, epochs=1)
        plain = trainer_in(tmp_path / "plain")
        plain.scheduler = torch.optim.lr_scheduler.StepLR(plain.optimizer, 1)
        with pytest.raises(ValueError, match="was made without a scheduler"):
            plain.fit(data, epochs=2, resume=True)


def test_what_cannot_be_read_again_is_not_written(tmp_path):
    for state, message in (
        ({(1, 2): 3}, r"keys that are strings or numbers; state has \(1, 2\)"),
        ({"x": [torch.eye(2).to_sparse()]}, r"dense tensors; state.x.0 is torch.sparse_coo"),
        ({"x": torch.zeros(2, dtype=torch.complex128)}, "dtypes that safetensors has; one is torch.complex128"),
    ):
        with pytest.raises(TypeError, match=message):
            checkpoint.save(tmp_path / "new", 1, state)
    assert not (tmp_path / "new").exists()


def test_keys_with_dots(tmp_path):
    state = {"a.b": torch.tensor(1), "a": {"b": torch.tensor(2)}, 1: torch.tensor(3), "1": torch.tensor(4)}
    checkpoint.save(tmp_path, 1, state)
    got = checkpoint.load_newest(tmp_path)
    assert [got["a.b"].item(), got["a"]["b"].item(), got[1].item(), got["1"].item()] == [1, 2, 3, 4]


def test_a_conjugate_view(tmp_path):
    x = torch.tensor([1 + 2j])
    checkpoint.save(tmp_path, 1, {"x": x.conj()})
    assert checkpoint.load_newest(tmp_path)["x"].tolist() == [1 - 2j]


def test_a_damaged_checkpoint_does_not_push_out_a_whole_one(tmp_path, data):
    """A run that goes on from the one before it gives its next checkpoint the same number."""
    trainer_in(tmp_path).fit(data, epochs=3, batch_size=16)
    for _ in range(6):  # a name's place among those of the same number depends on its hash
        newest = checkpoint.found(tmp_path)[0]
        newest.write_bytes(newest.read_bytes()[:-10])
        with pytest.warns(UserWarning, match="is damaged"):
            trainer_in(tmp_path).fit(data, epochs=4, batch_size=16, resume=True)
        whole = [x for x in checkpoint.found(tmp_path) if x != newest]
        assert len(whole) == 2
