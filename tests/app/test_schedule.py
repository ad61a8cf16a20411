"""The schedules against tables worked out by hand."""

import pytest

from app.config import RunConfig
from app.schedule import Past, best, boost, learning_rate, mu, scale, stop


def measured(*losses: float | None) -> list[Past]:
    return [Past(loss, {}) for loss in losses]


def rates(config: RunConfig, steps: int) -> list[float]:
    return [learning_rate(config, step) for step in range(steps)]


@pytest.mark.parametrize("schedule", ["constant", "plateau"])
def test_the_learning_rate_rises_once_over_the_whole_run(schedule: str) -> None:
    config = RunConfig(
        schedule=schedule, learning_rate=0.5, warmup_steps=4, rounds=9, local_steps=2
    )
    assert rates(config, 7) == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.5, 0.5])
    assert learning_rate(config, 17) == 0.5
    assert rates(RunConfig(schedule=schedule, learning_rate=0.5, warmup_steps=0), 1) == [0.5]


def test_cosine_falls_once_over_all_rounds() -> None:
    config = RunConfig(
        schedule="cosine",
        learning_rate=1.0,
        min_learning_rate=0.2,
        warmup_steps=0,
        rounds=2,
        local_steps=4,
    )
    table = [1.0, 0.969552, 0.882843, 0.753073, 0.6, 0.446927, 0.317157, 0.230448]
    assert rates(config, 8) == pytest.approx(table, abs=1e-6)
    # There is no step after the last; asked for one, it stays where it ended.
    assert learning_rate(config, 8) == pytest.approx(0.2)
    assert learning_rate(config, 20) == pytest.approx(0.2)


def test_the_warm_up_is_part_of_the_cosine() -> None:
    config = RunConfig(
        schedule="cosine",
        learning_rate=1.0,
        min_learning_rate=0.2,
        warmup_steps=3,
        rounds=2,
        local_steps=4,
    )
    # A quarter, a half and three quarters of the table above, then the table.
    table = [0.25, 0.484776, 0.662132, 0.753073, 0.6]
    assert rates(config, 5) == pytest.approx(table, abs=1e-6)


def test_warm_restarts_begin_anew_with_a_round() -> None:
    config = RunConfig(
        schedule="warm-restarts",
        learning_rate=0.8,
        warmup_steps=1,
        cycle_rounds=2,
        local_steps=2,
        rounds=6,
    )
    cycle = [0.8, 0.682843, 0.4, 0.117157]
    assert rates(config, 12) == pytest.approx([0.4, *cycle[1:], *cycle, *cycle], abs=1e-6)
    raised = RunConfig(
        schedule="warm-restarts",
        learning_rate=0.8,
        min_learning_rate=0.4,
        warmup_steps=0,
        cycle_rounds=1,
        local_steps=2,
    )
    assert rates(raised, 4) == pytest.approx([0.8, 0.6, 0.8, 0.6])


def test_plateau_lowers_after_rounds_without_a_better_loss() -> None:
    config = RunConfig(
        schedule="plateau",
        plateau_rounds=2,
        plateau_factor=0.5,
        learning_rate=0.4,
        min_learning_rate=0.1,
    )
    losses = [5.0, 4.0, 4.5, 4.2, 4.1, 4.3, 3.9, 4.0, 3.9]
    table = [1.0, 1.0, 1.0, 0.5, 0.5, 0.25, 0.25, 0.25, 0.25]
    history = measured(*losses)
    assert [scale(config, history[: n + 1]) for n in range(9)] == table
    assert scale(config, []) == 1.0
    # Without the floor the last one would be an eighth.
    free = RunConfig(schedule="plateau", plateau_rounds=2, learning_rate=0.4)
    assert scale(free, history) == 0.125


