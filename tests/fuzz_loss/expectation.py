"""Expected results in long double, and the bounds of their errors: the contract of the losses.

The bounds are the contract's, row by row. With q, p and onehot of the row, ``scale`` its weight over the denominator:

    abs(error of loss)      <= 1e-6 (abs(loss) + alpha T^2 + (1 - alpha)) scale
    norm(error of gradient) <= 2e-6 (norm(alpha T q) + norm(alpha T p) + norm((1 - alpha) (softmax(s) - onehot))) scale

and 1e-12 for float64. A half gradient is besides rounded to its dtype. What is added to that, and why:

- _PARTS of the two parts whose difference a gradient is, h and q sum(h): for reverse_kl and its skews h is q times a
  difference of logarithms. Where that is 1e4, rounding the exact gradient to float32 is already more than 2e-6 of q.
- The same of the loss, and _PARTS roundings of the exponential's argument: where a probability of e^-40 is multiplied
  by a difference of 1e38, the loss is as far off as that probability. One that may be flushed to 0 may take its part
  of loss and gradient with it.
- mse has no p and q; its own gradient is the unit. dkd weighs a second divergence by beta: 1 + beta times the loss's
  unit, and beta times the norms of its own distributions, which those of p and q do not bound.
- The same roundings of the hard gradient's parts, softmax(s) and onehot. The label's gradient is q - 1, which for a
  confident student is a small difference of numbers near 1; torch's own cross_entropy has no more digits.
- total_variation has a kink where p = q: see divergences.
- Disturbed logits: behind a linear head the logits are themselves rounded, and the torch formula rounds s / T. A
  disturbance d of the logits changes log q by 2 d / T at most, and so the loss and gradient in proportion to their
  parts. Where d / T is beyond 0.05 that is no bound any more, and nothing but NaN and 0 is compared.
- A bucket's teacher has the rest 1 - exp(difference of two log-sum-exps). Its rounding is tried out on both sides.
"""

from dataclasses import dataclass, field, replace

import numpy as np
import torch

from .case import Case
from .definitions import DEFINITIONS, log_softmax, resolve
from .divergences import INF, Real, bucket_term, norm, soft_term
from .logits import ROUNDING, real, rows_of, student_logits, teacher_logits

_PARTS = 4  # roundings
_LARGEST_DISTURBANCE = 0.05


@dataclass
class Gradient:
    """Of one leaf: every row within its bound. Rows that must be NaN throughout; rows about which nothing is said.

    largest: of the logits, the largest numbers that their gradient consists of before and after grad_output.
    """

    values: np.ndarray
    bound: np.ndarray
    nan: np.ndarray
    unchecked: np.ndarray
    largest: np.ndarray | None = None


@dataclass
class Expectation:
    """Values with their bounds.

    rows_of_zero: rows whose soft term is exactly 0. agreement and accuracy: (least, most). gradients: by the leaf's
    name. open: the loss is 0 * inf somewhere, about which the contract says nothing.
    """

    loss: np.ndarray
    loss_bound: np.ndarray
    soft: np.ndarray
    soft_bound: np.ndarray
    hard: np.ndarray
    hard_bound: np.ndarray
    items: tuple
    agreement: tuple = (np.nan, np.nan)
    accuracy: tuple = (np.nan, np.nan)
    gradients: dict = field(default_factory=dict)
    rows_of_zero: np.ndarray | None = None
    open: bool = False


@dataclass
class _Precision:
    loss: float
    gradient: float
    ulp: float  # half of one, relative: one rounding
    smallest: float  # what exp may take as 0
    largest: float


_SINGLE = _Precision(1e-6, 2e-6, 2.0**-24, 1e-36, 3e38)
_DOUBLE = _Precision(1e-12, 1e-12, 2.0**-53, 1e-306, 1.7e308)


