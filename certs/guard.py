"""The role guard: an ASGI application in front of Flower's that maps the peer's role to what it may ask for.

Flower's own middleware starts behind it; nothing that is not allowed here reaches Flower.
"""

import logging
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from datetime import UTC, datetime
from typing import Any, Final

from prometheus_client import REGISTRY

from certs.lifetime import life_of
from certs.metric import Metric
from certs.revocations import Revocations
from certs.roles import Peer

_log = logging.getLogger("vlafleet.guard")

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]
# Answers None when the peer may go on, else the reason (a bounded metric label).
Rule = Callable[[Peer, Mapping[bytes, bytes]], Awaitable[str | None]]
# Gets role, name, serial (hex), path, reason and address of a refused request; what is not known is empty.
OnRefused = Callable[[dict[str, str]], None]

# Why a TLS connection never reached HTTP (certs.server; "limit" is superlink.door's as well).
HANDSHAKE_REASONS: Final = (
    "no certificate", "not verified", "certificate", "plain HTTP", "old TLS", "handshake", "timeout", "limit",
)  # fmt: skip

_REFUSALS = Metric(
    "vlafleet_refusals",
    "counter",
    "Requests that were refused, and connections that never became one (handshake).",
    ["kind"],
)
_REQUESTS = Metric(
    "vlafleet_refused_requests",
    "counter",
    "Requests that the role guard refused; a series begins with its first one.",
    ["role", "api", "reason"],
)
_HANDSHAKES = Metric(
    "vlafleet_failed_handshakes", "counter", "TLS handshakes that were refused.", ["reason"]
)
METRICS: Final = (_REFUSALS, _REQUESTS, _HANDSHAKES)

REFUSED = _REQUESTS.counting(REGISTRY)
FAILED_HANDSHAKES = _HANDSHAKES.counting(REGISTRY)
for _reason in HANDSHAKE_REASONS:
    FAILED_HANDSHAKES.labels(_reason)
# increase() does not see what a series begins with, and a series for every request that may be refused would be
# hundreds. These two are there from the start.
_refusals = _REFUSALS.counting(REGISTRY)
_REFUSED_REQUESTS, _REFUSED_HANDSHAKES = _refusals.labels("request"), _refusals.labels("handshake")

# From here on a status refuses (RFC 9110).
_REFUSED = 400
# Flower's SuperNode ends itself on 401 and takes 403 for "run not running"; on 404 it keeps trying.
_STATUS = 404
# Flower's error form (flwr.supercore.error.FlowerError.from_json), so that its clients print the sentence. The code
# lies outside Flower's own ranges.
_BODY = b'{"code": 40400, "detail": "Refused by the role guard; the server\'s log says why."}'

# Holders renew at two thirds of a certificate's life. In its last sixth, answers end the connection, so that the next
# request comes with the new certificate and none is caught by the end of the old one.
_LAST_SHARE = 1 / 6


def allow(predicate: Callable[[Peer], bool]) -> Rule:
    """Return the rule that lets those peers pass for whom ``predicate`` holds."""

    async def rule(peer: Peer, _headers: Mapping[bytes, bytes]) -> str | None:
        return None if predicate(peer) else "role"

    return rule


def log_refused_handshake(reason: str, sentence: str, address: str) -> None:
    """Log and count a refused TLS handshake."""
    count_failed_handshake(reason)
    _log.warning("refused handshake: reason=%r address=%s %s", reason, address, sentence)


def count_failed_handshake(reason: str) -> None:
    """Count a connection that never reached HTTP; ``reason`` is one of ``HANDSHAKE_REASONS``."""
    FAILED_HANDSHAKES.labels(reason).inc()
    _REFUSED_HANDSHAKES.inc()


def unfit(peer: Peer, revocations: Revocations | None) -> str | None:
    """Return why a peer may not go on, though its handshake was accepted; None when it may."""
    if revocations is not None and peer.serial in revocations:
        return "revoked"
    return "expired" if datetime.now(UTC) >= peer.not_after else None


def client_address(scope: Scope) -> str:
    """Return the IP address a request came from."""
    return scope["client"][0] if scope.get("client") else ""


async def read_body(receive: Receive, limit: int) -> bytes | None:
    """Return a request's body, or None when it is longer than ``limit`` bytes or its sender has gone."""
    body, more = b"", True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            return None
        body += message.get("body", b"")
        if len(body) > limit:
            return None
        more = message.get("more_body", False)
    return body


