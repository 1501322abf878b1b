"""A Trainer that is killed: run in a process of its own, in which no thread of torch has started before the forks."""

import pickle
import sys
from pathlib import Path

import torch
import torch._dynamo  # which an optimizer imports: every process would, for longer than it trains
from killing import kill_at_random_moments

import pydistill
from pydistill.callbacks import BestModel, EarlyStopping
from pydistill.trainer import checkpoint

EPOCHS = 8


def train(folder):
    """A run with everything that a checkpoint holds, and its result to the bit in a file."""
    torch.manual_seed(3)
    inputs, targets = torch.randn(96, 6), torch.randn(96, 3)
    data = inputs, targets, targets.argmax(-1)
    layers = torch.nn.Linear(6, 16), torch.nn.BatchNorm1d(16), torch.nn.Dropout(0.2), torch.nn.ReLU()
    student = torch.nn.Sequential(*layers, torch.nn.Linear(16, 3))
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-2)
    trainer = pydistill.Trainer(
        student,
        pydistill.DistillationLoss(temperature=2.0),
        optimizer=optimizer,
        scheduler=torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 6], 0.7),
        schedules={"alpha": lambda epoch: 1 / epoch},
        callbacks=[BestModel(), EarlyStopping(patience=EPOCHS)],
        accumulate=2,
        clip_norm=1.0,
        seed=0,
        progress=False,
        checkpoint_dir=folder / "checkpoints",
        checkpoint_every=1,
    )
    history = trainer.fit(data, data, epochs=EPOCHS, batch_size=10, resume=True)
    assert [record.epoch for record in history] == list(range(1, EPOCHS + 1))
    of_optimizer = [x[name].tolist() for x in optimizer.state.values() for name in ("step", "exp_avg", "exp_avg_sq")]
    weights = [x.tolist() for x in student.state_dict().values()]
    numbers = [(record.train, record.val) for record in history]
    (folder / "result").write_bytes(pickle.dumps([weights, of_optimizer, numbers, optimizer.param_groups[0]["lr"]]))


def result(folder):
    return (folder / "result").read_bytes()


def progress(folder):
    """The number of the newest checkpoint."""
    found = checkpoint.found(folder / "checkpoints")
    return int(found[0].name.split("-")[1]) if found else 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    kill_at_random_moments(train, result, Path(sys.argv[1]), progress)
