"""Processes beside each other: how one that ended is reported, and how their logs stay bounded."""

from pathlib import Path

import pytest

from certs import processes
from certs.errors import RunFailedError
from certs.processes import Processes, last_line, trim


def test_a_process_that_ends_is_named_with_its_last_line_and_its_log_grows(tmp_path: Path) -> None:
    running = Processes(tmp_path)
    for _ in range(2):
        # An identity that is not there: it ends by itself.
        running.start("superexec", "superexec", "--identity", str(tmp_path), "--address", "x:1")
        running.running["superexec"].wait(60)
        with pytest.raises(
            RunFailedError, match=r"superexec ended with exit code 10: vlafleet: .*superexec\.log"
        ):
            running.check()
    running.stop()
    running.check()
    assert running.log("superexec").read_text().count("vlafleet: ") == 2


def test_a_large_log_is_kept_once_and_written_on_from_its_top(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "_LOG_BYTES", 10)
    log = tmp_path / "x.log"
    trim(log)
    with log.open("ab", buffering=0) as writer:
        writer.write(b"the first\n")
        trim(log)
        assert log.read_bytes() == b"the first\n"
        writer.write(b"the second\n")
        trim(log)
        writer.write(b"the third\n")
    assert log.read_bytes() == b"the third\n"
    assert (tmp_path / "x.log.1").read_bytes() == b"the first\nthe second\n"


def test_the_last_line_of_a_large_log_is_found_at_its_end(tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    log.touch()
    assert last_line(log) == ""
    log.write_bytes(b"\xff long\n" * 1_000_000 + b"  the last one \n\n")
    assert last_line(log) == "the last one"
    log.write_text(
        '{"level": "ERROR", "message": "the sentence", "exception": "%s"}\n' % ("x" * 9999)
    )
    assert last_line(log) == "the sentence"
