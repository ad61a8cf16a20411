"""Prometheus and Alertmanager with the project's own configuration, on loopback, and who is told."""

import contextlib
import functools
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import yaml

from certs.parent import end_with_parent
from tests.monitoring.tools import prometheus_tools
from tests.tools import ROOT

# Both listen within a second or two.
_START_S = 60.0
_STOP_S = 15.0
# Labels that say which process was scraped, how urgent an alert is, and where it stands.
_NOT_WHOSE = {"__name__", "alertname", "alertstate", "instance", "severity"}


@dataclass(frozen=True, order=True)
class Alert:
    """An alert by what tells it from others: its name and the labels that say whose it is."""

    name: str
    labels: tuple[tuple[str, str], ...] = ()

    @classmethod
    def make(cls, name: str, /, **labels: str) -> "Alert":
        """The alert of this name and these labels."""
        return cls(name, tuple(sorted(labels.items())))

    @classmethod
    def of(cls, labels: Mapping[str, str]) -> "Alert":
        """The alert of a label set."""
        own = {key: value for key, value in labels.items() if key not in _NOT_WHOSE}
        return cls.make(labels["alertname"], **own)

    def __str__(self) -> str:
        return f"{self.name}{{{', '.join(f'{key}={value}' for key, value in self.labels)}}}"


@dataclass
class Webhook:
    """What a receiver was sent by Alertmanager, each with its Unix time."""

    address: str
    received: list[tuple[float, dict[str, Any]]] = field(default_factory=list)

    def told(self, status: str = "firing") -> dict[Alert, float]:
        """When each alert was first told of with this status."""
        first: dict[Alert, float] = {}
        for moment, body in list(self.received):
            for alert in body["alerts"]:
                if alert["status"] == status:
                    first.setdefault(Alert.of(alert["labels"]), moment)
        return first

    def sent(self) -> list[dict[str, Any]]:
        """Every alert of every notification, as it came."""
        return [alert for _, body in list(self.received) for alert in body["alerts"]]


@dataclass(frozen=True)
class Monitoring:
    """A running Prometheus and Alertmanager."""

    prometheus: str
    alertmanager: str
    webhook: Webhook

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The samples of an instant query; ``AssertionError`` with Prometheus' own words where it is none."""
        answer = httpx.post(
            f"{self.prometheus}/api/v1/query", data={"query": expression}, timeout=30
        ).json()
        assert answer["status"] == "success", (expression, answer)
        assert answer["data"]["resultType"] == "vector", (expression, answer)
        samples: list[dict[str, Any]] = answer["data"]["result"]
        return samples

    def shows(self, expression: str, since: float) -> bool:
        """Whether a panel shows something: there are samples now, and since then (Unix time) one was a number."""
        if not self.query(expression):
            return False
        span = {"query": expression, "start": since, "end": time.time(), "step": 1}
        answer = httpx.post(f"{self.prometheus}/api/v1/query_range", data=span, timeout=30).json()
        assert answer["status"] == "success", (expression, answer)
        series = answer["data"]["result"]
        return any(value != "NaN" for each in series for _, value in each["values"])

    def alerts(self, state: str = "firing") -> set[Alert]:
        """The alerts that Prometheus has in a state: pending or firing."""
        found = httpx.get(f"{self.prometheus}/api/v1/alerts", timeout=30).json()["data"]["alerts"]
        return {Alert.of(alert["labels"]) for alert in found if alert["state"] == state}

    def fired(self) -> dict[Alert, float]:
        """When each alert that fires, or did, began to (Unix time), by Prometheus' own record."""
        first = 'min_over_time(timestamp(ALERTS{alertstate="firing"})[30m:1s])'
        return {
            Alert.of(sample["metric"]): float(sample["value"][1]) for sample in self.query(first)
        }

    def values(self) -> dict[str, str]:
        """What each pending or firing alert's expression says, for a failure's message."""
        found = httpx.get(f"{self.prometheus}/api/v1/alerts", timeout=30).json()["data"]["alerts"]
        return {f"{alert['state']} {alert['labels']}": alert["value"] for alert in found}

    def routed(self, state: str = "active") -> set[Alert]:
        """The alerts that Alertmanager has: active, or suppressed by another."""
        found = httpx.get(f"{self.alertmanager}/api/v2/alerts", timeout=30).json()
        return {Alert.of(alert["labels"]) for alert in found if alert["status"]["state"] == state}

    def targets(self) -> dict[str, str]:
        """The health of every target, by job and address; what went wrong where it is not up."""
        found = httpx.get(f"{self.prometheus}/api/v1/targets?state=active", timeout=30).json()
        return {
            f"{target['labels']['job']} {target['labels']['instance']}": target["lastError"]
            or target["health"]
            for target in found["data"]["activeTargets"]
        }


