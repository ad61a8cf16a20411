"""The TLS contexts of every process: TLS 1.3 (RFC 8446) only, both sides with a certificate of this federation."""

import ssl
from collections.abc import Callable
from typing import Any

from certs.errors import CertificateError
from certs.identity import Identity
from certs.revocations import Revocations
from certs.roles import SUPERLINK_NAME, Peer, Role

# Called with a short reason (bounded, a metric label) and a sentence for every refused handshake.
OnRefused = Callable[[str, str], None]


def server_context(
    identity: Identity, revocations: Revocations | None, on_refused: OnRefused
) -> ssl.SSLContext:
    """Return the context of a server that requires a client certificate of its own federation.

    The holder is checked as the handshake ends, so a revoked or foreign certificate never reaches HTTP. ``ssl`` has no
    callback there; ``SSLContext.sslobject_class`` is its documented extension point, which asyncio's transports use.
    """

    class Checked(ssl.SSLObject):
        def do_handshake(self) -> None:
            try:
                super().do_handshake()
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                raise
            except ssl.SSLError as error:
                on_refused(_reason(error), str(error))
                raise
            sentence = _unfit(self.getpeercert(binary_form=True), identity, revocations)
            if sentence is not None:
                on_refused("certificate", sentence)
                raise ssl.SSLError(sentence)

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    _common(context, identity)
    context.verify_mode = ssl.CERT_REQUIRED
    # No resumption: a ticket would let a holder back in without showing the certificate again.
    context.num_tickets = 0
    context.sslobject_class = Checked
    return context


def client_context(identity: Identity) -> ssl.SSLContext:
    """Return the context of a client that presents ``identity`` and checks host name and role of the server.

    The role check keeps a site, whose certificate also serves its Runtime API, from posing as the SuperLink.
    """
    expected = expected_server(identity.peer)

    class Checked(ssl.SSLSocket):
        def do_handshake(self, block: bool = False) -> None:
            super().do_handshake(block)
            check_server(self.getpeercert(binary_form=True), expected)

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    _common(context, identity)
    context.sslsocket_class = Checked
    return context


def expected_server(peer: Peer) -> tuple[str, Role, str]:
    """Return federation, role and name of the only server a holder talks to.

    A site's SuperExec talks to its own SuperNode; everybody else, the SuperLink's SuperExec
    among them, to the SuperLink.
    """
    if peer.role is Role.SUPEREXEC and peer.name != SUPERLINK_NAME:
        return peer.federation, Role.SITE, peer.name
    return peer.federation, Role.SUPERLINK, SUPERLINK_NAME


def check_server(der: bytes | None, expected: tuple[str, Role, str]) -> None:
    """Raise ``ssl.SSLCertVerificationError`` unless a server's certificate is the expected holder's."""
    try:
        peer = Peer.of_der(der or b"")
    except (CertificateError, ValueError) as error:
        raise ssl.SSLCertVerificationError(f"the server's certificate: {error}") from error
    if (peer.federation, peer.role, peer.name) != expected:
        raise ssl.SSLCertVerificationError(
            f"the server is {peer.uri}; expected {expected[1]} {expected[2]!r} of {expected[0]!r}"
        )


def _common(context: ssl.SSLContext, identity: Identity) -> None:
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    try:
        context.load_cert_chain(identity.certificate, identity.key)
        context.load_verify_locations(identity.authority)
    except (OSError, ssl.SSLError) as error:
        raise CertificateError(f"{identity.directory} cannot be used for TLS: {error}") from error


def _unfit(der: bytes | None, identity: Identity, revocations: Revocations | None) -> str | None:
    """Return why a client certificate that OpenSSL verified is not accepted, or None."""
    try:
        peer = Peer.of_der(der or b"")
    except (CertificateError, ValueError) as error:
        return str(error)
    if peer.federation != identity.peer.federation:
        return f"{peer.uri} is of another federation"
    if revocations is not None and peer.serial in revocations:
        return f"the certificate {peer.serial:x} of {peer.uri} is revoked"
    return None


def _reason(error: Any) -> str:
    """Return a bounded reason for a handshake that OpenSSL failed."""
    reason = str(getattr(error, "reason", None) or "unknown").lower()
    known = {
        "peer_did_not_return_a_certificate": "no certificate",
        "certificate_verify_failed": "not verified",
        "http_request": "plain HTTP",
        "unsupported_protocol": "old TLS",
    }
    return known.get(reason, "handshake")
