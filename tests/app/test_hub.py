"""A policy is published whole, privately unless told otherwise, and every refusal is one sentence without the token."""

import json
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest

from app.checkpoint import SERVER, UPDATE, Checkpoint
from app.hub import push
from certs.errors import ModelError
from tests.hub import TOKEN, Hub

CARD = "---\nlicense: apache-2.0\n---\n# A policy\n"
POLICY = {
    "README.md",
    "config.json",
    "federation.json",
    "model.safetensors",
    "policy_postprocessor.json",
    "policy_postprocessor_step_0_unnormalizer_processor.safetensors",
    "policy_preprocessor.json",
    "policy_preprocessor_step_5_normalizer_processor.safetensors",
}
KEY = "models/acme/pick"

# What a push said or where its commit is; huggingface_hub reads its settings once, so each is a process.
PUSH = """
import sys
from pathlib import Path
from app.hub import push
from certs.errors import FleetError
try:
    print(push(Path({checkpoint!r}), {repository!r}, private={private}, card=Path({card!r}), message="Round 2"))
except FleetError as error:
    print(f"{{type(error).__name__}}: {{error}}" if "\\n" not in str(error) else repr(error))
"""


@pytest.fixture
def checkpoint(tiny_base: Path, tmp_path: Path) -> Path:
    """A round's checkpoint as the ServerApp writes it, with what must not be published beside the policy."""
    statistics = {
        key: {"mean": np.zeros(6, np.float32), "std": np.ones(6, np.float32)}
        for key in ("observation.state", "action")
    }
    checkpoints = tmp_path / "checkpoints"
    with Checkpoint(
        checkpoints, 2, base=tiny_base, shapes={}, states=(), normalisation=statistics
    ) as writing:
        base, record = {"name": str(tiny_base)}, {"reason": "SECRET"}
        writing.finish({"round": 2, "base": base, "record": record}, None)
    path = checkpoints / "round-0002"
    for name in (SERVER, UPDATE, "optimizer.pt"):
        (path / name).write_bytes(b"moments")
    (tmp_path / "model_card.md").write_text(CARD)
    return path


def pushed(
    hub: Hub, checkpoint: Path, *, token: str | None = TOKEN, private: bool = True, **other: str
) -> str:
    tmp_path = checkpoint.parents[1]
    settings = {
        "checkpoint": str(checkpoint),
        "repository": "acme/pick",
        "card": str(tmp_path / "model_card.md"),
    }
    code = PUSH.format(private=private, **{**settings, **other})
    return hub.run(code, tmp_path / "cache", token)


def refused(hub: Hub, checkpoint: Path, *, token: str | None = TOKEN, private: bool = True) -> str:
    """The reason of a StorageError that begins as every failed push does."""
    kind, _, sentence = pushed(hub, checkpoint, token=token, private=private).partition(": ")
    assert kind == "StorageError"
    start, _, reason = sentence.partition(": ")
    assert start == "Checkpoint round-0002 was not pushed to acme/pick"
    assert not token or token.strip() not in reason
    assert "s3cret" not in reason
    return reason


def test_a_policy_is_published_as_one_private_commit(hub: Hub, checkpoint: Path) -> None:
    address = pushed(hub, checkpoint)
    assert address == f"{hub.address}/acme/pick/commit/{hub.commit}"
    assert hub.messages == ["Round 2"]
    assert hub.private == {KEY}
    folder = hub.repositories[KEY]
    assert {path.name for path in folder.iterdir()} == POLICY
    assert (folder / "README.md").read_text() == CARD
    # The weights went the way of large files, byte for byte.
    weights = (checkpoint / "model.safetensors").read_bytes()
    assert (folder / "model.safetensors").read_bytes() == weights
    assert weights in hub.large.values()


def test_no_path_of_this_machine_is_published(hub: Hub, checkpoint: Path, tiny_base: Path) -> None:
    assert str(tiny_base.parent) in (checkpoint / "config.json").read_text()
    pushed(hub, checkpoint)
    folder = hub.repositories[KEY]
    for path in folder.glob("*.json"):
        assert str(tiny_base.parent) not in path.read_text(), path
        assert "SECRET" not in path.read_text(), path
    published = json.loads((folder / "config.json").read_text())
    here = json.loads((checkpoint / "config.json").read_text())
    assert published == {**here, "vlm_model_name": "vlm"}


def test_what_was_published_trains_on(hub: Hub, checkpoint: Path, tiny_base: Path) -> None:
    pushed(hub, checkpoint)
    code = (
        "import huggingface_hub\n"
        f"print(huggingface_hub.snapshot_download('acme/pick', token={TOKEN!r}))"
    )
    fetched = Path(hub.run(code, checkpoint.parents[1] / "fetched"))
    base = checkpoint.parents[1] / "model" / "base"
    shutil.copytree(fetched, base)
    shutil.copytree(tiny_base.parent / "vlm", base.parent / "vlm")
    from app.policy import load_policy

    assert len(list(load_policy(base, "cpu").parameters())) > 100


