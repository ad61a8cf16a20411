"""What a site keeps on its own disk between two messages: the model it holds, and its training state.

Without the held model every round would be a full broadcast, without the optimiser's moments every
round would start cold, and without the residual what a codec rounds away would be lost (error
feedback). None of it leaves the site.

A lineage (one run, however often it is resumed) has a directory with numbered safetensors files,
and an index that names those in use. Replacing the index is the one step that changes anything: a
crash before it leaves the old state, after it the new, and files the index does not name are
removed by the next write.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from app import tensorfile
from app.durable import sync, write_json
from app.optimizer import OptimizerState
from app.payload import Tensors
from app.tensorfile import Lazy
from certs.errors import ConfigError, ModelError, StorageError

SCHEMA = 1
INDEX = "index.json"
# Held by the process that writes; the kernel releases it when that process ends.
_LOCK = ".lock"
# This run's, and the one before it should that be resumed. SmolVLA's is up to 2.8 GB each: the
# model (0.4 GB), and twice its moments (0.8 GB) and residual (0.4 GB).
_LINEAGES = 2
# A round that is done again starts from the state before the one it replaces.
_STATES = 2
# A directory name: the run's record has the same one.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")

_log = logging.getLogger("flwr")


@dataclass(frozen=True)
class Kept:
    """A site's training state after a round; each part is None where the config has no use for it."""

    optimizer: OptimizerState | None
    residual: Tensors | None


@dataclass(frozen=True)
class _State:
    """The files of the training state after ``round``, and the optimiser's steps."""

    round: int
    step: int
    optimizer: str | None
    residual: str | None


@dataclass(frozen=True)
class _Index:
    """What an index names. ``serial`` numbers files, so that none is ever written over."""

    serial: int = 0
    hash: str | None = None
    model: str | None = None
    states: tuple[_State, ...] = ()

    @property
    def files(self) -> set[str]:
        found = [self.model, *(name for s in self.states for name in (s.optimizer, s.residual))]
        return {name for name in found if name}


def most_bytes(values: int, *, moments: bool, residual: bool) -> int:
    """The most that a site's state takes on disk for a model of so many trained values, in float32.

    The model, and in each of the states the optimiser's two moments and the residual, where the run keeps them; for
    this run and the one before it, and for a state that is being written.
    """
    state = values * 4 * (2 * moments + residual)
    return _LINEAGES * (values * 4 + _STATES * state) + state


