"""Every site that is asked ends in exactly one state, with a reason, in time."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field

import pytest
from flwr.app import ConfigRecord, Error, Message, MessageType, RecordDict
from flwr.common.constant import ErrorCode

# Flower's Message takes its sender from here; its own process sets it when a task starts.
from flwr.supercore.task_identity import TaskIdentity

from app import cause
from app.exchange import Exchange, Outcome
from app.payload import PayloadError
from app.rounds import Deadlines, Site, State
from certs.errors import DatasetError

# A deadline that is not to be met, a call that does not return: longer than any test here runs.
FOREVER_S = 60.0
# A bound that only a wait without one breaks.
SOON_S = 15.0
A, B, C, D = ALL = tuple(Site(f"site-{letter}", node) for node, letter in enumerate("abcd", 1))
type Answer = Callable[[Message, float], Message | None]


@pytest.fixture(autouse=True)
def identity(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


@pytest.fixture
def over() -> Iterator[threading.Event]:
    """What calls that hang wait for; set when the test is over at the latest."""
    event = threading.Event()
    yield event
    event.set()


@dataclass
class Node:
    node_id: int
    name: str = ""


@dataclass
class FakeGrid:
    """A Grid whose sites answer by script: ``answers[node](message, seconds since the start)``.

    ``again[node]`` answers the messages after the first.
    """

    answers: dict[int, Answer] = field(default_factory=dict)
    again: dict[int, Answer] = field(default_factory=dict)
    # Who is offline, by what happened so far.
    away: Callable[[FakeGrid], set[int]] = lambda _: set()
    nodes: tuple[int, ...] = (1, 2, 3, 4)
    refuse: frozenset[int] = frozenset()
    # Pulls by node, and looks at who is online by thread.
    pulls: Counter[int] = field(default_factory=Counter)
    looks: Counter[str] = field(default_factory=Counter)
    sent: dict[str, Message] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    def get_nodes(self) -> list[Node]:
        self.looks[threading.current_thread().name] += 1
        return [Node(node) for node in self.nodes if node not in self.away(self)]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids: list[str] = []
        for message in messages:
            if message.metadata.dst_node_id in self.refuse:
                ids.append(None)  # type: ignore[arg-type]
                continue
            ids.append(f"{message.metadata.dst_node_id}:{len(self.to(message))}")
            self.sent[ids[-1]] = message
        return ids

    def to(self, message: Message) -> list[Message]:
        """What was sent to the site of ``message``, in order."""
        node = message.metadata.dst_node_id
        return [sent for sent in self.sent.values() if sent.metadata.dst_node_id == node]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        (message_id,) = message_ids
        message = self.sent[message_id]
        node = message.metadata.dst_node_id
        now = time.monotonic() - self.started
        self.pulls[node] += 1
        first = message is self.to(message)[0]
        reply = (self.answers if first else self.again)[node](message, now)
        return [reply] if reply else []


def good(message: Message, _: float) -> Message:
    node = message.metadata.dst_node_id
    return Message(RecordDict({"reply": ConfigRecord({"node": node})}), reply_to=message)


def silent(_: Message, __: float) -> None:
    return None


def fails(code: int, reason: str) -> Answer:
    return lambda message, _: Message(Error(code, reason), reply_to=message)


def after(seconds: float) -> Answer:
    return lambda message, now: good(message, now) if now > seconds else None


def lost_once_asked(grid: FakeGrid) -> set[int]:
    """Site A goes offline as soon as its reply was looked for."""
    return {1} if grid.pulls[1] else set()


def once(event: threading.Event) -> Answer:
    """Answers as soon as ``event`` is set; until then there is no reply to pull."""
    return lambda message, now: good(message, now) if event.is_set() else None


def uploads_until(event: threading.Event) -> Answer:
    """Has a reply at once, whose pull lasts until ``event``."""

    def answer(message: Message, now: float) -> Message:
        event.wait(FOREVER_S)
        return good(message, now)

    return answer


def want(site: Site) -> Message:
    """What a site is sent in place of the first message."""
    return Message(RecordDict({"again": ConfigRecord({})}), site.node, MessageType.TRAIN)


@dataclass
class Asked:
    """An exchange with ``sites`` that ran to its end, and what it said."""

    grid: FakeGrid
    sites: tuple[Site, ...]
    deadlines: Deadlines
    quorum: int = 1
    enough: int | None = None
    fold: Callable[[Site, RecordDict], Message | None] = lambda *_: None
    # Called as each site ends.
    told: Callable[[Outcome], None] = lambda _: None
    revoked: Callable[[Collection[int]], set[int]] = lambda _: set()
    folded: list[str] = field(default_factory=list)
    ended: list[Outcome] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)
    seconds: float = 0.0
    threads: list[threading.Thread] = field(default_factory=list)

    def __post_init__(self) -> None:
        before = set(threading.enumerate())
        started = time.monotonic()
        self.exchange = Exchange(
            self.grid,
            self._fold,
            self._note,
            deadlines=self.deadlines,
            quorum=self.quorum,
            enough=self.enough,
            poll_s=0.02,
            held_s=0.2,
            revoked=self._lookup,
        )
        self.exchange.dispatch(
            {site: Message(RecordDict(), site.node, MessageType.TRAIN) for site in self.sites}
        )
        self.outcomes = self.exchange.collect()
        self.seconds = time.monotonic() - started
        self.threads = [thread for thread in threading.enumerate() if thread not in before]
        self.check()

    def _fold(self, site: Site, content: RecordDict) -> Message | None:
        assert content.config_records["reply"]["node"] == site.node
        message = self.fold(site, content)
        if message is None:
            self.folded.append(site.name)
        return message

    def _lookup(self, nodes: Collection[int]) -> set[int]:
        # It takes seconds where the SuperLink is slow: nobody may have to wait for it.
        assert not self.exchange._changed._is_owned()  # type: ignore[attr-defined]
        return self.revoked(nodes) & set(nodes)

    def _note(self, outcome: Outcome) -> None:
        self.ended.append(outcome)
        self.told(outcome)

    def check(self) -> None:
        """Whatever happens: everyone asked ends once, by name, is told of once, and in time."""
        assert [o.site.name for o in self.outcomes] == sorted(site.name for site in self.sites)
        assert sorted(self.ended, key=lambda outcome: outcome.site.name) == self.outcomes
        for outcome in self.outcomes:
            assert (outcome.reason is None) == (outcome.state is State.COMPLETED)
            assert outcome.sent or not outcome.resent
            assert (outcome.cause == "revoked") == (outcome.reason == "revoked")
            if outcome.state in (State.COMPLETED, State.LATE, State.TIMEOUT):
                assert outcome.cause is None
        assert sorted(self.folded) == self.names(State.COMPLETED)
        assert self.seconds < self.deadlines.hard + SOON_S

    def settle(self) -> None:
        """Let everything that was still under way come to its end; nothing may have changed."""
        for thread in self.threads:
            thread.join(SOON_S)
            assert not thread.is_alive()
        self.check()

    def names(self, state: State) -> list[str]:
        return [outcome.site.name for outcome in self.outcomes if outcome.state is state]

    def states(self) -> list[State]:
        """By site name."""
        return [outcome.state for outcome in self.outcomes]

    def of(self, site: Site) -> Outcome:
        (found,) = [outcome for outcome in self.outcomes if outcome.site == site]
        return found

    def reason(self, site: Site) -> str:
        reason = self.of(site).reason
        assert reason
        return reason


def ask(
    grid: FakeGrid,
    *sites: Site,
    hard: float = FOREVER_S,
    soft: float = 0.0,
    grace: float = FOREVER_S,
    quorum: int = 1,
    enough: int | None = None,
    fold: Callable[[Site, RecordDict], Message | None] = lambda *_: None,
    told: Callable[[Outcome], None] = lambda _: None,
    revoked: Callable[[Collection[int]], set[int]] = lambda _: set(),
) -> Asked:
    return Asked(grid, sites, Deadlines(hard, soft, grace), quorum, enough, fold, told, revoked)


# --- how a site ends ---------------------------------------------------------------------------


def test_everyone_answers() -> None:
    asked = ask(FakeGrid({1: good, 2: after(0.1)}), A, B)
    assert asked.states() == [State.COMPLETED, State.COMPLETED]
    assert asked.seconds < SOON_S
    assert not any(outcome.resent for outcome in asked.outcomes)
    asked.settle()


def test_each_end_has_its_state_and_reason() -> None:
    grid = FakeGrid({1: good, 2: fails(2, "no dataset\nat /data"), 3: silent})
    asked = ask(grid, A, B, C, hard=2.0)
    assert asked.states() == [State.COMPLETED, State.ERROR, State.TIMEOUT]
    assert asked.reason(B) == "no dataset at /data"
    assert asked.reason(C) == "no reply within 2 s"
    assert [outcome.cause for outcome in asked.outcomes] == [None, "unexpected", None]
    assert asked.exchange.left() == 0


def test_a_reply_that_cannot_be_used_is_invalid() -> None:
    def fold(site: Site, content: RecordDict) -> None:
        if site == A:
            raise PayloadError("checksum", "The bytes do not match.")
        content.config_records["absent"]

    asked = ask(FakeGrid({1: good, 2: good}), A, B, fold=fold)
    assert asked.states() == [State.INVALID, State.INVALID]
    assert asked.reason(A) == "The bytes do not match."
    assert "absent" in asked.reason(B)
    assert [outcome.cause for outcome in asked.outcomes] == ["checksum", "unexpected"]


def test_a_site_says_in_a_word_why_it_failed() -> None:
    """As its ClientApp puts it into the code of Flower's error; another release may know other words."""
    errors = (DatasetError("No file."), PayloadError("finite", "Diverged."))
    codes = dict(zip((1, 2, 3, 4), (*map(cause.code, errors), 2, 9999), strict=True))
    grid = FakeGrid({node: fails(code, "It failed.") for node, code in codes.items()})
    asked = ask(grid, *ALL)
    assert asked.states() == [State.ERROR] * 4
    causes = [outcome.cause for outcome in asked.outcomes]
    assert causes == ["dataset", "finite", "unexpected", "unexpected"]


