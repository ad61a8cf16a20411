"""A site's dataset: found, held against the federation's contract, and split, before torch or lerobot is imported.

LeRobot asks the hub for whatever is missing from a local dataset, creates directories on the way, and trains silently
on a wrong joint count. So everything it will need is checked here first, from ``meta/`` alone
(format: https://huggingface.co/docs/lerobot/lerobot-dataset-v3).
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from app import hub
from app.columns import read_columns
from app.dataset_meta import JOINTS, VECTORS, VERSION, Meta, read_meta
from certs.errors import DatasetError

if TYPE_CHECKING:
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

# Seconds by which a frame's timestamp may differ from its place and from its image: lerobot's own tolerance.
TOLERANCE = 1e-4
# lerobot looks images up in float32, which resolves 1.2e-4 s a thousand seconds into a video file: at its tolerance up
# to 7 % of the frames of long episodes there are refused. A millisecond still names one image.
LOOKUP_TOLERANCE = 1e-3
# Both, joined by "&", or one of them.
_FRAGMENT = re.compile(r"(?=.)(?:episodes=(\d+):(\d+))?(?:(?:^|(?<=\d)&)part=(\d+)/(\d+))?")


@dataclass(frozen=True)
class DatasetUri:
    """A directory, or ``owner/name`` on the hub, and which of its episodes.

    ``#episodes=A:B`` chooses a half-open range, ``#part=I/N`` one of N parts counted from 0, and
    ``#episodes=A:B&part=I/N`` a part of the range.
    """

    text: str
    source: Path | str
    span: tuple[int, int] | None
    part: tuple[int, int] | None = None


@dataclass(frozen=True)
class SiteDataset:
    """What a site trains and evaluates on; every file it needs was there when it was opened."""

    uri: str
    root: Path
    train_episodes: tuple[int, ...]
    held_out_episodes: tuple[int, ...]
    meta: Meta

    @property
    def episodes(self) -> tuple[int, ...]:
        """All chosen episodes, ascending."""
        return tuple(sorted(self.train_episodes + self.held_out_episodes))

    @property
    def fps(self) -> int:
        return self.meta.fps

    @property
    def cameras(self) -> tuple[str, ...]:
        """The contract's cameras that this dataset has, as dataset keys."""
        return self.meta.cameras

    @property
    def tasks(self) -> tuple[str, ...]:
        """The task sentences of the chosen episodes, sorted."""
        return tuple(
            sorted({task for index in self.episodes for task in self.meta.episodes[index].tasks})
        )

    def frames(self, episodes: Sequence[int]) -> int:
        """How many frames these episodes hold."""
        return sum(self.meta.episodes[index].frames for index in episodes)

    def lerobot(self, episodes: Sequence[int], chunk: int = 50) -> "LeRobotDataset":
        """These episodes as lerobot reads them: ``action`` is [chunk, 6] with ``action_is_pad``, images are uint8.

        ``chunk`` is the policy's chunk size in frames, 50 for SmolVLA.
        """
        from datasets.exceptions import DatasetsError
        from lerobot.datasets.lerobot_dataset import LeRobotDataset

        try:
            with readable(self):
                return LeRobotDataset(
                    "local/dataset",
                    root=self.root,
                    episodes=list(episodes),
                    delta_timestamps={"action": [step / self.fps for step in range(chunk)]},
                    tolerance_s=LOOKUP_TOLERANCE,
                    # torchcodec needs FFmpeg's libraries on the machine; PyAV brings its own.
                    video_backend="pyav",
                    return_uint8=True,
                )
        except DatasetsError as error:
            raise DatasetError(_unreadable(self, error)) from error


def parse_uri(text: str) -> DatasetUri:
    """Take a dataset URI apart. Raises DatasetError."""
    location, _, fragment = text.partition("#")
    span = part = None
    if "#" in text:
        match = _FRAGMENT.fullmatch(fragment)
        if match:
            span = (int(match[1]), int(match[2])) if match[1] else None
            part = (int(match[3]), int(match[4])) if match[3] else None
        if not match or any(low >= high for low, high in filter(None, (span, part))):
            raise DatasetError(
                f"dataset {text!r} ends in '#{fragment}': write '#episodes=A:B' for episodes A to B-1, with A below B, "
                "or '#part=I/N' for one of N parts, with I from 0 to N-1."
            )
    if location.startswith("hf:"):
        repository = location.removeprefix("hf:")
        if not hub.is_repository(repository):
            raise DatasetError(
                f"dataset {text!r} is not of the form 'hf:owner/name': write the hub's two-part name."
            )
        return DatasetUri(text, repository, span, part)
    if not location:
        raise DatasetError(
            f"dataset {text!r} names no directory: write its path, or 'hf:owner/name'."
        )
    return DatasetUri(text, Path(location).expanduser().absolute(), span, part)


