"""Teachers: targets that the row's own label did not shape, in the right columns, as logits where there are any."""

import math
import sys
import warnings

import numpy as np
import pytest
import torch
from sklearn.base import BaseEstimator, ClassifierMixin, clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.datasets import load_breast_cancer, load_digits, load_wine
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.ensemble import (
    AdaBoostClassifier,
    BaggingClassifier,
    GradientBoostingClassifier,
    HistGradientBoostingClassifier,
    RandomForestClassifier,
    StackingClassifier,
    VotingClassifier,
)
from sklearn.exceptions import NotFittedError
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LinearRegression, LogisticRegression, LogisticRegressionCV, RidgeClassifier
from sklearn.model_selection import (
    GridSearchCV,
    GroupKFold,
    KFold,
    PredefinedSplit,
    ShuffleSplit,
    StratifiedKFold,
    cross_val_predict,
)
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC, LinearSVC
from sklearn.tree import DecisionTreeClassifier
from torch import nn

import pydistill
from pydistill.targets import looks_like_probabilities
from pydistill.teachers import soft_targets, teacher_outputs


@pytest.fixture(scope="module")
def wine():
    """178 rows, 3 classes, in the order of the classes."""
    X, y = load_wine(return_X_y=True)
    return StandardScaler().fit_transform(X), y


@pytest.fixture(scope="module")
def cancer():
    """Two classes."""
    X, y = load_breast_cancer(return_X_y=True)
    return StandardScaler().fit_transform(X)[:200], y[:200]


def xgboost(**options):
    module = pytest.importorskip("xgboost")
    return module.XGBClassifier(**({"n_estimators": 8, "max_depth": 3, "n_jobs": 1} | options))


LOGITS = {
    "LogisticRegression": lambda: LogisticRegression(),
    "LogisticRegressionCV": lambda: LogisticRegressionCV(
        Cs=2, cv=3, l1_ratios=(0.0,), use_legacy_attributes=False, scoring="accuracy"
    ),
    "HistGradientBoosting": lambda: HistGradientBoostingClassifier(max_iter=5, max_leaf_nodes=7),
    "GradientBoosting": lambda: GradientBoostingClassifier(n_estimators=5, random_state=0),
    "LinearDiscriminantAnalysis": lambda: LinearDiscriminantAnalysis(),
    "XGBClassifier": lambda: xgboost(),
}
PROBS = {
    "RandomForest": lambda: RandomForestClassifier(20, random_state=0),
    "KNeighbors": lambda: KNeighborsClassifier(),
    "GaussianNB": lambda: GaussianNB(),
    "AdaBoost": lambda: AdaBoostClassifier(n_estimators=5, random_state=0),
    "CalibratedSVC": lambda: CalibratedClassifierCV(SVC(), ensemble=False, cv=3),
}


def decisions(estimator, X):
    if "xgboost" in type(estimator).__module__:
        return estimator.predict(X, output_margin=True)
    return estimator.decision_function(X)


