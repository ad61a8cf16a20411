"""What the enrolment service does unasked, every few seconds until it succeeds."""

import logging
import threading
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec

from certs.authority import Authority
from certs.contexts import reload
from certs.errors import FleetError
from certs.files import load_certificate, pem_certificate
from certs.identity import Identity, hosts_of, store_identity
from certs.lifetime import renew_at
from certs.renewal import RENEWAL_FAILURES
from superlink.refused import Refused

_log = logging.getLogger("vlafleet.enrolment")

# A SuperLink that was away has its revocation list within this time.
_PAUSE_SECONDS = 3.0


class Upkeep:
    """Duties by name, each done in turn by a thread of their own; one that fails is tried again."""

    def __init__(self) -> None:
        self._awake = threading.Event()
        self._said: dict[str, str] = {}

    def start(self, duties: Mapping[str, Callable[[], None]]) -> None:
        """Begin, until the process ends."""
        threading.Thread(target=self._run, args=(duties,), name="upkeep", daemon=True).start()

    def wake(self) -> None:
        """Do them now."""
        self._awake.set()

    def _run(self, duties: Mapping[str, Callable[[], None]]) -> None:
        while True:
            for name, duty in duties.items():
                self._do(name, duty)
            self._awake.wait(_PAUSE_SECONDS)
            self._awake.clear()

    def _do(self, name: str, duty: Callable[[], None]) -> None:
        try:
            duty()
        except (FleetError, Refused) as error:
            # Once, however often it is tried.
            if self._said.get(name) != str(error):
                _log.warning("%s: %s; tried again every %.0f s", name, error, _PAUSE_SECONDS)
            self._said[name] = str(error)
        except Exception:  # noqa: BLE001 - the end of this thread would go unnoticed
            _log.exception("%s", name)
        else:
            if self._said.pop(name, None) is not None:
                _log.info("%s: done", name)


def renew_own(directory: Path, identity: Identity) -> None:
    """Give the service its own next certificate when it is time; ``directory`` is the authority's, which is here."""
    failed = RENEWAL_FAILURES.labels(identity.peer.role)
    try:
        _renew_own(directory, identity)
    except FleetError:
        failed.inc()
        raise


def _renew_own(directory: Path, identity: Identity) -> None:
    current = load_certificate(identity.certificate)
    authority = Authority.load(directory)
    if datetime.now(UTC) < renew_at(current) and authority.is_current(current):
        return
    key = ec.generate_private_key(ec.SECP256R1())
    peer = identity.peer
    certificate = authority.issue(key.public_key(), peer.role, peer.name, hosts=hosts_of(current))
    store_identity(
        identity.directory, key, pem_certificate(certificate).decode(), authority.bundle.decode()
    )
    reload(Identity.load(identity.directory, peer.role))
    _log.info("the service's own certificate is renewed until %s", certificate.not_valid_after_utc)
