"""What a site tells Prometheus, at its SuperNode: this process's own metrics, and what its SuperExec reports.

The SuperExec runs the code that trains and reaches nothing but its SuperNode, so it reports. Nobody but this process is
to be harmed by a false report: it is bounded, and no more of it is shown than numbers for the series that
``certs.site_metrics`` declares.
"""

import asyncio
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import uvicorn
from prometheus_client import REGISTRY
from prometheus_client.core import Metric as Family
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.registry import Collector, CollectorRegistry

from certs.guard import Application, Receive, Scope, Send, read_body, reply
from certs.identity import Identity
from certs.metric import Metric, exposition
from certs.process_metrics import ProcessCollector
from certs.site_metrics import (
    MAX_REPORT_BYTES,
    REPORTED,
    STALE_SECONDS,
    VALUES,
    ContactCollector,
)

if TYPE_CHECKING:
    from supernode.link import Link

PATH: Final = "/metrics"

_REPORTED_AT = Metric(
    "vlafleet_report_timestamp_seconds", "gauge", "When the site's SuperExec last reported."
)
_LINK = Metric(
    "vlafleet_link_bytes_per_second",
    "gauge",
    "How fast the link to the SuperLink was when the SuperNode started: up, from the site, and down.",
    ["direction"],
)
METRICS: Final = (_REPORTED_AT, _LINK)

# Characters of a peer's text in a sentence.
_QUOTED = 80
# Connections at a time of the port without TLS: a Prometheus has one.
_CONNECTIONS = 16

# One sample (https://prometheus.io/docs/instrumenting/exposition_formats), without a timestamp: what is reported is so
# now. No allowed value of a label holds what would be escaped.
_SAMPLE = re.compile(r"([a-z0-9_]+)(?:\{([^{}]*)\})? (NaN|[+-]Inf|[0-9eE.+-]{1,32})")
_LABEL = re.compile(r'([a-z]+)="([a-z0-9_]+)"')

# What follows a metric's name in its samples, by its kind.
SUFFIXES: Final = {
    "gauge": ("",),
    "counter": ("_total",),
    "summary": ("_count", "_sum"),
    "info": ("_info",),
}
_KNOWN: Final = {
    metric.name + suffix: metric for metric in REPORTED for suffix in SUFFIXES[metric.kind]
}


@dataclass(frozen=True)
class _Report:
    """What was reported, and when: on the clock that only goes forward, and in seconds since 1970."""

    families: list[Family]
    at: float
    time: float


