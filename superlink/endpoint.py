"""An HTTP path that speaks JSON (ASGI): strict in what it reads, a status below 500 for whatever a client sends."""

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from certs.enrolment import MAX_BODY_BYTES
from certs.errors import FleetError
from certs.guard import Application, Receive, Scope, Send, client_address
from certs.roles import Peer
from superlink.refused import Refused

_log = logging.getLogger("vlafleet.enrolment")

_NO_CONTENT, _METHOD_NOT_ALLOWED = 204, 405
_WITH_BODY = frozenset({"POST", "PUT"})


@dataclass(frozen=True)
class Request:
    """What a handler sees: who asks (nobody: no certificate) from where, for what path, and the body's JSON."""

    peer: Peer | None
    certificate: bytes | None
    address: str
    path: str
    body: Any = None

    @property
    def holder(self) -> Peer:
        """The peer, of a path that the guard opens to holders of a certificate only."""
        if self.peer is None:
            raise Refused("role", "this path needs a certificate of the federation")
        return self.peer


# Returns the answer's JSON, None for no content; raises Refused.
Handler = Callable[[Request], Awaitable[Mapping[str, Any] | None]]


def endpoint(
    handlers: Mapping[str, Handler],
    refused: Callable[[Request, Refused], None] | None = None,
    *,
    limited: Callable[[str], None] | None = None,
) -> Application:
    """Return the application that answers each method with its handler.

    ``limited`` is called with the address before anything is read and may raise ``Refused``; ``refused`` hears of every
    request that was.
    """

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        state = scope.get("state", {})
        request = Request(
            state.get("peer"), state.get("certificate"), client_address(scope), scope["path"]
        )
        # Until then, an answer ends the connection: what comes after the head is never read.
        read = False
        try:
            if limited is not None:
                limited(request.address)
            handler = handlers.get(scope["method"])
            if handler is None:
                detail = f"{request.path} takes {' and '.join(handlers)}"
                error = _error("malformed", detail)
                await _answer(send, _METHOD_NOT_ALLOWED, error, allow=handlers, close=True)
                return
            if scope["method"] in _WITH_BODY:
                body = await _body(scope, receive)
                read = True
                request = replace(request, body=strict_json(body))
            answer = await handler(request)
        except _Gone:
            return
        except Refused as error:
            if refused is not None:
                await asyncio.to_thread(refused, request, error)
            await _refuse(send, error, close=not read)
        except FleetError as error:
            # Not the client's doing: a full disk, a damaged file.
            _log.error("%s %s: %s", scope["method"], scope["path"], error)
            detail = "the enrolment service cannot do this now; its log says why"
            await _refuse(send, Refused("unavailable", detail), close=not read)
        else:
            await _answer(send, 200 if answer is not None else _NO_CONTENT, answer)

    return serve


def strict_json(data: bytes) -> Any:
    """Read JSON (RFC 8259) in UTF-8; raise ``Refused`` for anything else, a repeated name and NaN among it."""

    def members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) != len(pairs):
            raise ValueError("a name occurs twice")
        return dict(pairs)

    def constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is no JSON")

    try:
        return json.loads(data.decode(), object_pairs_hook=members, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        # Not what the parser says: it may quote the body.
        raise Refused("malformed", "the body is not JSON in UTF-8") from error


def fields(record: Any, names: set[str]) -> Mapping[str, Any]:
    """Return a JSON object; raise ``Refused`` unless it has these fields and no other."""
    if not isinstance(record, Mapping) or set(record) != names:
        raise Refused("malformed", f"the body is an object of {' and '.join(sorted(names))}")
    return record


class _Gone(Exception):  # noqa: N818 - nobody is left to be answered
    """The client has closed the connection."""


async def _body(scope: Scope, receive: Receive) -> bytes:
    too_large = Refused("too-large", f"a request has at most {MAX_BODY_BYTES} bytes")
    length = dict(scope["headers"]).get(b"content-length", b"0")
    # uvicorn's parser has made sure that it is a number of a bounded length.
    if int(length) > MAX_BODY_BYTES:
        raise too_large
    body = bytearray()
    more = True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            raise _Gone
        body += message.get("body", b"")
        if len(body) > MAX_BODY_BYTES:
            raise too_large
        more = message.get("more_body", False)
    return bytes(body)


def _error(code: str, detail: str) -> dict[str, str]:
    return {"code": code, "detail": detail}


async def _refuse(send: Send, refused: Refused, *, close: bool) -> None:
    error = _error(refused.code, refused.detail)
    await _answer(send, refused.status, error, retry_after=refused.retry_after, close=close)


async def _answer(
    send: Send,
    status: int,
    content: Mapping[str, Any] | None,
    *,
    retry_after: int | None = None,
    allow: Mapping[str, Handler] | None = None,
    close: bool = False,
) -> None:
    body = json.dumps(content).encode() if content is not None else b""
    headers = [(b"content-length", str(len(body)).encode())] if status != _NO_CONTENT else []
    headers += [(b"content-type", b"application/json"), (b"cache-control", b"no-store")]
    if retry_after is not None:
        headers.append((b"retry-after", str(retry_after).encode()))
    if allow is not None:
        headers.append((b"allow", ", ".join(allow).encode()))
    if close:
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
