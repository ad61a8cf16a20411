"""The resident trainer: one process of a site that does its ClientApps' jobs, one at a time.

Started and watched by the site's SuperExec (``app.supervisor``), it keeps what is dear to make over rounds and runs:
the import of lerobot (14 s of CPU), the policy, caches, moments, the CUDA context. A job that fails leaves it running;
a ClientApp that goes away ends its job.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from app.job import Answer, Job, Progress
from app.manifest import PayloadError
from app.payload import Payload
from app.trainer_metrics import Metrics, Result
from app.trainer_wire import receive, same_user, send
from certs import logs
from certs.errors import FleetError, RunFailedError, first_line
from certs.parent import end_with_parent

# Jobs that wait while one runs. A SuperNode hands out one message at a time; more are leftovers.
WAITING = 2
# Connections at a time: the jobs, and whoever reads the metrics.
_CONNECTIONS = 16
# Seconds a client may take to send its request, and to take its answer.
_CLIENT_S = 30.0
# Seconds a cancelled job may take to notice: a large batch's step on a CPU is a minute.
_CANCEL_S = 120.0
# torch's name for an error after which its CUDA context answers every call with that error.
_BROKEN = "AcceleratorError"
# Half of the machine's memory is added to this process's size when the kernel looks for one to end
# (proc_pid_oom_score_adj(5)): a job then fails, and the SuperExec stays.
_OOM_SCORE = "500"

_log = logging.getLogger("vlafleet.trainer")


class Handler(Protocol):
    """What does the jobs: ``app.worker.Worker``."""

    def handle(self, job: Job, progress: Progress) -> Answer:
        """Do one job; ``FleetError`` says why it cannot be done."""
        ...

    def close(self) -> None:
        """Finish what is being written."""
        ...


@dataclass(frozen=True)
class _Ticket:
    """A job, and the connection that waits for its answer."""

    job: Job
    connection: socket.socket
    cancelled: threading.Event = field(default_factory=threading.Event)
    done: threading.Event = field(default_factory=threading.Event)


class Trainer:
    """Takes jobs from a listening socket, and does them with ``handler`` in the thread that calls ``serve``."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler
        self._metrics = Metrics()
        self._tickets: queue.SimpleQueue[_Ticket] = queue.SimpleQueue()
        self._running: _Ticket | None = None
        # One more for the job that runs.
        self._places = threading.BoundedSemaphore(WAITING + 1)
        self._connections = threading.BoundedSemaphore(_CONNECTIONS)

    def serve(self, listener: socket.socket) -> None:
        """Do jobs, one at a time, for ever."""
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()
        while True:
            self._work(self._tickets.get())

    def _accept(self, listener: socket.socket) -> None:
        while True:
            self._connections.acquire()
            connection, _ = listener.accept()
            threading.Thread(target=self._connection, args=(connection,), daemon=True).start()

    def _connection(self, connection: socket.socket) -> None:
        try:
            with connection:
                if same_user(connection):
                    self._attend(connection)
                else:
                    _log.warning("refused a process of another user")
        except (EOFError, OSError):
            _log.info("a client went away")
        except FleetError as error:
            _log.warning("refused a request: %s", error)
        finally:
            self._connections.release()

    def _attend(self, connection: socket.socket) -> None:
        connection.settimeout(_CLIENT_S)
        send(connection, {"pid": os.getpid()})
        try:
            header, payload = receive(connection)
            if "metrics" in header:
                send(connection, {"metrics": self._metrics.text()})
                return
            ticket = _Ticket(_job(header, payload), connection)
            if not self._places.acquire(blocking=False):
                raise RunFailedError(
                    f"The trainer works on a job and {WAITING} wait already: this one is refused."
                )
        except FleetError as error:
            send(connection, _error(error))
            raise
        del payload, header
        connection.settimeout(None)
        # A client that takes nothing must not hold the thread that does the jobs.
        connection.setsockopt(
            socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(_CLIENT_S), 0)
        )
        self._metrics.waiting.inc()
        self._tickets.put(ticket)
        self._watch(ticket)

    def _watch(self, ticket: _Ticket) -> None:
        """Cancel the job when its client goes away; end this process when the job does not notice."""
        with contextlib.suppress(ConnectionError):
            ticket.connection.recv(1)
        ticket.cancelled.set()
        while not ticket.done.wait(_CANCEL_S):
            # One that still waits for its turn ends as soon as it has it.
            if self._running is ticket:
                _log.error("a cancelled job did not end in %.0f s: the trainer ends", _CANCEL_S)
                os.kill(os.getpid(), signal.SIGKILL)

    def _work(self, ticket: _Ticket) -> None:
        kind, self._running = ticket.job.kind, ticket
        self._metrics.waiting.dec()
        try:
            send(ticket.connection, {"begun": True})
            with self._metrics.job(kind) as ended:
                reply, payload, ended.result = self._reply(ticket)
            try:
                send(ticket.connection, reply, payload)
            except FleetError as error:
                send(ticket.connection, _error(error))
            if ended.result == "broken":
                raise SystemExit("after an error of its accelerator a process can only end")
        except OSError as error:
            _log.info("%s: the ClientApp does not take the answer (%s)", kind, first_line(error))
        finally:
            # Whatever happened, nobody waits for more.
            with contextlib.suppress(OSError):
                ticket.connection.shutdown(socket.SHUT_WR)
            self._running = None
            ticket.done.set()
            self._places.release()

    def _reply(self, ticket: _Ticket) -> tuple[dict[str, Any], Payload | None, Result]:
        def progress(**values: float | int | str) -> None:
            self._metrics.progress(values)
            if ticket.cancelled.is_set():
                raise RunFailedError("The job was cancelled: its ClientApp went away.")

        try:
            progress()
            answer = self._handler.handle(ticket.job, progress)
        except FleetError as error:
            return _error(error), None, "cancelled" if ticket.cancelled.is_set() else "error"
        except Exception as error:  # noqa: BLE001 (whatever a job does, the next one is done)
            _log.exception("%s failed unexpectedly", ticket.job.kind)
            sentence = (
                f"The trainer failed unexpectedly ({type(error).__name__}: {first_line(error)}): "
                "its log has the traceback."
            )
            broken = type(error).__name__ == _BROKEN
            return _error(RunFailedError(sentence)), None, "broken" if broken else "failed"
        said = {
            "configs": {name: dict(record) for name, record in answer.configs.items()},
            "metrics": {name: dict(record) for name, record in answer.metrics.items()},
        }
        return {"answer": said}, answer.payload, "completed"


