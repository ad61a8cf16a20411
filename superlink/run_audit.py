"""The audit of runs: who started or stopped one, and from where.

Around Flower's endpoints, which it changes in nothing. The line is on the disk before the asker has the answer.
"""

import asyncio
from collections.abc import Callable, MutableMapping
from typing import Any

from certs.audit import Audit
from certs.guard import Application, Receive, Scope, Send, client_address

START_PATH = "/v1/control/start-run"
STOP_PATH = "/v1/control/stop-run"
# Answers, and the request to stop, are a few numbers; of anything longer (a bundle) nothing is kept.
_MAX_BYTES = 64 << 10
_OK = 200


def started(app: Application, audit: Audit) -> Application:
    """Return Flower's endpoint ``START_PATH`` that records every run it starts."""

    def run(_request: bytes | None, answer: bytes | None) -> str | None:
        from flwr.proto.control_pb2 import StartRunResponse

        response = StartRunResponse.FromString(answer or b"")
        return str(response.run_id) if response.HasField("run_id") else None

    return _recorded(app, audit, "run-started", run)


def stopped(app: Application, audit: Audit) -> Application:
    """Return Flower's endpoint ``STOP_PATH`` that records every run it stops."""

    def run(request: bytes | None, answer: bytes | None) -> str | None:
        from flwr.proto.control_pb2 import StopRunRequest, StopRunResponse

        if not StopRunResponse.FromString(answer or b"").success:
            return None
        # A request that was padded beyond what is kept leaves a line all the same.
        return "unknown" if request is None else str(StopRunRequest.FromString(request).run_id)

    return _recorded(app, audit, "run-stopped", run)


def _recorded(
    app: Application,
    audit: Audit,
    event: str,
    run: Callable[[bytes | None, bytes | None], str | None],
) -> Application:
    """Return ``app`` with a line for each answer in which ``run`` (of request and answer) finds a run."""

    async def recorded(scope: Scope, receive: Receive, send: Send) -> None:
        request, answer = _Body(), _Body()
        status = 0

        async def received() -> MutableMapping[str, Any]:
            message = await receive()
            request.add(message)
            return message

        async def sent(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            status = message.get("status", status)
            answer.add(message)
            last = message["type"] == "http.response.body" and not message.get("more_body")
            if last and status == _OK:
                found = run(request.data, answer.data)
                if found is not None:
                    by, address = scope["state"]["peer"], client_address(scope)
                    await asyncio.to_thread(audit.record, event, by=by, address=address, run=found)
            await send(message)

        await app(scope, received, sent)

    return recorded


class _Body:
    """A body as it passes; ``data`` is None once it is too long to be kept."""

    def __init__(self) -> None:
        self.data: bytes | None = b""

    def add(self, message: MutableMapping[str, Any]) -> None:
        """Keep a message's part."""
        part = message.get("body", b"")
        if self.data is not None:
            self.data = self.data + part if len(self.data) + len(part) <= _MAX_BYTES else None
