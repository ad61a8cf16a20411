"""A round: who is asked, what became of each, and that it ends in time.

Flower's own calls may wait for ever (its HTTP client retries without a limit, and pulling a reply
waits up to two hours for a slow upload), so they run in daemon threads and this module keeps the
deadline. Replies are pulled and folded in one at a time: memory does not grow with the sites.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from queue import Empty, SimpleQueue
from typing import Protocol

from flwr.app import Message, RecordDict
from flwr.common.constant import ErrorCode

from certs.errors import FleetError, RunFailedError

# Seconds between two looks at one site, and at who is online. Each costs the SuperLink about 10 ms.
POLL_S = 1.0
# Flower calls a silent node offline after about 54 s, and a link that returns still delivers its
# reply; a minute more covers links lost for almost two.
OFFLINE_S = 60.0
# Looks at sites in a second, all together: more sites are looked at less often.
LOOKS = 20
# Replies pulled at a time: each may be a whole model in memory.
WORKERS = 2
# A worker that waits this long for a site's upload no longer counts, so that two slow uplinks
# cannot keep everyone else's reply waiting.
HELD_S = 10.0
# Longer texts from a site are cut: they go to logs and records.
TEXT = 300


class State(StrEnum):
    """How a site that was asked ended."""

    COMPLETED = "completed"
    TIMEOUT = "timeout"
    OFFLINE = "offline"
    ERROR = "error"
    INVALID = "invalid"


class Phase(StrEnum):
    """Where a round is."""

    DISPATCH = "dispatch"
    COLLECT = "collect"
    COMMIT = "commit"
    FAIL = "fail"
    EVALUATE = "evaluate"
    DONE = "done"


# Round 0 has nothing to train: it commits the base model and evaluates it.
_MOVES: dict[Phase | None, set[Phase]] = {
    None: {Phase.DISPATCH, Phase.COMMIT},
    Phase.DISPATCH: {Phase.COLLECT},
    Phase.COLLECT: {Phase.COMMIT, Phase.FAIL},
    Phase.COMMIT: {Phase.EVALUATE},
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
    _entered: float = 0.0

    def enter(self, phase: Phase) -> None:
        """Move on to ``phase``."""
        if phase not in _MOVES[self.phase]:
            raise RuntimeError(f"round {self.number} cannot go from {self.phase} to {phase}")
        now = time.monotonic()
        if self.phase is not None:
            self.seconds[self.phase.value] = round(now - self._entered, 3)
        self.phase, self._entered = phase, now


@dataclass(frozen=True)
class Site:
    """A site of this run: its name, and the id of its SuperNode."""

    name: str
    node: int


@dataclass(frozen=True)
class Outcome:
    """How one site ended; ``seconds`` from dispatch to its end, ``sent`` if the message left."""

    site: Site
    state: State
    reason: str | None
    seconds: float
    sent: bool


class Node(Protocol):
    """What this module reads of Flower's NodeInfo."""

    node_id: int
    name: str


class Grid(Protocol):
    """What this module uses of Flower's Grid."""

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
    while (left := end - time.monotonic()) > 0:
        try:
            nodes = bounded(lambda: list(grid.get_nodes()), left)
        except TimeoutError:
            break
        if len(nodes) >= minimum:
            return sorted(nodes, key=lambda node: (node.name, node.node_id))
        time.sleep(min(poll_s, max(end - time.monotonic(), 0.0)))
    raise RunFailedError(
        f"{len(nodes)} of the {minimum} sites this run needs came online within {seconds:g} s: "
        "start the missing sites, or lower min-sites."
    )


