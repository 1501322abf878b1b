"""The store as users see it: build it, open it, index its rows, pickle it as a path."""

import errno
from collections.abc import Callable, Iterable
from os import PathLike
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pydistill._arguments import check_count
from pydistill.store.building import fill
from pydistill.store.fingerprints import Teacher, data_fingerprint, teacher_fingerprint
from pydistill.store.layout import DTypeName, file_specs
from pydistill.store.manifest import (
    Manifest,
    check_files,
    check_holds_nothing,
    manifest_crc,
    open_map,
    read_manifest,
)
from pydistill.store.request import Request, check_options, check_same
from pydistill.store.sources import Data, as_source
from pydistill.store.writer import locked
from pydistill.targets import RowIndex, SoftTargets, Tail


class TeacherStore:
    """A teacher's outputs for some data, stored in a folder: made by :meth:`build`, read by :meth:`open`.

    ``store[rows]`` gives the :class:`SoftTargets` of some rows, in the order of the data. They hold logits, so that one
    store serves every temperature and alpha. With ``k=None`` all logits are stored; with ``k`` the k largest of each
    row, their classes, and the log-partition at each of ``temperatures``: ``tail="bucket"`` needs the log-partition at
    the temperature of the loss.

    **On disk**: ``logits.npy``; for top-k also ``indices.npy`` (int32, ascending in a row) and one
    ``log_partition_<i>.npy`` (float64) per temperature; and ``manifest.json``. The .npy files are ordinary ones, except
    that bfloat16 is stored as its bits in uint16; the manifest names the dtype. They are memory-mapped read-only, so
    that all processes share one copy in the page cache. A pickled store holds its path only, so DataLoader workers can
    use it.

    **Fingerprints** detect a stale store, which is then refused. The fingerprint of the data is a sha256 over the
    inputs; labels are not part of it. It covers the dtype, the shape and every byte of a tensor, an array, a
    TensorDataset, or all the batches of an iterable, which are read once more for it. For any other Dataset, and for a
    DataLoader that reads one in order, it covers only the length and 64 items at fixed places. The fingerprint of a
    teacher module covers names, dtypes, shapes and bytes in its ``state_dict()``, so a change of its code is not
    detected; that of a classifier covers its pickle, that of SoftTargets their numbers. A callable cannot be checked:
    its fingerprint is the string ``fingerprint=``, which you change whenever the callable changes. Without this string
    a warning is given that the teacher was not checked.

    **Checksums** (CRC-32, against accidents) cover every byte of every file.

    **Rounding**: logits are rounded to ``dtype``. Before top-k logits are rounded to a half type, the largest logit of
    the row is subtracted from all of them: the divergences that accept top-k targets do not depend on such a constant,
    and the likely classes then have the smallest rounding errors. The log-partitions are corrected for the rounding, so
    that the probability outside the k classes has float64 precision.

    Attributes:
        folder: absolute path of the store.

    Example:
        >>> import tempfile, torch, pydistill
        >>> from pydistill.store import TeacherStore
        >>> inputs, teacher = torch.randn(1000, 8), torch.nn.Linear(8, 50)
        >>> folder = tempfile.TemporaryDirectory()
        >>> store = TeacherStore.build(folder.name, teacher, inputs, k=10, temperatures=(1.0, 2.0), tail="bucket")
        >>> len(store), store.shape, store[torch.tensor([5, 900, -1])]
        (1000, torch.Size([1000, 50]), SoftTargets(shape=(3, 50), dtype=torch.float16, k=10, tail='bucket'))
        >>> store = TeacherStore.open(folder.name, data=inputs, teacher=teacher)  # checks both
        >>> student_logits = torch.zeros(3, 50, requires_grad=True)
        >>> pydistill.distillation_loss(student_logits, store[:3], alpha=1.0, temperature=2.0).backward()
        >>> TeacherStore.open(folder.name, data=inputs + 1)
        Traceback (most recent call last):
        ...
        ValueError: the store in ... was built with other data: ...
        >>> folder.cleanup()
    """

    folder: Path

    @classmethod
    def build(
        cls,
        folder: str | PathLike[str],
        teacher: Teacher,
        data: Data,
        *,
        k: int | None = None,
        temperatures: Iterable[float] = (1.0,),
        tail: Tail = "renormalize",
        dtype: DTypeName = "float16",
        batch_size: int = 256,
        fingerprint: str | None = None,
    ) -> Self:
        """Run the teacher over the data and store its outputs, or continue where an earlier call stopped.

        Rows are written batch by batch; memory holds one batch. Every second, and when an error stops the build, the
        files and then the manifest are synced to disk. After a kill, a full disk or any error, the same call resumes
        after the last recorded row, and the files become byte for byte those of one uninterrupted call (provided that
        the teacher computes the same from the same batch). If the store is finished, the same call opens it. A second
        process that builds in the same folder waits for the first (not on Windows).

        Args:
            folder: a path, created if missing. The folder must be empty or hold a store.
            teacher: one of

                - a module that maps a batch of inputs to logits ``(B, ..., C)``; it runs in eval mode (its modes are
                  restored afterwards) under ``torch.inference_mode``, and gets floating-point inputs in its own dtype;
                - a fitted scikit-learn or XGBoost classifier, for rows that it was not fitted on, as in
                  :func:`pydistill.teachers.teacher_outputs`;
                - :class:`SoftTargets` with one row for each row of data, such as the out-of-fold ones of
                  :func:`pydistill.teachers.soft_targets`;
                - a callable that maps a batch of the data, unchanged, to logits or SoftTargets.
            data: the inputs, in one of three forms: a tensor or array with one row per item, or a tuple of columns of
                one length whose first column is the inputs; a Dataset; or an iterable of batches ``(rows, ...)`` that
                can be iterated several times, such as a list, or a DataLoader that does not shuffle. If an item or a
                batch is a tuple or list, its first element is the input. An item of a list is a batch, not a row;
                one-dimensional items, such as a list of texts' tokens, are therefore refused: stack or pad them to
                ``(rows, length)``, or pass a Dataset.
            k: how many logits of each row to keep; None: all. Top-k targets from a callable are stored as they are.
            temperatures: the temperatures at which log-partitions are stored; used only with ``k``.
            tail: as in :meth:`SoftTargets.from_topk`; used only with ``k``.
            dtype: the dtype of the stored logits: "float32", "float16" or "bfloat16".
            batch_size: rows per batch; not used if the data are an iterable of batches.
            fingerprint: a string that stands for a callable teacher when the store is used again.

        Raises:
            TypeError: if the data, their batches or the teacher's outputs have another form.
            ValueError: if an option is outside its range; if the data are empty, shuffled, different each time, or
                have batches of one dimension; if a row's largest logit is not finite, or a logit is too large for
                ``dtype``; if the folder holds other files, a store of other data, another teacher or other options (the
                message says which), or a damaged store.
            OSError: if a file cannot be written, for instance on a full disk. Rows already recorded are safe. If the
                file system allows it, the space for all rows is reserved before the second batch is computed.
        """
        options, batch_size = check_options(k, temperatures, tail, dtype), check_count("batch_size", batch_size)
        source = as_source(data, batch_size)
        rows, data_digest = data_fingerprint(source)
        request: Request = {**options, "data": data_digest, "teacher": teacher_fingerprint(teacher, fingerprint)}
        folder = Path(folder).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder):
            manifest = read_manifest(folder)
            if manifest is None:
                check_holds_nothing(folder)
            elif manifest["rows_written"]:
                check_same(folder, manifest["request"], request)
            else:  # an earlier build stopped before the first row; there is nothing to keep
                for name in file_specs(manifest["layout"]):
                    (folder / name).unlink(missing_ok=True)
            finished = manifest is not None and manifest["rows_written"] == rows
            if not finished:
                fill(folder, manifest, request, rows, source, teacher, batch_size)
        return cls.open(folder, verify=finished)

    @classmethod
    def open(
        cls,
        folder: str | PathLike[str],
        *,
        data: Data | None = None,
        teacher: Teacher | None = None,
        fingerprint: str | None = None,
        verify: bool = True,
    ) -> Self:
        """Open a finished store.

        Args:
            folder: path of the store.
            data: the inputs that the store must have been built from, in the same form; None: not checked.
            teacher: the teacher that the store must have been built with; None: not checked.
            fingerprint: the string that was given for a callable teacher.
            verify: compare every byte with the checksums. This reads all the files once, about a second per gigabyte
                when they are in the page cache; if False, only their sizes and headers are checked.

        Raises:
            FileNotFoundError: if there is no store in the folder.
            ValueError: if the store is unfinished (the message says how many rows it holds) or damaged (the message
                names the file), or was built with other data or another teacher.
        """
        folder = Path(folder).absolute()
        manifest = read_manifest(folder)
        if manifest is None:
            raise FileNotFoundError(errno.ENOENT, "there is no teacher store here: no manifest", str(folder))
        written, rows = manifest["rows_written"], manifest["layout"]["shape"][0]
        if written < rows:
            then = "with the same arguments continues after them" if written else "starts again from the first row"
            raise ValueError(
                f"the store in {folder} is unfinished: it holds {written} of {rows} rows. TeacherStore.build {then}"
            )
        given: dict[str, object] = {}
        if data is not None:
            given["data"] = data_fingerprint(as_source(data))[1]
        if teacher is not None:
            given["teacher"] = teacher_fingerprint(teacher, fingerprint)
        check_same(folder, manifest["request"], given)
        check_files(folder, manifest, checksums=verify)
        return cls(folder, manifest)

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        """Use :meth:`build` or :meth:`open`."""
        layout = manifest["layout"]
        self.folder, self._checksum = folder, manifest_crc(manifest)
        self._shape, self._dtype = torch.Size(layout["shape"]), layout["dtype"]
        self._classes = None if layout["k"] is None else self._shape[-1]
        self._k, self._tail, self._zeros = layout["k"], layout["tail"], manifest["has_zeros"]
        self._temperatures = tuple(layout["temperatures"])
        files = manifest["files"]
        self._arrays = [open_map(folder / x, files[x]["header"], *spec) for x, spec in file_specs(layout).items()]

    def __getitem__(self, rows: RowIndex) -> SoftTargets:
        """Return the targets of some rows, copied into memory; indices may be negative.

        Args:
            rows: an index, a slice, a mask of all the rows, or a tensor, array or list of indices, of any shape.
                ``(rows, ...)``, as scikit-learn writes it, is the same as ``rows``.

        Raises:
            IndexError: if an index is outside the rows, or a mask has another length.
            TypeError: if ``rows`` is anything else.
        """
        # A batch of 64 takes 50 us. numpy's take checks the range and copies whole rows. torch's index_select takes 1.5
        # times as long, and as_tensor and .long() take 5 us each more than from_numpy and astype.
        # The rows are always copied, because writing to a tensor that shares the read-only map would end the process.
        if isinstance(rows, tuple) and len(rows) == 2 and rows[1] is Ellipsis:
            rows = rows[0]
        if isinstance(rows, slice):
            logits, *others = (array[rows].copy() for array in self._arrays)
        else:
            places = _as_indices(rows, self._shape[0])
            try:
                logits, *others = (array.take(places, 0) for array in self._arrays)
            except IndexError:
                raise IndexError(_out_of_range(places, self._shape[0])) from None
        indices = None if self._k is None else torch.from_numpy(others.pop(0).astype(np.int64))
        values = torch.from_numpy(logits)
        partitions = [torch.from_numpy(np.asarray(x)) for x in others]  # the log-partition of a single row is a number
        return SoftTargets(
            values.view(torch.bfloat16) if self._dtype == "bfloat16" else values,
            indices=indices,
            classes=self._classes,
            log_partitions=dict(zip(self._temperatures, partitions, strict=True)),
            tail=self._tail,
            zeros=self._zeros,
        )

    @property
    def shape(self) -> torch.Size:
        """Shape of the targets: rows first, classes last; a top-k store counts all C classes, not k."""
        return self._shape

    def __len__(self) -> int:
        return self._shape[0]

    def __repr__(self) -> str:
        top = ""
        if self._k is not None:
            temperatures = ", ".join(f"{t:g}" for t in self._temperatures)
            top = f", k={self._k}, tail={self._tail!r}, temperatures=({temperatures})"
        return f"TeacherStore({str(self.folder)!r}, shape={tuple(self._shape)}, dtype={self._dtype}{top})"

    def __reduce__(self) -> tuple[Callable[..., "TeacherStore"], tuple[type[Self], Path, int]]:
        return _reopen, (type(self), self.folder, self._checksum)


