"""Images in video files: where each of them is, and decoded in order or from the key frame before it."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from threading import Lock
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from app.dataset import LOOKUP_TOLERANCE
from app.dataset_meta import Camera
from certs.errors import DatasetError, first_line

type Times = NDArray[np.float64]
type Image = NDArray[np.uint8]

# A jump empties the decoder, whose threads are some images ahead: it takes as long as decoding four images more
# (measured on h264 and AV1 of 480x640 as lerobot writes them, with a key frame every second image).
_AHEAD = 4
# Files that a decoder keeps open, a few MB each; recordings put hours into one, conversions a minute.
_OPEN = 4
# Decoders of single rows for a camera: eight give a thousand images of 480x640 a second, given as many cores.
_DECODERS = 8


@dataclass(frozen=True)
class VideoIndex:
    """Where a file's images are, in the order they are shown.

    ``pts`` [images] in the stream's unit, ``seconds`` [images], ``key`` [images]: the number of the key frame from
    which each can be decoded.
    """

    pts: NDArray[np.int64]
    seconds: Times
    key: NDArray[np.int64]


def _read_index(container: Any, stream: Any) -> VideoIndex:
    packets = sorted(
        (packet.pts, packet.is_keyframe)
        for packet in container.demux(stream)
        # The last packet of a file that was cut is there in part.
        if packet.size and packet.pts is not None and not packet.is_corrupt
    )
    pts = np.array([pts for pts, _ in packets], np.int64)
    keys = np.array([key for _, key in packets], bool)
    unit = stream.time_base
    return VideoIndex(
        pts=pts,
        seconds=pts * unit.numerator / unit.denominator,
        key=np.maximum.accumulate(np.where(keys, np.arange(len(pts)), 0)),
    )


def nearest(images: Times, wanted: Times) -> tuple[NDArray[np.int64], Times]:
    """Number of, and seconds to, the image that is closest to each ``wanted`` second; ``images`` ascend."""
    edges = np.concatenate(([-np.inf], images, [np.inf]))
    after = np.searchsorted(edges, wanted)
    before, behind = wanted - edges[after - 1], edges[after] - wanted
    return after - 1 - (before <= behind), np.minimum(before, behind)


class Video:
    """A video file, open until ``close``; for one thread at a time.

    ``threads`` is FFmpeg's: "SLICE" answers a single image soonest, "AUTO" also decodes several at a time.
    Raises DatasetError, as its methods do, for a file that cannot be read.
    """

    def __init__(
        self, path: Path, index: VideoIndex | None, threads: Literal["SLICE", "AUTO"]
    ) -> None:
        import av
        from av.video.reformatter import VideoReformatter

        self._path = path
        # One for all images: each has tables of its own to set up, which take as long as converting an image.
        self._reformatter = VideoReformatter()
        try:
            self._container = av.open(str(path))
            self._stream = self._container.streams.video[0]
            self._stream.thread_type = threads
            self.index = index or _read_index(self._container, self._stream)
        # FFmpeg's errors are ValueErrors and OSErrors; a file without a video stream is an IndexError.
        except (OSError, ValueError, IndexError) as error:
            raise self._unreadable(error) from error
        self._decoded: Iterator[Any] = iter(())
        # The image that was decoded last, and its number.
        self._image: Any = None
        self._at = -1

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self._stream.height, self._stream.width

    @property
    def rate(self) -> float:
        """Frames per second, on average."""
        return float(self._stream.average_rate or 0)

    def close(self) -> None:
        self._container.close()

    def image(self, number: int) -> Image:
        """The image of this number in the index, [3, H, W] in RGB."""
        if self._image is None or number != self._at:
            self._go(number)
        image = self._reformatter.reformat(self._image, format="rgb24").to_ndarray()
        if image.shape[:2] != self.size:
            raise self._unreadable(ValueError("its images differ in size"))
        return np.ascontiguousarray(image.transpose(2, 0, 1))

    def _go(self, number: int) -> None:
        """Decode up to this image, from where the file stands or from the key frame before it."""
        key = int(self.index.key[number])
        near = self._image is not None and self._at < number and key <= self._at + _AHEAD
        try:
            if near and self._decode(number):
                return
            # A key frame may turn out to lie behind its place in the file; the file's start never does.
            for start in (key, 0):
                self._container.seek(int(self.index.pts[start]), stream=self._stream)
                self._decoded = self._container.decode(self._stream)
                if self._decode(number):
                    return
        except (OSError, ValueError) as error:
            raise self._unreadable(error) from error
        second = self.index.seconds[number]
        raise self._unreadable(ValueError(f"the image at {second:.2f} s cannot be decoded"))

    def _decode(self, number: int) -> bool:
        """Decode on until this image; false where it does not come."""
        wanted = int(self.index.pts[number])
        for frame in self._decoded:
            if frame.pts is not None and frame.pts >= wanted:
                self._image, self._at = frame, number
                return bool(frame.pts == wanted)
        self._image = None
        return False

    def _unreadable(self, error: Exception) -> DatasetError:
        return DatasetError(
            f"{self._path} cannot be read ({first_line(error)}): copy it again, or record the episodes again."
        )


class VideoImages:
    """One camera's images of rows that lie in video files: ``file`` [rows] numbers ``files``, ``seconds`` [rows] in it.

    Raises DatasetError where a file cannot be read, has other images than the camera, or lacks a row's.
    """

    def __init__(
        self, camera: Camera, files: Sequence[Path], file: NDArray[np.int64], seconds: Times
    ) -> None:
        self.files = tuple(files)
        self._camera, self.file, self.place = camera, file, seconds
        # The number of each row's image in its file; known for the files that have an index.
        self._number = np.zeros(len(file), np.int64)
        self._indexes: dict[int, VideoIndex] = {}
        # The files that each decoder of single rows has open, the one it used last at the end.
        self._decoders: list[dict[int, Video]] = [
            {} for _ in range(min(_DECODERS, len(os.sched_getaffinity(0))))
        ]
        self._lock = Lock()

    def ordered(self, rows: Sequence[int]) -> Iterator[Image]:
        """The images of these rows, [3, H, W] each; cheapest where they ascend."""
        for file, group in groupby(rows, key=lambda row: int(self.file[row])):
            with closing(self._open(file, "AUTO")) as video:
                for row in group:
                    yield video.image(int(self._number[row]))

    def fetch(self, rows: Sequence[int]) -> Image:
        """The images of these rows, in any order, [rows, 3, H, W]."""
        wanted = np.asarray(rows)
        images = np.empty((len(wanted), 3, self._camera.height, self._camera.width), np.uint8)
        # Images that are close to each other go to the same decoder.
        order = np.lexsort((self.place[wanted], self.file[wanted]))

        def read(decoder: dict[int, Video], places: NDArray[np.int64]) -> None:
            for place in places.tolist():
                video = self._kept(decoder, int(self.file[wanted[place]]))
                images[place] = video.image(int(self._number[wanted[place]]))

        parts = np.array_split(order, len(self._decoders))
        with self._lock, ThreadPoolExecutor(len(parts)) as threads:
            for _ in threads.map(read, self._decoders, parts):
                pass
        return images

    def _kept(self, decoder: dict[int, Video], file: int) -> Video:
        video = decoder.pop(file, None) or self._open(file, "SLICE")
        decoder[file] = video
        if len(decoder) > _OPEN:
            decoder.pop(next(iter(decoder))).close()
        return video

    def _open(self, file: int, threads: Literal["SLICE", "AUTO"]) -> Video:
        path, camera = self.files[file], self._camera
        video = Video(path, self._indexes.get(file), threads)
        if video.size != (camera.height, camera.width):
            raise DatasetError(
                f"{path} is {video.size[1]}x{video.size[0]} pixels where meta/info.json says "
                f"{camera.width}x{camera.height}: record the camera again."
            )
        if file not in self._indexes:
            rows = self.file == file
            numbers, off = nearest(video.index.seconds, self.place[rows])
            if lacking := int((off > LOOKUP_TOLERANCE).sum()):
                raise DatasetError(
                    f"{path} lacks the images of {lacking} of {len(off)} frames: "
                    "it was cut short or is of another recording, copy the dataset again."
                )
            self._number[rows] = numbers
            self._indexes[file] = video.index
        return video