class Exchange:
    """One message to each site, and each site's end.

    ``fold(site, content)`` takes a reply; it is never called twice at a time, and what it raises
    makes the site ``invalid``. ``ended(outcome)`` is called once for every site, as it ends.
    """

    def __init__(
        self,
        grid: Grid,
        fold: Callable[[Site, RecordDict], None],
        ended: Callable[[Outcome], None],
        *,
        seconds: float,
        poll_s: float = POLL_S,
        offline_s: float = OFFLINE_S,
        held_s: float = HELD_S,
    ) -> None:
        self._grid, self._fold, self._ended = grid, fold, ended
        self._limit, self._poll_s, self._offline_s = seconds, poll_s, offline_s
        self._held_s = held_s
        self._started = time.monotonic()
        self._end = self._started + seconds
        self._changed = threading.Condition()
        # All below is guarded by _changed.
        self._closed = False
        self._waiting: dict[str, Site] = {}
        self._due: deque[tuple[float, str]] = deque()
        self._busy: dict[int, float] = {}
        self._offline_since: dict[int, float] = {}
        self._outcomes: dict[str, Outcome] = {}
        self._sent: set[Site] = set()

    def dispatch(self, messages: Mapping[Site, Message]) -> None:
        """Send each site its message; a site that is not online ends here."""
        asked = dict(messages)
        self._poll_s = max(self._poll_s, len(asked) / LOOKS)
        try:
            online = bounded(self._online, self._left())
            for site in [site for site in asked if site.node not in online]:
                del asked[site]
                self._settle(site, State.OFFLINE, "not online when it was asked")
            ids = bounded(
                lambda: list(self._grid.push_messages(list(asked.values()))), self._left()
            )
        except TimeoutError:
            reason = f"not sent: the SuperLink did not answer within {self._limit:g} s"
            for site in asked:
                self._settle(site, State.TIMEOUT, reason)
            return
        except Exception as error:  # noqa: BLE001 - whatever Flower raises fails the round, not the run
            for site in asked:
                self._settle(site, State.ERROR, one_line(f"not sent: {error}"))
            return
        # Flower answers an empty list, or None for one message, where it does not accept them.
        accepted = ids if len(ids) == len(asked) else [None] * len(asked)
        with self._changed:
            for site, message_id in zip(asked, accepted, strict=True):
                if message_id is None:
                    self._settle(site, State.ERROR, "the SuperLink did not accept the message")
                else:
                    self._sent.add(site)
                    self._waiting[message_id] = site
                    self._due.append((time.monotonic(), message_id))

    def collect(self) -> list[Outcome]:
        """Fold replies in until every site ended or the deadline is here; outcomes by site name."""
        threading.Thread(target=self._watch, daemon=True).start()
        workers = 0
        with self._changed:
            while self._waiting and self._left() > 0:
                now = time.monotonic()
                held = sum(now - since > self._held_s for since in self._busy.values())
                # Never more threads than sites; held ones are replaced, not ended.
                if workers < min(WORKERS + held, len(self._waiting) + held):
                    workers += 1
                    threading.Thread(target=self._work, daemon=True).start()
                    continue
                for message_id, site in list(self._waiting.items()):
                    if now - self._offline_since.get(site.node, now) > self._offline_s:
                        del self._waiting[message_id]
                        reason = f"went offline and did not return within {self._offline_s:g} s"
                        self._settle(site, State.OFFLINE, reason)
                self._changed.wait(min(self._poll_s, self._left()))
            self._closed = True
            self._changed.notify_all()
            for site in self._waiting.values():
                if site.node in self._offline_since:
                    self._settle(site, State.OFFLINE, "went offline before it answered")
                else:
                    self._settle(site, State.TIMEOUT, f"no reply within {self._limit:g} s")
            self._waiting.clear()
        return [self._outcomes[name] for name in sorted(self._outcomes)]

    def _left(self) -> float:
        return max(self._end - time.monotonic(), 0.0)

    def _online(self) -> set[int]:
        return {node.node_id for node in self._grid.get_nodes()}

    def _settle(self, site: Site, state: State, reason: str | None = None) -> None:
        if site.name in self._outcomes:
            raise RuntimeError(f"{site.name} already ended")
        seconds = round(time.monotonic() - self._started, 3)
        outcome = Outcome(site, state, reason, seconds, site in self._sent)
        self._outcomes[site.name] = outcome
        self._ended(outcome)

    def _watch(self) -> None:
        """Keep ``_offline_since`` true until the exchange is closed."""
        while True:
            try:
                online = self._online()
            except Exception:  # noqa: BLE001 - whatever Flower raises: the deadline decides
                online = None
            with self._changed:
                if self._closed:
                    return
                if online is not None:
                    now = time.monotonic()
                    away = {site.node for site in self._waiting.values()} - online
                    self._offline_since = {
                        node: self._offline_since.get(node, now) for node in away
                    }
                self._changed.wait(self._poll_s)

    def _work(self) -> None:
        """Pull replies, one message id at a time, until the exchange is closed."""
        me = threading.get_ident()
        while True:
            with self._changed:
                message_id = self._next()
                if message_id is None:
                    return
                node = self._waiting[message_id].node
                self._busy[me] = time.monotonic()
            reply = self._pull(message_id, node)
            with self._changed:
                del self._busy[me]
                site = self._waiting.get(message_id)
                if self._closed:
                    return
                if site is None:  # it ended as offline while this worker held its reply
                    continue
                if reply is None:
                    self._due.append((time.monotonic() + self._poll_s, message_id))
                    continue
                del self._waiting[message_id]
                self._take(site, reply)
                self._changed.notify_all()
            # A reply may be as large as the model: it must not outlive its turn.
            del reply

    def _next(self) -> str | None:
        """The message id to look at next, waiting until it is due; None once closed."""
        while not self._closed:
            # Every id goes back with the same delay, so the first is always the next one due.
            wait_s = self._due[0][0] - time.monotonic() if self._due else self._poll_s
            if wait_s > 0:
                self._changed.wait(wait_s)
                continue
            _, message_id = self._due.popleft()
            if message_id in self._waiting:
                return message_id
        return None

    def _pull(self, message_id: str, node: int) -> Message | None:
        try:
            # To pull for a node that is offline makes Flower answer with an error and throw the
            # real reply away; without a pull, a link that returns still delivers it. So ask anew,
            # right before: what _watch knows may be a second old.
            if node not in self._online():
                return None
            return next(iter(self._grid.pull_messages([message_id])), None)
        except Exception:  # noqa: BLE001 - whatever Flower raises: try again until the deadline
            return None

    def _take(self, site: Site, reply: Message) -> None:
        if reply.has_error():
            gone = reply.error.code == ErrorCode.NODE_UNAVAILABLE
            reason = one_line(reply.error.reason or f"Flower error {reply.error.code}")
            self._settle(site, State.OFFLINE if gone else State.ERROR, reason)
            return
        try:
            self._fold(site, reply.content)
        except FleetError as error:
            self._settle(site, State.INVALID, one_line(error))
        except Exception as error:  # noqa: BLE001 - one site's reply must not end everyone's round
            self._settle(site, State.INVALID, one_line(f"{type(error).__name__}: {error}"))
        else:
            self._settle(site, State.COMPLETED)
