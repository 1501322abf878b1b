"""The backends: which one runs, why, and how to choose another one."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from pydistill._arguments import check_count, warn_caller
from pydistill.engine.batch import Batch, Outcome
from pydistill.engine.compiled import CompiledBackend, load_core
from pydistill.engine.torch_backend import TorchBackend

NAMES = ("compiled", "numba", "torch")


class Backend(Protocol):
    """What every backend has."""

    @property
    def name(self) -> str:
        """One of ``NAMES``."""

    @property
    def isa(self) -> str | None:
        """The compiled variant; None for the other backends."""

    @property
    def threads(self) -> int:
        """Number of threads for a large batch."""

    def evaluate(
        self,
        batch: Batch,
        gradient: Tensor | None = None,
        grad_output: float | Tensor = 1.0,
        metrics: bool = False,
    ) -> Outcome:
        """Evaluate one batch.

        Args:
            batch: checked, its student and teacher ``(N, C)`` with the classes next to each other in memory.
            gradient: None, or ``(N, C)`` with the classes next to each other and the student's dtype. All of it is
                written, after all checks. It may be the student itself.
            grad_output: a float, or for reduction="none" a tensor ``(N,)`` in the loss's dtype. The gradient is
                multiplied by it.
            metrics: whether the metrics are wanted.
        """

    def new_gradient(self, student: Tensor) -> Tensor:
        """Allocate a buffer for the gradient; its values are arbitrary."""


class BackendInfo(NamedTuple):
    """The backend in use; see :func:`backend_info`."""

    name: str
    isa: str | None
    threads: int
    reason: str
    last_call: str


class _LastCall(threading.local):
    text: str = "no call yet in this thread"


last_call: _LastCall = _LastCall()
_chosen: ContextVar[tuple[Backend, str] | None] = ContextVar("pydistill_backend", default=None)  # with the reason


def current() -> Backend:
    """The backend in use."""
    chosen = _chosen.get()
    return (chosen or _default())[0]


def backend_info() -> BackendInfo:
    """Return the backend that runs the loss in this thread, and why it was chosen.

    Returns:
        BackendInfo: ``name`` ("compiled", "numba" or "torch"), ``isa`` (the compiled variant, None elsewhere),
        ``threads`` (for a large batch), ``reason`` (why this backend), ``last_call`` (what the latest call of this
        thread ran on: the backend, or the torch formula and why; and whether ``inplace`` was followed).

    Example:
        >>> import pydistill
        >>> with pydistill.use_backend("torch"):
        ...     info = pydistill.backend_info()
        >>> info.name, info.reason
        ('torch', 'chosen with use_backend')
    """
    backend, reason = _chosen.get() or _default()
    return BackendInfo(backend.name, backend.isa, backend.threads, reason, last_call.text)


@contextmanager
def use_backend(name: str, *, isa: str | None = None, threads: int | None = None) -> Iterator[None]:
    """Run the loss on another backend within a ``with`` block, in this thread (or asyncio task) only.

    Args:
        name: "compiled", "numba" or "torch".
        isa: a variant of the compiled backend, such as "avx2", "baseline" or "portable".
        threads: for numba, which is serial unless asked; the others use torch's number of threads.

    Raises:
        ValueError: an unknown name, an ISA that this CPU or build does not have, or an option of another backend.
        ImportError: the backend is not installed; the message says why.

    Example:
        >>> import torch, pydistill
        >>> s, t = torch.randn(4, 10), torch.randn(4, 10)
        >>> fast = pydistill.distillation_loss(s, t, alpha=1.0)
        >>> with pydistill.use_backend("torch"):
        ...     plain = pydistill.distillation_loss(s, t, alpha=1.0)
        >>> torch.allclose(fast, plain)
        True
    """
    token = _chosen.set((_make(name, isa, threads), "chosen with use_backend"))
    try:
        yield
    finally:
        _chosen.reset(token)


@lru_cache(maxsize=1)
def _core() -> Any:
    return load_core()


@lru_cache(maxsize=32)
def _make(name: str, isa: str | None = None, threads: int | None = None) -> Backend:
    if name not in NAMES:
        raise ValueError(f"name must be a backend, one of {', '.join(NAMES)}; got {name!r}")
    if isa is not None and name != "compiled":
        raise ValueError(
            f"isa must be None with the {name} backend, got {isa!r}; only the compiled backend has variants"
        )
    if threads is not None and name != "numba":
        raise ValueError(
            f"threads must be None with the {name} backend, got {threads!r}; it uses torch's number of threads"
        )
    if threads is not None:
        check_count("threads", threads)
    if name == "torch":
        return TorchBackend()
    if name == "numba":
        from pydistill.engine.numba import NumbaBackend  # numba takes a second to import

        return NumbaBackend(threads=threads or 1)
    core = _core()
    if isa is not None and isa not in core.ISAS:
        raise ValueError(f"isa must be one that this CPU and build have ({', '.join(core.ISAS)}); got {isa!r}")
    return CompiledBackend(core, isa)


def _from_environment(name: str, isa: str | None, setting: str) -> Backend:
    try:
        return _make(name, isa)
    except ValueError as error:
        raise ValueError(f"{setting} in the environment: {error}") from None


@lru_cache(maxsize=1)
def _default() -> tuple[Backend, str]:
    """The environment's choice, else the best backend available, with the reason. Warns once if it is not compiled."""
    name, isa = os.environ.get("PYDISTILL_BACKEND") or None, os.environ.get("PYDISTILL_ISA") or None
    if name is not None:
        reason = f"PYDISTILL_BACKEND={name}" + (f", PYDISTILL_ISA={isa}" if isa else "")
        return _from_environment(name, isa, reason), reason
    try:
        backend = _from_environment("compiled", isa, f"PYDISTILL_ISA={isa}")
        reason = f"PYDISTILL_ISA={isa}" if isa else f"best of {', '.join(_core().ISAS)} for this CPU"
        return backend, reason
    except ImportError as error:
        missing = str(error)
    if isa is not None:
        raise ImportError(f"PYDISTILL_ISA={isa} needs the compiled backend: {missing}")
    try:
        backend = _make("numba")
    except ImportError as error:
        backend, missing = _make("torch"), f"{missing}; numba: {error}"
    warn_caller(f"pydistill runs on its slower {backend.name} backend: {missing}", RuntimeWarning)
    return backend, missing
