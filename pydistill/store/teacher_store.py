"""The store as its users see it: built, opened, indexed by rows, pickled as a path."""

import errno
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pydistill.store.building import fill
from pydistill.store.fingerprints import measure, teacher_fingerprint
from pydistill.store.layout import file_specs
from pydistill.store.manifest import check_files, check_holds_nothing, manifest_crc, open_map, read_manifest
from pydistill.store.request import check_request, check_same
from pydistill.store.sources import as_source
from pydistill.store.writer import locked
from pydistill.targets import SoftTargets


class TeacherStore:
    """A teacher's outputs for some data, in a folder: made by :meth:`build`, read by :meth:`open`.

    ``store[rows]`` gives the :class:`SoftTargets` of some rows, in the order of the data. They hold logits, so that one
    store serves every temperature and alpha: with ``k=None`` all of them; with ``k`` the k largest of each row, their
    classes, and the log-partition at each of ``temperatures``, which ``tail="bucket"`` needs at the loss's temperature.

    **On disk**: ``logits.npy``; for top-k also ``indices.npy`` (int32, ascending in a row) and one
    ``log_partition_<i>.npy`` (float64) per temperature; and ``manifest.json``. They are ordinary .npy files; bfloat16
    is stored as its bits in uint16, which the manifest says. They are memory-mapped read-only: processes share one copy
    in the page cache, and a pickled store is its path, so that DataLoader workers can have it.

    **Fingerprints** refuse a stale store. Of the data: a sha256 over dtype, shape and every byte of a tensor, an array,
    a TensorDataset, or all the batches of an iterable, which are read once more for it; of any other Dataset, and of a
    DataLoader that reads one in order, over 64 items at fixed places and the length alone. Only the inputs count, not
    the labels. Of the teacher: over names, dtypes, shapes and bytes in a module's ``state_dict()``, so a change in its
    code is not seen; over a classifier's pickle; over the numbers of SoftTargets. Of a callable nothing can be known:
    ``fingerprint=``, a string that you change with it, stands for it, and without one a warning says that it was not
    checked.

    **Checksums** (CRC-32, against accidents) cover every byte of every file.

    Numerics: logits are rounded to ``dtype``. Top-k logits in a half type have their row's largest subtracted first,
    which no divergence that takes a top-k teacher can see, and which keeps the likely classes exact; log-partitions
    move along with the rounding, so that the mass outside the k classes stays right to float64.

    Example:
        >>> import tempfile, torch, pydistill
        >>> from pydistill.store import TeacherStore
        >>> inputs, teacher = torch.randn(1000, 8), torch.nn.Linear(8, 50)
        >>> folder = tempfile.TemporaryDirectory()
        >>> store = TeacherStore.build(folder.name, teacher, inputs, k=10, temperatures=(1.0, 2.0), tail="bucket")
        >>> len(store), store.shape, store[torch.tensor([5, 900, -1])]
        (1000, torch.Size([1000, 50]), SoftTargets(shape=(3, 50), dtype=torch.float16, k=10, tail='bucket'))
        >>> store = TeacherStore.open(folder.name, data=inputs, teacher=teacher)  # the same, or an error
        >>> student_logits = torch.zeros(3, 50, requires_grad=True)
        >>> pydistill.distillation_loss(student_logits, store[:3], alpha=1.0, temperature=2.0).backward()
        >>> TeacherStore.open(folder.name, data=inputs + 1)
        Traceback (most recent call last):
        ...
        ValueError: the store in ... was built with other data: ...
        >>> folder.cleanup()
    """

    @classmethod
    def build(
        cls,
        folder,
        teacher,
        data,
        *,
        k=None,
        temperatures=(1.0,),
        tail="renormalize",
        dtype="float16",
        batch_size=256,
        fingerprint=None,
    ) -> "TeacherStore":
        """Run the teacher over the data and store what it says; or go on where an earlier call stopped.

        Rows are written as they come; memory holds one batch. Every second, and when an error stops the build, files
        and then the manifest are synced to disk. After a kill, a full disk or any error, the same call resumes at the
        last row that was recorded, and what it writes is byte for byte what one uninterrupted call writes (if the
        teacher computes the same from the same batch). For a finished store the same call opens it. A second process
        that builds in the same folder waits for the first (not on Windows).

        Args:
            folder: a path; made if missing. It must be empty or hold a store.
            teacher: one of

                - a module that maps a batch of inputs to logits ``(B, ..., C)``; it runs in eval mode (restored
                  afterwards) under ``torch.inference_mode``, and gets floating-point inputs in its own dtype;
                - a fitted scikit-learn or XGBoost classifier, for rows that it was not fitted on, as in
                  :func:`pydistill.teachers.teacher_outputs`;
                - :class:`SoftTargets` with a row per row of data, such as the out-of-fold ones of
                  :func:`pydistill.teachers.soft_targets`;
                - a callable that maps a batch, as the data has it, to logits or SoftTargets.
            data: the inputs: a tensor or array with a row per item (a tuple of them, columns of one length: its first);
                a Dataset; or an iterable of batches ``(rows, ...)`` that can be gone through again, such as a list or a
                DataLoader that does not shuffle. Of items and batches that are tuples or lists the first column is the
                input. An item of a list is a batch, not a row; one-dimensional items, such as a list of texts'
                tokens, are therefore refused: stack or pad them to ``(rows, length)``, or pass a Dataset.
            k: how many logits of each row to keep; None: all. A callable's top-k targets are stored as they are.
            temperatures: those at which log-partitions are stored, with ``k``.
            tail: as in :meth:`SoftTargets.from_topk`, with ``k``.
            dtype: "float32", "float16" or "bfloat16", for the logits.
            batch_size: rows per batch; iterables bring their own.
            fingerprint: a string that stands for a callable teacher when the store is used again.

        Raises:
            TypeError: data, batches or a teacher's output of another form.
            ValueError: an option outside its range; data that are empty, shuffled, different each time, or batches
                of one dimension; a row whose largest logit is not finite; a logit too large for ``dtype``; a folder
                that holds other files, or a store of other data, another teacher or other options (the message says
                which), or a damaged one.
            OSError: nothing more could be written, for instance on a full disk. Rows already recorded are safe. The
                space for all rows is claimed before the second batch, where the file system can do that.
        """
        request = check_request(k, temperatures, tail, dtype, batch_size)
        source = as_source(data, batch_size)
        rows, request["data"] = measure(source)
        request["teacher"] = teacher_fingerprint(teacher, fingerprint)
        folder = Path(folder).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder):
            manifest = read_manifest(folder)
            if manifest is None:
                check_holds_nothing(folder)
            elif manifest["rows_written"]:
                check_same(folder, manifest, request)
            else:  # stopped before the first row: nothing to keep, whatever it was to become
                for name in file_specs(manifest["layout"]):
                    (folder / name).unlink(missing_ok=True)
            finished = manifest is not None and manifest["rows_written"] == rows
            if not finished:
                fill(folder, manifest, request, rows, source, teacher, batch_size)
        return cls.open(folder, verify=finished)

    @classmethod
    def open(cls, folder, *, data=None, teacher=None, fingerprint=None, verify=True) -> "TeacherStore":
        """Open a finished store.

        Args:
            folder: its path.
            data: the inputs that the store must have been built from, in the same form; None: not checked.
            teacher: the teacher that it must have been built with; None: not checked.
            fingerprint: the string that was given for a callable teacher.
            verify: compare every byte with the checksums. That reads all the files once, about a second per gigabyte
                when they are in the page cache; without it only their sizes and headers are checked.

        Raises:
            FileNotFoundError: there is no store in the folder.
            ValueError: it is unfinished (the message says how many rows it holds), damaged (which file), or was built
                with other data or another teacher.
        """
        folder = Path(folder).absolute()
        manifest = read_manifest(folder)
        if manifest is None:
            raise FileNotFoundError(errno.ENOENT, "there is no teacher store here: no manifest", str(folder))
        written, rows = manifest["rows_written"], manifest["layout"]["shape"][0]
        if written < rows:
            then = "with the same arguments goes on from there" if written else "starts it anew"
            raise ValueError(
                f"the store in {folder} is unfinished: it holds {written} of {rows} rows. TeacherStore.build {then}"
            )
        given = {}
        if data is not None:
            given["data"] = measure(as_source(data))[1]
        if teacher is not None:
            given["teacher"] = teacher_fingerprint(teacher, fingerprint)
        check_same(folder, manifest, given)
        check_files(folder, manifest, checksums=verify)
        return cls(folder, manifest)

    def __init__(self, folder, manifest):
        """Use :meth:`build` or :meth:`open`."""
        layout = manifest["layout"]
        self.folder, self._checksum = folder, manifest_crc(manifest)
        self._shape, self._dtype = torch.Size(layout["shape"]), layout["dtype"]
        self._classes = None if layout["k"] is None else self._shape[-1]
        self._k, self._tail, self._zeros = layout["k"], layout["tail"], manifest["has_zeros"]
        self._temperatures = tuple(layout["temperatures"])
        files = manifest["files"]
        self._arrays = [open_map(folder / x, files[x]["header"], *spec) for x, spec in file_specs(layout).items()]

    def __getitem__(self, rows) -> SoftTargets:
        """The targets of some rows, copied into memory; indices may be negative.

        Args:
            rows: an index, a slice, a mask of all the rows, or a tensor, array or list of indices, of any shape.
                ``(rows, ...)``, as scikit-learn writes it, is the same.

        Raises:
            IndexError: an index outside the rows, or a mask of another length.
            TypeError: anything else.
        """
        # numpy's take checks the range and copies whole rows; torch's index_select takes half as long again, and
        # as_tensor and .long() 5 us each more than from_numpy and astype, of the 50 us that a batch of 64 takes.
        # Always a copy: writing to a tensor over a read-only map would end the process.
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
        indices = None
        if self._k is not None:
            indices, *others = others
            indices = torch.from_numpy(indices.astype(np.int64))
        logits = torch.from_numpy(logits)
        partitions = map(torch.from_numpy, map(np.asarray, others))  # that of a single row is a number
        return SoftTargets(
            logits.view(torch.bfloat16) if self._dtype == "bfloat16" else logits,
            indices=indices,
            classes=self._classes,
            log_partitions=dict(zip(self._temperatures, partitions, strict=True)),
            tail=self._tail,
            zeros=self._zeros,
        )

    @property
    def shape(self) -> torch.Size:
        """Shape of the targets: rows first, classes last; for a top-k store all classes count."""
        return self._shape

    def __len__(self) -> int:
        return self._shape[0]

    def __repr__(self) -> str:
        top = ""
        if self._k is not None:
            temperatures = ", ".join(f"{t:g}" for t in self._temperatures)
            top = f", k={self._k}, tail={self._tail!r}, temperatures=({temperatures})"
        return f"TeacherStore({str(self.folder)!r}, shape={tuple(self._shape)}, dtype={self._dtype}{top})"

    def __reduce__(self):
        return _reopen, (type(self), self.folder, self._checksum)


def _reopen(cls, folder, checksum):
    """What a pickle holds: the path. The checksums were compared by the process that opened the store first."""
    store = cls.open(folder, verify=False)
    if store._checksum != checksum:
        raise ValueError(f"the store in {folder} is another one than when it was pickled")
    return store


def _as_indices(rows, count):
    """Indices as numpy's take wants them: a mask as the places where it is true."""
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


def _out_of_range(indices, count) -> str:
    first = indices[(indices < -count) | (indices >= count)].flat[0]
    return f"rows must be in [{-count}, {count}), the store has {count}; got {first}"
