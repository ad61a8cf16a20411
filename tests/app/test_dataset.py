"""Dataset URIs, the contract, the split, and reading through lerobot."""

import math
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from app.dataset import open_dataset, parse_uri, split
from certs.errors import DatasetError
from tests.damage import FLOATS, data, edit_column, edit_info, edit_parquet, meta_rows, video


@pytest.fixture
def copy(tiny_dataset: Path, tmp_path: Path) -> Path:
    """A dataset of one's own to break."""
    shutil.copytree(tiny_dataset, tmp_path / "copy")
    return tmp_path / "copy"


def _open(uri: object) -> Any:
    return open_dataset(str(uri), held_out=0.25, seed=0)


def test_parses_uris() -> None:
    assert parse_uri("/data/site").source == Path("/data/site")
    assert parse_uri("/data/site").span is None
    assert parse_uri("relative").source == Path.cwd() / "relative"
    assert parse_uri("hf:acme/pick-place_1.0#episodes=0:25").source == "acme/pick-place_1.0"
    assert parse_uri("hf:acme/pick#episodes=10:25").span == (10, 25)


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "#episodes=0:1",
        "/d#episodes=3:3",
        "/d#episodes=4:2",
        "/d#episodes=a:b",
        "/d#frames=1:2",
        "hf:acme",
        "hf:",
    ],
)
def test_refuses_malformed_uris(uri: str) -> None:
    with pytest.raises(DatasetError) as caught:
        parse_uri(uri)
    assert "\n" not in str(caught.value)


def test_opens_a_dataset(tiny_dataset: Path) -> None:
    dataset = _open(tiny_dataset)
    assert dataset.root == tiny_dataset
    assert dataset.episodes == (0, 1, 2, 3)
    assert len(dataset.held_out_episodes) == 1
    assert set(dataset.train_episodes) | set(dataset.held_out_episodes) == {0, 1, 2, 3}
    assert dataset.fps == 30
    assert dataset.cameras == ("observation.images.top", "observation.images.wrist")
    assert dataset.tasks == ("Pick up the cube and place it in the box.",)
    assert dataset.frames([0, 3]) == 30 + 45


def test_a_partition_is_a_dataset_of_its_own(tiny_dataset: Path) -> None:
    dataset = _open(f"{tiny_dataset}#episodes=1:3")
    assert dataset.episodes == (1, 2)
    assert dataset.frames(dataset.episodes) == 35 + 40


