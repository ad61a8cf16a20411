"""Pooled normalisation statistics."""

import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from app.dataset import open_dataset
from app.dataset_meta import VECTORS
from app.statistics import (
    STD_FLOOR,
    Moments,
    from_bytes,
    merge,
    moments_of,
    normalisation,
    to_bytes,
)
from certs.errors import DatasetError
from tests.damage import data, edit_column


def _of(values: NDArray[np.float64]) -> Moments:
    mean = values.mean(axis=0)
    return Moments(len(values), mean, ((values - mean) ** 2).sum(axis=0))


def _rows(root: Path, key: str, episodes: tuple[int, ...]) -> NDArray[np.float64]:
    table = pq.read_table(data(root)).to_pandas()
    return np.stack(table[table["episode_index"].isin(episodes)][key]).astype(np.float64)


def test_moments_are_those_of_the_training_rows(tiny_dataset: Path) -> None:
    dataset = open_dataset(str(tiny_dataset), held_out=0.25, seed=0)
    moments = moments_of(dataset)
    for key in VECTORS:
        values = _rows(tiny_dataset, key, dataset.train_episodes)
        assert moments[key].count == len(values) == dataset.frames(dataset.train_episodes)
        np.testing.assert_allclose(moments[key].mean, values.mean(axis=0), rtol=1e-12)
        np.testing.assert_allclose(moments[key].m2 / len(values), values.var(axis=0), rtol=1e-12)


def test_neither_held_out_rows_nor_stats_json_enter(tiny_dataset: Path, tmp_path: Path) -> None:
    root = tmp_path / "copy"
    shutil.copytree(tiny_dataset, root)
    before = moments_of(open_dataset(str(root), held_out=0.25, seed=0))
    dataset = open_dataset(str(root), held_out=0.25, seed=0)
    owner = np.array(pq.read_table(data(root))["episode_index"])
    held_out = np.isin(owner, dataset.held_out_episodes)
    edit_column(
        data(root),
        "observation.state",
        lambda rows: [
            [math.nan] * 6 if held else row for row, held in zip(rows, held_out, strict=True)
        ],
    )
    (root / "meta" / "stats.json").unlink()
    assert to_bytes(moments_of(dataset)) == to_bytes(before)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=6),
    st.integers(0, 2**32 - 1),
    st.floats(-360, 360),
)
def test_merging_equals_pooling(sizes: list[int], seed: int, offset: float) -> None:
    random = np.random.default_rng(seed)
    sites = [random.normal(offset + site, 1 + site, (size, 6)) for site, size in enumerate(sizes)]
    parts = [dict.fromkeys(VECTORS, _of(site)) for site in sites]
    pooled = np.concatenate(sites)
    for key, merged in merge(parts).items():
        assert key in VECTORS
        assert merged.count == len(pooled)
        # The absolute part is for sums that cancel to almost nothing: 360 degrees carry 6e-14 of rounding.
        np.testing.assert_allclose(merged.mean, pooled.mean(axis=0), rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(merged.m2, _of(pooled).m2, rtol=1e-12, atol=1e-11)


def test_merging_is_exact_where_float32_cancels() -> None:
    # Mean 180 degrees, std 0.05: E[x^2] - E[x]^2 in float32 gives 0.0625.
    random = np.random.default_rng(0)
    sites = [random.normal(180, 0.05, (1000, 6)) for _ in range(4)]
    merged = merge([dict.fromkeys(VECTORS, _of(site)) for site in sites])["action"]
    np.testing.assert_allclose(
        merged.m2 / merged.count, np.concatenate(sites).var(axis=0), rtol=1e-12
    )


def test_the_order_of_sites_does_not_matter_beyond_rounding() -> None:
    random = np.random.default_rng(1)
    parts = [dict.fromkeys(VECTORS, _of(random.normal(5, 3, (size, 6)))) for size in (3, 50, 1, 20)]
    one, other = merge(parts)["action"], merge(reversed(parts))["action"]
    np.testing.assert_allclose(one.m2, other.m2, rtol=1e-12)


def test_nothing_to_merge_is_an_error() -> None:
    with pytest.raises(DatasetError, match="no site"):
        merge([])


def test_a_joint_that_stands_still_gets_the_floor() -> None:
    values = np.tile([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], (10, 1))
    values[:, 0] = np.linspace(0, 90, 10)
    result = normalisation(dict.fromkeys(VECTORS, _of(values)))["action"]
    assert result["std"][0] == pytest.approx(values[:, 0].std(), rel=1e-12)
    assert (result["std"][1:] == STD_FLOOR).all()
    np.testing.assert_array_equal(result["mean"], values.mean(axis=0))


def test_bytes_restore_every_bit() -> None:
    random = np.random.default_rng(2)
    moments = {key: _of(random.normal(math.pi, 1e-7, (7, 6))) for key in VECTORS}
    restored = from_bytes(to_bytes(moments))
    for key in VECTORS:
        assert restored[key].count == 7
        assert restored[key].mean.tobytes() == moments[key].mean.tobytes()
        assert restored[key].m2.tobytes() == moments[key].m2.tobytes()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"null",
        b"\xff",
        b'{"action": 1}',
        b'{"action": {"count": 0, "mean": [0,0,0,0,0,0], "m2": [0,0,0,0,0,0]}}',
    ],
)
def test_refuses_bytes_that_are_not_statistics(data: bytes) -> None:
    with pytest.raises(DatasetError, match="statistics cannot be read"):
        from_bytes(data)


@pytest.mark.parametrize(
    ("count", "mean", "m2"),
    [
        (0, [0.0] * 6, [0.0] * 6),
        (True, [0.0] * 6, [0.0] * 6),
        (3, [0.0] * 7, [0.0] * 6),
        (3, [math.nan] * 6, [0.0] * 6),
        (3, [0.0] * 6, [-1.0] * 6),
    ],
)
def test_refuses_impossible_statistics(count: int, mean: list[float], m2: list[float]) -> None:
    bad = Moments(count, np.array(mean), np.array(m2))
    with pytest.raises(DatasetError, match="statistics cannot be read"):
        from_bytes(to_bytes(dict.fromkeys(VECTORS, bad)))


def test_a_value_that_is_not_finite_is_one_sentence(tiny_dataset: Path, tmp_path: Path) -> None:
    root = tmp_path / "copy"
    shutil.copytree(tiny_dataset, root)
    dataset = open_dataset(str(root), held_out=0.25, seed=0)
    episode = dataset.train_episodes[-1]
    broken = dataset.meta.episodes[episode].first + 3
    edit_column(
        data(root),
        "observation.state",
        lambda rows: [*rows[:broken], [math.nan] * 6, *rows[broken + 1 :]],
    )
    with pytest.raises(
        DatasetError, match=f"episode {episode} in .*observation.state that are not finite"
    ) as caught:
        moments_of(dataset)
    assert str(root) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_importing_needs_neither_torch_nor_lerobot(tiny_dataset: Path) -> None:
    code = (
        "import sys; from app.dataset import open_dataset; from app.statistics import *;"
        "to_bytes(moments_of(open_dataset(sys.argv[1], held_out=0.2, seed=0)));"
        "assert not {'torch', 'lerobot', 'datasets', 'pandas'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tiny_dataset)], check=True, timeout=60)
