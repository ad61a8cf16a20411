"""A join: what it makes, that it goes on where it was interrupted, and that what is refused leaves nothing."""

import json
import stat
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from certs.errors import (
    CertificateError,
    ConfigError,
    ConnectionRefusedByFleetError,
    DatasetError,
    InvitationError,
    RunFailedError,
    StorageError,
    UnknownSiteError,
)
from certs.files import load_certificate
from certs.identity import Identity
from certs.invitation import Invitation
from certs.roles import Role
from supernode import enrol, membership
from supernode.findings import Report, fail
from supernode.join import default_mode, join, stop
from supernode.site import Site, locked
from tests.joining import FEDERATION, Fleet, after, before, files, keys

NAME = "lab-7"


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """What the operator of a site asks for."""
    return planned(tmp_path / "home")


def planned(directory: Path, **changes: Any) -> Site:
    made = Site(directory, FEDERATION, NAME, "", "", "/data/so101", "cpu", "native")
    return replace(made, **changes)


def joined(site: Site, invitation: Invitation) -> list[str]:
    said: list[str] = []
    join(site, invitation, said.append)
    return said


def test_a_join_makes_a_member_that_runs(fleet: Fleet, site: Site) -> None:
    said = joined(site, fleet.invite(NAME))
    assert Site.load(site.directory) == replace(
        site, superlink=fleet.superlink, enrolment=fleet.enrolment
    )
    for directory, role in ((site.identity, Role.SITE), (site.superexec, Role.SUPEREXEC)):
        peer = Identity.load(directory, role).peer
        assert (peer.federation, peer.name) == (FEDERATION, NAME)
    assert [node.name for node in fleet.register.known] == [NAME]
    assert fleet.running[NAME].dataset == "/data/so101"
    assert fleet.states(NAME) == ["used"]
    assert fleet.datasets.of(NAME) is not None
    text = "\n".join(said)
    for step in ("authority", "keys", "membership", "dataset", "start", "online"):
        assert f"\n{step}" in f"\n{text}", step
    assert fleet.fingerprint in text
    assert f"vlafleet site stop --directory {site.directory}" in text
    assert "never leave this machine" in text


def test_what_it_makes_is_its_owners_alone(fleet: Fleet, site: Site) -> None:
    joined(site, fleet.invite(NAME))
    private = {path for path in site.directory.rglob("*") if path.suffix == ".key"}
    assert {path.name for path in private} == {"tls.key", "node.key"}
    assert len(private) == 3
    for path in private:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    for path in (site.directory, site.identity, site.superexec, site.state, site.logs, site.cache):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700, path


