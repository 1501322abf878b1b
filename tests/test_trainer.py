"""The trainer: what it computes, and what it restores. What it refuses is in test_trainer_errors.py."""

import math
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from training import CLASSES, FEATURES, ROWS, make_data, mlp, same_students, trainer_for, weights

import pydistill


@pytest.fixture
def data():
    return make_data()


class Recorder(nn.Module):
    """A student that notes what it is called with."""

    def __init__(self):
        super().__init__()
        self.inner, self.calls = mlp(), []

    def forward(self, inputs):
        self.calls.append((inputs.detach().clone(), self.training, torch.get_num_threads()))
        return self.inner(inputs)


class TestFit:
    def test_loss_falls_and_student_learns(self, data):
        optimizer = torch.optim.Adam((student := mlp()).parameters(), lr=1e-2)
        history = trainer_for(student, optimizer=optimizer).fit(data, epochs=30)
        assert [record.epoch for record in history] == list(range(1, 31))
        assert history[-1].train.loss < 0.5 * history[0].train.loss
        assert history[-1].train.accuracy > 0.9 > history[0].train.accuracy
        assert history[-1].train.agreement == history[-1].train.accuracy  # the labels are the teacher's classes
        assert history[-1].val is None

    def test_one_step_is_one_optimizer_step_on_the_mean_loss(self, data):
        ours, by_hand = same_students(2)
        optimizers = [torch.optim.SGD(s.parameters(), lr=0.1) for s in (ours, by_hand)]
        loss = pydistill.DistillationLoss(temperature=2.0, alpha=0.7)
        history = trainer_for(ours, loss, optimizer=optimizers[0]).fit(data, epochs=1, batch_size=ROWS)
        inputs, targets, labels = data
        logits = by_hand(inputs)
        soft = 4 * F.kl_div((logits / 2).log_softmax(-1), (targets / 2).softmax(-1), reduction="batchmean")
        hard = F.cross_entropy(logits, labels)
        (0.7 * soft + 0.3 * hard).backward()
        optimizers[1].step()
        torch.testing.assert_close(weights(ours), weights(by_hand), rtol=1e-5, atol=1e-6)
        assert history[0].train.soft_loss == pytest.approx(soft.item(), rel=1e-5)
        assert history[0].train.hard_loss == pytest.approx(hard.item(), rel=1e-5)
        assert history[0].train.loss == pytest.approx(0.7 * soft.item() + 0.3 * hard.item(), rel=1e-5)

    def test_gradients_do_not_pile_up_over_steps(self, data):
        ours, by_hand = same_students(2)
        optimizers = [torch.optim.SGD(s.parameters(), lr=0.1) for s in (ours, by_hand)]
        batches = [tuple(column[i : i + 64] for column in data) for i in range(0, ROWS, 64)]
        sum(p.sum() for p in ours.parameters()).backward()  # left over from something else
        trainer_for(ours, pydistill.DistillationLoss(alpha=0.0), optimizer=optimizers[0]).fit(batches, epochs=1)
        for inputs, _, labels in batches:
            optimizers[1].zero_grad()
            F.cross_entropy(by_hand(inputs), labels).backward()
            optimizers[1].step()
        torch.testing.assert_close(weights(ours), weights(by_hand), rtol=1e-5, atol=1e-6)

    def test_every_row_once_per_epoch_shuffled_with_a_smaller_last_batch(self, data):
        student = Recorder()
        trainer_for(student).fit(data, epochs=2, batch_size=64)
        assert [len(inputs) for inputs, *_ in student.calls] == [64, 64, 22] * 2
        epochs = [torch.cat([inputs for inputs, *_ in student.calls[i : i + 3]]) for i in (0, 3)]
        assert not torch.equal(epochs[0], data[0])
        assert not torch.equal(epochs[0], epochs[1])
        for seen in epochs:
            torch.testing.assert_close(seen[seen[:, 0].argsort()], data[0][data[0][:, 0].argsort()])

    def test_epoch_means_weigh_batches_by_their_rows(self, data):
        student = mlp()
        still = torch.optim.SGD(student.parameters(), lr=0.0)
        trainer = trainer_for(student, optimizer=still)
        in_batches = trainer.fit(data, epochs=1, batch_size=64)[0].train
        at_once = trainer.evaluate(data, batch_size=ROWS)
        assert in_batches == pytest.approx(at_once, rel=1e-5)

    def test_same_seed_same_bits_also_with_dropout(self, data):
        students = same_students(3, dropout=0.5)
        state = torch.random.get_rng_state()
        histories = [trainer_for(s, seed=k).fit(data, epochs=3) for s, k in zip(students, (5, 5, 6), strict=True)]
        assert torch.equal(weights(students[0]), weights(students[1]))
        assert [r.train for r in histories[0]] == [r.train for r in histories[1]]
        assert not torch.equal(weights(students[0]), weights(students[2]))
        assert torch.equal(torch.random.get_rng_state(), state)

    def test_without_a_seed_torchs_own_is_used(self, data):
        students = same_students(2)
        for student in students:
            torch.manual_seed(3)
            trainer_for(student, seed=None).fit(data, epochs=2)
        assert torch.equal(weights(students[0]), weights(students[1]))

    def test_validation_runs_in_eval_mode_and_is_recorded(self, data):
        student = Recorder()
        val = tuple(column[:20] for column in data)
        trainer = trainer_for(student)
        history = trainer.fit(data, val, epochs=2, batch_size=64)
        assert [training for _, training, _ in student.calls] == [False] + ([True] * 3 + [False]) * 2
        assert history[-1].val == pytest.approx(trainer.evaluate(val), rel=1e-6)

    def test_modes_are_restored_module_by_module(self, data):
        student = mlp(dropout=0.1).train()
        student[2].eval()
        trainer_for(student).fit(data, data, epochs=1)
        assert [m.training for m in student] == [True, True, False, True]
        student.eval()
        trainer_for(student).fit(data, epochs=1)
        assert not any(m.training for m in student.modules())

    def test_callbacks_get_trainer_and_record_and_can_schedule_alpha(self, data):
        seen = []

        def anneal(trainer, record):
            seen.append((trainer, record))
            trainer.loss.alpha = 0.0

        trainer = trainer_for(mlp(), callbacks=[anneal])
        history = trainer.fit(data, epochs=2)
        assert seen == [(trainer, history[0]), (trainer, history[1])]
        assert history[0].train.soft_loss > 0
        assert math.isnan(history[1].train.soft_loss)
        assert history[1].train.loss == history[1].train.hard_loss

    def test_scheduler_steps_once_per_epoch(self, data):
        student = mlp()
        optimizer = torch.optim.SGD(student.parameters(), lr=1.0)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        trainer_for(student, optimizer=optimizer, scheduler=scheduler).fit(data, epochs=3)
        assert optimizer.param_groups[0]["lr"] == 0.125

    def test_plateau_scheduler_gets_the_validation_loss(self, data):
        student = mlp()
        optimizer = torch.optim.SGD(student.parameters(), lr=0.0)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        trainer = trainer_for(student, optimizer=optimizer, scheduler=scheduler)
        history = trainer.fit(data, tuple(column[:30] for column in data), epochs=1)
        assert scheduler.best == history[0].val.loss != history[0].train.loss

    def test_a_loss_that_is_not_finite_stops_before_the_step(self, data):
        inputs, logits, labels = data
        student = mlp()
        before = weights(student)
        probs = F.one_hot(logits.argmax(-1), CLASSES).double()
        loss = pydistill.DistillationLoss(divergence="reverse_kl")
        zeros = torch.log(probs)  # as a plain tensor, which nobody asks about zeros
        with pytest.raises(ValueError, match=r"the loss must stay finite.*epoch 1, step 1, under .*'reverse_kl'"):
            trainer_for(student, loss).fit((inputs, zeros, labels), epochs=2)
        assert torch.equal(weights(student), before)
        inputs = inputs.clone()
        inputs[140] = math.nan
        batches = [tuple(x[i : i + 64] for x in (inputs, *data[1:])) for i in range(0, ROWS, 64)]
        with pytest.raises(ValueError, match="became nan or infinite in epoch 1, step 3"):
            trainer_for(student).fit(batches, epochs=1)
        assert weights(student).isfinite().all()

    @pytest.mark.parametrize("installed", [True, False])
    def test_progress_bar_needs_tqdm_and_nothing_else_is_printed(self, data, installed, monkeypatch, capsys):
        if not installed:
            monkeypatch.setitem(sys.modules, "tqdm", None)
        trainer_for(mlp(), progress=True).fit(data, epochs=1)
        trainer_for(mlp(), progress=False).fit(data, epochs=1)
        out, err = capsys.readouterr()
        assert out == ""
        assert ("epoch 1/1 |" in err, "00:00 left, loss=" in err) == (installed, installed)


