"""The fuzzer itself: planted mistakes are found and made small, the oracle is right, what is printed is the call."""

import contextlib
import dataclasses
import io
import os
import signal

import numpy as np
import pytest
import reference
import torch
from fuzz_loss import __main__ as command
from fuzz_loss import campaign, judging, refusals, running
from fuzz_loss.case import written
from fuzz_loss.drawing import draw

from pydistill.engine import torch_backend

TORCH = ("torch", None)
pytestmark = pytest.mark.filterwarnings("ignore:student_logits .* with labels")


def cases(seed, suits, count):
    """So many random calls that suit."""
    found, number = [], 0
    while len(found) < count:
        case = draw(f"{seed}:{number}")
        number += 1
        if suits(case):
            found.append(case)
    return found


def of_logits(case):
    return case.function == "distillation_loss"


# --- Planted mistakes -----------------------------------------------------------------------------------------


def scaled_gradient(outcome, gradient):
    if gradient is not None:
        gradient.mul_(1 + 1e-4)
    return outcome


def other_denominator(outcome, _):
    return dataclasses.replace(outcome, soft_items=outcome.soft_items + 1)


def other_loss(outcome, _):
    return dataclasses.replace(outcome, loss=outcome.loss * (1 + 1e-5))


def lost_agreement(outcome, _):
    return dataclasses.replace(outcome, metrics=dict(outcome.metrics) | {"agreement": 0.0})


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (scaled_gradient, "gradient"),
        (other_denominator, "num_items"),
        (other_loss, "loss"),
        (lost_agreement, "agreement"),
    ],
)
def test_planted_mistake_is_found_and_made_small(monkeypatch, change, kind):
    def suits(case):
        small = of_logits(case) and case.rows.numel() * case.classes < 2000
        return small and case.path == "engine" and case.dtype in (torch.float32, torch.float64)

    right = [case for case in cases("planted", suits, 40) if judging.check(case, *TORCH) is None]
    assert len(right) > 30
    evaluate = torch_backend.TorchBackend.evaluate

    def wrong(self, batch, gradient=None, grad_output=1.0, metrics=False):
        return change(evaluate(self, batch, gradient, grad_output, metrics), gradient)

    monkeypatch.setattr(torch_backend.TorchBackend, "evaluate", wrong)
    found = [(case, judging.check(case, *TORCH)) for case in right]
    found = [(case, finding) for case, finding in found if finding is not None and finding.kind == kind]
    assert len(found) > 3
    case, finding = max(found, key=lambda pair: pair[0].rows.numel() * pair[0].classes)
    small, finding = campaign.smaller(case, TORCH, finding, seconds=8.0)
    assert finding.kind == kind
    assert small.rows.numel() == 1
    assert small.classes <= 2
    assert set(small.options) <= {"alpha", "return_metrics"}
    assert small.student.layout == "as it is"


def test_write_to_an_input_is_found(monkeypatch):
    evaluate = torch_backend.TorchBackend.evaluate

    def wrong(self, batch, gradient=None, grad_output=1.0, metrics=False):
        outcome = evaluate(self, batch, gradient, grad_output, metrics)
        if batch.teacher is not None:
            batch.teacher.view(-1)[:1] += 1
        return outcome

    monkeypatch.setattr(torch_backend.TorchBackend, "evaluate", wrong)
    kinds = [judging.check(case, *TORCH) for case in cases("written", lambda c: of_logits(c) and c.teacher, 40)]
    assert sum(finding is not None and finding.kind == "written" for finding in kinds) > 5


# --- The oracle -----------------------------------------------------------------------------------------------


def test_oracle_agrees_with_the_float64_reference():
    """Two references, written apart, on calls that both of them know."""

    def suits(case):
        if not of_logits(case) or case.rows.numel() * case.classes > 3000 or case.path != "engine":
            return False
        if case.teacher is None or case.teacher.form != "logits" or case.option("num_items") is not None:
            return False
        ends = case.option("beta") in (0, 1)
        tensors = (case.student.values, case.teacher.values.values)
        moderate = all(x.isfinite().all() and (x.abs() < 3e4).all() for x in tensors)
        return moderate and not ends and case.option("temperature") >= 0.3

    compared = 0
    for case in cases("oracle", suits, 400):
        want = next(iter(judging.Readings(case)))
        if not (want.gradients["student"].bound > 0).any():
            continue  # no row counts
        got_loss, got = by_reference(case)
        exact = want.gradients["student"]
        scale = 1e-9 / (1e-12 if case.dtype == torch.float64 else 1e-6)
        loss, bound = (np.asarray(x, np.float64).reshape(-1) for x in (want.loss, want.loss_bound))
        same = np.isnan(loss) | np.isinf(bound) | (np.abs(loss - got_loss) <= scale * bound + 1e-300)
        assert same.all(), (loss, got_loss, case)
        rows = ~(exact.nan | exact.unchecked)
        error = np.sqrt(((np.asarray(exact.values, np.float64) - got)[rows] ** 2).sum(-1))
        assert (error <= 1e-9 * np.sqrt((got[rows] ** 2).sum(-1)) + 2e-3 * exact.bound[rows]).all(), case
        compared += bool(rows.any())
    assert compared > 300


