"""A teacher's outputs on disk: computed once, read in random batches by every epoch and every sweep."""

import errno
import hashlib
import json
import math
import os
import time
import warnings
import zlib
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from pydistill.soft_targets import SoftTargets, top_k

_MANIFEST, _PARTIAL_MANIFEST = "manifest.json", "manifest.json.partial"
_FORMAT = 1
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_NUMPY_DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}  # numpy has no bfloat16: its bits
_SHUFFLING = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)
_SAMPLED_ITEMS = 64
_CHUNK = 1 << 24  # bytes read or hashed at a time

# A kill loses at most this much work. Syncing the files and the manifest took 20 to 40 ms: after every batch, a small
# teacher's build took twice as long.
_SECONDS_BETWEEN_SYNCS = 1.0


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
    the labels. Of the teacher: over names, dtypes, shapes and bytes in its ``state_dict()``, so a change in its code
    is not seen. Of a teacher that is a callable nothing can be known, and nothing is checked.

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
    ) -> "TeacherStore":
        """Run the teacher over the data and store what it says; or go on where an earlier call stopped.

        Rows are written as they come; memory holds one batch. Every second, and when an error stops the build, files
        and then the manifest are synced to disk. After a kill, a full disk or any error, the same call resumes at the
        last row that was recorded, and what it writes is byte for byte what one uninterrupted call writes (if the
        teacher computes the same from the same batch). For a finished store the same call opens it. A second process
        that builds in the same folder waits for the first (not on Windows).

        Args:
            folder: a path; made if missing. It must be empty or hold a store.
            teacher: a module that maps a batch of inputs to logits ``(B, ..., C)``; it runs in eval mode (restored
                afterwards) under ``torch.inference_mode``. Or a callable that maps a batch, as the data has it, to
                logits or :class:`SoftTargets`: ``lambda x: SoftTargets.from_probs(forest.predict_proba(x))``.
            data: the inputs: a tensor or array with a row per item (a tuple of them: its first); a Dataset; or an
                iterable of batches that can be gone through again, such as a DataLoader that does not shuffle. Of
                items and batches that are tuples or lists the first column is the input.
            k: how many logits of each row to keep; None: all. A callable's top-k targets are stored as they are.
            temperatures: those at which log-partitions are stored, with ``k``.
            tail: as in :meth:`SoftTargets.from_topk`, with ``k``.
            dtype: "float32", "float16" or "bfloat16", for the logits.
            batch_size: rows per batch; iterables bring their own.

        Raises:
            TypeError: data, batches or a teacher's output of another form.
            ValueError: an option outside its range; data that are empty, shuffled, or different each time; a row whose
                largest logit is not finite; a logit too large for ``dtype``; a folder that holds other files, or a
                store of other data, another teacher or other options (the message says which), or a damaged one.
            OSError: nothing more could be written, for instance on a full disk. Rows already recorded are safe. The
                space for all rows is claimed before the second batch, where the file system can do that.
        """
        request = _check_request(k, temperatures, tail, dtype, batch_size)
        source = _source(data, batch_size)
        rows, request["data"] = _measure(source)
        request["teacher"] = _teacher_fingerprint(teacher)
        folder = Path(folder).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            manifest = _read_manifest(folder)
            if manifest is None:
                _check_holds_nothing(folder)
            elif manifest["rows_written"]:
                _check_same(folder, manifest, request)
            else:  # stopped before the first row: nothing to keep, whatever it was to become
                for name in _file_specs(manifest["layout"]):
                    (folder / name).unlink(missing_ok=True)
            finished = manifest is not None and manifest["rows_written"] == rows
            if not finished:
                _fill(folder, manifest, request, rows, source, teacher, batch_size)
        return cls.open(folder, verify=finished)

    @classmethod
    def open(cls, folder, *, data=None, teacher=None, verify=True) -> "TeacherStore":
        """Open a finished store.

        Args:
            folder: its path.
            data: the inputs that the store must have been built from, in the same form; None: not checked.
            teacher: the teacher that it must have been built with; None: not checked.
            verify: compare every byte with the checksums. That reads all the files once, about a second per gigabyte
                when they are in the page cache; without it only their sizes and headers are checked.

        Raises:
            FileNotFoundError: there is no store in the folder.
            ValueError: it is unfinished (the message says how many rows it holds), damaged (which file), or was built
                with other data or another teacher.
        """
        folder = Path(folder).absolute()
        manifest = _read_manifest(folder)
        if manifest is None:
            raise FileNotFoundError(errno.ENOENT, "there is no teacher store here: no manifest", str(folder))
        written, rows = manifest["rows_written"], manifest["layout"]["shape"][0]
        if written < rows:
            raise ValueError(
                f"the store in {folder} is unfinished: it holds {written} of {rows} rows. TeacherStore.build with the "
                "same arguments goes on from there"
            )
        given = {}
        if data is not None:
            given["data"] = _measure(_source(data))[1]
        if teacher is not None:
            given["teacher"] = _teacher_fingerprint(teacher)
        _check_same(folder, manifest, given)
        _check_files(folder, manifest, checksums=verify)
        return cls(folder, manifest)

    def __init__(self, folder, manifest):
        """Use :meth:`build` or :meth:`open`."""
        layout = manifest["layout"]
        self.folder, self._checksum = folder, _checksum(manifest)
        self._shape, self._dtype = torch.Size(layout["shape"]), layout["dtype"]
        self._classes = None if layout["k"] is None else self._shape[-1]
        self._k, self._tail, self._zeros = layout["k"], layout["tail"], manifest["has_zeros"]
        self._temperatures = tuple(layout["temperatures"])
        self._arrays = [_open_map(folder / name, *spec) for name, spec in _file_specs(layout).items()]

    def __getitem__(self, rows) -> SoftTargets:
        """The targets of some rows, copied into memory; indices may be negative.

        Args:
            rows: an index, a slice, a mask of all the rows, or a tensor, array or list of indices, of any shape.

        Raises:
            IndexError: an index outside the rows, or a mask of another length.
            TypeError: anything else.
        """
        # numpy's take checks the range and copies whole rows; torch's index_select takes half as long again, and
        # as_tensor and .long() 5 us each more than from_numpy and astype, of the 50 us that a batch of 64 takes.
        # Always a copy: writing to a tensor over a read-only map would end the process.
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


