"""A site in containers: starts, checks and stops them with ``docker compose``."""

import re
import subprocess
from typing import Final

from certs.errors import ConnectionRefusedByFleetError, RunFailedError, ToolError
from supernode.compose_file import dataset, device, from_hub, place, write
from supernode.site import Site

__all__ = ["check_command", "running", "start", "stop", "write"]

# The version that the repository's own compose.yaml needs and is tested with.
_COMPOSE_MIN = (2, 26)
# A SuperNode has its SuperLink's answer within seconds; imports on a busy machine take longer.
_START_S = 180
_QUERY_S = 60

# Run in the SuperNode's container, with the addresses it has to reach.
_REACH: Final = f"""
import socket, sys
for address in sys.argv[1:]:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), 10).close()
    except OSError as error:
        print(f"{{address}} ({{error}})")
        sys.exit({ConnectionRefusedByFleetError.exit_code})
"""


def start(site: Site) -> None:
    """Start the site's containers and return when both are healthy.

    Raises ``ToolError`` when docker or its compose plugin is missing, too old or without an engine,
    ``ConnectionRefusedByFleetError`` when a container does not reach the federation, ``RunFailedError`` with compose's
    last line when the containers do not come up.
    """
    _require_docker()
    _require_reach(site)
    options = ["--detach", "--remove-orphans", "--wait", "--wait-timeout", str(_START_S)]
    if from_hub(site):
        # First and without a limit: it may be gigabytes.
        _run(site, ["run", "--rm", "-T", "fetch"], None)
    _run(site, ["up", *options], _START_S + _QUERY_S)


def stop(site: Site) -> bool:
    """Stop and remove the site's containers and networks; return whether any ran."""
    if not place(site).exists():
        return False
    was = running(site)
    _run(site, ["down", "--remove-orphans"], _QUERY_S)
    return was


def running(site: Site) -> bool:
    """Whether a container of the site runs, or is started again and again."""
    if not place(site).exists():
        return False
    _require_docker()
    states = ["--status", "running", "--status", "restarting"]
    return bool(_run(site, ["ps", "--quiet", *states], _QUERY_S).strip())


def check_command(site: Site) -> list[str]:
    """Return the command that checks the dataset as the app's container sees it; writes the compose file first."""
    write(site)
    check = ["data", "check", dataset(site), "--json", "--device", device(site)]
    # Its only dependency is a dataset of the hub, which has to be fetched.
    return [*_compose(site), "run", "--rm", "-T", "app", *check]


def _compose(site: Site) -> list[str]:
    return ["docker", "compose", "--file", str(place(site))]


def _run(site: Site, arguments: list[str], seconds: float | None) -> str:
    """Run compose on the site's file and return what it printed; raise what it failed with."""
    done = _call(site, arguments, seconds)
    if done.returncode:
        command = " ".join(done.args)
        raise RunFailedError(f"'{command}' failed: {_last(done.stderr or done.stdout)}")
    return done.stdout


def _call(
    site: Site, arguments: list[str], seconds: float | None
) -> subprocess.CompletedProcess[str]:
    command = [*_compose(site), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds)
    except OSError as error:
        raise ToolError(
            f"docker cannot be run ({error.strerror}): install it, or join with --native"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise RunFailedError(f"'{' '.join(command)}' did not end within {seconds:g} s") from error


def _require_reach(site: Site) -> None:
    """Raise ``ConnectionRefusedByFleetError`` unless the SuperNode's container reaches both addresses.

    What this machine reaches a container may not: another resolver, a firewall, a server on loopback alone.
    """
    once = ["run", "--rm", "-T", "--no-deps", "--entrypoint", "python", "supernode"]
    addresses = [site.superlink, site.enrolment]
    done = _call(site, [*once, "-c", _REACH, *addresses], _QUERY_S)
    if done.returncode == ConnectionRefusedByFleetError.exit_code:
        raise ConnectionRefusedByFleetError(
            f"a container of this machine does not reach {_last(done.stdout)}: let the server listen on the machine's "
            "address (--host), let containers out, or join with --native"
        )
    if done.returncode:
        raise RunFailedError(
            f"a container of the SuperNode cannot be started: {_last(done.stderr or done.stdout)}"
        )


def _require_docker() -> None:
    """Raise ``ToolError`` unless an engine answers and compose is new enough."""
    said = _ask("docker", "compose", "version", "--short")
    numbers = tuple(map(int, re.findall(r"\d+", said or "")[:2]))
    if len(numbers) < 2 or numbers < _COMPOSE_MIN:
        wanted = ".".join(map(str, _COMPOSE_MIN))
        raise ToolError(
            f"docker compose {wanted} or newer is needed and {said or 'none'} is here: install Docker's current "
            "compose plugin, or join with --native"
        )
    if _ask("docker", "version", "--format", "{{.Server.Version}}") is None:
        raise ToolError(
            "the Docker engine does not answer: start it, or add this user to the group docker; or join with --native"
        )


def _ask(*command: str) -> str | None:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=_QUERY_S
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _last(output: str) -> str:
    lines = output.strip().splitlines()
    return lines[-1].strip() if lines else "it said nothing"