@contextlib.contextmanager
def watching(
    directory: Path,
    targets: Mapping[str, str],
    sites: Mapping[str, str],
    identity: Path,
    ports: tuple[int, int],
) -> Iterator[Monitoring]:
    """Run Prometheus and Alertmanager; yield when every target was scraped.

    ``targets`` maps a job of the project's ``prometheus.yml`` to where that process listens, ``sites`` a site to its
    SuperNode; ``identity`` is the monitor's. Rules and routes are the project's, unchanged; only intervals are a
    second, and addresses and paths this machine's.
    """
    tools = prometheus_tools()
    prometheus, alertmanager = (f"127.0.0.1:{port}" for port in ports)
    directory.mkdir(parents=True)
    own = {"prometheus": prometheus, "alertmanager": alertmanager}
    config = derived({**targets, **own}, identity)
    (directory / "prometheus.yml").write_text(yaml.safe_dump(config))
    (directory / "sites").mkdir()
    entries = [{"targets": [address], "labels": {"site": site}} for site, address in sites.items()]
    (directory / "sites" / "sites.yml").write_text(yaml.safe_dump(entries))
    with contextlib.ExitStack() as stack:
        webhook = stack.enter_context(receiving())
        stack.enter_context(
            running(
                directory / "alertmanager.log",
                # The start script of the container, with this machine's addresses.
                ["sh", str(ROOT / "docker" / "alertmanager" / "start.sh"),
                 f"--web.listen-address={alertmanager}", "--cluster.listen-address=",
                 f"--storage.path={directory / 'alertmanager'}"],
                PATH=f"{tools}:{os.environ['PATH']}",
                VLAFLEET_ALERT_WEBHOOK=webhook.address,
                TMPDIR=str(directory),
            )
        )  # fmt: skip
        stack.enter_context(
            running(
                directory / "prometheus.log",
                [str(tools / "prometheus"), f"--config.file={directory / 'prometheus.yml'}",
                 f"--storage.tsdb.path={directory / 'tsdb'}", f"--web.listen-address={prometheus}"],
            )
        )  # fmt: skip
        started = Monitoring(f"http://{prometheus}", f"http://{alertmanager}", webhook)
        wait_ready(f"http://{alertmanager}/-/ready", directory / "alertmanager.log")
        wait_ready(f"http://{prometheus}/-/ready", directory / "prometheus.log")
        deadline = time.monotonic() + _START_S
        expected = len(config["scrape_configs"]) - 1 + len(sites)
        while list((found := started.targets()).values()) != ["up"] * expected:
            assert time.monotonic() < deadline, found
            time.sleep(0.2)
        yield started


def derived(targets: Mapping[str, str], identity: Path) -> dict[str, Any]:
    """The project's ``prometheus.yml`` with a second between scrapes, and between evaluations, and these addresses."""
    place = ROOT / "docker" / "prometheus"
    config: dict[str, Any] = yaml.safe_load((place / "prometheus.yml").read_text())
    config["global"] |= {"scrape_interval": "1s", "evaluation_interval": "1s"}
    jobs = {job["job_name"]: job for job in config["scrape_configs"]}
    assert jobs.keys() == targets.keys() | {"site"}, "a job that no process of the test answers to"
    for name, job in jobs.items():
        assert not {"scrape_interval", "scrape_timeout"} & job.keys(), name
        if name in targets:
            job["static_configs"] = [{"targets": [targets[name]]}]
        for key in {"ca_file", "cert_file", "key_file"} & job.get("tls_config", {}).keys():
            job["tls_config"][key] = str(identity / Path(job["tls_config"][key]).name)
    config["rule_files"] = [str(place / Path(file).name) for file in config["rule_files"]]
    (managers,) = config["alerting"]["alertmanagers"]
    managers["static_configs"] = [{"targets": [targets["alertmanager"]]}]
    return config


@contextlib.contextmanager
def receiving() -> Iterator[Webhook]:
    """Take notifications on a port of loopback."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            webhook.received.append((time.time(), body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        webhook = Webhook(f"http://127.0.0.1:{server.server_port}/")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield webhook
        finally:
            server.shutdown()


@contextlib.contextmanager
def running(log: Path, command: Sequence[str], **environment: str) -> Iterator[None]:
    """Run a process that ends with the block, and with this process."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=log.parent,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
            preexec_fn=functools.partial(end_with_parent, signal.SIGTERM),  # noqa: PLW1509
        )
    try:
        yield
        assert process.poll() is None, log.read_text()[-2000:]
    finally:
        process.terminate()
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_ready(address: str, log: Path) -> None:
    """Return once the address answers 200; ``AssertionError`` with the end of the log when it takes a minute."""
    deadline = time.monotonic() + _START_S
    while True:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(address, timeout=5).status_code == httpx.codes.OK:
                return
        assert time.monotonic() < deadline, log.read_text()[-2000:]
        time.sleep(0.1)
