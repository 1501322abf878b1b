"""The Trainer's progress bar, and the plot of its history."""

import math
import os
import struct
import sys
import threading
from contextlib import contextmanager, suppress

import pytest
from training import make_data, mlp, trainer_for

import pydistill
from pydistill.trainer.history import EpochRecord, History, Scores
from pydistill.trainer.progress import progress_bar

COLUMNS = 80


@pytest.fixture
def data():
    return make_data()


@contextmanager
def terminal(monkeypatch):
    """Standard error is a terminal of 80 columns inside; afterwards the list holds the lines that were drawn."""
    pytest.importorskip("tqdm")
    fcntl, termios = pytest.importorskip("fcntl"), pytest.importorskip("termios")
    lines, (reading, writing) = [], os.openpty()
    fcntl.ioctl(writing, termios.TIOCSWINSZ, struct.pack("HHHH", 24, COLUMNS, 0, 0))
    chunks = []
    reader = threading.Thread(target=read_all, args=(reading, chunks))  # a terminal that nobody reads blocks its writer
    reader.start()
    with open(writing, "w", encoding="utf-8") as stderr, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stderr)
        yield lines
    reader.join()
    os.close(reading)
    text = b"".join(chunks).decode().replace("\n", "\r")
    lines.extend(line for line in text.split("\r") if line.strip())


def read_all(descriptor, chunks):
    with suppress(OSError):  # at the end, on Linux
        while chunk := os.read(descriptor, 4096):
            chunks.append(chunk)


class Unsized:
    """Batches whose number is not known before."""

    def __init__(self, data):
        self.data = data

    def __iter__(self):
        return iter([tuple(x[i : i + 50] for x in self.data) for i in range(0, 150, 50)])


@pytest.mark.parametrize("form", [lambda data: data, Unsized], ids=["in memory", "without a length"])
def test_the_bar_fits_80_columns(data, monkeypatch, form):
    trainer = trainer_for(mlp(), progress=True)
    with terminal(monkeypatch) as lines:
        history = trainer.fit(form(data), data, epochs=3, batch_size=50)
    assert max(map(len, lines)) == COLUMNS - 1  # tqdm leaves the last one free
    assert lines[0].startswith("epoch 0/3 |")
    for part in (
        "epoch 3/3 |",
        "00:00 left",
        f"loss={history[-1].train.loss:.3g}",
        f"accuracy={history[-1].val.accuracy:.3f}",
        f"agreement={history[-1].val.agreement:.3f}",
    ):
        assert part in lines[-1]


def test_the_longest_line_fits_80_columns(monkeypatch):
    scores = Scores(1.2345e-5, 1.2345e-5, 1.2345e-5, 0.98765, 0.99123)
    with terminal(monkeypatch) as lines, progress_bar(True, 999, 999 * 1000) as bar:
        bar.advance(100_000)
        bar._bar.start_t -= 10 * 3600  # of 100 hours
        bar.show(EpochRecord(100, scores, None, 360.0), 1000)
    longest = [line for line in lines if "loss" in line]
    for line in longest:
        assert len(line) == COLUMNS - 1
        assert line.startswith("epoch 100/999 |")
        assert line.rstrip().endswith(" left, loss=1.23e-05, accuracy=0.988, agreement=0.991")
    assert "| 89:54:0" in longest[0]


def test_a_resumed_bar_goes_on_where_it_was(data, monkeypatch, tmp_path):
    student = mlp()
    options = {"progress": True, "checkpoint_dir": tmp_path}
    with terminal(monkeypatch):
        trainer_for(student, **options).fit(data, epochs=2, batch_size=50)
    with terminal(monkeypatch) as lines:
        trainer_for(student, **options).fit(data, epochs=4, batch_size=50, resume=True)
    assert any(line.startswith("epoch 2/4 |") for line in lines)
    assert not any(line.startswith("epoch 1/4 |") for line in lines)
    assert lines[-1].startswith("epoch 4/4 |")


def scores(*values):
    return Scores(*(values or (0.9, 1.0, 0.8, 0.55, 0.61)))


def panels(history):
    pytest.importorskip("matplotlib")
    figure = history.plot()
    figure.draw_without_rendering()
    *axes, legend = figure.axes
    return {x.get_title().split(",")[0]: x for x in axes}, [x.get_text() for x in legend.get_legend().get_texts()]


def test_the_plot_has_terms_shares_and_units(data, tmp_path):
    history = trainer_for(mlp()).fit(data, data, epochs=3)
    axes, legend = panels(history)
    names = {
        "loss": "loss",
        "soft term": "soft_loss",
        "hard term": "hard_loss",
        "accuracy": "accuracy",
        "agreement with the teacher": "agreement",
    }
    assert legend == ["training", "validation"]
    assert axes.keys() == names.keys()
    for title, name in names.items():
        training, validation = axes[title].lines
        assert list(training.get_xdata()) == [1, 2, 3]
        assert list(training.get_ydata()) == [getattr(record.train, name) for record in history]
        assert list(validation.get_ydata()) == [getattr(record.val, name) for record in history]
        assert axes[title].get_ylabel() == ("share of rows" if name in ("accuracy", "agreement") else "nats")
        low, high = axes[title].get_xlim()
        ticks = [x for x in axes[title].get_xticks() if low <= x <= high]
        assert ticks == [1, 2, 3]
    history.plot(tmp_path / "history.png")
    assert (tmp_path / "history.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("share", "bottom"), [(0.0, 0.0), (0.01, 0.0), (0.35, 0.3), (0.504, 0.4), (0.99, 0.9), (1.0, 0.9)]
)
def test_shares_end_at_one_and_begin_at_a_tenth(share, bottom):
    history = History([EpochRecord(1, scores(1.0, 1.0, 1.0, share, 1.0), None, 1.0)])
    low, high = panels(history)[0]["accuracy"].get_ylim()
    assert low == pytest.approx(bottom)
    assert 1 < high < 1.03


def test_one_epoch_of_training_data_can_be_seen():
    axes, legend = panels(History([EpochRecord(1, scores(), None, 1.0)]))
    assert legend == ["training"]
    for x in axes.values():
        (line,) = x.lines
        assert line.get_marker() == "o"


@pytest.mark.parametrize(
    ("alpha", "missing"), [(0.0, ["soft term", "agreement with the teacher"]), (1.0, ["hard term"])]
)
def test_a_term_that_is_not_evaluated_has_a_note(data, alpha, missing):
    history = trainer_for(mlp(), pydistill.DistillationLoss(alpha=alpha)).fit(data, data, epochs=2)
    axes, legend = panels(history)
    assert legend == ["training", "validation"]
    assert [title for title, x in axes.items() if not x.lines] == missing
    for title, x in axes.items():
        assert [text.get_text() for text in x.texts] == (["not evaluated"] if title in missing else [])


def test_an_epoch_without_a_score_leaves_a_gap():
    gap = scores()._replace(soft_loss=math.nan)
    records = [EpochRecord(i, gap if i == 2 else scores(), scores(), 1.0) for i in (1, 2, 3)]
    training, _ = panels(History(records))[0]["soft term"].lines
    assert [math.isnan(y) for y in training.get_ydata()] == [False, True, False]


def test_a_history_without_epochs_has_a_plot():
    axes, legend = panels(History())
    assert legend == []
    assert not any(x.lines for x in axes.values())
