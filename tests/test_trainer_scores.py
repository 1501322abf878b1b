"""Scores of an epoch are those of one batch of all its rows: against sums over rows in float64, and by hand."""

import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from training import CLASSES, FEATURES, ROWS, make_data, mlp, same_students, trainer_for, weights

import pydistill
from pydistill.trainer.history import Scores

CLASS_WEIGHT = torch.tensor([2.0, 0.3, 1.0, 0.6], dtype=torch.float64)
T, ALPHA = 2.0, 0.3


@pytest.fixture
def rows():
    """Columns in float64: labels of which a third are ignored and many differ from the targets, and weights with 0."""
    inputs, targets, _ = make_data()
    labels = torch.randint(CLASSES, (ROWS,))
    labels[::3] = -100
    labels[:40] = -100  # whole batches without a label
    weight = torch.rand(ROWS, dtype=torch.float64) * torch.arange(ROWS)
    weight[5::7] = 0
    weight[60:110] = 0  # whole batches of weight 0
    return inputs.double(), targets.double(), labels, weight


def student_and_logits(inputs):
    student = mlp().double()
    with torch.no_grad():
        return student, student(inputs)


def expected(logits, targets, labels, weight=None, *, alpha=ALPHA, class_weight=None, distill=False, ignored=-100):
    """Row by row, from the definitions; each sum is over all rows."""
    soft = hard = soft_items = hard_items = agreeing = correct = soft_rows = labelled = 0.0
    for i in range(len(logits)):
        w = 1.0 if weight is None else float(weight[i])
        label = ignored if labels is None else int(labels[i])
        if w == 0:
            continue
        if labels is None or label != ignored or distill:
            log_q, log_p = ((x[i].double() / T).log_softmax(-1) for x in (logits, targets))
            soft += w * T**2 * float((log_p.exp() * (log_p - log_q)).sum())
            soft_items += w
            agreeing += float(logits[i].argmax() == targets[i].argmax())
            soft_rows += 1
        if label != ignored:
            of_class = 1.0 if class_weight is None else float(class_weight[label])
            hard -= w * of_class * float(logits[i].double().log_softmax(-1)[label])
            hard_items += w * of_class
            correct += float(logits[i].argmax() == label)
            labelled += 1
    soft_loss = soft / soft_items if alpha > 0 else math.nan
    hard_loss = hard / hard_items if alpha < 1 else math.nan
    loss = (alpha * soft_loss if alpha > 0 else 0) + ((1 - alpha) * hard_loss if alpha < 1 else 0)
    agreement = agreeing / soft_rows if alpha > 0 else math.nan
    return Scores(loss, soft_loss, hard_loss, correct / labelled if labelled else math.nan, agreement)


OPTIONS = {
    "plain": {},
    "class weights": {"class_weight": CLASS_WEIGHT},
    "distill": {"unlabeled": "distill"},
    "distill, class weights": {"unlabeled": "distill", "class_weight": CLASS_WEIGHT},
    "labels only": {"alpha": 0.0},
    "labels only, distill": {"alpha": 0.0, "unlabeled": "distill", "class_weight": CLASS_WEIGHT},
    "targets only": {"alpha": 1.0},
    "targets only, distill": {"alpha": 1.0, "unlabeled": "distill"},
    "another ignored label": {"ignore_index": 2, "unlabeled": "distill"},
    "num_items": {"num_items": (10.0, 3.0), "unlabeled": "distill"},
    "num_items, class weights": {"num_items": 7.0, "class_weight": CLASS_WEIGHT},
}
options_of_losses = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def want_for(logits, targets, labels, weight, options):
    return expected(
        logits,
        targets,
        labels,
        weight,
        alpha=options.get("alpha", ALPHA),
        class_weight=options.get("class_weight"),
        distill=options.get("unlabeled") == "distill",
        ignored=options.get("ignore_index", -100),
    )


def check(got, want, rel=1e-12):
    assert got == pytest.approx(want, rel=rel, nan_ok=True)


