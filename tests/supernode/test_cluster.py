"""Enrolling from within a cluster: the Secrets hold a membership in the end, whatever happens on the way."""

import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from certs import cluster_pki
from certs.authority import Authority
from certs.cluster import Cluster
from certs.errors import (
    CertificateError,
    ConfigError,
    ConnectionRefusedByFleetError,
    InvitationError,
)
from certs.identity import ensure_identity
from certs.invitation import Invitation
from certs.roles import Role
from certs.take import Copy
from supernode import cluster as cluster_module
from supernode import join, membership
from supernode.cluster import Secrets, enrol
from supernode.site import Site
from tests.joining import FEDERATION, Fleet, after, files
from tests.k8s.api_server import Manifest, Running, granted, service_account, serving
from tests.past import ago

NAME, NAMESPACE, ACCOUNT, APP = "lab-7", "vlafleet", "vlafleet-lab-7-join", "robots"
SECRETS = Secrets("vlafleet-lab-7-identity", "vlafleet-lab-7-superexec", APP)
KEYS = (SECRETS.identity, SECRETS.superexec)


def rules(namespace: str, secret: str) -> list[Manifest]:
    metadata = {"name": ACCOUNT, "namespace": namespace}
    secrets = {"apiGroups": [""], "resources": ["secrets"]}
    return [
        {
            "kind": "Role",
            "metadata": metadata,
            "rules": [
                {**secrets, "verbs": ["create"]},
                {**secrets, "verbs": ["get", "update"], "resourceNames": [secret]},
            ],
        },
        {
            "kind": "RoleBinding",
            "metadata": metadata,
            "roleRef": {"kind": "Role", "name": ACCOUNT},
            "subjects": [{"kind": "ServiceAccount", "name": ACCOUNT, "namespace": NAMESPACE}],
        },
    ]


RBAC = [*rules(NAMESPACE, SECRETS.identity), *rules(APP, SECRETS.superexec)]


@pytest.fixture
def api(
    tmp_path: Path, free_port: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Running]:
    with serving(tmp_path / "api", free_port(), RBAC) as running:
        for name, value in running.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr("certs.cluster._PAUSES", ())
        yield running


@pytest.fixture
def cluster(api: Running, tmp_path: Path) -> Cluster:
    return Cluster.here(api.mount(tmp_path / "account", NAMESPACE, ACCOUNT))


class Job:
    """The join Job: each pod of it has an empty directory, which its containers share."""

    def __init__(self, fleet: Fleet, api: Running, cluster: Cluster, directory: Path) -> None:
        self.fleet, self.api, self.cluster, self.directory = fleet, api, cluster, directory
        self._pods = 0
        self.pod()

    def pod(self) -> None:
        """Begin with a new pod."""
        self._pods += 1
        self.site = self.directory / f"pod-{self._pods}"
        self.site.mkdir(parents=True)

    def run(self, invitation: Invitation | None) -> str:
        said: list[str] = []
        enrol(
            self.cluster, SECRETS, invitation, self.fleet.superlink, "/data", self.site, said.append
        )
        return "\n".join(said)

    def held(self) -> tuple[Copy, Copy]:
        pair = []
        for name, namespace in ((SECRETS.identity, NAMESPACE), (SECRETS.superexec, APP)):
            found = self.api.api.secret(name, namespace)
            assert found is not None
            pair.append(Copy.of(Path(name), found))
        return pair[0], pair[1]

    def put(self, authority: Authority, scratch: Path, **span: float) -> None:
        """Store identities that the authority issued so long ago."""
        with ago(**span):
            for role, name, namespace in (
                (Role.SITE, SECRETS.identity, NAMESPACE),
                (Role.SUPEREXEC, SECRETS.superexec, APP),
            ):
                ensure_identity(authority, scratch / role, role, NAME)
                copy = Copy.read(scratch / role)
                assert copy is not None
                self.api.api.put_secret(name, namespace, copy.files)


@pytest.fixture
def job(fleet: Fleet, api: Running, cluster: Cluster, tmp_path: Path) -> Job:
    return Job(fleet, api, cluster, tmp_path / "job")


class Crash(BaseException):
    """What ends a process wherever it is."""


def stored(api: Running) -> dict[str, dict[str, bytes] | None]:
    return {
        SECRETS.identity: api.api.secret(SECRETS.identity, NAMESPACE),
        SECRETS.superexec: api.api.secret(SECRETS.superexec, APP),
    }


