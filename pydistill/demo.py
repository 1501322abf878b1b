"""``pydistill demo``: a random forest distilled into a small network on scikit-learn's digits, and measured.

Each seed has its own split, forest and students. The forest is the teacher. What the student learns from are
its out-of-fold probabilities, since on the rows that it was fitted on a forest is far too sure of itself. The
same network, from the same first weights and in the same order of batches, is trained on the labels alone, so
that the difference is what distillation did. The test rows serve for the comparison and for nothing else.
"""

import importlib
import json
import pickle
import platform
import statistics
import time
from datetime import UTC, datetime
from functools import lru_cache
from importlib import metadata
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

import pydistill
from pydistill.trainer.loop import Trainer, threads_restored

FEATURES, HIDDEN, CLASSES = 64, 32, 10
TREES, FOLDS = 200, 5
BATCH_SIZE = 64
TEST_SHARE = 0.3
# After 40 epochs at 1e-3 the student trained on the labels alone misses 3 % of its training rows, here none.
LEARNING_RATE = 1e-2
_EXTRA = ("sklearn", "matplotlib", "tqdm")
_STUDENTS = ("hard_labels", "distilled")
_ROWS = {
    "teacher": "teacher (forest)",
    "hard_labels": "student, labels only",
    "distilled": "student, distilled",
}


class Options(NamedTuple):
    """What the command line chooses."""

    temperature: float = 1.0
    alpha: float = 0.5
    seeds: int = 5
    epochs: int = 40


class Model(NamedTuple):
    """What is measured of one teacher or student, for one seed; times are medians, in seconds."""

    accuracy: float
    agreement: float | None
    bytes: int
    seconds_test_set: float
    seconds_one_row: float


class Digits(NamedTuple):
    """One split of the digits: float32 features in [0, 1], int64 labels."""

    train_x: torch.Tensor
    test_x: torch.Tensor
    train_y: torch.Tensor
    test_y: torch.Tensor


def require_extra():
    """Import what only the demo needs.

    Raises:
        ImportError: one of them is missing; the message names the extra that brings it.
    """
    for name in _EXTRA:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ImportError(
                f"the demo needs {name}, which cannot be imported ({error}). Run: pip install 'pydistill-kd[demo]'"
            ) from error


def make_student() -> nn.Module:
    """The demo's student, untrained: 64 inputs, 32 hidden units, 10 classes.

    Example:
        >>> from pydistill.demo import make_student
        >>> sum(p.numel() for p in make_student().parameters())
        2410
    """
    return nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, CLASSES))


def run(options: Options) -> dict:
    """Train and measure everything: a dictionary of the figures, with ``"student"`` the first seed's module.

    Everything runs on one thread, so that times can be compared; torch's number of threads is restored. For a
    seed the accuracies and agreements are the same to the bit every time.
    """
    from tqdm import tqdm

    measured = {name: [] for name in _ROWS}
    students = []
    with threads_restored(), tqdm(total=options.seeds, desc="seeds", unit="seed") as bar:
        torch.set_num_threads(1)
        for seed in range(options.seeds):
            models, student = _run_seed(seed, options)
            students.append(student)
            for name, model in models.items():
                measured[name].append(model)
            bar.update()
        bar.set_description("seeds done, timing the loss")
        cost = loss_cost(options.temperature, options.alpha)
    summaries = {name: _summary(models) for name, models in measured.items()}
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "options": options._asdict(),
        "versions": {"pydistill": pydistill.__version__, "python": platform.python_version()}
        | versions("torch", "numpy", "scikit-learn"),
        "backend": pydistill.backend_info()._asdict(),
        "claim": _claim(summaries["teacher"], summaries["distilled"]),
        "models": summaries,
        "differences": _differences(measured),
        "loss_cost": cost,
        "student": students[0],
    }


