"""Each strategy against its formula, value by value in Python's own float64."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from app.config import RunConfig
from app.server_optimizer import STATE, step

SHAPES: tuple[tuple[int, ...], ...] = ((), (3,), (2, 2))
values = st.floats(-10, 10, width=32)
rounds = st.sampled_from(SHAPES).flatmap(
    lambda shape: st.lists(hnp.arrays(np.float32, shape, elements=values), min_size=1, max_size=6)
)
rates = st.floats(1e-3, 2.0)
decays = st.floats(0.0, 0.99)


def changes(config: RunConfig, means: list[Any]) -> list[Any]:
    state = {name: np.zeros_like(means[0]) for name in STATE[config.strategy]}
    return [step(config, mean, state) for mean in means]


@given(rounds, rates)
def test_fedavg_takes_the_mean_update_times_its_rate(means: list[Any], rate: float) -> None:
    config = RunConfig(server_learning_rate=rate)
    for mean, change in zip(means, changes(config, means), strict=True):
        assert change.dtype == np.float32
        assert change.shape == mean.shape
        np.testing.assert_array_equal(change, np.float32(rate) * mean)


def test_fedavg_at_its_default_rate_is_the_mean_bit_for_bit() -> None:
    mean = np.array([0.1, -3e-8, 1e18], np.float32)
    assert step(RunConfig(), mean, {}).tobytes() == mean.tobytes()


@given(rounds, rates, decays)
def test_fedavgm_is_the_plain_loop(means: list[Any], rate: float, beta: float) -> None:
    config = RunConfig(strategy="fedavgm", server_learning_rate=rate, server_momentum=beta)
    done = changes(config, means)
    for at in range(means[0].size):
        momentum = 0.0
        for mean, change in zip(means, done, strict=True):
            momentum = beta * momentum + float(mean.flat[at])
            # fp32 rounds each of up to six terms of at most ten.
            assert change.flat[at] == pytest.approx(rate * momentum, rel=1e-5, abs=1e-4)


@given(rounds, rates, decays, decays, st.floats(1e-3, 1.0))
def test_fedadam_is_the_plain_loop(
    means: list[Any], rate: float, beta1: float, beta2: float, tau: float
) -> None:
    config = RunConfig(
        strategy="fedadam",
        server_learning_rate=rate,
        server_momentum=beta1,
        server_beta2=beta2,
        server_tau=tau,
    )
    done = changes(config, means)
    for at in range(means[0].size):
        momentum = second = 0.0
        for mean, change in zip(means, done, strict=True):
            value = float(mean.flat[at])
            momentum = beta1 * momentum + (1 - beta1) * value
            second = beta2 * second + (1 - beta2) * value**2
            expected = rate * momentum / (math.sqrt(second) + tau)
            # 1 - beta loses up to two decimals of fp32's seven; momentum may cancel.
            assert change.flat[at] == pytest.approx(expected, rel=1e-4, abs=1e-3)


def test_fedavgm_by_hand() -> None:
    config = RunConfig(strategy="fedavgm", server_learning_rate=0.5, server_momentum=0.5)
    state: dict[str, Any] = {"momentum": np.zeros(1, np.float32)}
    mean = np.ones(1, np.float32)
    assert [float(step(config, mean, state)[0]) for _ in range(3)] == [0.5, 0.75, 0.875]
    assert state["momentum"].tolist() == [1.75]


def test_fedadam_by_hand() -> None:
    config = RunConfig(
        strategy="fedadam", server_learning_rate=1.0, server_momentum=0.5, server_beta2=0.75,
        server_tau=1.0,
    )  # fmt: skip
    state: dict[str, Any] = {name: np.zeros(1, np.float32) for name in STATE["fedadam"]}
    # m = 0.5 * 2, v = 0.25 * 4, 1 / (1 + 1)
    assert float(step(config, np.full(1, 2.0, np.float32), state)[0]) == 0.5
    assert (state["momentum"].tolist(), state["second"].tolist()) == ([1.0], [1.0])


@pytest.mark.parametrize("strategy", STATE)
def test_a_run_taken_up_from_its_kept_state_ends_in_the_same_bits(strategy: str) -> None:
    config = RunConfig(strategy=strategy, server_learning_rate=0.3)
    draw = np.random.default_rng(0)
    means = [draw.standard_normal(50).astype(np.float32) for _ in range(6)]
    whole = changes(config, means)
    state: dict[str, Any] = {name: np.zeros(50, np.float32) for name in STATE[strategy]}
    for mean in means[:3]:
        step(config, mean, state)
    # Read back as the server reads it: arrays that cannot be written to.
    kept: dict[str, Any] = {
        name: np.frombuffer(array.tobytes(), np.float32) for name, array in state.items()
    }
    for mean, change in zip(means[3:], whole[3:], strict=True):
        assert step(config, mean, kept).tobytes() == change.tobytes()


@pytest.mark.parametrize("strategy", STATE)
def test_the_mean_is_left_as_it_is(strategy: str) -> None:
    mean = np.array([1.0, -2.0], np.float32)
    changes(RunConfig(strategy=strategy), [mean])
    assert mean.tolist() == [1.0, -2.0]


@pytest.mark.parametrize("strategy", STATE)
def test_the_largest_value_an_update_may_hold_stays_finite(strategy: str) -> None:
    from app.aggregation import MAX_MAGNITUDE

    config = RunConfig(strategy=strategy, server_learning_rate=10.0)
    means = [np.array([MAX_MAGNITUDE, -MAX_MAGNITUDE, 0.0], np.float32)] * 20
    assert all(np.isfinite(change).all() for change in changes(config, means))
