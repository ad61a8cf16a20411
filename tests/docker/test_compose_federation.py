"""``docker compose up`` for real: the demo run, what each container can reach, and what stays behind.

Grafana is left out: where no image registry answers there is none. Its dashboards' queries are asked of Prometheus.
"""

import json
import socket
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.docker.compose_project import Project
from tests.monitoring.queries import queries

pytestmark = [pytest.mark.docker, pytest.mark.slow, pytest.mark.timeout(2400)]

LONG_RUNNING = {
    "superlink", "enrolment", "superexec", "site-a", "site-a-app", "site-b", "site-b-app", "prometheus",
    "prometheus-identity", "exporter", "alertmanager",
}  # fmt: skip
ONE_SHOT = {"pki", "register", "run"}

# Says for each address whether a TCP connection opens within 2 s; a closed port is an answer too.
REACH = """
import errno, socket, sys
for target in sys.argv[1:]:
    host, _, port = target.rpartition(":")
    try:
        socket.create_connection((host, int(port)), 2).close()
        print(target, "open")
    except ConnectionRefusedError:
        print(target, "refused")
    except OSError:
        print(target, "unreachable")
"""


@dataclass(frozen=True)
class Federation:
    """The running demo federation."""

    project: Project


def records(project: Project) -> list[dict[str, Any]]:
    """Return the run's journal so far."""
    journal = project.compose("exec", "-T", "superexec", "cat", "/runs/latest/rounds.jsonl")
    return [json.loads(line) for line in journal.stdout.splitlines()]


def committed(project: Project) -> bool:
    """Whether round 1's model is on disk; it appears in one rename, before it is evaluated."""
    checkpoint = "/runs/latest/checkpoints/round-0001"
    return project.compose("exec", "-T", "superexec", "test", "-e", checkpoint).returncode == 0


def checkpoints(project: Project) -> list[str]:
    """Return the names of the run's checkpoints so far."""
    listed = project.execute("superexec", "ls", "/runs/latest/checkpoints").split()
    return [name for name in listed if name.startswith("round-")]


def reached(project: Project, service: str, *targets: str) -> dict[str, str]:
    """Return what a process in the service's container gets from each target."""
    printed = project.execute(service, "python", "-c", REACH, *targets)
    return dict(line.rsplit(" ", 1) for line in printed.splitlines())


@pytest.fixture(scope="module")
def federation(project: Project) -> Iterator[Federation]:
    """The demo federation, up to its first committed round; taken down at the end."""
    try:
        started = time.monotonic()
        up = project.compose("up", "--detach", "--no-build", *LONG_RUNNING, *ONE_SHOT, timeout=300)
        assert up.returncode == 0, up.stdout + up.stderr + project.output("logs", "--no-color")
        while not committed(project):
            run = project.containers()["run"]
            log = "logs", "--no-color", "--tail", "40"
            assert run["State"] == "running", project.output(*log, "run", "superexec", "site-a-app")
            assert time.monotonic() - started < 600, project.output(*log, "run")
            time.sleep(1)
        yield Federation(project)
    finally:
        project.compose("down", "--volumes", "--timeout", "10")


def test_the_first_round_is_committed(federation: Federation) -> None:
    """How soon is measured by ``benchmarks/first_round``: a test must not fail on a busy machine."""
    assert 1 in [int(name[-4:]) for name in checkpoints(federation.project)]


def test_every_service_is_healthy(federation: Federation) -> None:
    containers = federation.project.containers()
    assert {containers[name]["Health"] for name in LONG_RUNNING} == {"healthy"}
    assert {containers[name]["ExitCode"] for name in ("pki", "register")} == {0}


def test_processes_run_without_privileges(federation: Federation) -> None:
    for service in LONG_RUNNING - {"prometheus", "alertmanager"}:
        status = federation.project.execute(service, "cat", "/proc/self/status")
        fields = dict(line.split(":\t", 1) for line in status.splitlines())
        assert fields["Uid"].split() == ["10001"] * 4
        assert int(fields["CapEff"], 16) == 0
        assert fields["NoNewPrivs"] == "1"
        denied = federation.project.compose("exec", "-T", service, "touch", "/opt/vlafleet/x")
        assert "Read-only file system" in denied.stderr


