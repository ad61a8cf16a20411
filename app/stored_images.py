"""Images in a dataset's data files: encoded bytes in a column, read in order, or by row from a copy."""

import io
import os
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain, groupby
from pathlib import Path
from threading import Lock
from typing import IO, TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from app.dataset_meta import Camera
from certs.errors import DatasetError, StorageError, first_line

if TYPE_CHECKING:
    import PIL.Image

type Image = NDArray[np.uint8]

# Rows whose images, 1 MB each or less, are in memory at a time, and the bytes of the file that are.
_ROWS = 16
_BUFFER = 1 << 20


def read_encoded(
    path: Path, key: str, groups: Sequence[int] | None = None
) -> Iterator[list[bytes | None]]:
    """A column's encoded images in order, a few rows at a time, of these row groups or of all.

    Raises OSError, ValueError, LookupError or TypeError for a file that does not hold them.
    """
    with pq.ParquetFile(path, buffer_size=_BUFFER, pre_buffer=False) as file:
        for batch in file.iter_batches(batch_size=_ROWS, row_groups=groups, columns=[key]):
            if not pa.types.is_struct(batch[key].type):
                raise TypeError(f"its values are of type {batch[key].type}")
            yield pc.struct_field(batch[key], "bytes").to_pylist()


def decode_image(data: bytes | None, camera: Camera) -> Image:
    """The image [3, H, W] as lerobot decodes it. Raises OSError, SyntaxError or ValueError where it cannot be used."""
    from PIL import ExifTags, ImageOps

    with _open(data) as image:
        image.load()
        if image.getexif().get(ExifTags.Base.Orientation) is not None:
            ImageOps.exif_transpose(image, in_place=True)
        _require(image, camera)
        return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def verify_image(data: bytes | None, camera: Camera) -> None:
    """Look at an image's header and checksums, without decoding it. Raises as :func:`decode_image` does."""
    with _open(data) as image:
        _require(image, camera)
        image.verify()


def _open(data: bytes | None) -> "PIL.Image.Image":
    from PIL import Image, UnidentifiedImageError

    if not data:
        raise ValueError("the image is not in the file")
    try:
        return Image.open(io.BytesIO(data))
    except UnidentifiedImageError:
        raise ValueError("it is in no image format") from None


def _require(image: "PIL.Image.Image", camera: Camera) -> None:
    if (image.height, image.width) != (camera.height, camera.width):
        raise ValueError(
            f"it is {image.width}x{image.height} pixels, meta/info.json says {camera.width}x{camera.height}"
        )
    if image.mode != "RGB":
        raise ValueError(f"it is of Pillow's mode {image.mode} in place of RGB")


class StoredImages:
    """One camera's images of rows in data files: ``file`` [rows] numbers ``files``, ``position`` [rows] its rows.

    parquet decompresses a whole row group, in lerobot's files an episode, for any of its rows. So a row group's encoded
    images are copied at its first use to a file below ``folder``, which has no name and goes with this object.
    Raises DatasetError where a file does not hold an image, StorageError where the copy finds no room.
    """

    def __init__(
        self,
        camera: Camera,
        files: Sequence[Path],
        file: NDArray[np.int64],
        position: NDArray[np.int64],
        folder: Path,
    ) -> None:
        self.files = tuple(files)
        self._camera, self.file, self.place = camera, file, position
        self._group = np.zeros(len(file), np.int64)
        # Each row group's first row in its file.
        self._first: list[NDArray[np.int64]] = []
        for number, path in enumerate(self.files):
            with _readable(path, camera), pq.ParquetFile(path) as opened:
                counts = [
                    opened.metadata.row_group(group).num_rows
                    for group in range(opened.num_row_groups)
                ]
            first = np.concatenate(([0], np.cumsum(counts)))
            rows = file == number
            self._group[rows] = np.searchsorted(first, position[rows], "right") - 1
            self._first.append(first)
        self._folder = folder
        self._copy: IO[bytes] | None = None
        self._offset, self._size = np.full(len(file), -1), np.zeros(len(file), np.int64)
        self._lock = Lock()
        # Pillow decodes outside of Python's lock.
        self._pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)))

    def ordered(self, rows: Sequence[int]) -> Iterator[Image]:
        """The images of these rows, which ascend, [3, H, W] each."""
        for found in self._encoded(rows):
            yield from self._pool.map(self._decode, *zip(*found, strict=True))

    def fetch(self, rows: Sequence[int]) -> Image:
        """The images of these rows, in any order, [rows, 3, H, W]."""
        images = np.empty((len(rows), 3, self._camera.height, self._camera.width), np.uint8)
        with self._lock:
            copy = self._copied(np.asarray(rows))

        def put(place: int, row: int) -> None:
            data = os.pread(copy.fileno(), int(self._size[row]), int(self._offset[row]))
            images[place] = self._decode(row, data)

        for _ in self._pool.map(put, range(len(rows)), rows):
            pass
        return images

    def _decode(self, row: int, data: bytes | None) -> Image:
        try:
            return decode_image(data, self._camera)
        # Pillow raises a SyntaxError for a PNG with damaged chunks, else one of the others.
        except (OSError, SyntaxError, ValueError) as error:
            raise DatasetError(
                f"{self.files[self.file[row]]} holds in row {self.place[row]} an image of {self._camera.key} that "
                f"cannot be used ({first_line(error)}): delete or record the episode again."
            ) from error

    def _encoded(self, rows: Sequence[int]) -> Iterator[list[tuple[int, bytes | None]]]:
        """These rows, which ascend, with their encoded images, a few at a time."""
        for (file, group), members in groupby(
            rows, key=lambda row: (int(self.file[row]), int(self._group[row]))
        ):
            wanted = {int(self.place[row]): row for row in members}
            place = int(self._first[file][group])
            with _readable(self.files[file], self._camera):
                for batch in read_encoded(self.files[file], self._camera.key, [group]):
                    found = [
                        (wanted.pop(place + number), data)
                        for number, data in enumerate(batch)
                        if place + number in wanted
                    ]
                    place += len(batch)
                    if found:
                        yield found
                    if not wanted:
                        break

    def _copied(self, rows: NDArray[np.int64]) -> IO[bytes]:
        """The copy, when it holds the row groups of these rows."""
        lacking = rows[self._offset[rows] < 0]
        groups = {(int(self.file[row]), int(self._group[row])) for row in lacking}
        try:
            if self._copy is None:
                self._folder.mkdir(parents=True, exist_ok=True)
                self._copy = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115
            for file, group in sorted(groups):
                members = np.flatnonzero((self.file == file) & (self._group == group)).tolist()
                for row, data in chain.from_iterable(self._encoded(members)):
                    self._offset[row], self._size[row] = self._copy.tell(), len(data or b"")
                    self._copy.write(data or b"")
            self._copy.flush()
        except OSError as error:
            self._copy = None
            self._offset[:] = -1
            raise StorageError(
                f"{self._folder} cannot hold a copy of the dataset's images ({first_line(error)}): make room there."
            ) from error
        return self._copy


@contextmanager
def _readable(path: Path, camera: Camera) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DatasetError(
            f"{path} does not hold {camera.key} as images ({first_line(error)}): record the dataset again."
        ) from error
