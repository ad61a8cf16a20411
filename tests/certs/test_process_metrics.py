"""What a process tells of itself: the certificate that is there now, and the disk that there is."""

import shutil
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.samples import Sample

from certs.authority import Authority
from certs.files import load_certificate
from certs.identity import Identity, authority_directory
from certs.lifetime import LIFETIMES
from certs.metric import Metric
from certs.process_metrics import METRICS, ProcessCollector
from certs.roles import Role
from tests.renewing import Fleet
from tests.serving import renew

EXPIRY = "vlafleet_certificate_expiry_timestamp_seconds"
LIFETIME = "vlafleet_certificate_lifetime_seconds"


def scraped(registry: CollectorRegistry) -> dict[str, list[Sample]]:
    return {family.name: family.samples for family in registry.collect()}


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    return Fleet.make(tmp_path / "pki")


def test_the_certificate_of_the_file(fleet: Fleet, tmp_path: Path) -> None:
    site = fleet.identity(Role.SITE, "site-a")
    registry = CollectorRegistry()
    registry.register(ProcessCollector(site, {}))

    def value(name: str) -> float:
        (sample,) = scraped(registry)[name]
        assert sample.labels == {"role": "site"}
        return sample.value

    def end() -> float:
        return load_certificate(site.certificate).not_valid_after_utc.timestamp()

    assert value(EXPIRY) == end()
    assert value(LIFETIME) == LIFETIMES[Role.SITE].total_seconds()
    renew(site, fleet.authority, lifetime=timedelta(hours=2))
    assert value(EXPIRY) == end() < site.not_after.timestamp()
    assert value(LIFETIME) == pytest.approx(7200, abs=1)
    # Somebody replaces it, and is half way: the scrape does not fail, and the end that is near stays known.
    site.certificate.write_text("-----BEGIN")
    assert value(LIFETIME) == pytest.approx(7200, abs=1)


def test_the_disks(fleet: Fleet, tmp_path: Path) -> None:
    site = fleet.identity(Role.SITE, "site-a")
    registry = CollectorRegistry()
    registry.register(ProcessCollector(site, {"site": tmp_path, "gone": tmp_path / "gone"}))
    told = scraped(registry)
    (free,), (size,) = told["vlafleet_disk_free_bytes"], told["vlafleet_disk_size_bytes"]
    assert free.labels == size.labels == {"volume": "site"}
    usage = shutil.disk_usage(tmp_path)
    assert size.value == usage.total
    assert 0 < free.value < size.value
    assert free.value == pytest.approx(usage.free, rel=0.1)


def test_what_is_told_is_declared(identity: Callable[[Role, str], Identity], pki: Path) -> None:
    collector = ProcessCollector(identity(Role.SITE, "site-a"), {"site": pki})
    declared = {metric.name: metric for metric in METRICS}
    assert Authority.load(authority_directory(pki)).federation == "test"
    for family in collector.collect():
        metric: Metric = declared.pop(family.name)
        assert (family.documentation, family.type) == (metric.help, metric.kind)
        assert {frozenset(sample.labels) for sample in family.samples} == {frozenset(metric.labels)}
    assert not declared
