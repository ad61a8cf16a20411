"""The ``meta/`` directory of a LeRobot v3.0 dataset, read with json and pyarrow and held against the contract."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from certs.errors import DatasetError, first_line

VERSION = "v3.0"
# SO-100 and SO-101, from base to gripper. Recordings write them as "shoulder_pan.pos", older ones as
# "main_shoulder_pan".
JOINTS = ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper")
REQUIRED_CAMERAS = ("observation.images.top", "observation.images.wrist")
OPTIONAL_CAMERAS = ("observation.images.side",)
VECTORS = ("observation.state", "action")

_EPISODE_COLUMNS = (
    "episode_index",
    "tasks",
    "dataset_from_index",
    "dataset_to_index",
    "data/chunk_index",
    "data/file_index",
)


@dataclass(frozen=True)
class Camera:
    """A camera that was recorded, its images' size in pixels, and whether they lie in videos or in the data files."""

    key: str
    height: int
    width: int
    video: bool


@dataclass(frozen=True)
class Clip:
    """Where an episode's images of one camera are: a video file, and the second of it at which they begin."""

    camera: str
    file: Path
    start: float


@dataclass(frozen=True)
class Episode:
    """One row of ``meta/episodes``: its frames [first, last) in the whole dataset, its tasks and its files."""

    first: int
    last: int
    tasks: tuple[str, ...]
    data: Path
    videos: tuple[Clip, ...]

    @property
    def frames(self) -> int:
        return self.last - self.first


@dataclass(frozen=True)
class Meta:
    """What the federation needs to know of a dataset; paths are relative to its root."""

    fps: int
    # Those that the policy sees.
    cameras: tuple[str, ...]
    # lerobot decodes every camera, also those that the policy does not see.
    recorded: tuple[Camera, ...]
    # Features that are columns of the data files.
    columns: tuple[str, ...]
    # The sentence of each task_index.
    tasks: tuple[str, ...]
    episodes: tuple[Episode, ...]

    def data_files(self, episodes: Sequence[int]) -> dict[Path, list[int]]:
        """Which of these episodes each data file holds; paths below the dataset's root."""
        by_file: dict[Path, list[int]] = {}
        for index in episodes:
            by_file.setdefault(self.episodes[index].data, []).append(index)
        return by_file

    def files(self, episodes: Sequence[int]) -> list[Path]:
        """The data and video files that these episodes are stored in, each once."""
        chosen = [self.episodes[index] for index in episodes]
        videos = {clip.file for episode in chosen for clip in episode.videos}
        return sorted(videos | {episode.data for episode in chosen})


def read_meta(root: Path) -> Meta:
    """Read and check a dataset's metadata. Raises DatasetError."""
    if not root.is_dir():
        raise DatasetError(f"dataset directory {root} does not exist: check the path.")
    path = root / "meta" / "info.json"
    try:
        info = json.loads(path.read_text())
    except FileNotFoundError:
        raise DatasetError(
            f"{root} holds no meta/info.json: it is not a LeRobot dataset, check the path."
        ) from None
    except (OSError, ValueError) as error:
        raise DatasetError(
            f"{path} cannot be read ({first_line(error)}): copy the dataset again."
        ) from error
    if not isinstance(info, dict):
        raise DatasetError(f"{path} is not a JSON object: copy the dataset again.")
    _check_version(info, root)
    features = info.get("features")
    if not isinstance(features, dict) or not all(
        isinstance(feature, dict) for feature in features.values()
    ):
        raise DatasetError(f"{path} describes no features: copy the dataset again.")
    for key in VECTORS:
        _check_vector(key, features.get(key), path)
    fps = info.get("fps")
    # lerobot writes an integer; a camera cannot run at no frames a second.
    if isinstance(fps, bool) or not isinstance(fps, int | float) or fps <= 0 or fps != int(fps):
        raise DatasetError(f"{path} gives fps {fps!r}: it must be a whole number above 0.")
    recorded = tuple(
        _camera(key, feature, path)
        for key, feature in features.items()
        if feature.get("dtype") in {"video", "image"}
    )
    videos = [camera.key for camera in recorded if camera.video]
    return Meta(
        fps=int(fps),
        cameras=_policy_cameras(features, recorded, path),
        recorded=recorded,
        columns=tuple(key for key in features if key not in videos),
        tasks=_tasks(root),
        episodes=_episodes(root, info, videos),
    )


def _check_version(info: dict[str, Any], root: Path) -> None:
    version = info.get("codebase_version")
    if version == "v2.1":
        raise DatasetError(
            f"{root} is a LeRobot v2.1 dataset: convert it with "
            "'python -m lerobot.scripts.convert_dataset_v21_to_v30', the federation reads v3.0."
        )
    if version != VERSION:
        raise DatasetError(
            f"{root} has codebase_version {version!r}: the federation reads {VERSION}, record or convert it again."
        )


def _check_vector(key: str, feature: dict[str, Any] | None, path: Path) -> None:
    """Six float32 joints in the contract's order."""
    if feature is None:
        raise DatasetError(
            f"{path} has no feature {key}: record the dataset with an SO-100 or SO-101 arm."
        )
    shape, dtype = feature.get("shape"), feature.get("dtype")
    if shape != [len(JOINTS)]:
        raise DatasetError(
            f"{path} gives {key} the shape {shape}: the federation's arms have {len(JOINTS)} joints."
        )
    if dtype != "float32":
        raise DatasetError(f"{path} stores {key} as {dtype}: record it as float32 degrees.")
    names = feature.get("names")
    if isinstance(names, dict) and len(names) == 1:
        # Datasets converted from v2.1 group them: {"motors": [...]}.
        names = next(iter(names.values()))
    if not isinstance(names, list) or tuple(_joint(name) for name in names) != JOINTS:
        raise DatasetError(
            f"{path} names the joints of {key} {names}: they must be {', '.join(JOINTS)}, in this order."
        )


