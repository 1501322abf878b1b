"""The numba backend: the algorithm of csrc/kernels.cpp, compiled at the first call, where no C++ core is.

A row is walked in blocks that stay in L1: block maximum, then exponentials against the running maximum, kept
in a scratch row; the sums are rescaled when the maximum moves. The gradient is a weighted sum of what waits
there. forward_kl needs no more; the other divergences look at the row once more, with the two functions of
formulas.py. Top-k teachers, dkd and mse are in listed.py.

float32 and float64 are computed as they are. Rows of a half type, and rows whose teacher has another dtype,
pass through small buffers of converted rows. A block's sums are in the row's dtype, a row's in float64.

In compiled code ``float(x)`` leaves a float32 one; what must be float64 says ``np.float64(x)``.

Here LLVM makes the vectors, so every inner loop is plain: no branch, no call, and a reduction only where
`accumulate` or `larger` allows its reordering. A loop that sums does not store: with a store in it LLVM's code
looks at run time whether the arrays lie near each other and takes another loop if so, and the order of the
additions, the last bit, would depend on addresses. Nothing else is compiled with fast-math: the shifted
differences and the rounding in `exp2` must stay as they are written.

Denormal numbers are not flushed to zero as in the C++ core: rows whose exponentials end there are slower.
"""

import dataclasses
import math
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache, lru_cache
from typing import NamedTuple

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

from pydistill import formulas
from pydistill.engine.batch import Outcome
from pydistill.engine.checks import bad_label, bad_weight, check_storage, sums_to_one
from pydistill.engine.loss_formula import combine
from pydistill.formulas import DIVERGENCES, Point, loss_dtype

_BLOCK = 512  # elements: four arrays of a block fit in L1 together
_CHUNK_ELEMENTS = 1 << 18  # of rows converted at a time: a megabyte of float32
_ELEMENTS_PER_THREAD = 32768  # below that, waking a thread costs more than it saves
_HUGE_PAGE_BYTES = 8 << 20  # below, the allocator's own reuse beats fresh huge pages
_NUMPY_DTYPE = {torch.float32: np.float32, torch.float64: np.float64}  # those computed in
_SHORTCUT = "forward_kl"  # its h is -p, whose sum is -1: no second look at the row
_LOG2E = 1.4426950408889634
_LN2 = 0.6931471805599453

# How exp(s), needed by cross-entropy, comes from exp(s / T), needed by the soft term.
_NONE, _SAME, _SQUARE, _FOURTH, _OWN = range(5)


class _Settings(NamedTuple):
    """What is the same for every row of a batch."""

    soft: bool
    scan_teacher: bool  # the teacher has a value for every class, to be exponentiated
    hard: bool
    write: bool
    keep: bool  # the exponentials of the whole row
    metrics: bool
    hard_exp: int
    temperature: float
    units: float  # T^2, or 1
    beta: float
    rest: float  # 1 - beta
    smoothing: float
    class_weight_sum: float


class _Plan(NamedTuple):
    """Per row: label or -1, weight (0: counts for nothing), the factors of its two terms in the gradient."""

    label: np.ndarray
    weight: np.ndarray
    soft_scale: np.ndarray
    hard_scale: np.ndarray


class _Found(NamedTuple):
    """Per row: the two terms in nats, T^2 included, before weights; what the student's argmax agrees with."""

    soft: np.ndarray
    hard: np.ndarray
    agree: np.ndarray
    correct: np.ndarray


class _Scratch(NamedTuple):
    """One thread's memory: a row's exponentials, and the maximum that each block's refer to."""

    student: np.ndarray  # exp((s - max) / T)
    teacher: np.ndarray  # exp((t - max) / T); later h of a divergence that needs a second pass
    hard: np.ndarray  # exp(s - max), where it is not a power of the first
    student_max: np.ndarray
    teacher_max: np.ndarray


class _Sums(NamedTuple):
    """Of a row: sums of its exponentials; of the teacher's times t - s, both shifted; the maxima so far."""

    student: float
    teacher: float
    cross: float
    hard: float
    student_max: float
    teacher_max: float
    student_block: int  # where the maxima are
    teacher_block: int


class _Exp2(NamedTuple):
    """The numbers of `exp2` for one dtype; csrc/math.hpp has the same."""

    bits: int
    mantissa_bits: int
    bias: int
    round_magic: float  # 1.5 * 2^mantissa_bits
    lowest_exponent: float
    coefficients: tuple