def test_pulls_that_raise_are_tried_again() -> None:
    def flaky(message: Message, now: float) -> Message:
        if now < 0.2:
            raise ConnectionError("reset")
        return good(message, now)

    assert ask(FakeGrid({1: flaky}), A).states() == [State.COMPLETED]


def test_replies_are_folded_one_at_a_time() -> None:
    inside: list[str] = []

    def fold(site: Site, _: RecordDict) -> None:
        inside.append(site.name)
        time.sleep(0.05)
        assert inside == [site.name]
        inside.clear()

    asked = ask(FakeGrid(dict.fromkeys((1, 2, 3, 4), good)), *ALL, fold=fold)
    assert asked.states() == [State.COMPLETED] * 4


# --- sites that are offline --------------------------------------------------------------------


def test_who_is_not_online_is_not_sent_anything() -> None:
    grid = FakeGrid({1: good}, nodes=(1,))
    asked = ask(grid, A, B)
    assert asked.states() == [State.COMPLETED, State.OFFLINE]
    assert list(grid.sent) == ["1:0"]
    assert [outcome.sent for outcome in asked.outcomes] == [True, False]


def test_a_round_of_nobody_ends_at_once() -> None:
    assert ask(FakeGrid(nodes=()), A).states() == [State.OFFLINE]
    assert ask(FakeGrid()).outcomes == []


