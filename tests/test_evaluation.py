"""The report: its figures are right, and so are its table, JSON and plot."""

import errno
import json
import os
import pickle
import sys
import time
import warnings
from copy import deepcopy

import numpy as np
import pytest
import torch
from torch import nn

from pydistill.evaluation import report

sklearn = pytest.importorskip("sklearn")

from sklearn.datasets import load_breast_cancer, load_digits, load_wine  # noqa: E402
from sklearn.ensemble import RandomForestClassifier  # noqa: E402
from sklearn.frozen import FrozenEstimator  # noqa: E402
from sklearn.linear_model import LogisticRegression  # noqa: E402
from sklearn.metrics import accuracy_score, precision_recall_fscore_support  # noqa: E402
from sklearn.model_selection import GridSearchCV, train_test_split  # noqa: E402
from sklearn.pipeline import make_pipeline  # noqa: E402
from sklearn.preprocessing import FunctionTransformer, StandardScaler  # noqa: E402
from sklearn.svm import LinearSVC  # noqa: E402

from pydistill.sklearn import DistilledClassifier  # noqa: E402


@pytest.fixture(scope="module")
def digits():
    X, y = load_digits(return_X_y=True)
    X = (X / 16).astype("float32")
    return X[:900], X[900:1300], y[:900], y[900:1300]


@pytest.fixture(scope="module")
def forest(digits):
    return RandomForestClassifier(10, random_state=0).fit(digits[0], digits[2])


def quick(*arguments):
    """A report that times one batch size only."""
    return report(*arguments, batch_sizes=(1,))


def linear_student(X, y):
    """A module with scikit-learn's logistic regression in it, columns in sorted order."""
    fitted = LogisticRegression(max_iter=300).fit(X, y)
    student = nn.Linear(X.shape[1], len(fitted.classes_))
    with torch.no_grad():
        student.weight.copy_(torch.tensor(fitted.coef_))
        student.bias.copy_(torch.tensor(fitted.intercept_))
    return student, fitted


class Scorer:
    """An estimator of fixed outputs: row i of X holds the number of the row of the table."""

    def __init__(self, classes, table):
        self.classes_, self.table = np.array(classes), np.array(table)

    def predict_proba(self, X):
        return self.table[np.asarray(X).reshape(-1).astype(int)]


