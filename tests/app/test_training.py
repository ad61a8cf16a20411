"""Local training: it learns, repeats to the bit, goes on where it was, and is lerobot's own to rounding."""

import itertools
import logging
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest

from app import prefix, training
from app.augmentation import augment
from app.dataset import SiteDataset
from app.evaluation import evaluate
from app.frames import Frames
from app.loader import Batch, Loader
from app.manifest import PayloadError
from app.optimizer import OptimizerState
from app.policy import load_policy, load_processors, trainable_tensors
from app.site_state import Kept, SiteState
from app.statistics import moments_of, normalisation
from app.training import Progress, TrainResult, train
from certs.errors import ConfigError, RunFailedError
from tests.loading import loader_of


@pytest.fixture(scope="module")
def frames(dataset: SiteDataset) -> Frames:
    return Frames(dataset, dataset.train_episodes)


@pytest.fixture
def policy(tiny_base: Path) -> Any:
    return load_policy(tiny_base, "cpu")


@pytest.fixture
def processors(tiny_base: Path, policy: Any, dataset: SiteDataset) -> Any:
    return load_processors(tiny_base, policy, normalisation(moments_of(dataset)))


@pytest.fixture
def loader(policy: Any, processors: Any, frames: Frames, tmp_path: Path) -> Loader:
    return loader_of(policy, processors, frames, tmp_path)


@pytest.fixture
def another(tiny_base: Path, processors: Any, frames: Frames, tmp_path: Path) -> Callable[[], Any]:
    """Make another untrained policy, and a loader for it."""

    def make() -> Any:
        policy = load_policy(tiny_base, "cpu")
        return policy, loader_of(policy, processors, frames, tmp_path)

    return make


def _train(
    policy: Any,
    loader: Loader,
    steps: int = 2,
    *,
    batch_size: int = 4,
    learning_rate: Callable[[int], float] = lambda _: 1e-3,
    seed: int = 0,
    global_step: int = 0,
    progress: Progress = lambda *_: None,
    micro_batch: int = 0,
    compiled: bool = False,
    proximal_mu: float = 0.0,
    optimizer_state: OptimizerState | None = None,
    deadline: float | None = None,
) -> TrainResult:
    return train(
        policy,
        loader,
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        seed=seed,
        global_step=global_step,
        progress=progress,
        micro_batch=micro_batch,
        compiled=compiled,
        proximal_mu=proximal_mu,
        optimizer_state=optimizer_state,
        deadline=deadline,
    )


def _bits(state: OptimizerState) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in state.tensors.items()}


def _weights(policy: Any) -> dict[str, bytes]:
    return {name: tensor.detach().numpy().tobytes() for name, tensor in policy.named_parameters()}


def _distance(one: Any, other: Any) -> float:
    """The largest difference of two policies' weights beside the largest weight of the tensor."""
    pairs = [
        (a.detach(), b.detach()) for a, b in zip(one.parameters(), other.parameters(), strict=True)
    ]
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs if b.any())


def _curve(policy: Any, loader: Loader, steps: int, **options: Any) -> list[float]:
    """Each step's loss."""
    told: list[float] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "_PROGRESS_S", 0.0)
        _train(
            policy,
            loader,
            steps,
            progress=lambda _, loss, *__: told.append(loss),
            **options,
        )
    assert len(told) == steps
    return told


