"""The benchmark suite: it measures what it says, refuses what is wrong, and its reports follow from its files."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # at the end: pydistill itself is the installed one

from bench import __main__ as bench  # noqa: E402
from bench import cases, contestants, measure, report, run, scaling  # noqa: E402

SMALL = "64x50"


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    assert bench.main([SMALL, f"{SMALL},T=2.5,forward", "--pairs", "3", "--output", str(folder)]) == 0
    return folder


def test_every_case_can_be_named():
    chosen = cases.default_cases()
    assert 30 <= len(chosen) <= 50
    assert [cases.parse(case.name) for case in chosen] == chosen
    assert set(cases.quick_cases()) <= set(chosen)
    assert {cases.Case(), cases.Case(dtype="bfloat16", temperature=2.0)} <= set(cases.full_cases())


@pytest.mark.parametrize("name", ["", "1024", "0x10", "axb", "8x8,float8", "8x8,T", "8x8,T=warm"])
def test_a_wrong_name_is_refused(name):
    with pytest.raises(ValueError, match=r"case|could not convert"):
        cases.parse(name)


def test_results_hold_every_contestant(results):
    data = json.loads((results / "results.json").read_text())
    both, forward = data["cases"]
    names = {"tutorial", "best eager", "compiled tutorial", "compiled best eager", "pydistill", "pydistill in place"}
    names |= {
        "pydistill in place, metrics",
        "pydistill numba",
        "pydistill torch",
        "limit",
        "limit in place",
        "torch.add",
    }
    assert set(both["contestants"]) | set(both["missing"]) == names
    assert set(forward["contestants"]) | set(forward["missing"]) == names - {
        "pydistill in place",
        "pydistill in place, metrics",
        "limit in place",
        "torch.add",
    }
    assert both["contestants"]["pydistill"]["over pydistill"] == [1, 1, 1]
    assert 0 < both["contestants"]["pydistill"]["error"] < 1e-6
    assert {"date", "cpu", "torch", "isa", "huge pages"} <= data["machine"].keys()


def test_report_from_the_file_alone(results, capsys):
    assert bench.main(["--report", str(results / "results.json")]) == 0
    text = capsys.readouterr().out
    assert "Where it loses" in text
    assert "torch.compile of the best eager form" in text
    assert (results / "speedup.png").stat().st_size > 10_000


def test_compare_tells_a_change_from_noise(results):
    old = json.loads((results / "results.json").read_text())
    new = json.loads(json.dumps(old))
    tutorial = new["cases"][0]["contestants"]["tutorial"]
    tutorial["over pydistill"] = [2 * x for x in tutorial["over pydistill"]]
    old["cases"][0]["contestants"]["tutorial"]["over pydistill"] = [4.0, 3.9, 4.1]
    tutorial["over pydistill"] = [8.0, 7.8, 8.2]
    lines = [line for line in report.compare(old, new).splitlines() if line.startswith(SMALL + " ")]
    assert [("pydistill is faster" in line) for line in lines] == [line.split()[1] == "tutorial" for line in lines]
    with pytest.raises(ValueError, match="no case in common"):
        report.compare(old, {"machine": old["machine"], "cases": []})


def test_a_case_names_its_threads(results, monkeypatch):
    assert [case["threads"] for case in json.loads((results / "results.json").read_text())["cases"]] == [1, 1]
    monkeypatch.setattr(run, "contestants", lambda case: (contestants_of_two(case), {}))
    count = torch.get_num_threads()
    try:
        result = run.run_case(cases.parse(f"{SMALL},threads=2"), lambda rounds: rounds, pairs=2)
    finally:
        torch.set_num_threads(count)
    assert (result["name"], result["threads"]) == (f"{SMALL},threads=2", 2)
    assert f"{SMALL},threads=2  (2 threads, 2 pairs)" in report.table(result)
    assert f"{SMALL}  (1 thread, 2 pairs)" in report.table(result | {"name": SMALL, "threads": 1})
    del result["threads"]  # as in a file written before there was the field
    assert report.threads(result) == 2


def contestants_of_two(case):
    found, _ = contestants.contestants(case)
    return {name: found[name] for name in ("pydistill", "pydistill in place")}


def test_only_cases_of_the_same_threads_are_compared(results):
    new = json.loads((results / "results.json").read_text())
    old = {"machine": new["machine"], "cases": [case | {"threads": 2} for case in new["cases"]]}
    with pytest.raises(ValueError, match="no case in common"):
        report.compare(old, new)


def test_a_wrong_contestant_is_not_timed(monkeypatch):
    def off_by_a_percent(case):
        found, missing = contestants.contestants(case)
        step = found["pydistill"].step

        def wrong(leaves, constants):
            loss, (gradient,) = step(leaves, constants)
            return loss, (1.01 * gradient,)

        return {"pydistill": contestants.Contestant(wrong)}, missing

    monkeypatch.setattr(run, "contestants", off_by_a_percent)
    with pytest.raises(AssertionError, match=r"pydistill is off by 0\.01"):
        run.run_case(cases.parse(SMALL), lambda rounds: rounds, pairs=2)


def test_a_wrong_loss_is_noticed_where_there_is_no_gradient():
    case = cases.parse(f"{SMALL},forward")
    inputs = measure.make_inputs(case)
    right = contestants.contestants(case)[0]["pydistill"]
    wrong = contestants.Contestant(lambda *x: (1.001 * right.step(*x)[0], None))
    exact = measure.exact(case, *inputs)
    assert measure.error(case, right, *inputs, exact) < 1e-6
    assert measure.error(case, wrong, *inputs, exact) > 5e-4


def test_peak_counts_buffers():
    case = cases.parse("2048x2100")  # 17 MB: small enough for the allocator to keep what is freed
    inputs = measure.make_inputs(case)

    def allocate(count, leaves, constants):
        return None, [torch.ones(case.rows, case.classes) for _ in range(count)]

    for count in (3, 1, 1, 1):  # by then the allocator has learnt to reuse
        contestant = contestants.Contestant(partial(allocate, count))
        assert measure.peak_buffers(case, contestant, *inputs) == pytest.approx(count, abs=0.1)


def test_losses_are_listed():
    def entry(over):
        return {"over pydistill": [over] * 3}

    text = report.losses([{"name": "8x8", "contestants": {"tutorial": entry(0.5), "best eager": entry(2.0)}}])
    loses, leads = text.split("Smallest leads")
    assert "tutorial" in loses
    assert "best eager" in leads


def test_exponent_of_a_power_law():
    assert scaling._exponent([1, 2, 4, 8], [3.0, 12.0, 48.0, 192.0]) == pytest.approx(2)


def test_pytest_benchmark_collects_the_same_cases():
    command = [
        sys.executable,
        "-m",
        "pytest",
        "bench",
        "--collect-only",
        "-q",
        "--benchmark-only",
        "-p",
        "no:cacheprovider",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    for case in cases.default_cases():
        assert case.huge_pages or f"[{case.name}-pydistill]" in done.stdout


@pytest.mark.parametrize("arguments", [["8x8,float8"], [SMALL, "--pairs", "1"]])
def test_the_command_line_refuses_what_it_cannot_do(arguments, capsys):
    with pytest.raises(SystemExit):
        bench.main(arguments)
    assert "got" in capsys.readouterr().err


def test_the_readme_shows_the_committed_results():
    readme = (ROOT / "README.md").read_text()
    results = json.loads((ROOT / "bench" / "results" / "results.json").read_text())
    assert report.markdown(results["cases"]) in readme
    assert [case["threads"] for case in results["cases"]] == [cases.parse(x["name"]).threads for x in results["cases"]]
    assert report.heading(results["machine"]).replace("\n", " ") in " ".join(readme.split())
    for name in ("speedup", "limit", "memory", "scaling"):
        assert f"bench/results/{name}.png" in readme
        assert (ROOT / "bench" / "results" / f"{name}.png").exists()
