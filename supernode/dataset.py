"""What the app says of the site's dataset and of a round on it: ``vlafleet data check --json``, where the app is.

A process of its own: the app's packages are not in the SuperNode's, and with containers not on this machine.
"""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from certs.errors import DatasetError, FleetError, ToolError
from supernode.findings import Finding, error_of, fail, ok, size, warning
from supernode.site import Site

# It reads every row and some images of each video; a dataset of the hub is fetched first.
_PATIENCE_SECONDS = 1800.0

# What the other checks read of the estimate (app/estimate.py): an app of another version is told from a broken one.
_ESTIMATE = frozenset(
    {
        "device", "cache_tier", "cache_bytes", "memory_bytes", "gpu_memory_bytes", "state_bytes", "seconds_per_round",
        "cache_seconds", "bytes_up", "bytes_down", "first_bytes_down", "torch_cuda", "cuda_available",
    }
)  # fmt: skip

_NAME = "dataset"


@dataclass(frozen=True)
class Look:
    """What was found, and the objects of the app's answer where it gave them."""

    findings: list[Finding]
    dataset: dict[str, Any] | None = None
    estimate: dict[str, Any] | None = None


def look(site: Site, run_config: Sequence[str] = ()) -> Look:
    """Have the app check the site's dataset, for the site's device and a run of ``run_config``."""
    if (missing := _without_app(site)) is not None:
        return Look([missing])
    try:
        done = subprocess.run(
            _command(site, run_config),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_PATIENCE_SECONDS,
            check=False,
            # Where the site's own processes keep what they fetched and made.
            env={**os.environ, "VLAFLEET_HOME": str(site.directory)},
        )
    except FleetError as error:
        return _unknown(str(error), type(error))
    except subprocess.TimeoutExpired:
        minutes = f"{_PATIENCE_SECONDS / 60:.0f} minutes"
        return _unknown(f"the check of {site.dataset} did not end within {minutes}", DatasetError)
    except OSError as error:
        return _unknown(f"{error.filename} cannot be run: {error.strerror}", ToolError)
    try:
        return _read(site, json.loads(done.stdout))
    except (ValueError, KeyError, TypeError):
        return _broken(done)


def _without_app(site: Site) -> Finding | None:
    """What is to be said where the app's packages are needed on this machine and are not there."""
    if site.mode == "compose" or importlib.util.find_spec("lerobot") is not None:
        return None
    if site.mode == "helm":
        return warning(
            _NAME,
            f"{site.dataset} was not checked: the app's packages are not on this machine",
            "The site checks it when a run begins; 'vlafleet data check' in the cluster's app container does before.",
        )
    return fail(
        _NAME,
        "the app's packages, which train, are not installed",
        "Install them (requirements/app.txt), or join with --compose.",
        ToolError,
    )


def _command(site: Site, run_config: Sequence[str]) -> list[str]:
    settings = [word for line in run_config for word in ("--run-config", line)]
    if site.mode == "compose":
        from supernode.compose import check_command

        return [*check_command(site), *settings]
    command = [sys.executable, "-m", "vlafleet", "data", "check", site.dataset]
    return [*command, "--json", "--device", site.device, *settings]


def _read(site: Site, answer: dict[str, Any]) -> Look:
    """Read the answer; ``ValueError``, ``KeyError`` or ``TypeError`` when it is none."""
    dataset, estimate = answer["dataset"], answer["estimate"]
    if estimate is not None and not set(estimate) >= _ESTIMATE:
        raise ValueError("an estimate without its figures")
    error = error_of(int(answer["exit_code"])) or DatasetError
    again = "Then check again; 'vlafleet data check' alone looks at the dataset only."
    findings = [
        warning(_NAME, str(sentence), again)
        if answer["fit"]
        else fail(_NAME, str(sentence), again, error)
        for sentence in answer["findings"]
    ]
    if not answer["fit"] and not findings:
        raise ValueError("unfit without a finding")
    if not findings:
        cameras = ", ".join(map(str, dataset["cameras"]))
        sentence = (
            f"{site.dataset}: {dataset['episodes']} episodes, {dataset['held_out_episodes']} of them held out, "
            f"{dataset['frames']} frames at {dataset['fps']} a second, cameras {cameras}, {size(dataset['bytes'])}"
        )
        findings = [ok(_NAME, sentence)]
    return Look(findings, dataset, estimate)


def _broken(done: subprocess.CompletedProcess[str]) -> Look:
    """The process ended without an answer: its last line says why."""
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    said = lines[-1][:300].removeprefix("vlafleet: ") if lines else "it said nothing"
    return _unknown(
        f"the check ended with code {done.returncode}: {said}",
        error_of(done.returncode) or ToolError,
    )


def _unknown(sentence: str, error: type[FleetError]) -> Look:
    remedy = "Run 'vlafleet data check' on it where the site trains, and see what it says."
    return Look([fail(_NAME, sentence, remedy, error)])
