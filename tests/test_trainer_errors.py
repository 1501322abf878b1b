"""Arguments that the Trainer refuses, and its error messages."""

import functools
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset
from training import CLASSES, FEATURES, ROWS, make_data, mlp, trainer_for, weights

import pydistill
from pydistill.callbacks import BestModel, EarlyStopping
from pydistill.trainer import Trainer


@pytest.fixture
def data():
    return make_data()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Trainer("net"), TypeError, "student must be a torch.nn.Module, got str"),
        (
            lambda: Trainer(mlp(), teacher=len),
            TypeError,
            r"teacher must be a torch.nn.Module, SoftTargets or a TeacherStore, got the function len.*data",
        ),
        (
            lambda: Trainer(mlp(), pydistill.DistillationLoss(reduction="sum")),
            ValueError,
            "loss must have reduction=\"mean\".*got 'sum'",
        ),
        (
            lambda: Trainer(mlp(), optimizer=torch.optim.SGD),
            TypeError,
            r"optimizer must be a torch.optim.Optimizer made of the student's.*got the class SGD",
        ),
        (lambda: Trainer(mlp(), optimizer=3), TypeError, "optimizer must be a torch.optim.Optimizer.*got int"),
        (
            lambda: Trainer(mlp(), optimizer=torch.optim.SGD(mlp().parameters(), lr=0.1)),
            ValueError,
            "optimizer must be made of the student's parameters.*this SGD holds none of them",
        ),
        (
            lambda: Trainer(mlp(), scheduler=object()),
            ValueError,
            "scheduler must come with the optimizer",
        ),
    ],
)
def test_constructor(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda x, t, y: x, TypeError, "train must be a tuple of tensors or arrays.*got Tensor of shape"),
        (lambda x, t, y: 3, TypeError, "train must be a tuple of tensors or arrays.*got int"),
        (
            lambda x, t, y: (x, t.tolist(), y),
            TypeError,
            "train must hold tensors, arrays.*element 1 is list: pass it as a tensor or an array",
        ),
        (lambda x, t, y: (x, t, np.array(list("ab") * 75)), TypeError, "element 2 is ndarray of.*LabelEncoder"),
        (lambda x, t, y: (x, t, y[:9]), ValueError, "train must hold columns of one length.*150, 150, 9"),
        (lambda x, t, y: (x[:0], t[:0], y[:0]), ValueError, "train must hold at least one row"),
        (lambda x, t, y: (), ValueError, "train must hold at least one row"),
        (lambda x, t, y: [], ValueError, "train must give at least one batch, got none in epoch 1$"),
        (
            lambda x, t, y: iter([(x, t, y)]),
            ValueError,
            "none in epoch 2; an iterator runs out after one epoch",
        ),
        (
            lambda x, t, y: [x, t, y],
            TypeError,
            "a batch must be a tuple or list.*got Tensor.*in memory is a tuple",
        ),
        (
            lambda x, t, y: (x,),
            ValueError,
            r"a batch must be \(inputs, targets, labels\).*got \(Tensor of shape",
        ),
        (lambda x, t, y: (x, t, y, y), ValueError, r"a batch must be \(inputs, targets, labels\)"),
        (lambda x, t, y: (x, y), ValueError, "teacher must be given unless alpha is 0"),
    ],
)
def test_data(data, change, error, message):
    with pytest.raises(error, match=message):
        trainer_for(mlp()).fit(change(*data), epochs=2)


def test_data_frames_and_stores(data, tmp_path):
    frame = pytest.importorskip("pandas").DataFrame(data[0].numpy())
    for train in ((frame, *data[1:]), frame):
        with pytest.raises(TypeError, match=r"DataFrame: pass its \.to_numpy\(\)"):
            trainer_for(mlp()).fit(train, epochs=1)
    store = pydistill.TeacherStore.build(tmp_path, mlp(), data[0])
    with pytest.raises(TypeError, match="element 1 is TeacherStore: pass it to the Trainer, as teacher=store"):
        trainer_for(mlp()).fit((data[0], store, data[2]), epochs=1)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda x, t, y: (x, t[:, :3], y), ValueError, "val: teacher must have the shape of student_logits"),
        (lambda x, t, y: (x, y + CLASSES), IndexError, "val: .*label"),
        (lambda x, t, y: (x[:, :2], y), RuntimeError, "val: mat1 and mat2 shapes"),
        (lambda x, t, y: [(x, t, y, y)], ValueError, r"val: a batch must be \(inputs, targets, labels\)"),
    ],
)
def test_validation_data_that_do_not_fit_cost_no_step(data, change, error, message):
    student = mlp()
    before = weights(student)
    with pytest.raises(error, match=message):
        trainer_for(student).fit(data, change(*data), epochs=1)
    assert torch.equal(weights(student), before)


