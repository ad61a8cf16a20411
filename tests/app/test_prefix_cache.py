"""The prefix cache: every tier gives what the policy would compute, and files survive all but damage."""

import errno
import fcntl
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app import memory
from app.dataset import SiteDataset
from app.frames import Frames
from app.policy import frozen_hash, load_policy, load_processors
from app.prefix_cache import PrefixCache
from app.statistics import moments_of, normalisation
from certs.errors import ConfigError, RunFailedError, StorageError

KEPT = ("memory", "disk", "embeddings")
# Two sentences of different length, so that one of them has padding.
TASKS = ("Pick up the cube and place it in the box.", "Wait.")

Open = Callable[..., PrefixCache]


@pytest.fixture(scope="module")
def frames(dataset: SiteDataset) -> Frames:
    """The training frames, every third of them of the second task."""
    frames = Frames(dataset, dataset.train_episodes)
    frames.tasks = TASKS
    frames.task = (np.arange(len(frames)) % 3 == 2).astype(np.int64)
    return frames


@pytest.fixture
def opened(
    policy: Any, processors: Any, frames: Frames, tiny_base: Path, tmp_path: Path
) -> Iterator[Open]:
    """Open a cache over every second frame; all are closed in the end."""
    caches = []

    def open_cache(choice: str, rows: Any = None, **options: Any) -> PrefixCache:
        chosen = range(0, len(frames), 2) if rows is None else rows
        options = {
            "frozen": frozen_hash(tiny_base),
            "folder": tmp_path / "cache",
            "progress": lambda *_: None,
            **options,
        }
        caches.append(
            PrefixCache.open(policy, processors, frames, chosen, choice=choice, **options)
        )
        return caches[-1]

    yield open_cache
    for cache in caches:
        cache.close()


def batch_of(processors: Any, frames: Frames, rows: list[int]) -> Any:
    """The batch that lerobot's loader and preprocessor make of these frames."""
    import torch

    images = {
        key: torch.from_numpy(value).float() / 255 for key, value in frames.images(rows).items()
    }
    return processors[0]({**images, "task": [frames.tasks[frames.task[row]] for row in rows]})


