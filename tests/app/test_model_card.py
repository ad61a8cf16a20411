"""A model card is metadata the Hub reads and claims the record supports, and names no directory."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import ModelCard

from app.checkpoint import Checkpoint
from app.model_card import write_model_card
from certs.errors import RunFailedError, StorageError
from tests.records import SITE, record, run


def rounds(*losses: float | None) -> list[dict[str, Any]]:
    return [record(n, {"site-a": loss, "site-b": 1.0}) for n, loss in enumerate(losses)]


def rows(text: str) -> dict[str, list[str]]:
    """The cells of every table's rows, by their first one."""
    lines = [line.strip("| ").split("|") for line in text.splitlines() if line.startswith("|")]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in lines}


def test_the_hub_can_read_its_metadata(tmp_path: Path) -> None:
    card = ModelCard(write_model_card(run(tmp_path, rounds(2.0, 1.0))).read_text())
    assert card.data.to_dict() == {
        "license": "apache-2.0",
        "library_name": "lerobot",
        "pipeline_tag": "robotics",
        "base_model": "lerobot/smolvla_base",
        "tags": ["robotics", "lerobot", "smolvla", "so101", "federated-learning", "vlafleet"],
    }
    assert card.text.lstrip().startswith("# SmolVLA, trained by 2 robot sites together\n")


@pytest.mark.parametrize(
    ("model", "base"),
    [
        ("hf:lerobot/smolvla_base", "lerobot/smolvla_base"),
        ("tiny", None),
        ("/srv/models/base", None),
        # A directory of the ServerApp's that looks like a name on the Hub.
        ("models/base", None),
    ],
)
def test_only_a_base_on_the_hub_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, base: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("models/base").mkdir(parents=True)
    text = write_model_card(run(tmp_path, rounds(2.0, 1.0), model=model)).read_text()
    assert ModelCard(text).data.base_model == base
    assert ("The base model is not on the Hub" in text) == (base is None)
    assert ("cannot\n  move a robot" in text) == (model == "tiny")
    assert "/srv" not in text


def test_only_datasets_on_the_hub_are_named(tmp_path: Path) -> None:
    sites = {
        "site-a": {**SITE, "dataset": "hf:acme/pick#episodes=0:8"},
        "site-b": {**SITE, "dataset": "secret-folder"},
    }
    one = rounds(2.0, 1.0)
    one[1]["server"] = {
        "/srv/data/unseen": {"loss": 0.7, "reason": None},
        "hf:acme/unseen": {"loss": None, "reason": "out of reach"},
    }
    settings: Any = {
        "eval_datasets": "/srv/data/unseen hf:acme/unseen",
        "simulation_dataset": "/srv/all",
    }
    text = write_model_card(run(tmp_path, one, sites=sites, **settings)).read_text()
    assert ModelCard(text).data.datasets == ["acme/pick"]
    assert "secret-folder" not in text
    assert "/srv" not in text
    assert rows(text)["unseen"] == ["not measured", "0.700"]
    assert rows(text)["hf:acme/unseen"] == ["not measured", "not measured"]
    assert "not measured on a dataset that no site trained on" not in text


def test_it_says_what_it_was_trained_on(tmp_path: Path) -> None:
    one = rounds(2.0, 1.0, 0.5)
    for each in one[1:]:
        each["sites"]["site-b"]["train"] |= {"state": "offline", "reason": "gone"}
    adam: dict[str, Any] = {"strategy": "fedadam", "server_learning_rate": 0.01}
    text = write_model_card(run(tmp_path, one, codec="bf16", **adam)).read_text()
    assert "- Sites: 2\n" in text
    assert "- Episodes: 16 trained on, 4 held out\n" in text
    assert "- Frames: 762 trained on, 194 held out\n" in text
    assert '- Tasks: "Pick up the red block."\n' in text
    assert "- Sites whose updates are in the model: 1 of 2\n" in text
    assert "- Trained: 99,880,992 values outside the VLM, which stayed frozen\n" in text
    settings = rows(text)
    assert settings["`codec`"] == ["bf16"]
    # Of settings that depend on others, those with an effect alone.
    assert "`server-beta2`" in settings
    assert "`trim`" not in settings
    assert settings["`exchange`"] == ["expert"]
    assert "`lora-rank`" not in settings


def test_it_says_of_adapters_what_they_are(tmp_path: Path) -> None:
    directory = run(tmp_path, rounds(2.0, 1.0), exchange="lora", lora_rank=32)
    text = write_model_card(directory).read_text()
    assert (
        "- Trained: 99,880,992 values of low-rank adapters ([LoRA](https://arxiv.org/abs/2106.09685)), merged into the "
        "weights; all else stayed\n  frozen. `adapters.safetensors` holds them alone, under peft's names (rank 32, "
        "alpha 8)\n- Base model: " in text
    )
    assert rows(text)["`exchange`"] == ["lora"]
    assert rows(text)["`lora-rank`"] == ["32"]


