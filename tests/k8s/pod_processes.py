"""A kubelet that runs task pods as processes, each the first of process numbers of its own where that is allowed."""

import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from tests.k8s.api_server import ApiServer

# A process of its own numbers, as a container is; its first one has no parent that it could see.
ALONE = ("unshare", "--pid", "--fork", "--kill-child=SIGKILL")


@dataclass
class Pod:
    """A pod that was begun: its manifest, its process, and where it logs."""

    manifest: dict[str, Any]
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def name(self) -> str:
        name: str = self.manifest["metadata"]["name"]
        return name


@dataclass
class PodProcesses:
    """Begins each pending pod of a namespace, and says how it ended.

    The one container's Secrets are files below ``directory``, and its arguments name them there. Its other volumes are
    at their mount paths already. Of this process's environment it has the search path alone.
    """

    api: ApiServer
    namespace: str
    directory: Path
    begun: list[Pod] = field(default_factory=list)
    alone: bool = False

    @classmethod
    @contextmanager
    def running(cls, api: ApiServer, namespace: str, directory: Path) -> Iterator[Self]:
        """Run pods until the block ends, and end those that still run."""
        directory.mkdir(parents=True)
        found = subprocess.run([*ALONE, "true"], check=False, capture_output=True).returncode
        made = cls(api, namespace, directory, alone=found == 0)
        over = threading.Event()
        thread = threading.Thread(target=made._follow, args=(over,), daemon=True)
        thread.start()
        try:
            yield made
        finally:
            over.set()
            thread.join(30)
            for pod in made.begun:
                if pod.process.poll() is None:
                    pod.process.kill()
                    pod.process.wait()

    def _follow(self, over: threading.Event) -> None:
        while not over.wait(0.1):
            for name, manifest in self.api.objects("pods", self.namespace).items():
                if manifest["status"]["phase"] == "Pending":
                    self.begun.append(self._begin(manifest))
                    self.api.set_phase(name, self.namespace, "Running")
            there = self.api.objects("pods", self.namespace)
            for pod in self.begun:
                code = pod.process.poll()
                if pod.name not in there and code is None:
                    os.kill(pod.process.pid, signal.SIGKILL)
                elif pod.name in there and code is not None:
                    phase = "Failed" if code else "Succeeded"
                    if there[pod.name]["status"]["phase"] == "Running":
                        self.api.set_phase(pod.name, self.namespace, phase)

    def _begin(self, manifest: dict[str, Any]) -> Pod:
        spec = manifest["spec"]
        [container] = spec["containers"]
        place = self.directory / manifest["metadata"]["name"]
        place.mkdir()
        words = [*container["command"], *container["args"]]
        for volume in spec["volumes"]:
            if "secret" in volume:
                [mount] = [m for m in container["volumeMounts"] if m["name"] == volume["name"]]
                files = self.api.secret(volume["secret"]["secretName"], self.namespace)
                assert files is not None, "the pod's Secret is made before it"
                for key, content in files.items():
                    (place / key).write_bytes(content)
                words = [word.replace(mount["mountPath"], str(place)) for word in words]
        environment = {entry["name"]: entry["value"] for entry in container["env"]}
        log = place / "log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*(ALONE if self.alone else ()), *words],
                env={"PATH": os.environ["PATH"], "HOME": str(place), **environment},
                cwd=place,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return Pod(manifest, process, log)


def pretend(directory: Path, mount: Path) -> Path:
    """Write what lets a process of this machine find its service account in ``mount``; return its PYTHONPATH."""
    directory.mkdir(parents=True)
    shutil.rmtree(directory / "__pycache__", ignore_errors=True)
    (directory / "sitecustomize.py").write_text(
        "from kubernetes.config import incluster_config\n"
        f"incluster_config.SERVICE_TOKEN_FILENAME = {str(mount / 'token')!r}\n"
        f"incluster_config.SERVICE_CERT_FILENAME = {str(mount / 'ca.crt')!r}\n"
    )
    return directory
