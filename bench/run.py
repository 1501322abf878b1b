"""One case from inputs to figures, and the machine they are figures of."""

import datetime
import json
import os
import platform
import statistics
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

BUDGET = 4.0  # seconds of rounds per case, unless that is fewer rounds than number_of_pairs allows


def machine() -> dict:
    """What a figure depends on beside the code."""
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

    The result has the case's name and threads and, per contestant: median milliseconds; median and quartiles of its
    time over pydistill's and over pydistill's in place; peak memory in N x C buffers; relative error against float64.
    """
    if case.huge_pages and os.environ.get("THP_MEM_ALLOC_ENABLE") != "1":
        return _in_own_process(case, pairs)
    torch.set_num_threads(case.threads)
    torch.compiler.reset()  # compiled for another case it would guard, and recompile, and in the end give up
    inputs = measure.make_inputs(case)
    found, missing = contestants(case)
    if isas:
        found |= isa_contestants(case)
    errors, exact = {}, measure.exact(case, *inputs)
    for name, contestant in found.items():
        errors[name] = measure.error(case, contestant, *inputs, exact)
        if not errors[name] < measure.TOLERANCE[case.dtype]:
            raise AssertionError(f"{case.name}: {name} is off by {errors[name]:.2g}, so it was not timed")
    buffers = {name: measure.peak_buffers(case, contestant, *inputs) for name, contestant in found.items()}
    pairs = pairs or measure.number_of_pairs(case, found, inputs, budget)
    times = measure.paired_times(found, inputs, pairs, progress)
    return {
        "name": case.name,
        "threads": case.threads,
        "pairs": pairs,
        "missing": missing,
        "contestants": {
            name: {
                "ms": statistics.median(times[name]) * 1e3,
                "over pydistill": measure.ratio(times, name, "pydistill"),
                "over in place": measure.ratio(times, name, "pydistill in place") if case.backward else None,
                "buffers": buffers[name],
                "error": errors[name],
            }
            for name in found
        },
    }


def _in_own_process(case, pairs):
    """torch reads the setting once, when it starts."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "bench", case.name, "--output", folder, "--no-plots"]
        command += ["--pairs", str(pairs)] if pairs else []
        environment = os.environ | {"THP_MEM_ALLOC_ENABLE": "1"}
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
        return json.loads((Path(folder) / "results.json").read_text())["cases"][0]
