"""How the federation stands, in a terminal: ``vlafleet status`` and ``vlafleet watch``."""

from __future__ import annotations

import contextlib
import http.client
import json
import signal
import ssl
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.live import Live

from app.screen import Screen
from app.status import PATH
from certs.cli import IdentityOption
from certs.contexts import client_context
from certs.errors import AddressError, ConnectionRefusedByFleetError, FleetError, RunFailedError
from certs.identity import Identity
from certs.invitation import is_address
from certs.roles import EXPORTER_NAME, Role

# Longer than the exporter waits for the SuperLink.
_TIMEOUT_SECONDS = 15.0
# An age has whole seconds.
_REDRAWS_PER_SECOND = 2

ExporterOption = Annotated[
    str, typer.Option("--exporter", envvar="VLAFLEET_EXPORTER", help="The exporter, host:port.")
]


def status(
    identity: IdentityOption,
    exporter: ExporterOption = "localhost:9095",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object, times as Unix time.")
    ] = False,
) -> None:
    """Show how the federation and its newest run stand; exit 16 when there is no run yet."""
    document = fetch(_operator(identity, exporter), exporter)
    if as_json:
        typer.echo(json.dumps(document, indent=2))
    else:
        _console().print(Screen(document, document["time"]))
    if document["run"] is None:
        raise RunFailedError(
            f"the exporter at {exporter} knows of no run yet: start one with 'vlafleet run', and if "
            "there is one, start the exporter with the directory that holds it (--runs)."
        )


def watch(
    identity: IdentityOption,
    exporter: ExporterOption = "localhost:9095",
    interval: Annotated[
        float, typer.Option(min=0.5, help="Seconds between two looks at the exporter.")
    ] = 2.0,
) -> None:
    """Show live how the federation and its newest run stand, until Ctrl-C."""
    holder = _operator(identity, exporter)
    seen = Watched(lambda: fetch(holder, exporter))
    console = _console()
    # A terminal that is left as Live has it would stay without its cursor.
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    with contextlib.suppress(KeyboardInterrupt):
        if console.is_terminal:
            _live(console, seen, interval)
        else:
            _one_after_the_other(console, seen, interval)


def _live(console: Console, seen: Watched, interval: float) -> None:
    """Redraw one screen; when it ends, what it showed last stays."""
    try:
        with Live(
            get_renderable=seen.screen,
            console=console,
            screen=True,
            refresh_per_second=_REDRAWS_PER_SECOND,
        ):
            while True:
                time.sleep(interval)
                seen.look()
    finally:
        console.print(seen.screen())


def _one_after_the_other(console: Console, seen: Watched, interval: float) -> None:
    """Print every look below the one before, for a pipe or a file."""
    while True:
        console.print(seen.screen(), "")
        time.sleep(interval)
        seen.look()


class Watched:
    """The document of the last look, and since when looks fail.

    The first look raises what ``ask`` does: a wrong address, say, is nothing to wait for.
    """

    def __init__(
        self, ask: Callable[[], dict[str, Any]], clock: Callable[[], float] = time.time
    ) -> None:
        self._ask, self._clock = ask, clock
        self._lost: tuple[float, FleetError] | None = None
        self._take(ask())

    def look(self) -> None:
        """Ask again; a failure is shown, and the next look may succeed."""
        try:
            self._take(self._ask())
        except FleetError as error:
            since = self._lost[0] if self._lost else self._clock()
            self._lost = since, error

    def screen(self) -> Screen:
        """Return what there is to see now."""
        now = self._clock()
        # Ages are by the clock of the machine that the times are from.
        document, at = self._seen
        if self._lost is None:
            return Screen(document, document["time"] + now - at)
        since, error = self._lost
        lost = f"No answer for {now - since:.0f} s, what is below is from before: {error}"
        return Screen(document, document["time"] + now - at, lost)

    def _take(self, document: dict[str, Any]) -> None:
        self._seen = document, self._clock()
        self._lost = None


def fetch(identity: Identity, address: str) -> dict[str, Any]:
    """Return the exporter's status document.

    Raises ``ConnectionRefusedByFleetError`` when the exporter does not answer, refuses, or is not this federation's.
    """
    host, _, port = address.rpartition(":")
    server = identity.peer.federation, Role.EXPORTER, EXPORTER_NAME
    try:
        # A context for each look: the identity's files may have been renewed.
        connection = http.client.HTTPSConnection(
            host.strip("[]"),
            int(port),
            timeout=_TIMEOUT_SECONDS,
            context=client_context(identity, server),
        )
        with contextlib.closing(connection):
            connection.request("GET", PATH)
            response = connection.getresponse()
            code, body = response.status, response.read()
    except ssl.SSLCertVerificationError as error:
        raise ConnectionRefusedByFleetError(
            f"what answers at {address} is not this federation's exporter ({error}): check the address"
        ) from error
    except (OSError, http.client.HTTPException) as error:
        raise ConnectionRefusedByFleetError(
            f"no exporter answers at {address} ({error or type(error).__name__}): check the address, "
            "and that 'vlafleet exporter' runs; its log says whether it refused your certificate"
        ) from error
    if code == http.client.NOT_FOUND:
        raise ConnectionRefusedByFleetError(
            f"the exporter at {address} refuses {identity.peer.uri}: its log says why"
        )
    document = _document(body) if code == http.client.OK else None
    if document is None:
        raise ConnectionRefusedByFleetError(
            f"the exporter at {address} answers {code}, and not with how the federation stands: "
            "look at its log, and whether it is of this release"
        )
    return document


def _document(body: bytes) -> dict[str, Any] | None:
    try:
        document = json.loads(body)
    except ValueError:
        return None
    known = isinstance(document, dict) and {"time", "run", "sites"} <= document.keys()
    return document if known else None


def _operator(directory: Path, exporter: str) -> Identity:
    if not is_address(exporter):
        raise AddressError(
            f"{exporter!r} is no address: name the exporter as host:port, as in 'localhost:9095'"
        )
    return Identity.load(directory, Role.OPERATOR)


def _console() -> Console:
    # What a site says may hold a character that this terminal cannot show.
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    return Console(highlight=False)
