"""The listening socket that closes what its limits do not let in."""

import socket
from collections.abc import Iterator

import pytest

from certs.guard import FAILED_HANDSHAKES
from certs.server import bind
from superlink.door import Door
from superlink.limits import Limits, Rate

BURST = 5


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def door(clock: Clock) -> Iterator[Door]:
    limits = Limits(Rate(1, BURST), Rate(100, 100), clock)
    with Door(bind("127.0.0.1", 0), limits) as made:
        made.listen(64)
        made.setblocking(False)
        yield made


def let_in(door: Door, source: str, number: int) -> int:
    """Connect so many times; return how many connections are accepted, all others being closed."""
    clients = [socket.create_connection(door.getsockname(), 10, (source, 0)) for _ in range(number)]
    accepted = []
    while True:
        try:
            connection, address = door.accept()
        except BlockingIOError:
            break
        assert address[0] == source
        assert connection.proto == socket.IPPROTO_TCP
        accepted.append(connection)
    for connection in accepted:
        connection.sendall(b"hello")
    answered = [_answer(client) for client in clients]
    for each in (*accepted, *clients):
        each.close()
    assert answered.count(b"hello") == len(accepted)
    assert answered.count(b"") == number - len(accepted)
    return len(accepted)


def _answer(client: socket.socket) -> bytes:
    try:
        return client.recv(5)
    except ConnectionResetError:
        return b""


def test_a_source_beyond_its_burst_is_closed(door: Door, clock: Clock) -> None:
    before = FAILED_HANDSHAKES.labels("limit")._value.get()
    assert let_in(door, "127.0.0.2", BURST + 7) == BURST
    assert FAILED_HANDSHAKES.labels("limit")._value.get() == before + 7
    # Others come in, and this one as its tokens come back.
    assert let_in(door, "127.0.0.3", 3) == 3
    assert let_in(door, "127.0.0.2", 3) == 0
    clock.now += 2
    assert let_in(door, "127.0.0.2", 3) == 2


def test_a_flood_does_not_hold_up_those_inside(door: Door) -> None:
    """One call closes so many, and then says that nobody is there."""
    assert let_in(door, "127.0.0.4", BURST) == BURST
    flood = [socket.create_connection(door.getsockname(), 10, ("127.0.0.4", 0)) for _ in range(40)]
    welcome = socket.create_connection(door.getsockname(), 10, ("127.0.0.5", 0))
    with pytest.raises(BlockingIOError):
        door.accept()
    connection, address = door.accept()
    assert address[0] == "127.0.0.5"
    for each in (*flood, welcome, connection):
        each.close()
