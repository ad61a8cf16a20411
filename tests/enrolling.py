"""What the tests of the enrolment service share: a site's keys, a stand-in for Flower's register, requests."""

import base64
import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from certs.audit import Audit
from certs.authority import Authority
from certs.enrolment import Application
from certs.errors import ConnectionRefusedByFleetError
from certs.invitation import Invitation
from certs.roles import Peer, Role
from superlink.control import Node
from superlink.crl import Publisher
from superlink.datasets import Datasets
from superlink.enrolment_api import Api
from superlink.invitations import Invitations
from superlink.members import Members
from superlink.refused import Refused

FEDERATION = "test"


def new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


@dataclass
class Keys:
    """The three keys of a site."""

    tls: ec.EllipticCurvePrivateKey = field(default_factory=new_key)
    superexec: ec.EllipticCurvePrivateKey = field(default_factory=new_key)
    node: ec.EllipticCurvePrivateKey = field(default_factory=new_key)

    def application(self, site: str, federation: str = FEDERATION) -> dict[str, str]:
        made = Application.make(federation, site, self.tls, self.superexec, self.node)
        return made.to_json()


def enrolment(secret: bytes, application: Mapping[str, Any]) -> dict[str, Any]:
    """The body of POST /v1/enrol."""
    text = base64.urlsafe_b64encode(secret).rstrip(b"=").decode()
    return {"invitation": text, "application": dict(application)}


@dataclass
class Register:
    """A stand-in for Flower's register of SuperNodes."""

    known: list[Node] = field(default_factory=list)
    reachable: bool = True

    @contextlib.contextmanager
    def connect(self) -> Iterator["Register"]:
        if not self.reachable:
            raise ConnectionRefusedByFleetError("no SuperLink of this federation answers; start it")
        yield self

    def every_node(self) -> list[Node]:
        return list(self.known)

    def register_key(
        self, name: str, key: ec.EllipticCurvePublicKey
    ) -> Literal["registered", "kept"]:
        pem = key.public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        if any(node.public_key == pem for node in self.known):
            return "kept"
        self.known.append(Node(name, "registered", pem, len(self.known) + 1, None))
        return "registered"

    def unregister(self, node_id: int) -> None:
        self.known = [
            replace(node, status="unregistered") if node.node_id == node_id else node
            for node in self.known
        ]

    def alive(self) -> list[str]:
        return [node.name for node in self.known if node.status != "unregistered"]


class Publishing(Publisher):
    """Where the revocation list goes."""

    def __init__(self, register: Register) -> None:
        self._register = register
        self.published = 0

    def publish(self) -> None:
        if not self._register.reachable:
            raise Refused("unavailable", "the SuperLink does not take the revocation list")
        self.published += 1


@dataclass(frozen=True)
class Reply:
    """An answer: its status, its headers and its JSON."""

    status: int
    headers: dict[bytes, bytes]
    body: Any


class Service:
    """The service's application without its process: real authority, files and audit log."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.authority = Authority.init(directory / "ca", FEDERATION)
        self.register = Register()
        self.publisher = Publishing(self.register)
        self.woken = 0
        self.now: float | None = None
        self.start()

    def start(self) -> None:
        """Begin, or begin again, with what is in the files."""
        state = self.directory / "state"
        self.invitations = Invitations(state / "invitations.json")
        self.members = Members(
            self.authority.directory,
            state,
            self.invitations,
            self.register.connect,
            self._wake,
            superlink="fleet.example:9092",
            enrolment="fleet.example:9093",
            site_lifetime=timedelta(days=7),
        )
        self.api = Api(
            self.authority.directory,
            self.invitations,
            self.members,
            Datasets(state / "datasets.json"),
            self.publisher,
            Audit(self.audit),
            address="fleet.example:9093",
            site_lifetime=timedelta(days=7),
        )
        self.paths = {path: app for path, (_, app) in self.api.rules().items()}
        self.paths |= self.api.anonymous()

    def _wake(self) -> None:
        self.woken += 1

    @property
    def audit(self) -> Path:
        return self.directory / "audit.jsonl"

    def events(self) -> list[dict[str, Any]]:
        """The audit log."""
        return [json.loads(line) for line in self.audit.read_text().splitlines()]

    def written(self) -> dict[str, bytes]:
        """Every file but the audit log, and the register."""
        files = [*(self.directory / "ca").rglob("*"), *(self.directory / "state").rglob("*")]
        return {str(path): path.read_bytes() for path in files if path.is_file()} | {
            "register": repr(self.register.known).encode()
        }

    def invite(self, site: str, valid_seconds: int = 3600) -> bytes:
        """Invite as the operator does; return the secret."""
        reply = self.operator("POST", "/v1/invitations", site=site, valid_seconds=valid_seconds)
        assert reply.status == 200, reply.body
        return Invitation.decode(reply.body["invitation"]).secret

    def enrol(self, secret: bytes, site: str, keys: Keys) -> Reply:
        return self.ask("POST", "/v1/enrol", enrolment(secret, keys.application(site)))

    def operator(self, method: str, path: str, **fields: Any) -> Reply:
        return self.ask(method, path, fields or None, self.issued(Role.OPERATOR, "admin"))

    def issued(self, role: Role, name: str, **options: Any) -> x509.Certificate:
        return self.authority.issue(new_key().public_key(), role, name, **options)

    def ask(
        self,
        method: str,
        path: str,
        content: Any = None,
        certificate: x509.Certificate | None = None,
        headers: list[tuple[bytes, bytes]] | None = None,
    ) -> Reply:
        """Send JSON, or bytes as they are, as the holder of a certificate."""
        import asyncio

        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        sent: list[Any] = []
        parts = [
            {"type": "http.request", "body": body[at : at + 4096], "more_body": True}
            for at in range(0, len(body), 4096)
        ]
        parts.append({"type": "http.request", "body": b"", "more_body": False})

        async def receive() -> Any:
            return parts.pop(0)

        async def send(message: Any) -> None:
            sent.append(message)

        prefix = next(
            each
            for each in self.paths
            if path == each or (each[-1] == "/" and path.startswith(each))
        )
        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "headers": headers or [],
            "client": ("192.0.2.7", 5000),
            "state": {
                "peer": Peer.of(certificate) if certificate else None,
                "certificate": certificate.public_bytes(serialization.Encoding.DER)
                if certificate
                else None,
            },
        }
        asyncio.run(self.paths[prefix](scope, receive, send))  # type: ignore[arg-type]
        start, end = sent
        text = end["body"]
        return Reply(start["status"], dict(start["headers"]), json.loads(text) if text else None)