# Building ------------------------------------------------------------------------------------------------------------


def _fill(folder, manifest, request, rows, source, teacher, batch_size):
    writer = _Writer(folder, manifest, request, rows)
    try:
        with _runnable(teacher) as run:
            for inputs in _batches(source, writer.written, batch_size):
                if writer.written + len(inputs) > rows:
                    raise ValueError(f"data must give the {rows} rows that it has, got more")
                targets = _as_targets(run(inputs), writer.written, len(inputs))
                writer.append(_cut(targets, request))
        if writer.written < rows:
            raise ValueError(f"data must give the {rows} rows that it has, got {writer.written}")
        writer.sync()
    except BaseException:
        with suppress(OSError):  # what was recorded before stays valid, and the first error tells more
            writer.sync()
        raise
    finally:
        writer.close()


class _Writer:
    """Appends batches to the files of a store, and records in the manifest how far they are on disk."""

    def __init__(self, folder, manifest, request, rows):
        self._folder, self._request, self._rows = folder, request, rows
        self._files, self._layout, self._entries = {}, None, {}
        self._state = (0, {}, False)  # rows, checksums, zeros: one assignment, so that no interrupt can split them
        self._synced, self._sync_time = 0, time.monotonic()
        if manifest is None or not manifest["rows_written"]:
            return
        _check_files(folder, manifest, checksums=True)
        self._layout, self._entries = manifest["layout"], manifest["files"]
        self._synced = manifest["rows_written"]
        self._state = (
            self._synced,
            {name: entry["crc32"] for name, entry in self._entries.items()},
            manifest["has_zeros"],
        )
        self._files = {name: FileIO(folder / name, "r+") for name in self._entries}

    @property
    def written(self) -> int:
        return self._state[0]

    def append(self, targets):
        shape = [self._rows, *targets.shape[1:]]
        layout = _layout(targets, shape, self._request["dtype"])
        columns = _columns(targets, layout["dtype"], self.written)
        with _write_errors(self._folder):
            if self._layout is None:
                self._create(layout)
            elif layout != self._layout:
                raise ValueError(
                    f"teacher must give outputs of one form; at row {self.written} they became {layout}, after "
                    f"{self._layout}"
                )
            written, checksums, zeros = self._state
            checksums = dict(checksums)
            for name, column in columns.items():
                entry, content = self._entries[name], memoryview(_bytes(column))
                _write_at(self._files[name], entry["header"] + written * entry["row_bytes"], content)
                checksums[name] = zlib.crc32(content, checksums[name])
            self._state = (written + len(targets), checksums, zeros or targets.has_zeros)
        if time.monotonic() - self._sync_time >= _SECONDS_BETWEEN_SYNCS:
            self.sync()

    def sync(self):
        """Everything appended so far to disk, then the manifest that says so."""
        if self.written == self._synced:
            return
        with _write_errors(self._folder):
            for file in self._files.values():
                os.fsync(file.fileno())
            self._write_manifest()
        self._synced, self._sync_time = self.written, time.monotonic()

    def close(self):
        for file in self._files.values():
            file.close()

    def _create(self, layout):
        """The files, at their full size. The manifest comes first, as the sign that the folder is a store's."""
        self._layout = layout
        self._write_manifest()
        checksums = {}
        try:
            for name, (dtype, shape) in _file_specs(layout).items():
                empty = np.lib.format.open_memmap(self._folder / name, mode="w+", dtype=dtype, shape=shape)
                header, row_bytes = empty.offset, empty[0].nbytes
                del empty
                file = self._files[name] = FileIO(self._folder / name, "r+")
                _claim(file, header + shape[0] * row_bytes)
                file.seek(0)
                checksums[name] = zlib.crc32(file.read(header))
                self._entries[name] = {"header": header, "row_bytes": row_bytes}
        except OSError:
            for name in _file_specs(layout):  # they hold nothing yet, and their space may be what others lack
                (self._folder / name).unlink(missing_ok=True)
            raise
        self._state = (0, checksums, False)

    def _write_manifest(self):
        written, checksums, zeros = self._state
        _replace_manifest(
            self._folder,
            {
                "format": _FORMAT,
                "request": self._request,
                "layout": self._layout,
                "rows_written": written,
                "has_zeros": zeros,
                "files": {name: entry | {"crc32": checksums[name]} for name, entry in self._entries.items()},
            },
        )


