"""``pydistill demo``: distil a random forest into a small network on scikit-learn's digits, and measure the result.

Each seed has its own split, forest and students. The forest is the teacher; the student learns from its out-of-fold
probabilities, because a forest is far too confident on the rows that it was fitted on. A second student, with the same
initial weights and the same order of batches, is trained on the labels alone, so that the difference between the two is
the effect of distillation. The test rows are used only for the comparison.
"""

import importlib
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from importlib import metadata
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

import pydistill
from pydistill._files import write_whole
from pydistill.evaluation.result import ModelScores, align_columns, new_figure, write_png
from pydistill.trainer.loop import threads_restored

FEATURES, HIDDEN, CLASSES = 64, 32, 10
TREES, FOLDS = 200, 5
BATCH_SIZE = 64
TEST_SHARE = 0.3
# At 1e-3 the student trained on the labels alone still misses 3 % of its training rows after 40 epochs; at 1e-2, none.
LEARNING_RATE = 1e-2
_EXTRA = ("sklearn", "matplotlib", "tqdm", "safetensors")
_ROWS = {
    "teacher": "teacher (forest)",
    "hard_labels": "student, labels only",
    "distilled": "student, distilled",
}


class Options(NamedTuple):
    """The options of the command line."""

    temperature: float = 1.0
    alpha: float = 0.5
    seeds: int = 5
    epochs: int = 40


class Model(NamedTuple):
    """The measurements of one teacher or student, for one seed; times are medians, in seconds."""

    accuracy: float
    agreement: float | None
    bytes: int
    seconds_test_set: float
    seconds_one_row: float


class Digits(NamedTuple):
    """One split of the digits: float32 features in [0, 1], int64 labels."""

    train_x: Tensor
    test_x: Tensor
    train_y: Tensor
    test_y: Tensor


class Statistic(TypedDict):
    """A figure over the seeds; ``sd`` is None for one seed."""

    mean: float
    sd: float | None
    per_seed: list[float]


class Results(TypedDict):
    """All results of a run."""

    date: str
    options: dict[str, Any]
    versions: dict[str, str]
    backend: dict[str, Any]
    claim: dict[str, float]
    models: dict[str, dict[str, Statistic | None]]
    differences: dict[str, Statistic]
    loss_cost: dict[str, dict[str, float]]
    student: nn.Module


def require_extra() -> None:
    """Import the packages that only the demo needs.

    Raises:
        ImportError: a package is missing; the message names the extra that installs it.
    """
    for name in _EXTRA:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ImportError(
                f"the demo needs {name}, which cannot be imported ({error}). Run: pip install 'pydistill-kd[demo]'"
            ) from error


def make_student() -> nn.Module:
    """Make the demo's student, untrained: 64 inputs, 32 hidden units, 10 classes.

    Example:
        >>> from pydistill.demo import make_student
        >>> sum(p.numel() for p in make_student().parameters())
        2410
    """
    return nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, CLASSES))


def run(options: Options) -> Results:
    """Train and measure all models; ``"student"`` is the distilled student of the first seed.

    Everything runs on one thread, so that times can be compared; torch's number of threads is restored. For each seed
    the accuracies and agreements are the same to the bit in every run.
    """
    from tqdm import tqdm

    with threads_restored():
        torch.set_num_threads(1)
        runs = [_run_seed(seed, options) for seed in tqdm(range(options.seeds), desc="seeds", unit="seed")]
        cost = loss_cost(options.temperature, options.alpha)
    measured = {name: [models[name] for models, _ in runs] for name in _ROWS}
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
        "student": runs[0][1],
    }


def versions(*distributions: str) -> dict[str, str]:
    """Return the installed versions of some distributions; "not installed" for those that are missing."""
    found = {}
    for name in distributions:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _run_seed(seed: int, options: Options) -> tuple[dict[str, Model], nn.Module]:
    """Return the measurements of the teacher and both students for one seed, and the distilled student."""
    digits = _split(seed)
    forest, targets = _teach(digits, seed)
    models: dict[str, Model] = {}
    for name, alpha in {"hard_labels": 0.0, "distilled": options.alpha}.items():
        loss = pydistill.DistillationLoss(temperature=options.temperature, alpha=alpha)
        student = _train(digits, targets, loss, seed, options.epochs)
        report = pydistill.report(student, forest, digits.test_x, digits.test_y, batch_sizes=(1, len(digits.test_y)))
        models[name] = _figures(report.student, report.agreement)
        models.setdefault("teacher", _figures(report.teacher, None))
    return models, student


def _figures(scores: ModelScores | None, agreement: float | None) -> Model:
    assert scores is not None  # the report is made with a teacher
    one_row, test_set = scores.seconds.values()
    return Model(scores.accuracy, agreement, scores.bytes, test_set, one_row)


def _split(seed: int) -> Digits:
    from sklearn.model_selection import train_test_split

    x, y = _load()
    parts = train_test_split(x, y, test_size=TEST_SHARE, stratify=y, random_state=seed)
    return Digits(*map(torch.from_numpy, parts))


