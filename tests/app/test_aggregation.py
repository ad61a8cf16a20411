"""The mean is the weighted mean, and what does not belong in it stays out."""

import itertools
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from app.aggregation import MAX_FRAMES, Accumulator, mean_loss, mean_rmse
from app.payload import Payload, PayloadError, Tensors

BASE: Tensors = {
    "w": np.array([[1.0, -2.0], [0.5, 4.0]], np.float32),
    "b": np.array([0.25, 0.0, -1.0], np.float32),
}

values = st.floats(-1e3, 1e3, width=32)
deltas = st.fixed_dictionaries(
    {name: hnp.arrays(np.float32, array.shape, elements=values) for name, array in BASE.items()}
)
reports = st.lists(st.tuples(deltas, st.integers(1, 100_000)), min_size=1, max_size=5)


def accumulator(base: Tensors = BASE) -> Accumulator:
    return Accumulator(base, base_hash="base", frozen_hash="frozen")


def update(tensors: Tensors, *, base: str = "base", frozen: str = "frozen") -> Payload:
    return Payload("delta", base, frozen, tensors)


def folded(order: list[tuple[Tensors, int]]) -> Tensors:
    total = accumulator()
    for tensors, frames in order:
        total.add(update(tensors), frames)
    return total.model()


@given(reports)
def test_it_is_the_mean_weighted_by_frames(given_reports: list[tuple[Tensors, int]]) -> None:
    model = folded(given_reports)
    weights = [float(frames) for _, frames in given_reports]
    for name, base in BASE.items():
        exact = base.astype(np.float64) + np.average(
            np.stack([tensors[name].astype(np.float64) for tensors, _ in given_reports]),
            axis=0,
            weights=weights,
        )
        assert model[name].dtype == np.float32
        # fp32 rounds at 6e-8 of the largest term, a thousand here; five terms are summed.
        np.testing.assert_allclose(model[name], exact, rtol=1e-5, atol=1e-3)


@given(reports)
@settings(max_examples=30)
def test_the_order_of_arrival_does_not_matter(given_reports: list[tuple[Tensors, int]]) -> None:
    first = folded(given_reports)
    for order in itertools.islice(itertools.permutations(given_reports), 6):
        for name, array in folded(list(order)).items():
            np.testing.assert_allclose(array, first[name], rtol=1e-5, atol=1e-3)


@given(deltas, deltas, st.integers(1, 100_000), st.integers(1, 100_000))
def test_two_sites_give_the_same_bits_in_either_order(
    one: Tensors, two: Tensors, frames_one: int, frames_two: int
) -> None:
    there = folded([(one, frames_one), (two, frames_two)])
    back = folded([(two, frames_two), (one, frames_one)])
    assert all(there[name].tobytes() == back[name].tobytes() for name in BASE)


@given(deltas, st.integers(1, MAX_FRAMES))
def test_one_site_alone_is_its_own_model(tensors: Tensors, frames: int) -> None:
    for name, array in folded([(tensors, frames)]).items():
        np.testing.assert_allclose(array, BASE[name] + tensors[name], rtol=1e-5, atol=1e-3)


def spoilt(name: str, value: float) -> Tensors:
    tensors = {key: np.zeros_like(array) for key, array in BASE.items()}
    tensors[name].flat[-1] = value
    return tensors


GOOD = spoilt("w", 0.5)


@pytest.mark.parametrize(
    ("refused", "frames", "reason"),
    [
        (update(spoilt("w", np.nan)), 8, "finite"),
        (update(spoilt("b", np.inf)), 8, "finite"),
        (update(spoilt("b", -np.inf)), 8, "finite"),
        (update(spoilt("b", -1e30)), 8, "finite"),
        (update(GOOD, base="another"), 8, "base"),
        (update(GOOD, frozen="another"), 8, "frozen"),
        (update({"w": GOOD["w"]}), 8, "names"),
        (update({**GOOD, "b": np.zeros(4, np.float32)}), 8, "shape"),
        (update(GOOD), 0, "frames"),
        (update(GOOD), -3, "frames"),
        (update(GOOD), MAX_FRAMES + 1, "frames"),
    ],
)
def test_a_refused_update_leaves_no_trace(refused: Payload, frames: int, reason: str) -> None:
    total = accumulator()
    total.add(update(GOOD), 10)
    before = {name: array.copy() for name, array in total.model().items()}
    with pytest.raises(PayloadError) as caught:
        total.add(refused, frames)
    assert caught.value.reason == reason
    assert (total.frames, total.updates) == (10, 1)
    assert all(np.array_equal(total.model()[name], before[name]) for name in BASE)


def test_the_largest_values_accepted_do_not_overflow() -> None:
    total = accumulator()
    for _ in range(50):
        total.add(update(spoilt("w", 1e24)), MAX_FRAMES)
    assert all(np.isfinite(array).all() for array in total.model().values())


def test_there_is_no_model_without_an_update() -> None:
    with pytest.raises(ValueError, match="no update"):
        accumulator().model()


def test_memory_does_not_grow_with_the_number_of_sites() -> None:
    base: Tensors = {f"t{index}": np.zeros(250_000, np.float32) for index in range(4)}  # 4 MB
    total = accumulator(base)
    delta: Tensors = {name: np.ones_like(array) for name, array in base.items()}
    total.add(update(delta), 1)
    tracemalloc.start()
    for _ in range(20):
        total.add(update(delta), 5)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # Scratch space for one tensor (1 MB) and its absolute values, whatever the number of sites.
    assert peak < 3_000_000


def test_losses_are_weighted_by_the_frames_they_were_measured_on() -> None:
    sites: list[dict[str, Any]] = [
        {"loss": 1.0, "frames": 30},
        {"loss": 2.0, "frames": 10},
        {"loss": None, "frames": None},
        {"loss": np.nan, "frames": 10},
    ]
    assert mean_loss(sites) == 1.25
    assert mean_loss(sites[2:]) is None
    assert mean_loss([]) is None


def test_joint_errors_are_pooled_as_squares() -> None:
    sites: list[dict[str, Any]] = [
        {"rmse_deg": [3.0, 0.0], "frames": 10},
        {"rmse_deg": [4.0, 1.0], "frames": 10},
        {"rmse_deg": None, "frames": None},
    ]
    assert mean_rmse(sites) == pytest.approx([np.sqrt(12.5), np.sqrt(0.5)])
    assert mean_rmse(sites[2:]) is None
