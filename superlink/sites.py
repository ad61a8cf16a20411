"""What the SuperLink says of its SuperNodes (``GET /v1/sites``) and of who is revoked (``/v1/crl``, where it is told).

Both stand beside Flower's API and read the state Flower keeps. Who may ask is the guard's rule.
"""

import asyncio
import json
import logging
import time
from typing import TYPE_CHECKING

from certs.errors import CertificateError
from certs.guard import Application, Receive, Scope, Send, read_body, reply
from certs.revocations import Revocations
from certs.roles import Peer, Role
from superlink.control import last_heartbeat

if TYPE_CHECKING:
    from flwr.server.superlink.linkstate import LinkStateFactory

_log = logging.getLogger("vlafleet.superlink")

# Who sees every SuperNode (the SuperLink's SuperExec for the ServerApp); a site sees its own.
_EVERY_SITE = frozenset(
    {Role.SUPEREXEC, Role.OPERATOR, Role.MONITOR, Role.ENROLMENT, Role.EXPORTER}
)
# A revoked certificate is some 40 bytes of the list: room for 18,000.
MAX_CRL_BYTES = 1 << 20

_OK, _NO_CONTENT, _BAD_REQUEST, _METHOD_NOT_ALLOWED, _TOO_LARGE, _UNAVAILABLE = (
    200,
    204,
    400,
    405,
    413,
    503,
)


def sites(factory: "LinkStateFactory") -> Application:
    """Return the endpoint that lists the SuperNodes its asker may know of.

    ``{"time", "sites": [{"name", "node_id", "status", "last_heartbeat", "offline_since"}]}``, times in seconds since
    1970, the id a decimal string (it has 64 bits), the status Flower's. A site that left and came back is there once a
    key. ``offline_since`` is when it signed off or was given up; None while it is online, and where it never was.
    """

    def known(peer: Peer) -> bytes:
        nodes = [
            {
                "name": node.name,
                "node_id": str(node.node_id),
                "status": node.status,
                "last_heartbeat": last_heartbeat(node),
                "offline_since": float(node.online_until) if node.status == "offline" else None,
            }
            for node in factory.state().get_node_info()
            if peer.role in _EVERY_SITE or node.name == peer.name
        ]
        return json.dumps({"time": time.time(), "sites": nodes}).encode()

    async def endpoint(scope: Scope, _receive: Receive, send: Send) -> None:
        if scope["method"] != "GET":
            await _refuse(send, _METHOD_NOT_ALLOWED, "malformed", "the sites are read with GET")
            return
        await reply(send, _OK, await asyncio.to_thread(known, scope["state"]["peer"]))

    return endpoint


def crl(revocations: Revocations) -> Application:
    """Return the endpoint of the revocation list, PEM: ``GET`` reads the one in force.

    ``PUT`` puts a newer one of this federation's authority in force; the enrolment service may.
    """

    async def endpoint(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] == "GET":
            await reply(send, _OK, revocations.pem, "application/pkix-crl")
            return
        if scope["method"] != "PUT" or scope["state"]["peer"].role is not Role.ENROLMENT:
            sentence = "the list is read with GET, and the enrolment service replaces it with PUT"
            await _refuse(send, _METHOD_NOT_ALLOWED, "malformed", sentence)
            return
        body = await read_body(receive, MAX_CRL_BYTES)
        if body is None:
            sentence = f"a revocation list has at most {MAX_CRL_BYTES >> 20} MiB here"
            await _refuse(send, _TOO_LARGE, "too-large", sentence)
            return
        try:
            await asyncio.to_thread(revocations.take, body)
        except CertificateError as error:
            _log.error("a revocation list was not taken: %s", error)
            if isinstance(error.__cause__, OSError):  # our disk's fault, not the list's
                await _refuse(send, _UNAVAILABLE, "unavailable", str(error))
            else:
                await _refuse(send, _BAD_REQUEST, "malformed", str(error))
            return
        await reply(send, _NO_CONTENT)

    return endpoint


async def _refuse(send: Send, status: int, code: str, detail: str) -> None:
    await reply(send, status, json.dumps({"code": code, "detail": detail}).encode())
