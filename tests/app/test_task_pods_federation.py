"""A federation with a site whose ClientApps are pods: Flower's executor makes them, the test runs them as processes."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from app.journal import read_rounds
from certs.identity import identity_directory
from certs.processes import Processes
from certs.roles import Role
from superlink.control import Control, run_request
from superlink.demo import federation
from tests.k8s.api_server import granted, serving
from tests.k8s.executor import ACCOUNT, CONFIG, NAMESPACE, OWNER, RULES, rbac
from tests.k8s.pod_processes import PodProcesses, pretend
from tests.recorder import record

ROOT = Path(__file__).parents[2]
RUN = "rounds=2 local-steps=2 batch-size=1 eval-batches=1"
# Hours of steps.
STOPPED = "rounds=1 local-steps=1000000 batch-size=1 eval-batches=1"
LONG = 400.0


def until[T](look: Callable[[], T], what: str) -> T:
    deadline = time.monotonic() + LONG
    while not (found := look()):
        assert time.monotonic() < deadline, what
        time.sleep(0.05)
    return found


def finished(control: Control, run: int) -> str:
    until(lambda: control.status(run).status == "finished", "the run did not end")
    return str(control.status(run).sub_status)


@pytest.mark.slow
@pytest.mark.federation
def test_a_site_trains_in_pods(
    tmp_path: Path, free_port: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    home, runs = tmp_path / "home", tmp_path / "runs"
    monkeypatch.setenv("VLAFLEET_HOME", str(home))
    datasets = {name: str(record(tmp_path / name, (30, 35, 40))) for name in ("site-a", "site-b")}
    pki = tmp_path / "federation" / "pki"
    # As the chart has it, but for the mount paths: a process sees this machine's.
    pod_home = tmp_path / "pod" / "home"
    environment = {
        "VLAFLEET_IDENTITY": str(identity_directory(pki, Role.SUPEREXEC, "site-a")),
        "VLAFLEET_HOME": str(home),
        "FLWR_HOME": str(pod_home / ".flwr"),
        "VLAFLEET_LOG_FORMAT": "json",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": os.environ["HF_HOME"],
        "OMP_NUM_THREADS": "1",
    }
    env = [{"name": name, "value": value} for name, value in environment.items()]
    config = tmp_path / "executor.yaml"
    config.write_text(yaml.safe_dump({**CONFIG, "env": env}))
    port = free_port()
    with serving(tmp_path / "api", free_port(), rbac(RULES)) as cluster:
        mount = cluster.mount(tmp_path / "serviceaccount", NAMESPACE, ACCOUNT)
        in_pod = {
            **cluster.environment,
            "PYTHONPATH": str(pretend(tmp_path / "pretend", mount)),
            "VLAFLEET_POD": OWNER["name"],
            "VLAFLEET_POD_UID": OWNER["uid"],
        }
        start = Processes.start

        def started(self: Processes, name: str, *words: str, **environment: str) -> None:
            if name == "superexec-site-a":
                words, environment = (*words, "--kubernetes", str(config)), environment | in_pod
            start(self, name, *words, **environment)

        monkeypatch.setattr(Processes, "start", started)
        with (
            PodProcesses.running(cluster.api, NAMESPACE, tmp_path / "pods") as pods,
            federation(tmp_path / "federation", datasets, runs, port) as (control, processes),
        ):
            log = processes.logs / "superexec-site-a.log"
            run = control.start(run_request(ROOT, [RUN]))
            assert finished(control, run) == "completed", log.read_text()
            rounds = read_rounds(runs / str(run))
            assert [entry["committed"] for entry in rounds] == [True] * 3
            for number, entry in enumerate(rounds):
                for site in datasets:
                    told = entry["sites"][site]
                    assert told["evaluate"]["state"] == "completed"
                    if number:
                        assert told["train"]["state"] == "completed"
            # The second round finds in its pod what the first one left: model, moments and residual.
            assert rounds[2]["sites"]["site-a"]["train"]["bytes_down"] == 0
            restarts = [rounds[2]["sites"][site]["train"]["trainer_restarts"] for site in datasets]
            assert restarts == [None, 0], "a pod has no trainer"
            [index] = (home / "sites" / "site-a").glob("*/index.json")
            states = json.loads(index.read_text())["states"]
            assert [(state["round"], state["step"]) for state in states] == [(1, 2), (2, 4)]
            # Describe, three times evaluate, twice train; a pod that a busy machine began too late has a second one.
            task = "flower.ai/superexec-task-id"
            done = {pod.manifest["metadata"]["labels"][task]: pod for pod in pods.begun}
            assert [pod.process.wait(LONG) for pod in done.values()] == [0] * 6
            lines = [json.loads(line) for line in pods.begun[-1].log.read_text().splitlines()]
            assert any("evaluate: " in line["message"] for line in lines)
            assert {line.get("site") for line in lines} == {"site-a"}
            assert any("Prefix cache (disk)" in line["message"] for line in lines)
            assert "the trainer listens" not in log.read_text()
            used = {asked._replace(name="*") for asked in cluster.api.used()}
            assert used <= granted(rbac(RULES))

            first = len(pods.begun)
            run = control.start(run_request(ROOT, [STOPPED]))
            trains = until(
                lambda: next((p for p in pods.begun[first:] if "step " in p.log.read_text()), None),
                "training did not begin",
            )
            control.stop(run)
            assert trains is not None
            until(lambda: trains.process.poll() is not None, "the stopped run's pod trains on")