class SiteMetrics(Collector):
    """What the SuperNode of ``identity`` shows, beside the other collectors of ``registry``."""

    def __init__(
        self,
        identity: Identity,
        registry: CollectorRegistry = REGISTRY,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._registry, self._clock = registry, clock
        self._report: _Report | None = None
        # Measured when the SuperNode starts.
        self.link: Link | None = None
        for collector in (ProcessCollector(identity, {}), ContactCollector(identity.peer), self):
            registry.register(collector)

    def take(self, body: bytes) -> None:
        """Take a report; ``ValueError`` says why it is refused, and the one before stays."""
        self._report = _Report(parse(body), self._clock(), time.time())

    def describe(self) -> Iterable[Family]:
        """Return nothing, so that registering reads nothing."""
        return []

    def collect(self) -> Iterator[Family]:
        """Yield what this process alone knows."""
        if self._report is not None:
            reported = _REPORTED_AT.gauge()
            reported.add_metric([], self._report.time)
            yield reported
        if self.link is not None:
            link = _LINK.gauge()
            link.add_metric(["up"], self.link.up)
            link.add_metric(["down"], self.link.down)
            yield link

    def text(self) -> bytes:
        """Return all of it in Prometheus' text format, what is reported while it is fresh."""
        families = {family.name: family for family in self._registry.collect()}
        report = self._report
        if report is not None and self._clock() - report.at < STALE_SECONDS:
            for family in report.families:
                _add(families, family)
        return exposition(families.values())


def _add(families: dict[str, Family], reported: Family) -> None:
    """Add the samples of a family; what this process says itself, nobody else says otherwise."""
    family = families.setdefault(
        reported.name, Family(reported.name, reported.documentation, reported.type)
    )
    own = [(sample.name, sample.labels) for sample in family.samples]
    family.samples.extend(
        sample for sample in reported.samples if (sample.name, sample.labels) not in own
    )


def parse(body: bytes) -> list[Family]:
    """Return the metrics of a report; ``ValueError`` says what in it is not one of a site.

    Help and types are those that are declared; what a report says of them is not read.
    """
    families: dict[str, Family] = {}
    seen: set[tuple[str, str]] = set()
    for line in body.decode("ascii").split("\n"):
        if not line or line.startswith("#"):
            continue
        sample = _SAMPLE.fullmatch(line)
        if sample is None:
            raise ValueError(f"{_cut(line)} is not a sample")
        name, labels, value = sample[1], sample[2] or "", float(sample[3])
        metric = _KNOWN.get(name)
        if metric is None:
            raise ValueError(f"{_cut(name)} is no metric that a SuperExec reports")
        if (name, labels) in seen:
            raise ValueError(f"{_cut(line)} is a sample of a series that had one")
        seen.add((name, labels))
        family = families.setdefault(metric.name, Family(metric.name, metric.help, metric.kind))
        family.add_sample(name, _labels(metric, labels), value)
    return list(families.values())


def _labels(metric: Metric, text: str) -> dict[str, str]:
    """Return the labels of a sample, in the one spelling that a series has: as the format's writers sort them."""
    found = dict(_LABEL.findall(text))
    known = all(found.get(name) in VALUES[name] for name in metric.labels)
    if not known or text != ",".join(f'{name}="{found[name]}"' for name in sorted(metric.labels)):
        raise ValueError(f"{metric.name} has no series {_cut(text)}")
    return found


def _cut(text: str) -> str:
    """Quote a peer's text for a sentence: the beginning, and no control character."""
    return repr(text if len(text) <= _QUOTED else f"{text[:_QUOTED]}...")


def reports(site: SiteMetrics) -> Application:
    """Return the ASGI application that takes a site's reports; the guard lets in its own SuperExec alone."""

    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] != "POST":
            await _refuse(send, 405, "a report is a POST")
            return
        body = await read_body(receive, MAX_REPORT_BYTES)
        if body is None:
            await _refuse(send, 413, f"a report has at most {MAX_REPORT_BYTES} bytes")
            return
        try:
            site.take(body)
        except ValueError as error:
            await _refuse(send, 400, str(error))
        else:
            await reply(send, 204)

    return application


def shown(site: SiteMetrics) -> Application:
    """Return the ASGI application that shows all of it, at ``/metrics`` and nowhere else."""

    async def application(scope: Scope, _receive: Receive, send: Send) -> None:
        if scope["path"] != PATH:
            await _refuse(send, 404, f"the metrics are at {PATH}")
        elif scope["method"] != "GET":
            await _refuse(send, 405, "metrics are read")
        else:
            # Files are read for it: not in the thread that serves the Runtime API.
            text = await asyncio.to_thread(site.text)
            await reply(send, 200, text, CONTENT_TYPE_PLAIN_0_0_4)

    return application


def serve_plainly(site: SiteMetrics, listener: socket.socket) -> None:
    """Show the metrics without TLS, too, to a Prometheus of the lab's own, from a daemon thread."""
    server = uvicorn.Server(
        uvicorn.Config(
            shown(site),
            # Whose parser bounds what a request has beside its body.
            http="h11",
            loop="asyncio",
            ws="none",
            lifespan="off",
            limit_concurrency=_CONNECTIONS,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            log_config=None,
        )
    )
    threading.Thread(
        target=server.run, kwargs={"sockets": [listener]}, name="metrics", daemon=True
    ).start()


async def _refuse(send: Send, status: int, detail: str) -> None:
    await reply(send, status, json.dumps({"detail": detail}).encode())
