"""Validation, once, at the boundary. What passes here is what every backend may rely on."""

import math
import sys
import warnings
from numbers import Integral, Real

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pydistill._arguments import lost_storage, no_storage
from pydistill.engine.batch import Options
from pydistill.formulas import DIVERGENCES
from pydistill.targets import SoftTargets

try:
    from torch._subclasses.fake_tensor import FakeTensor as _FakeTensor
except ImportError:
    _FakeTensor = None

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
REDUCTIONS = ("none", "sum", "mean")
SMALLEST_BETA = 1e-30  # of a mixture
SMALLEST_TEMPERATURE = 1e-30
_SOFT_LABELS = (
    ". Soft labels, as of mixup, are targets: distillation_loss(logits, SoftTargets.from_probs(labels), alpha=1.0) is "
    "their cross-entropy but for a constant; add it to the teacher's term, each times its own weight"
)


def check_options(
    divergence, beta, temperature, alpha, t_squared, ignore_index, unlabeled, label_smoothing, reduction, num_items
) -> Options:
    """Every rule about an option that needs no tensor of the batch."""
    entry = DIVERGENCES.get(divergence) if isinstance(divergence, str) else None
    if entry is None:
        raise ValueError(f"divergence must be one of {', '.join(DIVERGENCES)}; got {divergence!r}")
    if beta is None:
        beta = entry.beta
    elif entry.beta is None:
        raise ValueError(f"beta: divergence {divergence!r} has no parameter, got beta={beta!r}")
    else:
        beta = beta if type(beta) is float else _number("beta", beta)
        if not 0 <= beta <= entry.largest_beta or beta == math.inf:
            raise ValueError(f"beta of {divergence!r} must be in [0, {entry.largest_beta:g}] and finite, got {beta!r}")
        if beta in (0, 1):
            end = entry.ends[int(beta)]
            divergence, beta = (divergence, beta) if end is None else (end, None)
        elif beta < SMALLEST_BETA and entry.ends[0]:
            raise ValueError(
                f"beta of {divergence!r} must be 0, which is {entry.ends[0]!r}, or at least {SMALLEST_BETA:g}, since "
                f"float32 cannot hold p / beta below that; got {beta!r}"
            )
    if type(temperature) is not float:
        temperature = _number("temperature", temperature)
    if not SMALLEST_TEMPERATURE <= temperature <= 1 / SMALLEST_TEMPERATURE:
        raise _bad_temperature(temperature)
    if type(alpha) is not float:
        alpha = _number("alpha", alpha)
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha, the weight of the soft term, must be in [0, 1], got {alpha!r}")
    if type(label_smoothing) is not float:
        label_smoothing = _number("label_smoothing", label_smoothing)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing!r}")
    if t_squared is not True and t_squared is not False:
        raise TypeError(f"t_squared must be True or False, got {t_squared!r}")
    if type(ignore_index) is not int:
        ignore_index = _integer("ignore_index", ignore_index)
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index must fit in 64 bits, as labels do, got {ignore_index}")
    if not isinstance(unlabeled, str) or unlabeled not in ("skip", "distill"):
        raise ValueError(f'unlabeled must be "skip" or "distill", got {unlabeled!r}')
    if divergence == "dkd" and unlabeled == "distill" and alpha > 0:
        raise ValueError('unlabeled="distill": dkd needs the label of every row that counts')
    check_reduction(reduction)
    soft_items = hard_items = None
    if num_items is not None:
        soft_items, hard_items = _check_num_items(num_items, reduction)
    return Options(
        divergence,
        beta,
        temperature,
        alpha,
        t_squared,
        ignore_index,
        unlabeled,
        label_smoothing,
        reduction,
        soft_items,
        hard_items,
    )


def _bad_temperature(temperature):
    if not 0 < temperature < math.inf:
        return ValueError(f"temperature must be positive and finite, got {temperature!r}")
    return ValueError(f"temperature must be in [1e-30, 1e30], where float32 holds T and 1 / T; got {temperature!r}")


def check_reduction(reduction):
    """One of none, sum, mean; kl_div's name for the mean gets a hint."""
    if isinstance(reduction, str) and reduction in REDUCTIONS:
        return
    if isinstance(reduction, str) and reduction == "batchmean":
        raise ValueError('reduction="batchmean": write "mean"; here it divides by the rows, never by rows * classes')
    raise ValueError(f'reduction must be "none", "sum" or "mean", got {reduction!r}')