def test_nothing_is_pulled_for_a_site_that_is_offline() -> None:
    # Flower throws a reply away when it is pulled for at a moment when its site is offline.
    grid = FakeGrid({1: silent, 2: after(0.5)}, away=lost_once_asked)
    asked = ask(grid, A, B, hard=2.0)
    assert asked.states() == [State.OFFLINE, State.COMPLETED]
    assert asked.reason(A) == "went offline before it answered"
    assert grid.pulls[1] == 1


def test_a_site_that_comes_back_still_delivers() -> None:
    back = threading.Event()

    def away(grid: FakeGrid) -> set[int]:
        lost = lost_once_asked(grid)
        if lost and sum(grid.looks.values()) > 20:
            back.set()
        return set() if back.is_set() else lost

    assert ask(FakeGrid({1: once(back)}, away=away), A).states() == [State.COMPLETED]


def test_a_revoked_site_ends_at_once() -> None:
    """Nobody waits for the grace: it will not come back."""
    grid = FakeGrid({1: silent, 2: after(0.5)}, away=lost_once_asked)
    asked = ask(grid, A, B, revoked=lambda _: {1})
    assert asked.states() == [State.OFFLINE, State.COMPLETED]
    assert asked.reason(A) == "revoked"
    assert asked.of(A).sent
    assert asked.seconds < SOON_S
    asked.settle()


