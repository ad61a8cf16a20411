"""A round's phases, the draw of its sites, and waits for the SuperLink that end."""

import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import pytest
from flwr.app import Message

from app import rounds
from app.rounds import Phase, Round, Site, bounded, one_line, select, wait_for_sites
from certs.errors import RunFailedError

# Longer than any test runs; what waits this long is let go at the end of the test.
FOREVER_S = 60.0
# A bound that only a wait without one breaks.
SOON_S = 10.0

PATHS = (
    "select dispatch collect commit evaluate done",
    "select dispatch collect degrade evaluate done",
    "select dispatch collect fail done",
    # Nobody is online to be drawn.
    "select fail done",
    # Round 0, and a round whose checkpoint outlived a crash of the run.
    "commit evaluate done",
    "evaluate done",
)


@dataclass
class Node:
    node_id: int
    name: str = ""


@dataclass
class Nodes:
    """A Grid that knows who is online; ``late`` nodes are from the third look on."""

    nodes: list[Node]
    late: list[Node] = field(default_factory=list)
    looks: int = 0

    def get_nodes(self) -> list[Node]:
        self.looks += 1
        return self.nodes + (self.late if self.looks > 2 else [])

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        raise AssertionError(f"nothing is sent here: {messages}")

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        raise AssertionError(f"nothing is pulled here: {message_ids}")


class Hangs(Nodes):
    def __init__(self, until: threading.Event) -> None:
        super().__init__([])
        self.until = until

    def get_nodes(self) -> list[Node]:
        self.until.wait(FOREVER_S)
        return [Node(1)]


class Refuses(Nodes):
    def __init__(self, nodes: list[Node], refusals: int = 1_000) -> None:
        super().__init__(nodes)
        self.refusals = refusals

    def get_nodes(self) -> list[Node]:
        self.refusals -= 1
        if self.refusals >= 0:
            raise ConnectionError("503 Service\nUnavailable")
        return self.nodes


@pytest.fixture
def over() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


@pytest.mark.parametrize("path", PATHS)
def test_a_round_keeps_the_seconds_of_each_phase(path: str) -> None:
    state = Round(1)
    phases = [Phase(name) for name in path.split()]
    for phase in phases:
        state.enter(phase)
    assert list(state.seconds) == path.split()[:-1]
    assert all(seconds >= 0 for seconds in state.seconds.values())


def test_a_round_makes_no_other_moves() -> None:
    allowed = {
        move for path in PATHS for move in zip([None, *path.split()], path.split(), strict=False)
    }
    for before in (None, *Phase):
        for after in Phase:
            state = Round(3, phase=before)
            if (before, after) in allowed:
                state.enter(after)
                continue
            with pytest.raises(RuntimeError, match=f"round 3 cannot go from {before} to {after}"):
                state.enter(after)
            assert state.phase is before


def draw(sites: list[Site], away: set[int] | None = None, **changed: float) -> list[str]:
    asked = {"count": 3, "over_sampling": 1.0, "seed": 7, "number": 1, **changed}
    here = {site.node for site in sites} - (away or set())
    return [site.name for site in select(sites, here, **asked)]  # type: ignore[arg-type]


TEN = [Site(f"site-{letter}", node) for node, letter in enumerate("jihgfedcba", start=1)]


def test_every_site_is_asked_where_no_count_is_set() -> None:
    assert draw(TEN, count=0) == sorted(site.name for site in TEN)
    # One that is offline too: the round's record then says so.
    assert draw(TEN, away={1, 2}, count=0) == sorted(site.name for site in TEN)


def test_a_draw_repeats_and_does_not_depend_on_the_order_of_the_sites() -> None:
    drawn = draw(TEN)
    assert len(drawn) == 3
    assert drawn == sorted(drawn)
    assert draw(TEN[::-1]) == draw(TEN[5:] + TEN[:5]) == drawn
    # A site's node may be another one after it is set up anew.
    assert draw([Site(site.name, site.node + 100) for site in TEN]) == drawn


def test_a_draw_follows_the_seed_and_the_round() -> None:
    assert len({tuple(draw(TEN, number=number)) for number in range(1, 11)}) > 5
    assert len({tuple(draw(TEN, seed=seed)) for seed in range(10)}) > 5


def test_each_site_gets_its_turn() -> None:
    turns = Counter(name for number in range(1000) for name in draw(TEN, number=number))
    # 300 expected of each; the standard deviation of a fair draw is 14.5.
    assert len(turns) == 10
    assert all(240 < times < 360 for times in turns.values())


def test_only_sites_online_are_drawn_and_an_absence_changes_one_place() -> None:
    nodes = {site.name: site.node for site in TEN}
    for number in range(20):
        drawn = draw(TEN, number=number)
        without = draw(TEN, away={nodes[drawn[0]]}, number=number)
        assert set(drawn[1:]) < set(without)
        assert drawn[0] not in without
        assert len(without) == 3
    assert draw(TEN, away=set(range(1, 9))) == ["site-a", "site-b"]
    assert draw(TEN, away=set(range(1, 11))) == []


def test_over_sampling_asks_more_rounded_up() -> None:
    assert len(draw(TEN, over_sampling=1.5)) == 5
    assert len(draw(TEN, over_sampling=10)) == 10
    # As floats, 50 * 1.1 is a little more than 55.
    hundred = [Site(f"site-{n:03d}", n) for n in range(100)]
    assert len(draw(hundred, count=10, over_sampling=1.1)) == 11
    assert len(draw(hundred, count=50, over_sampling=1.1)) == 55
    # Whoever is asked without over-sampling is asked with it.
    assert set(draw(TEN)) < set(draw(TEN, over_sampling=1.5))


def test_the_run_starts_when_enough_sites_are_online() -> None:
    grid = Nodes([Node(2), Node(1)], late=[Node(3)])
    nodes = wait_for_sites(grid, 3, SOON_S, poll_s=0.02)
    assert [node.node_id for node in nodes] == [1, 2, 3]


def test_waiting_for_sites_ends(over: threading.Event) -> None:
    with pytest.raises(RunFailedError, match=r"1 of the 2 sites .* within 0.2 s"):
        wait_for_sites(Nodes([Node(1)]), 2, 0.2, poll_s=0.02)
    with pytest.raises(RunFailedError, match="0 of the 2 sites"):
        wait_for_sites(Hangs(over), 2, 0.2)


def test_a_superlink_that_restarts_does_not_end_the_wait() -> None:
    nodes = wait_for_sites(
        Refuses([Node(2, "a"), Node(1, "b")], refusals=3), 2, SOON_S, poll_s=0.02
    )
    assert [node.node_id for node in nodes] == [2, 1]
    with pytest.raises(
        RunFailedError, match=r"0 of the 1 .* \(the SuperLink says: 503 .*\): start"
    ):
        wait_for_sites(Refuses([Node(1)]), 1, 0.3, poll_s=0.02)


def test_a_bounded_call_answers_raises_or_times_out(over: threading.Event) -> None:
    assert bounded(lambda: 3, SOON_S) == 3
    with pytest.raises(ConnectionError, match="503"):
        bounded(Refuses([]).get_nodes, SOON_S)
    for seconds in (0.1, 0.0, -1.0):
        with pytest.raises(TimeoutError):
            bounded(lambda: over.wait(FOREVER_S), seconds)


def test_texts_from_sites_become_one_printable_line() -> None:
    assert one_line("a\n\tb\x1b[31m c ") == "a b [31m c"
    assert len(one_line("x" * 1000)) == rounds.TEXT
