"""The image files of a dataset, opened and looked up the way lerobot will in training."""

import itertools
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from app.columns import read_columns
from app.dataset import TOLERANCE, SiteDataset
from app.dataset_meta import Camera
from app.stored_images import decode_image, read_encoded, verify_image
from app.video import Times, Video, nearest
from certs.errors import DatasetError, first_line

# The frame rates in use that are closest to each other, 24 and 25, are 4 per cent apart.
_RATE_TOLERANCE = 0.02
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
            with closing(Video(path, None, "SLICE")) as video:
                yield from _check_file(video, path, camera, dataset.fps, episodes)
        except DatasetError as error:
            yield str(error)


def _check_file(
    video: Video, path: Path, camera: Camera, fps: int, episodes: Mapping[int, Times]
) -> Iterator[str]:
    if abs(video.rate - fps) > _RATE_TOLERANCE * fps:
        yield (
            f"{path} runs at {video.rate:g} frames per second where meta/info.json says {fps}: "
            "correct the one that is wrong or record again."
        )
        return
    if video.size != (camera.height, camera.width):
        yield (
            f"{path} is {video.size[1]}x{video.size[0]} pixels where meta/info.json says "
            f"{camera.width}x{camera.height}: record the camera again."
        )
    images = {index: nearest(video.index.seconds, rows) for index, rows in episodes.items()}
    lacking = {index: int((off > TOLERANCE).sum()) for index, (_, off) in images.items()}
    short = [str(index) for index, count in lacking.items() if count]
    if short:
        named = ", ".join(short[:_NAMED]) + (", ..." if len(short) > _NAMED else "")
        yield (
            f"{path} lacks the images of {sum(lacking.values())} of {sum(map(len, episodes.values()))} frames "
            f"(episodes {named}): it was cut short or is of another recording, copy the dataset again."
        )
        return
    yield from _check_order(path, episodes, fps)
    every = np.sort(np.concatenate([numbers for numbers, _ in images.values()]))
    for number in (every[0], every[len(every) // 2], every[-1]):
        video.image(int(number))


def _check_order(path: Path, episodes: Mapping[int, Times], fps: int) -> Iterator[str]:
    """Two episodes with the same images: one of them goes with another one's joints, which nothing else would show."""
    ordered = sorted(episodes.items(), key=lambda item: float(item[1][0]))
    for (before, earlier), (after, later) in itertools.pairwise(ordered):
        if later[0] - earlier[-1] < 0.5 / fps:
            yield (
                f"{path} gives episodes {before} and {after} the same images from {later[0]:.2f} s on: "
                "copy the dataset again, whole."
            )


def check_images(path: Path, camera: Camera, frames: Mapping[int, int]) -> Iterator[str]:
    """Open every image of a camera that a data file holds for these episodes, given with their number of frames.

    Of each episode the first, the middle and the last are decoded in full.
    """
    broken: dict[int, list[str]] = {}
    try:
        for episode, frame, image in _images(path, camera.key):
            if count := frames.get(episode):
                try:
                    look = decode_image if frame in {0, count // 2, count - 1} else verify_image
                    look(image, camera)
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
    if key not in pq.read_schema(path).names:
        return
    columns = read_columns(path, ["episode_index", "frame_index"])
    images = itertools.chain.from_iterable(read_encoded(path, key))
    yield from zip(
        columns["episode_index"].tolist(), columns["frame_index"].tolist(), images, strict=True
    )