@pytest.mark.parametrize(("rows", "batch_size"), [(65, 64), (1, 64), (3, 1)])
def test_a_last_batch_of_one_row_and_batch_norm(data, rows, batch_size):
    student = nn.Sequential(nn.Linear(FEATURES, CLASSES), nn.BatchNorm1d(CLASSES))
    state = torch.random.get_rng_state()
    few = tuple(x[:rows] for x in data)
    with pytest.raises(ValueError, match=f"batch_size must not leave .* {rows} rows in batches of {batch_size} do"):
        trainer_for(student).fit(few, epochs=1, batch_size=batch_size)
    assert student[1].num_batches_tracked == 0
    assert torch.equal(torch.random.get_rng_state(), state)
    images = torch.randn(65, 1, 3, 3)  # more than one value per channel even in one row
    layers = nn.Conv2d(1, CLASSES, 2), nn.BatchNorm2d(CLASSES), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    student = nn.Sequential(*layers)
    assert len(trainer_for(student).fit((images, *(x[:65] for x in data[1:])), epochs=1)) == 1


def test_targets_beside_a_teacher(data):
    with pytest.raises(ValueError, match=r"\(inputs, labels\) or \(inputs,\) with teacher="):
        trainer_for(mlp(), teacher=mlp()).fit(data, epochs=1)


def test_validation_and_evaluation_data_are_named(data):
    trainer = trainer_for(mlp())
    with pytest.raises(TypeError, match="val must be a tuple"):
        trainer.fit(data, data[0], epochs=1)
    with pytest.raises(TypeError, match="data must be a tuple"):
        trainer.evaluate(data[0])
    with pytest.raises(ValueError, match="data must give at least one batch"):
        trainer.evaluate([])
    with pytest.raises(ValueError, match=r"val must give at least one batch, got none in epoch 2; an iterator"):
        trainer.fit(data, iter([data]), epochs=2)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"epochs": 0}, ValueError, "epochs must be at least 1, got 0"),
        ({"epochs": 1.5}, TypeError, "epochs must be an integer, got 1.5"),
        ({"epochs": 1, "batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
    ],
)
def test_counts(data, options, error, message):
    with pytest.raises(error, match=message):
        trainer_for(mlp()).fit(data, **options)


CALLED_AS = r"loss must be a DistillationLoss, or a callable that is called as loss\(.*return_metrics=True\); got "


class Nothing:
    """An object that is no callback, no loss and no scheduler."""


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: Trainer(pydistill.DistillationLoss(), mlp()),
            TypeError,
            r"student must be the model, got the loss DistillationLoss: the order is Trainer\(student, loss",
        ),
        (lambda: Trainer(mlp(), mlp()), TypeError, CALLED_AS + "Sequential, which does not take.* teacher=teacher"),
        (lambda: Trainer(mlp(), nn.CrossEntropyLoss()), TypeError, CALLED_AS + "CrossEntropyLoss, which does not take"),
        (lambda: Trainer(mlp(), lambda s, t: 0), TypeError, CALLED_AS + "the function <lambda>, which does not take"),
        (
            lambda: Trainer(mlp(), pydistill.DistillationLoss),
            TypeError,
            CALLED_AS + r"the class DistillationLoss: pass an instance, DistillationLoss\(",
        ),
        (
            lambda: Trainer(mlp(), pydistill.LinearDistillationLoss()),
            TypeError,
            CALLED_AS + "a LinearDistillationLoss, which takes hidden states and a head",
        ),
        (lambda: Trainer(mlp(), 0.5), TypeError, CALLED_AS + "float"),
        (
            lambda: Trainer(mlp(), teacher=pydistill.DistillationLoss()),
            TypeError,
            "teacher must be a model or its outputs, got the loss DistillationLoss: the order is",
        ),
        (lambda: Trainer(nn.Linear), TypeError, "student must be a torch.nn.Module, got the class Linear"),
        (lambda: Trainer(nn.Identity()), ValueError, "student must have parameters to train, got Identity without any"),
        (
            lambda: Trainer(nn.LazyLinear(3)),
            ValueError,
            r"student must have parameters with.*LazyLinear.*student\(inputs\)",
        ),
        (
            lambda: Trainer(student := mlp(), optimizer=torch.optim.LBFGS(student.parameters())),
            ValueError,
            "optimizer must step without a closure, which LBFGS needs",
        ),
    ],
)
def test_a_model_a_loss_and_a_teacher_in_their_places(make, error, message):
    with pytest.raises(error, match=message):
        make()


