"""Local training: it learns, repeats to the bit, goes on where it was, and never poisons the weights."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from app.dataset import SiteDataset, open_dataset
from app.evaluation import evaluate
from app.policy import load_policy, load_processors, trainable_tensors
from app.site_state import Kept, SiteState
from app.statistics import moments_of, normalisation
from app.training import OptimizerState, TrainResult, train
from certs.errors import ConfigError, DatasetError, RunFailedError


@pytest.fixture(scope="module")
def dataset(tiny_dataset: Path) -> SiteDataset:
    return open_dataset(str(tiny_dataset), held_out=0.25, seed=0)


@pytest.fixture
def policy(tiny_base: Path) -> Any:
    return load_policy(tiny_base, "cpu")


@pytest.fixture
def processors(tiny_base: Path, policy: Any, dataset: SiteDataset) -> Any:
    return load_processors(tiny_base, policy, normalisation(moments_of(dataset)))


def _train(
    policy: Any,
    processors: Any,
    dataset: SiteDataset,
    steps: int = 2,
    *,
    learning_rate: Callable[[int], float] = lambda _: 1e-3,
    seed: int = 0,
    global_step: int = 0,
    progress: Callable[[int, float], None] = lambda _step, _loss: None,
    proximal_mu: float = 0.0,
    optimizer_state: OptimizerState | None = None,
    deadline: float | None = None,
) -> TrainResult:
    return train(
        policy,
        processors,
        dataset,
        steps=steps,
        batch_size=4,
        learning_rate=learning_rate,
        seed=seed,
        global_step=global_step,
        progress=progress,
        proximal_mu=proximal_mu,
        optimizer_state=optimizer_state,
        deadline=deadline,
    )


def _bits(state: OptimizerState) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in state.tensors.items()}


def _weights(policy: Any) -> dict[str, bytes]:
    return {name: tensor.detach().numpy().tobytes() for name, tensor in policy.named_parameters()}


def test_thirty_steps_lower_the_held_out_loss(
    policy: Any, processors: Any, dataset: SiteDataset
) -> None:
    before = evaluate(policy, processors, dataset, batch_size=8, batches=2, seed=0)
    told: list[tuple[int, float]] = []
    result = _train(
        policy, processors, dataset, 30, progress=lambda step, loss: told.append((step, loss))
    )
    after = evaluate(policy, processors, dataset, batch_size=8, batches=2, seed=0)
    assert after.loss < 0.8 * before.loss
    assert result.frames == 30 * 4
    assert [step for step, _ in told] == list(range(1, 31))
    assert result.last_loss == told[-1][1]
    assert result.mean_loss == pytest.approx(np.mean([loss for _, loss in told]))
    assert result.grad_norm > 0
    assert result.seconds > 0


def test_only_trainable_tensors_change(policy: Any, processors: Any, dataset: SiteDataset) -> None:
    before = _weights(policy)
    _train(policy, processors, dataset)
    after = _weights(policy)
    assert {name for name in before if before[name] != after[name]} == set(
        trainable_tensors(policy)
    )


def test_same_seed_and_weights_give_the_same_bits(
    tiny_base: Path, policy: Any, processors: Any, dataset: SiteDataset
) -> None:
    import torch

    torch.manual_seed(1)
    one = _train(policy, processors, dataset, seed=5, global_step=60)
    other_policy = load_policy(tiny_base, "cpu")
    torch.manual_seed(2)
    state = torch.get_rng_state()
    other = _train(other_policy, processors, dataset, seed=5, global_step=60)
    assert _weights(policy) == _weights(other_policy)
    assert (one.mean_loss, one.last_loss, one.grad_norm) == (
        other.mean_loss,
        other.last_loss,
        other.grad_norm,
    )
    # And the process's own random state is as it was.
    assert torch.equal(torch.get_rng_state(), state)
    third = load_policy(tiny_base, "cpu")
    assert _train(third, processors, dataset, seed=6, global_step=60).last_loss != one.last_loss


def test_the_learning_rate_follows_the_runs_step(
    policy: Any, processors: Any, dataset: SiteDataset
) -> None:
    asked: list[int] = []

    def rate(step: int) -> float:
        asked.append(step)
        return 0.0

    before = _weights(policy)
    _train(policy, processors, dataset, 3, learning_rate=rate, global_step=40)
    assert asked == [40, 41, 42]
    # At rate 0 AdamW moves nothing: the rate given is the rate used.
    assert _weights(policy) == before


def test_rounds_continue_the_order_of_frames(
    policy: Any, processors: Any, dataset: SiteDataset
) -> None:
    """Two rounds see the frames that one round of twice the length sees: an epoch is finished before it repeats."""

    def frames(steps: int, global_step: int) -> list[int]:
        seen: list[int] = []

        def recording(batch: dict[str, Any]) -> Any:
            seen.extend(batch["index"].tolist())
            return processors[0](batch)

        _train(policy, (recording, processors[1]), dataset, steps, global_step=global_step)
        return seen

    total = dataset.frames(dataset.train_episodes)
    epoch = math.ceil(total / 4)
    assert frames(2, 0) + frames(2, 2) == frames(4, 0)
    crossing = frames(3, epoch - 2)
    assert len(crossing) == 4 + (total % 4 or 4) + 4
    owners = {
        index for episode in dataset.train_episodes for index in range(*_span(dataset, episode))
    }
    assert set(crossing) <= owners


def test_two_rounds_with_kept_moments_are_one_of_twice_the_length(
    tiny_base: Path, tmp_path: Path, policy: Any, processors: Any, dataset: SiteDataset
) -> None:
    """Fifteen and fifteen steps, the state in between on disk; an epoch ends within the second round."""
    assert 20 < dataset.frames(dataset.train_episodes) / 4 < 35
    long = _train(policy, processors, dataset, 30, global_step=5)
    halves = load_policy(tiny_base, "cpu")
    first = _train(halves, processors, dataset, 15, global_step=5)
    assert first.optimizer_state.step == 15
    SiteState(tmp_path, "run").keep(1, Kept(first.optimizer_state, None))
    kept = SiteState(tmp_path, "run").before(2)
    assert kept
    cold = load_policy(tiny_base, "cpu")
    cold.load_state_dict(halves.state_dict())
    second = _train(halves, processors, dataset, 15, global_step=20, optimizer_state=kept.optimizer)
    assert _weights(halves) == _weights(policy)
    assert second.last_loss == long.last_loss
    assert second.optimizer_state.step == long.optimizer_state.step == 30
    assert _bits(second.optimizer_state) == _bits(long.optimizer_state)
    # And what was kept made the difference.
    _train(cold, processors, dataset, 15, global_step=20)
    assert _weights(cold) != _weights(policy)


def test_the_state_given_stays_as_it_was(
    policy: Any, processors: Any, dataset: SiteDataset
) -> None:
    """A round that is done again starts from it once more."""
    state = _train(policy, processors, dataset).optimizer_state
    before = _bits(state)
    after = _train(policy, processors, dataset, global_step=2, optimizer_state=state)
    assert _bits(state) == before
    assert _bits(after.optimizer_state) != before


def test_the_state_holds_both_moments_of_what_learns(
    policy: Any, processors: Any, dataset: SiteDataset
) -> None:
    before = _weights(policy)
    state = _train(policy, processors, dataset).optimizer_state
    after = _weights(policy)
    moved = {name for name in before if before[name] != after[name]}
    assert set(state.tensors) == {f"{k}.{n}" for n in moved for k in ("exp_avg", "exp_avg_sq")}
    shapes = {name: tuple(tensor.shape) for name, tensor in trainable_tensors(policy).items()}
    for name, array in state.tensors.items():
        assert array.dtype == np.float32
        assert array.shape == shapes[name.split(".", 1)[1]]
        assert np.isfinite(array).all()


def test_the_proximal_pull_is_autograds(
    policy: Any, processors: Any, dataset: SiteDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before clipping, a step's gradients are those of a loss that has FedProx's term in it."""
    import torch

    mu = 0.7
    tensors = list(trainable_tensors(policy).values())
    pairs = [(tensor, tensor.detach().clone()) for tensor in tensors]
    forward, clip = policy.forward, torch.nn.utils.clip_grad_norm_
    terms: list[float] = []
    losses: list[float] = []
    expected: list[Any] = []
    found: list[Any] = []

    def with_term(batch: Any) -> Any:
        loss, output = forward(batch)
        term = mu / 2 * torch.stack([((p - anchor) ** 2).sum() for p, anchor in pairs]).sum()
        terms.append(term.item())
        losses.append(loss.item())
        expected.append(torch.autograd.grad(loss + term, tensors, retain_graph=True))
        return loss, output

    def clipped(parameters: Any, bound: float) -> Any:
        found.append([p.grad.clone() if p.grad is not None else None for p in parameters])
        return clip(parameters, bound)

    monkeypatch.setattr(policy, "forward", with_term)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clipped)
    result = _train(policy, processors, dataset, 4, proximal_mu=mu)

    assert len(found) == len(expected) == 4
    for mine, autograds in zip(found, expected, strict=True):
        for one, two in zip(mine, autograds, strict=True):
            if one is None:
                # No gradient reaches it, so it never moves and is never pulled.
                assert not two.any()
            else:
                assert (one - two).abs().max() <= 1e-6 * two.abs().max()
    assert result.proximal_loss == pytest.approx(np.mean(terms), rel=1e-6)
    assert terms[0] == 0
    assert min(terms[1:]) > 0
    # The loss reported is the policy's own.
    assert result.last_loss == losses[-1]


