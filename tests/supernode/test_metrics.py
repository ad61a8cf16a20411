"""A site's metrics at its SuperNode: who sees them, and what is shown of a report that the training code may forge."""

import contextlib
import itertools
import re
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter
from prometheus_client.parser import text_string_to_metric_families

from certs.authority import Authority
from certs.contact import contact_file
from certs.contexts import client_context
from certs.errors import AddressError
from certs.identity import Identity
from certs.metric import REPORT_PATH
from certs.roles import SUPERLINK_NAME, Role
from certs.server import bind
from certs.site_metrics import MAX_REPORT_BYTES, REPORTED, STALE_SECONDS, VALUES
from supernode.link import Link
from supernode.metrics import SUFFIXES, SiteMetrics, parse, serve_plainly
from supernode.node import rules
from tests.clock import Clock
from tests.conftest import Vlafleet
from tests.serving import Serving, echo, serving

REPORT = b"""\
# HELP vlafleet_trainer_loss What it says itself is not read.
# TYPE vlafleet_trainer_loss histogram
vlafleet_trainer_loss NaN
vlafleet_trainer_up 1.0
vlafleet_trainer_restarts_total 2.0
vlafleet_trainer_jobs_total{kind="train",result="completed"} 3.0
vlafleet_trainer_job_seconds_count{kind="train"} 3.0
vlafleet_trainer_job_seconds_sum{kind="train"} 1.5e+02
vlafleet_trainer_cache_info{tier="memory"} 1.0
vlafleet_gpu_utilization_ratio{gpu="0"} 0.5
vlafleet_certificate_expiry_timestamp_seconds{role="superexec"} 1.8e+09
vlafleet_certificate_renewal_failures_total{role="superexec"} 0.0
vlafleet_disk_free_bytes{volume="site"} 1e+11
"""


@pytest.fixture
def own(identity: Callable[[Role, str], Identity]) -> Identity:
    return identity(Role.SITE, "site-a")


@pytest.fixture
def clock() -> Clock:
    return Clock(1000.0)


@pytest.fixture
def site(own: Identity, clock: Clock) -> SiteMetrics:
    return SiteMetrics(own, CollectorRegistry(), clock)


@pytest.fixture
def supernode(own: Identity, site: SiteMetrics) -> Iterator[Serving]:
    """Site-a's SuperNode; Flower's part answers as ``echo``."""
    with serving(own, rules=rules(own, echo, None, site)) as running:
        yield running


def client_of(running: Serving, identity: Identity) -> httpx.Client:
    server = (identity.peer.federation, Role.SITE, "site-a")
    return httpx.Client(base_url=running.url, verify=client_context(identity, server), timeout=20)


def samples(text: bytes) -> dict[str, float]:
    """Every series with its value; each has one, and its family is in one piece."""
    families = list(text_string_to_metric_families(text.decode()))
    assert len({family.name for family in families}) == len(families)
    found: dict[str, float] = {}
    for family in families:
        for sample in family.samples:
            labels = ",".join(f'{name}="{value}"' for name, value in sorted(sample.labels.items()))
            series = f"{sample.name}{{{labels}}}" if labels else sample.name
            assert series not in found
            found[series] = sample.value
    return found


def test_a_report_is_shown_beside_what_the_supernode_says_itself(
    identity: Callable[[Role, str], Identity], supernode: Serving, site: SiteMetrics
) -> None:
    site.link = Link(1e6, 2e6, 0.1)
    before = time.time()
    with client_of(supernode, identity(Role.SUPEREXEC, "site-a")) as superexec:
        assert superexec.post(REPORT_PATH, content=REPORT).status_code == 204
    with client_of(supernode, identity(Role.MONITOR, "prometheus")) as monitor:
        answer = monitor.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    found = samples(answer.content)
    assert found["vlafleet_trainer_restarts_total"] == 2
    assert found['vlafleet_trainer_jobs_total{kind="train",result="completed"}'] == 3
    assert found['vlafleet_trainer_job_seconds_sum{kind="train"}'] == 150
    assert found['vlafleet_trainer_cache_info{tier="memory"}'] == 1
    assert found['vlafleet_gpu_utilization_ratio{gpu="0"}'] == 0.5
    assert found['vlafleet_certificate_expiry_timestamp_seconds{role="superexec"}'] == 1.8e9
    assert found['vlafleet_certificate_expiry_timestamp_seconds{role="site"}'] > before
    assert found['vlafleet_link_bytes_per_second{direction="up"}'] == 1e6
    assert before <= found["vlafleet_report_timestamp_seconds"] <= time.time()
    assert "# TYPE vlafleet_trainer_loss gauge\n" in answer.text
    assert "What it says itself" not in answer.text


