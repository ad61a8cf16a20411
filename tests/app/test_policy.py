"""Finding, checking, hashing and loading SmolVLA."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.policy import (
    CAMERAS,
    frozen_hash,
    load_policy,
    load_processors,
    resolve_model,
    trainable_names,
    trainable_tensors,
)
from certs.errors import ModelError


@pytest.fixture(scope="module")
def policy(tiny_base: Path) -> Any:
    return load_policy(tiny_base, "cpu")


@pytest.fixture
def copy(models: Path, tmp_path: Path) -> Path:
    """A tiny model of one's own to break."""
    shutil.copytree(models / "tiny", tmp_path / "copy")
    return tmp_path / "copy" / "base"


def _edit(base: Path, **changes: object) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | changes))


def test_names_in_the_file_are_what_lerobot_trains(tiny_base: Path, policy: Any) -> None:
    names = trainable_names(tiny_base)
    assert names == sorted(
        name for name, tensor in policy.named_parameters() if tensor.requires_grad
    )
    assert list(trainable_tensors(policy)) == names
    assert 0 < len(names) < len(policy.state_dict())


def test_masters_are_float32_and_equal_the_file(tiny_base: Path, policy: Any) -> None:
    import torch
    from safetensors.torch import load_file

    stored = load_file(tiny_base / "model.safetensors")
    for name, parameter in policy.named_parameters():
        assert parameter.dtype == torch.float32, name
        assert torch.equal(parameter, stored[name].float()), name


def test_float32_weights_of_a_checkpoint_are_not_rounded(copy: Path) -> None:
    import torch

    from app import tensorfile

    file, names = copy / "model.safetensors", trainable_names(copy)
    # Not one of these is a bfloat16.
    finer = {name: array + np.float32(1e-5) for name, array in tensorfile.read(file, names).items()}
    tensorfile.write(copy / "finer", finer, base=file)
    (copy / "finer").rename(file)
    for name, parameter in trainable_tensors(load_policy(copy, "cpu")).items():
        assert torch.equal(parameter, torch.from_numpy(finer[name])), name


def test_our_path_computes_what_lerobots_own_path_computes(tiny_base: Path, policy: Any) -> None:
    import torch
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy

    theirs = SmolVLAPolicy.from_pretrained(tiny_base, strict=True)
    theirs.float()
    neutral = {
        key: {"mean": np.zeros(6), "std": np.ones(6)} for key in ("observation.state", "action")
    }
    pre, _ = load_processors(tiny_base, policy, neutral)
    random = torch.Generator().manual_seed(0)
    batch = pre(
        {
            "observation.images.top": torch.rand(2, 3, 96, 128, generator=random),
            "observation.images.wrist": torch.rand(2, 3, 96, 128, generator=random),
            "observation.state": torch.rand(2, 6, generator=random),
            "action": torch.rand(2, 50, 6, generator=random),
            "task": ["Pick up the cube."] * 2,
        }
    )
    noise, time = torch.randn(2, 50, 32, generator=random), torch.tensor([0.3, 0.8])
    with torch.no_grad():
        ours, _ = policy.forward(dict(batch), noise, time)
        reference, _ = theirs.forward(dict(batch), noise, time)
    assert torch.equal(ours, reference)


def test_processors_rename_cameras_and_normalise(tiny_base: Path, policy: Any) -> None:
    import torch

    state, action = np.arange(6.0), np.arange(6.0) + 10
    pre, post = load_processors(
        tiny_base,
        policy,
        {
            "observation.state": {"mean": state, "std": np.full(6, 2.0)},
            "action": {"mean": action, "std": np.full(6, 4.0)},
        },
    )
    image = torch.rand(1, 3, 8, 8)
    batch = pre(
        {
            **dict.fromkeys(CAMERAS, image),
            "observation.state": torch.from_numpy(state + 2).float()[None],
            "action": torch.from_numpy(action - 4).float()[None],
            "task": ["Pick up the cube."],
        }
    )
    torch.testing.assert_close(batch["observation.state"], torch.ones(1, 6))
    torch.testing.assert_close(batch["action"], -torch.ones(1, 6))
    for number in (1, 2, 3):
        # Images are not normalised.
        assert torch.equal(batch[f"observation.images.camera{number}"], image)
    torch.testing.assert_close(post(batch["action"]), torch.from_numpy(action - 4).float()[None])


def test_frozen_hash_sees_frozen_tensors_only(copy: Path, tiny_base: Path) -> None:
    from safetensors.torch import load_file, save_file

    original = frozen_hash(tiny_base)
    assert frozen_hash(copy) == original
    file = copy / "model.safetensors"
    tensors = load_file(file)
    tensors["model.state_proj.bias"] += 1
    save_file(tensors, file)
    assert frozen_hash(copy) == original
    tensors["model.vlm_with_expert.vlm.lm_head.weight"][0, 0] += 1
    save_file(tensors, file)
    assert frozen_hash(copy) != original


