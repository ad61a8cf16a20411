"""The mean is the mean it says it is, to the bit, and what does not belong in it stays out."""

import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from app import aggregation
from app.aggregation import MAX_FRAMES, MAX_MAGNITUDE, Updates, mean_loss, mean_rmse
from app.codec import encode
from app.payload import Payload, PayloadError, pack, pack_encoded
from certs.errors import StorageError

SHAPES: dict[str, tuple[int, ...]] = {"b": (3,), "s": (), "w": (2, 2)}
type Tensors = dict[str, Any]

BASE, FROZEN = "b" * 64, "f" * 64

values = st.floats(-1e3, 1e3, width=32)
deltas = st.fixed_dictionaries(
    {name: hnp.arrays(np.float32, shape, elements=values) for name, shape in SHAPES.items()}
)
reports = st.lists(st.tuples(deltas, st.integers(1, 100_000)), min_size=1, max_size=7)
robust = st.sampled_from(["none", "trimmed-mean", "median"])
# Files are made for each example: fewer of them, and no limit on a busy disk.
on_disk = settings(max_examples=40, deadline=None)


def update(
    tensors: Tensors, *, base: str = BASE, frozen: str = FROZEN, codec: str = "fp32"
) -> Payload:
    return pack(
        sorted(tensors.items()), kind="update", codec=codec, base=base, target=None, frozen=frozen
    )


@contextmanager
def opened(
    given_reports: list[tuple[Tensors, int]] | None = None,
    *,
    names: list[str] | None = None,
    norm_bound: float = 0.0,
) -> Iterator[Updates]:
    """Updates of sites s0, s1 ..., arriving in the order given, or as ``names`` say."""
    with TemporaryDirectory() as place:
        updates = Updates(
            Path(place) / "updates",
            SHAPES,
            base_hash=BASE,
            frozen_hash=FROZEN,
            norm_bound=norm_bound,
        )
        for index, (tensors, frames) in enumerate(given_reports or []):
            updates.add(names[index] if names else f"s{index}", update(tensors), frames)
        yield updates


def damaged(name: str, data: bytes, *, codec: str) -> Payload:
    """An update that no honest site packs: ``data`` in place of one tensor's encoded bytes."""
    parts = [
        (each, shape, data if each == name else encode(np.zeros(shape, np.float32), codec))
        for each, shape in SHAPES.items()
    ]
    return pack_encoded(parts, kind="update", codec=codec, base=BASE, target=None, frozen=FROZEN)


def floats(*values: float) -> bytes:
    return np.array(values, "<f4").tobytes()


def filled(value: float) -> Tensors:
    return {name: np.full(shape, value, np.float32) for name, shape in SHAPES.items()}


def spoilt(name: str, value: float) -> Tensors:
    tensors = filled(0.0)
    tensors[name].flat[-1] = value
    return tensors


def stacked(given_reports: list[tuple[Tensors, int]], name: str) -> Any:
    return np.stack([tensors[name].astype(np.float64) for tensors, _ in given_reports])


@given(reports)
@on_disk
def test_it_is_the_mean_weighted_by_frames(given_reports: list[tuple[Tensors, int]]) -> None:
    weights = [float(frames) for _, frames in given_reports]
    with opened(given_reports) as updates:
        assert (len(updates), updates.frames) == (len(given_reports), sum(weights))
        for name, shape in SHAPES.items():
            mean = updates.mean(name)
            assert mean.dtype == np.float32
            assert mean.shape == shape
            exact = np.average(stacked(given_reports, name), axis=0, weights=weights)
            # Rounded to fp32 once; float64 in another order differs where large values cancel.
            np.testing.assert_allclose(mean, exact, rtol=2**-24, atol=1e-9)


