"""Distil a random forest of 200 trees into a network of 2,410 parameters, whose file is about 660 times smaller.

Each of the five seeds has its own split. The student learns from the forest's out-of-bag probabilities. The temperature
is chosen on validation rows; the test rows are used once, for the figures below. Run it with
`python examples/digits_forest.py`. It takes about 40 seconds on two cores and prints:

    seed  T  forest  student  smaller  faster (batch of 256)
       0  1   0.981    0.978    667 x   612 x
       1  1   0.965    0.967    672 x   595 x
       2  1   0.970    0.959    663 x   726 x
       3  1   0.974    0.972    684 x   706 x
       4  1   0.967    0.969    658 x   732 x
    mean      0.971    0.969: 99.7% of the forest's accuracy kept
"""

import pickle
import statistics
import time
from io import BytesIO

import torch
from sklearn.datasets import load_digits
from sklearn.ensemble import RandomForestClassifier
from sklearn.model_selection import train_test_split

import pydistill
from pydistill.teachers import soft_targets, teacher_outputs

TEMPERATURES = (1.0, 2.0)
BATCH = 256


def load():
    """The digits as float32 in [0, 1], and their labels."""
    X, y = load_digits(return_X_y=True)
    return torch.tensor(X / 16, dtype=torch.float32), torch.tensor(y)


def split(X, y, seed):
    """Rows for training, validation and test: 56, 14 and 30 %."""
    rest, test = train_test_split(range(len(y)), test_size=0.3, stratify=y, random_state=seed)
    train, val = train_test_split(rest, test_size=0.2, stratify=y[rest], random_state=seed)
    return [(X[rows], y[rows]) for rows in (train, val, test)]


def train_student(X, targets, y, temperature, seed, epochs):
    """Train a 64-32-10 network on soft targets and labels, with equal weights."""
    torch.manual_seed(seed)
    student = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
    loss = pydistill.DistillationLoss(temperature=temperature, alpha=0.5)
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-2, fused=True)
    trainer = pydistill.Trainer(student, loss, optimizer=optimizer, seed=seed, progress=False)
    trainer.fit((X, targets, y), epochs=epochs)
    return student.eval()


@torch.no_grad()
def accuracy(student, X, y):
    """Share of the rows whose class the student predicts."""
    return float((student(X).argmax(-1) == y).double().mean())


def size(student):
    """Size of the student's file in bytes."""
    file = BytesIO()
    torch.save(student.state_dict(), file)
    return len(file.getbuffer())


@torch.no_grad()
def milliseconds(work, repeats):
    """Median time of a call in milliseconds."""
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def run(seed, trees, epochs):
    """Train and measure teacher and student for one seed."""
    (X, y), (X_val, y_val), (X_test, y_test) = split(*load(), seed)
    forest = RandomForestClassifier(trees, oob_score=True, random_state=seed).fit(X, y)
    targets = soft_targets(forest, X, y)
    students = {t: train_student(X, targets, y, t, seed, epochs) for t in TEMPERATURES}
    temperature = max(students, key=lambda t: accuracy(students[t], X_val, y_val))
    student, batch = students[temperature], X_test[:BATCH]
    rows = batch.numpy()
    return {
        "temperature": temperature,
        "forest": float((teacher_outputs(forest, X_test).logits.argmax(-1) == y_test).double().mean()),
        "student": accuracy(student, X_test, y_test),
        "smaller": len(pickle.dumps(forest)) / size(student),
        "faster": milliseconds(lambda: forest.predict_proba(rows), 5) / milliseconds(lambda: student(batch), 50),
    }


def main(seeds=5, trees=200, epochs=40):
    """Print one line per seed; returns the means."""
    print("seed  T  forest  student  smaller  faster (batch of 256)")
    results = []
    for seed in range(seeds):
        r = run(seed, trees, epochs)
        results.append(r)
        print(
            f"{seed:4} {r['temperature']:2.0f}  {r['forest']:6.3f}  {r['student']:7.3f}  {r['smaller']:5.0f} x"
            f"  {r['faster']:4.0f} x",
            flush=True,
        )
    means = {name: statistics.fmean(r[name] for r in results) for name in results[0]}
    means["kept"] = means["student"] / means["forest"]
    print(
        f"mean     {means['forest']:6.3f}  {means['student']:7.3f}: {means['kept']:.1%} of the forest's accuracy kept"
    )
    return means


if __name__ == "__main__":
    main()
