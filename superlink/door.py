"""The enrolment service's listening socket: it closes what would cost too much before TLS begins."""

import socket
from typing import Any

from certs.guard import count_failed_handshake
from superlink.limits import Limits
from superlink.refused import Refused

# Then those who are connected have their turn, however fast others come.
_AT_A_TIME = 32


class Door(socket.socket):
    """Accepts connections as far as ``limits`` let their addresses in.

    Measured: a connection with its handshake takes 2 ms of a core, one that is closed here 0.1. So a stranger who opens
    one after the other has no core to himself.
    """

    def __init__(self, listener: socket.socket, limits: Limits) -> None:
        """Take over a listening socket."""
        family, kind, protocol = listener.family, listener.type, listener.proto
        super().__init__(family, kind, protocol, fileno=listener.detach())
        self._limits = limits

    def accept(self) -> tuple[socket.socket, Any]:
        """Return a connection that is let in; raise ``BlockingIOError`` when there is none, or many that are not."""
        for _ in range(_AT_A_TIME):
            connection, address = super().accept()
            try:
                self._limits.require(address[0])
            except Refused:
                count_failed_handshake("limit")
                connection.close()
            else:
                return connection, address
        raise BlockingIOError