@pytest.mark.parametrize(
    ("role", "name"),
    [
        (Role.SUPEREXEC, "site-b"),
        (Role.SUPEREXEC, SUPERLINK_NAME),
        (Role.SITE, "site-a"),
        (Role.OPERATOR, "admin"),
        (Role.MONITOR, "prometheus"),
        (Role.SUPERLINK, SUPERLINK_NAME),
    ],
)
def test_nobody_else_reports(
    identity: Callable[[Role, str], Identity],
    supernode: Serving,
    site: SiteMetrics,
    role: Role,
    name: str,
) -> None:
    with client_of(supernode, identity(role, name)) as other:
        assert other.post(REPORT_PATH, content=REPORT).status_code == 404
    assert [refused["reason"] for refused in supernode.refused] == ["role"]
    assert b"trainer" not in site.text()


@pytest.mark.parametrize(
    ("role", "name"),
    [
        (Role.SUPEREXEC, "site-a"),
        (Role.SITE, "site-a"),
        (Role.SITE, "site-b"),
        (Role.OPERATOR, "admin"),
        (Role.SUPERLINK, SUPERLINK_NAME),
    ],
)
def test_nobody_but_a_monitor_sees_them(
    identity: Callable[[Role, str], Identity], supernode: Serving, role: Role, name: str
) -> None:
    with client_of(supernode, identity(role, name)) as other:
        assert other.get("/metrics").status_code == 404
    assert [refused["reason"] for refused in supernode.refused] == ["role"]


def test_a_report_is_shown_for_half_a_minute(site: SiteMetrics, clock: Clock) -> None:
    assert "vlafleet_report_timestamp_seconds" not in samples(site.text())
    site.take(REPORT)
    clock.now += STALE_SECONDS - 1
    assert samples(site.text())["vlafleet_trainer_up"] == 1
    clock.now += 1
    found = samples(site.text())
    assert "vlafleet_trainer_up" not in found
    assert 'vlafleet_certificate_expiry_timestamp_seconds{role="superexec"}' not in found
    # When it came stays known, and what the SuperNode says itself.
    assert "vlafleet_report_timestamp_seconds" in found
    assert 'vlafleet_certificate_expiry_timestamp_seconds{role="site"}' in found
    site.take(b"vlafleet_trainer_up 0\n")
    assert samples(site.text())["vlafleet_trainer_up"] == 0


@pytest.mark.parametrize(
    ("line", "why"),
    [
        # What other processes say, and rules and dashboards believe.
        ('vlafleet_site_online{site="site-b"} 0', "no metric that a SuperExec reports"),
        ("vlafleet_report_timestamp_seconds 1", "no metric that a SuperExec reports"),
        ('vlafleet_link_bytes_per_second{direction="up"} 1', "no metric that a SuperExec"),
        ("up 1", "no metric that a SuperExec reports"),
        ("process_resident_memory_bytes 1", "no metric that a SuperExec reports"),
        ('vlafleet_certificate_expiry_timestamp_seconds{role="site"} 1', "has no series"),
        ('vlafleet_disk_free_bytes{volume="runs"} 1', "has no series"),
        # Series without end.
        ('vlafleet_gpu_utilization_ratio{gpu="16"} 1', "has no series"),
        ('vlafleet_trainer_jobs_total{kind="x1",result="completed"} 1', "has no series"),
        ('vlafleet_trainer_jobs_total{result="completed",kind="train"} 1', "has no series"),
        ('vlafleet_trainer_jobs_total{kind="train"} 1', "has no series"),
        ('vlafleet_trainer_jobs_total{kind="train",result="error",x="1"} 1', "has no series"),
        ('vlafleet_trainer_jobs_total{kind="train",kind="train",result="error"} 1', "no series"),
        ('vlafleet_trainer_up{x="1"} 1', "has no series"),
        ("vlafleet_trainer_jobs_total 1", "has no series"),
        ("vlafleet_trainer_jobs 1", "no metric that a SuperExec reports"),
        ("vlafleet_trainer_up 1\nvlafleet_trainer_up 1", "series that had one"),
        # What the format allows, and nobody writes.
        ("vlafleet_trainer_up 1 1700000000000", "is not a sample"),
        ('vlafleet_trainer_cache_info{tier="a\\"b"} 1', "has no series"),
        ("vlafleet_trainer_up  1", "is not a sample"),
        ("vlafleet_trainer_up 1\r", "is not a sample"),
        ("vlafleet_trainer_up 0x10", "is not a sample"),
        ("vlafleet_trainer_up 1_0", "is not a sample"),
        ("vlafleet_trainer_up 1e", "could not convert"),
        ("vlafleet_trainer_up", "is not a sample"),
        ("vlafleet_trainer_up \x1b[31m1", r"'vlafleet_trainer_up \\x1b\[31m1' is not a sample"),
        ("vlafleet_trainer_up ä", "ascii"),
        ("x" * 5000, "x{80}...' is not a sample"),
    ],
)
def test_what_no_site_says_is_refused_by_name(
    identity: Callable[[Role, str], Identity],
    supernode: Serving,
    site: SiteMetrics,
    line: str,
    why: str,
) -> None:
    with client_of(supernode, identity(Role.SUPEREXEC, "site-a")) as superexec:
        assert superexec.post(REPORT_PATH, content=REPORT).status_code == 204
        before = site.text()
        answer = superexec.post(REPORT_PATH, content=f"vlafleet_trainer_busy 1\n{line}\n".encode())
        assert answer.status_code == 400
        assert re.search(why, answer.json()["detail"])
        assert len(answer.json()["detail"]) < 300
        # All of it or nothing: the one before stays until it is old.
        assert samples(site.text()) == pytest.approx(samples(before), nan_ok=True)


