"""Evaluation: the same weights give the same number, and padding does not count."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from app import evaluation
from app.dataset import SiteDataset
from app.evaluation import evaluate, evaluate_rows, spread
from app.frames import Frames
from app.policy import CAMERAS, load_processors
from app.statistics import moments_of, normalisation

if TYPE_CHECKING:
    from app.prefix import Prefix


@pytest.fixture
def frames(dataset: SiteDataset) -> Frames:
    return Frames(dataset, dataset.held_out_episodes)


def _lerobot(processors: Any, dataset: SiteDataset, rows: Sequence[int]) -> tuple[Any, Any]:
    """These held-out rows as lerobot reads them: collated, and preprocessed."""
    from torch.utils.data import default_collate

    opened = dataset.lerobot(dataset.held_out_episodes)
    items = default_collate([opened[row] for row in rows])
    return items, processors[0](
        {**items, **{camera: items[camera].float() / 255 for camera in CAMERAS if camera in items}}
    )


def test_equals_lerobots_own_forward_and_prediction(
    policy: Any, processors: Any, dataset: SiteDataset, frames: Frames
) -> None:
    """The loss of ``SmolVLAPolicy.forward`` and the error of its ``predict_action_chunk`` for the same draws."""
    import torch

    rows = spread(len(frames), 6)
    items, batch = _lerobot(processors, dataset, rows)
    draws = [
        [evaluation._draw(policy, index, stratum, 7) for index in items["index"].tolist()]
        for stratum in range(5)
    ]
    noises = [torch.from_numpy(np.stack([noise for noise, _ in drawn])) for drawn in draws]
    times = [torch.tensor([time for _, time in drawn], dtype=torch.float32) for drawn in draws]
    with torch.no_grad():
        losses = [
            policy.forward(dict(batch), noises[stratum], times[stratum], reduction="none")[0]
            for stratum in range(4)
        ]
    predicted = processors[1](policy.predict_action_chunk(dict(batch), noise=noises[4]))
    inside = ~items["action_is_pad"]
    assert not inside.all()
    squares = (predicted - items["action"])[inside].double().square()

    result = evaluate_rows(policy, processors, frames, rows, batch_size=4, seed=7)
    assert result.loss == pytest.approx(torch.stack(losses).mean().item(), rel=1e-6)
    assert result.rmse_deg == pytest.approx(squares.mean(dim=0).sqrt().tolist(), rel=1e-6)
    assert result.frames == 6


def test_batch_size_and_order_do_not_matter(policy: Any, processors: Any, frames: Frames) -> None:
    import torch

    torch.manual_seed(1)
    one = evaluate(policy, processors, frames, batch_size=8, batches=2, seed=0)
    torch.manual_seed(2)
    assert evaluate(policy, processors, frames, batch_size=8, batches=2, seed=0) == one
    rows = spread(len(frames), 16)
    random.Random(0).shuffle(rows)  # noqa: S311
    for size in (1, 5, 16):
        other = evaluate_rows(policy, processors, frames, rows, batch_size=size, seed=0)
        assert other.loss == pytest.approx(one.loss, rel=1e-6)
        assert other.rmse_deg == pytest.approx(one.rmse_deg, rel=1e-6)
        assert other.frames == one.frames == 16


def test_another_seed_is_another_draw_of_nearly_the_same_loss(
    policy: Any, processors: Any, frames: Frames
) -> None:
    losses = [
        evaluate(policy, processors, frames, batch_size=16, batches=1, seed=seed).loss
        for seed in range(3)
    ]
    assert len(set(losses)) == 3
    assert np.std(losses) < 0.05 * np.mean(losses)


def test_estimates_the_loss_that_training_minimises(
    policy: Any, processors: Any, dataset: SiteDataset, frames: Frames
) -> None:
    import torch

    rows = spread(len(frames), 8)
    ours = [
        evaluate_rows(policy, processors, frames, rows, batch_size=8, seed=seed).loss
        for seed in range(8)
    ]
    _, batch = _lerobot(processors, dataset, rows)
    torch.manual_seed(0)
    with torch.no_grad():
        draws = [policy.forward(dict(batch), reduction="none")[0].mean().item() for _ in range(100)]
    # lerobot draws noise and times itself; both are averaged until they settle to about 2 %.
    assert np.mean(ours) == pytest.approx(np.mean(draws), rel=0.05)


def test_padding_after_the_end_does_not_count(
    policy: Any, processors: Any, frames: Frames, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the actions beyond the end are taken to be must not change a digit."""
    rows = spread(len(frames), 6)
    windows, padding = frames.windows(rows, 50)
    assert padding[-1].any()
    plain = evaluate_rows(policy, processors, frames, rows, batch_size=3, seed=0)

    def shifted(rows: Sequence[int], chunk: int) -> Any:
        windows, padding = Frames.windows(frames, rows, chunk)
        return np.where(padding, 0, windows), padding

    monkeypatch.setattr(frames, "windows", shifted)
    assert not np.array_equal(frames.action[frames.windows(rows, 50)[0]], frames.action[windows])
    assert evaluate_rows(policy, processors, frames, rows, batch_size=3, seed=0) == plain


