"""What a site and the enrolment service say to each other, over HTTPS and in files: an application, a membership.

Bodies are JSON. An answer that refuses is ``{"code": ..., "detail": ...}``: one of ``CODES`` and a sentence.
"""

import base64
import binascii
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from certs.errors import CertificateError
from certs.roles import Role, checked_name, checked_site, subject

# Open to everybody: the authority's certificates, and the way in.
AUTHORITY_PATH = "/v1/authority"
ENROL_PATH = "/v1/enrol"
# Every holder of a certificate: the next one.
RENEW_PATH = "/v1/renew"
# A site: what it trains on, in numbers.
DATASET_PATH = "/v1/dataset"
# An operator. A site's name follows INVITATIONS_PATH where one is cancelled.
INVITATIONS_PATH = "/v1/invitations"
SITES_PATH = "/v1/sites"
APPROVE_PATH = "/v1/approve"
REVOKE_PATH = "/v1/revoke"
# At the SuperLink: the revocation list, from the enrolment service; and (SITES_PATH) who is online.
CRL_PATH = "/v1/crl"

# Two requests for a certificate, two keys and a signature take 2 kB.
MAX_BODY_BYTES = 16 << 10

# Why a request was refused; also a metric's label and what the audit log says.
CODES = frozenset(
    {
        "malformed",  # not what the path takes
        "too-large",  # beyond MAX_BODY_BYTES
        "busy",  # too many requests; Retry-After says when to come back
        "unknown",  # no such invitation
        "expired",
        "used",  # by other keys
        "cancelled",
        "federation",  # of another one
        "site",  # the invitation names another site
        "proof",  # a key's signature is wrong
        "retired-key",  # the SuperNode key was unregistered: another has to be made
        "member",  # another machine is registered under the site's name
        "revoked",  # the presented certificate is
        "role",  # the certificate's holder may not ask for this
        "unavailable",  # the SuperLink does not answer
    }
)


@dataclass(frozen=True)
class Application:
    """A site's request to be a member: three keys, and proof that it holds each.

    ``csr`` is for the SuperNode (role ``site``), ``superexec_csr`` for the SuperExec beside it: PKCS #10 (RFC 2986),
    PEM, each signed by its key. ``node_key`` is an OpenSSH public key; ``proof`` its ECDSA signature (SHA-256, DER,
    base64) over the rest.
    """

    federation: str
    site: str
    csr: str
    superexec_csr: str
    node_key: str
    proof: str

    @classmethod
    def make(
        cls,
        federation: str,
        site: str,
        key: ec.EllipticCurvePrivateKey,
        superexec_key: ec.EllipticCurvePrivateKey,
        node_key: ec.EllipticCurvePrivateKey,
    ) -> Self:
        """Apply with these keys."""
        public = node_key.public_key().public_bytes(
            serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
        )
        unsigned = cls(
            federation,
            site,
            signing_request(key, federation, Role.SITE, site),
            signing_request(superexec_key, federation, Role.SUPEREXEC, site),
            public.decode(),
            "",
        )
        signature = node_key.sign(unsigned._signed(), ec.ECDSA(hashes.SHA256()))
        return cls(**{**asdict(unsigned), "proof": base64.b64encode(signature).decode()})

    def to_json(self) -> dict[str, str]:
        """Return it as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, record: Any) -> Self:
        """Read it; raise ``CertificateError`` unless it has every field and no other, all of them strings."""
        names = set(cls.__dataclass_fields__)
        if not isinstance(record, Mapping) or set(record) != names:
            raise CertificateError(f"an application has the fields {', '.join(sorted(names))}")
        for name, value in record.items():
            if not isinstance(value, str):
                raise CertificateError(f"an application's {name} is a string")
        application = cls(**record)
        checked_name(application.federation, "federation name")
        checked_site(application.site)
        return application

    def keys(
        self,
    ) -> tuple[ec.EllipticCurvePublicKey, ec.EllipticCurvePublicKey, ec.EllipticCurvePublicKey]:
        """Return the SuperNode's TLS key, the SuperExec's and the SuperNode key, each proven to be the applicant's.

        Raises ``CertificateError`` when a signature is wrong or a key is not on P-256, or one key serves two ends.
        """
        key = requested_key(self.csr)
        superexec_key = requested_key(self.superexec_csr)
        node_key = public_node_key(self.node_key)
        try:
            signature = base64.b64decode(self.proof, validate=True)
            node_key.verify(signature, self._signed(), ec.ECDSA(hashes.SHA256()))
        except (binascii.Error, ValueError, InvalidSignature) as error:
            raise CertificateError("the SuperNode key's proof is not its signature") from error
        if len({fingerprint_of(each) for each in (key, superexec_key, node_key)}) != 3:
            raise CertificateError("the application uses one key for two ends")
        return key, superexec_key, node_key

    def _signed(self) -> bytes:
        fields = asdict(self)
        del fields["proof"]
        return b"vlafleet application 1\n" + json.dumps(fields, sort_keys=True).encode()


@dataclass(frozen=True)
class Membership:
    """The federation's answer to an application: the certificates (PEM), whom to trust, where to go.

    ``authority`` is a bundle; ``superlink`` and ``enrolment`` are ``host:port`` as a site reaches them.
    """

    federation: str
    site: str
    certificate: str
    superexec_certificate: str
    authority: str
    superlink: str
    enrolment: str

    def to_json(self) -> dict[str, str]:
        """Return it as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, record: Any) -> Self:
        """Read it; raise ``CertificateError`` unless it has every field, all of them strings."""
        names = set(cls.__dataclass_fields__)
        if not isinstance(record, Mapping) or not names <= set(record):
            raise CertificateError(f"a membership has the fields {', '.join(sorted(names))}")
        if any(not isinstance(record[name], str) for name in names):
            raise CertificateError("a membership's fields are strings")
        return cls(**{name: record[name] for name in names})