def test_a_site_that_is_revoked_while_it_is_away_ends_then() -> None:
    looks: Counter[int] = Counter()

    def revoked(nodes: Collection[int]) -> set[int]:
        looks.update(nodes)
        return {1} if looks[1] > 3 else set()

    asked = ask(FakeGrid({1: silent}, away=lost_once_asked), A, revoked=revoked)
    assert asked.reason(A) == "revoked"
    assert looks == {1: 4}


def test_a_site_that_was_revoked_before_it_was_asked_is_not_sent_anything() -> None:
    grid = FakeGrid({1: good}, nodes=(1,))
    asked = ask(grid, A, B, C, revoked=lambda _: {2})
    assert asked.states() == [State.COMPLETED, State.OFFLINE, State.OFFLINE]
    assert (asked.reason(B), asked.reason(C)) == ("revoked", "not online when it was asked")
    assert list(grid.sent) == ["1:0"]


def test_only_who_is_missing_is_looked_up() -> None:
    """A working round asks the registry nothing; one look asks for all that are missing."""
    looked: list[set[int]] = []

    def revoked(nodes: Collection[int]) -> set[int]:
        looked.append(set(nodes))
        return set()

    asked = ask(FakeGrid({1: after(0.2), 2: good}, nodes=(1, 2)), *ALL, revoked=revoked)
    assert asked.states() == [State.COMPLETED] * 2 + [State.OFFLINE] * 2
    assert [nodes for nodes in looked if nodes] == [{3, 4}]


@pytest.mark.parametrize("moment", ["sent", "pulled", "sent again"])
def test_a_site_may_be_revoked_at_any_moment(moment: str) -> None:
    """Between two looks at who is online Flower's own errors come first; the reason is the same."""
    fold: Callable[[Site, RecordDict], Message | None] = lambda *_: None  # noqa: E731
    grid = FakeGrid({1: good})
    if moment == "sent":
        grid.refuse = frozenset({1})
    elif moment == "pulled":
        grid.answers[1] = fails(ErrorCode.NODE_UNAVAILABLE, "Node Unavailable")
    else:

        def fold(site: Site, _: RecordDict) -> Message:
            grid.refuse = frozenset({1})
            return want(site)

    asked = ask(grid, A, fold=fold, revoked=lambda _: {1})
    assert asked.states() == [State.OFFLINE]
    assert asked.reason(A) == "revoked"


def test_a_slow_registry_keeps_nobody_waiting(over: threading.Event) -> None:
    def revoked(nodes: Collection[int]) -> set[int]:
        if nodes:
            over.wait(FOREVER_S)
        return set()

    grid = FakeGrid({1: silent, 2: after(0.3)}, away=lost_once_asked)
    asked = ask(grid, A, B, hard=1.0, revoked=revoked)
    assert asked.states()[1] is State.COMPLETED
    assert asked.of(B).seconds < 1.0


@pytest.mark.parametrize("grace", [0.3, 0.0])
def test_a_site_that_stays_away_longer_than_the_grace_is_not_waited_for(grace: float) -> None:
    grid = FakeGrid({1: silent, 2: after(1.0)}, away=lost_once_asked)
    asked = ask(grid, A, B, grace=grace)
    assert asked.states() == [State.OFFLINE, State.COMPLETED]
    assert asked.reason(A) == f"went offline and did not return within {grace:g} s"
    assert asked.of(A).seconds >= grace
    assert asked.seconds < SOON_S


