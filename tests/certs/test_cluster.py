"""Secrets of a cluster: asked for safely, and the newer copy of an identity wins there, too."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography import x509
from typer.testing import CliRunner

from certs import cluster_pki, rotation
from certs.authority import Authority
from certs.cli import cli
from certs.cluster import Cluster
from certs.cluster_pki import ensure
from certs.errors import (
    CertificateError,
    ConfigError,
    ConnectionRefusedByFleetError,
    FleetError,
    ToolError,
)
from certs.files import load_certificate
from certs.identity import authority_directory, ensure_identity, hosts_of, identity_directory
from certs.index import write_index
from certs.lifetime import CLOCK_SKEW
from certs.revocations import list_number
from certs.roles import Role
from certs.take import Copy, take
from tests.joining import files
from tests.k8s.api_server import (
    Asked,
    Manifest,
    Running,
    certify,
    granted,
    service_account,
    serving,
)
from tests.past import ago

NAMESPACE, ACCOUNT = "vlafleet", "fed-enrolment"
SECRETS = {
    (Role.SUPERLINK, "superlink"): "fed-superlink",
    (Role.SUPEREXEC, "superlink"): "fed-superexec",
    (Role.EXPORTER, "exporter"): "fed-exporter",
    (Role.OPERATOR, "admin"): "fed-operator",
    (Role.MONITOR, "prometheus"): "fed-monitor",
}
HOSTS = {role: [f"fed-{role}"] for role in (Role.SUPERLINK, Role.ENROLMENT, Role.EXPORTER)}
ARGUMENTS = [
    *(f"--host={role}={host}" for role, hosts in HOSTS.items() for host in hosts),
    *(f"--secret={role}/{name}={secret}" for (role, name), secret in SECRETS.items()),
]


def rules(account: str, names: Sequence[str], verbs: Sequence[str]) -> list[Manifest]:
    """Let a service account create Secrets where ``verbs`` says so, and the rest with these alone."""
    metadata = {"name": account, "namespace": NAMESPACE}
    rest = [verb for verb in verbs if verb != "create"]
    return [
        {
            "kind": "Role",
            "metadata": metadata,
            "rules": [
                *([{"verbs": ["create"]}] if "create" in verbs else []),
                {"verbs": rest, "resourceNames": list(names)},
            ],
        },
        {
            "kind": "RoleBinding",
            "metadata": metadata,
            "roleRef": {"kind": "Role", "name": account},
            "subjects": [{"kind": "ServiceAccount", "name": account, "namespace": NAMESPACE}],
        },
    ]


def complete(rbac: list[Manifest]) -> list[Manifest]:
    for role in rbac:
        for rule in role.get("rules", []):
            rule.update(apiGroups=[""], resources=["secrets"])
    return rbac


ENROLMENT = complete(rules(ACCOUNT, [*SECRETS.values()], ["create", "get", "update"]))
RENEWAL = complete(rules("fed-renewal", ["fed-operator"], ["get", "update"]))


@pytest.fixture
def api(
    tmp_path: Path, free_port: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Running]:
    with serving(tmp_path / "api", free_port(), [*ENROLMENT, *RENEWAL]) as running:
        for name, value in running.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr("certs.cluster._PAUSES", ())
        yield running


@pytest.fixture
def mount(api: Running, tmp_path: Path) -> Path:
    return api.mount(tmp_path / "account", NAMESPACE, ACCOUNT)


@pytest.fixture
def cluster(mount: Path) -> Cluster:
    """The cluster, as the enrolment service's init container sees it."""
    return Cluster.here(mount)


@pytest.fixture
def pki(tmp_path: Path) -> Path:
    return tmp_path / "pki"


def made(cluster: Cluster, pki: Path, federation: str = "fed", **changes: Any) -> dict[str, str]:
    """Ensure everything; return what became of each Secret."""
    given = {"hosts": HOSTS, "secrets": SECRETS, **changes}
    said = list(ensure(cluster, pki, federation, **given))
    return {what.split(":")[0].removeprefix("Secret "): how for how, what in said}


def held(api: Running, name: str) -> Copy:
    found = api.api.secret(name, NAMESPACE)
    assert found is not None
    return Copy.of(Path(name), found)


