"""A ServerApp that sends every site a payload and notes when each site's answer is there."""

import importlib
import json
import threading
import time
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.serverapp import Grid, ServerApp

from certs.flower import set_chunk_size

# The module that stands in for this name (sitecustomize.py); type checkers know the project's own.
_client: Any = importlib.import_module("app.client_app")

app = ServerApp()


def ask(grid: Grid, node: int, kind: str, content: RecordDict) -> Message:
    """Send one message and wait for its answer."""
    (sent,) = grid.push_messages([Message(content, node, kind, group_id="1")])
    while True:
        for reply in grid.pull_messages([sent]):
            if reply.has_error():
                raise RuntimeError(reply.error.reason)
            return reply
        time.sleep(0.2)


@app.main()
def main(grid: Grid, context: Context) -> None:
    """End when the sites named in ``sites`` have answered, or after ``seconds``."""
    config = context.run_config
    awaited = set(str(config["sites"]).split())
    deadline = time.monotonic() + float(config["seconds"])
    while len(nodes := list(grid.get_nodes())) < int(config["nodes"]):
        time.sleep(0.2)
    chunks: dict[str, int] = {}
    done: dict[str, dict[str, Any]] = {}
    everybody = threading.Barrier(len(nodes))
    started = time.monotonic()

    def exchange(name: str, node: int) -> None:
        empty = RecordDict({_client.ABOUT: ConfigRecord({"question": 1})})
        about = ask(grid, node, MessageType.QUERY, empty).content
        chunks[name] = int(about.config_records[_client.ABOUT]["chunk-bytes"])  # type: ignore[arg-type]
        everybody.wait(float(config["seconds"]))
        set_chunk_size(min(chunks.values()))
        request = _client.to_records(int(config["down-bytes"]))
        answer = ask(grid, node, MessageType.TRAIN, request).content
        whole = answer.config_records[_client.ABOUT]["whole"] == "yes" and _client.intact(answer)
        done[name] = {"seconds": time.monotonic() - started, "intact": whole}

    for node in nodes:
        threading.Thread(target=exchange, args=(node.name, node.node_id), daemon=True).start()
    while not awaited <= set(done) and time.monotonic() < deadline:
        time.sleep(0.2)
    Path(str(config["result"])).write_text(json.dumps({"chunks": chunks, "done": done}))
