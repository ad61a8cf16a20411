"""What a site's SuperExec reports of a real trainer process, over mutual TLS; and that what hangs does not stop it."""

import contextlib
import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import get_args

import pytest
from prometheus_client.parser import text_string_to_metric_families

from app import site_report, supervisor
from app.job import Job, Kind
from app.prefix_cache import PrefixCache
from app.site_report import Reporter, Source
from app.supervisor import supervised
from app.trainer_client import submit
from app.trainer_metrics import Metrics, Result
from certs import nvml, site_metrics
from certs.guard import Receive, Scope, Send, read_body
from certs.identity import Identity
from certs.metric import REPORT_PATH
from certs.nvml import Driver, Gpu, NoDriverError
from certs.roles import Role
from supernode.metrics import parse
from tests.serving import Serving, anybody, echo, serving

STANDIN = (sys.executable, "-P", str(Path(__file__).parents[1] / "trainer_standin.py"))
LONG = 60.0


def until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def samples(text: str) -> dict[str, float]:
    """Every series with its value; a report has each family once."""
    families = list(text_string_to_metric_families(text))
    assert len({family.name for family in families}) == len(families)
    return {
        sample.name + "".join(sorted(sample.labels.values())): sample.value
        for family in families
        for sample in family.samples
    }


class SuperNode:
    """Takes reports as a SuperNode does, and keeps them; ``status`` is its answer."""

    def __init__(self) -> None:
        self.reports: list[dict[str, float]] = []
        self.status = 204

    @property
    def last(self) -> dict[str, float]:
        return self.reports[-1] if self.reports else {}

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        body = await read_body(receive, site_metrics.MAX_REPORT_BYTES)
        assert body is not None
        if self.status == 204:
            assert parse(body)
            self.reports.append(samples(body.decode()))
        await send({"type": "http.response.start", "status": self.status})
        await send({"type": "http.response.body", "body": b"No." if self.status > 204 else b""})


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Twenty reports a second, each true for one; a home of the test's own."""
    monkeypatch.setattr(site_report, "REPORT_SECONDS", 0.05)
    monkeypatch.setattr(site_report, "_FRESH_S", 1.0)
    monkeypatch.setattr(supervisor, "_PAUSE_S", 0.05)
    monkeypatch.setenv("VLAFLEET_HOME", str(tmp_path))


@pytest.fixture
def superexec(identity: Callable[[Role, str], Identity], tmp_path: Path) -> Identity:
    return identity(Role.SUPEREXEC, "site-a")


@pytest.fixture
def node() -> SuperNode:
    return SuperNode()


@pytest.fixture
def server(identity: Callable[[Role, str], Identity], node: SuperNode) -> Iterator[Serving]:
    site = identity(Role.SITE, "site-a")
    with serving(site, rules={REPORT_PATH: (anybody, node), "/echo": (anybody, echo)}) as running:
        yield running


@contextlib.contextmanager
def reporting(superexec: Identity, server: Serving, trainer: Path | None) -> Iterator[Reporter]:
    reporter = Reporter(superexec, f"localhost:{server.port}", trainer)
    reporter.start()
    try:
        yield reporter
    finally:
        reporter.stop()


def has(node: SuperNode, **wanted: float) -> Callable[[], bool]:
    return lambda: wanted.items() <= node.last.items()


