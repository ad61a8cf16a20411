"""The client of the enrolment service: find the authority that an invitation names, and apply to it.

Nothing of the site's is sent before the service has proven, in a second connection, that this authority vouches for it.
"""

import base64
import contextlib
import json
import re
import ssl
import time
from collections.abc import Iterator, Mapping
from typing import Any

import httpx
from cryptography import x509
from cryptography.x509.oid import NameOID

from certs.contexts import (
    anonymous_context,
    client_context,
    enrolment_server,
    unverified_context,
)
from certs.enrolment import (
    AUTHORITY_PATH,
    CODES,
    DATASET_PATH,
    ENROL_PATH,
    Application,
    Membership,
    certificate_fingerprint,
)
from certs.errors import (
    CertificateError,
    ConnectionRefusedByFleetError,
    FleetError,
    InvitationError,
    first_line,
)
from certs.files import pem_certificate
from certs.identity import Identity
from certs.invitation import Invitation
from certs.lifetime import CLOCK_SKEW

# In all, however often the service asks to come back later.
_PATIENCE_SECONDS = 120.0
_TIMEOUT = httpx.Timeout(20.0, connect=5.0)
# Pauses before another attempt where nothing answered: a service that is being restarted is back by then.
_PAUSES = (1.0, 2.0, 4.0)
# Two certificates and a bundle take 5 kB; what is larger is no answer of this service.
_MAX_ANSWER_BYTES = 64 << 10
# What the operator has to put right is the invitation; what is left of CODES are the site's own files and keys.
_OF_INVITATION = frozenset(
    {"unknown", "expired", "used", "cancelled", "federation", "site", "member"}
)


class RetiredKeyError(CertificateError):
    """The site was revoked: Flower never takes its SuperNode key again, another has to be made."""


def authority_of(address: str, fingerprint: str) -> str:
    """Return the certificate (PEM) with this SHA-256 (hex) of the authority at ``address`` (``host:port``).

    Raises ``InvitationError`` when the service there has another one.
    """
    with _client(address, unverified_context()) as client:
        answer = _ask(client, address, "GET", AUTHORITY_PATH)
    # Not verified yet: whatever an impostor answers is not repeated.
    try:
        record = json.loads(answer.content)
        bundle = x509.load_pem_x509_certificates(record["authority"].encode())
    except (ValueError, KeyError, TypeError, AttributeError, x509.InvalidVersion) as error:
        raise ConnectionRefusedByFleetError(
            f"{address} does not answer as an enrolment service (HTTP {answer.status_code}): "
            "ask the federation's operator whether the address is right"
        ) from error
    for certificate in bundle:
        if certificate_fingerprint(certificate) == fingerprint:
            return pem_certificate(certificate).decode()
    raise InvitationError(
        f"the federation at {address} has another authority than the invitation names (fingerprint "
        f"{fingerprint[:16]}...): somebody may be between this machine and the federation, "
        "or the invitation is an old one; nothing was sent. Ask its operator"
    )


def inviter(invitation: Invitation) -> str:
    """Return the certificate (PEM) of the authority that an invitation names.

    Raises ``InvitationError`` when the service at its address has another one, or it is another federation's.
    """
    authority = authority_of(invitation.address, invitation.fingerprint)
    subject = x509.load_pem_x509_certificate(authority.encode()).subject
    names = [name.value for name in subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)]
    if names != [invitation.federation]:
        raise InvitationError(
            f"the invitation is for the federation {invitation.federation!r}, and the authority it names is "
            f"that of {', '.join(map(repr, names)) or 'none'}: it was altered; ask the operator for another one"
        )
    return authority


def enrol(invitation: Invitation, application: Application) -> Membership:
    """Apply with an invitation; the same application may be sent again, and gets the same membership.

    Raises ``InvitationError`` when the invitation is not good for it, ``RetiredKeyError`` when the SuperNode key is
    not, ``CertificateError`` when anything else of the application is not, ``ConnectionRefusedByFleetError`` when the
    federation cannot answer.
    """
    refuse_unfit(invitation, application.federation, application.site)
    authority = inviter(invitation)
    secret = base64.urlsafe_b64encode(invitation.secret).rstrip(b"=").decode()
    body = {"invitation": secret, "application": application.to_json()}
    with _client(invitation.address, anonymous_context(authority, invitation.federation)) as client:
        answer = _ask(client, invitation.address, "POST", ENROL_PATH, body)
    if answer.status_code != httpx.codes.OK:
        raise _refusal(answer, invitation.address)
    return Membership.from_json(_json(answer, invitation.address))


def refuse_unfit(invitation: Invitation, federation: str, site: str) -> None:
    """Raise ``InvitationError`` for an invitation that is over or somebody else's, without asking anybody.

    A clock may be wrong by ``CLOCK_SKEW``: within it the service decides.
    """
    if (invitation.federation, invitation.site) != (federation, site):
        raise InvitationError(
            f"the invitation is for the site {invitation.site!r} of the federation "
            f"{invitation.federation!r}, not for {site!r} of {federation!r}"
        )
    if time.time() > invitation.expires + CLOCK_SKEW.total_seconds():
        raise InvitationError(
            f"the invitation ended on {invitation.expires_at:%Y-%m-%d at %H:%M} UTC, and it is "
            f"{time.strftime('%Y-%m-%d %H:%M', time.gmtime())} by this machine's clock: "
            "ask the federation's operator for another one"
        )


