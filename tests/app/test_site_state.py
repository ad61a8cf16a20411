"""A site's state: what was kept comes back, and a crash, damage or a second writer never mixes two states."""

import json
import logging
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from app.optimizer import OptimizerState
from app.payload import Tensors
from app.site_state import INDEX, Kept, SiteState
from certs.errors import ConfigError, ModelError, StorageError

SHAPES = {"a": (3, 2), "b": (4,), "c": ()}


def tensors(value: float) -> Tensors:
    return {name: np.full(shape, value, np.float32) for name, shape in SHAPES.items()}


def kept(value: float) -> Kept:
    moments = {f"exp_avg.{name}": array for name, array in tensors(value).items()}
    return Kept(OptimizerState(int(value), moments), tensors(-value))


def hold(state: SiteState, value: float) -> None:
    state.keep_model(f"hash {value:g}", SHAPES, iter(tensors(value).items()))


def held(state: SiteState) -> float | None:
    """The value of the model a state holds; it must be one model's, whole, and the hash's."""
    model_hash = state.held()
    if model_hash is None:
        return None
    values = {float(v) for array in state.model().values() for v in array.flat}
    assert len(values) == 1
    (value,) = values
    assert model_hash == f"hash {value:g}"
    assert state.model().shapes == SHAPES
    return value


def trained(state: SiteState, before: int) -> float | None:
    """The value of the training state a round starts from, whose parts must belong together."""
    found = state.before(before)
    if found is None:
        return None
    assert found.optimizer
    assert found.residual
    (value,) = {float(v) for array in found.optimizer.tensors.values() for v in array.flat}
    assert found.optimizer.step == value
    assert set(found.optimizer.tensors) == {"exp_avg.a", "exp_avg.b", "exp_avg.c"}
    assert {float(v) for array in found.residual.values() for v in array.flat} == {-value}
    return value


def files(root: Path) -> list[str]:
    return sorted(path.name.split("-")[0] for path in (root / "run").iterdir())


def test_a_new_site_has_nothing(tmp_path: Path) -> None:
    state = SiteState(tmp_path / "sites" / "lab-a", "run")
    assert state.held() is None
    assert state.before(5) is None
    with pytest.raises(ModelError, match="holds no model"):
        state.model()


def test_the_held_model_is_the_last_one_kept(tmp_path: Path) -> None:
    state = SiteState(tmp_path, "run")
    hold(state, 1)
    assert held(state) == 1
    hold(state, 2)
    for again in (state, SiteState(tmp_path, "run")):
        assert held(again) == 2
    assert files(tmp_path) == [INDEX, "model"]


def test_a_model_is_written_from_the_one_it_replaces(tmp_path: Path) -> None:
    """The broadcast is a change: each tensor is read from the old model when its turn comes."""
    state = SiteState(tmp_path, "run")
    hold(state, 1)
    old = state.model()
    state.keep_model("hash 3", SHAPES, ((name, old[name] + np.float32(2)) for name in old))
    assert held(state) == 3
    assert float(old["c"]) == 1


def test_a_model_that_breaks_off_leaves_the_old_one(tmp_path: Path) -> None:
    state = SiteState(tmp_path, "run")
    hold(state, 1)

    def broken() -> object:
        yield "a", tensors(2)["a"]
        raise ModelError("the payload ends here")

    with pytest.raises(ModelError, match="ends here"):
        state.keep_model("hash 2", SHAPES, broken())  # type: ignore[arg-type]
    for again in (state, SiteState(tmp_path, "run")):
        assert held(again) == 1
    assert files(tmp_path) == [INDEX, "model"]


def test_a_round_starts_from_the_newest_state_before_it(tmp_path: Path) -> None:
    state = SiteState(tmp_path, "run")
    state.keep(1, kept(10))
    # The site was not asked in round 2.
    state.keep(3, kept(30))
    for again in (state, SiteState(tmp_path, "run")):
        assert [trained(again, number) for number in range(1, 6)] == [None, 10, 10, 30, 30]


def test_a_round_done_again_starts_where_it_started(tmp_path: Path) -> None:
    state = SiteState(tmp_path, "run")
    for number in range(1, 5):
        state.keep(number, kept(10 * number))
    assert trained(state, 4) == 30
    state.keep(4, kept(41))
    assert (trained(state, 4), trained(state, 5)) == (30, 41)
    # What came after a round that is done again is of a past that did not happen.
    state.keep(3, kept(33))
    assert [trained(state, number) for number in (3, 4, 5)] == [None, 33, 33]