def by_reference(case):
    """(loss, gradient) of tests/reference.py."""
    classes, rows = case.classes, case.rows.numel()
    flat = {"labels": case.labels, "sample_weight": case.sample_weight}
    flat = {name: None if x is None else x.values.reshape(-1) for name, x in flat.items()}
    options = {name: case.option(name) for name in case.options if name not in ("inplace", "return_metrics")}
    wide = torch.float64 if case.dtype == torch.float64 else torch.float32
    grad_output = case.grad_output
    if case.option("reduction") == "none":
        grad_output = (torch.ones(case.rows, dtype=torch.float64) * grad_output).reshape(-1)
    loss, gradient = reference.loss_and_gradient(
        case.student.values.reshape(-1, classes),
        case.teacher.values.values.reshape(-1, classes).to(wide),
        flat["labels"],
        grad_output=torch.as_tensor(grad_output, dtype=torch.float64),
        sample_weight=None if flat["sample_weight"] is None else flat["sample_weight"].to(wide),
        class_weight=None if case.class_weight is None else case.class_weight.values.to(wide),
        **options,
    )
    return loss.reshape(-1).numpy(), gradient.reshape(rows, classes).numpy()


def test_oracle_agrees_with_the_reference_of_top_k_teachers():
    def suits(case):
        return (
            of_logits(case)
            and case.teacher is not None
            and case.teacher.form == "top_k"
            and case.student.values.isfinite().all()
            and (case.student.values.abs() < 1e3).all()
            and (case.teacher.values.values.abs() < 1e3).all()
            and case.option("beta") not in (0, 1)
            and case.option("temperature") >= 0.5
            and case.teacher.k < case.classes < 100
        )

    compared = 0
    for case in cases("top k", suits, 60):
        case = case.with_options(alpha=1.0, reduction="none", num_items=None, t_squared=False, unlabeled=None)
        case = type(case)(**(vars(case) | {"labels": None, "sample_weight": None, "grad_output": 1.0}))
        targets, temperature = case.teacher.make([]), case.option("temperature")
        flat = [x.reshape(-1, x.shape[-1]) for x in (case.student.values.double(), targets.logits, targets.indices)]
        partition = targets.log_partitions[temperature].reshape(-1) if targets.tail == "bucket" else None
        want = reference.topk_divergence(
            case.option("divergence"), *flat, temperature, partition=partition, beta=case.option("beta")
        )
        got = next(iter(judging.Readings(case)))
        assert np.allclose(np.asarray(got.soft, np.float64), want.numpy(), rtol=1e-9, atol=1e-9), case
        compared += case.rows.numel() > 0
    assert compared > 50


# --- What is printed, and what is refused ---------------------------------------------------------------------


def test_printed_code_is_the_call():
    def suits(case):
        return case.function != "loss_items" and case.rows.numel() * case.classes < 300

    for case in cases("printed", suits, 60):
        names = {}
        result = running.run(case, *TORCH)
        if result.error is None:
            with contextlib.redirect_stdout(io.StringIO()):
                exec(written(case, *TORCH), names)
            assert torch.equal(names["loss"].detach().nan_to_num(12.5), result.loss.nan_to_num(12.5)), case
            for got, want in zip(names.get("gradients", ()), result.gradients.values(), strict=False):
                assert torch.equal(got.nan_to_num(12.5), want.nan_to_num(12.5)), case


def test_call_of_a_seed_is_always_the_same():
    for number in range(8):
        assert written(draw(f"same:{number}"), *TORCH) == written(draw(f"same:{number}"), *TORCH)


@pytest.mark.parametrize("refusal", list(refusals.every()), ids=lambda refusal: refusal.name)
def test_every_bad_argument_is_refused_by_name(refusal):
    assert refusal.check("torch", None) is None


def test_refusals_that_fail_are_found():
    for argument, value, error in (("temperature", "2.0", ValueError), ("temperature", "0.0", TypeError)):
        refusal = refusals.Refusal("distillation_loss", argument, value, error, "fails")
        assert refusal.check("torch", None) is not None


# --- The campaign ---------------------------------------------------------------------------------------------


def test_worker_counts_its_calls_and_findings(monkeypatch):
    monkeypatch.setattr(judging, "check", lambda case, *_: judging.Finding("loss", "wrong"))
    monkeypatch.setattr(campaign, "SECONDS_FOR_SHRINKING", 0.1)
    out = io.StringIO()
    worker = campaign.Worker("counted", [TORCH], out=out).run(60, calls=range(6))
    assert worker.calls == {"torch": 6}
    assert sum(worker.findings.values()) == 6
    assert "python -m tests.fuzz_loss --seed counted --call 0 --backend torch" in out.getvalue()
    assert "# wrong" in out.getvalue()


def test_crash_is_made_small_in_forked_children(monkeypatch, capfd):
    def run(case, *_):
        if case.student is not None and case.classes > 1:
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(judging, "run", run)
    number = next(n for n in range(100) if of_logits(draw(f"crash:{n}")) and draw(f"crash:{n}").classes > 4)
    campaign.crash("crash", number, "torch", seconds=2.0)
    printed = capfd.readouterr().out
    assert "# SIGKILL" in printed
    assert "distillation_loss(student" in printed


def test_command_makes_one_call(capsys):
    number = next(n for n in range(24) if judging.check(draw(f"one:{n}"), *TORCH) is None)
    assert command.main(["--seed", "one", "--call", str(number), "--backend", "torch"]) == 0
    assert f"call {number}: 0 findings on torch" in capsys.readouterr().out
