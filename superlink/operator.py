"""The enrolment service as an operator uses it: invitations, memberships, evictions."""

import contextlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

import httpx
from cryptography import x509

from certs.contexts import client_context, enrolment_server
from certs.enrolment import (
    APPROVE_PATH,
    INVITATIONS_PATH,
    MAX_BODY_BYTES,
    REVOKE_PATH,
    SITES_PATH,
    Application,
    Membership,
    certificate_fingerprint,
    keys_fingerprint,
)
from certs.errors import (
    CertificateError,
    ConnectionRefusedByFleetError,
    FleetError,
    InvitationError,
    UnknownSiteError,
)
from certs.files import load_certificate, write_atomic
from certs.identity import Identity, is_issued_by
from certs.invitation import Invitation
from certs.lifetime import renew_at
from certs.renewal import renew
from certs.roles import Role, checked_site

_log = logging.getLogger("vlafleet.operator")

# An eviction waits for the SuperLink, which may be slow while a round's tensors pass through it.
_TIMEOUT_SECONDS = 60.0
# Refusals that are about the asker or the service, not about what was asked for.
_OF_THE_SERVICE = frozenset({"role", "revoked", "busy", "too-large", "unavailable"})

Site = dict[str, Any]


@dataclass(frozen=True)
class Invited:
    """An invitation that was made, and whether its site is a member already."""

    invitation: Invitation
    member: bool


@dataclass(frozen=True)
class Evicted:
    """What a revocation did."""

    certificates: int
    unregistered: bool
    invitations: int


class Enrolment:
    """A connection to the enrolment service, with an operator's certificate."""

    def __init__(self, client: httpx.Client, address: str) -> None:
        self._client = client
        self._address = address

    @classmethod
    @contextlib.contextmanager
    def connect(cls, directory: Path, address: str) -> Iterator[Self]:
        """Open a connection to ``host:port`` with the operator's identity in ``directory``.

        An operator has no process that renews the certificate, so it is done here, when it is due.
        """
        identity = Identity.load(directory, Role.OPERATOR)
        if datetime.now(UTC) >= renew_at(load_certificate(identity.certificate)):
            try:
                identity = renew(identity, address)
            except FleetError as error:
                _log.warning(
                    "your certificate ends at %s and was not renewed: %s",
                    f"{identity.not_after:%Y-%m-%d %H:%M} UTC",
                    error,
                )
        context = client_context(identity, enrolment_server(identity.peer.federation))
        with httpx.Client(verify=context, timeout=_TIMEOUT_SECONDS) as client:
            yield cls(client, address)

    def invite(self, site: str, valid: timedelta) -> Invited:
        """Make an invitation; raise ``InvitationError`` when it is refused."""
        body = {"site": checked_site(site), "valid_seconds": int(valid.total_seconds())}
        answer = self._ask("POST", INVITATIONS_PATH, body, InvitationError)
        return Invited(Invitation.decode(answer["invitation"]), answer["member"])

    def cancel(self, site: str) -> int:
        """Cancel a site's open invitations; return how many, and raise ``InvitationError`` where there is none."""
        path = f"{INVITATIONS_PATH}/{quote(checked_site(site))}"
        cancelled: int = self._ask("DELETE", path, None, InvitationError)["cancelled"]
        if not cancelled:
            raise InvitationError(
                f"no invitation of site {site!r} is open; see 'vlafleet site list'"
            )
        return cancelled

    def sites(self) -> list[Site]:
        """Return the members and the invited, by name.

        Each is what the service says of it (``site``, ``state``, ``last_heartbeat``, ``not_after``, ``episodes``,
        ``frames``, ``bytes``) and until when it may join: ``invited_until``, or None.
        """
        known: dict[str, Site] = {
            site["site"]: {**site, "invited_until": None}
            for site in self._ask("GET", SITES_PATH)["sites"]
        }
        for invitation in self._ask("GET", INVITATIONS_PATH)["invitations"]:
            site = known.get(invitation["site"])
            if invitation["state"] == "open" and site is not None:
                site["invited_until"] = max(site["invited_until"] or 0, invitation["expires"])
        return [known[name] for name in sorted(known)]

    def approve(self, application: Application) -> Membership:
        """Admit a site; raise ``InvitationError`` when its application is refused."""
        answer = self._ask("POST", APPROVE_PATH, application.to_json(), InvitationError)
        return Membership.from_json(answer)

    def revoke(self, site: str) -> Evicted:
        """Evict a site; raise ``UnknownSiteError`` when there is nothing of it to revoke."""
        answer = self._ask("POST", REVOKE_PATH, {"site": checked_site(site)}, UnknownSiteError)
        return Evicted(answer["certificates"], answer["unregistered"], answer["invitations"])

    def _ask(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | dict[str, str] | None = None,
        refused: type[FleetError] = ConnectionRefusedByFleetError,
    ) -> dict[str, Any]:
        """Return the answer's JSON; raise ``refused`` when what was asked for is, and a sentence for all else."""
        try:
            response = self._client.request(method, f"https://{self._address}{path}", json=body)
        except httpx.ConnectError as error:
            raise ConnectionRefusedByFleetError(
                f"no enrolment service of this federation answers at {self._address} ({error}); "
                "check the address, and that 'vlafleet enrolment' runs"
            ) from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ConnectionRefusedByFleetError(
                f"the enrolment service at {self._address} did not answer "
                f"({error or type(error).__name__}); its log may name the reason"
            ) from error
        answer = _json(response)
        if response.is_success:
            return answer
        code, detail = answer.get("code"), answer.get("detail", "no reason given")
        # A code that is no string is the guard's or Flower's.
        if isinstance(code, str) and code not in _OF_THE_SERVICE:
            raise refused(str(detail))
        raise ConnectionRefusedByFleetError(
            f"the enrolment service at {self._address} refused the request "
            f"({response.status_code}): {detail}"
        )