def open_dataset(uri: str, *, held_out: float, seed: int) -> SiteDataset:
    """Open and check a dataset and hold out a share ``held_out`` of its episodes.

    Only an ``hf:`` dataset may use the network, for the chosen episodes' files. Raises DatasetError.
    """
    parsed = parse_uri(uri)
    source = parsed.source
    root = source if isinstance(source, Path) else _fetch(source, ["meta/*"])
    meta = read_meta(root)
    chosen = _choose(parsed, meta, seed)
    files = meta.files(chosen)
    if isinstance(source, str):
        _fetch(source, ["meta/*", *(file.as_posix() for file in files)])
    for file in files:
        _require(root / file, uri)
    _check_rows(root, meta, chosen)
    if len(chosen) < 2:
        raise DatasetError(
            f"dataset {uri} gives {len(chosen)} episode: training and held-out evaluation need at least two."
        )
    for index in chosen:
        if not any(task.strip() for task in meta.episodes[index].tasks):
            raise DatasetError(
                f"episode {index} of {root} has no task sentence: give it one, the policy is told what to do in words."
            )
    train, held = split(chosen, held_out=held_out, seed=seed)
    return SiteDataset(uri=uri, root=root, train_episodes=train, held_out_episodes=held, meta=meta)


def split(
    episodes: Sequence[int], *, held_out: float, seed: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Training and held-out episodes, ascending, at least one of each.

    Held out are those with the lowest hash of seed and index: no order of recording, and the same on every run.
    """
    ranked = _ranked(episodes, seed)
    count = min(max(round(held_out * len(ranked)), 1), len(ranked) - 1)
    return tuple(sorted(ranked[count:])), tuple(sorted(ranked[:count]))


def _ranked(episodes: Iterable[int], seed: int) -> list[int]:
    return sorted(episodes, key=lambda index: sha256(f"{seed}/{index}".encode()).digest())


@contextmanager
def readable(dataset: SiteDataset) -> Iterator[None]:
    """Turn what lerobot, PyAV and pyarrow raise over damaged files into a DatasetError."""
    try:
        yield
    # FFmpegError and FrameTimestampError are ValueErrors or OSErrors, pyarrow's errors ValueErrors or OSErrors too.
    except (OSError, ValueError, RuntimeError, LookupError, TypeError) as error:
        raise DatasetError(_unreadable(dataset, error)) from error


def _unreadable(dataset: SiteDataset, error: Exception) -> str:
    reason = f"{type(error).__name__}: {error}".strip().splitlines()[0].rstrip(".:")
    return f"dataset {dataset.root} cannot be read ({reason}): a file is damaged, record or copy it again."


def _choose(uri: DatasetUri, meta: Meta, seed: int) -> list[int]:
    total = len(meta.episodes)
    first, last = uri.span or (0, total)
    if last > total:
        raise DatasetError(
            f"dataset {uri.text} asks for episodes {first} to {last - 1}, but there are {total}: "
            f"choose '#episodes=A:B' within 0:{total}."
        )
    part, parts = uri.part or (0, 1)
    # Dealt out in the order of the split: whatever the number of parts, much the same episodes are held out in all.
    return sorted(_ranked(range(first, last), seed)[part::parts])


def _require(file: Path, uri: str) -> None:
    try:
        size = file.stat().st_size
    except OSError:
        raise DatasetError(
            f"{file} is missing, which {uri} needs: copy the dataset again, whole."
        ) from None
    if size == 0:
        raise DatasetError(f"{file} is empty, which {uri} needs: copy the dataset again, whole.")


def _check_rows(root: Path, meta: Meta, chosen: Sequence[int]) -> None:
    """Hold the data files against the metadata: rows of each episode, widths, and timestamps that fit the fps."""
    for file, episodes in meta.data_files(chosen).items():
        path = root / file
        columns = read_columns(
            path, ["episode_index", "frame_index", "timestamp", "index", "task_index", *VECTORS]
        )
        for key in VECTORS:
            if columns[key].shape[1:] != (len(JOINTS),):
                raise DatasetError(
                    f"{path} holds {key} that is not {len(JOINTS)} joints wide: record it again."
                )
        for index in episodes:
            rows = columns["episode_index"] == index
            episode = meta.episodes[index]
            if not np.array_equal(columns["index"][rows], np.arange(episode.first, episode.last)):
                raise DatasetError(
                    f"{path} holds {rows.sum()} frames of episode {index} where the metadata lists frames "
                    f"{episode.first} to {episode.last - 1}: copy the dataset again, whole."
                )
            if not np.array_equal(columns["frame_index"][rows], np.arange(episode.frames)):
                raise DatasetError(
                    f"episode {index} in {path} does not count its frames from 0 to {episode.frames - 1}: "
                    "record the episode again."
                )
            late = np.abs(
                columns["timestamp"][rows] - columns["frame_index"][rows] / meta.fps
            ).max()
            if not late <= TOLERANCE:  # also where it is not a number
                raise DatasetError(
                    f"episode {index} in {path} has timestamps {late:.4f} s off {meta.fps} frames per second: "
                    "correct fps in meta/info.json or record the episode again."
                )
            unknown = set(columns["task_index"][rows].tolist()) - set(range(len(meta.tasks)))
            if unknown:
                raise DatasetError(
                    f"episode {index} in {path} is of task {min(unknown)}, but meta/tasks.parquet lists "
                    f"{len(meta.tasks)}: copy the dataset again, whole."
                )


def _fetch(repository: str, patterns: list[str]) -> Path:
    try:
        # Dataset repositories are tagged with the format version of each commit; lerobot reads by that tag, too.
        return hub.snapshot(repository, patterns, kind="dataset", online=True, revision=VERSION)
    except hub.NotInReachError as error:
        raise DatasetError(
            f"dataset 'hf:{repository}' could not be fetched from the hub ({error}): "
            "check the name, the network, and HF_TOKEN if it is private."
        ) from error