def report_dataset(identity: Identity, address: str, numbers: Mapping[str, int]) -> None:
    """Tell the service how large the site's dataset is; raise ``FleetError`` when it does not take that."""
    context = client_context(identity, enrolment_server(identity.peer.federation))
    with _client(address, context) as client:
        answer = _ask(client, address, "PUT", DATASET_PATH, dict(numbers))
    if not answer.is_success:
        raise _refusal(answer, address)


@contextlib.contextmanager
def _client(address: str, context: ssl.SSLContext) -> Iterator[httpx.Client]:
    try:
        client = httpx.Client(
            base_url=f"https://{address}",
            verify=context,
            timeout=_TIMEOUT,
            # The bytes are counted as they come.
            headers={"accept-encoding": "identity"},
        )
    except (httpx.InvalidURL, ValueError) as error:
        raise ConnectionRefusedByFleetError(
            f"the address {address} is none: {first_line(error)}"
        ) from error
    with client:
        yield client


def _ask(
    client: httpx.Client, address: str, method: str, path: str, body: Any = None
) -> httpx.Response:
    """Return the answer to one request, asked again while that may help and patience lasts."""
    until = time.monotonic() + _PATIENCE_SECONDS
    pauses = iter(_PAUSES)
    while True:
        pause: float | None
        try:
            answer = _once(client, method, path, body, until)
        except (httpx.HTTPError, httpx.InvalidURL, OverflowError, UnicodeError) as error:
            why = untrusted(error)
            if why is not None:
                raise ConnectionRefusedByFleetError(
                    f"the server at {address} is not the federation's enrolment service: "
                    f"{why}; nothing was sent to it. If the federation has another authority "
                    "since the invitation was made, ask its operator for a new one"
                ) from error
            pause = next(pauses, None)
            if pause is None:
                raise ConnectionRefusedByFleetError(
                    f"the enrolment service at {address} cannot be reached: {first_line(error)}; check the network, "
                    "a firewall or proxy on the way, and with its operator that it runs"
                ) from error
        else:
            if answer.status_code not in {
                httpx.codes.TOO_MANY_REQUESTS,
                httpx.codes.SERVICE_UNAVAILABLE,
            }:
                return answer
            pause = _retry_after(answer)
            if time.monotonic() + pause > until:
                return answer
        time.sleep(pause)


def _once(client: httpx.Client, method: str, path: str, body: Any, until: float) -> httpx.Response:
    """Send one request and read an answer of bounded size, at ``until`` (monotonic) at the latest."""
    with client.stream(method, path, json=body) as response:
        content = bytearray()
        for piece in response.iter_raw():
            content += piece
            if len(content) > _MAX_ANSWER_BYTES:
                raise httpx.ReadError("the answer is too large")
            if time.monotonic() > until:
                raise httpx.ReadTimeout("the answer took too long")
    return httpx.Response(response.status_code, headers=response.headers, content=bytes(content))


def _retry_after(answer: httpx.Response) -> float:
    """Return the seconds that a busy service asks for, two where it does not say."""
    said = answer.headers.get("retry-after", "")
    # Ten digits: a number that a float holds.
    return max(float(said), 0.1) if re.fullmatch(r"[0-9]{1,10}", said) else 2.0


def untrusted(error: BaseException | None) -> str | None:
    """Return why a server's certificate was not taken, None when that was not the failure."""
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError):
            return error.verify_message if hasattr(error, "verify_message") else first_line(error)
        error = error.__cause__ or error.__context__
    return None


def _json(answer: httpx.Response, address: str) -> Any:
    try:
        return json.loads(answer.content)
    except ValueError as error:
        raise ConnectionRefusedByFleetError(
            f"the enrolment service at {address} answered {answer.status_code} with what is not JSON"
        ) from error


def _refusal(answer: httpx.Response, address: str) -> FleetError:
    """Return the error that an answer's code stands for, with the service's own sentence."""
    record = _json(answer, address)
    code = record.get("code") if isinstance(record, Mapping) else None
    if not isinstance(code, str) or code not in CODES:
        return ConnectionRefusedByFleetError(
            f"the enrolment service at {address} answered {answer.status_code}"
        )
    detail = str(record.get("detail", ""))[:300]
    detail = "".join(c if c.isprintable() else " " for c in detail).strip().rstrip(".") or code
    if code == "retired-key":
        return RetiredKeyError(detail)
    if code in {"busy", "unavailable"}:
        return ConnectionRefusedByFleetError(
            f"the federation at {address} cannot enrol now: {detail}; try again in a few minutes"
        )
    if code in _OF_INVITATION:
        return InvitationError(f"the federation at {address} refuses the invitation: {detail}")
    return CertificateError(f"the federation at {address} refuses the application: {detail}")
