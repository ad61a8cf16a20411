"""The exporter: what the runs do, for Prometheus and for ``vlafleet status``, over mutual TLS.

It only reads the runs, and imports neither Flower nor numpy. A thread follows them and renders what it finds; a scrape
gets what was rendered last.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import threading
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, REGISTRY, generate_latest

from app import run_metrics
from app.runs_view import Runs
from app.status import PATH, document
from app.superlink_client import SuperLink
from certs.errors import FleetError, first_line
from certs.guard import Application, Guard, Receive, Rule, Scope, Send, allow, no_lifespan, reply
from certs.identity import Identity
from certs.logs import bind as bind_log
from certs.metric import exposition
from certs.process_metrics import ProcessCollector
from certs.renewal import follow
from certs.revocations import Revocations
from certs.roles import Role
from certs.server import bind, mutual_tls_server

_log = logging.getLogger("vlafleet.exporter")

# Between two looks at the runs: what changes there takes seconds, and Prometheus asks every few.
_LOOK_SECONDS = 1.0
# Python's own is 5 ms.
_TURN_SECONDS = 0.001
# Older than this, what was read is no longer served: Prometheus says that the exporter is down.
_STALE_SECONDS = 60.0


def serve(
    identity: Identity, superlink: str, runs: Path, host: str, port: int, enrolment: str | None
) -> None:
    """Serve until SIGTERM or SIGINT what the runs below the directory ``runs`` do.

    ``superlink`` and ``enrolment`` are ``host:port``: who says which sites are online and who is revoked, and where the
    certificate is renewed (None: by hand). The directory need not be there yet; all that is there is read before the
    first answer. Raises ``StorageError`` when it cannot be listed, ``CertificateError`` when the identity holds no
    revocation list.
    """
    bind_log(role=str(identity.peer.role))
    revocations = Revocations(identity.crl, identity.authority)
    with bind(host, port) as listener:
        followed = Followed(Runs(runs))
        REGISTRY.register(ProcessCollector(identity, {"runs": runs}))
        asked = SuperLink(identity, superlink)
        asked.follow(revocations)
        guard = Guard(
            rules(identity.peer.federation, followed, asked.nodes), no_lifespan, revocations
        )
        server = mutual_tls_server(guard, identity, revocations)
        # Rendering takes tens of milliseconds of Python: between threads a request waits for each of its turns.
        sys.setswitchinterval(_TURN_SECONDS)
        followed.start()
        follow(identity, enrolment)
        _log.info("exporter of %s listens on %s port %d", identity.peer.federation, host, port)
        server.run(sockets=[listener])


class Followed(threading.Thread):
    """The thread that follows the runs; ``view`` and ``text`` are the newest of them."""

    def __init__(self, runs: Runs) -> None:
        """Read all that is there; raise ``StorageError`` when the directory cannot be listed."""
        super().__init__(name="runs", daemon=True)
        self._runs = runs
        self._over = threading.Event()
        self._said = ""
        self._behind = True
        runs.refresh()
        self._render()

    def run(self) -> None:
        """Look once a second until the process ends, or ``stop``."""
        while not self._over.wait(_LOOK_SECONDS):
            self.look()

    def stop(self) -> None:
        """End the thread."""
        self._over.set()
        self.join()

    def look(self) -> None:
        """Read and render what is new; what fails is said once and tried again."""
        try:
            self._behind |= self._runs.refresh()
            if self._behind:
                self._render()
        except FleetError as error:
            if str(error) != self._said:
                _log.error("%s", error)
            self._said = str(error)
        except Exception as error:  # noqa: BLE001 - what cannot be read now may be in a second
            if first_line(error) != self._said:
                _log.exception("the runs are not followed")
            self._said = first_line(error)
        else:
            self._said, self.read_at = "", time.monotonic()

    @property
    def stale(self) -> bool:
        """Whether nothing could be read for a while."""
        return time.monotonic() - self.read_at > _STALE_SECONDS

    def _render(self) -> None:
        self.view = self._runs.view
        self.text = exposition(run_metrics.families(self.view))
        self._behind = False
        self.read_at = time.monotonic()


def rules(
    federation: str, followed: Followed, nodes: Callable[[], list[dict[str, Any]] | None]
) -> dict[str, tuple[Rule, Application]]:
    """Return which role may ask for what, and what answers."""

    def metrics() -> bytes:
        return followed.text + generate_latest(REGISTRY)

    def status() -> bytes:
        return json.dumps(document(federation, followed.view, nodes(), time.time())).encode()

    def health() -> bytes:
        return b'{"status": "ok"}'

    asked_by = {
        "/metrics": ({Role.MONITOR}, metrics, CONTENT_TYPE_PLAIN_0_0_4),
        PATH: ({Role.OPERATOR, Role.MONITOR}, status, "application/json"),
        "/health": ({Role.EXPORTER, Role.MONITOR}, health, "application/json"),
    }
    return {
        path: (_only(roles), _endpoint(answer, form, followed))
        for path, (roles, answer, form) in asked_by.items()
    }


def _only(roles: Collection[Role]) -> Rule:
    return allow(lambda peer: peer.role in roles)


def _endpoint(answer: Callable[[], bytes], form: str, followed: Followed) -> Application:
    """Answer GET, and 503 while what would be said is old."""

    async def serve(scope: Scope, _receive: Receive, send: Send) -> None:
        status, kind = 200, form
        if scope["method"] != "GET":
            status, kind, body = 405, "text/plain", b"this path is read with GET\n"
        elif followed.stale:
            status, kind, body = 503, "text/plain", b"the runs cannot be read; the log says why\n"
        else:
            body = await asyncio.to_thread(answer)
        await reply(send, status, body, kind, (b"cache-control", b"no-store"))

    return serve