def test_losses_are_against_round_0_and_null_is_not_measured(tmp_path: Path) -> None:
    one = rounds(2.0, 0.5, 1.0, None)
    one[3]["aggregate"]["rmse_deg"] = None
    found = rows(write_model_card(run(tmp_path, one)).read_text())
    assert found["site-a"] == ["2.000", "0.500", "not measured", "-"]
    assert found["site-b"] == ["1.000", "1.000", "1.000", "+0.0 %"]
    assert found["all sites"] == ["1.500", "0.750", "not measured", "-"]
    assert found["gripper"] == ["15.000", "15.000", "not measured"]


def test_the_best_round_is_marked_and_a_failed_last_one_is_not_shown(tmp_path: Path) -> None:
    one = [*rounds(2.0, 0.5, 1.0), record(3, {"site-a": None, "site-b": None}, committed=False)]
    ended = {"at": "2026-01-01T01:00:00+00:00", "reason": "early stopping"}
    text = write_model_card(run(tmp_path, one, rounds=9, ended=ended)).read_text()
    assert "| | round 0 | round 1 (best) | round 2 | change |\n" in text
    assert "- Rounds: 2 of 9 committed, then early stopping ended the run\n" in text
    assert rows(text)["site-a"] == ["2.000", "0.500", "1.000", "-50.0 %"]


def test_it_claims_no_robot_and_no_privacy(tmp_path: Path) -> None:
    text = write_model_card(run(tmp_path, rounds(2.0, 1.0))).read_text()
    assert "It was not evaluated on a real robot." in text
    assert "differential privacy was\n  not used" in text
    assert "not measured on a dataset that no site trained on" in text


def test_whatever_a_record_holds_stays_within_its_place(tmp_path: Path) -> None:
    task = "Pick | <script>alert(1)</script>\n\n# [up](javascript:x) `it` {{ 7 * 7 }}"
    text = write_model_card(
        run(tmp_path, rounds(2.0, 1.0), sites={"site-a": {**SITE, "tasks": [task]}})
    ).read_text()
    (line,) = [line for line in text.splitlines() if line.startswith("- Tasks")]
    assert line == (
        r'- Tasks: "Pick \| \<script\>alert(1)\</script\> # \[up\](javascript:x) \`it\` {{ 7 \* 7 }}"'
    )


def test_a_run_without_rounds_has_a_card_too(tmp_path: Path) -> None:
    text = write_model_card(run(tmp_path, [], sites={})).read_text()
    assert ModelCard(text).data.license == "apache-2.0"
    assert "- Rounds: 0 of 1 committed\n" in text


def test_its_snippet_loads_the_model(tmp_path: Path, tiny_base: Path) -> None:
    statistics = {
        key: {"mean": np.zeros(6, np.float32), "std": np.ones(6, np.float32)}
        for key in ("observation.state", "action")
    }
    with Checkpoint(
        tmp_path, 1, base=tiny_base, shapes={}, states=(), normalisation=statistics
    ) as writing:
        writing.finish({"round": 1}, None)
    text = write_model_card(run(tmp_path, rounds(2.0, 1.0), push_to="acme/pick")).read_text()
    (snippet,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert 'name = "acme/pick"' in snippet
    names: dict[str, Any] = {}
    exec(snippet.replace("acme/pick", str(tmp_path / "round-0001")), names)  # noqa: S102 - the card's own
    import torch

    observation = {
        "observation.state": torch.zeros(6),
        "task": "Pick up the red block.",
        **{f"observation.images.{camera}": torch.zeros(3, 96, 128) for camera in ("top", "wrist")},
    }
    policy = names["policy"].eval()
    with torch.no_grad():
        action = names["postprocess"](policy.select_action(names["preprocess"](observation)))
    assert action.shape == (1, 6)


def test_a_damaged_record_is_one_sentence(tmp_path: Path) -> None:
    directory = run(tmp_path, rounds(2.0, 1.0), sites={"site-a": {"dataset": "x"}})
    with pytest.raises(RunFailedError, match="damaged") as caught:
        write_model_card(directory)
    assert "\n" not in str(caught.value)


def test_what_holds_the_card_cannot_be_written(tmp_path: Path) -> None:
    directory = run(tmp_path, rounds(2.0, 1.0))
    (directory / "model_card.md").mkdir()
    with pytest.raises(StorageError, match=re.escape(str(directory / "model_card.md"))):
        write_model_card(directory)