class _Recording:
    """A loader that remembers the rows it was asked for."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader
        self.rows: list[int] = []

    def batch(self, rows: Any, step: int) -> Batch:
        self.rows += list(rows)
        return self._loader.batch(rows, step)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


def test_thirty_steps_lower_the_held_out_loss(
    policy: Any, processors: Any, dataset: SiteDataset, loader: Loader
) -> None:
    held_out = Frames(dataset, dataset.held_out_episodes)
    before = evaluate(policy, processors, held_out, batch_size=8, batches=2, seed=0)
    losses: list[float] = []
    result = _train(policy, loader, 30, progress=lambda *told: losses.append(told[1]))
    after = evaluate(policy, processors, held_out, batch_size=8, batches=2, seed=0)
    assert after.loss < 0.8 * before.loss
    assert result.frames == 30 * 4
    assert result.last_loss == losses[-1]
    assert result.mean_loss < before.loss
    assert result.grad_norm > 0
    assert 0 <= result.waited < result.seconds


def test_only_trainable_tensors_change(policy: Any, loader: Loader) -> None:
    before = _weights(policy)
    _train(policy, loader)
    after = _weights(policy)
    assert {name for name in before if before[name] != after[name]} == set(
        trainable_tensors(policy)
    )


def test_the_steps_are_those_of_lerobots_own_loop(
    policy: Any,
    processors: Any,
    loader: Loader,
    dataset: SiteDataset,
    another: Callable[[], Any],
) -> None:
    """Its DataLoader, forward, clipping and optimiser, seeded at each step as ours; over the end of an epoch."""
    import torch
    from lerobot.datasets.sampler import EpisodeAwareSampler
    from torch.utils.data import DataLoader

    stock, _ = another()
    opened = dataset.lerobot(dataset.train_episodes, policy.config.chunk_size)
    sampler = EpisodeAwareSampler(
        opened.meta.episodes["dataset_from_index"],
        opened.meta.episodes["dataset_to_index"],
        episode_indices_to_use=list(dataset.train_episodes),
        shuffle=True,
        seed=0,
        absolute_to_relative_idx=opened.absolute_to_relative_idx,
    )
    batches = DataLoader(opened, batch_size=7, sampler=sampler)
    preset = stock.config.get_optimizer_preset()
    optimizer = preset.build(stock.parameters())
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    stock.train()
    expected, drawn = [], []
    assert len(opened) % 7
    steps = math.ceil(len(opened) / 7) + 2
    for step, batch in enumerate(itertools.islice(itertools.chain(batches, batches), steps)):
        drawn += batch["index"].tolist()
        for camera in dataset.cameras:
            batch[camera] = batch[camera].float() / 255
        torch.manual_seed(training.noise_seed(0, step))
        loss, _ = stock.forward(processors[0](batch))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(stock.parameters(), preset.grad_clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())

    recording: Any = _Recording(loader)
    losses = _curve(policy, recording, steps, batch_size=7)
    assert loader.frames.index[recording.rows].tolist() == drawn
    assert losses == pytest.approx(expected, rel=1e-4)
    assert _distance(policy, stock) < 1e-3


def test_same_seed_and_weights_give_the_same_bits(
    policy: Any, loader: Loader, another: Callable[[], Any]
) -> None:
    import torch

    torch.manual_seed(1)
    one = _train(policy, loader, seed=5, global_step=60)
    other_policy, other_loader = another()
    torch.manual_seed(2)
    state = torch.get_rng_state()
    other = _train(other_policy, other_loader, seed=5, global_step=60)
    assert _weights(policy) == _weights(other_policy)
    assert (one.mean_loss, one.last_loss, one.grad_norm) == (
        other.mean_loss,
        other.last_loss,
        other.grad_norm,
    )
    # And the process's own random state is as it was.
    assert torch.equal(torch.get_rng_state(), state)
    assert _train(*another(), seed=6, global_step=60).last_loss != one.last_loss


def test_the_learning_rate_follows_the_runs_step(policy: Any, loader: Loader) -> None:
    asked: list[int] = []

    def rate(step: int) -> float:
        asked.append(step)
        return 0.0

    before = _weights(policy)
    _train(policy, loader, 3, learning_rate=rate, global_step=40)
    assert asked == [40, 41, 42]
    # At rate 0 AdamW moves nothing: the rate given is the rate used.
    assert _weights(policy) == before


def test_rounds_continue_the_order_of_frames(
    policy: Any, loader: Loader, dataset: SiteDataset
) -> None:
    """Two rounds see the frames that one round of twice the length sees: an epoch is finished before it repeats."""

    def rows(steps: int, global_step: int) -> list[int]:
        recording: Any = _Recording(loader)
        _train(policy, recording, steps, global_step=global_step)
        seen: list[int] = recording.rows
        return seen

    total = dataset.frames(dataset.train_episodes)
    assert rows(2, 0) + rows(2, 2) == rows(4, 0)
    assert sorted(rows(1, 0) + rows(total // 4 - 1, 1)) == list(range(total))


def test_two_rounds_with_kept_moments_are_one_of_twice_the_length(
    policy: Any, loader: Loader, tmp_path: Path, dataset: SiteDataset, another: Callable[[], Any]
) -> None:
    """Fifteen and fifteen steps, the state in between on disk; an epoch ends within the second round."""
    assert 20 < dataset.frames(dataset.train_episodes) / 4 < 35
    long = _train(policy, loader, 30, global_step=5)
    halves, of_halves = another()
    first = _train(halves, of_halves, 15, global_step=5)
    assert first.optimizer_state.step == 15
    SiteState(tmp_path, "run").keep(1, Kept(first.optimizer_state, None))
    kept = SiteState(tmp_path, "run").before(2)
    assert kept
    cold, of_cold = another()
    cold.load_state_dict(halves.state_dict())
    second = _train(halves, of_halves, 15, global_step=20, optimizer_state=kept.optimizer)
    assert _weights(halves) == _weights(policy)
    assert second.last_loss == long.last_loss
    assert second.optimizer_state.step == long.optimizer_state.step == 30
    assert _bits(second.optimizer_state) == _bits(long.optimizer_state)
    # And what was kept made the difference.
    _train(cold, of_cold, 15, global_step=20)
    assert _weights(cold) != _weights(policy)


def test_the_state_given_stays_as_it_was(policy: Any, loader: Loader) -> None:
    """A round that is done again starts from it once more."""
    state = _train(policy, loader).optimizer_state
    before = _bits(state)
    after = _train(policy, loader, global_step=2, optimizer_state=state)
    assert _bits(state) == before
    assert _bits(after.optimizer_state) != before


def test_the_state_holds_both_moments_of_what_learns(policy: Any, loader: Loader) -> None:
    before = _weights(policy)
    state = _train(policy, loader).optimizer_state
    after = _weights(policy)
    moved = {name for name in before if before[name] != after[name]}
    assert set(state.tensors) == {f"{k}.{n}" for n in moved for k in ("exp_avg", "exp_avg_sq")}
    shapes = {name: tuple(tensor.shape) for name, tensor in trainable_tensors(policy).items()}
    for name, array in state.tensors.items():
        assert array.dtype == np.float32
        assert array.shape == shapes[name.split(".", 1)[1]]
        assert np.isfinite(array).all()


@pytest.mark.parametrize("micro_batch", [1, 3])
def test_a_batch_taken_in_parts_is_the_batch(
    policy: Any, loader: Loader, another: Callable[[], Any], micro_batch: int
) -> None:
    """Frames near an episode's end count as much as their actions within it, in whichever part they are."""
    steps = len(loader.frames) // 4
    whole = _curve(policy, loader, steps)
    in_parts, of_parts = another()
    recording: Any = _Recording(of_parts)
    assert _curve(in_parts, recording, steps, micro_batch=micro_batch) == pytest.approx(
        whole, rel=1e-4
    )
    assert sorted(recording.rows) == list(range(len(loader.frames)))
    assert _distance(in_parts, policy) < 1e-3


