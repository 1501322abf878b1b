"""Run one case, from its inputs to its results, and describe the machine."""

import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import numba
import numpy as np
import torch

import pydistill
from bench import measure
from bench.cases import Case
from bench.contestants import contestants, isa_contestants

BUDGET = 4.0  # seconds of rounds per case, unless number_of_pairs asks for more rounds


def machine() -> dict:
    """Describe the hardware, versions and settings on which the results depend, besides the code."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    info = pydistill.backend_info()
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "numba": numba.__version__,
        "pydistill": pydistill.__version__,
        "backend": info.name,
        "isa": info.isa,
        "huge pages": setting.read_text().strip() if setting.exists() else "unknown",
    }


def _cpu():
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    fields = dict(line.split("\t: ", 1) for line in lines if "\t: " in line)
    if "model name\t" in fields or "model name" in fields:
        family, model = fields.get("cpu family", "?"), fields.get("model\t", "?")
        return f"{fields.get('model name')} (family {family}, model {model})"
    return platform.processor() or platform.machine()


def run_case(case: Case, progress, *, budget=BUDGET, pairs=None, isas=False) -> dict:
    """Validate every contestant of a case, then measure memory and paired times.

    The result has the name and the threads of the case and, for each contestant:

    - "ms" and "ms quartiles": median, and first and third quartile, of its time in milliseconds;
    - "over pydistill" and "over in place": median and quartiles of its time / the time of pydistill (in place), paired
      by round;
    - "buffers": peak memory in buffers of the size of the logits;
    - "error": relative error against float64.
    """
    if case.huge_pages and os.environ.get("THP_MEM_ALLOC_ENABLE") != "1":
        return _in_own_process(case, pairs)
    torch.set_num_threads(case.threads)
    torch.compiler.reset()  # otherwise Dynamo recompiles for each case and gives up at its limit of recompilations
    inputs = measure.make_inputs(case)
    found, missing = contestants(case)
    if isas:
        found |= isa_contestants(case)
    errors, exact = {}, measure.exact(case, *inputs)
    for name, contestant in found.items():
        errors[name] = measure.error(case, contestant, *inputs, exact)
        if not errors[name] < measure.TOLERANCE[case.dtype]:
            raise AssertionError(
                f"{case.name}: {name} has a relative error of {errors[name]:.2g}, more than "
                f"{measure.TOLERANCE[case.dtype]:g}; a wrong contestant is not timed"
            )
    buffers = {name: measure.peak_buffers(case, contestant, *inputs) for name, contestant in found.items()}
    pairs = pairs or measure.number_of_pairs(case, found, inputs, budget)
    times = measure.paired_times(found, inputs, pairs, progress)
    return {
        "name": case.name,
        "threads": case.threads,
        "pairs": pairs,
        "missing": missing,
        "contestants": {
            name: _milliseconds(times[name])
            | {
                "over pydistill": measure.ratio(times, name, "pydistill"),
                "over in place": measure.ratio(times, name, "pydistill in place") if case.backward else None,
                "buffers": buffers[name],
                "error": errors[name],
            }
            for name in found
        },
    }


def _milliseconds(seconds) -> dict:
    median, low, high = measure.median_and_quartiles([1e3 * x for x in seconds])
    return {"ms": median, "ms quartiles": [low, high]}


def _in_own_process(case, pairs):
    """Run the case in a new process with the setting in its environment: torch reads it once, when it starts."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "bench", case.name, "--output", folder, "--no-plots"]
        command += ["--pairs", str(pairs)] if pairs else []
        environment = os.environ | {"THP_MEM_ALLOC_ENABLE": "1"}
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
        return json.loads((Path(folder) / "results.json").read_text())["cases"][0]
