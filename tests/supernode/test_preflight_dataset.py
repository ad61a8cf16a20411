"""What the app's own check says becomes findings, and so does a check that says nothing."""

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from certs.errors import ToolError
from supernode import dataset
from supernode.dataset import Look, look
from supernode.site import Mode, Site

DATASET = {
    "episodes": 12,
    "held_out_episodes": 3,
    "frames": 4800,
    "fps": 30,
    "cameras": ["top", "wrist"],
    "bytes": 1_234_000_000,
}
ESTIMATE = dict.fromkeys(dataset._ESTIMATE, 1)


def a_site(tmp_path: Path, mode: Mode = "native") -> Site:
    return Site(
        *(tmp_path, "test", "site-a", "superlink:9092", "enrol:9093"),
        *("/data/pick", "cpu", mode),
    )


type Answering = Callable[[str], Look]


@pytest.fixture
def answering(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Answering:
    """Have a real process do what a line of Python says, in the app's place."""

    def run(code: str) -> Look:
        monkeypatch.setattr(dataset, "_command", lambda *_: [sys.executable, "-c", code])
        return look(a_site(tmp_path))

    return run


def answer(fit: bool, findings: list[str], exit_code: int, data: Any, estimate: Any) -> str:
    record = {
        "uri": "/data/pick",
        "fit": fit,
        "findings": findings,
        "exit_code": exit_code,
        "dataset": data,
        "estimate": estimate,
    }
    # A library may say something first, on the other stream.
    return (
        f"import sys; print('loading', file=sys.stderr); print({json.dumps(record)!r}); "
        f"sys.exit({exit_code})"
    )


def test_a_dataset_that_is_fit(answering: Answering) -> None:
    found = answering(answer(True, [], 0, DATASET, ESTIMATE))
    (finding,) = found.findings
    assert (finding.name, finding.level, finding.remedy, finding.exit_code) == (
        *("dataset", "ok"), None, 0,
    )  # fmt: skip
    assert finding.sentence == (
        "/data/pick: 12 episodes, 3 of them held out, 4800 frames at 30 a second, cameras top, wrist, 1.2 GB"
    )
    assert (found.dataset, found.estimate) == (DATASET, ESTIMATE)


def test_each_of_its_findings_is_one(answering: Answering) -> None:
    sentences = ["episode 3 holds values that are not finite: record it again.", "no stats.json"]
    found = answering(answer(False, sentences, 12, DATASET, ESTIMATE))
    assert [each.sentence for each in found.findings] == sentences
    assert {(each.name, each.level, each.exit_code) for each in found.findings} == {
        ("dataset", "fail", 12)
    }
    assert all("vlafleet data check" in (each.remedy or "") for each in found.findings)
    assert (found.dataset, found.estimate) == (DATASET, ESTIMATE)


def test_findings_of_a_fit_dataset_warn(answering: Answering) -> None:
    found = answering(answer(True, ["the wrist camera is dark"], 0, DATASET, None))
    assert [(each.level, each.exit_code) for each in found.findings] == [("warning", 0)]
    assert found.estimate is None


@pytest.mark.parametrize(("code", "expected"), [(12, 12), (18, 18), (19, 19), (3, 12)])
def test_the_exit_code_is_the_answers(answering: Answering, code: int, expected: int) -> None:
    (finding,) = answering(answer(False, ["it is missing"], code, None, None)).findings
    assert finding.exit_code == expected


@pytest.mark.parametrize(
    ("code", "sentence", "expected"),
    [
        ("import sys; print('vlafleet: no space left', file=sys.stderr); sys.exit(19)",
         "the check ended with code 19: no space left", 19),
        ("raise RuntimeError('boom')", "the check ended with code 1: RuntimeError: boom", 14),
        ("import os; os.kill(os.getpid(), 9)", "the check ended with code -9: it said nothing", 14),
        ("print('not json')", "the check ended with code 0: it said nothing", 14),
        ("print('{}')", "the check ended with code 0: it said nothing", 14),
        ("print('[1]')", "the check ended with code 0: it said nothing", 14),
        (answer(False, [], 12, None, None), "the check ended with code 12: loading", 12),
        (answer(True, [], 0, DATASET, {"device": "cpu"}), "the check ended with code 0: loading", 14),
        (answer(True, [], 0, None, None), "the check ended with code 0: loading", 14),
    ],
)  # fmt: skip
def test_a_check_that_gives_no_answer(
    answering: Answering, code: str, sentence: str, expected: int
) -> None:
    found = answering(code)
    (finding,) = found.findings
    assert (finding.level, finding.sentence) == ("fail", sentence)
    assert finding.exit_code == expected
    assert finding.remedy is not None
    assert (found.dataset, found.estimate) == (None, None)


def test_a_check_that_does_not_end(answering: Answering, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "_PATIENCE_SECONDS", 0.2)
    (finding,) = answering("import time; time.sleep(60)").findings
    assert (finding.level, finding.exit_code) == ("fail", 12)
    assert finding.sentence == "the check of /data/pick did not end within 0 minutes"


def test_a_program_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "_command", lambda *_: ["no-such-docker", "compose"])
    (finding,) = look(a_site(tmp_path)).findings
    assert (finding.level, finding.exit_code) == ("fail", 14)
    assert finding.sentence == "no-such-docker cannot be run: No such file or directory"


