"""What 'vlafleet data check --json' says of a run: held against the parts themselves and against measured figures."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import app.check
from app import estimate as estimating
from app import memory, payload, trainables
from app.architecture import Architecture, words
from app.config import RunConfig
from app.dataset import SiteDataset
from app.estimate import Estimate, estimate
from app.frames import Frames
from app.optimizer import OptimizerState
from app.prefix_cache import PrefixCache
from app.site_state import Kept, SiteState, most_bytes
from app.tensorfile import WEIGHTS
from benchmarks import shapes
from certs.errors import ConfigError, DatasetError, ModelError

ROOT = Path(__file__).parents[2]
SPEED = estimating._Speed(operations=100e9, bytes=20e9)


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, models: Path) -> Path:
    """A site's own directory, with the tiny model; nothing is measured."""
    monkeypatch.setenv("VLAFLEET_HOME", str(tmp_path))
    (tmp_path / "models").symlink_to(models)
    monkeypatch.setattr(estimating, "_measure", lambda *_: SPEED)
    return tmp_path


@pytest.fixture(scope="module")
def real(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of the real model's shapes whose values are holes in a file."""
    folder = tmp_path_factory.mktemp("real")
    shutil.copytree(models / "tiny", folder / "tiny")
    with torch.device("meta"):
        policy = shapes.smolvla(folder / "tiny" / "vlm")
    header, end = {}, 0
    for name, parameter in policy.named_parameters():
        size = 2 * parameter.numel()
        header[name] = {
            "dtype": "BF16",
            "shape": list(parameter.shape),
            "data_offsets": [end, end + size],
        }
        end += size
    text = json.dumps(header).encode()
    base = folder / "tiny" / "base"
    with (base / WEIGHTS).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    config = json.loads((base / "config.json").read_text())
    config["resize_imgs_with_padding"] = [512, 512]
    (base / "config.json").write_text(json.dumps(config))
    return base


def of(
    dataset: SiteDataset,
    settings: Mapping[str, Any] | None = None,
    base: Path | None = None,
    device: str = "cpu",
) -> Estimate:
    named = {"model": str(base)} if base else {}
    return estimate(dataset, RunConfig.parse({**named, **(settings or {})}), device)


# --- against the parts themselves ----------------------------------------------------------------


@pytest.mark.parametrize("codec", ["fp32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("exchange", ["expert", "lora"])
def test_bytes_on_the_wire_are_those_of_a_payload(
    home: Path, dataset: SiteDataset, tiny_base: Path, codec: str, exchange: str
) -> None:
    settings = RunConfig.parse({"exchange": exchange})
    initial = trainables.initial(settings, tiny_base)
    sent = {}
    for kind in (codec, "fp32"):
        digest = "0" * 64
        packed = payload.pack(
            ((name, initial[name]) for name in sorted(initial)),
            kind="update",
            codec=kind,
            base=digest,
            target=None,
            frozen=digest,
        )
        sent[kind] = len(packed.flat()) + len(json.dumps(packed.manifest()))
    found = of(dataset, {"codec": codec, "exchange": exchange})
    assert found.bytes_up == found.bytes_down == sent[codec]
    assert found.first_bytes_down == sent["fp32"]


@pytest.mark.parametrize("choice", ["auto", "memory", "embeddings", "disk"])
def test_the_cache_takes_what_the_real_one_takes(
    home: Path,
    dataset: SiteDataset,
    policy: Any,
    processors: Any,
    monkeypatch: pytest.MonkeyPatch,
    choice: str,
) -> None:
    monkeypatch.setattr(memory, "host", lambda: 1 << 40)
    found = of(dataset, {"prefix-cache": choice})
    tier = {"auto": "memory"}.get(choice, choice)
    assert found.cache_tier == tier
    size = 0
    held_out = RunConfig().batch_size * RunConfig().eval_batches
    for episodes, most in ((dataset.train_episodes, 10**9), (dataset.held_out_episodes, held_out)):
        frames = Frames(dataset, episodes)
        cache = PrefixCache.open(
            policy,
            processors,
            frames,
            np.arange(min(len(frames), most)),
            choice=tier,
            frozen="0",
            folder=home / "cache",
            progress=lambda *_: None,
        )
        assert cache.tier == tier
        store: Any = cache._store
        layout = store._layout if tier == "disk" else None
        size += layout.size if layout else store.data.nbytes
        cache.close()
    assert found.cache_bytes == size


def test_without_space_or_use_there_is_no_cache(
    home: Path, dataset: SiteDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = of(dataset).cache_bytes
    assert of(dataset, {"image-augmentation": True}).cache_tier == "none"
    assert of(dataset, {"prefix-cache": "none"}).cache_bytes == 0
    monkeypatch.setattr(memory, "disk", lambda *_: 0)
    taken = of(dataset).memory_bytes
    monkeypatch.setattr(memory, "host", lambda: taken + full - 1)
    smaller = of(dataset)
    assert smaller.cache_tier == "embeddings"
    assert 0 < smaller.cache_bytes < full
    monkeypatch.setattr(memory, "host", lambda: taken)
    assert of(dataset).cache_tier == "none"
    assert of(dataset).cache_seconds == 0


def test_a_sites_state_stays_below_the_most(tmp_path: Path) -> None:
    values = 100_000
    tensors = {"a": np.ones(values, np.float32)}
    moments = OptimizerState(1, {f"exp_avg{kind}.a": tensors["a"] for kind in ("", "_sq")})
    largest = 0
    for lineage in ("one", "two", "three"):
        state = SiteState(tmp_path / "state", lineage)
        for number in range(1, 5):
            state.keep_model("0", {"a": (values,)}, tensors.items())
            state.keep(number, Kept(moments, tensors))
            files = [path for path in (tmp_path / "state").rglob("*") if path.is_file()]
            largest = max(largest, sum(path.stat().st_size for path in files))
    most = most_bytes(values, moments=True, residual=True)
    # What is being written comes on top of what is kept.
    assert 0.8 * most < largest <= most
    assert most_bytes(values, moments=False, residual=False) == 2 * 4 * values


def test_task_sentences_are_counted_as_the_preprocessor_does(
    tiny_base: Path, processors: Any
) -> None:
    tasks = ["Pick up the cube and place it in the box.", "Grasp.\n"]
    for task in tasks:
        batch = processors[0]({"observation.state": torch.zeros(1, 6), "task": [task]})
        assert words(tiny_base, [task]) == int(batch["observation.language.attention_mask"].sum())
    assert words(tiny_base, tasks) == words(tiny_base, tasks[:1])
    assert words(tiny_base, ["box " * 100]) == 48


# --- against what was measured of the real model ------------------------------------------------


def test_the_real_models_sizes(home: Path, dataset: SiteDataset, real: Path) -> None:
    model = Architecture.read(real)
    assert model.trained == shapes.VALUES
    assert model.frozen + model.trained == 450_046_176
    assert (model.layers, model.image_tokens, model.prefix_tokens(2, 12)) == (16, 64, 140)
    # ../shared/facts: 2.87 MB a frame in bfloat16, embedded images 246 KB.
    assert model.prefix_values(2, 12) * 2 == 2_867_200
    assert model.embedding_values(2) * 2 == 245_760
    # Counted by torch: 31.8 GFLOP a sample with the prefix known, 500.8 and 77 of attention without.
    assert model.training(140) == pytest.approx(31.8e9, rel=0.06)
    whole = model.training(140) + model.text(140) + model.vision(2)
    assert whole == pytest.approx(577.8e9, rel=0.15)
    found = of(dataset, base=real)
    assert found.bytes_up == pytest.approx(100.37e6, rel=1e-3)
    assert found.first_bytes_down == pytest.approx(399.55e6, rel=1e-3)
    lora = of(dataset, {"exchange": "lora"}, real)
    assert lora.bytes_up == pytest.approx(0.84e6, rel=0.05)
    # Per run 2.8 GB; two of them, and 1.2 GB in the making.
    assert found.state_bytes == pytest.approx(6.8e9, rel=0.01)


def test_the_real_models_memory(home: Path, dataset: SiteDataset, real: Path) -> None:
    """Measured: 4.2 GB at batch 1 and 52 MB for each frame more; rounds keep 1.7 GB beside that."""
    one, eight = (of(dataset, {"batch-size": size}, real).memory_bytes for size in (1, 8))
    assert one - 1.7e9 == pytest.approx(4.2e9, rel=0.1)
    assert (eight - one) / 7 == pytest.approx(57e6, rel=0.1)
    assert of(dataset, {"batch-size": 8, "micro-batch": 1}, real).memory_bytes == one
    on_gpu = of(dataset, {"batch-size": 64}, real, "cuda")
    assert on_gpu.gpu_memory_bytes is not None
    # The reserve of app.memory: 1.2 GB of gradients and moments, some 3 of activations at batch 64, and weights.
    assert 5e9 < on_gpu.gpu_memory_bytes < 8e9
    assert of(dataset, base=real).gpu_memory_bytes is None


def test_the_real_models_seconds(
    home: Path, dataset: SiteDataset, real: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured on one core that multiplies 155 GFLOP/s and moves 30 GB/s, in processor seconds."""
    share = estimating._CPU_SHARE
    speed = estimating._Speed(operations=155e9 * share, bytes=30e9)
    monkeypatch.setattr(estimating, "_measure", lambda *_: speed)
    monkeypatch.setattr(memory, "host", lambda: 1 << 40)

    def steps(size: int) -> float:
        """One training step."""
        less, more = (
            of(dataset, {"batch-size": size, "local-steps": steps, "eval-batches": 1}, real)
            for steps in (10, 110)
        )
        assert less.seconds_per_round is not None
        assert more.seconds_per_round is not None
        return (more.seconds_per_round - less.seconds_per_round) / 100

    # Forward, backward and AdamW.
    assert steps(1) == pytest.approx(0.59 + 0.20, rel=0.25)
    assert steps(4) == pytest.approx(1.36 + 0.20, rel=0.25)
    assert steps(8) == pytest.approx(2.45 + 0.20, rel=0.25)
    # benchmarks/training: 4.7 to 5.3 s a frame.
    found = of(dataset, {"rounds": 1, "local-steps": 1, "eval-batches": 1}, real)
    assert found.cache_seconds is not None
    assert found.cache_seconds / 16 == pytest.approx(4.6, rel=0.25)


# --- the device ---------------------------------------------------------------------------------


def test_the_device_is_measured(dataset: SiteDataset, tiny_base: Path) -> None:
    speed = estimating._measure(Architecture.read(tiny_base), RunConfig(), "cpu")
    # A processor of the last twenty years, and no figure of another unit.
    assert 1e8 < speed.operations < 1e14
    assert 1e8 < speed.bytes < 1e13


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_not_measured(home: Path, dataset: SiteDataset) -> None:
    found = of(dataset, device="cuda")
    assert (found.cuda_available, found.seconds_per_round, found.cache_seconds) == (
        False,
        None,
        None,
    )
    assert found.gpu_memory_bytes
    assert found.torch_cuda == torch.version.cuda


def test_more_work_takes_longer(home: Path, dataset: SiteDataset) -> None:
    usual = of(dataset).seconds_per_round
    assert usual
    for settings in ({"local-steps": 300}, {"batch-size": 64}, {"image-augmentation": True}):
        assert (of(dataset, settings).seconds_per_round or 0) > usual


# --- the command --------------------------------------------------------------------------------


def test_the_command_prints_one_object(dataset: SiteDataset, models: Path, tmp_path: Path) -> None:
    (tmp_path / "models").symlink_to(models)
    done = subprocess.run(
        [*(sys.executable, "-m", "vlafleet", "data", "check", str(dataset.root), "--json"),
         *("--held-out", "0.25", "-c", "batch-size=4 rounds=1", "-c", "codec='fp32'")],
        capture_output=True, text=True, timeout=120, check=True, cwd=ROOT,
        env={**os.environ, "VLAFLEET_HOME": str(tmp_path)},
    )  # fmt: skip
    found = json.loads(done.stdout)
    assert list(found) == ["uri", "fit", "findings", "exit_code", "dataset", "estimate"]
    assert (found["fit"], found["findings"], found["exit_code"]) == (True, [], 0)
    files = [dataset.root / file for file in dataset.meta.files(dataset.episodes)]
    assert found["dataset"] == {
        "episodes": 4,
        "held_out_episodes": 1,
        "frames": 150,
        "fps": 30,
        "cameras": ["top", "wrist"],
        "bytes": sum(file.stat().st_size for file in files),
    }
    estimated = found["estimate"]
    # 195 thousand values in four bytes each.
    assert estimated["bytes_up"] == estimated["first_bytes_down"] > 779_904
    assert 5 < estimated["seconds_per_round"] < 600
    assert estimated["device"] == "cpu"


def test_what_is_wrong_is_in_the_object_and_the_exit_code(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "vlafleet", "data", "check", str(tmp_path / "none"), "--json"],
        capture_output=True, text=True, timeout=60, check=False, cwd=ROOT,
    )  # fmt: skip
    found = json.loads(done.stdout)
    assert done.returncode == found["exit_code"] == DatasetError.exit_code
    assert not found["fit"]
    assert "does not exist" in found["findings"][0]
    assert (found["dataset"], found["estimate"]) == (None, None)


def test_a_bad_run_config_is_a_finding() -> None:
    for line, said in (("rouns=3", "unknown key 'rouns'"), ("held-out=2.0", "held-out=2.0")):
        found = app.check.report("anything", [line], {}, "cpu")
        assert found["exit_code"] == ConfigError.exit_code
        assert said in found["findings"][0]


def test_an_unfit_dataset_has_numbers_and_no_estimate(
    dataset: SiteDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app.check, "check", lambda _: ["A file is damaged."])
    found = app.check.report(str(dataset.root), [], {"held-out": 0.25, "seed": None}, "cpu")
    assert (found["fit"], found["exit_code"]) == (False, 12)
    assert found["findings"] == ["A file is damaged."]
    assert found["dataset"]["frames"] == 150
    assert found["estimate"] is None


def test_a_model_that_is_not_here_says_nothing_against_the_dataset(
    home: Path, dataset: SiteDataset
) -> None:
    found = app.check.report(str(dataset.root), ["model='hf:lerobot/smolvla_base'"], {}, "cpu")
    assert found["fit"]
    assert found["estimate"] is None


def test_a_base_without_its_sizes_is_refused(real: Path, tmp_path: Path) -> None:
    (tmp_path / WEIGHTS).symlink_to(real / WEIGHTS)
    settings = json.loads((real / "config.json").read_text())
    for broken in ({**settings, "resize_imgs_with_padding": None}, {}):
        (tmp_path / "config.json").write_text(json.dumps(broken))
        with pytest.raises(ModelError, match="does not say how large its policy is"):
            Architecture.read(tmp_path)
