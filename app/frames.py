"""A dataset's frames as columns, and their images in order or by row, without lerobot and without torch.

LeRobotDataset answers one row at a time, opens a video file for each image and decodes all 50 images of an
image-encoded window. Here states, actions and padding are slices of arrays, and an image costs its own decoding.
"""

import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from app.columns import read_columns
from app.config import home
from app.dataset import SiteDataset
from app.dataset_meta import VECTORS, Camera
from app.stored_images import StoredImages
from app.video import VideoImages
from certs.errors import DatasetError, first_line

type Image = NDArray[np.uint8]
type Images = VideoImages | StoredImages
type Rows = Sequence[int] | NDArray[np.int64]

_COLUMNS = ("episode_index", "index", "timestamp", "task_index", *VECTORS)
# sha256 of files by path, size and time of change: a gigabyte takes a second, and rounds ask again.
_HASHES: dict[tuple[Path, int, int], str] = {}


class Frames:
    """The frames of some episodes; a row is a frame's number among them, in the order of their absolute index.

    That is the order of a LeRobotDataset of the same episodes. ``index``, ``episode``, ``task`` (a number into
    ``tasks``) and ``last`` (the row of its episode's last frame) are [rows]; ``state`` and ``action`` are [rows, 6] in
    degrees. ``cameras`` are the dataset's keys. Raises DatasetError, as all methods do, for files that are damaged, and
    here for a state or an action that is not finite: one step on it would make every weight NaN.
    """

    def __init__(self, dataset: SiteDataset, episodes: Sequence[int]) -> None:
        self._dataset = dataset
        columns, files = _read(dataset, sorted(episodes))
        self.index: NDArray[np.int64] = columns["index"]
        self.episode: NDArray[np.int64] = columns["episode_index"]
        self.state: NDArray[np.float32] = columns["observation.state"]
        self.action: NDArray[np.float32] = columns["action"]
        if (np.diff(self.index) <= 0).any():
            raise DatasetError(
                f"the files of {dataset.root} do not hold their frames in order: copy the dataset again, whole."
            )
        for key in VECTORS:
            broken = ~np.isfinite(columns[key]).all(axis=1)
            if broken.any():
                raise DatasetError(
                    f"episode {self.episode[broken][0]} of {dataset.root} holds values of {key} that are not finite: "
                    "delete or record the episode again."
                )
        self.last = np.searchsorted(self.episode, self.episode, "right") - 1
        numbers, self.task = np.unique(columns["task_index"], return_inverse=True)
        self.tasks = tuple(dataset.meta.tasks[number] for number in numbers)
        self.cameras = dataset.cameras
        recorded = {camera.key: camera for camera in dataset.meta.recorded}
        self._images: dict[str, Images] = {
            key: self._video_images(recorded[key], columns["timestamp"])
            if recorded[key].video
            else StoredImages(
                recorded[key], files, columns["file"], columns["position"], home() / "cache"
            )
            for key in self.cameras
        }

    def __len__(self) -> int:
        return len(self.index)

    def windows(self, rows: Rows, chunk: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Rows of the next ``chunk`` actions [B, chunk], and which of them are padding after the episode's end."""
        start = np.asarray(rows)[:, None]
        ahead, last = start + np.arange(chunk), self.last[start]
        return np.minimum(ahead, last), ahead > last

    def images(self, rows: Rows) -> dict[str, Image]:
        """Each camera's images of these rows, in any order: [B, 3, H, W]."""
        wanted = np.asarray(rows).tolist()
        with ThreadPoolExecutor(len(self._images)) as threads:
            found = threads.map(lambda images: images.fetch(wanted), self._images.values())
            return dict(zip(self._images, found, strict=True))

    def decode(self, rows: Rows | None = None) -> Iterator[tuple[int, dict[str, Image]]]:
        """One pass over these rows, which ascend, or over all: each row with its image [3, H, W] of each camera."""
        wanted = np.arange(len(self)) if rows is None else np.asarray(rows)
        if (np.diff(wanted) <= 0).any():
            raise ValueError("rows must ascend")
        ordered = {key: images.ordered(wanted.tolist()) for key, images in self._images.items()}
        # A thread for each camera, a row ahead: FFmpeg and numpy work outside of Python's lock, and so may the caller.
        with ThreadPoolExecutor(len(ordered)) as threads:
            ahead = {key: threads.submit(next, one, None) for key, one in ordered.items()}
            for row in wanted.tolist():
                found = {key: one.result() for key, one in ahead.items()}
                ahead = {key: threads.submit(next, one, None) for key, one in ordered.items()}
                yield row, cast("dict[str, Image]", found)

    def fingerprint(self) -> str:
        """sha256 of what decides the rows' images and tasks: the bytes of the files, and which of them are whose."""
        digest = sha256(json.dumps([self.tasks, self.cameras]).encode())
        for array in (self.index, self.task):
            digest.update(array.tobytes())
        for images in self._images.values():
            digest.update("".join(_hash(file) for file in images.files).encode())
            digest.update(images.file.tobytes())
            digest.update(images.place.tobytes())
        return digest.hexdigest()

    def _video_images(self, camera: Camera, timestamps: NDArray[np.float32]) -> VideoImages:
        episodes, which = np.unique(self.episode, return_inverse=True)
        clips = [
            next(
                clip
                for clip in self._dataset.meta.episodes[index].videos
                if clip.camera == camera.key
            )
            for index in episodes
        ]
        files = list(dict.fromkeys(clip.file for clip in clips))
        file = np.array([files.index(clip.file) for clip in clips])[which]
        start = np.array([clip.start for clip in clips])[which]
        paths = [self._dataset.root / name for name in files]
        return VideoImages(camera, paths, file, start + timestamps.astype(np.float64))


def _read(
    dataset: SiteDataset, episodes: Sequence[int]
) -> tuple[dict[str, NDArray[Any]], list[Path]]:
    """The columns of these episodes, with the number of each row's data file and its position in it, and the files."""
    files: list[Path] = []
    parts: list[dict[str, NDArray[Any]]] = []
    for name, chosen in dataset.meta.data_files(episodes).items():
        columns = read_columns(dataset.root / name, _COLUMNS)
        rows = np.flatnonzero(np.isin(columns["episode_index"], chosen))
        part = {key: values[rows] for key, values in columns.items()}
        parts.append({**part, "file": np.full(len(rows), len(files)), "position": rows})
        files.append(dataset.root / name)
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}, files


def _hash(path: Path) -> str:
    try:
        with path.open("rb") as file:
            stat = os.fstat(file.fileno())
            key = (path, stat.st_size, stat.st_mtime_ns)
            if key not in _HASHES:
                _HASHES[key] = file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DatasetError(
            f"{path} cannot be read ({first_line(error)}): copy the dataset again."
        ) from error
    return _HASHES[key]
