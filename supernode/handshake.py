"""Why a TLS handshake with a server of the federation failed: what is shown to those who verify nothing.

Nothing is sent over such a connection; the certificate it presents is read and judged here.
"""

import socket
import ssl
from collections.abc import Callable
from datetime import UTC, datetime

from cryptography import x509
from cryptography.x509.oid import NameOID

from certs.errors import (
    CertificateError,
    ClockError,
    ConnectionRefusedByFleetError,
    FleetError,
    first_line,
)
from certs.identity import is_issued_by
from certs.roles import Peer

# OpenSSL's X509_V_ERR_HOSTNAME_MISMATCH and X509_V_ERR_IP_ADDRESS_MISMATCH (x509_vfy.h).
_OTHER_NAME = (62, 64)


class StepError(Exception):
    """A step to a server failed: a sentence that follows the server's address, a remedy, what it stands for."""

    def __init__(
        self,
        sentence: str,
        remedy: str,
        error: type[FleetError] = ConnectionRefusedByFleetError,
    ) -> None:
        super().__init__(sentence)
        self.sentence, self.remedy, self.error = sentence, remedy, error


def explain(
    failed: OSError, host: str, port: int, authorities: str, connect: Callable[[], socket.socket]
) -> StepError:
    """Return what a failed handshake with ``host`` means, after a second look at it through ``connect``.

    ``authorities`` is the federation's bundle, PEM.
    """
    if isinstance(failed, TimeoutError):
        return _silent(host, port)
    try:
        certificate = _presented(connect(), host)
    except TimeoutError:
        return _silent(host, port)
    except (ssl.SSLEOFError, ConnectionError):
        return StepError(
            "accepts a TCP connection and ends it in the TLS handshake, as a firewall does that blocks a name",
            f"Ask your network's administrator to allow TLS to {host} port {port}.",
        )
    except (OSError, ValueError) as error:
        why = getattr(error, "reason", None) or first_line(error)
        return StepError(
            f"what answers there does not speak TLS ({why})",
            f"Compare {host}:{port} with the federation's operator: another service has this port, or a portal wants "
            "a login first.",
        )
    if not is_issued_by(certificate, x509.load_pem_x509_certificates(authorities.encode())):
        return _foreign(certificate, host, port)
    return _own(certificate, failed, host)


def parsed(der: bytes | None) -> x509.Certificate:
    """Return a certificate from its DER; ``ValueError`` when it is none."""
    return x509.load_der_x509_certificate(der or b"")


def _presented(connection: socket.socket, host: str) -> x509.Certificate:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    # Whoever opens TLS on the way may do it in an old version and with weak keys: it shall be seen all the same.
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers("ALL:@SECLEVEL=0")
    with connection, context.wrap_socket(connection, server_hostname=host) as tls:
        return parsed(tls.getpeercert(binary_form=True))


def _silent(host: str, port: int) -> StepError:
    return StepError(
        "accepts a TCP connection and says nothing to a TLS handshake",
        f"Ask the federation's operator whether it hangs; another service may have port {port} of {host}, or a "
        "firewall swallows TLS.",
    )


def _foreign(certificate: x509.Certificate, host: str, port: int) -> StepError:
    """A certificate that the federation's authority did not sign."""
    try:
        peer = Peer.of(certificate)
    except CertificateError:
        return StepError(
            f"the certificate presented there is for {_name(certificate.subject)}, issued by "
            f"{_name(certificate.issuer)} and not by the federation: a proxy or firewall on the way opens TLS, or "
            "another service has this address",
            f"Ask your network's administrator to exempt {host}:{port} from TLS inspection: mutual TLS cannot pass it.",
        )
    return StepError(
        f"the certificate presented there is of {peer.uri}, signed by an authority that this site does not trust",
        "Ask the federation's operator whether the authority was replaced; then join again with a new invitation. If "
        "it was not, somebody poses as the federation.",
        CertificateError,
    )


def _own(certificate: x509.Certificate, failed: OSError, host: str) -> StepError:
    """A certificate of the federation's that was refused all the same."""
    now = datetime.now(UTC)
    start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now < start:
        return StepError(
            f"its certificate is valid from {start:%Y-%m-%d %H:%M} UTC on, and this machine's clock says "
            f"{now:%Y-%m-%d %H:%M}: the clock is behind",
            "Switch on time synchronisation ('timedatectl set-ntp true', or chrony), then check again.",
            ClockError,
        )
    if now >= end:
        return StepError(
            f"its certificate expired on {end:%Y-%m-%d %H:%M} UTC, and this machine's clock says {now:%Y-%m-%d %H:%M}",
            "Ask the federation's operator to renew it; if other sites reach it, this machine's clock is ahead.",
            CertificateError,
        )
    if getattr(failed, "verify_code", None) in _OTHER_NAME:
        return StepError(
            f"its certificate is for {', '.join(_hosts(certificate)) or 'no host'}, and not for {host}",
            f"Use one of these names, or ask the federation's operator to issue it with '--host {host}'.",
            CertificateError,
        )
    said = getattr(failed, "verify_message", None) or first_line(failed)
    return StepError(
        f"its certificate is of the federation, and is refused: {said}",
        "Compare the address with the one the federation's operator gave you.",
        CertificateError,
    )


def _name(name: x509.Name) -> str:
    """Return who a name is: organisation and common name, printable and short, for a stranger wrote it."""
    oids = (NameOID.ORGANIZATION_NAME, NameOID.COMMON_NAME)
    values = [str(each.value) for oid in oids for each in name.get_attributes_for_oid(oid)]
    text = ", ".join(dict.fromkeys(values)) or name.rfc4514_string() or "nobody"
    return repr("".join(char if char.isprintable() else "?" for char in text)[:100])


def _hosts(certificate: x509.Certificate) -> list[str]:
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return [
        *names.get_values_for_type(x509.DNSName),
        *map(str, names.get_values_for_type(x509.IPAddress)),
    ]