@lru_cache(maxsize=1)  # parsing the file takes longer than training a student
def _load() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return (x / 16).astype("float32"), y.astype("int64")  # pixels are 0 to 16


def _teach(digits: Digits, seed: int) -> tuple[Any, pydistill.SoftTargets]:
    """Fit a forest on the training rows; return it and its out-of-fold targets for these rows."""
    from sklearn.ensemble import RandomForestClassifier

    x, y = digits.train_x.numpy(), digits.train_y.numpy()
    # One job: with several, the order in which the trees' votes are added varies, and so do the last bits.
    forest = RandomForestClassifier(TREES, random_state=seed, n_jobs=1)
    targets = pydistill.soft_targets(forest, x, y, cv=FOLDS)
    return forest.fit(x, y), targets


def _train(
    digits: Digits, targets: pydistill.SoftTargets, loss: pydistill.DistillationLoss, seed: int, epochs: int
) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        student = make_student()
    optimizer = torch.optim.Adam(student.parameters(), lr=LEARNING_RATE, fused=True)
    trainer = pydistill.Trainer(student, loss, optimizer=optimizer, seed=seed, progress=False)
    trainer.fit((digits.train_x, targets, digits.train_y), epochs=epochs, batch_size=BATCH_SIZE)
    return student


def _summary(models: list[Model]) -> dict[str, Statistic | None]:
    """Compute the statistic of each field of Model; None for a field that is not measured."""
    columns = zip(Model._fields, zip(*models, strict=True), strict=True)
    return {field: None if values[0] is None else _statistic(values) for field, values in columns}


def _statistic(values: Sequence[float]) -> Statistic:
    sd = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "sd": sd, "per_seed": list(values)}


def _claim(teacher: dict[str, Statistic | None], student: dict[str, Statistic | None]) -> dict[str, float]:
    """Compute ratios of size, time and accuracy of teacher and distilled student, from the means in the table."""
    theirs, ours = ({field: x["mean"] for field, x in model.items() if x} for model in (teacher, student))
    return {
        "times_smaller": theirs["bytes"] / ours["bytes"],
        "times_faster_test_set": theirs["seconds_test_set"] / ours["seconds_test_set"],
        "times_faster_one_row": theirs["seconds_one_row"] / ours["seconds_one_row"],
        "accuracy_kept": ours["accuracy"] / theirs["accuracy"],
    }


def _differences(measured: dict[str, list[Model]]) -> dict[str, Statistic]:
    """Subtract the student trained on labels only from the distilled student, seed by seed."""
    pairs = list(zip(measured["distilled"], measured["hard_labels"], strict=True))
    return {
        field: _statistic([getattr(a, field) - getattr(b, field) for a, b in pairs])
        for field in ("accuracy", "agreement")
    }


def loss_cost(temperature: float, alpha: float, *, rounds: int = 60, steps: int = 20) -> dict[str, dict[str, float]]:
    """Time one loss with its gradient at 64 x 10 against two torch formulas, with torch's current number of threads.

    The three are timed alternately within each round. ``ratio`` is the median over the rounds of the formula's time /
    pydistill's time in the same round; ``seconds`` are medians per step. The second formula gets the teacher's
    probabilities precomputed.

    Raises:
        ArithmeticError: the gradients of the three differ by more than float32's rounding.
    """
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, BATCH_SIZE, CLASSES, generator=generator) * 3
    labels = torch.randint(CLASSES, (BATCH_SIZE,), generator=generator)
    student.requires_grad_()
    losses = _contestants(student, teacher, labels, temperature, alpha)
    _check_gradients(student, losses)
    times: dict[str, list[float]] = {name: [] for name in losses}
    for _ in range(rounds):
        for name, loss in losses.items():
            start = time.perf_counter()
            for _ in range(steps):
                torch.autograd.grad(loss(), student)
            times[name].append((time.perf_counter() - start) / steps)
    ratios = {name: [a / b for a, b in zip(x, times["pydistill"], strict=True)] for name, x in times.items()}
    median = statistics.median
    return {name: {"seconds": median(times[name]), "ratio": median(ratios[name])} for name in losses}


def _contestants(
    student: Tensor, teacher: Tensor, labels: Tensor, temperature: float, alpha: float
) -> dict[str, Callable[[], Tensor]]:
    targets = pydistill.SoftTargets.from_logits(teacher)
    loss = pydistill.DistillationLoss(temperature=temperature, alpha=alpha)
    probs = (teacher / temperature).softmax(-1)

    def with_hard_term(soft: Tensor) -> Tensor:
        return alpha * temperature**2 * soft + (1 - alpha) * F.cross_entropy(student, labels)

    def kl_div() -> Tensor:
        log_q, p = F.log_softmax(student / temperature, -1), F.softmax(teacher / temperature, -1)
        return with_hard_term(F.kl_div(log_q, p, reduction="batchmean"))

    def soft_cross_entropy() -> Tensor:
        return with_hard_term(F.cross_entropy(student if temperature == 1 else student / temperature, probs))

    return {
        "pydistill": lambda: loss(student, targets, labels),
        "kl_div + cross_entropy": kl_div,
        "soft cross_entropy + cross_entropy": soft_cross_entropy,
    }


