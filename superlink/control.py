"""The Control API with an operator's or the enrolment service's certificate: SuperNodes, runs, the ``flwr`` command."""

import contextlib
import hashlib
import os
import shlex
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import click
import httpx
import typer
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from certs.contexts import client_context
from certs.errors import (
    CertificateError,
    ConfigError,
    ConnectionRefusedByFleetError,
    RunFailedError,
    UnknownSiteError,
)
from certs.files import read
from certs.flower import install_client, quiet
from certs.identity import Identity
from certs.roles import checked_site

if TYPE_CHECKING:
    from flwr.proto.control_pb2 import StartRunRequest
    from flwr.proto.node_pb2 import NodeInfo
    from flwr.supercore.control import ControlHttpClient

# Between two looks at what changes in seconds (sites coming online, a run ending).
_POLL_SECONDS = 1.0


@dataclass(frozen=True)
class Node:
    """A SuperNode the SuperLink knows.

    ``status`` is Flower's: ``registered`` (never seen), ``online``, ``offline`` or ``unregistered``. ``public_key`` is
    the SuperNode key, PEM; ``last_heartbeat`` is in seconds since 1970.
    """

    name: str
    status: str
    public_key: bytes
    node_id: int
    last_heartbeat: float | None


@dataclass(frozen=True)
class RunStatus:
    """Where a run stands, in Flower's words."""

    status: str
    sub_status: str
    details: str


class Control:
    """A connection to the SuperLink's Control API."""

    def __init__(self, client: "ControlHttpClient", address: str) -> None:
        self._client = client
        self._address = address

    @classmethod
    @contextlib.contextmanager
    def connect(cls, identity: Identity, address: str) -> Iterator[Self]:
        """Open a connection to ``host:port`` with the identity of an operator or the enrolment service."""
        quiet()
        from flwr.supercore.control import ControlHttpClient

        with ControlHttpClient(f"https://{address}", verify=client_context(identity)) as client:
            yield cls(client, address)

    def nodes(self) -> list[Node]:
        """Return every SuperNode that is registered."""
        return [node for node in self.every_node() if node.status != "unregistered"]

    def every_node(self) -> list[Node]:
        """Return every SuperNode that is or was registered."""
        from flwr.proto.control_pb2 import ListNodesRequest

        with self._sentences():
            response = self._client.ListNodes(ListNodesRequest())
        return [
            Node(info.name, info.status, info.public_key, info.node_id, last_heartbeat(info))
            for info in response.nodes_info
        ]

    def register(self, name: str, public_key: Path) -> Literal["registered", "kept"]:
        """Register a SuperNode key (an OpenSSH file) under a site's name, unless it is."""
        return self.register_key(name, _load_public_key(public_key))

    def register_key(
        self, name: str, key: ec.EllipticCurvePublicKey
    ) -> Literal["registered", "kept"]:
        """Register a SuperNode key under a site's name, unless it is.

        Raises ``CertificateError`` for a key that is another site's, and for one that was unregistered.
        """
        from flwr.proto.control_pb2 import RegisterNodeRequest
        from flwr.supercore.primitives.asymmetric import public_key_to_bytes

        checked_site(name)
        public_key = public_key_to_bytes(key)
        for node in self.every_node():
            if node.public_key != public_key:
                continue
            if node.status == "unregistered":
                raise CertificateError(
                    f"the SuperNode key of site {node.name!r} was unregistered, and Flower never takes "
                    "such a key again: remove node.key and node.pub there and make new ones"
                )
            if node.name != name:
                raise CertificateError(
                    f"this SuperNode key is registered for site {node.name!r}; "
                    f"make another for {name!r}"
                )
            return "kept"
        with self._sentences():
            self._client.RegisterNode(RegisterNodeRequest(public_key=public_key, name=name))
        return "registered"

    def unregister(self, node_id: int) -> None:
        """Unregister a SuperNode: it is refused from now on, and its key for ever."""
        from flwr.proto.control_pb2 import UnregisterNodeRequest

        with self._sentences():
            self._client.UnregisterNode(UnregisterNodeRequest(node_id=node_id))

    def wait_online(self, sites: list[str], timeout: float) -> None:
        """Wait until the named sites, or every registered one, are online; give up after ``timeout`` seconds."""
        deadline = time.monotonic() + timeout
        while True:
            nodes = self.nodes()
            names = {node.name for node in nodes}
            if unknown := sorted(set(sites) - names):
                raise UnknownSiteError(
                    f"site {unknown[0]!r} is not registered at {self._address}; invite it with "
                    "'vlafleet site invite'"
                )
            wanted = set(sites) or names
            missing = wanted - {node.name for node in nodes if node.status == "online"}
            if wanted and not missing:
                return
            if time.monotonic() >= deadline:
                raise UnknownSiteError(
                    f"{', '.join(sorted(missing)) or 'every site'} did not come online within "
                    f"{timeout:.0f} s; look at the SuperNode's log there"
                )
            time.sleep(_POLL_SECONDS)

    def start(self, request: "StartRunRequest") -> int:
        """Submit a run; return its id."""
        with self._sentences():
            response = self._client.StartRun(request)
        if not response.HasField("run_id"):
            raise RunFailedError(
                f"the SuperLink at {self._address} started no run: {response.note}"
            )
        return int(response.run_id)

    def status(self, run_id: int) -> RunStatus:
        """Return where a run stands."""
        from flwr.proto.control_pb2 import ListRunsRequest

        with self._sentences():
            response = self._client.ListRuns(ListRunsRequest(run_id=run_id))
        status = response.run_dict[run_id].status
        return RunStatus(status.status, status.sub_status, status.details)

    def require_completed(self, run_id: int, where: str) -> None:
        """Raise ``RunFailedError`` unless the run ended well; ``where`` says what to read about it."""
        status = self.status(run_id)
        if status.sub_status != "completed":
            raise RunFailedError(
                f"run {run_id} {status.sub_status or status.status}: "
                f"{status.details or 'no reason given'}; {where}"
            )

    def follow(self, run_id: int) -> Iterator[str]:
        """Yield the run's log as it grows, until the run ends."""
        from flwr.proto.control_pb2 import StreamLogsRequest

        after = 0.0
        while True:
            ended = self.status(run_id).status == "finished"
            with self._sentences():
                request = StreamLogsRequest(run_id=run_id, after_timestamp=after)
                for part in self._client.StreamLogs(request):
                    after = max(after, part.latest_timestamp)
                    yield part.log_output
            if ended:
                return
            time.sleep(_POLL_SECONDS)

    def stop(self, run_id: int) -> None:
        """Stop a run."""
        from flwr.proto.control_pb2 import StopRunRequest

        with self._sentences():
            self._client.StopRun(StopRunRequest(run_id=run_id))

    @contextlib.contextmanager
    def _sentences(self) -> Iterator[None]:
        """Turn what httpx raises into a sentence for the operator."""
        try:
            yield
        except httpx.HTTPStatusError as error:
            raise ConnectionRefusedByFleetError(
                f"the SuperLink at {self._address} refused the request "
                f"({error.response.status_code}): {_detail(error.response)}"
            ) from error
        except httpx.ConnectError as error:
            raise ConnectionRefusedByFleetError(
                f"no SuperLink of this federation answers at {self._address} ({error}); "
                "check the address, and that the SuperLink runs"
            ) from error
        except httpx.TransportError as error:
            raise ConnectionRefusedByFleetError(
                f"the SuperLink at {self._address} closed the connection ({error or type(error).__name__}); "
                "its log names the reason, a revoked certificate among them"
            ) from error


