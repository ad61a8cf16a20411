"""Frames against LeRobotDataset: the same columns, windows and images to the bit, whatever the files look like."""

import io
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from app.dataset import SiteDataset, open_dataset
from app.frames import Frames
from certs.errors import DatasetError, StorageError
from tests.damage import data, edit_column, edit_info, meta_rows, video
from tests.recorder import TASK, record

ROOT = Path(__file__).parents[2]
STATE, ACTION = "observation.state", "action"
OTHER = "Put the cube back."
CHUNK = 50


def _reencode(path: Path) -> None:
    """As other programs write videos: a key frame a second, images that lean on later ones, packets out of order."""
    import av

    with av.open(str(path)) as source, av.open(f"{path}.new", "w", "mp4") as out:
        images = [frame.to_ndarray(format="rgb24") for frame in source.decode(video=0)]
        options = {"g": "30", "bf": "3", "sc_threshold": "0", "b-adapt": "0"}
        stream = out.add_stream("h264", rate=30, width=128, height=96, options=options)
        for image in images:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        out.mux(stream.encode())
    Path(f"{path}.new").replace(path)


@pytest.fixture(scope="module")
def datasets(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("frames")
    shutil.copytree(tiny_dataset, folder / "reencoded")
    for camera in ("top", "wrist"):
        _reencode(video(folder / "reencoded", camera))
    tasks = (TASK, OTHER)
    return {
        "video": tiny_dataset,
        "video, a file each": record(folder / "apart", (12, 55, 9), tasks=tasks, apart=True),
        "video, of another program": folder / "reencoded",
        "images": record(folder / "images", (12, 55, 9, 20), video=False, tasks=tasks),
        "images, a file each": record(folder / "images-apart", (12, 9, 7), video=False, apart=True),
    }


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VLAFLEET_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def copy(tiny_dataset: Path, tmp_path: Path) -> Path:
    """A dataset of one's own to break."""
    shutil.copytree(tiny_dataset, tmp_path / "copy")
    return tmp_path / "copy"


KINDS = [
    "video",
    "video, a file each",
    "video, of another program",
    "images",
    "images, a file each",
]


def _open(root: object) -> SiteDataset:
    return open_dataset(str(root), held_out=0.25, seed=0)


def _uint8(image: Any) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """What lerobot scaled to [0, 1] where images are not in videos, unscaled; float32 gives every value back."""
    if image.is_floating_point():
        scaled = (image * 255).round()
        assert (scaled / 255 == image).all()
        image = scaled.byte()
    array: np.ndarray[Any, np.dtype[np.uint8]] = image.numpy()
    return array


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("subset", [None, (1, 2)])
def test_a_row_is_lerobots_item_to_the_bit(
    kind: str, subset: tuple[int, ...] | None, datasets: dict[str, Path], home: Path
) -> None:
    dataset = _open(datasets[kind])
    episodes = subset or dataset.episodes
    frames, opened = Frames(dataset, episodes), dataset.lerobot(episodes, CHUNK)
    assert len(frames) == len(opened) == dataset.frames(episodes)
    assert frames.cameras == dataset.cameras
    decoded = dict(frames.decode())
    assert list(decoded) == list(range(len(frames)))
    every = np.arange(len(frames))
    windows, padding = frames.windows(every, CHUNK)
    # In an order that jumps back and forth and meets images twice.
    shuffled = np.concatenate((np.random.default_rng(0).permutation(every), [3, 3]))
    random = frames.images(shuffled)
    for row in every:
        item = opened[int(row)]
        assert frames.index[row] == item["index"]
        assert frames.episode[row] == item["episode_index"]
        assert frames.tasks[frames.task[row]] == item["task"]
        assert np.array_equal(frames.state[row], item[STATE].numpy())
        assert np.array_equal(frames.action[windows[row]], item[ACTION].numpy())
        assert np.array_equal(padding[row], item["action_is_pad"].numpy())
        assert frames.last[row] == every[frames.episode == frames.episode[row]][-1]
        for camera in frames.cameras:
            expected = _uint8(item[camera])
            assert np.array_equal(decoded[int(row)][camera], expected)
            for place in np.flatnonzero(shuffled == row):
                assert np.array_equal(random[camera][place], expected)
    for camera in frames.cameras:
        assert random[camera].dtype == np.uint8
        # The images differ, so that one taken for another would have been noticed.
        assert len({image[camera].tobytes() for image in decoded.values()}) > len(frames) / 3


@pytest.mark.parametrize("kind", KINDS)
def test_a_pass_over_some_rows_is_the_same_images(
    kind: str, datasets: dict[str, Path], home: Path
) -> None:
    dataset = _open(datasets[kind])
    frames = Frames(dataset, dataset.episodes)
    whole = dict(frames.decode())
    rows = np.flatnonzero(np.random.default_rng(1).random(len(frames)) < 0.2)
    some = list(frames.decode(rows))
    assert [row for row, _ in some] == rows.tolist()
    for row, images in some:
        for camera in frames.cameras:
            assert np.array_equal(images[camera], whole[row][camera])
    # Left in the middle, and asked anew.
    pass_ = frames.decode()
    next(pass_)
    del pass_
    assert np.array_equal(frames.images([0])[frames.cameras[0]][0], whole[0][frames.cameras[0]])
    with pytest.raises(ValueError, match="ascend"):
        next(frames.decode([1, 0]))


def test_tasks_are_those_of_the_episodes(datasets: dict[str, Path]) -> None:
    dataset = _open(datasets["images"])
    assert set(Frames(dataset, (0, 1)).tasks) == {TASK, OTHER}
    frames = Frames(dataset, (1, 3))
    assert frames.tasks == (OTHER,)
    assert not frames.task.any()


def test_reading_needs_neither_torch_nor_lerobot(datasets: dict[str, Path], home: Path) -> None:
    code = (
        "import sys; from app.dataset import open_dataset; from app.frames import Frames\n"
        "for root in sys.argv[1:]:\n"
        "  dataset = open_dataset(root, held_out=0.2, seed=0)\n"
        "  frames = Frames(dataset, dataset.episodes)\n"
        "  frames.images([1]); next(frames.decode()); frames.fingerprint()\n"
        "assert not {'torch', 'lerobot', 'datasets', 'pandas'} & set(sys.modules)"
    )
    roots = [str(datasets["video"]), str(datasets["images"])]
    subprocess.run([sys.executable, "-c", code, *roots], check=True, timeout=60, cwd=ROOT)


def test_single_rows_of_stored_images_leave_nothing_behind(
    datasets: dict[str, Path], home: Path
) -> None:
    dataset = _open(datasets["images"])
    frames = Frames(dataset, dataset.episodes)
    assert not home.exists()
    first = frames.images([40, 2])
    assert np.array_equal(first[frames.cameras[0]], frames.images([40, 2])[frames.cameras[0]])
    assert not [path for path in home.rglob("*") if path.is_file()]


def test_no_room_for_single_rows_is_one_sentence(datasets: dict[str, Path], home: Path) -> None:
    dataset = _open(datasets["images"])
    frames = Frames(dataset, dataset.episodes)
    home.write_text("a file where the directory would be")
    with pytest.raises(StorageError, match="make room") as caught:
        frames.images([0])
    assert "\n" not in str(caught.value)
    home.unlink()
    assert frames.images([0])


@pytest.mark.parametrize("kind", ["video, of another program", "images"])
def test_threads_do_not_disturb_each_other(
    kind: str, datasets: dict[str, Path], home: Path
) -> None:
    """A batch is read ahead in one thread while another one evaluates, and a third builds a cache."""
    dataset = _open(datasets[kind])
    frames = Frames(dataset, dataset.episodes)
    camera = frames.cameras[0]
    expected = np.stack([images[camera] for _, images in frames.decode()])

    def random(seed: int) -> bool:
        rows = np.random.default_rng(seed).permutation(len(frames))[:40]
        return np.array_equal(frames.images(rows)[camera], expected[rows])

    def ordered(_: int) -> bool:
        return all(np.array_equal(images[camera], expected[row]) for row, images in frames.decode())

    frames = Frames(dataset, dataset.episodes)
    with ThreadPoolExecutor(6) as threads:
        jobs = [threads.submit(job, seed) for seed in range(3) for job in (random, ordered)]
        assert all(job.result() for job in jobs)


def test_many_files_are_not_all_kept_open(tmp_path: Path) -> None:
    count = 40
    dataset = _open(record(tmp_path / "many", (2,) * count, apart=True))
    frames = Frames(dataset, dataset.episodes)
    camera = frames.cameras[0]
    decoded = {row: images[camera] for row, images in frames.decode()}
    before = len(os.listdir("/proc/self/fd"))
    for rows in (range(0, 2 * count, 2), range(2 * count - 1, 0, -2)):
        found = frames.images(list(rows))[camera]
        assert all(np.array_equal(found[place], decoded[row]) for place, row in enumerate(rows))
    # Four files for each of at most eight decoders of either camera.
    assert len(os.listdir("/proc/self/fd")) - before <= min(64, 8 * len(os.sched_getaffinity(0)))


def _set(column: str, frame: int, value: float) -> Callable[[Path], None]:
    def change(rows: list[list[float]]) -> list[list[float]]:
        rows[frame][3] = value
        return rows

    return lambda root: edit_column(data(root), column, change)


@pytest.mark.parametrize("column", [STATE, ACTION])
def test_values_that_are_not_finite_are_refused(column: str, copy: Path) -> None:
    # Frame 70 is the sixth of episode 2.
    _set(column, 70, float("nan"))(copy)
    dataset = _open(copy)
    with pytest.raises(
        DatasetError, match=f"episode 2 of .* values of {column} .* not finite"
    ) as caught:
        Frames(dataset, dataset.episodes)
    assert str(copy) in str(caught.value)
    assert len(Frames(dataset, (0, 1, 3))) == 110


def _cut(path: Path, share: float) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[: round(share * len(whole))])


