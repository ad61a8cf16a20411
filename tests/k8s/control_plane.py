"""The API server of the tests (``api_server.py``) in a container of its own, and what the test itself asks of it."""

import base64
import ssl
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

from tests.k8s.api_server import ADMIN, ApiServer, Asked, certify, granted, service_account
from tests.k8s.charts import Manifest
from tests.k8s.engine import Engine
from tests.k8s.wiring import Cluster, Pod, Wiring

# Documentation's (RFC 5737): where the policies see the API server.
ADDRESS = "192.0.2.53"
PORT = 6443
_STATE = "/state"
_IMAGE = "vlafleet-superlink:0.1.0"


class ControlPlane:
    """One API server for all clusters of a test: their namespaces have different names."""

    def __init__(
        self, engine: Engine, wiring: Wiring, directory: Path, port: int, user: str
    ) -> None:
        """Start it; ``port`` is the test's way in, on loopback, ``user`` is who owns ``directory`` (uid:gid)."""
        self._state = directory
        self._admin = service_account("test", ADMIN)
        self._tokens: dict[tuple[str, str], str] = {}
        self._rbac: list[Manifest] = []
        self.pod = _pod()
        # In each pair it was there first, and so has the first address of the pair's network.
        wiring.pods.insert(0, self.pod)
        certify(directory, ["localhost"], ["127.0.0.1", *wiring.first_addresses()])
        state = ApiServer(directory)
        state.allow(self._admin, ADMIN)
        state.grant([])
        script = Path(__file__).with_name("api_server.py")
        network = engine.name("api")
        # For the published port; without masquerading nothing gets out (see compose.yaml).
        masquerade = "com.docker.network.bridge.enable_ip_masquerade=false"
        engine("network", "create", "--opt", masquerade, *engine.label, network)
        engine(
            *("run", "--detach", "--name", engine.name(str(self.pod)), *engine.label, "--init"),
            *("--user", user, "--read-only", "--cap-drop", "ALL", "--network", network),
            *("--publish", f"127.0.0.1:{port}:{PORT}"),
            *("--mount", f"type=bind,src={directory},dst={_STATE}"),
            *("--mount", f"type=bind,src={script},dst=/api_server.py,readonly"),
            *("--entrypoint", "python", _IMAGE, "/api_server.py", "--port", str(PORT)),
            *("--certificate", f"{_STATE}/tls.crt", "--key", f"{_STATE}/tls.key"),
            *("--state", _STATE),
        )
        context = ssl.create_default_context(cafile=directory / "ca.crt")
        # As kubeadm makes it, without the identifiers of RFC 5280.
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT
        self._client = httpx.Client(
            base_url=f"https://localhost:{port}/api/v1/namespaces/",
            headers={"authorization": f"Bearer {self._admin}"},
            verify=context,
            trust_env=False,
            timeout=30,
        )
        deadline = time.monotonic() + 60
        while True:
            try:
                self._client.get("default/secrets").raise_for_status()
            except httpx.TransportError:
                assert time.monotonic() < deadline, engine.output(
                    "logs", engine.name(str(self.pod))
                )
                time.sleep(0.2)
            else:
                break

    def close(self) -> None:
        """Let go of the connection; the container is removed by its label."""
        self._client.close()

    @property
    def authority(self) -> str:
        """The certificate that the API server's is checked by."""
        return (self._state / "ca.crt").read_text()

    def grant(self, manifests: Sequence[Manifest]) -> None:
        """Put Roles and RoleBindings in force, besides those that are."""
        found = [one for one in manifests if one["kind"] in {"Role", "RoleBinding"}]
        kept = {_key(one): one for one in self._rbac} | {_key(one): one for one in found}
        self._rbac = list(kept.values())
        ApiServer(self._state).grant(self._rbac)

    def token(self, namespace: str, account: str) -> str:
        """Return a service account's token."""
        key = namespace, account
        if key not in self._tokens:
            self._tokens[key] = f"{namespace}.{account}.token"
            ApiServer(self._state).allow(self._tokens[key], service_account(*key))
        return self._tokens[key]

    def secret(self, namespace: str, name: str) -> dict[str, bytes] | None:
        """Return what a Secret holds, None where there is none."""
        return ApiServer(self._state).secret(name, namespace)

    def secrets(self, namespace: str) -> dict[str, Manifest]:
        """Return the Secrets of a namespace by name."""
        return ApiServer(self._state).objects("secrets", namespace)

    def put_secret(self, namespace: str, name: str, files: Mapping[str, bytes]) -> None:
        """Make or replace a Secret, as an operator with kubectl would."""
        data = {key: base64.b64encode(value).decode() for key, value in files.items()}
        body = {"metadata": {"name": name}, "data": data}
        known = self.secret(namespace, name) is not None
        path = f"{namespace}/secrets"
        asked = ("PUT", f"{path}/{name}") if known else ("POST", path)
        self._client.request(*asked, json=body).raise_for_status()

    def used(self) -> set[Asked]:
        """Return what service accounts asked for and were allowed; creates and lists name nothing."""
        return ApiServer(self._state).used()

    def granted(self) -> set[Asked]:
        """Return what the Roles in force allow, in the words of ``used``."""
        return {
            right._replace(name="" if right.name == "*" else right.name)
            for right in granted(self._rbac)
        }

    def refused(self) -> list[dict[str, Any]]:
        """Return what was asked in vain, for want of a right or of a token."""
        return [one for one in ApiServer(self._state).log() if one["code"] in {401, 403}]


def _pod() -> Pod:
    """Return the API server as the other pods see it: outside of their clusters, at one port."""
    service = {
        "kind": "Service",
        "metadata": {"name": "kubernetes"},
        "spec": {"type": "LoadBalancer", "selector": {}, "ports": [{"port": PORT}]},
    }
    cluster = Cluster("control-plane", ADDRESS)
    cluster.apply([service], "default")
    ports = [{"name": "https", "containerPort": PORT}]
    spec = {"containers": [{"name": "api", "ports": ports}]}
    return Pod(cluster, "kube-apiserver", "default", {}, spec)


def _key(manifest: Manifest) -> tuple[str, str, str]:
    metadata = manifest["metadata"]
    return manifest["kind"], metadata["namespace"], metadata["name"]
