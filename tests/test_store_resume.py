"""A store whose building stops midway: errors, kills at every step and at random moments, full disks."""

import errno
import os
import signal
import time
from multiprocessing import get_context

import killing
import pytest
import torch
from killing import run_child
from stores import FILES, ROWS, TOP_K, Items, Stream, contents, logits_of, make_inputs, make_teacher, read_only
from torch.utils.data import DataLoader

from pydistill import SoftTargets
from pydistill.store import TeacherStore, writer
from pydistill.store.manifest import read_manifest


@pytest.fixture
def inputs():
    return make_inputs()


@pytest.fixture
def teacher():
    return make_teacher()


@pytest.fixture
def logits(inputs, teacher):
    return logits_of(teacher, inputs)


class Stop(Exception):
    pass


def stopping(teacher, after):
    """A teacher that raises after some batches; equal to its module for the store."""
    calls = []

    def stop(module, args):
        calls.append(len(args[0]))
        if len(calls) > after:
            raise Stop

    teacher.register_forward_pre_hook(stop)
    return calls


class TestResume:
    @pytest.fixture(autouse=True)
    def _sync_every_batch(self, monkeypatch):
        monkeypatch.setattr(writer, "_SECONDS_BETWEEN_SYNCS", 0.0)

    @pytest.fixture
    def whole(self, tmp_path, inputs, teacher):
        """The files of a build that nothing interrupted."""
        return contents(TeacherStore.build(tmp_path / "whole", teacher, inputs, batch_size=16, **TOP_K).folder)

    @pytest.mark.parametrize(
        "form",
        [
            lambda x: x,
            Items,
            lambda x: list(x.split(16)),
            lambda x: DataLoader(Items(x), batch_size=16),
            lambda x: DataLoader(Stream(x), batch_size=16),
        ],
    )
    def test_goes_on_after_an_error_in_the_teacher(self, tmp_path, inputs, teacher, whole, form):
        handle = stopping(teacher, after=4)
        teacher.train()
        call = {"data": form(inputs), "batch_size": 16} | TOP_K
        with pytest.raises(Stop):
            TeacherStore.build(tmp_path / "store", teacher, **call)
        assert teacher.training
        with pytest.raises(ValueError, match="is unfinished: it holds 64 of 150 rows"):
            TeacherStore.open(tmp_path / "store")
        del handle[:]
        teacher._forward_pre_hooks.clear()
        seen = stopping(teacher, after=99)
        TeacherStore.build(tmp_path / "store", teacher, **call)
        assert seen == [16] * 5 + [6]
        got = contents(tmp_path / "store")
        assert all(got[name] == whole[name] for name in FILES)

    def test_an_error_loses_nothing_even_between_syncs(self, tmp_path, inputs, teacher, monkeypatch):
        monkeypatch.setattr(writer, "_SECONDS_BETWEEN_SYNCS", 1e9)
        stopping(teacher, after=4)
        with pytest.raises(Stop):
            TeacherStore.build(tmp_path, teacher, inputs, batch_size=16)
        with pytest.raises(ValueError, match="is unfinished: it holds 64 of 150 rows"):
            TeacherStore.open(tmp_path)

    def test_zeros_among_the_first_rows_are_not_forgotten(self, tmp_path):
        probs = torch.tensor([[1.0, 0.0]] * 16 + [[0.5, 0.5]] * 32)
        calls = []

        def forest(batch):
            calls.append(len(batch))
            if len(calls) == 2:
                raise Stop
            return SoftTargets.from_probs(batch)

        with pytest.raises(Stop):
            TeacherStore.build(tmp_path, forest, probs, batch_size=16)
        with pytest.warns(UserWarning, match="cannot check that it was the same one"):
            built = TeacherStore.build(tmp_path, forest, probs, batch_size=16)
        assert calls == [16] * 4
        assert built[:].has_zeros

    def test_other_arguments_are_refused(self, tmp_path, inputs, teacher):
        stopping(teacher, after=1)
        with pytest.raises(Stop):
            TeacherStore.build(tmp_path, teacher, inputs, batch_size=16, k=3)
        with pytest.raises(ValueError, match="other k: k: 3 there, 4 here"):
            TeacherStore.build(tmp_path, teacher, inputs, k=4)

    def test_a_batch_size_that_does_not_fit_the_rows_written(self, tmp_path, inputs, teacher, logits):
        stopping(teacher, after=3)
        with pytest.raises(Stop):
            TeacherStore.build(tmp_path, teacher, list(inputs.split(16)), dtype="float32")
        teacher._forward_pre_hooks.clear()
        built = TeacherStore.build(tmp_path, teacher, list(inputs.split(100)), dtype="float32")
        torch.testing.assert_close(built[:].logits, logits, rtol=1e-5, atol=1e-5)

    def test_damage_to_the_rows_written_is_found_before_going_on(self, tmp_path, inputs, teacher):
        stopping(teacher, after=3)
        with pytest.raises(Stop):
            TeacherStore.build(tmp_path, teacher, inputs, batch_size=16)
        content = bytearray((tmp_path / "logits.npy").read_bytes())
        content[200] ^= 1
        (tmp_path / "logits.npy").write_bytes(content)
        teacher._forward_pre_hooks.clear()
        with pytest.raises(ValueError, match=r"is damaged: logits.npy"):
            TeacherStore.build(tmp_path, teacher, inputs, batch_size=16)

    def test_rows_are_synced_to_disk_before_the_manifest_records_them(self, tmp_path, inputs, teacher, monkeypatch):
        """A test cannot cut the power, so it checks the order of the calls."""
        dirty, calls, before = set(), [], []
        fsync, replace, write_at = os.fsync, os.replace, writer._write_at

        def note_write(file, offset, content):
            dirty.add(os.path.realpath(file.name))
            write_at(file, offset, content)

        def note_fsync(handle):
            path = os.path.realpath(f"/proc/self/fd/{handle}")
            dirty.discard(path)
            if path == os.path.realpath(tmp_path):
                calls.append("folder synced")
            fsync(handle)

        def note_replace(old, new):
            assert dirty == set()
            if new.exists():
                before.append((new.open(), new.read_text()))
            replace(old, new)
            calls.append("replaced")

        monkeypatch.setattr(writer, "_write_at", note_write)
        monkeypatch.setattr(os, "fsync", note_fsync)
        monkeypatch.setattr(os, "replace", note_replace)
        TeacherStore.build(tmp_path, teacher, inputs, batch_size=50, **TOP_K)
        assert calls == ["replaced", "folder synced"] * 4
        assert len(before) == 3
        for file, text in before:
            with file:
                assert file.read() == text  # not written over

    @pytest.mark.timeout(120)
    def test_killed_at_every_step(self, tmp_path, inputs, teacher):
        """Before and after each write, sync and replacement of a build, in turn."""

        def build(folder):
            TeacherStore.build(folder, teacher, inputs, batch_size=75, **TOP_K)

        build(tmp_path / "whole")
        want = contents(tmp_path / "whole")
        step, rows_found = 0, set()
        while True:
            folder = tmp_path / f"killed {step}"
            killed = run_child(lambda folder=folder, step=step: build_and_die_at(step, build, folder))
            if not killed:
                break
            if (folder / "manifest.json").exists():
                rows_found.add(read_manifest(folder)["rows_written"])
            build(folder)
            assert contents(folder) == want
            step += 1
        assert step > 50
        assert rows_found == {0, 75, 150}

    @pytest.mark.timeout(killing.TIMEOUT)
    def test_killed_at_random_moments(self, tmp_path, inputs, teacher):
        def build(folder):
            def slow(module, args):
                time.sleep(0.01)

            with teacher.register_forward_pre_hook(slow):
                TeacherStore.build(folder, teacher, inputs, batch_size=16, **TOP_K)

        def rows_written(folder):
            manifest = read_manifest(folder) if folder.exists() else None
            return manifest["rows_written"] if manifest else 0

        killing.kill_at_random_moments(build, contents, tmp_path, rows_written)

    @pytest.mark.timeout(60)
    def test_a_second_builder_waits_for_the_first(self, tmp_path, inputs, teacher, whole):
        def build():
            def slow(module, args):
                time.sleep(0.03)

            with teacher.register_forward_pre_hook(slow):
                TeacherStore.build(tmp_path / "store", teacher, inputs, batch_size=16, **TOP_K)

        first = get_context("fork").Process(target=build)
        first.start()
        while not (tmp_path / "store" / "manifest.json").exists():
            time.sleep(0.001)
        seen = stopping(teacher, after=0)
        TeacherStore.build(tmp_path / "store", teacher, inputs, batch_size=16, **TOP_K)
        first.join()
        assert (first.exitcode, seen) == (0, [])
        assert contents(tmp_path / "store") == whole