# Minimax polynomial p of log(1 + x) = x - x^2 / 2 + x^3 p(x) for 1 + x in [sqrt(1/2), sqrt(2)].
_LOG_COEFFICIENTS = (
    "0x1.5556d8p-2",
    "-0x1.000382p-2",
    "0x1.98d7f2p-3",
    "-0x1.53824ap-3",
    "0x1.317458p-3",
    "-0x1.2432b8p-3",
    "0x1.645eap-4",
)
# Minimax polynomial of 2^x on [-1/2, 1/2].
_COEFFICIENTS = (
    "0x1p+0",
    "0x1.62e43p-1",
    "0x1.ebfbdap-3",
    "0x1.c6aed4p-5",
    "0x1.3b2dbcp-7",
    "0x1.5f456ap-10",
    "0x1.41d334p-13",
)
_EXP2 = {
    types.float32: _Exp2(
        bits=32,
        mantissa_bits=23,
        bias=127,
        round_magic=12582912.0,
        lowest_exponent=-127.0,
        coefficients=tuple(map(float.fromhex, _COEFFICIENTS)),
    ),
    types.float64: _Exp2(
        bits=64,
        mantissa_bits=52,
        bias=1023,
        round_magic=6755399441055744.0,
        lowest_exponent=-1023.0,
        coefficients=tuple(_LN2**k / math.factorial(k) for k in range(14)),
    ),
}


def _njit(function, on_disk=True):
    """Compiled at the first call, for its argument types; cached on disk where there is a place to write."""
    compiled = numba.njit(nogil=True, error_model="numpy")(function)
    if on_disk:
        with suppress(RuntimeError):  # neither this folder nor the user's is writable
            compiled.enable_caching()
    return compiled


# --- What numba has no word for -----------------------------------------------------------------------------


def _fmuladd(builder, args):
    """Code for a * b + c: fused where the CPU can, two instructions where it cannot."""
    real = args[0].type
    function = builder.module.declare_intrinsic("llvm.fmuladd", [real], ir.FunctionType(real, [real] * 3))
    return builder.call(function, args)


@intrinsic
def multiply_add(typingctx, a, b, addend):
    """``a * b + addend``, not rounded in between where the CPU has fused multiply-add."""

    def codegen(context, builder, signature, args):
        return _fmuladd(builder, args)

    return a(a, a, a), codegen


@intrinsic
def exp2(typingctx, d, c):
    """``exp2(d * c)`` for d <= 0 < c: within 1 ULP (float64: 2) beside the rounding of c.

    Exactly 0 below 2^-126.5 (2^-1022.5), NaN for NaN. n = round(d * c) comes from adding 1.5 * 2^(mantissa
    bits), which leaves n in the low bits; 2^n is put together from those bits. The remainder d * c - n in
    [-1/2, 1/2] is not rounded where the CPU has fused multiply-add. float32: minimax polynomial of degree 6,
    relative error 1.6e-8. float64: Taylor of degree 13, 4e-18.
    """
    numbers = _EXP2[d]

    def codegen(context, builder, signature, args):
        d, c = args
        real, integer = d.type, ir.IntType(numbers.bits)

        def fma(a, b, addend):
            return _fmuladd(builder, [a, b, addend])

        # Below the lowest exponent the bits of 2^n would run into the sign; at it they are 0.
        lowest = builder.fdiv(real(numbers.lowest_exponent), c)
        d = builder.select(builder.fcmp_ordered(">", lowest, d), lowest, d)
        magic = real(numbers.round_magic)
        shifted = fma(d, c, magic)
        fraction = fma(d, c, builder.fsub(magic, shifted))
        result = real(numbers.coefficients[-1])
        for coefficient in reversed(numbers.coefficients[:-1]):
            result = fma(result, fraction, real(coefficient))
        exponent = builder.shl(builder.bitcast(shifted, integer), integer(numbers.mantissa_bits))
        exponent = builder.add(exponent, integer(numbers.bias << numbers.mantissa_bits))
        return builder.fmul(result, builder.bitcast(exponent, real))

    return d(d, d), codegen


