"""Batches are those of lerobot's dataset, sampler, DataLoader and preprocessor, to the bit and in their order."""

import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from app import prefix
from app.dataset import SiteDataset
from app.frames import Frames
from app.loader import Loader, ahead, order
from certs.errors import DatasetError
from tests.loading import loader_of


@pytest.fixture(scope="module")
def frames(dataset: SiteDataset) -> Frames:
    return Frames(dataset, dataset.train_episodes)


@pytest.fixture
def loader(policy: Any, processors: Any, frames: Frames, tmp_path: Path) -> Loader:
    return loader_of(policy, processors, frames, tmp_path)


@pytest.fixture(scope="module")
def stock(policy: Any, processors: Any, dataset: SiteDataset) -> Any:
    """lerobot's batches of five from the run's first step on, preprocessed."""
    from lerobot.datasets.sampler import EpisodeAwareSampler
    from torch.utils.data import DataLoader

    opened = dataset.lerobot(dataset.train_episodes, policy.config.chunk_size)
    sampler = EpisodeAwareSampler(
        opened.meta.episodes["dataset_from_index"],
        opened.meta.episodes["dataset_to_index"],
        episode_indices_to_use=list(dataset.train_episodes),
        shuffle=True,
        seed=3,
        absolute_to_relative_idx=opened.absolute_to_relative_idx,
    )
    batches = []
    for batch in itertools.islice(DataLoader(opened, batch_size=5, sampler=sampler), 4):
        for camera in dataset.cameras:
            batch[camera] = batch[camera].float() / 255
        batches.append(processors[0](batch))
    return batches


def test_a_batch_is_lerobots(policy: Any, loader: Loader, frames: Frames, stock: Any) -> None:
    for rows, expected in zip(
        order(len(frames), batch_size=5, seed=3, step=0), stock, strict=False
    ):
        batch = loader.batch(rows)
        assert frames.index[rows].tolist() == expected["index"].tolist()
        assert batch.state.equal(expected["observation.state"])
        assert batch.actions.equal(expected["action"])
        assert batch.pad.equal(expected["action_is_pad"])
        assert batch.valid == int((~expected["action_is_pad"]).sum()) == loader.valid(rows)
        assert batch.inputs is None
        computed = prefix.compute(policy, expected)
        assert batch.prefix
        assert batch.prefix.mask.equal(computed.mask)
        assert float((batch.prefix.kv - computed.kv).abs().max()) < 1e-5


