"""A small API server of Kubernetes for tests: Secrets and Pods over TLS, for service accounts under RBAC.

It runs in the test (``serving``) or as a process of any Python without packages:

    python api_server.py --port 6443 --certificate tls.crt --key tls.key --state DIR

``DIR`` is read anew for every request, so that a test changes it at any time:

- ``tokens.json``: a bearer token to the user it stands for, ``system:serviceaccount:NAMESPACE:NAME`` or ``admin``, who
  may do everything;
- ``rbac.json``: the Roles, ClusterRoles and RoleBindings in force, a list of manifests;

and written: ``objects.json``, every object there is, and ``requests.jsonl``, what was asked and how it ended, which
``GET /log`` tells the admin, too.
"""

import argparse
import base64
import contextlib
import copy
import http.server
import json
import re
import ssl
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple, cast
from urllib.parse import parse_qs, urlsplit

Manifest = dict[str, Any]

ADMIN: Final = "admin"
KINDS: Final = {"secrets": "Secret", "pods": "Pod"}
# Where a container finds its service account.
MOUNT: Final = "/var/run/secrets/kubernetes.io/serviceaccount"

_PATH: Final = re.compile(
    r"/api/v1/namespaces/(?P<namespace>[a-z0-9-]+)/(?P<resource>secrets|pods)"
    r"(/(?P<name>[a-z0-9.-]+)(?P<status>/status)?)?"
)
_NAME: Final = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*")
_KEY: Final = re.compile(r"[-._a-zA-Z0-9]+")
_VERBS: Final = {"POST": "create", "GET": "get", "PUT": "update", "DELETE": "delete"}
# The most that a Secret holds.
_MAX_SECRET_BYTES: Final = 1 << 20


class Asked(NamedTuple):
    """A request: who, which verb on which resource, the object's name (empty for a create and a list), where."""

    user: str
    verb: str
    resource: str
    name: str
    namespace: str


class RefusedError(Exception):
    """An answer that is no object: a Status."""

    def __init__(self, code: int, reason: str, message: str, **details: str) -> None:
        super().__init__(message)
        self.code = code
        self.status = {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": message,
            "reason": reason,
            "details": details,
            "code": code,
        }


def service_account(namespace: str, name: str) -> str:
    """Return the user that a service account is."""
    return f"system:serviceaccount:{namespace}:{name}"


def granted(rbac: Iterable[Manifest]) -> set[Asked]:
    """Return every request that roles and bindings allow; the name is ``*`` where a rule names no object."""
    rbac = list(rbac)
    return {
        Asked(service_account(subject.get("namespace", ""), subject["name"]), *rest)
        for binding in rbac
        if binding["kind"] == "RoleBinding"
        for subject in binding.get("subjects", [])
        if subject["kind"] == "ServiceAccount"
        for rule in _rules(rbac, binding)
        if "" in rule["apiGroups"]
        for verb in rule["verbs"]
        for resource in rule["resources"]
        for name in rule.get("resourceNames") or ["*"]
        for rest in [(verb, resource, name, binding["metadata"]["namespace"])]
    }


def _rules(rbac: Iterable[Manifest], binding: Manifest) -> list[Manifest]:
    reference, namespace = binding["roleRef"], binding["metadata"]["namespace"]
    return [
        rule
        for role in rbac
        if role["kind"] == reference["kind"] and role["metadata"]["name"] == reference["name"]
        if role["kind"] == "ClusterRole" or role["metadata"]["namespace"] == namespace
        for rule in role.get("rules", [])
    ]


def _allowed(rights: set[Asked], asked: Asked) -> bool:
    """Whether a right covers a request. One with a name covers no create: the name is not known yet then."""
    return any(
        right.user == asked.user
        and right.verb in {asked.verb, "*"}
        and right.resource in {asked.resource, "*"}
        and right.name in {"*", asked.name}
        and right.namespace == asked.namespace
        for right in rights
    )