class TestForms:
    def test_soft_targets_equal_their_logits(self, data):
        inputs, logits, labels = data
        students = same_students(2)
        soft_targets = pydistill.SoftTargets.from_logits(logits)
        for student, targets in zip(students, (logits, soft_targets), strict=True):
            trainer_for(student).fit((inputs, targets, labels), epochs=2)
        assert torch.equal(weights(students[0]), weights(students[1]))

    def test_targets_alone(self, data):
        scores = trainer_for(mlp(), pydistill.DistillationLoss(alpha=1.0)).fit(data[:2], epochs=1)[0].train
        assert scores.loss == scores.soft_loss > 0
        assert math.isnan(scores.hard_loss)
        assert math.isnan(scores.accuracy)
        assert 0 <= scores.agreement <= 1

    def test_labels_alone(self, data):
        inputs, _, labels = data
        loss = pydistill.DistillationLoss(alpha=0.0)
        scores = trainer_for(mlp(), loss).fit((inputs, labels), epochs=1)[0].train
        assert scores.loss == scores.hard_loss > 0
        assert math.isnan(scores.agreement)

    @pytest.mark.parametrize("labelled", [True, False])
    def test_teacher_module_equals_its_outputs(self, data, labelled):
        inputs, _, labels = data
        teacher = mlp(dropout=0.5).train()
        teacher[0].eval()
        with torch.no_grad():
            targets = nn.Sequential(*[m for m in teacher if not isinstance(m, nn.Dropout)])(inputs)
        loss = pydistill.DistillationLoss(alpha=0.5 if labelled else 1.0)
        with_module, with_targets = same_students(2)
        columns = (labels,) if labelled else ()
        trainer_for(with_module, loss, teacher=teacher).fit((inputs, *columns), epochs=2)
        trainer_for(with_targets, loss).fit((inputs, targets, *columns), epochs=2)
        torch.testing.assert_close(weights(with_module), weights(with_targets), rtol=1e-5, atol=1e-6)
        assert all(p.grad is None for p in teacher.parameters())
        assert [m.training for m in teacher] == [False, True, True, True]

    def test_list_of_batches_in_its_own_order(self, data):
        student = Recorder()
        batches = [[column[i : i + 40] for column in data] for i in range(0, ROWS, 40)]
        trainer_for(student).fit(batches, epochs=1)
        assert torch.equal(torch.cat([inputs for inputs, *_ in student.calls]), data[0])

    @pytest.mark.timeout(120)
    def test_data_loader_with_workers(self, data):
        loader = DataLoader(
            TensorDataset(*data), batch_size=64, shuffle=True, num_workers=2, multiprocessing_context="fork"
        )
        students = same_students(2)
        histories = [trainer_for(student).fit(loader, loader, epochs=2) for student in students]
        assert torch.equal(weights(students[0]), weights(students[1]))
        assert histories[0][-1].val.loss < histories[0][0].train.loss
        assert histories[0][-1].val == pytest.approx(trainer_for(students[0]).evaluate(data), rel=1e-5)

    def test_unlabelled_rows_keep_their_soft_term(self, data):
        inputs, logits, labels = data
        labels = labels.clone()
        labels[::3] = -100
        student = mlp()
        trainer = trainer_for(student, pydistill.DistillationLoss(unlabeled="distill"))
        scores = trainer.evaluate((inputs, logits, labels), batch_size=64)
        classes, labelled = student(inputs).argmax(-1), labels != -100
        assert scores.accuracy == pytest.approx((classes == labels)[labelled].double().mean().item())
        assert scores.agreement == pytest.approx((classes == logits.argmax(-1)).double().mean().item())
        assert scores.hard_loss == pytest.approx(F.cross_entropy(student(inputs), labels).item(), rel=1e-5)