def readings(case: Case):
    """Every reading of the contract under which a result may be right, the plainest first; not for loss_items.

    What float32 (or float64, in which a backend may compute) cannot tell from a probability of 0 may be taken as 0. A
    float64 teacher beside a float32 student may be rounded to float32, or be read as it is.
    """
    precision = _DOUBLE if case.dtype == torch.float64 else _SINGLE
    working = torch.float64 if case.dtype == torch.float64 else torch.float32
    wide = case.teacher is not None and case.teacher.values.values.dtype == torch.float64 != working
    for dtype in (working, torch.float64) if wide else (working,):
        for ends in (
            {},
            {"smallest": precision.smallest, "largest": precision.largest},
            {"smallest": _DOUBLE.smallest},
        ):
            with np.errstate(all="ignore"):
                yield _expect(case, precision, working, dtype, ends)


def loss_items(case: Case):
    """The denominators, and the bound of their error."""
    weight, labels = _weights(case, torch.float64), _labels(case)
    soft, hard, _ = _counts(case, weight, labels)
    class_weight = None if case.class_weight is None else real(case.class_weight.values)
    return _denominators(weight, labels, class_weight, soft, hard)


def _expect(case, precision, working, teacher_dtype, ends):
    student = student_logits(case)
    teacher = None if case.option("alpha") == 0 else teacher_logits(case, teacher_dtype)
    weight, labels = _weights(case, working), _labels(case)
    soft_rows, hard_rows, _ = _counts(case, weight, labels)
    class_weight = None if case.class_weight is None else real(case.class_weight.values.to(working))
    counted = _denominators(weight, labels, class_weight, soft_rows, hard_rows)
    given = _given_items(case)
    items = tuple(n if g is None else Real(g) for n, g in zip(counted, given, strict=True))
    scales = [_scale(case, weight, rows, n) for rows, n in zip((soft_rows, hard_rows), items, strict=True)]

    alpha = Real(case.option("alpha"))
    terms = [
        _SoftPart(case, precision, student, teacher, labels, ends) if alpha > 0 else None,
        _HardPart(case, precision, student, labels, class_weight, hard_rows) if alpha < 1 else None,
    ]
    factors = (alpha, 1 - alpha)
    zeros = np.zeros(len(weight), Real)
    values = [_scaled(scale, part.value) if part else zeros for scale, part in zip(scales, terms, strict=True)]
    bounds = [_scaled(scale, part.bound) if part else zeros for scale, part in zip(scales, terms, strict=True)]

    def reduced(rows):
        return rows if case.option("reduction") == "none" else rows.sum()

    # A term that is not evaluated is NaN in the metrics.
    soft, hard = (reduced(v) if part else reduced(v) * np.nan for v, part in zip(values, terms, strict=True))
    want = Expectation(
        reduced(sum(f * v for f, v in zip(factors, values, strict=True))),
        reduced(sum(f * b for f, b in zip(factors, bounds, strict=True))),
        soft,
        reduced(bounds[0]),
        hard,
        reduced(bounds[1]),
        items,
        open=terms[1] is not None and bool((terms[1].open & (scales[1] > 0)).any()),
    )
    if terms[0] is not None and case.path in ("engine", "no gradient"):
        want.rows_of_zero = terms[0].exactly_zero
    # num_items of 0 says that no row counts, anywhere.
    counting = [rows & (g != 0) for rows, g in zip((soft_rows, hard_rows), given, strict=True)]
    # A row without a term is not read, so that it has no argmax either.
    with_a_term = sum(rows for rows, factor in zip(counting, factors, strict=True) if factor > 0) > 0
    want.agreement, want.accuracy = _metrics(student, teacher, labels, counting[0], counting[1] & with_a_term)
    if case.path != "no gradient":
        weighted = [(f * s, part) for f, s, part in zip(factors, scales, terms, strict=True) if part is not None]
        want.gradients = _of_leaves(case, precision, student, _gradient(case, weighted))
    return want


