"""Fixtures on real parts: the tiny SmolVLA, a LeRobot v3.0 dataset from lerobot's own recorder, a hub on loopback."""

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.dataset_meta import JOINTS
from tests.hub import Hub, serving

# Before anything imports torch or huggingface_hub: one thread (tiny models get slower with more), no hub, own caches.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="vlafleet-test-hf-")
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)

TASK = "Pick up the cube and place it in the box."
FPS = 30


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models directory that holds the tiny base."""
    from app.tiny_base import ensure_tiny_base

    folder = tmp_path_factory.mktemp("models")
    ensure_tiny_base(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_base(models: Path) -> Path:
    return models / "tiny" / "base"


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four episodes of 30, 35, 40 and 45 frames, two h264 cameras of 96x128, joints that follow sines in degrees."""
    import numpy as np
    from lerobot.configs.video import RGBEncoderConfig
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    root = tmp_path_factory.mktemp("data") / "site"
    names = [f"{joint}.pos" for joint in JOINTS]
    video = {"dtype": "video", "shape": (96, 128, 3), "names": ["height", "width", "channels"]}
    vector = {"dtype": "float32", "shape": (6,), "names": names}
    dataset = LeRobotDataset.create(
        repo_id="test/site",
        fps=FPS,
        root=root,
        robot_type="so101",
        features={
            "observation.state": vector,
            "action": vector,
            "observation.images.top": video,
            "observation.images.wrist": video,
        },
        streaming_encoding=True,
        rgb_encoder=RGBEncoderConfig(vcodec="h264"),
    )
    # Amplitude and offset in degrees; the gripper runs from 0 to 100.
    amplitude = np.array([40, 30, 50, 35, 60, 45])
    offset = np.array([0, -20, 30, 10, 0, 50])
    for episode, frames in enumerate((30, 35, 40, 45)):
        for frame in range(frames):
            phase = 2 * np.pi * frame / FPS + episode
            state = amplitude * np.sin(phase + np.arange(6)) + offset
            action = amplitude * np.sin(phase + 0.2 + np.arange(6)) + offset
            images = {}
            for camera, shade in (("top", 60), ("wrist", 120)):
                image = np.full((96, 128, 3), shade, np.uint8)
                column = int(54 + 50 * np.sin(phase))
                image[40:56, column : column + 16] = (220, 40, 40)
                images[f"observation.images.{camera}"] = image
            dataset.add_frame(
                {
                    "observation.state": state.astype(np.float32),
                    "action": action.astype(np.float32),
                    "task": TASK,
                    **images,
                }
            )
        dataset.save_episode()
    dataset.finalize()
    return root


@pytest.fixture
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    with serving(tmp_path_factory.mktemp("hub")) as server:
        yield server