@options_of_losses
@pytest.mark.parametrize("weighted", [False, True], ids=["unweighted", "weighted"])
@pytest.mark.parametrize("accumulate", [1, 3, 100])
def test_an_epoch_is_one_batch(rows, options, weighted, accumulate):
    inputs, targets, labels, weight = rows
    if "ignore_index" in options:
        labels = torch.where(labels == -100, options["ignore_index"], labels)
    columns = (inputs, targets, labels, weight) if weighted else (inputs, targets, labels)
    student, logits = student_and_logits(inputs)
    want = want_for(logits, targets, labels, weight if weighted else None, options)
    loss = pydistill.DistillationLoss(**({"temperature": T, "alpha": ALPHA} | options))
    optimizer = torch.optim.SGD(student.parameters(), lr=0.0)
    trainer = trainer_for(student, loss, optimizer=optimizer, accumulate=accumulate)
    batches = [tuple(x[i : i + 16] for x in columns) for i in range(0, ROWS, 16)]  # the last has 6 rows
    for train in (columns, batches, DataLoader(TensorDataset(*columns), batch_size=16)):
        (record,) = trainer.fit(train, columns, epochs=1, batch_size=16)
        check(record.train, want)
        check(record.val, want)
    for batch_size in (7, ROWS):
        check(trainer.evaluate(columns, batch_size=batch_size), want)
    at_once, metrics = loss(
        logits, targets, labels, sample_weight=weight if weighted else None, num_items=None, return_metrics=True
    )
    check(want, (float(at_once), *map(float, metrics[:2]), float(metrics.accuracy), float(metrics.agreement)))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_an_epoch_without_labels(rows, weighted, accumulate):
    inputs, targets, labels, weight = rows
    student, logits = student_and_logits(inputs)
    trainer = trainer_for(
        student,
        pydistill.DistillationLoss(temperature=T, alpha=1.0, unlabeled="distill"),
        optimizer=torch.optim.SGD(student.parameters(), lr=0.0),
        accumulate=accumulate,
    )
    columns = (inputs, targets, torch.full_like(labels, -100), weight) if weighted else (inputs, targets)
    want = expected(logits, targets, None, weight if weighted else None, alpha=1.0)
    check(trainer.fit(columns, epochs=1, batch_size=16)[0].train, want)
    check(trainer.evaluate(columns, batch_size=7), want)


def test_tokens_have_denominators_of_their_own(rows):
    tokens, weight = torch.randint(9, (ROWS, 5)), torch.rand(ROWS, 5, dtype=torch.float64)
    weight[::2, 3:] = 0  # padding
    labels, targets = torch.randint(CLASSES, (ROWS, 5)), torch.randn(ROWS, 5, CLASSES, dtype=torch.float64)
    labels[:, 0] = -100
    student = nn.Embedding(9, CLASSES).double()
    with torch.no_grad():
        flat = student(tokens).flatten(0, 1), targets.flatten(0, 1), labels.flatten(), weight.flatten()
    loss = pydistill.DistillationLoss(temperature=T, alpha=ALPHA, unlabeled="distill")
    trainer = trainer_for(student, loss, optimizer=torch.optim.SGD(student.parameters(), lr=0.0), accumulate=2)
    columns = (tokens, targets, labels, weight)
    (record,) = trainer.fit(columns, columns, epochs=1, batch_size=16)
    check(record.train, expected(*flat, distill=True))
    check(record.val, expected(*flat, distill=True))


class WithHint(pydistill.DistillationLoss):
    """A term of its own, the mean over rows."""

    def forward(self, student_logits, teacher=None, labels=None, **options):
        loss, metrics = super().forward(student_logits, teacher, labels, **options)
        items = float(options.get("num_items", [len(student_logits)])[0])
        return loss + student_logits.square().sum() / items, metrics