CALLBACKS = r"callbacks must be a sequence of functions of \(trainer, record\); got "
SCHEDULES = "schedules must map options of the loss to functions of the epoch"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"callbacks": print}, TypeError, CALLBACKS + "the function print: put it into a list"),
        ({"callbacks": EarlyStopping()}, TypeError, CALLBACKS + "EarlyStopping: put it into a list"),
        ({"callbacks": BestModel}, TypeError, CALLBACKS + "the class BestModel"),
        ({"callbacks": [BestModel]}, TypeError, CALLBACKS + r"the class BestModel: pass an instance, BestModel\(\)"),
        ({"callbacks": [Nothing()]}, TypeError, CALLBACKS + "Nothing, which cannot be called"),
        ({"callbacks": [lambda record: 0]}, TypeError, CALLBACKS + "the function <lambda>, which does not take these"),
        ({"callbacks": "ab"}, TypeError, CALLBACKS + "str"),
        ({"callbacks": None}, TypeError, CALLBACKS + "NoneType"),
        ({"seed": "a"}, TypeError, "seed must be an integer or None, got 'a'"),
        ({"seed": True}, TypeError, "seed must be an integer or None, got True"),
        ({"seed": 1.5}, TypeError, "seed must be an integer or None, got 1.5"),
        ({"seed": -1}, ValueError, r"seed must be in \[0, 2\*\*64\), got -1"),
        ({"seed": 2**70}, ValueError, r"seed must be in \[0, 2\*\*64\), got 1180591620717411303424"),
        ({"progress": "no"}, TypeError, "progress must be True or False, got 'no'"),
        ({"accumulate": "2"}, TypeError, "accumulate must be an integer, got '2'"),
        ({"accumulate": True}, TypeError, "accumulate must be an integer, got True"),
        ({"accumulate": 0}, ValueError, "accumulate must be at least 1, got 0"),
        ({"clip_norm": "1"}, TypeError, "clip_norm must be a number or None, got '1'"),
        ({"clip_norm": True}, TypeError, "clip_norm must be a number or None, got True"),
        ({"clip_norm": math.nan}, ValueError, "clip_norm must be positive, got nan"),
        ({"autocast": True}, ValueError, "autocast must be None or torch.bfloat16, got True"),
        ({"checkpoint_dir": True}, TypeError, "checkpoint_dir must be a path or None, got True"),
        ({"checkpoint_every": 2.0, "checkpoint_dir": "x"}, TypeError, "checkpoint_every must be an integer, got 2.0"),
        ({"checkpoint_every": 2}, ValueError, "checkpoint_every needs checkpoint_dir"),
        ({"schedules": print}, TypeError, SCHEDULES + ".*got the function print"),
        ({"schedules": ["alpha"]}, TypeError, SCHEDULES + r".*got \(str\)"),
        (
            {"schedules": {"alhpa": float}},
            ValueError,
            SCHEDULES + "; got 'alhpa', which DistillationLoss does not have",
        ),
        ({"schedules": {"alpha": 0.5}}, ValueError, SCHEDULES + "; got 'alpha': 0.5"),
        ({"schedules": {"alpha": lambda: 0.5}}, ValueError, SCHEDULES + "; got 'alpha': <function"),
    ],
)
def test_options_of_the_trainer(options, error, message):
    with pytest.raises(error, match=message):
        trainer_for(mlp(), **options)


def test_integers_of_numpy_and_the_ends_of_the_seeds(data):
    for seed in (0, np.int64(5), 2**63, 2**64 - 1):
        trainer = trainer_for(mlp(), seed=seed, accumulate=np.int32(2))
        assert len(trainer.fit(data, epochs=np.int64(1), batch_size=np.int64(64))) == 1
        assert type(trainer.seed) is type(trainer.accumulate) is int


