"""DistilledClassifier: scikit-learn's own checks, what the student is given, teachers, students, errors."""

import pickle
import warnings
from copy import deepcopy
from typing import ClassVar

import joblib
import numpy as np
import pytest
import torch
from sklearn import config_context
from sklearn.base import BaseEstimator, ClassifierMixin, clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.compose import make_column_transformer
from sklearn.datasets import load_breast_cancer, load_digits, load_wine
from sklearn.dummy import DummyClassifier
from sklearn.ensemble import RandomForestClassifier, StackingClassifier, VotingClassifier
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.model_selection import GridSearchCV, KFold, PredefinedSplit, cross_val_score, train_test_split
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from sklearn.svm import SVC
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch import nn

import pydistill
from pydistill.sklearn import DistilledClassifier
from pydistill.teachers import soft_targets, teacher_outputs


def make_double(n_features, n_classes):
    return nn.Sequential(nn.Linear(n_features, 8), nn.ReLU(), nn.Linear(8, n_classes)).double()


@parametrize_with_checks(
    # 3 folds: some of the checks have classes of 3 rows
    [
        DistilledClassifier(LogisticRegression(), hidden_layer_sizes=(8,), epochs=8, learning_rate=0.03, cv=3),
        DistilledClassifier(LogisticRegression(), student=make_double, epochs=8, learning_rate=0.03, cv=3),
    ]
)
def test_scikit_learns_checks(estimator, check):
    """All of them, with nothing expected to fail."""
    check(estimator)


@pytest.fixture(scope="module")
def digits():
    X, y = load_digits(return_X_y=True)
    return train_test_split(X / 16, y, test_size=0.5, stratify=y, random_state=0)


@pytest.fixture(scope="module")
def wine():
    X, y = load_wine(return_X_y=True)
    return StandardScaler().fit_transform(X), y


@pytest.fixture
def given(monkeypatch):
    """The arguments of every Trainer: a list of (loss, data), in the order of the calls."""
    calls = []
    fit = pydistill.Trainer.fit

    def spy(self, data, *args, **options):
        calls.append((self.loss, data))
        return fit(self, data, *args, **options)

    monkeypatch.setattr(pydistill.Trainer, "fit", spy)
    return calls


def quick(teacher=None, **options):
    teacher = LogisticRegression() if teacher is None else teacher
    return DistilledClassifier(teacher, **({"epochs": 5, "cv": 3, "random_state": 0} | options))


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.student_.parameters()])


