"""Schedulers of the Trainer, which it steps once after each epoch."""

import warnings

import pytest
import torch
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    CosineAnnealingLR,
    CyclicLR,
    ExponentialLR,
    LinearLR,
    OneCycleLR,
    SequentialLR,
    StepLR,
)
from training import make_data, mlp, trainer_for, weights

EPOCHS = 4
ONE_CYCLE = "scheduler: OneCycleLR is stepped once after each epoch, so total_steps must be the number of epochs, "


@pytest.fixture
def data():
    return make_data()


def trainer_with(make, **options):
    """Its scheduler is ``make(optimizer)``."""
    student = mlp()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    return trainer_for(student, optimizer=optimizer, scheduler=make(optimizer), **options)


def one_cycle(steps):
    return lambda optimizer: OneCycleLR(optimizer, 0.1, total_steps=steps)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda o: StepLR, TypeError, r"scheduler must be a scheduler of torch, .*StepLR\(.*; got the class StepLR"),
        (lambda o: o, TypeError, "scheduler must be a scheduler of torch, .*; got SGD"),
        (lambda o: len, TypeError, "scheduler must be a scheduler of torch, .*; got the function len"),
        (
            lambda o: StepLR(torch.optim.Adam(mlp().parameters()), 1),
            ValueError,
            "scheduler must be made of the optimizer.*this StepLR changes the learning rate of another Adam",
        ),
    ],
)
def test_no_scheduler_of_this_optimizer(make, error, message):
    with pytest.raises(error, match=message):
        trainer_with(make)


@pytest.mark.parametrize("steps", [EPOCHS * 3, EPOCHS + 1, EPOCHS - 1])
def test_one_cycle_of_another_number_of_steps_costs_no_step(data, steps):
    trainer = trainer_with(one_cycle(steps))
    before = weights(trainer.student)
    with pytest.raises(ValueError, match=f"{ONE_CYCLE}4; got total_steps={steps}. Make it with total_steps=4, or"):
        trainer.fit(data, epochs=EPOCHS)
    assert torch.equal(weights(trainer.student), before)


def test_one_cycle_of_the_epochs(data):
    rates = []
    trainer = trainer_with(one_cycle(EPOCHS), callbacks=[lambda trainer, record: rates.append(rate(trainer))])
    first = rate(trainer)
    trainer.fit(data, epochs=EPOCHS)
    optimizer = torch.optim.SGD(mlp().parameters(), lr=0.1)
    by_hand, want = one_cycle(EPOCHS)(optimizer), []
    for _ in range(EPOCHS):
        optimizer.step()
        by_hand.step()
        want.append(optimizer.param_groups[0]["lr"])
    assert rates == want
    assert first < max(rates)  # up, and down again
    with pytest.raises(ValueError, match=f"{ONE_CYCLE}2; got total_steps=4, of which 4 were taken. Make it with.*=2"):
        trainer.fit(data, epochs=2)


def rate(trainer):
    return trainer.optimizer.param_groups[0]["lr"]


def test_one_cycle_over_a_resume(data, tmp_path):
    def interrupt(trainer, record):
        if record.epoch == 2:
            raise KeyboardInterrupt

    whole = trainer_with(one_cycle(EPOCHS))
    start = {name: x.clone() for name, x in whole.student.state_dict().items()}
    whole.fit(data, epochs=EPOCHS)
    cut = trainer_with(one_cycle(EPOCHS), callbacks=[interrupt], checkpoint_dir=tmp_path)
    cut.student.load_state_dict(start)
    with pytest.raises(KeyboardInterrupt):
        cut.fit(data, epochs=EPOCHS)
    resumed = trainer_with(one_cycle(EPOCHS), callbacks=[lambda trainer, record: None], checkpoint_dir=tmp_path)
    resumed.fit(data, epochs=EPOCHS, resume=True)
    assert torch.equal(weights(resumed.student), weights(whole.student))
    longer = trainer_with(one_cycle(EPOCHS + 2), callbacks=[lambda trainer, record: None], checkpoint_dir=tmp_path)
    with pytest.raises(ValueError, match=f"{ONE_CYCLE}2; got total_steps=4, of which 4 were taken"):
        longer.fit(data, epochs=EPOCHS + 2, resume=True)  # the checkpoint's scheduler has its own plan


@pytest.mark.parametrize(
    "make",
    [
        lambda o: SequentialLR(o, [LinearLR(o, total_iters=1), OneCycleLR(o, 0.1, total_steps=40)], [1]),
        lambda o: ChainedScheduler([OneCycleLR(o, 0.1, total_steps=40), ExponentialLR(o, 0.9)], optimizer=o),
    ],
)
def test_a_scheduler_inside_another(data, make):
    with pytest.raises(ValueError, match=f"{ONE_CYCLE}{EPOCHS}; got total_steps=40"):
        trainer_with(make).fit(data, epochs=EPOCHS)


def test_a_cycle_must_fit(data):
    rule = r"scheduler: CyclicLR is stepped once.*a cycle must fit into the 4 epochs; got step_size_up.*="
    with pytest.raises(ValueError, match=rule + "4000"):
        trainer_with(lambda o: CyclicLR(o, 0.01, 0.1)).fit(data, epochs=EPOCHS)
    trainer = trainer_with(lambda o: CyclicLR(o, 0.01, 0.1, step_size_up=1, step_size_down=3))
    assert len(trainer.fit(data, epochs=EPOCHS)) == EPOCHS


@pytest.mark.parametrize(
    ("make", "option"),
    [
        (lambda o, steps: CosineAnnealingLR(o, steps), "T_max"),
        (lambda o, steps: LinearLR(o, total_iters=steps), "total_iters"),
    ],
)
def test_a_course_longer_than_the_training_is_warned_of(data, make, option):
    name = f"scheduler: {type(make(torch.optim.SGD(mlp().parameters()), 1)).__name__} is stepped once after each epoch"
    with pytest.warns(UserWarning, match=f"{name}, and with {option}=12 it will not.* after 4 epochs") as found:
        trainer_with(lambda o: make(o, 12)).fit(data, epochs=EPOCHS)
    assert found[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer = trainer_with(lambda o: make(o, 2 * EPOCHS))
        trainer.scheduler.last_epoch = EPOCHS  # the second half of a training of 8 epochs
        trainer.fit(data, epochs=EPOCHS)
        trainer_with(lambda o: make(o, EPOCHS)).fit(data, epochs=EPOCHS)