class TestFigures:
    def test_by_hand(self):
        """Four rows whose logits are X itself: accuracy, agreement, calibration, table."""
        probs = torch.tensor([[0.7, 0.2, 0.1], [0.5, 0.25, 0.25], [0.125, 0.5, 0.375], [0.05, 0.05, 0.9]])
        y = torch.tensor([0, 1, 1, 0])
        found = quick(nn.Identity(), nn.Identity(), probs.log(), y)
        assert found.student.accuracy == 0.5
        assert found.agreement == 1.0
        # Bins of a 15th: 0.5 and 0.5 share one (accuracy 1/2), 0.7 and 0.9 have one each.
        assert found.student.ece == pytest.approx((2 * 0.0 + 0.3 + 0.9) / 4, abs=1e-6)
        assert [(b.rows, b.accuracy) for b in found.student.reliability if b.rows] == [(2, 0.5), (1, 1.0), (1, 0.0)]
        assert [b.rows for b in found.student.reliability].index(2) == 7  # (7/15, 8/15]
        assert [tuple(c) for c in found.per_class] == [
            (0, 0.5, 0.5, 0.5, 2),
            (1, 1.0, 0.5, pytest.approx(2 / 3), 2),
            (2, 0.0, 0.0, 0.0, 0),
        ]
        assert (found.student.parameters, found.student.bytes, found.compression) == (0, 0, None)

    def test_a_confidence_on_an_edge_is_in_the_bin_below(self):
        student = Scorer(["a", "b"], [[0.6, 0.4], [0.55, 0.45], [0.0, 1.0]])
        bins = quick(student, None, np.arange(3)[:, None], ["a", "b", "b"]).student.reliability
        assert [(k, b.rows, b.accuracy) for k, b in enumerate(bins) if b.rows] == [(8, 2, 0.5), (14, 1, 1.0)]

    def test_ece_of_logits_is_that_of_their_softmax_at_temperature_1(self):
        logits = 3 * torch.randn(500, 4)
        y = torch.randint(4, (500,))
        confidence, predicted = logits.double().softmax(-1).max(-1)
        want = 0.0
        for b in range(15):
            inside = (confidence > b / 15) & (confidence <= (b + 1) / 15)
            if inside.any():
                gap = (predicted == y)[inside].double().mean() - confidence[inside].mean()
                want += float(inside.double().mean() * gap.abs())
        assert quick(nn.Identity(), None, logits, y).student.ece == pytest.approx(want, abs=1e-9)

    def test_against_scikit_learn(self, digits, forest):
        X, X_test, y, y_test = digits
        student, fitted = linear_student(X[:80], y[:80])
        found = report(student, forest, torch.from_numpy(X_test), torch.from_numpy(y_test))
        predicted = fitted.predict(X_test)
        assert found.student.accuracy == pytest.approx(accuracy_score(y_test, predicted))
        assert found.student.accuracy < 0.95
        assert found.teacher.accuracy == pytest.approx(accuracy_score(y_test, forest.predict(X_test)))
        assert found.agreement == pytest.approx((predicted == forest.predict(X_test)).mean())
        want = precision_recall_fscore_support(y_test, predicted, zero_division=0)
        np.testing.assert_allclose([c[1:] for c in found.per_class], np.array(want).T)
        assert (found.rows, found.classes) == (400, list(range(10)))
        assert (found.student.parameters, found.student.bytes) == (650, 2600)
        assert found.teacher.parameters is None
        assert found.teacher.bytes > 50_000
        assert found.compression == found.teacher.bytes / 2600
        assert found.speedup[256] == found.teacher.seconds[256] / found.student.seconds[256]

    def test_bytes_count_buffers_and_dtypes(self):
        student = nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3)).to(torch.bfloat16)
        found = quick(student, student, torch.randn(5, 6), [0, 1, 2, 0, 1])
        assert found.student.parameters == 21 + 6
        assert found.student.bytes == found.teacher.bytes == 2 * 27 + 2 * 6 + 8

    def test_without_a_teacher(self, digits):
        _, X_test, _, y_test = digits
        found = quick(nn.Linear(64, 10), None, X_test, y_test)
        assert (found.teacher, found.agreement, found.compression, found.speedup) == (None,) * 4
        assert json.loads(found.to_json())["teacher"] is None
        assert "teacher" not in str(found)

    def test_a_module_as_teacher(self, digits):
        _, X_test, _, y_test = digits
        teacher = nn.Sequential(nn.Linear(64, 40), nn.Linear(40, 10))
        found = quick(nn.Linear(64, 10), teacher, X_test, y_test)
        assert found.teacher.parameters == 65 * 40 + 41 * 10
        assert found.compression == pytest.approx(found.teacher.parameters / 650)


