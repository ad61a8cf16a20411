"""The exporter as a process beside a real SuperLink: who may read what, and that it follows the runs and goes on."""

import asyncio
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from app import cli
from app.exporter import Followed, rules
from app.journal import Journal
from app.runs_view import Runs, View
from app.superlink_client import SuperLink
from app.totals import Totals
from certs.authority import Authority
from certs.contexts import client_context
from certs.errors import CertificateError, StorageError
from certs.files import write_atomic
from certs.health import check
from certs.identity import (
    Identity,
    authority_directory,
    ensure_federation,
    ensure_identity,
)
from certs.logs import bind
from certs.processes import Processes
from certs.revocations import Revocations
from certs.roles import Role
from superlink.demo import wait_for_superlink
from tests.federation import Running
from tests.records import record, run
from tests.serving import serving, wait_until
from tests.wire import ask, context

LOSSES = {"site-a": 3.0, "site-b": 2.0}


@dataclass
class Serving:
    """A running exporter."""

    port: int
    runs: Path
    superlink: Running
    processes: Processes

    @property
    def address(self) -> str:
        return f"localhost:{self.port}"

    def client(self, role: Role, name: str) -> httpx.Client:
        identity = Identity.load(self.superlink.identity(role, name), role)
        tls = client_context(identity, (identity.peer.federation, Role.EXPORTER, "exporter"))
        return httpx.Client(base_url=f"https://{self.address}", verify=tls, timeout=20)


@pytest.fixture(scope="module")
def exporter(
    tmp_path_factory: pytest.TempPathFactory, superlink: Running, free_port: Callable[[], int]
) -> Iterator[Serving]:
    """An exporter beside the SuperLink, whose runs directory is not there yet."""
    directory = tmp_path_factory.mktemp("exporter")
    running = Serving(free_port(), directory / "runs", superlink, Processes(directory))
    own = superlink.identity(Role.EXPORTER, "exporter")
    try:
        running.processes.start(
            "exporter",
            *("exporter", "--identity", str(own), "--superlink", superlink.address),
            *("--runs", str(running.runs), "--port", str(running.port)),
        )
        wait_for_superlink(running.processes, own, running.address)
        yield running
    finally:
        running.processes.stop()


@pytest.fixture
def own_pki(tmp_path: Path) -> Path:
    """Another federation's, or one whose files a test may spoil."""
    for _ in ensure_federation(tmp_path / "pki", "test", []):
        pass
    return tmp_path / "pki"


@pytest.fixture
def monitor(exporter: Serving) -> Iterator[httpx.Client]:
    with exporter.client(Role.MONITOR, "prometheus") as client:
        yield client


def test_runs_are_followed_and_told(exporter: Serving, monitor: httpx.Client) -> None:
    def told() -> str:
        return monitor.get("/metrics").text

    answer = monitor.get("/metrics")
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert "vlafleet_rounds_total" in answer.text
    assert "vlafleet_run_info{" not in answer.text
    assert 'vlafleet_certificate_expiry_timestamp_seconds{role="exporter"}' in answer.text
    assert "vlafleet_refusals_total" in answer.text
    assert monitor.get("/v1/status").json()["run"] is None
    directory = run(exporter.runs, [record(0, LOSSES)], rounds=2)
    wait_until(lambda: 'vlafleet_site_drops_total{reason="error",site="site-a"} 0' in told())
    assert 'vlafleet_disk_free_bytes{volume="runs"}' in monitor.get("/metrics").text
    journal = Journal(exporter.runs, directory.name)
    journal.append(record(1, LOSSES, committed=False))
    journal.close()
    wait_until(lambda: 'vlafleet_site_drops_total{reason="timeout",site="site-b"} 1' in told())
    document = monitor.get("/v1/status").json()
    assert (document["run"]["name"], document["run"]["round"]) == (directory.name, 1)
    assert (document["federation"], document["superlink"]) == ("test", "online")
    # The SuperLink's word: other tests may have let the sites' SuperNodes in, and out.
    assert {site["name"] for site in document["sites"]} >= set(LOSSES)
    assert {site["status"] for site in document["sites"]} <= {"registered", "online", "offline"}


