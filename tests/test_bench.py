"""The benchmarks: what they measure, which input they refuse, and the documents made from a results file."""

import json
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # at the end: pydistill itself is the installed one

import pydistill  # noqa: E402
from bench import __main__ as bench  # noqa: E402
from bench import cases, contestants, documents, eager, measure, report, run, scaling  # noqa: E402
from pydistill.formulas import DIVERGENCES  # noqa: E402

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
    for c in both["contestants"].values():
        low, high = c["ms quartiles"]
        assert 0 < low <= c["ms"] <= high
    assert {"date", "cpu", "torch", "isa", "huge pages"} <= data["machine"].keys()


def test_report_from_the_file_alone(results, capsys):
    assert bench.main(["--report", str(results / "results.json")]) == 0
    text = capsys.readouterr().out
    assert "Smallest leads of pydistill" in text
    assert f"{SMALL},T=2.5,forward  (1 thread, 3 rounds)" in text
    assert (results / "speedup.png").stat().st_size > 10_000


def test_compare_marks_changes_beyond_the_quartiles(results):
    old = json.loads((results / "results.json").read_text())
    new = json.loads(json.dumps(old))
    tutorial = new["cases"][0]["contestants"]["tutorial"]
    tutorial["over pydistill"] = [2 * x for x in tutorial["over pydistill"]]
    old["cases"][0]["contestants"]["tutorial"]["over pydistill"] = [4.0, 3.9, 4.1]
    tutorial["over pydistill"] = [8.0, 7.8, 8.2]
    lines = [line for line in report.compare(old, new).splitlines() if line.startswith(SMALL + " ")]
    assert [("pydistill is faster" in line) for line in lines] == [line.split()[1] == "tutorial" for line in lines]
    with pytest.raises(ValueError, match="must have a case in common"):
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
    assert f"{SMALL},threads=2  (2 threads, 2 rounds)" in report.table(result)
    assert f"{SMALL}  (1 thread, 2 rounds)" in report.table(result | {"name": SMALL, "threads": 1})
    del result["threads"]  # as in a file written before there was the field
    assert report.threads(result) == 2


def contestants_of_two(case):
    found, _ = contestants.contestants(case)
    return {name: found[name] for name in ("pydistill", "pydistill in place")}


def test_only_cases_of_the_same_threads_are_compared(results):
    new = json.loads((results / "results.json").read_text())
    old = {"machine": new["machine"], "cases": [case | {"threads": 2} for case in new["cases"]]}
    with pytest.raises(ValueError, match="must have a case in common"):
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
    with pytest.raises(AssertionError, match=r"pydistill has a relative error of 0\.01"):
        run.run_case(cases.parse(SMALL), lambda rounds: rounds, pairs=2)


def test_a_wrong_loss_is_noticed_where_there_is_no_gradient():
    case = cases.parse(f"{SMALL},forward")
    inputs = measure.make_inputs(case)
    right = contestants.contestants(case)[0]["pydistill"]
    wrong = contestants.Contestant(lambda *x: (1.001 * right.step(*x)[0], None))
    exact = measure.exact(case, *inputs)
    assert measure.error(case, right, *inputs, exact) < 1e-6
    assert measure.error(case, wrong, *inputs, exact) > 5e-4


@pytest.mark.parametrize("divergence", [name for name, entry in DIVERGENCES.items() if entry.pointwise])
def test_a_divergence_without_an_eager_formula_is_measured_by_its_definition(divergence, monkeypatch):
    case = cases.parse(SMALL if divergence == "forward_kl" else f"{SMALL},{divergence}")
    (student,), (teacher, labels) = measure.make_inputs(case)
    beta = DIVERGENCES[divergence].beta
    want = pydistill.distillation_loss(student, teacher, divergence=divergence, temperature=2.0, alpha=1.0) / 4
    monkeypatch.delattr(eager, divergence, raising=False)
    torch.testing.assert_close(eager.soft_term(divergence)(student, teacher, labels, 2.0, beta), want)