@intrinsic
def log(typingctx, x):
    """log(x) for normal x > 0; exactly 0 at 1, NaN for NaN. float32: within 1 ULP, as in csrc/math.hpp; float64: libm.

    For float32 libm's would be a call, and a loop with a call in it has no vectors.
    """

    def of_float64(context, builder, signature, args):
        (x,) = args
        function = builder.module.declare_intrinsic("llvm.log", [x.type], ir.FunctionType(x.type, [x.type]))
        return builder.call(function, args)

    def of_float32(context, builder, signature, args):
        (x,) = args
        real, integer = x.type, ir.IntType(32)
        root_half = integer(0x3F3504F3)
        above = builder.sub(builder.bitcast(x, integer), root_half)  # its exponent field is n, x = 2^n (1 + f)
        exponent = builder.sitofp(builder.ashr(above, integer(23)), real)
        mantissa = builder.add(builder.and_(above, integer(0x7FFFFF)), root_half)
        f = builder.fsub(builder.bitcast(mantissa, real), real(1.0))
        coefficients = [real(float.fromhex(c)) for c in _LOG_COEFFICIENTS]
        r = coefficients[-1]
        for coefficient in reversed(coefficients[:-1]):
            r = _fmuladd(builder, [r, f, coefficient])
        square = builder.fmul(f, f)
        low = _fmuladd(builder, [real(-0.5), square, builder.fmul(exponent, real(-2.12194440e-4))])
        r = _fmuladd(builder, [builder.fmul(square, f), r, low])
        r = _fmuladd(builder, [exponent, real(0.693359375), builder.fadd(f, r)])
        return builder.fadd(r, builder.fsub(x, x))

    return x(x), of_float32 if x == types.float32 else of_float64


@intrinsic
def accumulate(typingctx, total, x):
    """``total + x`` in a loop whose additions LLVM may reorder, so that it can keep one total per lane."""

    def codegen(context, builder, signature, args):
        return builder.fadd(*args, flags=["reassoc", "nsz"])

    return total(total, total), codegen


@intrinsic
def larger(typingctx, a, b):
    """The larger of two, in any order. A NaN may win or not: it reaches the row's sums in either case."""

    def codegen(context, builder, signature, args):
        flags = ["nnan", "nsz"]
        return builder.select(builder.fcmp_ordered(">", *args, flags=flags), *args, flags=flags)

    return a(a, a), codegen


@overload(formulas.times)
def _times_of_scalars(weight, x):
    """`formulas.times` where numba compiles a divergence."""

    def times(weight, x):
        return weight if weight == 0 else weight * x  # not the literal 0, which would make it float64

    return times


@overload(formulas.root)
def _root_of_scalar(x):
    """`formulas.root` where numba compiles a divergence."""
    return lambda x: math.sqrt(x)


@overload(formulas.mixture)
def _mixture_of_scalars(x, of_p, of_q):
    """`formulas.mixture` where numba compiles a divergence; from the ratio of p and q, as csrc/divergences.hpp."""
    real = np.float32 if of_p == types.float32 else np.float64  # a literal would make float32 wider
    one, smallest = real(1), np.finfo(real).tiny

    def mixture(x, of_p, of_q):
        above = x.log_ratio > 0
        smaller = x.p if above else x.q
        larger = x.p if x.p > x.q else x.q  # not by the log-ratio: one of two nearly equal ones may have become 0
        of_larger = of_q if above else of_p
        ratio = smaller / larger
        m = ratio + of_larger * (one - ratio)
        m = smallest if m < smallest else m
        larger_over_m = -log(m)
        log_p = larger_over_m - x.log_ratio if above else larger_over_m
        log_q = larger_over_m if above else larger_over_m + x.log_ratio
        return formulas.Mixture(log_p, log_q, smaller if smaller == 0 else smaller / m)

    return mixture


@overload(formulas.log_q_over_mixture)
def _log_q_over_mixture(log_ratio: float, of_p: float, of_q: float):
    """`formulas.log_q_over_mixture` where numba compiles a divergence."""
    return formulas.log_q_over_mixture


# --- Passes over a block ------------------------------------------------------------------------------------


@_njit
def block_maximum(x, start):
    """The largest of a block and ``start``."""
    best = x.dtype.type(start)
    for j in range(len(x)):
        best = larger(best, x[j])
    return best


@_njit
def plain_sum(x):
    """Sum of a block, in its dtype."""
    total = x.dtype.type(0)
    for j in range(len(x)):
        total = accumulate(total, x[j])
    return total


@_njit
def exponentials(x, maximum, temperature, out):
    """``out = exp((x - maximum) / temperature)``, and its sum."""
    shift, c = x.dtype.type(maximum), x.dtype.type(_LOG2E / temperature)
    for j in range(len(x)):
        out[j] = exp2(x[j] - shift, c)
    return plain_sum(out)


@_njit
def cross_sum(s, t, student_max, teacher_max, weight):
    """Sum of weight times the difference of the shifted logits; a class of weight 0 adds nothing."""
    ms, mt = s.dtype.type(student_max), s.dtype.type(teacher_max)
    total = s.dtype.type(0)
    for j in range(len(s)):
        total = accumulate(total, formulas.times(weight[j], (t[j] - mt) - (s[j] - ms)))
    return total


@_njit
def sum_of_powers(e, hard_exp):
    """Sum of squares or of fourth powers."""
    total = e.dtype.type(0)
    if hard_exp == _SQUARE:
        for j in range(len(e)):
            total = accumulate(total, e[j] * e[j])
    else:
        for j in range(len(e)):
            square = e[j] * e[j]
            total = accumulate(total, square * square)
    return total