class ApiServer:
    """The objects, and who may do what with them; safe to share between threads."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self._lock = threading.Lock()
        state.mkdir(parents=True, exist_ok=True)
        stored = self._read("objects.json", {"version": 0, "objects": []})
        self._version: int = stored["version"]
        self._objects: dict[tuple[str, str, str], Manifest] = {
            (resource, found["metadata"]["namespace"], found["metadata"]["name"]): found
            for found in stored["objects"]
            for resource in KINDS
            if found["kind"] == KINDS[resource]
        }

    # What a test asks and sets without HTTP.

    def grant(self, rbac: Sequence[Manifest]) -> None:
        """Put these Roles and RoleBindings in force."""
        _write(self.state / "rbac.json", list(rbac))

    def allow(self, token: str, user: str) -> None:
        """Let a token stand for a user."""
        _write(self.state / "tokens.json", {**self._read("tokens.json", {}), token: user})

    def forbid(self, token: str) -> None:
        """Let a token stand for nobody any more."""
        tokens = self._read("tokens.json", {})
        del tokens[token]
        _write(self.state / "tokens.json", tokens)

    def log(self) -> list[dict[str, Any]]:
        """Return what was asked: the fields of ``Asked``, and the answer's ``code``."""
        path = self.state / "requests.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def used(self) -> set[Asked]:
        """Return every request that RBAC let through, whatever became of it."""
        return {
            Asked(*(line[name] for name in Asked._fields))
            for line in self.log()
            if line["code"] not in {401, 403} and line["user"] != ADMIN
        }

    def objects(self, resource: str, namespace: str) -> dict[str, Manifest]:
        """Return the objects of a namespace by name."""
        with self._lock:
            return {
                name: copy.deepcopy(found)
                for (kind, where, name), found in self._objects.items()
                if (kind, where) == (resource, namespace)
            }

    def secret(self, name: str, namespace: str) -> dict[str, bytes] | None:
        """Return what a Secret holds, None where there is none."""
        found = self.objects("secrets", namespace).get(name)
        if found is None:
            return None
        return {key: base64.b64decode(value) for key, value in found.get("data", {}).items()}

    def put_secret(
        self, name: str, namespace: str, files: Mapping[str, bytes], **metadata: Any
    ) -> None:
        """Make or replace a Secret, as its operator would."""
        data = {key: base64.b64encode(value).decode() for key, value in files.items()}
        body = {"kind": "Secret", "metadata": {**metadata, "name": name}, "data": data}
        with self._lock:
            if ("secrets", namespace, name) in self._objects:
                self._update("secrets", namespace, name, body, status=False)
            else:
                self._create("secrets", namespace, body)
            self._save()

    def set_phase(self, pod: str, namespace: str, phase: str) -> None:
        """Say how far a pod is, as its kubelet would: Pending, Running, Succeeded, Failed."""
        with self._lock:
            self._get("pods", namespace, pod).setdefault("status", {})["phase"] = phase
            self._save()

    def remove(self, resource: str, namespace: str, name: str) -> None:
        """Remove an object."""
        with self._lock:
            del self._objects[resource, namespace, name]
            self._save()

    # The API.

    def answer(self, method: str, url: str, token: str | None, body: bytes) -> tuple[int, Manifest]:
        """Return an answer's status and body."""
        parts = urlsplit(url)
        match = _PATH.fullmatch(parts.path)
        asked = Asked("", "", "", "", "")
        try:
            user = self._read("tokens.json", {}).get(token)
            if user is None:
                raise RefusedError(401, "Unauthorized", "Unauthorized")
            if (method, parts.path, user) == ("GET", "/log", ADMIN):
                return 200, {"items": self.log()}
            if match is None or method not in _VERBS:
                raise RefusedError(
                    404, "NotFound", "the server could not find the requested resource"
                )
            resource, namespace, name = match["resource"], match["namespace"], match["name"] or ""
            verb = "list" if method == "GET" and not name else _VERBS[method]
            asked = Asked(
                user,
                verb,
                resource + (match["status"] or ""),
                "" if verb == "create" else name,
                namespace,
            )
            self._authorize(asked)
            with self._lock:
                before = dict(self._objects)
                query = parse_qs(parts.query)
                if verb == "list":
                    selector = query.get("labelSelector", [""])[0]
                    done = 200, self._list(resource, namespace, selector)
                elif verb == "create" and not name:
                    done = 201, self._create(resource, namespace, _manifest(body, resource))
                elif verb == "get":
                    done = 200, self._get(resource, namespace, name)
                elif verb == "update" and name:
                    changed = _manifest(body, resource)
                    status = match["status"] is not None
                    done = 200, self._update(resource, namespace, name, changed, status=status)
                elif verb == "delete" and name:
                    done = 200, self._delete(resource, namespace, name)
                else:
                    raise RefusedError(
                        405, "MethodNotAllowed", "the server does not allow this method"
                    )
                if query.get("dryRun") == ["All"]:
                    self._objects = before
                elif method != "GET":
                    self._save()
                answer = done[0], copy.deepcopy(done[1])
        except RefusedError as refusal:
            answer = refusal.code, refusal.status
        self._note(asked, answer[0])
        return answer

    def _authorize(self, asked: Asked) -> None:
        if asked.user == ADMIN or _allowed(granted(self._read("rbac.json", [])), asked):
            return
        subject = f'{asked.resource} "{asked.name}"' if asked.name else asked.resource
        raise RefusedError(
            403,
            "Forbidden",
            f'{subject} is forbidden: User "{asked.user}" cannot {asked.verb} resource "{asked.resource}" in API '
            f'group "" in the namespace "{asked.namespace}"',
            name=asked.name,
            kind=asked.resource,
        )

    def _get(self, resource: str, namespace: str, name: str) -> Manifest:
        found = self._objects.get((resource, namespace, name))
        if found is None:
            message = f'{resource} "{name}" not found'
            raise RefusedError(404, "NotFound", message, name=name, kind=resource)
        return found

    def _list(self, resource: str, namespace: str, selector: str) -> Manifest:
        items = [
            found
            for (kind, where, _), found in sorted(self._objects.items())
            if (kind, where) == (resource, namespace)
            and _selected(found["metadata"].get("labels") or {}, selector)
        ]
        return {
            "kind": f"{KINDS[resource]}List",
            "apiVersion": "v1",
            "metadata": {"resourceVersion": str(self._version)},
            "items": items,
        }

    def _create(self, resource: str, namespace: str, body: Manifest) -> Manifest:
        metadata = body.get("metadata") or {}
        name = metadata.get("name") or ""
        if not _NAME.fullmatch(name) or len(name) > 253:
            raise _invalid(resource, name, "metadata.name: Invalid value")
        if metadata.get("namespace", namespace) != namespace:
            message = "the namespace of the provided object does not match the namespace sent on the request"
            raise RefusedError(400, "BadRequest", message)
        if (resource, namespace, name) in self._objects:
            message = f'{resource} "{name}" already exists'
            raise RefusedError(409, "AlreadyExists", message, name=name, kind=resource)
        made = _checked(resource, body)
        made["metadata"] |= {
            "namespace": namespace,
            "uid": str(uuid.uuid4()),
            "creationTimestamp": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "resourceVersion": self._next(),
        }
        if resource == "pods":
            made["status"] = {"phase": "Pending"}
        self._objects[resource, namespace, name] = made
        return made

    def _update(
        self, resource: str, namespace: str, name: str, body: Manifest, *, status: bool
    ) -> Manifest:
        before = self._get(resource, namespace, name)
        metadata = body.get("metadata") or {}
        if metadata.get("name", name) != name:
            message = "the name of the object does not match the name on the URL"
            raise RefusedError(400, "BadRequest", message)
        if metadata.get("resourceVersion", "") not in {"", before["metadata"]["resourceVersion"]}:
            raise RefusedError(
                409,
                "Conflict",
                f'Operation cannot be fulfilled on {resource} "{name}": the object has been modified; please apply '
                "your changes to the latest version and try again",
                name=name,
                kind=resource,
            )
        if status:
            after = {**before, "status": body.get("status", {})}
        else:
            after = _checked(resource, {**body, "metadata": {**metadata, "name": name}})
            if after.get("type") != before.get("type"):
                raise _invalid(resource, name, "type: Invalid value: field is immutable")
            if before.get("immutable"):
                raise _invalid(resource, name, "data: Forbidden: field is immutable when set")
            after = {**before, **after}
        after["metadata"] = {
            **after["metadata"],
            **{key: before["metadata"][key] for key in ("namespace", "uid", "creationTimestamp")},
            "resourceVersion": self._next(),
        }
        self._objects[resource, namespace, name] = after
        return after

    def _delete(self, resource: str, namespace: str, name: str) -> Manifest:
        found = self._get(resource, namespace, name)
        del self._objects[resource, namespace, name]
        self._next()
        if resource == "pods":
            return found
        details = {"name": name, "kind": resource, "uid": found["metadata"]["uid"]}
        status = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success"}
        return {**status, "details": details}

    def _next(self) -> str:
        self._version += 1
        return str(self._version)

    def _read(self, name: str, default: Any) -> Any:
        path = self.state / name
        return json.loads(path.read_text()) if path.exists() else default

    def _save(self) -> None:
        stored = {"version": self._version, "objects": [*self._objects.values()]}
        _write(self.state / "objects.json", stored)

    def _note(self, asked: Asked, code: int) -> None:
        line = json.dumps({**asked._asdict(), "code": code})
        with self._lock, (self.state / "requests.jsonl").open("a") as file:
            file.write(f"{line}\n")


