"""Where a prefix cache keeps its rows: tensors of one shape and type, written once in order, then read in any order.

Three places: the policy's device, host memory, and a file. Each gives back the bytes that were written.
"""

import contextlib
import fcntl
import logging
import math
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from app.durable import sync
from certs.errors import StorageError

if TYPE_CHECKING:
    import torch

_SUFFIX = ".prefix"
# Files that nobody uses and that stay when another one is written: the last run's training and held-out frames.
_KEPT = 2
# Rows of SmolVLA are 3 MB each: a few reads at a time keep an NVMe disk busy, more do not help.
_READERS = 4

_log = logging.getLogger("flwr")


@dataclass(frozen=True)
class Layout:
    """``count`` rows of the shape ``row`` and the type ``dtype``, read to ``device``."""

    count: int
    row: tuple[int, ...]
    dtype: "torch.dtype"
    device: "torch.device"

    @property
    def row_bytes(self) -> int:
        return math.prod(self.row) * self.dtype.itemsize

    @property
    def size(self) -> int:
        """Bytes of all rows."""
        return self.count * self.row_bytes


def moved(array: "NDArray[Any] | torch.Tensor", device: "torch.device") -> "torch.Tensor":
    """``array`` on the device; from pinned memory the copy does not wait for the work before it."""
    import torch

    tensor = torch.as_tensor(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


class Store(Protocol):
    """Rows at slots 0 to count - 1; ``filled`` where they are there from the start."""

    filled: bool

    def write(self, first: int, values: "torch.Tensor") -> None:
        """Put the rows [n, *row] at ``first`` and on; called in ascending order, each slot once."""

    def finish(self) -> None:
        """All rows are written; called before the first read."""

    def read(self, slots: NDArray[np.int64]) -> "torch.Tensor":
        """The rows [n, *row] at these slots, on the layout's device."""

    def close(self) -> None:
        """Give the memory back; an unfinished file is removed."""


class DeviceStore:
    """Rows in the memory of the policy's device."""

    filled = False

    def __init__(self, layout: Layout) -> None:
        self._device = layout.device
        self._data: torch.Tensor | None = self._allocate(layout)

    @property
    def data(self) -> "torch.Tensor":
        """The rows [count, *row]. Raises ValueError once the store is closed."""
        if self._data is None:
            raise ValueError("the store is closed")
        return self._data

    def write(self, first: int, values: "torch.Tensor") -> None:
        self.data[first : first + len(values)] = values

    def finish(self) -> None:
        """Nothing is left to do."""

    def read(self, slots: NDArray[np.int64]) -> "torch.Tensor":
        return self.data.index_select(0, moved(slots, self.data.device))

    def close(self) -> None:
        if self._device.type == "cuda":
            import torch

            # Reads on another stream may still be under way.
            torch.cuda.synchronize(self._device)
        self._data = None

    def _allocate(self, layout: Layout) -> "torch.Tensor":
        import torch

        return torch.empty((layout.count, *layout.row), dtype=layout.dtype, device=layout.device)


class HostStore(DeviceStore):
    """Rows in host memory; where the device is a GPU, page-locked, so that it fetches each row without the CPU."""

    def __init__(self, layout: Layout) -> None:
        super().__init__(layout)
        self._locked = layout.device.type == "cuda" and self._lock()

    def read(self, slots: NDArray[np.int64]) -> "torch.Tensor":
        import torch

        if self._device.type == "cpu":
            return super().read(slots)
        data = self.data
        rows = torch.empty((len(slots), *data.shape[1:]), dtype=data.dtype, device=self._device)
        for place, slot in enumerate(slots.tolist()):
            rows[place].copy_(data[slot], non_blocking=True)
        return rows

    def close(self) -> None:
        if self._locked:
            import torch

            torch.cuda.synchronize(self._device)
            runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
            runtime.cudaHostUnregister(self.data.data_ptr())
            self._locked = False
        super().close()

    def _allocate(self, layout: Layout) -> "torch.Tensor":
        import torch

        # Taken at once: what others then find free, this process does not want later.
        return torch.empty((layout.count, *layout.row), dtype=layout.dtype).zero_()

    def _lock(self) -> bool:
        """Page-lock the rows where they are: torch's own pinned allocator rounds up to a power of two."""
        import torch

        with torch.cuda.device(self._device):
            runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
            error = runtime.cudaHostRegister(self.data.data_ptr(), self.data.nbytes, 0)
            if int(error) == 0:
                return True
            _log.warning(
                "%.1f GB of host memory could not be page-locked (CUDA error %d): fetching from the prefix cache "
                "is slower.",
                self.data.nbytes / 1e9,
                int(error),
            )
            # The runtime hands the error to whoever launches next; that is nobody else.
            with contextlib.suppress(RuntimeError):
                torch.zeros(1, device=self._device)
            return False


class DiskStore:
    """Rows in the file ``folder/key``, which a later process finds again.

    It has the rows' bytes, then a CRC-32 of each. It is written under another name, synced and renamed; one that is
    not whole is written anew. Read, not mapped: a disk that fails is then an error and not a signal, and what the
    kernel holds of the file does not count as this process's memory. ``StorageError`` when the disk refuses.
    """

    def __init__(
        self, folder: Path, key: str, layout: Layout, progress: Callable[[int, int], None]
    ) -> None:
        self._layout, self._path = layout, folder / f"{key}{_SUFFIX}"
        self._work = folder / f".{key}.{uuid4().hex}{_SUFFIX}.tmp"
        self._sums = np.zeros(layout.count, "<u4")
        self._file = -1
        self._pool = ThreadPoolExecutor(_READERS)
        try:
            with self._disk(), _locked(folder):
                self._file = self._reuse()
            self.filled = self._file >= 0 and self._whole(progress)
            if not self.filled:
                with self._disk(), _locked(folder):
                    self._file = self._create()
        except BaseException:
            self.close()
            raise

    def write(self, first: int, values: "torch.Tensor") -> None:
        import torch

        rows = values.contiguous().cpu().view(torch.uint8).reshape(len(values), -1).numpy()
        for slot, row in enumerate(rows, first):
            self._sums[slot] = zlib.crc32(row)
        self._put(rows.reshape(-1).data, first * self._layout.row_bytes)

    def finish(self) -> None:
        self._put(self._sums.view(np.uint8).data, self._layout.size)
        with self._disk():
            os.fsync(self._file)
            self._work.rename(self._path)
            sync(self._path.parent)
        # Readers share it from now on, and none removes it while one reads.
        fcntl.flock(self._file, fcntl.LOCK_SH)

    def read(self, slots: NDArray[np.int64]) -> "torch.Tensor":
        import torch

        layout = self._layout
        # From page-locked memory the copy does not wait; torch keeps the memory until it is done.
        pinned = layout.device.type == "cuda"
        rows = torch.empty((len(slots), *layout.row), dtype=layout.dtype, pin_memory=pinned)
        places = rows.view(torch.uint8).reshape(len(slots), -1).numpy()
        offsets = (slots * layout.row_bytes).tolist()
        with self._disk():
            for _ in self._pool.map(self._get, (place.data for place in places), offsets):
                pass
        return rows.to(layout.device, non_blocking=True)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        with contextlib.suppress(OSError):
            self._work.unlink()

    def _reuse(self) -> int:
        """The finished file, locked against removal and marked as used; -1 when there is none."""
        try:
            file = os.open(self._path, os.O_RDWR)
        except FileNotFoundError:
            return -1
        fcntl.flock(file, fcntl.LOCK_SH)
        os.utime(file)
        return file

    def _whole(self, progress: Callable[[int, int], None]) -> bool:
        """Whether the file holds each row as it was written; a damaged one is removed."""
        try:
            if self._sums_match(progress):
                return True
        except OSError:
            pass
        _log.warning("%s is damaged: the prefix cache is built again.", self._path)
        with self._disk():
            self._path.unlink(missing_ok=True)
        os.close(self._file)
        self._file = -1
        return False

    def _sums_match(self, progress: Callable[[int, int], None]) -> bool:
        """Takes as long as the disk takes to read the file."""
        layout = self._layout
        if os.fstat(self._file).st_size != layout.size + self._sums.nbytes:
            return False
        self._get(self._sums.view(np.uint8).data, layout.size)
        for slot, found in enumerate(self._pool.map(self._sum, range(layout.count))):
            if found != self._sums[slot]:
                return False
            progress(slot + 1, layout.count)
        return True

    def _sum(self, slot: int) -> int:
        row = bytearray(self._layout.row_bytes)
        self._get(memoryview(row), slot * self._layout.row_bytes)
        return zlib.crc32(row)

    def _create(self) -> int:
        """An empty file with its whole space taken, in place of files that were not used for longest."""
        needed = self._layout.size + self._sums.nbytes
        _evict(self._path.parent, needed)
        file = os.open(self._work, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        fcntl.flock(file, fcntl.LOCK_EX)
        self._file = file
        # A disk that is too small says so now and not after minutes.
        os.posix_fallocate(file, 0, needed)
        return file

    def _put(self, data: memoryview, offset: int) -> None:
        with self._disk():
            while data:
                count = os.pwrite(self._file, data, offset)
                data, offset = data[count:], offset + count

    def _get(self, into: memoryview, offset: int) -> None:
        while into:
            count = os.preadv(self._file, [into], offset)
            if count == 0:
                raise OSError(0, "it was cut short")
            into, offset = into[count:], offset + count

    @contextlib.contextmanager
    def _disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StorageError(
                f"The prefix cache in {self._path} cannot be kept ({error.strerror}): free space there, let "
                "VLAFLEET_HOME name another disk, or choose another prefix-cache."
            ) from error


def reclaimable(folder: Path) -> int:
    """Bytes of the files that the next :class:`DiskStore` in ``folder`` may remove to make room."""
    if not folder.is_dir():
        return 0
    return sum(path.stat().st_size for path in _idle(folder.glob(f"*{_SUFFIX}")))


def _evict(folder: Path, needed: int) -> None:
    """Remove what ended processes left half-written, and finished files, oldest use first, down to those kept."""
    for path in _idle(folder.glob(f".*{_SUFFIX}.tmp")):
        path.unlink()
    idle = sorted(_idle(folder.glob(f"*{_SUFFIX}")), key=lambda path: path.stat().st_mtime_ns)
    while idle and (len(idle) > _KEPT or _free(folder) < needed):
        idle.pop(0).unlink()


def _free(folder: Path) -> int:
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


def _idle(paths: Iterable[Path]) -> list[Path]:
    """Those of the files that no process uses."""
    idle = []
    for path in paths:
        try:
            file = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            idle.append(path)
        except BlockingIOError:
            pass
        finally:
            os.close(file)
    return idle


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Alone among the processes that open or remove files in ``folder``, which is made."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