class TestClasses:
    def test_strings_align_through_classes(self):
        X, y = load_wine(return_X_y=True)
        names = np.array(["rosé", "red", "white"])[y]  # sorted: red, rosé, white
        scaled = StandardScaler().fit_transform(X)
        student, fitted = linear_student(scaled, names)
        teacher = RandomForestClassifier(10, random_state=0).fit(scaled, names)
        found = quick(student, teacher, scaled, names)
        assert found.classes == ["red", "rosé", "white"]
        assert found.student.accuracy == pytest.approx(fitted.score(scaled, names))
        assert found.teacher.accuracy == pytest.approx(teacher.score(scaled, names))
        assert min(found.student.accuracy, found.teacher.accuracy) > 0.95
        for models in ((student, teacher), (fitted, None)):  # numbers of columns would not say whose
            with pytest.raises(ValueError, match=r"student's classes, \['red', 'rosé', 'white'\]; row 0 holds 0"):
                quick(*models, scaled, y)
        assert quick(student, None, scaled, np.searchsorted(fitted.classes_, names)).student.accuracy > 0.95

    def test_columns_of_a_teacher_in_another_order(self):
        table = [[0.1, 0.2, 0.7], [0.6, 0.3, 0.1]]  # columns b, c, a
        teacher = Scorer(["b", "c", "a"], table)
        found = quick(Scorer(["a", "b", "c"], [[1, 0, 0.0], [0, 0, 1.0]]), teacher, np.array([[0], [1]]), ["a", "b"])
        assert (found.teacher.accuracy, found.student.accuracy, found.agreement) == (1.0, 0.5, 0.5)
        assert found.teacher.ece == pytest.approx((0.3 + 0.4) / 2)

    def test_integers_that_are_no_column_numbers(self):
        X, y = load_wine(return_X_y=True)
        X = StandardScaler().fit_transform(X)
        student, fitted = linear_student(X, y * 10 + 10)
        found = quick(student, fitted, X, y * 10 + 10)
        assert found.classes == [10, 20, 30]
        assert found.student.accuracy == found.teacher.accuracy > 0.95
        with pytest.raises(ValueError, match=r"y must hold the student's classes, \[10, 20, 30\]; row 0 holds 0"):
            quick(student, fitted, X, y)

    @pytest.mark.parametrize("load", [load_wine, load_breast_cancer], ids=["3 classes", "2 classes"])
    def test_decision_function_where_there_are_no_probabilities(self, load):
        X, y = load(return_X_y=True)
        teacher = make_pipeline(StandardScaler(), LinearSVC()).fit(X, y)
        student = make_pipeline(StandardScaler(), LogisticRegression(C=1e-6)).fit(X, y)
        found = quick(student, teacher, X, y)
        assert found.teacher.accuracy == pytest.approx(teacher.score(X, y))
        assert found.student.accuracy == pytest.approx((student.predict_proba(X).argmax(1) == y).mean())
        assert found.student.accuracy < found.teacher.accuracy
        assert (found.teacher.ece, found.teacher.reliability) == (None, None)
        assert found.student.ece is not None
        assert found.student.parameters is None

    def test_images_are_flattened_for_an_estimator(self, digits, forest):
        _, X_test, _, y_test = digits
        student = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(72, 10))
        found = quick(student, forest, X_test.reshape(-1, 1, 8, 8), y_test)
        assert found.teacher.accuracy == pytest.approx(forest.score(X_test, y_test))

    def test_a_classifier_with_a_network_inside_counts_that(self, digits, forest):
        _, X_test, _, y_test = digits
        network = nn.Linear(64, 10)

        class Classifier:
            student_, classes_ = network, np.arange(10)

            def predict_proba(self, X):
                with torch.no_grad():
                    return network(torch.from_numpy(X)).softmax(-1).numpy()

        found = quick(Classifier(), forest, X_test, y_test)
        assert (found.student.parameters, found.student.bytes) == (650, 2600)
        assert found.student[1:3] == pytest.approx(quick(network, forest, X_test, y_test).student[1:3])

    @pytest.mark.parametrize("wrap", [lambda p: p, lambda p: make_pipeline(p), lambda p: GridSearchCV(p, {}, cv=2)])
    def test_a_distilled_classifier_at_the_end_counts_its_network(self, digits, wrap):
        X, X_test, y, y_test = digits
        student = DistilledClassifier(RandomForestClassifier(20, random_state=0), epochs=3, cv=3, random_state=0)
        whole = wrap(make_pipeline(StandardScaler(), student)).fit(X, y)
        found = quick(whole, None, X_test, y_test)
        parameters = 64 * 32 + 32 + 32 * 10 + 10
        assert (found.student.parameters, found.student.bytes) == (parameters, 4 * parameters)
        assert found.student.accuracy == pytest.approx(whole.score(X_test, y_test))

    def test_the_steps_before_a_distilled_classifier_lead_to_its_teacher_too(self, digits):
        X, X_test, y, y_test = digits
        student = DistilledClassifier(RandomForestClassifier(20, random_state=0), epochs=3, cv=3, random_state=0)
        whole = make_pipeline(StandardScaler(), student).fit(X, y)
        found = quick(whole[-1], whole[-1].teacher_, whole[:-1].transform(X_test), y_test)
        assert found.student.accuracy == pytest.approx(whole.score(X_test, y_test))
        assert found.teacher.accuracy > 0.9
        assert found.compression == pytest.approx(student.compression_)

    @pytest.mark.parametrize(
        ("kind", "copied"),
        [
            ("pipeline", False),
            ("pipeline", True),
            ("nested", True),
            ("search", False),
            ("frozen", True),
            ("frame", False),
        ],
    )
    def test_a_pipelines_own_teacher_gets_what_the_steps_make_of_the_rows(self, kind, copied):
        X, X_test, y, y_test = train_test_split(*load_wine(return_X_y=True), random_state=0)
        student = DistilledClassifier(RandomForestClassifier(20, random_state=0), epochs=20, cv=3, random_state=0)
        whole = make_pipeline(StandardScaler(), student)
        if kind == "nested":
            whole = make_pipeline(FunctionTransformer(np.sqrt), "passthrough", whole)
        if kind == "search":
            whole = GridSearchCV(whole, {"distilledclassifier__alpha": [0.5]}, cv=2)
        if kind == "frame":
            pandas = pytest.importorskip("pandas", reason="pandas is not installed")
            X, X_test = (pandas.DataFrame(x, columns=[f"x{i}" for i in range(13)]) for x in (X, X_test))
            whole.set_output(transform="pandas")
        whole.fit(X, y)
        pipeline = whole.best_estimator_ if kind == "search" else whole
        whole = FrozenEstimator(whole) if kind == "frozen" else whole
        inner = pipeline[-1][-1] if kind == "nested" else pipeline[-1]
        rows = pipeline[:-1].transform(X_test)
        rows = pipeline[-1][:-1].transform(rows) if kind == "nested" else rows
        want = inner.teacher_.score(rows, y_test)
        assert want > 0.9
        teacher = pickle.loads(pickle.dumps(inner.teacher_)) if copied else inner.teacher_
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = quick(whole, teacher, X_test, y_test)
        assert found.teacher.accuracy == pytest.approx(want)
        assert found.student.accuracy == pytest.approx(pipeline.score(X_test, y_test))
        assert found.agreement == pytest.approx((inner.teacher_.predict(rows) == pipeline.predict(X_test)).mean())
        assert found.teacher.name == "RandomForestClassifier"
        assert found.teacher.bytes == len(pickle.dumps(teacher))

    @pytest.mark.parametrize("copied", [False, True])
    def test_a_pipelines_own_module_gets_what_the_steps_make_of_the_rows(self, copied):
        X, y = load_wine(return_X_y=True)
        scaled = StandardScaler().fit_transform(X)
        teacher, _ = linear_student(scaled, y)
        whole = make_pipeline(StandardScaler(), DistilledClassifier(teacher, epochs=5, random_state=0)).fit(X, y)
        assert quick(whole, deepcopy(teacher) if copied else teacher, X, y).teacher.accuracy > 0.95

    def test_other_teachers_get_the_rows_as_they_are(self):
        X, y = load_wine(return_X_y=True)
        forest = RandomForestClassifier(20, random_state=0)
        whole = make_pipeline(StandardScaler(), DistilledClassifier(forest, epochs=5, random_state=0)).fit(X, y)
        raw, scaled = (RandomForestClassifier(20, random_state=1).fit(x, y) for x in (X, whole[:-1].transform(X)))
        assert quick(whole, raw, X, y).teacher.accuracy > 0.95
        hint = r"make_pipeline\(\*student\[:-1\], teacher\)$"
        with pytest.warns(UserWarning, match=rf"teacher has an accuracy of 0\.\d+; .* has 0\.399\. .*{hint}"):
            assert quick(whole, scaled, X, y).teacher.accuracy < 0.4
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert quick(whole, make_pipeline(*whole[:-1], scaled), X, y).teacher.accuracy > 0.95
        few_columns = RandomForestClassifier(5, random_state=0).fit(X[:, :5], y)
        with pytest.raises(ValueError, match=r"^teacher: X has 13 features, but .*Forest.* is expecting 5 features"):
            quick(whole, few_columns, X, y)
        with pytest.raises(ValueError, match=r"^student: X has 5 features"):
            quick(whole, few_columns, X[:, :5], y)

    def test_images_are_not_flattened_for_a_skorch_net(self, digits):
        skorch = pytest.importorskip("skorch")
        X, X_test, y, y_test = (x.reshape(-1, 1, 8, 8) if x.ndim == 2 else x for x in digits)
        cnn = nn.Sequential(nn.Conv2d(1, 4, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(36, 10))
        options = {"optimizer": torch.optim.Adam, "lr": 0.01, "max_epochs": 5, "verbose": 0, "train_split": None}
        net = skorch.NeuralNetClassifier(cnn, criterion=nn.CrossEntropyLoss, **options).fit(X, y)
        for form in (X_test, torch.from_numpy(X_test)):
            found = quick(net, None, form, y_test)
            assert found.student.accuracy == pytest.approx(net.score(X_test, y_test))
            assert found.student.parameters == 40 + 370

    def test_a_module_with_steps_is_no_pipeline(self):
        student = nn.Identity()
        student.steps = 3
        assert quick(student, None, torch.eye(3), [0, 1, 2]).student.accuracy == 1


class Recorder(nn.Module):
    """A student that notes how it is called."""

    def __init__(self):
        super().__init__()
        self.inner, self.frozen, self.calls = nn.Linear(64, 10), nn.Dropout(0.5), []

    def forward(self, X):
        self.calls.append((len(X), self.training, torch.is_inference_mode_enabled(), X.dtype))
        return self.inner(self.frozen(X))


class TestRunning:
    def test_modes_inference_and_batches(self, digits):
        _, X_test, _, y_test = digits
        student, teacher = Recorder().train(), Recorder().train()
        student.frozen.eval()
        report(student, teacher, X_test[:100].astype("float64"), y_test[:100])
        for module in (student, teacher):
            assert {call[1:] for call in module.calls} == {(False, True, torch.float32)}
            assert {call[0] for call in module.calls} == {100, 1, 256}
        assert [m.training for m in student.modules()] == [True, True, False]
        assert all(m.training for m in teacher.modules())

    def test_modes_are_restored_after_an_error(self, digits):
        _, X_test, _, y_test = digits
        student = Recorder().train()
        with pytest.raises(ValueError, match="row 0 holds 14"):
            report(student, None, X_test, y_test + 10)
        assert student.training
        assert not torch.is_inference_mode_enabled()

    def test_latency_is_the_time_of_a_call(self, monkeypatch):
        """Measured with a clock that only the models move."""
        now = 0.0
        monkeypatch.setattr(time, "perf_counter", lambda: now)

        class Slow(nn.Module):
            def __init__(self, single, large):
                super().__init__()
                self.seconds = {1: single, 256: large}

            def forward(self, X):
                nonlocal now
                now += self.seconds.get(len(X), 1.0)
                return X

        models = Slow(0.005, 0.02), Slow(0.05, 0.08)
        found = report(*models, torch.randn(10, 3), torch.zeros(10, dtype=torch.int64))
        assert found.student.seconds == pytest.approx({1: 0.005, 256: 0.02})
        assert found.teacher.seconds == pytest.approx({1: 0.05, 256: 0.08})
        assert found.speedup == pytest.approx({1: 10.0, 256: 4.0})


class TestBadInput:
    @pytest.mark.parametrize("form", ["array", "tensor", "frame"])
    def test_nan_in_x(self, digits, form):
        X = digits[1][:20].copy()
        X[7, 3] = np.nan
        if form == "tensor":
            X = torch.from_numpy(X)
        elif form == "frame":
            X = pytest.importorskip("pandas").DataFrame(X)
        with pytest.raises(ValueError, match=r"X must be finite; row 7 holds a NaN"):
            report(nn.Linear(64, 10), None, X, digits[3][:20])

    def test_infinity_in_a_frame(self, digits):
        frame = pytest.importorskip("pandas").DataFrame(digits[1][:20].astype("float64"))
        frame["kind"] = "text"
        frame.loc[4, 2] = -np.inf
        with pytest.raises(ValueError, match=r"X must be finite; row 4 holds a NaN or an infinity"):
            report(nn.Linear(64, 10), None, frame, digits[3][:20])

    @pytest.mark.parametrize(
        ("rows", "labels", "message"),
        [
            (20, [0] * 19, r"X and y must have the same number of rows, got 20 and 19"),
            (0, [], r"X must hold at least one row"),
            (3, [0, 10, 1], r"y must hold the student's classes, \[0, .*; row 1 holds 10"),
            (3, [0, 1, -100], r"row 2 holds -100"),
            (2, [[0, 1], [1, 0]], r"y must be 1-D, one label per row, got shape \(2, 2\)"),
        ],
    )
    def test_rows_and_labels(self, digits, rows, labels, message):
        with pytest.raises(ValueError, match=message):
            report(nn.Linear(64, 10), None, digits[1][:rows], labels)

    def test_a_teacher_with_other_classes(self, digits, forest):
        _, X_test, _, y_test = digits
        with pytest.raises(ValueError, match=r"teacher must have the student's 4 classes, got 10"):
            report(nn.Linear(64, 4), forest, X_test, y_test)
        named = Scorer([str(k) for k in range(10)], np.eye(10))
        with pytest.raises(ValueError, match=r"teacher must have the student's classes, \['0', .*, got \[0, "):
            report(named, Scorer(range(10), np.eye(10)), np.arange(10)[:, None], y_test[:10])

    def test_models_of_other_kinds(self, digits, forest):
        _, X_test, _, y_test = digits
        with pytest.raises(TypeError, match=r"student must be a torch.nn.Module or a fitted classifier .*, got str; "):
            report("student", forest, X_test, y_test)
        with pytest.raises(TypeError, match=r"teacher must be a torch.nn.Module, .* or None, got StandardScaler; "):
            report(nn.Linear(64, 10), StandardScaler(), X_test, y_test)
        with pytest.raises(TypeError, match=r"teacher must be .*, got the class RandomForestClassifier: pass an inst"):
            report(nn.Linear(64, 10), RandomForestClassifier, X_test, y_test)
        with pytest.raises(TypeError, match=r"student must map 400 rows to \(400, C\) .*, got Tensor of shape \(400,"):
            report(nn.Sequential(nn.Linear(64, 1), nn.Flatten(0)), None, X_test, y_test)
        with pytest.raises(ValueError, match=r"student must not give NaN, got NaN for row 0"):
            report(nn.Sequential(nn.Linear(64, 10), nn.Threshold(9e9, float("nan"))), None, X_test, y_test)
        with pytest.raises(ValueError, match=r"batch_sizes must be integers of at least 1, got 0"):
            report(nn.Linear(64, 10), None, X_test, y_test, batch_sizes=(0,))
        with pytest.raises(ValueError, match=r"batch_sizes must be a sequence of integers, such as \(1, 256\), got 32"):
            report(nn.Linear(64, 10), None, X_test, y_test, batch_sizes=32)

    def test_arguments_in_another_order(self, digits, forest):
        _, X, _, y = digits
        student, order = nn.Linear(64, 10), r"the order is report\(student, teacher, X, y\)"
        for arguments, message in [
            ((None, forest, X, y), "student must be .*, got NoneType; .*, and only teacher may be None"),
            ((X, y, student, forest), "student must be .*, got ndarray; "),
            ((student, X, y, forest), "teacher must be .*, got ndarray; "),
            ((student, X, forest, y), "teacher must be .*, got ndarray; "),
        ]:
            with pytest.raises(TypeError, match=message) as caught:
                report(*arguments)
            caught.match(order)
        for labels, got in [(X, r"shape \(400, 64\)"), (None, "NoneType")]:
            with pytest.raises(ValueError, match=rf"y must be 1-D, one label per row, got {got}; {order}"):
                report(student, forest, y, labels)
        with pytest.raises(ValueError, match=r"X must be a tensor, an array or a DataFrame .*, got NoneType$"):
            report(student, forest, None, y)


@pytest.fixture(scope="module")
def found(digits, forest):
    torch.manual_seed(0)
    return report(nn.Linear(64, 10), forest, digits[1], digits[3])


class TestForms:
    def test_table(self, found):
        assert repr(found) == str(found)  # what a notebook shows
        lines = str(found).splitlines()
        assert lines[0] == f"400 rows, 10 classes; torch threads: {torch.get_num_threads()}"
        cells = {line.split("   ")[0]: line.split() for line in lines}
        assert cells["accuracy"][1:] == [f"{found.student.accuracy:.4f}", f"{found.teacher.accuracy:.4f}"]
        assert cells["agreement"][1:] == [f"{found.agreement:.4f}"]
        assert cells["bytes"][1:3] == ["2,600", f"{found.teacher.bytes:,}"]
        assert cells["bytes"][-1] == "smaller"
        assert cells["ms, batch of 256"][4:6] == [f"{1e3 * m.seconds[256]:.3f}" for m in (found.student, found.teacher)]
        assert cells["9"][-1] == str(found.per_class[9].support)

    def test_json(self, found, tmp_path):
        path = tmp_path / "report.json"
        text = found.to_json(path)
        assert path.read_text() == text
        figures = json.loads(text)
        assert figures["agreement"] == found.agreement
        assert figures["student"]["seconds"]["256"] == found.student.seconds[256]
        assert figures["per_class"][3] == {"name": 3, **found.per_class[3]._asdict()}
        assert figures["teacher"]["reliability"][-1] == found.teacher.reliability[-1]._asdict()
        assert sorted(p.name for p in tmp_path.iterdir()) == ["report.json"]

    def test_a_full_disk_keeps_the_old_files(self, found, tmp_path, monkeypatch):
        path = tmp_path / "report.json"
        path.write_text("old")

        def full(handle):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            found.to_json(path)
        assert path.read_text() == "old"
        assert sorted(p.name for p in tmp_path.iterdir()) == ["report.json"]

    def test_plot_is_a_png_and_leaves_pyplot_alone(self, found, tmp_path, monkeypatch):
        pytest.importorskip("matplotlib")
        monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
        figure = found.plot(tmp_path / "report.png")
        assert (tmp_path / "report.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert len(figure.axes) == 4
        heights = [bar.get_height() for bar in figure.axes[0].patches]
        assert heights == [found.student.accuracy, found.teacher.accuracy, found.agreement]
        assert [bar.get_height() for bar in figure.axes[2].patches] == [c.f1 for c in found.per_class]

    def test_plot_without_teacher_and_without_matplotlib(self, digits, tmp_path, monkeypatch):
        pytest.importorskip("matplotlib")
        alone = quick(nn.Linear(64, 10), None, digits[1], digits[3])
        assert len(alone.plot(tmp_path / "report.png").axes[0].patches) == 1
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        with pytest.raises(ImportError, match=r"pydistill-kd\[demo\]"):
            alone.plot(tmp_path / "report.png")