def _scaled(scale, values):
    """0 where a row does not count, whatever it holds."""
    return np.where(scale == 0, 0, scale * np.where(scale == 0, 0, values))


# --- Which rows count -----------------------------------------------------------------------------------------


def _weights(case, dtype):
    if case.sample_weight is None:
        return np.ones(case.rows.numel(), Real)
    return real(case.sample_weight.values.to(dtype)).reshape(-1)


def _labels(case):
    return None if case.labels is None else case.labels.values.long().reshape(-1).numpy()


def _counts(case, weight, labels):
    """Rows that count for the soft term, for the hard term, and for anything."""
    exists = weight > 0
    if labels is None:
        return exists, np.zeros_like(exists), exists
    labelled = labels != case.option("ignore_index")
    return exists & (labelled | (case.option("unlabeled") == "distill")), exists & labelled, exists


def _denominators(weight, labels, class_weight, soft, hard):
    of_label = np.ones(len(weight), Real)
    if labels is not None and class_weight is not None:
        of_label = class_weight[np.where(hard, labels, 0)]
    return weight[soft].sum(), (weight * of_label)[hard].sum()


def _given_items(case):
    given = case.options.get("num_items")
    pair = given if isinstance(given, tuple | list) else (given, given)
    return [float(n) if n is not None else None for n in pair]


def _scale(case, weight, counts, items):
    """A row's weight over the denominator; NaN for one of 0 with rows that count, all of class weight 0: not finite."""
    scale = np.where(counts, weight, 0)
    if case.option("reduction") != "mean":
        return scale
    given = case.options.get("num_items") is not None
    if items == 0:
        return scale * 0 if given or not counts.any() else np.where(counts, np.nan, 0)
    return scale / items


# --- The two terms --------------------------------------------------------------------------------------------


class _SoftPart:
    """The soft term with T^2 and without alpha: values, bounds, and the gradient with respect to the logits."""

    def __init__(self, case, precision, student, teacher, labels, ends):
        divergence, beta = resolve(case.option("divergence"), case.option("beta"))
        of_logits = DEFINITIONS[divergence].of_logits
        temperature = Real(1 if of_logits else case.option("temperature"))
        factor = temperature**2 if case.option("t_squared") else Real(1)
        disturbance = (student.disturbance + teacher.disturbance) / temperature
        formula = case.path in ("functorch", "create_graph")
        of_formula = disturbance
        if formula:
            of_formula = disturbance + precision.ulp * (
                8 + 2 * (_largest(student.values) + _largest(teacher.values)) / temperature
            )
        rounding = precision.ulp + of_formula.max(initial=0)
        normal = Real(np.finfo(np.float64 if precision is _DOUBLE else np.float32).tiny) * Real(1.01)
        options = {"rounding": rounding, "normal": normal} | ends

        def at(partition):
            return bucket_term(
                divergence, beta, temperature, student.values, teacher.indices, teacher.values, partition, **options
            )

        if formula and teacher.partition is not None:  # torch's own, in the loss's dtype
            size = _largest(teacher.values) / temperature + np.abs(teacher.partition)
            teacher = replace(teacher, partition_rounding=teacher.partition_rounding + 8 * precision.ulp * (1 + size))
        if teacher.partition is None:
            safe = None if labels is None else np.clip(np.where(_labelled(case, labels), labels, 0), 0, None)
            term = soft_term(divergence, beta, temperature, student.values, teacher.values, safe, **options)
            extra = extra_direction = 0
        else:
            term = at(teacher.partition)
            sides = [at(teacher.partition + sign * teacher.partition_rounding) for sign in (-1, 1)]
            extra = np.maximum(*(np.abs(side.value - term.value) for side in sides))
            extra_direction = np.maximum(*(norm(side.direction - term.direction) for side in sides))
            undecided = [np.isinf(side.value) != np.isinf(term.value) for side in sides]
            undecided.append(teacher.partition_rounding > _LARGEST_DISTURBANCE)
            undecided = np.logical_or.reduce(undecided)
            term.unchecked |= undecided
            extra = np.where(undecided, INF, np.where(np.isnan(extra), 0, extra))
            extra_direction = np.where(np.isnan(extra_direction), 0, extra_direction)
        self.value = factor * term.value
        self.nan = np.isnan(term.direction).all(-1)
        self.unchecked = term.unchecked
        if formula:  # an infinite loss has a gradient of NaN, also where float32 ends on the way to it
            largest = 1e-3 * Real(np.finfo(np.float64 if precision is _DOUBLE else np.float32).max)
            self.unchecked = self.unchecked | (np.abs(term.value) * max(factor, 1) > largest)
        finite = np.where(np.isfinite(term.value), np.abs(term.value), 0)

        def disturbed(by, size):
            return np.where(by > _LARGEST_DISTURBANCE, INF, 4 * by * size)

        in_loss = precision.loss * (finite + term.unit) + _PARTS * precision.ulp * term.exponents + term.lost + extra
        loss_by = disturbance if case.path == "create_graph" else of_formula
        self.bound = factor * (in_loss + disturbed(loss_by, 1 + finite + term.mass))
        tiny = Real(np.finfo(np.float64 if precision is _DOUBLE else np.float32).tiny) * 2
        steep = factor / temperature
        self.gradient = steep * term.direction
        self.gradient_bound = steep * (
            (precision.gradient * (4 if formula else 1)) * term.base
            + _PARTS * precision.ulp * term.parts
            + term.unsettled
            + extra_direction
            + (2 * (tiny + of_formula) if of_logits else 0)  # denormal logits may be read as 0
            + disturbed(of_formula, term.base + term.parts)
        )
        same = case.teacher.form not in ("from_topk", "top_k")  # those go another way, with roundings of their own
        undisturbed = (disturbance == 0).all()
        self.exactly_zero = (student.values == teacher.values).all(-1) if same and undisturbed else None
        if self.exactly_zero is not None:
            self.exactly_zero &= ~np.isnan(self.value)