def test_resolves_tiny_directories_and_moved_models(
    copy: Path, models: Path, tiny_base: Path
) -> None:
    assert resolve_model("tiny", models) == tiny_base
    assert resolve_model(str(copy), models) == copy
    # config.json still names the first place; the VLM beside the base wins.
    assert load_policy(copy, "cpu").config.vlm_model_name == str((copy.parent / "vlm").resolve())


def test_reading_names_and_hash_needs_neither_torch_nor_lerobot(tiny_base: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from app.policy import *;"
        "base = resolve_model(sys.argv[1], Path('unused'));"
        "trainable_names(base); frozen_hash(base);"
        "assert not {'torch', 'lerobot', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tiny_base)], check=True, timeout=60)


@pytest.mark.parametrize("name", ["/no/such/model", "nobody/such-model", "models", "hf:", "a/b/c"])
def test_a_missing_model_is_one_sentence(name: str, models: Path) -> None:
    with pytest.raises(ModelError, match=name) as caught:
        resolve_model(name, models)
    assert "\n" not in str(caught.value)


def test_broken_models_are_refused_by_name(copy: Path, models: Path) -> None:
    def refused(match: str) -> None:
        with pytest.raises(ModelError, match=match) as caught:
            resolve_model(str(copy), models)
        assert "\n" not in str(caught.value)

    original = json.loads((copy / "config.json").read_text())
    _edit(copy, type="act")
    refused("'act' policy")
    _edit(copy, **original | {"output_features": {"action": {"type": "ACTION", "shape": [7]}}})
    refused(r"shape \[7\]")
    _edit(
        copy,
        **original | {"input_features": {"observation.state": {"type": "STATE", "shape": [6]}}},
    )
    refused("no observation.images.camera1")
    _edit(copy, **original)
    weights = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(weights[:-1])
    refused("complete safetensors")
    (copy / "model.safetensors").write_bytes(b"not a model")
    refused("complete safetensors")
    (copy / "model.safetensors").unlink()
    refused("no model.safetensors")
    (copy / "config.json").write_text("{")
    refused("cannot be read")
    (copy / "config.json").unlink()
    refused("no config.json")


def test_a_missing_vlm_is_refused(copy: Path, models: Path) -> None:
    shutil.rmtree(copy.parent / "vlm")
    _edit(copy, vlm_model_name="/no/such/vlm")
    with pytest.raises(ModelError, match="/no/such/vlm"):
        resolve_model(str(copy), models)
    _edit(copy, vlm_model_name="nobody/vlm")
    with pytest.raises(ModelError, match="nobody/vlm"):
        resolve_model(str(copy), models)


def test_a_file_without_every_tensor_is_refused(copy: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(copy / "model.safetensors")
    del tensors["model.action_out_proj.bias"]
    save_file(tensors, copy / "model.safetensors")
    with pytest.raises(ModelError, match=r"does not hold the tensors"):
        load_policy(copy, "cpu")


def test_hub_models_come_with_their_vlm_and_stay_usable_offline(
    hub: Any, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.move(copy.parent / "vlm", tmp_path / "vlm")
    _edit(copy, vlm_model_name="acme/vlm")
    hub.repositories = {"models/acme/policy": copy, "models/acme/vlm": tmp_path / "vlm"}
    cache = tmp_path / "cache"
    code = (
        "from pathlib import Path; from app.policy import *;"
        "base = resolve_model({name!r}, Path('unused'));"
        "print(base, frozen_hash(base))"
    )
    path, digest = hub.run(code.format(name="hf:acme/policy"), cache).split()
    assert Path(path).is_relative_to(cache)
    assert digest == frozen_hash(copy)
    # The VLM's weights are in the policy's file and are not fetched again.
    assert not any("/vlm/resolve" in line and "safetensors" in line for line in hub.requests)
    # Without hf: the same name is found in the cache and the hub hears nothing.
    hub.requests.clear()
    assert hub.run(code.format(name="acme/policy"), cache).split() == [path, digest]
    assert hub.requests == []
    # And it loads from there, here with the hub offline.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache / "hub"))
    assert sorted(trainable_tensors(load_policy(Path(path), "cpu"))) == trainable_names(copy)


def test_an_unknown_hub_model_is_one_sentence(hub: Any, tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; from app.policy import *\n"
        "try: resolve_model('hf:acme/nothing', Path('unused'))\n"
        "except ModelError as error: print(repr(str(error)))"
    )
    sentence = hub.run(code, tmp_path)
    assert "hf:acme/nothing" in sentence
    assert "\\n" not in sentence
