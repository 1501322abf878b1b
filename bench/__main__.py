"""python -m bench: validate every contestant, then time it against pydistill, pairs in one process."""

import argparse
import importlib
import json
import sys
import time
from functools import partial
from pathlib import Path

from bench import cases, plots, report, run, scaling


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", help="such as 1024x32000,bfloat16,T=2.5,soft,threads=2")
    parser.add_argument("--quick", action="store_true", help="three shapes, few pairs: under two minutes")
    parser.add_argument("--full", action="store_true", help="every shape with every factor: hours")
    parser.add_argument("--pairs", type=int, help="rounds per case; by default as many as fit into some seconds")
    parser.add_argument("--output", type=Path, default=Path("bench-results"), help="folder for results.json and plots")
    parser.add_argument("--no-plots", action="store_true", help="text and JSON only")
    parser.add_argument("--report", type=Path, metavar="JSON", help="no run: text, README table and plots of a file")
    parser.add_argument("--compare", type=Path, nargs=2, metavar=("OLD", "NEW"), help="no run: two files' ratios")
    options = parser.parse_args(arguments)
    if options.compare:
        print(report.compare(*(json.loads(path.read_text()) for path in options.compare)))
        return 0
    if options.report:
        results = json.loads(options.report.read_text())
        for result in results["cases"]:
            print(report.table(result))
        _finish(results, None if options.no_plots else options.report.parent)
        print("\n" + report.markdown(results["cases"]))
        return 0
    if options.pairs is not None and options.pairs < 2:
        parser.error(f"--pairs must be at least 2, for a median with its spread; got {options.pairs}")
    try:
        chosen = [cases.parse(name) for name in options.cases]
    except ValueError as error:
        parser.error(str(error))
    suite = not chosen
    chosen = chosen or (
        cases.quick_cases() if options.quick else cases.full_cases() if options.full else cases.default_cases()
    )
    _measure(chosen, options, with_scaling=suite and not options.quick)
    return 0


def _measure(chosen, options, with_scaling):
    tqdm = _optional("tqdm").tqdm
    start = time.monotonic()
    results = {"machine": run.machine(), "cases": []}
    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / "results.json"
    print(report.heading(results["machine"]))
    print(report.legend())
    budget = 2.0 if options.quick else run.BUDGET
    for k, case in enumerate(chosen):
        progress = partial(tqdm, desc=f"[{k + 1}/{len(chosen)}] {case.name}", leave=False, disable=None)
        isas = case == cases.Case()
        result = run.run_case(case, progress, budget=budget, pairs=options.pairs, isas=isas)
        results["cases"].append(result)
        tqdm.write(report.table(result), file=sys.stdout)
        file.write_text(json.dumps(results, indent=1))  # after every case: an interrupted run keeps what it has
    if with_scaling:
        results["scaling"] = scaling.run(partial(tqdm, leave=False, disable=None))
        file.write_text(json.dumps(results, indent=1))
    _finish(results, None if options.no_plots else options.output)
    print(f"\n{file} after {time.monotonic() - start:.0f} s")


def _optional(library):
    try:
        return importlib.import_module(library)
    except ImportError as error:
        raise SystemExit(f"{error}: the benchmark suite needs the extra, pip install '.[bench]'") from None


def _finish(results, folder):
    if results.get("scaling"):
        print(report.scaling(results["scaling"]))
    print(report.losses(results["cases"]))
    if folder is not None:
        _optional("matplotlib")
        paths = plots.save(results, folder)
        if paths:
            print("\nplots: " + ", ".join(map(str, paths)))


if __name__ == "__main__":
    sys.exit(main())