def worker() -> Handler:
    """The handler of a site, with what its jobs need imported already."""
    from lerobot.policies.smolvla import modeling_smolvla  # noqa: F401

    from app.worker import Worker

    return Worker()


def main(make: Callable[[], Handler] = worker) -> None:
    """Serve the listening socket whose descriptor is the only argument, until the SuperExec ends."""
    end_with_parent(signal.SIGKILL)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    # A terminal's Ctrl-C reaches the SuperExec too, which then ends this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(OSError):  # a sandbox may have no such file
        Path("/proc/self/oom_score_adj").write_text(_OOM_SCORE)
    logs.configure()
    logs.bind(role="trainer")
    started = time.monotonic()
    handler = make()
    _log.info("ready after %.1f s", time.monotonic() - started)
    try:
        Trainer(handler).serve(socket.socket(fileno=int(sys.argv[1])))
    finally:
        handler.close()


def _job(header: Mapping[str, Any], payload: Payload | None) -> Job:
    job = header.get("job")
    if (
        not isinstance(job, dict)
        or job.get("kind") not in ("describe", "train", "evaluate")
        or not all(isinstance(job.get(name), dict) for name in ("node", "request"))
    ):
        raise RunFailedError("A request to the trainer is neither a job nor for its metrics.")
    return Job(job["kind"], job["node"], job["request"], payload)


def _error(error: FleetError) -> dict[str, Any]:
    said = {"class": type(error).__name__, "sentence": str(error)}
    if isinstance(error, PayloadError):
        said["reason"] = error.reason
    return {"error": said}


if __name__ == "__main__":
    main()
