"""Image augmentation: lerobot's own, drawn from seed, step, row and camera alone."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from app.augmentation import augment

TOP, WRIST = "observation.images.top", "observation.images.wrist"
type Images = dict[str, NDArray[np.uint8]]


@pytest.fixture(scope="module")
def images() -> Images:
    """Six frames of two cameras, all the same, so that differences are the augmentation's."""
    rows, columns = np.mgrid[0:48, 0:64]
    shades = (40 + 2 * rows, 60 + 2 * columns, 90 + rows + columns)
    image = np.stack([shade.astype(np.uint8) for shade in shades])
    return {camera: np.broadcast_to(image, (6, 3, 48, 64)).copy() for camera in (TOP, WRIST)}


def _drawn(images: Images, rows: list[int], step: int, seed: int = 0) -> Images:
    chosen = {camera: pixels[: len(rows)] for camera, pixels in images.items()}
    augmented = augment(chosen, rows, step, seed=seed, device="cpu")
    return {camera: pixels.numpy() for camera, pixels in augmented.items()}


def test_every_frame_camera_step_and_seed_draws_its_own(images: Images) -> None:
    first = _drawn(images, [0, 1, 2, 3, 4, 5], 7)
    seen = {image.tobytes() for camera in (TOP, WRIST) for image in first[camera]}
    assert len(seen) == 12
    for step, seed in ((8, 0), (7, 1)):
        again = _drawn(images, [0, 1, 2, 3, 4, 5], step, seed)
        assert not seen & {image.tobytes() for image in again[TOP]}
    for camera in (TOP, WRIST):
        assert first[camera].dtype == np.uint8
        assert first[camera].shape == images[camera].shape
        assert (first[camera] != images[camera]).any(axis=(1, 2, 3)).all()


def test_a_step_in_parts_is_the_step_in_one(images: Images) -> None:
    rows = [11, 4, 7, 30, 2, 9]
    whole = _drawn(images, rows, 3)
    parts = [_drawn(images, rows[:2], 3), _drawn(images, rows[2:], 3)]
    for camera in (TOP, WRIST):
        assert np.array_equal(whole[camera], np.concatenate([part[camera] for part in parts]))


def test_nothing_else_sees_the_draws(images: Images) -> None:
    """The flow-matching noise of a step must not depend on whether images are augmented."""
    import torch

    torch.manual_seed(5)
    expected = torch.randn(4)
    torch.manual_seed(5)
    first = _drawn(images, [0, 1], 0)
    assert torch.equal(torch.randn(4), expected)
    # And the draws depend on nothing that was drawn before.
    assert np.array_equal(_drawn(images, [0, 1], 0)[TOP], first[TOP])


def test_it_is_lerobots_own(images: Images, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each frame goes through three of lerobot's six transforms, and all of them have their turn."""
    from lerobot.transforms import ImageTransforms, ImageTransformsConfig
    from lerobot.transforms.transforms import RandomSubsetApply

    used: list[list[str]] = []
    apply = RandomSubsetApply.forward

    def watched(self: Any, image: Any) -> Any:
        changed = apply(self, image)
        used.append([repr(one) for one in self.selected_transforms])
        return changed

    monkeypatch.setattr(RandomSubsetApply, "forward", watched)
    for step in range(4):
        _drawn(images, [0, 1, 2, 3, 4, 5], step)
    offered = {repr(one) for one in ImageTransforms(ImageTransformsConfig()).transforms.values()}
    assert len(offered) == 6
    assert len(used) == 4 * 2 * 6
    assert {len(set(each)) for each in used} == {3}
    assert {one for each in used for one in each} == offered


@pytest.mark.parametrize("constant", [True, False])
def test_a_step_trains_on_augmented_images(
    constant: bool, tiny_base: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    """Whether the prefix is computed of them, or lerobot's own forward pass is given them."""
    from app.dataset import open_dataset
    from app.frames import Frames
    from app.loader import Loader
    from app.policy import load_policy, load_processors
    from app.prefix_cache import PrefixCache
    from app.statistics import moments_of, normalisation

    policy = load_policy(tiny_base, "cpu")
    if not constant:
        next(policy.model.vlm_with_expert.vlm.parameters()).requires_grad = True
    dataset = open_dataset(str(tiny_dataset), held_out=0.25, seed=0)
    processors = load_processors(tiny_base, policy, normalisation(moments_of(dataset)))
    frames = Frames(dataset, dataset.train_episodes)

    def seen(step: int, **options: Any) -> Any:
        cache = PrefixCache.open(
            policy,
            processors,
            frames,
            range(10),
            choice="auto",
            frozen="",
            folder=tmp_path,
            progress=lambda *_: None,
            **options,
        )
        batch = Loader(policy, processors, frames, cache).batch([3, 9], step)
        if batch.prefix:
            return batch.prefix.kv
        assert batch.inputs
        return batch.inputs["observation.images.camera1"]

    augmented = partial(augment, seed=0, device="cpu")
    first = seen(1, augment=augmented)
    assert first.equal(seen(1, augment=augmented))
    assert not first.equal(seen(2, augment=augmented))
    assert not first.equal(seen(1))