def test_opening_needs_neither_torch_nor_lerobot(tiny_dataset: Path) -> None:
    code = (
        "import sys; from app.dataset import open_dataset;"
        "open_dataset(sys.argv[1], held_out=0.2, seed=0);"
        "assert not {'torch', 'lerobot', 'datasets', 'pandas'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tiny_dataset)], check=True, timeout=60)


def test_the_split_depends_on_seed_and_episode_only() -> None:
    episodes = list(range(50))
    train, held = split(episodes, held_out=0.2, seed=0)
    assert (len(train), len(held)) == (40, 10)
    assert split(list(reversed(episodes)), held_out=0.2, seed=0) == (train, held)
    assert split(episodes, held_out=0.2, seed=1) != (train, held)
    # Not simply the first or the last ones.
    assert min(held) < 25 <= max(held)
    # Fixed for good: a later version must not move episodes between the two sides.
    assert split(list(range(5)), held_out=0.2, seed=0) == split(
        list(range(5)), held_out=0.1, seed=0
    )


@pytest.mark.parametrize(
    ("share", "held_out"), [(0.0, 1), (0.01, 1), (0.5, 2), (0.99, 3), (1.0, 3)]
)
def test_both_sides_of_the_split_hold_an_episode(share: float, held_out: int) -> None:
    train, held = split([4, 5, 6, 7], held_out=share, seed=3)
    assert (len(train), len(held)) == (4 - held_out, held_out)


def test_lerobot_reads_the_chosen_episodes(tiny_dataset: Path) -> None:
    import torch

    dataset = _open(tiny_dataset)
    episodes = dataset.held_out_episodes
    opened = dataset.lerobot(episodes, chunk=50)
    assert len(opened) == dataset.frames(episodes)
    item = opened[len(opened) - 10]
    assert item["episode_index"] == episodes[-1]
    assert item["action"].shape == (50, 6)
    # Ten frames are left in the episode; lerobot repeats the last one and says so.
    assert item["action_is_pad"].sum() == 40
    assert item["observation.state"].shape == (6,)
    assert item["task"] == "Pick up the cube and place it in the box."
    for camera in dataset.cameras:
        assert item[camera].dtype == torch.uint8
        assert item[camera].shape == (3, 96, 128)


def test_a_dataset_without_statistics_is_fine(copy: Path) -> None:
    # The run pools its own; lerobot's file is never read.
    (copy / "meta" / "stats.json").unlink()
    assert len(_open(copy).lerobot([0])) == 30


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no directory": (shutil.rmtree, "does not exist"),
    "no info": (lambda root: (root / "meta" / "info.json").unlink(), "no meta/info.json"),
    "bad info": (
        lambda root: (root / "meta" / "info.json").write_text("{"),
        "info.json cannot be read",
    ),
    "list info": (lambda root: (root / "meta" / "info.json").write_text("[]"), "not a JSON object"),
    "v2.1": (
        lambda root: edit_info(root, lambda info: info.update(codebase_version="v2.1")),
        "convert it with",
    ),
    "v4.0": (
        lambda root: edit_info(root, lambda info: info.update(codebase_version="v4.0")),
        "'v4.0'",
    ),
    "no features": (
        lambda root: edit_info(root, lambda info: info.pop("features")),
        "no features",
    ),
    "no action": (
        lambda root: edit_info(root, lambda info: info["features"].pop("action")),
        "no feature action",
    ),
    "seven joints": (
        lambda root: edit_info(root, lambda info: info["features"]["action"].update(shape=[7])),
        r"action the shape \[7\]",
    ),
    "float64": (
        lambda root: edit_info(
            root, lambda info: info["features"]["observation.state"].update(dtype="float64")
        ),
        "observation.state as float64",
    ),
    "unnamed joints": (
        lambda root: edit_info(root, lambda info: info["features"]["action"].update(names=None)),
        "names the joints of action None",
    ),
    "joints in another order": (
        lambda root: edit_info(root, lambda info: info["features"]["action"]["names"].reverse()),
        "in this order",
    ),
    "no wrist camera": (
        lambda root: edit_info(root, lambda info: info["features"].pop("observation.images.wrist")),
        "no camera observation.images.wrist .found: observation.images.top",
    ),
    "camera is a vector": (
        lambda root: edit_info(
            root, lambda info: info["features"]["observation.images.top"].update(dtype="float32")
        ),
        "does not describe observation.images.top",
    ),
    "fps 0": (lambda root: edit_info(root, lambda info: info.update(fps=0)), "fps 0"),
    "fps missing": (lambda root: edit_info(root, lambda info: info.pop("fps")), "fps None"),
    "no data path": (
        lambda root: edit_info(root, lambda info: info.pop("data_path")),
        "do not fit together",
    ),
    "wrong count": (
        lambda root: edit_info(root, lambda info: info.update(total_episodes=5)),
        "counts 5",
    ),
    "no tasks": (
        lambda root: (root / "meta" / "tasks.parquet").unlink(),
        "tasks.parquet is missing",
    ),
    "empty tasks": (
        lambda root: (root / "meta" / "tasks.parquet").write_bytes(b""),
        "tasks.parquet cannot be read",
    ),
    "no episode rows": (
        lambda root: shutil.rmtree(root / "meta" / "episodes"),
        "no episode metadata",
    ),
    "cut episode rows": (lambda root: meta_rows(root).write_bytes(b"PAR1"), "cannot be read"),
    "episode missing": (
        lambda root: edit_parquet(meta_rows(root), lambda table: table.slice(1)),
        "does not list episodes 0 to 2",
    ),
    "column missing": (
        lambda root: edit_parquet(
            meta_rows(root), lambda table: table.drop_columns("data/file_index")
        ),
        "no column data/file_index",
    ),
    "empty episode": (
        lambda root: edit_column(meta_rows(root), "dataset_to_index", lambda _: [0, 65, 105, 150]),
        "episode 0 holds no frames",
    ),
    "no task sentence": (
        lambda root: edit_column(meta_rows(root), "tasks", lambda _: [[""]] * 4),
        "no task sentence",
    ),
    "no data": (lambda root: data(root).unlink(), "parquet is missing"),
    "empty data": (lambda root: data(root).write_bytes(b""), "parquet is empty"),
    "rows missing": (
        lambda root: edit_parquet(data(root), lambda table: table.slice(0, 148)),
        "43 frames of episode 3 where the metadata lists frames 105 to 149",
    ),
    "another index": (
        lambda root: edit_column(
            data(root), "index", lambda values: [value + 1 for value in values]
        ),
        "30 frames of episode 0 where the metadata lists frames 0 to 29",
    ),
    "no action column": (
        lambda root: edit_parquet(data(root), lambda table: table.drop_columns("action")),
        "no column action",
    ),
    "five joints inside": (
        lambda root: edit_column(
            data(root), "action", lambda rows: [row[:5] for row in rows], FLOATS
        ),
        "action that is not 6 joints wide",
    ),
    "one short row": (
        lambda root: edit_column(
            data(root), "action", lambda rows: [rows[0][:5], *rows[1:]], FLOATS
        ),
        "rows of action differ in width",
    ),
    "a missing row": (
        lambda root: edit_column(
            data(root), "observation.state", lambda rows: [None, *rows[1:]], FLOATS
        ),
        "value of observation.state is missing",
    ),
    "text for numbers": (
        lambda root: edit_column(
            data(root), "timestamp", lambda rows: ["now"] * len(rows), pa.string()
        ),
        "values of timestamp are of type string",
    ),
    "late by 4 ms": (
        lambda root: edit_column(
            data(root), "timestamp", lambda rows: [*rows[:-1], rows[-1] + 0.004]
        ),
        "episode 3 .* 0.0040 s off 30 frames",
    ),
    "a timestamp that is no number": (
        lambda root: edit_column(data(root), "timestamp", lambda rows: [math.nan, *rows[1:]]),
        "episode 0 .* timestamps nan s off",
    ),
    "frames counted from 1": (
        lambda root: edit_column(
            data(root), "frame_index", lambda rows: [*rows[:-1], rows[-1] + 1]
        ),
        "episode 3 .* does not count its frames from 0 to 44",
    ),
    "unknown task": (
        lambda root: edit_column(data(root), "task_index", lambda rows: [*rows[:-1], 1]),
        "episode 3 .* is of task 1, but meta/tasks.parquet lists 1",
    ),
    "tasks in another order": (
        lambda root: edit_column(root / "meta" / "tasks.parquet", "task_index", lambda _: [1]),
        "does not list tasks 0 to 0 in order",
    ),
    "tasks without words": (
        lambda root: edit_parquet(
            root / "meta" / "tasks.parquet", lambda table: table.select(["task_index"])
        ),
        "tasks.parquet holds no task",
    ),
    "flat images": (
        lambda root: edit_info(
            root, lambda info: info["features"]["observation.images.top"].update(shape=[96, 128])
        ),
        r"observation.images.top the shape \[96, 128\]",
    ),
    "no place in the video": (
        lambda root: edit_column(
            meta_rows(root), "videos/observation.images.top/from_timestamp", lambda _: [None] * 4
        ),
        "do not fit together",
    ),
    "wrong fps": (
        lambda root: edit_info(root, lambda info: info.update(fps=50)),
        "off 50 frames per second",
    ),
    "cut data": (
        lambda root: data(root).write_bytes(data(root).read_bytes()[:-100]),
        "parquet cannot be read",
    ),
    "no video": (lambda root: video(root).unlink(), "mp4 is missing"),
    "empty video": (lambda root: video(root, "wrist").write_bytes(b""), "mp4 is empty"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_one_sentence_that_names_the_place(
    fault: str, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage, expected = FAULTS[fault]
    damage(copy)

    def no_network(*_: object) -> None:
        raise AssertionError("a local dataset asked the network")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    with pytest.raises(DatasetError, match=expected) as caught:
        _open(copy)
    sentence = str(caught.value)
    assert str(copy) in sentence
    assert "\n" not in sentence
    # Looking at a dataset creates nothing.
    assert copy.exists() == (fault != "no directory")


@pytest.mark.parametrize(
    ("span", "expected"), [("0:5", "there are 4"), ("9:12", "there are 4"), ("2:3", "at least two")]
)
def test_refuses_partitions_that_cannot_be_split(
    span: str, expected: str, tiny_dataset: Path
) -> None:
    with pytest.raises(DatasetError, match=expected):
        _open(f"{tiny_dataset}#episodes={span}")


def test_files_that_no_chosen_episode_needs_may_be_absent(copy: Path) -> None:
    edit_column(meta_rows(copy), "videos/observation.images.top/file_index", lambda _: [0, 0, 0, 7])
    assert _open(f"{copy}#episodes=0:3").episodes == (0, 1, 2)
    with pytest.raises(DatasetError, match=r"file-007.mp4 is missing"):
        _open(copy)


def test_images_are_found_late_in_a_long_video(tiny_dataset: Path, tmp_path: Path) -> None:
    """A quarter of an hour into a file, lerobot's float32 moves a time by more than its own tolerance."""
    import av
    import numpy as np
    from lerobot.datasets.video_utils import FrameTimestampError, decode_video_frames_pyav

    # An episode of five minutes that begins after 33,000 frames, and which of its frames rounding tears from its image.
    place = 33_000 + np.arange(9000)
    wanted = 33_000 / 30 + (np.arange(9000) / 30).astype(np.float32).astype(np.float64)
    apart = np.abs(wanted.astype(np.float32) - (place / 30).astype(np.float32))
    row = int(apart.argmax())
    second = float(wanted[row])
    path = tmp_path / "late.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("h264", rate=30, width=64, height=64, pix_fmt="yuv420p")
        for number in (0, *place[row - 1 : row + 2]):
            frame = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")
            frame.pts, frame.time_base = int(number), Fraction(1, 30)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(FrameTimestampError):
        decode_video_frames_pyav(path, [second], 1e-4)
    tolerance = _open(tiny_dataset).lerobot([0]).tolerance_s
    assert len(decode_video_frames_pyav(path, [second], tolerance)) == 1
    # And no other image is mistaken for it.
    with pytest.raises(FrameTimestampError):
        decode_video_frames_pyav(path, [second + 0.002], tolerance)


def test_damage_after_opening_is_one_sentence(copy: Path) -> None:
    dataset = _open(copy)
    data(copy).write_bytes(data(copy).read_bytes()[:-100])
    with pytest.raises(DatasetError, match="cannot be read") as caught:
        dataset.lerobot([0])
    assert str(copy) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_hub_datasets_fetch_only_the_chosen_files(hub: Any, copy: Path, tmp_path: Path) -> None:
    # A repository in two data files, as large ones are: the second one is not needed.
    shutil.copy(data(copy), data(copy).with_name("file-001.parquet"))
    assert data(copy).name == "file-000.parquet"
    edit_column(meta_rows(copy), "data/file_index", lambda _: [0, 0, 0, 1])
    hub.repositories = {"datasets/acme/pick": copy}
    hub.revisions = {"datasets/acme/pick": {"v3.0", "main"}}
    cache = tmp_path / "cache"
    code = (
        "from app.dataset import open_dataset\n"
        "dataset = open_dataset('hf:acme/pick#episodes=0:3', held_out=0.3, seed=0)\n"
        "print(dataset.root, *dataset.episodes)"
    )
    root, *episodes = hub.run(code, cache).split()
    assert Path(root).is_relative_to(cache)
    assert episodes == ["0", "1", "2"]
    fetched = {path.name for path in Path(root).rglob("*") if path.is_file()}
    assert {"info.json", "tasks.parquet", "file-000.mp4", "file-000.parquet"} <= fetched
    assert "file-001.parquet" not in fetched
    assert any("/revision/v3.0" in line for line in hub.requests)
    # Fetched once: the second time only the revision is asked for.
    hub.requests.clear()
    hub.run(code, cache)
    assert not any("/resolve/" in line for line in hub.requests)
    # And lerobot reads the snapshot, here with the hub offline.
    assert len(_open(f"{root}#episodes=0:3").lerobot([0])) == 30


def test_hub_datasets_without_a_version_tag_come_from_main(
    hub: Any, copy: Path, tmp_path: Path
) -> None:
    hub.repositories = {"datasets/acme/pick": copy}
    code = (
        "from app.dataset import open_dataset\n"
        "print(len(open_dataset('hf:acme/pick', held_out=0.3, seed=0).episodes))"
    )
    assert hub.run(code, tmp_path / "cache") == "4"


def test_an_unknown_hub_dataset_is_one_sentence(hub: Any, tmp_path: Path) -> None:
    code = (
        "from app.dataset import open_dataset\n"
        "try: open_dataset('hf:acme/nothing', held_out=0.2, seed=0)\n"
        "except Exception as error: print(type(error).__name__, repr(str(error)))"
    )
    sentence = hub.run(code, tmp_path)
    assert sentence.startswith("DatasetError")
    assert "hf:acme/nothing" in sentence
    assert "\\n" not in sentence
