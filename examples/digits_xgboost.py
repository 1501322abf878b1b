"""Distil XGBoost into a small network, using its margins as logits: unlike probabilities, they never round to 0 or 1.

The student learns from out-of-fold margins. For comparison, the same network is trained on the labels alone, with the
same initial weights and the same order of batches. Run it with `python examples/digits_xgboost.py`. It takes about 30
seconds on two cores and prints means over three seeds. With a label for every row, distillation gains no accuracy here:

    teacher                 0.970
    labels only             0.972
    labels only, agreement  0.973
    distilled               0.968
    distilled, agreement    0.976
"""

import statistics

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from xgboost import XGBClassifier

import pydistill
from pydistill.teachers import soft_targets, teacher_outputs


def train_student(X, targets, y, alpha, seed, epochs):
    """Train a 64-32-10 network; alpha is the weight of the soft targets, and with 0 only the labels are used."""
    torch.manual_seed(seed)
    student = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
    loss = pydistill.DistillationLoss(temperature=2.0, alpha=alpha)
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-2, fused=True)
    trainer = pydistill.Trainer(student, loss, optimizer=optimizer, seed=seed, progress=False)
    trainer.fit((X, targets, y), epochs=epochs)
    return trainer


def run(seed, trees, epochs):
    """Accuracies on the test rows, and agreement of the students with the teacher, for one seed."""
    X, y = load_digits(return_X_y=True)
    X = (X / 16).astype("float32")
    X, X_test, y, y_test = train_test_split(X, y, test_size=0.3, stratify=y, random_state=seed)
    options = {"max_depth": 3, "learning_rate": 0.3, "subsample": 0.6, "colsample_bynode": 0.25}
    teacher = XGBClassifier(n_estimators=trees, **options, n_jobs=1, random_state=seed)
    targets = soft_targets(teacher, X, y)
    teacher.fit(X, y)

    X, y, X_test, y_test = map(torch.from_numpy, (X, y, X_test, y_test))
    teacher_classes = teacher_outputs(teacher, X_test.numpy()).logits.argmax(-1)
    results = {"teacher": float((teacher_classes == y_test).double().mean())}
    for name, alpha in {"labels only": 0.0, "distilled": 0.5}.items():
        classes = train_student(X, targets, y, alpha, seed, epochs).predict(X_test).argmax(-1)
        results[name] = float((classes == y_test).double().mean())
        results[f"{name}, agreement"] = float((classes == teacher_classes).double().mean())
    return results


def main(seeds=3, trees=100, epochs=40):
    """Print and return the means over the seeds."""
    results = [run(seed, trees, epochs) for seed in range(seeds)]
    means = {name: statistics.fmean(r[name] for r in results) for name in results[0]}
    for name, mean in means.items():
        print(f"{name:23} {mean:.3f}")
    return means


if __name__ == "__main__":
    main()
