"""The commands as a site's people type them: what they print, their exit codes, and where an invitation is not seen."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import vlafleet
from certs.invitation import Invitation
from supernode.findings import Report, fail, warning
from supernode.site import Site
from tests.joining import FEDERATION, Fleet, joinable

NAME = "lab-7"
Command = Callable[..., int]


@pytest.fixture
def fleet(
    tmp_path: Path, free_port: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Fleet]:
    monkeypatch.setattr("supernode.join.default_mode", lambda: "native")
    with joinable(tmp_path, free_port, monkeypatch.setattr) as made:
        yield made


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run ``vlafleet site`` in a directory of the test's own; return its exit code."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)

    def run(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["vlafleet", "site", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            vlafleet.main()
        assert isinstance(ended.value.code, int)
        return ended.value.code

    return run


def test_a_site_s_life(fleet: Fleet, site: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert site("join", fleet.invite(NAME).encode(), "--dataset", "recordings") == 0
    made = Site.load(Path("vlafleet-lab-7"))
    assert (made.device, made.mode, made.dataset) == ("cpu", "native", f"{Path.cwd()}/recordings")
    assert f"{NAME} is online in {FEDERATION}" in capsys.readouterr().out
    assert site("check") == 0
    assert "is fit" in capsys.readouterr().out
    assert site("check", "--json") == 0
    assert json.loads(capsys.readouterr().out)["dataset"]["episodes"] == 4
    assert site("stop") == 0
    assert site("stop", "--directory", made.directory) == 0
    assert capsys.readouterr().out == f"{NAME} stopped\n{NAME} was not running\n"


def test_what_is_not_said_again_stays(fleet: Fleet, site: Command) -> None:
    text = fleet.invite(NAME).encode()
    assert site("join", text, "--dataset", "x", "--device", "cuda:1", "--native") == 0
    assert site("join", text, "--dataset", "x") == 0
    assert Site.load(Path("vlafleet-lab-7")).device == "cuda:1"
    assert len(fleet.starts) == 1


def test_an_invitation_is_read_where_nobody_sees_it(
    fleet: Fleet, site: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Standard input, or a variable that what is started does not inherit."""
    text = fleet.invite(NAME).encode()
    read, write = os.pipe()
    os.write(write, f"{text[:40]}\n  {text[40:]}\n".encode())
    os.close(write)
    with os.fdopen(read) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert site("join", "-", "--dataset", "x") == 0
    monkeypatch.setenv("VLAFLEET_INVITATION", text)
    seen: list[str | None] = []
    monkeypatch.setattr(
        "supernode.join.join", lambda *_: seen.append(os.environ.get("VLAFLEET_INVITATION"))
    )
    assert site("join", "--dataset", "x") == 0
    assert seen == [None]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["vlafleet1.AAAA", "--dataset", "x"], 20, "cut or altered"),
        (["hello", "--dataset", "x"], 20, "this is not an invitation"),
        (["{invitation}"], 2, "Missing option '--dataset'"),
        (["--dataset", "x"], 2, "Missing argument 'INVITATION'"),
        (["{invitation}", "--dataset", "x", "--helm", "--native"], 2, "exclude each other"),
        (["{invitation}", "--dataset", "x", "--device", "tpu"], 17, "the device 'tpu'"),
        (["{invitation}", "--dataset", "", "--native"], 17, "the dataset ''"),
    ],
)
def test_a_wrong_command_is_one_sentence(
    fleet: Fleet,
    site: Command,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    words: str,
) -> None:
    invitation: Invitation = fleet.invite(NAME)
    text = invitation.encode()
    assert site("join", *(each.format(invitation=text) for each in arguments)) == code
    captured = capsys.readouterr()
    assert words in captured.err
    assert text[-30:] not in captured.out + captured.err
    assert list(Path().iterdir()) == []
    assert fleet.asked == []


def test_a_check_exits_as_its_first_fail(
    fleet: Fleet,
    site: Command,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from certs.errors import ClockError, DatasetError

    assert site("join", fleet.invite(NAME).encode(), "--dataset", "x") == 0
    findings = [
        warning("link", "the link is slow", "Use codec=int4"),
        fail("clock", "the clock is 9 s ahead", "Run timedatectl set-ntp true", ClockError),
        fail("dataset", "it is empty", "Record some", DatasetError),
    ]
    monkeypatch.setattr("supernode.preflight.check", lambda *_: Report(NAME, findings, None, None))
    capsys.readouterr()
    for options in ((), ("--json",)):
        assert site("check", *options) == 21
        out, err = capsys.readouterr()
        assert "the link is slow" in out
        assert "it is empty" in out
        assert err == "vlafleet: the clock is 9 s ahead: run timedatectl set-ntp true\n"


def test_nothing_to_check_stop_or_run(
    site: Command, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for command in ("check", "stop", "run"):
        assert site(command) == 17
        assert "name it with --directory" in capsys.readouterr().err
        assert site(command, "--directory", tmp_path) == 17
        assert "is no site's directory" in capsys.readouterr().err


def test_helm_is_stopped_by_helm(
    fleet: Fleet, site: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    assert site("join", fleet.invite(NAME).encode(), "--dataset", "/x", "--helm") == 0
    assert site("stop") == 17
    assert "helm uninstall" in capsys.readouterr().err


def test_joining_by_files(fleet: Fleet, site: Command, capsys: pytest.CaptureFixture[str]) -> None:
    from superlink.members import candidate

    arguments = ["--federation", FEDERATION, "--dataset", "/x"]
    assert site("request", NAME, *arguments) == 0
    record = json.loads(Path("request.json").read_text())
    membership = fleet.members.approve(candidate(record, FEDERATION))
    Path("membership.json").write_text(json.dumps(membership.to_json()))
    assert site("accept", "membership.json") == 2
    assert site("accept", "membership.json", "--fingerprint", "00" * 32) == 10
    assert "another authority" in capsys.readouterr().err
    assert site("accept", "membership.json", "--fingerprint", fleet.fingerprint) == 0
    assert f"{NAME} is online" in capsys.readouterr().out
    assert site("request", "superlink", *arguments) == 17