@pytest.mark.parametrize(
    ("name", "seconds", "rounds"),
    [
        ("64x50", 1e-4, 2000),
        ("64x50", 0.01, 400),
        ("64x50", 0.5, 30),
        ("64x50", 2.0, 5),
        ("1024x32000", 5.0, 8),
        ("1024x32000", 50.0, 3),
        ("1024x32000,soft", 5.0, 3),
    ],
)
def test_number_of_rounds(name, seconds, rounds, monkeypatch):
    monkeypatch.setattr(measure, "seconds", lambda *_: seconds)
    assert measure.number_of_pairs(cases.parse(name), {"pydistill": None}, (), budget=4.0) == rounds


def test_peak_counts_buffers():
    case = cases.parse("2048x2100")  # 17 MB: small enough for the allocator to keep what is freed
    inputs = measure.make_inputs(case)

    def allocate(count, leaves, constants):
        return None, [torch.ones(case.rows, case.classes) for _ in range(count)]

    for count in (3, 1, 1, 1):  # by then the allocator has learnt to reuse
        contestant = contestants.Contestant(partial(allocate, count))
        assert measure.peak_buffers(case, contestant, *inputs) == pytest.approx(count, abs=0.1)


def test_alternatives_that_are_faster_are_listed():
    def entry(over):
        return {"over pydistill": [over] * 3}

    found = {"tutorial": entry(0.5), "best eager": entry(2.0), "pydistill numba": entry(0.4), "limit": entry(0.3)}
    faster, slower = report.ranking([{"name": "8x8", "contestants": found}])
    assert (faster, slower) == ([(0.5, "8x8", "tutorial")], [(2.0, "8x8", "best eager")])
    loses, leads = report.leads([{"name": "8x8", "contestants": found}]).split("Smallest leads")
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


@pytest.mark.parametrize(
    "arguments",
    [
        ["8x8,float8"],
        [SMALL, "--pairs", "1"],
        [SMALL, "--write-docs"],
        ["--quick", "--write-docs"],
        ["--report", "other/results.json", "--write-docs"],
    ],
)
def test_the_command_line_refuses_wrong_arguments(arguments, capsys):
    with pytest.raises(SystemExit):
        bench.main(arguments)
    assert re.search("got|leave out", capsys.readouterr().err)


def committed_results():
    return json.loads((documents.RESULTS / "results.json").read_text())


def test_the_documents_show_the_committed_results():
    """Both pages are as --write-docs writes them; every block is used, and every plot is shown."""
    results, text = committed_results(), ""
    blocks = documents.blocks(results)
    for page in documents.PAGES:
        text += page.read_text()
        assert page.read_text() == documents.fill(page.read_text(), blocks)
    assert all(f"<!-- bench {name} -->\n{block}\n<!-- end -->" in text for name, block in blocks.items())
    assert [case["threads"] for case in results["cases"]] == [cases.parse(x["name"]).threads for x in results["cases"]]
    for name in ("speedup", "limit", "memory", "scaling"):
        assert f"bench/results/{name}.png" in text
        assert (documents.RESULTS / f"{name}.png").exists()


def test_write_docs_replaces_the_marked_parts(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- bench times -->\nold\n<!-- end -->\nafter <!-- end -->\n")
    monkeypatch.setattr(documents, "PAGES", [page])
    results = committed_results()
    for result in results["cases"]:
        for c in result["contestants"].values():
            c["ms quartiles"] = [0.5 * c["ms"], 2 * c["ms"]]
    base = results["cases"][0]["contestants"]
    base["pydistill"] |= {"ms": 31.26, "ms quartiles": [29.94, 1234.5]}
    base["compiled tutorial"]["ms"], base["compiled best eager"]["ms"] = 99.96, 100.2
    for _ in range(2):  # the second time it changes nothing
        documents.write(results)
        text = page.read_text()
        assert text.startswith("before\n<!-- bench times -->\nMilliseconds per step: median (first to third quartile).")
        assert text.endswith("\n<!-- end -->\nafter <!-- end -->\n")
        row = next(line for line in text.splitlines() if line.startswith("| 1,024 x 32,000 |"))
        assert "| 100 (" in row  # the faster of the two compiled formulas
        assert "| **31.3 (29.9 to 1,234)** |" in row
