"""The role guard: an ASGI application in front of Flower's that maps the peer's role to what it may ask for.

Flower's own middleware starts behind it; nothing that is not allowed here reaches Flower.
"""

import logging
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from prometheus_client import Counter

from certs.revocations import Revocations
from certs.roles import Peer

_log = logging.getLogger("vlafleet.guard")

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]
# Answers None when the peer may go on, else the reason (a bounded metric label).
Rule = Callable[[Peer, Mapping[bytes, bytes]], Awaitable[str | None]]

REFUSED = Counter(
    "vlafleet_refused_requests",
    "Requests the role guard refused.",
    ["role", "api", "reason"],
)
FAILED_HANDSHAKES = Counter(
    "vlafleet_failed_handshakes", "TLS handshakes that were refused.", ["reason"]
)

# Flower's SuperNode ends itself on 401 and takes 403 for "run not running"; on 404 it keeps trying.
_STATUS = 404
# Flower's error form (flwr.supercore.error.FlowerError.from_json), so that its clients print the sentence. The code
# lies outside Flower's own ranges.
_BODY = b'{"code": 40400, "detail": "Refused by the role guard; the server\'s log says why."}'


def allow(predicate: Callable[[Peer], bool]) -> Rule:
    """Return the rule that lets those peers pass for whom ``predicate`` holds."""

    async def rule(peer: Peer, _headers: Mapping[bytes, bytes]) -> str | None:
        return None if predicate(peer) else "role"

    return rule


def log_refused_handshake(reason: str, sentence: str) -> None:
    """Log and count a refused TLS handshake."""
    FAILED_HANDSHAKES.labels(reason).inc()
    _log.warning("refused handshake: reason=%r %s", reason, sentence)


class Guard:
    """Let a request pass when the rule for its path accepts the peer; refuse every other path.

    ``rules`` maps a path prefix ending in ``/``, or one exact path, to a rule and the application behind it.
    """

    def __init__(
        self,
        rules: Mapping[str, tuple[Rule, Application]],
        lifespan: Application,
        revocations: Revocations | None,
    ) -> None:
        self._rules = rules
        self._lifespan = lifespan
        self._revocations = revocations

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        if scope["type"] == "lifespan":
            await self._lifespan(scope, receive, send)
            return
        peer: Peer | None = scope.get("state", {}).get("peer")
        path = str(scope["path"])
        api, entry = self._find(path)
        reason, application = "path", None
        if scope["type"] != "http" or peer is None:
            reason = "protocol"
        elif self._revocations is not None and peer.serial in self._revocations:
            # Checked on every request: a connection opened before the revocation ends here.
            reason = "revoked"
        elif entry is not None:
            rule, application = entry
            reason = await rule(peer, dict(scope["headers"])) or ""
        if not reason and application is not None:
            await application(scope, receive, send)
            return
        role = peer.role if peer else "none"
        REFUSED.labels(role, api, reason).inc()
        _log.warning(
            "refused request: role=%s name=%s path=%s serial=%s reason=%s",
            role,
            peer.name if peer else "-",
            repr(path),  # a path is the peer's text: no control character reaches the log
            f"{peer.serial:x}" if peer else "-",
            reason,
        )
        await _refuse(scope, send)

    def _find(self, path: str) -> tuple[str, tuple[Rule, Application] | None]:
        for prefix, entry in self._rules.items():
            if path == prefix or (prefix.endswith("/") and path.startswith(prefix)):
                return prefix, entry
        return "other", None


async def _refuse(scope: Scope, send: Send) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})  # policy violation, RFC 6455
        return
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": _STATUS, "headers": headers})
    await send({"type": "http.response.body", "body": _BODY})
