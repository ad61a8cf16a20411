"""Datasets to read: the same scene as lerobot's recorder keeps it in videos, and as images in the data files."""

import math
from pathlib import Path

import numpy as np
import numpy.typing as npt

from app.dataset_meta import JOINTS

FPS = 30
CAMERAS = ("top", "wrist")
# What SO-101 kits record.
HEIGHT, WIDTH = 480, 640
# Pixels by which the view moves to either side.
_SWAY = 32
# Standard deviation of a webcam's noise in shades of grey, and the pixels over which the scene is smooth.
_NOISE, _GRAIN = 2.0, 16

type Scene = npt.NDArray[np.float64]


def record(root: Path, episodes: int, length: int, *, video: bool) -> Path:
    """``episodes`` of ``length`` frames, two cameras that look at a moving scene; lerobot's own codec and settings."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    camera = {
        "dtype": "video" if video else "image",
        "shape": (HEIGHT, WIDTH, 3),
        "names": ["height", "width", "channels"],
    }
    vector = {"dtype": "float32", "shape": (6,), "names": [f"{joint}.pos" for joint in JOINTS]}
    dataset = LeRobotDataset.create(
        repo_id="benchmark/data",
        fps=FPS,
        root=root,
        features={
            "observation.state": vector,
            "action": vector,
            **{f"observation.images.{name}": camera for name in CAMERAS},
        },
        streaming_encoding=video,
    )
    random = np.random.default_rng(0)
    scenes = {f"observation.images.{name}": _scene(random) for name in CAMERAS}
    for episode in range(episodes):
        for frame in range(length):
            phase = 2 * math.pi * frame / (3 * FPS) + episode
            state = (40 * np.sin(phase + np.arange(6))).astype(np.float32)
            views = {
                key: _view(random, scene, phase + number)
                for number, (key, scene) in enumerate(scenes.items())
            }
            dataset.add_frame(
                {"observation.state": state, "action": state, "task": "Pick up the cube.", **views}
            )
        dataset.save_episode()
    dataset.finalize()
    return root


def _scene(random: np.random.Generator) -> Scene:
    """A smooth random picture, larger than a view."""
    height, width = HEIGHT + 2 * _SWAY, WIDTH + 2 * _SWAY
    coarse = random.uniform(0, 255, (height // _GRAIN + 2, width // _GRAIN + 2, 3))
    rows, columns = np.arange(height) / _GRAIN, np.arange(width) / _GRAIN
    top, left = rows.astype(int), columns.astype(int)
    down, right = (rows - top)[:, None, None], (columns - left)[None, :, None]
    above = coarse[top][:, left] * (1 - right) + coarse[top][:, left + 1] * right
    below = coarse[top + 1][:, left] * (1 - right) + coarse[top + 1][:, left + 1] * right
    scene: Scene = above * (1 - down) + below * down
    return scene


def _view(random: np.random.Generator, scene: Scene, phase: float) -> npt.NDArray[np.uint8]:
    down = round(_SWAY + _SWAY * math.cos(0.7 * phase))
    right = round(_SWAY + _SWAY * math.sin(phase))
    view = scene[down : down + HEIGHT, right : right + WIDTH]
    noise = random.normal(0, _NOISE, (HEIGHT, WIDTH, 1))
    return (view + noise).clip(0, 255).astype(np.uint8)