def everything(api: Running) -> dict[str, dict[str, bytes] | None]:
    return {name: api.api.secret(name, NAMESPACE) for name in SECRETS.values()}


def forget(authority: Authority) -> None:
    """Let all that was issued have expired long ago."""
    past = datetime.now(UTC) - 2 * CLOCK_SKEW
    lines = [replace(line, not_after=past) for line in authority.issued()]
    write_index(authority.directory / "issued.jsonl", lines)


def replace_authority(authority: Authority) -> None:
    """Replace it by the next one, as if every holder of a certificate had followed."""
    rotation.begin(authority)
    forget(authority)
    rotation.switch(authority)
    forget(authority)
    rotation.finish(authority)


# The client.


def test_it_reads_and_writes_what_it_may(api: Running, cluster: Cluster) -> None:
    assert cluster.namespace == NAMESPACE
    assert cluster.read("fed-superlink") is None
    assert cluster.store(
        "fed-superlink", lambda there: {"tls.key": b"\0k"} if there is None else None
    )
    assert cluster.read("fed-superlink") == {"tls.key": b"\0k"}
    assert not cluster.store("fed-superlink", lambda _there: None)
    with pytest.raises(ConnectionRefusedByFleetError) as error:
        cluster.read("others")
    assert str(error.value).startswith(
        'the service account of this pod may not read the Secret others in vlafleet: secrets "others" is forbidden'
    )
    with pytest.raises(
        ConnectionRefusedByFleetError, match=r"may not read the Secret .* in elsewhere"
    ):
        cluster.store("fed-superlink", lambda _there: {}, "elsewhere")


def test_the_token_is_read_anew_for_each_request(api: Running, cluster: Cluster) -> None:
    """A kubelet exchanges it every hour."""
    old = (cluster.mount / "token").read_text()
    assert cluster.read("fed-superlink") is None
    api.api.forbid(old)
    with pytest.raises(ConnectionRefusedByFleetError, match="does not take this pod's token"):
        cluster.read("fed-superlink")
    (cluster.mount / "token").write_text("the-next-one\n")
    api.api.allow("the-next-one", service_account(NAMESPACE, ACCOUNT))
    assert cluster.read("fed-superlink") is None


