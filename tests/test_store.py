"""The store: what it holds, what it refuses, what it says of damage. test_store_resume.py stops it midway."""

import json
import math
import pickle
import random
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from stores import (
    CLASSES,
    FEATURES,
    FILES,
    ROWS,
    TOP_K,
    Items,
    K,
    Stream,
    assert_same_targets,
    contents,
    logits_of,
    make_inputs,
    make_teacher,
)
from torch import nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    SequentialSampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)

import pydistill
from pydistill import SoftTargets
from pydistill.store import TeacherStore
from pydistill.store.manifest import read_manifest, replace_manifest


@pytest.fixture
def inputs():
    return make_inputs()


@pytest.fixture
def teacher():
    return make_teacher()


@pytest.fixture
def logits(inputs, teacher):
    return logits_of(teacher, inputs)


class TestContents:
    @pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
    def test_dense_logits_are_the_teachers_rounded_once(self, tmp_path, inputs, teacher, logits, dtype):
        built = TeacherStore.build(tmp_path, teacher, inputs, dtype=dtype, batch_size=ROWS)
        assert_same_targets(built[:], SoftTargets.from_logits(logits.to(getattr(torch, dtype))))
        assert (len(built), built.shape) == (ROWS, (ROWS, CLASSES))
        on_disk = np.load(tmp_path / "logits.npy")
        assert on_disk.dtype == {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}[dtype]
        assert json.loads((tmp_path / "manifest.json").read_text())["layout"]["dtype"] == dtype

    @pytest.mark.parametrize("tail", ["bucket", "renormalize"])
    def test_top_k_in_float32_is_top_k(self, tmp_path, inputs, teacher, logits, tail):
        options = TOP_K | {"tail": tail}
        built = TeacherStore.build(tmp_path, teacher, inputs, dtype="float32", batch_size=ROWS, **options)
        assert_same_targets(built[:], pydistill.top_k(logits, K, (1.0, 2.0), tail=tail))
        assert np.load(tmp_path / "indices.npy").dtype == np.int32
        assert built[:3].indices.dtype == torch.int64

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    def test_half_top_k_keeps_the_rest_of_the_mass(self, tmp_path, inputs, teacher, logits, dtype):
        built = TeacherStore.build(tmp_path, teacher, inputs, dtype=dtype, batch_size=ROWS, **TOP_K)
        got, want = built[:], pydistill.top_k(logits, K, (1.0, 2.0), tail="bucket")
        assert torch.equal(got.indices, want.indices)
        assert (got.logits.amax(-1) == 0).all()
        step = torch.finfo(got.logits.dtype).eps
        for t in (1.0, 2.0):
            kept = [(x.logits.double() / t).logsumexp(-1) - x.log_partitions[t] for x in (got, want)]
            torch.testing.assert_close(*kept, rtol=0, atol=1e-12)
            p = [(x.logits.double() / t - x.log_partitions[t][:, None]).exp() for x in (got, want)]
            assert (p[0] - p[1]).abs().max() < step  # relative to the distance from the largest, not to the logit
        assert logits.abs().max() > 8  # where rounding the logits themselves would be eight times as coarse

    def test_losses_from_the_store_are_the_teachers(self, tmp_path, inputs, teacher, logits):
        built = TeacherStore.build(tmp_path, teacher, inputs, **TOP_K)
        student = torch.randn(ROWS, CLASSES)
        for t in (1.0, 2.0):
            want = pydistill.top_k(logits, K, (t,), tail="bucket")
            losses = [pydistill.distillation_loss(student, x, alpha=1.0, temperature=t) for x in (built[:], want)]
            torch.testing.assert_close(*losses, rtol=1e-3, atol=0)
        with pytest.raises(ValueError, match=r"log-partition at temperature 3; stored: 1, 2"):
            pydistill.distillation_loss(student, built[:], alpha=1.0, temperature=3.0)

    def test_more_dimensions(self, tmp_path):
        tokens = torch.randint(50, (ROWS, 7))
        model = nn.Embedding(50, CLASSES)
        built = TeacherStore.build(tmp_path, model, tokens, dtype="float32", batch_size=64, **TOP_K)
        want = pydistill.top_k(model(tokens), K, (1.0, 2.0), tail="bucket")
        assert built.shape == (ROWS, 7, CLASSES)
        assert_same_targets(built[[3, 149]], want[[3, 149]])
        assert_same_targets(built[4], want[4])

    def test_probabilities_with_zeros_stay_such(self, tmp_path):
        probs = torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]]).repeat(20, 1)
        built = TeacherStore.build(tmp_path, SoftTargets.from_probs, probs, dtype="float32", batch_size=16)
        assert_same_targets(built[:], SoftTargets.from_probs(probs))
        assert built[1].has_zeros
        with pytest.raises(ValueError, match="mse compares logits"):
            pydistill.distillation_loss(torch.zeros(40, 3), built[:], alpha=1.0, divergence="mse")

    def test_top_k_of_a_callable_is_stored_as_it_is(self, tmp_path, inputs, logits):
        def cached(batch):
            return pydistill.top_k(batch @ torch.eye(FEATURES), 3, (4.0,), tail="bucket")

        built = TeacherStore.build(tmp_path, cached, inputs, dtype="float32", batch_size=64)
        assert_same_targets(built[:], cached(inputs))
        assert "k=3, tail='bucket', temperatures=(4)" in repr(built)

    def test_repr(self, tmp_path, inputs, teacher):
        built = TeacherStore.build(tmp_path, teacher, inputs)
        assert repr(built) == f"TeacherStore({str(tmp_path)!r}, shape=(150, 20), dtype=float16)"


