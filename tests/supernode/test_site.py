"""A site's directory says who it is, and takes nothing that a process or a file would trip over."""

import json
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from certs.errors import ConfigError, StorageError
from supernode.site import (
    Site,
    absolute_dataset,
    default_directory,
    locked,
    only_directory,
)

SITE = Site(
    Path("/srv/vlafleet-lab-7"),
    "demo",
    "lab-7",
    "fleet.example:9092",
    "fleet.example:9093",
    "/data/so101#episodes=0:50",
    "cuda:1",
    "native",
)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    made = replace(SITE, directory=tmp_path)
    made.save()
    return made


def test_it_survives_its_file(site: Site) -> None:
    assert Site.load(site.directory) == site
    assert stat.S_IMODE((site.directory / "site.json").stat().st_mode) == 0o600


def test_it_is_read_from_anywhere(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(site.directory.parent)
    assert Site.load(Path(site.directory.name)) == site


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("federation", ["", "De mo", "../x", "a" * 64]),
        ("name", ["", "superlink", "Lab", "a/b"]),
        (
            "superlink",
            ["fleet", "fleet:", "https://fleet:1", "fleet:9092/x", "a b:1", "fl\n:1", "fl:0"],
        ),
        ("enrolment", ["fleet", "user@fleet:1", "fleet:123456", "fleet:65536"]),
        ("dataset", ["", "/data\n- privileged: true", "/da\x00ta"]),
        ("device", ["", "gpu", "cuda:", "cuda:-1", "cpu; rm", "cuda:1000"]),
        ("mode", ["", "docker", "Native"]),
    ],
)
def test_what_cannot_be_is_refused(field: str, values: list[str]) -> None:
    for value in values:
        changes: dict[str, Any] = {field: value}
        with pytest.raises(ConfigError) as error:
            replace(SITE, **changes)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("address", ["localhost:1", "10.0.0.1:9092", "[::1]:9092", "a-b.c:65535"])
def test_addresses_of_every_kind_are_taken(address: str) -> None:
    assert replace(SITE, superlink=address).superlink == address


@given(st.recursive(st.none() | st.text() | st.integers(), st.lists, max_leaves=4))
@settings(deadline=None)
def test_a_damaged_file_is_one_sentence(record: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for content in (
            json.dumps(record),
            json.dumps({"federation": record}),
            str(record),
        ):
            patch.setattr(
                Path,
                "read_bytes",
                lambda _self, content=content: content.encode("utf-8", "replace"),
            )
            with pytest.raises(ConfigError):
                Site.load(Path("/nowhere"))


def test_a_value_that_was_altered_is_refused(site: Site) -> None:
    path = site.directory / "site.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "device": "tpu"}))
    with pytest.raises(ConfigError, match="'tpu'"):
        Site.load(site.directory)
    path.write_text(json.dumps({**record, "directory": "/"}))
    with pytest.raises(ConfigError, match="damaged"):
        Site.load(site.directory)


def test_no_directory_and_no_membership_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no site's directory"):
        Site.load(tmp_path)
    assert Site.find(tmp_path) is None
    applied = replace(SITE, directory=tmp_path, superlink="", enrolment="")
    applied.save()
    assert Site.find(tmp_path) == applied
    with pytest.raises(ConfigError, match="vlafleet site accept"):
        Site.load(tmp_path)


def test_a_directory_that_cannot_be_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be made"), locked(tmp_path / "file" / "home"):
        pass
    with pytest.raises(ConfigError, match="cannot be read"):
        Site.load(tmp_path / "file")


def test_one_command_at_a_time(site: Site) -> None:
    """Also when the other is another process; one that was killed holds nothing."""
    code = (
        "import sys, pathlib; from supernode.site import locked\n"
        "with locked(pathlib.Path(sys.argv[1])):\n"
        "    print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(site.directory)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with (
            pytest.raises(StorageError, match="another 'vlafleet site' command"),
            locked(site.directory),
        ):
            pass
        other.kill()
    with locked(site.directory):
        pass


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("hf:lerobot/svla_so101_pickplace", "hf:lerobot/svla_so101_pickplace"),
        ("hf:a/b#episodes=0:5", "hf:a/b#episodes=0:5"),
        ("/data/x#part=0/2", "/data/x#part=0/2"),
        ("data/x", "{here}/data/x"),
        ("../x#episodes=1:2", "{here}/../x#episodes=1:2"),
        ("~/x", "{home}/x"),
        ("", ""),
    ],
)
def test_a_dataset_reads_the_same_from_anywhere(
    given: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/lab")
    assert absolute_dataset(given) == expected.format(here=tmp_path, home="/home/lab")


def test_the_one_site_here_needs_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="there is none"):
        only_directory()
    first = replace(SITE, directory=tmp_path / default_directory("lab-7"))
    first.save()
    assert only_directory() == Path("vlafleet-lab-7")
    replace(SITE, directory=tmp_path / default_directory("lab-8")).save()
    with pytest.raises(ConfigError, match="vlafleet-lab-7, vlafleet-lab-8"):
        only_directory()
    monkeypatch.chdir(first.directory)
    assert only_directory() == Path()