def _reopen(cls: type[TeacherStore], folder: Path, checksum: int) -> TeacherStore:
    """Open a pickled store by its path. The process that first opened the store has compared the checksums."""
    store = cls.open(folder, verify=False)
    if store._checksum != checksum:
        raise ValueError(f"the store in {folder} was replaced after it was pickled")
    return store


def _as_indices(rows: Any, count: int) -> NDArray[Any]:
    """Convert rows to indices for numpy's take; a mask becomes the indices at which it is True."""
    if isinstance(rows, tuple):
        types = ", ".join(type(x).__name__ for x in rows)
        raise TypeError(f"rows must be one index, a slice or a list of indices, got a tuple ({types})")
    if isinstance(rows, list) and not rows:
        return np.empty(0, np.int64)
    indices = rows.numpy(force=True) if isinstance(rows, Tensor) else np.asarray(rows)
    if indices.dtype == np.bool_ and indices.ndim:
        if indices.shape != (count,):
            raise IndexError(f"a mask must have one entry for each of the {count} rows, got shape {indices.shape}")
        return indices.nonzero()[0]
    if indices.dtype.kind not in "iu":
        raise TypeError(f"rows must be integers, a slice or a mask, got {type(rows).__name__} of {indices.dtype}")
    return indices.astype(np.int64, copy=False)


def _out_of_range(indices: NDArray[Any], count: int) -> str:
    first = indices[(indices < -count) | (indices >= count)].flat[0]
    return f"rows must be in [{-count}, {count}), since the store has {count} rows; got {first}"