def test_the_secret_is_nowhere(
    fleet: Fleet, site: Site, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Neither in what is printed or logged, nor in a file of the site or the service, nor the keys elsewhere."""
    caplog.set_level("DEBUG")
    invitation = fleet.invite(NAME)
    said = joined(site, invitation)
    # Again, refused: an error's text is looked at as well.
    with pytest.raises(InvitationError) as error:
        joined(planned(site.directory.parent / "other"), invitation)
    out, err = capfd.readouterr()
    told = "\n".join([*said, out, err, caplog.text, str(error.value), repr(error.value)])
    written = {**files(site.directory), **files(fleet.directory)}
    text = invitation.encode()
    for secret in (text, text[-40:], invitation.secret.hex(), repr(invitation.secret)):
        assert secret not in told
        assert not [name for name, data in written.items() if secret.encode() in data]
    assert not [name for name, data in written.items() if invitation.secret in data]
    for name, key in keys(site.directory).items():
        body = b"".join(key.splitlines()[1:-1])[60:100].decode()  # before it, all keys are alike
        assert body not in told, name
        assert not [path for path, data in files(fleet.directory).items() if body.encode() in data]


class Crash(BaseException):
    """What ends a process wherever it is."""


# Where a join may be interrupted, in order.
STEPS = [
    "supernode.join.inviter",
    "supernode.membership.ensure_node_key",
    "supernode.membership.ensure_key",
    "supernode.join.enrol",
    "supernode.join.check",
    "supernode.join.keep",
    "supernode.membership.store_identity",
    "supernode.join.store",
    "supernode.site.Site.save",
    "supernode.join.forget",
    "supernode.preflight.check",
    "supernode.join.report_dataset",
    "supernode.native.start",
    "supernode.join._wait_online",
]


def found(name: str) -> Any:
    owner, _, attribute = name.rpartition(".")
    if owner == "supernode.site.Site":
        return Site.save
    return getattr(__import__(owner, fromlist=[attribute]), attribute)


@pytest.mark.parametrize("when", [before, after])
@pytest.mark.parametrize("step", STEPS)
def test_an_interrupted_join_is_run_again(
    fleet: Fleet,
    site: Site,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    when: Callable[[Any, BaseException], Any],
) -> None:
    invitation = fleet.invite(NAME)
    monkeypatch.setattr(step, when(found(step), Crash()))
    with pytest.raises(Crash):
        joined(site, invitation)
    made = keys(site.directory)
    joined(site, invitation)
    # No key that was there is another now, and there is one of each.
    assert len(keys(site.directory)) == 3
    assert made.items() <= keys(site.directory).items()
    assert fleet.states(NAME) == ["used"]
    assert len(fleet.register.known) == 1
    assert fleet.running[NAME] == Site.load(site.directory)
    assert len(fleet.starts) == 1
    assert not (site.directory / "membership.json").exists()
    certificate = load_certificate(site.identity / "tls.crt")
    # Once more: a member spends nothing, and what runs goes on.
    spent = [event["event"] for event in fleet.events()]
    joined(site, invitation)
    assert [event["event"] for event in fleet.events()] == spent
    assert load_certificate(site.identity / "tls.crt") == certificate
    assert fleet.stops == []
    assert len(fleet.starts) == 1


def test_interrupted_after_the_answer_it_asks_nobody_again(
    fleet: Fleet, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The invitation may be over by then."""
    invitation = fleet.invite(NAME)
    with monkeypatch.context() as patch:
        patch.setattr("supernode.join.store", before(membership.store, Crash()))
        with pytest.raises(Crash):
            joined(site, invitation)
    fleet.asked.clear()
    joined(site, replace(invitation, expires=1_000_000_000))
    assert fleet.asked == [("PUT", "/v1/dataset")]
    assert Identity.load(site.identity, Role.SITE)


def test_a_member_whose_invitation_is_long_over_joins_again(fleet: Fleet, site: Site) -> None:
    invitation = fleet.invite(NAME)
    joined(site, invitation)
    fleet.running.clear()
    said = joined(site, replace(invitation, expires=1_000_000_000))
    assert "no invitation is needed" in "\n".join(said)
    assert len(fleet.starts) == 2


@pytest.mark.parametrize("change", [{"dataset": "/data/other"}, {"device": "cuda:1"}])
def test_what_changed_restarts_the_site(
    fleet: Fleet, site: Site, change: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    invitation = fleet.invite(NAME)
    joined(site, invitation)
    changed = planned(site.directory, **change)
    # Interrupted between the stop and the start, it still knows.
    with monkeypatch.context() as patch:
        patch.setattr("supernode.site.Site.save", before(Site.save, Crash()))
        with pytest.raises(Crash):
            joined(changed, invitation)
    assert Site.load(site.directory).dataset == "/data/so101"
    joined(changed, invitation)
    for name, value in change.items():
        assert getattr(fleet.running[NAME], name) == value
    assert len(fleet.starts) == 2
    assert len(fleet.stops) == 1


def test_a_machine_that_does_not_pass_keeps_what_runs_running(
    fleet: Fleet, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    invitation = fleet.invite(NAME)
    joined(site, invitation)
    finding = fail("dataset", "it has no episodes", "Record some", DatasetError)
    report = Report(NAME, [finding], None, None)
    said: list[str] = []
    empty = planned(site.directory, dataset="/data/empty")
    with monkeypatch.context() as patch:
        patch.setattr("supernode.preflight.check", lambda _site: report)
        with pytest.raises(DatasetError, match="no episodes"):
            join(empty, invitation, said.append)
    assert "it has no episodes" in "\n".join(said)
    assert fleet.running[NAME].dataset == "/data/so101"
    assert Site.load(site.directory).dataset == "/data/so101"


def test_a_revoked_site_that_is_invited_again_makes_fresh_keys(fleet: Fleet, site: Site) -> None:
    joined(site, fleet.invite(NAME))
    former = keys(site.directory)
    fleet.revoke(NAME)
    time.sleep(1.1)  # how often the revocation list's file is looked at
    said = joined(site, fleet.invite(NAME))
    assert "made anew" in "\n".join(said)
    assert not former.items() & keys(site.directory).items()
    assert [node.status for node in fleet.register.known] == ["unregistered", "registered"]
    assert len(fleet.stops) == 1
    assert len(fleet.starts) == 2


def test_a_revoked_site_does_not_come_back_with_its_old_invitation(
    fleet: Fleet, site: Site
) -> None:
    invitation = fleet.invite(NAME)
    joined(site, invitation)
    fleet.revoke(NAME)
    time.sleep(1.1)
    kept = files(site.directory)
    with pytest.raises(InvitationError, match="cancelled"):
        joined(site, invitation)
    # Nothing of a site that was there is removed.
    assert files(site.directory) == kept


def test_a_membership_that_was_stored_does_not_bring_a_revoked_site_back(
    fleet: Fleet, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted just before its file was removed, and run again only after the revocation."""
    with monkeypatch.context() as patch:
        patch.setattr("supernode.join.forget", before(membership.forget, Crash()))
        with pytest.raises(Crash):
            joined(site, fleet.invite(NAME))
    former = keys(site.directory)
    assert (site.directory / "membership.json").exists()
    fleet.revoke(NAME)
    time.sleep(1.1)
    joined(site, fleet.invite(NAME))
    assert not former.items() & keys(site.directory).items()
    assert NAME in fleet.running


def test_a_superlink_that_is_away_spends_no_invitation(
    fleet: Fleet, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A member whose SuperLink cannot be asked is a member."""
    joined(site, fleet.invite(NAME))
    again = fleet.invite(NAME)
    away = ConnectionRefusedByFleetError("the SuperLink cannot be reached")

    def nobody(_site: Site) -> None:
        raise away

    monkeypatch.setattr("supernode.presence.presence", nobody)
    joined(site, again)
    assert "open" in fleet.states(NAME)


REFUSED = [
    ({"fingerprint": "00" * 32}, "another authority than the invitation names"),
    ({"expires": 1_000_000_000}, "ended on 2001-09-09 at 01:46 UTC"),
]


@pytest.mark.parametrize(("change", "words"), REFUSED)
def test_what_is_refused_here_sends_and_writes_nothing(
    fleet: Fleet, site: Site, change: dict[str, Any], words: str
) -> None:
    with pytest.raises(InvitationError, match=words):
        joined(site, fleet.invite(NAME, **change))
    assert {path for _, path in fleet.asked} <= {"/v1/authority"}
    assert not site.directory.exists()
    assert fleet.states(NAME) == ["open"]
    assert fleet.register.known == []


def test_an_invitation_of_another_federation_sends_nothing(fleet: Fleet, site: Site) -> None:
    invitation = fleet.invite(NAME, federation="other")
    with pytest.raises(
        InvitationError, match="of the federation 'other', not for 'lab-7' of 'test'"
    ):
        joined(site, invitation)
    assert fleet.asked == []
    assert not site.directory.exists()
    # Altered on purpose, it names an authority that is not of that federation: its secret stays here.
    with pytest.raises(InvitationError, match=r"for the federation 'other'.*that of 'test'"):
        joined(planned(site.directory, federation="other"), invitation)
    assert {path for _, path in fleet.asked} == {"/v1/authority"}


@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        (lambda fleet: fleet.invite(NAME, secret=bytes(16)), "does not know the invitation"),
        (lambda fleet: (fleet.invite(NAME), fleet.invitations.cancel(NAME))[0], "was cancelled"),
        (lambda fleet: replace(fleet.invite("lab-8"), site=NAME), "is for another site"),
    ],
)
def test_what_the_federation_refuses_leaves_nothing_here(
    fleet: Fleet, site: Site, prepare: Callable[[Fleet], Invitation], words: str
) -> None:
    with pytest.raises(InvitationError, match=words):
        joined(site, prepare(fleet))
    assert not site.directory.exists()
    assert fleet.register.known == []
    # What was there before stays.
    (site.directory / "notes").mkdir(parents=True)
    with pytest.raises(InvitationError, match=words):
        joined(site, prepare(fleet))
    assert {path.name for path in site.directory.iterdir()} == {"notes", ".lock"}


def test_an_invitation_lets_one_machine_in(fleet: Fleet, site: Site) -> None:
    invitation = fleet.invite(NAME)
    joined(site, invitation)
    other = planned(site.directory.parent / "other")
    with pytest.raises(InvitationError, match="used by another machine"):
        joined(other, invitation)
    assert not other.directory.exists()
    # Nor does another invitation bring a second machine under the name.
    with pytest.raises(InvitationError, match="another machine is the site lab-7"):
        joined(other, fleet.invite(NAME))


def test_a_directory_of_another_site_is_left_alone(fleet: Fleet, site: Site) -> None:
    joined(site, fleet.invite(NAME))
    kept = files(site.directory)
    for change, words in (
        ({"name": "lab-8"}, "is the site 'lab-7' of the federation 'test', not 'lab-8' of 'test'"),
        ({"federation": "other"}, "not 'lab-7' of 'other'"),
    ):
        with pytest.raises(ConfigError, match=words):
            joined(planned(site.directory, **change), fleet.invite("lab-8"))
    assert files(site.directory) == kept


def test_two_joins_do_not_run_at_once(fleet: Fleet, site: Site) -> None:
    with (
        locked(site.directory),
        pytest.raises(StorageError, match="another 'vlafleet site' command"),
    ):
        joined(site, fleet.invite(NAME))
    joined(site, fleet.invite(NAME))


def test_it_says_when_the_site_does_not_come_online(
    fleet: Fleet, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    invitation = fleet.invite(NAME)
    monkeypatch.setattr("supernode.join._ONLINE_SECONDS", 1.0)
    fleet.online_after_start = False
    with pytest.raises(UnknownSiteError, match=rf"SuperLink says offline\): look at {site.logs}"):
        joined(site, invitation)
    monkeypatch.setattr(fleet, "start", lambda _site: None)
    monkeypatch.setattr("supernode.native.start", fleet.start)
    fleet.running.clear()
    with pytest.raises(RunFailedError, match="have ended"):
        joined(site, invitation)


def test_what_was_online_before_does_not_count(
    fleet: Fleet, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A SuperNode that was killed looks online for a minute."""
    invitation = fleet.invite(NAME)
    joined(site, invitation)
    monkeypatch.setattr("supernode.join._ONLINE_SECONDS", 1.0)
    monkeypatch.setattr("supernode.join._running", lambda _site: True)
    looks = iter([False, *[True] * 1000])
    monkeypatch.setattr("supernode.join._running", lambda _site: next(looks))
    with pytest.raises(UnknownSiteError, match="not online"):
        joined(site, invitation)


def test_a_service_that_gives_a_certificate_for_another_key_is_refused(
    fleet: Fleet, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = enrol.enrol

    def swapped(*arguments: Any) -> Any:
        given = honest(*arguments)
        return replace(given, superexec_certificate=given.certificate)

    with monkeypatch.context() as patch:
        patch.setattr("supernode.join.enrol", swapped)
        with pytest.raises(CertificateError, match="not for superexec 'lab-7'"):
            joined(site, fleet.invite(NAME))
    assert Site.find(site.directory) is None
    assert not (site.identity / "tls.crt").exists()
    assert not (site.directory / "membership.json").exists()


def test_a_dataset_that_cannot_be_reported_is_no_failure(
    fleet: Fleet, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise ConnectionRefusedByFleetError("not now")

    monkeypatch.setattr("supernode.join.report_dataset", refuse)
    said = joined(site, fleet.invite(NAME))
    assert any(line.startswith("warning") and "not now" in line for line in said)
    assert NAME in fleet.running


def test_helm_starts_nothing(fleet: Fleet, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    said = joined(planned(site.directory, mode="helm"), fleet.invite(NAME))
    assert fleet.starts == []
    values = site.directory / "values.yaml"
    assert values.exists()
    assert str(values) in "\n".join(said)
    assert any(line.startswith("next") for line in said)


def test_another_mode_ends_what_ran(
    fleet: Fleet, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    invitation = fleet.invite(NAME)
    joined(site, invitation)
    joined(planned(site.directory, mode="helm"), invitation)
    assert fleet.stops == [site.directory]
    assert NAME not in fleet.running


def test_containers_are_written_started_and_replaced(
    fleet: Fleet, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def write(site: Site) -> Path:
        calls.append(f"write {site.device}")
        return site.directory / "compose.yaml"

    def start(site: Site) -> None:
        calls.append("start")
        fleet.start(site)

    def end(site: Site) -> bool:
        calls.append("stop")
        return fleet.stop(site.directory)

    for name, function in (("write", write), ("start", start), ("stop", end)):
        monkeypatch.setattr(f"supernode.compose.{name}", function)
    monkeypatch.setattr("supernode.compose.running", lambda site: fleet.is_running(site.directory))
    invitation = fleet.invite(NAME)
    contained = planned(site.directory, mode="compose")
    said = "\n".join(joined(contained, invitation))
    assert calls == ["write cpu", "start"]
    assert f"docker compose -f {site.directory / 'compose.yaml'} logs" in said
    # Nothing has changed: compose itself replaces what is not as the file says.
    calls.clear()
    joined(contained, invitation)
    assert calls == ["write cpu", "start"]
    calls.clear()
    joined(planned(site.directory, mode="compose", device="cuda"), invitation)
    assert calls == ["stop", "write cuda", "start"]
    calls.clear()
    joined(site, invitation)
    assert calls == ["stop"]
    assert fleet.running[NAME].mode == "native"


@pytest.mark.parametrize(
    ("outcome", "mode"),
    [
        (lambda *_a, **_k: subprocess.CompletedProcess([], 0), "compose"),
        (lambda *_a, **_k: subprocess.CompletedProcess([], 1), "native"),
    ],
)
def test_containers_where_an_engine_answers(
    monkeypatch: pytest.MonkeyPatch, outcome: Callable[..., object], mode: str
) -> None:
    monkeypatch.setattr("subprocess.run", outcome)
    assert default_mode() == mode


def test_plain_processes_where_there_is_no_docker(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert default_mode() == "native"


def test_stop_says_whether_something_ran(fleet: Fleet, site: Site) -> None:
    joined(site, fleet.invite(NAME))
    site = Site.load(site.directory)
    assert stop(site)
    assert not stop(site)


def test_a_membership_file_is_complete_or_not_there(fleet: Fleet, site: Site) -> None:
    """What an older or damaged file says is not taken, and asked again."""
    site.prepare()
    (site.directory / "membership.json").write_text(json.dumps({"federation": "test"}))
    assert membership.kept(site) is None
    joined(site, fleet.invite(NAME))
    assert Identity.load(site.identity, Role.SITE)
