"""Batches on the policy's device: columns kept there, prefixes from the cache, the next made while one is used."""

from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from app.policy import Processors
from app.prefix_store import moved

if TYPE_CHECKING:
    import torch
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy

    from app.frames import Frames, Rows
    from app.prefix import Prefix
    from app.prefix_cache import PrefixCache


@dataclass(frozen=True)
class Batch:
    """Frames with normalised ``state`` [B, 6] and ``actions`` [B, chunk, 6]; ``pad`` [B, chunk] beyond episodes' ends.

    ``valid`` counts the actions within. ``prefix`` is None where it depends on what is trained: ``inputs`` then holds
    the preprocessed batch for the policy's own ``forward``.
    """

    state: "torch.Tensor"
    actions: "torch.Tensor"
    pad: "torch.Tensor"
    valid: int
    prefix: "Prefix | None" = None
    inputs: dict[str, Any] | None = None


class Loader:
    """Batches of ``frames`` for ``policy``; states and actions are normalised once, by lerobot's own processors."""

    def __init__(
        self,
        policy: "SmolVLAPolicy",
        processors: Processors,
        frames: "Frames",
        cache: "PrefixCache",
    ) -> None:
        import torch

        from app.prefix import unfit

        self.policy, self.frames = policy, frames
        self.device = torch.device(policy.config.device)
        self._processors, self._cache = processors, cache
        self._constant = unfit(policy) is None
        columns = processors[0](
            {
                "observation.state": torch.from_numpy(frames.state),
                "action": torch.from_numpy(frames.action),
                # The pipeline tokenizes a task; these tokens are not used.
                "task": [frames.tasks[0]],
            }
        )
        self._state, self._action = columns["observation.state"], columns["action"]

    def batch(self, rows: "Rows", step: int = 0) -> Batch:
        """These rows, as the run's ``step`` sees them where images are augmented.

        Raises DatasetError where an image cannot be read.
        """
        chosen = np.asarray(rows, np.int64)
        windows, pad = self.frames.windows(chosen, self.policy.config.chunk_size)
        state, actions = self._state[self.moved(chosen)], self._action[self.moved(windows)]
        beyond, valid = self.moved(pad), int(pad.size - pad.sum())
        if self._constant:
            prefix = self._cache.prefix(chosen, step)
            return Batch(state, actions, beyond, valid, prefix=prefix)
        return Batch(state, actions, beyond, valid, inputs=self._inputs(chosen, step))

    def valid(self, rows: "Rows") -> int:
        """How many of these rows' actions lie within their episodes."""
        _, pad = self.frames.windows(rows, self.policy.config.chunk_size)
        return int(pad.size - pad.sum())

    def _inputs(self, rows: NDArray[np.int64], step: int) -> dict[str, Any]:
        """The batch that lerobot's DataLoader and preprocessor would make of these rows."""
        import torch

        frames = self.frames
        windows, pad = frames.windows(rows, self.policy.config.chunk_size)
        images = {
            # lerobot scales images before its preprocessor.
            camera: torch.as_tensor(pixels).float() / 255
            for camera, pixels in self._cache.images(rows, step).items()
        }
        inputs: dict[str, Any] = self._processors[0](
            {
                **images,
                "observation.state": torch.from_numpy(frames.state[rows]),
                "action": torch.from_numpy(frames.action[windows]),
                "action_is_pad": torch.from_numpy(pad),
                "task": [frames.tasks[task] for task in frames.task[rows]],
            }
        )
        return inputs

    def moved(self, array: "NDArray[Any] | torch.Tensor") -> "torch.Tensor":
        """``array`` on the device."""
        return moved(array, self.device)


def order(frames: int, *, batch_size: int, seed: int, step: int) -> Iterator[NDArray[np.int64]]:
    """Endless batches of rows in the order of lerobot's sampler, entered where ``step`` of a run would be."""
    from lerobot.datasets.sampler import EpisodeAwareSampler, compute_sampler_state

    # Its order depends on the number of frames alone; rows count them over all episodes.
    sampler = EpisodeAwareSampler([0], [frames], shuffle=True, seed=seed)
    sampler.load_state_dict(compute_sampler_state(step, frames, batch_size, num_processes=1))
    while True:
        rows = iter(sampler)
        while len(batch := np.fromiter(islice(rows, batch_size), np.int64)):
            yield batch


def ahead[T](items: Iterator[T], device: "torch.device") -> Generator[T]:
    """``items``; on a GPU, each is made while the one before is used, in a thread and on a stream of its own."""
    import torch

    if device.type != "cuda":
        yield from items
        return
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def make(used: torch.cuda.Event) -> tuple[T, torch.cuda.Event] | None:
        # Memory of the items before is free to be written once the work on them is done.
        stream.wait_event(used)
        with torch.cuda.stream(stream):
            item = next(items, None)
            return None if item is None else (item, stream.record_event())

    current = torch.cuda.current_stream(device)
    with ThreadPoolExecutor(1) as pool:
        made = pool.submit(make, current.record_event())
        while (result := made.result()) is not None:
            item, ready = result
            made = pool.submit(make, current.record_event())
            current.wait_event(ready)
            yield item
            del item, result
