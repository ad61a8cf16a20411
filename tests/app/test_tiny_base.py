"""The tiny base: deterministic, complete, safe to generate from several processes at once."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

from app.tiny_base import ensure_tiny_base


def _hashes(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.suffix == ".safetensors" or path.name == "tokenizer.json"
    }


def test_two_processes_generate_the_same_bytes(models: Path, tmp_path: Path) -> None:
    code = (
        "import random, sys; from pathlib import Path; from app.tiny_base import ensure_tiny_base;"
        # Another global seed: the caller's random state must not leak in.
        "import torch; torch.manual_seed(99); ensure_tiny_base(Path(sys.argv[1]))"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=120)
    here, there = _hashes(models / "tiny"), _hashes(tmp_path / "tiny")
    assert len(here) == 5
    assert here == there


def test_loads_through_lerobots_ordinary_path(tiny_base: Path) -> None:
    from lerobot.policies.factory import make_pre_post_processors
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy

    policy = SmolVLAPolicy.from_pretrained(tiny_base, strict=True)
    config = policy.config
    assert config.load_vlm_weights
    assert {key: feature.shape for key, feature in config.input_features.items()} == {
        "observation.state": (6,),
        **{f"observation.images.camera{number}": (3, 256, 256) for number in (1, 2, 3)},
    }
    assert config.output_features["action"].shape == (6,)
    assert config.chunk_size == 50
    assert 400_000 < sum(parameter.numel() for parameter in policy.parameters()) < 500_000
    pre, _ = make_pre_post_processors(config, pretrained_path=str(tiny_base))
    tokens = pre(
        {"task": "Pick up the red cube and put it in the bin.", "observation.state": _zeros()}
    )
    # The sentence fits the 48 tokens with room to spare.
    assert tokens["observation.language.attention_mask"].sum() < 40


def _zeros() -> object:
    import torch

    return torch.zeros(1, 6)


def test_leaves_the_callers_random_state_alone(tmp_path: Path) -> None:
    import torch

    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    ensure_tiny_base(tmp_path)
    assert torch.equal(torch.rand(4), expected)


def test_concurrent_callers_get_one_complete_directory(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        bases = list(pool.map(ensure_tiny_base, [tmp_path] * 4))
    assert set(bases) == {tmp_path / "tiny" / "base"}
    assert (bases[0] / "model.safetensors").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".tiny.lock", "tiny"]


def test_another_user_may_read_it(models: Path) -> None:
    """A site's containers run under a user of their own."""
    files = [path for path in (models / "tiny").rglob("*") if path.is_file()]
    assert files
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in files)


def test_an_existing_base_is_not_touched(models: Path) -> None:
    file = models / "tiny" / "base" / "model.safetensors"
    before = file.stat().st_mtime_ns
    ensure_tiny_base(models)
    assert file.stat().st_mtime_ns == before
