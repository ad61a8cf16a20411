"""The compose file of a site as compose understands it, and what its containers may read and write."""

import json
import os
import socket
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from certs.errors import ConnectionRefusedByFleetError, RunFailedError
from supernode import compose
from supernode.site import Site
from tests.docker.compose_project import docker

pytestmark = pytest.mark.docker


@pytest.fixture
def site(tmp_path: Path, engine: None) -> Iterator[Site]:
    """A site's directory with keys in it, under a project name of its own; its containers end with the test."""
    recordings = tmp_path / "recordings $HOME"
    recordings.mkdir()
    (recordings / "frame").write_text("frame")
    site = Site(
        tmp_path / "a site",
        *("demo", f"test-{os.getpid()}", "localhost:9092", "localhost:9093"),
        *(str(recordings), "cpu", "compose"),
    )
    site.prepare()
    for directory in (site.identity, site.superexec):
        key = directory / "tls.key"
        key.write_text(f"the key of {directory.name}")
        key.chmod(0o600)
    yield site
    if (site.directory / "compose.yaml").exists():
        compose.stop(site)


def config(site: Site) -> dict[str, Any]:
    path = compose.write(site)
    rendered: dict[str, Any] = json.loads(
        docker("compose", "--file", str(path), "config", "--format", "json")
    )
    return rendered


def test_compose_takes_the_file_as_it_was_meant(site: Site) -> None:
    rendered = config(site)
    assert rendered["name"] == f"vlafleet-demo-{site.name}"
    supernode, app = (rendered["services"][name] for name in ("supernode", "app"))
    assert set(rendered["services"]) == {"supernode", "app"}
    for service in (supernode, app):
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert int(service["mem_limit"]) > 0
        assert service["pids_limit"] > 0
        assert service["restart"] == "always"
        assert int(service["user"].split(":")[0]) > 0
    assert "ports" not in app
    assert [(port["host_ip"], port["target"]) for port in supernode["ports"]] == [
        ("127.0.0.1", 9095)
    ]
    mounted = {volume["target"]: volume["source"] for volume in app["volumes"]}
    # As compose writes a dollar that it leaves alone.
    assert mounted["/data"] == site.dataset.replace("$", "$$")
    assert mounted["/identity"] == str(site.superexec)
    assert set(app["networks"]) == {"inner"}
    assert rendered["networks"]["inner"]["internal"] is True
    assert not rendered["networks"]["uplink"].get("internal")


def test_compose_takes_a_gpu_and_a_dataset_of_the_hub(site: Site) -> None:
    rendered = config(replace(site, dataset="hf:owner/name", device="cuda:1"))
    assert set(rendered["services"]) == {"supernode", "app", "fetch"}
    app = rendered["services"]["app"]
    (device,) = app["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["device_ids"]) == ("nvidia", ["1"])
    script = rendered["services"]["fetch"]["entrypoint"][2]
    assert '"$$DATASET"' in script
    assert list(rendered["services"]["fetch"]["networks"]) == ["hub"]


LOOK = """
cat /identity/tls.key
touch /identity/renewed && rm /identity/renewed
if [ -e /data ]; then
  cat /data/frame
  touch /data/x 2>/dev/null && echo data can be written
  touch /var/lib/vlafleet/sites/x /var/lib/vlafleet/cache/x
fi
touch /x 2>/dev/null && echo the root can be written
python -c 'import getpass, os; getpass.getuser(), open(os.path.expanduser("~/x"), "w"), open("/tmp/x", "w")'
# A default route is one to 0.0.0.0.
awk '$2 == "00000000"' /proc/net/route | grep -q . && echo a route out || echo no route out
exit 0
"""


def looked(site: Site, service: str) -> str:
    """What a service's container may see and do, as it is and as its user."""
    path = compose.write(site)
    command = ["compose", "--file", str(path), "run", "--rm", "-T", "--no-deps"]
    done = subprocess.run(
        ["docker", *command, "--entrypoint", "sh", service, "-c", LOOK],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_containers_read_and_write_what_is_theirs(images: None, site: Site) -> None:
    assert looked(site, "app") == "the key of superexecframeno route out\n"
    assert looked(site, "supernode") == "the key of identitya route out\n"
    # This user, too, still may.
    assert (site.identity / "tls.key").stat().st_mode & 0o777 == 0o600
    assert (site.state / "x").exists()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_start_that_does_not_come_up_says_so_and_a_stop_leaves_nothing(
    images: None,
    site: Site,
    free_port: Callable[[], int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compose, "_START_S", 5)
    compose.write(site)
    # On loopback this machine reaches it, and a container does not.
    with socket.create_server(("127.0.0.1", free_port())) as server:
        address = f"localhost:{server.getsockname()[1]}"
        local = replace(site, superlink=address, enrolment=address)
        compose.write(local)
        with pytest.raises(ConnectionRefusedByFleetError, match=f"does not reach {address} "):
            compose.start(local)
    assert compose.running(site) is False
    with socket.create_server(("0.0.0.0", free_port())) as server:  # noqa: S104
        address = f"localhost:{server.getsockname()[1]}"
        local = replace(site, superlink=address, enrolment=address)
        compose.write(local)
        # The container gets that far; its certificate is missing.
        with pytest.raises(RunFailedError, match=r"compose\.yaml up .* failed: "):
            compose.start(local)
    assert compose.running(site) is True
    assert compose.stop(site) is True
    label = f"label=com.docker.compose.project=vlafleet-demo-{site.name}"
    assert docker("ps", "--all", "--quiet", "--filter", label) == ""
    assert docker("network", "ls", "--quiet", "--filter", label) == ""
    assert compose.stop(site) is False