def test_what_a_subclass_adds_is_in_the_loss_alone(rows):
    inputs, targets, labels, _ = rows
    student, logits = student_and_logits(inputs)
    loss = WithHint(temperature=T, alpha=ALPHA, unlabeled="distill")
    want = expected(logits, targets, labels, distill=True)
    want = want._replace(loss=want.loss + float(logits.square().sum() / ROWS))
    for accumulate in (1, 3):
        optimizer = torch.optim.SGD(student.parameters(), lr=0.0)
        trainer = trainer_for(student, loss, optimizer=optimizer, accumulate=accumulate)
        check(trainer.fit((inputs, targets, labels), epochs=1, batch_size=16)[0].train, want)
    check(trainer.evaluate((inputs, targets, labels), batch_size=16), want)


@pytest.mark.parametrize("named", [False, True], ids=["function", "with alpha"])
def test_a_loss_that_is_no_distillation_loss(rows, named):
    inputs, targets, labels, weight = rows
    student, logits = student_and_logits(inputs)

    def loss(student_logits, teacher, labels, **options):
        return pydistill.distillation_loss(student_logits, teacher, labels, temperature=T, alpha=ALPHA, **options)

    columns = (inputs, targets, labels, weight)
    want = expected(logits, targets, labels, weight)
    if named:  # each term then has its own denominator
        inner, columns = loss, (inputs, targets, labels)

        def loss(*columns, **options):
            return inner(*columns, unlabeled="distill", **options)

        loss.alpha = ALPHA
        want = expected(logits, targets, labels, distill=True)
    for accumulate in (1, 3):
        optimizer = torch.optim.SGD(student.parameters(), lr=0.0)
        trainer = trainer_for(student, loss, optimizer=optimizer, accumulate=accumulate)
        check(trainer.fit(columns, epochs=1, batch_size=16)[0].train, want)
    check(trainer.evaluate(columns, batch_size=16), want)


def test_a_loss_with_an_alpha_of_its_own_meaning(rows):
    inputs, targets, labels, _ = rows
    student, logits = student_and_logits(inputs)

    class HardWeight(nn.Module):
        """Its alpha weighs the hard term, and it does not say what the terms are."""

        alpha = 0.9

        def forward(self, student_logits, teacher, labels, **options):
            loss, metrics = pydistill.distillation_loss(student_logits, teacher, labels, alpha=0.1, **options)
            nan = torch.tensor(math.nan)
            return loss, metrics._replace(soft_loss=nan, hard_loss=nan)

    want = float(pydistill.distillation_loss(logits, targets, labels, alpha=0.1))
    scores = trainer_for(student, HardWeight()).evaluate((inputs, targets, labels), batch_size=16)
    assert scores.loss == pytest.approx(want, rel=1e-12)
    assert math.isnan(scores.soft_loss)
    assert scores.accuracy == pytest.approx(expected(logits, targets, labels).accuracy, rel=1e-12)


def test_a_loss_may_take_labels_of_its_own_form(rows):
    inputs, targets, _, _ = rows
    student, logits = student_and_logits(inputs)
    mixed = torch.rand(ROWS, CLASSES, dtype=torch.float64).softmax(-1)

    def loss(student_logits, teacher, labels, **options):
        loss, metrics = pydistill.distillation_loss(student_logits, teacher, alpha=1.0, **options)
        return loss + nn.functional.cross_entropy(student_logits, labels), metrics

    optimizer = torch.optim.SGD(student.parameters(), lr=0.0)
    trainer = trainer_for(student, loss, optimizer=optimizer)
    want = float(loss(logits, targets, mixed, return_metrics=True)[0])
    (record,) = trainer.fit((inputs, targets, mixed), (inputs, targets, mixed), epochs=1, batch_size=16)
    assert record.train.loss == pytest.approx(want, rel=1e-12)
    assert record.val.loss == pytest.approx(want, rel=1e-12)
    assert math.isnan(record.train.accuracy)