def test_a_sites_app_reaches_its_own_supernode_only(
    federation: Federation, free_port: Callable[[], int]
) -> None:
    project = federation.project
    superlink = project.addresses("superlink")
    uplink = f"{superlink['site-a-uplink']}:9092"
    own = f"{project.addresses('site-a')['site-a-inner']}:9094"
    # The probe tells open from closed: the SuperNode reaches the SuperLink, the app its SuperNode.
    assert reached(project, "site-a", uplink, "superlink:9092") == {
        uplink: "open",
        "superlink:9092": "open",
    }
    assert reached(project, "site-a-app", own) == {own: "open"}
    # A service of this machine that listens on every address, as another container would find it.
    with socket.create_server(("0.0.0.0", free_port())) as listener:  # noqa: S104
        port = listener.getsockname()[1]
        gateways = {
            network["IPAM"]["Config"][0]["Gateway"]
            for network in _networks(project)
            if network["IPAM"]["Config"]
        }
        elsewhere = [
            "superlink:9092",
            "site-b:9094",
            *(f"{address}:9092" for address in superlink.values()),
            *(f"{address}:9094" for address in project.addresses("site-b").values()),
            *(f"{address}:9090" for address in project.addresses("prometheus").values()),
            *(f"{gateway}:{port}" for gateway in gateways),
            "192.0.2.1:443",  # TEST-NET-1 (RFC 5737) stands for every address outside
            "example.org:443",
        ]
        for app in ("site-a-app", "superexec"):
            others = [target for target in elsewhere if app != "superexec" or "9092" not in target]
            assert set(reached(project, app, *others).values()) == {"unreachable"}


def test_a_supernode_reaches_the_superlink_but_not_the_outside(federation: Federation) -> None:
    project = federation.project
    elsewhere = [
        "192.0.2.1:443",
        *(f"{address}:9094" for address in project.addresses("site-b").values()),
        *(f"{address}:9090" for address in project.addresses("prometheus").values()),
    ]
    assert set(reached(project, "site-a", *elsewhere).values()) == {"unreachable"}


def test_an_app_container_has_no_key_of_its_site(federation: Federation) -> None:
    project = federation.project
    app = project.execute("site-a-app", "ls", "/identity").split()
    assert sorted(app) == ["ca.crt", "tls.crt", "tls.key"]
    inspected = project.execute(
        "site-a-app", "vlafleet", "certs", "inspect", "/identity/tls.crt"
    ).splitlines()[0]
    assert inspected == "spiffe://demo/superexec/site-a"
    # And the SuperNode, which has the keys, has no data.
    assert "data" not in project.execute("site-a", "ls", "/").split()
    assert "info.json" in project.execute("site-a-app", "ls", "/data/meta").split()


def test_data_cannot_be_written_by_the_app(federation: Federation) -> None:
    denied = federation.project.compose("exec", "-T", "site-a-app", "touch", "/data/x")
    assert "Read-only file system" in denied.stderr


def test_the_run_completes_and_its_artefacts_can_be_copied_out(
    federation: Federation, tmp_path: Path
) -> None:
    project = federation.project
    deadline = time.monotonic() + 900
    while project.containers()["run"]["State"] == "running" and time.monotonic() < deadline:
        time.sleep(2)
    log = project.output("logs", "--no-color", "--tail", "30", "run")
    assert project.containers()["run"]["ExitCode"] == 0, log
    project.output("cp", "superexec:/runs", str(tmp_path / "runs"))
    rounds = [record["round"] for record in records(project)]
    assert rounds == [0, 1, 2, 3]
    assert list(tmp_path.glob("runs/*/checkpoints/round-0003/model.safetensors"))