class TestData:
    @pytest.mark.parametrize(
        "form",
        [
            lambda x: x.numpy(),
            lambda x: (x, torch.zeros(ROWS)),
            lambda x: TensorDataset(x, torch.zeros(ROWS)),
            lambda x: Items(x),
            lambda x: Stream(x),
            lambda x: DataLoader(TensorDataset(x), batch_size=64),
            lambda x: DataLoader(Items(x), batch_size=64),
            lambda x: DataLoader(Stream(x), batch_size=64),
            lambda x: list(x.split(64)),
            lambda x: [[batch, None] for batch in np.split(x.numpy(), [64, 128])],
        ],
    )
    def test_every_form_gives_the_same_rows(self, tmp_path, inputs, teacher, form):
        want = TeacherStore.build(tmp_path / "tensor", teacher, inputs, batch_size=64)
        data = form(inputs)
        built = TeacherStore.build(tmp_path / "other", teacher, data, batch_size=64)
        assert_same_targets(built[:], want[:])
        assert_same_targets(TeacherStore.open(tmp_path / "other", data=data)[:], want[:])

    @pytest.mark.parametrize(
        "form",
        [
            lambda x: x.numpy(),
            lambda x: TensorDataset(x),
            lambda x: DataLoader(TensorDataset(x), batch_size=9),
            lambda x: list(x.split(40)),
        ],
    )
    def test_forms_whose_every_byte_is_read_have_one_fingerprint(self, tmp_path, inputs, teacher, form):
        TeacherStore.build(tmp_path, teacher, inputs)
        TeacherStore.open(tmp_path, data=form(inputs))
        changed = inputs.clone()
        changed[77, 3] += 1e-6
        for other in (changed, inputs[:-1], inputs.double(), inputs.reshape(ROWS, 2, 3)):
            with pytest.raises(ValueError, match="built with other data: data: 'all of 150 rows"):
                TeacherStore.open(tmp_path, data=form(other))

    def test_a_dataset_is_known_by_a_sample(self, tmp_path, inputs, teacher):
        TeacherStore.build(tmp_path, teacher, Items(inputs))
        TeacherStore.open(tmp_path, data=DataLoader(Items(inputs), batch_size=7))
        for other in (Items(inputs, change=0), Items(inputs, change=ROWS - 1), Items(inputs[:-1])):
            with pytest.raises(ValueError, match="a sample of 150 items"):
                TeacherStore.open(tmp_path, data=other)

    def test_module_sees_eval_mode_without_gradients_and_gets_its_modes_back(self, tmp_path, inputs):
        seen = []

        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.head, self.frozen = nn.Linear(FEATURES, CLASSES), nn.Dropout().eval()

            def forward(self, x):
                seen.append((self.training, torch.is_inference_mode_enabled(), len(x), type(x)))
                return self.head(x)

        model = Model()
        TeacherStore.build(tmp_path, model, inputs.numpy(), batch_size=64)
        assert seen == [(False, True, rows, torch.Tensor) for rows in (64, 64, 22)]
        assert (model.training, model.head.training, model.frozen.training) == (True, True, False)

    @pytest.mark.parametrize("form", [lambda x: x, torch.from_numpy, lambda x: Items(torch.from_numpy(x))])
    def test_module_gets_floats_in_its_own_dtype(self, tmp_path, inputs, teacher, logits, form):
        built = TeacherStore.build(tmp_path, teacher, form(inputs.double().numpy()), dtype="float32")
        torch.testing.assert_close(built[:].logits, logits)

    def test_callable_gets_batches_as_the_data_has_them(self, tmp_path, inputs):
        seen = []

        def forest(batch):
            seen.append((type(batch), torch.is_grad_enabled()))
            return np.asarray(batch) @ np.eye(FEATURES)

        TeacherStore.build(tmp_path / "array", forest, inputs.numpy())
        TeacherStore.build(tmp_path / "tensor", forest, inputs)
        assert seen == [(np.ndarray, False), (torch.Tensor, False)]

    def test_datasets_that_keep_tensors_get_ordinary_ones(self, tmp_path, inputs, teacher):
        made = []

        class Caching(Items):
            def __getitem__(self, i):
                made.append(self.inputs[i] * 2)
                return made[-1]

        TeacherStore.build(tmp_path, teacher, Caching(inputs))
        assert not any(x.is_inference() for x in made)

    def test_random_state_is_left_alone(self, tmp_path, inputs, teacher):
        state = torch.random.get_rng_state()
        TeacherStore.build(tmp_path, teacher, Items(inputs))
        assert torch.equal(torch.random.get_rng_state(), state)

    def test_probabilities_as_logits_are_warned_of(self, tmp_path, inputs):
        with pytest.warns(UserWarning, match="teacher looks like probabilities"):
            TeacherStore.build(tmp_path, lambda x: x.softmax(-1), inputs)

    def test_memory_holds_one_batch(self, tmp_path):
        script = """if True:
            import sys
            from pathlib import Path
            import torch
            from pydistill.store import TeacherStore

            def status(field):
                lines = Path("/proc/self/status").read_text().splitlines()
                return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024

            torch.set_num_threads(1)
            teacher, inputs = torch.nn.Linear(4, 2000), torch.randn(10_000, 4)
            TeacherStore.build(sys.argv[1] + "/warm", teacher, inputs[:512], dtype="float32")
            Path("/proc/self/clear_refs").write_text("5")
            before = status("VmRSS")
            TeacherStore.build(sys.argv[1] + "/store", teacher, inputs, dtype="float32")
            print((status("VmHWM") - before) / (4 * 10_000 * 2000))
        """
        command = [sys.executable, "-c", script, tmp_path]
        done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=True, cwd=tmp_path)
        assert (tmp_path / "store" / "logits.npy").stat().st_size > 80e6
        assert float(done.stdout) < 0.2


