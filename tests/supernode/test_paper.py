"""Joining by files: neither holds a secret, and an impostor's is not taken."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from certs.enrolment import Application, keys_fingerprint
from certs.errors import CertificateError, ConfigError
from certs.identity import Identity
from certs.roles import Role
from superlink.members import candidate
from supernode.paper import accept, request
from supernode.site import Site
from tests.joining import FEDERATION, Fleet, after, files, keys

NAME = "lab-7"


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path / "home", FEDERATION, NAME, "", "", "/data/so101", "cuda", "native")


def requested(site: Site) -> Path:
    out = site.directory.parent / "request.json"
    request(site, out, lambda _line: None)
    return out


def approved(fleet: Fleet, application: Path) -> Path:
    """What the operator's command does with a request's file."""
    record = json.loads(application.read_text())
    membership = fleet.members.approve(candidate(record, FEDERATION))
    path = application.with_name("membership.json")
    path.write_text(json.dumps(membership.to_json()))
    return path


def accepted(path: Path, fingerprint: str, site: Site) -> list[str]:
    said: list[str] = []
    accept(path, fingerprint, site.directory, said.append)
    return said


def test_a_site_joins_by_files(fleet: Fleet, site: Site) -> None:
    application = requested(site)
    assert fleet.asked == []
    made = keys(site.directory)
    said = accepted(approved(fleet, application), fleet.fingerprint, site)
    assert keys(site.directory) == made
    assert fleet.running[NAME] == replace(
        site, superlink=fleet.superlink, enrolment=fleet.enrolment
    )
    assert Identity.load(site.identity, Role.SITE).peer.name == NAME
    assert Identity.load(site.superexec, Role.SUPEREXEC).peer.name == NAME
    assert any(line.startswith("online") for line in said)


def test_the_request_holds_no_secret_and_stays_the_same_keys(site: Site) -> None:
    said: list[str] = []
    first = site.directory.parent / "request.json"
    request(site, first, said.append)
    record = json.loads(first.read_text())
    fingerprint = keys_fingerprint(*Application.from_json(record).keys())
    assert f"keys        {fingerprint}," in "\n".join(said)
    for name, key in keys(site.directory).items():
        body = b"".join(key.splitlines()[1:-1])[60:100]
        assert body not in first.read_bytes(), name
    second = json.loads(requested(site).read_text())
    # Signatures and requests are made anew; the keys in them are not.
    assert second["node_key"] == record["node_key"]
    assert [key.public_numbers() for key in Application.from_json(second).keys()] == [  # noqa: SIM118
        key.public_numbers()
        for key in Application.from_json(record).keys()  # noqa: SIM118
    ]


def test_before_the_answer_it_is_no_member(site: Site) -> None:
    requested(site)
    with pytest.raises(ConfigError, match="vlafleet site accept"):
        Site.load(site.directory)


@pytest.mark.parametrize(
    "written",
    [
        lambda digits: digits.upper(),
        lambda digits: ":".join(digits[at : at + 2] for at in range(0, 64, 2)),
        lambda digits: f" {digits[:32]} {digits[32:]}\n",
    ],
)
def test_a_fingerprint_reads_as_people_write_it(
    fleet: Fleet, site: Site, written: Callable[[str], str]
) -> None:
    accepted(approved(fleet, requested(site)), written(fleet.fingerprint), site)
    assert NAME in fleet.running


@pytest.mark.parametrize("fingerprint", ["", "ab", "0" * 63, "0" * 65, "g" * 64, "-" * 64])
def test_what_is_no_fingerprint_is_refused(fleet: Fleet, site: Site, fingerprint: str) -> None:
    path = approved(fleet, requested(site))
    with pytest.raises(CertificateError, match="64 hexadecimal digits"):
        accepted(path, fingerprint, site)


def test_an_impostors_membership_stores_nothing(fleet: Fleet, site: Site, tmp_path: Path) -> None:
    """Whole, good for these keys, and of another authority that bears the same name."""
    application = requested(site)
    impostor = Fleet(tmp_path / "impostor", "localhost:1", "localhost:2")
    path = approved(impostor, application)
    before = files(site.directory)
    with pytest.raises(
        CertificateError, match=r"another authority .* compare it .* nothing was stored"
    ):
        accepted(path, fleet.fingerprint, site)
    assert files(site.directory) == before
    assert NAME not in fleet.running


def altered(record: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**record, **changes}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda r: altered(r, certificate=r["superexec_certificate"]),
            "speaks for spiffe://test/superexec",
        ),
        (
            lambda r: altered(r, superexec_certificate=r["certificate"]),
            "speaks for spiffe://test/site",
        ),
        (lambda r: altered(r, certificate="x"), "is not PEM"),
        (lambda r: altered(r, authority="x"), "is not a PEM certificate"),
        (lambda r: altered(r, authority=r["certificate"]), "another authority"),
        (lambda r: altered(r, certificate=7), "are strings"),
        (lambda r: {"site": r["site"]}, "a membership has the fields"),
        (lambda _: [], "a membership has the fields"),
    ],
)
def test_an_altered_membership_stores_nothing(
    fleet: Fleet, site: Site, change: Callable[[dict[str, Any]], Any], words: str
) -> None:
    path = approved(fleet, requested(site))
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    before = files(site.directory)
    with pytest.raises(CertificateError, match=words):
        accepted(path, fleet.fingerprint, site)
    assert files(site.directory) == before


@pytest.mark.parametrize("field", ["superlink", "enrolment"])
@pytest.mark.parametrize("address", ["", "fleet", "fleet:1\nx: y"])
def test_an_address_that_is_none_is_refused(
    fleet: Fleet, site: Site, field: str, address: str
) -> None:
    path = approved(fleet, requested(site))
    path.write_text(json.dumps({**json.loads(path.read_text()), field: address}))
    before = files(site.directory)
    with pytest.raises(CertificateError, match="is not host:port"):
        accepted(path, fleet.fingerprint, site)
    assert files(site.directory) == before


def test_a_membership_for_other_keys_is_refused(fleet: Fleet, site: Site, tmp_path: Path) -> None:
    other = replace(site, directory=tmp_path / "other")
    path = approved(fleet, requested(other))
    requested(site)
    with pytest.raises(CertificateError, match="it answers another application"):
        accepted(path, fleet.fingerprint, site)


def test_a_file_that_is_none_is_one_sentence(fleet: Fleet, site: Site, tmp_path: Path) -> None:
    requested(site)
    with pytest.raises(CertificateError, match="cannot be read"):
        accepted(tmp_path / "none.json", fleet.fingerprint, site)
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(CertificateError, match="is not a membership"):
        accepted(tmp_path / "bad.json", fleet.fingerprint, site)


def test_nobody_has_applied_here(fleet: Fleet, site: Site, tmp_path: Path) -> None:
    path = approved(fleet, requested(site))
    with pytest.raises(ConfigError, match="vlafleet site request"):
        accept(path, fleet.fingerprint, tmp_path / "elsewhere", print)
    assert not (tmp_path / "elsewhere").exists()


def test_a_directory_of_another_site_is_left_alone(fleet: Fleet, site: Site) -> None:
    path = approved(fleet, requested(site))
    with pytest.raises(ConfigError, match="choose another --directory"):
        requested(replace(site, name="lab-8"))
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "site": "lab-8"}))
    with pytest.raises(ConfigError, match="choose another --directory"):
        accepted(path, fleet.fingerprint, site)


class Crash(BaseException):
    """What ends a process wherever it is."""


@pytest.mark.parametrize(
    "step",
    [
        "supernode.join.keep",
        "supernode.membership.store_identity",
        "supernode.join.store",
        "supernode.join.forget",
        "supernode.preflight.check",
        "supernode.native.start",
    ],
)
def test_an_interrupted_accept_is_run_again(
    fleet: Fleet, site: Site, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = approved(fleet, requested(site))
    made = keys(site.directory)
    owner, _, name = step.rpartition(".")
    function = getattr(__import__(owner, fromlist=[name]), name)
    monkeypatch.setattr(step, after(function, Crash()))
    with pytest.raises(Crash):
        accepted(path, fleet.fingerprint, site)
    accepted(path, fleet.fingerprint, site)
    assert keys(site.directory) == made
    assert fleet.running[NAME] == Site.load(site.directory)
    assert not (site.directory / "membership.json").exists()