def test_flowers_answer_for_a_lost_node_counts_as_offline() -> None:
    asked = ask(FakeGrid({1: fails(5, "Node Unavailable")}), A)
    assert asked.states() == [State.OFFLINE]
    assert asked.reason(A) == "Node Unavailable"


def test_a_reply_whose_site_ended_as_offline_meanwhile_is_not_folded(
    over: threading.Event,
) -> None:
    # Its worker is in the middle of the pull when the site's time is up.
    grid = FakeGrid({1: uploads_until(over), 2: once(over)}, away=lost_once_asked)
    asked = ask(grid, A, B, grace=0.1, told=lambda _: over.set())
    assert asked.states() == [State.OFFLINE, State.COMPLETED]
    assert asked.folded == ["site-b"]
    asked.settle()


# --- the first replies close the round ---------------------------------------------------------


def test_the_first_replies_close_the_round() -> None:
    grid = FakeGrid({1: silent, 2: good, 3: fails(2, "no"), 4: after(0.1)})
    asked = ask(grid, *ALL, enough=2)
    assert asked.states() == [State.LATE, State.COMPLETED, State.ERROR, State.COMPLETED]
    assert asked.reason(A) == "the round closed with the first 2 replies"
    assert asked.seconds < SOON_S
    asked.settle()


def test_no_more_than_enough_are_folded_when_they_come_at_once() -> None:
    # Both workers hold a reply before either can be folded.
    both = threading.Barrier(2)

    def together(message: Message, now: float) -> Message:
        both.wait(SOON_S)
        return good(message, now)

    asked = ask(FakeGrid({1: together, 2: together}), A, B, enough=1)
    assert sorted(asked.states()) == [State.COMPLETED, State.LATE]
    asked.settle()
    assert len(asked.folded) == 1


def test_who_was_lost_when_enough_answered_is_offline_and_not_late() -> None:
    noticed = threading.Event()
    since: list[int] = []

    def away(grid: FakeGrid) -> set[int]:
        if not lost_once_asked(grid):
            return set()
        looks = sum(n for thread, n in grid.looks.items() if "_watch" in thread)
        since.append(looks)
        # The one that watches has come back for more twice: it has taken note.
        if looks > since[0] + 2:
            noticed.set()
        return {1}

    asked = ask(FakeGrid({1: silent, 2: once(noticed), 3: silent}, away=away), A, B, C, enough=1)
    assert asked.states() == [State.OFFLINE, State.COMPLETED, State.LATE]


def test_too_few_replies_wait_for_the_deadline_and_nobody_is_late() -> None:
    asked = ask(FakeGrid({1: good, 2: silent, 3: silent}), A, B, C, enough=2, hard=2.0)
    assert asked.states() == [State.COMPLETED, State.TIMEOUT, State.TIMEOUT]
    assert asked.seconds >= 2.0
    # Everyone ended: nothing is left to wait for.
    asked = ask(FakeGrid({1: good, 2: fails(2, "no")}), A, B, enough=2)
    assert asked.states() == [State.COMPLETED, State.ERROR]
    assert asked.seconds < SOON_S


# --- the soft deadline -------------------------------------------------------------------------


def test_the_soft_deadline_closes_a_round_that_has_its_quorum() -> None:
    failed = threading.Event()
    grid = FakeGrid({1: once(failed), 2: silent, 3: fails(2, "no")})
    asked = ask(grid, A, B, C, soft=1.0, told=lambda _: failed.set())
    assert asked.states() == [State.COMPLETED, State.LATE, State.ERROR]
    assert asked.reason(B) == "the round closed with 1 of 3 replies after its soft deadline of 1 s"
    assert 1.0 <= asked.seconds < SOON_S


def test_a_round_that_is_whole_does_not_wait_for_its_soft_deadline() -> None:
    asked = ask(FakeGrid({1: good, 2: good}), A, B, soft=FOREVER_S)
    assert asked.states() == [State.COMPLETED] * 2
    assert asked.seconds < SOON_S


