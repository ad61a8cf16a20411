"""The enrolment service's HTTP API: which role may ask for what, and what is answered, counted and audited."""

import asyncio
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Final

from cryptography import x509
from prometheus_client import REGISTRY

from certs.audit import Audit
from certs.authority import Authority
from certs.enrolment import (
    APPROVE_PATH,
    AUTHORITY_PATH,
    CODES,
    DATASET_PATH,
    ENROL_PATH,
    INVITATIONS_PATH,
    RENEW_PATH,
    REVOKE_PATH,
    SITES_PATH,
    certificate_fingerprint,
)
from certs.errors import CertificateError, InvitationError
from certs.guard import Application, Rule, allow
from certs.invitation import Invitation
from certs.metric import Metric
from certs.roles import Peer, Role, checked_site
from superlink.crl import Publisher
from superlink.datasets import Datasets
from superlink.endpoint import Request, endpoint, fields
from superlink.invitations import Invitations
from superlink.limits import REQUESTS, Limits
from superlink.members import Candidate, Members, candidate, invitation_secret
from superlink.refused import Refused
from superlink.renewals import renew
from superlink.roster import roster

_ENROLMENTS = Metric(
    "vlafleet_enrolments", "counter", "Requests to be a member, by outcome.", ["result"]
)
_RENEWALS = Metric(
    "vlafleet_renewals", "counter", "Requests for the next certificate, by outcome.", ["result"]
)
METRICS: Final = (_ENROLMENTS, _RENEWALS)
ENROLMENTS, RENEWALS = _ENROLMENTS.counting(REGISTRY), _RENEWALS.counting(REGISTRY)
# There from the start: increase() does not see what a series begins with.
ENROLMENT_RESULTS: Final = ("enrolled", "approved", *sorted(CODES))
RENEWAL_RESULTS: Final = ("renewed", *sorted(CODES))
for _result in ENROLMENT_RESULTS:
    ENROLMENTS.labels(_result)
for _result in RENEWAL_RESULTS:
    RENEWALS.labels(_result)

# What waits for the SuperLink, a request at a time. It answers in 50 ms, so the last of them waits 2 s.
_MAX_WAITING = 40
_BUSY_SECONDS = 3