def read_application(path: Path) -> tuple[Application, str]:
    """Read what 'vlafleet site request' wrote; return it and the fingerprint of its keys (SHA-256, hex).

    Raises ``CertificateError`` for anything else.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BODY_BYTES + 1)
    except OSError as error:
        raise CertificateError(
            f"the application {path} cannot be read: {error.strerror}; "
            "name the file that 'vlafleet site request' wrote"
        ) from error
    try:
        if len(data) > MAX_BODY_BYTES:
            raise CertificateError("it is too long")
        application = Application.from_json(json.loads(data))
        fingerprint = keys_fingerprint(*application.keys())
    except (ValueError, CertificateError) as error:
        what = error if isinstance(error, CertificateError) else "it is not JSON"
        raise CertificateError(
            f"{path} is not an application to join ({what}); "
            "bring the file that 'vlafleet site request' wrote"
        ) from error
    return application, fingerprint


def write_membership(membership: Membership, path: Path) -> str:
    """Write the file that 'vlafleet site accept' takes; return the fingerprint of the authority that signed it."""
    certificate = x509.load_pem_x509_certificate(membership.certificate.encode())
    authorities = x509.load_pem_x509_certificates(membership.authority.encode())
    write_atomic(path, json.dumps(membership.to_json(), indent=2).encode() + b"\n")
    return next(
        certificate_fingerprint(authority)
        for authority in authorities
        if is_issued_by(certificate, [authority])
    )


def table(sites: Sequence[Site], now: float) -> str:
    """Return the sites as lines of text; ``now`` is in seconds since 1970, as the sites' times."""
    rows = [("SITE", "STATE", "HEARTBEAT", "CERTIFICATE UNTIL", "INVITED UNTIL", "DATASET")]
    rows += [
        (
            site["site"],
            site["state"],
            _age(now - site["last_heartbeat"]) if site["last_heartbeat"] else "-",
            _moment(site["not_after"]),
            _moment(site["invited_until"]),
            _dataset(site),
        )
        for site in sites
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def _json(response: httpx.Response) -> dict[str, Any]:
    """Return an answer's JSON object; an empty one for anything else."""
    try:
        answer = response.json()
    except ValueError:
        return {}
    return answer if isinstance(answer, dict) else {}


def _moment(seconds: int | None) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M}" if seconds else "-"


def _age(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{max(seconds, 0):.0f} s ago"


def _dataset(site: Site) -> str:
    if site["episodes"] is None:
        return "-"
    return f"{site['episodes']} episodes, {site['frames']} frames, {site['bytes'] / 1e6:.1f} MB"
