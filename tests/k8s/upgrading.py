"""``helm upgrade`` as Helm runs it, up to the cluster: the second revision of a release, rendered."""

import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml

from tests.k8s.charts import (
    NAMESPACE,
    RELEASES,
    ROOT,
    Manifest,
    objects_in,
    succeeded,
    tools,
)

# What Helm asks before it renders: which version of Kubernetes, and which kinds it knows.
_ANSWERS = {
    "/version": {"major": "1", "minor": "34", "gitVersion": "v1.34.0"},
    "/api": {"kind": "APIVersions", "versions": ["v1"]},
    "/apis": {"kind": "APIGroupList", "apiVersion": "v1", "groups": []},
    "/api/v1": {"kind": "APIResourceList", "groupVersion": "v1", "resources": []},
}


@dataclass(frozen=True)
class Release:
    """One revision of a release."""

    manifests: list[Manifest]
    notes: str


class _Version(BaseHTTPRequestHandler):
    """Answers as a cluster without anything in it."""

    def do_GET(self) -> None:
        answer = json.dumps(_ANSWERS[self.path.partition("?")[0]]).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@contextmanager
def cluster() -> Iterator[str]:
    """Serve what Helm asks of a cluster before it renders; yield the address."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Version) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def upgrade(
    chart: Path, values: Mapping[str, Any], scratch: Path, address: str, revision: int = 2
) -> Release:
    """Return a release's next revision: what ``helm upgrade`` to a chart would send to the cluster, and say."""
    about = yaml.safe_load((chart / "Chart.yaml").read_text())
    release = RELEASES[about["name"]]
    installed = {
        "name": release,
        "namespace": NAMESPACE,
        "version": revision - 1,
        "info": {"status": "deployed"},
        "manifest": "",
        "config": {},
        "chart": {"metadata": about},
    }
    (scratch / "releases.yaml").write_text(yaml.safe_dump([installed]))
    (scratch / "values.yaml").write_text(yaml.safe_dump(dict(values)))
    done = subprocess.run(
        [
            *(tools() / "helm", "upgrade", release, chart, "--namespace", NAMESPACE),
            *("--values", scratch / "values.yaml", "--dry-run=client", "--output", "json"),
            *("--kube-apiserver", address),
        ],
        cwd=ROOT,
        env={
            **os.environ,
            "HELM_DRIVER": "memory",
            "HELM_MEMORY_DRIVER_DATA": str(scratch / "releases.yaml"),
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    rendered = json.loads(succeeded(done))
    assert rendered["version"] == revision
    return Release(objects_in(rendered["manifest"]), rendered["info"]["notes"])


def next_version(chart: str, scratch: Path) -> Path:
    """Return a copy of a chart whose version and images are the next ones: all that a version's labels touch moves."""
    copy = scratch / chart
    shutil.copytree(ROOT / "k8s" / chart, copy)
    about = yaml.safe_load((copy / "Chart.yaml").read_text())
    about.update(version="99.0.0", appVersion="99.0.0")
    (copy / "Chart.yaml").write_text(yaml.safe_dump(about))
    return copy