@options_of_losses
@pytest.mark.parametrize("weighted", [False, True], ids=["unweighted", "weighted"])
def test_an_accumulated_step_is_that_of_one_batch(rows, options, weighted):
    inputs, targets, labels, weight = rows
    columns = (inputs, targets, labels, weight) if weighted else (inputs, targets, labels)
    options = {name: value for name, value in options.items() if name != "ignore_index"}
    loss = pydistill.DistillationLoss(**({"temperature": T, "alpha": ALPHA} | options))
    students = [student.double() for student in same_students(2)]
    start = weights(students[0])
    for student, size in zip(students, (ROWS, 16), strict=True):
        optimizer = torch.optim.SGD(student.parameters(), lr=1.0)
        batches = [tuple(x[i : i + size] for x in columns) for i in range(0, ROWS, size)]
        trainer_for(student, loss, optimizer=optimizer, accumulate=100).fit(batches, epochs=1)
    one, parts = map(weights, students)
    assert (one - start).abs().max() > 1e-3
    torch.testing.assert_close(parts, one, rtol=1e-12, atol=1e-13)


def test_an_accumulated_step_of_another_loss_is_the_mean_of_its_batches(rows):
    inputs, targets, labels, _ = rows
    ours, by_hand = (student.double() for student in same_students(2))
    batches = [(inputs[i : i + 40], targets[i : i + 40], labels[i : i + 40]) for i in range(0, ROWS, 40)]

    def loss(*columns, **options):
        return pydistill.distillation_loss(*columns, **options)

    optimizer = torch.optim.SGD(ours.parameters(), lr=1.0)
    trainer_for(ours, loss, optimizer=optimizer, accumulate=4).fit(batches, epochs=1)
    sum(pydistill.distillation_loss(by_hand(x), t, y) / 4 for x, t, y in batches).backward()
    torch.optim.SGD(by_hand.parameters(), lr=1.0).step()
    torch.testing.assert_close(weights(ours), weights(by_hand), rtol=1e-12, atol=1e-13)


def test_weights_of_the_loss_itself_count(rows):
    inputs, targets, labels, weight = (x[:64] for x in rows)
    student, logits = student_and_logits(inputs)
    own = weight[16:32]
    loss = pydistill.DistillationLoss(temperature=T, alpha=ALPHA, sample_weight=own)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.0)
    trainer = trainer_for(student, loss, optimizer=optimizer, accumulate=3)
    batches = [tuple(x[i : i + 16] for x in (inputs, targets, labels)) for i in range(0, 64, 16)]
    want = expected(logits, targets, labels, own.repeat(4))
    (record,) = trainer.fit(batches, batches, epochs=1)
    check(record.train, want)
    check(record.val, want)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_group_in_which_no_row_counts_changes_nothing(rows, accumulate):
    inputs, targets, labels, weight = rows
    empty = (inputs[:16], targets[:16], torch.full((16,), -100), weight[:16])
    zero = (inputs[:16], targets[:16], labels[40:56], torch.zeros(16, dtype=torch.float64))
    nothing = tuple(x[:0] for x in rows)
    columns = [tuple(x[i : i + 16] for x in rows) for i in (40, 112)]
    groups = [empty, zero, *columns, zero, nothing, empty]  # the last group is one batch
    students = [student.double() for student in same_students(2)]
    norms = []
    for student, batches in zip(students, (groups, columns), strict=True):
        optimizer = torch.optim.SGD(student.parameters(), lr=0.5)
        step = optimizer.step

        def watched(step=step, student=student):
            norms.append(float(torch.cat([p.grad.flatten() for p in student.parameters()]).norm()))
            step()

        optimizer.step = watched
        trainer = trainer_for(student, optimizer=optimizer, accumulate=accumulate)
        record = trainer.fit(batches, epochs=1)[0]
        assert all(math.isfinite(x) for x in record.train)
        if batches is groups:
            first, counted = record.train, norms.copy()
    check(first, record.train)
    assert torch.equal(weights(students[0]), weights(students[1]))
    still = {1: [True, True, False, False, True, True, True], 2: [True, False, True, True]}
    assert [norm == 0 for norm in counted] == still[accumulate]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_an_epoch_in_which_no_row_counts_says_so(rows, accumulate):
    inputs, targets, labels, _ = rows
    student = mlp().double()
    before = weights(student)
    nothing = (inputs, targets, torch.full_like(labels, -100))
    trainer = trainer_for(student, accumulate=accumulate)
    with pytest.warns(UserWarning, match="train: no row counts: each has the label that is ignored or a sample weight"):
        (record,) = trainer.fit(nothing, epochs=1)
    assert all(map(math.isnan, record.train))
    assert torch.equal(weights(student), before)
    with pytest.warns(UserWarning, match="data: no row counts") as found:
        assert all(map(math.isnan, trainer.evaluate(nothing)))
    assert found[0].filename == __file__
    with pytest.warns(UserWarning, match="val: no row counts") as found:
        trainer.fit((inputs, targets, labels), nothing, epochs=1)
    assert len(found) == 1  # not of the trial before the training
    assert found[0].filename == __file__