@_njit
def centre(h, e, by_e, h_sum):
    """``h -= q * h_sum``, where q is ``by_e * e``. Before any other factor: where q is 1, the two cancel."""
    for j in range(len(h)):
        h[j] = multiply_add(-h_sum, e[j] * by_e, h[j])


@_njit
def weighted_sum(out, e, f, hard, hard_exp, soft, by_e, by_f, by_hard, constant):
    """``out = by_e * e + by_f * f + by_hard * exp(s - max) + constant``: a gradient but for the label."""
    if not soft:
        for j in range(len(out)):
            out[j] = multiply_add(by_e, e[j], constant)
    elif hard_exp == _SQUARE:
        for j in range(len(out)):
            r = multiply_add(by_hard, e[j] * e[j], multiply_add(by_f, f[j], constant))
            out[j] = multiply_add(by_e, e[j], r)
    elif hard_exp == _FOURTH:
        for j in range(len(out)):
            square = e[j] * e[j]
            r = multiply_add(by_hard, square * square, multiply_add(by_f, f[j], constant))
            out[j] = multiply_add(by_e, e[j], r)
    elif hard_exp == _OWN:
        for j in range(len(out)):
            r = multiply_add(by_hard, hard[j], multiply_add(by_f, f[j], constant))
            out[j] = multiply_add(by_e, e[j], r)
    else:
        for j in range(len(out)):
            out[j] = multiply_add(by_e, e[j], multiply_add(by_f, f[j], constant))


# --- A row --------------------------------------------------------------------------------------------------


@_njit
def rescaled(sums, student_max, teacher_max, temperature):
    """The sums referred to their maxima; let them refer to larger ones.

    The two rises are subtracted first: where they are equal, a cross sum of 0 stays exactly 0.
    """
    student_rise, teacher_rise = 0.0, 0.0
    if student_max > sums.student_max:
        student_rise = student_max - sums.student_max
    if teacher_max > sums.teacher_max:
        teacher_rise = teacher_max - sums.teacher_max
    if student_rise == 0 and teacher_rise == 0:
        return sums.student, sums.teacher, sums.cross, sums.hard
    student = sums.student * math.exp(-student_rise / temperature)
    hard = sums.hard * math.exp(-student_rise)
    factor = math.exp(-teacher_rise / temperature)
    cross = 0.0
    if factor > 0:
        cross = factor * (sums.cross + sums.teacher * (student_rise - teacher_rise))
    return student, sums.teacher * factor, cross, hard