def build_and_die_at(step, build, folder):
    """Two steps to each operation: die before it, die after it."""
    count = 0

    def deadly(operation):
        def run(*args):
            nonlocal count
            if count == step:
                os.kill(os.getpid(), signal.SIGKILL)
            result = operation(*args)
            if count + 1 == step:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 2
            return result

        return run

    os.fsync, os.replace, os.posix_fallocate = map(deadly, (os.fsync, os.replace, os.posix_fallocate))
    writer._write_at = deadly(writer._write_at)
    build(folder)


class TestReadOnlyFolder:
    def test_a_new_store(self, shared_folder, inputs, teacher):
        with (
            read_only(shared_folder),
            pytest.raises(PermissionError, match="while writing the teacher store; the rows"),
        ):
            TeacherStore.build(shared_folder, teacher, inputs)
        assert not contents(shared_folder)

    def test_an_unfinished_one_and_a_finished_one(self, shared_folder, inputs, teacher):
        stopping(teacher, after=4)
        with pytest.raises(Stop):
            TeacherStore.build(shared_folder, teacher, inputs, batch_size=16)
        teacher._forward_pre_hooks.clear()
        before = contents(shared_folder)
        with read_only(shared_folder), pytest.raises(PermissionError, match="Permission denied"):
            TeacherStore.build(shared_folder, teacher, inputs, batch_size=16)
        assert contents(shared_folder) == before
        built = TeacherStore.build(shared_folder, teacher, inputs, batch_size=16)
        with read_only(shared_folder):
            again = TeacherStore.build(shared_folder, teacher, inputs, batch_size=16)  # nothing is left to write
            assert torch.equal(again[:].logits, built[:].logits)