@pytest.mark.parametrize("columns", [2, 3])
def test_evaluate_gives_the_last_validation_scores(rows, columns):
    inputs, targets, labels, weight = rows
    trainer = trainer_for(mlp().double(), pydistill.DistillationLoss(unlabeled="distill", num_items=64.0))
    val = (inputs, labels, weight)[:columns]
    history = trainer.fit((inputs, targets, labels, weight), val, epochs=2, batch_size=64)
    check(trainer.evaluate(val), history[-1].val)
    logits = trainer.predict(inputs)
    check(history[-1].val, expected(logits, targets, labels, *(weight,)[: columns - 2], alpha=0.0))


def test_weights_without_targets(rows):
    inputs, targets, labels, weight = rows
    student, logits = student_and_logits(inputs)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.0)
    trainer = trainer_for(student, pydistill.DistillationLoss(alpha=0.0), optimizer=optimizer)
    want = expected(logits, targets, labels, weight, alpha=0.0)
    check(trainer.fit((inputs, labels, weight), epochs=1, batch_size=16)[0].train, want)
    of_rows = trainer_for(
        student,
        pydistill.DistillationLoss(temperature=T, alpha=ALPHA),
        teacher=pydistill.SoftTargets.from_logits(targets),
        optimizer=optimizer,
    )
    (record,) = of_rows.fit((inputs, labels, weight), (inputs, labels, weight), epochs=1, batch_size=16)
    check(record.train, expected(logits, targets, labels, weight))
    check(record.val, want)


def test_a_resume_within_an_epoch_keeps_its_sums(rows, tmp_path):
    columns = rows
    loss = pydistill.DistillationLoss(unlabeled="distill", class_weight=CLASS_WEIGHT)

    class Interrupted(nn.Linear):
        calls, last = 0, math.inf

        def forward(self, inputs):
            self.calls += 1
            if self.calls > self.last:
                raise KeyboardInterrupt
            return super().forward(inputs)

    students = [Interrupted(FEATURES, CLASSES).double() for _ in range(3)]
    for student in students[1:]:
        student.load_state_dict(students[0].state_dict())
    whole = trainer_for(students[0], loss).fit(columns, epochs=2, batch_size=16)
    students[1].last = 15
    options = {"checkpoint_dir": tmp_path, "checkpoint_every": 1}
    with pytest.raises(KeyboardInterrupt):
        trainer_for(students[1], loss, **options).fit(columns, epochs=2, batch_size=16)
    resumed = trainer_for(students[2], loss, **options).fit(columns, epochs=2, batch_size=16, resume=True)
    assert [record.train for record in resumed] == [record.train for record in whole]


def test_a_small_plain_step_counts_nothing_twice(rows, monkeypatch):
    calls = []
    monkeypatch.setattr("pydistill.trainer.totals.loss_items", lambda *args, **options: calls.append(args))
    trainer_for(mlp().double()).fit(rows[:3], epochs=1, batch_size=16)
    assert calls == []


def test_the_progress_bar_shows_what_there_is(rows, capsys):
    pytest.importorskip("tqdm")
    trainer_for(mlp().double(), pydistill.DistillationLoss(alpha=1.0), progress=True).fit(rows[:2], epochs=1)
    shown = capsys.readouterr().err
    assert "agreement=" in shown
    assert "loss=" in shown
    assert "nan" not in shown