class TestOutOfFold:
    @pytest.mark.parametrize("make", (LOGITS | PROBS).values(), ids=LOGITS | PROBS)
    @pytest.mark.parametrize("data", ["wine", "cancer"])
    def test_equal_cross_val_predicts_probabilities(self, make, data, request):
        X, y = request.getfixturevalue(data)
        targets = soft_targets(make(), X, y, cv=3)
        probs = cross_val_predict(make(), X, y, cv=3, method="predict_proba")
        assert targets.logits.dtype == torch.float32
        assert targets.shape == probs.shape
        np.testing.assert_allclose(targets.logits.softmax(-1), probs, rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("make", LOGITS.values(), ids=LOGITS)
    @pytest.mark.parametrize("data", ["wine", "cancer"])
    def test_exact_logits(self, make, data, request):
        X, y = request.getfixturevalue(data)
        scores = decisions(make().fit(X, y), X)
        want = np.stack([np.zeros(len(y)), scores], 1) if scores.ndim == 1 else scores
        logits = teacher_outputs(make().fit(X, y), X).logits
        np.testing.assert_allclose(logits, want, rtol=1e-5, atol=1e-6)
        assert not np.allclose(logits, torch.from_numpy(want).log_softmax(-1), atol=1e-3)  # no log-probabilities

    @pytest.mark.parametrize("name", PROBS)
    def test_log_probabilities_elsewhere(self, name, wine):
        X, y = wine
        teacher = PROBS[name]().fit(X, y)
        targets = teacher_outputs(teacher, X)
        np.testing.assert_allclose(targets.logits.exp(), teacher.predict_proba(X), rtol=1e-5, atol=1e-7)
        assert targets.has_zeros == (name in ("RandomForest", "KNeighbors"))

    def test_decision_values_of_other_losses_are_not_logits(self, cancer):
        X, y = cancer
        boosting = GradientBoostingClassifier(loss="exponential", n_estimators=5).fit(X, y)
        hinge = xgboost(objective="binary:hinge").fit(X, y)
        for teacher in (boosting, hinge):
            probs = teacher_outputs(teacher, X).logits.exp()
            np.testing.assert_allclose(probs, teacher.predict_proba(X), rtol=1e-5, atol=1e-6)

    def test_small_probabilities_survive_float32(self):
        class Sure(ClassifierMixin, BaseEstimator):  # as naive Bayes is
            classes_ = np.array([0, 1])

            def predict_proba(self, X):
                return np.tile([1e-60, 1 - 1e-60], (len(X), 1))

        targets = teacher_outputs(Sure(), np.zeros((4, 1)))
        assert targets.logits[0, 0] == pytest.approx(-60 * np.log(10), rel=1e-6)
        assert not targets.has_zeros

    def test_a_row_does_not_see_its_label(self, wine):
        X, y = wine
        nearest = KNeighborsClassifier(1)
        ours = soft_targets(nearest, X, y).logits.argmax(-1).numpy()
        assert 0.8 < (ours == y).mean() < 1
        with pytest.warns(UserWarning, match="in_sample"):
            seen = soft_targets(clone(nearest).fit(X, y), X, y, in_sample=True).logits.argmax(-1).numpy()
        assert (seen == y).all()

    def test_the_estimator_is_not_touched(self, wine):
        X, y = wine
        unfitted, fitted = LogisticRegression(), LogisticRegression().fit(X[:130], y[:130])
        coef = fitted.coef_.copy()
        for estimator in (unfitted, fitted):
            soft_targets(estimator, X, y)
        assert not hasattr(unfitted, "coef_")
        np.testing.assert_array_equal(fitted.coef_, coef)

    def test_splitters_and_iterables(self, wine):
        X, y = wine
        folds = StratifiedKFold(4, shuffle=True, random_state=3)
        groups = np.arange(len(y)) % 7
        for cv in (folds, list(GroupKFold(3).split(X, y, groups))):
            got = soft_targets(LogisticRegression(), X, y, cv=cv).logits.softmax(-1)
            want = cross_val_predict(LogisticRegression(), X, y, cv=cv, method="predict_proba")
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)
        generator = GroupKFold(3).split(X, y, groups)
        torch.testing.assert_close(soft_targets(LogisticRegression(), X, y, cv=generator).logits.softmax(-1), got)

    def test_usable_in_training(self, wine):
        X, y = wine
        targets = soft_targets(RandomForestClassifier(40, oob_score=True, random_state=0), X, y)
        inputs, student = torch.tensor(X, dtype=torch.float32), nn.Linear(13, 3)
        optimizer = torch.optim.Adam(student.parameters(), lr=3e-2)
        loss = pydistill.DistillationLoss(temperature=2.0, alpha=0.9)
        trainer = pydistill.Trainer(student, loss, optimizer=optimizer, seed=0, progress=False)
        history = trainer.fit((inputs, targets, torch.tensor(y)), epochs=20)
        assert history[-1].train.accuracy > 0.95
        assert history[-1].train.agreement > 0.95