def cnn(width):
    """Digits come as rows of 64 numbers."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, width, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(9 * width, 10),
    )


def make_cnn_student(n_features, n_classes):
    assert (n_features, n_classes) == (64, 10)
    return cnn(8)


def xgboost_teacher():
    xgboost = pytest.importorskip("xgboost", reason="xgboost is not installed")
    return xgboost.XGBClassifier(n_estimators=20, max_depth=3, n_jobs=1)


TEACHERS = {
    "forest": lambda: RandomForestClassifier(50),
    "xgboost": xgboost_teacher,
    "logistic regression": lambda: LogisticRegression(C=0.1),
    "svc": lambda: SVC(probability=True),
}


class TestTeachersAndStudents:
    # scikit-learn 1.9 deprecates probability=True; it stays tested for as long as users have such teachers.
    @pytest.mark.filterwarnings("ignore:The `probability` parameter:FutureWarning")
    @pytest.mark.parametrize("name", TEACHERS)
    def test_student_is_small_and_nearly_as_good(self, digits, name):
        X, X_test, y, y_test = digits
        model = quick(TEACHERS[name](), epochs=40).fit(X, y)
        teacher, student = model.teacher_.score(X_test, y_test), model.score(X_test, y_test)
        assert teacher > 0.85
        assert student > 0.97 * teacher
        assert 0.92 < model.agreement_ <= 1
        assert sum(p.numel() for p in model.student_.parameters()) == 64 * 32 + 32 + 32 * 10 + 10
        assert not model.student_.training

    def test_torch_teacher_and_cnn_student(self, digits):
        X, X_test, y, y_test = digits
        half = len(X) // 2  # the teacher has not seen the rows that it teaches
        torch.manual_seed(0)
        teacher = cnn(32)
        optimizer = torch.optim.Adam(teacher.parameters(), lr=1e-2, fused=True)
        trainer = pydistill.Trainer(
            teacher, pydistill.DistillationLoss(alpha=0.0), optimizer=optimizer, seed=0, progress=False
        )
        trainer.fit((X[:half].astype("float32"), y[:half]), epochs=20)
        before = weights_of(teacher)
        model = quick(teacher, student=make_cnn_student, epochs=40, batch_size=32).fit(X[half:], y[half:])
        assert model.teacher_ is teacher
        assert torch.equal(weights_of(teacher), before)
        right = (trainer.predict(torch.tensor(X_test, dtype=torch.float32)).argmax(-1).numpy() == y_test).mean()
        assert right > 0.9
        assert model.score(X_test, y_test) > 0.95 * right
        assert isinstance(model.student_[1], nn.Conv2d)
        assert model.compression_ > 2

    def test_module_as_student_is_copied_with_its_weights(self, wine):
        torch.manual_seed(3)
        student = nn.Linear(13, 3)
        before = weights_of(student)
        models = [quick(student=student, epochs=1, learning_rate=rate).fit(*wine) for rate in (1e-9, 1e-2)]
        assert torch.equal(weights_of(student), before)
        torch.testing.assert_close(weights(models[0]), before, rtol=0, atol=1e-6)
        assert not torch.allclose(weights(models[1]), before, rtol=0, atol=1e-3)

    def test_lazy_student_gets_its_sizes(self, wine):
        model = quick(student=lambda n_features, n_classes: nn.LazyLinear(n_classes)).fit(*wine)
        assert model.student_.weight.shape == (3, 13)

    @pytest.mark.parametrize(("hidden", "widths"), [((), [3]), (7, [7, 3]), ((np.int64(5), 4), [5, 4, 3])])
    def test_hidden_layer_sizes(self, wine, hidden, widths):
        model = quick(hidden_layer_sizes=hidden, epochs=1).fit(*wine)
        linear = [layer for layer in model.student_ if isinstance(layer, nn.Linear)]
        assert [layer.out_features for layer in linear] == widths

    def test_agreement_compression_and_history(self, wine):
        X, y = wine
        model = quick(RandomForestClassifier(20, random_state=0), epochs=7).fit(X, y)
        targets = soft_targets(model.teacher_, X, y, cv=3)
        assert model.agreement_ == np.mean(model.predict(X) == targets.logits.argmax(-1).numpy())
        # The teacher itself has memorised these rows, and knows more about their labels than it taught.
        assert model.agreement_ != np.mean(model.predict(X) == model.teacher_.predict(X))
        assert [record.epoch for record in model.history_] == list(range(1, 8))
        assert model.history_[-1].train.loss < model.history_[0].train.loss
        assert model.compression_ == len(pickle.dumps(model.teacher_)) / (4 * (13 * 32 + 32 + 32 * 3 + 3))


def weights_of(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


class TestWhatTheStudentIsGiven:
    def test_targets_are_out_of_fold_and_options_reach_the_loss(self, wine, given):
        X, y = wine
        forest = RandomForestClassifier(10, random_state=1)
        model = quick(forest, temperature=3.0, alpha=0.4, cv=4).fit(X, y)
        loss, (inputs, targets, labels) = given[0]
        assert (loss.temperature, loss.alpha, loss.unlabeled) == (3.0, 0.4, "distill")
        assert torch.equal(targets.logits, soft_targets(forest, X, y, cv=4).logits)
        assert torch.equal(inputs, torch.tensor(X))
        assert torch.equal(labels, torch.tensor(y))
        np.testing.assert_array_equal(model.teacher_.predict_proba(X), clone(forest).fit(X, y).predict_proba(X))

    def test_labels_are_coded_in_the_order_of_the_columns(self, wine, given):
        X, y = wine
        names = np.array(["white", "red", "rose"])[y]
        model = quick(RandomForestClassifier(10)).fit(X, names)
        _, (_, targets, labels) = given[0]
        assert model.classes_.tolist() == ["red", "rose", "white"]
        assert (model.classes_[labels] == names).all()
        assert (model.classes_[targets.logits.argmax(-1)] == names).mean() > 0.9
        assert (model.predict(X) == names).mean() > 0.9
        assert model.teacher_.score(X, names) > 0.9  # it predicts the labels themselves

    @pytest.mark.parametrize("names", [["white", "red", "rose"], [1, 2, 3]])
    def test_xgboost_learns_codes_and_predicts_the_labels(self, wine, given, names):
        X, y = wine
        names = np.array(names)[y]
        model = quick(xgboost_teacher(), epochs=20).fit(X, names)
        codes = np.unique(names, return_inverse=True)[1]
        plain = quick(xgboost_teacher(), epochs=20).fit(X, codes)
        assert torch.equal(given[0][1][1].logits, given[1][1][1].logits)
        assert torch.equal(weights(model), weights(plain))
        assert model.teacher_.score(X, names) > 0.95
        assert model.score(X, names) > 0.95
        assert model.agreement_ == plain.agreement_

    def test_sample_weight_is_on_the_students_loss(self, wine, given):
        X, y = wine
        wrong = np.arange(len(y)) % 3 == 0
        spoiled = np.where(wrong, (y + 1) % 3, y)
        weight = np.where(wrong, 0.0, 2.0)
        options = {"alpha": 0.0, "epochs": 60, "hidden_layer_sizes": (64,)}
        weighted = quick(**options).fit(X, spoiled, sample_weight=weight)
        assert given[0][1][3].tolist() == weight[~wrong].tolist()
        assert weighted.score(X, y) > 0.97
        assert quick(**options).fit(X, spoiled).score(X, y) < 0.9
        assert weighted.score(X, spoiled, sample_weight=weight) > 0.97

    def test_unlabelled_rows_get_the_fitted_teachers_outputs_and_weight_one(self, wine, given):
        X, y = wine
        X, more, y, _ = train_test_split(X, y, train_size=60, stratify=y, random_state=0)
        model = quick(RandomForestClassifier(10)).fit(X, y, sample_weight=np.full(60, 3.0), X_unlabeled=more)
        _, (inputs, targets, labels, weight) = given[0]
        assert len(inputs) == len(targets) == len(labels) == len(weight) == 178
        assert (labels[60:] == -100).all()
        assert (labels[:60] != -100).all()
        assert torch.equal(inputs[60:], torch.tensor(more))
        assert torch.equal(targets.logits[60:], teacher_outputs(model.teacher_, more).logits)
        assert weight.tolist() == [3.0] * 60 + [1.0] * 118

    def test_unlabelled_rows_teach(self):
        """With a handful of labels, a student of the rows agrees with its teacher far more often on new rows."""
        X, y = load_digits(return_X_y=True)
        X, rest, y, _ = train_test_split(X / 16, y, train_size=50, stratify=y, random_state=0)
        more, new = rest[:1000], rest[1000:]
        shares = []
        for unlabeled in (None, more):
            model = quick(LogisticRegression(), epochs=30, alpha=1.0).fit(X, y, X_unlabeled=unlabeled)
            shares.append((model.predict(new) == model.teacher_.predict(new)).mean())
        assert shares[1] > shares[0] + 0.05
        assert shares[1] > 0.95

    def test_a_stack_teaches(self, wine):
        stack = StackingClassifier([("near", KNeighborsClassifier())], cv=2)
        assert quick(stack, epochs=20).fit(*wine).score(*wine) > 0.95


class Witness(ClassifierMixin, BaseEstimator):
    """A classifier whose ``fit`` notes the weights that come with the rows: column 0 says what they should be."""

    met: ClassVar = []

    def fit(self, X, y, sample_weight=None):
        Witness.met.append(None if sample_weight is None else np.array_equal(sample_weight, np.asarray(X)[:, 0]))
        self.model_ = GaussianNB().fit(X, y, sample_weight)
        self.classes_ = self.model_.classes_
        return self

    def predict(self, X):
        return self.model_.predict(X)

    def predict_proba(self, X):
        return self.model_.predict_proba(X)


class TestSampleWeight:
    @pytest.fixture
    def weighted(self, wine):
        """Wine with the weights 1, 2, 3, 4 in front; and the weights."""
        X, y = wine
        weight = 1.0 + np.arange(len(y)) % 4
        return np.column_stack([weight, X]), y, weight

    @pytest.mark.parametrize(
        "wrap",
        [
            lambda x: x,
            lambda x: make_pipeline(FunctionTransformer(), x),
            lambda x: make_pipeline(FunctionTransformer(), make_pipeline("passthrough", x)),
            lambda x: GridSearchCV(x, {}, cv=2),
            lambda x: GridSearchCV(make_pipeline(FunctionTransformer(), x), {}, cv=2),
            lambda x: make_pipeline(FunctionTransformer(), GridSearchCV(x, {}, cv=2)),
            lambda x: CalibratedClassifierCV(x, cv=2),
            lambda x: VotingClassifier([("a", x), ("b", LogisticRegression()), ("c", "drop")], voting="soft"),
            lambda x: StackingClassifier([("a", x)], cv=2),
        ],
        ids=[
            "alone",
            "pipeline",
            "nested",
            "search",
            "search of pipeline",
            "pipeline of search",
            "calibrated",
            "vote",
            "stack",
        ],
    )
    def test_weights_reach_the_teacher_row_by_row(self, wrap, weighted):
        X, y, weight = weighted
        Witness.met = []
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            quick(wrap(Witness()), epochs=1).fit(X, y, sample_weight=weight)
        assert len(Witness.met) >= 4  # three folds and all rows
        assert all(Witness.met), Witness.met

    def test_weights_reach_the_steps_before_the_classifier(self, weighted):
        X, y, weight = weighted
        pipeline = make_pipeline(StandardScaler(), GaussianNB())
        model = quick(pipeline, epochs=1).fit(X, y, sample_weight=weight)
        repeated = clone(pipeline).fit(X.repeat(weight.astype(int), 0), y.repeat(weight.astype(int)))
        np.testing.assert_allclose(model.teacher_[0].mean_, repeated[0].mean_)
        np.testing.assert_allclose(model.teacher_.predict_proba(X), repeated.predict_proba(X), rtol=1e-4)

    def test_weights_reach_xgboost_on_codes(self, weighted):
        X, y, weight = weighted
        names = np.array(["red", "white", "amber"])[y]
        models = [quick(xgboost_teacher(), epochs=1).fit(X, names, sample_weight=w) for w in (None, weight)]
        codes = np.unique(names, return_inverse=True)[1]
        want = xgboost_teacher().fit(X, codes, sample_weight=weight).predict_proba(X)
        np.testing.assert_allclose(models[1].teacher_.predict_proba(X), want, rtol=1e-5)
        assert not np.allclose(models[0].teacher_.predict_proba(X), want, rtol=1e-3)

    def test_under_metadata_routing_requests_decide(self, weighted):
        X, y, weight = weighted
        with config_context(enable_metadata_routing=True), warnings.catch_warnings():
            warnings.simplefilter("error")
            asked = make_pipeline(FunctionTransformer(), Witness().set_fit_request(sample_weight=True))
            Witness.met = []
            quick(asked, epochs=1).fit(X, y, sample_weight=weight)
            assert Witness.met == [True] * 4
            with pytest.raises(UserWarning, match=r"sample_weight cannot reach teacher: Pipeline\.fit does not pass"):
                quick(make_pipeline(Witness()), epochs=1).fit(X, y, sample_weight=weight)

    def test_a_teacher_that_takes_no_weights_is_named_in_a_warning(self, weighted, given):
        X, y, weight = weighted
        weight = np.where(np.arange(len(y)) % 5 == 0, 0, weight)
        for teacher in (KNeighborsClassifier(), make_pipeline(StandardScaler(), KNeighborsClassifier())):
            name = type(teacher).__name__
            with pytest.warns(UserWarning, match=rf"cannot reach teacher: {name}\.fit.* counts once") as met:
                model = quick(teacher, epochs=1).fit(X, y, sample_weight=weight)
            assert [x.filename for x in met] == [__file__]
            want = clone(teacher).fit(X[weight > 0], y[weight > 0]).predict_proba(X)
            np.testing.assert_array_equal(model.teacher_.predict_proba(X), want)
            assert given[-1][1][3].tolist() == weight[weight > 0].tolist()
        with warnings.catch_warnings():  # nothing is lost where all rows that count weigh the same
            warnings.simplefilter("error")
            quick(KNeighborsClassifier(), epochs=1).fit(X, y, sample_weight=2.0 * (weight > 0))

    @pytest.mark.parametrize("teacher", [LogisticRegression(), KNeighborsClassifier(), RandomForestClassifier(5)])
    @pytest.mark.parametrize("form", ["array", "list", "frame"])
    def test_rows_of_weight_zero_do_not_exist(self, wine, teacher, form):
        """The model is the same to the bit, even if they hold another class or NaN."""
        X, y = wine
        rows = np.sort(np.random.RandomState(0).permutation(len(y))[:150])
        want = quick(teacher).fit(X[rows], y[rows], sample_weight=np.ones(150))
        more, labels, weight = np.full((200, 13), np.nan), np.full(200, 7), np.zeros(200)
        places = np.sort(np.random.RandomState(1).permutation(200)[:150])
        more[places], labels[places], weight[places] = X[rows], y[rows], 1.0
        if form == "list":
            more, labels, weight = more.tolist(), labels.tolist(), weight.tolist()
        elif form == "frame":
            pandas = pytest.importorskip("pandas", reason="pandas is not installed")
            more = pandas.DataFrame(more, columns=[f"x{i}" for i in range(13)], index=np.arange(200) + 5)
            labels, weight = pandas.Series(labels, index=more.index), pandas.Series(weight, index=more.index)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            got = quick(teacher).fit(more, labels, sample_weight=weight)
        assert got.classes_.tolist() == [0, 1, 2]
        assert torch.equal(weights(got), weights(want))
        assert got.agreement_ == want.agreement_
        assert got.history_[-1].train == want.history_[-1].train

    @pytest.mark.parametrize("splitter", ["indices", "PredefinedSplit", "KFold"])
    def test_folds_are_made_of_the_rows_that_count(self, wine, given, splitter):
        X, y = wine
        weight = (np.arange(len(y)) % 5 != 0).astype(float)
        counts = weight > 0
        fold = np.random.RandomState(0).randint(3, size=len(y))
        pairs = [(np.flatnonzero(fold != k), np.flatnonzero(fold == k)) for k in range(3)]
        of_rows = PredefinedSplit(fold[counts])
        cv, alone = {
            "indices": (pairs, of_rows),
            "PredefinedSplit": (PredefinedSplit(fold), of_rows),
            "KFold": (KFold(3, shuffle=True, random_state=5), KFold(3, shuffle=True, random_state=5)),
        }[splitter]
        quick(cv=cv).fit(X, y, sample_weight=weight)
        quick(cv=alone).fit(X[counts], y[counts])
        assert torch.equal(given[0][1][1].logits, given[1][1][1].logits)

    def test_batch_norm_counts_the_rows_that_count(self, wine):
        X, y = wine
        model = quick(student=make_normalised, batch_size=60, epochs=1)
        model.fit(X[:-1], y[:-1])
        with pytest.raises(ValueError, match="121 rows in batches of 60"):
            model.fit(X, y, sample_weight=np.arange(178) >= 57)
        one_batch_of_one = np.ones(178)
        model.set_params(batch_size=59)
        with pytest.raises(ValueError, match="178 rows in batches of 59"):
            model.fit(X, y, sample_weight=one_batch_of_one)
        one_batch_of_one[5] = 0
        model.fit(X, y, sample_weight=one_batch_of_one)

    def test_float32_does_not_turn_weights_into_zero_or_infinity(self, wine):
        X, y = wine
        for value, shown in ((1e-50, "1e-50"), (1e50, r"1e\+50")):
            with pytest.raises(ValueError, match=rf"sample_weight must be 0 or from 1e-38 to 3e\+38.*got {shown};"):
                quick(student=make_narrow).fit(X, y, sample_weight=np.full(178, value))
        quick(GaussianNB(), student=make_wide, epochs=1).fit(X, y, sample_weight=np.full(178, 1e-50))

    def test_a_student_in_float64_learns_and_predicts_in_float64(self, wine, given):
        X, y = wine
        more = X[:20] + 0.1
        model = quick(student=make_wide, epochs=20).fit(X, y, sample_weight=np.full(178, 0.3), X_unlabeled=more)
        inputs, _, _, weight = given[0][1]
        assert torch.equal(inputs, torch.from_numpy(np.concatenate([X, more])))
        assert weight.tolist() == [0.3] * 178 + [1.0] * 20
        assert model.predict_proba(X).dtype == np.float64
        assert model.score(X, y) > 0.95


def make_narrow(n_features, n_classes):
    return nn.Linear(n_features, n_classes)


def make_wide(n_features, n_classes):
    return nn.Linear(n_features, n_classes, dtype=torch.float64)


class TestPrefit:
    def test_frozen_teacher_is_used_as_it_is(self, wine, given):
        X, y = wine
        forest = RandomForestClassifier(10, random_state=0).fit(X[::2], y[::2])
        probs = forest.predict_proba(X)
        model = quick(FrozenEstimator(forest)).fit(X[1::2], y[1::2])
        assert model.teacher_ is forest
        np.testing.assert_array_equal(forest.predict_proba(X), probs)
        targets = teacher_outputs(forest, X[1::2]).logits
        assert torch.equal(given[0][1][1].logits, targets)
        assert model.agreement_ == (model.predict(X[1::2]) == targets.argmax(-1).numpy()).mean()

    def test_other_classes_are_refused(self, wine):
        X, y = wine
        teacher = FrozenEstimator(LogisticRegression().fit(X, y))
        with pytest.raises(ValueError, match=r"the classes of y, \[1, 2, 3\]; it was fitted on \[0, 1, 2\]"):
            quick(teacher).fit(X, y + 1)
        with pytest.raises(ValueError, match=r"teacher must have the classes of y, \[0, 1\]; "):
            quick(teacher).fit(X[y < 2], y[y < 2])
        with pytest.raises(ValueError, match=r"one output for each of the 3 classes of y, got .*\(178, 4\)"):
            quick(nn.Linear(13, 4)).fit(X, y)
        on_codes = FrozenEstimator(xgboost_teacher().fit(X, y))
        with pytest.raises(ValueError, match=r"it was fitted on \[0, 1, 2\].*codes: pass them as y too, LabelEncoder"):
            quick(on_codes).fit(X, np.array(["a", "b", "c"])[y])

    def test_a_teacher_of_rows_in_another_form_is_warned_of(self, wine):
        X, y = wine
        raw = load_wine(return_X_y=True)[0]
        forest = RandomForestClassifier(10, random_state=0).fit(raw, y)
        good = nn.Linear(13, 3)
        fitted = LogisticRegression().fit(X, y)
        with torch.no_grad():
            good.weight.copy_(torch.tensor(fitted.coef_))
            good.bias.copy_(torch.tensor(fitted.intercept_))
        turned = nn.Sequential(deepcopy(good), nn.Linear(3, 3, bias=False))
        with torch.no_grad():
            turned[1].weight.copy_(torch.eye(3).roll(1, 0))
        for teacher in (FrozenEstimator(forest), turned):
            with pytest.warns(UserWarning, match=r"^teacher has an accuracy of 0\.\d+; .* has 0\.399\.") as met:
                quick(teacher, epochs=1).fit(X, y)
            assert met[0].filename == __file__
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            quick(good, epochs=1).fit(X, y)
            quick(FrozenEstimator(forest), epochs=1, learning_rate=1e-6).fit(raw, y)

    def test_a_frozen_classifier_in_the_teacher_is_refused(self, wine):
        X, y = wine
        frozen = FrozenEstimator(LogisticRegression().fit(X, y))
        pipeline = make_pipeline(StandardScaler().fit(X), frozen)
        for teacher in (pipeline, CalibratedClassifierCV(frozen), VotingClassifier([("a", frozen)], voting="soft")):
            with pytest.raises(ValueError, match=r"^teacher cannot be refitted.*FrozenEstimator\(teacher\)$"):
                quick(teacher).fit(X, y)
        assert quick(FrozenEstimator(pipeline)).fit(X, y).teacher_ is pipeline


class TestScikitLearn:
    def test_pipeline_search_and_cross_validation(self, wine):
        X, y = load_wine(return_X_y=True)
        pipeline = make_pipeline(StandardScaler(), quick(epochs=15))
        grid = {"distilledclassifier__temperature": [1.0, 4.0], "distilledclassifier__alpha": np.array([0.3, 0.9])}
        search = GridSearchCV(pipeline, grid, cv=3, error_score="raise").fit(X, y)
        assert search.best_score_ > 0.93
        best = search.best_estimator_[-1]
        assert (best.temperature, best.alpha) == tuple(
            search.best_params_[f"distilledclassifier__{name}"] for name in ("temperature", "alpha")
        )
        scores = cross_val_score(pipeline, X, y, cv=3, scoring="neg_log_loss", error_score="raise")
        assert (scores > -0.4).all()

    def test_temperature_and_alpha_change_the_student(self, wine):
        models = [quick(temperature=t, alpha=a).fit(*wine) for t, a in [(1.0, 0.5), (4.0, 0.5), (4.0, 1.0)]]
        assert not torch.equal(weights(models[0]), weights(models[1]))
        assert not torch.equal(weights(models[1]), weights(models[2]))

    def test_memory_fits_the_teacher_once_per_split(self, wine, tmp_path):
        grid = {"temperature": [1.0, 2.0, 4.0]}
        counts = []
        for memory in (None, str(tmp_path)):
            Counted.fits = 0
            model = quick(Counted(), memory=memory, epochs=2)
            search = GridSearchCV(model, grid, cv=2, refit=False, error_score="raise").fit(*wine)
            counts.append((Counted.fits, search.cv_results_["mean_test_score"].tolist()))
        assert [fits for fits, _ in counts] == [2 * 3 * (3 + 1), 2 * (3 + 1)]
        assert counts[0][1] == counts[1][1]

    def test_joblib_keeps_the_predictions(self, wine, tmp_path):
        X, y = wine
        model = quick(RandomForestClassifier(5), student=make_linear).fit(X, y)
        joblib.dump(model, tmp_path / "model")
        loaded = joblib.load(tmp_path / "model")
        np.testing.assert_array_equal(loaded.predict_proba(X), model.predict_proba(X))
        assert loaded.history_ == model.history_
        assert loaded.fit(X, y).predict(X).tolist() == model.predict(X).tolist()

    def test_clone_keeps_parameters_and_nested_names(self):
        model = quick(RandomForestClassifier(7), temperature=5.0)
        copy = clone(model.set_params(teacher__max_depth=3))
        assert (copy.temperature, copy.teacher.n_estimators, copy.teacher.max_depth) == (5.0, 7, 3)
        assert copy.teacher is not model.teacher

    def test_unlabelled_rows_pass_the_pipelines_steps_when_asked_to(self, wine, given):
        X, y = load_wine(return_X_y=True)
        with config_context(enable_metadata_routing=True):
            model = quick().set_fit_request(X_unlabeled=True, sample_weight=False)
            pipeline = Pipeline([("scale", StandardScaler()), ("model", model)], transform_input=["X_unlabeled"])
            pipeline.fit(X[::2], y[::2], X_unlabeled=X[1::2])
        inputs = given[0][1][0]
        want = StandardScaler().fit(X[::2]).transform(X[1::2])
        torch.testing.assert_close(inputs[89:], torch.tensor(want, dtype=torch.float64))

    def test_data_frames(self, given):
        pytest.importorskip("pandas", reason="pandas is not installed")
        X, y = load_breast_cancer(return_X_y=True, as_frame=True)
        X, y = X.iloc[:200, :4] / X.iloc[:200, :4].std(), y[:200].map({0: "malignant", 1: "benign"})
        columns = list(X.columns)
        teacher = make_pipeline(make_column_transformer(("passthrough", columns[:2])), LogisticRegression())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model = quick(teacher, epochs=20).fit(X, y, X_unlabeled=X.iloc[:50])
            assert model.feature_names_in_.tolist() == columns
            assert model.score(X, y) > 0.85
        assert model.teacher_[0].n_features_in_ == 4
        assert set(model.predict(X)) == {"benign", "malignant"}
        with pytest.raises(ValueError, match="feature names should match"):
            model.predict(X[columns[::-1]])
        with pytest.raises(ValueError, match="feature names should match"):
            model.fit(X, y, X_unlabeled=X[columns[::-1]])

    def test_probabilities_are_the_students_softmax_at_one(self, wine):
        X, y = wine
        model = quick(temperature=4.0).fit(X, y)
        with torch.no_grad():
            want = model.student_(torch.tensor(X, dtype=torch.float32)).softmax(-1)
        np.testing.assert_allclose(model.predict_proba(X), want, rtol=1e-5)
        assert (model.predict(X) == want.argmax(-1).numpy()).all()


def make_linear(n_features, n_classes):
    return nn.Linear(n_features, n_classes)


class Counted(ClassifierMixin, BaseEstimator):
    """A classifier that counts how often one was fitted."""

    fits = 0

    def fit(self, X, y):
        Counted.fits += 1
        self.model_ = LogisticRegression().fit(X, y)
        self.classes_ = self.model_.classes_
        return self

    def predict_proba(self, X):
        return self.model_.predict_proba(X)


class TestSeeds:
    def test_one_seed_gives_one_result_and_leaves_torchs_alone(self, wine):
        state = torch.random.get_rng_state()
        models = [
            quick(RandomForestClassifier(5), random_state=s, student=student).fit(*wine)
            for student in (None, make_dropout)
            for s in (4, 4, 5)
        ]
        assert torch.equal(torch.random.get_rng_state(), state)
        for first, second, other in (models[:3], models[3:]):
            assert torch.equal(weights(first), weights(second))
            assert first.teacher_.random_state == second.teacher_.random_state is not None
            assert not torch.equal(weights(first), weights(other))

    def test_a_seed_of_the_teachers_own_is_kept(self, wine):
        pipeline = make_pipeline(StandardScaler(), RandomForestClassifier(5, random_state=42))
        model = quick(pipeline).fit(*wine)
        assert model.teacher_[-1].random_state == 42
        assert pipeline[-1].random_state == 42
        assert not hasattr(pipeline[-1], "estimators_")  # clones are fitted

    def test_without_a_seed_results_differ(self, wine):
        models = [quick(random_state=None).fit(*wine) for _ in range(2)]
        assert not torch.equal(weights(models[0]), weights(models[1]))


def make_dropout(n_features, n_classes):
    return nn.Sequential(nn.Linear(n_features, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, n_classes))


class Tiny(nn.Module):
    """A student that takes no arguments."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(13, 3)

    def forward(self, x):
        return self.layer(x)


