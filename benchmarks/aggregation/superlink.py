"""A stand-in for the SuperLink and its sites, in a process of its own: what a ServerApp talks to.

The ServerApp keeps Flower's own ``HttpGrid``, so that every copy Flower makes of a message counts; only HTTPS is
replaced, by a Unix socket. Sites answer at once: no reply waits for another, which is the most a ServerApp can be
sent at a time.
"""

import argparse
import json
import threading
from dataclasses import replace
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto import message_pb2, node_pb2, runtime_pb2
from flwr.supercore.inflatable.inflatable_object import (
    InflatableObject,
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
)
from flwr.supercore.task_identity import TaskIdentity

from app.description import Description
from app.payload import MANIFEST, Payload, to_records
from app.statistics import Moments

# The Runtime API's calls that HttpGrid makes, with what they take and answer.
_CALLS: dict[str, tuple[Any, Any]] = {
    "GetNodes": (runtime_pb2.GetNodesRequest, runtime_pb2.GetNodesResponse),
    "PushMessages": (runtime_pb2.PushAppMessagesRequest, runtime_pb2.PushAppMessagesResponse),
    "PushObject": (message_pb2.PushObjectRequest, message_pb2.PushObjectResponse),
    "PullMessages": (runtime_pb2.PullAppMessagesRequest, runtime_pb2.PullAppMessagesResponse),
    "PullObject": (message_pb2.PullObjectRequest, message_pb2.PullObjectResponse),
    "ConfirmMessageReceived": (
        message_pb2.ConfirmMessageReceivedRequest,
        message_pb2.ConfirmMessageReceivedResponse,
    ),
}
_EPISODES, _FRAMES = 10, 3000


class RuntimeClient:
    """What HttpGrid calls in place of its HTTP client; each thread has its own connection."""

    def __init__(self, address: str) -> None:
        self._address, self._local = address, threading.local()

    def __getattr__(self, call: str) -> Any:
        _, answer = _CALLS[call]
        return lambda request: answer.FromString(self._exchange(call, request.SerializeToString()))

    def _exchange(self, call: str, request: bytes) -> bytes:
        if not hasattr(self._local, "link"):
            self._local.link = Client(self._address)
        self._local.link.send_bytes(call.encode())
        self._local.link.send_bytes(request)
        answer: bytes = self._local.link.recv_bytes()
        return answer


class SuperLink:
    """Answers those calls for scripted sites, each of which holds the model ``held``.

    Site k trains to the k-th of ``updates``, in turn, whatever model it is sent.
    """

    def __init__(self, sites: int, held: str, updates: list[Path]) -> None:
        self._sites, self._held = sites, held
        self._updates = [Payload.open(path) for path in updates]
        self._asked: dict[str, tuple[Any, list[str]]] = {}
        self._config_records: dict[str, ConfigRecord] = {}
        self._objects: dict[str, InflatableObject] = {}

    def serve(self, link: Connection) -> None:
        """Answer one connection until it closes."""
        try:
            while True:
                call = link.recv_bytes().decode()
                takes, answers = _CALLS[call]
                found = getattr(self, call)(takes.FromString(link.recv_bytes()))
                link.send_bytes(answers(**found).SerializeToString())
        except EOFError:
            return

    def GetNodes(self, _: Any) -> dict[str, Any]:  # noqa: N802 - Flower's name, as all below
        nodes = range(1, self._sites + 1)
        return {"nodes": [node_pb2.NodeInfo(node_id=n, name=f"site-{n:02d}") for n in nodes]}

    def PushMessages(self, request: Any) -> dict[str, Any]:  # noqa: N802
        ids, objects = [], set()
        for message, tree in zip(request.messages_list, request.message_object_trees, strict=True):
            of_it = [part.object_id for part in iterate_object_tree(tree)]
            ids.append(message.metadata.message_id)
            self._asked[ids[-1]] = (message, of_it)
            objects |= set(of_it)
        return {"message_ids": ids, "objects_to_push": sorted(objects), "session_id": "1"}

    def PushObject(self, request: Any) -> dict[str, Any]:  # noqa: N802
        content = request.object_content
        # A real site would keep the model's bytes, too; a scripted one has no use for them.
        if content.startswith(b"ConfigRecord"):
            self._config_records[request.object_id] = ConfigRecord.inflate(content)
        return {"stored": True}

    def PullMessages(self, request: Any) -> dict[str, Any]:  # noqa: N802
        messages, trees = [], []
        for message_id in request.message_ids:
            reply = self._reply(*self._asked[message_id])
            reply.metadata.__dict__["_message_id"] = reply.object_id
            self._objects |= get_all_nested_objects(reply)
            messages.append(message_to_proto(remove_content_from_message(reply)))
            trees.append(get_object_tree(reply))
        return {"messages_list": messages, "message_object_trees": trees}

    def PullObject(self, request: Any) -> dict[str, Any]:  # noqa: N802
        content = self._objects[request.object_id].deflate()
        return {"object_found": True, "object_available": True, "object_content": content}

    def ConfirmMessageReceived(self, _: Any) -> dict[str, Any]:  # noqa: N802
        return {}

    def _reply(self, message: Any, objects: list[str]) -> Message:
        asked = message_from_proto(message)
        node, kind = asked.metadata.dst_node_id, asked.metadata.message_type
        if kind == "query":
            return Message(self._describe(node), reply_to=asked)
        metrics = MetricRecord({"loss": 1.0 / node, "frames": _FRAMES * node})
        content = RecordDict()
        if kind == "train":
            records = [self._config_records.get(one) for one in objects]
            (text,) = (record["json"] for record in records if record and "json" in record)
            target = json.loads(str(text))["target"]
            content = to_records(replace(self._updates[node % len(self._updates)], base=target))
            assert MANIFEST in content
        content["metrics"] = metrics
        return Message(content, reply_to=asked)

    def _describe(self, node: int) -> RecordDict:
        joints = Moments(_FRAMES, np.zeros(6), np.full(6, float(_FRAMES)))
        return Description(
            site=f"site-{node:02d}",
            dataset="synthetic",
            train_episodes=_EPISODES,
            held_out_episodes=1,
            train_frames=_FRAMES,
            held_out_frames=_FRAMES // _EPISODES,
            fps=30,
            cameras=("top", "wrist"),
            tasks=("Pick up the cube.",),
            moments={"observation.state": joints, "action": joints},
            held=self._held,
            chunk_bytes=0,
        ).to_records()


def main() -> None:
    """Serve until the process is ended."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("address")
    parser.add_argument("updates", nargs="+", type=Path)
    parser.add_argument("--sites", type=int, required=True)
    parser.add_argument("--held", default="")
    options = parser.parse_args()
    # What Flower sets in a process that makes messages.
    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1
    superlink = SuperLink(options.sites, options.held, options.updates)
    # As many connections may wait as HttpGrid and the round have threads.
    with Listener(options.address, backlog=64) as listener:
        while True:
            link = listener.accept()
            threading.Thread(target=superlink.serve, args=(link,), daemon=True).start()


if __name__ == "__main__":
    main()