class TestSampleWeight:
    """Weights of 0, 1, 2, ... are that many copies of the row, in its fold."""

    @pytest.mark.parametrize(
        "estimator",
        [
            LogisticRegression(solver="newton-cholesky", tol=1e-10),
            DecisionTreeClassifier(max_depth=3, random_state=0),
            make_pipeline(StandardScaler(), LogisticRegression(solver="newton-cholesky", tol=1e-10)),
        ],
        ids=["logistic regression", "tree", "pipeline"],
    )
    def test_integers_are_repeated_rows(self, estimator, wine):
        X, y = wine
        weight = np.random.RandomState(0).randint(4, size=len(y))
        fold = np.arange(len(y)) % 3
        copies = np.arange(len(y)).repeat(weight)
        got = soft_targets(estimator, X, y, cv=PredefinedSplit(fold), sample_weight=weight).logits
        want = soft_targets(estimator, X[copies], y[copies], cv=PredefinedSplit(fold[copies])).logits
        torch.testing.assert_close(got[copies], want, rtol=1e-4, atol=1e-4)
        plain = soft_targets(estimator, X, y, cv=PredefinedSplit(fold)).logits
        assert not torch.allclose(plain[copies].softmax(-1), want.softmax(-1), rtol=0, atol=1e-2)
        assert got.shape == (len(y), 3)
        assert (got[weight == 0] == got[weight == 0][:, :1]).all()  # uniform

    def test_a_label_of_weight_zero_is_no_class(self, wine):
        X, y = wine
        hole, labels, weight = X.copy(), y.astype(float), np.ones(len(y))
        hole[::9], labels[::9], weight[::9] = np.nan, np.nan, 0
        got = soft_targets(LogisticRegression(), hole, labels, sample_weight=weight)
        want = soft_targets(LogisticRegression(), X[weight > 0], y[weight > 0])
        assert torch.equal(got.logits[torch.from_numpy(weight) > 0], want.logits)

    def test_out_of_bag(self, wine):
        X, y = wine
        weight = np.arange(len(y)) % 4
        forest = RandomForestClassifier(60, oob_score=True, random_state=0)
        got = soft_targets(forest, X, y, sample_weight=weight).logits.exp()[weight > 0]
        fitted = clone(forest).fit(X[weight > 0], y[weight > 0], sample_weight=weight[weight > 0])
        np.testing.assert_allclose(got, fitted.oob_decision_function_, rtol=1e-5, atol=1e-7)

    def test_an_estimator_without_weights_warns(self, wine):
        X, y = wine
        weight = 1.0 + np.arange(len(y)) % 2
        with pytest.warns(UserWarning, match="cannot reach estimator: KNeighborsClassifier") as met:
            got = soft_targets(KNeighborsClassifier(), X, y, sample_weight=weight)
        assert met[0].filename == __file__
        assert torch.equal(got.logits, soft_targets(KNeighborsClassifier(), X, y).logits)

    def test_errors(self, wine):
        X, y = wine
        some = np.ones(len(y))
        some[0] = 0
        for weight, message in (
            (np.ones(9), r"sample_weight.shape == \(9,\), expected \(178,\)"),
            (-some, "[Nn]egative"),
            (0 * some, "at least one non-zero"),
            (some * np.nan, "sample_weight contains NaN"),
        ):
            with pytest.raises(ValueError, match=message):
                soft_targets(LogisticRegression(), X, y, sample_weight=weight)
        for cv in ([([1, 2], [3, 178])], [([1, 2], [0.5])], [([1, 2], np.ones(178, bool))]):
            with pytest.raises(ValueError, match="cv must hold numbers of rows, from 0 to 177, got"):
                soft_targets(LogisticRegression(), X, y, cv=cv, sample_weight=some)
        with pytest.raises(ValueError, match="cv must hold out each of the 177 rows once; it holds out 2"):
            soft_targets(LogisticRegression(), X, y, cv=[([5, 6], [0, 1, 2])], sample_weight=some)


class TestColumns:
    def test_names_are_sorted(self, wine):
        X, y = wine
        names = np.array(["red", "white", "amber"])[y]
        ours = soft_targets(LogisticRegression(), X, names).logits
        plain = soft_targets(LogisticRegression(), X, y).logits
        torch.testing.assert_close(ours.softmax(-1), plain[:, [2, 0, 1]].softmax(-1), rtol=1e-2, atol=1e-3)

    @pytest.mark.parametrize("data", ["wine", "cancer"])
    def test_an_estimators_own_order_is_undone(self, data, request):
        class Backwards(RandomForestClassifier):
            def fit(self, X, y):
                super().fit(X, y)
                self.classes_ = self.classes_[::-1]
                return self

            def predict_proba(self, X):
                return super().predict_proba(X)[:, ::-1]

        X, y = request.getfixturevalue(data)
        options = {"n_estimators": 20, "random_state": 0}
        want = soft_targets(RandomForestClassifier(**options), X, y)
        torch.testing.assert_close(soft_targets(Backwards(**options), X, y).logits, want.logits)

    def test_binary_scores_point_to_the_second_class(self, cancer):
        X, y = cancer
        names = np.where(y == 1, "a benign one", "malignant")  # sorted: the other way round
        for estimator in (LogisticRegression(), HistGradientBoostingClassifier(max_iter=20)):
            classes = soft_targets(estimator, X, names).logits.argmax(-1).numpy()
            assert (np.unique(names)[classes] == names).mean() > 0.9

    def test_class_weights_keep_their_names(self, wine):
        X, y = wine
        names = np.array(["a", "b", "c"])[y]
        weighted = soft_targets(LogisticRegression(class_weight={"a": 1e-9}), X, names)
        assert sorted(weighted.logits.argmax(-1).unique()) == [1, 2]

    def test_a_class_with_fewer_rows_than_folds(self, wine):
        X, y = wine
        y = np.where(np.arange(len(y)) < 3, 7, y)
        with pytest.raises(ValueError, match=r"at least 5 rows of each class.*holds 3 of class 7\."):
            soft_targets(LogisticRegression(), X, y)
        targets = soft_targets(LogisticRegression(), X, y, cv=3)
        assert targets.shape == (len(y), 4)
        assert torch.isfinite(targets.logits).all()

    def test_a_fold_that_lacks_a_class(self, wine):
        X, y = wine  # sorted by class: contiguous folds hold whole classes out
        with pytest.raises(ValueError, match=r"cv must leave every class.*fold 0 has none of class 0$"):
            soft_targets(LogisticRegression(), X, y, cv=KFold(3))


