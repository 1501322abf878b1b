"""Shared by the tests of the Trainer: data, students and trainers."""

import torch
from torch import nn

from pydistill.trainer import Trainer

ROWS, FEATURES, CLASSES = 150, 6, 4  # 150 is not a multiple of any batch size in the tests


def make_data():
    """Inputs, a linear teacher's logits, and its classes as labels."""
    generator = torch.Generator().manual_seed(7)
    inputs = torch.randn(ROWS, FEATURES, generator=generator)
    logits = inputs @ (2 * torch.randn(FEATURES, CLASSES, generator=generator))
    return inputs, logits, logits.argmax(-1)


def mlp(dropout=0.0):
    layers = [nn.Linear(FEATURES, 16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, CLASSES)]
    return nn.Sequential(*layers)


def same_students(count, dropout=0.0):
    first = mlp(dropout)
    others = [mlp(dropout) for _ in range(count - 1)]
    for student in others:
        student.load_state_dict(first.state_dict())
    return [first, *others]


def trainer_for(student, loss=None, **options):
    return Trainer(student, loss, **({"seed": 0, "progress": False} | options))


def weights(student):
    return torch.cat([p.detach().flatten() for p in student.parameters()])