@_njit
def scan(s, t, settings, scratch):
    """The pass over a row's logits: exponentials into scratch, and their sums."""
    lowest = np.float64(np.finfo(s.dtype).min)
    temperature, hard_exp = settings.temperature, settings.hard_exp
    sums = _Sums(0.0, 0.0, 0.0, 0.0, lowest, lowest, 0, 0)
    for block in range((len(s) + _BLOCK - 1) // _BLOCK):
        begin = block * _BLOCK
        end = min(begin + _BLOCK, len(s))
        at = begin if settings.keep else 0
        e = scratch.student[at : at + end - begin]
        student_max = np.float64(block_maximum(s[begin:end], sums.student_max))
        teacher_max = np.float64(block_maximum(t[begin:end], sums.teacher_max)) if settings.scan_teacher else lowest
        student_block = begin if student_max > sums.student_max else sums.student_block
        teacher_block = begin if teacher_max > sums.teacher_max else sums.teacher_block
        scratch.student_max[block], scratch.teacher_max[block] = student_max, teacher_max
        student, teacher, cross, hard = rescaled(sums, student_max, teacher_max, temperature)

        e_sum = np.float64(exponentials(s[begin:end], student_max, temperature, e))
        student += e_sum
        if settings.scan_teacher:
            f = scratch.teacher[at : at + end - begin]
            teacher += np.float64(exponentials(t[begin:end], teacher_max, temperature, f))
            cross += np.float64(cross_sum(s[begin:end], t[begin:end], student_max, teacher_max, f))
        if hard_exp == _SAME:
            hard += e_sum
        elif hard_exp == _OWN:
            hard += np.float64(exponentials(s[begin:end], student_max, 1.0, scratch.hard[at : at + end - begin]))
        elif hard_exp != _NONE:
            hard += np.float64(sum_of_powers(e, hard_exp))
        sums = _Sums(student, teacher, cross, hard, student_max, teacher_max, student_block, teacher_block)
    return sums


@_njit
def shifted_sum(s, maximum, class_weight):
    """Sum of class weight times (s - maximum), in float64."""
    total = 0.0
    if len(class_weight) > 0:
        for j in range(len(s)):
            total = accumulate(total, (np.float64(s[j]) - maximum) * np.float64(class_weight[j]))
    else:
        for j in range(len(s)):
            total = accumulate(total, np.float64(s[j]) - maximum)
    return total


@_njit
def cross_entropy(s, label, whole, class_weight, settings):
    """torch's value for this row under reduction="none", class weight and label smoothing included.

    ``whole`` is (maximum, sum of exp(s - maximum)).
    """
    log_sum = math.log(whole[1])
    weighted = len(class_weight) > 0
    nll = whole[0] - np.float64(s[label]) + log_sum
    if weighted:
        nll *= np.float64(class_weight[label])
    if settings.smoothing == 0:
        return nll
    shifted = shifted_sum(s, whole[0], class_weight)
    smooth = (settings.class_weight_sum * log_sum - shifted) / len(s)
    return (1 - settings.smoothing) * nll + settings.smoothing * smooth


@_njit
def first_at(x, begin, value):
    """Where the value is first found, from `begin` on."""
    j = begin
    while j < len(x) and x[j] != value:
        j += 1
    return j


@_njit
def write_gradient(out, label, hard_scale, sums, whole, factors, centred, h_sum, class_weight, settings, scratch):
    """The row's gradient from scratch.

    ``factors`` are those of the student's exponentials and of what waits beside them: the teacher's exponentials, h
    to be centred here by its sum, or another array.
    """
    temperature, hard_exp, classes = settings.temperature, settings.hard_exp, len(out)
    labelled = settings.hard and label >= 0
    weighted = len(class_weight) > 0
    smoothing = settings.smoothing if labelled else 0.0
    label_weight = 0.0
    if labelled:
        label_weight = np.float64(class_weight[label]) if weighted else 1.0
    uniform = smoothing / classes
    hard_total = (1 - smoothing) * label_weight + uniform * settings.class_weight_sum
    by_hard = 0.0
    if labelled:
        by_hard = hard_scale * hard_total * math.exp(sums.student_max - whole[0]) / whole[1]
    smooth = hard_scale * uniform

    for block in range((classes + _BLOCK - 1) // _BLOCK):
        begin = block * _BLOCK
        end = min(begin + _BLOCK, classes)
        student_drop = np.float64(scratch.student_max[block]) - sums.student_max
        teacher_factor = 1.0
        if settings.scan_teacher and not centred:
            teacher_factor = math.exp((np.float64(scratch.teacher_max[block]) - sums.teacher_max) / temperature)
        e_factor = math.exp(student_drop / temperature)
        hard_factor = math.exp(student_drop)
        by_e = factors[0] * e_factor
        if centred:
            h, e = scratch.teacher[begin:end], scratch.student[begin:end]
            centre(h, e, out.dtype.type(e_factor / sums.student), out.dtype.type(h_sum))
        if hard_exp == _SAME:
            by_e = (factors[0] + by_hard) * e_factor
        weighted_sum(
            out[begin:end],
            scratch.student[begin:end],
            scratch.teacher[begin:end],
            scratch.hard[begin:end],
            hard_exp,
            settings.soft,
            out.dtype.type(by_e),
            out.dtype.type(factors[1] * teacher_factor),
            out.dtype.type(by_hard * hard_factor),
            out.dtype.type(0.0 if weighted else -smooth),
        )
    if weighted and smoothing > 0:
        for j in range(classes):
            out[j] -= out.dtype.type(smooth) * class_weight[j]
    if labelled:  # both sides rounded alike: at probability 1 they cancel
        out[label] -= out.dtype.type(hard_scale * (1 - smoothing) * label_weight)


def _second_pass(divergence):
    """For a divergence without a shortcut: a row's value and sum of h; h replaces the teacher's exponentials.

    log q - log p comes from the logits: as a difference of two logarithms of q and p it would lose digits.
    """
    value_of, h_of = numba.njit(divergence.value), numba.njit(divergence.d_log_q)
    reference_of = numba.njit(divergence.reference)

    def pointwise(s, t, e, f, by_e, by_f, sums, temperature, beta, rest, reference):
        real = s.dtype.type
        ms, mt, inverse = real(sums.student_max), real(sums.teacher_max), real(1 / temperature)
        shift = real(math.log(sums.student / sums.teacher))
        value = real(0)
        for j in range(len(s)):
            log_ratio = ((s[j] - ms) - (t[j] - mt)) * inverse - shift
            x = Point(f[j] * by_f, e[j] * by_e, log_ratio, beta, rest, reference)
            value = accumulate(value, real(value_of(x)))
        for j in range(len(s)):
            log_ratio = ((s[j] - ms) - (t[j] - mt)) * inverse - shift
            f[j] = h_of(Point(f[j] * by_f, e[j] * by_e, log_ratio, beta, rest, reference))
        return value, plain_sum(f)

    pointwise = _njit(pointwise, on_disk=False)

    def second_pass(s, t, sums, settings, scratch):
        real, temperature = s.dtype.type, settings.temperature
        value = h_sum = 0.0
        best = first_at(s, sums.student_block, sums.student_max)
        reference = 0.0
        if best < len(s):
            log_sums = math.log(sums.student / sums.teacher)
            at_best = (sums.teacher_max - np.float64(t[best])) / temperature - log_sums
            reference = reference_of(at_best, settings.beta, settings.rest)
        for block in range((len(s) + _BLOCK - 1) // _BLOCK):
            begin = block * _BLOCK
            end = min(begin + _BLOCK, len(s))
            student_drop = np.float64(scratch.student_max[block]) - sums.student_max
            teacher_drop = np.float64(scratch.teacher_max[block]) - sums.teacher_max
            of_block = pointwise(
                s[begin:end],
                t[begin:end],
                scratch.student[begin:end],
                scratch.teacher[begin:end],
                real(math.exp(student_drop / temperature) / sums.student),
                real(math.exp(teacher_drop / temperature) / sums.teacher),
                sums,
                temperature,
                real(settings.beta),
                real(settings.rest),
                real(reference),
            )
            value += np.float64(of_block[0])
            h_sum += np.float64(of_block[1])
        # An infinite h (reverse_kl where p is 0): the whole row's gradient is NaN, not a mixture of NaN and inf.
        return value, h_sum if math.isfinite(h_sum) else math.nan

    return _njit(second_pass, on_disk=False)


@cache
def _row_kernel(name):
    """The loop over rows for one divergence; only forward_kl's is cached on disk.

    numba finds cached code by what the function closes over, and another compiled function there looks new in
    every process. Nor would the cache notice a change of formulas.py.
    """
    second_pass = None if name == _SHORTCUT else _second_pass(DIVERGENCES[name])
    shortcut = second_pass is None

    def run_rows(student, teacher, gradient, strides, classes, class_weight, plan, found, settings, scratch):
        for row in range(len(plan.label)):
            s = student[row * strides[0] : row * strides[0] + classes]
            t = teacher[row * strides[1] : row * strides[1] + classes]
            out = gradient[row * strides[2] : row * strides[2] + classes]
            label = plan.label[row]
            if plan.weight[row] == 0:
                if settings.write:
                    out[:] = 0
                continue
            sums = scan(s, t, settings, scratch)
            whole = (sums.student_max, sums.hard)
            scale = plan.soft_scale[row] * settings.units / settings.temperature
            value, h_sum, factors = 0.0, 0.0, (0.0, 0.0)
            if settings.soft:
                if second_pass is None:  # h is -p, its sum -1
                    value = sums.cross / (sums.teacher * settings.temperature)
                    value += math.log(sums.student) - math.log(sums.teacher)
                    factors = (scale / sums.student, -scale / sums.teacher)
                else:
                    value, h_sum = second_pass(s, t, sums, settings, scratch)
                    factors = (0.0, scale)
            found.soft[row] = settings.units * value
            if math.isnan(value):  # then so is the whole row's gradient, also where h does not see the NaN
                factors = (math.nan, math.nan)
            if settings.hard and label >= 0:
                found.hard[row] = cross_entropy(s, label, whole, class_weight, settings)
            if settings.metrics and sums.student > 0:  # false for NaN
                best = first_at(s, sums.student_block, sums.student_max)
                found.correct[row] = best == label
                if settings.soft and sums.teacher > 0:
                    found.agree[row] = best == first_at(t, sums.teacher_block, sums.teacher_max)
            if settings.write:
                hard_scale = plan.hard_scale[row]
                centred = settings.soft and not shortcut
                write_gradient(
                    out, label, hard_scale, sums, whole, factors, centred, h_sum, class_weight, settings, scratch
                )

    return _njit(run_rows, on_disk=shortcut)


# --- A batch ------------------------------------------------------------------------------------------------


class NumbaBackend:
    """Runs batches on numba's code; serial unless asked for threads, which are Python's and not numba's."""

    name = "numba"
    isa = None

    def __init__(self, threads: int = 1):
        """``threads``: how many share the rows of a large batch."""
        self._threads = threads

    @property
    def threads(self) -> int:
        """Threads that a large batch runs on."""
        return self._threads

    def evaluate(self, batch, gradient=None, grad_output=1.0, metrics=False) -> Outcome:
        """See :func:`pydistill.engine.backend.evaluate`."""
        check_storage(batch)
        plan, items = _plan_rows(batch, grad_output)
        # Grad mode belongs to a thread: what the workers touch must not require a gradient.
        teacher = None if batch.teacher is None else batch.teacher.detach()
        batch = dataclasses.replace(batch, student=batch.student.detach(), teacher=teacher)
        gradient = None if gradient is None else gradient.detach()
        rows, classes = batch.student.shape
        found = _Found(np.zeros(rows), np.zeros(rows), np.zeros(rows, np.bool_), np.zeros(rows, np.bool_))
        settings, class_weight = _settings(batch, gradient is not None, metrics)

        def run(begin, end):
            _run_range(batch, gradient, begin, end, class_weight, plan, found, settings)

        parts = min(self._threads, rows, max(1, rows * classes // _ELEMENTS_PER_THREAD))
        if parts == 1:
            run(0, rows)
        elif parts > 1:
            bounds = [rows * part // parts for part in range(parts + 1)]
            list(_thread_pool(os.getpid(), self._threads).map(run, bounds[:-1], bounds[1:]))
        return _reduce(batch, plan, found, items, metrics)

    def new_gradient(self, student):
        """An uninitialised buffer for the gradient; a large one from numpy, which asks for huge pages."""
        size = student.numel() * student.element_size()
        if size < _HUGE_PAGE_BYTES:
            return torch.empty(student.shape, dtype=student.dtype)
        return torch.from_numpy(np.empty(size, np.uint8)).view(student.dtype).view(student.shape)


@lru_cache(maxsize=1)
def _thread_pool(process, threads):
    """One pool per process: a forked child inherits the pool but not its threads."""
    return ThreadPoolExecutor(threads, thread_name_prefix="pydistill")


def _plan_rows(batch, grad_output):
    """Which rows count, for what and how much; and the denominators of "mean"."""
    options = batch.options
    rows, classes = batch.student.shape
    label, weight = np.full(rows, -1), np.ones(rows)
    ignored, outside, unusable = np.zeros((3, rows), np.bool_)
    if batch.labels is not None:
        label = batch.labels.numpy().astype(np.int64)
        ignored = label == options.ignore_index
        outside = ((label < 0) | (label >= classes)) & ~ignored
        label[ignored] = -1
    if batch.sample_weight is not None:
        weight = batch.sample_weight.numpy().astype(np.float64)
        unusable = ~((weight >= 0) & (weight < math.inf))
    if (outside | unusable).any():
        row = int(np.argmax(outside | unusable))
        raise (bad_label if outside[row] else bad_weight)(batch, row)
    if options.unlabeled == "skip":
        weight[ignored] = 0
    label[weight == 0] = -1

    hard_weight = np.where(label >= 0, weight, 0)
    if batch.class_weight is not None and batch.labels is not None:
        hard_weight *= batch.class_weight.numpy()[np.maximum(label, 0)]
    counted = (weight.sum(), hard_weight.sum())
    given = options.num_items
    items = tuple(np.float64(c if g is None else g) for c, g in zip(counted, given, strict=True))
    if not batch.evaluates_soft:  # a row without a term has gradient 0, whatever it holds
        weight[label < 0 if batch.evaluates_hard else slice(None)] = 0

    mean = options.reduction == "mean"
    scale = weight * (grad_output.detach().numpy() if isinstance(grad_output, torch.Tensor) else grad_output)
    with np.errstate(all="ignore"):  # 0 / 0 where no row counts for a term
        soft_scale = options.alpha * scale / (items[0] if mean else 1) if options.num_items.soft != 0 else 0 * scale
        hard_scale = np.where(label >= 0, (1 - options.alpha) * scale / (items[1] if mean else 1), 0)
    if not batch.evaluates_hard:
        hard_scale[:] = 0
    return _Plan(label, weight, soft_scale, hard_scale), items


def _settings(batch, write, metrics):
    """The batch's constants as the kernels take them, and the class weights: none is an empty array."""
    options = batch.options
    soft, hard = batch.evaluates_soft, batch.evaluates_hard
    tempered = soft and options.divergence != "mse"
    temperature = options.temperature if tempered else 1.0
    beta = 0.0 if options.beta is None else options.beta
    if batch.class_weight is None:
        class_weight = np.empty(0, _NUMPY_DTYPE[loss_dtype(batch.student)])
        class_weight_sum = float(batch.student.shape[1])
    else:
        class_weight = batch.class_weight.numpy()
        class_weight_sum = float(class_weight.sum(dtype=np.float64))
    settings = _Settings(
        soft=soft,
        scan_teacher=tempered and batch.teacher_indices is None,
        hard=hard,
        write=write,
        keep=write or (soft and options.divergence != _SHORTCUT),  # of every form but the shortcut
        metrics=metrics,
        hard_exp=_how_to_exponentiate(tempered, hard, temperature),
        temperature=temperature,
        units=temperature**2 if options.t_squared else 1.0,
        beta=beta,
        rest=1 - beta,
        smoothing=float(options.label_smoothing),
        class_weight_sum=class_weight_sum,
    )
    return settings, class_weight


def _how_to_exponentiate(soft, hard, temperature):
    """How the hard term's exponential comes about."""
    if not hard:
        return _NONE
    if not soft:
        return _SAME
    return {1.0: _SAME, 2.0: _SQUARE, 4.0: _FOURTH}.get(temperature, _OWN)


def _run_range(batch, gradient, begin, end, class_weight, plan, found, settings):
    """One thread's rows: all at once, or in converted chunks where a dtype is not the one computed in."""
    student, teacher = batch.student, batch.teacher if settings.soft else batch.student
    dtype, classes = loss_dtype(student), student.shape[1]
    if settings.soft and (batch.teacher_indices is not None or batch.options.divergence in ("mse", "dkd")):
        from pydistill.engine.numba.listed import kernel, teacher_arrays

        run_rows, more = kernel(batch), teacher_arrays
    else:
        run_rows, more = _row_kernel(batch.options.divergence if settings.soft else _SHORTCUT), _no_arrays
    scratch = _new_scratch(classes, settings, _NUMPY_DTYPE[dtype])
    step = end - begin
    if student.dtype != dtype or teacher.dtype != dtype:
        step = max(1, _CHUNK_ELEMENTS // classes)
    for start in range(begin, end, step):
        rows = slice(start, min(start + step, end))
        # Converted rows are contiguous, also where the given ones overlap in memory.
        s, t = (x[rows].to(dtype, memory_format=torch.contiguous_format) for x in (student, teacher))
        out = s
        if settings.write:
            out = gradient[rows] if gradient.dtype == dtype else torch.empty_like(s)
        run_rows(
            *map(_flat, (s, t, out)),
            *more(batch, rows),
            (s.stride(0), t.stride(0), out.stride(0)),
            classes,
            class_weight,
            _Plan(*(x[rows] for x in plan)),
            _Found(*(x[rows] for x in found)),
            settings,
            scratch,
        )
        if settings.write and gradient.dtype != dtype:
            gradient[rows] = out


def _no_arrays(batch, rows):
    return ()


def _flat(x):
    """The memory of a matrix as one array, whose type tells numba that it is contiguous."""
    rows, classes = x.shape
    return x.as_strided(((rows - 1) * x.stride(0) + classes,), (1,)).numpy()


def _new_scratch(classes, settings, dtype):
    """Memory for one thread; a block is enough where nothing of a row is needed again."""
    blocks = (classes + _BLOCK - 1) // _BLOCK
    row = classes if settings.keep else min(classes, _BLOCK)
    return _Scratch(*np.empty((3, row), dtype), *np.empty((2, blocks), dtype))


def _reduce(batch, plan, found, items, metrics):
    """The batch's loss from its rows', in their order: the number of threads cannot change a bit."""
    options, dtype = batch.options, loss_dtype(batch.student)
    counted = (plan.weight != 0) & (options.num_items.soft != 0)
    labelled = (plan.weight != 0) & (plan.label >= 0) & (options.num_items.hard != 0)
    terms = []
    for on, of_row, rows, denominator in (
        (batch.teacher is not None, found.soft, counted, items[0]),
        (options.alpha < 1, found.hard, labelled, items[1]),
    ):
        term = np.where(rows, plan.weight * of_row, 0) if on else np.full_like(of_row, math.nan)
        if options.reduction != "none":
            term = term.sum() if on else math.nan
        if options.reduction == "mean" and rows.any():
            with np.errstate(all="ignore"):
                term = term / denominator
        terms.append(term)
    loss = torch.as_tensor(combine(options.alpha, *terms), dtype=dtype)
    if options.reduction == "none":
        soft, hard = (torch.as_tensor(term, dtype=dtype) for term in terms)
    else:
        soft, hard = map(float, terms)
    agreement = accuracy = math.nan
    if metrics and batch.teacher is not None and counted.any():
        agreement = float(found.agree.sum() / counted.sum())
    if metrics and labelled.any():
        accuracy = float(found.correct.sum() / labelled.sum())
    return Outcome(
        loss=loss,
        soft=soft,
        hard=hard,
        soft_items=float(items[0]),
        hard_items=float(items[1]),
        metrics={"agreement": agreement, "accuracy": accuracy},
        teacher_sums_to_one=sums_to_one(batch),
    )