class TestCodes:
    """XGBClassifier takes no labels but 0, 1, ...: it is fitted on their codes."""

    @pytest.mark.parametrize("names", [np.array(["red", "white", "amber"]), np.array([30, 10, 20])])
    @pytest.mark.parametrize(
        "wrap",
        [
            lambda xgb: xgb,
            lambda xgb: make_pipeline(StandardScaler(), xgb),
            lambda xgb: GridSearchCV(xgb, {"max_depth": [3]}, cv=2),
            lambda xgb: CalibratedClassifierCV(xgb, cv=2),
        ],
        ids=["alone", "pipeline", "search", "calibrated"],
    )
    def test_any_labels(self, wrap, names, wine):
        X, y = wine
        places = np.searchsorted(np.sort(names), names)  # of the classes 0, 1, 2 among the sorted names
        ours = soft_targets(wrap(xgboost()), X, names[y], cv=3).logits
        plain = soft_targets(wrap(xgboost()), X, places[y], cv=3).logits
        assert torch.equal(ours, plain)
        assert (ours.argmax(-1).numpy() == places[y]).mean() > 0.8

    def test_out_of_bag_rows_stay_out_of_bag(self, wine):
        X, y = wine
        bag = BaggingClassifier(xgboost(), n_estimators=30, oob_score=True, random_state=0)
        names = np.array(["a", "b", "c"])[y]
        want = clone(bag).fit(X, names).oob_decision_function_
        np.testing.assert_allclose(soft_targets(bag, X, names).logits.exp(), want, rtol=1e-4, atol=1e-6)

    @pytest.mark.filterwarnings("ignore:in_sample")
    def test_prefit_on_codes_is_told_what_to_do(self, wine):
        X, y = wine
        frozen = FrozenEstimator(xgboost().fit(X, y))
        with pytest.raises(ValueError, match=r"\['a', 'b', 'c'\]; it was fitted on \[0, 1, 2\].*LabelEncoder"):
            soft_targets(frozen, X, np.array(["a", "b", "c"])[y], in_sample=True)


class TestMetaEstimators:
    def test_a_stack_has_probabilities_once_it_is_fitted(self, wine):
        X, y = wine
        stack = StackingClassifier([("nb", GaussianNB()), ("near", KNeighborsClassifier())], cv=2)
        assert not hasattr(stack, "predict_proba")
        got = soft_targets(stack, X, y, cv=3).logits.exp()
        same = stack.set_params(final_estimator=LogisticRegression())  # cross_val_predict wants to be told of it
        want = cross_val_predict(same, X, y, cv=3, method="predict_proba")
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)
        with pytest.raises(NotFittedError):
            teacher_outputs(stack.set_params(final_estimator=None), X)

    def test_a_vote_without_probabilities(self, wine):
        vote = VotingClassifier([("nb", GaussianNB())], voting="hard")
        with pytest.raises(ValueError, match="must have predict_proba, got VotingClassifier without"):
            soft_targets(vote, *wine)