def last_heartbeat(node: "NodeInfo") -> float | None:
    """Return when a SuperNode was last heard of, in seconds since 1970; None when it never was.

    Flower keeps until when a node counts as online: so many heartbeat intervals after the last heartbeat, or the moment
    it signed off, for which this is that much too early.
    """
    from flwr.common.constant import HEARTBEAT_PATIENCE

    if not node.online_until:
        return None
    return float(node.online_until - HEARTBEAT_PATIENCE * node.heartbeat_interval)


def run_request(app: Path, run_config: Sequence[str]) -> "StartRunRequest":
    """Return the request for a run of the app whose ``pyproject.toml`` lies in ``app``.

    ``run_config`` are overrides in Flower's form, ``'key=value key=value'``. Raises ``ConfigError`` for what
    Flower would pass over (a word without ``=``) or refuse without naming it (an unknown key).
    """
    quiet()
    from flwr.cli.build import build_fab_from_disk
    from flwr.common.config import parse_config_args
    from flwr.common.serde import fab_to_proto, user_config_to_proto
    from flwr.proto.control_pb2 import StartRunRequest
    from flwr.supercore.fab import Fab

    if not (app / "pyproject.toml").is_file():
        raise ConfigError(f"{app} holds no pyproject.toml; name the app's directory with --app")
    try:
        project = tomllib.loads((app / "pyproject.toml").read_text())
        known = set(project["tool"]["flwr"]["app"]["config"])
        words = [word for line in run_config for word in shlex.split(line)]
        overrides = parse_config_args(list(run_config))
        bundle = build_fab_from_disk(app)
    except (KeyError, ValueError, OSError, typer.Exit, click.ClickException) as error:
        raise ConfigError(f"the run cannot be submitted: {error}") from error
    for word in words:
        if "=" not in word and not word.endswith(".toml"):
            raise ConfigError(f"the run config holds {word!r}; write 'key=value key=value'")
    if unknown := sorted(set(overrides) - known):
        raise ConfigError(
            f"the run config has the unknown key {unknown[0]!r}; the keys are {', '.join(sorted(known))}"
        )
    return StartRunRequest(
        fab=fab_to_proto(Fab(hashlib.sha256(bundle).hexdigest(), bundle, {})),
        override_config=user_config_to_proto(overrides),
    )


def flwr(identity: Identity, address: str, arguments: list[str]) -> None:
    """Run the stock ``flwr`` command against the SuperLink with an operator's certificate.

    Flower's configuration lies in a directory of its own for the time of the command, so that the user's is untouched.
    """
    quiet()
    with tempfile.TemporaryDirectory(prefix="vlafleet-flwr-") as home:
        config = (
            '[superlink]\ndefault = "fleet"\n\n[superlink.fleet]\n'
            f'address = "{address}"\nroot-certificates = "{identity.authority.absolute()}"\n'
        )
        Path(home, "config.toml").write_text(config)
        os.environ["FLWR_HOME"] = home
        install_client(identity)
        from flwr.cli.app import app

        sys.argv = ["flwr", *arguments]
        app()


def _detail(response: Any) -> str:
    try:
        payload = response.json()
    except ValueError:
        return "no reason given"
    return str(payload.get("extra") or payload.get("detail") or payload)


def _load_public_key(path: Path) -> ec.EllipticCurvePublicKey:
    try:
        key = serialization.load_ssh_public_key(read(path, "SuperNode public key"))
    except (ValueError, UnsupportedAlgorithm) as error:
        raise CertificateError(f"{path} is not an OpenSSH public key") from error
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise CertificateError(f"{path} is not an ECDSA key, which Flower asks for")
    return key
