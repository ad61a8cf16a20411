"""The Secrets of the Kubernetes cluster that this process runs in, as far as its pod's service account may.

The token is read anew for each request, because its kubelet exchanges it every hour. It goes to the server that the
mounted authority vouches for, and to no other.
"""

import base64
import binascii
import os
import re
import ssl
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import httpx

from certs.errors import ConfigError, ConnectionRefusedByFleetError, ToolError, first_line

# What a Secret holds (None: there is none) to what it is to hold (None: leave it).
Decide = Callable[[dict[str, bytes] | None], Mapping[str, bytes] | None]

MOUNT: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount")

_TIMEOUT: Final = httpx.Timeout(20.0, connect=5.0)
# Pauses before another attempt: a pod's network, or an API server that is being restarted, is there by then.
_PAUSES: Final = (1.0, 2.0, 4.0)
# How often a Secret that somebody else changes at the same time is read again.
_CONFLICTS: Final = 5
# Names of namespaces (RFC 1123 label) and of Secrets (subdomain).
_LABEL: Final = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
_NAME: Final = re.compile(rf"{_LABEL}(\.{_LABEL})*")
_LABELS: Final = {
    "app.kubernetes.io/part-of": "vlafleet",
    "app.kubernetes.io/managed-by": "vlafleet",
}