class TestOutOfBag:
    @pytest.mark.parametrize("kind", [RandomForestClassifier, BaggingClassifier])
    def test_is_the_forests_own(self, kind, wine):
        X, y = wine
        forest = kind(n_estimators=60, oob_score=True, random_state=0)
        targets = soft_targets(forest, X, y)
        want = clone(forest).fit(X, y).oob_decision_function_
        np.testing.assert_allclose(targets.logits.exp(), want, rtol=1e-5, atol=1e-7)

    @pytest.mark.filterwarnings("ignore:Some inputs do not have OOB", "ignore:invalid value")
    @pytest.mark.parametrize("kind", [RandomForestClassifier, BaggingClassifier])
    def test_rows_that_were_never_out_of_bag(self, kind, wine):
        with pytest.raises(ValueError, match=r"no out-of-bag targets for \d+ of 178 rows .*its 3 members"):
            soft_targets(kind(n_estimators=3, oob_score=True, random_state=0), *wine)

    def test_in_a_pipeline_folds_are_used(self, wine):
        X, y = wine
        forest = RandomForestClassifier(20, oob_score=True, random_state=0)
        got = soft_targets(make_pipeline(StandardScaler(), forest), X, y).logits.exp()
        want = cross_val_predict(make_pipeline(StandardScaler(), forest), X, y, method="predict_proba")
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)


class TestWrapped:
    def wrappers(self, estimator):
        pipeline = make_pipeline(StandardScaler(), estimator)
        search = GridSearchCV(pipeline, {"standardscaler__with_mean": [True]}, cv=2)
        return {
            "pipeline": pipeline,
            "nested": make_pipeline(StandardScaler(), pipeline),
            "alone": make_pipeline(estimator),
            "search": search,
            "search within": make_pipeline(StandardScaler(), GridSearchCV(estimator, {}, cv=2)),
        }

    @pytest.mark.parametrize("make", [LOGITS["LogisticRegression"], LOGITS["XGBClassifier"]], ids=["sklearn", "xgb"])
    @pytest.mark.parametrize("wrapper", ["pipeline", "nested", "alone", "search", "search within"])
    def test_the_last_step_decides(self, make, wrapper, wine):
        X, y = wine  # standardised already: once more changes nothing
        estimator = make()
        got = soft_targets(self.wrappers(estimator)[wrapper], X, y, cv=3).logits
        want = torch.empty_like(got)
        for train, test in StratifiedKFold(3).split(X, y):
            steps = (
                StandardScaler().fit(X[train])
                if wrapper != "alone"
                else StandardScaler(with_mean=False, with_std=False).fit(X)
            )
            fitted = clone(estimator).fit(steps.transform(X[train]), y[train])
            want[test] = torch.as_tensor(decisions(fitted, steps.transform(X[test])), dtype=torch.float32)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)

    def test_frozen_estimators_cannot_be_refitted(self, wine):
        X, y = wine
        frozen = FrozenEstimator(LogisticRegression().fit(X, y))
        for estimator in (frozen, make_pipeline(StandardScaler(), frozen)):
            with pytest.raises(ValueError, match=r"frozen.*teacher_outputs.*in_sample=True"):
                soft_targets(estimator, X, y)
        np.testing.assert_allclose(teacher_outputs(frozen, X).logits, frozen.decision_function(X), rtol=1e-5, atol=1e-6)
        with pytest.warns(UserWarning, match="in_sample=True"):
            targets = soft_targets(frozen, X, y, in_sample=True)
        assert torch.equal(targets.logits, teacher_outputs(frozen, X).logits)

    @pytest.mark.parametrize(
        ("wrap", "part"),
        [
            (lambda frozen: CalibratedClassifierCV(frozen), "'estimator' is frozen"),
            (lambda frozen: VotingClassifier([("a", frozen)], voting="soft"), "'a' is frozen"),
            (lambda frozen: BaggingClassifier(frozen, oob_score=True), "'estimator' is frozen"),
            (lambda frozen: GridSearchCV(make_pipeline(StandardScaler(), frozen), {}), "frozenestimator' is frozen"),
            (lambda frozen: StackingClassifier([("a", frozen.estimator)], cv="prefit"), "'cv' is 'prefit'"),
        ],
        ids=["calibrated", "voting", "bagging", "search", "prefit"],
    )
    def test_a_frozen_classifier_anywhere_is_found(self, wrap, part, wine):
        X, y = wine
        frozen = FrozenEstimator(RandomForestClassifier(5, random_state=0).fit(X, y))
        with pytest.raises(ValueError, match=rf"cannot be refitted.*its '?.*{part}.*teacher_outputs.*in_sample=True"):
            soft_targets(wrap(frozen), X, y, cv=3)

    def test_a_frozen_preprocessor_is_fine(self, wine):
        X, y = wine
        scaler = FrozenEstimator(StandardScaler().fit(X))
        got = soft_targets(make_pipeline(scaler, LogisticRegression()), X, y).logits
        torch.testing.assert_close(got, soft_targets(LogisticRegression(), X, y).logits, rtol=1e-3, atol=1e-3)


