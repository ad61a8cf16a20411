"""lerobot's image augmentation, the same for a frame and a step however the step is cut into batches."""

from collections.abc import Mapping, Sequence
from functools import cache
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch


def augment(
    images: Mapping[str, NDArray[np.uint8]],
    rows: Sequence[int] | NDArray[np.int64],
    step: int,
    *,
    seed: int,
    device: str,
) -> "dict[str, torch.Tensor]":
    """Each camera's images [B, 3, H, W] of these rows, changed on ``device`` by lerobot's ImageTransforms.

    Every image draws its own, as in lerobot's default config: three of brightness, contrast, saturation, hue,
    sharpness, and a small turn and shift. The draws are functions of seed, step, row and camera alone. They use torch's
    CPU generator and leave it as it was: no other thread may draw from it meanwhile.
    """
    import torch

    transform = _transform()
    augmented = {}
    with torch.random.fork_rng(devices=[]):
        for camera, pixels in images.items():
            changed = []
            for row, image in zip(rows, torch.from_numpy(pixels).to(device), strict=True):
                torch.default_generator.manual_seed(_seed(seed, step, int(row), camera))
                changed.append(transform(image))
            augmented[camera] = torch.stack(changed)
    return augmented


@cache
def _transform() -> Any:
    from lerobot.transforms import ImageTransforms, ImageTransformsConfig

    return ImageTransforms(ImageTransformsConfig(enable=True))


def _seed(seed: int, step: int, row: int, camera: str) -> int:
    digest = sha256(f"augment/{seed}/{step}/{row}/{camera}".encode()).digest()
    # 63 bits, so that it is a valid seed for every torch generator.
    return int.from_bytes(digest[:8], "little") >> 1
