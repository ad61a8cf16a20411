"""What the SuperLink and the enrolment service tell Prometheus, read at scrape time."""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Final

from prometheus_client import REGISTRY, generate_latest
from prometheus_client.core import Metric as Family
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.registry import Collector

from certs.guard import Receive, Scope, Send, reply
from certs.index import Issued
from certs.lifetime import LIFETIMES
from certs.metric import Metric
from certs.roles import Role
from superlink.control import last_heartbeat
from superlink.invitations import Invitations

if TYPE_CHECKING:
    from flwr.server.superlink.linkstate import LinkStateFactory

_ONLINE = Metric(
    "vlafleet_site_online",
    "gauge",
    "Whether the site's SuperNode is online (1) or not (0).",
    ["site"],
)
_HEARTBEAT = Metric(
    "vlafleet_site_last_heartbeat_timestamp_seconds",
    "gauge",
    "When the site's SuperNode was last heard of.",
    ["site"],
)
_RUNS = Metric("vlafleet_runs", "gauge", "Runs known to the SuperLink, by status.", ["status"])
_INVITATIONS = Metric(
    "vlafleet_invitations", "gauge", "Invitations of the last 30 days, by state.", ["state"]
)
_ISSUED_EXPIRY = Metric(
    "vlafleet_issued_certificate_expiry_timestamp_seconds",
    "gauge",
    "When the newest certificate of a holder expires; gone a day after that, or once revoked.",
    ["role", "name"],
)
_ISSUED_LIFETIME = Metric(
    "vlafleet_issued_certificate_lifetime_seconds",
    "gauge",
    "How long the newest certificate of a holder was to live.",
    ["role", "name"],
)
SUPERLINK: Final = (_ONLINE, _HEARTBEAT, _RUNS)
ENROLMENT: Final = (_INVITATIONS, _ISSUED_EXPIRY, _ISSUED_LIFETIME)
METRICS: Final = (*SUPERLINK, *ENROLMENT)

# Flower's (flwr.common.constant.Status), and how it finished (SubStatus).
RUN_STATUSES: Final = ("pending", "starting", "running", "completed", "failed", "stopped")
INVITATION_STATES: Final = ("open", "used", "expired", "cancelled")
# Whoever has not renewed by then has left.
_EXPIRED_FOR = timedelta(days=1)


class FleetCollector(Collector):
    """A collector over Flower's LinkState; labels are bounded by the registered sites."""

    def __init__(self, factory: "LinkStateFactory") -> None:
        self._factory = factory

    def describe(self) -> Iterable[Family]:
        """Return nothing, so that registering does not read the database."""
        return []

    def collect(self) -> Iterator[Family]:
        """Yield the current values."""
        state = self._factory.state()
        online, heartbeat = _ONLINE.gauge(), _HEARTBEAT.gauge()
        for node in state.get_node_info():
            if node.status == "unregistered":
                continue
            online.add_metric([node.name], float(node.status == "online"))
            if (last := last_heartbeat(node)) is not None:
                heartbeat.add_metric([node.name], last)
        runs = _RUNS.gauge()
        found = Counter(run.status.sub_status or run.status.status for run in state.get_run_info())
        for status in RUN_STATUSES:
            runs.add_metric([status], found[status])
        yield from (online, heartbeat, runs)


class EnrolmentCollector(Collector):
    """A collector over the invitations of the last 30 days, and the certificates that are out.

    ``issued`` returns the authority's index, in order of issue.
    """

    def __init__(self, invitations: Invitations, issued: Callable[[], Sequence[Issued]]) -> None:
        self._invitations = invitations
        self._issued = issued

    def describe(self) -> Iterable[Family]:
        """Return nothing, so that registering reads nothing."""
        return []

    def collect(self) -> Iterator[Family]:
        """Yield the current values."""
        states = Counter(str(entry["state"]) for entry in self._invitations.listed())
        invitations = _INVITATIONS.gauge()
        for state in INVITATION_STATES:
            invitations.add_metric([state], states[state])
        expiry, lifetime = _ISSUED_EXPIRY.gauge(), _ISSUED_LIFETIME.gauge()
        for line in _newest(self._issued(), datetime.now(UTC)):
            holder = [line.role, line.name]
            expiry.add_metric(holder, line.not_after.timestamp())
            life = line.not_after - line.issued_at if line.issued_at else LIFETIMES[line.role]
            lifetime.add_metric(holder, life.total_seconds())
        yield from (invitations, expiry, lifetime)


async def exposition(_scope: Scope, _receive: Receive, send: Send) -> None:
    """Answer a scrape (ASGI) from a thread: Flower takes 0.1 s to list a thousand runs."""
    body = await asyncio.to_thread(generate_latest, REGISTRY)
    await reply(send, 200, body, CONTENT_TYPE_PLAIN_0_0_4)


def _newest(issued: Sequence[Issued], now: datetime) -> list[Issued]:
    """Return each holder's newest certificate that is not revoked, unless it expired over a day ago."""
    newest: dict[tuple[Role, str], Issued] = {
        (line.role, line.name): line for line in issued if line.revoked_at is None
    }
    return [line for line in newest.values() if now - line.not_after < _EXPIRED_FOR]