class TestIndexing:
    @pytest.fixture(params=["float16", "bfloat16"])
    def built(self, request, tmp_path, inputs, teacher):
        return TeacherStore.build(tmp_path, teacher, inputs, dtype=request.param, **TOP_K)

    @pytest.mark.parametrize(
        "rows",
        [
            0,
            -1,
            np.int32(7),
            torch.tensor(149),
            slice(None),
            slice(10, 100, 7),
            slice(-5, None),
            slice(0, 0),
            [3, 3, -150],
            [],
            np.array([5, 2], np.uint8),
            torch.tensor([149, 0, -3]),
            torch.tensor([], dtype=torch.int64),
            torch.arange(6, dtype=torch.int32).reshape(2, 3),
            torch.arange(ROWS) % 4 == 1,
            np.arange(ROWS) > 200,
        ],
    )
    def test_every_form_of_index(self, built, rows):
        everything = built[0:ROWS]
        in_torch = rows if isinstance(rows, slice | torch.Tensor) else torch.as_tensor(np.asarray(rows).tolist())
        in_torch = in_torch.long() if isinstance(rows, list) else in_torch  # torch makes [] floats
        assert_same_targets(built[rows], everything[in_torch])

    def test_rows_as_scikit_learn_asks_for_them(self, built):
        assert_same_targets(built[np.array([3, 1]), ...], built[[3, 1]])

    def test_steps_backwards(self, built):
        assert_same_targets(built[::-50], built[[149, 99, 49]])

    def test_iteration_ends(self, built):
        assert sum(len(row.logits) for row in built) == ROWS * K

    @pytest.mark.parametrize(
        ("rows", "error", "message"),
        [
            (150, IndexError, r"rows must be in \[-150, 150\), since the store has 150 rows; got 150"),
            (-151, IndexError, "got -151"),
            ([0, 1, 400, 500], IndexError, "got 400"),
            (torch.tensor([[0], [-200]]), IndexError, "got -200"),
            (torch.ones(149, dtype=torch.bool), IndexError, "mask must have one entry for each of the 150 rows"),
            (1.0, TypeError, "rows must be integers, a slice or a mask, got float of float64"),
            (torch.ones(3), TypeError, "got Tensor of float32"),
            (True, TypeError, "got bool"),
            (None, TypeError, "got NoneType"),
            ((1, 2), TypeError, r"got a tuple \(int, int\)$"),
            ((np.arange(150), 2), TypeError, r"got a tuple \(ndarray, int\)$"),
        ],
    )
    def test_errors(self, built, rows, error, message):
        with pytest.raises(error, match=message):
            built[rows]

    @pytest.mark.parametrize("rows", [slice(0, 3), [0, 1, 2], 0])
    def test_what_it_gives_is_a_copy(self, built, rows):
        before = contents(built.folder)
        batch = built[rows]
        batch.logits.fill_(7)
        batch.indices.fill_(7)
        batch.log_partitions[1.0].fill_(7)
        assert (built[0].logits != 7).all()
        assert contents(built.folder) == before


class TestSharing:
    def test_pickle_is_a_path_and_reopens(self, tmp_path, inputs, teacher, monkeypatch):
        built = TeacherStore.build(tmp_path / "store", teacher, inputs, **TOP_K)
        monkeypatch.chdir(tmp_path)
        relative = TeacherStore.open("store")
        monkeypatch.chdir("/")
        for original in (built, relative):
            pickled = pickle.dumps(original)
            assert len(pickled) < 1000
            assert_same_targets(pickle.loads(pickled)[:], built[:])

    def test_pickle_of_a_store_that_was_replaced_is_refused(self, tmp_path, inputs, teacher):
        pickled = pickle.dumps(TeacherStore.build(tmp_path, teacher, inputs))
        for path in tmp_path.iterdir():
            path.unlink()
        TeacherStore.build(tmp_path, teacher, inputs + 1)
        with pytest.raises(ValueError, match="was replaced after it was pickled"):
            pickle.loads(pickled)

    @pytest.mark.timeout(120)
    def test_data_loader_workers(self, tmp_path, inputs, teacher):
        built = TeacherStore.build(tmp_path, teacher, inputs, **TOP_K)
        loader = DataLoader(
            Targets(built), batch_size=None, sampler=[0, 100, 50], num_workers=2, multiprocessing_context="fork"
        )
        for first, (logits, indices) in zip([0, 100, 50], loader, strict=True):
            assert torch.equal(logits, built[first : first + 50].logits)
            assert torch.equal(indices, built[first : first + 50].indices)

    def test_files_are_read_only_maps(self, tmp_path, inputs, teacher):
        TeacherStore.build(tmp_path, teacher, inputs)
        for path in tmp_path.iterdir():
            path.chmod(0o444)
        tmp_path.chmod(0o555)
        try:
            opened = TeacherStore.open(tmp_path)
            assert not any(array.flags.writeable for array in opened._arrays)
            assert opened[0].logits.isfinite().all()
        finally:
            tmp_path.chmod(0o755)


class Targets(Dataset):
    def __init__(self, built):
        self.built = built

    def __getitem__(self, first):
        targets = self.built[first : first + 50]
        return targets.logits, targets.indices