def versions(*distributions) -> dict[str, str]:
    """The installed versions of some distributions, "not installed" where there is none."""
    found = {}
    for name in distributions:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _run_seed(seed, options):
    """Teacher and both students of one seed: their figures, and the distilled student."""
    digits = _split(seed)
    forest, targets = _teach(digits, seed)
    teacher_classes = torch.from_numpy(forest.predict_proba(digits.test_x.numpy())).argmax(-1)
    models = {"teacher": _measure_forest(forest, digits, teacher_classes)}
    for name in _STUDENTS:
        alpha = 0.0 if name == "hard_labels" else options.alpha
        loss = pydistill.DistillationLoss(temperature=options.temperature, alpha=alpha)
        student = _train(digits, targets, loss, seed, options.epochs)
        models[name] = _measure_student(student, digits, teacher_classes)
    return models, student


def _split(seed) -> Digits:
    from sklearn.model_selection import train_test_split

    x, y = _load()
    parts = train_test_split(x, y, test_size=TEST_SHARE, stratify=y, random_state=seed)
    return Digits(*map(torch.from_numpy, parts))


@lru_cache(maxsize=1)  # parsing the file takes longer than training a student
def _load():
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return (x / 16).astype("float32"), y.astype("int64")  # pixels are 0 to 16


def _teach(digits, seed):
    """A forest fitted on the training rows, and its out-of-fold probabilities for them."""
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    x, y = digits.train_x.numpy(), digits.train_y.numpy()
    # One job: in several threads the trees' votes are added in any order, and the last bits differ from run
    # to run. For the folds neither threads nor processes gained anything on two cores.
    forest = RandomForestClassifier(TREES, random_state=seed, n_jobs=1)
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    probs = cross_val_predict(forest, x, y, cv=folds, method="predict_proba")
    return forest.fit(x, y), pydistill.SoftTargets.from_probs(torch.from_numpy(probs))


def _train(digits, targets, loss, seed, epochs) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        student = make_student()
    optimizer = torch.optim.Adam(student.parameters(), lr=LEARNING_RATE, fused=True)
    trainer = Trainer(student, loss, optimizer=optimizer, seed=seed, progress=False)
    trainer.fit((digits.train_x, targets, digits.train_y), epochs=epochs, batch_size=BATCH_SIZE)
    return student


def _measure_forest(forest, digits, classes) -> Model:
    x = digits.test_x.numpy()
    return Model(
        accuracy=_share(classes == digits.test_y),
        agreement=None,
        bytes=len(pickle.dumps(forest)),
        seconds_test_set=_median_seconds(lambda: forest.predict_proba(x), repeats=5),
        seconds_one_row=_median_seconds(lambda: forest.predict_proba(x[:1]), repeats=5),
    )


@torch.no_grad()
def _measure_student(student, digits, teacher_classes) -> Model:
    x, first = digits.test_x, digits.test_x[:1]
    student.eval()
    classes = student(x).argmax(-1)
    file = BytesIO()
    torch.save(student.state_dict(), file)
    return Model(
        accuracy=_share(classes == digits.test_y),
        agreement=_share(classes == teacher_classes),
        bytes=len(file.getbuffer()),
        seconds_test_set=_median_seconds(lambda: student(x), repeats=50),
        seconds_one_row=_median_seconds(lambda: student(first), repeats=50),
    )


def _share(flags) -> float:
    return float(flags.double().mean())


def _median_seconds(work, repeats) -> float:
    work()
    return statistics.median(_seconds(work) for _ in range(repeats))


def _seconds(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _summary(models) -> dict:
    """Per field of Model: mean, spread and every seed's value; None for what is not measured."""
    columns = zip(Model._fields, zip(*models, strict=True), strict=True)
    return {field: None if values[0] is None else _mean_and_sd(values) for field, values in columns}


def _mean_and_sd(values) -> dict:
    sd = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "sd": sd, "per_seed": list(values)}


def _claim(teacher, student) -> dict:
    """What the distilled student saves and keeps of the teacher: ratios of the means in the table."""
    theirs, ours = ({field: x and x["mean"] for field, x in model.items()} for model in (teacher, student))
    return {
        "times_smaller": theirs["bytes"] / ours["bytes"],
        "times_faster_test_set": theirs["seconds_test_set"] / ours["seconds_test_set"],
        "times_faster_one_row": theirs["seconds_one_row"] / ours["seconds_one_row"],
        "accuracy_kept": ours["accuracy"] / theirs["accuracy"],
    }


