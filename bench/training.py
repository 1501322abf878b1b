"""Time an epoch of a small student: with the Trainer, with a hand-written loop, and with the loop of tutorials.

Run ``python -m bench.training``. Each contestant trains a 64-32-10 network on 1,437 rows for one epoch, in batches of
64 rows:

- Trainer: ``pydistill.Trainer``;
- by hand: a loop of the same parts (tensors indexed directly, fused Adam, distillation_loss) without the metrics that
  the Trainer records;
- tutorial: a DataLoader, Adam, and kl_div + cross_entropy, with the mistakes of the tutorial corrected.

The contestants take turns, epoch by epoch, in one process. The ratios are medians of paired ratios.
"""

import statistics
import time

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import pydistill

ROWS, BATCH, T, ALPHA = 1437, 64, 2.0, 0.7


def make_data():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.rand(ROWS, 64, generator=generator)
    return inputs, torch.randn(ROWS, 10, generator=generator), torch.randint(10, (ROWS,), generator=generator)


def make_student():
    return torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))


def trainer(data):
    made = pydistill.Trainer(make_student(), pydistill.DistillationLoss(temperature=T, alpha=ALPHA), progress=False)
    return lambda: made.fit(data, epochs=1, batch_size=BATCH)


def by_hand(data):
    student = make_student()
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-3, fused=True)
    inputs, targets, labels = data

    def epoch():
        for rows in torch.randperm(ROWS).split(BATCH):
            logits = student(inputs[rows])
            loss = pydistill.distillation_loss(logits, targets[rows], labels[rows], temperature=T, alpha=ALPHA)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return epoch


def tutorial(data):
    student = make_student()
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-3)
    loader = DataLoader(TensorDataset(*data), batch_size=BATCH, shuffle=True)

    def epoch():
        for inputs, targets, labels in loader:
            logits = student(inputs)
            log_q, p = F.log_softmax(logits / T, -1), F.softmax(targets / T, -1)
            loss = ALPHA * T**2 * F.kl_div(log_q, p, reduction="batchmean")
            loss = loss + (1 - ALPHA) * F.cross_entropy(logits, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return epoch


def main(pairs=60):
    torch.set_num_threads(1)
    data = make_data()
    epochs = {"Trainer": trainer(data), "by hand": by_hand(data), "tutorial": tutorial(data)}
    times = {name: [] for name in epochs}
    for round_ in range(pairs + 3):
        for name, epoch in epochs.items():
            start = time.perf_counter()
            epoch()
            if round_ >= 3:  # the first rounds warm up
                times[name].append(time.perf_counter() - start)
    for name in epochs:
        ratios = [a / b for a, b in zip(times[name], times["Trainer"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        ms = statistics.median(times[name]) * 1e3
        print(f"{name:10}{ms:8.1f} ms per epoch, {middle:.2f} x the Trainer's time (quartiles {low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main()