def make_normalised(n_features, n_classes):
    return nn.Sequential(nn.Linear(n_features, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, n_classes))


class TestErrors:
    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"temperature": 0.0}, ValueError, "temperature"),
            ({"alpha": 1.5}, ValueError, "alpha.*1.5"),
            ({"epochs": 0}, ValueError, "epochs must be at least 1, got 0"),
            ({"epochs": 2.5}, TypeError, "epochs must be an integer, got 2.5"),
            ({"batch_size": -1}, ValueError, "batch_size must be at least 1, got -1"),
            ({"hidden_layer_sizes": (4, 0)}, ValueError, r"hidden_layer_sizes must be integers.*got \(4, 0\)"),
            ({"learning_rate": -1.0}, ValueError, "learning rate: -1"),
            ({"student": "mlp"}, TypeError, "student must be a torch module or a function.*got str"),
            (
                {"student": Tiny},
                TypeError,
                r"such as MyNet\(\), or a function.*Tiny does not take these two arguments: too many",
            ),
            ({"student": lambda n: None}, TypeError, "does not take these two arguments: too many"),
            ({"student": lambda n, c: None}, TypeError, "must return a torch module, got NoneType"),
            (
                {"student": lambda n, c: nn.Linear(n, 2)},
                ValueError,
                r"student must map \(rows, 13\) to logits \(rows, 3\).*maps \(2, 13\) to \(2, 2\)",
            ),
        ],
    )
    def test_options_are_checked_before_the_teacher_is_fitted(self, wine, options, error, message):
        Counted.fits = 0
        with pytest.raises(error, match=message):
            quick(Counted(), **options).fit(*wine)
        assert Counted.fits == 0

    def test_data(self, wine):
        X, y = wine
        with pytest.raises(ValueError, match=r"y must hold at least two classes, got 1 class$"):
            quick().fit(X[y == 1], y[y == 1])
        with pytest.raises(ValueError, match="two classes in rows whose sample_weight is not 0, got 1 class"):
            quick().fit(X, y, sample_weight=(y == 1).astype(float))
        with pytest.raises(ValueError, match=r"[Nn]egative"):
            quick().fit(X, y, sample_weight=np.linspace(-1, 1, len(y)))
        with pytest.raises(ValueError, match="X_unlabeled must have the 13 features of X, got 5"):
            quick().fit(X, y, X_unlabeled=X[:, :5])
        with pytest.raises(ValueError, match="X_unlabeled must hold at least one row, got none"):
            quick().fit(X, y, X_unlabeled=X[:0])
        hole = X.copy()
        hole[3, 2] = np.nan
        with pytest.raises(ValueError, match="Input X_unlabeled contains NaN"):
            quick().fit(X, y, X_unlabeled=hole)
        with pytest.raises(ValueError, match="Input X contains NaN"):
            quick().fit(hole, y)

    def test_teachers_without_probabilities(self, wine):
        with pytest.raises(ValueError, match="must have predict_proba, got SVC"):
            quick(SVC()).fit(*wine)

    @pytest.mark.parametrize(
        ("teacher", "error", "message"),
        [
            (RandomForestClassifier, TypeError, "got the class RandomForestClassifier: pass an instance"),
            ("forest", TypeError, "with predict_proba, got str"),
            (LinearRegression(), ValueError, "which LinearRegression is not"),
        ],
    )
    def test_teachers_that_are_no_classifiers(self, wine, teacher, error, message):
        with pytest.raises(error, match=f"^teacher must be a classifier.*{message}"):
            quick(teacher).fit(*wine)
        with pytest.raises(TypeError, match=r"^teacher must be a classifier with predict_proba, got NoneType"):
            DistilledClassifier(None).fit(*wine)

    @pytest.mark.parametrize(("batch_size", "unlabeled"), [(59, 0), (177, 0), (1, 0), (60, 3)])
    def test_a_last_batch_of_one_row_under_batch_norm(self, wine, batch_size, unlabeled):
        X, y = wine
        options = {"student": make_normalised, "batch_size": batch_size, "epochs": 1}
        more = X[:unlabeled] if unlabeled else None
        rows = 178 + unlabeled
        Counted.fits = 0
        with pytest.raises(
            ValueError, match=rf"batch_size must not leave.*one row.*{rows} rows in batches of {batch_size}"
        ):
            quick(Counted(), **options).fit(X, y, X_unlabeled=more)
        assert Counted.fits == 0
        quick(**options | {"student": None}).fit(X, y, X_unlabeled=more)  # no BatchNorm
        if batch_size > 1:
            quick(**options).fit(X[2:], y[2:], X_unlabeled=more)

    def test_a_student_that_diverges_is_not_kept(self, wine):
        X, y = wine
        model = quick(DummyClassifier(), epochs=3).fit(X, y)
        before = model.student_
        for rate, message in (
            (1e200, r"in epoch 1, [\s\S]*"),
            (1e30, "must give finite logits for X, got NaN or infinity in .*32: "),
        ):
            model.learning_rate = rate
            with pytest.raises(ValueError, match=rf"{message}scale the features.*_rate.*1e\+"):
                model.fit(X, y)
            assert model.student_ is before

    def test_a_failed_fit_keeps_the_fitted_model(self, wine):
        X, y = wine
        model = quick(KNeighborsClassifier(3)).fit(X, y)
        probs = model.predict_proba(X)
        with pytest.raises(ValueError, match="classes"):
            model.fit(X, np.zeros(len(y)))
        with pytest.raises(ValueError, match=r"got 1 class$"):  # other columns: they are noted first
            model.fit(X[:, :5], np.zeros(len(y)))
        assert model.n_features_in_ == 13
        np.testing.assert_array_equal(model.predict_proba(X), probs)
