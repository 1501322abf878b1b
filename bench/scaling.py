"""Time as a function of rows, of classes and of threads, with the exponent of a fitted power law."""

import statistics

import numpy as np
import torch

from bench import measure
from bench.cases import THREADS, Case
from bench.contestants import contestants

SWEEPS = {
    "rows": [Case(rows=n, classes=1000) for n in (16, 64, 256, 1024, 4096, 16384)],
    "classes": [Case(rows=256, classes=c) for c in (16, 128, 1024, 8192, 65536)],
    "threads": [Case(rows=1024, classes=8192, threads=n) for n in range(1, THREADS + 1)],
}
NAMES = ("tutorial", "pydistill")


def run(progress, pairs=15) -> dict:
    """Measure every sweep: its values and, for each contestant, the median milliseconds and the fitted exponent.

    The exponent x of time = constant * value^x is fitted over the upper half of the values, where fixed costs are
    negligible. "fixed" is the name of the sweep's first case.
    """
    result = {}
    for factor, cases in SWEEPS.items():
        values = [getattr(case, factor) for case in cases]
        ms = {name: [] for name in NAMES}
        for case in progress(cases, desc=f"scaling in {factor}"):
            torch.set_num_threads(case.threads)
            inputs = measure.make_inputs(case)
            found = contestants(case)[0]
            found = {name: found[name] for name in NAMES}
            times = measure.paired_times(found, inputs, pairs + 2, lambda rounds: rounds)
            for name in NAMES:
                ms[name].append(statistics.median(times[name][2:]) * 1e3)
        result[factor] = {
            "values": values,
            "fixed": cases[0].name,
            "ms": ms,
            "exponent": {name: _exponent(values, ms[name]) for name in NAMES},
        }
    return result


def _exponent(values, ms):
    if len(values) < 2:
        return None
    upper = slice(len(values) // 2 - 1, None) if len(values) > 3 else slice(None)
    return float(np.polyfit(np.log(values[upper]), np.log(ms[upper]), 1)[0])
