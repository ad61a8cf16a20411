"""One message to each of a round's sites, and each site's end, in time.

Pulling a reply waits up to two hours for a slow upload, so Flower's calls run in daemon threads and
this module keeps the deadline. Replies are pulled and folded in one at a time: memory does not grow
with the sites.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from flwr.app import Message, RecordDict
from flwr.common.constant import ErrorCode

from app import cause, registry
from app.rounds import POLL_S, Deadlines, Grid, Site, State, bounded, one_line
from certs.errors import FleetError

# Looks at sites in a second, all together: more sites are looked at less often.
LOOKS = 20
# Replies pulled at a time: each may be a whole model in memory. With two, 16 sites' updates took a
# quarter more memory than two sites', and no less time: folding in is done one at a time.
WORKERS = 1
# A worker that waits this long for a site's upload no longer counts, so that a slow uplink cannot
# keep everyone else's reply waiting.
HELD_S = 10.0
# Why a site ended whose certificates were revoked: its node is gone for good.
REVOKED = cause.REVOKED


@dataclass(frozen=True)
class Outcome:
    """How one site ended; ``seconds`` from dispatch to its end, ``sent`` if the message left.

    ``resent``: it asked for another message in place of the first, and that one left too. ``cause`` is
    the reason in a word of ``app.cause``, if the site failed or was revoked.
    """

    site: Site
    state: State
    reason: str | None
    seconds: float
    sent: bool
    resent: bool
    cause: str | None = None


class Exchange:
    """One message to each site, and each site's end.

    ``fold(site, content)`` takes a reply; it is never called twice at a time, and what it raises
    makes the site ``invalid``. Once for each site it may return a message, which is sent to the
    site in place of the first; the site is then waited for as before. ``ended(outcome)`` is called
    once for every site, as it ends.

    The exchange closes when every site ended, when ``enough`` completed, when ``quorum`` completed
    and the soft deadline is past, or at the hard deadline. A reply that is not folded in by then
    never is, so the outcomes say what was folded in; a fold that has begun is let finish.

    ``revoked(nodes)`` says which of the nodes that went missing will not return. They end at once,
    without grace. It may take seconds and must not raise.
    """

    def __init__(
        self,
        grid: Grid,
        fold: Callable[[Site, RecordDict], Message | None],
        ended: Callable[[Outcome], None],
        *,
        deadlines: Deadlines,
        quorum: int = 1,
        enough: int | None = None,
        poll_s: float = POLL_S,
        held_s: float = HELD_S,
        revoked: Callable[[Collection[int]], set[int]] = registry.revoked,
    ) -> None:
        self._grid, self._fold, self._ended = grid, fold, ended
        self._deadlines, self._quorum, self._enough = deadlines, quorum, enough
        self._poll_s, self._held_s = poll_s, held_s
        # Asks another machine: never called with the lock held.
        self._revoked = revoked
        self._started = time.monotonic()
        self._changed = threading.Condition()
        # All below is guarded by _changed.
        self._closed = False
        self._late: str | None = None
        # The message whose reply each site owes; a site is in _due unless a worker looks after it.
        self._waiting: dict[Site, str] = {}
        self._due: deque[tuple[float, Site]] = deque()
        self._busy: dict[int, float] = {}
        self._offline_since: dict[int, float] = {}
        self._outcomes: dict[str, Outcome] = {}
        self._completed = 0
        self._sent: set[Site] = set()
        self._resent: set[Site] = set()

    def left(self) -> float:
        """Seconds to the hard deadline, 0 after it."""
        return max(self._started + self._deadlines.hard - time.monotonic(), 0.0)

    def dispatch(self, messages: Mapping[Site, Message]) -> None:
        """Send each site its message; a site that is not online ends here."""
        asked = dict(messages)
        self._poll_s = max(self._poll_s, len(asked) / LOOKS)
        try:
            online = bounded(self._online, self.left())
            missing = [site for site in asked if site.node not in online]
            revoked = self._revoked([site.node for site in missing])
            for site in missing:
                del asked[site]
                reason = REVOKED if site.node in revoked else "not online when it was asked"
                self._settle(site, State.OFFLINE, reason)
            ids = bounded(lambda: self._push(list(asked.values())), self.left())
        except TimeoutError:
            reason = f"not sent: the SuperLink did not answer within {self._deadlines.hard:g} s"
            for site in asked:
                self._settle(site, State.TIMEOUT, reason)
            return
        except Exception as error:  # noqa: BLE001 - whatever Flower raises fails the round, not the run
            for site in asked:
                self._settle(site, State.ERROR, one_line(f"not sent: {error}"))
            return
        unsent = [site.node for site, message_id in zip(asked, ids, strict=True) if not message_id]
        revoked = self._revoked(unsent)
        with self._changed:
            for site, message_id in zip(asked, ids, strict=True):
                if site.node in revoked:
                    self._settle(site, State.OFFLINE, REVOKED)
                elif message_id is None:
                    self._settle(site, State.ERROR, "the SuperLink did not accept the message")
                else:
                    self._sent.add(site)
                    self._waiting[site] = message_id
                    self._due.append((time.monotonic(), site))

    def collect(self) -> list[Outcome]:
        """Fold replies in until the exchange closes; the outcomes by site name."""
        threading.Thread(target=self._watch, daemon=True).start()
        workers = 0
        with self._changed:
            while not self._over():
                now = time.monotonic()
                held = sum(now - since > self._held_s for since in self._busy.values())
                # Never more threads than sites; held ones are replaced, not ended.
                if workers < min(WORKERS + held, len(self._waiting) + held):
                    workers += 1
                    threading.Thread(target=self._work, daemon=True).start()
                    continue
                grace = self._deadlines.grace
                for site in list(self._waiting):
                    since = self._offline_since.get(site.node)
                    if since is not None and now - since >= grace:
                        reason = f"went offline and did not return within {grace:g} s"
                        self._settle(site, State.OFFLINE, reason)
                self._changed.wait(self._nap())
            self._changed.notify_all()
            for site in list(self._waiting):
                if site.node in self._offline_since:
                    self._settle(site, State.OFFLINE, "went offline before it answered")
                elif self._late:
                    self._settle(site, State.LATE, self._late)
                else:
                    reason = f"no reply within {self._deadlines.hard:g} s"
                    self._settle(site, State.TIMEOUT, reason)
        return [self._outcomes[name] for name in sorted(self._outcomes)]

    def _over(self) -> bool:
        """Whether the exchange is closed; nothing is folded in without asking here first."""
        if not self._closed:
            soft = self._deadlines.soft
            if not self._waiting or self.left() <= 0:
                self._closed = True
            elif self._enough is not None and self._completed >= self._enough:
                self._closed = True
                self._late = f"the round closed with the first {self._enough} replies"
            elif 0 < soft <= self._passed() and self._completed >= self._quorum:
                self._closed = True
                replies = f"{self._completed} of {len(self._outcomes) + len(self._waiting)} replies"
                self._late = (
                    f"the round closed with {replies} after its soft deadline of {soft:g} s"
                )
        return self._closed

    def _passed(self) -> float:
        return time.monotonic() - self._started

    def _nap(self) -> float:
        """Seconds until something may have changed that nobody is told of."""
        until_soft = self._deadlines.soft - self._passed()
        return min(self._poll_s, self.left(), until_soft if until_soft > 0 else self._poll_s)

    def _online(self) -> set[int]:
        return {node.node_id for node in self._grid.get_nodes()}

    def _push(self, messages: list[Message]) -> list[str | None]:
        """The messages' ids; None where the SuperLink did not accept one."""
        ids: list[str | None] = list(self._grid.push_messages(messages))
        # Flower answers an empty list, or None for one message, where it does not accept them.
        return ids if len(ids) == len(messages) else [None] * len(messages)

    def _settle(
        self, site: Site, state: State, reason: str | None = None, why: str | None = None
    ) -> None:
        with self._changed:
            if site.name in self._outcomes:
                raise RuntimeError(f"{site.name} already ended")
            self._waiting.pop(site, None)
            self._completed += state is State.COMPLETED
            sent, resent = site in self._sent, site in self._resent
            why = cause.REVOKED if reason == REVOKED else why
            outcome = Outcome(site, state, reason, round(self._passed(), 3), sent, resent, why)
            self._outcomes[site.name] = outcome
            self._changed.notify_all()
            self._ended(outcome)

    def _watch(self) -> None:
        """Keep ``_offline_since`` true until the exchange is closed."""
        while True:
            try:
                online = self._online()
            except Exception:  # noqa: BLE001 - whatever Flower raises: the deadline decides
                online = None
            now = time.monotonic()
            with self._changed:
                away = {site.node for site in self._waiting} - (online or set())
            # At every look, not only the first: a site may be revoked while its link is down.
            revoked = self._revoked(away) if online is not None else set()
            with self._changed:
                if self._closed:
                    return
                for site in [site for site in self._waiting if site.node in revoked]:
                    self._settle(site, State.OFFLINE, REVOKED)
                if online is not None:
                    away = {site.node for site in self._waiting} - online
                    self._offline_since = {
                        node: self._offline_since.get(node, now) for node in away
                    }
                self._changed.wait(self._poll_s)

    def _work(self) -> None:
        """Pull replies, one site at a time, until the exchange is closed."""
        me = threading.get_ident()
        while True:
            with self._changed:
                site = self._next()
                if site is None:
                    return
                message_id = self._waiting[site]
                self._busy[me] = time.monotonic()
            reply = self._pull(message_id, site.node)
            revoked = bool(reply is not None and _gone(reply) and self._revoked([site.node]))
            with self._changed:
                del self._busy[me]
                again = self._take(site, reply, revoked=revoked)
                if again is not None:
                    self._busy[me] = time.monotonic()
            # A reply or a message may be as large as the model: it must not outlive its turn.
            del reply
            if again is not None:
                self._send_again(site, again)
                with self._changed:
                    del self._busy[me]
            del again

    def _next(self) -> Site | None:
        """The site to look at next, waiting until it is due; None once closed."""
        while not self._closed:
            # Every site goes back with the same delay, so the first is always the next one due.
            wait_s = self._due[0][0] - time.monotonic() if self._due else self._poll_s
            if wait_s > 0:
                self._changed.wait(wait_s)
                continue
            _, site = self._due.popleft()
            if site in self._waiting:
                return site
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

    def _take(self, site: Site, reply: Message | None, *, revoked: bool) -> Message | None:
        """Fold the reply in; a message to be sent in its place, if fold asks for one."""
        # It may also have ended as offline while this worker held its reply.
        if self._over() or site not in self._waiting:
            return None
        if reply is None:
            self._due.append((time.monotonic() + self._poll_s, site))
            return None
        if reply.has_error():
            reason = one_line(reply.error.reason or f"Flower error {reply.error.code}")
            if revoked or _gone(reply):
                self._settle(site, State.OFFLINE, REVOKED if revoked else reason)
            else:
                self._settle(site, State.ERROR, reason, cause.told(reply.error.code))
            return None
        try:
            again = self._fold(site, reply.content)
        except FleetError as error:
            self._settle(site, State.INVALID, one_line(error), cause.of(error))
        except Exception as error:  # noqa: BLE001 - one site's reply must not end everyone's round
            reason = one_line(f"{type(error).__name__}: {error}")
            self._settle(site, State.INVALID, reason, cause.of(error))
        else:
            if again is None:
                self._settle(site, State.COMPLETED)
            elif site in self._resent:
                self._settle(site, State.INVALID, "asked for the model twice", cause.UNEXPECTED)
            else:
                return again
        return None

    def _send_again(self, site: Site, message: Message) -> None:
        """Send a message in place of the first; without the lock, for it may take an upload's time."""
        message_id, reason = None, "the SuperLink did not accept the message"
        try:
            (message_id,) = self._push([message])
        except Exception as error:  # noqa: BLE001 - whatever Flower raises fails this site alone
            reason = one_line(f"not sent again: {error}")
        revoked = message_id is None and self._revoked([site.node])
        with self._changed:
            # It may have ended meanwhile, as offline or because the exchange closed.
            if site not in self._waiting:
                return
            if message_id is None:
                ended = (State.OFFLINE, REVOKED) if revoked else (State.ERROR, reason)
                self._settle(site, *ended)
                return
            self._resent.add(site)
            self._waiting[site] = message_id
            self._due.append((time.monotonic() + self._poll_s, site))


def _gone(reply: Message) -> bool:
    """Whether Flower answered in the site's place, because its node is gone."""
    return bool(reply.has_error() and reply.error.code == ErrorCode.NODE_UNAVAILABLE)
