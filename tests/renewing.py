"""A federation of a test's own, and a stand-in for its enrolment service: it signs renewals, or fails as told."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Self

from certs.authority import Authority
from certs.enrolment import requested_key
from certs.files import pem_certificate
from certs.guard import Receive, Scope, Send
from certs.identity import Identity, authority_directory, ensure_federation, identity_directory
from certs.roles import Peer, Role

# What a server answers: status, headers, body.
Answer = tuple[int, dict[str, str], bytes]


@dataclass(frozen=True)
class Fleet:
    """A PKI directory."""

    directory: Path

    @classmethod
    def make(cls, directory: Path) -> Self:
        """Make the federation ``test`` with site-a and site-b."""
        for _ in ensure_federation(directory, "test", ["site-a", "site-b"]):
            pass
        return cls(directory)

    @property
    def authority(self) -> Authority:
        return Authority.load(authority_directory(self.directory))

    def identity(self, role: Role, name: str) -> Identity:
        return Identity.load(identity_directory(self.directory, role, name), role)


@dataclass
class Signer:
    """An ASGI application for ``POST /v1/renew``; ``fault`` may answer in its place (None: it does not)."""

    authority: Authority
    lifetime: timedelta
    fault: Callable[[dict[str, str], Peer], Answer | None] = lambda _request, _peer: None
    # Who asked for what, and the serials that were signed.
    requests: list[tuple[Peer, dict[str, str]]] = field(default_factory=list)
    serials: list[int] = field(default_factory=list)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        message, body = await receive(), b""
        while True:
            body += message["body"]
            if not message.get("more_body"):
                break
            message = await receive()
        request, peer = json.loads(body), scope["state"]["peer"]
        self.requests.append((peer, request))
        status, headers, data = self.fault(request, peer) or self.sign(request, peer)
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": status, "headers": raw})
        await send({"type": "http.response.body", "body": data})

    def sign(self, request: dict[str, str], peer: Peer) -> Answer:
        """Answer with a certificate for the peer, or for its SuperExec."""
        role = Role(request.get("role", peer.role))
        certificate = self.authority.issue(
            requested_key(request["csr"]),
            role,
            peer.name,
            hosts=["localhost"] if role is Role.SITE else [],
            lifetime=self.lifetime,
        )
        self.serials.append(certificate.serial_number)
        return answer(
            certificate=pem_certificate(certificate).decode(),
            authority=self.authority.bundle.decode(),
        )


def answer(status: int = 200, **record: Any) -> Answer:
    """An answer in JSON."""
    return status, {"content-type": "application/json"}, json.dumps(record).encode()