def test_adapters_are_published_beside_the_policy(hub: Hub, checkpoint: Path) -> None:
    (checkpoint / "adapters.safetensors").write_bytes(b"adapters")
    pushed(hub, checkpoint)
    folder = hub.repositories[KEY]
    assert {path.name for path in folder.iterdir()} == POLICY | {"adapters.safetensors"}
    assert (folder / "adapters.safetensors").read_bytes() == b"adapters"


def test_a_second_push_is_a_second_commit(hub: Hub, checkpoint: Path) -> None:
    pushed(hub, checkpoint)
    hub.requests.clear()
    card = checkpoint.parents[1] / "model_card.md"
    card.write_text(CARD + "Better.\n")
    pushed(hub, checkpoint)
    assert hub.messages == ["Round 2", "Round 2"]
    assert (hub.repositories[KEY] / "README.md").read_text().endswith("Better.\n")
    # What the hub has already is not sent again.
    assert not any(line.startswith("PUT") for line in hub.requests)


def test_a_public_repository_is_refused_when_private_is_asked(hub: Hub, checkpoint: Path) -> None:
    folder = checkpoint.parents[1] / "public"
    folder.mkdir()
    hub.repositories[KEY] = folder
    assert refused(hub, checkpoint) == (
        "it is public and push-private is set, make it private or choose another."
    )
    assert list(folder.iterdir()) == []
    assert hub.messages == []
    pushed(hub, checkpoint, private=False)
    assert {path.name for path in folder.iterdir()} == POLICY


def test_a_public_repository_is_made_only_when_asked_for(hub: Hub, checkpoint: Path) -> None:
    pushed(hub, checkpoint, private=False)
    assert hub.private == set()


@pytest.mark.parametrize(
    ("token", "reason"),
    [
        (
            "hf_wrong",
            "the Hub does not accept the token (401), set HF_TOKEN to one that may write.",
        ),
        (None, "there is no token, set HF_TOKEN to one that may write."),
        # The client's own error quotes a header that holds white space.
        ("hf_se\x0bcret", "HF_TOKEN holds a character that no token has."),
        ("hf_se\u00e9cret", "HF_TOKEN holds a character that no token has."),
    ],
)
def test_a_token_that_is_not_good_is_one_sentence(
    hub: Hub, checkpoint: Path, token: str | None, reason: str
) -> None:
    said = refused(hub, checkpoint, token=token)
    assert said == reason
    assert "cret" not in said
    assert hub.repositories == {}


@pytest.mark.parametrize(
    ("request_", "status", "reason"),
    [
        ("POST /api/repos/create", 500, "the Hub answered 500 (it gave no reason)."),
        ("POST /api/models/acme/pick/commit", 500, "the Hub answered 500 (it gave no reason)."),
        ("POST /api/models/acme/pick/commit", 403, "the token may not write there (403)"),
        ("PUT /lfs/", 400, "the Hub answered 400 (it gave no reason)."),
    ],
)
def test_what_the_hub_refuses_is_one_sentence(
    hub: Hub, checkpoint: Path, request_: str, status: int, reason: str
) -> None:
    hub.failures = {request_: [status] * 10}
    assert refused(hub, checkpoint).startswith(reason)
    assert hub.messages == []


def test_a_hub_that_stumbles_once_gets_the_weights_again(hub: Hub, checkpoint: Path) -> None:
    hub.failures = {"PUT /lfs/": [503]}
    assert "/commit/" in pushed(hub, checkpoint)
    assert hub.failures == {"PUT /lfs/": []}


def test_a_hub_out_of_reach_is_one_sentence(hub: Hub, checkpoint: Path) -> None:
    # Bound and never listening: a port that refuses for as long as the test runs.
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        hub.address = f"http://127.0.0.1:{closed.getsockname()[1]}"
        assert refused(hub, checkpoint).startswith("the Hub could not be reached (")


def test_a_hub_switched_off_is_not_asked(hub: Hub, checkpoint: Path) -> None:
    code = "import os; os.environ['HF_HUB_OFFLINE'] = '1'\n" + PUSH.format(
        checkpoint=str(checkpoint),
        repository="acme/pick",
        private=True,
        card=str(checkpoint.parents[1] / "model_card.md"),
    )
    said = hub.run(code, checkpoint.parents[1] / "cache", TOKEN)
    assert said.startswith("StorageError: ")
    assert "HF_HUB_OFFLINE" in said
    assert hub.requests == []


@pytest.mark.parametrize("missing", ["model.safetensors", "config.json", "federation.json", "card"])
def test_half_a_checkpoint_is_not_published(checkpoint: Path, missing: str) -> None:
    card = checkpoint.parents[1] / "model_card.md"
    path = card if missing == "card" else checkpoint / missing
    path.unlink()
    with pytest.raises(ModelError) as caught:
        push(checkpoint, "acme/pick", private=True, card=card, message="Round 2")
    assert str(path) in str(caught.value)


def test_a_name_without_an_owner_is_refused(checkpoint: Path) -> None:
    card = checkpoint.parents[1] / "model_card.md"
    with pytest.raises(ModelError, match="'pick' is not of the form 'owner/name'"):
        push(checkpoint, "pick", private=True, card=card, message="Round 2")
