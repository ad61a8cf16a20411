"""A federation that sites can join in a test.

The enrolment service's application and the TLS are the real ones. The SuperLink has ``GET /v1/sites`` alone; Flower's
register, the checks of a machine and the processes that a join starts are stand-ins.
"""

import contextlib
import functools
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from certs.audit import Audit
from certs.authority import Authority
from certs.enrolment import SITES_PATH, certificate_fingerprint
from certs.guard import Application, Guard, Receive, Scope, Send, allow
from certs.identity import (
    Identity,
    authority_directory,
    ensure_federation,
    identity_directory,
    publish_crl,
)
from certs.invitation import Invitation
from certs.revocations import Revocations
from certs.roles import Role
from certs.server import bind, mutual_tls_server
from superlink.datasets import Datasets
from superlink.enrolment_api import Api
from superlink.invitations import Invitations
from superlink.members import Members
from supernode.findings import Report, ok
from supernode.site import Site
from tests.enrolling import Publishing, Register

FEDERATION = "test"


async def _lifespan(_scope: Scope, receive: Receive, send: Send) -> None:
    for event in ("startup", "shutdown"):
        await receive()
        await send({"type": f"lifespan.{event}.complete"})


async def answer_json(send: Send, content: Any, status: int = 200, **headers: str) -> None:
    head = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": head})
    await send({"type": "http.response.body", "body": json.dumps(content).encode()})