class Batches:
    """An iterable that starts anew each time."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


class TestStale:
    def test_the_same_call_opens_a_finished_store_without_the_teacher(self, tmp_path, inputs, teacher):
        TeacherStore.build(tmp_path, teacher, inputs, **TOP_K)
        before = contents(tmp_path)
        teacher.forward = None
        TeacherStore.build(tmp_path, teacher, inputs.numpy(), batch_size=9, **TOP_K)
        assert contents(tmp_path) == before

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"data": torch.zeros(ROWS, FEATURES)}, "other data: data: 'all of 150 rows"),
            ({"teacher": nn.Linear(FEATURES, CLASSES)}, "other teacher: teacher: 'a module, sha256"),
            ({"teacher": abs}, "other teacher: .*there, 'a callable' here"),
            ({"k": 4}, "other k: k: 5 there, 4 here"),
            ({"k": None}, "other k and temperatures and tail"),
            ({"temperatures": (1.0, 3.0)}, r"other temperatures: temperatures: \[1.0, 2.0\] there"),
            ({"tail": "renormalize"}, "other tail: tail: 'bucket' there"),
            ({"dtype": "float32", "k": 4}, "other k and dtype"),
        ],
    )
    def test_another_call_is_refused_and_changes_nothing(self, tmp_path, inputs, teacher, change, message):
        call = TOP_K | {"teacher": teacher, "data": inputs, "dtype": "float16"}
        TeacherStore.build(tmp_path, **call)
        before = contents(tmp_path)
        with pytest.raises(ValueError, match=f"was built with {message}"):
            TeacherStore.build(tmp_path, **(call | change))
        assert contents(tmp_path) == before

    def test_open_with_data_and_teacher(self, tmp_path, inputs, teacher):
        TeacherStore.build(tmp_path, teacher, inputs)
        TeacherStore.open(tmp_path, data=inputs, teacher=teacher)
        with torch.no_grad():
            teacher[0].bias[0] += 1e-6
        with pytest.raises(ValueError, match="built with other teacher: teacher: 'a module"):
            TeacherStore.open(tmp_path, data=inputs, teacher=teacher)
        with pytest.raises(ValueError, match="built with other data and teacher: "):
            TeacherStore.open(tmp_path, data=inputs + 1, teacher=teacher)
        TeacherStore.open(tmp_path)

    def test_teachers_differ_by_names_shapes_and_dtypes_too(self, tmp_path, inputs):
        zeros = nn.Linear(4, 9, bias=False)
        nn.init.zeros_(zeros.weight)
        TeacherStore.build(tmp_path, zeros, inputs[:, :4])
        for other in (nn.Linear(9, 4, bias=False), nn.Linear(4, 9, bias=False).double(), nn.Embedding(9, 4)):
            nn.init.zeros_(other.weight)
            if isinstance(other, nn.Embedding):
                other = nn.Sequential(other)
            with pytest.raises(ValueError, match="other teacher"):
                TeacherStore.open(tmp_path, teacher=other)

    def test_a_callable_is_not_checked_and_a_warning_says_so(self, tmp_path, inputs):
        TeacherStore.build(tmp_path, torch.relu, inputs)
        with pytest.warns(UserWarning, match="cannot check that it was the same one"):
            TeacherStore.open(tmp_path, teacher=torch.sigmoid)
        with pytest.warns(UserWarning, match=r'Pass fingerprint="..."'):
            TeacherStore.build(tmp_path, torch.sigmoid, inputs)

    def test_a_fingerprint_stands_for_a_callable(self, tmp_path, inputs, teacher, recwarn):
        TeacherStore.build(tmp_path, torch.relu, inputs, fingerprint="relu")
        TeacherStore.build(tmp_path, torch.relu, inputs, fingerprint="relu")
        TeacherStore.open(tmp_path, teacher=torch.relu, fingerprint="relu")
        for given in ("sigmoid", None):
            with pytest.raises(ValueError, match="other teacher: teacher: 'a callable, relu' there"):
                TeacherStore.build(tmp_path, torch.sigmoid, inputs, fingerprint=given)
        with pytest.raises(TypeError, match="fingerprint must be a string that stands for a callable teacher, got 1"):
            TeacherStore.open(tmp_path, teacher=torch.relu, fingerprint=1)
        with pytest.raises(TypeError, match="stands for a callable teacher, got 'mine'"):
            TeacherStore.open(tmp_path, teacher=teacher, fingerprint="mine")
        assert not recwarn

    @pytest.mark.parametrize("top", [False, True])
    def test_targets_of_rows(self, tmp_path, inputs, logits, top):
        def form(x):
            return pydistill.top_k(x, K, (2.0,), tail="bucket") if top else SoftTargets.from_log_probs(x)

        logits[7, 3] = -math.inf
        targets = form(logits)
        built = TeacherStore.build(tmp_path, targets, inputs, dtype="float32", batch_size=64)
        assert_same_targets(built[:], targets)
        TeacherStore.open(tmp_path, data=inputs, teacher=targets)
        logits[149, 0] += 1
        for other in (form(logits), SoftTargets.from_logits(logits[:, :10])):
            with pytest.raises(ValueError, match="other teacher: teacher: 'SoftTargets, sha256"):
                TeacherStore.build(tmp_path, other, inputs, dtype="float32")
        with pytest.raises(ValueError, match="teacher must have one row for each of the 150 rows of data, got 9 rows"):
            TeacherStore.build(tmp_path / "new", targets[:9], inputs)

    @pytest.mark.parametrize("data", [lambda x: x, lambda x: x.numpy()])
    def test_a_fitted_classifier(self, tmp_path, inputs, data):
        ensemble = pytest.importorskip("sklearn.ensemble")
        labels = (inputs[:, 0] > 0).long().numpy()
        for make in (ensemble.RandomForestClassifier, ensemble.HistGradientBoostingClassifier):
            folder = tmp_path / make.__name__
            classifier = make(random_state=0).fit(inputs.numpy(), labels)
            built = TeacherStore.build(folder, classifier, data(inputs), dtype="float32", batch_size=64)
            assert_same_targets(built[:], pydistill.teachers.teacher_outputs(classifier, inputs.numpy()))
            TeacherStore.open(folder, teacher=pickle.loads(pickle.dumps(classifier)))
            other = make(random_state=1).fit(inputs.numpy()[:99], labels[:99])
            with pytest.raises(ValueError, match=f"other teacher: teacher: 'a {make.__name__}, .*' there"):
                TeacherStore.build(folder, other, data(inputs), dtype="float32")


class TestDamage:
    @pytest.fixture
    def built(self, tmp_path, inputs, teacher):
        return TeacherStore.build(tmp_path, teacher, inputs, **TOP_K)

    def test_files(self, built):
        assert sorted(contents(built.folder)) == sorted([*FILES, "manifest.json"])

    @pytest.mark.parametrize("name", FILES)
    def test_flipped_bit(self, built, name):
        path = built.folder / name
        good = path.read_bytes()
        places = {0, 7, 127, 128, len(good) - 1, *random.Random(0).sample(range(len(good)), 20)}
        for place in sorted(places):
            bad = bytearray(good)
            bad[place] ^= 1 << place % 8
            path.write_bytes(bad)
            with pytest.raises(ValueError, match=rf"is damaged: {name} does not have the bytes"):
                TeacherStore.open(built.folder)
        path.write_bytes(good)
        TeacherStore.open(built.folder)

    @pytest.mark.parametrize("verify", [True, False])
    @pytest.mark.parametrize("name", FILES)
    def test_size(self, built, name, verify):
        path = built.folder / name
        good = path.read_bytes()
        for bad in (good[:-1], good[:60], b"", good + b"\0"):
            path.write_bytes(bad)
            message = rf"is damaged: {name} has {len(bad)} bytes instead of {len(good)}"
            with pytest.raises(ValueError, match=message):
                TeacherStore.open(built.folder, verify=verify)
        path.unlink()
        with pytest.raises(ValueError, match=f"is damaged: {name} is missing"):
            TeacherStore.open(built.folder, verify=verify)

    def test_without_verify_only_sizes_and_headers_are_checked(self, built):
        path = built.folder / "logits.npy"
        good = path.read_bytes()
        path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        TeacherStore.open(built.folder, verify=False)
        path.write_bytes(good.replace(b"<f2", b"<i2"))
        with pytest.raises(ValueError, match=r"is damaged: logits.npy holds int16"):
            TeacherStore.open(built.folder, verify=False)
        path.write_bytes(b"\0" + good[1:])
        with pytest.raises(ValueError, match=r"is damaged: logits.npy has no .npy header"):
            TeacherStore.open(built.folder, verify=False)

    @pytest.mark.parametrize(
        "change",
        [
            lambda text: text[: len(text) // 2],
            lambda text: "",
            lambda text: "[]",
            lambda text: "null",
            lambda text: "{}",
            lambda text: text.replace("2.0", "3.0"),
            lambda text: text.replace("bucket", "bicket"),
            lambda text: text.replace('"rows_written": 150', '"rows_written": 149'),
            lambda text: text.replace('"checksum": ', '"checksum": 1'),
            lambda text: "\udcff" + text,
        ],
    )
    def test_manifest(self, built, change):
        path = built.folder / "manifest.json"
        good = path.read_text()
        assert change(good) != good
        path.write_text(change(good), errors="surrogateescape")
        with pytest.raises(ValueError, match=r"is damaged: manifest.json is not a manifest, or was changed"):
            TeacherStore.open(built.folder)

    def test_manifest_that_is_nested_deeply(self, built):
        for text in ("[" * 200_000, '{"checksum": 3, "format": ' + "[" * 900 + "]" * 900 + "}"):
            (built.folder / "manifest.json").write_text(text)
            with pytest.raises(ValueError, match=r"is damaged: manifest.json is not a manifest, or was changed"):
                TeacherStore.open(built.folder)

    def check_changed_manifest(self, built, inputs, teacher, path, change, message):
        manifest = read_manifest(built.folder)
        parent = manifest
        for key in path[:-1]:
            parent = parent[key]
        change(parent, path[-1])
        replace_manifest(built.folder, manifest)  # with the right checksum
        before = contents(built.folder)
        for call in (
            lambda: TeacherStore.open(built.folder),
            lambda: TeacherStore.open(built.folder, verify=False),
            lambda: TeacherStore.build(built.folder, teacher, inputs, **TOP_K),
        ):
            with pytest.raises(ValueError, match=rf"is damaged: manifest.json {message}\. Delete"):
                call()
        assert contents(built.folder) == before

    @pytest.mark.parametrize(
        "path",
        [
            ("format",),
            ("request",),
            *(("request", key) for key in ("k", "temperatures", "tail", "dtype", "data", "teacher")),
            ("layout",),
            *(("layout", key) for key in ("shape", "dtype", "k", "temperatures", "tail")),
            ("rows_written",),
            ("has_zeros",),
            ("files",),
            *(("files", "logits.npy", key) for key in ("header", "row_bytes", "crc32")),
        ],
    )
    def test_manifest_that_lacks_a_key(self, built, inputs, teacher, path):
        def remove(parent, key):
            del parent[key]

        self.check_changed_manifest(built, inputs, teacher, path, remove, f"has no {re.escape('.'.join(path))}")

    @pytest.mark.parametrize(
        ("path", "value", "message"),
        [
            (("request",), [], "has list where request must be dict"),
            (("request", "data"), None, "has NoneType where request.data must be str"),
            (("layout", "shape"), 3, "has int where layout.shape must be list"),
            (("layout", "shape"), [150, "20"], r"has str where layout.shape\[1\] must be int"),
            (("layout", "shape"), [150], r"has \[150\] as layout.shape"),
            (("layout", "shape"), [150, 0], r"has \[150, 0\] as layout.shape"),
            (("layout", "dtype"), "float64", "has 'float64' as layout.dtype"),
            (("layout", "k"), 21, "has 21 as layout.k, of 20 classes"),
            (("layout", "k"), 0, "has 0 as layout.k, of 20 classes"),
            (("layout", "k"), 5.0, "has float where layout.k must be int or NoneType"),
            (("layout", "k"), None, "has 'bucket' as layout.tail"),
            (("layout", "tail"), None, "has None as layout.tail"),
            (("layout", "tail"), "bicket", "has 'bicket' as layout.tail"),
            (("layout", "temperatures"), [1.0, math.nan], r"has \[1.0, nan\] as layout.temperatures"),
            (
                ("layout", "temperatures"),
                [1.0, None],
                r"has NoneType where layout.temperatures\[1\] must be int or float",
            ),
            (("rows_written",), "150", "has str where rows_written must be int"),
            (("rows_written",), True, "has bool where rows_written must be int"),
            (("rows_written",), 151, "has 151 as rows_written, of 150 rows"),
            (("rows_written",), -1, "has -1 as rows_written, of 150 rows"),
            (("has_zeros",), 0, "has int where has_zeros must be bool"),
            (("files",), {}, "has nothing as files, which must be logits.npy, .*"),
            (("files",), [], "has list where files must be dict"),
            (("files", "../logits.npy"), {}, "has .*, ../logits.npy as files, which must be .*"),
            (("files", "logits.npy"), 3, "has int where files.logits.npy must be dict"),
            (("files", "logits.npy", "header"), -128, "has {.*} as files.logits.npy, whose rows have 10 bytes"),
            (("files", "logits.npy", "row_bytes"), 20, "has {.*} as files.logits.npy, whose rows have 10 bytes"),
            (("files", "logits.npy", "crc32"), None, "has NoneType where files.logits.npy.crc32 must be int"),
        ],
    )
    def test_manifest_with_other_values(self, built, inputs, teacher, path, value, message):
        def replace(parent, key):
            parent[key] = value

        self.check_changed_manifest(built, inputs, teacher, path, replace, message)

    def test_headers_that_numpy_can_or_cannot_read(self, built):
        """Without the checksums the header alone says what the rows are."""
        path = built.folder / "logits.npy"
        good = path.read_bytes()
        for bad, message in (
            (good.replace(b"False", b"True "), "logits.npy holds float16"),
            (good[:8] + b"\x66" + good[9:], "logits.npy h"),  # rows begin sixteen bytes earlier
            (good.replace(b"'descr': '<f2'", b"'descr': ('<f2"), "logits.npy has no .npy header"),
            (good.replace(b"'shape': (", b"'shape': [("), "logits.npy has no .npy header"),
            (good.replace(b"'<f2'", b"'>f2'"), "logits.npy holds >f2"),
        ):
            path.write_bytes(bad[: len(good)])
            assert path.read_bytes() != good
            with pytest.raises(ValueError, match=rf"is damaged: {message}"):
                TeacherStore.open(built.folder, verify=False)

    def test_other_format(self, built):
        manifest = read_manifest(built.folder)
        replace_manifest(built.folder, manifest | {"format": 9})
        with pytest.raises(ValueError, match="has format 9; this version reads 1"):
            TeacherStore.open(built.folder)

    def test_no_store(self, tmp_path):
        for folder in (tmp_path, tmp_path / "nowhere"):
            with pytest.raises(FileNotFoundError, match="no teacher store here"):
                TeacherStore.open(folder)

    def test_build_verifies_a_finished_store_too(self, built, inputs, teacher):
        path = built.folder / "indices.npy"
        good = path.read_bytes()
        path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        with pytest.raises(ValueError, match=r"is damaged: indices.npy"):
            TeacherStore.build(built.folder, teacher, inputs, **TOP_K)


class TestErrors:
    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"k": 0}, ValueError, "k must be at least 1, got 0"),
            ({"k": 2.0}, TypeError, "k must be an integer, got 2.0"),
            ({"k": True}, TypeError, "k must be an integer"),
            ({"k": 21}, ValueError, r"k must be an integer in \[1, 20\].*got 21"),
            ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
            ({"batch_size": None}, TypeError, "batch_size must be an integer, got None"),
            ({"dtype": "float64"}, ValueError, "dtype must be 'float32', 'float16', 'bfloat16'; got 'float64'"),
            ({"tail": "drop"}, ValueError, "tail must be .* got 'drop'"),
            ({"temperatures": 2.0}, TypeError, "temperatures must be a sequence of numbers, got 2.0"),
            ({"temperatures": (0.0,)}, ValueError, "temperatures must be positive and finite"),
            ({"temperatures": (math.inf,)}, ValueError, "temperatures must be positive and finite"),
            ({"k": 3, "temperatures": (), "tail": "bucket"}, ValueError, "temperatures must name at least one"),
            ({"teacher": "net"}, TypeError, "teacher must be a module, a fitted classifier, SoftTargets or"),
            ({"data": 3}, TypeError, "data must be a tensor, an array, a Dataset or an iterable of batches, got int"),
            ({"data": torch.zeros(0, FEATURES)}, ValueError, r"data must have at least one row, got shape \(0, 6\)"),
            ({"data": torch.tensor(1.0)}, ValueError, "data must have at least one row"),
            ({"data": []}, ValueError, "data must give at least one row, got none"),
            ({"data": ()}, ValueError, "data must give at least one row, got none"),
            ({"data": Items(torch.zeros(0, 3))}, ValueError, "at least one item, got an empty Dataset"),
            ({"data": iter([torch.zeros(3, 6)])}, ValueError, "can be iterated several times.*got the iterator"),
            ({"data": ["a", "b"]}, TypeError, "first column is a tensor or array of rows, got str"),
            ({"data": [torch.zeros(2, 6), torch.zeros(2, 7)]}, ValueError, "rows of one dtype and shape, got float32"),
            ({"data": np.array([[None]])}, TypeError, "data must be numbers, got an array of Python objects"),
        ],
    )
    def test_arguments(self, tmp_path, inputs, teacher, options, error, message):
        with pytest.raises(error, match=message):
            TeacherStore.build(tmp_path / "store", **({"teacher": teacher, "data": inputs} | options))
        assert not (tmp_path / "store").exists() or not contents(tmp_path / "store")

    @pytest.mark.parametrize(
        "loader",
        [
            lambda x: DataLoader(TensorDataset(x), shuffle=True),
            lambda x: DataLoader(Items(x), sampler=WeightedRandomSampler(torch.ones(ROWS), ROWS)),
            lambda x: DataLoader(Items(x), sampler=torch.utils.data.SubsetRandomSampler(range(ROWS))),
            lambda x: DataLoader(Items(x), sampler=torch.utils.data.DistributedSampler(Items(x), 2, 0)),
            lambda x: DataLoader(
                Items(x),
                batch_sampler=torch.utils.data.BatchSampler(torch.utils.data.RandomSampler(x), 4, False),
            ),
        ],
    )
    def test_shuffling_loader(self, tmp_path, inputs, teacher, loader):
        with pytest.raises(ValueError, match=r"data must come in the same order each time.*Sampler.*shuffle=False"):
            TeacherStore.build(tmp_path, teacher, loader(inputs))

    def test_loaders_in_an_order_of_their_own_are_read_whole(self, tmp_path, inputs, teacher, logits):
        def backwards(x):
            return DataLoader(TensorDataset(x), batch_size=40, sampler=range(ROWS - 1, -1, -1))

        def without_the_last(x):
            return DataLoader(TensorDataset(x), batch_size=40, drop_last=True)

        def the_first(x):
            return DataLoader(TensorDataset(x), batch_size=40, sampler=SequentialSampler(range(100)))

        forms = ((backwards, logits.flip(0)), (without_the_last, logits[:120]), (the_first, logits[:100]))
        for form, want in forms:
            folder = tmp_path / form.__name__
            built = TeacherStore.build(folder, teacher, form(inputs), dtype="float32")
            torch.testing.assert_close(built[:].logits, want, rtol=1e-5, atol=1e-5)
            with pytest.raises(ValueError, match="other data"):
                TeacherStore.open(folder, data=inputs)

    ROWS_FOR_BATCHES = pytest.mark.parametrize(
        "form",
        [
            lambda rows: rows,
            lambda rows: [row.numpy() for row in rows],
            lambda rows: [(row, 3) for row in rows],
            lambda rows: [[row, rows[0]] for row in rows],
            lambda rows: DataLoader(Items(rows), batch_size=None),
            lambda rows: DataLoader(Stream(rows), batch_size=None),
            lambda rows: Batches(rows),
        ],
        ids=["list", "arrays", "pairs", "lists", "loader", "stream", "iterable"],
    )
    NO_BATCHES = r"data must give batches of rows, .*its batch 0 has shape \(7,\).* stack or pad them to one tensor"

    @ROWS_FOR_BATCHES
    @pytest.mark.parametrize("lengths", [(7, 7, 7), (7, 5, 9)])
    def test_rows_that_are_taken_for_batches(self, tmp_path, form, lengths):
        """A list of texts' tokens: each tensor would become as many rows as it has tokens."""
        tokens = [torch.randint(50, (length,)) for length in lengths]
        with pytest.raises(ValueError, match=self.NO_BATCHES):
            TeacherStore.build(tmp_path, nn.Embedding(50, CLASSES), form(tokens))
        assert not contents(tmp_path)

    def test_rows_are_stacked_as_the_message_says(self, tmp_path):
        tokens, model = [torch.randint(50, (7,)) for _ in range(3)], nn.Embedding(50, CLASSES)
        built = TeacherStore.build(tmp_path / "stacked", model, torch.stack(tokens), dtype="float32")
        assert built.shape == (3, 7, CLASSES)
        assert_same_targets(TeacherStore.build(tmp_path / "items", model, Items(tokens), dtype="float32")[:], built[:])

    @ROWS_FOR_BATCHES
    def test_a_store_is_not_opened_with_rows_for_batches(self, tmp_path, form):
        tokens = [torch.randint(50, (7,)) for _ in range(3)]
        TeacherStore.build(tmp_path, nn.Embedding(50, CLASSES), torch.stack(tokens), dtype="float32")
        with pytest.raises(ValueError, match=self.NO_BATCHES):
            TeacherStore.open(tmp_path, data=form(tokens))

    @pytest.mark.parametrize(
        "form",
        [
            lambda x: x,
            lambda x: (x, x),
            lambda x: Items(x),
            lambda x: Stream(x),
            lambda x: DataLoader(TensorDataset(x), batch_size=64),
            lambda x: DataLoader(Items(x), batch_size=64),
            lambda x: DataLoader(Stream(x), batch_size=64),
        ],
    )
    def test_rows_that_are_single_numbers(self, tmp_path, form):
        numbers, model = torch.randint(50, (ROWS,)), nn.Embedding(50, CLASSES)
        built = TeacherStore.build(tmp_path, model, form(numbers), dtype="float32")
        assert torch.equal(built[:].logits, model(numbers))

    def test_a_tuple_of_batches_is_not_one_of_columns(self, tmp_path, inputs, teacher):
        with pytest.raises(ValueError, match=r"columns of one length, .*got lengths 22, 64\. Pass batches as a list"):
            TeacherStore.build(tmp_path, teacher, inputs.split(64))

    def test_data_frames(self, tmp_path, inputs, teacher):
        frame = pytest.importorskip("pandas").DataFrame(inputs.numpy())
        for data in (frame, (frame, frame[0])):
            with pytest.raises(TypeError, match=r"tensor or an array, got a DataFrame: pass its \.to_numpy\(\)"):
                TeacherStore.build(tmp_path, teacher, data)

    def test_augmented_data(self, tmp_path, inputs, teacher):
        class Augmented(Items):
            def __getitem__(self, i):
                return self.inputs[i] + torch.randn(FEATURES)

        with pytest.raises(ValueError, match=r"data must give the same items each time.*augment"):
            TeacherStore.build(tmp_path, teacher, Augmented(inputs))

    def test_data_with_fewer_or_more_rows_than_they_have(self, tmp_path, inputs, teacher):
        fewer = DataLoader(Items(inputs), batch_size=50, collate_fn=lambda items: torch.zeros(40, FEATURES))
        with pytest.raises(ValueError, match="data must give the same 150 rows each time, got 120"):
            TeacherStore.build(tmp_path / "fewer", teacher, fewer)
        more = DataLoader(Items(inputs), batch_size=50, collate_fn=lambda items: torch.zeros(60, FEATURES))
        with pytest.raises(ValueError, match="data must give the same 150 rows each time, got more"):
            TeacherStore.build(tmp_path / "more", teacher, more)

    @pytest.mark.parametrize(
        "make", [lambda: nn.Linear(FEATURES + 1, CLASSES), lambda: nn.Linear(FEATURES + 1, CLASSES).forward]
    )
    def test_an_error_of_the_teacher_names_the_rows(self, tmp_path, inputs, make):
        """torch's own error says which matrices do not fit, but not that one of them is the data."""
        message = (
            r"^teacher, called with rows 0 to 63 of data, of shape \(64, 6\) and dtype torch.float32: mat1 and mat2"
        )
        with pytest.raises(RuntimeError, match=message):
            TeacherStore.build(tmp_path, make(), inputs, batch_size=64)

    @pytest.mark.parametrize(
        ("output", "options", "error", "message"),
        [
            (lambda x: "logits", {}, TypeError, "teacher must return logits or SoftTargets, got str"),
            (lambda x: (x,), {}, TypeError, "teacher must return logits or SoftTargets, got tuple"),
            (lambda x: x.argmax(-1), {}, TypeError, "floating-point, got dtype torch.int64"),
            (lambda x: x[:-1], {}, ValueError, r"for a batch of 64 rows, got shape \(63, 6\)"),
            (lambda x: x[:, 0], {}, ValueError, r"\(rows, ..., classes\).*got shape \(64,\)"),
            (lambda x: x[:, :0], {}, ValueError, r"got shape \(64, 0\)"),
            (lambda x: x[:, : len(x) // 11], {}, ValueError, "outputs of one form; from row 128 on it is"),
            (lambda x: x * 1e5, {}, ValueError, "in row 0 is infinite in float16; use .bfloat16. or"),
            (lambda x: pydistill.top_k(x, 3), {"k": 2}, ValueError, "k must be None or the teacher's own 3, got 2"),
        ],
    )
    def test_outputs(self, tmp_path, inputs, output, options, error, message):
        with pytest.raises(error, match=message):
            TeacherStore.build(tmp_path, output, inputs, batch_size=64, **options)

    @pytest.mark.parametrize(("value", "shown"), [(math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf")])
    @pytest.mark.parametrize("k", [None, 2])
    def test_rows_without_a_finite_largest_logit(self, tmp_path, inputs, value, shown, k):
        inputs[100] = value
        with pytest.raises(ValueError, match=f"finite largest logit in every row; that of row 100 is {shown}"):
            TeacherStore.build(tmp_path, torch.clone, inputs, k=k, batch_size=64)
        with pytest.raises(ValueError, match="holds 64 of 150 rows"):
            TeacherStore.open(tmp_path)

    def test_masked_classes_are_fine(self, tmp_path, inputs):
        inputs[:, 2] = -math.inf
        built = TeacherStore.build(tmp_path, torch.clone, inputs)
        assert torch.equal(built[:].logits, inputs.half())

    def test_foreign_files_are_left_alone(self, tmp_path, inputs, teacher):
        (tmp_path / "logits.npy").write_bytes(b"mine")
        with pytest.raises(ValueError, match=r"folder must be empty or hold a teacher store.*holds logits.npy"):
            TeacherStore.build(tmp_path, teacher, inputs)
        assert contents(tmp_path) == {"logits.npy": b"mine"}

    def test_subset_of_a_dataset(self, tmp_path, inputs, teacher, logits):
        built = TeacherStore.build(tmp_path, teacher, Subset(Items(inputs), range(20, 90)), dtype="float32")
        torch.testing.assert_close(built[:].logits, logits[20:90], rtol=1e-5, atol=1e-5)