def check_flags(inplace, return_metrics):
    """The two switches that are no options of the batch."""
    for name, value in (("inplace", inplace), ("return_metrics", return_metrics)):
        if value is not True and value is not False:
            raise TypeError(f"{name} must be True or False, got {value!r}")


def _number(name, value) -> float:
    if isinstance(value, Tensor):
        if value.requires_grad:
            raise TypeError(f"{name} must not require a gradient: none flows into it; pass {name}.detach()")
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


def _integer(name, value) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    return int(value)


def _check_num_items(num_items, reduction):
    if reduction != "mean":
        raise ValueError(f'num_items is the denominator of reduction="mean"; got it with reduction={reduction!r}')
    pair = tuple(num_items) if isinstance(num_items, tuple | list) else (num_items, num_items)
    if len(pair) != 2:
        raise ValueError(f"num_items must be a number or a pair (soft, hard), got {num_items!r}")
    items = tuple(_number("num_items", n) for n in pair)
    if not all(0 <= n < math.inf for n in items):
        raise ValueError(f"num_items must be >= 0 and finite, got {num_items!r}")
    return items


def check_tensors(student, teacher, labels, sample_weight, class_weight, *, soft: bool, hard: bool):
    """Types, dtypes, devices and shapes. ``soft`` and ``hard`` say which terms are evaluated.

    The teacher's logits, the weights, and the indices of a top-k teacher.
    """
    if not isinstance(student, Tensor):
        raise TypeError(f"student_logits must be a tensor, got {type(student).__name__}")
    if student.dtype not in DTYPES:
        raise TypeError(f"student_logits must be float32, float64, bfloat16 or float16, got {student.dtype}")
    check_dense("student_logits", student)
    shape = student.shape
    if not shape or shape[-1] == 0:
        raise ValueError(f"student_logits must have at least one class in its last dimension, got shape {tuple(shape)}")
    if soft:
        if teacher is None:
            raise ValueError("teacher must be given unless alpha is 0: alpha is the weight of the soft term")
        teacher, indices = _check_teacher(teacher, student)
    else:
        teacher = indices = None
    if labels is not None:
        _check_labels(labels, student)
    elif hard:
        raise ValueError("labels must be given unless alpha is 1: 1 - alpha is the weight of the hard term")
    if sample_weight is not None:
        sample_weight = _check_weight("sample_weight", sample_weight, student, shape[:-1])
    if class_weight is not None:
        class_weight = _check_weight("class_weight", class_weight, student, shape[-1:])
    return teacher, sample_weight, class_weight, indices


def _check_teacher(teacher, student):
    indices, shape, targets = None, None, "SoftTargets.from_logits(teacher)"
    if isinstance(teacher, SoftTargets):
        targets = "teacher" if teacher.indices is None else "the targets, before the top k are taken,"
        indices, shape, teacher = teacher.indices, teacher.shape, teacher.logits
    elif isinstance(teacher, Tensor):
        shape = teacher.shape
    else:
        raise TypeError(f"teacher must be a tensor of logits or SoftTargets, got {type(teacher).__name__}")
    if teacher.dtype not in DTYPES:
        raise TypeError(f"teacher must be float32, float64, bfloat16 or float16, got {teacher.dtype}")
    check_dense("teacher", teacher)
    if shape != student.shape:
        raise ValueError(
            f"teacher must have the shape of student_logits, got teacher {tuple(shape)} and "
            f"student_logits {tuple(student.shape)}{_shape_hint(shape, student.shape, targets)}"
        )
    _check_device("teacher", teacher, student)
    return teacher, indices


def _shape_hint(teacher, student, targets):
    def moved(shape):
        return (shape[0], *shape[2:], shape[1])

    if len(teacher) > 2 and moved(teacher) == student:
        return "; if the teacher's classes are dimension 1, pass teacher.movedim(1, -1)"
    if len(student) > 2 and moved(student) == teacher:
        return "; if the student's classes are dimension 1, pass student_logits.movedim(1, -1)"
    if len(teacher) and teacher[:-1] == student[:-1] and teacher[-1] > student[-1]:
        return (
            f"; if the teacher's last classes are padding, or not the student's, pass "
            f"{targets}.select_classes({student[-1]}), or the indices of the student's classes"
        )
    return ""


