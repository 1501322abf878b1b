"""The suite's cases for pytest-benchmark: ``pytest bench/ --benchmark-only``.

Save two commits' runs with ``--benchmark-autosave`` and compare them with ``pytest-benchmark compare``. One test per
case and contestant, validated first; pairs, ratios and their spread are what ``python -m bench`` is for.
"""

from functools import lru_cache

import pytest
import torch

from bench import measure
from bench.cases import default_cases
from bench.contestants import contestants

CASES = [case for case in default_cases() if not case.huge_pages]  # that is a setting of the whole process


@lru_cache(maxsize=1)
def prepared(case):
    """Inputs and contestants of one case; the tests come case by case."""
    torch.compiler.reset()
    return measure.make_inputs(case), contestants(case)[0]


@pytest.mark.parametrize(
    ("case", "name"),
    [pytest.param(case, name, id=f"{case.name}-{name}") for case in CASES for name in contestants(case)[0]],
)
def test_step(benchmark, case, name):
    threads = torch.get_num_threads()
    torch.set_num_threads(case.threads)
    try:
        (leaves, constants), found = prepared(case)
        contestant = found[name]
        benchmark.group = case.name
        exact = measure.exact(case, leaves, constants)
        benchmark.extra_info["error"] = measure.error(case, contestant, leaves, constants, exact)
        assert benchmark.extra_info["error"] < measure.TOLERANCE[case.dtype]
        benchmark.extra_info["buffers"] = measure.peak_buffers(case, contestant, leaves, constants)
        rounds = 5 if case.elements > 1 << 22 else 100
        with contestant.context():
            benchmark.pedantic(
                contestant.step,
                setup=lambda: ((measure.fresh(leaves), constants), {}),
                rounds=rounds,
                warmup_rounds=2,
            )
    finally:
        torch.set_num_threads(threads)
