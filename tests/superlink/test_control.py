"""The Control API as an operator and the enrolment service use it."""

import base64
import json
import shutil
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key

from certs.authority import Authority
from certs.contexts import client_context
from certs.errors import CertificateError, ConnectionRefusedByFleetError
from certs.files import pem_certificate
from certs.identity import Identity, authority_directory, store_identity
from certs.roles import ENROLMENT_NAME, SUPERLINK_NAME, Role
from superlink.control import Control, run_request
from tests.federation import Running, node_header, running_superlink

pytestmark = pytest.mark.federation

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def running(
    tmp_path_factory: pytest.TempPathFactory, free_port: Callable[[], int]
) -> Iterator[Running]:
    """A SuperLink of this module's own, whose SuperNodes come and go."""
    with running_superlink(tmp_path_factory.mktemp("control"), free_port()) as running:
        yield running


@pytest.fixture
def control(running: Running) -> Iterator[Control]:
    """The enrolment service's connection."""
    directory = running.identity(Role.ENROLMENT, ENROLMENT_NAME)
    with Control.connect(Identity.load(directory, Role.ENROLMENT), running.address) as control:
        yield control


def new_key() -> ec.EllipticCurvePublicKey:
    return ec.generate_private_key(ec.SECP256R1()).public_key()


def test_a_key_is_registered_once_and_never_again(running: Running, control: Control) -> None:
    key = new_key()
    assert control.register_key("site-c", key) == "registered"
    assert control.register_key("site-c", key) == "kept"
    with pytest.raises(
        CertificateError, match="this SuperNode key is registered for site 'site-c'"
    ):
        control.register_key("site-d", key)
    (node,) = [node for node in control.nodes() if node.name == "site-c"]
    assert node.status == "registered"
    assert node.last_heartbeat is None
    control.unregister(node.node_id)
    assert "site-c" not in {node.name for node in control.nodes()}
    (gone,) = [node for node in control.every_node() if node.name == "site-c"]
    assert gone.status == "unregistered"
    assert gone.node_id == node.node_id
    # The ServerApp takes it from there that a site was revoked.
    told = running.ask("/v1/sites", running.identity(Role.SITE, "site-a"), method="GET")
    assert {site["name"] for site in json.loads(told.body)["sites"]} == {"site-a"}
    told = running.ask("/v1/sites", running.identity(Role.SUPEREXEC, SUPERLINK_NAME), method="GET")
    assert {
        "name": "site-c",
        "node_id": str(node.node_id),
        "status": "unregistered",
        "last_heartbeat": None,
        "offline_since": None,
    } in json.loads(told.body)["sites"]
    with pytest.raises(CertificateError, match="never takes such a key again"):
        control.register_key("site-c", key)
    assert control.register_key("site-c", new_key()) == "registered"
    with pytest.raises(ConnectionRefusedByFleetError, match="refused the request"):
        control.unregister(node.node_id)


def test_a_site_cannot_bear_the_superlinks_name(control: Control) -> None:
    with pytest.raises(CertificateError, match="a site cannot be named 'superlink'"):
        control.register_key("superlink", new_key())


def test_when_a_supernode_was_last_heard_of(running: Running, control: Control) -> None:
    site = running.identity(Role.SITE, "site-a")
    activate(running, site)
    (node,) = [node for node in control.nodes() if node.name == "site-a"]
    assert node.status == "online"
    assert node.last_heartbeat is not None
    assert 0 <= time.time() - node.last_heartbeat < 30


def activate(running: Running, site: Path) -> None:
    """Come online as a site's SuperNode does, for a minute."""
    from flwr.proto.fleet_pb2 import ActivateNodeRequest
    from flwr.supercore.date import now
    from flwr.supercore.primitives.asymmetric import sign_message

    key = load_ssh_private_key((site / "node.key").read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    header = node_header(site)
    timestamp = now().isoformat()
    signature = base64.b64encode(sign_message(key, timestamp.encode())).decode()
    public_key = base64.b64decode(header["flwr-public-key"])
    with httpx.Client(verify=client_context(Identity.load(site, Role.SITE))) as client:
        answer = client.post(
            f"https://{running.address}/v1/fleet/activate-node",
            content=ActivateNodeRequest(
                public_key=public_key, heartbeat_interval=30
            ).SerializeToString(),
            headers={
                **header,
                "flwr-timestamp": timestamp,
                "flwr-signature": signature,
                "content-type": "application/protobuf",
            },
        )
    answer.raise_for_status()


def test_runs_are_audited(running: Running, tmp_path: Path) -> None:
    """Who started and stopped a run, from where; what came of neither leaves no line."""
    # Alone, so that no other file is looked at for the bundle.
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    log = running.processes.logs / "state" / "audit.jsonl"
    directory = running.identity(Role.OPERATOR, "admin")
    operator = Identity.load(directory, Role.OPERATOR)
    with Control.connect(operator, running.address) as control:
        run = control.start(run_request(tmp_path, ["rounds=1"]))
        control.stop(run)
        assert control.status(run).sub_status == "stopped"
        with pytest.raises(ConnectionRefusedByFleetError):  # it is finished
            control.stop(run)
        with pytest.raises(ConnectionRefusedByFleetError):  # there is none
            control.stop(run + 1)
        request = run_request(tmp_path, [])
        request.fab.content = b"no bundle"
        with pytest.raises(ConnectionRefusedByFleetError):
            control.start(request)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    lines = [line for line in lines if line["event"].startswith("run-")]
    assert [(line["event"], line["run"]) for line in lines] == [
        ("run-started", str(run)),
        ("run-stopped", str(run)),
    ]
    for line in lines:
        assert (line["role"], line["name"]) == ("operator", "admin")
        assert line["serial"] == f"{operator.peer.serial:x}"
        assert line["address"] in {"127.0.0.1", "::1"}


def test_the_expiry_that_is_watched_follows_the_certificate(running: Running) -> None:
    own = running.identity(Role.SUPERLINK, SUPERLINK_NAME)
    authority = Authority.load(authority_directory(running.pki))
    key = ec.generate_private_key(ec.SECP256R1())
    for days in (3, 5):
        certificate = authority.issue(
            *(key.public_key(), Role.SUPERLINK, SUPERLINK_NAME),
            hosts=["localhost"],
            lifetime=timedelta(days=days),
        )
        store_identity(own, key, pem_certificate(certificate).decode(), authority.bundle.decode())
        answer = running.ask("/metrics", running.identity(Role.MONITOR, "prometheus"), method="GET")
        (line,) = [
            line
            for line in answer.body.decode().splitlines()
            if line.startswith("vlafleet_certificate_expiry_timestamp_seconds{")
        ]
        assert 'role="superlink"' in line
        assert float(line.split()[-1]) == certificate.not_valid_after_utc.timestamp()