class _HardPart:
    """Cross-entropy at T = 1 as torch's reduction="none" gives it, and its gradient. ``open``: 0 * inf in torch."""

    def __init__(self, case, precision, student, labels, class_weight, counts):
        n, classes = student.values.shape
        smoothing = Real(case.option("label_smoothing"))
        at = np.where(counts, labels, 0)[:, None]
        weight = np.ones(classes, Real) if class_weight is None else class_weight
        target = np.broadcast_to(smoothing / classes * weight, (n, classes)).copy()
        own = (1 - smoothing) * weight[at]
        np.put_along_axis(target, at, np.take_along_axis(target, at, -1) + own, -1)
        logs = log_softmax(student.values, Real(1))
        masked = logs == -INF
        self.value = np.where(target == 0, 0, -target * np.where(target == 0, 0, logs)).sum(-1)
        spoiled = np.isnan(logs).any(-1)
        self.value[spoiled] = np.nan
        involved = np.full((n, classes), smoothing > 0)
        np.put_along_axis(involved, at, True, -1)
        own_masked = np.take_along_axis(masked, at, -1)[:, 0] & (smoothing == 1)
        self.open = (masked & involved & (target == 0)).any(-1) | own_masked
        total = target.sum(-1)
        softmax = np.exp(logs)
        pull = softmax * total[:, None]
        self.gradient = pull - target
        self.nan, self.unchecked = spoiled, np.zeros(n, bool)
        finite = np.where(np.isfinite(self.value), np.abs(self.value), 0)
        disturbance = student.disturbance
        of_formula = disturbance
        if case.path in ("functorch", "create_graph"):
            of_formula = disturbance + precision.ulp * (8 + 2 * _largest(student.values))

        def disturbed(by):
            return np.where(by > _LARGEST_DISTURBANCE, INF, 4 * by * total)

        loss_by = disturbance if case.path == "create_graph" else of_formula
        self.bound = precision.loss * (finite + total) + disturbed(loss_by)
        parts = _PARTS * precision.ulp * (norm(pull) + norm(target))
        self.gradient_bound = precision.gradient * norm(self.gradient) + parts + disturbed(of_formula)


