"""What the SuperLink and the enrolment service tell Prometheus, read at scrape time."""

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from certs.files import load_certificate
from certs.identity import Identity
from superlink.control import last_heartbeat
from superlink.invitations import Invitations

if TYPE_CHECKING:
    from flwr.server.superlink.linkstate import LinkStateFactory


class FleetCollector(Collector):
    """A collector over Flower's LinkState; labels are bounded by the registered sites."""

    def __init__(self, factory: "LinkStateFactory", identity: Identity) -> None:
        self._factory = factory
        self._identity = identity

    def describe(self) -> list[GaugeMetricFamily]:
        """Return nothing, so that registering does not read the database."""
        return []

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Yield the current values."""
        state = self._factory.state()
        online = GaugeMetricFamily(
            "vlafleet_site_online",
            "Whether the site's SuperNode is online (1) or not (0).",
            labels=["site"],
        )
        heartbeat = GaugeMetricFamily(
            "vlafleet_site_last_heartbeat_timestamp_seconds",
            "When the site's SuperNode was last heard of.",
            labels=["site"],
        )
        for node in state.get_node_info():
            if node.status == "unregistered":
                continue
            online.add_metric([node.name], float(node.status == "online"))
            if (last := last_heartbeat(node)) is not None:
                heartbeat.add_metric([node.name], last)
        yield online
        yield heartbeat
        runs = GaugeMetricFamily(
            "vlafleet_runs", "Runs known to the SuperLink, by status.", labels=["status"]
        )
        for status, number in Counter(run.status.status for run in state.get_run_info()).items():
            runs.add_metric([status], number)
        yield runs
        yield _expiry(self._identity)


class EnrolmentCollector(Collector):
    """A collector over the invitations of the last 30 days."""

    def __init__(self, invitations: Invitations, identity: Identity) -> None:
        self._invitations = invitations
        self._identity = identity

    def describe(self) -> list[GaugeMetricFamily]:
        """Return nothing, so that registering reads nothing."""
        return []

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Yield the current values."""
        states = Counter(str(entry["state"]) for entry in self._invitations.listed())
        family = GaugeMetricFamily(
            "vlafleet_invitations", "Invitations of the last 30 days, by state.", labels=["state"]
        )
        for state in ("open", "used", "expired", "cancelled"):
            family.add_metric([state], states[state])
        yield family
        yield _expiry(self._identity)


def _expiry(identity: Identity) -> GaugeMetricFamily:
    family = GaugeMetricFamily(
        "vlafleet_certificate_expiry_timestamp_seconds",
        "When the certificate this process presents expires.",
        labels=["role"],
    )
    # Of the file: a certificate is renewed while the process runs.
    current = load_certificate(identity.certificate)
    family.add_metric([identity.peer.role], current.not_valid_after_utc.timestamp())
    return family