def _check_gradients(student: Tensor, losses: dict[str, Callable[[], Tensor]]) -> None:
    gradients = {name: torch.autograd.grad(loss(), student)[0] for name, loss in losses.items()}
    ours = gradients.pop("pydistill")
    for name, gradient in gradients.items():
        error = float((ours - gradient).norm() / gradient.norm())
        if not error <= 1e-5:
            raise ArithmeticError(f"the gradient of {name} differs from pydistill's by {error:.1e}")


def text(results: Results) -> str:
    """Format the results: student against teacher, the table, the effect of distillation, the cost of the loss."""
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


def _table(models: dict[str, dict[str, Statistic | None]]) -> list[str]:
    columns: list[tuple[str, str, float, str]] = [
        ("test accuracy", "accuracy", 1, ".3f"),
        ("agreement", "agreement", 1, ".3f"),
        ("bytes", "bytes", 1, ",.0f"),
        ("test set, ms", "seconds_test_set", 1e3, ".3f"),
        ("one row, ms", "seconds_one_row", 1e3, ".3f"),
    ]
    rows = [["", *(title for title, *_ in columns)]]
    for name, title in _ROWS.items():
        rows.append([title, *(_cell(models[name][field], unit, form) for _, field, unit, form in columns)])
    return align_columns(rows)


def _cell(figure: Statistic | None, unit: float, form: str) -> str:
    if figure is None:
        return "-"
    spread = "" if figure["sd"] is None else f" ± {figure['sd'] * unit:{form}}"
    return f"{figure['mean'] * unit:{form}}{spread}"


def _verdict(differences: dict[str, Statistic]) -> list[str]:
    lines = []
    for field, figure in differences.items():
        spread = "" if figure["sd"] is None else f" ± {figure['sd']:.4f}"
        difference = f"{figure['mean']:+.4f}{spread}"
        lines.append(f"{field.capitalize()}, distilled minus labels only: {difference}. {_judge(figure)}")
    return lines


def _judge(figure: Statistic) -> str:
    """Interpret the mean of the differences, given their standard deviation."""
    mean, sd = figure["mean"], figure["sd"]
    if sd is None:
        return "One seed cannot show whether this is chance."
    if abs(mean) <= sd:
        return "Within the spread: distillation did not measurably help."
    return "Lower: distillation did not help." if mean < 0 else "Higher, beyond the spread."


def save(results: Results, folder: str | PathLike[str]) -> str:
    """Write the student, metrics.json and plot.png to a folder, which is created if needed.

    Returns:
        str: the names of the files, and the lines of Python that load the student.
    """
    folder = pydistill.save_student(results["student"], folder)
    figures = {key: value for key, value in results.items() if key != "student"}
    write_whole(folder / "metrics.json", (json.dumps(figures, indent=2, allow_nan=False) + "\n").encode())
    _plot(results, folder / "plot.png")
    return "\n".join(
        [
            f"Written to {folder}: student.safetensors, student.json (distilled, first seed), metrics.json, plot.png",
            "Load the student with:",
            "  import pydistill; from pydistill.demo import make_student",
            f"  student = pydistill.load_student({str(folder)!r}, make_student())",
        ]
    )


def _plot(results: Results, path: Path) -> None:
    """Draw test accuracy and agreement: one dot per seed, a line for the mean."""
    options = results["options"]
    figure = new_figure(9, 4.2)
    panels = {"accuracy": "Accuracy", "agreement": "Agreement with the teacher"}
    for axes, (field, title) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        shown = {name: x for name in _ROWS if (x := results["models"][name][field]) is not None}
        for i, summary in enumerate(shown.values()):
            seeds = len(summary["per_seed"])
            places = [i + 0.3 * ((k + 0.5) / seeds - 0.5) for k in range(seeds)]
            axes.plot(places, [100 * x for x in summary["per_seed"]], "o", color="C0", alpha=0.6, label="one seed")
            mean = 100 * summary["mean"]
            axes.plot([i - 0.25, i + 0.25], [mean, mean], color="black", linewidth=2, label="mean")
        axes.set_xticks(range(len(shown)), [_ROWS[name].replace(", ", ",\n").replace(" (", "\n(") for name in shown])
        axes.set(title=title, ylabel="% of the test rows", xlim=(-0.5, len(shown) - 0.5))
        axes.grid(axis="y", alpha=0.3)
        axes.legend(*(x[:2] for x in axes.get_legend_handles_labels()), loc="best", fontsize="small")
    figure.suptitle(
        f"A forest distilled into a small network: digits, T = {options['temperature']:g}, alpha = "
        f"{options['alpha']:g}, {options['epochs']} epochs. The vertical axes do not start at 0",
        fontsize="medium",
    )
    write_png(figure, path)