class TestInSample:
    def test_warns_and_takes_the_outputs_as_they_are(self, wine):
        X, y = wine
        forest = RandomForestClassifier(30, random_state=0, oob_score=True).fit(X, y)
        with pytest.warns(UserWarning, match="more confident about them than about new ones") as caught:
            targets = soft_targets(forest, X, y, in_sample=True)
        assert caught[0].filename == __file__
        np.testing.assert_allclose(targets.logits.exp(), forest.predict_proba(X), rtol=1e-5, atol=1e-7)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            unseen = soft_targets(forest, X, y)
        assert targets.logits.exp().amax(-1).mean() > unseen.logits.exp().amax(-1).mean() + 0.03

    @pytest.mark.filterwarnings("ignore:in_sample")
    def test_needs_a_fitted_estimator_with_the_same_classes(self, wine):
        X, y = wine
        with pytest.raises(NotFittedError):
            soft_targets(LogisticRegression(), X, y, in_sample=True)
        teacher = LogisticRegression().fit(X, y)
        with pytest.raises(ValueError, match=r"classes of y, \[0, 1\]; it was fitted on \[0, 1, 2\]$"):
            soft_targets(teacher, X[:100], y[:100], in_sample=True)


class TestInputs:
    def test_lists_frames_sparse_matrices_tensors(self, wine):
        from scipy.sparse import coo_matrix, csc_array, csr_matrix

        X, y = wine
        want = soft_targets(LogisticRegression(), X, y).logits
        sparse = [(form(X), y) for form in (csr_matrix, coo_matrix, csc_array)]
        forms = [(X.tolist(), y.tolist()), (torch.tensor(X), torch.tensor(y)), *sparse]
        for form in forms:
            torch.testing.assert_close(soft_targets(LogisticRegression(), *form).logits, want, rtol=1e-2, atol=1e-2)

    def test_data_frames_keep_their_column_names(self, wine):
        pandas = pytest.importorskip("pandas")
        X, y = wine
        frame = pandas.DataFrame(X, columns=[f"x{i}" for i in range(13)], index=np.arange(178)[::-1])
        labels = pandas.Series(np.array(["a", "b", "c"])[y], index=frame.index)

        class Named(LogisticRegression):
            def fit(self, X, y):
                assert list(X.columns) == [f"x{i}" for i in range(13)]
                return super().fit(X, y)

        got = soft_targets(Named(), frame, labels).logits
        torch.testing.assert_close(got, soft_targets(LogisticRegression(), X, y).logits, rtol=1e-3, atol=1e-3)

    def test_missing_values_are_passed_through_to_the_estimator(self, wine):
        X, y = wine
        X = np.where(np.arange(X.size).reshape(X.shape) % 7 == 3, np.nan, X)
        with pytest.raises(ValueError, match="Input X contains NaN"):
            soft_targets(LogisticRegression(), X, y)
        assert torch.isfinite(
            soft_targets(HistGradientBoostingClassifier(max_iter=5, max_leaf_nodes=7), X, y).logits
        ).all()

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda X, y: (X[:-1], y), "X and y must have the same number of rows, got 177 and 178"),
            (lambda X, y: (X, y[:, None]), r"y must be 1-D.*\(178, 1\)"),
            (lambda X, y: (X, np.zeros(178, int)), r"at least two classes, got \[0\]"),
            (lambda X, y: (X, y + 0.5), "Unknown label type"),
        ],
    )
    def test_bad_rows_and_labels(self, change, message, wine):
        with pytest.raises(ValueError, match=message):
            soft_targets(LogisticRegression(), *change(*wine))

    @pytest.mark.parametrize(
        ("cv", "message"),
        [
            (ShuffleSplit(3, random_state=0), "cv must hold out each of the 178 rows once; it holds out 54"),
            ([(np.arange(178), np.arange(178))], "cv must not train on the rows that it holds out, as fold 0 does"),
            (1, "n_splits=1"),
        ],
    )
    def test_bad_folds(self, cv, message, wine):
        with pytest.raises(ValueError, match=message):
            soft_targets(LogisticRegression(), *wine, cv=cv)

    @pytest.mark.parametrize(
        "estimator", [SVC(), LinearSVC(), RidgeClassifier(), make_pipeline(StandardScaler(), SVC())]
    )
    def test_decision_values_of_svc_are_not_logits(self, estimator, wine):
        for call in (lambda: soft_targets(estimator, *wine), lambda: teacher_outputs(estimator.fit(*wine), wine[0])):
            with pytest.raises(ValueError, match=r"must have predict_proba, got \w+ without.*CalibratedClassifierCV"):
                call()

    # scikit-learn 1.9 deprecates probability=True; it stays tested for as long as users have such teachers.
    @pytest.mark.filterwarnings("ignore:The `probability` parameter:FutureWarning")
    def test_svc_with_probabilities(self, wine):
        X, y = wine
        teacher = SVC(probability=True, random_state=0)
        got = soft_targets(teacher, X, y).logits.exp()
        want = cross_val_predict(teacher, X, y, method="predict_proba")
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize(
        ("teacher", "error", "message"),
        [
            (LinearRegression(), ValueError, "must be a classifier, which LinearRegression is not: it has no classes$"),
            (StandardScaler(), ValueError, "must be a classifier, which StandardScaler is not"),
            (RandomForestClassifier, TypeError, "must be a classifier, got the class RandomForestClassifier: pass an"),
            (None, TypeError, "must be a classifier with predict_proba, got NoneType"),
        ],
    )
    def test_what_is_no_classifier(self, teacher, error, message, wine):
        with pytest.raises(error, match=f"^estimator {message}"):
            soft_targets(teacher, *wine)
        with pytest.raises(error, match=f"^teacher {message}"):
            teacher_outputs(teacher, wine[0])

    def test_several_outputs(self, wine):
        X, y = wine
        forest = RandomForestClassifier(5).fit(X, np.stack([y, y], 1))
        with pytest.raises(ValueError, match="must have one output, got a RandomForestClassifier with 2"):
            teacher_outputs(forest, X)

    def test_nan_from_a_teacher(self, wine):
        class Broken(LogisticRegression):
            def decision_function(self, X):
                scores = super().decision_function(X)
                scores[5, 1] = np.nan
                return scores

        with pytest.raises(ValueError, match="must not give NaN, as it does for row 5"):
            teacher_outputs(Broken().fit(*wine), wine[0])

    def test_without_scikit_learn(self, wine, monkeypatch):
        for name in ("sklearn", "sklearn.base"):  # the second is loaded already
            monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ImportError, match=r"pydistill-kd\[sklearn\]"):
            soft_targets(LogisticRegression(), *wine)