def test_the_token_goes_to_the_clusters_server_alone(
    api: Running, cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not to a proxy of the environment, nor to a server that another authority vouches for."""
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert cluster.read("fed-superlink") is None
    asked = len(api.api.log())
    other = tmp_path / "other"
    certify(other, [], ["127.0.0.1"])
    monkeypatch.setenv("SSL_CERT_FILE", str(cluster.mount / "ca.crt"))
    shutil.copy(other / "ca.crt", cluster.mount / "ca.crt")
    with pytest.raises(
        ConnectionRefusedByFleetError, match=r"is not the cluster's: .*nothing was sent"
    ):
        cluster.read("fed-superlink")
    assert len(api.api.log()) == asked


def test_somebody_else_may_write_at_the_same_time(api: Running, cluster: Cluster) -> None:
    asked: list[dict[str, bytes] | None] = []

    def decide(there: dict[str, bytes] | None) -> dict[str, bytes]:
        asked.append(there)
        if len(asked) < 3:
            api.api.put_secret("fed-superlink", NAMESPACE, {"n": str(len(asked)).encode()})
        if len(asked) == 3:
            api.api.remove("secrets", NAMESPACE, "fed-superlink")
        return {"mine": b"yes"}

    assert cluster.store("fed-superlink", decide)
    assert asked == [None, {"n": b"1"}, {"n": b"2"}, None]
    assert api.api.secret("fed-superlink", NAMESPACE) == {"mine": b"yes"}

    def contend(_there: dict[str, bytes] | None) -> dict[str, bytes]:
        api.api.put_secret("fed-superlink", NAMESPACE, {"n": os.urandom(4)})
        return {"mine": b"yes"}

    with pytest.raises(ConnectionRefusedByFleetError, match="changed by somebody else 5 times"):
        cluster.store("fed-superlink", contend)


def test_what_its_operator_wrote_beside_stays(api: Running, cluster: Cluster) -> None:
    api.api.put_secret("fed-superlink", NAMESPACE, {"a": b"b"}, annotations={"team": "robots"})
    cluster.store("fed-superlink", lambda _there: {"c": b"d"})
    stored = api.api.objects("secrets", NAMESPACE)["fed-superlink"]
    assert (stored["metadata"]["annotations"], stored["type"]) == ({"team": "robots"}, "Opaque")
    assert api.api.secret("fed-superlink", NAMESPACE) == {"c": b"d"}


def test_an_answer_that_was_lost_is_no_harm(
    api: Running, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written, and not told so: asked again, it is what it should be."""
    monkeypatch.setattr("certs.cluster._PAUSES", (0.0,))
    once = Cluster._once
    lost: list[str] = []

    def losing(self: Cluster, method: str, path: str, body: Any) -> httpx.Response:
        answer = once(self, method, path, body)
        if method == "POST" and not lost:
            lost.append(path)
            raise httpx.ReadTimeout("the answer was lost")
        return answer

    monkeypatch.setattr(Cluster, "_once", losing)
    wanted = {"a": b"b"}
    assert not cluster.store("fed-superlink", lambda there: None if there == wanted else wanted)
    assert lost
    assert api.api.secret("fed-superlink", NAMESPACE) == wanted


def test_where_there_is_no_cluster(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ToolError, match="no service account's token"):
        Cluster.here(tmp_path / "nothing")
    (cluster.mount / "token").write_text("\n")
    with pytest.raises(ToolError, match="token is empty"):
        cluster.read("fed-superlink")
    for name in ("../configmaps/a", "UPPER", "a/b", ""):
        with pytest.raises(ConfigError, match="is not the name of a Secret"):
            cluster.read(name)
    with pytest.raises(ConfigError, match="is not the name of a namespace"):
        cluster.read("a", "b/c")
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST")
    with pytest.raises(ToolError, match="is this a pod"):
        Cluster.here(cluster.mount)


def test_a_server_that_does_not_answer(
    cluster: Cluster, free_port: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(free_port()))
    with pytest.raises(ConnectionRefusedByFleetError, match=r"cannot be reached .*NetworkPolicy"):
        Cluster.here(cluster.mount).read("fed-superlink")
    monkeypatch.setattr(
        Cluster, "_once", lambda *_arguments: httpx.Response(503, text="tls.key tls.key")
    )
    with pytest.raises(ConnectionRefusedByFleetError, match="answers 503") as error:
        cluster.read("fed-superlink")
    assert "tls.key" not in str(error.value)


# The authority and its identities.


def test_a_federation_is_made_once(api: Running, cluster: Cluster, pki: Path) -> None:
    first = made(cluster, pki)
    assert {first[name] for name in SECRETS.values()} == {"stored"}
    for (role, name), secret in SECRETS.items():
        copy = held(api, secret)
        assert (copy.peer.federation, copy.peer.role, copy.peer.name) == ("fed", role, name)
        assert (pki / role / name / "tls.crt").read_bytes() == copy.identity.certificate
        wanted = {"tls.key", "tls.crt", "ca.crt"}
        assert set(copy.files) == wanted | ({"crl.pem"} if role in HOSTS else set())
    for role, name in ((Role.SUPERLINK, "fed-superlink"), (Role.EXPORTER, "fed-exporter")):
        assert set(hosts_of(held(api, name).certificate)) == {
            "localhost",
            "127.0.0.1",
            f"fed-{role}",
        }
    enrolment = load_certificate(pki / "enrolment" / "enrolment" / "tls.crt")
    assert "fed-enrolment" in hosts_of(enrolment)
    keys = {path.read_bytes() for path in pki.rglob("ca.key")}
    stored = [data for found in everything(api).values() for data in (found or {}).values()]
    assert not keys & set(stored)
    before = everything(api)
    second = made(cluster, pki)
    # Signed anew at every start; that is all that changed.
    assert {name for name, how in second.items() if how == "stored"} == {
        "fed-superlink",
        "fed-exporter",
    }
    for name, now in everything(api).items():
        assert {**(now or {}), "crl.pem": b""} == {**(before[name] or {}), "crl.pem": b""}


def test_what_was_renewed_elsewhere_is_kept(api: Running, cluster: Cluster, pki: Path) -> None:
    """The operator's Secret is renewed daily, where this copy of it waits for the day that it is needed."""
    with ago(days=3):
        made(cluster, pki)
    authority = Authority.load(authority_directory(pki))
    elsewhere = pki.parent / "elsewhere"
    with ago(days=1):
        ensure_identity(authority, elsewhere, Role.OPERATOR, "admin")
    copy = Copy.read(elsewhere)
    assert copy is not None
    assert cluster_pki.store(cluster, "fed-operator", copy) == "stored"
    assert made(cluster, pki)["fed-operator"] == "kept"
    assert held(api, "fed-operator").peer.serial == copy.peer.serial


def test_what_is_due_is_issued_again(api: Running, cluster: Cluster, pki: Path) -> None:
    with ago(days=25):
        made(cluster, pki)
    first = held(api, "fed-superlink")
    assert made(cluster, pki)["fed-superlink"] == "stored"
    assert held(api, "fed-superlink").follows(first)


def test_another_host(api: Running, cluster: Cluster, pki: Path, tmp_path: Path) -> None:
    with ago(hours=1):
        made(cluster, pki)
    volume = tmp_path / "volume"
    hosts = {**HOSTS, Role.SUPERLINK: ["fed-superlink", "fleet.example", "localhost"]}
    made(cluster, pki, hosts=hosts)
    copy = held(api, "fed-superlink")
    assert set(hosts_of(copy.certificate)) >= {"fleet.example", "fed-superlink"}
    names = copy.certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    dns = names.value.get_values_for_type(x509.DNSName)
    assert len(dns) == len(set(dns))
    for name, data in copy.files.items():
        (tmp_path / "secret").mkdir(exist_ok=True)
        (tmp_path / "secret" / name).write_bytes(data)
    assert take(tmp_path / "secret", volume, ["fleet.example"]) == "taken"


class Crash(BaseException):
    """What ends a process wherever it is."""


def test_a_crash_anywhere_is_made_good(
    api: Running, cluster: Cluster, pki: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before each write to the disk or the cluster, the last time after all of them; then it is run again."""
    rename, once = Path.rename, Cluster._once
    left = 0

    def step() -> None:
        nonlocal left
        if left == 0:
            raise Crash
        left -= 1

    def renaming(self: Path, target: Path) -> Path:
        if "state" not in self.parts:  # the API server's own
            step()
        return rename(self, target)

    def asking(self: Cluster, method: str, path: str, body: Any) -> httpx.Response:
        if method != "GET":
            step()
        return once(self, method, path, body)

    crashes = 0
    while True:
        shutil.rmtree(pki, ignore_errors=True)
        for name in SECRETS.values():
            if api.api.secret(name, NAMESPACE) is not None:
                api.api.remove("secrets", NAMESPACE, name)
        left = crashes
        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", renaming)
            patch.setattr(Cluster, "_once", asking)
            try:
                made(cluster, pki)
                break
            except Crash:
                pass
        after = files(pki)
        made(cluster, pki)
        # A key or a certificate that was made is the one that is there in the end.
        for name, data in after.items():
            if name.endswith((".key", "ca.crt")) and not Path(name).name.startswith("."):
                assert files(pki)[name] == data, name
        for (role, name), secret in SECRETS.items():
            copy = Copy.read(identity_directory(pki, role, name))
            assert copy is not None
            assert held(api, secret).peer == copy.peer
        crashes += 8  # each costs a second
    assert crashes > 20


def test_a_lost_volume_is_not_made_anew(api: Running, cluster: Cluster, pki: Path) -> None:
    made(cluster, pki)
    before = everything(api)
    shutil.rmtree(pki)
    with pytest.raises(CertificateError, match="if the volume was lost, restore it"):
        made(cluster, pki)
    assert not pki.exists()
    # One of them is enough.
    for name in list(SECRETS.values())[1:]:
        api.api.remove("secrets", NAMESPACE, name)
    with pytest.raises(CertificateError, match=r"\(Secrets fed-superlink\)"):
        made(cluster, pki)
    assert not pki.exists()
    assert api.api.secret("fed-superlink", NAMESPACE) == before["fed-superlink"]


@pytest.mark.parametrize("replacements", [0, 1])
def test_another_authority_is_refused(
    api: Running, cluster: Cluster, pki: Path, tmp_path: Path, replacements: int
) -> None:
    """A volume that was restored from before the authority was replaced, or is another federation's of that name."""
    made(cluster, pki)
    other = tmp_path / "other"
    authority = Authority.init(authority_directory(other), "fed")
    if replacements:
        shutil.copytree(authority_directory(pki), tmp_path / "restored" / "ca")
        authority = Authority.load(authority_directory(pki))
        replace_authority(authority)
        made(cluster, pki)
        other = tmp_path / "restored"
    before, there = everything(api), files(other)
    with pytest.raises(CertificateError, match="of another authority"):
        made(cluster, other)
    assert (everything(api), files(other)) == (before, there)


def test_what_is_no_identity_of_this_federation_is_refused(
    api: Running, cluster: Cluster, pki: Path, tmp_path: Path
) -> None:
    made(cluster, pki)
    there = files(pki)
    with pytest.raises(CertificateError, match="holds the authority of 'fed', not of 'other'"):
        made(cluster, pki, "other")
    swapped = {
        **SECRETS,
        (Role.OPERATOR, "admin"): "fed-monitor",
        (Role.MONITOR, "prometheus"): "fed-operator",
    }
    with pytest.raises(
        CertificateError, match="holds the identity spiffe://fed/monitor/prometheus"
    ):
        made(cluster, pki, secrets=swapped)
    api.api.put_secret("fed-superexec", NAMESPACE, {"password": b"secret"})
    with pytest.raises(CertificateError, match=r"fed-superexec holds no identity: tls\.key"):
        made(cluster, pki)
    assert api.api.secret("fed-superexec", NAMESPACE) == {"password": b"secret"}
    assert files(pki) == there


def test_the_authority_is_replaced(api: Running, cluster: Cluster, pki: Path) -> None:
    """What this directory issues between 'begin' and 'switch' says nothing about what runs elsewhere."""
    with ago(hours=1):
        made(cluster, pki)
    first = {name: held(api, name).peer.serial for name in SECRETS.values()}
    authority = Authority.load(authority_directory(pki))
    rotation.begin(authority)
    made(cluster, pki)
    assert {name: held(api, name).peer.serial for name in SECRETS.values()} == first
    waiting = {(line.role, line.name) for line in rotation.status(authority).waiting}
    assert waiting == set(SECRETS)  # the enrolment service works in the directory itself
    # A host that is missing cannot wait: the pods that come with it ask for it.
    made(cluster, pki, hosts={**HOSTS, Role.SUPERLINK: ["fleet.example"]})
    assert held(api, "fed-superlink").peer.serial != first["fed-superlink"]
    forget(authority)
    rotation.switch(authority)
    made(cluster, pki)
    assert {len(held(api, name).identity.authorities()) for name in SECRETS.values()} == {2}
    forget(authority)
    rotation.finish(authority)
    made(cluster, pki)
    for name in SECRETS.values():
        assert held(api, name).identity.authorities() == authority.certificates()


def test_secrets_from_before_a_replacement_are_brought_up_to_date(
    api: Running, cluster: Cluster, pki: Path
) -> None:
    """The pod ran all the while, so nobody stored anything."""
    with ago(days=60):
        made(cluster, pki)
    authority = Authority.load(authority_directory(pki))
    replace_authority(authority)
    assert set(made(cluster, pki).values()) == {"issued", "stored"}
    for name in SECRETS.values():
        assert held(api, name).identity.authorities() == authority.certificates()


def test_the_newer_list_is_stored_beside_a_newer_certificate(
    api: Running, cluster: Cluster, pki: Path
) -> None:
    made(cluster, pki)
    authority = Authority.load(authority_directory(pki))
    ensure_identity(authority, pki.parent / "left", Role.OPERATOR, "left")
    authority.revoke(Role.OPERATOR, "left")
    made(cluster, pki)
    for name in ("fed-superlink", "fed-exporter"):
        stored = x509.load_pem_x509_crl(held(api, name).beside["crl.pem"])
        assert len(stored) == 1
        assert list_number(stored) == list_number(
            x509.load_pem_x509_crl(authority.crl.read_bytes())
        )


def test_it_uses_what_it_is_granted(
    api: Running, cluster: Cluster, pki: Path, tmp_path: Path
) -> None:
    """And no more; the daily renewal may not make a Secret."""
    with ago(days=1):
        made(cluster, pki)
    user = service_account(NAMESPACE, ACCOUNT)
    made(cluster, pki, hosts={role: ["another"] for role in HOSTS})
    used = {asked._replace(name=asked.name or "*") for asked in api.api.used()}
    assert used == granted(ENROLMENT) - {
        Asked(user, "update", "secrets", f"fed-{name}", NAMESPACE)
        for name in ("superexec", "operator", "monitor")  # nothing to renew yet
    }
    renewal = Cluster.here(api.mount(tmp_path / "renewal", NAMESPACE, "fed-renewal"))
    identity = tmp_path / "identity"
    ensure_identity(Authority.load(authority_directory(pki)), identity, Role.OPERATOR, "admin")
    assert cluster_pki.store_directory(renewal, identity, "fed-operator", None) == "stored"
    account = service_account(NAMESPACE, "fed-renewal")
    mine = {asked for asked in api.api.used() if asked.user == account}
    assert mine == granted(RENEWAL)
    api.api.remove("secrets", NAMESPACE, "fed-operator")
    with pytest.raises(
        ConnectionRefusedByFleetError, match="may not write the Secret fed-operator"
    ):
        cluster_pki.store_directory(renewal, identity, "fed-operator", None)


@pytest.mark.parametrize(
    ("secret", "sentence"),
    [
        ((Role.SITE, "lab-7"), "become members by invitation"),
        ((Role.SUPEREXEC, "lab-7"), "become members by invitation"),
        ((Role.ENROLMENT, "enrolment"), "works in the PKI directory itself"),
        ((Role.OPERATOR, "Ann"), "is not allowed"),
        ((Role.OPERATOR, "ann"), "a Secret of its own"),
    ],
)
def test_what_cannot_be(
    cluster: Cluster, pki: Path, secret: tuple[Role, str], sentence: str
) -> None:
    with pytest.raises(FleetError, match=sentence):
        made(cluster, pki, secrets={**SECRETS, secret: "fed-operator"})
    assert not pki.exists()


def test_the_commands(
    api: Running, cluster: Cluster, pki: Path, tmp_path: Path, free_port: Callable[[], int]
) -> None:
    """As a pod runs them: what they print, what they leave, and that no key is told."""
    program = (
        "import sys, pathlib, certs.cluster; certs.cluster.Cluster.here.__func__.__defaults__ = "
        "(pathlib.Path(sys.argv.pop(1)),); import vlafleet; vlafleet.main()"
    )

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", program, cluster.mount, *arguments]
        return subprocess.run(
            list(map(str, command)),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env={**os.environ, **api.environment, "VLAFLEET_LOG_LEVEL": "debug"},
        )

    done = run("certs", "cluster", pki, "--federation", "fed", *ARGUMENTS)
    assert (done.returncode, done.stderr) == (0, "")
    assert "stored: Secret fed-superlink" in done.stdout
    identity = identity_directory(pki, Role.OPERATOR, "admin")
    assert run("certs", "store", identity, "fed-operator").stdout == "kept: Secret fed-operator\n"
    refused = run("certs", "store", identity, "fed-monitor")
    assert (refused.returncode, refused.stderr.count("\n")) == (10, 1)
    assert "holds the identity spiffe://fed/monitor/prometheus" in refused.stderr
    # Refused before anything is asked.
    for extra in (
        ["--secret", "operator=fed-operator"],
        ["--secret", "king/admin=fed-operator"],
        ["--secret", "operator/admin=a", "--secret", "operator/admin=b"],
        ["--secret", "operator/admin=a", "--host", "superlink"],
    ):
        result = CliRunner().invoke(cli, ["cluster", str(pki), "--federation", "fed", *extra])
        assert result.exit_code == 2, result.output
    token = (cluster.mount / "token").read_text()
    told = "".join(each.stdout + each.stderr for each in (done, refused))
    assert token not in told
    assert "PRIVATE" not in told
