"""A running SuperLink with two registered sites, for the tests that attack or watch it."""

import base64
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_public_key

from certs.identity import Identity, authority_directory, ensure_federation, identity_directory
from certs.processes import Processes
from certs.roles import Role
from superlink.control import Control
from superlink.demo import wait_for_superlink
from tests.wire import Answer, ask, context

SITES = ("site-a", "site-b")


@dataclass(frozen=True)
class Running:
    """Where a running SuperLink listens, its PKI and its processes."""

    port: int
    pki: Path
    processes: Processes

    @property
    def address(self) -> str:
        return f"localhost:{self.port}"

    @property
    def authority(self) -> Path:
        return authority_directory(self.pki) / "ca.crt"

    @property
    def log(self) -> Path:
        return self.processes.logs / "superlink.log"

    def identity(self, role: Role, name: str) -> Path:
        return identity_directory(self.pki, role, name)

    def ask(self, path: str, identity: Path | None, **options: object) -> Answer:
        return ask(self.port, path, context(self.authority, identity), **options)  # type: ignore[arg-type]


@contextlib.contextmanager
def running_superlink(directory: Path, port: int) -> Iterator[Running]:
    """Start a SuperLink, register the sites, and end it."""
    pki = directory / "pki"
    for _ in ensure_federation(pki, "test", SITES):
        pass
    running = Running(port, pki, Processes(directory))
    own = running.identity(Role.SUPERLINK, "superlink")
    try:
        running.processes.start(
            "superlink",
            *(
                "superlink",
                "--identity",
                str(own),
                "--state",
                str(directory / "state"),
                "--port",
                str(port),
            ),
        )
        wait_for_superlink(running.processes, own, running.address)
        operator = Identity.load(running.identity(Role.OPERATOR, "admin"), Role.OPERATOR)
        with Control.connect(operator, running.address) as control:
            for site in SITES:
                control.register(site, running.identity(Role.SITE, site) / "node.pub")
        yield running
    finally:
        running.processes.stop()


def node_header(identity: Path) -> dict[str, str]:
    from flwr.supercore.primitives.asymmetric import public_key_to_bytes

    key = load_ssh_public_key((identity / "node.pub").read_bytes())
    assert isinstance(key, ec.EllipticCurvePublicKey)
    return {"flwr-public-key": base64.b64encode(public_key_to_bytes(key)).decode()}