class TestEvaluateAndPredict:
    def test_evaluate_equals_the_direct_computation(self, data):
        inputs, logits, labels = data
        student = mlp()
        trainer = trainer_for(student, pydistill.DistillationLoss(temperature=3.0, alpha=0.3))
        before = weights(student)
        scores = trainer.evaluate(data, batch_size=64)
        s = student(inputs).double()
        p, log_q = (logits.double() / 3).softmax(-1), (s / 3).log_softmax(-1)
        soft = 9 * (p * (p.log() - log_q)).sum(-1).mean().item()
        hard = -s.log_softmax(-1)[torch.arange(ROWS), labels].mean().item()
        assert scores.soft_loss == pytest.approx(soft, rel=1e-5)
        assert scores.hard_loss == pytest.approx(hard, rel=1e-5)
        assert scores.loss == pytest.approx(0.3 * soft + 0.7 * hard, rel=1e-5)
        assert scores.accuracy == pytest.approx((s.argmax(-1) == labels).double().mean().item())
        assert scores.agreement == pytest.approx((s.argmax(-1) == logits.argmax(-1)).double().mean().item())
        assert torch.equal(weights(student), before)
        assert student.training

    def test_batches_where_no_row_counts_change_nothing(self, data):
        inputs, logits, labels = data
        padded = [data, (inputs, logits, torch.full_like(labels, -100))]
        trainer = trainer_for(mlp())
        assert trainer.evaluate(padded) == pytest.approx(trainer.evaluate([data]))

    @pytest.mark.parametrize("training", [True, False])
    def test_predict_uses_eval_mode_and_restores_it(self, data, training):
        student = mlp(dropout=0.9)
        student.train(training)
        logits = trainer_for(student).predict(data[0], batch_size=64)
        assert student.training is student[2].training is training
        assert not logits.requires_grad
        torch.testing.assert_close(logits, student.eval()(data[0]).detach())

    def test_predict_restores_the_mode_after_an_error(self, data):
        student = mlp()
        with pytest.raises(RuntimeError, match="mat1 and mat2 shapes"):
            trainer_for(student).predict(data[0][:, :2])
        assert student.training

    def test_predict_takes_batches_and_their_first_column(self, data):
        trainer = trainer_for(mlp())
        loader = DataLoader(TensorDataset(*data), batch_size=64)
        torch.testing.assert_close(trainer.predict(loader), trainer.predict(data[0]))
        with pytest.raises(ValueError, match="inputs must hold at least one batch"):
            trainer.predict([])


