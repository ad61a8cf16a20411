"""A SuperLink that logs JSON: Flower's lines, uvicorn's and ours, whatever a peer sends and however it ends."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from certs import logs
from certs.roles import Role
from tests.federation import running_superlink

pytestmark = pytest.mark.federation


def test_every_line_is_an_object(
    tmp_path: Path, free_port: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(logs.FORMAT, "json")
    with running_superlink(tmp_path, free_port()) as running:
        hostile = "/v1/%0A%1B%5B31m%22%7D"
        assert running.ask(hostile, running.identity(Role.SITE, "site-a")).refused
        assert running.ask("/v1/control/list-runs", None).refused_by_tls
    written = running.log.read_text().splitlines()
    assert all(line.isascii() and line.isprintable() for line in written)
    lines = [json.loads(line) for line in written]
    assert {line["role"] for line in lines} == {"superlink"}
    assert {"flwr", "uvicorn.error", "vlafleet.guard", "vlafleet.superlink"} <= {
        line["logger"] for line in lines
    }
    assert all(line["message"] for line in lines)
