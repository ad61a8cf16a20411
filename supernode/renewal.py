"""How a site's SuperExec gets its next certificate: it has a way to its SuperNode alone, which asks in its place."""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass

from certs.enrolment import MAX_BODY_BYTES
from certs.errors import FleetError
from certs.guard import Application, Receive, Scope, Send, read_body
from certs.identity import Identity
from certs.renewal import ask
from certs.roles import Role

Headers = Sequence[tuple[bytes, bytes]]

# What is left of the request is never read.
_CLOSE = (b"connection", b"close")


@dataclass(frozen=True)
class _Answer:
    status: int
    body: bytes
    headers: Headers = ()


def forward(identity: Identity, enrolment: str | None) -> Application:
    """Return the ASGI application that hands a SuperExec's ``{"csr": PEM}`` to the enrolment service.

    ``identity`` is the SuperNode's, ``enrolment`` is ``host:port``. Answers come back as the service gave them. The
    guard before it lets in nobody but the SuperExec of the same site; one request is on its way at a time.
    """
    turn = asyncio.Lock()

    async def answer(scope: Scope, receive: Receive) -> _Answer:
        if scope["method"] != "POST":
            return _refusal(405, "malformed", "a renewal is a POST", [_CLOSE])
        body = await read_body(receive, MAX_BODY_BYTES)
        if body is None:
            return _refusal(
                413, "too-large", f"a renewal has at most {MAX_BODY_BYTES} bytes", [_CLOSE]
            )
        csr = _csr(body)
        if csr is None:
            return _refusal(400, "malformed", 'a renewal is JSON {"csr": PEM} and nothing else')
        if enrolment is None:
            return _refusal(
                404,
                "unavailable",
                "this SuperNode does not know the enrolment service; start it with --enrolment",
            )
        if turn.locked():
            return _refusal(
                429, "busy", "another renewal is on its way", [_CLOSE, (b"retry-after", b"1")]
            )
        async with turn:
            return await asyncio.to_thread(_ask, identity, enrolment, csr)

    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        given = await answer(scope, receive)
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(given.body)).encode()),
            *given.headers,
        ]
        await send({"type": "http.response.start", "status": given.status, "headers": headers})
        await send({"type": "http.response.body", "body": given.body})

    return application


def _csr(body: bytes) -> str | None:
    try:
        record = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or set(record) != {"csr"} or not isinstance(record["csr"], str):
        return None
    return record["csr"]


def _ask(identity: Identity, enrolment: str, csr: str) -> _Answer:
    try:
        response = ask(identity, enrolment, {"csr": csr, "role": Role.SUPEREXEC})
    except FleetError as error:
        return _refusal(503, "unavailable", str(error))
    after = response.headers.get("retry-after")
    headers = [(b"retry-after", after.encode())] if after else []
    return _Answer(response.status_code, response.content, headers)


def _refusal(status: int, code: str, detail: str, headers: Headers = ()) -> _Answer:
    return _Answer(status, json.dumps({"code": code, "detail": detail}).encode(), headers)
