"""A ClientApp that takes a payload and sends another back, cut as the project's own is."""

import hashlib
import os

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from certs.flower import set_chunk_size

# Where a payload and its hash lie in a message.
PAYLOAD, ABOUT = "payload", "about"

app = ClientApp()


def to_records(size: int, **about: str | int) -> RecordDict:
    """Make a payload of random bytes; no two chunks are alike, and none can be compressed."""
    data = os.urandom(size)
    about["sha256"] = hashlib.sha256(data).hexdigest()
    flat = Array("uint8", (size,), "raw", data)
    return RecordDict({PAYLOAD: ArrayRecord({"flat": flat}), ABOUT: ConfigRecord({**about})})


def intact(records: RecordDict) -> bool:
    """Whether a payload is what was sent."""
    data = records.array_records[PAYLOAD]["flat"].data
    return hashlib.sha256(data).hexdigest() == records.config_records[ABOUT]["sha256"]


@app.query()
def describe(message: Message, context: Context) -> Message:
    """Say the chunk size that suits this site."""
    chunk = context.node_config["chunk-bytes"]
    return Message(RecordDict({ABOUT: ConfigRecord({"chunk-bytes": chunk})}), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Check what came, send as much as the run asks for."""
    set_chunk_size(int(context.node_config["chunk-bytes"]))
    whole = "yes" if intact(message.content) else "no"
    return Message(to_records(int(context.run_config["up-bytes"]), whole=whole), reply_to=message)
