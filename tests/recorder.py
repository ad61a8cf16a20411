"""A small LeRobot v3.0 dataset from lerobot's own recorder."""

from collections.abc import Sequence
from pathlib import Path

from app.dataset_meta import JOINTS

TASK = "Pick up the cube and place it in the box."
FPS = 30


def record(
    root: Path,
    lengths: Sequence[int] = (30, 35, 40, 45),
    *,
    video: bool = True,
    tasks: Sequence[str] = (TASK,),
    apart: bool = False,
) -> Path:
    """Episodes of so many frames, two cameras of 96x128, joints that follow sines in degrees.

    Images are h264 video, or PNGs in the data files; ``tasks`` take turns; ``apart`` gives episodes files of their own.
    """
    import numpy as np
    from lerobot.configs.video import RGBEncoderConfig
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    names = [f"{joint}.pos" for joint in JOINTS]
    camera_feature = {
        "dtype": "video" if video else "image",
        "shape": (96, 128, 3),
        "names": ["height", "width", "channels"],
    }
    vector = {"dtype": "float32", "shape": (6,), "names": names}
    dataset = LeRobotDataset.create(
        repo_id="test/site",
        fps=FPS,
        root=root,
        robot_type="so101",
        features={
            "observation.state": vector,
            "action": vector,
            "observation.images.top": camera_feature,
            "observation.images.wrist": camera_feature,
        },
        streaming_encoding=video,
        # On a busy machine the encoders fall behind: a frame that finds the queue full is dropped.
        encoder_queue_maxsize=max(lengths),
        rgb_encoder=RGBEncoderConfig(vcodec="h264"),
    )
    if apart:
        # Megabytes that every episode exceeds.
        dataset.meta.info.data_files_size_in_mb = dataset.meta.info.video_files_size_in_mb = 1e-4
    # Amplitude and offset in degrees; the gripper runs from 0 to 100.
    amplitude = np.array([40, 30, 50, 35, 60, 45])
    offset = np.array([0, -20, 30, 10, 0, 50])
    for episode, frames in enumerate(lengths):
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
                    "task": tasks[episode % len(tasks)],
                    **images,
                }
            )
        dataset.save_episode()
    dataset.finalize()
    return root