def test_a_quorum_after_the_soft_deadline_closes_the_round_at_that_moment() -> None:
    asked = ask(FakeGrid({1: good, 2: after(1.0), 3: silent}), A, B, C, soft=0.2, quorum=2)
    assert asked.states() == [State.COMPLETED, State.COMPLETED, State.LATE]
    assert "with 2 of 3 replies after its soft deadline" in asked.reason(C)
    assert asked.seconds < SOON_S


def test_without_a_quorum_the_round_ends_at_the_hard_deadline() -> None:
    asked = ask(FakeGrid({1: good, 2: silent}), A, B, soft=0.1, quorum=2, hard=2.0)
    assert asked.states() == [State.COMPLETED, State.TIMEOUT]
    assert asked.seconds >= 2.0
    # No update is no quorum, whatever is asked for.
    asked = ask(FakeGrid({1: silent}), A, soft=0.1, quorum=1, hard=0.5)
    assert asked.states() == [State.TIMEOUT]


def test_a_soft_deadline_at_the_hard_one_changes_nothing() -> None:
    asked = ask(FakeGrid({1: good, 2: silent}), A, B, soft=2.0, hard=2.0)
    assert asked.states() == [State.COMPLETED, State.TIMEOUT]


def test_who_is_offline_at_the_soft_deadline_is_not_late() -> None:
    grid = FakeGrid({1: silent, 2: good}, away=lost_once_asked)
    asked = ask(grid, A, B, soft=2.0)
    assert asked.states() == [State.OFFLINE, State.COMPLETED]
    assert asked.reason(A) == "went offline before it answered"


# --- what comes while the round closes ---------------------------------------------------------


@pytest.mark.parametrize("closes", ["hard", "soft", "enough"])
def test_a_reply_that_comes_while_the_round_closes_is_not_folded(
    closes: str, over: threading.Event
) -> None:
    bounds = {"hard": {"hard": 2.0}, "soft": {"soft": 0.5}, "enough": {"enough": 1}}[closes]
    grid = FakeGrid({1: uploads_until(over), 2: after(0.2)})
    asked = ask(grid, A, B, **bounds)  # type: ignore[arg-type]
    state = State.TIMEOUT if closes == "hard" else State.LATE
    assert asked.states() == [state, State.COMPLETED]
    over.set()
    asked.settle()
    assert asked.folded == ["site-b"]


def test_a_fold_under_way_at_the_deadline_counts_and_the_next_one_does_not() -> None:
    both = threading.Barrier(2)

    def together(message: Message, now: float) -> Message:
        both.wait(SOON_S)
        return good(message, now)

    def fold(*_: object) -> None:
        time.sleep(2.5)

    asked = ask(FakeGrid({1: together, 2: together}), A, B, fold=fold, hard=2.0)
    assert sorted(asked.states()) == [State.COMPLETED, State.TIMEOUT]
    asked.settle()
    assert len(asked.folded) == 1


# --- a message in place of the first -----------------------------------------------------------


class Again:
    """A fold that asks for another message for ``sites``, ``times`` times each."""

    def __init__(self, *sites: Site, times: int = 1) -> None:
        self.left = dict.fromkeys(sites, times)

    def __call__(self, site: Site, _: RecordDict) -> Message | None:
        if not self.left.get(site):
            return None
        self.left[site] -= 1
        return want(site)


def test_a_site_that_needs_another_message_gets_it_once_and_completes() -> None:
    other = threading.Event()
    grid = FakeGrid({1: good, 2: good}, again={1: once(other)})
    asked = ask(grid, A, B, fold=Again(A), told=lambda _: other.set())
    assert asked.states() == [State.COMPLETED] * 2
    assert asked.folded == ["site-b", "site-a"]
    assert [(o.sent, o.resent) for o in asked.outcomes] == [(True, True), (True, False)]
    assert list(grid.sent) == ["1:0", "2:0", "1:1"]
    assert "again" in grid.sent["1:1"].content
    asked.settle()


def test_all_sites_may_need_another_message() -> None:
    everyone: dict[int, Answer] = dict.fromkeys((1, 2, 3, 4), good)
    asked = ask(FakeGrid(everyone, again=everyone), *ALL, fold=Again(*ALL))
    assert asked.states() == [State.COMPLETED] * 4
    assert all(outcome.resent for outcome in asked.outcomes)


