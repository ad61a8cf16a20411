"""A stopped run's ClientApp is ended in Flower's own state, and its SuperNode gets the reply it waits for."""

import httpx
import pytest
from flwr.app import Message, RecordDict
from flwr.common.constant import Status, SubStatus
from flwr.supercore.constant import TaskType
from flwr.supercore.error import ApiErrorCode, FlowerError
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.nodestate import NodeStateFactory
from flwr.supernode.nodestate.in_memory_nodestate import InMemoryNodeState
from flwr.supernode.start_client_internal import _insert_message

from certs.flower import HookError
from supernode.stopped_runs import at_work, check_state_hook, end, is_stopped

RUN = 7


@pytest.fixture
def state(monkeypatch: pytest.MonkeyPatch) -> InMemoryNodeState:
    """A SuperNode's state with one message, whose ClientApp was started."""
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, RUN)
    factory = ObjectStoreFactory()
    state = NodeStateFactory(objectstore_factory=factory).state()
    assert isinstance(state, InMemoryNodeState)
    message = Message(RecordDict(), dst_node_id=1, message_type="train")
    _insert_message(message, state, factory.store())
    task = state.create_task(TaskType.CLIENT_APP, RUN, fab_hash="f")
    assert task is not None
    assert state.claim_task(task)
    assert state.activate_task(task)
    return state


def taken(state: InMemoryNodeState) -> int:
    [message] = state.get_messages_legacy(run_ids=[RUN], is_reply=False)
    state.record_message_processing_start(message.metadata.message_id)
    [task] = state.get_tasks(run_ids=[RUN])
    return task.task_id


def test_a_message_that_nobody_took_is_left_alone(state: InMemoryNodeState) -> None:
    """Its ClientApp is about to: ended before, it would leave the SuperNode waiting for ever."""
    assert at_work(state) == set()
    taken(state)
    assert at_work(state) == {RUN}


def test_the_reply_is_an_error_and_the_clientapp_is_out(state: InMemoryNodeState) -> None:
    task = taken(state)
    assert state.acknowledge_task_heartbeat(task)
    assert end(state, RUN)
    [finished] = state.get_tasks(run_ids=[RUN])
    assert (finished.status.status, finished.status.sub_status) == (
        Status.FINISHED,
        SubStatus.STOPPED,
    )
    # Flower's ClientApp ends when its heartbeat is refused.
    assert not state.acknowledge_task_heartbeat(task)
    [reply] = state.get_messages_legacy(is_reply=True)
    assert reply.error.reason == "The run was stopped."
    assert at_work(state) == set()
    assert not end(state, RUN)


def test_a_reply_that_is_on_its_way_stays_the_only_one(state: InMemoryNodeState) -> None:
    taken(state)
    [entry] = state.msg_store.values()
    reply = Message(RecordDict(), reply_to=entry.message)
    _insert_message(reply, state, state.object_store)
    assert at_work(state) == set()


class SuperLink:
    """Answers GetRun as the SuperLink does."""

    def __init__(self, status: int, code: int) -> None:
        self._answer = httpx.Response(
            status,
            json=FlowerError(code, "for the log").to_json("for everyone"),
            request=httpx.Request("POST", "https://superlink/v1/fleet/get-run"),
        )

    def GetRun(self, _: object) -> None:  # noqa: N802 (Flower's name)
        self._answer.raise_for_status()


@pytest.mark.parametrize(
    ("status", "code", "stopped"),
    [
        (403, int(ApiErrorCode.FLEET_RUN_STATUS_NOT_ALLOWED), True),
        (403, int(ApiErrorCode.FLEET_GET_RUN_FAILED), False),
        (404, 0, False),
        (200, 0, False),
    ],
)
def test_only_the_superlinks_word_stops_a_run(status: int, code: int, stopped: bool) -> None:
    assert is_stopped(SuperLink(status, code), 1, RUN) is stopped  # type: ignore[arg-type]


def test_a_flower_without_the_hook_is_named() -> None:
    check_state_hook(InMemoryNodeState)
    with pytest.raises(HookError, match="_store_error_replies is gone"):
        check_state_hook(object)
