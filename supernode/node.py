"""The SuperNode process: Flower's own worker, its Runtime API behind mutual TLS and the role guard."""

import logging
import os
import socket
import threading
import time
from typing import NoReturn

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key

from certs import logs
from certs.contact import recorder
from certs.enrolment import RENEW_PATH
from certs.errors import CertificateError
from certs.files import read
from certs.flower import install_client, quiet, set_concurrency
from certs.guard import Application, Guard, Rule, allow
from certs.identity import Identity
from certs.link import CHUNK_BYTES
from certs.metric import REPORT_PATH
from certs.renewal import follow
from certs.roles import Role
from certs.server import bind, mutual_tls_server
from supernode import stopped_runs
from supernode.link import settle
from supernode.metrics import PATH as METRICS_PATH
from supernode.metrics import SiteMetrics, reports, serve_plainly, shown
from supernode.renewal import forward

_log = logging.getLogger("vlafleet.supernode")

# The Runtime API is up in well under a second; this bounds a wait that must not hang a start.
_START_SECONDS = 30.0


def serve(
    identity: Identity,
    superlink: str,
    host: str,
    port: int,
    node_config: dict[str, str],
    enrolment: str | None,
    metrics: str | None,
) -> NoReturn:
    """Run the SuperNode until SIGTERM or SIGINT.

    ``superlink`` is ``host:port``, and so is ``enrolment``: where its certificate and its SuperExec's are renewed; None
    leaves renewal to somebody else. ``node_config`` is what the site's ClientApp reads (site, dataset, device);
    the size of the chunks that suit the measured link is added to it. At ``metrics`` (``host:port``) the site's metrics
    are shown without TLS, too.
    """
    key = _node_key(identity)
    listener = bind(host, port)
    open_listener = _bind_metrics(metrics) if metrics else None
    logs.bind(role=identity.peer.role, site=identity.peer.name)
    quiet()
    install_client(identity, recorder(identity.peer))
    from flwr.common.constant import ISOLATION_MODE_PROCESS
    from flwr.supercore.exit import add_exit_handler
    from flwr.supercore.object_store import ObjectStoreFactory
    from flwr.supernode.main import create_app
    from flwr.supernode.nodestate import NodeStateFactory
    from flwr.supernode.start_client_internal import start_client_internal

    factory = NodeStateFactory(objectstore_factory=ObjectStoreFactory())
    app = create_app(state_factory=factory)
    site = SiteMetrics(identity)
    guard = Guard(rules(identity, app, enrolment, site), app, None)
    server = mutual_tls_server(guard, identity, None)
    thread = threading.Thread(
        target=server.run, kwargs={"sockets": [listener]}, name="runtime-api", daemon=True
    )
    thread.start()
    deadline = time.monotonic() + _START_SECONDS
    while not server.started and thread.is_alive() and time.monotonic() < deadline:
        time.sleep(0.05)
    add_exit_handler(lambda: setattr(server, "should_exit", True))
    _log.info("SuperNode of %s: Runtime API on %s port %d", identity.peer.name, host, port)
    if open_listener:
        serve_plainly(site, open_listener)
    follow(identity, enrolment)
    code = 1
    try:
        site.link, transfer = settle(identity, superlink)
        set_concurrency(transfer.concurrency)
        threading.Thread(
            target=stopped_runs.watch,
            args=(factory.state(), identity, superlink, key),
            name="stopped-runs",
            daemon=True,
        ).start()
        start_client_internal(
            state_factory=factory,
            server_address=superlink,
            node_config={**node_config, CHUNK_BYTES: transfer.chunk_bytes},
            root_certificates=str(identity.authority),
            insecure=False,
            authentication_keys=(key, key.public_key()),
            isolation=ISOLATION_MODE_PROCESS,
            runtime_api_address=f"{host}:{port}",
        )
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    finally:
        # Flower's worker swallows what ends its loop and leaves threads behind: a SuperNode that does no work must not
        # look alive. Its restart policy starts a fresh one.
        logging.shutdown()
        os._exit(code)


def rules(
    identity: Identity, app: Application, enrolment: str | None, site: SiteMetrics
) -> dict[str, tuple[Rule, Application]]:
    """Return who may ask this SuperNode for what.

    Its site's SuperExec for work and its next certificate, and to report its metrics; a monitor to see them.
    """
    own_superexec = allow(
        lambda peer: peer.role is Role.SUPEREXEC and peer.name == identity.peer.name
    )
    return {
        "/v1/runtime/": (own_superexec, app),
        RENEW_PATH: (own_superexec, forward(identity, enrolment)),
        REPORT_PATH: (own_superexec, reports(site)),
        METRICS_PATH: (allow(lambda peer: peer.role is Role.MONITOR), shown(site)),
    }


def _bind_metrics(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    return bind(host.strip("[]"), int(port), "--metrics")


def _node_key(identity: Identity) -> ec.EllipticCurvePrivateKey:
    data = read(identity.node_key, "SuperNode key")
    try:
        key = load_ssh_private_key(data, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise CertificateError(
            f"the SuperNode key {identity.node_key} is not an unencrypted OpenSSH key"
        ) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise CertificateError(f"the SuperNode key {identity.node_key} is not an ECDSA key")
    return key