def test_a_site_that_asks_twice_is_invalid() -> None:
    grid = FakeGrid({1: good}, again={1: good})
    asked = ask(grid, A, fold=Again(A, times=2))
    assert asked.states() == [State.INVALID]
    assert asked.reason(A) == "asked for the model twice"
    assert len(grid.sent) == 2


@pytest.mark.parametrize(
    ("answer", "state", "reason"),
    [
        (silent, State.TIMEOUT, "no reply within 2 s"),
        (fails(2, "out of memory"), State.ERROR, "out of memory"),
        (fails(5, "Node Unavailable"), State.OFFLINE, "Node Unavailable"),
    ],
)
def test_the_second_message_may_end_as_the_first(answer: Answer, state: State, reason: str) -> None:
    asked = ask(FakeGrid({1: good}, again={1: answer}), A, fold=Again(A), hard=2.0)
    assert asked.states() == [state]
    assert asked.reason(A) == reason
    assert asked.of(A).resent


def test_a_site_that_never_answers_the_second_message_is_late_at_the_soft_deadline() -> None:
    grid = FakeGrid({1: good, 2: good}, again={1: silent})
    asked = ask(grid, A, B, fold=Again(A), soft=1.0)
    assert asked.states() == [State.LATE, State.COMPLETED]
    assert asked.of(A).resent


def test_a_site_lost_after_the_second_message_is_waited_for_as_long_as_the_grace() -> None:
    def away(grid: FakeGrid) -> set[int]:
        return {1} if "1:1" in grid.sent else set()

    grid = FakeGrid({1: good}, again={1: good}, away=away)
    asked = ask(grid, A, fold=Again(A), grace=0.3)
    assert asked.states() == [State.OFFLINE]
    assert asked.reason(A) == "went offline and did not return within 0.3 s"
    assert asked.of(A).resent