def _labelled(case, labels):
    return labels != case.option("ignore_index")


def _largest(values):
    return np.where(np.isfinite(values), np.abs(values), 0).max(-1)


# --- The gradient ---------------------------------------------------------------------------------------------


def _gradient(case, weighted) -> Gradient:
    """With respect to the logits, (N, C). ``weighted``: (alpha times every row's scale, the term) of the terms."""
    grad_output = case.grad_output
    of_rows = real(grad_output).reshape(-1) if isinstance(grad_output, torch.Tensor) else Real(grad_output)
    n, classes = case.rows.numel(), case.classes
    values, bound = np.zeros((n, classes), Real), np.zeros(n, Real)
    counts, nan, unchecked = np.zeros((3, n), bool)
    for scale, part in weighted:
        values += _scaled(scale[:, None], part.gradient)
        bound += _scaled(scale, part.gradient_bound)
        counts |= scale != 0
        nan |= (scale != 0) & part.nan
        unchecked |= (scale != 0) & (part.unchecked | np.isnan(scale))
    # Before grad_output multiplies it, the gradient is in memory: beyond the dtype it is inf there, or inf - inf.
    largest = np.abs(values)
    values = values * (of_rows[:, None] if np.ndim(of_rows) else of_rows)
    # The gradient is rounded when it is stored, and again when a grad_output other than 1 multiplies it.
    steps = _smallest(case.dtype) * np.sqrt(Real(classes)) * (1 + np.abs(of_rows)) * counts
    bound = bound * np.abs(of_rows) + 2.02 * ROUNDING[case.dtype] * norm(values) + steps
    largest = np.maximum(largest, np.abs(values))
    beyond = (largest > torch.finfo(case.dtype).max * Real(0.99)).any(-1)
    unchecked |= beyond & (case.dtype not in (torch.float16, torch.bfloat16))  # inf, or inf - inf on the way there
    if case.path in ("functorch", "create_graph"):  # the formula's own intermediate results end before that
        unchecked |= (np.abs(values) > 1e-3 * torch.finfo(torch.float32).max).any(-1) & (case.dtype != torch.float64)
    return Gradient(values, np.where(nan, 0, bound), nan & ~unchecked, unchecked, largest)


def _float16_unit(case):
    """At most what a float16 gradient is multiplied by until the products are made: denominator / largest weight."""
    if case.option("reduction") != "mean":
        return 1
    largest = max(float(_weights(case, torch.float64).max(initial=0)), np.finfo(np.float64).tiny)
    given = [n / largest for n in _given_items(case) if n]
    return max(1, case.rows.numel(), *given)


