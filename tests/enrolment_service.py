"""A running enrolment service beside a SuperLink, and clients of it that present whatever a test wants."""

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from certs.contexts import anonymous_context, client_context, enrolment_server
from certs.enrolment import Application, Membership
from certs.identity import Identity, authority_directory
from certs.invitation import Invitation
from certs.roles import Role
from supernode.enrol import enrol
from tests.enrolling import FEDERATION, Keys
from tests.federation import Running, running_superlink

_START_SECONDS = 60.0


@dataclass
class Enrolment:
    """A running service: where it listens, and the SuperLink's side."""

    superlink: Running
    port: int
    directory: Path

    @property
    def address(self) -> str:
        return f"localhost:{self.port}"

    @property
    def process(self) -> int:
        return self.superlink.processes.running["enrolment"].pid

    @property
    def log(self) -> str:
        return self.superlink.processes.log("enrolment").read_text()

    @property
    def state(self) -> Path:
        return self.directory / "enrolment"

    def events(self) -> list[dict[str, Any]]:
        """The audit log."""
        lines = (self.state / "audit.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def start(self, before: str = "") -> None:
        """Start the service, and return when it answers; ``before`` is Python that its process runs first."""
        own = self.superlink.identity(Role.ENROLMENT, "enrolment")
        arguments = (
            *("enrolment", "--identity", str(own), "--port", str(self.port)),
            *("--authority", str(authority_directory(self.superlink.pki))),
            *("--state", str(self.state), "--superlink", self.superlink.address),
        )
        processes = self.superlink.processes
        if before:
            code = f"{before}\nimport vlafleet; vlafleet.main()"
            with processes.log("enrolment").open("wb") as output:
                processes.running["enrolment"] = subprocess.Popen(
                    [sys.executable, "-c", code, *arguments],
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        else:
            processes.start("enrolment", *arguments)
        deadline = time.monotonic() + _START_SECONDS
        with self.client(None) as client:
            while True:
                self.superlink.processes.check()
                with contextlib.suppress(httpx.TransportError):
                    if client.get("/v1/authority").status_code == httpx.codes.OK:
                        return
                assert time.monotonic() < deadline, self.log
                time.sleep(0.1)

    def stop(self) -> None:
        """End the service as an operator does."""
        process = self.superlink.processes.running.pop("enrolment")
        process.terminate()
        assert process.wait(20) in {0, -15}, self.log

    def crashed(self) -> None:
        """Take note that the service has ended on its own, as ``os._exit(9)`` ends it."""
        assert self.superlink.processes.running.pop("enrolment").wait(20) == 9, self.log

    def client(self, identity: Identity | None) -> httpx.Client:
        """A client with this identity, or none."""
        if identity is None:
            context = anonymous_context(self.superlink.authority.read_text(), FEDERATION)
        else:
            context = client_context(identity, enrolment_server(FEDERATION))
        return httpx.Client(base_url=f"https://{self.address}", verify=context, timeout=30)

    def holder(self, role: Role, name: str) -> Identity:
        return Identity.load(self.superlink.identity(role, name), role)

    def operator(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """Ask as the operator; return the JSON of an answer that must be 200."""
        with self.client(self.holder(Role.OPERATOR, "admin")) as client:
            answer = client.request(method, path, json=body)
        assert answer.status_code == httpx.codes.OK, answer.text
        return answer.json()

    def invite(self, site: str) -> Invitation:
        body = {"site": site, "valid_seconds": 3600}
        return Invitation.decode(self.operator("POST", "/v1/invitations", body)["invitation"])

    def enrol(self, invitation: Invitation, keys: Keys) -> Membership:
        """Enrol as a site does."""
        form = Application.from_json(keys.application(invitation.site))
        return enrol(invitation, form)

    def sites(self) -> dict[str, dict[str, Any]]:
        return {site["site"]: site for site in self.operator("GET", "/v1/sites")["sites"]}


@contextlib.contextmanager
def running_enrolment(directory: Path, port: int, superlink_port: int) -> Iterator[Enrolment]:
    """Run a SuperLink and the enrolment service."""
    with running_superlink(directory, superlink_port) as superlink:
        service = Enrolment(superlink, port, directory)
        service.start()
        yield service
