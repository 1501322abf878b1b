"""DistilledNeuralNetClassifier with the real skorch: whose rows the targets are, and that it fits where skorch fits."""

import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.base import clone
from sklearn.datasets import load_wine
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

import pydistill
from pydistill.teachers import soft_targets

pytest.importorskip("skorch", reason="skorch is not installed")

from skorch.callbacks import EpochScoring
from skorch.dataset import Dataset, ValidSplit
from skorch.helper import predefined_split

from pydistill.skorch import DistilledNeuralNetClassifier


class MLP(nn.Module):
    def __init__(self, hidden=16):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(13, hidden), nn.ReLU(), nn.Linear(hidden, 3))

    def forward(self, X, scale=1.0):
        return self.layers(X) * scale


def net_for(module=MLP, **options):
    defaults = {"max_epochs": 15, "optimizer": torch.optim.Adam, "lr": 0.01, "batch_size": 32, "verbose": 0}
    return DistilledNeuralNetClassifier(module, **(defaults | options))


@pytest.fixture(scope="module")
def raw():
    X, y = load_wine(return_X_y=True)
    return X.astype(np.float32), y


@pytest.fixture(scope="module")
def data(raw):
    """Scaled inputs, labels, and a teacher's targets."""
    X, y = StandardScaler().fit_transform(raw[0]), raw[1]
    return X, y, soft_targets(LogisticRegression(), X, y)