def test_rounds_that_were_not_measured_count_for_nothing() -> None:
    config = RunConfig(schedule="plateau", plateau_rounds=2, plateau_factor=0.1, patience=2)
    few = measured(5.0, None, 5.1, None, None)
    assert scale(config, few) == 1.0
    assert not stop(config, few)
    enough = [*few, *measured(5.2)]
    assert scale(config, enough) == pytest.approx(0.1)
    assert stop(config, enough)
    nothing = measured(None, None, None)
    assert (scale(config, nothing), best(nothing), stop(config, nothing)) == (1.0, None, False)


def test_each_spike_halves() -> None:
    config = RunConfig(schedule="constant", spike_factor=2.0)
    losses = [1.0, 1.5, 2.5, 0.8, 1.7, 1.6, 9.0]
    table = [1.0, 1.0, 0.5, 0.5, 0.25, 0.25, 0.125]
    history = measured(*losses)
    assert [scale(config, history[: n + 1]) for n in range(7)] == table
    assert scale(RunConfig(schedule="constant"), history) == 1.0


def test_spikes_come_on_top_of_a_plateau() -> None:
    config = RunConfig(schedule="plateau", plateau_rounds=2, plateau_factor=0.1, spike_factor=2.0)
    assert scale(config, measured(1.0, 3.0)) == 0.5
    assert scale(config, measured(1.0, 3.0, 1.2)) == pytest.approx(0.05)


def test_a_site_is_raised_by_how_far_it_is_above_the_mean() -> None:
    history = [Past(9.0, {"lab-a": 9.0}), Past(2.0, {"lab-a": 3.0, "lab-b": 1.0})]
    config = RunConfig(hard_site_boost=5.0)
    assert boost(config, history, "lab-a") == 1.5
    assert boost(config, history, "lab-b") == 1.0
    assert boost(config, history, "unknown") == 1.0
    assert boost(RunConfig(hard_site_boost=1.2), history, "lab-a") == 1.2
    assert boost(RunConfig(), history, "lab-a") == 1.0
    assert boost(config, [], "lab-a") == 1.0
    # The mean of a round that some sites missed says nothing about any of them.
    assert boost(config, [*history, Past(None, {"lab-a": 40.0})], "lab-a") == 1.5
    assert boost(config, [Past(0.0, {"lab-a": 0.0})], "lab-a") == 1.0


def test_mu_follows_the_loss() -> None:
    config = RunConfig(proximal_mu=0.05, dynamic_mu=True)
    losses = [5.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5]
    table = [0.05, 0.15, 0.15, 0.15, 0.15, 0.15, 0.05, 0.05, 0.05, 0.05, 0.05, 0.0]
    history = measured(*losses)
    assert [mu(config, history[: n + 1]) for n in range(12)] == table
    assert mu(config, []) == 0.05
    assert mu(RunConfig(proximal_mu=0.05), history) == 0.05


def test_mu_needs_five_falls_in_a_row() -> None:
    config = RunConfig(proximal_mu=1.0, dynamic_mu=True)
    assert mu(config, measured(9, 8, 7, 6, 5, 5, 4)) == 1.0
    assert mu(config, measured(9, 8, None, 7, 6, None, 5, 4)) == 0.9
    # Three up, three down: exactly nothing is left.
    up_and_down = [1.0, 2, 3, 4, *(4 - n / 10 for n in range(1, 16))]
    assert mu(RunConfig(dynamic_mu=True), measured(*up_and_down)) == 0.0


def test_the_best_round_is_the_first_of_the_lowest() -> None:
    assert best(measured(5.0, None, 3.0, 3.0, 4.0)) == 2
    assert best(measured(1.0)) == 0
    assert best([]) is None


def test_patience_ends_a_run() -> None:
    config = RunConfig(patience=2)
    history = measured(5.0, 4.0, 4.0, 4.1, 3.0, 3.5)
    assert [stop(config, history[: n + 1]) for n in range(6)] == [
        False, False, False, True, False, False,
    ]  # fmt: skip
    assert not stop(config, [])
    assert not stop(RunConfig(patience=0), measured(1.0, 2.0, 3.0, 4.0))