def _of_leaves(case, precision, student, logits):
    """The chain rule through a head; the bounds are those of its factors' norms."""
    if case.student is not None:
        return {"student": logits}
    hidden, weight = rows_of(real(case.head.hidden.values)), real(case.head.weight.values)
    counts = (logits.values != 0).any(-1) | (logits.bound > 0) | logits.nan | logits.unchecked
    dtype = case.dtype
    # The products' factors are rounded to the dtype: a gradient of the logits beyond it is infinite there.
    beyond = np.abs(np.where(logits.nan[:, None], 0, logits.values)).max(-1, initial=0) > torch.finfo(dtype).max
    unchecked = logits.unchecked | beyond
    steep = _scaled(counts[:, None] * Real(1), logits.values * student.slopes)
    largest = np.where(counts, np.abs(student.slopes).max(-1), 0)
    cap = case.option("softcap")
    # The slope of a soft cap is 1 - tanh^2: where tanh is near 1, torch's own has an absolute error of some roundings.
    of_slope = 0 if cap is None else 4 * (student.disturbance / cap + 8 * precision.ulp) * case.option("logit_scale")
    bound = _scaled(counts * Real(1), logits.bound * largest + of_slope * norm(logits.values))
    # In a half dtype the products' factors are rounded to it; sums of n products in any order are off by n roundings.
    factor = 2 * ROUNDING[dtype]
    classes, n = case.classes, len(hidden)
    single = ROUNDING[torch.float64 if dtype == torch.float64 else torch.float32]
    of_sum = factor + single * (classes + 2)
    # A product's sum may be beyond its dtype, which is at least float32, though what comes out is not: inf - inf.
    largest_sum = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).max * Real(0.99)
    largest = np.where(counts[:, None], logits.largest * np.abs(student.slopes), 0)
    sums = largest @ np.abs(weight)
    unchecked_hidden = unchecked | (sums > largest_sum).any(-1)
    if dtype == torch.float16:  # a product may come out in float16, and is divided by a row's denominator after that
        unchecked_hidden |= (sums * _float16_unit(case) > torch.finfo(dtype).max * Real(0.99)).any(-1)
    if dtype in (torch.float16, torch.bfloat16) and classes % 2:
        # With AMX, torch's product of bfloat16 matrices was seen to multiply the number after a row of odd length, the
        # first of the next row, by 0: a NaN there makes this row NaN too.
        unchecked_hidden[:-1] |= (logits.nan | unchecked)[1:]
    hidden_values = steep @ weight
    hidden_bound = bound * norm(norm(weight)[None])[0] + of_sum * norm(np.abs(steep) @ np.abs(weight))
    gradients = {"hidden": Gradient(hidden_values, hidden_bound, logits.nan, unchecked_hidden)}
    counted = np.where(counts[:, None], hidden, 0)
    spoiled = np.array([(logits.nan | unchecked).any()])
    spoiled |= (largest.T @ np.abs(counted) > largest_sum).any() | (largest.sum(0) > largest_sum).any()
    of_rows = factor + single * (n + 2)
    weight_values = (steep.T @ counted).reshape(1, -1)
    weight_bound = (bound * norm(counted)).sum(keepdims=True)
    weight_bound = weight_bound + of_rows * norm((np.abs(steep).T @ np.abs(counted)).reshape(1, -1))
    none = np.array([False])
    gradients["weight"] = Gradient(weight_values, weight_bound, none, spoiled)
    if case.head.bias is not None:
        bias_bound = bound.sum(keepdims=True) + of_rows * norm(np.abs(steep).sum(0, keepdims=True))
        gradients["bias"] = Gradient(steep.sum(0, keepdims=True), bias_bound, none, spoiled)
    for gradient in gradients.values():
        gradient.bound = gradient.bound + _smallest(dtype) * np.sqrt(Real(gradient.values.shape[-1])) * (
            1 if counts.any() else 0
        )
    return gradients


def _smallest(dtype):
    """The steps in which numbers near 0 are stored: float16 keeps denormals, the others may be flushed."""
    info = torch.finfo(dtype)
    return Real(info.smallest_normal) * (info.eps if dtype == torch.float16 else 1)


# --- Metrics --------------------------------------------------------------------------------------------------


def _metrics(student, teacher, labels, soft_rows, hard_rows):
    """Shares of rows as (least, most); NaN of no rows, or of a term that is not evaluated."""
    agreement = accuracy = (np.nan, np.nan)
    if teacher is not None and soft_rows.any():
        same = (student.best == teacher.best) & (student.best >= 0)
        clear = (student.clear & teacher.clear) | (student.best == -1) | (teacher.best == -1)
        agreement = _share(same, clear, soft_rows)
    if labels is not None and hard_rows.any():
        accuracy = _share(student.best == labels, student.clear, hard_rows)
    return agreement, accuracy


def _share(flags, clear, rows):
    n = rows.sum()
    return (flags & clear & rows).sum() / n, ((flags | ~clear) & rows).sum() / n
