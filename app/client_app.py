"""The ClientApp: hands each message to the site's resident trainer, and its answer back.

Flower starts a process for each message, so this module imports neither torch nor lerobot. Where no
trainer runs the process does the work itself: in the simulation, whose processes serve many messages,
and in a pod of its own.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp

from app import cause, payload, trainer_client
from app.job import METRICS, REQUEST, Answer, Job, Kind, Record
from app.payload import PayloadError
from app.simulation import is_simulated
from app.supervisor import SOCKET, restarts
from certs import logs
from certs.errors import FleetError
from certs.flower import set_chunk_size
from certs.link import CHUNK_BYTES

if TYPE_CHECKING:
    from app.worker import Worker

_log = logging.getLogger("flwr")
app = ClientApp()


def _answer(kind: Kind) -> Callable[[Message, Context], Message]:
    """Send an expected failure back as its sentence; Flower would log and send a traceback."""

    def answered(message: Message, context: Context) -> Message:
        try:
            # Flower cuts the reply into chunks in this process.
            if chunk := context.node_config.get(CHUNK_BYTES):
                set_chunk_size(int(chunk))
            model = (
                None if kind == "describe" else payload.from_records(message.content, kind="model")
            )
            request = _request(message)
            logs.bind(run=request.get("lineage"), round=request.get("round"))
            answer = _submit(Job(kind, dict(context.node_config), request, model))
            return Message(answer.to_records(), reply_to=message)
        except FleetError as error:
            _log.error("%s: %s", kind, error)
            return Message(Error(cause.code(error), str(error)), reply_to=message)

    return answered


app.query()(_answer("describe"))
app.train()(_answer("train"))
app.evaluate()(_answer("evaluate"))


def _request(message: Message) -> Record:
    record = message.content.config_records.get(REQUEST)
    if record is None:
        raise PayloadError("missing", f"The message has no record {REQUEST!r}.")
    return dict(record)


def _submit(job: Job) -> Answer:
    if SOCKET in os.environ:
        answer = trainer_client.submit(job)
        if job.kind == "train" and METRICS in answer.metrics:
            # Of what starts it again the trainer knows nothing.
            times = restarts(Path(os.environ[SOCKET]))
            told = {**answer.metrics[METRICS], "trainer_restarts": times}
            return replace(answer, metrics={**answer.metrics, METRICS: told})
        return answer
    worker = _worker(brief=not is_simulated(job.node))
    answer = worker.handle(job, _unwatched)
    # This process may end with its message, as a pod does, and another may have this site next.
    worker.settle()
    return answer


@functools.cache
def _worker(*, brief: bool) -> Worker:
    """This process's own, with what it has loaded."""
    from app.worker import Worker

    return Worker(brief=brief)


def _unwatched(**_: Any) -> None:
    """Progress that nobody follows but the log."""
