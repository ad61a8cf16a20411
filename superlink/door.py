"""The enrolment service's listening socket: it closes what would cost too much before TLS begins."""

import socket
from typing import Any

from certs.guard import FAILED_HANDSHAKES
from superlink.limits import Limits
from superlink.refused import Refused


class Door(socket.socket):
    """Accepts connections as far as ``limits`` let their addresses in.

    A handshake takes 2 ms of a core, a close 0.02: a stranger who opens connection after connection has no core to
    himself.
    """

    def __init__(self, listener: socket.socket, limits: Limits) -> None:
        """Take over a listening socket."""
        family, kind, protocol = listener.family, listener.type, listener.proto
        super().__init__(family, kind, protocol, fileno=listener.detach())
        self._limits = limits

    def accept(self) -> tuple[socket.socket, Any]:
        """Wait for a connection that is let in."""
        while True:
            connection, address = super().accept()
            try:
                self._limits.require(address[0])
            except Refused:
                FAILED_HANDSHAKES.labels("limit").inc()
                connection.close()
            else:
                return connection, address