def check_teacher_form(teacher, labels, options):
    """The rules about a teacher's form that depend on the options; the log-partitions that are needed, or None."""
    if options.alpha == 0:
        return None
    divergence, entry = options.divergence, DIVERGENCES[options.divergence]
    if divergence == "dkd" and labels is None:
        raise ValueError("labels must be given with divergence='dkd', which tells the label from the other classes")
    if not isinstance(teacher, SoftTargets):
        return None
    if not entry.zeros and teacher.has_zeros:
        raise ValueError(
            f"teacher: {divergence} compares logits, and a probability of 0 has none; use forward_kl or jsd"
        )
    if teacher.indices is None:
        return None
    if teacher.tail not in entry.top_k:
        forms = " or ".join(f'tail="{tail}"' for tail in entry.top_k)
        rule = f"takes a top-k teacher with {forms} only" if forms else "takes no top-k teacher"
        raise ValueError(f'teacher: {divergence} {rule}, got tail="{teacher.tail}"')
    if teacher.tail == "renormalize":
        return None
    partitions = teacher.log_partitions.get(options.temperature)
    if teacher.indices.shape[-1] == teacher.shape[-1]:
        return None  # there is no rest, and a rounded one would be infinitely far from the student's
    if partitions is None:
        stored = ", ".join(f"{t:g}" for t in teacher.log_partitions) or "none"
        raise ValueError(
            f'teacher: tail="bucket" needs the log-partition at temperature {options.temperature:g}; stored: {stored}'
        )
    return partitions


def _check_labels(labels, student):
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be a tensor of class indices, got {type(labels).__name__}")
    if labels.dtype not in (torch.int64, torch.int32):
        hint = _SOFT_LABELS if labels.is_floating_point() else ""
        raise TypeError(f"labels must be class indices of dtype int64 or int32, got {labels.dtype}{hint}")
    check_dense("labels", labels)
    if labels.shape != student.shape[:-1]:
        hint = ""
        if student.dim() > 2 and labels.shape == student.shape[:1] + student.shape[2:]:
            hint = "; if the classes are dimension 1, pass student_logits.movedim(1, -1), and the teacher's likewise"
        raise ValueError(
            f"labels must have the shape of student_logits without its last dimension, got labels "
            f"{tuple(labels.shape)} and student_logits {tuple(student.shape)}{hint}"
        )
    if student.dim() > 2 and labels.shape == student.shape[:1] + student.shape[2:]:
        warnings.warn(
            f"student_logits {tuple(student.shape)} with labels {tuple(labels.shape)}: the classes may be dimension 1 "
            "or the last one, and are taken from the last. If they are dimension 1, pass "
            "student_logits.movedim(1, -1), and the teacher's likewise",
            UserWarning,
            stacklevel=4,
        )
    _check_device("labels", labels, student)


def check_dense(name, tensor):
    """Sparse tensors and those of other libraries' layouts have no rows in memory."""
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {tensor.layout}; pass {name}.to_dense()")


def _check_weight(name, weight, student, shape):
    if not isinstance(weight, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(weight).__name__}")
    if weight.requires_grad:
        raise TypeError(f"{name} must not require a gradient: none flows into it; pass {name}.detach()")
    if weight.is_complex():
        raise TypeError(f"{name} must be real, got dtype {weight.dtype}")
    check_dense(name, weight)
    if weight.shape != shape:
        raise ValueError(
            f"{name} must have shape {tuple(shape)}, got {tuple(weight.shape)} with student_logits "
            f"{tuple(student.shape)}"
        )
    _check_device(name, weight, student)
    return weight.to(torch.float64 if student.dtype == torch.float64 else torch.float32).contiguous()


def _check_device(name, tensor, student):
    if not (tensor.is_cpu and student.is_cpu) and tensor.device != student.device:
        raise ValueError(
            f"{name} and student_logits must be on one device, got {name} on {tensor.device} and student_logits on "
            f"{student.device}"
        )


_probability_warning_given = False


def warn_of_probabilities():
    """Once: a plain tensor is taken as logits, and this one was more likely meant as probabilities."""
    global _probability_warning_given
    if not _probability_warning_given:
        _probability_warning_given = True
        warnings.warn(
            "teacher looks like probabilities (its first row is >= 0 and sums to 1), but a plain tensor is taken as "
            "logits. Use pydistill.SoftTargets.from_probs(teacher)",
            UserWarning,
            stacklevel=3,
        )


def sums_to_one(batch) -> bool:
    """Whether the teacher's first row is >= 0 and sums to 1. A single class, whose logit may be 1, tells nothing."""
    teacher = batch.teacher
    if teacher is None or batch.teacher_indices is not None or teacher.numel() == 0 or teacher.shape[-1] == 1:
        return False
    row = teacher.detach().reshape(-1, teacher.shape[-1])[0]
    return bool((row >= 0).all()) and abs(float(row.sum(dtype=torch.float64)) - 1) <= 1e-3


