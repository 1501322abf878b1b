"""The implementations that are compared. Each computes the loss of a case and, unless it is forward only, gradients.

The tutorial's formula and the best eager formula are what users write. Soft cross-entropy has the same gradient as the
KL divergence but does not need kl_div's xlogy. It is the fastest formula of eager torch, so every speed-up is reported
against it too. The memory limit moves the bytes that any such loss must move, and computes nothing.
"""

import importlib.util
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

import pydistill
from bench import limit
from bench.cases import Case
from bench.eager import soft_term
from pydistill.engine.backend import NAMES
from pydistill.engine.compiled import load_core
from pydistill.formulas import DIVERGENCES

_LARGE = 1 << 23  # elements

LEGEND = {
    "tutorial": "kl_div + cross_entropy",
    "best eager": "soft cross_entropy + cross_entropy",
    "compiled tutorial": "torch.compile of the tutorial's formula",
    "compiled best eager": "torch.compile of the best eager formula",
    "pydistill": "distillation_loss; a gradient of 8 MiB or more reuses the memory of the previous step's gradient",
    "pydistill, new memory": "the same without reuse, as in the first step",
    "pydistill in place": "inplace=True",
    "pydistill in place, metrics": "inplace=True and return_metrics=True",
    "matrix products": "with a linear head: its four matrix products alone, for all rows at once",
    "pydistill, top 64": "with a linear head: the teacher is given by its 64 largest logits, which were cached",
    "limit": "memory limit: c = a + b over the bytes of the case; stores bypass the cache if it is too small",
    "limit in place": "memory limit in place: a = a + b",
    "torch.add": "torch.add(a, b, out=c)",
}


class TopkTeacher(NamedTuple):
    """The same teacher as top-k targets and as dense logits."""

    targets: pydistill.SoftTargets
    dense: torch.Tensor


class Contestant(NamedTuple):
    """``step(leaves, constants)`` returns (loss, gradients); a contestant without a loss returns (None, None)."""

    step: Callable
    value_is_kl: bool = True  # False: the loss omits the teacher's entropy, a constant
    context: Callable = nullcontext


def contestants(case: Case) -> tuple[dict[str, Contestant], dict[str, str]]:
    """Return the contestants of a case by name, and the reason for each contestant that is missing."""
    head = case.hidden > 0
    eager = formulas(case)
    found, missing = {}, {}
    for name, formula in eager.items():
        kl = name == "tutorial" or case.divergence != "forward_kl"
        found[name] = Contestant(_stepper(case, _with_head(formula) if head else formula), kl)
    for name, formula in eager.items():
        compiled = torch.compile(_with_head(formula) if head else formula, dynamic=False)
        found[f"compiled {name}"] = Contestant(_stepper(case, compiled), name == "tutorial")

    options = {"temperature": case.temperature, "alpha": case.alpha, "divergence": case.divergence}
    loss = partial(_pydistill, options)
    if case.k:
        return _topk_contestants(case, eager, options), missing
    step = _stepper(case, loss)
    found["pydistill"] = Contestant(step)
    in_place = partial(_pydistill, options | {"inplace": True})
    if head:
        found["pydistill"] = Contestant(_stepper(case, partial(_pydistill_head, options)))
        found["pydistill in place"] = Contestant(_stepper(case, _with_head(in_place)))
        _add_head_limits(case, found, options)
        _add_peers(case, found, missing)
        return found, missing
    if case.backward and case.elements > _LARGE:
        found["pydistill, new memory"] = Contestant(step, context=_without_kept_memory)
    if case.backward:
        found["pydistill in place"] = Contestant(_stepper(case, in_place))
    if case.backward and case.threads == 1:
        with_metrics = partial(_pydistill, options | {"inplace": True, "return_metrics": True})
        found["pydistill in place, metrics"] = Contestant(_stepper(case, lambda s, t, y: with_metrics(s, t, y)[0]))
    for name in NAMES[1:]:
        large = case.elements > _LARGE and (name == "torch" or case.divergence != "forward_kl")
        if large and case != Case():
            missing[f"pydistill {name}"] = "for large cases measured in the base case only, to save a third of the time"
        else:
            found[f"pydistill {name}"] = Contestant(step, context=partial(_use_backend, name, case.threads))
    _add_limits(case, found, missing)
    return found, missing


def isa_contestants(case: Case) -> dict[str, Contestant]:
    """Return pydistill with each instruction-set variant that this CPU can run."""
    step = _stepper(case, partial(_pydistill, {"temperature": case.temperature, "alpha": case.alpha}))
    return {
        f"pydistill {isa}": Contestant(step, context=partial(pydistill.use_backend, "compiled", isa=isa))
        for isa in load_core().ISAS
    }


@contextmanager
def _without_kept_memory():
    release_kept_memory()
    yield


def release_kept_memory() -> None:
    """Release the memory of a freed gradient that the compiled core keeps for the next step."""
    if pydistill.backend_info().name == "compiled":
        load_core().GradientMemory.release()


def _use_backend(name, threads):
    return pydistill.use_backend(name, **({"threads": threads} if name == "numba" else {}))


