"""The health probe: whether a process does its work, not merely whether it runs."""

import http.client
import ssl
from pathlib import Path

from certs.contact import seconds_since_contact
from certs.contexts import client_context
from certs.errors import ConnectionRefusedByFleetError
from certs.identity import Identity
from certs.roles import Role

# SuperNode and SuperExec poll every 1 to 3 s, a heartbeat goes out every 20 s, and Flower calls a
# node offline after 60 s.
_SILENCE_SECONDS = 60.0
# A probe runs every few seconds; an answer from the same machine that takes longer is a failure.
_PROBE_SECONDS = 5.0
# Servers of their own port, which says whether they work.
_ASKED = (Role.SUPERLINK, Role.ENROLMENT, Role.EXPORTER)


def check(directory: Path, address: str) -> str:
    """Return a line that says the process is healthy; raise ``ConnectionRefusedByFleetError`` otherwise.

    SuperLink, enrolment service and exporter are asked over mutual TLS with their own identity. SuperNode and SuperExec
    are healthy while their server answers them: their own ports stay open when their work has stopped (measured on
    Flower 1.41).
    """
    identity = Identity.load(directory, *_ASKED, Role.SITE, Role.SUPEREXEC)
    if identity.peer.role in _ASKED:
        return _ask(identity, address)
    silence = seconds_since_contact(identity.peer)
    if silence is None or silence > _SILENCE_SECONDS:
        since = "has not answered yet" if silence is None else f"last answered {silence:.0f} s ago"
        raise ConnectionRefusedByFleetError(
            f"the server of {identity.peer.role} {identity.peer.name} {since}; "
            "look at both logs and the network between them"
        )
    return f"{identity.peer.role} {identity.peer.name}: last contact {silence:.0f} s ago"


def _ask(identity: Identity, address: str) -> str:
    host, _, port = address.rpartition(":")
    peer = identity.peer
    context = client_context(identity, (peer.federation, peer.role, peer.name))
    try:
        connection = http.client.HTTPSConnection(
            host, int(port), timeout=_PROBE_SECONDS, context=context
        )
        try:
            connection.request("GET", "/health")
            status = connection.getresponse().status
        finally:
            connection.close()
    except (OSError, ssl.SSLError, http.client.HTTPException, ValueError) as error:
        raise ConnectionRefusedByFleetError(
            f"the {peer.role} at {address} does not answer: {error}"
        ) from error
    if status != http.client.OK:
        raise ConnectionRefusedByFleetError(f"the {peer.role} at {address} answers {status}")
    return f"{peer.role}: {address} answers"