class TestFullDisk:
    def test_space_for_all_rows_is_claimed_at_the_start(self, tmp_path, inputs, teacher):
        def build():
            import resource

            resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))  # a file may grow to 4000 bytes, of 6128
            calls = stopping(teacher, after=99)
            with pytest.raises(
                OSError, match="writing the teacher store; the rows already recorded are safe"
            ) as caught:
                TeacherStore.build(tmp_path, teacher, inputs, batch_size=16)
            assert caught.value.errno == errno.EFBIG
            assert calls == [16]

        assert not run_child(build)
        assert list(contents(tmp_path)) == ["manifest.json"]  # nothing that takes space
        with pytest.raises(ValueError, match=r"it holds 0 of 150 rows.*build starts again from the first row$"):
            TeacherStore.open(tmp_path)
        assert len(TeacherStore.build(tmp_path, teacher, inputs, k=3)) == ROWS  # fits, and is not refused

    @pytest.mark.parametrize("operation", ["_write_at", "replace_manifest"])
    def test_later(self, tmp_path, inputs, teacher, logits, monkeypatch, operation):
        monkeypatch.setattr(writer, "_SECONDS_BETWEEN_SYNCS", 0.0)
        calls, works = [], getattr(writer, operation)

        def fill_up(*args):
            calls.append(args)
            if len(calls) > 6:
                raise OSError(errno.ENOSPC, "No space left on device")
            works(*args)

        monkeypatch.setattr(writer, operation, fill_up)
        with pytest.raises(OSError, match=r"No space left on device, while writing the teacher store") as caught:
            TeacherStore.build(tmp_path, teacher, inputs, batch_size=16, dtype="float32")
        assert caught.value.errno == errno.ENOSPC
        rows = 96 if operation == "_write_at" else 80  # the first manifest is of no rows
        with pytest.raises(ValueError, match=f"is unfinished: it holds {rows} of 150 rows"):
            TeacherStore.open(tmp_path)
        monkeypatch.setattr(writer, operation, works)
        built = TeacherStore.build(tmp_path, teacher, inputs, batch_size=16, dtype="float32")
        torch.testing.assert_close(built[:].logits, logits, rtol=1e-5, atol=1e-5)

    def test_a_manifest_that_cannot_be_replaced_stays(self, tmp_path, inputs, teacher, monkeypatch):
        monkeypatch.setattr(writer, "_SECONDS_BETWEEN_SYNCS", 0.0)
        calls, replace = [], os.replace

        def fail_later(old, new):
            calls.append(new)
            if len(calls) > 3:
                raise OSError(errno.ENOSPC, "No space left on device")
            replace(old, new)

        monkeypatch.setattr(os, "replace", fail_later)
        with pytest.raises(OSError, match="while writing the teacher store"):
            TeacherStore.build(tmp_path, teacher, inputs, batch_size=16)
        assert read_manifest(tmp_path)["rows_written"] == 32
        assert sorted(contents(tmp_path)) == ["logits.npy", "manifest.json"]

    def test_a_write_that_takes_only_a_part(self, tmp_path):
        class Stingy:
            def __init__(self):
                self.content, self.at = bytearray(10), 0

            def seek(self, offset):
                self.at = offset

            def write(self, content):
                self.content[self.at : self.at + 3] = content[:3]
                self.at += len(content[:3])
                return len(content[:3])

        file = Stingy()
        writer._write_at(file, 2, memoryview(b"abcdefgh"))
        assert file.content == b"\0\0abcdefgh"
