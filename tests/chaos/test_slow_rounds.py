"""A site behind 200 kB/s and 150 ms each way completes rounds of real training."""

import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from app.journal import read_rounds
from superlink.control import run_request
from superlink.demo import federation
from tests.recorder import record
from tests.throttle import throttled

ROOT = Path(__file__).parents[2]
# fp32, the largest legs a model has.
RUN = "rounds=1 local-steps=2 batch-size=2 eval-batches=1 min-sites=1 codec='fp32'"
# Four messages, each with an import of lerobot and a dozen round trips of 0.3 s.
SECONDS = 400


@pytest.mark.slow
@pytest.mark.federation
def test_rounds_complete_over_a_slow_link(
    tmp_path: Path, free_port: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLAFLEET_HOME", str(tmp_path / "home"))
    datasets = {"site-a": str(record(tmp_path / "a", (30, 35, 40)))}
    runs, port = tmp_path / "runs", free_port()
    with (
        throttled(port) as slow,
        federation(
            tmp_path / "federation",
            datasets,
            runs,
            port,
            uplinks={"site-a": f"localhost:{slow.port}"},
        ) as (control, processes),
    ):
        run = control.start(run_request(ROOT, [RUN]))
        deadline = time.monotonic() + SECONDS
        while (status := control.status(run)).status != "finished":
            processes.check()
            assert time.monotonic() < deadline, "the run did not end"
            time.sleep(0.5)
        log = (processes.logs / "supernode-site-a.log").read_text()
        carried = slow.up
    assert status.sub_status == "completed", status
    zero, one = read_rounds(runs / str(run))
    train, evaluate = one["sites"]["site-a"]["train"], one["sites"]["site-a"]["evaluate"]
    assert (train["state"], evaluate["state"]) == ("completed", "completed")
    # The update went up over the link, the change of the model came down.
    assert carried > train["bytes_up"] > 700_000
    assert evaluate["bytes_down"] == train["bytes_up"]
    assert evaluate["loss"] != zero["sites"]["site-a"]["evaluate"]["loss"]
    # Far below Flower's 5 MiB, which never get through.
    chosen = re.search(r"chunks of (\d+) KiB, [12] at a time", log)
    assert chosen, log
    assert int(chosen[1]) <= 640