# The private names of torch in the package; each has a fallback.
def wants_op(student) -> bool:
    """Whether the call is being recorded, or has no storage: by compile, export, jit.trace, make_fx, fake tensors."""
    return torch.compiler.is_compiling() or type(student) is _FakeTensor or _dispatch_modes() > 0 or _is_tracing()


def in_functorch() -> bool:
    """Whether a functorch transform (grad, vmap, jvp, ...) is active: tensors may then have no values to look at."""
    return _functorch_active()


def in_forward_mode() -> bool:
    """Whether forward-mode differentiation is active; tensors have values, and perhaps tangents."""
    return getattr(forward_ad, "_current_level", -1) >= 0


def is_batched(grad_output) -> bool:
    """Whether it stands for several gradients at once, as under ``is_grads_batched``."""
    return _is_batched(grad_output) or _is_legacy_batched(grad_output)


def _never(*_):
    return False


_functorch_active = getattr(torch._C, "_are_functorch_transforms_active", _never)
_functorch = getattr(torch._C, "_functorch", None)
_is_batched = getattr(_functorch, "is_batchedtensor", _never)
_is_legacy_batched = getattr(_functorch, "is_legacy_batchedtensor", _never)
_dispatch_modes = getattr(torch._C, "_len_torch_dispatch_stack", _never)
_is_tracing = getattr(torch._C, "_is_tracing", torch.jit.is_tracing)


def check_storage(batch):
    """No tensor of a flat batch may have lost its memory, as one that FSDP has freed: its address is 0."""
    for name, tensor in zip(batch._fields[:7], batch[:7], strict=True):
        if tensor is not None and lost_storage(tensor):
            raise no_storage(name, tensor)


def check_dtensors(named_tensors):
    """DTensors are right only where torch's operations are: all of them together, and not under loss_parallel()."""
    named_tensors = [(name, tensor) for name, tensor in named_tensors if tensor is not None]
    distributed = [name for name, tensor in named_tensors if is_dtensor(tensor)]
    if not distributed:
        return
    plain = [name for name, tensor in named_tensors if name not in distributed and tensor.dim() > 0]
    if plain:
        raise ValueError(
            f"all tensors must be DTensors or none: {', '.join(distributed)} distributed, {', '.join(plain)} plain. "
            "Distribute all of them over the same mesh, or pass each rank's own rows as plain tensors (x.to_local())"
        )
    if _loss_parallel_is_active():
        raise ValueError(
            f"{', '.join(distributed)} must not be used under torch.distributed.tensor.parallel.loss_parallel(): there "
            "the gradient of torch's log_softmax is that of cross_entropy alone. Call the loss outside of it; "
            "logits that are sharded over the classes are then gathered"
        )


def is_dtensor(tensor) -> bool:
    """Told by the name: importing torch.distributed.tensor takes long."""
    kind = type(tensor)
    return kind.__name__ == "DTensor" and kind.__module__.startswith("torch.distributed")


def _loss_parallel_is_active() -> bool:
    dtensor = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    handlers = getattr(getattr(dtensor, "_op_dispatcher", None), "_custom_op_handlers", {})
    return torch.ops.aten._log_softmax.default in handlers


def check_rows(batch):
    """The first row whose label is out of range or whose weight is unusable is an error; by torch operations."""
    labels, weight = (None if x is None else x.reshape(-1) for x in (batch.labels, batch.sample_weight))
    bad_labels = bad_weights = torch.zeros((), dtype=torch.bool)
    if labels is not None:
        labels = labels.long()  # compared with int32 labels, an ignore_index beyond 32 bits would wrap around
        outside = (labels < 0) | (labels >= batch.student.shape[-1])
        bad_labels = outside & (labels != batch.options.ignore_index)
    if weight is not None:
        bad_weights = ~((weight >= 0) & weight.isfinite())
    bad = bad_labels | bad_weights
    if bad.any():
        row = int(bad.nonzero()[0])
        error = bad_label if labels is not None and bad_labels[row] else bad_weight
        raise error(batch._replace(labels=labels, sample_weight=weight), row)


def bad_label(batch, row: int):
    """The error for a label that is neither a class nor ignore_index; ``row`` is the first such row."""
    classes, label = batch.student.shape[-1], int(batch.labels[row])
    return IndexError(
        f"labels must be in [0, {classes}) or ignore_index={batch.options.ignore_index}; row {row} holds {label}"
    )


def bad_weight(batch, row: int):
    """The error for a sample weight that is negative or not finite."""
    return ValueError(f"sample_weight must be >= 0 and finite; row {row} holds {float(batch.sample_weight[row])}")