def _differences(measured) -> dict:
    """Distilled minus hard labels only, seed by seed."""
    pairs = list(zip(measured["distilled"], measured["hard_labels"], strict=True))
    return {
        field: _mean_and_sd([getattr(a, field) - getattr(b, field) for a, b in pairs])
        for field in ("accuracy", "agreement")
    }


def loss_cost(temperature, alpha, *, rounds=60, steps=20) -> dict:
    """Time of one loss with its gradient at 64 x 10, against two torch formulas, on the threads that torch
    has.

    The three take turns within each round. ``ratio`` is the median over the rounds of the formula's time
    divided by pydistill's in the same round; ``seconds`` are medians per step. The best eager form gets the
    teacher's probabilities for free.

    Raises:
        ArithmeticError: the gradients of the three differ by more than float32's rounding.
    """
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, BATCH_SIZE, CLASSES, generator=generator) * 3
    labels = torch.randint(CLASSES, (BATCH_SIZE,), generator=generator)
    student.requires_grad_()
    losses = _contestants(student, teacher, labels, temperature, alpha)
    _check_gradients(student, losses)
    times = {name: [] for name in losses}
    for _ in range(rounds):
        for name, loss in losses.items():
            times[name].append(_seconds(lambda loss=loss: _repeat_step(student, loss, steps)) / steps)
    ours = times["pydistill"]
    return {
        name: {
            "seconds": statistics.median(theirs),
            "ratio": statistics.median(a / b for a, b in zip(theirs, ours, strict=True)),
        }
        for name, theirs in times.items()
    }


def _contestants(student, teacher, labels, temperature, alpha):
    targets = pydistill.SoftTargets.from_logits(teacher)
    probs = (teacher / temperature).softmax(-1)
    loss = pydistill.DistillationLoss(temperature=temperature, alpha=alpha)

    def kl_div_and_cross_entropy():
        soft = F.kl_div(
            F.log_softmax(student / temperature, -1),
            F.softmax(teacher / temperature, -1),
            reduction="batchmean",
        )
        return alpha * temperature**2 * soft + (1 - alpha) * F.cross_entropy(student, labels)

    def soft_cross_entropy_and_cross_entropy():
        soft = F.cross_entropy(student if temperature == 1 else student / temperature, probs)
        return alpha * temperature**2 * soft + (1 - alpha) * F.cross_entropy(student, labels)

    return {
        "pydistill": lambda: loss(student, targets, labels),
        "kl_div + cross_entropy": kl_div_and_cross_entropy,
        "soft cross_entropy + cross_entropy": soft_cross_entropy_and_cross_entropy,
    }


def _check_gradients(student, losses):
    gradients = {name: torch.autograd.grad(loss(), student)[0] for name, loss in losses.items()}
    ours = gradients.pop("pydistill")
    for name, gradient in gradients.items():
        error = float((ours - gradient).norm() / gradient.norm())
        if not error <= 1e-5:
            raise ArithmeticError(f"the gradient of {name} differs from pydistill's by {error:.1e}")


def _repeat_step(student, loss, steps):
    for _ in range(steps):
        student.grad = None
        loss().backward()


def text(results) -> str:
    """What distillation saves and keeps; the table, what it says about distillation, and the cost of the loss."""
    options, claim = results["options"], results["claim"]
    seeds = f"{options['seeds']} seed" + "s" * (options["seeds"] > 1)
    lines = [
        f"Distilled student: {claim['times_smaller']:,.0f} times smaller and {claim['times_faster_test_set']:,.0f} "
        f"times faster than its teacher (one row: {claim['times_faster_one_row']:,.0f} times), with "
        f"{100 * claim['accuracy_kept']:.1f} % of its accuracy",
        "",
        f"digits, {seeds}, T = {options['temperature']:g}, alpha = {options['alpha']:g}, {options['epochs']} "
        "epochs; one thread; mean ± sd over the seeds",
        "",
        *_table(results["models"]),
        "",
        *_verdict(results["differences"]),
        "",
        f"The loss, forward + backward, {BATCH_SIZE} x {CLASSES} ({results['backend']['name']} backend):",
    ]
    for name, cost in results["loss_cost"].items():
        ratio = "" if name == "pydistill" else f"   {cost['ratio']:.1f} x the time of pydistill"
        lines.append(f"  {name:34} {cost['seconds'] * 1e6:7.0f} us{ratio}")
    return "\n".join(lines)


