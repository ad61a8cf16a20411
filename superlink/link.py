"""The SuperLink's end of a site's link measurement: it takes bytes and forgets them, or sends bytes.

``POST`` takes at most ``MAX_PROBE_BYTES``; ``GET ?bytes=N`` sends N of them. One piece is in memory at a time: uvicorn
stops reading from a peer that sends faster than it is read, and waits for one that reads slower than it is sent to.
"""

import os

from certs.guard import Receive, Scope, Send
from certs.link import MAX_PROBE_BYTES

# Random, so that no compressing tunnel on the way makes a link look faster than it is.
_PIECE = os.urandom(64 * 1024)

_OK, _BAD_REQUEST, _METHOD_NOT_ALLOWED, _TOO_LARGE = 200, 400, 405, 413


async def link(scope: Scope, receive: Receive, send: Send) -> None:
    """Serve one request of a measurement (ASGI)."""
    if scope["method"] == "POST":
        await _take(receive, send)
    elif scope["method"] == "GET":
        await _give(scope["query_string"], send)
    else:
        await _answer(send, _METHOD_NOT_ALLOWED)


async def _take(receive: Receive, send: Send) -> None:
    taken, more = 0, True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            return  # the peer has gone
        taken += len(message.get("body", b""))
        if taken > MAX_PROBE_BYTES:
            await _answer(send, _TOO_LARGE)
            return
        more = message.get("more_body", False)
    await _answer(send, _OK)


async def _give(query: bytes, send: Send) -> None:
    name, _, number = query.partition(b"=")
    # Seven digits hold the limit; int() of a number of any length would cost the peer nothing and us a lot.
    if name != b"bytes" or not number.isdigit() or len(number) > 7:
        await _answer(send, _BAD_REQUEST)
        return
    left = int(number)
    if left > MAX_PROBE_BYTES:
        await _answer(send, _TOO_LARGE)
        return
    headers = [(b"content-type", b"application/octet-stream"), (b"content-length", number)]
    await send({"type": "http.response.start", "status": _OK, "headers": headers})
    while left:
        piece = _PIECE[:left]
        left -= len(piece)
        await send({"type": "http.response.body", "body": piece, "more_body": True})
    await send({"type": "http.response.body"})


async def _answer(send: Send, status: int) -> None:
    headers = [(b"content-length", b"0")]
    if status != _OK:
        headers.append((b"connection", b"close"))  # what is left of the request is never read
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body"})