def test_rmse_is_in_degrees(
    policy: Any,
    tiny_base: Path,
    dataset: SiteDataset,
    frames: Frames,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A policy that predicts the mean errs by the spread of the actions around it."""
    import torch

    statistics = normalisation(moments_of(dataset))
    processors = load_processors(tiny_base, policy, statistics)
    monkeypatch.setattr("app.prefix.denoise", lambda *inputs: torch.zeros(len(inputs[-1]), 50, 6))
    rows = spread(len(frames), 10)
    result = evaluate_rows(policy, processors, frames, rows, batch_size=4, seed=0)
    windows, padding = frames.windows(rows, 50)
    actions = frames.action[windows][~padding].astype(np.float64)
    expected = np.sqrt(((actions - statistics["action"]["mean"]) ** 2).mean(axis=0))
    assert result.rmse_deg == pytest.approx(expected, rel=1e-5)


def test_a_cache_gives_the_same_figures_without_an_image(
    policy: Any, processors: Any, dataset: SiteDataset, frames: Frames
) -> None:
    """What a cache answers is used as it is; nothing is decoded beside it."""
    from app.prefix import Prefix, compute

    plain = evaluate(policy, processors, frames, batch_size=4, batches=2, seed=0)
    rows = spread(len(frames), 8)
    _, batch = _lerobot(processors, dataset, rows)
    whole = compute(policy, batch)

    class Cache:
        def prefix(self, wanted: Sequence[int]) -> "Prefix":
            chosen = [rows.index(row) for row in wanted]
            return Prefix(whole.kv[chosen], whole.mask[chosen])

    def no_images(rows: Any) -> Any:
        raise AssertionError("an image was decoded")

    cache: Any = Cache()
    frames.images = no_images  # type: ignore[method-assign]
    cached = evaluate(policy, processors, frames, batch_size=4, batches=2, seed=0, cache=cache)
    assert cached.loss == pytest.approx(plain.loss, rel=1e-6)
    assert cached.rmse_deg == pytest.approx(plain.rmse_deg, rel=1e-6)
    assert cached.frames == plain.frames == 8


def test_training_mode_changes_nothing_and_is_left_as_it_was(
    policy: Any, processors: Any, frames: Frames
) -> None:
    results = []
    for mode in (True, False):
        policy.train(mode)
        results.append(evaluate(policy, processors, frames, batch_size=2, batches=1, seed=0))
        assert policy.training is mode
    assert results[0] == results[1]


@pytest.mark.parametrize(
    ("total", "count", "expected"),
    [
        (10, 5, [1, 3, 5, 7, 9]),
        (3, 8, [0, 1, 2]),
        (100, 2, [25, 75]),
        (7, 3, [1, 3, 5]),
        (5, 1, [2]),
    ],
)
def test_frames_are_spread_evenly(total: int, count: int, expected: list[int]) -> None:
    assert spread(total, count) == expected