def _table(models) -> list[str]:
    columns = {
        "test accuracy": ("accuracy", 1, ".3f"),
        "agreement": ("agreement", 1, ".3f"),
        "bytes": ("bytes", 1, ",.0f"),
        "test set, ms": ("seconds_test_set", 1e3, ".3f"),
        "one row, ms": ("seconds_one_row", 1e3, ".3f"),
    }
    rows = [["", *columns]]
    for name, title in _ROWS.items():
        cells = [_cell(models[name][field], unit, form) for field, unit, form in columns.values()]
        rows.append([title, *cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = ([cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows)
    return ["   ".join(cells).rstrip() for cells in padded]


def _cell(figure, unit, form) -> str:
    if figure is None:
        return "-"
    spread = "" if figure["sd"] is None else f" ± {figure['sd'] * unit:{form}}"
    return f"{figure['mean'] * unit:{form}}{spread}"


def _verdict(differences) -> list[str]:
    return [
        f"{field.capitalize()}, distilled minus labels only: {_signed(figure)}. {_judge(figure)}"
        for field, figure in differences.items()
    ]


def _signed(figure) -> str:
    spread = "" if figure["sd"] is None else f" ± {figure['sd']:.4f}"
    return f"{figure['mean']:+.4f}{spread}"


def _judge(figure) -> str:
    """What the mean difference means beside the spread of the differences; no more than that."""
    mean, sd = figure["mean"], figure["sd"]
    if sd is None:
        return "One seed tells nothing about chance."
    if abs(mean) <= sd:
        return "Within the spread: distillation did not measurably help."
    return "Lower: distillation did not help." if mean < 0 else "Higher, beyond the spread."


def save(results, folder) -> str:
    """Write student.pt, metrics.json and plot.png to a folder, made if need be; returns what is where."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(results["student"].state_dict(), folder / "student.pt")
    figures = {key: value for key, value in results.items() if key != "student"}
    document = json.dumps(figures, indent=2, allow_nan=False)
    (folder / "metrics.json").write_text(document + "\n", encoding="utf-8")
    _plot(results["models"], folder / "plot.png")
    return "\n".join(
        [
            f"Written to {folder}: student.pt (distilled, first seed), metrics.json, plot.png",
            "Load the student with:",
            "  import torch; from pydistill.demo import make_student",
            "  student = make_student()",
            f"  student.load_state_dict(torch.load({str(folder / 'student.pt')!r}))",
        ]
    )


def _plot(models, path):
    """Test accuracy and agreement: a dot per seed, a bar for the mean."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no window, and no global pyplot state
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = {"accuracy": "test accuracy", "agreement": "agreement with the teacher, test rows"}
    for axes, (field, title) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        shown = {name: models[name][field] for name in _ROWS if models[name][field] is not None}
        for i, summary in enumerate(shown.values()):
            seeds = len(summary["per_seed"])
            jitter = [i + 0.3 * ((k + 0.5) / seeds - 0.5) for k in range(seeds)]
            axes.plot(jitter, summary["per_seed"], "o", color="tab:blue", alpha=0.6)
            axes.plot([i - 0.25, i + 0.25], [summary["mean"]] * 2, color="black", linewidth=2)
        axes.set_xticks(range(len(shown)), [_ROWS[name].replace(", ", ",\n") for name in shown])
        axes.set_xlim(-0.5, len(shown) - 0.5)
        axes.set_title(title)
        axes.grid(axis="y", alpha=0.3)
    figure.suptitle("A dot per seed, a bar for the mean; the axes do not start at 0", fontsize=9)
    figure.savefig(path, dpi=120)
