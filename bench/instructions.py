"""Number of instructions that the core executes, counted by valgrind. Unlike time, it is the same on a busy machine.

``python -m bench.instructions`` builds core_bench and compares its counts with bench/instructions.json. It fails if a
count differs by more than 3 % in either direction: a faster kernel needs a new record (``--record``). Counts depend on
the compiler and its version, so the record has one set for each. The AVX2 variant is run: valgrind does not support
AVX-512.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
RECORD = Path(__file__).with_name("instructions.json")
CASES = {  # name: (rows, classes, calls)
    "32x10": (32, 10, 20),
    "64x1000": (64, 1000, 5),
    "16x32000": (16, 32000, 1),
}
ALLOWED = 0.03


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.instructions", description=__doc__.splitlines()[0])
    parser.add_argument("--record", action="store_true", help=f"write the counts to {RECORD.name}")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        program, compiler = _build(Path(folder))
        counts = {name: round(_per_element(program, *case), 2) for name, case in CASES.items()}
    recorded = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    if options.record:
        RECORD.write_text(json.dumps(recorded | {compiler: counts}, indent=1) + "\n")
    elif compiler not in recorded:
        print(f"no record for {compiler} (there is {', '.join(recorded) or 'none'}); make one with --record")
        return 1
    failed = False
    print(f"instructions per element, AVX2, {compiler}")
    for name, count in counts.items():
        if options.record:
            print(f"{name:12}{count:10.2f} recorded")
            continue
        change = count / recorded[compiler][name] - 1
        off = abs(change) > ALLOWED
        failed |= off
        note = "  FAILED" if off else ""
        print(f"{name:12}{count:10.2f} recorded {recorded[compiler][name]:10.2f} {change:+8.1%}{note}")
    return int(failed)


def _build(folder):
    configure = ["cmake", "-S", ROOT, "-B", folder, "-DPYDISTILL_BENCH=ON", "-DCMAKE_BUILD_TYPE=Release"]
    subprocess.run(configure, check=True, stdout=subprocess.DEVNULL)
    build = ["cmake", "--build", folder, "--target", "core_bench", "--parallel", "2"]
    subprocess.run(build, check=True, stdout=subprocess.DEVNULL)
    cache = next(folder.glob("CMakeFiles/*/CMakeCXXCompiler.cmake")).read_text()
    name, version = (re.search(rf'set\(CMAKE_CXX_COMPILER_{x} "([^"]*)"', cache)[1] for x in ("ID", "VERSION"))
    return folder / "core_bench", f"{name} {version}"


def _per_element(program, rows, classes, calls) -> float:
    """Count instructions per element, as a difference of two runs, in which start-up and making the inputs cancel."""
    few, many = (_instructions(program, rows, classes, n) for n in (1, 1 + calls))
    return (many - few) / (calls * rows * classes)


def _instructions(program, rows, classes, calls) -> int:
    command = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", program]
    command += ["avx2", *map(str, (rows, classes, calls))]
    done = subprocess.run(command, capture_output=True, text=True)
    found = re.search(r"Collected : (\d+)", done.stderr)
    if done.returncode != 0 or found is None:
        raise RuntimeError(f"{' '.join(map(str, command))} failed:\n{done.stderr}")
    return int(found[1])


if __name__ == "__main__":
    sys.exit(main())