def _joint(name: object) -> str:
    return str(name).removeprefix("main_").removesuffix(".pos")


def _camera(key: str, feature: dict[str, Any], path: Path) -> Camera:
    shape, names = feature.get("shape"), feature.get("names")
    if not (
        isinstance(shape, list)
        and len(shape) == 3
        and all(isinstance(size, int) and size > 0 for size in shape)
    ):
        raise DatasetError(
            f"{path} gives {key} the shape {shape}, which is no image's: record the camera again."
        )
    # Recordings write either order and name it; the usual one is height, width, channels.
    channels_first = isinstance(names, list) and names[:1] in (["channel"], ["channels"])
    height, width = shape[1:] if channels_first else shape[:2]
    return Camera(key, height, width, feature["dtype"] == "video")


def _policy_cameras(
    features: dict[str, Any], recorded: tuple[Camera, ...], path: Path
) -> tuple[str, ...]:
    for key in REQUIRED_CAMERAS:
        if key not in features:
            found = [name for name in features if name.startswith("observation.images.")]
            raise DatasetError(
                f"{path} has no camera {key} (found: {', '.join(found) or 'none'}): name the cameras 'top' and 'wrist'."
            )
    present = tuple(key for key in REQUIRED_CAMERAS + OPTIONAL_CAMERAS if key in features)
    for key in present:
        if key not in {camera.key for camera in recorded}:
            raise DatasetError(
                f"{path} does not describe {key} as video or images: record the camera again."
            )
    return present


def _tasks(root: Path) -> tuple[str, ...]:
    path = root / "meta" / "tasks.parquet"
    table = _table([path], None, f"{path}")
    # pandas stores its index as a column; early v3.0 conversions left it without a name.
    text = next((name for name in ("task", "__index_level_0__") if name in table.column_names), "")
    if not text or "task_index" not in table.column_names or table.num_rows == 0:
        raise DatasetError(f"{path} holds no task: record every episode with a task sentence.")
    # lerobot takes the row at this position, whatever its task_index says.
    if table["task_index"].to_pylist() != list(range(table.num_rows)):
        raise DatasetError(
            f"{path} does not list tasks 0 to {table.num_rows - 1} in order: copy the dataset again."
        )
    return tuple(str(task) for task in table[text].to_pylist())


def _episodes(root: Path, info: dict[str, Any], videos: list[str]) -> tuple[Episode, ...]:
    folder = root / "meta" / "episodes"
    paths = sorted(folder.glob("*/*.parquet"))
    if not paths:
        raise DatasetError(f"{folder} holds no episode metadata: copy the dataset again, whole.")
    parts = ("chunk_index", "file_index", "from_timestamp")
    columns = [f"videos/{key}/{part}" for key in videos for part in parts]
    rows = _table(paths, [*_EPISODE_COLUMNS, *columns], f"{folder}").to_pylist()
    if [row["episode_index"] for row in rows] != list(range(len(rows))):
        raise DatasetError(
            f"{folder} does not list episodes 0 to {len(rows) - 1} in order: copy the dataset again."
        )
    if info.get("total_episodes") != len(rows):
        raise DatasetError(
            f"{folder} lists {len(rows)} episodes where meta/info.json counts {info.get('total_episodes')}: "
            "copy the dataset again, whole."
        )
    try:
        return tuple(_episode(row, info, videos) for row in rows)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise DatasetError(
            f"{folder} and meta/info.json do not fit together ({type(error).__name__}: {first_line(error)}): "
            "copy the dataset again."
        ) from error


def _episode(row: dict[str, Any], info: dict[str, Any], videos: list[str]) -> Episode:
    first, last = int(row["dataset_from_index"]), int(row["dataset_to_index"])
    if first >= last:
        raise ValueError(f"episode {row['episode_index']} holds no frames")
    return Episode(
        first=first,
        last=last,
        tasks=tuple(str(task) for task in row["tasks"]),
        data=Path(
            info["data_path"].format(
                chunk_index=row["data/chunk_index"], file_index=row["data/file_index"]
            )
        ),
        videos=tuple(
            Clip(
                camera=key,
                file=Path(
                    info["video_path"].format(
                        video_key=key,
                        chunk_index=row[f"videos/{key}/chunk_index"],
                        file_index=row[f"videos/{key}/file_index"],
                    )
                ),
                start=float(row[f"videos/{key}/from_timestamp"]),
            )
            for key in videos
        ),
    )


def _table(paths: list[Path], columns: list[str] | None, where: str) -> pa.Table:
    """These columns (None: all) of parquet files, one after the other."""
    try:
        tables = []
        for path in paths:
            with pq.ParquetFile(path) as file:
                missing = set(columns or ()) - set(file.schema_arrow.names)
                if missing:
                    raise DatasetError(
                        f"{path} has no column {sorted(missing)[0]}: it is not LeRobot {VERSION} metadata, convert it."
                    )
                tables.append(file.read(columns=columns))
        return pa.concat_tables(tables, promote_options="permissive")
    except FileNotFoundError:
        raise DatasetError(f"{where} is missing: copy the dataset again, whole.") from None
    except (OSError, pa.ArrowException) as error:
        raise DatasetError(
            f"{where} cannot be read ({first_line(error)}): copy the dataset again."
        ) from error