def test_a_prefix_that_is_trained_gets_lerobots_inputs(
    policy: Any,
    processors: Any,
    frames: Frames,
    tmp_path: Path,
    stock: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch

    monkeypatch.setattr(prefix, "unfit", lambda _: "the test says so")
    loader = loader_of(policy, processors, frames, tmp_path)
    for rows, expected in zip(
        order(len(frames), batch_size=5, seed=3, step=0), stock, strict=False
    ):
        batch = loader.batch(rows)
        assert batch.prefix is None
        assert batch.inputs
        # The policy reads no other keys than these.
        keys = {
            "observation.state",
            "action",
            "action_is_pad",
            "observation.language.tokens",
            "observation.language.attention_mask",
            "observation.images.camera1",
            "observation.images.camera2",
        }
        assert keys <= set(batch.inputs)
        for key in keys:
            assert torch.equal(batch.inputs[key], expected[key]), key


@pytest.mark.parametrize("batch_size", [1, 7, 60, 500])
def test_the_order_is_the_samplers_from_any_step(
    dataset: SiteDataset, frames: Frames, batch_size: int
) -> None:
    """Each epoch ends in a smaller batch; a batch is never larger than the dataset."""
    from lerobot.datasets.sampler import EpisodeAwareSampler
    from torch.utils.data import BatchSampler

    episodes = dataset.meta.episodes
    sampler = EpisodeAwareSampler(
        [episode.first for episode in episodes],
        [episode.last for episode in episodes],
        episode_indices_to_use=list(dataset.train_episodes),
        shuffle=True,
        seed=9,
        absolute_to_relative_idx={index: row for row, index in enumerate(frames.index.tolist())},
    )
    batches = BatchSampler(sampler, batch_size, drop_last=False)
    expected = [batch for _ in range(3) for batch in batches]
    for step in {0, 1, len(batches) - 1, len(batches), len(batches) + 2} & set(
        range(len(expected))
    ):
        found = order(len(frames), batch_size=batch_size, seed=9, step=step)
        for rows, batch in zip(found, expected[step:], strict=False):
            assert rows.tolist() == batch


class _Cuda:
    """Streams and events without a GPU: a stream's work is what it waits for and what is done on it, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import torch

        self.main, self.side = _Stream("main"), _Stream("side")
        self._thread = threading.local()
        monkeypatch.setattr(torch.cuda, "Stream", lambda _: self.side)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _: self.main)
        monkeypatch.setattr(torch.cuda, "stream", self._using)

    @contextmanager
    def _using(self, stream: "_Stream") -> Iterator[None]:
        self._thread.stream = stream
        yield
        del self._thread.stream

    def run(self, kernel: str) -> None:
        getattr(self._thread, "stream", self.main).work.append(kernel)


class _Stream:
    def __init__(self, name: str) -> None:
        self.name = name
        self.work: list[str] = []

    def record_event(self) -> tuple[str, int]:
        return self.name, len(self.work)

    def wait_event(self, event: tuple[str, int]) -> None:
        self.work.append(f"wait for {event[0]} up to {event[1]}")


def test_on_a_gpu_the_next_item_is_made_while_one_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each stream waits for the other: for an item to be there, and for the one before it to be done with."""
    import torch

    cuda = _Cuda(monkeypatch)
    makers: set[threading.Thread] = set()
    made = {name: threading.Event() for name in "abc"}

    def items() -> Iterator[str]:
        for name, event in made.items():
            makers.add(threading.current_thread())
            cuda.run(f"make {name}")
            event.set()
            yield name

    used = []
    for item, following in zip(ahead(items(), torch.device("cuda")), "bcc", strict=False):
        # It is made before this one was used, or nobody would ever make it.
        assert made[following].wait(timeout=60)
        cuda.run(f"use {item}")
        used.append(item)
    assert used == ["a", "b", "c"]
    assert cuda.side.work == [
        "wait for main up to 0",
        "make a",
        "wait for main up to 0",
        "make b",
        "wait for main up to 2",
        "make c",
        "wait for main up to 4",
    ]
    assert cuda.main.work == [
        "wait for side up to 2",
        "use a",
        "wait for side up to 4",
        "use b",
        "wait for side up to 6",
        "use c",
    ]
    assert not any(maker.is_alive() for maker in makers)
    assert threading.current_thread() not in makers


def test_on_a_gpu_what_goes_wrong_ahead_is_raised_in_its_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch

    _Cuda(monkeypatch)

    def items() -> Iterator[int]:
        yield 1
        raise DatasetError("the file is damaged")

    asked = ahead(items(), torch.device("cuda"))
    assert next(asked) == 1
    with pytest.raises(DatasetError, match="damaged"):
        next(asked)


def test_on_a_gpu_nothing_is_made_after_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that is cancelled gives its cache back, so nobody may read from it any more."""
    import torch

    _Cuda(monkeypatch)
    before = set(threading.enumerate())
    made: list[int] = []

    def items() -> Iterator[int]:
        for number in itertools.count():
            made.append(number)
            yield number

    asked = ahead(items(), torch.device("cuda"))
    assert next(asked) == 0
    asked.close()
    assert len(made) <= 2
    assert set(threading.enumerate()) <= before


def test_on_a_cpu_an_item_is_made_when_it_is_asked_for() -> None:
    import torch

    made: list[int] = []

    def items() -> Iterator[int]:
        for number in range(3):
            made.append(number)
            yield number

    asked = ahead(items(), torch.device("cpu"))
    assert next(asked) == 0
    assert made == [0]
    assert list(asked) == [1, 2]
