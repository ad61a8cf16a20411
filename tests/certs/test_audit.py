"""The audit log: whole lines, bounded ones, and no secrets."""

import itertools
import json
import logging
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from certs.audit import Audit
from certs.errors import StorageError
from certs.invitation import Invitation, new_secret
from certs.roles import Peer


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that a test sets, in a list of one."""
    now = [1000.0]
    monkeypatch.setattr("certs.audit.time.monotonic", lambda: now[0])
    return now


@pytest.fixture
def operator(identity: Any) -> Peer:
    peer: Peer = identity("operator", "admin").peer
    return peer


def test_a_line_says_who_and_from_where(tmp_path: Path, operator: Peer) -> None:
    path = tmp_path / "new" / "audit.jsonl"
    Audit(path).record("invited", by=operator, address="10.0.0.7", site="lab-1", valid=True)
    (line,) = lines(path)
    assert line.pop("time").endswith("+00:00")
    assert line == {
        "event": "invited",
        "role": "operator",
        "name": "admin",
        "serial": f"{operator.serial:x}",
        "address": "10.0.0.7",
        "site": "lab-1",
        "valid": True,
    }
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


WRITER = """
import sys
from pathlib import Path
from certs.audit import Audit
audit = Audit(Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
for number in range(300):
    audit.record("renewed", site=sys.argv[2], number=number, text="x" * 290)
"""


def test_two_processes_append_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path), name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in ("one", "two")
    ]
    try:
        for writer in writers:
            assert writer.stdout is not None
            assert writer.stdout.readline() == "ready\n"
        for writer in writers:
            assert writer.stdin is not None
            writer.stdin.write("\n")
            writer.stdin.flush()
        assert [writer.wait(60) for writer in writers] == [0, 0]
    finally:
        for writer in writers:
            writer.kill()
            writer.communicate()
    written = lines(path)
    for name in ("one", "two"):
        assert [line["number"] for line in written if line["site"] == name] == list(range(300))
    # Two writers that took turns would prove nothing.
    turns = sum(a["site"] != b["site"] for a, b in itertools.pairwise(written))
    assert turns > 1, "the processes never wrote at the same time"


def test_refusals_are_limited_and_counted(tmp_path: Path, clock: list[float]) -> None:
    path = tmp_path / "audit.jsonl"
    audit = Audit(path)
    for number in range(1000):
        audit.record("handshake-refused", number=number)
    assert [line["number"] for line in lines(path)] == list(range(50))
    clock[0] += 0.2  # room for one more
    audit.record("handshake-refused", number=1000)
    audit.record("handshake-refused", number=1001)
    assert lines(path)[-1]["number"] == 1000
    assert lines(path)[-1]["suppressed"] == 950
    clock[0] += 3600  # no more than the burst is saved up
    for number in range(100):
        audit.record("handshake-refused", number=number)
    assert len(lines(path)) == 51 + 50
    assert lines(path)[51]["suppressed"] == 1
    assert "suppressed" not in lines(path)[52]


def test_a_flood_hides_nothing_else(tmp_path: Path, clock: list[float]) -> None:
    path = tmp_path / "audit.jsonl"
    audit = Audit(path)
    for _ in range(1000):
        audit.record("handshake-refused")
    audit.record("enrolment-refused")
    for _ in range(60):
        audit.record("revoked")
    events = [line["event"] for line in lines(path)]
    assert events[50:] == ["enrolment-refused"] + 60 * ["revoked"]


@pytest.mark.parametrize(
    "text", ["a\nb", "\x1b[2J", "\x7f", "\u2028", "\u202etxt", "\ud800", "x" * 10_000]
)
def test_a_strangers_text_stays_short_and_on_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "audit.jsonl"
    Audit(path).record("request-refused", path=text)
    assert len(path.read_bytes().split(b"\n")) == 2
    shown = lines(path)[0]["path"]
    assert shown.isprintable()
    assert 0 < len(shown) <= 300


def test_a_pasted_secret_is_removed(tmp_path: Path, identity: Any) -> None:
    path = tmp_path / "audit.jsonl"
    invitation = Invitation("lab", "lab-1", "host:9093", "0" * 64, 2_000_000_000, new_secret())
    own = identity("operator", "admin")
    audit = Audit(path)
    audit.record("request-refused", path=f"/v1/invitations/{invitation.encode()}")
    audit.record("request-refused", path=own.key.read_text())
    body = invitation.encode().removeprefix("vlafleet1.")
    key = "".join(own.key.read_text().splitlines()[1:-1])
    for line in path.read_text().splitlines():
        assert "[removed]" in line
        for secret in (body, key):
            assert not any(secret[i : i + 16] in line for i in range(len(secret) - 16))


def test_objects_are_not_written(tmp_path: Path) -> None:
    """An object's text could hold what it knows."""
    path = tmp_path / "audit.jsonl"
    with pytest.raises(TypeError):
        Audit(path).record("invited", invitation=new_secret())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'invitd' is not an audit event"):
        Audit(path).record("invitd")
    assert path.read_bytes() == b""


def test_a_renamed_log_goes_on_in_a_new_one(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    audit = Audit(path)
    audit.record("revoked", site="one")
    path.rename(tmp_path / "audit.jsonl.1")
    audit.record("revoked", site="two")
    assert [line["site"] for line in lines(path)] == ["two"]
    assert [line["site"] for line in lines(tmp_path / "audit.jsonl.1")] == ["one"]


def test_half_a_line_spoils_no_other(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    audit = Audit(path)
    audit.record("revoked", site="one")
    with path.open("ab") as file:
        file.write(b'{"time": "20')
    audit.record("revoked", site="two")
    kept = path.read_text().splitlines()
    assert len(kept) == 3
    assert json.loads(kept[2])["site"] == "two"


def test_a_line_that_cannot_be_written_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "audit.jsonl"
    audit = Audit(path)
    path.unlink()
    path.mkdir()
    with caplog.at_level(logging.ERROR, "vlafleet.audit"):
        audit.record("revoked", site="one")
    assert f"{path} cannot be written (Is a directory)" in caplog.text
    assert '"site": "one"' in caplog.text


def test_no_log_no_service() -> None:
    with pytest.raises(StorageError, match=r"the audit log /proc/none/audit\.jsonl cannot be"):
        Audit(Path("/proc/none/audit.jsonl"))