def test_one_step_is_the_loss_of_all_rows(data):
    X, y, targets = data
    net = net_for(
        train_split=None,
        max_epochs=1,
        batch_size=-1,
        optimizer=torch.optim.SGD,
        lr=0.1,
        criterion__temperature=2.0,
        criterion__alpha=0.7,
    ).initialize()
    module = MLP()
    module.load_state_dict(net.module_.state_dict())
    net.partial_fit(X, y, teacher=targets)
    logits = module(torch.from_numpy(X))
    soft = 4 * F.kl_div((logits / 2).log_softmax(-1), (targets.logits / 2).softmax(-1), reduction="batchmean")
    loss = 0.7 * soft + 0.3 * F.cross_entropy(logits, torch.from_numpy(y))
    loss.backward()
    torch.optim.SGD(module.parameters(), lr=0.1).step()
    assert net.history[-1, "train_loss"] == pytest.approx(loss.item(), rel=1e-5)
    for ours, by_hand in zip(net.module_.parameters(), module.parameters(), strict=True):
        torch.testing.assert_close(ours, by_hand, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", ["SoftTargets", "tensor", "array", "top-k"])
def test_every_batch_gets_its_own_rows(form, monkeypatch):
    """Row i of the teacher says i; shuffled and split, each input must meet its own number."""
    count = 60
    X, y = np.arange(count, dtype=np.float32)[:, None], np.arange(count) % 3
    logits = torch.arange(count, dtype=torch.float32)[:, None] + torch.tensor([0.25, 0.5, 0.0])
    teacher = {
        "SoftTargets": pydistill.SoftTargets.from_logits(logits),
        "tensor": logits,
        "array": logits.numpy(),
        "top-k": pydistill.top_k(logits, 2),
    }[form]
    seen = []

    class Spy(pydistill.DistillationLoss):
        def forward(self, student_logits, teacher=None, labels=None):
            numbers = teacher.logits if isinstance(teacher, pydistill.SoftTargets) else teacher
            seen.append((inputs[-1], numbers[:, 0].floor().long(), labels))
            return super().forward(student_logits, teacher, labels)

    inputs = []

    class Numbers(nn.Linear):
        def forward(self, X):
            inputs.append(X[:, 0].long())
            return super().forward(X)

    net = net_for(
        Numbers,
        module__in_features=1,
        module__out_features=3,
        criterion=Spy,
        max_epochs=2,
        batch_size=16,
        iterator_train__shuffle=True,
    )
    net.fit(X, y, teacher=teacher)
    assert sum(len(rows) for rows, *_ in seen) == 2 * count  # training and validation
    for rows, numbers, labels in seen:
        assert torch.equal(rows, numbers)
        assert torch.equal(labels, rows % 3)
    assert not torch.equal(seen[0][0], seen[0][0].sort().values)


def test_validation_split_is_scored(data):
    X, y, targets = data
    net = net_for(criterion__alpha=0.6, max_epochs=3).fit(X, y, teacher=targets)
    record = net.history[-1]
    assert {"train_loss", "valid_loss", "valid_acc"} <= record.keys()
    _, valid = net.train_split(net.get_dataset(X, y), y)
    rows = torch.as_tensor(valid.indices)
    logits = net.module_(torch.from_numpy(X)[rows])
    want = pydistill.distillation_loss(logits, targets[rows], torch.from_numpy(y)[rows], alpha=0.6)
    assert record["valid_loss"] == pytest.approx(want.item(), rel=1e-4)
    assert record["valid_acc"] == (logits.argmax(-1).numpy() == y[rows]).mean()


def test_foreign_validation_rows_are_scored_on_labels(data):
    X, y, targets = data
    valid = Dataset(X[::3] + 0.1, y[::3])
    net = net_for(train_split=predefined_split(valid), criterion__alpha=0.6, max_epochs=3).fit(X, y, teacher=targets)
    want = F.cross_entropy(net.module_(torch.from_numpy(valid.X)), torch.from_numpy(valid.y))
    assert net.history[-1, "valid_loss"] == pytest.approx(want.item(), rel=1e-4)


def test_scoring_callbacks_find_the_data(data):
    X, y, targets = data
    scoring = EpochScoring("accuracy", name="again", lower_is_better=False, use_caching=False)
    net = net_for(max_epochs=3, callbacks=[scoring]).fit(X, y, teacher=targets)
    assert net.history[:, "again"] == net.history[:, "valid_acc"]


def test_a_search_splits_a_store(data, tmp_path):
    """With alpha = 1 the student must believe the rows that are its own."""
    X, y, targets = data
    store = pydistill.TeacherStore.build(tmp_path, targets, X)
    net = net_for(train_split=None, criterion__alpha=1.0)
    search = GridSearchCV(net, {"criterion__temperature": [1.0, 2.0]}, cv=3, error_score="raise")
    assert search.fit(X, y, teacher=store).best_score_ > 0.9


def test_prediction_knows_no_teacher_and_survives_pickling(data):
    X, y, targets = data
    net = net_for().fit(X, y, teacher=targets)
    loaded = pickle.loads(pickle.dumps(net))
    probs = loaded.predict_proba(X)
    np.testing.assert_array_equal(probs, net.predict_proba(X))
    with torch.no_grad():
        np.testing.assert_allclose(probs, net.module_.eval()(torch.from_numpy(X)).softmax(-1), rtol=1e-5)
    assert (net.predict(X) == probs.argmax(1)).all()
    assert net.score(X, y) > 0.93


def test_pipeline_and_search(raw, data):
    X, y = raw
    targets = data[2]
    pipeline = Pipeline([("scale", StandardScaler()), ("net", net_for(train_split=None))])
    assert clone(pipeline).fit(X, y, net__teacher=targets).score(X, y) > 0.93
    grid = {"net__criterion__temperature": [1.0, 4.0], "net__criterion__alpha": [0.5, 1.0], "net__module__hidden": [16]}
    search = GridSearchCV(pipeline, grid, cv=3, error_score="raise").fit(X, y, net__teacher=targets)
    assert search.best_score_ > 0.9
    assert search.best_estimator_["net"].criterion_.alpha == search.best_params_["net__criterion__alpha"]


def test_cross_validation_splits_the_targets(data):
    """With alpha = 1 and targets that lie about the labels the student must believe the targets of its own rows."""
    X, y, _ = data
    lies = F.one_hot(torch.from_numpy((y + 1) % 3), 3).float().mul(8).numpy()
    net = net_for(criterion__alpha=1.0, max_epochs=30, train_split=ValidSplit(4))
    scores = cross_val_score(net, X, y, cv=3, params={"teacher": lies}, error_score="raise")
    assert (scores < 0.1).all()
    assert (cross_val_score(net, X, (y + 1) % 3, cv=3, params={"teacher": lies}, error_score="raise") > 0.8).all()


def test_labels_alone_and_forward_parameters(data):
    X, y, _ = data
    net = net_for(criterion__alpha=0.0, train_split=None).fit(X, y, scale=2.0)
    assert net.score(X, y) > 0.93
    assert net.criterion_.alpha == 0.0


def test_errors(data):
    X, y, targets = data
    with pytest.raises(ValueError, match="teacher must be given unless alpha is 0"):
        net_for().fit(X, y)
    with pytest.raises(ValueError, match="teacher must have the 178 rows of X, got 9"):
        net_for().fit(X, y, teacher=targets[:9])
    with pytest.raises(ValueError, match="train_split must take its training rows from X"):
        net_for(train_split=lambda dataset, y, **_: (Dataset(X, y), None)).fit(X, y, teacher=targets)
    for teacher in (RandomForestClassifier(3), nn.Linear(13, 3), targets.logits.tolist()):
        with pytest.raises(TypeError, match=f"got {type(teacher).__name__}.*soft_targets.*teacher_outputs"):
            net_for().fit(X, y, teacher=teacher)
    with pytest.raises(ValueError, match="temperature"):
        net_for(criterion__temperature=-1.0).fit(X, y, teacher=targets)
