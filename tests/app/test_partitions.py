"""Partitions of a dataset by seed: the ``#part=I/N`` of a dataset URI."""

from pathlib import Path

import pytest

from app.dataset import open_dataset, parse_uri
from certs.errors import DatasetError


def _parts(root: Path, count: int, *, seed: int = 0, span: str = "") -> list[tuple[int, ...]]:
    uris = [f"{root}#{span}part={index}/{count}" for index in range(count)]
    return [open_dataset(uri, held_out=0.25, seed=seed).episodes for uri in uris]


def test_parses_parts() -> None:
    whole = parse_uri("/data/site")
    assert (whole.span, whole.part) == (None, None)
    part = parse_uri("hf:acme/pick#part=0/3")
    assert (part.source, part.span, part.part) == ("acme/pick", None, (0, 3))
    both = parse_uri("/data/site#episodes=10:25&part=2/3")
    assert (both.source, both.span, both.part) == (Path("/data/site"), (10, 25), (2, 3))


@pytest.mark.parametrize(
    "fragment",
    ["", "&", "part=3/3", "part=0/0", "part=a/2", "part=1", "part=-1/2", "part=0/2&", "&part=0/2",
     "episodes=0:4part=0/2", "part=0/2&episodes=0:4", "part=0/2&part=1/2", "episodes=2:2&part=0/2"],
)  # fmt: skip
def test_refuses_malformed_parts(fragment: str) -> None:
    with pytest.raises(DatasetError, match=r"write '#episodes=A:B' .* or '#part=I/N'"):
        parse_uri(f"/data/site#{fragment}")


def test_parts_share_out_every_episode(tiny_dataset: Path) -> None:
    first, second = _parts(tiny_dataset, 2)
    assert sorted(first + second) == [0, 1, 2, 3]
    assert (len(first), len(second)) == (2, 2)


def test_a_part_of_a_range_stays_in_it(tiny_dataset: Path) -> None:
    (part,) = _parts(tiny_dataset, 1, span="episodes=1:4&")
    assert part == (1, 2, 3)


def test_the_seed_decides_and_nothing_else(tiny_dataset: Path) -> None:
    by_seed = {seed: _parts(tiny_dataset, 2, seed=seed) for seed in range(8)}
    assert by_seed == {seed: _parts(tiny_dataset, 2, seed=seed) for seed in range(8)}
    # Three ways to pair four episodes, twice over: eight seeds that all agree would be no draw.
    assert len({tuple(parts) for parts in by_seed.values()}) > 1


def test_the_parts_hold_out_what_the_whole_does(tiny_dataset: Path) -> None:
    whole = open_dataset(str(tiny_dataset), held_out=0.5, seed=3)
    parts = [open_dataset(f"{tiny_dataset}#part={n}/2", held_out=0.5, seed=3) for n in range(2)]
    held_out = sorted(index for part in parts for index in part.held_out_episodes)
    assert tuple(held_out) == whole.held_out_episodes


def test_a_part_too_small_to_train_on_says_so(tiny_dataset: Path) -> None:
    with pytest.raises(DatasetError, match="part=1/3 gives 1 episode"):
        _parts(tiny_dataset, 3)
    with pytest.raises(DatasetError, match="gives 0 episode"):
        open_dataset(f"{tiny_dataset}#part=8/9", held_out=0.25, seed=0)
