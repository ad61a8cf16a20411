"""A checkpoint is a whole policy that lerobot opens, or it is not there."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app import tensorfile, trainables
from app.checkpoint import SERVER, UPDATE, Checkpoint, newest, read_federation
from app.config import RunConfig
from app.payload import Payload, Tensors, canonical_hash, pack
from app.policy import CAMERAS, frozen_hash, load_policy, resolve_model, trainable_names
from certs.errors import ModelError, StorageError

LORA = RunConfig(exchange="lora")
NORMALISATION = {
    "observation.state": {
        "mean": np.arange(6, dtype=np.float64),
        "std": np.full(6, 2.0),
    },
    "action": {"mean": np.full(6, -10.0), "std": np.full(6, 3.0)},
}


def trained(base: Path) -> Tensors:
    tensors = tensorfile.read(base / "model.safetensors", trainable_names(base))
    return {name: array + np.float32(0.125) for name, array in tensors.items()}


def write(
    checkpoints: Path,
    base: Path,
    number: int = 3,
    *,
    states: tuple[str, ...] = (),
    update: bool = False,
) -> Path:
    tensors = trained(base)
    shapes = {name: array.shape for name, array in tensors.items()}
    with Checkpoint(
        checkpoints,
        number,
        base=base,
        shapes=shapes,
        states=states,
        normalisation=NORMALISATION,
    ) as checkpoint:
        # In another order than they are stored in.
        for name in sorted(tensors, reverse=True):
            checkpoint.put(name, tensors[name], **dict.fromkeys(states, tensors[name] * number))

        def broadcast(target: str) -> Payload:
            return pack(
                sorted(tensors.items()), kind="model", codec="bf16", base="before", target=target,
                frozen="frozen",
            )  # fmt: skip

        checkpoint.finish({"round": number}, broadcast if update else None)
    return checkpoints / f"round-{number:04d}"


@pytest.fixture(scope="module")
def written(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("run") / "checkpoints", tiny_base)


def test_lerobot_opens_it_strictly_and_predicts_with_its_own_processors(
    written: Path, tiny_base: Path
) -> None:
    import torch
    from lerobot.policies.factory import make_pre_post_processors
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy

    policy = SmolVLAPolicy.from_pretrained(written, strict=True)
    for name, array in trained(tiny_base).items():
        loaded = policy.get_parameter(name).detach()
        assert torch.equal(loaded, torch.from_numpy(array).to(loaded.dtype)), name
    pre, post = make_pre_post_processors(policy.config, pretrained_path=str(written))
    batch = {
        "observation.state": torch.zeros(6),
        "task": "Pick up the cube.",
        **{camera: torch.rand(3, 96, 128) for camera in list(CAMERAS)[:2]},
    }
    prepared = pre(batch)
    # (0 - mean) / std, with the run's pooled numbers.
    expected = -torch.arange(6, dtype=torch.float32) / 2
    torch.testing.assert_close(prepared["observation.state"][0], expected)
    chunk = policy.predict_action_chunk(prepared)
    assert chunk.shape == (1, policy.config.chunk_size, 6)
    actions = post(chunk)
    torch.testing.assert_close(actions, chunk * 3 - 10)
    assert torch.isfinite(actions).all()


def adapters(base: Path) -> Tensors:
    fresh = trainables.initial(LORA, base)
    return {name: array + np.float32(0.03125) for name, array in fresh.items()}


def write_merged(checkpoints: Path, base: Path) -> Path:
    tensors = adapters(base)
    with Checkpoint(
        checkpoints,
        3,
        base=base,
        shapes={name: array.shape for name, array in tensors.items()},
        states=(),
        normalisation=NORMALISATION,
        exchange="lora",
    ) as checkpoint:
        for name in sorted(tensors, reverse=True):
            checkpoint.put(name, tensors[name])
        assert checkpoint.finish({"round": 3}, None) == canonical_hash(tensors)
    return checkpoints / "round-0003"


def test_adapters_are_merged_into_a_policy_that_lerobot_opens(
    tiny_base: Path, tmp_path: Path
) -> None:
    import torch
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy

    from app.lora import attach

    path = write_merged(tmp_path, tiny_base)
    own = adapters(tiny_base)
    stored = tensorfile.read(path / "adapters.safetensors", own)
    assert canonical_hash(stored) == canonical_hash(own)
    # The base's tensors by name and type; what is not adapted to the byte.
    file, before = path / "model.safetensors", tiny_base / "model.safetensors"
    found, expected = tensorfile.entries(file)[0], tensorfile.entries(before)[0]
    changed = {f"{layer}.weight" for layer in trainables.targets(tiny_base)}
    assert found.keys() == expected.keys()
    for name, entry in found.items():
        same = list(tensorfile.blocks(file, entry)) == list(
            tensorfile.blocks(before, expected[name])
        )
        assert same == (name not in changed), name
        assert entry.dtype == ("F32" if name in changed else expected[name].dtype)

    policy = SmolVLAPolicy.from_pretrained(path, strict=True).float()
    ours, adapted = load_policy(path, "cpu"), load_policy(tiny_base, "cpu")
    random = torch.Generator().manual_seed(0)
    inputs = {
        "observation.state": torch.rand(2, 6, generator=random),
        "observation.language.tokens": torch.arange(16).reshape(2, 8),
        "observation.language.attention_mask": torch.ones(2, 8, dtype=torch.bool),
        "observation.images.camera1": torch.rand(2, 3, 64, 64, generator=random),
    }
    noise = torch.randn(2, 50, 32, generator=random)
    with torch.no_grad():
        unadapted = adapted.predict_action_chunk(dict(inputs), noise=noise)
        attach(adapted, LORA.lora_rank)
        for name, array in own.items():
            adapted.get_parameter(name).copy_(torch.from_numpy(array))
        expected_chunk = adapted.predict_action_chunk(dict(inputs), noise=noise)
        assert (expected_chunk - unadapted).abs().max() > 0.1
        # lerobot rounds the weights it loads to bfloat16.
        for loaded, tolerance in ((ours, 1e-5), (policy, 0.02)):
            chunk = loaded.predict_action_chunk(dict(inputs), noise=noise)
            torch.testing.assert_close(chunk, expected_chunk, rtol=0, atol=tolerance)


def test_a_merged_checkpoint_is_a_base_for_another_run(
    tiny_base: Path, tmp_path: Path, models: Path
) -> None:
    path = write_merged(tmp_path, tiny_base)
    base = resolve_model(str(path), models)
    assert frozen_hash(base) == frozen_hash(tiny_base)
    assert trainable_names(base) == trainable_names(tiny_base)
    # Of adapters, which begin anew, too.
    assert trainables.targets(base) == trainables.targets(tiny_base)


def test_it_is_a_base_for_another_run(written: Path, tiny_base: Path, models: Path) -> None:
    base = resolve_model(str(written), models)
    assert frozen_hash(base) == frozen_hash(tiny_base)
    tensors = tensorfile.read(base / "model.safetensors", trainable_names(base))
    assert canonical_hash(tensors) == canonical_hash(trained(tiny_base))


def test_it_says_where_it_comes_from(written: Path, tiny_base: Path) -> None:
    model = canonical_hash(trained(tiny_base))
    expected = {"schema": 1, "round": 3, "model": model}
    assert json.loads((written / "federation.json").read_text()) == expected
    assert read_federation(written) == expected
    assert (written.parent / "latest").resolve() == written.resolve()


def test_a_damaged_federation_record_is_one_sentence(tmp_path: Path) -> None:
    for text in ("{", "[]", '{"schema": 9}'):
        (tmp_path / "federation.json").write_text(text)
        with pytest.raises(StorageError, match=r"federation\.json cannot be read"):
            read_federation(tmp_path)


def test_what_the_next_round_needs_lies_in_the_newest_checkpoint_alone(
    tiny_base: Path, tmp_path: Path
) -> None:
    tensors = trained(tiny_base)
    for number in (1, 2):
        path = write(tmp_path, tiny_base, number, states=("momentum",), update=True)
        stored = tensorfile.Lazy(path / SERVER, [f"momentum.{name}" for name in tensors])
        for name, array in tensors.items():
            assert np.array_equal(stored[f"momentum.{name}"], array * number)
        update = Payload.open(path / UPDATE)
        assert (update.base, update.target) == ("before", canonical_hash(tensors))
    assert not (tmp_path / "round-0001" / SERVER).exists()
    assert not (tmp_path / "round-0001" / UPDATE).exists()
    assert (tmp_path / "round-0001" / "model.safetensors").exists()


def test_the_newest_is_the_highest_round(tiny_base: Path, tmp_path: Path) -> None:
    assert newest(tmp_path / "none") is None
    for number in (9999, 10_000, 3):
        write(tmp_path, tiny_base, number)
    found = newest(tmp_path)
    assert found
    assert found.name == "round-10000"
    # A crash between the rename and the link leaves the link behind.
    assert os.readlink(tmp_path / "latest") == "round-10000"


def test_statistics_of_the_base_that_are_not_the_runs_do_not_stay(
    tiny_base: Path, tmp_path: Path, models: Path
) -> None:
    import shutil

    base = tmp_path / "tiny" / "base"
    shutil.copytree(tiny_base, base)
    (state,) = base.glob("policy_preprocessor_step_*_normalizer_processor.safetensors")
    foreign: Tensors = {
        "action.max": np.ones(6, np.float32),
        "observation.images.camera1.mean": np.ones(3, np.float32),
    }
    tensorfile.write(state, foreign)
    found, _ = tensorfile.entries(write(tmp_path / "checkpoints", base) / state.name)
    assert sorted(found) == [
        "action.mean",
        "action.std",
        "observation.images.camera1.mean",
        "observation.state.mean",
        "observation.state.std",
    ]


def test_latest_follows_the_rounds(tiny_base: Path, tmp_path: Path) -> None:
    for number in (0, 1):
        path = write(tmp_path, tiny_base, number)
        assert path.name == f"round-{number:04d}"
        assert os.readlink(tmp_path / "latest") == path.name


def test_a_write_that_dies_leaves_the_last_round_in_place(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = write(tmp_path, tiny_base, 1)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    for method in ("put", "close"):
        with monkeypatch.context() as patch:
            patch.setattr(tensorfile.Writer, method, full)
            with pytest.raises(OSError, match="No space"):
                write(tmp_path, tiny_base, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "round-0001"]
    assert (tmp_path / "latest").resolve() == first.resolve()
    # What a killed process leaves behind is cleared by the next write.
    (tmp_path / ".round-0002.tmp").mkdir()
    (tmp_path / ".round-0002.tmp" / "half").write_text("")
    assert write(tmp_path, tiny_base, 2).is_dir()
    assert not (tmp_path / ".round-0002.tmp").exists()


def test_everything_is_on_disk_before_it_has_its_name(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: set[str] = set()
    fsync, rename = os.fsync, Path.rename

    def recording_fsync(handle: int) -> None:
        synced.add(os.readlink(f"/proc/self/fd/{handle}"))
        fsync(handle)

    def recording_rename(path: Path, target: Path) -> Path:
        if path.is_dir() and not path.is_symlink():
            names = {str(path)} | {str(file) for file in path.iterdir()}
            # JSON files are synced under the name they are written to.
            names = {n if not n.endswith(".json") else f"{path}/.{Path(n).name}.tmp" for n in names}
            assert names <= synced
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", recording_fsync)
    monkeypatch.setattr(Path, "rename", recording_rename)
    write(tmp_path, tiny_base, states=("momentum",))
    assert str(tmp_path) in synced


def test_a_broken_processor_is_named(tiny_base: Path, tmp_path: Path) -> None:
    import shutil

    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    (base / "policy_preprocessor.json").write_text('{"steps": [3]}')
    with pytest.raises(ModelError, match=r"policy_preprocessor\.json is not a processor"):
        write(tmp_path / "checkpoints", base)
    (base / "policy_preprocessor.json").unlink()
    with pytest.raises(ModelError, match=r"policy_preprocessor\.json cannot be read"):
        write(tmp_path / "checkpoints", base)
    assert list((tmp_path / "checkpoints").iterdir()) == []