def signing_request(key: ec.EllipticCurvePrivateKey, federation: str, role: Role, name: str) -> str:
    """Return a request for a certificate, PEM, signed by ``key``; who signs it decides what the certificate says."""
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject(federation, role, name))
    request = builder.sign(key, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.PEM).decode()


def requested_key(csr: str) -> ec.EllipticCurvePublicKey:
    """Return the key of a request that it signed; raise ``CertificateError`` for any other."""
    try:
        request = x509.load_pem_x509_csr(csr.encode())
        key = request.public_key()
        signed = request.is_signature_valid
    except (ValueError, TypeError, UnsupportedAlgorithm, x509.InvalidVersion) as error:
        raise CertificateError("this is not a PEM request for a certificate") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise CertificateError("a federation's keys are on the curve P-256")
    if not signed:
        raise CertificateError("the request for a certificate is not signed by its key")
    return key


def public_node_key(text: str) -> ec.EllipticCurvePublicKey:
    """Return a SuperNode's public key; raise ``CertificateError`` unless it is an OpenSSH one on P-256."""
    try:
        key = serialization.load_ssh_public_key(text.encode())
    except (ValueError, TypeError, UnsupportedAlgorithm, NotImplementedError) as error:
        raise CertificateError("the SuperNode key is not an OpenSSH public key") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise CertificateError("a SuperNode key is on the curve P-256")
    return key


def fingerprint_of(key: ec.EllipticCurvePublicKey) -> str:
    """Return the SHA-256 of a public key (SubjectPublicKeyInfo, DER), hex."""
    der = key.public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return hashlib.sha256(der).hexdigest()


def keys_fingerprint(*keys: ec.EllipticCurvePublicKey) -> str:
    """Return one SHA-256 over several public keys, hex: what two people compare, and what an invitation was used by."""
    return hashlib.sha256("".join(map(fingerprint_of, keys)).encode()).hexdigest()


def certificate_fingerprint(certificate: x509.Certificate) -> str:
    """Return the SHA-256 of a certificate (DER), hex: what an invitation names the authority by."""
    return certificate.fingerprint(hashes.SHA256()).hex()
