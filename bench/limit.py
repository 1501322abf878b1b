"""The memory limit: the loop of limit.cpp, compiled with the system's compiler on first use."""

import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch

from bench.cases import Case

_PAST_CACHE_BYTES = 32 << 20  # larger gradients are stored past the cache; kPastCacheBytes in csrc/evaluate.cpp


@lru_cache(maxsize=1)
def load() -> tuple[Callable | None, str | None]:
    """Compile limit.cpp. Return ``(function, None)``, or ``(None, reason)`` if that is not possible."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        return None, "no C++ compiler was found; set CXX"
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "limit.so"
        source = Path(__file__).with_name("limit.cpp")
        command = [
            compiler,
            "-std=c++20",
            "-O3",
            "-march=native",
            "-pthread",
            "-shared",
            "-fPIC",
            source,
            "-o",
            library,
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            return None, f"{compiler} failed: {done.stderr.strip().splitlines()[-1]}"
        move = ctypes.CDLL(str(library)).move
    move.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_int64, ctypes.c_int, ctypes.c_int]
    return move, None


def step(move: Callable, case: Case, in_place: bool) -> Callable:
    """Make a contestant's step that reads the bytes of student and teacher and writes the bytes of the gradient."""
    size = torch.finfo(case.torch_dtype).bits // 8
    floats = case.elements * size // 4
    buffer = None if in_place or not case.backward else torch.zeros(floats)
    past_cache = not in_place and case.elements * size > _PAST_CACHE_BYTES

    def run(leaves, constants):
        student = leaves[0].data_ptr()
        teacher = constants[0].data_ptr() if case.alpha > 0 else None
        out = None if not case.backward else student if in_place else buffer.data_ptr()
        move(student, teacher, out, floats, past_cache, case.threads)
        return None, None

    return run
