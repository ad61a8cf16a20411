"""One message in a process of its own, as Flower's SuperExec starts one: in comes a file, out goes one.

The work is done here, or by the trainer that ``VLAFLEET_TRAINER`` names. Prints when the ClientApp was called and when
it had its reply.
"""

import json
import os
import sys
import time
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, RecordDict

# What Flower's own process imports before it loads the app.
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.cli import flwr_clientapp  # noqa: F401

from app.client_app import app
from app.job import REQUEST
from app.payload import Payload, from_records, to_records
from app.supervisor import SOCKET
from benchmarks.round_overhead import stamps


def main(folder: Path) -> None:
    """Answer the message in ``folder``: ``job.json`` and ``model``; leave ``reply.json`` and ``update``."""
    if SOCKET not in os.environ:
        stamps.install()
    for name in ("_task_id", "_run_id", "_node_id"):
        setattr(TaskIdentity, name, 1)
    job = json.loads((folder / "job.json").read_text())
    model = folder / "model"
    content = to_records(Payload.open(model)) if model.exists() else RecordDict()
    content[REQUEST] = ConfigRecord(job["request"])
    message = Message(content, 1, job["kind"])
    message.metadata.__dict__["_message_id"] = "asked"
    called = time.monotonic()
    reply = app(message, Context(1, 1, job["node"], RecordDict(), {}))
    replied = time.monotonic()
    if reply.has_error():
        sys.exit(str(reply.error.reason))
    records = {name: dict(record) for name, record in reply.content.config_records.items()}
    (folder / "reply.json").write_text(json.dumps(records))
    if job["kind"] == "train":
        from_records(reply.content, kind="update").write(folder / "update")
    print(json.dumps([called, replied]))
    # A process that Flower started has replied by now: what it still writes is not waited for.


if __name__ == "__main__":
    main(Path(sys.argv[1]))
