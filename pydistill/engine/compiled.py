"""The compiled backend: hands addresses to the C++ core. The only module that knows its binding."""

import hashlib
import importlib
import importlib.metadata
import importlib.util
from pathlib import Path

import torch

from pydistill.engine.batch import Outcome
from pydistill.engine.checks import bad_label, bad_weight, check_storage
from pydistill.formulas import loss_dtype

_DTYPE = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}  # enum DType
_REDUCTION = {"none": 0, "sum": 1, "mean": 2}  # enum Reduction
_KEPT_BYTES = 8 << 20  # below, the allocator's own reuse is as good


def load_core():
    """The compiled module: beside this package, or, for a checkout's sources, the installed one if it fits them.

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
    core = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(core)
    if _hash_of_sources(package.parent / "csrc") != core.SOURCE_HASH:
        raise ImportError(
            "the sources in csrc/ are not those that the installed compiled module was built from: pip install ."
        )
    return core


def _installed_core(package: Path):
    """Path of the compiled module of the installed distribution, when ``package`` lies in a checkout beside csrc/."""
    if not (package.parent / "csrc").is_dir():
        return None
    try:
        files = importlib.metadata.distribution("pydistill-kd").files or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((f.locate() for f in files if f.name.startswith("_core.") and f.suffix in (".so", ".pyd")), None)


def _hash_of_sources(folder: Path) -> str:
    sources = sorted(p for p in folder.iterdir() if p.suffix in (".cpp", ".hpp", ".def"))
    hashes = "".join(hashlib.sha256(p.read_bytes()).hexdigest() for p in sources)
    return hashlib.sha256(hashes.encode()).hexdigest()


class CompiledBackend:
    """Runs batches on one ISA variant of the core, on torch's number of threads."""

    name = "compiled"

    def __init__(self, core, isa: str | None = None):
        self._core = core
        self.isa = core.ISAS[0] if isa is None else isa
        self._variant = core.isa(self.isa)
        self._options = {}  # a schedule changes alpha every step, so it is emptied now and then

    @property
    def threads(self) -> int:
        """Threads that a large batch runs on: torch's, or one where its pool cannot be used."""
        return self._core.usable_threads(torch.get_num_threads())

    def _make_options(self, options):
        if len(self._options) > 256:
            self._options.clear()
        made = self._options[options] = self._core.Options(
            divergence=options.divergence,
            beta=0.0 if options.beta is None else options.beta,
            temperature=options.temperature,
            alpha=options.alpha,
            t_squared=options.t_squared,
            ignore_index=options.ignore_index,
            distill_unlabeled=options.unlabeled == "distill",
            label_smoothing=options.label_smoothing,
        )
        return made

    def evaluate(self, batch, gradient=None, grad_output=1.0, metrics=False) -> Outcome:
        """See :func:`pydistill.engine.backend.evaluate`."""
        student, teacher, labels, sample_weight, class_weight, indices, partitions, options = batch
        rows, classes = student.shape
        per_row = options.reduction == "none"
        loss = soft = hard = None
        if sample_weight is not None or class_weight is not None or indices is not None:
            check_storage(batch)
        if per_row:
            loss, soft, hard = student.new_empty(3, rows, dtype=loss_dtype(student))
        row_grad_output = None if isinstance(grad_output, float) else grad_output
        student_at = student.data_ptr()
        teacher_at = 0 if teacher is None else teacher.data_ptr()
        labels_at = 0 if labels is None else labels.data_ptr()
        if not student_at or (teacher is not None and not teacher_at) or (labels is not None and not labels_at):
            check_storage(batch)  # an address of 0: no rows, or no memory
        result = self._core.run(
            self._variant,
            torch.get_num_threads(),
            self._options.get(options) or self._make_options(options),
            rows,
            classes,
            student_at,
            _DTYPE[student.dtype],
            student.stride()[0],  # a third of the time of stride(0), and every microsecond shows in a small batch
            teacher_at,
            0 if teacher is None else _DTYPE[teacher.dtype],
            0 if teacher is None else teacher.stride()[0],
            0 if indices is None else indices.data_ptr(),
            0 if indices is None else indices.shape[1],
            0 if partitions is None else partitions.data_ptr(),
            labels_at,
            labels is not None and labels.dtype is torch.int32,
            0 if sample_weight is None else sample_weight.data_ptr(),
            0 if class_weight is None else class_weight.data_ptr(),
            _REDUCTION[options.reduction],
            -1.0 if options.soft_items is None else options.soft_items,  # negative: to be counted
            -1.0 if options.hard_items is None else options.hard_items,
            grad_output if row_grad_output is None else 1.0,
            0 if row_grad_output is None else row_grad_output.data_ptr(),
            0 if gradient is None else gradient.data_ptr(),
            0 if gradient is None else gradient.stride()[0],
            0 if loss is None else loss.data_ptr(),
            0 if soft is None else soft.data_ptr(),
            0 if hard is None else hard.data_ptr(),
            metrics,
        )
        problem, row = result[:2]
        if problem:
            raise (bad_label if problem == 1 else bad_weight)(batch, row)
        if per_row:
            return Outcome(loss, soft, hard, *result[5:])
        return Outcome(torch.scalar_tensor(result[2], dtype=loss_dtype(student)), *result[3:])

    def new_gradient(self, student):
        """An uninitialised buffer for the gradient; a large one in the memory of an earlier one that is gone."""
        size = student.nbytes
        if size < _KEPT_BYTES:
            return torch.empty_like(student, memory_format=torch.contiguous_format)  # rows may overlap in memory
        return torch.frombuffer(self._core.GradientMemory(size), dtype=student.dtype).view(student.shape)
