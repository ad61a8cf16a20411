"""Dataset URIs, the contract, the split, and reading through lerobot."""

import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from app.dataset import open_dataset, parse_uri, split
from certs.errors import DatasetError


@pytest.fixture
def copy(tiny_dataset: Path, tmp_path: Path) -> Path:
    """A dataset of one's own to break."""
    shutil.copytree(tiny_dataset, tmp_path / "copy")
    return tmp_path / "copy"


def _open(uri: object) -> Any:
    return open_dataset(str(uri), held_out=0.25, seed=0)


def _edit_info(root: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = root / "meta" / "info.json"
    info = json.loads(path.read_text())
    change(info)
    path.write_text(json.dumps(info))


def _edit_parquet(path: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    pq.write_table(change(pq.read_table(path)), path)


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


def _video(root: Path, camera: str = "top") -> Path:
    return next((root / "videos" / f"observation.images.{camera}").rglob("*.mp4"))


def _data(root: Path) -> Path:
    return min((root / "data").rglob("*.parquet"))


def _meta_rows(root: Path) -> Path:
    return next((root / "meta" / "episodes").rglob("*.parquet"))


def _set(table: pa.Table, column: str, values: list[object]) -> pa.Table:
    index = table.column_names.index(column)
    return table.set_column(index, column, pa.array(values, table.schema.field(column).type))


def _edit_column(
    root: Path, column: str, change: Callable[[Any], Any], kind: pa.DataType | None = None
) -> None:
    def edit(table: pa.Table) -> pa.Table:
        index = table.column_names.index(column)
        values = change(table[column].to_pylist())
        return table.set_column(
            index, column, pa.array(values, kind or table.schema.field(column).type)
        )

    _edit_parquet(_data(root), edit)


FLOATS = pa.list_(pa.float32())
FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no directory": (shutil.rmtree, "does not exist"),
    "no info": (lambda root: (root / "meta" / "info.json").unlink(), "no meta/info.json"),
    "bad info": (
        lambda root: (root / "meta" / "info.json").write_text("{"),
        "info.json cannot be read",
    ),
    "list info": (lambda root: (root / "meta" / "info.json").write_text("[]"), "not a JSON object"),
    "v2.1": (
        lambda root: _edit_info(root, lambda info: info.update(codebase_version="v2.1")),
        "convert it with",
    ),
    "v4.0": (
        lambda root: _edit_info(root, lambda info: info.update(codebase_version="v4.0")),
        "'v4.0'",
    ),
    "no features": (
        lambda root: _edit_info(root, lambda info: info.pop("features")),
        "no features",
    ),
    "no action": (
        lambda root: _edit_info(root, lambda info: info["features"].pop("action")),
        "no feature action",
    ),
    "seven joints": (
        lambda root: _edit_info(root, lambda info: info["features"]["action"].update(shape=[7])),
        r"action the shape \[7\]",
    ),
    "float64": (
        lambda root: _edit_info(
            root, lambda info: info["features"]["observation.state"].update(dtype="float64")
        ),
        "observation.state as float64",
    ),
    "unnamed joints": (
        lambda root: _edit_info(root, lambda info: info["features"]["action"].update(names=None)),
        "names the joints of action None",
    ),
    "joints in another order": (
        lambda root: _edit_info(root, lambda info: info["features"]["action"]["names"].reverse()),
        "in this order",
    ),
    "no wrist camera": (
        lambda root: _edit_info(
            root, lambda info: info["features"].pop("observation.images.wrist")
        ),
        "no camera observation.images.wrist .found: observation.images.top",
    ),
    "camera is a vector": (
        lambda root: _edit_info(
            root, lambda info: info["features"]["observation.images.top"].update(dtype="float32")
        ),
        "does not describe observation.images.top",
    ),
    "fps 0": (lambda root: _edit_info(root, lambda info: info.update(fps=0)), "fps 0"),
    "fps missing": (lambda root: _edit_info(root, lambda info: info.pop("fps")), "fps None"),
    "no data path": (
        lambda root: _edit_info(root, lambda info: info.pop("data_path")),
        "do not fit together",
    ),
    "wrong count": (
        lambda root: _edit_info(root, lambda info: info.update(total_episodes=5)),
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
    "cut episode rows": (lambda root: _meta_rows(root).write_bytes(b"PAR1"), "cannot be read"),
    "episode missing": (
        lambda root: _edit_parquet(_meta_rows(root), lambda table: table.slice(1)),
        "does not list episodes 0 to 2",
    ),
    "column missing": (
        lambda root: _edit_parquet(
            _meta_rows(root), lambda table: table.drop_columns("data/file_index")
        ),
        "no column data/file_index",
    ),
    "empty episode": (
        lambda root: _edit_parquet(
            _meta_rows(root), lambda table: _set(table, "dataset_to_index", [0, 65, 105, 150])
        ),
        "episode 0 holds no frames",
    ),
    "no task sentence": (
        lambda root: _edit_parquet(
            _meta_rows(root), lambda table: _set(table, "tasks", [[""]] * 4)
        ),
        "no task sentence",
    ),
    "no data": (lambda root: _data(root).unlink(), "parquet is missing"),
    "empty data": (lambda root: _data(root).write_bytes(b""), "parquet is empty"),
    "rows missing": (
        lambda root: _edit_parquet(_data(root), lambda table: table.slice(0, 148)),
        "43 frames of episode 3 where the metadata lists frames 105 to 149",
    ),
    "another index": (
        lambda root: _edit_column(root, "index", lambda values: [value + 1 for value in values]),
        "30 frames of episode 0 where the metadata lists frames 0 to 29",
    ),
    "no action column": (
        lambda root: _edit_parquet(_data(root), lambda table: table.drop_columns("action")),
        "no column action",
    ),
    "five joints inside": (
        lambda root: _edit_column(root, "action", lambda rows: [row[:5] for row in rows], FLOATS),
        "action that is not 6 joints wide",
    ),
    "one short row": (
        lambda root: _edit_column(root, "action", lambda rows: [rows[0][:5], *rows[1:]], FLOATS),
        "rows of action differ in width",
    ),
    "a missing row": (
        lambda root: _edit_column(
            root, "observation.state", lambda rows: [None, *rows[1:]], FLOATS
        ),
        "value of observation.state is missing",
    ),
    "text for numbers": (
        lambda root: _edit_column(root, "timestamp", lambda rows: ["now"] * len(rows), pa.string()),
        "values of timestamp are of type string",
    ),
    "late by 4 ms": (
        lambda root: _edit_column(root, "timestamp", lambda rows: [*rows[:-1], rows[-1] + 0.004]),
        "episode 3 .* 0.0040 s off 30 frames",
    ),
    "wrong fps": (
        lambda root: _edit_info(root, lambda info: info.update(fps=50)),
        "off 50 frames per second",
    ),
    "cut data": (
        lambda root: _data(root).write_bytes(_data(root).read_bytes()[:-100]),
        "parquet cannot be read",
    ),
    "no video": (lambda root: _video(root).unlink(), "mp4 is missing"),
    "empty video": (lambda root: _video(root, "wrist").write_bytes(b""), "mp4 is empty"),
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
    def elsewhere(table: pa.Table) -> pa.Table:
        return _set(table, "videos/observation.images.top/file_index", [0, 0, 0, 7])

    _edit_parquet(_meta_rows(copy), elsewhere)
    assert _open(f"{copy}#episodes=0:3").episodes == (0, 1, 2)
    with pytest.raises(DatasetError, match=r"file-007.mp4 is missing"):
        _open(copy)


def test_damage_after_opening_is_one_sentence(copy: Path) -> None:
    dataset = _open(copy)
    _data(copy).write_bytes(_data(copy).read_bytes()[:-100])
    with pytest.raises(DatasetError, match="cannot be read") as caught:
        dataset.lerobot([0])
    assert str(copy) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_hub_datasets_fetch_only_the_chosen_files(hub: Any, copy: Path, tmp_path: Path) -> None:
    # A repository in two data files, as large ones are: the second one is not needed.
    shutil.copy(_data(copy), _data(copy).with_name("file-001.parquet"))
    assert _data(copy).name == "file-000.parquet"
    _edit_parquet(_meta_rows(copy), lambda table: _set(table, "data/file_index", [0, 0, 0, 1]))
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
