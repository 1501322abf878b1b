"""Every private name of torch that the engine uses, each with a fallback for a torch that lacks it."""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

try:
    from torch._subclasses.fake_tensor import FakeTensor as _FakeTensor
except ImportError:
    _FakeTensor = None  # type: ignore[assignment,misc]  # no tensor is of this type then


def _never(*_: Any) -> bool:
    return False


_functorch = getattr(torch._C, "_functorch", None)
_is_batched: Callable[[Tensor], bool] = getattr(_functorch, "is_batchedtensor", _never)
_is_legacy_batched: Callable[[Tensor], bool] = getattr(_functorch, "is_legacy_batchedtensor", _never)
_dispatch_modes = getattr(torch._C, "_len_torch_dispatch_stack", _never)
_is_tracing = getattr(torch._C, "_is_tracing", torch.jit.is_tracing)  # type: ignore[attr-defined]  # not in its stubs


def wants_op(student: Any) -> bool:
    """Whether the call is being recorded (compile, export, jit.trace, make_fx), or the student is a fake tensor."""
    return torch.compiler.is_compiling() or type(student) is _FakeTensor or _dispatch_modes() > 0 or _is_tracing()


# Whether a functorch transform (grad, vmap, jvp, ...) is active. Tensors may then have no readable values.
in_functorch: Callable[[], bool] = getattr(torch._C, "_are_functorch_transforms_active", _never)


def in_forward_mode() -> bool:
    """Whether forward-mode differentiation is active. Tensors have values, and perhaps tangents."""
    return getattr(forward_ad, "_current_level", -1) >= 0


def is_batched(grad_output: Tensor) -> bool:
    """Whether it stands for several gradients at once, as under ``is_grads_batched``."""
    return _is_batched(grad_output) or _is_legacy_batched(grad_output)


def is_dtensor(tensor: Tensor) -> bool:
    """Whether it is a DTensor. Decided by the class's name, because torch.distributed.tensor takes long to import."""
    kind = type(tensor)
    return kind.__name__ == "DTensor" and kind.__module__.startswith("torch.distributed")


def loss_parallel_is_active() -> bool:
    """Whether the call is under ``torch.distributed.tensor.parallel.loss_parallel()``."""
    dtensor = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    handlers = getattr(getattr(dtensor, "_op_dispatcher", None), "_custom_op_handlers", {})
    return torch.ops.aten._log_softmax.default in handlers


def base_of(view: Tensor) -> Tensor | None:
    """The tensor whose memory a view shows; None if it is no view."""
    return getattr(view, "_base", None)


def has_native_products(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies matrices of a half dtype by instructions of their own."""
    name = "bf16" if dtype is torch.bfloat16 else "fp16"
    supported = getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", None)
    return supported is not None and bool(supported())


def apply_of(function: type[torch.autograd.Function]) -> Any:
    """``function.apply`` without its functorch check, for callers that have made it; saves 5 % of a small batch."""
    return super(torch.autograd.Function, function).apply  # type: ignore[misc]