def test_a_report_is_bounded_and_posted(
    identity: Callable[[Role, str], Identity], supernode: Serving
) -> None:
    with client_of(supernode, identity(Role.SUPEREXEC, "site-a")) as superexec:
        whole = b"#" * (MAX_REPORT_BYTES - 1) + b"\n"
        assert superexec.post(REPORT_PATH, content=whole).status_code == 204
        assert superexec.post(REPORT_PATH, content=whole + b"\n").status_code == 413
        assert superexec.get(REPORT_PATH).status_code == 405
    with client_of(supernode, identity(Role.MONITOR, "prometheus")) as monitor:
        assert monitor.post("/metrics").status_code == 405


def test_the_slowest_report_takes_no_time() -> None:
    """The Runtime API waits meanwhile."""
    wide = ",".join(f'a{number}="b"' for number in range(20000))
    for body in (
        b"#\n" * (MAX_REPORT_BYTES // 2),
        b"\n" * MAX_REPORT_BYTES,
        b"a" * MAX_REPORT_BYTES,
        b"a" * (MAX_REPORT_BYTES // 2) + b" " * (MAX_REPORT_BYTES // 2),
        f"vlafleet_trainer_up{{{wide}}} 1".encode()[:MAX_REPORT_BYTES],
        b"vlafleet_trainer_up{" + b'"' * (MAX_REPORT_BYTES - 30) + b"} 1",
        b"vlafleet_trainer_up{" + b'a="\\"' * ((MAX_REPORT_BYTES - 30) // 5) + b"} 1",
    ):
        started = time.process_time()
        with contextlib.suppress(ValueError):
            parse(body)
        assert time.process_time() - started < 1.0


def test_a_process_is_believed_about_itself(own: Identity) -> None:
    """Should a series of a report ever be one that this process has."""
    registry = CollectorRegistry()
    failures = Counter("vlafleet_certificate_renewal_failures", "x.", ["role"], registry=registry)
    failures.labels("superexec").inc(7)
    site = SiteMetrics(own, registry)
    site.take(REPORT)
    found = samples(site.text())
    assert found['vlafleet_certificate_renewal_failures_total{role="superexec"}'] == 7


def test_the_last_contact_is_told(own: Identity, site: SiteMetrics) -> None:
    path = contact_file(own.peer)
    path.unlink(missing_ok=True)
    series = 'vlafleet_last_contact_timestamp_seconds{role="site"}'
    assert series not in samples(site.text())
    path.parent.mkdir(mode=0o700, exist_ok=True)
    before = time.time()
    path.touch()
    try:
        assert samples(site.text())[series] == pytest.approx(before, abs=5)
    finally:
        path.unlink()


def test_all_that_is_declared_is_taken_and_no_more_is_there() -> None:
    """So many series a site's report has at most, whatever its SuperExec says."""
    lines = []
    for metric in REPORTED:
        values = itertools.product(*(VALUES[name] for name in metric.labels))
        for combination in values:
            pairs = zip(metric.labels, combination, strict=True)
            labels = ",".join(f'{name}="{value}"' for name, value in pairs)
            series = f"{{{labels}}}" if labels else ""
            lines += [f"{metric.name}{suffix}{series} 1" for suffix in SUFFIXES[metric.kind]]
    taken = parse("\n".join(lines).encode())
    assert {family.name for family in taken} == {metric.name for metric in REPORTED}
    assert sum(len(family.samples) for family in taken) == len(lines) == 103
    assert len("\n".join(lines)) < MAX_REPORT_BYTES / 10


def labelled() -> st.SearchStrategy[str]:
    """Samples near what is allowed: right and wrong names, labels, values."""
    suffix = {"counter": "_total", "info": "_info", "summary": "_count"}
    names = st.sampled_from([metric.name + suffix.get(metric.kind, "") for metric in REPORTED])
    keys = st.sampled_from([*VALUES, "site", "le", "__name__", ""])
    known = st.sampled_from([value for values in VALUES.values() for value in values])
    pair = st.builds(lambda key, value: f'{key}="{value}"', keys, known | st.text(max_size=5))
    labels = st.lists(pair, max_size=3).map(lambda pairs: f"{{{','.join(pairs)}}}" if pairs else "")
    value = (
        st.floats().map(str)
        | st.sampled_from(["NaN", "+Inf", "-Inf", "1e400"])
        | st.text(max_size=5)
    )
    return st.builds(lambda name, label, number: f"{name}{label} {number}", names, labels, value)


@given(
    st.binary(max_size=300)
    | st.text(max_size=300).map(str.encode)
    | st.lists(labelled(), max_size=5).map(lambda lines: "\n".join(lines).encode())
)
@example(b'vlafleet_trainer_cache_info{tier="memory"} 1')
def test_whatever_is_reported_what_is_shown_is_sound(pki: Path, body: bytes) -> None:
    """Refused with one error, or shown: in the format, of known series, of finite number."""
    site = SiteMetrics(
        Identity.load(pki / "site" / "site-a", Role.SITE), CollectorRegistry(auto_describe=False)
    )
    own = samples(site.text())
    try:
        site.take(body)
    except ValueError:
        assert samples(site.text()).keys() == own.keys()
        return
    for series in samples(site.text()).keys() - own.keys() - {"vlafleet_report_timestamp_seconds"}:
        name, _, rest = series.partition("{")
        assert any(name.startswith(metric.name) for metric in REPORTED)
        for key, value in re.findall(r'([^=,]*)="([^"]*)"', rest):
            assert value in VALUES[key]


def plain(port: int, request: bytes = b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n") -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=20)
    connection.sendall(request)
    return connection


def test_without_tls_on_the_labs_own_port(site: SiteMetrics) -> None:
    site.take(REPORT)
    listener = bind("127.0.0.1", 0)
    port = listener.getsockname()[1]
    serve_plainly(site, listener)
    deadline = time.monotonic() + 20
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20) as client:
        while True:
            try:
                answer = client.get("/metrics")
                break
            except httpx.TransportError:
                assert time.monotonic() < deadline
                time.sleep(0.01)
        assert samples(answer.content)["vlafleet_trainer_up"] == 1
        # Nothing else is there, and nothing is taken.
        for path in (REPORT_PATH, "/v1/runtime/acquire-task", "/v1/renew", "/"):
            assert client.post(path, content=REPORT).status_code == 404
        assert client.post("/metrics", content=b"").status_code == 405
    # A head without end is not kept.
    endless = b"GET /metrics HTTP/1.1\r\nx: " + b"a" * 100_000
    with plain(port, endless) as connection, contextlib.suppress(ConnectionError):
        assert connection.recv(65536).startswith(b"HTTP/1.1 400")
    # Nor are more connections than a few.
    held = [plain(port, b"") for _ in range(16)]
    with plain(port) as connection:
        assert connection.recv(65536).startswith(b"HTTP/1.1 503")
    for each in held:
        each.close()


def test_an_address_that_is_taken_names_its_option(authority: Authority) -> None:
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        with pytest.raises(AddressError, match=r"choose another --metrics$"):
            bind("127.0.0.1", taken.getsockname()[1], "--metrics")


@pytest.mark.parametrize("wrong", ["9095", "http://localhost:9095"])
def test_an_address_is_a_host_and_a_port(own: Identity, vlafleet: Vlafleet, wrong: str) -> None:
    done = vlafleet(
        *("supernode", "--identity", own.directory, "--superlink", "localhost:9"),
        *("--dataset", "/nowhere", "--metrics", wrong),
    )
    assert done.returncode == 2
    assert f"{wrong!r} is not HOST:PORT" in done.stderr
