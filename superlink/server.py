"""The SuperLink process: Flower's own application, served over mutual TLS behind the role guard."""

import asyncio
import base64
import binascii
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prometheus_client import REGISTRY

from certs import logs
from certs.audit import Audit
from certs.enrolment import CRL_PATH, SITES_PATH
from certs.errors import StorageError
from certs.flower import quiet
from certs.guard import Guard, Rule, allow
from certs.identity import Identity
from certs.link import PATH
from certs.process_metrics import ProcessCollector
from certs.renewal import follow
from certs.revocations import Revocations
from certs.roles import SUPERLINK_NAME, Peer, Role
from certs.server import bind, mutual_tls_server
from superlink.link import link
from superlink.metrics import FleetCollector, exposition
from superlink.run_audit import START_PATH, STOP_PATH, started, stopped
from superlink.sites import crl, sites

if TYPE_CHECKING:
    from fastapi import FastAPI
    from flwr.server.superlink.linkstate import LinkStateFactory

_log = logging.getLogger("vlafleet.superlink")

# Flower's name of the header that carries a SuperNode's public key (flwr.supercore.constant).
_PUBLIC_KEY_HEADER = b"flwr-public-key"


def serve(
    identity: Identity,
    host: str,
    port: int,
    state: Path,
    *,
    enrolment: str | None,
    audit: Path,
    simulation: bool,
) -> None:
    """Run the SuperLink until SIGTERM or SIGINT.

    ``state`` is a directory; Flower keeps its database there, so runs and SuperNodes outlive a crash. Its certificate
    is renewed at ``enrolment`` (``host:port``), or by hand where that is None. With ``simulation`` every run is one for
    Flower's simulation runtime, which has no SuperNodes.
    """
    logs.bind(role=identity.peer.role)
    # These fail in a moment with a sentence; importing Flower takes seconds.
    revocations = Revocations(identity.crl, identity.authority)
    listener = bind(host, port)
    with listener:
        log = Audit(audit)
        app = _flower_app(host, port, state, simulation=simulation)
        factory: LinkStateFactory = app.state.linkstate_factory
        REGISTRY.register(FleetCollector(factory))
        REGISTRY.register(ProcessCollector(identity, {"state": state}))
        allowed = rules(app, factory, revocations, log)
        guard = Guard(allowed, app, revocations, on_refused=log.refused_request)
        server = mutual_tls_server(guard, identity, revocations, on_refused=log.refused_handshake)
        follow(identity, enrolment)
        _log.info("SuperLink of %s listens on %s port %d", identity.peer.federation, host, port)
        server.run(sockets=[listener])


def rules(
    app: Any, factory: "LinkStateFactory", revocations: Revocations, audit: Audit
) -> dict[str, tuple[Rule, Any]]:
    """Return which role may ask for what; every other path is refused."""
    operator = allow(lambda peer: peer.role is Role.OPERATOR)
    # An exact path stands before the prefix that holds it.
    return {
        "/v1/fleet/": (_site_with_its_own_key(factory), app),
        PATH: (allow(lambda peer: peer.role is Role.SITE), link),
        SITES_PATH: (allow(_sees_sites), sites(factory)),
        CRL_PATH: (allow(lambda peer: peer.role in _WITH_LIST), crl(revocations)),
        # The enrolment service admits members and evicts them; runs are no business of its.
        **{
            f"/v1/control/{name}": (allow(lambda peer: peer.role in _REGISTRARS), app)
            for name in ("list-nodes", "register-node", "unregister-node")
        },
        START_PATH: (operator, started(app, audit)),
        STOP_PATH: (operator, stopped(app, audit)),
        "/v1/control/": (operator, app),
        # A site's SuperExec has no business here: its ServerApp tokens would open every run.
        "/v1/runtime/": (allow(_is_the_superlinks_superexec), app),
        "/metrics": (allow(lambda peer: peer.role is Role.MONITOR), exposition),
        "/health": (allow(lambda peer: peer.role in {Role.SUPERLINK, Role.MONITOR}), app),
    }


# One replaces the revocation list, the other reads it.
_WITH_LIST = frozenset({Role.ENROLMENT, Role.EXPORTER})
_REGISTRARS = frozenset({Role.OPERATOR, Role.ENROLMENT})


def _is_the_superlinks_superexec(peer: Peer) -> bool:
    return peer.role is Role.SUPEREXEC and peer.name == SUPERLINK_NAME


def _sees_sites(peer: Peer) -> bool:
    seeing = {Role.SITE, Role.OPERATOR, Role.MONITOR, Role.ENROLMENT, Role.EXPORTER}
    return peer.role in seeing or _is_the_superlinks_superexec(peer)


def _site_with_its_own_key(factory: "LinkStateFactory") -> Rule:
    """Return the rule that binds a site's certificate to the SuperNode key registered under the site's name.

    A key's name never changes in Flower, and Flower itself refuses a key that was unregistered, so a pair that was
    found once is remembered.
    """
    bound: dict[bytes, str] = {}

    def registered_name(header: bytes) -> str | None:
        try:
            key = base64.b64decode(header, validate=True)
        except binascii.Error:
            return None
        state = factory.state()
        node_id = state.get_node_id_by_public_key(key)
        if node_id is None:
            return None
        return next((str(node.name) for node in state.get_node_info(node_ids=[node_id])), None)

    async def rule(peer: Peer, headers: Mapping[bytes, bytes]) -> str | None:
        if peer.role is not Role.SITE:
            return "role"
        header = headers.get(_PUBLIC_KEY_HEADER, b"")
        name = bound.get(header)
        if name is None:
            name = await asyncio.to_thread(registered_name, header)
            if name is None:
                return "unregistered key"
            bound[header] = name
        return None if name == peer.name else "another site's key"

    return rule


def _flower_app(host: str, port: int, state: Path, *, simulation: bool) -> "FastAPI":
    """Compose Flower's application as ``flower-superlink`` does, with SuperNode authentication on."""
    quiet()
    from flwr.common.constant import ISOLATION_MODE_PROCESS, TRANSPORT_TYPE_GRPC_RERE
    from flwr.superlink.cli.flower_superlink import SuperLinkLifespan
    from flwr.superlink.config_loader import SuperLinkLifespanConfig, load_control_authn_plugin
    from flwr.superlink.main import create_app

    try:
        state.mkdir(parents=True, exist_ok=True, mode=0o700)
        (state / ".writable").touch()
        (state / ".writable").unlink()
    except OSError as error:
        raise StorageError(
            f"the state directory {state} cannot be written: {error.strerror}; check its owner"
        ) from error
    config = SuperLinkLifespanConfig(
        host=host,
        port=port,
        database=str(state / "superlink.db"),
        enable_supernode_auth=True,
        isolation=ISOLATION_MODE_PROCESS,
        authn_plugin=load_control_authn_plugin(),
        # TLS, event logs, gRPC and subprocesses are Flower's other ways to be served; none is used.
        insecure=False,
        certificates=None,
        ssl_ca_certfile=None,
        ssl_certfile=None,
        ssl_keyfile=None,
        superexec_auth_secret=None,
        event_log_plugin=None,
        fleet_event_log_plugin=None,
        enable_event_log=False,
        artifact_provider=None,
        control_address="",
        health_server_address=None,
        fleet_api_type=TRANSPORT_TYPE_GRPC_RERE,
        fleet_api_address=None,
        simulation=simulation,
        runtime_dependency_install=False,
    )
    return create_app(config, SuperLinkLifespan)