async def reply(
    send: Send,
    status: int,
    body: bytes = b"",
    form: str = "application/json",
    *more: tuple[bytes, bytes],
) -> None:
    """Send a whole answer, with ``more`` headers; after a refusal, what is left of the request is never read."""
    headers = list(more)
    if body:
        headers += [
            (b"content-type", form.encode()),
            (b"content-length", str(len(body)).encode()),
        ]
    if status >= _REFUSED:
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def no_lifespan(_scope: Scope, receive: Receive, send: Send) -> None:
    """Nothing begins or ends with the server (ASGI's lifespan)."""
    for event in ("startup", "shutdown"):
        await receive()
        await send({"type": f"lifespan.{event}.complete"})


class Guard:
    """Let a request pass when the rule for its path accepts the peer; refuse every other path.

    ``rules`` maps a path prefix ending in ``/``, or one exact path, to a rule and the application behind it.
    ``anonymous`` maps an exact path to an application for everybody, with a certificate or without.
    """

    def __init__(
        self,
        rules: Mapping[str, tuple[Rule, Application]],
        lifespan: Application,
        revocations: Revocations | None,
        *,
        anonymous: Mapping[str, Application] | None = None,
        on_refused: OnRefused | None = None,
    ) -> None:
        self._rules = rules
        self._lifespan = lifespan
        self._revocations = revocations
        self._anonymous = anonymous or {}
        self._on_refused = on_refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        if scope["type"] == "lifespan":
            await self._lifespan(scope, receive, send)
            return
        peer: Peer | None = scope.get("state", {}).get("peer")
        api, rule, application = self._find(str(scope["path"]))
        reason = await self._reason(scope, peer, rule, application)
        if reason is None and application is not None:
            closing = peer is not None and _in_last_share(peer)
            await application(scope, receive, _closing(send) if closing else send)
            return
        refused = {
            "role": str(peer.role) if peer else "none",
            "name": peer.name if peer else "",
            "serial": f"{peer.serial:x}" if peer else "",
            "path": str(scope["path"]),
            "reason": str(reason),
            "address": client_address(scope),
        }
        REFUSED.labels(refused["role"], api, reason).inc()
        _REFUSED_REQUESTS.inc()
        _log.warning(
            "refused request: role=%s name=%s path=%s serial=%s address=%s reason=%s",
            refused["role"],
            refused["name"] or "-",
            repr(refused["path"]),  # the peer's text: no control character reaches the log
            refused["serial"] or "-",
            refused["address"] or "-",
            reason,
        )
        if self._on_refused is not None:
            self._on_refused(refused)
        await _refuse(scope, send)

    async def _reason(
        self,
        scope: Scope,
        peer: Peer | None,
        rule: Rule | None,
        application: Application | None,
    ) -> str | None:
        """Return why a request is refused (a bounded metric label), or None."""
        if scope["type"] != "http":
            return "protocol"
        # Checked on every request: a connection opened before the revocation ends here.
        if peer is not None and (reason := unfit(peer, self._revocations)):
            return reason
        if application is None:
            return "path"
        if rule is None:
            return None
        return await rule(peer, dict(scope["headers"])) if peer else "no certificate"

    def _find(self, path: str) -> tuple[str, Rule | None, Application | None]:
        """Return the API (a bounded metric label), who may use it (None: everybody) and what serves it."""
        if path in self._anonymous:
            return path, None, self._anonymous[path]
        for prefix, (rule, application) in self._rules.items():
            if path == prefix or (prefix.endswith("/") and path.startswith(prefix)):
                return prefix, rule, application
        return "other", None, None


def _in_last_share(peer: Peer) -> bool:
    return datetime.now(UTC) >= peer.not_after - life_of(peer) * _LAST_SHARE


def _closing(send: Send) -> Send:
    """Return a ``send`` whose answer ends the connection."""

    async def close(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            headers = [*message.get("headers", []), (b"connection", b"close")]
            message = {**message, "headers": headers}
        await send(message)

    return close


async def _refuse(scope: Scope, send: Send) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})  # policy violation, RFC 6455
        return
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": _STATUS, "headers": headers})
    await send({"type": "http.response.body", "body": _BODY})