class Api:
    """The paths of the enrolment service.

    ``authority`` is the authority's directory, ``address`` the service's ``host:port`` as the sites reach it.
    """

    def __init__(
        self,
        authority: Path,
        invitations: Invitations,
        members: Members,
        datasets: Datasets,
        publisher: Publisher,
        audit: Audit,
        *,
        address: str,
        site_lifetime: timedelta,
    ) -> None:
        self._authority = authority
        self._invitations = invitations
        self._members = members
        self._datasets = datasets
        self._publisher = publisher
        self._audit = audit
        self._address = address
        self._site_lifetime = site_lifetime
        # One at a time, as Members is; apart from what does not wait for the SuperLink, a renewal for example.
        self._superlink = ThreadPoolExecutor(1, "superlink")
        self._waiting = 0
        self._limits = Limits(*REQUESTS)

    def anonymous(self) -> dict[str, Application]:
        """Return what is open to those who have no certificate."""
        limited = self._limits.require
        return {
            AUTHORITY_PATH: endpoint({"GET": self.trust}, limited=limited),
            ENROL_PATH: endpoint({"POST": self.enrol}, self._enrolment_refused, limited=limited),
        }

    def rules(self) -> dict[str, tuple[Rule, Application]]:
        """Return which role may ask for what."""
        operator = allow(lambda peer: peer.role is Role.OPERATOR)
        site = allow(lambda peer: peer.role is Role.SITE)
        everybody = allow(lambda _peer: True)
        invitations = {"POST": self.invite, "GET": self.invitations}
        return {
            RENEW_PATH: (everybody, endpoint({"POST": self.renew}, self._renewal_refused)),
            DATASET_PATH: (site, endpoint({"PUT": self.dataset})),
            INVITATIONS_PATH: (operator, endpoint(invitations)),
            f"{INVITATIONS_PATH}/": (operator, endpoint({"DELETE": self.cancel})),
            SITES_PATH: (operator, endpoint({"GET": self.sites})),
            APPROVE_PATH: (
                operator,
                endpoint({"POST": self.approve}, self._enrolment_refused),
            ),
            REVOKE_PATH: (operator, endpoint({"POST": self.revoke})),
        }

    async def trust(self, _request: Request) -> dict[str, Any]:
        """Answer with the authority's certificates; which of them to trust, an invitation's fingerprint says."""
        authority = await asyncio.to_thread(Authority.load, self._authority)
        return {
            "authority": authority.bundle.decode(),
            "federation": authority.federation,
            "time": time.time(),
        }

    async def enrol(self, request: Request) -> dict[str, Any]:
        """Admit a site that was invited."""
        body = fields(request.body, {"invitation", "application"})
        site, secret = await asyncio.to_thread(self._validated, body)
        membership, invitation = await self._in_turn(self._members.enrol, secret, site)
        self._enrolled("enrolled", request, site, invitation=invitation)
        return membership.to_json()

    async def approve(self, request: Request) -> dict[str, Any]:
        """Admit a site whose application came as a file."""
        site = await asyncio.to_thread(self._candidate, request.body)
        membership = await self._in_turn(self._members.approve, site)
        self._enrolled("approved", request, site)
        return membership.to_json()

    async def renew(self, request: Request) -> dict[str, Any]:
        """Sign the holder's next certificate."""
        presented = x509.load_der_x509_certificate(request.certificate or b"")
        peer = request.holder
        answer = await asyncio.to_thread(
            renew, self._authority, peer, presented, request.body, self._site_lifetime
        )
        RENEWALS.labels("renewed").inc()
        issued = x509.load_pem_x509_certificate(answer["certificate"].encode())
        self._audit.record(
            "renewed",
            by=peer,
            address=request.address,
            holder=Peer.of(issued).uri,
            issued=f"{issued.serial_number:x}",
        )
        return answer

    async def dataset(self, request: Request) -> None:
        """Keep what a site says of its dataset."""
        await asyncio.to_thread(self._datasets.report, request.holder.name, request.body)

    async def invite(self, request: Request) -> dict[str, Any]:
        """Make an invitation for a site."""
        body = fields(request.body, {"site", "valid_seconds"})
        site, seconds = body["site"], body["valid_seconds"]
        if not isinstance(site, str) or type(seconds) is not int:
            raise Refused("malformed", "site is a string, and valid_seconds a whole number")
        member = await self._in_turn(self._members.is_member, site)
        authority = Authority.load(self._authority)
        try:
            secret, entry = await asyncio.to_thread(self._invitations.create, site, seconds)
            invitation = Invitation(
                authority.federation,
                site,
                self._address,
                certificate_fingerprint(authority.certificate),
                entry.expires,
                secret,
            )
        except (CertificateError, InvitationError) as error:
            raise Refused("malformed", str(error)) from error
        self._audit.record(
            "invited",
            by=request.peer,
            address=request.address,
            site=site,
            invitation=entry.id,
            valid_seconds=seconds,
        )
        return {
            "invitation": invitation.encode(),
            "site": site,
            "expires": entry.expires,
            "member": member,
        }

    async def invitations(self, _request: Request) -> dict[str, Any]:
        """List the invitations."""
        return {"invitations": self._invitations.listed()}

    async def cancel(self, request: Request) -> dict[str, Any]:
        """Cancel the invitations of the site that the path names."""
        site = _checked(request.path.removeprefix(f"{INVITATIONS_PATH}/"))
        cancelled = await asyncio.to_thread(self._invitations.cancel, site)
        if cancelled:
            self._audit.record(
                "invitation-cancelled", by=request.peer, address=request.address, site=site
            )
        return {"cancelled": cancelled}

    async def sites(self, _request: Request) -> dict[str, Any]:
        """List the sites."""
        nodes = await self._in_turn(self._members.nodes)
        issued = Authority.load(self._authority).issued()
        return {"sites": roster(issued, nodes, self._invitations.listed(), self._datasets)}

    async def revoke(self, request: Request) -> dict[str, Any]:
        """Evict a site, and have the SuperLink know at once."""
        site = _checked(fields(request.body, {"site"})["site"])
        eviction = await self._in_turn(self._members.revoke, site)
        open_ends = [eviction.open] if eviction.open else []
        try:
            await asyncio.to_thread(self._publisher.publish)
        except Refused as refused:
            open_ends.append(refused.detail)
        self._audit.record(
            "revoked",
            by=request.peer,
            address=request.address,
            site=site,
            certificates=eviction.certificates,
            open="; ".join(open_ends) or None,
        )
        if open_ends:
            raise Refused(
                "unavailable",
                f"{eviction.certificates} certificates and {eviction.invitations} invitations of "
                f"{site} are revoked, and what is left is tried again until it is done: "
                + "; ".join(open_ends),
            )
        return {
            "certificates": eviction.certificates,
            "unregistered": eviction.unregistered,
            "invitations": eviction.invitations,
        }

    def finish_evictions(self) -> None:
        """Complete the evictions that were begun; raise ``Refused`` when the SuperLink does not answer."""

        def finished(site: str) -> None:
            self._audit.record("revoked", site=site, detail="an eviction begun before is finished")

        self._members.finish_evictions(finished)

    def _validated(self, body: Mapping[str, Any]) -> tuple[Candidate, bytes]:
        """Read an enrolment, and refuse what cannot succeed before it waits for its turn."""
        secret = invitation_secret(body["invitation"])
        site = self._candidate(body["application"])
        self._invitations.require(secret, site.site, site.fingerprint)
        return site, secret

    def _candidate(self, record: Any) -> Candidate:
        return candidate(record, Authority.load(self._authority).federation)

    async def _in_turn[**P, T](
        self, work: Callable[P, T], *arguments: P.args, **options: P.kwargs
    ) -> T:
        """Run what waits for the SuperLink when those before it are done."""
        if self._waiting >= _MAX_WAITING:
            raise Refused(
                "busy",
                f"too many requests wait for the SuperLink: come again in {_BUSY_SECONDS} s",
                retry_after=_BUSY_SECONDS,
            )
        self._waiting += 1
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._superlink, partial(work, *arguments, **options))
        finally:
            self._waiting -= 1

    def _enrolled(self, event: str, request: Request, site: Candidate, **details: str) -> None:
        ENROLMENTS.labels(event).inc()
        self._audit.record(
            event,
            by=request.peer,
            address=request.address,
            site=site.site,
            keys=site.fingerprint,
            **details,
        )

    def _enrolment_refused(self, request: Request, refused: Refused) -> None:
        ENROLMENTS.labels(refused.code).inc()
        self._refused("enrolment-refused", request, refused)

    def _renewal_refused(self, request: Request, refused: Refused) -> None:
        RENEWALS.labels(refused.code).inc()
        self._refused("renewal-refused", request, refused)

    def _refused(self, event: str, request: Request, refused: Refused) -> None:
        self._audit.record(
            event,
            by=request.peer,
            address=request.address,
            reason=refused.code,
            detail=refused.detail,
        )


def _checked(site: Any) -> str:
    try:
        return checked_site(site if isinstance(site, str) else "")
    except CertificateError as error:
        raise Refused("malformed", str(error)) from error