class Watching(nn.Module):
    """A small CNN that notes the rows, modes and inference mode of its calls."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5), nn.Linear(216, 10)
        )
        self.calls = []

    def forward(self, x):
        self.calls.append((len(x), self.training, torch.is_inference_mode_enabled()))
        return self.layers(x)


class TestModules:
    @pytest.fixture
    def images(self):
        return torch.tensor(load_digits().images[:100, None] / 16, dtype=torch.float32)

    def test_batches_in_eval_and_inference_mode(self, images):
        cnn = Watching()
        got = teacher_outputs(cnn, images, batch_size=32)
        assert cnn.calls == [(32, False, True)] * 3 + [(4, False, True)]
        torch.testing.assert_close(got.logits, cnn.eval()(images).detach())
        assert got.shape == (100, 10)

    def test_modes_are_restored_also_after_an_error(self, images):
        cnn = Watching().train()
        cnn.layers[1].eval()
        teacher_outputs(cnn, images)
        with pytest.raises(RuntimeError, match="mat1 and mat2 shapes"):
            teacher_outputs(cnn, images[:, :, :5])
        assert [m.training for m in cnn.layers] == [True, False, True, True, True, True]
        assert cnn.training

    def test_targets_can_be_trained_with(self, images):
        targets = teacher_outputs(Watching(), images)
        assert not targets.logits.is_inference()
        weight = torch.ones(10, requires_grad=True)
        (targets.logits * weight).sum().backward()  # autograd saves the targets
        torch.testing.assert_close(weight.grad, targets.logits.sum(0))
        student = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        trainer = pydistill.Trainer(student, pydistill.DistillationLoss(alpha=1.0), seed=0, progress=False)
        history = trainer.fit((images, targets), epochs=3)
        assert history[-1].train.loss < history[0].train.loss

    def test_arrays_and_tensors_get_the_modules_dtype(self, images):
        cnn = Watching()
        want = teacher_outputs(cnn, images).logits
        for doubles in (images.double(), images.double().numpy()):
            torch.testing.assert_close(teacher_outputs(cnn, doubles).logits, want)
        tokens = np.arange(12).reshape(4, 3)
        embedding = nn.Embedding(12, 5)
        assert torch.equal(teacher_outputs(embedding, tokens).logits, embedding(torch.tensor(tokens)).detach())

    def test_half_precision_teachers_give_float32(self, images):
        cnn = Watching().bfloat16()
        logits = teacher_outputs(cnn, images.bfloat16()).logits
        assert logits.dtype == torch.float32
        assert torch.equal(logits, cnn.eval()(images.bfloat16()).detach().float()[:])

    def test_memory_maps_are_read_batch_by_batch(self, images, tmp_path):
        np.save(tmp_path / "x.npy", images.numpy())
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # torch would complain of a read-only array
            got = teacher_outputs(cnn := Watching(), np.load(tmp_path / "x.npy", mmap_mode="r"), batch_size=64)
        torch.testing.assert_close(got.logits, teacher_outputs(cnn, images).logits)

    def test_probabilities_are_noticed(self, images):
        softmax = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.Softmax(-1))
        with pytest.warns(UserWarning, match="looks like probabilities.*remove the softmax") as caught:
            teacher_outputs(softmax, images)
        assert caught[0].filename == __file__
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            teacher_outputs(softmax[:2], images)

    @pytest.mark.parametrize(
        ("logits", "expected"),
        [
            ([[0.25, 0.75], [-3.0, 9.0]], True),  # the first row decides
            ([[[0.5, 0.5]], [[7.0, 8.0]]], True),
            ([[0.5, 0.501]], True),
            ([[0.5, 0.499]], True),
            ([[0.5, 0.502]], False),
            ([[0.5, 0.498]], False),
            ([[1.5, -0.5]], False),
            ([[math.nan, 1.0]], False),
            ([[1.0]], False),  # the logit of a single class
            ([], False),
        ],
    )
    def test_the_rule_for_probabilities(self, logits, expected):
        """The compiled core has the same bounds; all backends are compared where the loss warns."""
        assert looks_like_probabilities(torch.tensor(logits, dtype=torch.float64)) is expected

    @pytest.mark.parametrize(
        ("module", "message"),
        [
            (nn.Flatten(0), r"\(100, ..., C\), got torch.float32 \(6400,\)"),
            (nn.LSTM(8, 3, batch_first=True), "got tuple"),
        ],
    )
    def test_outputs_that_are_no_logits(self, module, message, images):
        with pytest.raises(TypeError, match=message):
            teacher_outputs(module, images[:, 0])

    def test_an_error_of_the_module_names_the_rows(self):
        message = r"^teacher, called with rows 0 to 63 of X, of shape \(64, 5\) and dtype torch.float32: mat1 and mat2"
        with pytest.raises(RuntimeError, match=message):
            teacher_outputs(nn.Linear(6, 3), torch.randn(100, 5), batch_size=64)

    def test_bad_calls(self, images):
        with pytest.raises(ValueError, match="at least one row"):
            teacher_outputs(Watching(), images[:0])
        loader = torch.utils.data.DataLoader(images)
        for teacher in (Watching(), LogisticRegression()):
            with pytest.raises(TypeError, match=r"X must be a tensor or an array.*got DataLoader; .*torch.cat"):
                teacher_outputs(teacher, loader)
        with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
            teacher_outputs(Watching(), images, batch_size=0)
        with pytest.raises(ValueError, match="must not give NaN, as it does for row 3"):
            teacher_outputs(Watching(), torch.where(torch.arange(100)[:, None, None, None] == 3, np.nan, images))
        with pytest.raises(TypeError, match=r"refitted, got the torch module Watching.*teacher_outputs"):
            soft_targets(Watching(), images, np.arange(100) % 10)


@pytest.mark.parametrize("data", ["wine", "cancer"])
def test_xgboost_margins_beyond_the_probabilities(data, request):
    """Margins tell classes apart where float32 probabilities are 0 and 1."""
    X, y = request.getfixturevalue(data)
    teacher = xgboost(n_estimators=300, learning_rate=1.0, reg_lambda=0.0, min_child_weight=0.0).fit(X, y)
    logits = teacher_outputs(teacher, X).logits
    np.testing.assert_allclose(logits.softmax(-1), teacher.predict_proba(X), rtol=1e-4, atol=1e-6)
    assert torch.isfinite(logits).all()
    assert logits.amax(-1).sub(logits.amin(-1)).max() > 17  # 1 - exp(-17) is 1 in float32