def test_it_becomes_a_member_once(job: Job) -> None:
    said = job.run(job.fleet.invite(NAME))
    identity, superexec = job.held()
    for copy, role in ((identity, Role.SITE), (superexec, Role.SUPEREXEC)):
        assert (copy.peer.federation, copy.peer.role, copy.peer.name) == (FEDERATION, role, NAME)
    assert set(identity.files) == {"tls.key", "tls.crt", "ca.crt", "node.key", "node.pub"}
    assert set(superexec.files) == {"tls.key", "tls.crt", "ca.crt"}
    assert [node.name for node in job.fleet.register.known] == [NAME]
    assert job.fleet.states(NAME) == ["used"]
    assert job.fleet.starts == []
    assert f"secret      {SECRETS.identity}: stored" in said
    before, asked = stored(job.api), len(job.api.api.log())
    job.pod()
    # The invitation may be gone by now.
    assert "is a member of test; no invitation is needed" in job.run(None)
    job.pod()
    job.run(job.fleet.invite(NAME))
    assert job.fleet.states(NAME)[-1] == "open"
    assert stored(job.api) == before
    assert {line["verb"] for line in job.api.api.log()[asked:]} == {"get"}


def test_it_uses_what_it_is_granted(job: Job) -> None:
    job.run(job.fleet.invite(NAME))
    job.fleet.revoke(NAME)
    job.run(job.fleet.invite(NAME))
    used = {asked._replace(name=asked.name or "*") for asked in job.api.api.used()}
    assert used == granted(RBAC)
    assert {asked.user for asked in used} == {service_account(NAMESPACE, ACCOUNT)}


