"""Save a distilled student, load it again, export it to ONNX and run it with ONNX Runtime, without torch.

The ONNX model accepts any number of rows. It predicts the same classes, and its logits are the same within rounding.
Run the example with `python examples/deploy.py`. The last lines of its output (one thread):

    student.safetensors 9,936 bytes, student.onnx 13,857 bytes
    540 test rows: accuracy 0.972, largest difference of a logit 1.7e-06, same classes: True
    batch of   1: torch 0.055 ms, ONNX Runtime 0.024 ms
    batch of 256: torch 0.118 ms, ONNX Runtime 0.066 ms
"""

import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from sklearn.datasets import load_digits
from sklearn.ensemble import RandomForestClassifier
from sklearn.model_selection import train_test_split

import pydistill
from pydistill.shipping import load_student, save_student
from pydistill.teachers import soft_targets

BATCH = 256


def make_student():
    """The student: 64 inputs, 32 hidden units, 10 classes. The code that loads it must build the same module."""
    return torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))


def distil(X, y, trees, epochs):
    """Distil a random forest into the student."""
    targets = soft_targets(RandomForestClassifier(trees, oob_score=True, random_state=0), X, y)
    torch.manual_seed(0)
    student = make_student()
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-2, fused=True)
    trainer = pydistill.Trainer(student, pydistill.DistillationLoss(), optimizer=optimizer, seed=0, progress=False)
    trainer.fit((torch.from_numpy(X), targets, torch.from_numpy(y)), epochs=epochs)
    return student


def export(student, path):
    """Write one ONNX file, weights included, for any number of rows.

    The export is traced with two rows: with one row it would fix the number of rows at 1.
    """
    torch.onnx.export(
        student.eval(),
        (torch.zeros(2, 64),),
        path,
        input_names=["pixels"],
        output_names=["logits"],
        dynamic_shapes=({0: "rows"},),
        external_data=False,
        verbose=False,
    )


def open_session(path):
    """Open the model in ONNX Runtime on one thread: a network of this size gains nothing from more."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def milliseconds(work, repeats=100):
    """Median time of a call in milliseconds."""
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


@torch.inference_mode()
def compare(student, session, X, y):
    """Compare torch and ONNX Runtime on the same rows: logits, classes and time."""
    run = lambda rows: session.run(["logits"], {"pixels": rows})[0]  # noqa: E731
    want, got = student(torch.from_numpy(X)).numpy(), run(X)
    figures = {
        "accuracy": float((got.argmax(1) == y).mean()),
        "largest difference": float(abs(got - want).max()),
        "same classes": bool((got.argmax(1) == want.argmax(1)).all()),
    }
    for rows in (1, BATCH):
        batch = np.resize(X, (rows, 64))
        tensor = torch.from_numpy(batch)
        figures[f"torch, {rows}"] = milliseconds(lambda tensor=tensor: student(tensor))
        figures[f"onnx, {rows}"] = milliseconds(lambda batch=batch: run(batch))
    return figures


def main(trees=200, epochs=40):
    """Distil, save, load, export and compare; returns the figures."""
    X, y = load_digits(return_X_y=True)
    X, X_test, y, y_test = train_test_split((X / 16).astype("float32"), y, test_size=0.3, stratify=y, random_state=0)
    with tempfile.TemporaryDirectory() as name:
        folder, path = Path(name) / "student", Path(name) / "student.onnx"
        save_student(distil(X, y, trees, epochs), folder, metadata={"classes": list(range(10))})
        student = load_student(folder, make_student())
        export(student, path)
        figures = compare(student, open_session(path), X_test, y_test)
        figures["safetensors"] = (folder / "student.safetensors").stat().st_size
        figures["onnx"] = path.stat().st_size
    print(f"student.safetensors {figures['safetensors']:,} bytes, student.onnx {figures['onnx']:,} bytes")
    print(f"{len(y_test)} test rows: accuracy {figures['accuracy']:.3f}, largest difference of a logit", end=" ")
    print(f"{figures['largest difference']:.1e}, same classes: {figures['same classes']}")
    for rows in (1, BATCH):
        times = f"torch {figures[f'torch, {rows}']:.3f} ms, ONNX Runtime {figures[f'onnx, {rows}']:.3f} ms"
        print(f"batch of {rows:3}: {times}")
    return figures


if __name__ == "__main__":
    main()
