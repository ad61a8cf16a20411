"""Renewal: a process's next certificate, asked for with the present one while it works.

Each renewal has a fresh key. The TLS contexts of the process take the new files over in place; whoever else works from
the same directory follows the files.
"""

import logging
import os
import random
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from prometheus_client import REGISTRY

from certs.contexts import client_context, enrolment_server, expected_server, reload
from certs.enrolment import RENEW_PATH, signing_request
from certs.errors import CertificateError, ConnectionRefusedByFleetError, FleetError, first_line
from certs.files import load_certificate, parse_certificates
from certs.identity import Identity, is_issued_by, store_identity
from certs.lifetime import life, renew_at
from certs.metric import Metric
from certs.roles import SUPERLINK_NAME, Peer, Role

_FAILURES = Metric(
    "vlafleet_certificate_renewal_failures",
    "counter",
    "Tries to renew the certificate of this process that failed.",
    ["role"],
)
METRICS: Final = (_FAILURES,)
RENEWAL_FAILURES = _FAILURES.counting(REGISTRY)

_log = logging.getLogger("vlafleet.certs")

# How often the directory is looked at: four stats.
_LOOK_SECONDS = 1.0
# A failed renewal is tried again after 1, 2, 4 ... seconds, but at least eight times in what is left, and often enough
# that a service that comes back is used soon.
_TRIES_LEFT = 8
_LONGEST_PAUSE = timedelta(minutes=15)
_SHORTEST_PAUSE = timedelta(seconds=1)
# The least of its life that a certificate has left before the log warns: where it renews itself, and where it does not.
_WARN_RENEWING = 1 / 6
_WARN_FOLLOWING = 1 / 4
# An answer takes a signature and two round trips; a saturated link delays it by seconds.
_LONGEST_WAIT_SECONDS = 30.0


def renew(identity: Identity, address: str) -> Identity:
    """Renew a certificate now, under a fresh key, at ``host:port``; return the identity as it is from now on.

    That is the enrolment service, or for a site's SuperExec its own SuperNode. Raises
    ``ConnectionRefusedByFleetError`` when it cannot be reached or refuses, ``CertificateError`` when its answer is not
    to be trusted or cannot be stored; the present files are untouched then.
    """
    peer = identity.peer
    if not os.access(identity.directory, os.W_OK):
        raise CertificateError(
            f"{identity.directory} cannot be written, so nothing is renewed; mount it writable, or "
            "have whoever fills it renew the certificate"
        )
    key = ec.generate_private_key(ec.SECP256R1())
    csr = signing_request(key, peer.federation, peer.role, peer.name)
    response = ask(identity, address, {"csr": csr})
    if response.status_code != httpx.codes.OK:
        raise ConnectionRefusedByFleetError(
            f"{address} refuses to renew the certificate ({response.status_code}): {_detail(response)}"
        )
    certificate, authority = _checked(identity, key.public_key(), response, address)
    store_identity(identity.directory, key, certificate, authority)
    renewed = Identity.load(identity.directory, peer.role)
    reload(renewed)
    return renewed


def ask(identity: Identity, address: str, request: dict[str, str]) -> httpx.Response:
    """Send a request for a renewal with the present certificate; return the answer, whatever its status.

    Raises ``ConnectionRefusedByFleetError`` when none comes.
    """
    left = (identity.not_after - datetime.now(UTC)).total_seconds()
    try:
        # httpx's defaults, as Flower's own clients have them: where HTTPS_PROXY leads those, it leads this.
        with httpx.Client(
            verify=client_context(identity, _server(identity.peer)),
            # So that a certificate of a minute has time for another try.
            timeout=min(max(left / 4, 1.0), _LONGEST_WAIT_SECONDS),
        ) as client:
            return client.post(f"https://{address}{RENEW_PATH}", json=request)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ConnectionRefusedByFleetError(
            f"{address} does not renew certificates ({first_line(error)}); "
            "check the address, and that the enrolment service runs"
        ) from error


def follow(identity: Identity, address: str | None) -> "Follower":
    """Keep the certificate of a running process current, from a daemon thread; return the thread.

    It renews at two thirds of the certificate's life at ``address`` (as ``renew``) until it succeeds, and loads the
    files into the process's TLS contexts whenever somebody else has changed them. Without an address it only does the
    latter.
    """
    follower = Follower(identity, address)
    follower.start()
    return follower


def pause_before_retry(left: timedelta, failures: int) -> timedelta:
    """How long to wait after so many failures in a row, while the certificate lives for ``left``."""
    longest = min(max(left / _TRIES_LEFT, _SHORTEST_PAUSE), _LONGEST_PAUSE)
    doubled: timedelta = _SHORTEST_PAUSE * 2 ** min(failures - 1, 20)
    return min(doubled, longest)


