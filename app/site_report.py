"""What a site's SuperExec reports to its SuperNode, the one place that it reaches: trainer, GPU, disk, certificate.

Each source is asked in a thread of its own. One that does not answer, a trainer that is stopped or a driver that hangs,
is left out of the report, and the others are in it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import httpx
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric as Family
from prometheus_client.registry import Collector

from app.config import home
from app.supervisor import restarts
from app.trainer_client import await_metrics
from certs import nvml
from certs.contexts import client_context
from certs.errors import first_line
from certs.identity import Identity
from certs.metric import REPORT_PATH
from certs.process_metrics import ProcessCollector
from certs.renewal import RENEWAL_FAILURES
from certs.site_metrics import (
    GPU_BUSY,
    GPU_SIZE,
    GPU_USED,
    REPORT_SECONDS,
    TRAINER_RESTARTS,
    TRAINER_UP,
    VALUES,
    ContactCollector,
)

_log = logging.getLogger("vlafleet.report")

# An answer is true for three reports: a busy machine delays one.
_FRESH_S = 3 * REPORT_SECONDS
# A failure that passes sooner is no news.
_FAILURES = 3
# Seconds for a report to be taken.
_SEND_S = 5.0


class _Trouble:
    """Logs once what goes wrong again and again, and its end.

    A trainer or a SuperNode that is started again, or is stopped first, says so itself.
    """

    def __init__(self, what: str) -> None:
        self._what, self._times = what, 0

    def note(self, sentence: str) -> None:
        """Take what went wrong this time; nothing, when it is empty."""
        if not sentence:
            if self._times >= _FAILURES:
                _log.info("%s: all is well again", self._what)
            self._times = 0
            return
        self._times += 1
        if self._times == _FAILURES:
            _log.warning("%s: %s", self._what, sentence)


class Source(threading.Thread):
    """Asks ``read`` every few seconds, in turn, for metrics in Prometheus' text format."""

    def __init__(self, name: str, read: Callable[[], str], over: threading.Event) -> None:
        super().__init__(name=f"report-{name}", daemon=True)
        self._read, self._over = read, over
        self._last: tuple[float, str] | None = None
        self._trouble = _Trouble(f"not in the site's report: {name}")

    def run(self) -> None:
        """Ask until it is over."""
        while not self._over.is_set():
            try:
                self._last = time.monotonic(), self._read()
                self._trouble.note("")
            except Exception as error:  # noqa: BLE001  # whatever one source meets, it is asked again
                self._last = None
                self._trouble.note(first_line(error))
            self._over.wait(REPORT_SECONDS)

    def text(self) -> str | None:
        """Return the last answer; None while there is none that is fresh."""
        last = self._last
        return last[1] if last and time.monotonic() - last[0] < _FRESH_S else None


class Reporter(threading.Thread):
    """Reports every few seconds until the process ends; of a ``trainer`` (its socket) where there is one."""

    def __init__(self, identity: Identity, address: str, trainer: Path | None) -> None:
        super().__init__(name="report", daemon=True)
        self._identity, self._url = identity, f"https://{address}{REPORT_PATH}"
        self._over = threading.Event()
        self._sources = [
            Source("gpu", lambda: _text(_Gpus()), self._over),
            Source("process", lambda: _text(*_process(identity)), self._over),
        ]
        self._trainer: tuple[Path, Source] | None = None
        if trainer is not None:
            source = Source("trainer", lambda: await_metrics(trainer), self._over)
            self._trainer = trainer, source
            self._sources.append(source)
        self._trouble = _Trouble(f"the SuperNode at {address} does not take the site's report")

    def run(self) -> None:
        """Start the sources, and report what they say."""
        for source in self._sources:
            source.start()
        # httpx's defaults, as Flower's own clients have them: where HTTPS_PROXY leads those, it leads this.
        with httpx.Client(verify=client_context(self._identity), timeout=_SEND_S) as client:
            while not self._over.is_set():
                self._trouble.note(self._send(client))
                self._over.wait(REPORT_SECONDS)

    def stop(self) -> None:
        """End the thread; its sources end with their next answers."""
        self._over.set()
        self.join()

    def text(self) -> str:
        """Return what there is to report now."""
        found = [text for source in self._sources if (text := source.text()) is not None]
        if self._trainer is not None:
            path, source = self._trainer
            found.insert(0, _text(_Trainer(up=source.text() is not None, restarts=restarts(path))))
        return "".join(found)

    def _send(self, client: httpx.Client) -> str:
        """Send a report; return what went wrong, empty when nothing did."""
        try:
            answer = client.post(self._url, content=self.text())
        except (httpx.HTTPError, OSError) as error:
            return first_line(error)
        return "" if answer.is_success else f"it answers {answer.status_code}: {answer.text[:300]}"


class _Trainer(Collector):
    def __init__(self, *, up: bool, restarts: int) -> None:
        self._up, self._restarts = up, restarts

    def collect(self) -> Iterator[Family]:
        up, times = TRAINER_UP.gauge(), TRAINER_RESTARTS.counter()
        up.add_metric([], self._up)
        times.add_metric([], self._restarts)
        yield from (up, times)


class _Gpus(Collector):
    """Every GPU that this process sees; none where there is no driver."""

    def collect(self) -> Iterator[Family]:
        used, size, busy = GPU_USED.gauge(), GPU_SIZE.gauge(), GPU_BUSY.gauge()
        try:
            gpus = nvml.read().gpus
        except nvml.NoDriverError:
            return
        for number, gpu in zip(VALUES["gpu"], gpus, strict=False):
            if gpu.total is not None and gpu.free is not None:
                used.add_metric([number], gpu.total - gpu.free)
                size.add_metric([number], gpu.total)
            if gpu.utilization is not None:
                busy.add_metric([number], gpu.utilization)
        yield from (used, size, busy)


def _process(identity: Identity) -> Iterable[Collector]:
    """This process's certificate and contact, and the disk that its trainer fills."""
    # In a container that is a volume, and what lies above it is none; elsewhere the first job makes it.
    states = home() / "sites"
    place = next(path for path in (states, *states.parents) if path.is_dir())
    return (
        ProcessCollector(identity, {"site": place}),
        ContactCollector(identity.peer),
        RENEWAL_FAILURES,
    )


def _text(*collectors: Collector) -> str:
    registry = CollectorRegistry(auto_describe=False)
    for collector in collectors:
        registry.register(collector)
    return generate_latest(registry).decode()
