"""A process's log: text as people read it, or a JSON object a line, whoever wrote the line and whatever it says."""

import json
import logging
import os
import subprocess
import sys
from typing import Any

import pytest

from certs import logs
from certs.errors import ConfigError
from superlink.demo import of_the_run

HOSTILE = "\x1b[31mred\n{'forged': 1}\r\x07 “quoted” \u202e \x9b\x7f"


def ran(program: str, form: str | None, code: int = 0) -> str:
    """Run a program whose logging is configured first; return what it wrote to both streams."""
    environment = {name: value for name, value in os.environ.items() if name != logs.FORMAT}
    if form is not None:
        environment[logs.FORMAT] = form
    start = "import logging, threading, warnings\nfrom certs import logs\nlogs.configure()\n"
    done = subprocess.run(
        [sys.executable, "-c", start + program],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == code, done.stdout
    return done.stdout


def lines(program: str, code: int = 0) -> list[dict[str, Any]]:
    """Every line that a program wrote; each must be a JSON object in printable ASCII, a string's NaN included."""
    written = ran(program, "json", code).splitlines()
    assert all(line.isascii() and line.isprintable() for line in written), written

    def constant(name: str) -> Any:
        raise AssertionError(f"{name} is no JSON")

    return [json.loads(line, parse_constant=constant) for line in written]


def test_text_is_the_default() -> None:
    for form in (None, "", "text"):
        said = ran("logging.getLogger('vlafleet.x').info('hello %s', 'world')", form)
        assert said.endswith(" INFO vlafleet.x: hello world\n")
        assert said[:4].isdigit()


def test_a_format_that_does_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(logs.FORMAT, "xml")
    with pytest.raises(ConfigError, match=r"VLAFLEET_LOG_FORMAT is 'xml': set it to 'text' or"):
        logs.configure()


def test_a_line_of_json() -> None:
    (line,) = lines("logging.getLogger('vlafleet.x').warning('%d of %s', 3, 'four')")
    assert line["time"].endswith("+00:00")
    assert isinstance(line.pop("pid"), int)
    del line["time"]
    assert line == {"level": "WARNING", "logger": "vlafleet.x", "message": "3 of four"}


def test_a_peers_text_stays_in_its_line() -> None:
    (line,) = lines(f"logging.getLogger('vlafleet.x').warning('%s', {HOSTILE!r})")
    assert line["message"] == HOSTILE


def test_what_is_bound_stands_in_every_later_line() -> None:
    first, second, third = lines(
        "say = logging.getLogger('vlafleet.x').info\n"
        "say('1')\n"
        "logs.bind(role='site', site='site-a', round=3)\n"
        "say('2')\n"
        "logs.bind(round=None, run='7', level='none of yours')\n"
        "say('3')\n"
    )
    assert "site" not in first
    assert (second["role"], second["site"], second["round"]) == ("site", "site-a", 3)
    assert (third["site"], third["run"], third["level"]) == ("site-a", "7", "INFO")
    assert "round" not in third


def test_errors_are_a_field() -> None:
    program = (
        "try:\n    1 / 0\nexcept ZeroDivisionError:\n    logging.getLogger('a').exception('of %s', 'x')\n"
        "warnings.warn('soon gone')\n"
        "thread = threading.Thread(target=lambda: [][0]); thread.start(); thread.join()\n"
        "raise RuntimeError('the\\nend')\n"
    )
    caught, warned, thread, end = lines(program, code=1)
    assert caught["message"] == "of x"
    assert caught["exception"].endswith("ZeroDivisionError: division by zero")
    assert "soon gone" in warned["message"]
    assert (warned["level"], warned["logger"]) == ("WARNING", "py.warnings")
    assert thread["exception"].endswith("IndexError: list index out of range")
    assert (end["level"], end["message"]) == ("CRITICAL", "RuntimeError: the\nend")
    assert end["exception"].startswith("Traceback")
    assert end["exception"].endswith("RuntimeError: the\nend")


FLOWER = (
    "early = logging.getLogger('flwr')\n"
    "early.info('before')\n"
    "from flwr.common.logger import log\n"
    "log(logging.INFO, 'said by Flower')\n"
    "log(logging.DEBUG, 'not said')\n"
    "log(logging.INFO, '')\n"
    "early.error('by us, too')\n"
)


def test_flowers_own_handler_writes_json_with_its_level() -> None:
    said = [(line["level"], line["logger"], line["message"]) for line in lines(FLOWER)]
    assert said == [
        ("INFO", "flwr", "before"),
        ("INFO", "flwr", "said by Flower"),
        ("ERROR", "flwr", "by us, too"),
    ]


def test_flowers_lines_are_said_once_as_text() -> None:
    said = ran(FLOWER, "text")
    assert [said.count(text) for text in ("before", "said by Flower", "not said", "us, too")] == [
        *(1, 1, 0, 1)
    ]


def test_flower_imported_before() -> None:
    """A task process may have it already; and what Flower mirrors to the run's log is what it writes."""
    program = (
        "import flwr.common.logger as own\nlogs.configure()\n"
        "own.redirect_output(buffer := __import__('io').StringIO())\n"
        "own.log(logging.INFO, 'mirrored')\n"
        "own.restore_output()\nprint(buffer.getvalue(), end='')"
    )
    (line,) = lines(program)
    assert (line["logger"], line["message"]) == ("flwr", "mirrored")


def test_uvicorn_and_libraries_with_handlers_of_their_own() -> None:
    program = (
        "import asyncio, uvicorn\n"
        "from huggingface_hub.utils import logging as hub\n"
        "hub.get_logger('huggingface_hub.x').warning('from the hub')\n"
        "async def app(scope, receive, send): raise RuntimeError('no lifespan')\n"
        "config = uvicorn.Config(app, host='127.0.0.1', port=0, log_config=None, lifespan='on')\n"
        "asyncio.run(uvicorn.Server(config).serve())\n"
    )
    hub, *served = lines(program)
    assert (hub["logger"], hub["message"]) == ("huggingface_hub.x", "from the hub")
    assert {line["logger"] for line in served} == {"uvicorn.error"}
    assert any("no lifespan" in line.get("exception", line["message"]) for line in served)
    assert not [line for line in served if "color_message" in line]


def test_what_ends_a_command() -> None:
    command = [sys.executable, "-m", "vlafleet", "report", "/nowhere"]
    for form in ("text", "json", "xml"):
        environment = {**os.environ, logs.FORMAT: form}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        (said,) = done.stderr.splitlines()
        if form == "json":
            assert json.loads(said)["message"].startswith("/nowhere holds no run")
        else:
            assert said.startswith("vlafleet: ")
        assert done.returncode == (ConfigError.exit_code if form == "xml" else done.returncode) > 0


@pytest.mark.parametrize(
    ("line", "entry"),
    [
        ('{"level": "INFO", "message": "round 1"}\n', ("INFO", "round 1")),
        ("INFO :      round 1", None),
        ('{"level": "INFO"}', None),
        ('["level"]', None),
        ("17", None),
        ("", None),
    ],
)
def test_a_line_is_read_back(line: str, entry: tuple[str, str] | None) -> None:
    assert logs.entry(line) == entry


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("\x1b[92mINFO \x1b[0m:      round 1/3: 2 of 2 sites", "round 1/3: 2 of 2 sites"),
        ('{"level": "INFO", "message": "round 1/3: 2 of 2 sites"}', "round 1/3: 2 of 2 sites"),
        ("\x1b[92mINFO \x1b[0m:      Starting", None),
        ('{"level": "INFO", "message": "Starting"}', None),
        ("\x1b[93mWARNING \x1b[0m:   site-b timed out", "WARNING: site-b timed out"),
        ('{"level": "WARNING", "message": "site-b timed out"}', "WARNING: site-b timed out"),
        ("Traceback", None),
    ],
)
def test_the_demo_reads_both(line: str, said: str | None) -> None:
    assert of_the_run(line) == said


def test_our_own_loggers_have_no_handler() -> None:
    """Or their lines would keep the form that it gives them."""
    import vlafleet  # noqa: F401

    ours = [name for name in logging.root.manager.loggerDict if name.startswith("vlafleet")]
    assert ours
    assert not [name for name in ours if logging.getLogger(name).handlers]