def _write(path: Path, content: Any) -> None:
    temporary = path.with_name(f".{path.name}.{threading.get_ident()}")
    temporary.write_text(json.dumps(content, indent=1))
    temporary.replace(path)


def _manifest(body: bytes, resource: str) -> Manifest:
    try:
        made = json.loads(body)
    except ValueError as error:
        raise RefusedError(400, "BadRequest", "the object provided is unrecognized") from error
    if not isinstance(made, dict) or made.get("kind", KINDS[resource]) != KINDS[resource]:
        raise RefusedError(400, "BadRequest", f"the object provided is no {KINDS[resource]}")
    return made


def _checked(resource: str, body: Manifest) -> Manifest:
    """Return an object as it is kept; raise ``RefusedError`` for what Kubernetes does not take."""
    made: Manifest = {**copy.deepcopy(body), "kind": KINDS[resource], "apiVersion": "v1"}
    made.pop("status", None)
    name = made["metadata"]["name"]
    if resource == "pods":
        if not made.get("spec", {}).get("containers"):
            raise _invalid(resource, name, "spec.containers: Required value")
        return made
    data = dict(made.get("data") or {})
    for key, value in (made.pop("stringData", None) or {}).items():
        data[key] = base64.b64encode(value.encode()).decode()
    size = 0
    for key, value in data.items():
        if not _KEY.fullmatch(key):
            raise _invalid(resource, name, f"data[{key}]: Invalid value")
        try:
            size += len(base64.b64decode(value, validate=True))
        except (ValueError, TypeError) as error:
            raise RefusedError(400, "BadRequest", "illegal base64 data at input byte 0") from error
    if size > _MAX_SECRET_BYTES:
        raise _invalid(resource, name, "data: Too long: must have at most 1048576 bytes")
    made["type"] = made.get("type") or "Opaque"
    if made["type"] == "kubernetes.io/tls" and not {"tls.key", "tls.crt"} <= set(data):
        raise _invalid(resource, name, "data[tls.key]: Required value")
    return {**made, "data": data}