def test_a_command_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> list[str]:
        raise ToolError("docker is not installed")

    monkeypatch.setattr(dataset, "_command", refuse)
    (finding,) = look(a_site(tmp_path)).findings
    assert (finding.level, finding.sentence, finding.exit_code) == (
        *("fail", "docker is not installed"), 14,
    )  # fmt: skip


def test_the_check_finds_what_the_sites_processes_keep(
    answering: Answering, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLAFLEET_HOME", "/elsewhere")
    code = "import os, sys; print(os.environ['VLAFLEET_HOME'], file=sys.stderr)"
    (finding,) = answering(code).findings
    assert finding.sentence == f"the check ended with code 0: {tmp_path}"


def test_the_estimate_is_the_apps() -> None:
    from app.estimate import Estimate

    assert set(Estimate.__dataclass_fields__) >= dataset._ESTIMATE


@pytest.fixture
def _without_lerobot(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        "supernode.dataset.importlib.util.find_spec",
        lambda name: None if name == "lerobot" else found(name),
    )


@pytest.mark.usefixtures("_without_lerobot")
def test_native_needs_the_apps_packages(tmp_path: Path) -> None:
    (finding,) = look(a_site(tmp_path)).findings
    assert (finding.level, finding.exit_code) == ("fail", 14)
    assert "requirements/app.txt" in (finding.remedy or "")


@pytest.mark.usefixtures("_without_lerobot")
def test_a_cluster_checks_it_itself(tmp_path: Path) -> None:
    (finding,) = look(a_site(tmp_path, "helm")).findings
    assert (finding.level, finding.exit_code) == ("warning", 0)
    assert finding.sentence.startswith("/data/pick was not checked")
    assert "The site checks it when a run begins" in (finding.remedy or "")


def test_native_and_helm_ask_the_app_beside_them(tmp_path: Path) -> None:
    for mode in ("native", "helm"):
        assert dataset._command(a_site(tmp_path, mode), ["rounds=1 codec=int4"]) == [
            *(sys.executable, "-m", "vlafleet", "data", "check", "/data/pick"),
            *("--json", "--device", "cpu", "--run-config", "rounds=1 codec=int4"),
        ]


@pytest.mark.usefixtures("_without_lerobot")
def test_compose_asks_the_app_in_its_container(tmp_path: Path) -> None:
    command = dataset._command(a_site(tmp_path, "compose"), ["rounds=1"])
    assert command[:2] == ["docker", "compose"]
    assert command[-5:] == ["--json", "--device", "cpu", "--run-config", "rounds=1"]
    assert dataset._without_app(a_site(tmp_path, "compose")) is None