class Recording(Guard):
    """A guard that notes what was asked, and may answer in the application's place."""

    def __init__(self, asked: list[tuple[str, str]], *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.asked = asked
        self.instead: Application | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            self.asked.append((scope["method"], scope["path"]))
            if self.instead is not None:
                await self.instead(scope, receive, send)
                return
        await super().__call__(scope, receive, send)


@contextlib.contextmanager
def serving(
    guard: Guard, identity: Identity, revocations: Revocations, port: int, *, anonymous: bool
) -> Iterator[None]:
    """Serve in a thread until the block ends."""
    with bind("127.0.0.1", port) as listener:
        server = mutual_tls_server(guard, identity, revocations, anonymous=anonymous)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        try:
            yield
        finally:
            server.should_exit = True
            thread.join(30)


@dataclass
class Fleet:
    """The federation: its authority, whom it knows, what it was asked."""

    directory: Path
    superlink: str
    enrolment: str
    register: Register = field(default_factory=Register)
    asked: list[tuple[str, str]] = field(default_factory=list)
    # A site's name to the processes that run, as the stand-in started them.
    running: dict[str, Site] = field(default_factory=dict)
    starts: list[Site] = field(default_factory=list)
    stops: list[Path] = field(default_factory=list)
    heartbeat: float = 1000.0
    online_after_start: bool = True

    def __post_init__(self) -> None:
        self.pki = self.directory / "pki"
        for _ in ensure_federation(self.pki, FEDERATION, []):
            pass
        self.authority = Authority.load(authority_directory(self.pki))
        state = self.directory / "state"
        self.invitations = Invitations(state / "invitations.json")
        self.datasets = Datasets(state / "datasets.json")
        self.members = Members(
            self.authority.directory,
            state,
            self.invitations,
            self.register.connect,
            self._publish,
            superlink=self.superlink,
            enrolment=self.enrolment,
            site_lifetime=timedelta(days=7),
        )
        self.api = Api(
            self.authority.directory,
            self.invitations,
            self.members,
            self.datasets,
            Publishing(self.register),
            Audit(self.audit),
            address=self.enrolment,
            site_lifetime=timedelta(days=7),
        )
        self.service = Recording(
            self.asked,
            self.api.rules(),
            _lifespan,
            None,
            anonymous=self.api.anonymous(),
        )

    @property
    def audit(self) -> Path:
        return self.directory / "audit.jsonl"

    @property
    def fingerprint(self) -> str:
        return certificate_fingerprint(self.authority.certificate)

    def events(self) -> list[dict[str, Any]]:
        lines = self.audit.read_text().splitlines() if self.audit.exists() else []
        return [json.loads(line) for line in lines]

    def identity(self, role: Role) -> Identity:
        return Identity.load(identity_directory(self.pki, role, str(role)), role)

    def invite(self, site: str, seconds: int = 3600, **changes: Any) -> Invitation:
        """Invite, and alter the invitation on its way."""
        secret, entry = self.invitations.create(site, seconds)
        made = Invitation(FEDERATION, site, self.enrolment, self.fingerprint, entry.expires, secret)
        return replace(made, **changes)

    def states(self, site: str) -> list[str]:
        return [str(each["state"]) for each in self.invitations.listed() if each["site"] == site]

    def revoke(self, site: str) -> None:
        self.members.revoke(site)
        self._publish()

    def _publish(self) -> None:
        publish_crl(self.pki, self.authority)

    @contextlib.contextmanager
    def serve(self) -> Iterator["Fleet"]:
        """Answer at both addresses."""
        site = allow(lambda peer: peer.role is Role.SITE)
        superlink, enrolment = self.identity(Role.SUPERLINK), self.identity(Role.ENROLMENT)
        revocations = Revocations(superlink.crl, superlink.authority)
        guard = Guard({SITES_PATH: (site, self._sites)}, _lifespan, revocations)
        ports = [int(each.rpartition(":")[2]) for each in (self.superlink, self.enrolment)]
        with (
            serving(guard, superlink, revocations, ports[0], anonymous=False),
            serving(self.service, enrolment, revocations, ports[1], anonymous=True),
        ):
            yield self

    async def _sites(self, scope: Scope, _receive: Receive, send: Send) -> None:
        name = scope["state"]["peer"].name
        sites = [
            {
                "name": node.name,
                "node_id": str(node.node_id),
                "status": node.status if node.status == "unregistered" else self._status(name),
                "last_heartbeat": self.heartbeat if name in self.running else None,
            }
            for node in self.register.known
            if node.name == name
        ]
        await answer_json(send, {"time": time.time(), "sites": sites})

    def _status(self, name: str) -> str:
        if name not in self.running:
            return "registered"
        return "online" if self.online_after_start else "offline"

    # What supernode.native and supernode.preflight do, without processes.

    def start(self, site: Site) -> None:
        if site.name in self.running:
            return
        self.running[site.name] = Site.load(site.directory)
        self.starts.append(site)
        self.heartbeat += 1

    def stop(self, directory: Path) -> bool:
        self.stops.append(directory)
        return self.running.pop(Site.load(directory).name, None) is not None

    def is_running(self, directory: Path) -> bool:
        site = Site.find(directory)
        return site is not None and site.name in self.running

    def check(self, site: Site, _run_config: Sequence[str] = ()) -> Report:
        dataset = {"episodes": 4, "frames": 400, "bytes": 12345, "fps": 30, "cameras": ["top"]}
        return Report(site.name, [ok("dataset", f"{site.dataset} is fit")], dataset, None)


@contextlib.contextmanager
def joinable(
    directory: Path, free_port: Callable[[], int], patch: Callable[[str, object], None]
) -> Iterator[Fleet]:
    """Run a federation whose joins start and check nothing real."""
    fleet = Fleet(directory / "fleet", f"localhost:{free_port()}", f"localhost:{free_port()}")
    patch("supernode.enrol._PAUSES", (0.01, 0.01))
    patch("supernode.native.start", fleet.start)
    patch("supernode.native.stop", fleet.stop)
    patch("supernode.native.running", fleet.is_running)
    patch("supernode.preflight.check", fleet.check)
    with fleet.serve():
        yield fleet


def files(directory: Path) -> dict[str, bytes]:
    """Every file below a directory."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def keys(directory: Path) -> dict[str, bytes]:
    """Every private key of a site."""
    return {name: data for name, data in files(directory).items() if name.endswith(".key")}


def after[**P, T](function: Callable[P, T], error: BaseException) -> Callable[P, T]:
    """Return the function, which fails once it has done its work, the first time it is called."""
    calls: list[None] = []

    @functools.wraps(function)
    def wrapped(*arguments: P.args, **options: P.kwargs) -> T:
        result = function(*arguments, **options)
        calls.append(None)
        if len(calls) == 1:
            raise error
        return result

    return wrapped


def before[**P, T](function: Callable[P, T], error: BaseException) -> Callable[P, T]:
    """Return the function, which fails before its work, the first time it is called."""
    calls: list[None] = []

    @functools.wraps(function)
    def wrapped(*arguments: P.args, **options: P.kwargs) -> T:
        calls.append(None)
        if len(calls) == 1:
            raise error
        return function(*arguments, **options)

    return wrapped