def _write_at(file, offset, content):
    file.seek(offset)
    while content:
        content = content[file.write(content) :]


def _claim(file, size):
    """Space for the whole file, now: a full disk should stop the build before the teacher has run for hours."""
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # a file system that cannot do it
            raise


@contextmanager
def _write_errors(folder):
    try:
        yield
    except OSError as error:
        raise OSError(
            error.errno,
            f"{error.strerror or error}, while writing the teacher store; what was recorded is safe, and "
            "TeacherStore.build with the same arguments goes on from there",
            str(folder),
        ) from error


@contextmanager
def _locked(folder):
    """One builder at a time. The system drops the lock with the process, however it ends."""
    if os.name != "posix":
        yield
        return
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@contextmanager
def _runnable(teacher):
    """The teacher as a function of a batch; a module's modes are restored one by one."""

    def run_callable(inputs):
        with torch.no_grad():
            return teacher(inputs)

    def run_module(inputs):  # inference mode here only: a Dataset that keeps tensors must not get such ones
        with torch.inference_mode():
            return teacher(inputs if isinstance(inputs, Tensor) else torch.tensor(inputs))

    if not isinstance(teacher, torch.nn.Module):
        yield run_callable
        return
    before = [(m, m.training) for m in teacher.modules()]
    teacher.eval()
    try:
        yield run_module
    finally:
        for m, mode in before:
            m.training = mode


# What the teacher says -----------------------------------------------------------------------------------------------


def _as_targets(output, first, rows) -> SoftTargets:
    """A batch's output, checked; ``first`` is the number of its first row."""
    if not isinstance(output, SoftTargets | Tensor | np.ndarray):
        raise TypeError(f"teacher must return logits or SoftTargets, got {type(output).__name__}")
    targets = output if isinstance(output, SoftTargets) else SoftTargets.from_logits(output)
    shape = tuple(targets.shape)
    if len(shape) < 2 or shape[0] != rows or 0 in shape:
        raise ValueError(f"teacher must give (rows, ..., classes) for a batch of {rows} rows, got shape {shape}")
    largest = targets.logits.amax(-1)
    if not largest.isfinite().all():
        at = tuple((~largest.isfinite()).nonzero()[0])
        raise ValueError(
            f"teacher must give a finite largest logit in every row; that of row {first + int(at[0])} is {largest[at]}"
        )
    if first == 0 and targets is not output and _look_like_probabilities(targets.logits):
        warnings.warn(
            "the teacher's outputs look like probabilities (>= 0, and their rows sum to 1), but are stored as logits; "
            "return pydistill.SoftTargets.from_probs(...) instead",
            UserWarning,
            stacklevel=4,
        )
    return targets


def _look_like_probabilities(logits) -> bool:
    return bool((logits >= 0).all() and ((logits.double().sum(-1) - 1).abs() < 1e-2).all() and logits.shape[-1] > 1)


