"""The benchmark cases for pytest-benchmark: ``pytest bench/ --benchmark-only``.

There is one test per case and contestant; each contestant is validated first. To compare two commits, save a run of
each with ``--benchmark-autosave`` and use ``pytest-benchmark compare``. Paired ratios and their quartiles come from
``python -m bench``.
"""

from functools import lru_cache

import pytest
import torch

from bench import measure
from bench.cases import default_cases
from bench.contestants import contestants

CASES = [case for case in default_cases() if not case.huge_pages]  # huge pages are a setting of a whole process


@lru_cache(maxsize=1)
def prepared(case):
    """Make the inputs and contestants of one case. Only the latest case is cached: its tests run one after another."""
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