def test_the_compiled_step_is_the_step(
    policy: Any, loader: Loader, another: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One graph, also for the smaller batch at an epoch's end; without a compiler, whose rounding is its own."""
    import torch

    epoch = math.ceil(len(loader.frames) / 7)
    assert len(loader.frames) % 7
    expected = _curve(policy, loader, 3, batch_size=7, global_step=epoch - 2)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    training._compiled_flow_losses.cache_clear()
    try:
        other, of_other = another()
        found = _curve(other, of_other, 3, batch_size=7, global_step=epoch - 2, compiled=True)
    finally:
        training._compiled_flow_losses.cache_clear()
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_step_that_does_not_compile_is_one_sentence(
    policy: Any, loader: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    def no_compiler(*_: Any) -> Any:
        raise RuntimeError("No working C++ compiler found\n\nmore about it")

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=no_compiler))
    training._compiled_flow_losses.cache_clear()
    try:
        with pytest.raises(
            ConfigError, match=r"No working C\+\+ compiler found.*compile=false"
        ) as caught:
            _train(policy, loader, compiled=True)
    finally:
        training._compiled_flow_losses.cache_clear()
    assert "\n" not in str(caught.value)


class _Memory:
    """A device that holds ``room`` frames at a time."""

    def __init__(self, room: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.room = room
        self.asked: list[int] = []
        self._flow_losses = prefix.flow_losses
        monkeypatch.setattr(prefix, "flow_losses", self)

    def __call__(self, policy: Any, known: Any, state: Any, *others: Any) -> Any:
        import torch

        self.asked.append(len(state))
        if len(state) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return self._flow_losses(policy, known, state, *others)


def test_too_little_memory_halves_what_is_taken_at_a_time(
    policy: Any,
    loader: Loader,
    another: Callable[[], Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """In the second part of the third step: it is taken again from its start, to the same bits."""
    expected = _train(policy, loader, 5, micro_batch=2)
    memory = _Memory(4, monkeypatch)

    def shrink(step: int) -> float:
        memory.room = 4 if step < 2 else 3
        return 1e-3

    found_policy, of_found = another()
    with caplog.at_level(logging.WARNING, "flwr"):
        found = _train(found_policy, of_found, 5, learning_rate=shrink)
    assert memory.asked == [4, 4, 4] + 6 * [2]
    assert found.frames == expected.frames == 20
    assert "micro-batch of 4: training goes on with 2" in caplog.text
    # The same steps from the same start, taken in parts from the third on.
    assert found.last_loss == pytest.approx(expected.last_loss, rel=1e-4)
    assert found.optimizer_state.step == 5
    assert _distance(found_policy, policy) < 1e-3


def test_memory_that_is_too_small_for_half_fails(
    policy: Any, loader: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = _Memory(1, monkeypatch)
    with pytest.raises(RunFailedError, match="a micro-batch of 2:") as caught:
        _train(policy, loader, 5)
    assert memory.asked == [4, 2]
    assert "\n" not in str(caught.value)
    memory.room = 0
    with pytest.raises(RunFailedError, match="a micro-batch of 1:"):
        _train(policy, loader, 5, micro_batch=1)


def test_memory_that_ends_while_moments_are_made_leaves_them_whole(
    policy: Any, loader: Loader, another: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    expected = _train(policy, loader, 2, micro_batch=2)
    zeros_like, calls = torch.zeros_like, itertools.count()

    def scarce(*args: Any, **options: Any) -> Any:
        # AdamW makes its moments with it, two a tensor.
        if next(calls) == 7:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return zeros_like(*args, **options)

    monkeypatch.setattr(torch, "zeros_like", scarce)
    found_policy, of_found = another()
    found = _train(found_policy, of_found, 2)
    assert next(calls) > 8
    assert _weights(found_policy) == _weights(policy)
    assert _bits(found.optimizer_state) == _bits(expected.optimizer_state)


def test_a_prefix_that_is_not_constant_is_lerobots_own_forward(
    policy: Any, loader: Loader, another: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = _curve(policy, loader, 4)
    monkeypatch.setattr(prefix, "unfit", lambda _: "the test says so")
    stock, of_stock = another()
    forwards = mock.Mock(side_effect=stock.forward)
    monkeypatch.setattr(stock, "forward", forwards)
    assert _curve(stock, of_stock, 4, micro_batch=3) == pytest.approx(expected, rel=1e-4)
    # Four frames are a part of three and one of one.
    assert forwards.call_count == 8
    assert _distance(stock, policy) < 1e-3


def test_a_steps_images_are_augmented_however_it_is_cut(
    policy: Any,
    processors: Any,
    frames: Frames,
    loader: Loader,
    tmp_path: Path,
    another: Callable[[], Any],
) -> None:
    augmentation = partial(augment, seed=0, device="cpu")

    def augmented(of: Any) -> Loader:
        return loader_of(of, processors, frames, tmp_path, augmentation)

    plain = _curve(policy, loader, 3)
    whole, _ = another()
    found = _curve(whole, augmented(whole), 3)
    in_parts, _ = another()
    assert _curve(in_parts, augmented(in_parts), 3, micro_batch=3) == pytest.approx(found, rel=1e-4)
    assert all(one != pytest.approx(two, rel=1e-3) for one, two in zip(found, plain, strict=True))
    # A later step sees the same frames otherwise.
    rows = [0, 1]
    first, later = (augmented(whole).batch(rows, step).prefix for step in (0, 30))
    assert first
    assert later
    assert not first.kv.equal(later.kv)


def test_the_proximal_pull_is_autograds(
    policy: Any, loader: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before clipping, a step's gradients are those of a loss that has FedProx's term in it."""
    import torch

    mu = 0.7
    tensors = list(trainable_tensors(policy).values())
    pairs = [(tensor, tensor.detach().clone()) for tensor in tensors]
    flow_losses, clip = prefix.flow_losses, torch.nn.utils.clip_grad_norm_
    terms: list[float] = []
    losses: list[float] = []
    expected: list[Any] = []
    found: list[Any] = []
    batches: list[Batch] = []

    class Remembering(_Recording):
        def batch(self, rows: Any, step: int) -> Batch:
            batches.append(super().batch(rows, step))
            return batches[-1]

    def with_term(*arguments: Any) -> Any:
        elements = flow_losses(*arguments)
        inside = elements[:, :, :6][~batches[-1].pad]
        term = mu / 2 * torch.stack([((p - anchor) ** 2).sum() for p, anchor in pairs]).sum()
        terms.append(term.item())
        losses.append(inside.mean().item())
        expected.append(torch.autograd.grad(inside.mean() + term, tensors, retain_graph=True))
        return elements

    def clipped(parameters: Any, bound: float) -> Any:
        found.append([p.grad.clone() if p.grad is not None else None for p in parameters])
        return clip(parameters, bound)

    monkeypatch.setattr(prefix, "flow_losses", with_term)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clipped)
    remembering: Any = Remembering(loader)
    result = _train(policy, remembering, 4, proximal_mu=mu)

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
    assert result.last_loss == pytest.approx(losses[-1], rel=1e-6)
    assert result.mean_loss == pytest.approx(np.mean(losses), rel=1e-6)


def test_the_pull_keeps_the_weights_near(
    tiny_base: Path, policy: Any, loader: Loader, another: Callable[[], Any]
) -> None:
    def distance(trained: Any) -> float:
        anchors = trainable_tensors(load_policy(tiny_base, "cpu"))
        changes = ((p - anchors[n]).norm() for n, p in trainable_tensors(trained).items())
        return math.hypot(*(change.item() for change in changes))

    free = _train(policy, loader, 8)
    assert free.proximal_loss is None
    pulled, of_pulled = another()
    result = _train(pulled, of_pulled, 8, proximal_mu=10.0)
    assert result.proximal_loss
    assert distance(pulled) < 0.8 * distance(policy)


class _Clock:
    """It moves by 10 s a step, when the step's learning rate is asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        clock = SimpleNamespace(monotonic=lambda: self.now, perf_counter=lambda: self.now)
        monkeypatch.setattr(training, "time", clock)

    def tick(self, _step: int) -> float:
        self.now += 10
        return 1e-3


def test_training_ends_at_the_deadline(
    policy: Any, loader: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = _Clock(monkeypatch)
    before = _weights(policy)
    with pytest.raises(RunFailedError, match="after 0 of 4 training steps"):
        _train(policy, loader, 4, learning_rate=clock.tick, deadline=100.0)
    assert _weights(policy) == before
    with pytest.raises(RunFailedError, match="after 3 of 4 training steps") as caught:
        _train(policy, loader, 4, learning_rate=clock.tick, deadline=125.0)
    assert "\n" not in str(caught.value)
    clock.now = 100.0
    assert _train(policy, loader, 4, learning_rate=clock.tick, deadline=131.0).frames == 16


def test_progress_is_told_now_and_then_and_at_the_end(
    policy: Any, loader: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each look waits for the device, so it is not one a step: here one in 25 s, of steps of 10 s and 4 frames."""
    clock = _Clock(monkeypatch)
    monkeypatch.setattr(training, "_PROGRESS_S", 25.0)
    batch = loader.batch

    def slow(rows: Any, step: int) -> Batch:
        clock.now += 2.5
        return batch(rows, step)

    monkeypatch.setattr(loader, "batch", slow)
    told: list[tuple[int, float, float, float]] = []
    result = _train(
        policy, loader, 7, learning_rate=clock.tick, progress=lambda *values: told.append(values)
    )
    assert [step for step, *_ in told] == [2, 4, 6, 7]
    assert told[-1][1] == result.last_loss
    assert [rate for *_, rate, _ in told] == pytest.approx(4 * [4 / 12.5])
    assert [waited for *_, waited in told] == pytest.approx(4 * [0.2])
    assert (result.waited, result.seconds) == pytest.approx((7 * 2.5, 7 * 12.5))


@pytest.mark.parametrize("proximal_mu", [0.0, 0.5])
def test_no_step_waits_for_the_device(
    policy: Any, loader: Loader, monkeypatch: pytest.MonkeyPatch, proximal_mu: float
) -> None:
    """Between two looks no tensor becomes a number, for which a GPU would have to be done with all its work."""
    from torch.utils._python_dispatch import TorchDispatchMode

    read: list[str] = []

    class Reads(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if "_local_scalar_dense" in str(func):
                read.append(str(func))
            return func(*args, **(kwargs or {}))

    parts = training._parts

    def drawn(*arguments: Any) -> Any:
        # The order of frames and the draws are the CPU's, wherever the training is.
        made = list(parts(*arguments))
        read.clear()
        return iter(made)

    monkeypatch.setattr(training, "_parts", drawn)
    monkeypatch.setattr(training, "_PROGRESS_S", math.inf)
    seen: list[list[str]] = []
    with Reads():  # type: ignore[no-untyped-call]
        _train(
            policy,
            loader,
            4,
            micro_batch=3,
            proximal_mu=proximal_mu,
            progress=lambda *_: seen.append(list(read)),
        )
    assert seen == [[]]
    # It would have been noticed: the step count that is read at the end is.
    assert read


def test_training_ends_with_what_progress_raises(policy: Any, loader: Loader) -> None:
    """So a job is cancelled; the next one finds the loader as it was."""

    def cancelled(*_: Any) -> None:
        raise RunFailedError("cancelled")

    with pytest.raises(RunFailedError, match="cancelled"):
        _train(policy, loader, progress=cancelled)
    assert _train(policy, loader).frames == 8


def test_divergence_is_one_sentence_with_the_step(policy: Any, loader: Loader) -> None:
    with pytest.raises(PayloadError, match=r"at step 41 with learning-rate 1e\+20") as caught:
        _train(policy, loader, 20, learning_rate=lambda _: 1e20, global_step=40)
    assert "\n" not in str(caught.value)
    # What the operator's alert goes by.
    assert caught.value.reason == "finite"
