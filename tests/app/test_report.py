"""The closing table and the page say what was measured, and nothing that was not."""

import base64
import json
import re
import subprocess
import sys
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from app.journal import SCHEMA, Journal
from app.report import cli, write_report
from certs.errors import RunFailedError, StorageError
from tests.conftest import Vlafleet
from tests.records import SITE, record, run


def printed(*arguments: object) -> tuple[str, BaseException | None]:
    done = CliRunner().invoke(cli, [*map(str, arguments)], env={"COLUMNS": "80"})
    return done.output, done.exception


def cells(output: str, name: str) -> list[str]:
    (line,) = [line for line in output.splitlines() if name in line]
    return [cell.strip() for cell in re.split("[│┃|]", line.strip("│┃| \n"))]


class Page(HTMLParser):
    """A report as a browser takes it apart: elements, and the text of tables' cells by heading."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.style = ""
        self._open = ""
        self._heading = ""
        self.text = ""
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._open = tag
        if tag in ("h1", "h2", "summary"):
            self._heading = ""
        elif tag == "table":
            self.tables[self._heading] = []
        elif tag == "tr":
            self.tables[self._heading].append([])
        elif tag in ("th", "td"):
            self.tables[self._heading][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag == self._open:
            self._open = ""

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._open == "style":
            self.style += data
        elif self._open in ("h1", "h2", "summary"):
            self._heading += data
        elif self._open in ("th", "td"):
            self.tables[self._heading][-1][-1] += data

    def pictures(self) -> list[str]:
        """The SVG documents in the page."""
        sources = [str(attrs["src"]) for tag, attrs in self.elements if tag == "img"]
        prefix = "data:image/svg+xml;base64,"
        assert all(source.startswith(prefix) for source in sources)
        return [base64.b64decode(source.removeprefix(prefix)).decode() for source in sources]


def labels(picture: str) -> list[str]:
    """The texts of an SVG document."""
    return [
        "".join(element.itertext()).strip()
        for element in ElementTree.fromstring(picture).iter("{http://www.w3.org/2000/svg}text")  # noqa: S314 - ours
    ]


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
    assert str(directory / "report.html") in output


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


def test_the_best_model_is_named_where_it_is_not_the_last(tmp_path: Path) -> None:
    losses = (2.0, 1.0, 1.2)
    directory = run(tmp_path, [record(n, {"site-a": loss}) for n, loss in enumerate(losses)])
    output, _ = printed(directory)
    assert f"Best model, of round 1:\n{directory / 'checkpoints/round-0001'}\n" in output
    assert f"Model of round 2:\n{directory / 'checkpoints/round-0002'}\n" in output


def test_a_run_cut_short_is_shown_and_fails(tmp_path: Path, vlafleet: Vlafleet) -> None:
    directory = run(
        tmp_path,
        [
            record(0, {"site-a": 2.0, "site-b": 1.0}),
            record(1, {"site-a": 1.0, "site-b": 0.5}),
            record(2, {"site-a": None, "site-b": None}, committed=False),
        ],
        rounds=3,
    )
    output, error = printed(directory)
    assert isinstance(error, RunFailedError)
    assert str(error) == f"{directory} has 1 of the 3 rounds it was asked for."
    assert "round 2: no valid update: the last model stays" in output
    assert str(directory / "checkpoints/round-0001") in output
    assert cells(output, "site-a  ")[-1] == "-50.0 %"
    assert (directory / "report.html").is_file()
    assert vlafleet("report", directory).returncode == 16


def test_only_early_stopping_excuses_missing_rounds(tmp_path: Path) -> None:
    rounds = [record(n, {"site-a": 2.0 - n / 10}) for n in range(3)]
    for number, reason in enumerate(("early stopping", "completed", "No site came online.")):
        ended = {"at": "2026-01-01T01:00:00+00:00", "reason": reason}
        _, error = printed(run(tmp_path, rounds, name=str(number), rounds=9, ended=ended))
        assert (error is None) == (reason == "early stopping")


def test_a_long_run_still_fits(tmp_path: Path) -> None:
    rounds = [record(n, {"site-a": 2.0 - n / 100, "site-b": 1.0}) for n in range(31)]
    output, error = printed(run(tmp_path, rounds))
    assert error is None
    assert cells(output, "round 0")[1:] == [
        *("round 0", "round 27", "round 28", "round 29", "round 30", "change")
    ]
    assert all(len(line) <= 80 for line in output.splitlines() if "│" in line)


def test_a_run_that_never_started_says_so(tmp_path: Path) -> None:
    directory = run(tmp_path, [], rounds=3)
    _, error = printed(directory)
    assert isinstance(error, RunFailedError)
    assert "has 0 of the 3 rounds" in str(error)
    assert "0 of 3" in Page(directory / "report.html").text


def test_a_run_without_sites_has_a_report(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "18")
    about = {"run": "18", "config": {"rounds": 3}, "sites": None, "model": None, "ended": None}
    journal.describe({**about, "started_at": "2026-01-01T00:00:00+00:00"})
    journal.close()
    assert "0 of 3" in Page(write_report(journal.directory)).text


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("config.json", None),
        ("config.json", "{"),
        ("config.json", f'{{"schema": {SCHEMA}}}'),
        ("config.json", f'{{"schema": {SCHEMA}, "run": "17", "sites": 3, "config": {{"rounds": 1}}}}'),
        ("config.json", '{"schema": 1}'),
        ("rounds.jsonl", f'{{"schema": {SCHEMA}, "round": 0}}\n'),
        ("rounds.jsonl", "nonsense\n"),
    ],
)  # fmt: skip
def test_a_damaged_record_is_one_sentence(tmp_path: Path, name: str, text: str | None) -> None:
    directory = run(tmp_path, [record(0, {"site-a": 2.0, "site-b": 1.0})])
    (directory / name).unlink()
    if text is not None:
        (directory / name).write_text(text)
    for caught in (printed(directory)[1], _error(directory)):
        assert isinstance(caught, RunFailedError)
        assert str(directory) in str(caught)
        assert "\n" not in str(caught)


def _error(directory: Path) -> Exception:
    with pytest.raises(RunFailedError) as caught:
        write_report(directory)
    return caught.value


def test_what_holds_the_page_cannot_be_written(tmp_path: Path) -> None:
    directory = run(tmp_path, [record(0, {"site-a": 2.0})])
    # A directory in its place: even root cannot write over it.
    (directory / "report.html").mkdir()
    with pytest.raises(StorageError, match=re.escape(str(directory / "report.html"))):
        write_report(directory)


def test_the_page_shows_every_round_and_site(tmp_path: Path) -> None:
    rounds = [
        record(0, {"site-a": 2.0, "site-b": 1.0}),
        record(1, {"site-a": 1.0, "site-b": None}),
        record(2, {"site-a": None, "site-b": None}, committed=False),
        record(3, {"site-a": 0.5, "site-b": 0.25}),
    ]
    rounds[3]["degraded"] = True
    rounds[3]["server"] = {"hf:acme/test": {"loss": 0.75, "reason": None}}
    page = Page(write_report(run(tmp_path, rounds)))
    assert page.tables["vlafleet run 17"][3] == ["rounds committed", "2 of 3"]
    ends = {row[0]: row[1:7] for row in page.tables["Rounds"]}
    assert ends["0"] == ["committed", "-", "-", "-", "1.500", "-"]
    assert ends["1"] == ["committed", "2 of 2", "480", "0.600", "-", "-"]
    assert ends["2"] == ["failed", "0 of 2", "-", "-", "-", "-"]
    assert ends["3"] == ["degraded", "2 of 2", "480", "0.600", "0.375", "-75.0 %"]
    sites = {row[0]: row for row in page.tables["Sites"]}
    assert sites["site-a"][1:4] == [SITE["dataset"], "8", "381"]
    assert sites["site-a"][-4:] == ["2.000", "0.500", "0.500", "-75.0 %"]
    details = {row[0]: row for row in page.tables["Round 1"]}
    assert details["site-b"][1] == "completed"
    assert details["site-b"][-3:] == ["timeout: no reply within 600 s", "-", "-"]
    assert page.tables["Datasets no site trains on"][1] == ["hf:acme/test", "3", "0.750", ""]
    assert ["strategy", "fedavg"] in page.tables["Run config"]
    assert "site dropped: round 1 evaluate: site-b timeout, no reply within 600 s" in page.text


def test_the_pictures_hold_what_their_captions_say(tmp_path: Path) -> None:
    rounds = [record(n, {"site-a": 2.0 - n / 10, "site-b": 1.0}) for n in range(4)]
    rounds[2]["sites"]["site-b"]["train"] |= {"state": "offline", "reason": "gone"}
    loss, participation, traffic, phases = map(
        labels, Page(write_report(run(tmp_path, rounds))).pictures()
    )
    assert {"held-out loss", "site-a", "site-b", "all sites", "base model"} <= set(loss)
    assert {"completed", "offline"} <= set(participation)
    assert {"MB", "to sites", "from sites"} <= set(traffic)
    assert {"seconds", "dispatch", "collect", "commit", "evaluate"} <= set(phases)


def test_many_sites_share_one_line_of_the_legend(tmp_path: Path) -> None:
    losses = {f"site-{number:03d}": 1.0 + number for number in range(30)}
    page = Page(write_report(run(tmp_path, [record(0, losses), record(1, losses)])))
    assert labels(page.pictures()[0]).count("each site") == 1
    assert not any(text.startswith("site-") for text in labels(page.pictures()[0]))
    # The table has each of them.
    assert [row[0] for row in page.tables["Sites"][1:]] == [*losses, "all sites"]


def test_a_baseline_is_drawn_and_compared(tmp_path: Path) -> None:
    first = run(
        tmp_path,
        [record(0, {"site-a": 2.0}), record(1, {"site-a": 1.0})],
        name="16",
        codec="fp32",
    )
    second = run(tmp_path, [record(0, {"site-a": 2.0}), record(1, {"site-a": 0.5})])
    output, error = printed(second, "--baseline", first)
    assert error is None
    last = "held-out loss, last round, site-a"
    assert cells(output, last) == [last, "0.500", "1.000", "-50.0 %"]
    page = Page(second / "report.html")
    rows = {row[0]: row[1:] for row in page.tables["Against run 16"]}
    assert rows[""] == ["run 17", "run 16", "difference"]
    assert rows["codec"] == ["int8", "fp32", ""]
    assert rows["held-out loss, round 0"] == ["2.000", "2.000", "+0.0 %"]
    assert "strategy" not in rows
    assert {"site-a", "site-a, run 16", "all sites, run 16"} <= set(labels(page.pictures()[0]))
    # The baseline itself is left as it was.
    assert not (first / "report.html").exists()


def test_a_baseline_that_is_no_run_is_one_sentence(tmp_path: Path) -> None:
    _, error = printed(run(tmp_path, [record(0, {"site-a": 2.0})]), "--baseline", tmp_path / "no")
    assert isinstance(error, RunFailedError)
    assert str(error).startswith(f"{tmp_path / 'no'} holds no run")


def test_the_page_fetches_nothing_and_runs_nothing(tmp_path: Path) -> None:
    rounds = [record(n, {"site-a": 2.0, "site-b": 1.0}) for n in range(3)]
    page = Page(write_report(run(tmp_path, rounds)))
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "link", "iframe", "object", "embed", "form", "base", "a", "svg"}
    for tag, attrs in page.elements:
        assert not {"style", "href", "srcset", "action"} & set(attrs), tag
        assert not any(name.startswith("on") for name in attrs), tag
    (policy,) = [str(attrs["content"]) for _, attrs in page.elements if attrs.get("http-equiv")]
    digest = base64.b64encode(sha256(page.style.encode()).digest()).decode()
    assert policy.split("; ") == [
        "default-src 'none'",
        "img-src data:",
        f"style-src 'sha256-{digest}'",
        "base-uri 'none'",
        "form-action 'none'",
    ]
    for picture in page.pictures():
        # Names of the format are addresses that nothing fetches; references stay within the picture.
        for element in ElementTree.fromstring(picture).iter():  # noqa: S314 - ours
            for name, value in element.attrib.items():
                assert not name.endswith("href") or value.startswith("#"), value
                assert "url(" not in value.replace("url(#", ""), value


def test_whatever_a_record_holds_is_text(tmp_path: Path) -> None:
    evil: Any = '<script>alert("1")</script>$\\frac{1}{2}$[red]{{ 7 * 7 }}'
    rounds = [record(0, {evil: 2.0}), record(1, {evil: 1.0})]
    rounds[1]["sites"][evil]["train"] |= {"state": "error", "reason": evil}
    directory = run(
        tmp_path, rounds, sites={evil: {**SITE, "dataset": evil, "tasks": [evil]}}, model=evil
    )
    output, _ = printed(directory)
    page = Page(directory / "report.html")
    assert "script" not in {tag for tag, _ in page.elements}
    assert page.tables["Sites"][1][:2] == [evil, evil]
    assert page.tables["vlafleet run 17"][5] == ["base model", evil]
    assert evil in labels(page.pictures()[0])
    assert evil in output.replace("\n", "")


def test_the_same_record_gives_the_same_page(tmp_path: Path) -> None:
    directory = run(tmp_path, [record(n, {"site-a": 2.0 - n / 10}) for n in range(3)])
    first = write_report(directory).read_bytes()
    code = f"from pathlib import Path; from app.report import write_report; write_report(Path({str(directory)!r}))"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert (directory / "report.html").read_bytes() == first


@pytest.mark.parametrize("module", ["app.report", "app.anomalies", "app.page"])
def test_it_needs_no_torch(module: str) -> None:
    code = f"import sys, {module}; print([m for m in ('torch', 'lerobot') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


def test_the_command_line_starts_without_what_draws() -> None:
    code = "import sys, app.report; print(*{'matplotlib', 'jinja2', 'pyarrow', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
