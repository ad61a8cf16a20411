"""The ClientApp's side of the resident trainer: hand over a job, wait for its answer."""

from __future__ import annotations

import json
import os
import select
import socket
import time
from pathlib import Path
from typing import Any

from app import manifest
from app.job import Answer, Job
from app.payload import Payload
from app.supervisor import SOCKET, ended, restarts
from app.trainer_wire import receive, same_user, send
from certs import errors
from certs.errors import FleetError, RunFailedError

# A job that waited for its turn when the trainer ended has not begun, and is handed over once more.
_ATTEMPTS = 2
# Seconds a round's job may take beyond its round-timeout: training that stops itself there still answers.
_MARGIN_S = 30.0
# Seconds for a job whose request names no round-timeout; the trainer refuses that request at once.
_DEFAULT_S = 600.0
# Seconds for an answer that no job delays.
_METRICS_S = 10.0
# A trainer that ends so often while a job waits for it to start does not start.
_FAILED_STARTS = 2
# Seconds between two looks at whether that has happened.
_LOOK_S = 0.5
# Seconds for the supervisor to note how the trainer ended: it sleeps until then.
_NOTE_S = 5.0


def submit(job: Job) -> Answer:
    """Have the trainer whose socket is ``VLAFLEET_TRAINER`` do ``job``; return its answer.

    Waits while the trainer starts, and gives up when the round is over. Raises what the job raised, and
    ``RunFailedError`` when the trainer ended, cannot be reached, or has too much to do.
    """
    path = Path(os.environ[SOCKET])
    deadline = time.monotonic() + _seconds(job)
    try:
        for _ in range(_ATTEMPTS):
            with _connect(path) as connection:
                pid = _begun(connection, path, job, deadline)
                if pid is not None:
                    return _answer(connection, path, pid, deadline)
    except TimeoutError:
        raise RunFailedError(
            "The trainer did not answer before the round's deadline; its job is cancelled."
        ) from None
    raise RunFailedError(
        "The trainer closed the connection before it began: the log of this site's SuperExec says why."
    )


def metrics(path: Path) -> str:
    """What the trainer at the socket ``path`` tells Prometheus, in its text format.

    ``RunFailedError`` when it cannot be reached, or has not started yet.
    """
    deadline = time.monotonic() + _METRICS_S
    with _connect(path) as connection:
        try:
            _greeted(connection, path, deadline)
            send(connection, {"metrics": True})
            header, _ = _receive(connection, deadline)
        except (EOFError, ConnectionError, TimeoutError):
            raise RunFailedError(
                f"The trainer at {path} does not answer: while it starts, it takes a minute at most."
            ) from None
    return str(header["metrics"])


def await_metrics(path: Path) -> str:
    """As ``metrics``, for who can wait: for one answer over one connection, however long the trainer takes to start.

    Who gave up and came again would leave a connection each time in the queue of a trainer that does not start.
    Raises ``RunFailedError`` when it cannot be reached, ``EOFError`` or ``OSError`` when it ends before it answers.
    """
    with _connect(path) as connection:
        receive(connection)  # the greeting
        send(connection, {"metrics": True})
        return str(receive(connection)[0]["metrics"])


def _begun(connection: socket.socket, path: Path, job: Job, deadline: float) -> int | None:
    """The trainer's process id once it works on ``job``; None when it ended before that."""
    try:
        pid = _greeted(connection, path, deadline)
        said = {"kind": job.kind, "node": job.node, "request": job.request}
        send(connection, {"job": said}, job.payload)
        header, _ = _receive(connection, deadline)
    except (EOFError, ConnectionError):
        return None
    if "error" in header:
        raise _error(header["error"])
    return pid


def _answer(connection: socket.socket, path: Path, pid: int, deadline: float) -> Answer:
    try:
        header, payload = _receive(connection, deadline)
    except (EOFError, ConnectionError):
        raise RunFailedError(
            f"The trainer ended in mid-job ({_how(path, pid)}); it is started again."
        ) from None
    if "error" in header:
        raise _error(header["error"])
    answer = header["answer"]
    return Answer(answer["configs"], answer["metrics"], payload)


def _connect(path: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect(str(path))
        if not same_user(connection):
            raise RunFailedError(f"{path} belongs to another user's process: it is no trainer.")
    except OSError as error:
        connection.close()
        raise RunFailedError(
            f"The trainer cannot be reached at {path} ({errors.first_line(error)}): "
            "restart this site's SuperExec."
        ) from error
    except BaseException:
        connection.close()
        raise
    return connection


def _greeted(connection: socket.socket, path: Path, deadline: float) -> int:
    """Return the trainer's process id once it serves this connection; until then its socket holds it."""
    before = restarts(path)
    while True:
        if select.select([connection], [], [], _LOOK_S)[0]:
            return int(_receive(connection, deadline)[0]["pid"])
        if time.monotonic() >= deadline:
            raise TimeoutError
        if restarts(path) >= before + _FAILED_STARTS:
            raise RunFailedError(
                f"The trainer does not start ({ended(path)['how']}): the log of this site's SuperExec says more."
            )


def _receive(connection: socket.socket, deadline: float) -> tuple[dict[str, Any], Payload | None]:
    # A timeout of 0 would mean not to wait at all.
    connection.settimeout(max(0.001, deadline - time.monotonic()))
    return receive(connection)


def _seconds(job: Job) -> float:
    try:
        seconds = json.loads(job.request["config"])["round-timeout"]
        return float(seconds) + _MARGIN_S
    except (KeyError, TypeError, ValueError):
        return _DEFAULT_S


def _how(path: Path, pid: int) -> str:
    deadline = time.monotonic() + _NOTE_S
    while time.monotonic() < deadline:
        if (last := ended(path)).get("pid") == pid:
            return str(last["how"])
        time.sleep(0.05)
    return "it closed the connection"


def _error(said: dict[str, Any]) -> FleetError:
    """The error that a job raised, of its own class."""
    kind, sentence = str(said["class"]), str(said["sentence"])
    if kind == manifest.PayloadError.__name__:
        return manifest.PayloadError(said["reason"], sentence)
    found = getattr(errors, kind, None)
    if isinstance(found, type) and issubclass(found, FleetError):
        return found(sentence)
    return RunFailedError(sentence)
