"""Ends this site's work for a run that was stopped.

Flower 1.41 tells nobody at the site: the ClientApp of a stopped run works on to its end, and its SuperNode, which waits
for the reply, takes no other message until then. So the SuperNode asks now and then whether the run it works for still
runs. When it does not, the task is finished in its name and an error stands in for the reply. The ClientApp learns it
from its next heartbeat, at most 22 s later, and ends; the trainer cancels the job of a ClientApp that ended.
"""

import logging
import time
from typing import TYPE_CHECKING, Any, NoReturn

import httpx
from cryptography.hazmat.primitives.asymmetric import ec

from certs.flower import HookError
from certs.identity import Identity

if TYPE_CHECKING:
    from flwr.supernode.fleet_http_client import FleetHttpClient

# Seconds between two looks: a request of a few milliseconds, and only while a ClientApp works.
_LOOK_S = 10.0

_log = logging.getLogger("vlafleet.supernode")


def watch(
    state: Any, identity: Identity, superlink: str, key: ec.EllipticCurvePrivateKey
) -> NoReturn:
    """Watch the runs of a SuperNode's ``state`` at a SuperLink (``host:port``) for ever; for a thread of its own."""
    from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
    from flwr.supernode.fleet_http_client import FleetHttpClient
    from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

    check_state_hook(type(state))
    client = FleetHttpClient.from_server_address(
        superlink,
        False,
        str(identity.authority),
        interceptors=[
            RuntimeVersionHttpInterceptor(component_name="SuperNode"),
            NodeAuthHttpInterceptor(key, key.public_key()),
        ],
    )
    while True:
        time.sleep(_LOOK_S)
        for run in at_work(state):
            try:
                stopped = is_stopped(client, state.get_node_id(), run)
            except httpx.HTTPError:  # no link: Flower's own requests say so
                continue
            if stopped and end(state, run):
                _log.info("run %s was stopped: its ClientApp ends", run)


def is_stopped(client: "FleetHttpClient", node: int, run: int) -> bool:
    """Whether the SuperLink says that the run no longer runs; ``httpx.HTTPError`` when it says nothing."""
    from flwr.proto.node_pb2 import Node
    from flwr.proto.run_pb2 import GetRunRequest
    from flwr.supercore.error import ApiErrorCode, FlowerError

    try:
        client.GetRun(GetRunRequest(node=Node(node_id=node), run_id=run))
    except httpx.HTTPStatusError as error:
        said = FlowerError.from_json(error.response.text)
        return said is not None and said.code == ApiErrorCode.FLEET_RUN_STATUS_NOT_ALLOWED
    return False


def at_work(state: Any) -> set[int]:
    """The runs for which a ClientApp has taken a message and has not replied."""
    with state.lock_msg_store:
        entries = [
            (entry.message.metadata, entry.is_retrieved) for entry in state.msg_store.values()
        ]
    replied = {metadata.reply_to_message_id for metadata, _ in entries}
    return {
        metadata.run_id
        for metadata, taken in entries
        if taken and not metadata.reply_to_message_id and metadata.message_id not in replied
    }


def end(state: Any, run: int) -> bool:
    """Finish the tasks of a run, and put an error in the place of their replies; False when there are none left.

    Hook: ``InMemoryNodeState._store_error_replies``, with which Flower answers for a ClientApp that crashed.
    """
    from flwr.app import Error
    from flwr.common.constant import ErrorCode, Status, SubStatus

    tasks = state.get_tasks(run_ids=[run], statuses=[Status.RUNNING])
    # Its token goes first: from here on the ClientApp cannot reply.
    if not any(state.finish_task(task.task_id, SubStatus.STOPPED, "") for task in tasks):
        return False
    state._store_error_replies({run}, Error(ErrorCode.CLIENT_APP_CRASHED, "The run was stopped."))
    return True


def check_state_hook(state: type) -> None:
    """Raise ``HookError`` unless the SuperNode's state still answers in a ClientApp's name."""
    wanted = ("_store_error_replies", "get_tasks", "finish_task", "get_node_id")
    if missing := [name for name in wanted if not callable(getattr(state, name, None))]:
        raise HookError(
            f"the hook {missing[0]} is gone from Flower's InMemoryNodeState: "
            "a stopped run's ClientApp could not be ended"
        )
