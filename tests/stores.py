"""Shared by the tests of the store: inputs, a teacher, forms of data, the contents of a folder, read-only folders."""

import os
from contextlib import contextmanager

import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset

ROWS, FEATURES, CLASSES, K = 150, 6, 20, 5  # 150 is not a multiple of the batch sizes below
TOP_K = {"k": K, "temperatures": (1.0, 2.0), "tail": "bucket"}
FILES = ("indices.npy", "log_partition_0.npy", "log_partition_1.npy", "logits.npy")


def make_inputs():
    return torch.randn(ROWS, FEATURES, generator=torch.Generator().manual_seed(7))


def make_teacher():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(FEATURES, 30), nn.Dropout(0.5), nn.ReLU(), nn.Linear(30, CLASSES))
    with torch.no_grad():
        model[3].weight *= 10
    return model


def logits_of(teacher, inputs):
    teacher.eval()
    with torch.no_grad():
        result = teacher(inputs)
    teacher.train()
    return result


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def assert_same_targets(got, want):
    assert got.shape == want.shape
    assert (got.tail, got.has_zeros) == (want.tail, want.has_zeros)
    assert got.logits.dtype == want.logits.dtype
    assert torch.equal(got.logits, want.logits)
    assert (got.indices is None) == (want.indices is None)
    assert got.indices is None or torch.equal(got.indices, want.indices)
    assert got.log_partitions.keys() == want.log_partitions.keys()
    assert all(torch.equal(x, want.log_partitions[t]) for t, x in got.log_partitions.items())


@contextmanager
def read_only(folder):
    """The folder and its files can be read only, also by a test that runs as root, whom no mode stops."""
    modes = {path: path.stat().st_mode & 0o777 for path in (*folder.iterdir(), folder)}
    for path, mode in modes.items():
        path.chmod(mode & 0o555)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)  # nobody
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        for path, mode in modes.items():
            path.chmod(mode)


class Items(Dataset):
    """A Dataset that does not show its tensors; 1 is added to the item number ``change``."""

    def __init__(self, inputs, change=None):
        self.inputs, self.change = inputs, change

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, i):
        if not 0 <= i < len(self):
            raise IndexError(i)
        return self.inputs[i] + int(i == self.change), i % 3


class Stream(IterableDataset):
    def __init__(self, inputs):
        self.inputs = inputs

    def __iter__(self):
        return iter(self.inputs)