@pytest.mark.parametrize(
    "step",
    [
        "supernode.membership.Keys.application",
        "supernode.join.enrol",
        "supernode.join.keep",
        "supernode.join.store",
        "supernode.join.forget",
        "supernode.cluster.become_member",
        "supernode.cluster.store",
    ],
)
def test_a_container_that_ended_goes_on(
    job: Job, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """Right after any step; the next container of the pod spends no second invitation."""
    invitation = job.fleet.invite(NAME)
    module, _, name = step.rpartition(".")
    with monkeypatch.context() as patch:
        place: object = sys.modules.get(module)
        if place is None:
            module, _, owner = module.rpartition(".")
            place = getattr(sys.modules[module], owner)
        patch.setattr(place, name, after(getattr(place, name), Crash()))
        with pytest.raises(Crash):
            job.run(invitation)
    job.run(invitation)
    identity, superexec = job.held()
    assert (job.site / "identity" / "tls.crt").read_bytes() == identity.identity.certificate
    assert (job.site / "superexec" / "tls.crt").read_bytes() == superexec.identity.certificate
    assert len(job.fleet.register.known) == 1
    assert job.fleet.states(NAME) == ["used"]


def test_with_one_secret_written_another_pod_goes_on(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The SuperExec's key went with the first pod: it gets another by the SuperNode's certificate."""
    invitation = job.fleet.invite(NAME)
    with monkeypatch.context() as patch:
        patch.setattr(cluster_module, "store", after(cluster_pki.store, Crash()))
        with pytest.raises(Crash):
            job.run(invitation)
    identity = job.api.api.secret(SECRETS.identity, NAMESPACE)
    assert identity is not None
    assert job.api.api.secret(SECRETS.superexec, APP) is None
    job.pod()
    with pytest.raises(InvitationError, match="its SuperExec has no certificate"):
        job.run(None)
    job.run(invitation)
    assert job.api.api.secret(SECRETS.identity, NAMESPACE) == identity
    assert job.held()[1].peer.name == NAME
    assert job.fleet.states(NAME) == ["used"]
    assert len(job.fleet.register.known) == 1


def test_revoked_and_invited_again(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    job.run(job.fleet.invite(NAME))
    first = job.held()
    job.fleet.revoke(NAME)
    job.pod()
    with pytest.raises(InvitationError, match="lab-7 is to be invited again"):
        job.run(None)
    invitation = job.fleet.invite(NAME)
    # Ended when it had other keys and a membership for them: those of the Secrets do not come back.
    with monkeypatch.context() as patch:
        patch.setattr(join, "keep", after(membership.keep, Crash()))
        with pytest.raises(Crash):
            job.run(invitation)
    job.run(invitation)
    second = job.held()
    assert second[0].beside["node.key"] != first[0].beside["node.key"]
    for before, now in zip(first, second, strict=True):
        assert now.follows(before) or now.peer.serial != before.peer.serial
        assert now.identity.key != before.identity.key
    assert [node.status == "unregistered" for node in job.fleet.register.known] == [True, False]
    job.pod()
    assert "no invitation is needed" in job.run(None)


def test_a_site_that_joined_long_ago_is_no_failure(job: Job, tmp_path: Path) -> None:
    """An upgrade runs the Job again, and the Secrets are over: the site renews its own copies."""
    job.put(job.fleet.authority, tmp_path / "long-ago", days=8)
    before = stored(job.api)
    assert "was over on" in job.run(None)
    old = job.fleet.invite(NAME, expires=1_000_000_000)
    job.pod()
    assert "the invitation ended on 2001-09-09" in job.run(old)
    # Used by other keys.
    used = job.fleet.invite(NAME)
    entry = job.fleet.invitations.require(used.secret, NAME, "")
    job.fleet.invitations.use(entry, "somebody else's")
    job.pod()
    assert "was used by another machine" in job.run(used)
    assert stored(job.api) == before
    # One that is good is taken, for the SuperNode key that the SuperLink may know.
    job.pod()
    job.run(job.fleet.invite(NAME))
    identity, _ = job.held()
    assert not identity.is_over
    found = before[SECRETS.identity]
    assert found is not None
    assert identity.beside["node.key"] == found["node.key"]


def test_an_invitation_that_is_over_fails_who_never_joined(job: Job) -> None:
    with pytest.raises(InvitationError, match="the invitation ended on"):
        job.run(job.fleet.invite(NAME, expires=1_000_000_000))
    with pytest.raises(InvitationError, match="no invitation was given"):
        job.run(None)
    assert stored(job.api) == {SECRETS.identity: None, SECRETS.superexec: None}


def test_what_belongs_to_others_stays(job: Job, tmp_path: Path) -> None:
    """And the invitation is not spent on it."""
    invitation = job.fleet.invite(NAME)
    lab_8 = tmp_path / "lab-8"
    ensure_identity(job.fleet.authority, lab_8, Role.SITE, "lab-8")
    other = Copy.read(lab_8)
    assert other is not None
    job.api.api.put_secret(SECRETS.identity, NAMESPACE, other.files)
    with pytest.raises(CertificateError, match="site/lab-8, and spiffe://test/site/lab-7 is to go"):
        job.run(invitation)
    job.api.api.put_secret(SECRETS.identity, NAMESPACE, {"password": b"1"})
    with pytest.raises(CertificateError, match="holds no identity"):
        job.run(invitation)
    # A federation of the same name, made anew.
    job.put(Authority.init(tmp_path / "former", FEDERATION), tmp_path / "former-site")
    before = stored(job.api)
    with pytest.raises(CertificateError, match="of another authority"):
        job.run(invitation)
    assert stored(job.api) == before
    assert job.fleet.states(NAME) == ["open"]
    assert job.fleet.register.known == []


def test_a_pod_without_the_right_says_so(job: Job) -> None:
    job.api.api.grant(rules(NAMESPACE, SECRETS.identity))
    with pytest.raises(
        ConnectionRefusedByFleetError,
        match="may not read the Secret vlafleet-lab-7-superexec in robots",
    ):
        job.run(job.fleet.invite(NAME))
    assert job.fleet.states(NAME) == ["open"]


def test_another_sites_directory_is_refused(job: Job) -> None:
    Site(job.site, FEDERATION, "lab-8", "", "", "/data", "cpu", "helm").save()
    with pytest.raises(ConfigError, match="is the site 'lab-8'"):
        job.run(job.fleet.invite(NAME))
    assert job.fleet.states(NAME) == ["open"]


def test_the_command(job: Job, tmp_path: Path) -> None:
    """As the Job runs it: the invitation comes by the environment, and nothing secret is told or left open."""
    program = (
        "import sys, pathlib, certs.cluster; certs.cluster.Cluster.here.__func__.__defaults__ = "
        "(pathlib.Path(sys.argv.pop(1)),); import vlafleet; vlafleet.main()"
    )

    def run(**environment: str) -> subprocess.CompletedProcess[str]:
        arguments = [
            *("site", "enrol", "--dataset", "/data", "--secret", SECRETS.identity),
            *("--superexec-secret", SECRETS.superexec, "--superexec-namespace", APP),
            *("--directory", str(job.site)),
        ]
        return subprocess.run(
            [sys.executable, "-c", program, str(job.cluster.mount), *arguments],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env={
                **os.environ,
                **job.api.environment,
                "VLAFLEET_SUPERLINK": job.fleet.superlink,
                **environment,
            },
        )

    none = run(VLAFLEET_INVITATION="")
    assert (none.returncode, none.stderr.count("\n")) == (20, 1)
    invitation = job.fleet.invite(NAME)
    done = run(VLAFLEET_INVITATION=f"{invitation.encode()}\n")
    assert done.returncode == 0, done.stderr
    again = run()
    assert again.returncode == 0, again.stderr
    assert "no invitation is needed" in again.stdout
    told = "".join(each.stdout + each.stderr for each in (none, done, again))
    secret = [invitation.encode()[-40:], (job.cluster.mount / "token").read_text()]
    for copy in job.held():
        for name, key in copy.files.items():
            if name.endswith(".key"):
                secret.append(b"".join(key.splitlines()[1:-1])[60:100].decode())
    assert len(secret) == 5
    assert not [text for text in secret if text in told]
    for name in files(job.site):
        if name.endswith(".key"):
            assert stat.S_IMODE((job.site / name).stat().st_mode) == 0o600
