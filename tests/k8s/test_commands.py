"""The commands in the charts, read by the program that they start: every option exists, every value is one."""

import functools
from pathlib import Path
from typing import Any

import click
import pytest
import typer

import vlafleet
from tests.k8s.objects import Template
from tests.k8s.pod_checks import Container, every_container
from tests.k8s.renders import EVERY_RENDER, rendered


@functools.cache
def program() -> click.Command:
    """Return vlafleet, as its entry point runs it."""
    return typer.main.get_command(vlafleet.cli)


def parse(arguments: list[str], environment: dict[str, str], monkeypatch: Any) -> None:
    """Read a command line as vlafleet does, without running it; click's exceptions say what is wrong."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    command, rest = program(), list(arguments)
    while isinstance(command, click.Group):
        found = command.get_command(click.Context(command), rest[0])
        if found is None:
            raise click.UsageError(f"No such command {rest[0]!r}.")
        command, rest = found, rest[1:]
    context = command.make_context(command.name, rest)
    context.close()


def environment(container: Container) -> dict[str, str]:
    """Return a container's variables; what comes out of a Secret is there, but is not known here."""
    return {one["name"]: one.get("value", "from-a-secret") for one in container.get("env", [])}


def command_lines(pod: Template, container: Container) -> list[list[str]]:
    """Return the command lines of vlafleet in a container: what it runs, and its probes."""
    lines = [] if "command" in container else [container["args"]]
    for kind in ("livenessProbe", "readinessProbe", "startupProbe"):
        if kind in container:
            program, *line = container[kind]["exec"]["command"]
            assert program == "vlafleet", f"{pod} {container['name']}"
            lines.append(line)
    return lines


@EVERY_RENDER
def test_the_program_knows_every_command_line(
    chart: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = 0
    for pod, container in every_container(rendered(chart, path)):
        for line in command_lines(pod, container):
            with monkeypatch.context() as scope:
                try:
                    parse(line, environment(container), scope)
                except click.ClickException as error:
                    pytest.fail(f"{pod} {container['name']}: {line}: {error.format_message()}")
            read += 1
    assert read


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (["supernod"], "No such command"),
        (["superlink", "--identity", "/i", "--prot", "1"], "No such option"),
        (["superlink", "--port", "9092"], "--identity"),
        (["superlink", "--identity", "/i", "--port", "x"], "not a valid int"),
        (["certs", "take", "/secret"], "Missing argument"),
    ],
    ids=["command", "option", "missing", "value", "argument"],
)
def test_a_wrong_command_line_is_seen(
    line: list[str], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(click.ClickException) as raised:
        parse(line, {}, monkeypatch)
    assert says in raised.value.format_message()
