"""Sites come and go while a federation works: real processes, and the commands that an operator and a site type."""

import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from app.journal import read_rounds
from certs.authority import Authority
from certs.contexts import unverified_context
from certs.enrolment import ENROL_PATH, MAX_BODY_BYTES
from certs.files import load_certificate, pem_certificate
from certs.identity import authority_directory, identity_directory, store_identity
from certs.invitation import PREFIX, Invitation
from certs.processes import Processes
from certs.roles import Role
from superlink.control import Control, run_request
from superlink.demo import federation
from tests.recorder import record

pytestmark = [pytest.mark.federation, pytest.mark.slow, pytest.mark.timeout(1500)]

ROOT = Path(__file__).parents[2]
# Certificates that live so long are renewed every two thirds of it: several times in the run below.
LIFETIME_S = int(os.environ.get("VLAFLEET_TEST_LIFETIME", "60"))
# Flower's own waits make a round 12 s long: more than a lifetime.
ROUNDS = int(os.environ.get("VLAFLEET_TEST_ROUNDS", "7"))
# What a loaded machine may take for a wait that must end; the tested bounds are their own.
LONG = 600.0
SMALL = "batch-size=2 eval-batches=1 min-sites=2 quorum=1"


@dataclass(frozen=True)
class Fleet:
    """A federation of one site, its enrolment service, and the datasets of those who may join."""

    directory: Path
    control: Control
    processes: Processes
    superlink: str
    enrolment: str

    @property
    def pki(self) -> Path:
        return self.directory / "federation" / "pki"

    @property
    def runs(self) -> Path:
        return self.directory / "runs"

    def dataset(self, name: str) -> str:
        return str(self.directory / "data" / name)

    def home(self, name: str) -> Path:
        return self.directory / "homes" / name

    def vlafleet(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command as the operator, or as a site."""
        operator = identity_directory(self.pki, Role.OPERATOR, "admin")
        done = subprocess.run(
            [sys.executable, "-m", "vlafleet", *arguments],
            capture_output=True,
            text=True,
            check=False,
            timeout=LONG,
            env={
                **os.environ,
                "VLAFLEET_IDENTITY": str(operator),
                "VLAFLEET_ENROLMENT": self.enrolment,
            },
        )
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    def invite(self, name: str, *arguments: str) -> str:
        """The invitation that the operator's command prints."""
        (invitation,) = self.vlafleet("site", "invite", name, *arguments).stdout.split()
        assert invitation.startswith(PREFIX)
        return invitation

    def join(
        self, name: str, invitation: str, *, check: bool = True, home: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Join as a site of this machine."""
        arguments = ["--dataset", self.dataset("site-c"), "--native"]
        directory = ["--directory", str(home or self.home(name))]
        return self.vlafleet("site", "join", invitation, *arguments, *directory, check=check)

    def sites(self) -> dict[str, dict[str, object]]:
        """What ``site list --json`` says, by name."""
        listed = json.loads(self.vlafleet("site", "list", "--json").stdout)
        entries = listed["sites"] if isinstance(listed, dict) else listed
        return {entry["site"]: entry for entry in entries}

    def audit(self) -> list[dict[str, object]]:
        """Every line of the audit logs, by time."""
        lines = [
            json.loads(line)
            for path in self.directory.rglob("audit.jsonl")
            for line in path.read_text().splitlines()
        ]
        return sorted(lines, key=lambda line: str(line["time"]))

    def run(self, config: str) -> int:
        """Start a run."""
        return self.control.start(run_request(ROOT, [config]))

    def finished(self, run: int) -> str:
        """How a run ended, once it has."""
        until(lambda: self.control.status(run).status == "finished", f"run {run} did not end")
        return str(self.control.status(run).sub_status)


def until[T](look: Callable[[], T], what: str) -> T:
    deadline = time.monotonic() + LONG
    while not (found := look()):
        assert time.monotonic() < deadline, what
        time.sleep(0.2)
    return found


def content(directory: Path) -> dict[str, str]:
    """The hash of every file below a directory."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def seconds(line: dict[str, object]) -> float:
    return datetime.fromisoformat(str(line["time"])).timestamp()


@pytest.fixture(scope="module")
def fleet(
    tmp_path_factory: pytest.TempPathFactory, free_port: Callable[[], int]
) -> Iterator[Fleet]:
    directory = tmp_path_factory.mktemp("fleet")
    for name in ("site-a", "site-c"):
        record(directory / "data" / name)
    port = free_port()
    with federation(
        directory / "federation",
        {"site-a": str(directory / "data" / "site-a")},
        directory / "runs",
        port,
        enrolment=True,
        site_lifetime=f"{LIFETIME_S}s",
    ) as (control, processes):
        made = Fleet(directory, control, processes, f"localhost:{port}", f"localhost:{port + 2}")
        try:
            yield made
        finally:
            for home in (directory / "homes").glob("*"):
                made.vlafleet("site", "stop", "--directory", str(home), check=False)


def test_a_site_joins_with_two_commands_and_changes_nobody_else(fleet: Fleet) -> None:
    before = {
        role: content(identity_directory(fleet.pki, role, "site-a"))
        for role in (Role.SITE, Role.SUPEREXEC)
    }
    joined = fleet.join("site-c", fleet.invite("site-c"))
    assert "online" in joined.stdout
    for role, files in before.items():
        assert content(identity_directory(fleet.pki, role, "site-a")) == files
    listed = fleet.sites()
    assert {name: entry["state"] for name, entry in listed.items()} == {
        "site-a": "online",
        "site-c": "online",
    }
    assert listed["site-c"]["episodes"] == 4
    for key in fleet.home("site-c").rglob("*.key"):
        assert key.stat().st_mode & 0o777 == 0o600, key


def test_renewal_and_a_flood_of_requests_disturb_no_round(fleet: Fleet) -> None:
    """The SuperLink's certificate is replaced as well, and the enrolment port is under fire."""
    certificate = fleet.home("site-c") / "identity" / "tls.crt"
    superexec = fleet.home("site-c") / "superexec" / "tls.crt"
    superlink = identity_directory(fleet.pki, Role.SUPERLINK, "superlink")
    served = presented(fleet.superlink)
    began = time.monotonic()
    with ThreadPoolExecutor() as pool:
        run = fleet.run(f"rounds={ROUNDS} {SMALL} local-steps=2")
        flood = pool.submit(fire, fleet.enrolment, 1000)
        serials, own = set(), set()
        while fleet.control.status(run).status != "finished":
            serials.add(load_certificate(certificate).serial_number)
            own.add(load_certificate(superexec).serial_number)
            if presented(fleet.superlink) == served and flood.done():
                replace(Authority.load(authority_directory(fleet.pki)), superlink)
            time.sleep(1)
        statuses = flood.result()
    assert fleet.finished(run) == "completed"
    records = read_rounds(fleet.runs / str(run))
    assert [entry["round"] for entry in records] == list(range(ROUNDS + 1))
    for entry in records[1:]:
        assert entry["committed"]
        assert {site["train"]["state"] for site in entry["sites"].values()} == {"completed"}, entry
        assert set(entry["sites"]) == {"site-a", "site-c"}
    # Renewed at two thirds, so more than once in each life that the run lasted.
    assert len(serials) > (time.monotonic() - began) / LIFETIME_S
    assert len(own) > (time.monotonic() - began) / LIFETIME_S
    assert presented(fleet.superlink) != served
    assert sum(statuses.values()) == 1000
    assert statuses[400] > 10
    assert all(400 <= status < 500 for status in statuses if status), statuses


def test_a_revoked_site_is_out_within_seconds_and_may_come_back(fleet: Fleet) -> None:
    log = fleet.home("site-c") / "logs" / "superexec.log"
    before = len(log.read_text())
    run = fleet.run(f"rounds=1 {SMALL} local-steps=1000")
    until(lambda: "train: step" in log.read_text()[before:], "site-c trains")
    started = time.time()
    fleet.vlafleet("site", "revoke", "site-c")
    refused = until(
        lambda: [
            line
            for line in fleet.audit()
            if line["event"] in {"request-refused", "handshake-refused"} and seconds(line) > started
        ],
        "site-c is refused",
    )
    (revoked,) = [line for line in fleet.audit() if line["event"] == "revoked"]
    assert seconds(refused[0]) - seconds(revoked) < 10
    assert fleet.finished(run) == "completed"
    (_, entry) = read_rounds(fleet.runs / str(run))
    assert entry["committed"]
    assert entry["sites"]["site-a"]["train"]["state"] == "completed"
    assert entry["sites"]["site-c"]["train"]["state"] == "offline"
    assert entry["sites"]["site-c"]["train"]["reason"] == "revoked"
    assert fleet.sites()["site-c"]["state"] == "revoked"
    key = (fleet.home("site-c") / "identity" / "node.pub").read_bytes()
    fleet.join("site-c", fleet.invite("site-c"))
    assert (fleet.home("site-c") / "identity" / "node.pub").read_bytes() != key
    run = fleet.run(f"rounds=1 {SMALL} local-steps=2")
    assert fleet.finished(run) == "completed"
    (_, entry) = read_rounds(fleet.runs / str(run))
    assert entry["sites"]["site-c"]["train"]["state"] == "completed"


def test_an_invitation_is_good_once_for_one_site_of_one_federation(fleet: Fleet) -> None:
    used = fleet.invite("site-d")
    fleet.join("site-d", used)
    fleet.vlafleet("site", "stop", "--directory", str(fleet.home("site-d")))
    open_ = Invitation.decode(fleet.invite("site-e"))
    values = vars(open_)
    cancelled = fleet.invite("site-f")
    fleet.vlafleet("site", "cancel", "site-f")
    bad = {
        "used": used,
        "another site": Invitation(**{**values, "site": "site-g"}).encode(),
        "another federation": Invitation(**{**values, "federation": "other"}).encode(),
        "another fingerprint": Invitation(**{**values, "fingerprint": "0" * 64}).encode(),
        "another secret": Invitation(**{**values, "secret": bytes(16)}).encode(),
        "expired": Invitation(**{**values, "expires": int(time.time()) - 3600}).encode(),
        "cancelled": cancelled,
        "altered": used[:-7] + ("A" if used[-7] != "A" else "B") + used[-6:],
        "cut": used[:-3],
    }
    members = fleet.sites().keys()
    issued = len(Authority.load(authority_directory(fleet.pki)).issued())
    for what, invitation in bad.items():
        home = fleet.directory / "refused" / what.replace(" ", "-")
        refused = fleet.join("", invitation, check=False, home=home)
        assert refused.returncode == 20, (what, refused.stderr)
        assert len(refused.stderr.strip().splitlines()) == 1, (what, refused.stderr)
        assert not list(home.rglob("tls.crt")), what
        assert not list(home.rglob("site.json")), what
    assert fleet.sites().keys() == members
    # The others' certificates go on being renewed meanwhile.
    holders = {
        line.name for line in Authority.load(authority_directory(fleet.pki)).issued()[issued:]
    }
    assert holders <= {"site-c", "site-d"}
    reasons = [line["reason"] for line in fleet.audit() if line["event"] == "enrolment-refused"]
    # The others are noticed at the site, before anything is asked of the service.
    assert {"used", "site", "unknown", "cancelled"} <= set(reasons)


def test_no_secret_is_in_any_log(fleet: Fleet) -> None:
    secret = Invitation.decode(fleet.invite("site-h")).secret
    logs = [*fleet.directory.rglob("*.log"), *fleet.directory.rglob("*.jsonl")]
    assert any(path.name == "audit.jsonl" for path in logs)
    assert any(path.name == "enrolment.log" for path in logs)
    private = [
        "".join(path.read_text().split("-----")[2].split())
        for path in fleet.directory.rglob("*.key")
    ]
    assert len(private) > 10
    for path in logs:
        text = "".join(path.read_text(errors="replace").split())
        assert "PRIVATEKEY" not in text, path
        assert not re.search(re.escape(PREFIX) + r"[\w-]{40}", text), path
        assert secret.hex() not in text, path
        for key in private:
            assert key[:60] not in text, path


def presented(address: str) -> int:
    """The serial of the certificate that a server presents; the handshake fails later, for want of ours."""
    host, _, port = address.partition(":")
    with (
        socket.create_connection((host, int(port)), timeout=20) as connection,
        unverified_context().wrap_socket(connection, server_hostname=host) as tls,
    ):
        return x509.load_der_x509_certificate(
            tls.getpeercert(binary_form=True) or b""
        ).serial_number


def replace(authority: Authority, directory: Path) -> None:
    """Issue a certificate for a new key, as an operator would whose SuperLink's key is to go."""
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = authority.issue(
        key.public_key(), Role.SUPERLINK, "superlink", hosts=["localhost", "127.0.0.1"]
    )
    store_identity(directory, key, pem_certificate(certificate).decode(), authority.bundle.decode())


def fire(address: str, requests: int) -> Counter[int]:
    """Send requests that no honest site would, fifty at a time; the statuses (0: not let in), and how often."""
    bodies = [b"", b"{", b"[]", b"null", b'{"invitation": 1}', b"\xff" * 100, b"[" * 10000]
    bodies.append(b"A" * (MAX_BODY_BYTES + 1))
    context = unverified_context()

    def send(number: int) -> int:
        try:
            return httpx.post(
                f"https://{address}{ENROL_PATH}",
                content=bodies[number % len(bodies)],
                verify=context,
                timeout=LONG,
            ).status_code
        except httpx.TransportError:
            return 0

    with ThreadPoolExecutor(50) as pool:
        return Counter(pool.map(send, range(requests)))