def test_two_states_stay(tmp_path: Path) -> None:
    state = SiteState(tmp_path, "run")
    for number in range(1, 6):
        state.keep(number, kept(number))
    assert files(tmp_path) == [INDEX, "optimizer", "optimizer", "residual", "residual"]


def test_parts_a_config_has_no_use_for_are_absent(tmp_path: Path) -> None:
    SiteState(tmp_path, "run").keep(1, Kept(None, tensors(1)))
    found = SiteState(tmp_path, "run").before(2)
    assert found
    assert found.optimizer is None
    assert found.residual
    SiteState(tmp_path, "run").keep(2, Kept(kept(2).optimizer, None))
    found = SiteState(tmp_path, "run").before(3)
    assert found
    assert found.optimizer
    assert found.residual is None


# Does each thing a site does to its state, and dies before the n-th change of a directory.
KILLED = """
import os, shutil, sys
from pathlib import Path
from tests.app.test_site_state import SiteState, hold, kept

start, work = Path(sys.argv[1]), Path(sys.argv[2])
change = {"model": lambda s: hold(s, 2), "state": lambda s: s.keep(2, kept(20))}[sys.argv[3]]
for number in range(100):
    root = work / str(number)
    shutil.copytree(start, root)
    child = os.fork()
    if not child:
        left = number

        def count(event, args):
            global left
            writes = event == "open" and str(root) in str(args[0]) and args[2] & os.O_ACCMODE
            if writes or event in ("os.rename", "os.remove"):
                if not left:
                    os._exit(9)
                left -= 1

        state = SiteState(root, "run")
        sys.addaudithook(count)
        change(state)
        os._exit(0)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
        break
"""


@pytest.mark.parametrize("change", ["model", "state"])
def test_a_crash_leaves_the_old_or_the_new(tmp_path: Path, change: str) -> None:
    start = tmp_path / "start"
    state = SiteState(start, "run")
    hold(state, 1)
    state.keep(1, kept(10))
    # Of the past that the crash interrupts: the new state takes its place.
    state.keep(2, kept(15))
    (tmp_path / "work").mkdir()
    python(KILLED, str(start), str(tmp_path / "work"), change)
    seen = []
    runs = sorted((tmp_path / "work").iterdir(), key=lambda path: int(path.name))
    for root in runs:
        crashed = SiteState(root, "run")
        seen.append((held(crashed), trained(crashed, 2), trained(crashed, 3)))
        # What the crash left over is gone, and the site goes on.
        assert files(root) == [INDEX, "model", *["optimizer"] * 2, *["residual"] * 2]
        hold(crashed, 5)
        crashed.keep(3, kept(30))
        assert (held(crashed), trained(crashed, 4)) == (5, 30)
    old = (1, 10, 15)
    new = (2, 10, 15) if change == "model" else (1, 10, 20)
    assert seen == [old] * seen.count(old) + [new] * seen.count(new)
    # The lock, the file or files, the index aside, its rename; then what is no longer named.
    assert seen.count(old) >= 4
    assert seen.count(new) >= 2


def python(code: str, *arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _empty(path: Path) -> None:
    os.truncate(path, 0)


@pytest.mark.parametrize("damage", [_cut, _empty, Path.unlink])
def test_a_damaged_file_is_absent_and_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None]
) -> None:
    state = SiteState(tmp_path, "run")
    hold(state, 1)
    state.keep(1, kept(10))
    state.keep(2, kept(20))
    damage(next((tmp_path / "run").glob("model-*")))
    damage(max((tmp_path / "run").glob("residual-*")))
    caplog.set_level(logging.WARNING, "flwr")
    for _ in range(2):
        again = SiteState(tmp_path, "run")
        assert (again.held(), trained(again, 3)) == (None, 10)
    assert len(caplog.messages) == 2
    assert all("is damaged" in message and str(tmp_path) in message for message in caplog.messages)
    # The moments that went with the lost residual are gone, too.
    assert files(tmp_path) == [INDEX, "optimizer", "residual"]


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"schema": 99}', '{"schema": 1}'])
def test_a_damaged_index_is_an_empty_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: str
) -> None:
    state = SiteState(tmp_path, "run")
    hold(state, 1)
    state.keep(1, kept(10))
    (tmp_path / "run" / INDEX).write_text(content)
    caplog.set_level(logging.WARNING, "flwr")
    for _ in range(2):
        again = SiteState(tmp_path, "run")
        assert (again.held(), again.before(9)) == (None, None)
    assert len(caplog.messages) == 1
    hold(again, 2)
    assert held(SiteState(tmp_path, "run")) == 2