class SiteState:
    """One site's state in one lineage below ``root``, which is that site's alone.

    The two lineages used last are kept, others removed. Damaged files are logged once and then
    absent. ``StorageError`` when the directory cannot be written, ``ConfigError`` when ``lineage``
    cannot be a directory's name.
    """

    def __init__(self, root: Path, lineage: str) -> None:
        if not _NAME.fullmatch(lineage):
            raise ConfigError(
                f"The run calls itself {lineage[:128]!r}: use up to 128 letters, digits, dots and "
                "dashes, beginning with a letter or digit."
            )
        self._folder = root / lineage
        # The state that was kept last, by what the index says of it.
        self._recent: tuple[_State, Kept] | None = None
        self._writer: threading.Thread | None = None
        self._failure: Exception | None = None
        self.refresh()

    def refresh(self) -> None:
        """See what other processes of this site have written; raises what a ``later`` write raised."""
        self.settle()
        with self._writing():
            self._folder.mkdir(parents=True, exist_ok=True)
        with self._locked():
            # The time of the last use, by which lineages are kept.
            os.utime(self._folder)
            self._remove_lineages()
            read = self._read()
            self._index = self._whole(read)
            if self._index != read:
                self._commit(self._index)

    def later(self, write: Callable[[], None]) -> None:
        """Let a thread do ``write``, a call of ``keep`` or ``keep_model``; :meth:`settle` before anything else."""
        self.settle()

        def run() -> None:
            try:
                write()
            except Exception as error:  # noqa: BLE001 (raised by settle)
                self._failure = error
                _log.error("%s", error)

        # No daemon: a process that ends writes first.
        self._writer = threading.Thread(target=run, name="site-state")
        self._writer.start()

    def settle(self) -> None:
        """Wait until what ``later`` was given is on disk; raises what it raised, once."""
        if self._writer:
            self._writer.join()
            self._writer = None
        failure, self._failure = self._failure, None
        if failure:
            raise failure

    def held(self) -> str | None:
        """The canonical hash of the model this site holds."""
        return self._index.hash

    def model(self) -> Lazy:
        """The model this site holds; ``ModelError`` when it holds none."""
        if self._index.model is None:
            raise ModelError(f"{self._folder} holds no model: ask for the full one.")
        return self._open(self._index.model)

    def keep_model(
        self,
        model_hash: str,
        shapes: Mapping[str, tuple[int, ...]],
        tensors: Iterable[tuple[str, NDArray[np.float32]]],
    ) -> None:
        """Hold another model; its tensors are written as they come, and may be read from the old one."""
        with self._locked():
            index = self._read()
            name = f"model-{index.serial:08d}.safetensors"
            writer = tensorfile.Writer(self._folder / name, shapes)
            for tensor, array in tensors:
                writer.put(tensor, array)
            writer.close()
            self._commit(replace(index, hash=model_hash, model=name))

    def before(self, number: int) -> Kept | None:
        """The newest training state of a round before ``number``."""
        states = [state for state in self._index.states if state.round < number]
        if not states:
            return None
        state = states[-1]
        if self._recent and self._recent[0] == state:
            return self._recent[1]
        return Kept(
            OptimizerState(state.step, self._open(state.optimizer)) if state.optimizer else None,
            self._open(state.residual) if state.residual else None,
        )

    def keep(self, number: int, kept: Kept) -> None:
        """Keep the training state after round ``number``, in place of that round's and later ones'.

        The newest two stay: a round that is done again must start where it started. ``kept`` itself
        stays in memory until the next one, for the round that follows.
        """
        self._recent = None
        with self._locked():
            index = self._read()
            names: list[str | None] = []
            for part, tensors in (
                ("optimizer", kept.optimizer.tensors if kept.optimizer else None),
                ("residual", kept.residual),
            ):
                name = f"{part}-{index.serial:08d}.safetensors" if tensors else None
                if tensors and name:
                    tensorfile.write(self._folder / name, tensors)
                names.append(name)
            state = _State(number, kept.optimizer.step if kept.optimizer else 0, *names)
            earlier = [state for state in index.states if state.round < number]
            self._commit(replace(index, states=(*earlier[1 - _STATES :], state)))
        self._recent = (state, kept)

    def _open(self, name: str) -> Lazy:
        path = self._folder / name
        return Lazy(path, tensorfile.entries(path)[0])

    def _commit(self, index: _Index) -> None:
        index = replace(index, serial=index.serial + 1)
        # The files' names reach the disk before the name of what refers to them.
        sync(self._folder)
        write_json(self._folder / INDEX, {"schema": SCHEMA, **asdict(index)})
        self._index = index

    def _read(self) -> _Index:
        """The index on disk; an empty one when there is none. A damaged one is removed."""
        path = self._folder / INDEX
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content.pop("schema") != SCHEMA:
                raise ValueError("another version")
            states = tuple(_State(**state) for state in content.pop("states"))
            return _Index(**content, states=states)
        except FileNotFoundError:
            return _Index()
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            _log.warning("%s is damaged (%s): this site starts without it.", path, error)
            path.unlink()
            return _Index()

    def _whole(self, index: _Index) -> _Index:
        """``index`` without what refers to damaged files."""
        damaged = set()
        for name in sorted(index.files):
            try:
                tensorfile.entries(self._folder / name)
            except ModelError:
                damaged.add(name)
                _log.warning("%s is damaged: this site goes on without it.", self._folder / name)
        if index.model in damaged:
            index = replace(index, hash=None, model=None)
        states = (s for s in index.states if not damaged & {s.optimizer, s.residual})
        return replace(index, states=tuple(states))

    def _remove_lineages(self) -> None:
        others = [p for p in self._folder.parent.iterdir() if p.is_dir() and p != self._folder]
        others.sort(key=lambda folder: folder.stat().st_mtime_ns)
        for folder in others[: 1 - _LINEAGES]:
            shutil.rmtree(folder)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Alone among the site's processes: a late round's may still write.

        Leaves only the files that the index names.
        """
        with self._writing(), (self._folder.parent / _LOCK).open("w") as lock:
            # The holder does nothing but write, and the kernel frees the lock when it dies.
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                yield
            finally:
                named = {INDEX, *self._read().files}
                for path in self._folder.iterdir():
                    if path.name not in named:
                        path.unlink()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StorageError(
                f"This site's state in {self._folder} cannot be written ({error.strerror}): free "
                "space there, or let VLAFLEET_HOME name another disk."
            ) from error