def _cut(targets, request) -> SoftTargets:
    k = request["k"]
    if k is None:
        return targets
    if targets.indices is None:
        return top_k(targets.logits, k, request["temperatures"], tail=request["tail"])
    if targets.indices.shape[-1] != k:
        raise ValueError(f"k must be None or the teacher's own {targets.indices.shape[-1]}, got {k}")
    return targets


def _layout(targets, shape, dtype) -> dict:
    """What the manifest says about the form of the outputs."""
    return {
        "shape": shape,
        "dtype": dtype,
        "k": None if targets.indices is None else targets.indices.shape[-1],
        "temperatures": list(targets.log_partitions),
        "tail": targets.tail,
    }


def _file_specs(layout) -> dict:
    """The files that a layout has: their dtypes and shapes."""
    shape, k, dtype = tuple(layout["shape"]), layout["k"], _NUMPY_DTYPES[layout["dtype"]]
    if k is None:
        return {"logits.npy": (dtype, shape)}
    specs = {"logits.npy": (dtype, (*shape[:-1], k)), "indices.npy": (np.int32, (*shape[:-1], k))}
    for i in range(len(layout["temperatures"])):
        specs[f"log_partition_{i}.npy"] = (np.float64, shape[:-1])
    return specs


def _columns(targets, dtype, first) -> dict:
    """A batch as the arrays that the files get."""
    logits = targets.logits.cpu()
    if targets.indices is not None and dtype != "float32":
        logits = logits - logits.amax(-1, keepdim=True)
    rounded = logits.to(_DTYPES[dtype])
    lost = rounded.isinf() & logits.isfinite()
    if lost.any():
        at = tuple(lost.nonzero()[0])
        raise ValueError(
            f"dtype must hold the teacher's logits: {logits[at]:g} in row {first + int(at[0])} is infinite in {dtype}; "
            'use "bfloat16" or "float32"'
        )
    bits = rounded.contiguous().view(torch.uint16) if dtype == "bfloat16" else rounded.contiguous()
    columns = {"logits.npy": bits.numpy()}
    if targets.indices is None:
        return columns
    columns["indices.npy"] = targets.indices.cpu().to(torch.int32).contiguous().numpy()
    for i, (t, partition) in enumerate(targets.log_partitions.items()):
        # The rest of the mass is -expm1(log-sum-exp of the k - log-partition): move both by what rounding did to one.
        exact, stored = ((x.double() / t).logsumexp(-1) for x in (targets.logits.cpu(), rounded))
        columns[f"log_partition_{i}.npy"] = (partition.cpu() + (stored - exact)).contiguous().numpy()
    return columns


# The data ------------------------------------------------------------------------------------------------------------


def _source(data, batch_size=256):
    """What data stands for: a tensor or array, a Dataset, or an iterable of batches that starts anew each time."""
    if isinstance(data, tuple) and data and not isinstance(data[0], tuple | list):
        data = data[0]
    if isinstance(data, DataLoader):
        _check_order(data)
    elif isinstance(data, IterableDataset):
        return DataLoader(data, batch_size=batch_size, generator=torch.Generator())
    data = _in_memory(data)
    if isinstance(data, Tensor | np.ndarray):
        if data.ndim == 0 or len(data) == 0:
            raise ValueError(f"data must have at least one row, got shape {tuple(data.shape)}")
    elif isinstance(data, Dataset):
        if len(data) == 0:
            raise ValueError("data must have at least one item, got an empty Dataset")
    elif not hasattr(data, "__iter__"):
        raise TypeError(
            f"data must be a tensor, an array, a Dataset or an iterable of batches, got {type(data).__name__}"
        )
    elif hasattr(data, "__next__"):
        raise ValueError(
            f"data must be an iterable that starts anew each time, such as a DataLoader or a list of batches; got the "
            f"iterator {type(data).__name__}, which runs out"
        )
    return data


def _in_memory(data):
    """The tensor that a TensorDataset has as its inputs; other data as they are."""
    return data.tensors[0] if isinstance(data, TensorDataset) else data


def _check_order(loader):
    for sampler in (loader.sampler, getattr(loader.batch_sampler, "sampler", None)):
        if isinstance(sampler, _SHUFFLING) or getattr(sampler, "shuffle", False) is True:
            raise ValueError(
                f"data must come in one order, in which the rows of the store are counted; this DataLoader shuffles "
                f"(its sampler is a {type(sampler).__name__}): pass one with shuffle=False"
            )


