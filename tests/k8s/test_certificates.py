"""What cert-manager would sign for the SuperLink chart is what the processes, and Prometheus, let in."""

import ssl
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from certs.contexts import client_context, server_context
from certs.errors import CertificateError
from certs.files import pem_certificate, pem_key
from certs.identity import Identity
from certs.revocations import Revocations
from certs.roles import Role
from tests.k8s.charts import ROOT, Manifest
from tests.k8s.objects import of_kind, pod_templates
from tests.k8s.pod_files import files
from tests.k8s.renders import rendered

VALUES = ROOT / "k8s/superlink/ci/cert-manager-values.yaml"
USAGES = {
    "client auth": ExtendedKeyUsageOID.CLIENT_AUTH,
    "server auth": ExtendedKeyUsageOID.SERVER_AUTH,
}
Secrets = dict[str, dict[str, bytes]]


class Issuer:
    """A self-signed authority, and certificates of it as cert-manager makes them."""

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "acme-authority")])
        self.certificate = self._signed(self._name, self._key, 1, authority=True)

    def secret(self, certificate: Manifest, number: int) -> dict[str, bytes]:
        """Return the Secret of a Certificate."""
        spec = certificate["spec"]
        assert (spec["privateKey"]["algorithm"], spec["privateKey"]["size"]) == ("ECDSA", 256)
        key = ec.generate_private_key(ec.SECP256R1())
        # Go writes a subject in this order, whatever that of the fields.
        subject = [
            *(
                _attribute(NameOID.ORGANIZATION_NAME, one)
                for one in spec["subject"]["organizations"]
            ),
            *(
                _attribute(NameOID.ORGANIZATIONAL_UNIT_NAME, one)
                for one in spec["subject"]["organizationalUnits"]
            ),
            _attribute(NameOID.COMMON_NAME, spec["commonName"]),
        ]
        names: list[x509.GeneralName] = [
            *map(x509.DNSName, spec.get("dnsNames", [])),
            *(x509.IPAddress(ip_address(one)) for one in spec.get("ipAddresses", [])),
            *map(x509.UniformResourceIdentifier, spec["uris"]),
        ]
        assert spec["usages"][0] == "digital signature"
        signed = self._signed(
            x509.Name(subject),
            key,
            number,
            x509.SubjectAlternativeName(names),
            x509.ExtendedKeyUsage([USAGES[one] for one in spec["usages"][1:]]),
        )
        return {
            "tls.key": pem_key(key),
            "tls.crt": pem_certificate(signed),
            "ca.crt": pem_certificate(self.certificate),
        }

    def revoked(self, number: int) -> bytes:
        """Return a list that revokes one certificate."""
        now = datetime.now(UTC)
        entry = x509.RevokedCertificateBuilder().serial_number(number).revocation_date(now).build()
        crl = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self._name)
            .last_update(now)
            .next_update(now + timedelta(days=1))
            .add_extension(x509.CRLNumber(1), critical=False)
            .add_revoked_certificate(entry)
            .sign(self._key, hashes.SHA256())
        )
        return crl.public_bytes(serialization.Encoding.PEM)

    def _signed(
        self,
        subject: x509.Name,
        key: ec.EllipticCurvePrivateKey,
        number: int,
        *extensions: x509.ExtensionType,
        authority: bool = False,
    ) -> x509.Certificate:
        now = datetime.now(UTC)
        issuer = x509.SubjectKeyIdentifier.from_public_key(self._key.public_key())
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(number)
            .not_valid_before(now)
            .not_valid_after(now + timedelta(days=30))
            .add_extension(x509.BasicConstraints(authority, None), critical=True)
            .add_extension(_usage(authority=authority), critical=True)
        )
        if authority:
            builder = builder.add_extension(issuer, critical=False)
        else:
            builder = builder.add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer),
                critical=False,
            )
        for extension in extensions:
            builder = builder.add_extension(extension, critical=False)
        return builder.sign(self._key, hashes.SHA256())


def _attribute(oid: x509.ObjectIdentifier, value: str) -> x509.NameAttribute[str]:
    # Go prefers this type, where the characters allow it.
    return x509.NameAttribute(oid, value, x509.name._ASN1Type.PrintableString)


def _usage(*, authority: bool) -> x509.KeyUsage:
    others = dict.fromkeys(
        (
            *("content_commitment", "key_encipherment", "data_encipherment", "key_agreement"),
            *("encipher_only", "decipher_only"),
        ),
        False,
    )
    return x509.KeyUsage(
        digital_signature=True, key_cert_sign=authority, crl_sign=authority, **others
    )


@pytest.fixture(scope="module")
def manifests() -> list[Manifest]:
    return rendered("superlink", VALUES).manifests


@pytest.fixture(scope="module")
def secrets(manifests: list[Manifest]) -> Secrets:
    """What cert-manager stores for the release, and the revocation list that its operator brings."""
    issuer = Issuer()
    made = {
        one["spec"]["secretName"]: issuer.secret(one, number)
        for number, one in enumerate(of_kind(manifests, "Certificate"), 2)
    }
    operator = x509.load_pem_x509_certificate(made["fed-operator"]["tls.crt"])
    return {**made, "acme-revoked": {"crl.pem": issuer.revoked(operator.serial_number)}}


