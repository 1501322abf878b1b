"""pydistill: a fused loss engine for knowledge distillation on the CPU."""

from importlib import import_module as _import_module
from importlib import metadata as _metadata
from types import ModuleType as _ModuleType

# An unrelated distribution named "pydistill" installs the same import package; the two overwrite each other's files.
try:
    _metadata.distribution("pydistill")
except _metadata.PackageNotFoundError:
    pass
else:
    raise ImportError(
        "two distributions share the import name 'pydistill': 'pydistill' (unrelated) and 'pydistill-kd' (this one). "
        "Run: pip uninstall pydistill pydistill-kd && pip install pydistill-kd"
    )

import torch  # noqa: F401  before the compiled core, so that both use torch's OpenMP pool

from pydistill._version import __version__ as __version__
from pydistill.engine.backend import BackendInfo, backend_info, use_backend
from pydistill.evaluation import report
from pydistill.functional import LossMetrics, distillation_loss, loss_items
from pydistill.linear import LinearTeacher, linear_distillation_loss
from pydistill.losses import DistillationLoss, LinearDistillationLoss
from pydistill.shipping import load_student, save_student
from pydistill.store import TeacherStore
from pydistill.targets import SoftTargets, top_k
from pydistill.teachers import soft_targets, teacher_outputs
from pydistill.trainer import Trainer

__all__ = [
    "BackendInfo",
    "DistillationLoss",
    "LinearDistillationLoss",
    "LinearTeacher",
    "LossMetrics",
    "SoftTargets",
    "TeacherStore",
    "Trainer",
    "backend_info",
    "distillation_loss",
    "linear_distillation_loss",
    "load_student",
    "loss_items",
    "report",
    "save_student",
    "soft_targets",
    "teacher_outputs",
    "top_k",
    "use_backend",
]

_OPTIONAL = ("callbacks", "sklearn", "skorch")


def __getattr__(name: str) -> _ModuleType:
    """Import a submodule when it is first used, because scikit-learn and skorch need not be installed."""
    if name in _OPTIONAL:
        return _import_module(f"pydistill.{name}")
    raise AttributeError(f"module 'pydistill' has no attribute {name!r}")
