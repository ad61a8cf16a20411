"""The closing table says what was measured, and nothing that was not."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from app.journal import Journal
from app.report import cli
from certs.errors import RunFailedError


def result(loss: float | None, state: str = "completed", reason: str | None = None) -> Any:
    return {"state": state, "reason": reason, "loss": loss, "frames": 10}


def record(number: int, losses: dict[str, float | None], *, committed: bool = True) -> Any:
    known = [loss for loss in losses.values() if loss is not None]
    return {
        "round": number,
        "committed": committed,
        "reason": None if committed else "no valid update: the last model stays",
        "checkpoint": f"checkpoints/round-{number:04d}" if committed else None,
        "sites": {
            site: {
                "train": result(0.5) if number else None,
                "evaluate": result(loss)
                if loss is not None
                else result(None, "timeout", "no reply within 600 s"),
            }
            for site, loss in losses.items()
        },
        "aggregate": {"loss": sum(known) / len(known) if known else None},
    }


def run(tmp_path: Path, rounds: list[Any], asked: int = 2) -> Path:
    journal = Journal(tmp_path, "17")
    journal.describe(
        {"run": "17", "config": {"rounds": asked}, "sites": {"site-a": {}, "site-b": {}}}
    )
    for one in rounds:
        journal.append(one)
    return journal.directory


def printed(directory: Path) -> tuple[str, BaseException | None]:
    done = CliRunner().invoke(cli, [str(directory)], env={"COLUMNS": "80"})
    return done.output, done.exception


def cells(output: str, name: str) -> list[str]:
    (line,) = [line for line in output.splitlines() if name in line]
    return [cell.strip() for cell in re.split("[│┃|]", line.strip("│┃| \n"))]


def test_losses_and_their_change_are_in_the_table(tmp_path: Path) -> None:
    directory = run(
        tmp_path,
        [
            record(0, {"site-a": 2.0, "site-b": 1.0}),
            record(1, {"site-a": 1.5, "site-b": 1.1}),
            record(2, {"site-a": 1.0, "site-b": 1.2}),
        ],
    )
    output, error = printed(directory)
    assert error is None
    assert cells(output, "round 0") == ["site", "round 0", "round 1", "round 2", "change"]
    assert cells(output, "site-a") == ["site-a", "2.000", "1.500", "1.000", "-50.0 %"]
    assert cells(output, "site-b") == ["site-b", "1.000", "1.100", "1.200", "+20.0 %"]
    assert cells(output, "all sites") == ["all sites", "1.500", "1.300", "1.100", "-26.7 %"]
    assert str(directory / "checkpoints/round-0002") in output


def test_what_was_not_measured_is_a_dash(tmp_path: Path) -> None:
    directory = run(
        tmp_path,
        [
            record(0, {"site-a": 2.0, "site-b": 1.0}),
            record(1, {"site-a": 1.0, "site-b": None}),
            record(2, {"site-a": 1.0, "site-b": 0.5}),
        ],
    )
    output, error = printed(directory)
    assert error is None
    assert cells(output, "site-b  ") == ["site-b", "1.000", "-", "0.500", "-50.0 %"]
    assert cells(output, "all sites")[2] == "-"
    assert "round 1 evaluate: site-b timeout, no reply within 600 s" in output


def test_a_run_cut_short_is_shown_and_fails(tmp_path: Path) -> None:
    directory = run(
        tmp_path,
        [
            record(0, {"site-a": 2.0, "site-b": 1.0}),
            record(1, {"site-a": 1.0, "site-b": 0.5}),
            record(2, {}, committed=False),
        ],
        asked=3,
    )
    output, error = printed(directory)
    assert isinstance(error, RunFailedError)
    assert str(error) == f"{directory} has 1 of the 3 rounds it was asked for."
    assert "round 2: no valid update: the last model stays" in output
    assert str(directory / "checkpoints/round-0001") in output
    assert cells(output, "site-a")[-1] == "-50.0 %"


def test_a_long_run_still_fits(tmp_path: Path) -> None:
    rounds = [record(n, {"site-a": 2.0 - n / 100, "site-b": 1.0}) for n in range(31)]
    output, error = printed(run(tmp_path, rounds, asked=30))
    assert error is None
    assert cells(output, "round 0")[1:] == [
        *("round 0", "round 27", "round 28", "round 29", "round 30", "change")
    ]
    assert all(len(line) <= 80 for line in output.splitlines() if "│" in line)


def test_a_run_that_never_started_says_so(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "18")
    journal.describe({"run": "18", "config": {"rounds": 3}, "sites": None})
    _, error = printed(journal.directory)
    assert isinstance(error, RunFailedError)
    assert "has 0 of the 3 rounds" in str(error)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("config.json", None),
        ("config.json", "{"),
        ("config.json", '{"schema": 1}'),
        ("config.json", '{"schema": 1, "run": "17", "sites": 3, "config": {"rounds": 1}}'),
        ("rounds.jsonl", '{"schema": 1, "round": 0}\n'),
        ("rounds.jsonl", "nonsense\n"),
    ],
)
def test_a_damaged_record_is_one_sentence(tmp_path: Path, name: str, text: str | None) -> None:
    directory = run(tmp_path, [record(0, {"site-a": 2.0, "site-b": 1.0})])
    (directory / name).unlink()
    if text is not None:
        (directory / name).write_text(text)
    _, error = printed(directory)
    assert isinstance(error, RunFailedError)
    assert str(directory) in str(error)
    assert "\n" not in str(error)


def test_it_needs_no_torch() -> None:
    code = "import sys, app.report; print([m for m in ('torch', 'lerobot') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []
