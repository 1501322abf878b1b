"""python -m bench: validate every contestant, then time each of them and pydistill in turns, in one process."""

import argparse
import importlib
import json
import sys
import time
from functools import partial
from pathlib import Path

from bench import cases, documents, plots, report, run, scaling


def main(arguments=None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.compare:
        try:
            print(report.compare(*(json.loads(path.read_text()) for path in options.compare)))
        except ValueError as error:
            parser.error(str(error))
        return 0
    if options.pairs is not None and options.pairs < 2:
        parser.error(f"--pairs must be at least 2, for a median with quartiles; got {options.pairs}")
    try:
        chosen = [cases.parse(name) for name in options.cases]
    except ValueError as error:
        parser.error(str(error))
    if options.write_docs:
        if chosen or options.quick or options.full:
            parser.error("--write-docs needs the default cases: leave out CASE, --quick and --full")
        options.output = documents.RESULTS
        if options.report and options.report.resolve().parent != documents.RESULTS.resolve():
            parser.error(f"--write-docs shows the results in {documents.RESULTS}; got --report {options.report}")
    if options.report:
        results = json.loads(options.report.read_text())
        for result in results["cases"]:
            print(report.table(result))
        _finish(results, options.report.parent, options)
        return 0
    suite = not chosen
    chosen = chosen or (
        cases.quick_cases() if options.quick else cases.full_cases() if options.full else cases.default_cases()
    )
    _measure(chosen, options, with_scaling=suite and not options.quick)
    return 0


def _parser():
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", help="such as 1024x32000,bfloat16,T=2.5,soft,threads=2")
    parser.add_argument("--quick", action="store_true", help="three shapes and few rounds; under two minutes")
    parser.add_argument("--full", action="store_true", help="every shape with every value of every factor; hours")
    parser.add_argument("--pairs", type=int, help="rounds per case; default: as many as fit into some seconds")
    parser.add_argument(
        "--output", type=Path, default=Path("bench-results"), help="folder for results.json and plots (%(default)s)"
    )
    parser.add_argument("--no-plots", action="store_true", help="write text and JSON only")
    parser.add_argument(
        "--write-docs",
        action="store_true",
        help="write to bench/results, and rewrite the tables in README.md and docs/benchmarks.md",
    )
    parser.add_argument(
        "--report", type=Path, metavar="JSON", help="measure nothing; print and plot the results of this file"
    )
    parser.add_argument(
        "--compare", type=Path, nargs=2, metavar=("OLD", "NEW"), help="measure nothing; compare two files of results"
    )
    return parser


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
        file.write_text(json.dumps(results, indent=1))  # after every case, so that an interrupted run keeps its results
    if with_scaling:
        results["scaling"] = scaling.run(partial(tqdm, leave=False, disable=None))
        file.write_text(json.dumps(results, indent=1))
    _finish(results, options.output, options)
    print(f"\n{file} after {time.monotonic() - start:.0f} s")


def _optional(library):
    try:
        return importlib.import_module(library)
    except ImportError as error:
        raise SystemExit(f"{error}: the benchmarks need the extra: pip install '.[bench]'") from None


def _finish(results, folder, options):
    if results.get("scaling"):
        print(report.scaling(results["scaling"]))
    print(report.leads(results["cases"]))
    if not options.no_plots:
        _optional("matplotlib")
        paths = plots.save(results, folder)
        if paths:
            print("\nplots: " + ", ".join(map(str, paths)))
    if options.write_docs:
        print("documents: " + ", ".join(map(str, documents.write(results))))


if __name__ == "__main__":
    sys.exit(main())