def formulas(case: Case) -> dict[str, Callable]:
    """Return the formulas that users write in torch, by name."""
    T, alpha = case.temperature, case.alpha

    def hard(s, y):
        return (1 - alpha) * F.cross_entropy(s, y)

    def tutorial(s, t, y):
        log_q, p = F.log_softmax(s / T, -1), F.softmax(t / T, -1)
        soft = alpha * T**2 * F.kl_div(log_q, p, reduction="batchmean")
        return soft + hard(s, y) if alpha < 1 else soft

    def best_eager(s, t, y):
        soft = alpha * T**2 * F.cross_entropy(s / T, F.softmax(t / T, -1))
        return soft + hard(s, y) if alpha < 1 else soft

    def cross_entropy(s, t, y):
        return hard(s, y)

    def other(s, t, y):
        soft = soft_term(case.divergence)(s, t, y, T, DIVERGENCES[case.divergence].beta)
        soft = alpha * (1 if case.divergence == "mse" else T**2) * soft
        return soft + hard(s, y) if alpha < 1 else soft

    def scattered(s, t, y):
        """A top-k teacher with a bucket for the rest in plain torch: the rest is a (k + 1)-th class."""
        t = t.targets
        log_q, log_p = F.log_softmax(s / T, -1), t.logits / T - t.log_partitions[T].unsqueeze(-1)
        rest_q = log_q.scatter(-1, t.indices, -torch.inf).logsumexp(-1, keepdim=True)
        rest_p = torch.log1p(-log_p.exp().sum(-1, keepdim=True))
        log_p = torch.cat([log_p, rest_p], -1).to(log_q.dtype)
        log_q = torch.cat([log_q.gather(-1, t.indices), rest_q], -1)
        soft = alpha * T**2 * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
        return soft + hard(s, y) if alpha < 1 else soft

    if case.k:
        return {"best eager": scattered}
    if case.divergence != "forward_kl":
        return {"best eager": other}
    return {"tutorial": cross_entropy} if alpha == 0 else {"tutorial": tutorial, "best eager": best_eager}


def _pydistill(options, s, t, y):
    return pydistill.distillation_loss(s, t, y, **options)


def _pydistill_head(options, hidden, weight, teacher_hidden, teacher_weight, y):
    teacher = pydistill.LinearTeacher(teacher_hidden, teacher_weight)
    return pydistill.linear_distillation_loss(hidden, weight, teacher, y, **options)


def _add_head_limits(case, found, options):
    """Add the matrix products that every loss with a linear head needs, and pydistill with a teacher without them."""

    def products(leaves, constants):
        hidden, weight = (x.detach() for x in leaves)
        if case.alpha > 0:
            constants[0] @ constants[1].T
        logits = hidden @ weight.T
        _ = logits @ weight, logits.T @ hidden
        return None, None

    found["matrix products"] = Contestant(products)
    if case.alpha == 0:
        return
    made = {}

    def top_64(hidden, weight, teacher_hidden, teacher_weight, y):
        if not made:
            logits = teacher_hidden @ teacher_weight.T
            made["teacher"] = pydistill.top_k(logits, 64, temperatures=(case.temperature,), tail="bucket")
        return pydistill.linear_distillation_loss(hidden, weight, made["teacher"], y, **options)

    found["pydistill, top 64"] = Contestant(partial(_unchecked, _stepper(case, top_64)))


def _topk_contestants(case, eager, options):
    """A top-k teacher: eager torch, pydistill, and pydistill with all of the teacher's logits ("dense")."""
    found = {name: Contestant(_stepper(case, formula)) for name, formula in eager.items()}
    for name, more in (("pydistill", {}), ("pydistill in place", {"inplace": True})):
        loss = partial(_pydistill, options | more)
        found[name] = Contestant(_stepper(case, lambda s, t, y, loss=loss: loss(s, t.targets, y)))
        dense = _stepper(case, lambda s, t, y, loss=loss: loss(s, t.dense, y))
        # The dense teacher has another loss than the top-k teacher, so the top-k reference does not apply.
        found[f"dense {name}"] = Contestant(partial(_unchecked, dense))
    return found


def _unchecked(step, leaves, constants):
    step(leaves, constants)
    return None, None


def _with_head(loss):
    def headed(hidden, weight, teacher_hidden, teacher_weight, y):
        return loss(hidden @ weight.T, teacher_hidden @ teacher_weight.T, y)

    return headed


def _stepper(case, loss):
    if not case.backward:

        def forward(leaves, constants):
            with torch.no_grad():
                return loss(*leaves, *constants), None

        return forward

    def forward_backward(leaves, constants):
        value = loss(*leaves, *constants)
        return value.detach(), torch.autograd.grad(value, leaves)

    return forward_backward


def _add_limits(case, found, missing):
    triad, reason = limit.load()
    names = ["limit", "limit in place"] if case.backward else ["limit"]
    if triad is None:
        missing |= dict.fromkeys(names, reason)
    else:
        for name in names:
            found[name] = Contestant(limit.step(triad, case, in_place=name == "limit in place"))
    if case.backward and case.alpha > 0:
        out = torch.zeros(case.rows, case.classes, dtype=case.torch_dtype)

        def add(leaves, constants):
            torch.add(leaves[0].detach(), constants[0], out=out)
            return None, None

        found["torch.add"] = Contestant(add)


def _add_peers(case, found, missing):
    """Losses of other libraries that take hidden states, and so need no memory for all logits either."""
    alpha = case.alpha
    if alpha == 0:

        def linear_cross_entropy(hidden, weight, teacher_hidden, teacher_weight, y):
            return F.linear_cross_entropy(hidden, weight, y)

        if hasattr(F, "linear_cross_entropy"):
            found["linear_cross_entropy"] = Contestant(_stepper(case, linear_cross_entropy))
        else:
            missing["linear_cross_entropy"] = f"torch {torch.__version__} does not have it"
        return
    if importlib.util.find_spec("liger_kernel") is None:
        missing["liger"] = "liger-kernel is not installed; pip install liger-kernel"
        return
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    # beta=0 is KL(teacher || student), without the factor T^2.
    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=1 - alpha,
        weight_soft_loss=alpha * case.temperature**2,
        beta=0.0,
        temperature=case.temperature,
        compiled=False,
    )
    found["liger"] = Contestant(_stepper(case, lambda hidden, w, th, tw, y: loss(hidden, w, th, tw, y)))