def _reads_in_order(loader) -> bool:
    """Whether a loader's rows are its dataset's items, each once and in their order."""
    batches = loader.batch_sampler
    return (
        type(batches) is BatchSampler
        and not batches.drop_last
        and type(batches.sampler) is SequentialSampler
        and batches.sampler.data_source is loader.dataset
    )


def _measure(source) -> tuple[int, str]:
    """The number of rows, and the fingerprint."""
    if isinstance(source, DataLoader) and _reads_in_order(source):
        source = _in_memory(source.dataset)
    if isinstance(source, Dataset):
        first, second = _sample_digest(source), _sample_digest(source)
        if first != second:
            raise ValueError(
                "data must give the same items each time; this Dataset does not. Does it augment at random? A stored "
                "target belongs to one input"
            )
        return len(source), f"a sample of {len(source)} items, sha256 {first}"
    digest, rows, form = hashlib.sha256(), 0, None
    for inputs in [source] if isinstance(source, Tensor | np.ndarray) else map(_first_column, source):
        if form not in (None, _form(inputs)):
            raise ValueError(f"data must have rows of one dtype and shape, got {_form(inputs)} after {form}")
        form = _form(inputs)
        _hash(digest, inputs)
        rows += len(inputs)
    if rows == 0:
        raise ValueError("data must give at least one row, got none")
    digest.update(form.encode())
    return rows, f"all of {rows} rows, sha256 {digest.hexdigest()[:32]}"