class TestThreads:
    @pytest.fixture(autouse=True)
    def _two_threads(self):
        threads = torch.get_num_threads()
        torch.set_num_threads(2)
        yield
        torch.set_num_threads(threads)

    def threads_during_fit(self, student, data):
        trainer_for(student).fit(data, epochs=1, batch_size=64)
        return {threads for *_, threads in student.calls}

    def test_small_steps_run_on_one_thread(self, data):
        assert self.threads_during_fit(Recorder(), data) == {1}
        assert torch.get_num_threads() == 2

    def test_larger_steps_keep_torchs_threads(self, data):
        student = Recorder()
        student.unused = nn.Parameter(torch.zeros(200_000))  # 200,000 * 64 rows are more than 10 million
        assert self.threads_during_fit(student, data) == {2}

    def test_shared_parameters_count_every_position(self):
        class Image(Recorder):
            def forward(self, inputs):
                return super().forward(inputs.mean(dim=(1, 2))[:, None].expand(-1, FEATURES))

        images = torch.randn(64, 40, 40)  # 64 * 1600 * 180 parameters
        data = (images, torch.randn(64, CLASSES), torch.zeros(64, dtype=torch.int64))
        assert self.threads_during_fit(Image(), data) == {2}

    def test_threads_are_restored_after_an_error(self, data):
        seen = []

        def stop(trainer, record):
            seen.append(torch.get_num_threads())
            raise KeyboardInterrupt

        student = mlp().eval()
        with pytest.raises(KeyboardInterrupt):
            trainer_for(student, callbacks=[stop]).fit(data, epochs=2)
        assert seen == [1]
        assert torch.get_num_threads() == 2
        assert not student.training


