"""A prefix cache that is built in a thread, so that a round which ends meanwhile loses nothing of it.

One pass over a large dataset takes longer than a round may: the next round waits for the rest of it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from app.prefix_cache import PrefixCache

type Told = Callable[[int, int], None]
"""Told frames done and frames in all; what it raises ends whoever calls it."""

# Seconds between two words to whoever waits: a cancelled job should notice at once.
_LOOK_S = 0.2


class _DroppedError(Exception):
    """Nobody wants the cache any more."""


class PrefixBuild:
    """Runs ``build``, which is told what to call with its progress, in a thread until it is done or dropped."""

    def __init__(self, build: Callable[[Told], PrefixCache]) -> None:
        self._build = build
        self._done = (0, 0)
        self._dropped = threading.Event()
        self._built: Future[PrefixCache] = Future()
        # A daemon: a process that ends has no use for what is half built.
        self._thread = threading.Thread(target=self._run, name="prefix-cache", daemon=True)
        self._thread.start()

    @property
    def failed(self) -> bool:
        """Whether it ended without a cache."""
        return self._built.done() and self._built.exception() is not None

    def wait(self, told: Told) -> PrefixCache:
        """The cache, once it is whole. Raises what ``told`` raises, or what building it raised."""
        while not wait([self._built], _LOOK_S).done:
            told(*self._done)
        return self._built.result()

    def close(self) -> None:
        """End the thread, and give back what the cache holds."""
        self._dropped.set()
        self._thread.join()
        if not self.failed:
            self._built.result().close()

    def _run(self) -> None:
        try:
            self._built.set_result(self._build(self._note))
        except BaseException as error:  # noqa: BLE001 (raised by wait)
            self._built.set_exception(error)

    def _note(self, done: int, total: int) -> None:
        self._done = (done, total)
        if self._dropped.is_set():
            raise _DroppedError
