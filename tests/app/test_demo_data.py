"""Demonstration data: real physics, real rendering, read back by the real LeRobotDataset."""

import ctypes
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from typer.testing import CliRunner

from app import demo_data, demo_scene
from app.dataset_meta import JOINTS
from app.demo_data import RECIPE, cli, layout_of, make_site
from app.demo_sites import REACH_X, REACH_Y, profile_of
from certs.errors import ConfigError, DatasetError, FleetError, ToolError

EPISODES = 2


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sites of two episodes each."""
    out = tmp_path_factory.mktemp("demo")
    for site in ("site-a", "site-b"):
        assert make_site(out, site, episodes=EPISODES) == out / site
    return out


def columns(root: Path) -> dict[str, NDArray[Any]]:
    table = pq.read_table(root / "data")
    return {
        name: np.stack(table[name].to_numpy())
        for name in ("observation.state", "action", "episode_index")
    }


def open_dataset(root: Path) -> Any:
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    return LeRobotDataset(f"local/{root.name}", root=root, video_backend="pyav")


def image(dataset: Any, index: int, camera: str) -> NDArray[np.uint8]:
    """[height, width, 3]"""
    frame: NDArray[np.float32] = dataset[index][f"observation.images.{camera}"].numpy()
    return np.round(frame * 255).astype(np.uint8).transpose(1, 2, 0)


def pixels_like(picture: NDArray[np.uint8], colour: tuple[float, float, float]) -> int:
    """Pixels whose hue is that of ``colour``, however bright."""
    wanted = np.array(colour) / np.linalg.norm(colour)
    values = picture.astype(float)
    lengths = np.linalg.norm(values, axis=-1)
    cosine = (values @ wanted) / np.maximum(lengths, 1)
    return int(((cosine > 0.97) & (lengths > 40)).sum())


# --- what is recorded


@pytest.mark.sim
def test_it_is_a_lerobot_v3_recording_of_an_so101(made: Path) -> None:
    info = json.loads((made / "site-a" / "meta" / "info.json").read_text())
    assert info["codebase_version"] == "v3.0"
    assert info["robot_type"] == "so101_follower"
    assert info["fps"] == 10
    assert info["total_episodes"] == EPISODES
    names = [f"{joint}.pos" for joint in JOINTS]
    for key in ("observation.state", "action"):
        assert info["features"][key]["names"] == names
        assert info["features"][key]["dtype"] == "float32"
    for camera in ("top", "wrist"):
        feature = info["features"][f"observation.images.{camera}"]
        assert feature["dtype"] == "video"
        assert feature["info"]["video.codec"] == "h264"


@pytest.mark.sim
def test_joints_are_degrees_and_the_gripper_is_percent(made: Path) -> None:
    for site in ("site-a", "site-b"):
        data = columns(made / site)
        for key in ("observation.state", "action"):
            arm, gripper = data[key][:, :5], data[key][:, 5]
            assert np.isfinite(data[key]).all()
            assert np.abs(arm).max() > 10  # radians would stay below 3
            assert np.abs(arm).max() <= 165
            assert gripper.min() >= 0
            assert gripper.max() <= 100
            assert gripper.max() - gripper.min() > 30  # it closes on the block and lets go
        # A state follows the action of the frame before: closer to it than to nothing at all.
        first = data["episode_index"] == 0
        state, action = data["observation.state"][first], data["action"][first]
        followed = np.abs(state[1:, :5] - action[:-1, :5]).mean()
        assert followed < np.abs(state[1:, :5] - action[:-1, :5].mean(axis=0)).mean()


@pytest.mark.sim
def test_frames_show_block_and_goal_from_both_cameras(made: Path) -> None:
    for site in ("site-a", "site-b"):
        dataset, profile = open_dataset(made / site), profile_of(site)
        assert dataset[0]["task"] == profile.task
        length = int(dataset.meta.episodes[0]["length"])
        for camera in ("top", "wrist"):
            pictures = [image(dataset, index, camera) for index in range(0, length, 5)]
            assert pictures[0].shape == (demo_scene.HEIGHT, demo_scene.WIDTH, 3)
            assert all(30 < picture.mean() < 245 and picture.std() > 10 for picture in pictures)
            for colour in (profile.block_rgb, profile.goal_rgb):
                # At 160 x 120 the block is about 12 pixels wide from above.
                assert max(pixels_like(picture, colour) for picture in pictures) > 40, camera


@pytest.mark.sim
def test_cameras_differ_and_sites_differ(made: Path) -> None:
    a, b = open_dataset(made / "site-a"), open_dataset(made / "site-b")
    assert a[0]["task"] != b[0]["task"]
    for one, other in (
        (image(a, 10, "top"), image(a, 10, "wrist")),
        (image(a, 10, "top"), image(b, 10, "top")),
        (image(a, 10, "wrist"), image(b, 10, "wrist")),
    ):
        assert np.abs(one.astype(int) - other.astype(int)).mean() > 20
    # One region lies at the robot's left, the other at its right, towards greater pan angles:
    # 1.5 s into an episode the gripper is above the block.
    pan = {}
    for site in ("site-a", "site-b"):
        data = columns(made / site)
        starts = np.searchsorted(data["episode_index"], range(EPISODES))
        pan[site] = data["action"][starts + 15, 0]
    assert pan["site-a"].max() < pan["site-b"].min()


# --- what it is good for


@pytest.mark.sim
def test_recorded_actions_alone_solve_the_task_again(made: Path) -> None:
    data = columns(made / "site-a")
    scene = demo_scene.Scene(profile_of("site-a"))
    try:
        solved = 0
        for episode in range(EPISODES):
            rows = data["episode_index"] == episode
            scene.reset(layout_of("site-a", 0, episode))
            placed = [scene.step(action) for action in data["action"][rows]]
            solved += placed[-1]
            assert not any(placed[:-1])  # the episode ends where the task is solved
    finally:
        scene.close()
    assert solved == EPISODES


@pytest.mark.sim
def test_joint_targets_of_the_expert_generalise_over_layouts_and_sites() -> None:
    solved = 0
    for site in ("site-c", "lab-7"):
        scene = demo_scene.Scene(profile_of(site))
        try:
            for attempt in range(5):
                layout = layout_of(site, 1, attempt)
                targets = scene.plan(layout)
                if targets is not None:
                    scene.reset(layout)
                    solved += any(scene.step(action) for action in targets)
        finally:
            scene.close()
    assert solved >= 9


@pytest.mark.sim
def test_doing_nothing_does_not_solve_the_task() -> None:
    scene = demo_scene.Scene(profile_of("site-a"))
    try:
        scene.reset(layout_of("site-a", 0, 0))
        resting = scene.state()
        assert not any(scene.step(resting) for _ in range(30))
    finally:
        scene.close()


# --- reproducible and kept


@pytest.mark.sim
def test_same_seed_same_arrays_bit_for_bit(made: Path, tmp_path: Path) -> None:
    again = columns(make_site(tmp_path / "again", "site-a", episodes=EPISODES))
    other = columns(make_site(tmp_path / "other", "site-a", episodes=EPISODES, seed=1))
    first = columns(made / "site-a")
    for key in ("observation.state", "action"):
        assert first[key].tobytes() == again[key].tobytes()
        assert first[key].tobytes() != other[key].tobytes()


@pytest.mark.sim
def test_a_complete_dataset_is_reused_and_an_incomplete_or_different_one_remade(
    made: Path, tmp_path: Path
) -> None:
    root = tmp_path / "site-a"
    shutil.copytree(made / "site-a", root)
    (root / "note-of-a-reader").touch()
    start = time.monotonic()
    assert make_site(tmp_path, "site-a", episodes=EPISODES) == root
    assert time.monotonic() - start < 0.5
    assert (root / "note-of-a-reader").exists()

    next(root.rglob("*.mp4")).write_bytes(b"cut off")
    seen: list[tuple[int, int]] = []
    make_site(
        tmp_path, "site-a", episodes=EPISODES, progress=lambda done, all_: seen.append((done, all_))
    )
    assert seen == [(1, 2), (2, 2)]
    assert not (root / "note-of-a-reader").exists()
    assert columns(root)["action"].tobytes() == columns(made / "site-a")["action"].tobytes()

    make_site(tmp_path, "site-a", episodes=3)
    assert json.loads((root / "meta" / "info.json").read_text())["total_episodes"] == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == [".site-a.lock", "site-a"]


@pytest.mark.sim
def test_an_interrupted_recording_leaves_nothing_and_what_a_killed_one_left_is_cleared(
    tmp_path: Path,
) -> None:
    def interrupt(done: int, wanted: int) -> None:
        assert (tmp_path / ".site-a.partial" / "meta" / "info.json").exists()
        assert not (tmp_path / "site-a").exists()
        raise KeyboardInterrupt

    killed = tmp_path / ".site-a.partial" / "meta"
    killed.mkdir(parents=True)
    (killed / "half-written").touch()
    with pytest.raises(KeyboardInterrupt):
        make_site(tmp_path, "site-a", episodes=EPISODES, progress=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == [".site-a.lock"]

    root = make_site(tmp_path, "site-a", episodes=EPISODES)
    assert len(open_dataset(root)) > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [".site-a.lock", "site-a"]


@pytest.mark.sim
def test_the_command_records_sites_in_parallel_and_prints_plain_lines(
    made: Path, tmp_path: Path
) -> None:
    arguments = ["make", str(tmp_path), "--site", "site-a", "--site", "lab-7", "--episodes", "2"]
    result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert result.stdout.split() == [str(tmp_path / "site-a"), str(tmp_path / "lab-7")]
    assert sorted(result.stderr.splitlines()) == [
        f"{site}: recorded episode {done} of 2" for site in ("lab-7", "site-a") for done in (1, 2)
    ]
    # Recorded in another process, still the same bits.
    first, second = columns(made / "site-a"), columns(tmp_path / "site-a")
    assert first["action"].tobytes() == second["action"].tobytes()
    assert first["observation.state"].tobytes() == second["observation.state"].tobytes()
    assert {path.stat().st_mode & 0o444 for path in tmp_path.rglob("*.mp4")} == {0o444}


# --- refusals


@pytest.mark.parametrize(
    ("site", "episodes", "seed", "error"),
    [
        ("Site-A", 2, 0, DatasetError),
        ("", 2, 0, DatasetError),
        ("../escape", 2, 0, DatasetError),
        ("site-a\n", 2, 0, DatasetError),
        ("a" * 64, 2, 0, DatasetError),
        ("site-a", 1, 0, ConfigError),
        ("site-a", 2, -1, ConfigError),
    ],
)
def test_bad_arguments_are_one_sentence(
    tmp_path: Path, site: str, episodes: int, seed: int, error: type[FleetError]
) -> None:
    with pytest.raises(error) as caught:
        make_site(tmp_path, site, episodes=episodes, seed=seed)
    assert "\n" not in str(caught.value)
    with pytest.raises(error):
        demo_data.make_sites(tmp_path, [site], episodes=episodes, seed=seed)
    assert not any(tmp_path.iterdir())


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    blocked = tmp_path / "a-file"
    blocked.touch()
    with pytest.raises(DatasetError, match=r"site-a in .*a-file.*you may write to"):
        make_site(blocked, "site-a")


def test_someone_elses_dataset_is_never_replaced(tmp_path: Path) -> None:
    precious = tmp_path / "site-a" / "meta" / "info.json"
    precious.parent.mkdir(parents=True)
    precious.write_text("{}")
    with pytest.raises(DatasetError, match="was not made by this command"):
        make_site(tmp_path, "site-a")
    assert precious.read_text() == "{}"


def test_without_opengl_the_packages_to_install_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> ctypes.CDLL:
        raise OSError(name)

    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.setattr(ctypes, "CDLL", absent)
    with pytest.raises(ToolError, match=r"libegl1 libgl1-mesa-dri libopengl0.*libosmesa6"):
        demo_scene.select_gl()
    assert "MUJOCO_GL" not in os.environ


def test_a_back_end_that_does_not_load_is_a_tool_error(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from app.demo_data import make_site\n"
        "from certs.errors import ToolError\n"
        "try: make_site(Path(sys.argv[1]), 'site-a')\n"
        "except ToolError as error: print(error)"
    )
    environment = {**os.environ, "MUJOCO_GL": "no-such-back-end"}
    result = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.stdout.startswith("MuJoCo cannot render"), result.stderr
    assert not (tmp_path / "site-a").exists()


# --- parts


def test_importing_the_module_loads_neither_mujoco_nor_lerobot() -> None:
    script = (
        "import sys, app.demo_data; print({'mujoco', 'torch', 'lerobot', 'numpy'} & {*sys.modules})"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert result.stdout == "set()\n"


def test_an_unnamed_site_has_the_same_profile_in_every_process() -> None:
    script = "from app.demo_sites import profile_of; print(profile_of('lab-7'))"
    result = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONHASHSEED": "7"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert result.stdout == f"{profile_of('lab-7')}\n"


@given(st.from_regex(r"[a-z0-9-]{1,63}", fullmatch=True), st.integers(0, 2**32))
def test_every_site_name_has_a_profile_within_reach(site: str, seed: int) -> None:
    profile = profile_of(site)
    assert profile.block != profile.goal
    layout = layout_of(site, seed, 0)
    assert layout == layout_of(site, seed, 0)
    for x, y in (layout.block, layout.goal):
        assert REACH_X[0] <= x <= REACH_X[1]
        assert REACH_Y[0] <= y <= REACH_Y[1]
    assert profile.block_x[0] <= layout.block[0] <= profile.block_x[1]
    assert profile.block_y[0] <= layout.block[1] <= profile.block_y[1]
    assert np.hypot(*np.subtract(layout.block, layout.goal)) >= 0.08


def test_the_named_sites_differ_in_everything_a_policy_sees() -> None:
    profiles = [profile_of(f"site-{letter}") for letter in "abcd"]
    for one, other in itertools.combinations(profiles, 2):
        assert one.task != other.task
        assert one.block != other.block
        assert one.table != other.table
        assert one.camera_offset != other.camera_offset
        assert (one.block_x, one.block_y) != (other.block_x, other.block_y)


def test_decimation_keeps_the_shape_and_the_winding() -> None:
    # A cylinder of radius 20 mm and height 40 mm as 4 x 400 x 100 triangles on its side.
    turns, rings = 400, 100
    angle = np.linspace(0, 2 * np.pi, turns, endpoint=False)
    height = np.linspace(0, 0.04, rings + 1)
    grid = np.stack(
        np.broadcast_arrays(
            0.02 * np.cos(angle)[None], 0.02 * np.sin(angle)[None], height[:, None]
        ),
        axis=-1,
    )
    ring, turn = np.meshgrid(np.arange(rings), np.arange(turns), indexing="ij")
    a, b = ring * turns + turn, ring * turns + (turn + 1) % turns
    faces = np.concatenate(
        [np.stack([a, b, b + turns], axis=-1), np.stack([a, b + turns, a + turns], axis=-1)]
    )
    vertices, fewer = demo_scene.decimate(
        grid.reshape(-1, 3).astype(np.float32), faces.reshape(-1, 3).astype(np.int32), cell=0.004
    )
    assert len(fewer) < 2 * turns * rings / 20
    assert np.abs(np.hypot(vertices[:, 0], vertices[:, 1]) - 0.02).max() < 0.002
    corners = vertices[fewer]
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    outwards = (normals[:, :2] * corners.mean(axis=1)[:, :2]).sum(axis=1)
    assert (outwards > 0).mean() > 0.95
    area = np.linalg.norm(normals, axis=1).sum() / 2
    assert area == pytest.approx(2 * np.pi * 0.02 * 0.04, rel=0.12)


def test_the_recipe_is_the_last_file_and_lists_the_others(tmp_path: Path) -> None:
    recipe = demo_data._recipe("site-a", 2, 0)
    (tmp_path / "data").write_bytes(b"1234")
    assert not demo_data._complete(tmp_path, recipe)
    (tmp_path / RECIPE).write_text(json.dumps({"recipe": recipe, "files": {"data": 4}}))
    assert demo_data._complete(tmp_path, recipe)
    assert not demo_data._complete(tmp_path, demo_data._recipe("site-a", 2, 1))
    (tmp_path / RECIPE).write_text("{half")
    assert not demo_data._complete(tmp_path, recipe)