def test_prometheus_scrapes_every_server_and_every_panel_has_data(federation: Federation) -> None:
    project = federation.project
    up = {sample["metric"]["job"]: sample["value"][1] for sample in _query(project, "up")}
    jobs = ("superlink", "enrolment", "exporter", "prometheus", "alertmanager")
    assert up == dict.fromkeys(jobs, "1")
    for query in queries():
        # No GPU here, and the sites' own exporters are their labs' to ask.
        if not (query.needs_gpu or query.needs_site_exporter):
            assert _query(project, query.expr), query
    online = _query(project, "vlafleet_site_online")
    assert {sample["metric"]["site"]: sample["value"][1] for sample in online} == {
        "site-a": "1",
        "site-b": "1",
    }


def test_the_operators_commands_work_from_the_run_service(federation: Federation) -> None:
    listed = federation.project.output("run", "--rm", "--no-deps", "run", "site", "list")
    rows = [line.split()[:2] for line in listed.splitlines() if line.startswith("site-")]
    assert rows == [["site-a", "online"], ["site-b", "online"]]
    status = json.loads(
        federation.project.output("run", "--rm", "--no-deps", "run", "status", "--json")
    )
    assert status["run"]["ended"]["reason"] == "completed"
    assert {site["name"]: site["status"] for site in status["sites"]} == {
        "site-a": "online",
        "site-b": "online",
    }
    flwr = federation.project.output(
        "run", "--rm", "--no-deps", "run", "flwr", "ls", "--format", "json"
    )
    runs = json.loads(flwr[flwr.index("{") :])["runs"]
    assert [run["status"] for run in runs] == ["finished:completed"]


def test_a_second_up_changes_nothing(federation: Federation) -> None:
    project = federation.project
    before = project.execute("superlink", "cat", "/identity/tls.crt")
    project.output("up", "--detach", "--no-build", "--no-deps", "pki", "register")
    deadline = time.monotonic() + 60
    while any(project.containers()[name]["State"] == "running" for name in ("pki", "register")):
        assert time.monotonic() < deadline
        time.sleep(1)
    containers = project.containers()
    assert {containers[name]["ExitCode"] for name in ("pki", "register")} == {0}
    assert project.execute("superlink", "cat", "/identity/tls.crt") == before


# The last test of this module: nothing after it has a federation.
def test_down_leaves_nothing(federation: Federation) -> None:
    federation.project.output("down", "--volumes")
    assert federation.project.leftovers() == {"containers": [], "volumes": [], "networks": []}


def test_missing_datasets_are_refused_in_a_sentence(project: Project, tmp_path: Path) -> None:
    missing = Project(
        f"{project.name}-missing", {**project.environment, "VLAFLEET_DATA": str(tmp_path / "none")}
    )
    try:
        refused = missing.compose("up", "--no-build", "--detach", "site-a-app")
        assert refused.returncode != 0
        assert "bind source path does not exist" in refused.stderr
        assert str(tmp_path / "none" / "site-a") in refused.stderr
        assert not (tmp_path / "none").exists()
    finally:
        missing.compose("down", "--volumes")


def _networks(project: Project) -> list[dict[str, Any]]:
    from tests.docker.compose_project import docker

    found: list[dict[str, Any]] = json.loads(
        docker("network", "inspect", *project.leftovers()["networks"])
    )
    return found


def _query(project: Project, expression: str) -> list[dict[str, Any]]:
    """Ask Prometheus, for as long as the first scrapes take."""
    port = project.environment["VLAFLEET_PROMETHEUS_PORT"]
    url = f"http://127.0.0.1:{port}/api/v1/query?" + urllib.parse.urlencode({"query": expression})
    deadline = time.monotonic() + 30
    while True:
        with urllib.request.urlopen(url, timeout=10) as answer:
            result: list[dict[str, Any]] = json.load(answer)["data"]["result"]
        if result or time.monotonic() > deadline:
            return result
        time.sleep(1)