@given(reports, st.floats(0.01, 0.5))
@on_disk
def test_the_trimmed_mean_drops_the_same_number_at_either_end(
    given_reports: list[tuple[Tensors, int]], trim: float
) -> None:
    sites = len(given_reports)
    # The same rule, said by counting.
    drop = next(k for k in range(sites) if k >= trim * sites - 1e-9 or k == (sites - 1) // 2)
    with opened(given_reports) as updates:
        for name in SHAPES:
            kept = np.sort(stacked(given_reports, name), axis=0)[drop : sites - drop]
            mean = updates.mean(name, robust="trimmed-mean", trim=trim)
            np.testing.assert_allclose(mean, kept.mean(axis=0), rtol=2**-24, atol=1e-9)


@given(reports)
@on_disk
def test_the_median_is_numpys(given_reports: list[tuple[Tensors, int]]) -> None:
    with opened(given_reports) as updates:
        for name, shape in SHAPES.items():
            mean = updates.mean(name, robust="median")
            assert mean.dtype == np.float32
            assert mean.shape == shape
            exact = np.median(stacked(given_reports, name), axis=0)
            np.testing.assert_array_equal(mean, exact.astype(np.float32))


@pytest.mark.parametrize("sites", [*range(1, 34), 100])
def test_every_number_of_sites_is_sorted(sites: int, tmp_path: Path) -> None:
    draw = np.random.default_rng(sites)
    sent = draw.integers(-9, 9, (sites, 40)).astype(np.float32)
    with Updates(tmp_path / "u", {"w": (40,)}, base_hash=BASE, frozen_hash=FROZEN) as updates:
        for index, row in enumerate(sent):
            updates.add(f"s{index:03d}", update({"w": row}), 1)
        np.testing.assert_array_equal(updates.mean("w", robust="median"), np.median(sent, axis=0))


@given(reports, robust, st.randoms())
@on_disk
def test_the_order_of_arrival_changes_no_bit(
    given_reports: list[tuple[Tensors, int]], kind: str, random: Any
) -> None:
    named = [(f"s{index}", report) for index, report in enumerate(given_reports)]
    mixed = random.sample(named, len(named))
    with (
        opened(given_reports) as there,
        opened([report for _, report in mixed], names=[name for name, _ in mixed]) as here,
    ):
        assert there.sites == here.sites == tuple(sorted(name for name, _ in named))
        for name in SHAPES:
            one, other = there.mean(name, robust=kind), here.mean(name, robust=kind)
            assert one.tobytes() == other.tobytes()


@given(reports, robust)
@on_disk
def test_it_is_never_outside_the_updates(
    given_reports: list[tuple[Tensors, int]], kind: str
) -> None:
    with opened(given_reports) as updates:
        for name in SHAPES:
            mean, all_of_them = updates.mean(name, robust=kind), stacked(given_reports, name)
            assert (all_of_them.min(axis=0) <= mean).all()
            assert (mean <= all_of_them.max(axis=0)).all()


@given(deltas, st.lists(st.integers(1, MAX_FRAMES), min_size=1, max_size=7), robust)
@on_disk
def test_equal_updates_give_that_update(tensors: Tensors, frames: list[int], kind: str) -> None:
    with opened([(tensors, number) for number in frames]) as updates:
        for name in SHAPES:
            np.testing.assert_array_equal(updates.mean(name, robust=kind), tensors[name])


@given(deltas, deltas, deltas, st.floats(-(2.0**59), 2.0**59, width=32), st.integers(1, MAX_FRAMES))
@on_disk
def test_one_attacker_cannot_move_a_robust_mean_out_of_the_honest_range(
    one: Tensors, two: Tensors, three: Tensors, poison: float, frames: int
) -> None:
    honest = [(one, 10), (two, 20), (three, 30)]
    with opened([*honest, (filled(poison), frames)]) as updates:
        for name in SHAPES:
            low, high = stacked(honest, name).min(axis=0), stacked(honest, name).max(axis=0)
            for kind in ("trimmed-mean", "median"):
                mean = updates.mean(name, robust=kind)
                assert ((low <= mean) & (mean <= high)).all()


def test_by_hand() -> None:
    given_reports = [(filled(value), frames) for value, frames in [(1, 1), (2, 1), (9, 2), (4, 6)]]
    with opened(given_reports) as updates:
        assert updates.mean("s") == np.float32(4.5)
        assert updates.mean("s", robust="trimmed-mean", trim=0.25) == 3
        assert updates.mean("s", robust="median") == 3
        updates.add("t", update(filled(100)), 1)
        assert updates.mean("s", robust="trimmed-mean", trim=0.2) == 5
        # Two of five at either end, where one and a half were asked for.
        assert updates.mean("s", robust="trimmed-mean", trim=0.3) == 4
        assert updates.mean("s", robust="median") == 4


@pytest.mark.parametrize(("trim", "drop"), [(0.07, 7), (0.29, 29), (0.295, 30), (0.5, 49)])
def test_the_share_dropped_is_not_off_by_the_computers_arithmetic(trim: float, drop: int) -> None:
    # Site k sends 2^k, so that the mean tells who was in it.
    given_reports = [(filled(2.0 ** min(index, 59)), 1) for index in range(100)]
    values_then = [2.0 ** min(index, 59) for index in range(100)]
    with opened(given_reports) as updates:
        kept = values_then[drop : 100 - drop]
        mean = updates.mean("s", robust="trimmed-mean", trim=trim)
        assert mean == np.float32(sum(kept) / len(kept))


@pytest.mark.parametrize("kind", ["trimmed-mean", "median"])
def test_chunks_meet_without_a_seam(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(0)
    given_reports: list[tuple[Tensors, int]] = [
        (
            {
                name: draw.standard_normal(shape).astype(np.float32)
                for name, shape in SHAPES.items()
            },
            1,
        )
        for _ in range(5)
    ]
    with opened(given_reports) as updates:
        whole = {name: updates.mean(name, robust=kind) for name in SHAPES}
        # Three, two, and (more sites than a chunk holds values) one value of each site at a time.
        for size, cached in ((15, 2), (10, 1), (2, 1), (1000, 3)):
            monkeypatch.setattr(aggregation, "_SORTED", size)
            monkeypatch.setattr(aggregation, "_CACHED", cached)
            for name in SHAPES:
                assert updates.mean(name, robust=kind).tobytes() == whole[name].tobytes()


@pytest.mark.parametrize("codec", ["fp32", "bf16", "int8", "int4"])
def test_what_is_averaged_is_what_was_sent_in_every_codec(codec: str, tmp_path: Path) -> None:
    draw = np.random.default_rng(1)
    sent = [
        update(
            {
                name: draw.standard_normal(shape).astype(np.float32)
                for name, shape in SHAPES.items()
            },
            codec=codec,
        )
        for _ in range(3)
    ]
    updates = Updates(tmp_path / "u", SHAPES, base_hash=BASE, frozen_hash=FROZEN)
    for index, each in enumerate(sent):
        norm = updates.add(f"s{index}", each, 10)
        decoded = np.concatenate([array.reshape(-1) for _, array in each.items()])
        assert norm == pytest.approx(np.linalg.norm(decoded.astype(np.float64)), rel=1e-12)
    for name in SHAPES:
        exact = np.mean([each.tensor(name).astype(np.float64) for each in sent], axis=0)
        np.testing.assert_allclose(updates.mean(name), exact, rtol=2**-24, atol=1e-9)


GOOD = spoilt("w", 0.5)


@pytest.mark.parametrize(
    ("refused", "frames", "reason"),
    [
        (update(GOOD, base="another"), 8, "base"),
        (update(GOOD, frozen="another"), 8, "frozen"),
        (update({"w": GOOD["w"]}), 8, "names"),
        (update({**GOOD, "x": GOOD["w"]}), 8, "names"),
        (update({**GOOD, "b": np.zeros(4, np.float32)}), 8, "shape"),
        (update({**GOOD, "b": np.zeros((1, 3), np.float32)}), 8, "shape"),
        (update(GOOD), 0, "frames"),
        (update(GOOD), -3, "frames"),
        (update(GOOD), MAX_FRAMES + 1, "frames"),
        (damaged("b", floats(0, np.nan, 0), codec="fp32"), 8, "finite"),
        (damaged("s", floats(np.inf), codec="fp32"), 8, "finite"),
        (damaged("w", floats(0, 0, 0, -np.inf), codec="fp32"), 8, "finite"),
        (damaged("b", floats(np.nan) + b"\x01\x00\x00", codec="int8"), 8, "finite"),
        (damaged("b", floats(1e30) + b"\x00\x7f\x00", codec="int8"), 8, "finite"),
        (update(spoilt("b", -1e19)), 8, "finite"),
        (update(spoilt("s", 1e38)), 8, "finite"),
        (update(filled(3.0)), 8, "norm"),
    ],
)
def test_a_refused_update_leaves_no_trace(
    refused: Payload, frames: int, reason: str, tmp_path: Path
) -> None:
    folder = tmp_path / "updates"
    updates = Updates(folder, SHAPES, base_hash=BASE, frozen_hash=FROZEN, norm_bound=8.0)
    # The norm of eight values of 2.8 is 7.9.
    assert updates.add("a", update(filled(2.8)), 10) == pytest.approx(2.8 * 8**0.5, rel=1e-6)
    before = {name: updates.mean(name) for name in SHAPES}
    files = sorted(folder.iterdir())
    with pytest.raises(PayloadError) as caught:
        updates.add("b", refused, frames)
    assert caught.value.reason == reason
    assert str(caught.value).endswith(".")
    assert (updates.sites, updates.frames, len(updates)) == (("a",), 10, 1)
    assert sorted(folder.iterdir()) == files
    assert all(np.array_equal(updates.mean(name), before[name]) for name in SHAPES)
    # And the site may still send a good one.
    updates.add("b", update(GOOD), 30)
    assert updates.sites == ("a", "b")


def test_without_a_bound_any_finite_norm_is_accepted(tmp_path: Path) -> None:
    updates = Updates(tmp_path / "u", SHAPES, base_hash=BASE, frozen_hash=FROZEN)
    for index in range(50):
        norm = updates.add(f"s{index}", update(filled(MAX_MAGNITUDE)), MAX_FRAMES)
        # fp32 would have overflowed in the square.
        assert norm == pytest.approx(MAX_MAGNITUDE * 8**0.5, rel=1e-6)
    for kind in ("none", "trimmed-mean", "median"):
        assert np.array_equal(updates.mean("w", robust=kind), filled(MAX_MAGNITUDE)["w"])


def test_a_second_update_of_one_site_is_a_mistake_of_ours(tmp_path: Path) -> None:
    updates = Updates(tmp_path / "u", SHAPES, base_hash=BASE, frozen_hash=FROZEN)
    updates.add("a", update(GOOD), 1)
    with pytest.raises(ValueError, match="a has an update"):
        updates.add("a", update(GOOD), 1)


def test_there_is_no_mean_without_an_update(tmp_path: Path) -> None:
    updates = Updates(tmp_path / "u", SHAPES, base_hash=BASE, frozen_hash=FROZEN)
    with pytest.raises(ValueError, match="no update"):
        updates.mean("w")


def test_a_tensor_without_values_has_a_mean_too(tmp_path: Path) -> None:
    updates = Updates(tmp_path / "u", {"e": (0, 3)}, base_hash=BASE, frozen_hash=FROZEN)
    assert updates.add("a", update({"e": np.zeros((0, 3), np.float32)}), 1) == 0.0
    for kind in ("none", "trimmed-mean", "median"):
        assert updates.mean("e", robust=kind).shape == (0, 3)


def test_a_site_may_be_called_anything(tmp_path: Path) -> None:
    updates = Updates(tmp_path / "u", SHAPES, base_hash=BASE, frozen_hash=FROZEN)
    for name in ("../../etc/passwd", "Köln", "a" * 300):
        updates.add(name, update(GOOD), 1)
    assert len(list((tmp_path / "u").iterdir())) == 3
    assert list(tmp_path.iterdir()) == [tmp_path / "u"]


def test_what_a_dead_process_left_is_emptied_and_closing_removes_all(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "updates"
    folder.mkdir(parents=True)
    (folder / "00000").write_bytes(b"left behind")
    with Updates(folder, SHAPES, base_hash=BASE, frozen_hash=FROZEN) as updates:
        assert not list(folder.iterdir())
        updates.add("a", update(GOOD), 1)
    assert not folder.exists()
    assert len(updates) == 0
    updates.close()


def test_a_full_disk_is_one_sentence_and_leaves_no_half_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    updates = Updates(tmp_path / "u", SHAPES, base_hash=BASE, frozen_hash=FROZEN)

    def full(self: Payload, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Payload, "write", full)
    with pytest.raises(StorageError, match=r"cannot be kept in .* \(No space left on device\)"):
        updates.add("a", update(GOOD), 1)
    assert not list((tmp_path / "u").iterdir())
    assert len(updates) == 0


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="Not a directory"):
        Updates(tmp_path / "file" / "u", SHAPES, base_hash=BASE, frozen_hash=FROZEN)


@pytest.mark.parametrize("kind", ["none", "trimmed-mean", "median"])
def test_memory_does_not_grow_with_the_number_of_sites(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 250_000
    shapes = {f"t{index}": (size,) for index in range(4)}  # 1 MB each
    # Chunks of 1 MB, as 32 MB are to the real model.
    monkeypatch.setattr(aggregation, "_SORTED", size)
    each = update({name: np.ones(shape, np.float32) for name, shape in shapes.items()})

    def peak(sites: int) -> int:
        updates = Updates(tmp_path / "u", shapes, base_hash=BASE, frozen_hash=FROZEN)
        tracemalloc.start()
        for index in range(sites):
            updates.add(f"s{index}", each, 5)
        for name in shapes:
            updates.mean(name, robust=kind)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    few, many = peak(3), peak(24)
    # Some tensors' worth, of which float64 takes two each; far from 24 of them.
    assert few < 9_000_000
    assert many < 1.2 * few


def test_losses_are_weighted_by_the_frames_they_were_measured_on() -> None:
    sites: list[dict[str, Any]] = [
        {"loss": 1.0, "frames": 30},
        {"loss": 2.0, "frames": 10},
        {"loss": None, "frames": None},
        {"loss": np.nan, "frames": 10},
    ]
    assert mean_loss(sites) == 1.25
    assert mean_loss(sites[2:]) is None
    assert mean_loss([]) is None


def test_joint_errors_are_pooled_as_squares() -> None:
    sites: list[dict[str, Any]] = [
        {"rmse_deg": [3.0, 0.0], "frames": 10},
        {"rmse_deg": [4.0, 1.0], "frames": 10},
        {"rmse_deg": None, "frames": None},
    ]
    assert mean_rmse(sites) == pytest.approx([np.sqrt(12.5), np.sqrt(0.5)])
    assert mean_rmse(sites[2:]) is None