def test_a_role_reads_what_it_needs(exporter: Serving) -> None:
    may = {
        (Role.MONITOR, "prometheus"): {"/metrics", "/v1/status", "/health"},
        (Role.OPERATOR, "admin"): {"/v1/status"},
        (Role.EXPORTER, "exporter"): {"/health"},
        (Role.SITE, "site-a"): set(),
        (Role.SUPEREXEC, "site-a"): set(),
        (Role.SUPEREXEC, "superlink"): set(),
        (Role.SUPERLINK, "superlink"): set(),
        (Role.ENROLMENT, "enrolment"): set(),
    }
    for (role, name), paths in may.items():
        with exporter.client(role, name) as client:
            for path in ("/metrics", "/v1/status", "/health", "/metrics/", "/"):
                status = client.get(path).status_code
                assert status == (200 if path in paths else 404), (role, name, path)


def test_nobody_without_a_certificate_gets_in(exporter: Serving, pki: Path) -> None:
    authority = exporter.superlink.authority
    for tls in (None, context(authority), context(authority, pki / "monitor" / "prometheus")):
        assert ask(exporter.port, "/metrics", tls, method="GET").refused_by_tls


def test_the_exporter_only_reads(monitor: httpx.Client) -> None:
    for method in ("POST", "PUT", "DELETE"):
        assert monitor.request(method, "/v1/status", content=b"{}").status_code == 405


def test_its_health_is_that_of_its_work(exporter: Serving) -> None:
    own = exporter.superlink.identity(Role.EXPORTER, "exporter")
    assert check(own, exporter.address) == f"exporter: {exporter.address} answers"


def test_it_ends_in_order_and_a_restart_loses_nothing(exporter: Serving) -> None:
    def ours() -> list[str]:
        with exporter.client(Role.MONITOR, "prometheus") as client:
            text = client.get("/metrics").text
        return re.findall(r"^vlafleet_(?!refus|failed|disk|certificate).*", text, re.MULTILINE)

    before = ours()
    assert any(line.startswith("vlafleet_rounds_total") for line in before)
    process = exporter.processes.running.pop("exporter")
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) in {0, -signal.SIGTERM}
    own = exporter.superlink.identity(Role.EXPORTER, "exporter")
    exporter.processes.start(
        "exporter",
        *("exporter", "--identity", str(own), "--superlink", exporter.superlink.address),
        *("--runs", str(exporter.runs), "--port", str(exporter.port)),
    )
    wait_for_superlink(exporter.processes, own, exporter.address)
    # The first answer is whole.
    assert ours() == before


def test_only_an_exporter_s_identity_is_taken(pki: Path, tmp_path: Path) -> None:
    with pytest.raises(CertificateError, match="needs one of role exporter"):
        cli.exporter(pki / "monitor" / "prometheus", "localhost:1", tmp_path)


def test_what_is_no_runs_directory_is_refused(
    pki: Path, tmp_path: Path, free_port: Callable[[], int]
) -> None:
    file = tmp_path / "runs"
    file.write_text("")
    with pytest.raises(StorageError, match=f"the runs in {file} cannot be listed"):
        cli.exporter(pki / "exporter" / "exporter", "localhost:1", file, port=free_port())
    bind(role=None)


