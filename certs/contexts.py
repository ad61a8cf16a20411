"""The TLS contexts of every process: TLS 1.3 (RFC 8446) only, and both sides check whom they talk to.

A context follows the identity's files: each handshake uses the certificate, the key and the authorities that lie there
now. Connections that are open go on with what they began with.
"""

import logging
import ssl
import threading
import weakref
from collections.abc import Callable
from typing import Any, Self, cast

from certs.errors import CertificateError
from certs.identity import Identity
from certs.revocations import Revocations
from certs.roles import ENROLMENT_NAME, SUPERLINK_NAME, Peer, Role

_log = logging.getLogger("vlafleet.certs")

# Federation, role and name of a server.
Server = tuple[str, Role, str]
# Raises ssl.SSLCertVerificationError unless a certificate (DER; None: none was presented) is acceptable.
Check = Callable[[bytes | None], None]


def server_context(identity: Identity, revocations: Revocations | None) -> ssl.SSLContext:
    """Return the context of a server that requires a client certificate of its own federation.

    The holder is checked as the handshake ends, so a revoked or foreign certificate never reaches HTTP.
    """
    return _server(identity, revocations, ssl.CERT_REQUIRED)


def open_server_context(identity: Identity, revocations: Revocations | None) -> ssl.SSLContext:
    """Return the context of a server that also answers clients without a certificate.

    A certificate that is presented is checked as ``server_context`` does.
    """
    return _server(identity, revocations, ssl.CERT_OPTIONAL)


def client_context(identity: Identity, server: Server | None = None) -> ssl.SSLContext:
    """Return the context of a client that presents ``identity`` and checks host name and holder of the server.

    ``server`` is who is expected, by default the one that a holder of this role talks to. The check keeps a site, whose
    certificate also serves its Runtime API, from posing as the SuperLink. A site goes by its SPIFFE ID alone.
    """
    expected = server or expected_server(identity.peer)

    def make() -> _Checked:
        context = _Checked(ssl.PROTOCOL_TLS_CLIENT, lambda der: check_server(der, expected))
        # The operator signs for a site without knowing under what name its app reaches its SuperNode, which in a
        # cluster is an address that the app's pod is given: it has no DNS. A host name would add nothing, since the
        # SPIFFE ID is the one holder's, whatever the address.
        context.check_hostname = expected[1] is not Role.SITE
        _present(context, identity)
        return context

    return _Following(ssl.PROTOCOL_TLS_CLIENT, identity, make)


def anonymous_context(authority_pem: str, federation: str) -> ssl.SSLContext:
    """Return the context of a client without a certificate, which expects the enrolment service of a federation.

    ``authority_pem`` is the authority's certificate. Raises ``CertificateError`` when it cannot be read.
    """
    expected = enrolment_server(federation)
    context = _Checked(ssl.PROTOCOL_TLS_CLIENT, lambda der: check_server(der, expected))
    try:
        context.load_verify_locations(cadata=authority_pem)
    except (ssl.SSLError, TypeError, ValueError) as error:
        raise CertificateError(
            f"the authority of {federation!r} is not a PEM certificate: {error}"
        ) from error
    return context


def unverified_context() -> ssl.SSLContext:
    """Return the context of a client that verifies nothing.

    Only for asking who the authority is: nothing secret may be sent, and what comes back must be verified by the
    fingerprint in the invitation.
    """
    context = _Checked(ssl.PROTOCOL_TLS_CLIENT, lambda _der: None)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def reload(identity: Identity) -> None:
    """Let every living context of the identity's directory take its files up now, not at its next handshake.

    Raises ``CertificateError`` when they cannot be used; then what was in force stays so.
    """
    for context in _living():
        if context.identity.directory == identity.directory:
            context.follow()


def expected_server(peer: Peer) -> Server:
    """Return the server that a holder talks to.

    A site's SuperExec talks to its own SuperNode; everybody else, the SuperLink's SuperExec
    among them, to the SuperLink.
    """
    if peer.role is Role.SUPEREXEC and peer.name != SUPERLINK_NAME:
        return peer.federation, Role.SITE, peer.name
    return peer.federation, Role.SUPERLINK, SUPERLINK_NAME


def enrolment_server(federation: str) -> Server:
    """Return the enrolment service of a federation."""
    return federation, Role.ENROLMENT, ENROLMENT_NAME