def test_a_frozen_student(data):
    student = mlp().requires_grad_(False)
    trainer = trainer_for(student)
    assert trainer.evaluate(data).loss > 0  # which needs no gradient
    with pytest.raises(ValueError, match=r"student must have a parameter that requires a gradient, but all.*frozen"):
        trainer.fit(data, epochs=1)
    student[3].requires_grad_(True)
    before = student[0].weight.clone(), student[3].weight.clone()
    trainer.fit(data, epochs=1)
    assert torch.equal(student[0].weight, before[0])
    assert not torch.equal(student[3].weight, before[1])
    other = trainer_for(student, optimizer=torch.optim.SGD(student[0].parameters(), lr=0.1))
    with pytest.raises(ValueError, match=r"optimizer must hold a parameter.*those that this SGD holds are frozen"):
        other.fit(data, epochs=1)


@pytest.mark.parametrize(
    ("loss", "returned"),
    [
        (lambda s, t, y, **options: s.mean(), "Tensor of shape"),
        (lambda s, t, y, **options: (s.mean(), s.mean()), r"the function <lambda> returned Tensor of shape \(\)"),
        (lambda s, t, y, **options: None, "returned NoneType"),
    ],
)
def test_a_loss_that_returns_something_else(data, loss, returned):
    with pytest.raises(TypeError, match=f"train: loss must return .*LossMetrics.*{returned}"):
        trainer_for(mlp(), loss).fit(data, epochs=1)


WHOLE_NUMBERS = r"labels must be class indices of an integer dtype, got Tensor.*float32; if.*pass labels.long\(\)"
PROBABILITIES = "labels must be class indices of an integer dtype, got Tensor.*; class probabilities are targets"


@pytest.mark.parametrize(
    ("change", "teacher", "message"),
    [
        (lambda x, t, y: (x, t, y.float()), False, WHOLE_NUMBERS),
        (lambda x, t, y: (x, t, y.float(), torch.ones(ROWS)), False, WHOLE_NUMBERS),
        (lambda x, t, y: (x, y.float()), False, WHOLE_NUMBERS),
        (lambda x, t, y: (x, y.float()), True, WHOLE_NUMBERS),
        (lambda x, t, y: (x, t, t.softmax(-1)), False, PROBABILITIES),
        (lambda x, t, y: (x, t.softmax(-1)), True, PROBABILITIES),
    ],
)
@pytest.mark.parametrize("in_memory", [True, False])
def test_floating_point_labels(data, change, teacher, message, in_memory):
    columns = change(*data)
    trainer = trainer_for(mlp(), teacher=mlp() if teacher else None)
    with pytest.raises(TypeError, match="train: " + message):
        trainer.fit(columns if in_memory else [columns], epochs=1)
    with pytest.raises(TypeError, match="data: " + message):
        trainer.evaluate(columns if in_memory else [columns])


@pytest.mark.parametrize("weight", [math.nan, math.inf, -1.0])
def test_a_sample_weight_that_is_none_costs_no_step(data, weight):
    student = mlp()
    before = weights(student)
    sample_weight = torch.ones(ROWS)
    sample_weight[140] = weight
    with pytest.raises(ValueError, match=f"train: sample_weight must be >= 0 and finite; row 140 holds {weight}"):
        trainer_for(student).fit((*data, sample_weight), epochs=1)
    with pytest.raises(ValueError, match=f"val: sample_weight must be >= 0 and finite; row 140 holds {weight}"):
        trainer_for(student).fit(data, (*data, sample_weight), epochs=1)
    assert torch.equal(weights(student), before)


@pytest.mark.parametrize(
    ("change", "teacher"),
    [
        (lambda x, t, y: (x, t, y, y), False),
        (lambda x, t, y: (x, y, y), False),
        (lambda x, t, y: (x, y, y), True),
        (lambda x, t, y: (x, t, y, torch.ones(ROWS, 1)), False),
    ],
)
def test_weights_of_another_form(data, change, teacher):
    trainer = trainer_for(mlp(), teacher=mlp() if teacher else None)
    rule = "train: a batch must be .*; sample_weight is floating-point and has the shape of labels; got"
    with pytest.raises(ValueError, match=rule):
        trainer.fit(change(*data), epochs=1)