def test_leftovers_are_removed(tmp_path: Path) -> None:
    hold(SiteState(tmp_path, "run"), 1)
    for name in ("model-00000007.safetensors", f".{INDEX}.tmp", "optimizer-00000001.safetensors"):
        (tmp_path / "run" / name).write_bytes(b"half a file")
    assert held(SiteState(tmp_path, "run")) == 1
    assert files(tmp_path) == [INDEX, "model"]


# Many small changes by one process while another makes changes of the other kind.
WRITER = """
import sys
from pathlib import Path
from tests.app.test_site_state import SiteState, hold, kept

state = SiteState(Path(sys.argv[1]), "run")
for value in range(1, 41):
    hold(state, value) if sys.argv[2] == "model" else state.keep(value, kept(value))
"""


def test_two_processes_lose_nothing_of_each_other(tmp_path: Path) -> None:
    """A late round's process may still write while the next message's does."""
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), kind],
            cwd=Path(__file__).parents[2],
            stderr=subprocess.PIPE,
            text=True,
        )
        for kind in ("model", "state")
    ]
    for writer in writers:
        _, errors = writer.communicate(timeout=120)
        assert writer.returncode == 0, errors
    state = SiteState(tmp_path, "run")
    assert (held(state), trained(state, 40), trained(state, 41)) == (40, 39, 40)


def test_the_two_lineages_used_last_stay(tmp_path: Path) -> None:
    for age, name in enumerate(("first", "second", "third")):
        hold(SiteState(tmp_path, name), age)
        os.utime(tmp_path / name, (1000 + age, 1000 + age))
        assert name in os.listdir(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["second", "third"]
    # An old run that is resumed is used, and stays.
    SiteState(tmp_path, "second")
    os.utime(tmp_path / "second", (2000, 2000))
    hold(SiteState(tmp_path, "fourth"), 4)
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["fourth", "second"]
    assert held(SiteState(tmp_path, "second")) == 1


@pytest.mark.parametrize("lineage", ["", "..", "../../etc", "a/b", "/tmp", ".hidden", "x" * 129])
def test_a_lineage_stays_below_its_site(tmp_path: Path, lineage: str) -> None:
    with pytest.raises(ConfigError, match="The run calls itself"):
        SiteState(tmp_path / "site", lineage)
    assert not list(tmp_path.iterdir())


def test_a_directory_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "sites").write_text("a file where the directory should be")
    with pytest.raises(StorageError, match=r"sites.*cannot be written .*VLAFLEET_HOME") as caught:
        SiteState(tmp_path / "sites" / "lab-a", "run")
    assert "\n" not in str(caught.value)


def test_a_full_disk_leaves_the_old_state(tmp_path: Path) -> None:
    state = SiteState(tmp_path, "run")
    hold(state, 1)
    # /dev/full takes no byte: what a full disk answers.
    index = json.loads((tmp_path / "run" / INDEX).read_text())
    full = tmp_path / "run" / f"model-{index['serial']:08d}.safetensors"
    full.symlink_to("/dev/full")
    with pytest.raises(StorageError, match="No space left"):
        hold(state, 2)
    assert held(state) == 1
    hold(state, 3)
    assert held(SiteState(tmp_path, "run")) == 3


def test_a_copy_of_the_directory_is_a_state(tmp_path: Path) -> None:
    """A site that moves to another machine takes its state with it."""
    state = SiteState(tmp_path / "here", "run")
    hold(state, 1)
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    assert held(SiteState(tmp_path / "there", "run")) == 1


def test_what_is_written_later_is_waited_for(tmp_path: Path) -> None:
    state, may_write = SiteState(tmp_path, "run"), threading.Event()

    def write() -> None:
        assert may_write.wait(60)
        state.keep(1, kept(10))

    state.later(write)
    assert state.before(2) is None
    may_write.set()
    state.refresh()
    assert trained(state, 2) == trained(SiteState(tmp_path, "run"), 2) == 10


def test_a_later_write_that_failed_is_said_once(tmp_path: Path) -> None:
    state = SiteState(tmp_path, "run")
    state.keep(1, kept(10))

    def full() -> None:
        raise StorageError("The disk is full.")

    state.later(full)
    with pytest.raises(StorageError, match="full"):
        state.settle()
    state.settle()
    assert trained(state, 2) == 10


def test_the_newest_state_stays_in_memory_until_another_process_writes(tmp_path: Path) -> None:
    state, other = SiteState(tmp_path, "run"), SiteState(tmp_path, "run")
    mine = kept(10)
    state.keep(1, mine)
    assert state.before(2) is mine
    other.keep(1, kept(20))
    state.refresh()
    assert trained(state, 2) == 20