def test_the_exporter_loads_neither_flower_nor_numpy() -> None:
    code = (
        "import vlafleet, app.exporter, sys; print(*{'flwr', 'numpy', 'torch'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


class Failing(Runs):
    """Runs whose next looks end in ``errors``."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.errors: list[Exception] = []

    def refresh(self) -> bool:
        if self.errors:
            raise self.errors.pop(0)
        return super().refresh()


def test_a_look_that_fails_is_said_once_and_followed_by_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    runs = Failing(tmp_path)
    followed = Followed(runs)
    runs.errors = [OSError("gone"), OSError("gone"), OSError("still")]
    run(tmp_path, [record(0, LOSSES)])
    for _ in range(3):
        followed.look()
        assert followed.view.config is None
    assert [each.exc_info[1].args for each in caplog.records] == [("gone",), ("still",)]  # type: ignore[index,union-attr]
    followed.look()
    assert followed.view.config is not None
    assert b"vlafleet_run_info{" in followed.text


def test_what_cannot_be_rendered_is_rendered_when_it_can(tmp_path: Path) -> None:
    """A text that stays as it was must not pass for a new one."""

    class Odd(Runs):
        odd = True

        def refresh(self) -> bool:
            changed = super().refresh()
            if self.odd and self.view.config is not None:
                self.view = View(totals=Totals(drops={"site-a": None}))  # type: ignore[dict-item]
            return changed

    runs = Odd(tmp_path)
    followed = Followed(runs)
    read_at = followed.read_at
    run(tmp_path, [record(0, LOSSES)])
    followed.look()
    followed.look()
    assert followed.read_at == read_at
    runs.odd = False
    runs.view = View(unreadable=5)
    followed.look()
    assert followed.read_at > read_at
    assert b"vlafleet_unreadable_runs 5" in followed.text


async def _asked(application: Any, method: str = "GET") -> tuple[int, bytes]:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    await application({"method": method}, None, send)
    return sent[0]["status"], sent[1]["body"]


def test_a_scrape_renders_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With 100 sites the text takes longer to make than a scrape may (benchmarks/exporter)."""
    run(tmp_path, [record(0, LOSSES)])
    followed = Followed(Runs(tmp_path))
    rendered: list[View] = []

    def families(view: View) -> Iterator[None]:
        rendered.append(view)
        return iter(())

    monkeypatch.setattr("app.run_metrics.families", families)
    _, metrics = rules("test", followed, lambda: None)["/metrics"]
    followed.look()
    status, body = asyncio.run(_asked(metrics))
    assert (status, rendered) == (200, [])
    assert b"vlafleet_run_info{" in body
    (tmp_path / "17" / "progress.json").write_text("{}")
    followed.look()
    assert rendered == [followed.view]


def test_what_is_old_is_not_served(tmp_path: Path) -> None:
    """Prometheus then says that the exporter is down, and nobody takes the old figures for a quiet federation."""
    followed = Followed(Runs(tmp_path))
    served = rules("test", followed, lambda: None)
    for path in ("/metrics", "/v1/status", "/health"):
        _, application = served[path]
        followed.read_at = time.monotonic()
        assert asyncio.run(_asked(application))[0] == 200
        followed.read_at = time.monotonic() - 61
        assert asyncio.run(_asked(application))[0] == 503


def test_the_thread_looks_until_it_is_stopped(tmp_path: Path) -> None:
    followed = Followed(Runs(tmp_path / "runs"))
    followed.start()
    run(tmp_path / "runs", [record(0, LOSSES)])
    wait_until(lambda: followed.view.config is not None)
    followed.stop()
    assert not followed.is_alive()


def test_a_revoked_operator_is_out_within_seconds(exporter: Serving) -> None:
    """The exporter learns it from the SuperLink; a connection that is open ends, too."""
    pki = exporter.superlink.pki
    authority = Authority.load(authority_directory(pki))
    leaver = exporter.superlink.identity(Role.OPERATOR, "leaver")
    ensure_identity(authority, leaver, Role.OPERATOR, "leaver")
    with exporter.client(Role.OPERATOR, "leaver") as client:
        assert client.get("/v1/status").status_code == 200
        revoked_at = time.monotonic()
        authority.revoke(Role.OPERATOR, "leaver")
        superlink = Identity.load(
            exporter.superlink.identity(Role.SUPERLINK, "superlink"), Role.SUPERLINK
        )
        write_atomic(superlink.crl, authority.crl.read_bytes())
        wait_until(lambda: _refused(client))
        assert time.monotonic() - revoked_at < 10  # three seconds, and what a busy machine takes
    with exporter.client(Role.OPERATOR, "leaver") as client, pytest.raises(httpx.TransportError):
        client.get("/v1/status")
    with exporter.client(Role.OPERATOR, "admin") as client:
        assert client.get("/v1/status").status_code == 200
    # It stays out while the SuperLink is away: the list is kept.
    own = Identity.load(exporter.superlink.identity(Role.EXPORTER, "exporter"), Role.EXPORTER)
    assert own.crl.read_bytes() == authority.crl.read_bytes()


def _refused(client: httpx.Client) -> bool:
    try:
        return client.get("/v1/status").status_code == 404
    except httpx.TransportError:
        return True


def test_without_its_revocation_list_nobody_is_served(
    own_pki: Path, tmp_path: Path, free_port: Callable[[], int]
) -> None:
    own = own_pki / "exporter" / "exporter"
    (own / "crl.pem").unlink()
    with pytest.raises(CertificateError, match="revocation list"):
        cli.exporter(own, "localhost:1", tmp_path, port=free_port())
    bind(role=None)


def test_a_list_that_is_not_the_authority_s_is_not_taken(
    identity: Callable[[Role, str], Identity], own_pki: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A list of another federation, a refusal and no answer: the last good one stays in force, which is said once."""
    foreign = Authority.load(authority_directory(own_pki)).crl.read_bytes()
    answers = [(200, foreign), (200, b"no list"), (404, b""), (200, foreign)]
    asked: list[str] = []

    async def crl(scope: Any, _receive: Any, send: Any) -> None:
        status, body = answers[len(asked)]
        asked.append(scope["method"])
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": body})

    own = identity(Role.EXPORTER, "exporter")
    revocations = Revocations(own.crl, own.authority)
    before = own.crl.read_bytes()
    with serving(identity(Role.SUPERLINK, "superlink"), rules={"/v1/crl": (_anybody, crl)}) as it:
        superlink = SuperLink(own, f"localhost:{it.port}")
        for _ in answers:
            superlink.take_list(revocations)
    superlink.take_list(revocations)
    superlink.take_list(revocations)
    assert asked == ["GET"] * 4
    assert own.crl.read_bytes() == before
    said = [
        one.message for one in caplog.records if "who is revoked stays as it was" in one.message
    ]
    assert len(said) == 5


async def _anybody(_peer: object, _headers: object) -> None:
    """Let every peer pass."""


def test_a_superlink_that_is_not_there_is_nobody_s_word(
    identity: Callable[[Role, str], Identity],
    free_port: Callable[[], int],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("app.superlink_client._NODES_SECONDS", 0.0)
    superlink = SuperLink(identity(Role.EXPORTER, "exporter"), f"localhost:{free_port()}")
    assert superlink.nodes() is None
    assert superlink.nodes() is None
    assert len(caplog.messages) == 1


def test_the_superlink_is_asked_with_the_exporter_s_certificate(
    identity: Callable[[Role, str], Identity], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    bodies = [b'{"sites": [{"name": "site-a"}]}', b"[]", b"{}", b"no json"]

    async def sites(scope: Any, _receive: Any, send: Any) -> None:
        asked.append(scope["state"]["peer"].role)
        body = bodies[(len(asked) - 1) % len(bodies)]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": body})

    with serving(
        identity(Role.SUPERLINK, "superlink"), rules={"/v1/sites": (_anybody, sites)}
    ) as running:
        superlink = SuperLink(identity(Role.EXPORTER, "exporter"), f"localhost:{running.port}")
        # However many watch, it is asked once in two seconds.
        assert [superlink.nodes(), superlink.nodes()] == [[{"name": "site-a"}]] * 2
        assert asked == [Role.EXPORTER]
        monkeypatch.setattr("app.superlink_client._NODES_SECONDS", 0.0)
        superlink = SuperLink(identity(Role.EXPORTER, "exporter"), f"localhost:{running.port}")
        assert [superlink.nodes() for _ in bodies[1:]] == [None] * 3
    before = len(asked)
    # A site that listens there is not the SuperLink.
    with serving(identity(Role.SITE, "site-a"), rules={"/v1/sites": (_anybody, sites)}) as running:
        superlink = SuperLink(identity(Role.EXPORTER, "exporter"), f"localhost:{running.port}")
        assert superlink.nodes() is None
    assert len(asked) == before