def _invalid(resource: str, name: str, message: str) -> RefusedError:
    return RefusedError(
        422,
        "Invalid",
        f'{KINDS[resource]} "{name}" is invalid: {message}',
        name=name,
        kind=resource,
    )


def _selected(labels: Mapping[str, str], selector: str) -> bool:
    """Whether labels meet an equality selector: ``key=value``, ``key!=value`` and ``key``, split by commas."""
    for term in filter(None, selector.split(",")):
        key, operator, value = re.fullmatch(r"([^=!]+)(==|=|!=)?(.*)", term.strip()).groups()  # type: ignore[union-attr]
        met = key in labels if operator is None else labels.get(key) == value
        if met is (operator == "!="):
            return False
    return True


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 60

    def setup(self) -> None:
        # Here, in a thread of its own: a client that does not shake hands keeps nobody else waiting.
        self.request = cast(_Server, self.server).context.wrap_socket(
            self.request, server_side=True
        )
        super().setup()

    def finish(self) -> None:
        super().finish()
        with contextlib.suppress(OSError):
            self.request.close()

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        scheme, _, token = (self.headers.get("authorization") or "").partition(" ")
        given = token if scheme.lower() == "bearer" else None
        api = cast(_Server, self.server).api
        code, answer = api.answer(self.command, self.path, given, body)
        data = json.dumps(answer).encode()
        self.send_response(code)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = _answer  # noqa: N815

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(
        self, address: tuple[str, int], api: ApiServer, certificate: Path, key: Path
    ) -> None:
        super().__init__(address, _Handler)
        self.api = api
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(certificate, key)

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass


@dataclass(frozen=True)
class Running:
    """An API server on loopback: the address, the authority of its certificate, and its objects."""

    port: int
    authority: Path
    api: ApiServer

    @property
    def environment(self) -> dict[str, str]:
        """What tells a container where the API is."""
        return {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": str(self.port)}

    def mount(self, directory: Path, namespace: str, account: str) -> Path:
        """Fill a directory with what a pod of a service account finds in ``MOUNT``; each call has a new token."""
        token = uuid.uuid4().hex
        self.api.allow(token, service_account(namespace, account))
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "token").write_text(token)
        (directory / "namespace").write_text(namespace)
        (directory / "ca.crt").write_bytes(self.authority.read_bytes())
        return directory


@contextlib.contextmanager
def serving(directory: Path, port: int, rbac: Sequence[Manifest] = ()) -> Iterator[Running]:
    """Run an API server in a thread until the block ends; its state and certificates are below ``directory``."""
    api = ApiServer(directory / "state")
    api.grant(rbac)
    certify(directory, ["localhost"], ["127.0.0.1"])
    certificate, key = directory / "tls.crt", directory / "tls.key"
    server = _Server(("127.0.0.1", port), api, certificate, key)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield Running(port, directory / "ca.crt", api)
    finally:
        server.shutdown()
        thread.join(30)
        server.server_close()


def certify(directory: Path, names: Sequence[str], addresses: Sequence[str]) -> None:
    """Write ``ca.crt``, and ``tls.crt`` and ``tls.key`` of a server with these DNS names and IP addresses."""
    import datetime
    import ipaddress

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    directory.mkdir(parents=True, exist_ok=True)
    now = datetime.datetime.now(datetime.UTC)

    def builder(name: str, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
            .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "kubernetes")]))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(days=1))
        )

    key, server_key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    # As kubeadm makes it: without the identifiers that RFC 5280 asks for.
    authority = builder("kubernetes", key).add_extension(
        x509.BasicConstraints(ca=True, path_length=None), critical=True
    )
    alternative = [
        *map(x509.DNSName, names),
        *(x509.IPAddress(ipaddress.ip_address(each)) for each in addresses),
    ]
    server = builder("kube-apiserver", server_key).add_extension(
        x509.SubjectAlternativeName(alternative), critical=False
    )
    pem = serialization.Encoding.PEM
    (directory / "ca.crt").write_bytes(authority.sign(key, hashes.SHA256()).public_bytes(pem))
    (directory / "tls.crt").write_bytes(server.sign(key, hashes.SHA256()).public_bytes(pem))
    (directory / "tls.key").write_bytes(
        server_key.private_bytes(
            pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )


def main() -> None:
    """Serve until the process ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--host", default="0.0.0.0")  # noqa: S104 - in a container of its own
    parser.add_argument("--port", type=int, required=True)
    for name in ("certificate", "key", "state"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    options = parser.parse_args()
    api = ApiServer(options.state)
    with _Server((options.host, options.port), api, options.certificate, options.key) as server:
        server.serve_forever()


if __name__ == "__main__":
    main()