def files(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache").glob("*.prefix"))


@pytest.mark.parametrize("tier", [*KEPT, "none"])
def test_every_tier_gives_what_the_policy_computes(
    tier: str, opened: Open, policy: Any, processors: Any, frames: Frames
) -> None:
    from app.prefix import compute

    cache = opened(tier)
    assert cache.tier == tier
    # Out of order, one twice, of both tasks.
    rows = [40, 2, 8, 40, 98, 4]
    got, expected = cache.prefix(rows), compute(policy, batch_of(processors, frames, rows))
    assert got.kv.dtype == expected.kv.dtype
    assert (got.mask == expected.mask).all()
    assert not got.mask.all()
    real = expected.mask[:, None, None, :, None, None].expand_as(expected.kv)
    difference = (got.kv - expected.kv)[real].abs().max() / expected.kv[real].abs().max()
    # Batches of other sizes sum in another order.
    assert difference < 2e-6
    # A batch with the short task alone is as long: a compiled step sees one shape.
    assert cache.prefix([2]).mask.shape[1] == got.mask.shape[1]


def test_the_tiers_hold_the_same_bytes(opened: Open, frames: Frames) -> None:
    import torch

    rows = list(range(0, len(frames), 2))
    kept, written = (opened(tier).prefix(rows) for tier in ("memory", "disk"))
    assert torch.equal(kept.kv, written.kv)
    assert torch.equal(kept.mask, written.mask)
    # Embedded in batches, attended to in batches: the same numbers go through the same arithmetic.
    embedded = opened("embeddings").prefix(rows[:16])
    assert torch.equal(kept.kv[:16], embedded.kv)


def test_the_order_of_a_batch_is_that_of_its_rows(opened: Open) -> None:
    import torch

    cache = opened("memory")
    one, other = cache.prefix([0, 2, 4]), cache.prefix([4, 2, 0])
    assert torch.equal(one.kv.flip(0), other.kv)


def test_each_frame_is_decoded_once_and_told(
    opened: Open, frames: Frames, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[int] = []
    real = Frames.decode

    def counting(self: Frames, rows: Any = None) -> Any:
        for row, images in real(self, rows):
            decoded.append(row)
            yield row, images

    monkeypatch.setattr(Frames, "decode", counting)
    told: list[tuple[int, int]] = []
    # Twice and out of order.
    opened("memory", [5, *range(20), 3], progress=lambda done, total: told.append((done, total)))
    assert decoded == list(range(20))
    assert told == [(16, 20), (20, 20)]


@pytest.mark.parametrize("tier", ["memory", "disk"])
def test_a_closed_cache_gives_nothing(tier: str, opened: Open) -> None:
    cache = opened(tier)
    cache.close()
    with pytest.raises((ValueError, RuntimeError)):
        cache.prefix([0])


def test_a_row_that_was_not_asked_for_is_refused(opened: Open) -> None:
    with pytest.raises(ValueError, match="row 1 "):
        opened("memory").prefix([0, 1])


# --- the choice of a tier -------------------------------------------------------------------------


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Let so many bytes of host memory and disk be free."""

    def free(host: int, disk: int) -> None:
        monkeypatch.setattr(memory, "host", lambda: host)
        monkeypatch.setattr(memory, "disk", lambda *_: disk)

    return free


def sizes(cache: PrefixCache) -> tuple[int, int]:
    """Bytes of a frame's keys and values, and of its embedded images."""
    plans, _ = cache._plans(Path("/"))
    return plans[0].layout.row_bytes, plans[-1].layout.row_bytes


def test_auto_takes_the_fastest_tier_that_has_the_space(
    opened: Open, room: Callable[[int, int], None], caplog: pytest.LogCaptureFixture
) -> None:
    kv, embeddings = sizes(opened("none"))
    assert embeddings < kv
    rows = range(10)
    for host, disk, tier in (
        (10 * kv, 10 * kv, "memory"),
        (10 * kv - 1, 10 * kv, "disk"),
        (10 * kv - 1, 10 * kv - 1, "embeddings"),
        (10 * embeddings, 0, "embeddings"),
        (0, 10 * embeddings, "embeddings"),
    ):
        room(host, disk)
        assert opened("auto", rows).tier == tier
    room(10 * embeddings - 1, 10 * embeddings - 1)
    caplog.clear()
    with caplog.at_level(logging.INFO, "flwr"):
        cache = opened("auto", rows)
    assert cache.tier == "none"
    assert "No prefix cache" in caplog.text
    assert "10 frames of" in caplog.text
    assert cache.prefix([0]).mask.any()


def test_a_process_that_ends_with_its_job_leaves_its_prefixes_to_the_next(
    opened: Open,
    room: Callable[[int, int], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Disk first, be it for images alone; memory where the disk has no space for either."""
    kv, embeddings = sizes(opened("none"))
    built, build = [], PrefixCache._build

    def noted(self: PrefixCache, *words: Any) -> None:
        built.append(self.tier)
        build(self, *words)

    monkeypatch.setattr(PrefixCache, "_build", noted)
    rows = range(10)
    for disk, tier, kept in (
        (10 * kv, "disk", 1),
        (10 * kv - 1, "embeddings", 2),
        (10 * embeddings - 1, "memory", 2),
    ):
        room(100 * kv, disk)
        opened("auto", rows, brief=True).close()
        assert opened("auto", rows, brief=True).tier == tier
        assert len(files(tmp_path)) == kept
    # What is on disk is not made again.
    assert built == ["disk", "embeddings", "memory", "memory"]
    # The run config's word stands.
    room(10 * kv, 10 * kv)
    assert opened("memory", rows, brief=True).tier == "memory"


@pytest.fixture
def with_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Let the device's own memory, which is the host's here, be a GPU's of which so many bytes are free."""
    real = PrefixCache._plans

    def free(room: int) -> None:
        def plans(self: PrefixCache, folder: Path) -> Any:
            found, masks = real(self, folder)
            kv = next(plan for plan in found if plan.tier == "memory")
            embeddings = next(plan for plan in found if plan.tier == "embeddings")
            return [
                replace(kv, tier="gpu", place="gpu", room=room),
                *(plan for plan in found if plan.tier != "embeddings"),
                replace(embeddings, place="gpu", room=room),
                *(plan for plan in found if plan.tier == "embeddings"),
            ], masks

        monkeypatch.setattr(PrefixCache, "_plans", plans)

    return free


def test_gpu_memory_is_taken_first(
    opened: Open, room: Callable[[int, int], None], with_gpu: Callable[[int], None]
) -> None:
    import torch

    kv, embeddings = sizes(opened("none"))
    expected = opened("memory", range(10)).prefix([1, 3]).kv
    room(10 * kv, 10 * kv)
    with_gpu(10 * kv)
    cache = opened("auto", range(10))
    assert cache.tier == "gpu"
    assert torch.equal(cache.prefix([1, 3]).kv, expected)
    with_gpu(10 * kv - 1)
    assert opened("auto", range(10)).tier == "memory"
    room(0, 0)
    assert opened("auto", range(10)).tier == "embeddings"
    with_gpu(10 * embeddings - 1)
    assert opened("auto", range(10)).tier == "none"


def test_gpu_memory_that_is_gone_when_it_is_asked_for(
    opened: Open, with_gpu: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from app import prefix_cache

    def gone(_: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(prefix_cache, "DeviceStore", gone)
    with_gpu(1 << 40)
    assert opened("auto").tier == "memory"


def test_on_a_gpu_all_tiers_hold_the_same_bytes(
    tiny_base: Path, dataset: SiteDataset, frames: Frames, tmp_path: Path
) -> None:
    import torch

    from app.prefix import compute

    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    policy = load_policy(tiny_base, "cuda")
    processors = load_processors(tiny_base, policy, normalisation(moments_of(dataset)))
    rows = [40, 2, 8, 40, 98, 4]
    expected = compute(policy, batch_of(processors, frames, rows)).kv
    found = {}
    for tier in ("gpu", "memory", "disk", "embeddings", "none"):
        cache = PrefixCache.open(
            policy,
            processors,
            frames,
            range(0, len(frames), 2),
            choice=tier,
            frozen="",
            folder=tmp_path,
            progress=lambda *_: None,
        )
        assert cache.tier == tier
        # As a thread that works ahead does.
        with torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
            found[tier] = cache.prefix(rows).kv.clone()
        cache.close()
        assert found[tier].device.type == "cuda"
        assert found[tier].dtype == torch.bfloat16
        # bfloat16 resolves 2^-8.
        torch.testing.assert_close(found[tier], expected, rtol=2e-2, atol=2e-2)
    assert torch.equal(found["gpu"], found["memory"])
    assert torch.equal(found["gpu"], found["disk"])


@pytest.mark.parametrize("tier", KEPT)
def test_a_tier_that_does_not_fit_is_refused_with_the_numbers(
    tier: str, opened: Open, room: Callable[[int, int], None]
) -> None:
    room(1000, 2000)
    with pytest.raises(ConfigError, match=f"prefix-cache='{tier}'.* 10 frames of .* GB") as raised:
        opened(tier, range(10))
    assert "\n" not in str(raised.value)


def test_gpu_memory_is_refused_on_a_cpu(opened: Open) -> None:
    with pytest.raises(ConfigError, match="prefix-cache='gpu', but this site trains on its CPU"):
        opened("gpu")


def test_augmented_images_are_not_kept(opened: Open, caplog: pytest.LogCaptureFixture) -> None:
    import torch

    from app.augmentation import augment

    with caplog.at_level(logging.INFO, "flwr"):
        cache = opened("memory", augment=partial(augment, seed=0, device="cpu"))
    assert cache.tier == "none"
    assert "images are augmented" in caplog.text
    one, again, other = (cache.prefix([0, 2], step).kv for step in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    plain = opened("none")
    assert torch.equal(plain.prefix([0, 2], 1).kv, plain.prefix([0, 2], 2).kv)
    assert not torch.equal(one, plain.prefix([0, 2], 1).kv)


def test_a_trained_vlm_is_not_kept(
    opened: Open, policy: Any, caplog: pytest.LogCaptureFixture
) -> None:
    weight = next(policy.model.vlm_with_expert.vlm.parameters())
    weight.requires_grad = True
    try:
        with caplog.at_level(logging.INFO, "flwr"):
            assert opened("memory").tier == "none"
    finally:
        weight.requires_grad = False
    assert "is trained" in caplog.text


# --- the disk tier --------------------------------------------------------------------------------


def test_a_file_is_found_again(
    opened: Open, frames: Frames, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    first = opened("disk")
    expected = first.prefix([0, 6]).kv
    first.close()
    (path,) = files(tmp_path)
    # The rows, and a checksum for each.
    kv, _ = sizes(first)
    assert path.stat().st_size == len(range(0, len(frames), 2)) * (kv + 4)
    monkeypatch.setattr(Frames, "decode", None)
    again = opened("disk")
    assert torch.equal(again.prefix([0, 6]).kv, expected)
    assert files(tmp_path) == [path]


@pytest.mark.parametrize("damage", ["flip", "cut", "grow", "zero", "checksum"])
def test_a_damaged_file_is_built_again(
    damage: str, opened: Open, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import torch

    first = opened("disk")
    expected = first.prefix(range(0, 100, 2)).kv
    first.close()
    (path,) = files(tmp_path)
    size = path.stat().st_size
    with path.open("r+b") as file:
        if damage == "flip":
            file.seek(size // 2)
            byte = file.read(1)[0]
            file.seek(size // 2)
            file.write(bytes([byte ^ 1]))
        elif damage == "zero":
            file.write(bytes(4096))
        elif damage == "checksum":
            file.seek(size - 1)
            byte = file.read(1)[0]
            file.seek(size - 1)
            file.write(bytes([byte ^ 1]))
        else:
            file.truncate(size - 1 if damage == "cut" else size + 1)
    again = opened("disk")
    assert f"{path} is damaged" in caplog.text
    assert torch.equal(again.prefix(range(0, 100, 2)).kv, expected)
    caplog.clear()
    again.close()
    opened("disk")
    assert "damaged" not in caplog.text


def test_what_decides_the_bytes_decides_the_file(
    opened: Open, policy: Any, frames: Frames, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def key(tier: str = "disk", rows: Any = None, **options: Any) -> str:
        cache = opened("none", rows)
        plans, _ = cache._plans(tmp_path)
        plan = next(plan for plan in plans if plan.tier == tier)
        return cache._key(plan, options.get("frozen", "a"))

    same = key()
    assert key() == same
    found = {same, key("embeddings"), key(rows=range(5)), key(frozen="b")}
    with monkeypatch.context() as patch:
        patch.setattr(policy.config, "resize_imgs_with_padding", (32, 32))
        found.add(key())
    with monkeypatch.context() as patch:
        patch.setattr(frames, "tasks", (TASKS[0], "Stop."))
        found.add(key())
    with monkeypatch.context() as patch:
        patch.setattr(Frames, "fingerprint", lambda *_: "other images")
        found.add(key())
    with monkeypatch.context() as patch:
        patch.setattr(policy.model.vlm_with_expert.config.text_config, "rms_norm_eps", 1e-3)
        found.add(key())
    assert len(found) == 8
    # What is trained is not of them.
    with monkeypatch.context() as patch:
        patch.setattr(policy.config, "optimizer_lr", 1.0)
        patch.setattr(policy.config, "pretrained_path", Path("/elsewhere"))
        assert key() == same


def test_a_cancelled_build_leaves_nothing(opened: Open, tmp_path: Path) -> None:
    def cancel(done: int, total: int) -> None:
        raise RunFailedError("cancelled")

    with pytest.raises(RunFailedError):
        opened("disk", progress=cancel)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_what_a_killed_build_left_is_removed(opened: Open, tmp_path: Path) -> None:
    """The kernel frees a lock with its process; a file that is locked is still being built."""
    folder = tmp_path / "cache"
    folder.mkdir()
    left, building = (folder / f".{'a' * 64}.{process}.prefix.tmp" for process in (1, 2))
    left.touch()
    with building.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        opened("disk")
    assert not left.exists()
    assert building.exists()
    assert len(files(tmp_path)) == 1


def test_old_files_make_room(opened: Open, tmp_path: Path) -> None:
    for number in range(2, 6):
        opened("disk", range(number)).close()
    # The two used last, and the one that was just written.
    assert [path.stat().st_size for path in by_use(tmp_path)] == sorted(
        path.stat().st_size for path in files(tmp_path)
    )
    assert len(files(tmp_path)) == 3
    oldest = by_use(tmp_path)[0]
    # Used again, it is not the oldest any more.
    opened("disk", range(3)).close()
    assert by_use(tmp_path)[-1] == oldest
    opened("disk", range(7)).close()
    assert oldest in files(tmp_path)
    assert len(files(tmp_path)) == 3


def test_a_file_in_use_stays(opened: Open, tmp_path: Path) -> None:
    cache = opened("disk", [0, 1])
    (used,) = files(tmp_path)
    for number in range(3, 8):
        opened("disk", range(number)).close()
    assert used in files(tmp_path)
    assert cache.prefix([1]).mask.any()


def test_files_that_must_go_count_as_room(
    opened: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from app import prefix_store

    opened("disk", range(8)).close()
    (old,) = files(tmp_path)
    assert prefix_store.reclaimable(tmp_path / "cache") == old.stat().st_size
    cache = opened("disk", range(9))
    assert prefix_store.reclaimable(tmp_path / "cache") == old.stat().st_size
    cache.close()
    # No space while it is there.
    monkeypatch.setattr(prefix_store, "_free", lambda _: 0 if old.exists() else 1 << 40)
    opened("disk", range(10))
    assert old not in files(tmp_path)
    assert len(files(tmp_path)) == 2


def test_two_that_build_the_same_file_do_not_meet(tmp_path: Path) -> None:
    import torch

    from app.prefix_store import DiskStore, Layout

    layout = Layout(4, (2, 3), torch.bfloat16, torch.device("cpu"))
    rows = torch.arange(24, dtype=torch.bfloat16).view(4, 2, 3)
    stores = [DiskStore(tmp_path / "cache", "key", layout, lambda *_: None) for _ in range(2)]
    for first in (0, 2):
        for store in stores:
            assert not store.filled
            store.write(first, rows[first : first + 2])
    for store in stores:
        store.finish()
    third = DiskStore(tmp_path / "cache", "key", layout, lambda *_: None)
    assert third.filled
    for store in (*stores, third):
        assert torch.equal(store.read(np.array([3, 0, 3])), rows[[3, 0, 3]])
        store.close()
    assert [path.name for path in files(tmp_path)] == ["key.prefix"]
    assert not list((tmp_path / "cache").glob("*.tmp"))


def by_use(tmp_path: Path) -> list[Path]:
    return sorted(files(tmp_path), key=lambda path: path.stat().st_mtime_ns)


def test_a_disk_that_refuses_is_one_sentence(
    opened: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for call in ("posix_fallocate", "pwrite", "fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(os, call, refuse)
            with pytest.raises(StorageError, match=r"No space left.*VLAFLEET_HOME") as raised:
                opened("disk")
        assert "\n" not in str(raised.value)
        assert [path.name for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_auto_goes_on_where_a_disk_refuses(
    opened: Open,
    room: Callable[[int, int], None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def refuse(*_: int) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    _, embeddings = sizes(opened("none"))
    room(10 * embeddings, 1 << 40)
    monkeypatch.setattr(os, "posix_fallocate", refuse)
    assert opened("auto", range(10)).tier == "embeddings"
    assert "quota" in caplog.text


def test_a_file_that_is_cut_while_it_is_read_is_an_error(opened: Open, tmp_path: Path) -> None:
    cache = opened("disk")
    (path,) = files(tmp_path)
    os.truncate(path, 100)
    with pytest.raises(StorageError, match="cut short"):
        cache.prefix([50])
