"""A site behind 200 kB/s and 150 ms exchanges real messages where stock Flower's settings do not get through.

SuperLink, SuperNodes, SuperExecs and task processes are the real ones; the two app modules are stand-ins that carry
payloads of the size of a model's update, without the time it takes to train one.
"""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from certs.identity import ensure_federation, identity_directory
from certs.roles import Role
from superlink.control import run_request
from superlink.demo import federation
from tests.throttle import throttled

STANDIN = Path(__file__).parent / "standin"
# Flower's own chunks are 5 MiB: two of them at once are the least that never gets through, at 100 kB/s each in 30 s.
UP = 2 * (5 << 20)
DOWN = 2_000_000
RATE = 200e3
# Both ways take 62 s of the link and 15 s of Flower's own; a busy machine may take its time.
SECONDS = 240

PROJECT = f"""
[project]
name = "transfer"
version = "0.1.0"
license = "Apache-2.0"
[tool.flwr.app]
publisher = "vlafleet"
fab-include = ["pyproject.toml"]
[tool.flwr.app.components]
serverapp = "app.server_app:app"
clientapp = "app.client_app:app"
[tool.flwr.app.config]
nodes = 3
sites = "slow fast"
up-bytes = {UP}
down-bytes = {DOWN}
seconds = {SECONDS}
result = ""
"""


def stand_ins(**modules: str) -> str:
    """The value of VLAFLEET_STANDINS; a name's ``__`` is a dot."""
    names = {name.replace("__", "."): STANDIN / file for name, file in modules.items()}
    return ":".join(f"{name}={file}" for name, file in names.items())


def exchange(directory: Path, port: int, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Let three sites exchange a payload: ``slow`` and ``stock`` behind a link each, ``fast`` behind none."""
    monkeypatch.setenv("PYTHONPATH", str(STANDIN))
    apps = stand_ins(app__server_app="server_app.py", app__client_app="client_app.py")
    monkeypatch.setenv("VLAFLEET_STANDINS", apps)
    app = directory / "transfer"
    app.mkdir()
    (app / "pyproject.toml").write_text(PROJECT)
    # The build looks for the components' files; the bundle does not carry them.
    (app / "app").mkdir()
    for name in ("server_app.py", "client_app.py"):
        shutil.copy(STANDIN / name, app / "app")
    result = directory / "result.json"
    pki = directory / "federation" / "pki"
    for _ in ensure_federation(pki, "demo", ["slow", "fast", "stock"]):
        pass
    with (
        throttled(port, rate=RATE) as slow,
        throttled(port, rate=RATE) as stock,
        federation(
            directory / "federation",
            {"slow": "/nowhere", "fast": "/nowhere"},
            directory / "runs",
            port,
            uplinks={"slow": f"localhost:{slow.port}"},
        ) as (control, processes),
    ):
        site = identity_directory(pki, Role.SITE, "stock")
        control.register("stock", site / "node.pub")
        processes.start(
            "supernode-stock",
            *("supernode", "--identity", str(site), "--superlink", f"localhost:{stock.port}"),
            *("--dataset", "/nowhere", "--port", str(port + 3)),
            VLAFLEET_STANDINS=stand_ins(supernode__link="stock_link.py"),
        )
        processes.start(
            "superexec-stock",
            *("superexec", "--identity", str(identity_directory(pki, Role.SUPEREXEC, "stock"))),
            *("--address", f"localhost:{port + 3}"),
            FLWR_HOME=str(directory / "federation" / "flwr" / "stock"),
        )
        control.wait_online(["slow", "fast", "stock"], 120)
        run = control.start(run_request(app, [f'result="{result}"']))
        deadline = time.monotonic() + SECONDS + 60
        while control.status(run).status != "finished":
            processes.check()
            assert time.monotonic() < deadline, "the run did not end"
            time.sleep(0.5)
        carried = {"slow": slow.up, "stock": stock.up}
        logs = {
            site: (processes.logs / f"supernode-{site}.log").read_text()
            for site in ("slow", "fast", "stock")
        }
    return {**json.loads(result.read_text()), "carried": carried, "logs": logs}


@pytest.mark.federation
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_slow_site_gets_through(
    tmp_path: Path, free_port: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = exchange(tmp_path, free_port(), monkeypatch)
    done, chunks, logs = found["done"], found["chunks"], found["logs"]
    # Both ways, whole, over the slow link (no faster than it is), and nothing twice.
    assert done["slow"]["intact"]
    assert done["slow"]["seconds"] > (UP + DOWN) / RATE
    assert found["carried"]["slow"] < 1.2 * UP
    assert chunks["slow"] <= 640 << 10
    assert "kB/s up" in logs["slow"]
    # Its neighbour is neither slowed nor cut as small by it.
    assert done["fast"]["intact"]
    assert done["fast"]["seconds"] < done["slow"]["seconds"]
    assert chunks["fast"] == 5 << 20
    # The control had the same link and time, and used it: its requests timed out and began again.
    assert "stock" not in done
    assert found["carried"]["stock"] > UP / 2
    assert "Connection attempt failed, retrying" in logs["stock"]