def check_server(der: bytes | None, expected: Server) -> None:
    """Raise ``ssl.SSLCertVerificationError`` unless a server's certificate is the expected holder's."""
    try:
        peer = Peer.of_der(der or b"")
    except (CertificateError, ValueError) as error:
        raise _unverified(f"the server's certificate: {error}") from error
    if (peer.federation, peer.role, peer.name) != expected:
        raise _unverified(
            f"the server is {peer.uri}; expected {expected[1]} {expected[2]!r} of {expected[0]!r}"
        )


def _unverified(sentence: str) -> ssl.SSLCertVerificationError:
    # With a number, as OpenSSL's own: str() of it is then the sentence.
    return ssl.SSLCertVerificationError(int(ssl.SSL_ERROR_SSL), sentence)


class _Socket(ssl.SSLSocket):
    def do_handshake(self, block: bool = False) -> None:
        super().do_handshake(block)
        cast("_Checked", self.context).check(self.getpeercert(binary_form=True))


class _Object(ssl.SSLObject):
    def do_handshake(self) -> None:
        super().do_handshake()
        cast("_Checked", self.context).check(self.getpeercert(binary_form=True))


class _Checked(ssl.SSLContext):
    """TLS 1.3 whose handshakes end with a check of the peer's certificate.

    ``ssl`` has no callback there; ``sslsocket_class`` and ``sslobject_class`` are its documented extension points. An
    httpx client uses the one, asyncio's transports the other.
    """

    sslsocket_class = _Socket
    sslobject_class = _Object

    def __new__(cls, protocol: int, _check: Check) -> Self:
        return super().__new__(cls, protocol)

    def __init__(self, _protocol: int, check: Check) -> None:
        self.check = check
        self.minimum_version = ssl.TLSVersion.TLSv1_3
        self.verify_flags |= ssl.VERIFY_X509_STRICT


class _Following(ssl.SSLContext):
    """Hands each handshake to a context made of the identity's current files.

    A context in use cannot be changed instead: ``load_cert_chain`` leaves it without a certificate for a moment, and
    an authority that was loaded stays trusted. This context itself trusts nobody.
    """

    def __new__(cls, protocol: int, _identity: Identity, _make: Callable[[], _Checked]) -> Self:
        return super().__new__(cls, protocol)

    def __init__(self, _protocol: int, identity: Identity, make: Callable[[], _Checked]) -> None:
        self.identity = identity
        self._make = make
        self._lock = threading.Lock()
        self._seen = identity.version()
        self._current = make()
        with _living_lock:
            _contexts.add(self)

    def wrap_socket(self, *arguments: Any, **options: Any) -> ssl.SSLSocket:
        """Begin a connection of an httpx or http.client client."""
        return self._followed().wrap_socket(*arguments, **options)

    def wrap_bio(self, *arguments: Any, **options: Any) -> ssl.SSLObject:
        """Begin a connection of an asyncio transport."""
        return self._followed().wrap_bio(*arguments, **options)

    def follow(self) -> None:
        """Take up the files if they changed; raise ``CertificateError`` when they cannot be used."""
        with self._lock:
            version = self.identity.version()
            if version != self._seen:
                # Noted first: files that cannot be used are not read again until they change.
                self._seen = version
                self._current = self._make()

    def _followed(self) -> ssl.SSLContext:
        try:
            self.follow()
        except CertificateError as error:
            _log.error("the last good certificate stays in use: %s", error)
        return self._current


_contexts: weakref.WeakSet[_Following] = weakref.WeakSet()
_living_lock = threading.Lock()


def _living() -> list[_Following]:
    with _living_lock:
        return list(_contexts)


def _server(
    identity: Identity, revocations: Revocations | None, verify_mode: ssl.VerifyMode
) -> ssl.SSLContext:
    def check(der: bytes | None) -> None:
        # OpenSSL has ended the handshake already when there is none and one is required.
        if der is None and verify_mode is ssl.CERT_OPTIONAL:
            return
        sentence = _unfit(der, identity, revocations)
        if sentence is not None:
            raise _unverified(sentence)

    def make() -> _Checked:
        context = _Checked(ssl.PROTOCOL_TLS_SERVER, check)
        _present(context, identity)
        context.verify_mode = verify_mode
        # No resumption: a ticket would let a holder back in without showing the certificate again.
        context.num_tickets = 0
        return context

    return _Following(ssl.PROTOCOL_TLS_SERVER, identity, make)


def _present(context: ssl.SSLContext, identity: Identity) -> None:
    """Load the identity's certificate and key, and the authorities it trusts."""
    try:
        with identity.chain() as chain:
            context.load_cert_chain(chain)
        context.load_verify_locations(cadata=identity.bundle())
    except (OSError, ssl.SSLError, TypeError, ValueError) as error:
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
