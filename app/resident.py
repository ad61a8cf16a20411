"""What a worker keeps loaded from one job to the next: base, policy, the site's frames, and their prefixes.

Each is kept as long as jobs ask for the same one, and dropped before another takes its place.
"""

from __future__ import annotations

import os
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from app import payload, trainables
from app.config import RunConfig, home, models_directory
from app.frames import Frames
from app.payload import Tensors
from app.policy import frozen_hash, resolve_model
from app.prefix_build import PrefixBuild, Told
from app.site_state import SiteState
from app.tensorfile import WEIGHTS

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from app.dataset import SiteDataset
    from app.loader import Loader
    from app.policy import Processors
    from app.prefix_cache import PrefixCache

type Part = Literal["train", "held_out"]
type Stamps = tuple[tuple[Path, int, int], ...]
"""Files with their size and time of change."""

# Sites whose data stay loaded in one process. A SuperNode has one; a process of the simulation
# serves many in turn, and the caches of that many are what a round of it asks for again.
_SITES = 16


class Base:
    """A base model's directory, and what is computed from its file once."""

    def __init__(self, config: RunConfig, path: Path) -> None:
        self.path, self._config = path, config
        self.initial = trainables.initial(config, path)

    @cached_property
    def frozen(self) -> str:
        """The hash of what never crosses the wire."""
        return trainables.frozen(self._config, self.path)

    @cached_property
    def vlm(self) -> str:
        """The hash of what prefixes are computed with."""
        return frozen_hash(self.path)

    @cached_property
    def hash(self) -> str:
        """The canonical hash of the tensors that a run starts from."""
        return payload.canonical_hash(self.initial)


class Model:
    """A policy on a device, and which model its trainable tensors hold."""

    def __init__(self, config: RunConfig, base: Base, device: str) -> None:
        from app.policy import load_policy, trainable_tensors

        self.base = base
        self.policy = load_policy(base.path, device)
        if config.exchange == "lora":
            from app.lora import attach

            attach(self.policy, config.lora_rank)
        self.trainable: dict[str, torch.Tensor] = trainable_tensors(self.policy)
        self._holds: str | None = None
        self._processors: tuple[str, Processors] | None = None

    def hold(self, model: str, tensors: Tensors) -> None:
        """Let the trainable tensors be ``tensors``, whose canonical hash is ``model``."""
        import torch

        if self._holds == model:
            return
        self._holds = None
        with torch.no_grad():
            for name, parameter in self.trainable.items():
                parameter.copy_(torch.tensor(tensors[name]))
        self._holds = model

    def change(self) -> None:
        """The trainable tensors are about to change."""
        self._holds = None

    def processors(self, statistics: str) -> Processors:
        """The base's pre- and post-processor with a run's pooled statistics, as its request has them."""
        if self._processors is None or self._processors[0] != statistics:
            self._processors = (statistics, self._load_processors(statistics))
        return self._processors[1]

    def prefix_cache(
        self,
        frames: Frames,
        rows: NDArray[Any],
        config: RunConfig,
        statistics: str,
        seed: int | None,
        brief: bool,
        told: Told,
    ) -> PrefixCache:
        """Find or make the prefixes of these rows; ``seed`` is that of their images' augmentation, if any."""
        from app.augmentation import augment
        from app.prefix_cache import PrefixCache

        device = str(self.policy.config.device)
        return PrefixCache.open(
            self.policy,
            # Of its own, for it is used in a thread. Images and tasks are not normalised.
            self._load_processors(statistics),
            frames,
            rows,
            choice=config.prefix_cache,
            frozen=self.base.vlm,
            folder=home() / "cache",
            augment=None if seed is None else partial(augment, seed=seed, device=device),
            brief=brief,
            progress=told,
        )

    def _load_processors(self, statistics: str) -> Processors:
        from app.policy import load_processors
        from app.statistics import from_bytes, normalisation

        found = normalisation(from_bytes(statistics.encode()))
        return load_processors(self.base.path, self.policy, found)


class Site:
    """A site's dataset, its frames, and their prefixes."""

    def __init__(self, dataset: SiteDataset, *, brief: bool) -> None:
        self.dataset, self._stamps, self._brief = dataset, _stamps(dataset), brief
        self._frames: dict[Part, Frames] = {}
        self._builds: dict[Part, tuple[object, PrefixBuild]] = {}
        self._loader: tuple[object, Loader] | None = None

    def unchanged(self) -> bool:
        """Whether the dataset's files are those that were opened."""
        try:
            return self._stamps == _stamps(self.dataset)
        except OSError:
            return False

    def same(self, other: Site) -> bool:
        """Whether ``other`` was opened on the same files and splits them alike."""
        return (self.dataset, self._stamps) == (other.dataset, other._stamps)

    def frames(self, part: Part) -> Frames:
        """The training frames, or the held-out ones. Raises DatasetError."""
        if part not in self._frames:
            dataset = self.dataset
            chosen = dataset.train_episodes if part == "train" else dataset.held_out_episodes
            self._frames[part] = Frames(dataset, chosen)
        return self._frames[part]

    def cache(
        self, part: Part, model: Model, config: RunConfig, statistics: str, told: Told
    ) -> PrefixCache:
        """The prefixes of the frames that the run uses, waited for; ``told`` says how far they are."""
        frames = self.frames(part)
        rows = _drawn(frames, config) if part == "train" else _spread(frames, config)
        seed = config.seed if config.image_augmentation and part == "train" else None
        key = (model, rows.tobytes(), config.prefix_cache, seed)
        before = self._builds.get(part)
        if before is None or before[0] != key or before[1].failed:
            self._drop(part)
            make = partial(model.prefix_cache, frames, rows, config, statistics, seed, self._brief)
            self._builds[part] = (key, PrefixBuild(make))
        return self._builds[part][1].wait(told)

    def loader(self, model: Model, statistics: str, cache: PrefixCache) -> Loader:
        """Batches of the training frames, whose prefixes ``cache`` has."""
        from app.loader import Loader

        key = (statistics, cache)
        if self._loader is None or self._loader[0] != key:
            processors = model.processors(statistics)
            loader = Loader(model.policy, processors, self.frames("train"), cache)
            self._loader = (key, loader)
        return self._loader[1]

    def close(self) -> None:
        """Give back what the caches hold."""
        for part in list(self._builds):
            self._drop(part)

    def _drop(self, part: Part) -> None:
        if part == "train":
            self._loader = None
        if part in self._builds:
            self._builds.pop(part)[1].close()