def test_inputs_that_do_not_fit_are_named_with_their_shape(data):
    inputs, targets, labels = data
    of_torch = r"mat1 and mat2 shapes cannot be multiplied .*; the {}'s inputs were Tensor of shape \({}\) and dtype"
    trainer = trainer_for(mlp())
    with pytest.raises(RuntimeError, match="^train: " + of_torch.format("student", "64, 2")):
        trainer.fit((inputs[:, :2], targets, labels), epochs=1)
    with pytest.raises(RuntimeError, match="^data: " + of_torch.format("student", "150, 2")):
        trainer.evaluate((inputs[:, :2], targets, labels))
    with pytest.raises(RuntimeError, match="^inputs: " + of_torch.format("student", "150, 2")):
        trainer.predict(inputs[:, :2])
    with pytest.raises(RuntimeError, match="^train: " + of_torch.format("teacher", "64, 6")):
        trainer_for(mlp(), teacher=nn.Linear(5, CLASSES)).fit((inputs, labels), epochs=1)
    with pytest.raises(RuntimeError, match=r"^train: mat1 and mat2 must have the same dtype.*dtype torch.int64$"):
        trainer.fit((inputs.long(), targets, labels), epochs=1)
    with pytest.raises(IndexError, match=r"^train: labels must be in .0, 4.*holds 4"):
        trainer.fit((inputs, targets, torch.full_like(labels, CLASSES)), epochs=1)


INPUTS = "inputs must be a tensor, an array, a Dataset or an iterable of batches; got "


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda x, t, y: None, TypeError, INPUTS + "NoneType"),
        (lambda x, t, y: 5, TypeError, INPUTS + "int"),
        (lambda x, t, y: "ab", TypeError, INPUTS + "str"),
        (lambda x, t, y: (x, t, y), TypeError, "inputs must be one tensor.*got the tuple .* pass the first column"),
        (lambda x, t, y: torch.tensor(1.0), TypeError, r"inputs must hold .*Tensor of shape \(\)"),
        (
            lambda x, t, y: x[0],
            ValueError,
            r"inputs: the student must return a row of logits for each row.*inputs\[None\]",
        ),
        (lambda x, t, y: torch.full_like(x, math.nan), ValueError, "inputs: the inputs must be finite; row 0"),
    ],
)
def test_predict(data, make, error, message):
    with pytest.raises(error, match=message):
        trainer_for(mlp()).predict(make(*data))


def test_predict_takes_the_rows_of_a_dataset(data):
    trainer = trainer_for(mlp())
    want = trainer.predict(data[0])
    assert want.shape == (ROWS, CLASSES)
    assert torch.equal(trainer.predict(TensorDataset(*data)), want)
    assert torch.equal(trainer.predict((data[0],)), want)
    assert trainer.predict(data[0][:0]).shape == (0, CLASSES)


def test_outputs_of_a_student_that_are_no_tensor(data):
    class Dictionary(nn.Linear):
        def forward(self, inputs):
            return {"logits": super().forward(inputs)}

    with pytest.raises(TypeError, match="inputs: the student must return a tensor of logits, got dict"):
        trainer_for(Dictionary(FEATURES, CLASSES)).predict(data[0])
    with pytest.raises(TypeError, match="train: student_logits must be a tensor, got dict"):
        trainer_for(Dictionary(FEATURES, CLASSES)).fit(data, epochs=1)


@pytest.mark.parametrize("make", [EarlyStopping, BestModel])
def test_a_monitor_that_the_data_do_not_give(data, make):
    inputs, targets, labels = data
    with pytest.raises(ValueError, match="got 'accuracy', which is nan after epoch 1: the training data have no label"):
        trainer_for(mlp(), pydistill.DistillationLoss(alpha=1.0), callbacks=[make(monitor="accuracy")]).fit(
            (inputs, targets), epochs=3
        )
    with pytest.raises(ValueError, match="got 'agreement', which is nan after epoch 1: the validation data have no"):
        trainer_for(mlp(), callbacks=[make(monitor="agreement")]).fit(data, (inputs, labels), epochs=3)
    schedules = {"alpha": lambda epoch: 1.0 if epoch < 3 else 0.0}  # the agreement ends, but there was one
    trainer = trainer_for(mlp(), callbacks=[make(monitor="agreement")], schedules=schedules)
    assert len(trainer.fit(data, epochs=3)) == 3


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"patience": True}, TypeError, "patience must be an integer, got True"),
        ({"patience": 0}, ValueError, "patience must be at least 1, got 0"),
        ({"min_delta": "a"}, TypeError, "min_delta must be a number, got 'a'"),
        ({"min_delta": math.nan}, ValueError, "min_delta must be at least 0, got nan"),
        ({"monitor": "f1"}, ValueError, "monitor must be .* got 'f1'"),
    ],
)
def test_early_stopping(options, error, message):
    with pytest.raises(error, match=message):
        EarlyStopping(**options)


def test_a_partial_of_the_loss_is_a_loss(data):
    loss = functools.partial(pydistill.distillation_loss, alpha=0.3)
    assert len(trainer_for(mlp(), loss).fit(data, epochs=1)) == 1
