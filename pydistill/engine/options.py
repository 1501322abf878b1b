"""The options of the loss, defined once: name, type, check, and type in the schema of the torch.library op.

The public signatures (functional.py, linear.py, and the two modules in losses.py) state names and defaults; a test
keeps them equal. Everything behind them takes names and types from :class:`Options`. csrc/options.def lists the same
options for the C++ core.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from operator import itemgetter
from typing import Annotated, Any, Literal, NamedTuple, TypedDict, get_args, get_type_hints

import torch
from torch import Tensor

from pydistill._arguments import check_flag
from pydistill.formulas import DIVERGENCES, DivergenceName

Unlabeled = Literal["skip", "distill"]
Reduction = Literal["none", "sum", "mean"]
Number = float | Tensor  # a tensor is 0-d and without gradient
SMALLEST_BETA = 1e-30  # the smallest beta other than 0 of a divergence with a mixture
SMALLEST_TEMPERATURE = 1e-30


class Items(NamedTuple):
    """Given denominators of "mean". None means that the rows are counted; 0, that no row counts in the whole step."""

    soft: float | None = None
    hard: float | None = None


class LossKeywords(TypedDict, total=False):
    """The keyword arguments that all forms of the loss share, for type checkers: the options, and two tensors."""

    divergence: DivergenceName
    beta: float | None
    temperature: Number
    alpha: Number
    t_squared: bool
    ignore_index: int
    unlabeled: Unlabeled
    sample_weight: Tensor | None
    class_weight: Tensor | None
    label_smoothing: float
    reduction: Reduction
    num_items: Number | tuple[Number, Number] | None


class Option(NamedTuple):
    """What :class:`Options` states about one of its fields.

    Attributes:
        check: ``check(name, value)`` returns the checked value or raises.
        op: type of the option in the schema of the torch.library op. "Tensor" is for numbers that a schedule changes:
            with a float argument each new value would recompile. "Items" is a pair of optional tensors.
    """

    check: Callable[[str, Any], Any]
    op: Literal["Tensor", "Items", "str", "float", "float?", "int", "bool"]


def _number(name: str, value: Any) -> float:
    if isinstance(value, Tensor):
        if value.requires_grad:
            raise TypeError(f"{name} must not require a gradient, since none flows into it; pass {name}.detach()")
        if value.dim() != 0:
            raise ValueError(f"{name} must be a number or a 0-d tensor, got a tensor of shape {tuple(value.shape)}")
        if value.dtype is torch.bool or value.is_complex():
            raise TypeError(f"{name} must be a real number, got a tensor of dtype {value.dtype}")
        return float(value)
    dtype = getattr(value, "dtype", None)  # of numpy
    real = isinstance(value, Real) if dtype is None else dtype.kind in "fiu" and value.ndim == 0
    if isinstance(value, bool) or not real:
        raise TypeError(f"{name} must be a number or a 0-d tensor, got {value!r}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} must be a number that a float can hold, got {value!r}") from None


def _divergence(name: str, value: Any) -> str:
    if not isinstance(value, str) or value not in DIVERGENCES:
        raise ValueError(f"{name} must be one of {', '.join(DIVERGENCES)}; got {value!r}")
    return value


def _beta(name: str, value: Any) -> float | None:
    return None if value is None else _number(name, value)  # its range depends on the divergence


def _temperature(name: str, value: Any) -> float:
    number = _number(name, value)
    if not 0 < number < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {number!r}")
    if not SMALLEST_TEMPERATURE <= number <= 1 / SMALLEST_TEMPERATURE:
        raise ValueError(f"{name} must be in [1e-30, 1e30], where float32 holds T and 1 / T; got {number!r}")
    return number


def _alpha(name: str, value: Any) -> float:
    number = _number(name, value)
    if not 0 <= number <= 1:
        raise ValueError(f"{name}, the weight of the soft term, must be in [0, 1], got {number!r}")
    return number


def _label_smoothing(name: str, value: Any) -> float:
    number = _number(name, value)
    if not 0 <= number <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {number!r}")
    return number


def _ignore_index(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    index = int(value)
    if not -(2**63) <= index < 2**63:
        raise ValueError(f"{name} must fit in 64 bits, as labels do, got {index}")
    return index


def _unlabeled(name: str, value: Any) -> str:
    if not isinstance(value, str) or value not in get_args(Unlabeled):
        raise ValueError(f'{name} must be "skip" or "distill", got {value!r}')
    return value


def _reduction(name: str, value: Any) -> str:
    """The value, if it is "none", "sum" or "mean". "batchmean", kl_div's name for the mean, gets a hint."""
    if isinstance(value, str) and value in get_args(Reduction):
        return value
    if isinstance(value, str) and value == "batchmean":
        raise ValueError(
            f'{name} must be "none", "sum" or "mean", got "batchmean"; "mean" divides by the rows, never by '
            "rows * classes"
        )
    raise ValueError(f'{name} must be "none", "sum" or "mean", got {value!r}')


