"""A site's prefixes, computed once and kept: keys and values in GPU memory, host memory or a file, or embedded images.

The prefix of a frame (:mod:`app.prefix`) is the same in every step and round. Which tier holds it is a matter of space:
SmolVLA's keys and values take 2.9 MB a frame with two cameras in bfloat16, its embedded images a twelfth of that.
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import version
from itertools import batched, chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from app import memory, prefix_store
from app.policy import Processors
from app.prefix_store import DeviceStore, DiskStore, HostStore, Layout, Store, moved
from certs.errors import ConfigError, StorageError

if TYPE_CHECKING:
    import torch
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy

    from app.frames import Frames
    from app.prefix import Prefix

type Rows = Sequence[int] | NDArray[np.int64]
type Images = Mapping[str, NDArray[np.uint8]]
"""Camera -> [B, 3, H, W]."""
type Augment = Callable[[Images, NDArray[np.int64], int], Mapping[str, torch.Tensor]]
"""Images of these rows as a step sees them (``app.augmentation.augment`` with its seed and device)."""
type Progress = Callable[[int, int], None]
"""Told how many frames of how many are there."""

# Frames embedded at a time: the 32 images of two cameras fill a GPU, and fit into what is kept free of it.
_BATCH = 16
# Part of a file's name: raised whenever the bytes of a file change their meaning.
_FORMAT = 1
# What of the policy's config decides how images become tokens; the rest of it does not touch the prefix.
_SETTINGS = (
    "image_features",
    "resize_imgs_with_padding",
    "empty_cameras",
    "add_image_special_tokens",
    "num_vlm_layers",
)
_PLACES = {"gpu": "GPU memory", "memory": "host memory", "disk": "disk"}

_log = logging.getLogger("flwr")


@dataclass(frozen=True)
class _Tasks:
    """The task sentences in use, with ``ids`` and ``mask`` [tasks, T] of the longest; ``number`` [frames] counts them.

    One length for all batches: a compiled step is compiled once.
    """

    number: NDArray[np.int64]
    sentences: list[str]
    ids: "torch.Tensor"
    mask: "torch.Tensor"


@dataclass(frozen=True)
class _Plan:
    """A tier, the place where its rows would lie, and the bytes that may be filled there."""

    tier: str
    place: str
    layout: Layout
    room: int

    def __str__(self) -> str:
        layout = self.layout
        return (
            f"{layout.count} frames of {layout.row_bytes / 1e6:.2f} MB take {layout.size / 1e9:.3f} of the "
            f"{self.room / 1e9:.3f} GB of {_PLACES[self.place]} that may be filled"
        )


class PrefixCache:
    """The prefixes of some of a dataset's frames; :meth:`open` is the way in.

    ``tier`` is "gpu", "memory", "disk", "embeddings" or "none"; the first three hold keys and values.
    """

    def __init__(
        self,
        policy: "SmolVLAPolicy",
        processors: Processors,
        frames: "Frames",
        rows: NDArray[np.int64],
        augment: Augment | None,
    ) -> None:
        self.tier = "none"
        self._policy, self._processors = policy, processors
        self._frames, self._rows, self._augment = frames, rows, augment
        self._slots = np.full(len(frames), -1)
        self._slots[rows] = np.arange(len(rows))
        self._tasks = _tasks(processors, frames, rows)
        self._masks: torch.Tensor | None = None
        self._store: Store | None = None

    @classmethod
    def open(
        cls,
        policy: "SmolVLAPolicy",
        processors: Processors,
        frames: "Frames",
        rows: Rows,
        *,
        choice: str,
        frozen: str,
        folder: Path,
        augment: Augment | None = None,
        brief: bool = False,
        progress: Progress,
    ) -> Self:
        """Find or build the cache of these rows in the tier ``choice``; "auto" takes the fastest that has the space.

        In a ``brief`` process, which ends with its job, "auto" prefers the disk, where the next process finds it.
        ``frozen`` is the hash of the policy's frozen tensors; the files of the disk tier lie in ``folder``. Where
        images are augmented or the VLM is trained nothing can be kept, and the log says so.

        Raises ConfigError when the chosen tier has not the space, DatasetError for images that cannot be read,
        StorageError when the disk refuses.
        """
        import torch

        from app.prefix import unfit

        cache = cls(policy, processors, frames, np.unique(np.asarray(rows, np.int64)), augment)
        reason = "images are augmented" if augment else unfit(policy)
        if choice == "none":
            reason = "the run config says so"
        if reason:
            _log.info("No prefix cache, the VLM sees every batch: %s.", reason)
            return cache
        device = torch.device(policy.config.device)
        try:
            cache._fill(choice, frozen, folder, progress, brief=brief)
            if device.type == "cuda":
                # Whoever reads may do so on another stream than this one.
                torch.cuda.synchronize(device)
        except BaseException:
            cache.close()
            raise
        return cache

    def prefix(self, rows: Rows, step: int = 0) -> "Prefix":
        """The prefixes of these rows, in this order, on the policy's device; ``step`` decides their augmentation alone.

        Raises DatasetError and StorageError.
        """
        from app.prefix import Prefix

        chosen = np.asarray(rows, np.int64)
        slots = self._slots[chosen]
        if (slots < 0).any():
            raise ValueError(
                f"row {chosen[slots < 0][0]} is not one that the cache was opened with"
            )
        if not self._store:
            return self._attended(self._embed(self.images(chosen, step), chosen), chosen)
        values = self._store.read(slots)
        if self._masks is None:
            return self._attended(values, chosen)
        return Prefix(values, self._of_tasks(self._masks, chosen))

    def images(self, rows: Rows, step: int = 0) -> "Mapping[str, NDArray[np.uint8] | torch.Tensor]":
        """The images that the policy sees in this step: camera -> [B, 3, H, W]. Raises DatasetError."""
        chosen = np.asarray(rows, np.int64)
        images = self._frames.images(chosen)
        return self._augment(images, chosen, step) if self._augment else images

    def close(self) -> None:
        """Give the memory back; a file stays for the next process."""
        if self._store:
            self._store.close()

    def _fill(
        self, choice: str, frozen: str, folder: Path, progress: Progress, *, brief: bool
    ) -> None:
        """Take the first tier that is asked for and has the space, and build what it does not hold yet."""
        import torch

        if choice == "gpu" and torch.device(self._policy.config.device).type != "cuda":
            raise ConfigError(
                "The run config sets prefix-cache='gpu', but this site trains on its CPU: set prefix-cache='auto'."
            )
        plans, masks = self._plans(folder)
        asked = [plan for plan in plans if choice in ("auto", plan.tier)]
        if brief:
            asked.sort(key=lambda plan: plan.place != "disk")
        for plan in asked:
            if plan.layout.size <= plan.room:
                try:
                    store = self._open_store(plan, frozen, folder, progress)
                except StorageError as error:
                    # A quota, say: with another tier left to try, no reason for a round to fail.
                    if choice != "auto":
                        raise
                    _log.warning("%s", error)
                    continue
                if store:
                    break
        else:
            said = "; ".join(map(str, asked))
            if choice != "auto":
                raise ConfigError(
                    f"The run config sets prefix-cache={choice!r}, but {said}: set prefix-cache='auto'."
                )
            _log.info("No prefix cache, the VLM sees every batch: %s.", said)
            return
        _log.info("Prefix cache (%s): %s.", plan.tier, plan)
        self.tier, self._store = plan.tier, store
        self._masks = None if plan.tier == "embeddings" else masks
        if not store.filled:
            self._build(store, progress)

    def _plans(self, folder: Path) -> "tuple[list[_Plan], torch.Tensor]":
        """Every tier, the fastest first, and the mask [tasks, P] of each task's prefixes; measured on one frame."""
        import torch

        from app.prefix import from_embeddings

        first = self._rows[:1]
        # One image stands for all: neither shapes nor masks depend on what it shows.
        image = self._embed(self._frames.images(first), first)
        masks = []
        for start in range(0, len(self._tasks.sentences), _BATCH):
            ids, mask = (
                table[start : start + _BATCH] for table in (self._tasks.ids, self._tasks.mask)
            )
            sample = from_embeddings(self._policy, image.expand(len(ids), -1, -1), ids, mask)
            masks.append(sample.mask)
        device = image.device
        rooms = {
            **({"gpu": memory.gpu(device)} if device.type == "cuda" else {}),
            "memory": memory.host(),
            "disk": memory.disk(folder, prefix_store.reclaimable(folder)),
        }
        kv, embeddings = (
            Layout(len(self._rows), tuple(values.shape[1:]), values.dtype, device)
            for values in (sample.kv, image)
        )
        plans = [_Plan(place, place, kv, room) for place, room in rooms.items()]
        plans += [_Plan("embeddings", place, embeddings, room) for place, room in rooms.items()]
        return plans, torch.cat(masks)

    def _open_store(
        self, plan: _Plan, frozen: str, folder: Path, progress: Progress
    ) -> Store | None:
        """A place for the rows; None where another process took the GPU's memory meanwhile."""
        import torch

        if plan.place == "disk":
            return DiskStore(folder, self._key(plan, frozen), plan.layout, progress)
        if plan.place == "memory":
            return HostStore(plan.layout)
        try:
            return DeviceStore(plan.layout)
        except torch.OutOfMemoryError:
            return None

    def _key(self, plan: _Plan, frozen: str) -> str:
        """sha256 of all that decides the bytes of the rows."""
        policy, layout = self._policy, plan.layout
        vlm = json.loads(policy.model.vlm_with_expert.config.to_json_string())
        # Where the VLM's files lie, and whose version wrote them, is all the same.
        for name in ("_name_or_path", "transformers_version"):
            vlm.pop(name, None)
        described = [
            _FORMAT,
            frozen,
            {package: version(package) for package in ("lerobot", "torch", "transformers")},
            vlm,
            {name: str(getattr(policy.config, name)) for name in _SETTINGS},
            [layout.row, str(layout.dtype), layout.device.type, plan.tier],
            [self._tasks.ids.tolist(), self._tasks.mask.tolist()],
            self._frames.fingerprint(),
        ]
        digest = sha256(json.dumps(described, sort_keys=True).encode())
        digest.update(self._rows.tobytes())
        return digest.hexdigest()

    def _build(self, store: Store, progress: Progress) -> None:
        """Decode every frame once, in order, and store what the VLM makes of it."""
        made: torch.Tensor | None = None
        done = 0
        # The empty batch at the end is for the last one made.
        for batch in chain(batched(self._frames.decode(self._rows), _BATCH), [()]):
            # Fetched only now: a GPU computed it while this batch was decoded.
            if made is not None:
                store.write(done, made)
                done += len(made)
                progress(done, len(self._rows))
            if batch:
                rows = np.array([row for row, _ in batch])
                cameras = batch[0][1]
                images = {key: np.stack([image[key] for _, image in batch]) for key in cameras}
                made = self._embed(images, rows)
                if self._masks is not None:
                    made = self._attended(made, rows).kv
        store.finish()

    def _embed(
        self,
        images: "Mapping[str, NDArray[np.uint8] | torch.Tensor]",
        rows: NDArray[np.int64],
    ) -> "torch.Tensor":
        """The embedded images [B, I, hidden] of these rows."""
        import torch

        from app.prefix import embed_images

        device = torch.device(self._policy.config.device)
        # Divided by a tensor: by a number, a GPU multiplies by its reciprocal, which is not lerobot's scaling.
        white = torch.full((), 255.0, device=device)
        scaled = {
            camera: torch.as_tensor(pixels).to(device).float() / white
            for camera, pixels in images.items()
        }
        # The pipeline tokenizes a task; these tokens are not used.
        batch = self._processors[0]({**scaled, "task": [self._tasks.sentences[0]] * len(rows)})
        return embed_images(self._policy, batch)

    def _attended(self, embeddings: "torch.Tensor", rows: NDArray[np.int64]) -> "Prefix":
        """The prefixes of these rows from their embedded images."""
        from app.prefix import from_embeddings

        tasks = self._tasks
        return from_embeddings(
            self._policy,
            embeddings,
            self._of_tasks(tasks.ids, rows),
            self._of_tasks(tasks.mask, rows),
        )

    def _of_tasks(self, table: "torch.Tensor", rows: NDArray[np.int64]) -> "torch.Tensor":
        """Each row's line of a table [tasks, ...]."""
        return table.index_select(0, moved(self._tasks.number[rows], table.device))


def _tasks(processors: Processors, frames: "Frames", rows: NDArray[np.int64]) -> _Tasks:
    """The tasks of these rows, by the policy's own preprocessor."""
    import torch

    used = np.unique(frames.task[rows])
    number = np.asarray(np.searchsorted(used, frames.task), np.int64)
    sentences = [frames.tasks[task] for task in used]
    # The pipeline wants an observation.
    state = torch.zeros(len(sentences), frames.state.shape[1])
    batch: dict[str, Any] = processors[0]({"observation.state": state, "task": sentences})
    ids, mask = (batch[f"observation.language.{name}"] for name in ("tokens", "attention_mask"))
    length = int(mask.any(0).sum())
    return _Tasks(number, sentences, ids[:, :length], mask[:, :length].bool())