@pytest.fixture
def mounted(manifests: list[Manifest], secrets: Secrets, tmp_path: Path) -> dict[str, Path]:
    """The identity of each container of the release, as its pod mounts it."""
    found = {}
    for pod in pod_templates(manifests):
        volumes = {volume["name"]: volume for volume in pod.spec["volumes"]}
        for container in pod.spec["containers"]:
            (mount,) = (one for one in container["volumeMounts"] if one["mountPath"] == "/identity")
            assert "/identity" in container["args"]
            assert mount["readOnly"]
            volume = volumes[mount["name"]]
            held = files(volume, lambda _, name: secrets.get(name), "", {})
            found[container["name"]] = written(tmp_path / container["name"], held)
    assert set(found) == {"superlink", "superexec", "exporter"}
    return found


def written(directory: Path, held: dict[str, tuple[int, bytes]]) -> Path:
    directory.mkdir()
    for name, (mode, content) in held.items():
        (directory / name).write_bytes(content)
        (directory / name).chmod(mode)
    return directory


def secret(directory: Path, held: dict[str, bytes]) -> Path:
    return written(directory, {name: (0o440, content) for name, content in held.items()})


def server(directory: Path, role: Role) -> ssl.SSLContext:
    identity = Identity.load(directory, role)
    return server_context(identity, Revocations(identity.crl, identity.authority))


def shake_hands(client: ssl.SSLContext, server: ssl.SSLContext, host: str) -> None:
    """Let the two meet in memory; raise what either side has against the other."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    asking = client.wrap_bio(to_client, to_server, server_hostname=host)
    answering = server.wrap_bio(to_server, to_client, server_side=True)
    left = [asking, answering]
    while left:
        for side in list(left):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
            left.remove(side)


def test_processes_meet_with_what_cert_manager_signed(mounted: dict[str, Path]) -> None:
    superlink = server(mounted["superlink"], Role.SUPERLINK)
    exporter = Identity.load(mounted["exporter"], Role.EXPORTER)
    for client in (Identity.load(mounted["superexec"], Role.SUPEREXEC), exporter):
        for host in ("fed-superlink", "fed-superlink.vlafleet.svc", "superlink.example.org"):
            shake_hands(client_context(client), superlink, host)
    with pytest.raises(ssl.SSLCertVerificationError, match="not valid for"):
        shake_hands(client_context(exporter), superlink, "fed-exporter")
    # As a probe asks.
    own = client_context(exporter, ("acme", Role.EXPORTER, "exporter"))
    shake_hands(own, server(mounted["exporter"], Role.EXPORTER), "localhost")


def test_the_revoked_stay_out(mounted: dict[str, Path], secrets: Secrets, tmp_path: Path) -> None:
    operator = Identity.load(secret(tmp_path / "operator", secrets["fed-operator"]), Role.OPERATOR)
    superlink = server(mounted["superlink"], Role.SUPERLINK)
    with pytest.raises(ssl.SSLCertVerificationError, match="operator/admin is revoked"):
        shake_hands(client_context(operator), superlink, "fed-superlink")


def test_prometheus_asks_as_its_service_monitors_say(
    manifests: list[Manifest], mounted: dict[str, Path], secrets: Secrets, tmp_path: Path
) -> None:
    asked = set()
    for monitor in of_kind(manifests, "ServiceMonitor"):
        (endpoint,) = monitor["spec"]["endpoints"]
        config = endpoint["tlsConfig"]
        (service,) = (
            one
            for one in of_kind(manifests, "Service")
            if monitor["spec"]["selector"]["matchLabels"].items()
            <= one["metadata"]["labels"].items()
        )
        assert endpoint["port"] in {port["name"] for port in service["spec"]["ports"]}
        job = service["metadata"]["labels"][monitor["spec"]["jobLabel"]]
        directory = tmp_path / f"monitor-{job}"
        directory.mkdir()
        for name, source in (
            ("ca.crt", config["ca"]["secret"]),
            ("tls.crt", config["cert"]["secret"]),
            ("tls.key", config["keySecret"]),
        ):
            (directory / name).write_bytes(secrets[source["name"]][source["key"]])
        prometheus = ssl.create_default_context(cafile=str(directory / "ca.crt"))
        prometheus.load_cert_chain(directory / "tls.crt", directory / "tls.key")
        shake_hands(prometheus, server(mounted[job], Role(job)), config["serverName"])
        asked.add(job)
    # Without an authority of its own the federation has no enrolment service.
    assert asked == {"superlink", "exporter"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"commonName": "exporter"}, "name different holders"),
        ({"subject": {"organizations": ["acme"], "organizationalUnits": []}}, "different holders"),
        ({"uris": []}, "has one SAN URI"),
    ],
)
def test_a_certificate_that_says_less_is_refused(
    manifests: list[Manifest], tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    (certificate,) = (
        one
        for one in of_kind(manifests, "Certificate")
        if one["metadata"]["name"] == "fed-superexec"
    )
    changed = {**certificate, "spec": {**certificate["spec"], **change}}
    directory = secret(tmp_path / "identity", Issuer().secret(changed, 2))
    with pytest.raises(CertificateError, match=says):
        Identity.load(directory, Role.SUPEREXEC)
