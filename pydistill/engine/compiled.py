"""The compiled backend: passes addresses to the C++ core. No other module calls the binding."""

import hashlib
import importlib
import importlib.metadata
import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pydistill.engine.batch import Batch, Outcome
from pydistill.engine.checks import bad_label, bad_weight, check_storage
from pydistill.engine.options import NAMES, Options
from pydistill.formulas import loss_dtype

_KEPT_BYTES = 8 << 20  # smaller buffers are reused equally well by the allocator


def load_core() -> Any:
    """Import the compiled module: beside this package, or, for a checkout's sources, the installed one if it fits.

    Raises:
        ImportError: there is none, or the checkout's csrc/ is not what the installed one was built from.
    """
    package = Path(__file__).parents[1]
    if importlib.util.find_spec("pydistill._core") is not None:
        return importlib.import_module("pydistill._core")
    path = _installed_core(package)
    if path is None:
        raise ImportError("no compiled module: pydistill was installed without a working C++ compiler")
    spec = importlib.util.spec_from_file_location("pydistill._core", path)
    assert spec is not None
    assert spec.loader is not None
    core = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(core)
    if _hash_of_sources(package.parent / "csrc") != core.SOURCE_HASH:
        raise ImportError(
            "the sources in csrc/ are not those that the installed compiled module was built from: pip install ."
        )
    return core


def _installed_core(package: Path) -> Path | None:
    """Path of the compiled module of the installed distribution, when ``package`` lies in a checkout beside csrc/."""
    if not (package.parent / "csrc").is_dir():
        return None
    try:
        files = importlib.metadata.distribution("pydistill-kd").files or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((Path(f.locate()) for f in files if f.name.startswith("_core.") and f.suffix in (".so", ".pyd")), None)


def _hash_of_sources(folder: Path) -> str:
    sources = sorted(p for p in folder.iterdir() if p.suffix in (".cpp", ".hpp", ".def"))
    hashes = "".join(hashlib.sha256(p.read_bytes()).hexdigest() for p in sources)
    return hashlib.sha256(hashes.encode()).hexdigest()


class CompiledBackend:
    """Evaluates batches on one ISA variant of the core, on torch's number of threads."""

    name = "compiled"

    def __init__(self, core: Any, isa: str | None = None) -> None:
        self._core = core
        self.isa: str = core.ISAS[0] if isa is None else isa
        self._variant = core.isa(self.isa)
        self._dtypes = {getattr(torch, name): i for i, name in enumerate(core.DTYPES)}
        self._options: dict[Options, Any] = {}

    @property
    def threads(self) -> int:
        """Threads that a large batch runs on: torch's number, or one where its pool cannot be used."""
        return int(self._core.usable_threads(torch.get_num_threads()))

    def _make_options(self, options: Options) -> Any:
        if len(self._options) >= 256:  # a schedule changes alpha in every step
            self._options.clear()
        values = {name: getattr(options, name) for name in NAMES if name != "num_items"}
        values |= {"soft_items": options.num_items.soft, "hard_items": options.num_items.hard}
        given = {name: value for name, value in values.items() if value is not None}
        made = self._options[options] = self._core.Options(**given)
        return made

    def evaluate(
        self,
        batch: Batch,
        gradient: Tensor | None = None,
        grad_output: float | Tensor = 1.0,
        metrics: bool = False,
    ) -> Outcome:
        """See :meth:`pydistill.engine.backend.Backend.evaluate`."""
        student, teacher, labels, indices = batch.student, batch.teacher, batch.labels, batch.teacher_indices
        sample_weight, class_weight = batch.sample_weight, batch.class_weight
        top_k = weights = row_outputs = per_row = None
        if indices is not None:
            check_storage(batch)
            top_k = (indices.data_ptr(), indices.shape[1], _address(batch.log_partitions))
        if sample_weight is not None or class_weight is not None:
            check_storage(batch)
            weights = (_address(sample_weight), _address(class_weight))
        if batch.options.reduction == "none":
            per_row = student.new_empty(3, len(student), dtype=loss_dtype(student))
            row_outputs = tuple(x.data_ptr() for x in per_row)
        # stride()[0] is three times as fast as stride(0), which matters for small batches.
        dtypes, of_teacher, of_labels, of_gradient = self._dtypes, None, None, None
        of_student = (student.data_ptr(), dtypes[student.dtype], student.stride()[0])
        if teacher is not None:
            of_teacher = (teacher.data_ptr(), dtypes[teacher.dtype], teacher.stride()[0])
        if labels is not None:
            of_labels = (labels.data_ptr(), labels.dtype is torch.int32)
        if gradient is not None:
            of_gradient = (gradient.data_ptr(), dtypes[gradient.dtype], gradient.stride()[0])
        if not (of_student[0] and (of_teacher is None or of_teacher[0]) and (of_labels is None or of_labels[0])):
            check_storage(batch)  # an address of 0: no rows, or no memory
        found = self._core.run(
            self._variant,
            torch.get_num_threads(),
            self._options.get(batch.options) or self._make_options(batch.options),
            shape=student.shape,
            student=of_student,
            teacher=of_teacher,
            top_k=top_k,
            labels=of_labels,
            weights=weights,
            grad_output=(1.0, grad_output.data_ptr()) if isinstance(grad_output, Tensor) else (grad_output, 0),
            gradient=of_gradient,
            row_outputs=row_outputs,
            metrics=metrics,
        )
        if "problem" in found:
            raise (bad_label if found["problem"] == "label" else bad_weight)(batch, found["row"])
        if per_row is not None:
            found["loss"], found["soft"], found["hard"] = per_row
        else:
            found["loss"] = torch.scalar_tensor(found["loss"], dtype=loss_dtype(student))
        return Outcome(**found)

    def new_gradient(self, student: Tensor) -> Tensor:
        """Allocate a buffer for the gradient; a large one in the memory of an earlier one that was freed."""
        size = student.nbytes
        if size < _KEPT_BYTES:
            return torch.empty_like(student, memory_format=torch.contiguous_format)  # rows may overlap in memory
        return torch.frombuffer(self._core.GradientMemory(size), dtype=student.dtype).view(student.shape)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
