"""A round: its phases, who is asked, and how each site ends.

Flower's own calls may wait for ever (its HTTP client retries without a limit), so they run in
daemon threads and what calls them keeps the deadline. ``app/exchange.py`` asks the sites.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from hashlib import sha256
from queue import Empty, SimpleQueue
from typing import Protocol

from flwr.app import Message

from certs.errors import RunFailedError

# Seconds between two looks at one site, and at who is online. Each costs the SuperLink about 10 ms.
POLL_S = 1.0
# Longer texts from a site are cut: they go to logs and records.
TEXT = 300


class State(StrEnum):
    """How a site that was asked ended."""

    COMPLETED = "completed"
    LATE = "late"
    TIMEOUT = "timeout"
    OFFLINE = "offline"
    ERROR = "error"
    INVALID = "invalid"


class Phase(StrEnum):
    """Where a round is; a degraded one commits without some of the sites it asked."""

    SELECT = "select"
    DISPATCH = "dispatch"
    COLLECT = "collect"
    COMMIT = "commit"
    DEGRADE = "degrade"
    FAIL = "fail"
    EVALUATE = "evaluate"
    DONE = "done"


# Round 0 has nothing to train: it commits the base model and evaluates it. A resumed run evaluates
# the round whose checkpoint it finds without a record.
_MOVES: dict[Phase | None, set[Phase]] = {
    None: {Phase.SELECT, Phase.COMMIT, Phase.EVALUATE},
    Phase.SELECT: {Phase.DISPATCH, Phase.FAIL},
    Phase.DISPATCH: {Phase.COLLECT},
    Phase.COLLECT: {Phase.COMMIT, Phase.DEGRADE, Phase.FAIL},
    Phase.COMMIT: {Phase.EVALUATE},
    Phase.DEGRADE: {Phase.EVALUATE},
    Phase.EVALUATE: {Phase.DONE},
    Phase.FAIL: {Phase.DONE},
    Phase.DONE: set(),
}


@dataclass
class Round:
    """A round's state machine; it refuses impossible moves and keeps the seconds of each phase."""

    number: int
    phase: Phase | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    # Told each phase and the round's number.
    told: Callable[[str, int], None] = lambda *_: None
    _entered: float = 0.0

    def enter(self, phase: Phase) -> None:
        """Move on to ``phase``."""
        if phase not in _MOVES[self.phase]:
            raise RuntimeError(f"round {self.number} cannot go from {self.phase} to {phase}")
        now = time.monotonic()
        if self.phase is not None:
            self.seconds[self.phase.value] = round(now - self._entered, 3)
        self.phase, self._entered = phase, now
        self.told(phase.value, self.number)


@dataclass(frozen=True)
class Site:
    """A site of this run: its name, and the id of its SuperNode."""

    name: str
    node: int


@dataclass(frozen=True)
class Deadlines:
    """Seconds from the first message: when the wait for sites ends, and what a lost link may take.

    After ``soft`` the wait ends as soon as there is a quorum (0: never before ``hard``); a site
    that is offline for longer than ``grace`` is not waited for.
    """

    hard: float
    soft: float = 0.0
    grace: float = 60.0


class Node(Protocol):
    """What this module reads of Flower's NodeInfo."""

    node_id: int
    name: str


class Grid(Protocol):
    """What this module and ``app.exchange`` use of Flower's Grid."""

    def get_nodes(self) -> Iterable[Node]: ...
    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]: ...
    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]: ...


def one_line(text: object) -> str:
    """``text`` from elsewhere, fit for a log line: printable, on one line, at most TEXT long."""
    words = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    return words if len(words) <= TEXT else words[: TEXT - 1] + "…"


def bounded[T](call: Callable[[], T], seconds: float) -> T:
    """The result of ``call``, or ``TimeoutError`` after ``seconds``; the call is then left behind."""
    answers: SimpleQueue[tuple[T, None] | tuple[None, Exception]] = SimpleQueue()

    def run() -> None:
        try:
            answers.put((call(), None))
        except Exception as error:  # noqa: BLE001 - raised again below, in the caller's thread
            answers.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        value, error = answers.get(timeout=max(seconds, 0.0))
    except Empty:
        raise TimeoutError from None
    if error is not None:
        raise error
    return value  # type: ignore[return-value]


def wait_for_sites(
    grid: Grid, minimum: int, seconds: float, *, poll_s: float = POLL_S
) -> list[Node]:
    """The SuperNodes online, once there are ``minimum``; ``RunFailedError`` after ``seconds``."""
    end = time.monotonic() + seconds
    nodes: list[Node] = []
    said = ""
    while (left := end - time.monotonic()) > 0:
        try:
            nodes, said = bounded(lambda: list(grid.get_nodes()), left), ""
        except TimeoutError:
            break
        except Exception as error:  # noqa: BLE001 - a SuperLink that restarts must not end the run
            said = f" (the SuperLink says: {one_line(error)})"
        if len(nodes) >= minimum:
            return sorted(nodes, key=lambda node: (node.name, node.node_id))
        time.sleep(min(poll_s, max(end - time.monotonic(), 0.0)))
    raise RunFailedError(
        f"{len(nodes)} of the {minimum} sites this run needs came online within {seconds:g} s{said}: "
        "start the missing sites, or lower min-sites or quorum."
    )


def select(
    sites: Sequence[Site],
    online: Collection[int],
    *,
    count: int,
    over_sampling: float,
    seed: int,
    number: int,
) -> list[Site]:
    """The sites that round ``number`` asks, by name.

    With ``count`` 0 every site: one that is offline ends so, and is on record. Else ``count`` times
    ``over_sampling`` of those ``online``, rounded up, by the order of a hash of seed, round and name:
    the same whatever the order of the sites, and one site's absence changes one place in the draw.
    """
    drawn = list(sites)
    if count:
        drawn = [site for site in sites if site.node in online]
        drawn.sort(key=lambda site: sha256(f"{seed}/{number}/{site.name}".encode()).digest())
        # As floats 50 * 1.1 is 55.00000000000001, and asks 55: nobody sets more than six digits.
        drawn = drawn[: math.ceil(round(count * over_sampling, 6))]
    return sorted(drawn, key=lambda site: site.name)