def _sample_digest(dataset) -> str:
    digest, last = hashlib.sha256(), len(dataset) - 1
    for i in sorted({j * last // (_SAMPLED_ITEMS - 1) for j in range(_SAMPLED_ITEMS)}):
        item = dataset[i]
        item = item[0] if isinstance(item, tuple | list) else item
        item = item if isinstance(item, Tensor) else np.asarray(item)
        digest.update(f"{i} {tuple(item.shape)} {_form(item[None])} ".encode())
        _hash(digest, item[None])
    return digest.hexdigest()[:32]


def _form(inputs) -> str:
    return f"{str(inputs.dtype).removeprefix('torch.')} {tuple(inputs.shape[1:])}"


def _hash(digest, rows):
    """The bytes of a tensor or array into a digest, some megabytes at a time."""
    if rows.dtype == object:
        raise TypeError("data must be numbers, got an array of Python objects")
    width = max(1, math.prod(rows.shape[1:]) * rows.itemsize)
    step = max(1, _CHUNK // width)
    for start in range(0, len(rows), step):
        digest.update(_bytes(rows[start : start + step]))


def _bytes(values):
    if isinstance(values, Tensor):
        return values.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8)


def _first_column(batch):
    inputs = batch[0] if isinstance(batch, tuple | list) and batch else batch
    if not isinstance(inputs, Tensor | np.ndarray) or inputs.ndim == 0:
        raise TypeError(
            f"data must give batches whose first column is a tensor or array of rows, got {type(inputs).__name__}"
        )
    return inputs


def _batches(source, start, batch_size):
    """The batches of inputs from row ``start`` on."""
    if isinstance(source, Tensor | np.ndarray):
        for first in range(start, len(source), batch_size):
            yield source[first : first + batch_size]
        return
    if isinstance(source, Dataset):
        rest = Subset(source, range(start, len(source)))
        source, start = DataLoader(rest, batch_size=batch_size, generator=torch.Generator()), 0
    for batch in source:
        inputs = _first_column(batch)
        skipped = min(start, len(inputs))
        start -= skipped
        if skipped < len(inputs):
            yield inputs[skipped:] if skipped else inputs


# The teacher's fingerprint, the manifest, the files ------------------------------------------------------------------


def _teacher_fingerprint(teacher) -> str:
    if not isinstance(teacher, torch.nn.Module):
        if not callable(teacher):
            raise TypeError(f"teacher must be a module or a callable, got {type(teacher).__name__}")
        return "a callable"
    digest = hashlib.sha256()
    for name, value in sorted(teacher.state_dict().items()):
        if isinstance(value, Tensor):  # extra state can be anything
            digest.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
            digest.update(_bytes(value))
    return f"a module, sha256 {digest.hexdigest()[:32]}"


def _checksum(manifest) -> int:
    return zlib.crc32(json.dumps(manifest, sort_keys=True).encode())


def _read_manifest(folder) -> dict | None:
    try:
        content = (folder / _MANIFEST).read_bytes()
    except FileNotFoundError:
        return None
    try:
        manifest = json.loads(content)
        checksum = manifest.pop("checksum")
    except (ValueError, LookupError, TypeError, AttributeError):
        manifest = checksum = None
    if manifest is None or checksum != _checksum(manifest):
        raise ValueError(_damaged(folder, _MANIFEST, "is no manifest, or was changed"))
    if manifest["format"] != _FORMAT:
        raise ValueError(f"the store in {folder} has format {manifest['format']}; this version reads {_FORMAT}")
    return manifest


def _replace_manifest(folder, manifest):
    """Whole or not at all, and on disk when this returns."""
    with open(folder / _PARTIAL_MANIFEST, "w") as file:
        json.dump(manifest | {"checksum": _checksum(manifest)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(folder / _PARTIAL_MANIFEST, folder / _MANIFEST)
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _check_holds_nothing(folder):
    others = sorted(path.name for path in folder.iterdir() if path.name != _PARTIAL_MANIFEST)
    if others:
        raise ValueError(f"folder must be empty or hold a teacher store; {folder} holds {', '.join(others[:5])}")


def _check_same(folder, manifest, given):
    there = manifest["request"]
    differ = [name for name, value in given.items() if there[name] != value]
    if differ:
        details = "; ".join(f"{name}: {there[name]!r} there, {given[name]!r} here" for name in differ)
        raise ValueError(
            f"the store in {folder} was built with other {' and '.join(differ)}: {details}. Build into another folder, "
            "or delete this one"
        )


def _check_files(folder, manifest, *, checksums):
    """The sizes of the files, and, if wanted, the checksums of the rows written so far."""
    written, rows = manifest["rows_written"], manifest["layout"]["shape"][0]
    for name, entry in manifest["files"].items():
        try:
            size = (folder / name).stat().st_size
        except FileNotFoundError:
            raise ValueError(_damaged(folder, name, "is missing")) from None
        expected = entry["header"] + rows * entry["row_bytes"]
        if size != expected:
            raise ValueError(_damaged(folder, name, f"has {size} bytes instead of {expected}"))
        if checksums and _file_crc(folder / name, entry["header"] + written * entry["row_bytes"]) != entry["crc32"]:
            raise ValueError(_damaged(folder, name, "does not have the bytes that were written (CRC-32)"))


def _file_crc(path, count) -> int:
    crc = 0
    with open(path, "rb", buffering=0) as file:
        while count and (chunk := file.read(min(count, _CHUNK))):
            crc, count = zlib.crc32(chunk, crc), count - len(chunk)
    return crc


def _damaged(folder, name, how) -> str:
    return f"the store in {folder} is damaged: {name} {how}. Delete the folder and build it again"


def _open_map(path, dtype, shape) -> np.ndarray:
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except ValueError:
        raise ValueError(_damaged(path.parent, path.name, "has no .npy header")) from None
    if array.dtype != dtype or array.shape != shape:
        raise ValueError(_damaged(path.parent, path.name, f"holds {array.dtype} {array.shape}"))
    return np.asarray(array)  # without memmap's own indexing, which is slower


# Arguments -----------------------------------------------------------------------------------------------------------


def _check_request(k, temperatures, tail, dtype, batch_size) -> dict:
    for name, value in (("k", k), ("batch_size", batch_size)):
        if value is None and name == "k":
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an integer, got {value!r}")
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if dtype not in _DTYPES:
        raise ValueError(f"dtype must be {', '.join(map(repr, _DTYPES))}; got {dtype!r}")
    if tail not in ("renormalize", "bucket"):
        raise ValueError(f'tail must be "renormalize" or "bucket", got {tail!r}')
    try:
        temperatures = list(dict.fromkeys(map(float, temperatures)))
    except TypeError:
        raise TypeError(f"temperatures must be a sequence of numbers, got {temperatures!r}") from None
    if not all(0 < t < math.inf for t in temperatures):
        raise ValueError(f"temperatures must be positive and finite, got {temperatures!r}")
    if tail == "bucket" and not temperatures:
        raise ValueError('temperatures must name at least one with tail="bucket", got none')
    if k is None:  # all the logits: the other two change nothing
        temperatures = tail = None
    return {"k": k, "temperatures": temperatures, "tail": tail, "dtype": dtype}


def _as_indices(rows, count):
    """Indices as numpy's take wants them: a mask as the places where it is true."""
    if isinstance(rows, tuple):
        raise TypeError(f"rows must be one index or a list of them, got the tuple {rows!r}")
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