def test_the_pull_keeps_the_weights_near(
    tiny_base: Path, policy: Any, processors: Any, dataset: SiteDataset
) -> None:
    def distance(trained: Any) -> float:
        anchors = trainable_tensors(load_policy(tiny_base, "cpu"))
        changes = ((p - anchors[n]).norm() for n, p in trainable_tensors(trained).items())
        return math.hypot(*(change.item() for change in changes))

    free = _train(policy, processors, dataset, 8)
    assert free.proximal_loss is None
    pulled = load_policy(tiny_base, "cpu")
    result = _train(pulled, processors, dataset, 8, proximal_mu=10.0)
    assert result.proximal_loss
    assert distance(pulled) < 0.8 * distance(policy)


def test_training_ends_at_the_deadline(
    policy: Any, processors: Any, dataset: SiteDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock stands at 100 s and each step takes 10."""
    now = 100.0
    clock = SimpleNamespace(monotonic=lambda: now, perf_counter=lambda: now)
    monkeypatch.setattr("app.training.time", clock)

    def tick(_step: int, _loss: float) -> None:
        nonlocal now
        now += 10

    before = _weights(policy)
    with pytest.raises(RunFailedError, match="after 0 of 4 training steps"):
        _train(policy, processors, dataset, 4, deadline=100.0)
    assert _weights(policy) == before
    with pytest.raises(RunFailedError, match="after 3 of 4 training steps") as caught:
        _train(policy, processors, dataset, 4, deadline=125.0, progress=tick)
    assert "\n" not in str(caught.value)
    now = 100.0
    assert _train(policy, processors, dataset, 4, deadline=131.0, progress=tick).frames == 16


def _span(dataset: SiteDataset, episode: int) -> tuple[int, int]:
    row = dataset.meta.episodes[episode]
    return row.first, row.last


def _damaged(tiny_dataset: Path, root: Path) -> SiteDataset:
    """A dataset whose every action holds an infinity."""
    shutil.copytree(tiny_dataset, root)
    file = next((root / "data").rglob("*.parquet"))
    table = pq.read_table(file)
    actions = np.full((table.num_rows, 6), np.inf, np.float32)
    column = pa.array(list(actions), table.schema.field("action").type)
    pq.write_table(table.set_column(table.column_names.index("action"), "action", column), file)
    return open_dataset(str(root), held_out=0.25, seed=0)


def test_values_that_are_not_finite_stop_before_the_weights(
    tiny_dataset: Path, tmp_path: Path, policy: Any, processors: Any
) -> None:
    dataset = _damaged(tiny_dataset, tmp_path / "copy")
    before = _weights(policy)
    with pytest.raises(DatasetError, match=r"episode \d .* action that are not finite") as caught:
        _train(policy, processors, dataset)
    assert str(dataset.root) in str(caught.value)
    assert _weights(policy) == before


def test_divergence_stops_with_finite_weights(
    policy: Any, processors: Any, dataset: SiteDataset
) -> None:
    import torch

    with pytest.raises(ConfigError, match="learning-rate 1e\\+20"):
        _train(policy, processors, dataset, 20, learning_rate=lambda _: 1e20)
    assert all(torch.isfinite(tensor).all() for tensor in policy.parameters())


def test_a_video_cut_short_is_one_sentence(
    tiny_dataset: Path, tmp_path: Path, policy: Any, processors: Any
) -> None:
    root = tmp_path / "copy"
    shutil.copytree(tiny_dataset, root)
    for video in (root / "videos").rglob("*.mp4"):
        content = video.read_bytes()
        video.write_bytes(content[: len(content) // 2])
    dataset = open_dataset(str(root), held_out=0.25, seed=0)
    with pytest.raises(DatasetError, match="cannot be read") as caught:
        _train(policy, processors, dataset)
    assert str(root) in str(caught.value)
    assert "\n" not in str(caught.value)
