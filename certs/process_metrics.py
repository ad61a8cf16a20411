"""What every long-running process tells Prometheus of itself: its certificate, and the disk that it fills."""

import contextlib
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final

from prometheus_client.core import Metric as Family
from prometheus_client.registry import Collector

from certs.errors import CertificateError
from certs.files import load_certificate
from certs.identity import Identity
from certs.lifetime import life_of
from certs.metric import Metric
from certs.roles import Peer

_EXPIRY = Metric(
    "vlafleet_certificate_expiry_timestamp_seconds",
    "gauge",
    "When the certificate that this process presents expires.",
    ["role"],
)
_LIFETIME = Metric(
    "vlafleet_certificate_lifetime_seconds",
    "gauge",
    "How long the certificate that this process presents was to live.",
    ["role"],
)
_DISK_FREE = Metric(
    "vlafleet_disk_free_bytes",
    "gauge",
    "Free space where this process keeps its files.",
    ["volume"],
)
_DISK_SIZE = Metric(
    "vlafleet_disk_size_bytes",
    "gauge",
    "Size of the disk where this process keeps its files.",
    ["volume"],
)
METRICS: Final = (_EXPIRY, _LIFETIME, _DISK_FREE, _DISK_SIZE)


class ProcessCollector(Collector):
    """The certificate in ``identity`` and the free space of ``volumes`` (directories by name), at scrape time.

    A certificate that cannot be read is the last one that could; a volume that cannot be read is left out.
    """

    def __init__(self, identity: Identity, volumes: Mapping[str, Path]) -> None:
        self._file = identity.certificate
        self._peer = identity.peer
        self._volumes = volumes

    def describe(self) -> Iterable[Family]:
        """Return nothing, so that registering reads nothing."""
        return []

    def collect(self) -> Iterator[Family]:
        """Yield the current values."""
        expiry, lifetime = _EXPIRY.gauge(), _LIFETIME.gauge()
        peer = self._current()
        expiry.add_metric([peer.role], peer.not_after.timestamp())
        lifetime.add_metric([peer.role], life_of(peer).total_seconds())
        free, size = _DISK_FREE.gauge(), _DISK_SIZE.gauge()
        for volume, path in self._volumes.items():
            try:
                usage = shutil.disk_usage(path)
            except OSError:
                continue
            free.add_metric([volume], usage.free)
            size.add_metric([volume], usage.total)
        yield from (expiry, lifetime, free, size)

    def _current(self) -> Peer:
        # Of the file: a certificate is renewed while the process runs.
        with contextlib.suppress(CertificateError):
            self._peer = Peer.of(load_certificate(self._file))
        return self._peer