@dataclass(frozen=True)
class Cluster:
    """The API server at ``address`` (``host:port``), asked with what is mounted at ``mount``."""

    address: str
    mount: Path
    namespace: str

    @classmethod
    def here(cls, mount: Path = MOUNT) -> Self:
        """Find the cluster from within a pod; raise ``ToolError`` where this is none, or has no service account."""
        host, port = (os.environ.get(f"KUBERNETES_SERVICE_{name}") for name in ("HOST", "PORT"))
        if not host or not port:
            raise ToolError(
                "this command stores Secrets from within a cluster, and KUBERNETES_SERVICE_HOST is not set: "
                "is this a pod? Elsewhere 'kubectl create secret generic' stores an identity"
            )
        if ":" in host:
            host = f"[{host}]"
        cluster = cls(f"{host}:{port}", mount, "")
        return cls(cluster.address, mount, cluster._mounted("namespace"))

    def read(self, name: str, namespace: str | None = None) -> dict[str, bytes] | None:
        """Return what a Secret holds, None where there is none.

        Raises ``ConnectionRefusedByFleetError`` when the API server cannot be asked or does not allow it.
        """
        found = self._get(name, namespace or self.namespace)
        return None if found is None else self._content(found, name)

    def store(self, name: str, decide: Decide, namespace: str | None = None) -> bool:
        """Let a Secret hold what ``decide`` makes of what it holds; return whether it was written.

        Should somebody else write it at the same time, ``decide`` is asked again, with what they wrote.
        """
        namespace = namespace or self.namespace
        for _ in range(_CONFLICTS):
            found = self._get(name, namespace)
            files = decide(None if found is None else self._content(found, name))
            if files is None:
                return False
            data = {key: base64.b64encode(value).decode() for key, value in files.items()}
            if found is None:
                body = {
                    "apiVersion": "v1",
                    "kind": "Secret",
                    "type": "Opaque",
                    "metadata": {"name": name, "labels": _LABELS},
                    "data": data,
                }
                answer = self._ask("POST", "create", name, namespace, body)
            else:
                # With the version that was read: what others have made of it since is not overwritten.
                answer = self._ask("PUT", "update", name, namespace, {**found, "data": data})
            lost = answer.status_code == httpx.codes.CONFLICT
            if not lost and (found is None or answer.status_code != httpx.codes.NOT_FOUND):
                self._require(answer, "write", name, namespace)
                return True
        raise ConnectionRefusedByFleetError(
            f"the Secret {name} in {namespace} was changed by somebody else {_CONFLICTS} times in a row: "
            "find out who writes it, then try again"
        )

    def _get(self, name: str, namespace: str) -> dict[str, Any] | None:
        answer = self._ask("GET", "get", name, namespace)
        if answer.status_code == httpx.codes.NOT_FOUND:
            return None
        self._require(answer, "read", name, namespace)
        found = _json(answer)
        if not isinstance(found, dict) or found.get("kind") != "Secret":
            raise ConnectionRefusedByFleetError(
                f"{self.address} does not answer as an API server of Kubernetes; check KUBERNETES_SERVICE_HOST"
            )
        return found

    def _content(self, found: Mapping[str, Any], name: str) -> dict[str, bytes]:
        try:
            data = found.get("data") or {}
            return {key: base64.b64decode(value, validate=True) for key, value in data.items()}
        except (AttributeError, TypeError, binascii.Error, ValueError) as error:
            raise ConnectionRefusedByFleetError(
                f"the API server at {self.address} answers for the Secret {name} with what is no Secret"
            ) from error

    def _ask(
        self, method: str, verb: str, name: str, namespace: str, body: Any = None
    ) -> httpx.Response:
        """Return the answer to one request, asked again while the server cannot answer and patience lasts."""
        for what, given in (("namespace", namespace), ("Secret", name)):
            if not _NAME.fullmatch(given) or len(given) > (63 if what == "namespace" else 253):
                raise ConfigError(f"{given!r} is not the name of a {what} of Kubernetes")
        path = f"/api/v1/namespaces/{namespace}/secrets"
        path += "" if verb == "create" else f"/{name}"
        why = ""
        for pause in (0.0, *_PAUSES):
            time.sleep(pause)
            try:
                answer = self._once(method, path, body)
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                self._require_trusted(error)
                why = f"cannot be reached ({first_line(error)})"
                continue
            code = answer.status_code
            if code != httpx.codes.TOO_MANY_REQUESTS and code < httpx.codes.INTERNAL_SERVER_ERROR:
                return answer
            why = f"answers {code}"
        raise ConnectionRefusedByFleetError(
            f"the API server at {self.address} {why}: check that a NetworkPolicy lets this pod reach it, and that it "
            "is the one of this cluster"
        )

    def _once(self, method: str, path: str, body: Any) -> httpx.Response:
        # Neither a proxy nor an authority of the environment: the token is for this server alone. Without RFC 5280's
        # strictest rules, which the authority of many a cluster does not meet.
        try:
            context = ssl.create_default_context(cadata=self._mounted("ca.crt"))
        except ssl.SSLError as error:
            raise ToolError(f"{self.mount / 'ca.crt'} is not a PEM certificate") from error
        headers = {"authorization": f"Bearer {self._mounted('token')}"}
        with httpx.Client(
            base_url=f"https://{self.address}", verify=context, timeout=_TIMEOUT, trust_env=False
        ) as client:
            return client.request(method, path, json=body, headers=headers)

    def _require_trusted(self, error: BaseException | None) -> None:
        """Raise ``ConnectionRefusedByFleetError`` when another server than the cluster's was there."""
        while error is not None:
            if isinstance(error, ssl.SSLCertVerificationError):
                raise ConnectionRefusedByFleetError(
                    f"the server at {self.address} is not the cluster's: {error.verify_message}; nothing was sent to "
                    f"it. {self.mount / 'ca.crt'} is the authority that it has to be of"
                ) from error
            error = error.__cause__ or error.__context__

    def _mounted(self, name: str) -> str:
        path = self.mount / name
        try:
            text = path.read_text("ascii").strip()
        except (OSError, ValueError) as error:
            raise ToolError(
                f"{path} cannot be read ({first_line(error)}): this pod has no service account's token; let its "
                "manifest mount one, as the chart's does for this command"
            ) from error
        if not text or (name != "ca.crt" and not text.isprintable()):
            raise ToolError(f"{path} is empty or damaged; it is the cluster that fills it")
        return text

    def _require(self, answer: httpx.Response, what: str, name: str, namespace: str) -> None:
        """Raise ``ConnectionRefusedByFleetError`` unless a request was granted and done."""
        if answer.is_success:
            return
        secret = f"the Secret {name} in {namespace}"
        if answer.status_code == httpx.codes.UNAUTHORIZED:
            raise ConnectionRefusedByFleetError(
                f"{secret} cannot be {_done(what)}: the API server at {self.address} does not take this pod's token; "
                "was the service account made anew? Then delete the pod"
            )
        record = _json(answer)
        record = record if isinstance(record, dict) else {}
        if answer.status_code == httpx.codes.FORBIDDEN:
            # Kubernetes names who, what and where.
            raise ConnectionRefusedByFleetError(
                f"the service account of this pod may not {what} {secret}: {_clean(record.get('message'))}; "
                "grant it with a Role and a RoleBinding, as the chart does"
            )
        # The message of another refusal may repeat what was sent.
        raise ConnectionRefusedByFleetError(
            f"{secret} cannot be {_done(what)}: the API server at {self.address} answers {answer.status_code} "
            f"({_clean(record.get('reason'))}); is the Secret immutable, or an admission policy in the way?"
        )


def _done(what: str) -> str:
    return {"read": "read", "write": "written"}[what]


def _json(answer: httpx.Response) -> Any:
    try:
        return answer.json()
    except ValueError:
        return None


def _clean(text: object) -> str:
    said = str(text or "no reason given")[:300]
    return " ".join("".join(c if c.isprintable() else " " for c in said).split()).rstrip(".")
