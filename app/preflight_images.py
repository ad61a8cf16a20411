"""The image files of a dataset, opened and looked up the way lerobot will in training."""

import io
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from app.dataset import TOLERANCE, SiteDataset
from app.dataset_meta import Camera
from certs.errors import first_line

type Times = NDArray[np.float64]

# The frame rates in use that are closest to each other, 24 and 25, are 4 per cent apart.
_RATE_TOLERANCE = 0.02
# Rows whose images are in memory at a time: 64 images of 1 MB are little beside a process that will train.
_ROWS = 64
# Episodes that a sentence names.
_NAMED = 5


def check_video(dataset: SiteDataset, camera: Camera, times: Mapping[int, Times]) -> Iterator[str]:
    """Open each video of a camera and find every frame's image; ``times`` are the timestamps of the episodes' rows."""
    wanted: dict[Path, dict[int, Times]] = {}
    for index, rows in times.items():
        for clip in dataset.meta.episodes[index].videos:
            if clip.camera == camera.key:
                wanted.setdefault(clip.file, {})[index] = clip.start + rows
    for file, episodes in wanted.items():
        path = dataset.root / file
        try:
            yield from _check_file(path, camera, dataset.fps, episodes)
        # FFmpeg's errors are ValueErrors and OSErrors; a file without a video stream is an IndexError.
        except (OSError, ValueError, IndexError) as error:
            yield f"{path} cannot be read ({first_line(error)}): copy it again, or record the episodes again."


def _check_file(
    path: Path, camera: Camera, fps: int, episodes: Mapping[int, Times]
) -> Iterator[str]:
    import av

    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        images = np.sort(
            [
                float(packet.pts * stream.time_base)
                for packet in container.demux(stream)
                # The last packet of a file that was cut is there in part.
                if packet.size and packet.pts is not None and not packet.is_corrupt
            ]
        )
        rate = float(stream.average_rate or 0)
        if abs(rate - fps) > _RATE_TOLERANCE * fps:
            yield (
                f"{path} runs at {rate:g} frames per second where meta/info.json says {fps}: "
                "correct the one that is wrong or record again."
            )
            return
        if (stream.height, stream.width) != (camera.height, camera.width):
            yield (
                f"{path} is {stream.width}x{stream.height} pixels where meta/info.json says "
                f"{camera.width}x{camera.height}: record the camera again."
            )
        lacking = {index: _missing(images, rows) for index, rows in episodes.items()}
        short = [str(index) for index, count in lacking.items() if count]
        if short:
            named = ", ".join(short[:_NAMED]) + (", ..." if len(short) > _NAMED else "")
            yield (
                f"{path} lacks the images of {sum(lacking.values())} of {sum(map(len, episodes.values()))} frames "
                f"(episodes {named}): it was cut short or is of another recording, copy the dataset again."
            )
            return
        yield from _check_order(path, episodes, fps)
        every = np.sort(np.concatenate(list(episodes.values())))
        for second in (every[0], every[len(every) // 2], every[-1]):
            _decode(container, stream, float(second))


def _missing(images: Times, wanted: Times) -> int:
    """How many of the ``wanted`` seconds have no image within the tolerance; ``images`` ascend."""
    edges = np.concatenate(([-np.inf], images, [np.inf]))
    after = np.searchsorted(edges, wanted)
    off = np.minimum(wanted - edges[after - 1], edges[after] - wanted)
    return int((off > TOLERANCE).sum())


def _check_order(path: Path, episodes: Mapping[int, Times], fps: int) -> Iterator[str]:
    """Two episodes with the same images: one of them goes with another one's joints, which nothing else would show."""
    ordered = sorted(episodes.items(), key=lambda item: float(item[1][0]))
    for (before, earlier), (after, later) in itertools.pairwise(ordered):
        if later[0] - earlier[-1] < 0.5 / fps:
            yield (
                f"{path} gives episodes {before} and {after} the same images from {later[0]:.2f} s on: "
                "copy the dataset again, whole."
            )


def _decode(container: Any, stream: Any, second: float) -> None:
    """Decode the image at this second, from the key frame before it, as lerobot does. Raises ValueError."""
    container.seek(round(second / stream.time_base) - 1, stream=stream)
    for frame in container.decode(stream):
        if frame.pts is not None and frame.pts * stream.time_base > second - TOLERANCE:
            return
    raise ValueError(f"the image at {second:.2f} s cannot be decoded")


def check_images(path: Path, camera: Camera, frames: Mapping[int, int]) -> Iterator[str]:
    """Open every image of a camera that a data file holds for these episodes, given with their number of frames.

    Of each episode the first, the middle and the last are decoded in full.
    """
    broken: dict[int, list[str]] = {}
    try:
        for episode, frame, image in _images(path, camera.key):
            if count := frames.get(episode):
                try:
                    _check_image(image, camera, whole=frame in {0, count // 2, count - 1})
                # Pillow raises a SyntaxError for a PNG with damaged chunks, else one of the others.
                except (OSError, SyntaxError, ValueError) as error:
                    broken.setdefault(episode, []).append(f"frame {frame}: {first_line(error)}")
    except (OSError, ValueError, LookupError, TypeError) as error:
        yield f"{path} does not hold {camera.key} as images ({first_line(error)}): record the dataset again."
        return
    for episode, errors in broken.items():
        yield (
            f"episode {episode} in {path} holds {len(errors)} images of {camera.key} that cannot be used "
            f"({errors[0]}): delete or record the episode again."
        )


def _images(path: Path, key: str) -> Iterator[tuple[int, int, bytes | None]]:
    """Episode, frame and encoded image of every row, none where there is no such column."""
    names = ["episode_index", "frame_index", key]
    with pq.ParquetFile(path) as file:
        if key not in file.schema_arrow.names:
            return
        for batch in file.iter_batches(batch_size=_ROWS, columns=names):
            columns = [batch[name].to_pylist() for name in names]
            for episode, frame, image in zip(*columns, strict=True):
                yield episode, frame, image["bytes"]


def _check_image(data: bytes | None, camera: Camera, *, whole: bool) -> None:
    """Raises OSError, SyntaxError or ValueError for an image that lerobot could not train on."""
    from PIL import Image

    if not data:
        raise ValueError("the image is not in the file")
    with Image.open(io.BytesIO(data)) as image:
        if (image.height, image.width) != (camera.height, camera.width):
            raise ValueError(
                f"it is {image.width}x{image.height} pixels, meta/info.json says {camera.width}x{camera.height}"
            )
        if whole:
            image.load()
        else:
            image.verify()
