"""The examples run, and do what they say."""

import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import pydistill

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_distilbert_loss():
    example = load("distilbert_loss")
    history = example.main(steps=40)
    assert history[-1][0] < 0.7 * history[0][0]

    student, teacher = example.Model(1), example.Model(1)
    tokens, labels = example.masked_batch(4)
    logits, hidden = (x.flatten(0, 1) for x in student(tokens))
    teacher_logits, teacher_hidden = (x.flatten(0, 1).detach() for x in teacher(tokens))
    soft = F.kl_div((logits / 2).log_softmax(-1), (teacher_logits / 2).softmax(-1), reduction="batchmean")
    want = 5 * 4 * soft + 2 * F.cross_entropy(logits, labels.flatten())
    want = want + (1 - F.cosine_similarity(hidden, teacher_hidden)).mean()
    torch.testing.assert_close(example.distilbert_loss(student, teacher, tokens, labels)[0], want, rtol=1e-4, atol=1e-5)


def test_language_model():
    example = load("language_model")
    torch.manual_seed(0)
    texts = example.paragraphs()
    tokens, labels = example.make_batch(texts[:4])
    student, teacher = example.GPT(16, 1), example.GPT(32, 1)
    hidden, targets = student(tokens), example.linear_teacher(teacher, tokens)
    weight = student.embed.weight
    loss = pydistill.linear_distillation_loss(hidden, weight, targets, labels, **example.OPTIONS)
    want = example.eager_loss(hidden, weight, *targets.head[:2], labels)
    torch.testing.assert_close(loss, want)
    for got, expected in zip(
        torch.autograd.grad(loss, student.parameters(), retain_graph=True),
        torch.autograd.grad(want, student.parameters()),
        strict=True,
    ):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)

    results = example.main(texts[:640], teacher_epochs=1, epochs=1)
    assert all(value < 7 for value in results.values())  # uniform: log 2000 = 7.6


def test_digits_forest():
    means = load("digits_forest").main(seeds=1, trees=60, epochs=25)
    assert means["smaller"] > 200
    assert means["faster"] > 0
    assert means["kept"] > 0.95


def test_digits_xgboost():
    pytest.importorskip("xgboost")
    means = load("digits_xgboost").main(seeds=1, trees=20, epochs=15)
    assert all(0.8 < value <= 1 for value in means.values())


def test_unlabeled_transfer():
    means = load("unlabeled_transfer").main(seeds=2, steps=400)
    assert means["distilled"] > 0.88  # two seeds do not tell whether it gains
    assert means["gain"] == pytest.approx(means["distilled"] - means["labels only"])


def test_cnn_to_cnn():
    means = load("cnn_to_cnn").main(seeds=1, teacher_epochs=3, epochs=5)
    assert means["teacher"] > 0.9
    assert means["distilled"] > 0.7
    assert means["compression"] > 5


def test_deploy():
    pytest.importorskip("onnxruntime")
    figures = load("deploy").main(trees=30, epochs=10)
    assert figures["same classes"]
    assert figures["largest difference"] < 1e-4
    assert figures["accuracy"] > 0.85


def test_prune():
    means = load("prune").main(seeds=1, epochs=20)
    assert means["fine-tuned with the teacher"] > means["pruned"] + 0.1
    assert means["weights left"] < 0.11 * means["weights"]


def test_sklearn_pipeline():
    example = load("sklearn_pipeline")
    example.TEMPERATURES, example.ALPHAS = [1.0, 4.0], [0.3]
    results = example.main(trees=15)
    assert results["student"] > 0.9
    assert results["compression"] > 20