def _shorten(path: Path, images: int) -> None:
    """Leave out the video's last images."""
    import av

    with av.open(str(path)) as source, av.open(f"{path}.new", "w", "mp4") as out:
        stream = out.add_stream_from_template(source.streams.video[0])
        packets = [packet for packet in source.demux(video=0) if packet.size]
        for packet in packets[:-images]:
            packet.stream = stream
            out.mux(packet)
    Path(f"{path}.new").replace(path)


def _late(root: Path) -> None:
    column = "videos/observation.images.top/from_timestamp"
    edit_column(meta_rows(root), column, lambda starts: [start + 0.01 for start in starts])


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "short": (lambda root: _shorten(video(root), 7), "lacks the images of 7 of 150 frames"),
    "cut": (lambda root: _cut(video(root), 0.5), "lacks the images of"),
    "no video": (lambda root: video(root).write_text("no video"), "cannot be read"),
    "gone": (lambda root: video(root).unlink(), "cannot be read"),
    "late by 10 ms": (_late, "lacks the images of 150 of 150 frames"),
    "of another size": (
        lambda root: edit_info(
            root,
            lambda info: info["features"]["observation.images.top"].update(shape=[48, 64, 3]),
        ),
        "128x96 pixels where meta/info.json says 64x48",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_video_is_one_sentence(fault: str, copy: Path) -> None:
    damage, expected = FAULTS[fault]
    # The metadata is read when the dataset is opened, the files later.
    dataset = _open(copy)
    damage(copy)
    if fault in {"late by 10 ms", "of another size"}:
        dataset = _open(copy)
    frames = Frames(dataset, dataset.episodes)
    for read in (lambda: list(frames.decode()), lambda: frames.images(range(len(frames)))):
        with pytest.raises(DatasetError, match=expected) as caught:
            read()
        assert str(copy) in str(caught.value)
        assert "\n" not in str(caught.value)


def _replace(frame: int, image: dict[str, Any]) -> Callable[[Path], None]:
    """Put another image in the first camera's column, in a file of one row group."""

    def change(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [*rows[:frame], image, *rows[frame + 1 :]]

    return lambda root: edit_column(data(root), "observation.images.top", change)


def _png(height: int, width: int, mode: str = "RGB") -> dict[str, Any]:
    from PIL import Image

    file = io.BytesIO()
    Image.new(mode, (width, height)).save(file, "png")
    return {"bytes": file.getvalue(), "path": None}


STORED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no image": (_replace(14, {"bytes": None, "path": "x.png"}), "row 14 .* not in the file"),
    "no png": (_replace(14, {"bytes": b"no png", "path": None}), "row 14 .* in no image format"),
    "cut": (
        _replace(14, {"bytes": _png(96, 128)["bytes"][:-40], "path": None}),
        "row 14 .* cannot be used",
    ),
    "of another size": (_replace(14, _png(48, 64)), "row 14 .* 64x48 pixels, .* says 128x96"),
    "grey": (_replace(14, _png(96, 128, "L")), "row 14 .* mode L"),
    "numbers": (
        lambda root: edit_column(
            data(root), "observation.images.top", lambda rows: [1] * len(rows), pa.int64()
        ),
        "does not hold observation.images.top as images .*int64",
    ),
}


@pytest.mark.parametrize("fault", STORED)
def test_a_damaged_image_is_one_sentence(
    fault: str, datasets: dict[str, Path], tmp_path: Path, home: Path
) -> None:
    damage, expected = STORED[fault]
    copy = shutil.copytree(datasets["images"], tmp_path / "copy")
    damage(copy)
    dataset = _open(copy)
    frames = Frames(dataset, dataset.episodes)
    for read in (lambda: list(frames.decode()), lambda: frames.images([20, 14])):
        with pytest.raises(DatasetError, match=expected) as caught:
            read()
        assert str(copy) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_the_fingerprint_is_of_what_decides_images_and_tasks(copy: Path, tmp_path: Path) -> None:
    def fingerprint(root: Path, episodes: tuple[int, ...] = (0, 1, 2)) -> str:
        return Frames(_open(root), episodes).fingerprint()

    whole = fingerprint(copy)
    assert fingerprint(copy) == whole
    shutil.copytree(copy, tmp_path / "elsewhere")
    assert fingerprint(tmp_path / "elsewhere") == whole
    assert fingerprint(copy, (0, 1)) != whole
    # States and actions are none of its concern, another image and another sentence are.
    _set(ACTION, 0, 1.0)(copy)
    assert fingerprint(copy) == whole
    edit_column(copy / "meta" / "tasks.parquet", "task", lambda _: [OTHER])
    told = fingerprint(copy)
    assert told != whole
    _reencode(video(copy, "wrist"))
    assert fingerprint(copy) not in {whole, told}
