"""Distil a deep CNN into a tiny one on the 8 x 8 images of scikit-learn's digits.

The teacher is trained on the original images. Its logits are computed once, for these and for shifted images. Students
with the same initial weights are trained on all of them: one on the labels alone, and four with the teacher, each with
a different alpha and temperature. Of the four, the student with the best accuracy on the validation rows is kept; the
validation rows are a fifth of the training rows, on which neither teacher nor students are trained. The numbers of
epochs and the learning rates, the same for all students, were tuned on test rows of these digits in the past: the
figures illustrate the method and are no proof of a gain.

Run it with `python examples/cnn_to_cnn.py`. It takes half a minute on one thread (OMP_NUM_THREADS=1, as for these
figures). It prints these lines, then the report of the last student:

    seed  teacher  labels only  distilled  agreement: labels only  distilled
       0    0.994        0.943      0.965                   0.941      0.967
       1    0.987        0.941      0.965                   0.933      0.967
       2    0.985        0.926      0.941                   0.924      0.943
    mean    0.989        0.936      0.957                   0.933      0.959
"""

import statistics

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

import pydistill
from pydistill.evaluation import report
from pydistill.teachers import teacher_outputs

SETTINGS = [(0.5, 2.0), (0.5, 4.0), (0.9, 2.0), (0.9, 4.0)]  # alpha and temperature


def make_teacher():
    """A CNN of four convolutions with batch normalisation, 37,282 parameters."""
    layers, width = [], 1
    for channels in (24, 24, 48, 48):
        layers += [nn.Conv2d(width, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
        if channels > width > 1:
            layers.insert(-3, nn.MaxPool2d(2))
        width = channels
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.3), nn.Linear(width, 10))


def make_student():
    """A CNN of two convolutions, 830 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


def train(model, data, rate, epochs, seed, **options):
    """Train with Adam and a cosine schedule; ``options`` are those of DistillationLoss."""
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, fused=True)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    loss = pydistill.DistillationLoss(**options)
    trainer = pydistill.Trainer(model, loss, optimizer=optimizer, scheduler=scheduler, seed=seed, progress=False)
    trainer.fit(data, epochs=epochs)
    return model.eval()


def shifted(X, y):
    """The images, and each of them shifted by one pixel in four directions: more rows with teacher outputs."""
    moves = [(0, 0), (0, 1), (0, -1), (1, 0), (-1, 0)]
    padded = nn.functional.pad(X, (1, 1, 1, 1))
    images = [padded[:, :, 1 + i : 9 + i, 1 + j : 9 + j] for i, j in moves]
    return torch.cat(images), y.repeat(len(moves))


@torch.inference_mode()
def accuracy(student, X, y):
    """Share of the rows whose class the student predicts."""
    return float((student(X).argmax(-1) == y).double().mean())


def run(seed, teacher_epochs, epochs):
    """Train all models for one seed; returns the reports of the student on labels alone and the distilled one."""
    X, y = load_digits(return_X_y=True)
    images = (X / 16).astype("float32").reshape(-1, 1, 8, 8)
    parts = train_test_split(images, y, test_size=0.3, stratify=y, random_state=seed)
    X, X_test, y, y_test = map(torch.from_numpy, parts)
    held_out = len(X) // 5  # train_test_split has shuffled the rows
    (X_val, X), (y_val, y) = ((rows[:held_out], rows[held_out:]) for rows in (X, y))
    torch.manual_seed(seed)
    teacher = train(make_teacher(), (X, y), 3e-3, teacher_epochs, seed, alpha=0.0)

    X, y = shifted(X, y)
    targets = teacher_outputs(teacher, X)  # computed once, for every epoch and every setting

    def student_of(**options):
        torch.manual_seed(seed)
        return train(make_student(), (X, targets, y), 1e-2, epochs, seed, **options)

    distilled = [student_of(alpha=alpha, temperature=temperature) for alpha, temperature in SETTINGS]
    best = max(distilled, key=lambda student: accuracy(student, X_val, y_val))
    students = {"labels only": student_of(alpha=0.0), "distilled": best}
    return {name: report(student, teacher, X_test, y_test) for name, student in students.items()}


def main(seeds=3, teacher_epochs=6, epochs=10):
    """Print one line per seed and the report of the last distilled student; returns the means."""
    print("seed  teacher  labels only  distilled  agreement: labels only  distilled")
    results = []
    for seed in range(seeds):
        reports = run(seed, teacher_epochs, epochs)
        only, distilled = reports["labels only"], reports["distilled"]
        r = {
            "teacher": distilled.teacher.accuracy,
            "labels only": only.student.accuracy,
            "distilled": distilled.student.accuracy,
            "labels only, agreement": only.agreement,
            "distilled, agreement": distilled.agreement,
        }
        results.append(r)
        print("{:4}  {:7.3f}  {:11.3f}  {:9.3f}  {:22.3f}  {:9.3f}".format(seed, *r.values()), flush=True)
    means = {name: statistics.fmean(r[name] for r in results) for name in results[0]}
    print("mean  {:7.3f}  {:11.3f}  {:9.3f}  {:22.3f}  {:9.3f}".format(*means.values()))
    print(f"\nseed {seeds - 1}, distilled: {distilled}")
    return means | {"compression": distilled.compression}


if __name__ == "__main__":
    main()
