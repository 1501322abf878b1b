"""exp2, log and formulas.py's functions for scalars, in plain code that LLVM turns into vectors; as csrc/math.hpp."""

import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numba
import numpy as np
from numba import types
from numba.extending import overload
from numpy.typing import NDArray

from pydistill import formulas

Array: TypeAlias = NDArray[Any]  # of float32 or float64, in one dimension
LOG2E, LN2 = 1.4426950408889634, 0.6931471805599453

# fastmath is written out, since a function takes over that of the one that it is first called from. Without the runtime
# nothing counts references, a fifth of the time, and nothing can allocate while a gradient is written over its logits.
OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": False, "_nrt": False}
compiled: Any = numba.njit(**OPTIONS, no_cpython_wrapper=True, no_cfunc_wrapper=True)  # called by compiled code only

# A digest of the files whose code is compiled together, which all that is cached on disk closes over: numba's cache
# compares a function's own file and what it closes over, not the files of the functions that it calls.
SOURCES: str = hashlib.sha256(
    b"".join(file.read_bytes() for file in [*sorted(Path(__file__).parent.glob("*.py")), Path(formulas.__file__)])
).hexdigest()


def cached_on_disk(decorator: Callable[..., Any], function: Callable[..., Any]) -> Any:
    """The compiled function, cached on disk where there is a place to write."""
    try:
        return decorator(cache=True)(function)
    except RuntimeError:  # neither this folder nor the user's is writable
        return decorator()(function)


@numba.njit(**OPTIONS | {"fastmath": {"reassoc", "nsz"}})
def accumulate(total: Any, x: Any) -> Any:
    """``total + x`` in a loop whose additions LLVM may reorder, so that it can keep one total per lane."""
    return total + x


@numba.njit(**OPTIONS | {"fastmath": {"contract"}})
def multiply_add(a: Any, b: Any, addend: Any) -> Any:
    """``a * b + addend``, rounded once where the CPU has fused multiply-add."""
    return a * b + addend


def _float32(*coefficients):
    return tuple(map(np.float32, coefficients))


# Per dtype: its type, the integer of its width, mantissa bits, exponent bias, and the polynomial of 2^x on [-1/2, 1/2].
# float32: minimax of degree 6, relative error 1.6e-8. float64: Taylor of degree 13, 4e-18.
_EXP2 = _float32(1, 0.6931472, 0.24022646, 0.055503286, 0.009618489, 0.0013399931, 0.00015345812)
FORMAT: dict[Any, tuple[Any, ...]] = {
    types.float32: (np.float32, np.int32, 23, 127, _EXP2),
    types.float64: (np.float64, np.int64, 52, 1023, tuple(LN2**k / math.factorial(k) for k in range(14))),
}
# log(1 + x) = x - x^2 / 2 + x^3 p(x) for 1 + x in [sqrt(1/2), sqrt(2)]: minimax of degree 6, relative error 3.5e-8.
_LOG = _float32(0.3333391, -0.25001338, 0.19963063, -0.16577585, 0.14914769, -0.14267486, 0.087004304)


def exp2(d: Any, c: Any, period: Any) -> Any:
    """``exp2(d * c)`` for d <= 0 < c and ``period`` = 1 / c. float32: within 1 ULP; float64: within 2.

    Beside the rounding of ``period``; 0 below 2^-126.5 (2^-1022.5), NaN for NaN. Adding 1.5 * 2^(mantissa bits) leaves
    n = round(d * c) in the low bits, from which 2^n is put together. d - n * period is rounded once with fused
    multiply-add.
    """


@overload(exp2, jit_options={"fastmath": {"contract"}})
def _exp2(d, c, period):
    real, integer, mantissa_bits, bias, coefficients = FORMAT[d]
    magic, lowest_exponent, degree = real(1.5 * 2**mantissa_bits), real(-bias), len(coefficients) - 1

    def exp2(d, c, period):
        lowest = lowest_exponent * period  # below, the bits of 2^n would run into the sign; at it they are 0
        d = lowest if lowest > d else d
        shifted = d * c + magic
        fraction = (d - (shifted - magic) * period) * c
        result = coefficients[degree]
        for k in range(1, degree + 1):
            result = result * fraction + coefficients[degree - k]
        return result * integer((real(shifted).view(integer) << mantissa_bits) + (bias << mantissa_bits)).view(real)

    return exp2


def log(x: Any) -> Any:
    """log(x) for normal x > 0; exactly 0 at 1, NaN for NaN. float32: within 1 ULP; float64: libm's, not in vectors."""


@overload(log, jit_options={"fastmath": {"contract"}})
def _log(x):
    if x == types.float64:
        return lambda x: math.log(x)
    root_half, degree = 0x3F3504F3, len(_LOG) - 1  # the bits of sqrt(1/2)
    one, half, high, low = _float32(1, -0.5, 0.693359375, -2.12194440e-4)  # high + low is log(2)

    def log(x):
        above = np.float32(x).view(np.int32) - root_half  # its exponent field is n, x = 2^n (1 + f)
        n, f = np.float32(above >> 23), np.int32((above & 0x7FFFFF) + root_half).view(np.float32) - one
        result = _LOG[degree]
        for k in range(1, degree + 1):
            result = result * f + _LOG[degree - k]
        square = f * f
        return n * high + (f + (square * f * result + (square * half + n * low))) + (x - x)

    return log


# --- formulas.py's functions of tensors, where numba compiles a divergence ------------------------------------


overload(formulas.root)(lambda x: lambda x: math.sqrt(x))
# Not the literal 0, which would make it float64.
overload(formulas.times)(lambda weight, x: lambda weight, x: weight if weight == 0 else weight * x)


@overload(formulas.mixture)
def _mixture(x, of_p, of_q):
    """From the ratio of p and q, as in csrc/divergences.hpp."""
    one, smallest = FORMAT[of_p][0](1), np.finfo(FORMAT[of_p][0]).tiny  # a literal would make float32 wider

    def mixture(x, of_p, of_q):
        above = x.log_ratio > 0
        smaller = x.p if above else x.q
        larger = x.p if x.p > x.q else x.q  # not by the log-ratio: one of two nearly equal ones may have become 0
        ratio = smaller / larger
        m = ratio + (of_q if above else of_p) * (one - ratio)
        m = smallest if m < smallest else m
        larger_over_m = -log(m)
        log_p = larger_over_m - x.log_ratio if above else larger_over_m
        log_q = larger_over_m if above else larger_over_m + x.log_ratio
        return formulas.Mixture(log_p, log_q, smaller if smaller == 0 else smaller / m)

    return mixture
