"""The enrolment service: the one process that holds the authority's key, and answers those who have no certificate."""

import contextlib
import fcntl
import functools
import ipaddress
import logging
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

from prometheus_client import REGISTRY

from certs import logs
from certs.audit import Audit
from certs.authority import Authority
from certs.errors import AddressError, CertificateError, StorageError
from certs.files import load_certificate
from certs.guard import Guard, allow, no_lifespan
from certs.identity import Identity, hosts_of
from certs.process_metrics import ProcessCollector
from certs.revocations import Revocations
from certs.roles import Role
from certs.server import bind, mutual_tls_server
from superlink.control import Control
from superlink.crl import Publisher
from superlink.datasets import Datasets
from superlink.door import Door
from superlink.endpoint import Request, endpoint
from superlink.enrolment_api import Api
from superlink.invitations import Invitations
from superlink.limits import CONNECTIONS, Limits
from superlink.members import Members
from superlink.metrics import EnrolmentCollector, exposition
from superlink.upkeep import Upkeep, renew_own

_log = logging.getLogger("vlafleet.enrolment")


def serve(
    identity: Identity,
    pki_authority: Path,
    state: Path,
    host: str,
    port: int,
    superlink: str,
    advertise: str | None,
    advertise_superlink: str | None,
    site_lifetime: timedelta,
    audit: Path,
) -> None:
    """Run the enrolment service until SIGTERM or SIGINT.

    ``superlink`` is where this service reaches the SuperLink (``host:port``); ``advertise`` and ``advertise_superlink``
    are where the sites reach the two, by default the same. ``state`` keeps the invitations.
    """
    logs.bind(role=identity.peer.role)
    address = _advertised(identity, host, port, advertise)
    authority = Authority.load(pki_authority)
    if authority.federation != identity.peer.federation:
        raise CertificateError(
            f"{pki_authority} holds the authority of {authority.federation!r}, and "
            f"{identity.directory} an identity of {identity.peer.federation!r}; name the two of one federation"
        )
    revocations = Revocations(authority.crl, identity.authority)
    with Door(bind(host, port), Limits(*CONNECTIONS)) as listener, _alone(state):
        log = Audit(audit)
        invitations = Invitations(state / "invitations.json")
        datasets = Datasets(state / "datasets.json")
        publisher = Publisher(pki_authority, identity, superlink)
        upkeep = Upkeep()
        members = Members(
            pki_authority,
            state,
            invitations,
            functools.partial(Control.connect, identity, superlink),
            upkeep.wake,
            superlink=advertise_superlink or superlink,
            enrolment=address,
            site_lifetime=site_lifetime,
        )
        api = Api(
            pki_authority,
            invitations,
            members,
            datasets,
            publisher,
            log,
            address=address,
            site_lifetime=site_lifetime,
        )
        _import_flower()
        REGISTRY.register(EnrolmentCollector(invitations, authority.issued))
        REGISTRY.register(ProcessCollector(identity, {"enrolment": state}))
        monitor = allow(lambda peer: peer.role is Role.MONITOR)
        own = allow(lambda peer: peer.role in {Role.ENROLMENT, Role.MONITOR})
        guard = Guard(
            {
                **api.rules(),
                "/metrics": (monitor, exposition),
                "/health": (own, endpoint({"GET": _healthy})),
            },
            no_lifespan,
            revocations,
            anonymous=api.anonymous(),
            on_refused=log.refused_request,
        )
        server = mutual_tls_server(
            guard,
            identity,
            revocations,
            anonymous=True,
            on_refused=log.refused_handshake,
        )
        upkeep.start(
            {
                "revocation list": publisher.publish,
                "evictions": api.finish_evictions,
                "own certificate": functools.partial(renew_own, pki_authority, identity),
                "daily signature": publisher.sign_again,
            }
        )
        _log.info(
            "enrolment service of %s listens on %s port %d, reached at %s",
            identity.peer.federation,
            host,
            port,
            address,
        )
        server.run(sockets=[listener])


def _advertised(identity: Identity, host: str, port: int, advertise: str | None) -> str:
    """Return where the sites reach the service; raise a sentence unless its certificate is good for that."""
    if advertise is None:
        with contextlib.suppress(ValueError):
            listening = ipaddress.ip_address(host)
            if listening.is_unspecified:
                raise AddressError(
                    f"listening on {host} says nothing about where the sites reach this service; "
                    "add --advertise host:port"
                )
            host = "localhost" if listening.is_loopback else host
        advertise = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    name, _, number = advertise.rpartition(":")
    if not name or not number.isdigit() or not 0 < int(number) < 65536:
        raise AddressError(f"--advertise {advertise!r} is not host:port")
    held = hosts_of(load_certificate(identity.certificate))
    if name.strip("[]") not in held:
        raise CertificateError(
            f"the enrolment service's certificate is good for {', '.join(held)}, not for {name}, "
            "and every site would refuse it; issue it again with --host"
        )
    return advertise


@contextlib.contextmanager
def _alone(state: Path) -> Iterator[None]:
    """Hold the state directory: a second service would overwrite the first one's invitations."""
    try:
        state.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = (state / ".lock").open("w")
    except OSError as error:
        raise StorageError(
            f"the state directory {state} cannot be written: {error.strerror}; check its owner"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise StorageError(
                f"another enrolment service works in {state}; stop it, or name another --state"
            ) from error
        yield


def _import_flower() -> None:
    """Load Flower's client before the first request has to wait for it."""
    from flwr.proto import control_pb2
    from flwr.supercore import control

    _log.debug("%s and %s are loaded", control_pb2.__name__, control.__name__)


async def _healthy(_request: Request) -> dict[str, str]:
    return {"status": "ok"}
