"""What is in a site's data, looked at before anything trains on it: values, units, tasks and every image file.

``open_dataset`` refuses what breaks the contract in ``meta/`` and in the rows' order, at the first fault. This is the
slower look into the files, and it collects: an operator mends a dataset once. Neither torch nor lerobot is imported.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from app.columns import read_columns
from app.dataset import SiteDataset
from app.dataset_meta import JOINTS, VECTORS
from app.preflight_images import check_images, check_video
from certs.errors import DatasetError, first_line

# LeRobot's own limits for these motors (its Feetech driver up to 2025 refused readings outside): half a turn to either
# side and as much again as calibrations were seen to be off; the gripper runs from 0 to 100 per cent.
_DEGREES = (-270.0, 270.0)
_PER_CENT = (-10.0, 110.0)
# No demonstration keeps all five joints of an arm within 6.3 degrees of zero; in radians every posture is there.
_RADIANS = 2 * np.pi
# An STS3215 counts 4096 ticks a turn and stands near 2048 in mid-range; no posture in degrees is beyond one turn.
_TURN = 360.0

type Columns = dict[str, NDArray[Any]]


def check(dataset: SiteDataset) -> list[str]:
    """One sentence for each thing that makes the chosen episodes, held out or not, unfit to train and test on.

    Empty when they are fit. Costs a read of every file of these episodes and the decoding of three images a video.
    """
    findings = list(_check_statistics(dataset.root / "meta" / "stats.json"))
    times: dict[int, NDArray[np.float64]] = {}
    vectors: list[Columns] = []
    for file, episodes in dataset.meta.data_files(dataset.episodes).items():
        path = dataset.root / file
        try:
            columns = _chosen(path, episodes)
        except DatasetError as error:
            findings.append(str(error))
            continue
        vectors.append(columns)
        for index in episodes:
            rows = columns["episode_index"] == index
            times[index] = columns["timestamp"][rows].astype(np.float64)
            findings += _check_values(path, index, {key: columns[key][rows] for key in VECTORS})
            findings += _check_tasks(dataset, path, index, columns["task_index"][rows])
        findings += _check_columns(dataset, path)
        frames = {index: dataset.meta.episodes[index].frames for index in episodes}
        for camera in dataset.meta.recorded:
            if not camera.video:
                findings += check_images(path, camera, frames)
    for key in VECTORS:
        if vectors:
            findings += _check_joints(dataset, key, vectors)
    for camera in dataset.meta.recorded:
        if camera.video:
            findings += check_video(dataset, camera, times)
    return findings


def _chosen(path: Path, episodes: list[int]) -> Columns:
    columns = read_columns(path, ["episode_index", "timestamp", "task_index", *VECTORS])
    rows = np.isin(columns["episode_index"], episodes)
    return {name: values[rows] for name, values in columns.items()}


def _check_statistics(path: Path) -> Iterator[str]:
    try:
        json.loads(path.read_text())
    except FileNotFoundError:
        yield f"{path} is missing, without which lerobot's own tools end in a TypeError: copy the dataset again, whole."
    except (OSError, ValueError) as error:
        yield f"{path} cannot be read ({first_line(error)}): copy the dataset again."


def _check_columns(dataset: SiteDataset, path: Path) -> Iterator[str]:
    """lerobot casts a data file to the features of info.json and fails where they are not the same."""
    found = set(pq.read_schema(path).names)
    declared = set(dataset.meta.columns)
    for name in sorted(declared - found):
        yield f"{path} has no column {name}, which meta/info.json declares: record the dataset again."
    for name in sorted(found - declared):
        yield f"{path} has a column {name} that meta/info.json does not declare: copy the dataset again."


def _check_values(path: Path, episode: int, vectors: Columns) -> Iterator[str]:
    for key, values in vectors.items():
        broken = ~np.isfinite(values)
        if broken.any():
            frame, joint = np.argwhere(broken)[0]
            yield (
                f"episode {episode} in {path} holds {broken.sum()} values of {key} that are not finite, the first "
                f"for {JOINTS[joint]} in frame {frame}: delete or record the episode again."
            )


def _check_tasks(
    dataset: SiteDataset, path: Path, episode: int, tasks: NDArray[np.int64]
) -> Iterator[str]:
    listed = dataset.meta.episodes[episode].tasks
    for index in np.unique(tasks):
        sentence = dataset.meta.tasks[index]
        if not sentence.strip():
            yield (
                f"episode {episode} in {path} is of task {index}, which has no sentence in meta/tasks.parquet: "
                "give it one, the policy is told what to do in words."
            )
        elif sentence not in listed:
            yield (
                f"episode {episode} in {path} is of task {sentence!r}, but meta/episodes lists {', '.join(listed)!r} "
                "for it: copy the dataset again, whole."
            )


def _check_joints(dataset: SiteDataset, key: str, parts: list[Columns]) -> Iterator[str]:
    """Hold all frames of one vector against the contract's units, values that are not finite aside."""
    owner = np.concatenate([part["episode_index"] for part in parts])
    values = np.concatenate([part[key] for part in parts]).astype(np.float64)
    finite = np.isfinite(values).all(axis=1)
    owner, values = owner[finite], values[finite]
    if not len(values):
        return
    where = f"{key} of {dataset.uri}"
    for joint in np.flatnonzero(np.ptp(values, axis=0) == 0):
        yield (
            f"{where} holds exactly {values[0, joint]:g} for {JOINTS[joint]} in all {len(dataset.episodes)} episodes: "
            "check the motor's cable and calibration and record again."
        )
    arm = np.abs(values[:, :-1])
    if 0 < arm.max() <= _RADIANS:
        yield (
            f"{where} keeps all joints within {arm.max():.3g} of zero, as angles in radians do: "
            "convert them to degrees."
        )
        return
    if np.median(arm) > _TURN:
        yield (
            f"{where} holds values up to {arm.max():g}, as raw encoder ticks do: "
            "calibrate the arm and record in degrees."
        )
        return
    for joint, name in enumerate(JOINTS):
        (low, high), unit = (_PER_CENT, "per cent") if name == "gripper" else (_DEGREES, "degrees")
        outside = (values[:, joint] < low) | (values[:, joint] > high)
        if outside.any():
            first = np.flatnonzero(outside)[0]
            yield (
                f"{where} holds {values[first, joint]:g} for {name} in episode {owner[first]} ({outside.sum()} frames "
                f"are outside {low:g} to {high:g} {unit}): calibrate the arm and record again."
            )