class TestMore:
    def test_numpy_arrays_and_float64_inputs(self, data):
        arrays = tuple(column.numpy() for column in data)
        want, got = mlp(), mlp()
        got.load_state_dict(want.state_dict())
        trainer_for(want).fit(data, epochs=2)
        trainer_for(got).fit((arrays[0].astype("float64"), *arrays[1:]), epochs=2)
        assert all(torch.equal(a, b) for a, b in zip(want.parameters(), got.parameters(), strict=True))

    def test_a_dataset_gives_the_same_batches_as_its_tensors(self, data):
        class Rows(torch.utils.data.Dataset):
            def __len__(self):
                return len(data[0])

            def __getitem__(self, i):
                return tuple(column[i] for column in data)

        students = [mlp() for _ in range(3)]
        start = {name: x.clone() for name, x in students[0].state_dict().items()}
        for student, train in zip(students, (data, Rows(), torch.utils.data.TensorDataset(*data)), strict=True):
            student.load_state_dict(start)
            trainer_for(student).fit(train, epochs=2)
        for other in students[1:]:
            assert all(torch.equal(a, b) for a, b in zip(students[0].parameters(), other.parameters(), strict=True))

    def test_a_teacher_of_rows(self, data):
        inputs, targets, labels = data
        want, got = mlp(), mlp()
        got.load_state_dict(want.state_dict())
        history = trainer_for(want).fit(data, data, epochs=2)
        teacher = pydistill.SoftTargets.from_logits(targets)
        of_rows = trainer_for(got, teacher=teacher).fit((inputs, labels), (inputs, labels), epochs=2)
        assert all(torch.equal(a, b) for a, b in zip(want.parameters(), got.parameters(), strict=True))
        assert of_rows[-1].val.accuracy == history[-1].val.accuracy
        assert of_rows[-1].val.soft_loss != of_rows[-1].val.soft_loss  # the teacher has no rows for them
        with pytest.raises(ValueError, match="teacher must have a row per row of train, got 150 for 9"):
            trainer_for(mlp(), teacher=teacher).fit((inputs[:9], labels[:9]), epochs=1)
        with pytest.raises(ValueError, match="the batches of an iterable have no row numbers"):
            trainer_for(mlp(), teacher=teacher).fit([(inputs, labels)], epochs=1)

    def test_validation_data_without_targets_are_scored_on_labels(self, data):
        inputs, _, labels = data
        student = mlp()
        history = trainer_for(student).fit(data, (inputs, labels), epochs=1)
        assert history[0].val.loss == pytest.approx(F.cross_entropy(student(inputs), labels).item(), rel=1e-5)
        assert math.isnan(history[0].val.soft_loss)

    def test_a_teacher_store_is_a_teacher_of_rows(self, data, tmp_path):
        inputs, _, labels = data
        teacher = mlp()
        students = [mlp(), mlp()]
        students[1].load_state_dict(students[0].state_dict())
        store = pydistill.TeacherStore.build(
            tmp_path / "store", teacher, inputs, dtype="float32", batch_size=len(inputs)
        )
        trainer_for(students[0], teacher=store).fit((inputs, labels), epochs=3)
        trainer_for(students[1]).fit((inputs, teacher(inputs).detach(), labels), epochs=3)
        for a, b in zip(*(student.parameters() for student in students), strict=True):
            torch.testing.assert_close(a, b)

    def test_sample_weight_is_the_fourth_column(self, data):
        weight = torch.zeros(len(data[0]))
        weight[:40] = 1
        want, got = mlp(), mlp()
        got.load_state_dict(want.state_dict())
        trainer_for(want).fit(tuple(x[:40] for x in data), epochs=3, batch_size=500)
        trainer_for(got).fit((*data, weight), epochs=3, batch_size=500)
        for a, b in zip(want.parameters(), got.parameters(), strict=True):
            torch.testing.assert_close(a, b)

    def test_accumulated_batches_step_like_one(self, data):
        inputs, targets, labels = data
        labels = torch.where(torch.arange(len(labels)) % 3 == 0, -100, labels)
        weight = torch.rand(len(labels))
        loss = pydistill.DistillationLoss(unlabeled="distill", class_weight=torch.rand(targets.shape[1]) + 0.5)
        want, got = mlp(), mlp()
        got.load_state_dict(want.state_dict())
        one = trainer_for(want, loss).fit((inputs, targets, labels, weight), epochs=3, batch_size=60)
        two = trainer_for(got, loss, accumulate=3).fit((inputs, targets, labels, weight), epochs=3, batch_size=20)
        for a, b in zip(want.parameters(), got.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
        assert one[-1].train.loss == pytest.approx(two[-1].train.loss, rel=1e-3)
        assert one[-1].train.accuracy == pytest.approx(two[-1].train.accuracy)

    def test_clipping_and_schedules(self, data):
        seen, norms = [], []
        student = mlp()
        optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        step = optimizer.step

        def watched():
            norms.append(float(torch.cat([p.grad.flatten() for p in student.parameters()]).norm()))
            step()

        optimizer.step = watched
        trainer_for(
            student,
            optimizer=optimizer,
            clip_norm=1e-3,
            schedules={"alpha": lambda epoch: 1 / epoch, "temperature": float},
            callbacks=[lambda trainer, record: seen.append((trainer.loss.alpha, trainer.loss.temperature))],
        ).fit(data, epochs=3)
        assert seen == [(1.0, 1.0), (0.5, 2.0), (1 / 3, 3.0)]
        assert max(norms) <= 1e-3 * 1.0001

    def test_autocast_runs_the_student_in_bfloat16(self, data):
        seen = []

        class Watched(torch.nn.Linear):
            def forward(self, x):
                y = super().forward(x)
                seen.append(y.dtype)
                return y

        trainer_for(Watched(data[0].shape[1], data[1].shape[1]), autocast=torch.bfloat16).fit(data, epochs=1)
        assert set(seen) == {torch.bfloat16}

    def test_the_best_model_comes_back(self, data):
        from pydistill.callbacks import BestModel

        weights = []
        student, best = mlp(), BestModel("accuracy")
        optimizer = torch.optim.SGD(student.parameters(), lr=5.0)  # too large: the last epoch is not the best
        keep = lambda trainer, record: weights.append([p.detach().clone() for p in student.parameters()])  # noqa: E731
        history = trainer_for(student, optimizer=optimizer, callbacks=[keep, best]).fit(data, data, epochs=6)
        accuracies = [record.val.accuracy for record in history]
        assert best.epoch == accuracies.index(max(accuracies)) + 1
        for a, b in zip(student.parameters(), weights[best.epoch - 1], strict=True):
            assert torch.equal(a, b)

    def test_history_plots_itself(self, data, tmp_path):
        pytest.importorskip("matplotlib")
        history = trainer_for(mlp()).fit(data, data, epochs=2)
        figure = history.plot(tmp_path / "history.png")
        assert (tmp_path / "history.png").stat().st_size > 1000
        lines = figure.axes[0].lines
        assert [float(y) for y in lines[0].get_ydata()] == [record.train.loss for record in history]

    def test_inputs_that_are_not_finite(self, data):
        inputs = data[0].clone()
        inputs[7, 1] = float("nan")
        with pytest.raises(ValueError, match="train: the inputs must be finite; row 7"):
            trainer_for(mlp()).fit((inputs, *data[1:]), epochs=1)

    @pytest.mark.parametrize("accumulate", [1, 2])
    def test_a_nan_is_not_hidden_and_tokens_count(self, accumulate):
        tokens, targets = torch.randint(9, (8, 5)), torch.randn(8, 5, 4)
        loss = pydistill.DistillationLoss(alpha=1.0)
        student = nn.Embedding(9, 4)
        want = loss(student(tokens), targets)
        sgd = torch.optim.SGD(student.parameters(), lr=0.0)
        options = {"optimizer": sgd, "accumulate": accumulate}
        history = trainer_for(student, loss, **options).fit((tokens, targets), epochs=1, batch_size=8 // accumulate)
        assert history[0].train.loss == pytest.approx(want.item(), rel=1e-5)
        gradient = student.weight.grad.clone()
        (expected,) = torch.autograd.grad(loss(student(tokens), targets), student.weight)
        torch.testing.assert_close(gradient, expected)
        targets[7] = math.nan
        with pytest.raises(ValueError, match="the loss must stay finite"):
            trainer_for(student, loss, **options).fit((tokens, targets), epochs=1, batch_size=4)
        assert math.isnan(trainer_for(student, loss).evaluate((tokens, targets), batch_size=4).loss)

    def test_a_second_fit_begins_anew(self, data):
        from pydistill.callbacks import BestModel, EarlyStopping

        stopping, best = EarlyStopping(patience=1, min_delta=1e9), BestModel()
        trainer = trainer_for(mlp(), callbacks=[stopping, best])
        assert [len(trainer.fit(data, epochs=5)) for _ in range(2)] == [2, 2]
        assert best.epoch in (1, 2)