class Resident:
    """What is loaded; every method loads anew only what differs from the last job's.

    ``brief`` says that the process ends with its job, and that what is dear to make is best left on disk.
    """

    def __init__(self, *, brief: bool) -> None:
        self._brief = brief
        self._path: tuple[object, Path] | None = None
        self._base: tuple[object, Base] | None = None
        self._model: tuple[object, Model] | None = None
        # By name, the one that was used last at the end; with the key it was opened by.
        self._sites: dict[str, tuple[object, Site]] = {}
        self._state: tuple[object, SiteState] | None = None

    def base(self, config: RunConfig, lineage: str) -> Base:
        """The base model that the run names. Raises ModelError."""
        models = models_directory()
        # Once a run: a model on the hub is looked for there.
        named = (config.model, models, lineage)
        if self._path is None or self._path[0] != named:
            self._path = (named, resolve_model(config.model, models))
        path = self._path[1]
        files: Stamps = ()
        try:
            files = tuple(_stamp(path / name) for name in (WEIGHTS, "config.json"))
        except OSError:
            # It went away: this says so.
            path = resolve_model(config.model, models)
        # Adapters begin as the seed says.
        key = (path, files, config.exchange, config.lora_rank, config.seed)
        if self._base is None or self._base[0] != key:
            self._unload()
            self._base = (key, Base(config, path))
        return self._base[1]

    def model(self, config: RunConfig, base: Base, device: str) -> Model:
        """The policy that ``base`` holds, on ``device``. Raises ModelError."""
        key = (base, device)
        if self._model is None or self._model[0] != key:
            self._unload()
            self._model = (key, Model(config, base, device))
        return self._model[1]

    def site(self, name: str, uri: str, config: RunConfig, lineage: str) -> Site:
        """A site's data. Raises DatasetError."""
        from app.dataset import open_dataset

        # Once a run, or when its files change: a dataset on the hub is looked for there.
        key = (uri, config.held_out, config.seed, lineage)
        before = self._sites.pop(name, None)
        if before is None or before[0] != key or not before[1].unchanged():
            try:
                dataset = open_dataset(uri, held_out=config.held_out, seed=config.seed)
                site = Site(dataset, brief=self._brief)
            except BaseException:
                if before:
                    before[1].close()
                raise
            if before and before[1].same(site):
                site = before[1]
            elif before:
                before[1].close()
            before = (key, site)
        self._sites[name] = before
        while len(self._sites) > _SITES:
            self._sites.pop(next(iter(self._sites)))[1].close()
        return before[1]

    def state(self, name: str, lineage: str) -> SiteState:
        """What a site keeps on disk, as it is now there. Raises StorageError."""
        root = home() / "sites" / name
        if self._state is None or self._state[0] != (root, lineage):
            if self._state:
                self._state[1].settle()
            self._state = ((root, lineage), SiteState(root, lineage))
        else:
            self._state[1].refresh()
        return self._state[1]

    def settle(self) -> None:
        """Finish what is being written. Raises StorageError."""
        if self._state:
            self._state[1].settle()

    def close(self) -> None:
        """Finish what is being written, and give everything back."""
        self._unload()
        self._base = None
        self._sites.clear()
        self.settle()
        self._state = None

    def _unload(self) -> None:
        """Drop the policy, and what was computed with it."""
        for _, site in self._sites.values():
            site.close()
        if self._model:
            self._model = None
            import torch

            torch.cuda.empty_cache()


def _drawn(frames: Frames, config: RunConfig) -> NDArray[Any]:
    """The rows that a run trains on: all, unless it ends within its first pass over them."""
    import numpy as np

    from app.loader import order

    steps = config.rounds * config.local_steps
    if steps * config.batch_size >= len(frames):
        return np.arange(len(frames))
    batches = order(len(frames), batch_size=config.batch_size, seed=config.seed, step=0)
    return np.sort(np.concatenate(list(islice(batches, steps))))


def _spread(frames: Frames, config: RunConfig) -> NDArray[Any]:
    import numpy as np

    from app.evaluation import spread

    return np.array(spread(len(frames), config.batch_size * config.eval_batches))


def _stamps(dataset: SiteDataset) -> Stamps:
    meta = sorted(path for path in (dataset.root / "meta").rglob("*") if path.is_file())
    files = [dataset.root / file for file in dataset.meta.files(dataset.episodes)]
    return tuple(_stamp(path) for path in [*meta, *files])


def _stamp(path: Path) -> tuple[Path, int, int]:
    stat = os.stat(path)
    return path, stat.st_size, stat.st_mtime_ns
