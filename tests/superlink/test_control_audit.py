"""The audit around Flower's start and stop of a run: a line when something happened, and nothing changed."""

import asyncio
import json
from collections.abc import Callable, MutableMapping
from pathlib import Path
from typing import Any

import pytest
from flwr.proto.control_pb2 import (
    StartRunResponse,
    StopRunRequest,
    StopRunResponse,
)

from certs.audit import Audit
from certs.guard import Application, Receive, Scope, Send
from certs.identity import Identity
from certs.roles import Role
from superlink.run_audit import started, stopped

Message = MutableMapping[str, Any]
RUN = 2**63 + 5


def flower(status: int, parts: list[bytes], seen: list[Message]) -> Application:
    """An application that reads the request and answers in parts."""

    async def app(_scope: Scope, receive: Receive, send: Send) -> None:
        more = True
        while more:
            message = await receive()
            seen.append(message)
            more = message.get("more_body", False)
        await send({"type": "http.response.start", "status": status, "headers": [(b"a", b"b")]})
        for number, part in enumerate(parts, 1):
            more = number < len(parts)
            await send({"type": "http.response.body", "body": part, "more_body": more})

    return app


@pytest.fixture
def ask(tmp_path: Path, identity: Callable[[Role, str], Identity]) -> Callable[..., list[Any]]:
    """Send a request through the audit; return the lines, of which the last answer was to wait."""

    def send_through(
        wrap: Callable[[Application, Audit], Application],
        request: list[bytes],
        answer: list[bytes],
        status: int = 200,
    ) -> list[Any]:
        log = tmp_path / "audit.jsonl"
        sent = [
            {"type": "http.request", "body": part, "more_body": i < len(request)}
            for i, part in enumerate(request, 1)
        ]
        waiting = list(sent)
        seen: list[Message] = []
        received: list[Message] = []
        at_the_end: list[str] = []

        async def receive() -> Message:
            return waiting.pop(0)

        async def send(message: Message) -> None:
            received.append(message)
            if message["type"] == "http.response.body" and not message["more_body"]:
                at_the_end.extend(log.read_text().splitlines())

        app = wrap(flower(status, answer, seen), Audit(log))
        scope = {
            "type": "http",
            "client": ("192.0.2.7", 4000),
            "state": {"peer": identity(Role.OPERATOR, "admin").peer},
        }
        asyncio.run(app(scope, receive, send))  # type: ignore[arg-type]
        assert seen == sent
        assert received[0] == {
            "type": "http.response.start",
            "status": status,
            "headers": [(b"a", b"b")],
        }
        assert [message["body"] for message in received[1:]] == answer
        assert at_the_end == log.read_text().splitlines()
        return [json.loads(line) for line in at_the_end]

    return send_through


def test_a_start(ask: Callable[..., list[Any]]) -> None:
    answer = StartRunResponse(run_id=RUN, note="x" * 300).SerializeToString()
    bundle = [bytes(100_000) for _ in range(3)]
    (line,) = ask(started, bundle, [answer[:7], answer[7:], b""])
    assert line["event"] == "run-started"
    assert line["run"] == str(RUN)
    assert line["name"] == "admin"
    assert line["address"] == "192.0.2.7"


@pytest.mark.parametrize(
    ("status", "answer"),
    [(200, StartRunResponse(note="no").SerializeToString()), (400, b'{"code": 1}'), (500, b"")],
)
def test_nothing_started(ask: Callable[..., list[Any]], status: int, answer: bytes) -> None:
    assert ask(started, [b""], [answer], status) == []


def test_a_stop(ask: Callable[..., list[Any]]) -> None:
    request = StopRunRequest(run_id=RUN).SerializeToString()
    answer = StopRunResponse(success=True).SerializeToString()
    (line,) = ask(stopped, [request[:2], request[2:]], [answer])
    assert (line["event"], line["run"]) == ("run-stopped", str(RUN))


def test_nothing_stopped(ask: Callable[..., list[Any]]) -> None:
    request = StopRunRequest(run_id=RUN).SerializeToString()
    assert ask(stopped, [request], [StopRunResponse().SerializeToString()]) == []
    assert ask(stopped, [request], [b"{}"], 404) == []


def test_padding_does_not_hide_a_stop(ask: Callable[..., list[Any]]) -> None:
    """Protobuf passes over fields that it does not know; field 15, a string of 100,000 bytes."""
    request = StopRunRequest(run_id=RUN).SerializeToString()
    padded = request + b"\x7a\xa0\x8d\x06" + bytes(100_000)
    assert StopRunRequest.FromString(padded).run_id == RUN
    (line,) = ask(stopped, [padded], [StopRunResponse(success=True).SerializeToString()])
    assert line["run"] == "unknown"
