"""Evaluation: the same weights give the same number, and padding does not count."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.dataset import SiteDataset, open_dataset
from app.evaluation import evaluate, evaluate_rows, spread
from app.policy import load_policy, load_processors
from app.statistics import moments_of, normalisation


@pytest.fixture(scope="module")
def dataset(tiny_dataset: Path) -> SiteDataset:
    return open_dataset(str(tiny_dataset), held_out=0.25, seed=0)


@pytest.fixture(scope="module")
def policy(tiny_base: Path) -> Any:
    return load_policy(tiny_base, "cpu")


@pytest.fixture(scope="module")
def processors(tiny_base: Path, policy: Any, dataset: SiteDataset) -> Any:
    return load_processors(tiny_base, policy, normalisation(moments_of(dataset)))


def test_batch_size_and_order_do_not_matter(
    policy: Any, processors: Any, dataset: SiteDataset
) -> None:
    import torch

    torch.manual_seed(1)
    one = evaluate(policy, processors, dataset, batch_size=8, batches=2, seed=0)
    torch.manual_seed(2)
    assert evaluate(policy, processors, dataset, batch_size=8, batches=2, seed=0) == one
    opened = dataset.lerobot(dataset.held_out_episodes)
    rows = spread(len(opened), 16)
    random.Random(0).shuffle(rows)  # noqa: S311
    for size in (1, 5, 16):
        other = evaluate_rows(policy, processors, dataset, opened, rows, batch_size=size, seed=0)
        assert other.loss == pytest.approx(one.loss, rel=1e-6)
        assert other.rmse_deg == pytest.approx(one.rmse_deg, rel=1e-6)
        assert other.frames == one.frames == 16


def test_another_seed_is_another_draw_of_nearly_the_same_loss(
    policy: Any, processors: Any, dataset: SiteDataset
) -> None:
    losses = [
        evaluate(policy, processors, dataset, batch_size=16, batches=1, seed=seed).loss
        for seed in range(3)
    ]
    assert len(set(losses)) == 3
    assert np.std(losses) < 0.05 * np.mean(losses)


def test_estimates_the_loss_that_training_minimises(
    policy: Any, processors: Any, dataset: SiteDataset
) -> None:
    import torch

    from app.training import to_batch

    opened = dataset.lerobot(dataset.held_out_episodes)
    rows = spread(len(opened), 8)
    ours = [
        evaluate_rows(policy, processors, dataset, opened, rows, batch_size=8, seed=seed).loss
        for seed in range(8)
    ]
    batch = processors[0](to_batch([opened[row] for row in rows]))
    torch.manual_seed(0)
    with torch.no_grad():
        draws = [policy.forward(dict(batch), reduction="none")[0].mean().item() for _ in range(100)]
    # lerobot draws noise and times itself; both are averaged until they settle to about 2 %.
    assert np.mean(ours) == pytest.approx(np.mean(draws), rel=0.05)


def test_padding_after_the_end_does_not_count(
    policy: Any, processors: Any, dataset: SiteDataset
) -> None:
    """Replacing what lerobot pads with must not change a digit."""

    class Shifted:
        def __init__(self, opened: Any) -> None:
            self.opened = opened

        def __getitem__(self, row: int) -> dict[str, Any]:
            item = dict(self.opened[row])
            item["action"] = item["action"].clone()
            item["action"][item["action_is_pad"]] = 1000.0
            return item

    opened: Any = dataset.lerobot(dataset.held_out_episodes)
    rows = spread(len(opened), 6)
    assert opened[rows[-1]]["action_is_pad"].any()
    plain = evaluate_rows(policy, processors, dataset, opened, rows, batch_size=3, seed=0)
    shifted: Any = Shifted(opened)
    assert evaluate_rows(policy, processors, dataset, shifted, rows, batch_size=3, seed=0) == plain


def test_rmse_is_in_degrees(policy: Any, tiny_base: Path, dataset: SiteDataset) -> None:
    """A policy that predicts the mean errs by the spread of the actions around it."""
    import torch

    statistics = normalisation(moments_of(dataset))
    processors = load_processors(tiny_base, policy, statistics)

    class Mean:
        config = policy.config
        training = False
        forward = staticmethod(policy.forward)

        def eval(self) -> None:
            pass

        def train(self, mode: bool) -> None:
            pass

        def predict_action_chunk(self, _: dict[str, Any], noise: Any) -> Any:
            return torch.zeros(noise.shape[0], 50, 6)

    opened = dataset.lerobot(dataset.held_out_episodes)
    rows = spread(len(opened), 10)
    mean: Any = Mean()
    result = evaluate_rows(mean, processors, dataset, opened, rows, batch_size=4, seed=0)
    chunks = [
        (opened[row]["action"].numpy(), ~opened[row]["action_is_pad"].numpy()) for row in rows
    ]
    actions = np.concatenate([chunk[inside] for chunk, inside in chunks]).astype(np.float64)
    expected = np.sqrt(((actions - statistics["action"]["mean"]) ** 2).mean(axis=0))
    assert result.rmse_deg == pytest.approx(expected, rel=1e-5)


def test_training_mode_is_left_as_it_was(
    policy: Any, processors: Any, dataset: SiteDataset
) -> None:
    for mode in (True, False):
        policy.train(mode)
        evaluate(policy, processors, dataset, batch_size=2, batches=1, seed=0)
        assert policy.training is mode


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