class Follower(threading.Thread):
    """The thread of ``follow``."""

    def __init__(self, identity: Identity, address: str | None) -> None:
        super().__init__(name="renewal", daemon=True)
        self._over = threading.Event()
        self._address = address
        # What changed between the identity's loading and the first look is a change, too.
        self._seen: object = None
        self._failed = RENEWAL_FAILURES.labels(identity.peer.role)
        self._failures, self._retry_at = 0, 0.0  # seconds of time.monotonic()
        self._warned = False
        self._adopt(identity)

    def run(self) -> None:
        """Look once a second until the process ends, or ``stop``."""
        while not self._over.is_set():
            try:
                self.look()
            except Exception:  # noqa: BLE001  # the certificate ends where this thread does
                _log.exception("the certificate in %s is not followed", self._identity.directory)
            self._over.wait(_LOOK_SECONDS)

    def stop(self) -> None:
        """End the thread."""
        self._over.set()
        self.join()

    def look(self) -> None:
        """Take over what has changed, renew when it is time, warn when that is late."""
        seen = self._identity.version()
        if seen != self._seen:
            self._seen = seen
            self._take_over()
        now = datetime.now(UTC)
        left = self._identity.not_after - now
        # An expired certificate opens no door; should the clock be set right, it is tried again.
        due = renew_at(self._certificate) <= now and left > timedelta()
        if self._address is not None and due and time.monotonic() >= self._retry_at:
            self._try(self._address)
        share = _WARN_FOLLOWING if self._address is None else _WARN_RENEWING
        if not self._warned and left < life(self._certificate) * share:
            self._warned = True
            _log.error(
                "the certificate %s; after that nobody lets this process in: %s",
                *(_told(self._identity), self._remedy()),
            )

    def _adopt(self, identity: Identity) -> None:
        self._identity, self._certificate = identity, load_certificate(identity.certificate)

    def _renewed(self, identity: Identity, how: str) -> None:
        self._adopt(identity)
        self._failures, self._retry_at, self._warned = 0, 0.0, False
        _log.info("%s: the certificate %s", how, _told(identity))

    def _take_over(self) -> None:
        """Load the directory's files into the living contexts."""
        before = self._identity.peer
        try:
            identity = Identity.load(self._identity.directory, before.role)
            if identity.peer.uri != before.uri:
                raise CertificateError(
                    f"{identity.directory} now holds the identity {identity.peer.uri}; restart the process"
                )
            reload(identity)
        except FleetError as error:
            _log.error("the certificate in use stays: %s", error)
            return
        if identity.peer.serial != before.serial:
            self._renewed(identity, "replaced")

    def _try(self, address: str) -> None:
        try:
            self._renewed(renew(self._identity, address), "renewed")
        except FleetError as error:
            self._failed.inc()
            self._failures += 1
            seconds = self._wait(self._failures)
            _log.warning("not renewed, tried again in %.0f s: %s", seconds, error)
        else:
            # A service whose clock is behind signs what is due at once.
            self._wait(_TRIES_LEFT)

    def _wait(self, failures: int) -> float:
        """Put the next try off; return the seconds."""
        pause = pause_before_retry(self._identity.not_after - datetime.now(UTC), failures)
        # Apart from each other, should many have met the same outage.
        seconds = pause.total_seconds() * random.uniform(0.8, 1.2)  # noqa: S311
        self._retry_at = time.monotonic() + seconds
        return seconds

    def _remedy(self) -> str:
        if self._address is None:
            return "issue it again, or renew it; this process takes it over"
        return f"{self._address} must answer until then, or join or issue it again"


def _server(peer: Peer) -> tuple[str, Role, str]:
    """Return who renews: a site's SuperExec has no way to anybody but its SuperNode."""
    if peer.role is Role.SUPEREXEC and peer.name != SUPERLINK_NAME:
        return expected_server(peer)
    return enrolment_server(peer.federation)


def _checked(
    identity: Identity, key: ec.EllipticCurvePublicKey, response: httpx.Response, address: str
) -> tuple[str, str]:
    """Return certificate and bundle of an answer; raise ``CertificateError`` unless they continue the identity."""
    where = Path(f"from {address}")
    try:
        record: Any = response.json()
        certificate_pem, authority_pem = record["certificate"], record["authority"]
        data, authority_data = certificate_pem.encode(), authority_pem.encode()
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CertificateError(
            f"{address} answered with something else than a certificate"
        ) from error
    certificate, *others = parse_certificates(data, where, "certificate")
    authorities = parse_certificates(authority_data, where, "authority certificate")
    peer = Peer.of(certificate)
    if others or certificate.public_key() != key or peer.uri != identity.peer.uri:
        raise CertificateError(f"{address} answered with a certificate for another key or holder")
    if not set(authorities) & set(identity.authorities()):
        raise CertificateError(
            f"{address} answered with authorities none of which this process trusts; the file ca.crt stays"
        )
    if not is_issued_by(certificate, authorities):
        raise CertificateError(f"{address} answered with a certificate of an unknown authority")
    now = datetime.now(UTC)
    if not certificate.not_valid_before_utc <= now < certificate.not_valid_after_utc:
        raise CertificateError(
            f"{address} answered with a certificate that is valid from "
            f"{certificate.not_valid_before_utc:%Y-%m-%d %H:%M} to "
            f"{certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC; correct the clock of this machine or its"
        )
    return certificate_pem, authority_pem


def _detail(response: httpx.Response) -> str:
    """Return the sentence of a refusal, on one line."""
    try:
        detail = str(response.json()["detail"])
    except (ValueError, TypeError, KeyError):
        return "no reason given"
    return " ".join(detail.split())[:300]


def _told(identity: Identity) -> str:
    return (
        f"{identity.peer.serial:x} of {identity.peer.uri} ends at "
        f"{identity.not_after:%Y-%m-%d %H:%M:%S} UTC"
    )