class SlowToSend(FakeGrid):
    """Its second push, and each later one, lasts until ``until``; ``pushing`` says it has begun."""

    def __init__(self, until: threading.Event, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self.until, self.pushing = until, threading.Event()

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        if self.sent:
            self.pushing.set()
            self.until.wait(FOREVER_S)
        return super().push_messages(messages)


def test_a_second_message_that_is_slow_to_send_holds_nobody_up(over: threading.Event) -> None:
    answers: dict[int, Answer] = {1: good, 2: good, 3: good}
    grid = SlowToSend(over, answers, again=dict(answers))
    # It has something to say when the others are at it, and they go on when it has ended.
    grid.answers[4] = once(grid.pushing)
    asked = ask(grid, *ALL, fold=Again(A, B, C), told=lambda _: over.set())
    assert asked.states() == [State.COMPLETED] * 4
    assert asked.folded[0] == "site-d"


@pytest.mark.parametrize("closes", ["hard", "soft", "enough"])
def test_a_second_message_under_way_when_the_round_closes_changes_nothing(
    closes: str, over: threading.Event
) -> None:
    bounds = {"hard": {"hard": 2.0}, "soft": {"soft": 0.5}, "enough": {"enough": 1}}[closes]
    grid = SlowToSend(over, {1: good}, again={1: good})
    grid.answers[2] = once(grid.pushing)
    asked = ask(grid, A, B, fold=Again(A), **bounds)  # type: ignore[arg-type]
    state = State.TIMEOUT if closes == "hard" else State.LATE
    assert asked.states() == [state, State.COMPLETED]
    # Whether it left is not known when the site ends.
    assert not asked.of(A).resent
    over.set()
    asked.settle()
    assert asked.folded == ["site-b"]


def test_a_site_lost_while_its_second_message_is_sent_ends_once(over: threading.Event) -> None:
    def away(_: FakeGrid) -> set[int]:
        return {1} if grid.pushing.is_set() else set()

    grid = SlowToSend(over, {1: good, 2: silent}, again={1: good}, away=away)
    grid.answers[2] = once(over)
    asked = ask(grid, A, B, fold=Again(A), grace=0.1, told=lambda _: over.set())
    assert asked.states() == [State.OFFLINE, State.COMPLETED]
    asked.settle()
    assert asked.folded == ["site-b"]


def test_a_second_message_that_cannot_be_sent_is_an_error() -> None:
    class Refuses(FakeGrid):
        def push_messages(self, messages: Iterable[Message]) -> list[str]:
            if self.sent:
                raise ConnectionError("503 Service\nUnavailable")
            return super().push_messages(messages)

    class Drops(FakeGrid):
        def push_messages(self, messages: Iterable[Message]) -> list[str]:
            return [] if self.sent else super().push_messages(messages)

    for grid, reason in (
        (Refuses({1: good, 2: good}), "not sent again: 503 Service Unavailable"),
        (Drops({1: good, 2: good}), "the SuperLink did not accept the message"),
    ):
        asked = ask(grid, A, B, fold=Again(A))
        assert asked.states() == [State.ERROR, State.COMPLETED]
        assert asked.reason(A) == reason
        assert not asked.of(A).resent


# --- no call waits without a bound -------------------------------------------------------------


def test_hanging_pulls_do_not_hold_up_the_others(over: threading.Event) -> None:
    stuck = uploads_until(over)
    grid = FakeGrid({1: stuck, 2: stuck, 3: stuck, 4: after(0.1)})
    asked = ask(grid, *ALL, hard=5.0, soft=0.1)
    assert asked.states() == [State.LATE] * 3 + [State.COMPLETED]
    assert asked.seconds < 5.0 + SOON_S


class Hangs(FakeGrid):
    """``calls`` never return from the n-th on."""

    def __init__(self, until: threading.Event, **calls: int) -> None:
        super().__init__({1: good, 2: silent, 3: silent, 4: silent})
        self.until, self.left = until, calls

    def wait(self, call: str) -> None:
        if call in self.left:
            self.left[call] -= 1
            if self.left[call] < 1:
                self.until.wait(FOREVER_S)

    def get_nodes(self) -> list[Node]:
        self.wait("get_nodes")
        return super().get_nodes()

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        self.wait("push_messages")
        return super().push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        self.wait("pull_messages")
        return super().pull_messages(message_ids)


@pytest.mark.parametrize(
    ("calls", "hard", "reason"),
    [
        ({"get_nodes": 1}, 0.5, "not sent: the SuperLink did not answer within 0.5 s"),
        ({"push_messages": 1}, 0.5, "not sent: the SuperLink did not answer within 0.5 s"),
        # The first look is before the messages are sent.
        ({"get_nodes": 2}, 2.0, "no reply within 2 s"),
        ({"get_nodes": 5}, 2.0, "no reply within 2 s"),
        ({"pull_messages": 1}, 2.0, "no reply within 2 s"),
        ({"get_nodes": 4, "pull_messages": 2}, 2.0, "no reply within 2 s"),
    ],
)
def test_a_superlink_that_hangs_cannot_hold_the_round(
    calls: dict[str, int], hard: float, reason: str, over: threading.Event
) -> None:
    asked = ask(Hangs(over, **calls), *ALL, hard=hard, soft=0.1, quorum=2, enough=3, grace=0.0)
    assert {asked.reason(site) for site in (B, C, D)} == {reason}
    assert set(asked.states()[1:]) == {State.TIMEOUT}
    assert hard <= asked.seconds < SOON_S
    # What hangs is left behind, but not piled up: a worker a site, one that waits, one that watches.
    assert len(asked.threads) <= len(ALL) + 2 + 1
    over.set()
    asked.settle()


def test_a_superlink_that_refuses_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ask(FakeGrid({1: good}, refuse=frozenset({2})), A, B)
    assert asked.states() == [State.COMPLETED, State.ERROR]

    def refuse(_: object) -> None:
        raise ConnectionError("503 Service Unavailable")

    grid = FakeGrid({1: good})
    monkeypatch.setattr(grid, "push_messages", refuse)
    assert ask(grid, A).reason(A) == "not sent: 503 Service Unavailable"
    monkeypatch.setattr(grid, "push_messages", lambda _: [])
    assert ask(grid, A).states() == [State.ERROR]
