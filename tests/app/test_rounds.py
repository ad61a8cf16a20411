"""Every site that is asked ends in exactly one state, with a reason, in time."""

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import pytest
from flwr.app import ConfigRecord, Error, Message, MessageType, RecordDict

# Flower's Message takes its sender from here; its own process sets it when a task starts.
from flwr.supercore.task_identity import TaskIdentity

from app import rounds
from app.payload import PayloadError
from app.rounds import Exchange, Outcome, Phase, Round, Site, State, one_line, wait_for_sites
from certs.errors import RunFailedError

FOREVER_S = 60.0
A, B, C, D = (Site(f"site-{letter}", node) for node, letter in enumerate("abcd", start=1))


@pytest.fixture(autouse=True)
def identity(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


@dataclass
class Node:
    node_id: int
    name: str = ""


@dataclass
class FakeGrid:
    """A Grid whose sites answer by script: ``answers[node](message, seconds since dispatch)``."""

    answers: dict[int, Callable[[Message, float], Message | None]] = field(default_factory=dict)
    away: Callable[[float], set[int]] = lambda _: set()
    nodes: tuple[int, ...] = (1, 2, 3, 4)
    refuse: frozenset[int] = frozenset()
    pulled_at: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    sent: dict[str, Message] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    def get_nodes(self) -> list[Node]:
        gone = self.away(time.monotonic() - self.started)
        return [Node(node) for node in self.nodes if node not in gone]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids: list[str] = []
        for message in messages:
            node = message.metadata.dst_node_id
            if node in self.refuse:
                ids.append(None)  # type: ignore[arg-type]
                continue
            ids.append(f"message-to-{node}")
            self.sent[ids[-1]] = message
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        (message_id,) = message_ids
        message = self.sent[message_id]
        node = message.metadata.dst_node_id
        now = time.monotonic() - self.started
        self.pulled_at[node].append(now)
        reply = self.answers[node](message, now)
        return iter([reply] if reply else [])


def good(message: Message, _: float) -> Message:
    node = message.metadata.dst_node_id
    return Message(RecordDict({"reply": ConfigRecord({"node": node})}), reply_to=message)


def silent(_: Message, __: float) -> None:
    return None


def fails(code: int, reason: str) -> Callable[[Message, float], Message]:
    return lambda message, _: Message(Error(code, reason), reply_to=message)


def after(seconds: float) -> Callable[[Message, float], Message | None]:
    return lambda message, now: good(message, now) if now > seconds else None


def stuck(_: Message, __: float) -> None:
    time.sleep(FOREVER_S)


@dataclass
class Result:
    outcomes: list[Outcome]
    folded: list[str]
    ended: list[Outcome]
    seconds: float

    def states(self) -> dict[str, State]:
        return {outcome.site.name: outcome.state for outcome in self.outcomes}

    def reason(self, site: Site) -> str:
        (found,) = [outcome.reason for outcome in self.outcomes if outcome.site == site]
        assert found
        return found


def run(
    grid: FakeGrid,
    *sites: Site,
    seconds: float = 5.0,
    offline_s: float = FOREVER_S,
    fold: Callable[[Site, RecordDict], None] | None = None,
) -> Result:
    folded: list[str] = []
    ended: list[Outcome] = []

    def note(site: Site, content: RecordDict) -> None:
        assert content.config_records["reply"]["node"] == site.node
        if fold:
            fold(site, content)
        folded.append(site.name)

    exchange = Exchange(
        grid,
        note,
        ended.append,
        seconds=seconds,
        poll_s=0.02,
        offline_s=offline_s,
        held_s=0.2,
    )
    started = time.monotonic()
    exchange.dispatch({site: Message(RecordDict(), site.node, MessageType.TRAIN) for site in sites})
    outcomes = exchange.collect()
    result = Result(outcomes, folded, ended, time.monotonic() - started)
    # Whatever happens: everyone asked ends once, by name, and is told of once.
    assert [outcome.site.name for outcome in outcomes] == sorted(site.name for site in sites)
    assert sorted(ended, key=lambda outcome: outcome.site.name) == outcomes
    for outcome in outcomes:
        assert (outcome.reason is None) == (outcome.state is State.COMPLETED)
    assert sorted(folded) == [o.site.name for o in outcomes if o.state is State.COMPLETED]
    return result


def test_everyone_answers() -> None:
    result = run(FakeGrid({1: good, 2: after(0.1)}), A, B)
    assert result.states() == {"site-a": State.COMPLETED, "site-b": State.COMPLETED}
    assert result.seconds < 2


def test_each_end_has_its_state_and_reason() -> None:
    grid = FakeGrid({1: good, 2: fails(2, "no dataset\nat /data"), 3: silent})
    result = run(grid, A, B, C, seconds=0.5)
    assert result.states() == {
        "site-a": State.COMPLETED,
        "site-b": State.ERROR,
        "site-c": State.TIMEOUT,
    }
    assert result.reason(B) == "no dataset at /data"
    assert result.reason(C) == "no reply within 0.5 s"


def test_a_reply_that_cannot_be_used_is_invalid() -> None:
    def fold(site: Site, content: RecordDict) -> None:
        if site == A:
            raise PayloadError("checksum", "The bytes do not match.")
        content.config_records["absent"]

    result = run(FakeGrid({1: good, 2: good}), A, B, fold=fold)
    assert result.states() == {"site-a": State.INVALID, "site-b": State.INVALID}
    assert result.reason(A) == "The bytes do not match."
    assert "absent" in result.reason(B)


def test_the_deadline_holds_while_a_pull_hangs() -> None:
    result = run(FakeGrid({1: stuck, 2: good}), A, B, seconds=0.6)
    assert result.states() == {"site-a": State.TIMEOUT, "site-b": State.COMPLETED}
    assert 0.5 < result.seconds < 2


def test_hanging_pulls_do_not_hold_up_the_others() -> None:
    result = run(FakeGrid({1: stuck, 2: stuck, 3: stuck, 4: after(0.1)}), A, B, C, D, seconds=3)
    assert result.states()["site-d"] is State.COMPLETED
    assert list(result.states().values())[:3] == [State.TIMEOUT] * 3


def test_what_arrives_after_the_deadline_is_not_folded() -> None:
    release = threading.Event()

    def late(message: Message, now: float) -> Message:
        release.wait(5)
        return good(message, now)

    result = run(FakeGrid({1: late}), A, seconds=0.3)
    release.set()
    time.sleep(0.2)
    assert result.folded == []
    assert result.states() == {"site-a": State.TIMEOUT}


def test_who_is_not_online_is_not_sent_anything() -> None:
    grid = FakeGrid({1: good}, nodes=(1,))
    result = run(grid, A, B)
    assert result.states() == {"site-a": State.COMPLETED, "site-b": State.OFFLINE}
    assert result.seconds < 2
    assert list(grid.sent) == ["message-to-1"]
    assert [outcome.sent for outcome in result.outcomes] == [True, False]


def test_nothing_is_pulled_for_a_site_that_is_offline() -> None:
    # Flower throws a reply away when it is pulled for at a moment when its site is offline.
    grid = FakeGrid({1: silent, 2: after(0.5)}, away=lambda now: {1} if now > 0.2 else set())
    result = run(grid, A, B, seconds=1.0)
    assert result.states() == {"site-a": State.OFFLINE, "site-b": State.COMPLETED}
    assert result.reason(A) == "went offline before it answered"
    assert max(grid.pulled_at[1]) < 0.25


def test_a_site_that_comes_back_still_delivers() -> None:
    grid = FakeGrid({1: after(0.5)}, away=lambda now: {1} if 0.1 < now < 0.4 else set())
    assert run(grid, A, offline_s=1).states() == {"site-a": State.COMPLETED}


def test_a_site_that_stays_away_ends_before_the_deadline() -> None:
    grid = FakeGrid({1: silent, 2: good}, away=lambda now: {1} if now > 0.1 else set())
    result = run(grid, A, B, seconds=30, offline_s=0.3)
    assert result.states() == {"site-a": State.OFFLINE, "site-b": State.COMPLETED}
    assert result.seconds < 5


def test_flowers_answer_for_a_lost_node_counts_as_offline() -> None:
    result = run(FakeGrid({1: fails(5, "Node Unavailable")}), A)
    assert result.states() == {"site-a": State.OFFLINE}
    assert result.reason(A) == "Node Unavailable"


def test_pulls_that_raise_are_tried_again() -> None:
    def flaky(message: Message, now: float) -> Message:
        if now < 0.2:
            raise ConnectionError("reset")
        return good(message, now)

    assert run(FakeGrid({1: flaky}), A).states() == {"site-a": State.COMPLETED}


def test_replies_are_folded_one_at_a_time() -> None:
    inside: list[str] = []

    def fold(site: Site, _: RecordDict) -> None:
        inside.append(site.name)
        time.sleep(0.05)
        assert inside == [site.name]
        inside.clear()

    result = run(FakeGrid({1: good, 2: good, 3: good, 4: good}), A, B, C, D, fold=fold)
    assert set(result.states().values()) == {State.COMPLETED}


def test_a_superlink_that_hangs_cannot_hold_the_round(monkeypatch: pytest.MonkeyPatch) -> None:
    for call in ("get_nodes", "push_messages"):
        grid = FakeGrid({1: good})
        monkeypatch.setattr(grid, call, lambda *_: time.sleep(FOREVER_S))
        result = run(grid, A, seconds=0.3)
        assert result.states() == {"site-a": State.TIMEOUT}
        assert "did not answer within 0.3 s" in result.reason(A)
        assert result.seconds < 2


def test_a_superlink_that_refuses_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(FakeGrid({1: good}, refuse=frozenset({2})), A, B)
    assert result.states() == {"site-a": State.COMPLETED, "site-b": State.ERROR}

    def refuse(_: object) -> None:
        raise ConnectionError("503 Service Unavailable")

    grid = FakeGrid({1: good})
    monkeypatch.setattr(grid, "push_messages", refuse)
    assert run(grid, A).reason(A) == "not sent: 503 Service Unavailable"
    monkeypatch.setattr(grid, "push_messages", lambda _: [])
    assert run(grid, A).states() == {"site-a": State.ERROR}


def test_the_run_starts_when_enough_sites_are_online() -> None:
    grid = FakeGrid(nodes=(2, 1, 3), away=lambda now: {3} if now < 0.2 else set())
    nodes = wait_for_sites(grid, 3, 5, poll_s=0.02)
    assert [node.node_id for node in nodes] == [1, 2, 3]


def test_waiting_for_sites_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RunFailedError, match=r"1 of the 2 sites .* within 0.2 s"):
        wait_for_sites(FakeGrid(nodes=(1,)), 2, 0.2, poll_s=0.02)
    grid = FakeGrid()
    monkeypatch.setattr(grid, "get_nodes", lambda: time.sleep(FOREVER_S))
    with pytest.raises(RunFailedError, match="0 of the 2 sites"):
        wait_for_sites(grid, 2, 0.2)


def test_a_round_only_makes_the_moves_it_may() -> None:
    state = Round(1)
    with pytest.raises(RuntimeError, match="round 1 cannot go from None to collect"):
        state.enter(Phase.COLLECT)
    for phase in (Phase.DISPATCH, Phase.COLLECT, Phase.COMMIT, Phase.EVALUATE, Phase.DONE):
        state.enter(phase)
    assert list(state.seconds) == ["dispatch", "collect", "commit", "evaluate"]
    with pytest.raises(RuntimeError, match="from done to dispatch"):
        state.enter(Phase.DISPATCH)


def test_a_failed_round_is_not_evaluated() -> None:
    state = Round(2)
    for phase in (Phase.DISPATCH, Phase.COLLECT, Phase.FAIL):
        state.enter(phase)
    with pytest.raises(RuntimeError, match="from fail to evaluate"):
        state.enter(Phase.EVALUATE)
    state.enter(Phase.DONE)


def test_texts_from_sites_become_one_printable_line() -> None:
    assert one_line("a\n\tb\x1b[31m c ") == "a b [31m c"
    assert len(one_line("x" * 1000)) == rounds.TEXT
