"""The whole check of a site: against a running federation, and with everything broken at once."""

import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from certs.authority import Authority
from certs.errors import CertificateError, ClockError, ConnectionRefusedByFleetError, DatasetError
from certs.files import load_key, pem_certificate
from certs.identity import authority_directory, ensure_federation, identity_directory
from certs.nvml import Driver, Gpu, NoDriverError
from certs.roles import Role
from supernode import dataset, gpu, link, preflight
from supernode.findings import Finding, Report, fail, ok, size, span, warning
from supernode.preflight import check
from supernode.site import Site
from tests.endpoints import Https, https, issued
from tests.enrolment_service import Enrolment, running_enrolment
from tests.throttle import throttled

DATASET = {
    "episodes": 12,
    "held_out_episodes": 3,
    "frames": 4800,
    "fps": 30,
    "cameras": ["top", "wrist"],
    "bytes": 1_234_000_000,
}
ESTIMATE = {
    "device": "cpu",
    "cache_tier": "disk",
    "cache_bytes": 2_000_000,
    "cache_seconds": 30.0,
    "memory_bytes": 1_000_000,
    "gpu_memory_bytes": None,
    "state_bytes": 3_000_000,
    "seconds_per_round": 80.0,
    "bytes_up": 1_000_000,
    "bytes_down": 1_000_000,
    "first_bytes_down": 900_000_000,
    "torch_cuda": None,
    "cuda_available": False,
}
NAMES = [
    "identity", "superexec", "proxy", "enrolment", "superlink", "clock", "link", "disk", "memory", "gpu", "dataset",
    "cache", "round",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same machine wherever the tests run: no proxy, no GPU."""
    for name in ("HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    has_gpu(monkeypatch, "no NVIDIA driver is installed")


def has_gpu(monkeypatch: pytest.MonkeyPatch, found: Driver | str) -> None:
    def read() -> Driver:
        if isinstance(found, str):
            raise NoDriverError(found)
        return found

    monkeypatch.setattr(gpu, "read", read)


@pytest.fixture(autouse=True)
def answers(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What a real process says in the app's place, for a test to change."""
    answer: dict[str, Any] = {
        "uri": "/data/pick",
        "fit": True,
        "findings": [],
        "exit_code": 0,
        "dataset": DATASET,
        "estimate": dict(ESTIMATE),
    }

    def command(*_: object) -> list[str]:
        code = f"import sys; print({json.dumps(answer)!r}); sys.exit({answer['exit_code']})"
        return [sys.executable, "-c", code]

    monkeypatch.setattr(dataset, "_command", command)
    return answer


@pytest.fixture(scope="module")
def service(
    tmp_path_factory: pytest.TempPathFactory, free_port: Callable[[], int]
) -> Iterator[Enrolment]:
    """A running federation."""
    with running_enrolment(tmp_path_factory.mktemp("preflight"), free_port(), free_port()) as made:
        yield made


def a_site(
    directory: Path, pki: Path, superlink: str, enrolment: str, name: str = "site-a"
) -> Site:
    """A site's directory as a join leaves it."""
    site = Site(directory, "test", name, superlink, enrolment, "/data/pick", "cpu", "native")
    shutil.copytree(identity_directory(pki, Role.SITE, name), site.identity)
    shutil.copytree(identity_directory(pki, Role.SUPEREXEC, name), site.superexec)
    site.prepare()
    site.save()
    return site


@pytest.fixture
def site(tmp_path: Path, service: Enrolment) -> Site:
    return a_site(
        tmp_path / "site", service.superlink.pki, service.superlink.address, service.address
    )


def by_name(report: Report, name: str) -> Finding:
    """The only finding of a name."""
    (finding,) = [each for each in report.findings if each.name == name]
    return finding


@pytest.mark.federation
def test_a_site_that_is_well(site: Site) -> None:
    report = check(site)
    found = report.to_json()
    assert set(found) == {"site", "level", "exit_code", "findings", "dataset", "estimate"}
    assert (found["site"], found["level"], found["exit_code"]) == ("site-a", "ok", 0), report.text()
    assert (found["dataset"], found["estimate"]) == (DATASET, ESTIMATE)
    assert [each["name"] for each in found["findings"]] == NAMES
    took = r"\d+(\.\d)? m?s"
    steps = (
        rf"\d address(es)? in {took}, TCP in {took}, TLSv1.3 in {took}, certificate good for "
        rf"(29\.9|30\.0) days, answer in {took}"
    )
    rate = r"\d+(\.\d)? [GMk]B/s"
    sentences = [
        r"site certificate good for 7\.0 days, renewed in 4\.7 days",
        r"superexec certificate good for 7\.0 days, renewed in 4\.7 days",
        "no proxy is set: connections go straight to the federation",
        f"the enrolment service {site.enrolment}: {steps}",
        f"the SuperLink {site.superlink}: {steps}",
        rf"this machine's clock is \d+(\.\d)? ms (ahead of|behind) the SuperLink's \(± {took}\)",
        rf"{rate} up, {rate} down, {took} round trip; messages go in chunks of .*, a round's in {took}",
        rf".* free for {site.state} and {site.cache}; a run takes up to 5\.0 MB more",
        r".* of .* of memory free; training takes about 1\.0 MB",
        "training on the CPU, which is slow for the real model; there is no GPU",
        "/data/pick: 12 episodes, 3 of them held out, 4800 frames at 30 a second, cameras top, wrist, 1.2 GB",
        r"the cache of what the frozen model makes of the frames takes 2\.0 MB and 30 s to fill once, on the disk",
        rf"a round takes about {took}: 80 s of work on cpu and {took} of transfer; 1\.0 MB down \(the first time "
        r"900 MB\) and 1\.0 MB up",
    ]
    for finding, sentence in zip(found["findings"], sentences, strict=True):
        assert set(finding) == {"name", "level", "sentence", "remedy", "exit_code"}
        assert (finding["level"], finding["remedy"], finding["exit_code"]) == ("ok", None, 0)
        assert re.fullmatch(sentence, finding["sentence"]), finding
    json.dumps(found)
    report.require()


@pytest.mark.federation
def test_nothing_secret_is_said(site: Site) -> None:
    report = check(site)
    said = report.text() + json.dumps(report.to_json())
    for key in ("identity/tls.key", "identity/node.key", "superexec/tls.key"):
        lines = (site.directory / key).read_text().splitlines()[1:-1]
        assert lines
        assert not any(line in said for line in lines)


@pytest.mark.federation
def test_a_slow_link(site: Site, service: Enrolment, answers: dict[str, Any]) -> None:
    """30 MB each way at no more than 200 kB/s are 300 s, half a round's time and more."""
    answers["estimate"].update(bytes_up=30_000_000, bytes_down=30_000_000)
    with throttled(service.superlink.port, delay=0.02) as slow:
        report = check(replace(site, superlink=f"localhost:{slow.port}"))
    finding = by_name(report, "link")
    assert (finding.level, finding.exit_code) == ("warning", 0)
    matched = re.fullmatch(
        r"(\d+) kB/s up, (\d+) kB/s down, \d+ ms round trip; messages go in chunks of \d+ KiB, \d at a time, a round's "
        r"in (\d+(\.\d)?) (s|min), more than a third of a round's 10 min",
        finding.sentence,
    )
    assert matched, finding.sentence
    # Nothing makes the link faster; a busy machine makes it slower.
    assert int(matched[1]) < 210
    assert int(matched[2]) < 210
    assert "exchange=lora" in (finding.remedy or "")
    assert (report.level, report.exit_code) == ("warning", 0)
    report.require()
    round_ = by_name(report, "round")
    assert "80 s of work on cpu and " in round_.sentence


@pytest.mark.federation
def test_an_evicted_site(tmp_path: Path, service: Enrolment) -> None:
    site = a_site(
        *(tmp_path / "site", service.superlink.pki, service.superlink.address, service.address),
        "site-b",
    )
    assert check(site).exit_code == 0
    assert service.operator("POST", "/v1/revoke", {"site": "site-b"})["certificates"] == 2
    report = check(site)
    finding = by_name(report, "superlink")
    assert (finding.level, finding.exit_code) == ("fail", 15)
    # The enrolment service follows the list within a second; until then it tells the time.
    assert re.fullmatch(
        f"the SuperLink {site.superlink}: ends the connection after the handshake, as it does for a certificate "
        r"that is revoked \(.*\); (the clock and )?the link's speed not checked",
        finding.sentence,
    ), finding.sentence
    assert "a new invitation brings it back" in (finding.remedy or "")
    assert "link" not in {each.name for each in report.findings}
    with pytest.raises(ConnectionRefusedByFleetError, match="ends the connection"):
        report.require()


# --- against stand-ins, for what a federation on one machine does not show ---------------------


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("pki")
    assert len(list(ensure_federation(made, "test", ["site-a"]))) == 8
    return made


@pytest.fixture
def servers(tmp_path: Path, pki: Path) -> Iterator[tuple[Https, Https]]:
    """A SuperLink and an enrolment service that tell the time and nothing else."""
    files = []
    for role in (Role.SUPERLINK, Role.ENROLMENT):
        directory = identity_directory(pki, role, role)
        files.append(tmp_path / f"{role}.pem")
        files[-1].write_bytes(
            (directory / "tls.key").read_bytes() + (directory / "tls.crt").read_bytes()
        )
    with https(files[0]) as superlink, https(files[1]) as enrolment:
        yield superlink, enrolment


@pytest.fixture
def lone(tmp_path: Path, pki: Path, servers: tuple[Https, Https]) -> Site:
    """A site of these servers."""
    addresses = [f"localhost:{each.port}" for each in servers]
    return a_site(tmp_path / "site", pki, addresses[0], addresses[1])


def test_a_skewed_clock(lone: Site, servers: tuple[Https, Https]) -> None:
    servers[0].skew = -6.0
    report = check(lone)
    finding = by_name(report, "clock")
    assert (finding.level, finding.exit_code) == ("fail", 21)
    assert finding.sentence.startswith("this machine's clock is 6 s ahead of the SuperLink's")
    assert "timedatectl set-ntp true" in (finding.remedy or "")
    assert report.exit_code == 21
    with pytest.raises(ClockError, match=r"6 s ahead .*: switch on time synchronisation"):
        report.require()


def test_a_link_that_cannot_be_measured(lone: Site) -> None:
    """The stand-in knows no POST."""
    report = check(lone)
    finding = by_name(report, "link")
    assert (finding.level, finding.exit_code) == ("warning", 0)
    assert finding.sentence.startswith(f"the link to {lone.superlink} was not measured: ")
    assert by_name(report, "round").sentence.startswith(
        "a round takes about 80 s: 80 s of work on cpu and no time for transfer, which was not measured; 1.0 MB down"
    )


def test_servers_that_do_not_tell_the_time(lone: Site, servers: tuple[Https, Https]) -> None:
    for server in servers:
        server.body = b"{}"
    finding = by_name(check(lone), "clock")
    assert (finding.level, finding.exit_code) == ("warning", 0)
    assert finding.sentence == "the clock was not compared: no server told the time"


def test_the_clock_is_compared_with_whom_answers(
    lone: Site, servers: tuple[Https, Https], free_port: Callable[[], int]
) -> None:
    servers[1].skew = 400.0
    report = check(replace(lone, superlink=f"localhost:{free_port()}"))
    finding = by_name(report, "clock")
    assert finding.level == "fail"
    assert re.match(
        r"this machine's clock is 6\.7 min behind the enrolment service's", finding.sentence
    )
    superlink = by_name(report, "superlink")
    assert superlink.sentence.endswith("refuses connections; the link's speed not checked")
    # The first fail's.
    assert report.exit_code == 15


def test_failures_do_not_hide_each_other(
    lone: Site,
    servers: tuple[Https, Https],
    free_port: Callable[[], int],
    answers: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers.update(fit=False, findings=["no stats", "a NaN"], exit_code=12, estimate=None)
    full = type(shutil.disk_usage("/"))(1, 1, 0)
    monkeypatch.setattr("supernode.capacity.shutil.disk_usage", lambda _: full)
    (lone.superexec / "tls.crt").unlink()
    broken = replace(
        lone,
        superlink="superlink.invalid:9092",
        enrolment=f"localhost:{free_port()}",
        device="cuda",
    )
    report = check(broken)
    assert [(each.name, each.level, each.exit_code) for each in report.findings] == [
        ("identity", "ok", 0),
        ("superexec", "fail", 10),
        ("proxy", "ok", 0),
        ("enrolment", "fail", 15),
        ("superlink", "fail", 15),
        ("disk", "fail", 19),
        ("memory", "ok", 0),
        ("gpu", "fail", 22),
        ("dataset", "fail", 12),
        ("dataset", "fail", 12),
    ]
    assert by_name(report, "superlink").sentence.endswith(
        "; the clock and the link's speed not checked"
    )
    assert (report.level, report.exit_code) == ("fail", 10)
    assert all(each.remedy for each in report.findings if each.level == "fail")
    with pytest.raises(CertificateError, match=r"tls\.crt"):
        report.require()


def test_an_unfit_dataset_alone(lone: Site, answers: dict[str, Any]) -> None:
    answers.update(fit=False, findings=["episode 3 holds a NaN: record it again."], exit_code=12)
    report = check(lone)
    assert (report.exit_code, report.dataset, report.estimate) == (12, DATASET, ESTIMATE)
    with pytest.raises(DatasetError, match=r"^episode 3 holds a NaN: record it again\.$"):
        report.require()


def test_proxy_variables_that_stop_flower(lone: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", "socks5://me:s3cret@proxy.lab:1080")
    report = check(lone)
    finding = by_name(report, "proxy")
    assert (finding.level, finding.exit_code) == ("fail", 15)
    assert finding.sentence.endswith("SOCKS is not supported; nothing of the network was checked")
    assert not {"enrolment", "superlink", "clock", "link"} & {each.name for each in report.findings}
    assert "s3cret" not in report.text()


def test_containers_and_proxies(lone: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://me:s3cret@127.0.0.1:1")
    report = check(replace(lone, mode="compose"))
    assert by_name(report, "proxy").level == "warning"
    assert "the proxy http://127.0.0.1:1" in by_name(report, "superlink").sentence
    assert "s3cret" not in report.text() + json.dumps(report.to_json())


def test_a_cluster_is_not_this_machine(lone: Site) -> None:
    report = check(replace(lone, mode="helm"))
    finding = by_name(report, "hardware")
    assert (finding.level, finding.exit_code) == ("warning", 0)
    assert not {"disk", "memory", "gpu"} & {each.name for each in report.findings}
    assert by_name(report, "superlink").level == "ok"


def test_a_gpu_is_held_against_the_estimate(
    lone: Site, answers: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    has_gpu(
        monkeypatch,
        Driver("580.1", (13, 0), [Gpu("GPU-1", "NVIDIA T4", 16 * 10**9, 16 * 10**9, (7, 5), 0)]),
    )
    answers["estimate"].update(
        device="cuda", torch_cuda="13.0", cuda_available=True, gpu_memory_bytes=20 * 10**9
    )
    report = check(replace(lone, device="cuda"))
    found = [each for each in report.findings if each.name == "gpu"]
    assert [(each.level, each.exit_code) for each in found] == [("warning", 0), ("fail", 22)]
    assert report.exit_code == 22


def test_a_round_that_takes_too_long(lone: Site, answers: dict[str, Any]) -> None:
    answers["estimate"]["seconds_per_round"] = 4000.0
    finding = by_name(check(lone), "round")
    assert (finding.level, finding.exit_code) == ("warning", 0)
    assert finding.sentence.startswith("a round takes about 66.7 min: 66.7 min of work on cpu")
    assert finding.sentence.endswith("that is longer than the 10 min a round has by default")
    assert "fewer local-steps" in (finding.remedy or "")


def test_a_round_on_a_device_that_is_not_there(lone: Site, answers: dict[str, Any]) -> None:
    answers["estimate"].update(seconds_per_round=None, cache_seconds=None, device="cuda")
    report = check(lone)
    assert "no time for work, for the device is not there and no time" in (
        by_name(report, "round").sentence
    )
    assert by_name(report, "cache").sentence == (
        "the cache of what the frozen model makes of the frames takes 2.0 MB, on the disk"
    )


@pytest.mark.parametrize(
    ("tier", "level", "says"),
    [
        ("gpu", "ok", "takes 2.0 MB and 30 s to fill once, in the GPU's memory"),
        ("memory", "ok", "takes 2.0 MB and 30 s to fill once, in memory"),
        ("embeddings", "warning", "room for image embeddings only"),
        ("none", "warning", "there is no room for a cache"),
    ],
)
def test_where_the_cache_lies(tier: str, level: str, says: str) -> None:
    finding = preflight._cache({**ESTIMATE, "cache_tier": tier})
    assert (finding.name, finding.level, finding.exit_code) == ("cache", level, 0)
    assert says in finding.sentence
    assert (finding.remedy is None) == (level == "ok")


def test_the_default_of_a_round_is_the_run_configs() -> None:
    from app.config import RunConfig

    assert RunConfig().round_timeout == preflight._ROUND_TIMEOUT_SECONDS


# --- identities --------------------------------------------------------------------------------


def identities(site: Site) -> dict[str, Finding]:
    findings, _ = preflight._identities(site)
    return {each.name: each for each in findings}


def reissue(site: Site, pki: Path, lifetime: timedelta) -> None:
    authority = Authority.load(authority_directory(pki))
    key = load_key(site.identity / "tls.key").public_key()
    certificate = authority.issue(key, Role.SITE, "site-a", hosts=["localhost"], lifetime=lifetime)
    (site.identity / "tls.crt").write_bytes(pem_certificate(certificate))


def failed(finding: Finding, sentence: str) -> None:
    assert (finding.level, finding.exit_code) == ("fail", 10)
    assert re.search(sentence, finding.sentence), finding.sentence
    assert finding.remedy is not None


@pytest.mark.parametrize("name", ["tls.key", "tls.crt", "ca.crt", "node.key", "node.pub"])
def test_a_file_of_the_identity_is_missing(lone: Site, name: str) -> None:
    (lone.identity / name).unlink()
    found = identities(lone)
    failed(found["identity"], name)
    assert found["superexec"].level == "ok"


def test_an_expired_certificate(lone: Site, pki: Path) -> None:
    reissue(lone, pki, timedelta(seconds=-1))
    failed(identities(lone)["identity"], "is valid from .* to ")


def test_a_renewal_that_is_due(lone: Site, pki: Path) -> None:
    authority = Authority.load(authority_directory(pki))
    start, end = timedelta(days=-6), timedelta(days=1)
    both = issued(lone.directory, authority, Role.SITE, "site-a", start=start, end=end)
    combined = both.read_bytes()
    at = combined.index(b"-----BEGIN CERTIFICATE")
    (lone.identity / "tls.key").write_bytes(combined[:at])
    (lone.identity / "tls.crt").write_bytes(combined[at:])
    finding = identities(lone)["identity"]
    assert (finding.level, finding.exit_code) == ("warning", 0)
    assert re.fullmatch(
        r"site certificate good for 24 h, and its renewal is due for 32 h", finding.sentence
    ), finding.sentence
    assert "start the site" in (finding.remedy or "")


@pytest.mark.parametrize("name", ["tls.key", "node.key"])
def test_a_key_that_others_may_read(lone: Site, name: str) -> None:
    (lone.identity / name).chmod(0o640)
    finding = identities(lone)["identity"]
    assert finding.level == "warning"
    assert finding.sentence.startswith(f"{lone.identity / name} has the mode 0640")
    assert finding.remedy == f"Run 'chmod 600 {lone.identity / name}'."


@pytest.mark.parametrize("name", ["identity/tls.key", "identity/node.key", "superexec/tls.key"])
def test_a_key_that_everybody_may_read(lone: Site, name: str) -> None:
    path = lone.directory / name
    path.chmod(0o644)
    finding = identities(lone)[path.parent.name]
    failed(finding, f"^{path} is open to every user$")
    assert finding.remedy == f"Run 'chmod 600 {path}'."


def test_the_identity_of_another_site(lone: Site) -> None:
    found = identities(replace(lone, name="site-b"))
    failed(found["identity"], "is the identity spiffe://test/site/site-a, and the site is 'site-b'")
    failed(found["superexec"], "spiffe://test/superexec/site-a")


def test_without_an_identity_the_network_is_looked_at(lone: Site) -> None:
    """The enrolment service answers those without a certificate, by the authority that is still there."""
    (lone.identity / "tls.key").unlink()
    report = check(lone)
    assert by_name(report, "enrolment").level == "ok"
    assert by_name(report, "superlink").level == "warning"
    assert by_name(report, "superlink").sentence.endswith(
        "TLS was not checked without the site's identity; the link's speed not checked"
    )
    assert by_name(report, "clock").level == "ok"
    assert report.exit_code == 10


def test_with_a_damaged_bundle_the_network_is_looked_at(lone: Site) -> None:
    (lone.identity / "ca.crt").write_bytes(b"\xff no certificate")
    report = check(lone)
    assert by_name(report, "identity").exit_code == 10
    assert by_name(report, "enrolment").level == "warning"
    assert "TLS was not checked" in by_name(report, "enrolment").sentence


def test_without_any_file_the_network_is_looked_at(lone: Site) -> None:
    shutil.rmtree(lone.identity)
    report = check(lone)
    assert by_name(report, "enrolment").level == "warning"
    assert by_name(report, "superlink").level == "warning"
    assert report.exit_code == 10


# --- the report --------------------------------------------------------------------------------


def test_a_report() -> None:
    found = [
        ok("identity", "all is well"),
        warning("link", "it is slow", "Find a faster one."),
        fail("clock", "it is ahead", "Set it.", ClockError),
        fail("dataset", "it is unfit.", "Record it again.", DatasetError),
    ]
    report = Report("site-a", found, None, None)
    assert (report.level, report.exit_code) == ("fail", 21)
    assert report.to_json() == {
        "site": "site-a",
        "level": "fail",
        "exit_code": 21,
        "findings": [
            {"name": "identity", "level": "ok", "sentence": "all is well", "remedy": None, "exit_code": 0},
            {"name": "link", "level": "warning", "sentence": "it is slow", "remedy": "Find a faster one.",
             "exit_code": 0},
            {"name": "clock", "level": "fail", "sentence": "it is ahead", "remedy": "Set it.", "exit_code": 21},
            {"name": "dataset", "level": "fail", "sentence": "it is unfit.", "remedy": "Record it again.",
             "exit_code": 12},
        ],
        "dataset": None,
        "estimate": None,
    }  # fmt: skip
    assert report.text() == (
        "✓ identity  all is well\n"
        "! link      it is slow\n"
        "            → Find a faster one.\n"
        "✗ clock     it is ahead\n"
        "            → Set it.\n"
        "✗ dataset   it is unfit.\n"
        "            → Record it again."
    )
    with pytest.raises(ClockError, match=r"^it is ahead: set it\.$"):
        report.require()
    assert Report("site-a", found[:2], None, None).level == "warning"
    Report("site-a", found[:2], None, None).require()


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (12_345, "12 kB"), (9.96e6, "10.0 MB"), (1e12, "1000 GB")],
)  # fmt: skip
def test_sizes(count: float, text: str) -> None:
    assert size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0004, "0.4 ms"), (0.0354, "35 ms"), (1, "1 s"), (4.25, "4.2 s"), (119, "119 s"), (120, "2 min"),
        (754, "12.6 min"), (7200, "2 h"), (172_800, "2.0 days"),
    ],
)  # fmt: skip
def test_spans(seconds: float, text: str) -> None:
    assert span(seconds) == text


def test_a_links_rates_are_used_for_a_round() -> None:
    measured = link.Link(1e6, 10e6, 0.01)
    estimate = {"bytes_up": 100e6, "bytes_down": 100e6}
    assert preflight._transfer(estimate, measured) == 110.0
