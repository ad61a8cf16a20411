"""A slow link on loopback: a TCP proxy with a rate, a delay and hardly any buffer.

It behaves like the wire, not like a buffering proxy: what it takes from a sender has found its place on the link, all
connections share that link piece by piece, and at most one piece of a connection waits. TLS passes through untouched.
"""

import asyncio
import contextlib
import socket
import threading
from collections.abc import Iterator

# 40 ms of a 200 kB/s link: a heartbeat waits that long behind another connection's piece.
_PIECE = 8192
# Kernels double what is asked for. Small receive buffers and an Ethernet's segment size keep senders from parking
# megabytes in their own send buffers, as loopback with its segments of 64 KiB lets them.
_BUFFER = 32 * 1024
_SEGMENT = 1460
# Pieces on the wire of one connection: more than rate x delay holds, so the link and not the queue sets the pace.
_QUEUED = 64


class _Direction:
    """One direction of the link, shared by every connection."""

    def __init__(self, rate: float, delay: float) -> None:
        self.rate, self.delay = rate, delay
        self.carried = 0
        self._free = 0.0

    async def carry(self, size: int) -> float:
        """Wait until ``size`` bytes have left the sender; return when they arrive."""
        loop = asyncio.get_running_loop()
        self._free = max(loop.time(), self._free) + size / self.rate
        self.carried += size
        left = self._free
        await asyncio.sleep(left - loop.time())
        return left + self.delay


class Throttle:
    """The running link: connect to ``port``; ``up`` and ``down`` are the bytes carried so far."""

    def __init__(self, target: int, rate: float, delay: float) -> None:
        self._target = target
        self._up, self._down = _Direction(rate, delay), _Direction(rate, delay)
        self._listener = _socket()
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen()
        self._listener.setblocking(False)
        self.port: int = self._listener.getsockname()[1]

    @property
    def up(self) -> int:
        return self._up.carried

    @property
    def down(self) -> int:
        return self._down.carried

    async def serve(self) -> None:
        """Carry connections until cancelled."""
        loop = asyncio.get_running_loop()
        async with asyncio.TaskGroup() as connections:
            while True:
                near, _ = await loop.sock_accept(self._listener)
                near.setblocking(False)
                connections.create_task(self._connection(near))

    def close(self) -> None:
        self._listener.close()

    async def _connection(self, near: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        far = _socket()
        far.setblocking(False)
        with near, far, contextlib.suppress(OSError):
            await loop.sock_connect(far, ("127.0.0.1", self._target))
            # A broken half breaks the other, as a reset on the way would.
            async with asyncio.TaskGroup() as halves:
                halves.create_task(_pump(near, far, self._up))
                halves.create_task(_pump(far, near, self._down))


async def _pump(source: socket.socket, sink: socket.socket, direction: _Direction) -> None:
    """Carry one direction of a connection to its end."""
    loop = asyncio.get_running_loop()
    wire: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(_QUEUED)

    async def enter() -> None:
        while data := await loop.sock_recv(source, _PIECE):
            await wire.put((await direction.carry(len(data)), data))
        await wire.put((loop.time() + direction.delay, b""))

    async def leave() -> None:
        while True:
            arrival, data = await wire.get()
            await asyncio.sleep(arrival - loop.time())
            if not data:
                sink.shutdown(socket.SHUT_WR)
                return
            await loop.sock_sendall(sink, data)

    async with asyncio.TaskGroup() as ends:
        ends.create_task(enter())
        ends.create_task(leave())


def _socket() -> socket.socket:
    made = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, _SEGMENT)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return made


@contextlib.contextmanager
def throttled(target: int, *, rate: float = 200e3, delay: float = 0.15) -> Iterator[Throttle]:
    """Run a link of ``rate`` bytes/s and ``delay`` seconds, each way, to port ``target`` of loopback."""
    link = Throttle(target, rate, delay)
    loop = asyncio.new_event_loop()
    serving = loop.create_task(link.serve())

    def run() -> None:
        with contextlib.suppress(asyncio.CancelledError):
            loop.run_until_complete(serving)
        loop.close()

    thread = threading.Thread(target=run, name="throttle", daemon=True)
    thread.start()
    try:
        yield link
    finally:
        loop.call_soon_threadsafe(serving.cancel)
        thread.join(10)
        link.close()
