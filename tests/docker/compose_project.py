"""docker compose as the tests use it: one project, its environment, its answers as data."""

import json
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def docker(*arguments: str, timeout: float = 120, check: bool = True) -> str:
    """Run docker and return what it printed; a failure's message is in the assertion."""
    result = subprocess.run(
        ["docker", *arguments], capture_output=True, text=True, timeout=timeout, check=False
    )
    assert not check or result.returncode == 0, result.stderr
    return result.stdout


@dataclass(frozen=True)
class Project:
    """A compose project of this repository under a name of its own."""

    name: str
    environment: Mapping[str, str]
    files: tuple[str, ...] = ("compose.yaml",)

    def compose(self, *arguments: str, timeout: float = 180) -> subprocess.CompletedProcess[str]:
        """Run ``docker compose`` with the project's files and environment."""
        files = [option for file in self.files for option in ("--file", file)]
        return subprocess.run(
            ["docker", "compose", "--project-name", self.name, *files, *arguments],
            cwd=ROOT,
            env={**os.environ, **self.environment},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def output(self, *arguments: str, timeout: float = 180) -> str:
        """Return the standard output of a compose command that must succeed."""
        result = self.compose(*arguments, timeout=timeout)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    def config(self) -> dict[str, Any]:
        """Return the configuration as compose understands it."""
        rendered: dict[str, Any] = json.loads(self.output("config", "--format", "json"))
        return rendered

    def containers(self) -> dict[str, dict[str, Any]]:
        """Return every container by service, ended ones too."""
        lines = self.output("ps", "--all", "--format", "json").splitlines()
        return {entry["Service"]: entry for entry in map(json.loads, lines)}

    def execute(self, service: str, *command: str, timeout: float = 60) -> str:
        """Run a command in a running service and return its output."""
        return self.output("exec", "-T", service, *command, timeout=timeout)

    def addresses(self, service: str) -> dict[str, str]:
        """Return the service's address on each of its networks."""
        identifier = self.output("ps", "--all", "--quiet", service).strip()
        networks = json.loads(docker("inspect", identifier))[0]["NetworkSettings"]["Networks"]
        return {
            name.removeprefix(f"{self.name}_"): at["IPAddress"] for name, at in networks.items()
        }

    def leftovers(self) -> dict[str, list[str]]:
        """Return the containers, volumes and networks that carry the project's label."""
        label = f"label=com.docker.compose.project={self.name}"
        return {
            "containers": docker("ps", "--all", "--quiet", "--filter", label).split(),
            "volumes": docker("volume", "ls", "--quiet", "--filter", label).split(),
            "networks": docker("network", "ls", "--quiet", "--filter", label).split(),
        }
