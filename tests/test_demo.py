"""The console command: the demo's files and figures, and info."""

import json
import subprocess
import sys

import pytest
import torch

import pydistill
from pydistill import cli, demo


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A short run through the command line: its folder and what it printed."""
    folder = tmp_path_factory.mktemp("demo") / "new" / "folder"
    words = ["demo", "--seeds", "2", "--epochs", "3", "--temperature", "2", "--output", str(folder)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "TREES", 20)
        printed = []
        patch.setattr("builtins.print", lambda *parts: printed.append(" ".join(map(str, parts))))
        threads = torch.get_num_threads()
        status = cli.main(words)
    assert status == 0
    assert torch.get_num_threads() == threads
    return folder, "\n".join(printed)


@pytest.fixture(scope="module")
def figures(finished):
    return json.loads((finished[0] / "metrics.json").read_text(encoding="utf-8"))


def test_metrics_hold_options_versions_and_backend(figures):
    assert set(figures) == {
        "date",
        "options",
        "versions",
        "backend",
        "claim",
        "models",
        "differences",
        "loss_cost",
    }
    assert figures["options"] == {"temperature": 2.0, "alpha": 0.5, "seeds": 2, "epochs": 3}
    assert figures["versions"]["torch"] == torch.__version__
    assert set(figures["versions"]) == {"pydistill", "python", "torch", "numpy", "scikit-learn"}
    assert figures["backend"]["name"] == pydistill.backend_info().name


def test_models_have_plausible_figures_for_every_seed(figures):
    models = figures["models"]
    assert set(models) == {"teacher", "hard_labels", "distilled"}
    assert models["teacher"]["agreement"] is None
    for name, model in models.items():
        shares = model["accuracy"]["per_seed"]
        if name != "teacher":
            shares = shares + model["agreement"]["per_seed"]
        assert all(0.5 < share <= 1 for share in shares)  # chance is 0.1
        for field in ("accuracy", "bytes", "seconds_test_set", "seconds_one_row"):
            per_seed = model[field]["per_seed"]
            assert len(per_seed) == 2
            assert model[field]["mean"] == pytest.approx(sum(per_seed) / 2)
            assert model[field]["sd"] == pytest.approx(abs(per_seed[0] - per_seed[1]) / 2**0.5)
        assert min(model["seconds_test_set"]["mean"], model["seconds_one_row"]["mean"]) > 0
    assert models["teacher"]["bytes"]["mean"] > 10 * models["distilled"]["bytes"]["mean"]
    assert models["distilled"]["bytes"]["per_seed"] == [2410 * 4] * 2


def test_differences_are_paired(figures):
    models = figures["models"]
    for field in ("accuracy", "agreement"):
        distilled, hard = (models[name][field]["per_seed"] for name in ("distilled", "hard_labels"))
        expected = [a - b for a, b in zip(distilled, hard, strict=True)]
        assert figures["differences"][field]["per_seed"] == pytest.approx(expected)


def test_loss_cost_names_its_contestants(figures):
    cost = figures["loss_cost"]
    assert list(cost) == ["pydistill", "kl_div + cross_entropy", "soft cross_entropy + cross_entropy"]
    assert cost["pydistill"]["ratio"] == 1.0
    assert all(entry["seconds"] > 0 and entry["ratio"] > 0 for entry in cost.values())


def test_saved_student_is_the_one_that_was_measured(finished, figures):
    student = pydistill.load_student(finished[0], demo.make_student())
    digits = demo._split(seed=0)
    accuracy = (student(digits.test_x).argmax(-1) == digits.test_y).double().mean().item()
    assert accuracy == figures["models"]["distilled"]["accuracy"]["per_seed"][0]


def test_plot_is_a_picture(finished):
    from matplotlib.image import imread

    path = finished[0] / "plot.png"
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    pixels = imread(path)
    assert min(pixels.shape[:2]) > 300
    assert pixels.std() > 0.05  # not blank


def test_printed_table_and_files(finished, figures):
    folder, printed = finished
    mean, sd = (figures["models"]["distilled"]["accuracy"][key] for key in ("mean", "sd"))
    row = next(line for line in printed.splitlines() if line.startswith("student, distilled"))
    assert f"{mean:.3f} ± {sd:.3f}" in row
    assert "digits, 2 seeds, T = 2, alpha = 0.5, 3 epochs" in printed
    assert f"Written to {folder}: student.safetensors, student.json" in printed
    scope = {}
    exec("\n".join(line.strip() for line in printed.splitlines()[-2:]), scope)  # as printed, they load the student
    assert isinstance(scope["student"], torch.nn.Module)
    written = {"metrics.json", "plot.png", "student.json", "student.safetensors"}
    assert {path.name for path in folder.iterdir()} == written


def test_the_first_line_says_what_is_saved_and_what_is_kept(finished, figures):
    teacher, student = (figures["models"][name] for name in ("teacher", "distilled"))
    smaller, faster, one_row = (
        teacher[field]["mean"] / student[field]["mean"] for field in ("bytes", "seconds_test_set", "seconds_one_row")
    )
    kept = student["accuracy"]["mean"] / teacher["accuracy"]["mean"]
    assert list(figures["claim"].values()) == pytest.approx([smaller, faster, one_row, kept])
    first = finished[1].splitlines()[0]
    assert first == (
        f"Distilled student: {smaller:,.0f} times smaller and {faster:,.0f} times faster than its teacher "
        f"(one row: {one_row:,.0f} times), with {100 * kept:.1f} % of its accuracy"
    )


def test_same_seed_same_figures(monkeypatch):
    monkeypatch.setattr(demo, "TREES", 10)
    runs = [demo._run_seed(3, demo.Options(epochs=2)) for _ in range(2)]
    for name in ("teacher", "hard_labels", "distilled"):
        first, second = (models[name] for models, _ in runs)
        assert first[:3] == second[:3]  # all but the times
    for first, second in zip(*(student.parameters() for _, student in runs), strict=True):
        assert torch.equal(first, second)


def test_students_differ_in_alpha_alone(monkeypatch):
    monkeypatch.setattr(demo, "TREES", 2)
    calls = []

    def train(digits, targets, loss, seed, epochs):
        calls.append((loss.temperature, loss.alpha, seed, epochs, digits.train_x, targets))
        return demo.make_student()

    monkeypatch.setattr(demo, "_train", train)
    demo._run_seed(4, demo.Options(temperature=2.0, alpha=0.7, epochs=6))
    assert [call[:4] for call in calls] == [(2.0, 0.0, 4, 6), (2.0, 0.7, 4, 6)]
    assert calls[0][4] is calls[1][4]
    assert calls[0][5] is calls[1][5]


def test_no_test_row_is_trained_on(monkeypatch):
    monkeypatch.setattr(demo, "TREES", 2)
    digits = demo._split(seed=1)
    assert (len(digits.train_y), len(digits.test_y)) == (1257, 540)
    shares = [torch.bincount(y, minlength=10) / len(y) for y in (digits.train_y, digits.test_y)]
    torch.testing.assert_close(*shares, rtol=0, atol=0.005)  # stratified
    assert digits.train_x.min() == 0
    assert digits.train_x.max() == 1
    fitted = []
    from sklearn.ensemble import RandomForestClassifier

    fit = RandomForestClassifier.fit
    monkeypatch.setattr(RandomForestClassifier, "fit", lambda self, x, y: fitted.append(x) or fit(self, x, y))
    _, targets = demo._teach(digits, seed=1)
    assert [len(x) for x in fitted] == [1005, 1005, 1006, 1006, 1006, 1257]
    assert torch.equal(torch.from_numpy(fitted[-1]), digits.train_x)
    assert targets.shape == (1257, 10)


@pytest.mark.parametrize(
    ("mean", "sd", "says"),
    [
        (0.004, 0.005, "did not measurably help"),
        (-0.004, 0.005, "did not measurably help"),
        (-0.006, 0.005, "Lower: distillation did not help"),
        (0.006, 0.005, "Higher, beyond the spread"),
        (0.006, None, "One seed cannot show"),
    ],
)
def test_verdict(mean, sd, says):
    assert says in demo._judge({"mean": mean, "sd": sd})


def test_one_seed_has_no_spread():
    assert demo._statistic([0.5]) == {"mean": 0.5, "sd": None, "per_seed": [0.5]}


def test_contestants_that_disagree_are_not_timed():
    logits = torch.randn(4, 3, requires_grad=True)
    losses = {"pydistill": lambda: logits.square().sum(), "other": lambda: 1.001 * logits.square().sum()}
    with pytest.raises(ArithmeticError, match=r"the gradient of other differs from pydistill's by 1\.0e-03"):
        demo._check_gradients(logits, losses)


@pytest.mark.parametrize("missing", ["sklearn", "matplotlib", "tqdm", "safetensors"])
def test_missing_extra_is_named(missing, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, missing, None)
    assert cli.main(["demo", "--output", str(tmp_path / "out")]) == 1
    out, err = capsys.readouterr()
    assert f"the demo needs {missing}" in err
    assert "pip install 'pydistill-kd[demo]'" in err
    assert out == ""
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["demo", "--alpha", "1.5"], "alpha, the weight of the soft term, must be in [0, 1], got 1.5"),
        (["demo", "--temperature", "0"], "temperature must be positive and finite, got 0.0"),
        (["demo", "--seeds", "0"], "argument --seeds: must be an integer of at least 1, got '0'"),
        (["demo", "--epochs", "two"], "argument --epochs: must be an integer of at least 1, got 'two'"),
        ([], "the following arguments are required: command"),
    ],
)
def test_bad_words_exit_with_status_two(words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_info_says_what_runs(capsys):
    with pydistill.use_backend("torch"):
        assert cli.main(["info"]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["backend"] == "torch"
    assert lines["reason"] == "chosen with use_backend"
    assert lines["threads"] == str(torch.get_num_threads())
    assert lines["pydistill"] == pydistill.__version__
    assert lines["torch"] == torch.__version__


def test_versions_of_what_is_not_installed():
    assert demo.versions("torch", "no-such-thing") == {
        "torch": torch.__version__,
        "no-such-thing": "not installed",
    }


def test_module_runs_the_command():
    done = subprocess.run([sys.executable, "-m", "pydistill", "info"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert done.stdout.startswith("pydistill")