def test_a_site_is_reported(
    superexec: Identity,
    server: Serving,
    node: SuperNode,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Nobody has made it yet.
    monkeypatch.setenv("VLAFLEET_HOME", str(tmp_path / "home"))
    with supervised(STANDIN) as path, reporting(superexec, server, path):
        # From the first report on, so that an increase is seen: nothing has answered yet.
        until(lambda: node.reports, "no report")
        first = node.reports[0]
        assert (first["vlafleet_trainer_up"], first["vlafleet_trainer_restarts_total"]) == (0, 0)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("VLAFLEET_TRAINER", str(path))
            submit(Job("train", {}, {"do": "echo"}))
        until(has(node, vlafleet_trainer_up=1, vlafleet_trainer_step=3), "the trainer is not told")
        until(lambda: "vlafleet_disk_size_bytessite" in node.last, "the disk is not told")
        told = node.last
        assert told["vlafleet_trainer_jobs_totalcompletedtrain"] == 1
        usage = shutil.disk_usage(tmp_path)
        assert told["vlafleet_disk_size_bytessite"] == usage.total
        assert told["vlafleet_disk_free_bytessite"] == pytest.approx(usage.free, rel=0.1)
        assert told["vlafleet_certificate_expiry_timestamp_secondssuperexec"] == (
            superexec.not_after.timestamp()
        )
    assert server.refused == []


def test_a_trainer_that_ends_is_counted_and_one_that_is_stopped_is_down(
    superexec: Identity, server: Serving, node: SuperNode
) -> None:
    with supervised(STANDIN) as path, reporting(superexec, server, path):
        until(has(node, vlafleet_trainer_up=1), "the trainer is not up")
        pid = pid_of(path)
        os.kill(pid, signal.SIGSTOP)
        until(has(node, vlafleet_trainer_up=0), "a trainer that is stopped is up")
        reports = len(node.reports)
        until(lambda: len(node.reports) > reports + 5, "the others are not reported")
        assert "vlafleet_trainer_step" not in node.last
        assert "vlafleet_disk_free_bytessite" in node.last
        os.kill(pid, signal.SIGCONT)
        until(has(node, vlafleet_trainer_up=1), "it is not up again")
        os.kill(pid, signal.SIGKILL)
        until(has(node, vlafleet_trainer_restarts_total=1), "its end is not counted")
        until(has(node, vlafleet_trainer_up=1), "the next one is not up")


def test_a_site_whose_tasks_are_pods_has_no_trainer_to_report(
    superexec: Identity, server: Serving, node: SuperNode, tmp_path: Path
) -> None:
    """Neither one that is down: its disk, certificate and contact are reported all the same."""
    with reporting(superexec, server, None):
        until(lambda: "vlafleet_disk_size_bytessite" in node.last, "the disk is not told")
        told = node.last
        assert not [name for name in told if name.startswith("vlafleet_trainer")]
        assert told["vlafleet_disk_size_bytessite"] == shutil.disk_usage(tmp_path).total
        assert "vlafleet_certificate_expiry_timestamp_secondssuperexec" in told
    assert server.refused == []


def pid_of(path: Path) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLAFLEET_TRAINER", str(path))
        return int(submit(Job("train", {}, {"do": "echo"})).metrics["who"]["pid"])


def test_a_trainer_that_does_not_start_has_one_connection_that_waits(
    superexec: Identity, server: Serving, node: SuperNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its socket is the supervisor's: what gives up stays in the queue, where jobs would find no place."""
    connected: list[int] = []
    connect = socket.socket.connect

    def counted(this: socket.socket, address: object) -> None:
        if this.family == socket.AF_UNIX:
            connected.append(1)
        connect(this, address)  # type: ignore[arg-type]

    monkeypatch.setattr(socket.socket, "connect", counted)
    with supervised((sys.executable, "-c", "")) as path, reporting(superexec, server, path):
        until(lambda: node.last.get("vlafleet_trainer_restarts_total", 0) >= 3, "not restarted")
        assert node.last["vlafleet_trainer_up"] == 0
        assert connected == [1]


def test_a_driver_that_hangs_stops_nothing_else(
    superexec: Identity, server: Serving, node: SuperNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    over, asked = threading.Event(), threading.Event()

    def hang() -> Driver:
        asked.set()
        over.wait()
        raise NoDriverError("no NVIDIA driver is installed")

    monkeypatch.setattr(nvml, "read", hang)
    with supervised(STANDIN) as path, reporting(superexec, server, path):
        assert asked.wait(LONG)
        until(has(node, vlafleet_trainer_up=1), "the trainer is not told")
        assert "vlafleet_disk_free_bytessite" in node.last
        over.set()


def test_every_gpu_is_told_by_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = [
        Gpu("GPU-a", "NVIDIA A10", 24, 20, (8, 6), 1, 0.25),
        # A part of one (MIG), and one whose driver says little.
        Gpu("GPU-b", "NVIDIA H100", 80, 80, (9, 0), 0, None),
        Gpu("GPU-c", "NVIDIA Thor", None, None, None, 0, 0.5),
        *[Gpu("GPU-d", "NVIDIA A10", 24, 20, (8, 6), 1, 0.25)] * 20,
    ]
    monkeypatch.setattr(nvml, "read", lambda: Driver("580", (13, 0), gpus))
    told = samples(site_report._text(site_report._Gpus()))
    assert told["vlafleet_gpu_memory_used_bytes0"] == 4
    assert told["vlafleet_gpu_memory_size_bytes0"] == 24
    assert told["vlafleet_gpu_utilization_ratio0"] == 0.25
    assert told["vlafleet_gpu_memory_used_bytes1"] == 0
    assert told["vlafleet_gpu_utilization_ratio2"] == 0.5
    assert "vlafleet_gpu_utilization_ratio1" not in told
    assert "vlafleet_gpu_memory_used_bytes2" not in told
    assert "vlafleet_gpu_memory_used_bytes15" in told
    assert "vlafleet_gpu_memory_used_bytes16" not in told


def test_without_a_gpu_none_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> Driver:
        raise NoDriverError("no NVIDIA driver is installed")

    monkeypatch.setattr(nvml, "read", none)
    assert site_report._text(site_report._Gpus()) == ""


def test_a_supernode_that_takes_none_is_named_once(
    superexec: Identity,
    server: Serving,
    node: SuperNode,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    node.status = 400
    caplog.set_level("INFO", "vlafleet.report")
    with (
        contextlib.closing(silent(tmp_path)) as path,
        reporting(superexec, server, Path(path.getsockname())),
    ):
        until(
            lambda: "does not take the site's report: it answers 400: No." in caplog.text,
            "not said",
        )
        node.status = 204
        until(lambda: len(node.reports) > 5, "not taken again")
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2
    assert said[1] == said[0].replace("it answers 400: No.", "all is well again")


def silent(directory: Path) -> socket.socket:
    """A socket behind which no trainer ever starts."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(directory / "s"))
    listener.listen()
    return listener


def test_a_source_that_fails_is_asked_again_and_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    over, times = threading.Event(), []

    def read() -> str:
        times.append(1)
        if len(times) < 5:
            raise OSError("no\nmore")
        return "x"

    source = Source("disk", read, over)
    source.start()
    until(lambda: source.text() == "x", "it is not asked again")
    over.set()
    source.join(LONG)
    assert [record.getMessage() for record in caplog.records] == [
        "not in the site's report: disk: no"
    ]


def test_labels_have_the_values_that_the_supernode_knows() -> None:
    assert get_args(Kind.__value__) == site_metrics.VALUES["kind"]
    assert get_args(Result.__value__) == site_metrics.VALUES["result"]
    doc = PrefixCache.__doc__ or ""
    assert all(f'"{tier}"' in doc for tier in site_metrics.VALUES["tier"])


def test_what_a_trainer_says_of_its_dataset_stays(trainer_metrics: Metrics) -> None:
    with trainer_metrics.job("describe"):
        trainer_metrics.progress(
            {"train_episodes": 8, "held_out_episodes": 2, "train_frames": 800, "loss": 1.0}
        )
    with trainer_metrics.job("train"):
        trainer_metrics.progress({"held_out_frames": 200})
        told = samples(trainer_metrics.text())
    assert told["vlafleet_trainer_dataset_episodestrain"] == 8
    assert told["vlafleet_trainer_dataset_episodesheld_out"] == 2
    assert told["vlafleet_trainer_dataset_framestrain"] == 800
    assert told["vlafleet_trainer_dataset_framesheld_out"] == 200
    assert told["vlafleet_trainer_loss"] != told["vlafleet_trainer_loss"]


@pytest.fixture
def trainer_metrics() -> Metrics:
    return Metrics()


def test_a_trainer_says_what_is_declared_and_no_more(trainer_metrics: Metrics) -> None:
    with trainer_metrics.job("train") as ended:
        ended.result = "completed"
        trainer_metrics.progress(
            {"cache_tier": "disk", "train_episodes": 1, "train_frames": 1, "unheard_of": 1}
        )
    families = list(text_string_to_metric_families(trainer_metrics.text()))
    suffix = {"counter": "_total", "info": "_info"}
    declared = {
        f"{metric.name}{suffix.get(metric.kind, '')}": metric.help
        for metric in site_metrics.METRICS
        if metric.name.startswith("vlafleet_trainer_")
    }
    told = {
        f"{family.name}{suffix.get(family.type, '')}": family.documentation for family in families
    }
    assert told.keys() == declared.keys() - {
        "vlafleet_trainer_up",
        "vlafleet_trainer_restarts_total",
    }
    ours = [name for name in told if "_process_" not in name]
    assert {name: told[name] for name in ours} == {name: declared[name] for name in ours}