def _num_items(name: str, value: Any) -> Items:
    if value is None:
        return Items()
    pair = tuple(value) if isinstance(value, tuple | list) else (value, value)
    if len(pair) != 2:
        raise ValueError(f"{name} must be a number or a pair (soft, hard), got {value!r}")
    soft, hard = (_number(name, n) for n in pair)
    if not (0 <= soft < math.inf and 0 <= hard < math.inf):
        raise ValueError(f"{name} must be >= 0 and finite, got {value!r}")
    return Items(soft, hard)


@dataclass(frozen=True, slots=True, eq=False)
class Options:
    """The options, checked. Two objects are never equal, so that a backend may use one as the key of a cache."""

    divergence: Annotated[DivergenceName, Option(_divergence, "str")]
    beta: Annotated[float | None, Option(_beta, "float?")]
    temperature: Annotated[float, Option(_temperature, "Tensor")]
    alpha: Annotated[float, Option(_alpha, "Tensor")]
    t_squared: Annotated[bool, Option(check_flag, "bool")]
    ignore_index: Annotated[int, Option(_ignore_index, "int")]
    unlabeled: Annotated[Unlabeled, Option(_unlabeled, "str")]
    label_smoothing: Annotated[float, Option(_label_smoothing, "float")]
    reduction: Annotated[Reduction, Option(_reduction, "str")]
    num_items: Annotated[Items, Option(_num_items, "Items")]

    @property
    def evaluates_soft(self) -> bool:
        """Whether the soft term has a weight and a denominator; a given denominator of 0 means that no row counts."""
        return self.alpha > 0 and self.num_items.soft != 0

    @property
    def evaluates_hard(self) -> bool:
        """Whether the hard term has a weight and a denominator."""
        return self.alpha < 1 and self.num_items.hard != 0


OPTIONS: dict[str, Option] = {
    name: hint.__metadata__[0] for name, hint in get_type_hints(Options, include_extras=True).items()
}
NAMES = tuple(OPTIONS)
_values_of = itemgetter(*NAMES)
_PLAIN = {str, float, int, bool, type(None)}  # types whose values never change
_checked: dict[tuple[Any, ...], Options] = {}


def check_options(arguments: Mapping[str, Any]) -> Options:
    """Check every rule about an option that needs no tensor of the batch.

    ``arguments`` has the options by name, and may have more. The result for plain values is kept, because the time of
    the checks matters for small batches; the types belong to the key, since ``True == 1``.
    """
    values = _values_of(arguments)
    types = tuple(map(type, values))
    if not _PLAIN.issuperset(types):
        return _check(values)
    key = (values, types)
    found = _checked.get(key)
    if found is None:
        found = _check(values)
        if len(_checked) >= 256:  # a schedule changes alpha in every step
            _checked.clear()
        _checked[key] = found
    return found


def _check(values: tuple[Any, ...]) -> Options:
    checked = {name: OPTIONS[name].check(name, value) for name, value in zip(NAMES, values, strict=True)}
    _settle_beta(checked)
    if checked["divergence"] == "dkd" and checked["unlabeled"] == "distill" and checked["alpha"] > 0:
        raise ValueError(
            'unlabeled must be "skip" with divergence="dkd", which needs the label of every row that counts; got '
            '"distill"'
        )
    if checked["num_items"] != Items() and checked["reduction"] != "mean":
        raise ValueError(
            f'num_items must be None unless reduction="mean", whose denominators they are; got '
            f"{checked['num_items']} with reduction={checked['reduction']!r}"
        )
    return Options(**checked)


def _settle_beta(checked: dict[str, Any]) -> None:
    """Apply the divergence's default and range. At 0 or 1, replace the divergence by the one that it equals there."""
    divergence, beta = checked["divergence"], checked["beta"]
    entry = DIVERGENCES[divergence]
    if beta is None:
        checked["beta"] = entry.beta
        return
    if entry.beta is None:
        raise ValueError(f"beta must be None with divergence={divergence!r}, which has no parameter; got {beta!r}")
    if not 0 <= beta <= entry.largest_beta or beta == math.inf:
        raise ValueError(f"beta of {divergence!r} must be in [0, {entry.largest_beta:g}] and finite, got {beta!r}")
    if beta in (0, 1):
        end = entry.ends[int(beta)]
        if end is not None:
            checked["divergence"], checked["beta"] = end, None
    elif beta < SMALLEST_BETA and entry.ends[0]:
        raise ValueError(
            f"beta of {divergence!r} must be 0, which is {entry.ends[0]!r}, or at least {SMALLEST_BETA:g}, since "
            f"float32 cannot hold p / beta below that; got {beta!r}"
        )
