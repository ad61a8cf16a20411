"""The compose file of a site as it is written, and what is said when docker is not there to take it."""

import ast
import os
import stat
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from certs.errors import ConfigError, ConnectionRefusedByFleetError, RunFailedError, ToolError
from supernode import compose
from supernode.site import Site

Service = dict[str, Any]


@pytest.fixture
def site(tmp_path: Path) -> Site:
    (tmp_path / "recordings").mkdir()
    directory = tmp_path / "site"
    site = Site(
        directory,
        *("demo", "lab-7", "fed.example:9092", "fed.example:9093"),
        *(f"{tmp_path}/recordings#episodes=0:50", "cpu", "compose"),
    )
    site.prepare()
    return site


def services(site: Site) -> dict[str, Service]:
    document: dict[str, Any] = yaml.safe_load(compose.write(site).read_text())
    return dict(document["services"])


def binds(service: Service) -> dict[str, str]:
    """What is mounted where, and whether it can be written."""
    assert all(volume["type"] == "bind" for volume in service["volumes"])
    assert not any(volume["bind"]["create_host_path"] for volume in service["volumes"])
    return {
        volume["target"]: f"{volume['source']}:{'ro' if volume.get('read_only') else 'rw'}"
        for volume in service["volumes"]
    }


def test_every_service_is_hardened_and_limited(site: Site) -> None:
    for name, service in services(site).items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["init"] is True, name
        assert service["mem_limit"], name
        assert service["pids_limit"] > 0, name
        assert service["logging"]["options"] == {"max-size": "10m", "max-file": "3"}, name
        uid, gid = map(int, service["user"].split(":"))
        assert uid > 0, name
        assert any(f"uid={uid},gid={gid}" in place for place in service["tmpfs"]), name
        assert not {"privileged", "cap_add", "network_mode", "pid", "ipc"} & set(service)
        assert name == "supernode" or "ports" not in service
        if name != "fetch":
            assert service["restart"] == "always", name
            assert service["healthcheck"]["start_interval"] == "1s", name


def test_what_trains_has_neither_the_sites_keys_nor_a_route(site: Site) -> None:
    document = yaml.safe_load(compose.write(site).read_text())
    supernode, app = document["services"]["supernode"], document["services"]["app"]
    assert binds(supernode) == {"/identity": f"{site.identity}:rw"}
    assert binds(app) == {
        "/identity": f"{site.superexec}:rw",
        "/data": f"{site.directory.parent}/recordings:ro",
        "/fetched/models": f"{site.directory}/hub/models:ro",
        "/var/lib/vlafleet/sites": f"{site.state}:rw",
        "/var/lib/vlafleet/cache": f"{site.cache}:rw",
    }
    assert str(site.identity) not in str(app)
    assert app["networks"] == ["inner"]
    assert set(supernode["networks"]) == {"uplink", "inner"}
    inner = document["networks"]["inner"]
    assert inner["internal"] is True
    # Nor does it reach services of the machine itself.
    assert inner["driver_opts"] == {"com.docker.network.bridge.inhibit_ipv4": "true"}
    assert not (document["networks"]["uplink"] or {}).get("internal")
    # It finds its SuperNode under the name in that one's certificate.
    assert supernode["networks"]["inner"]["aliases"] == ["lab-7"]
    assert app["command"][-2:] == ["--address", "lab-7:9094"]
    assert app["environment"]["HF_HUB_OFFLINE"] == "1"


def test_the_supernode_is_told_where_to_go_and_what_the_app_sees(site: Site) -> None:
    command = services(site)["supernode"]["command"]
    options = dict(zip(command[1::2], command[2::2], strict=True))
    assert options["--superlink"] == "fed.example:9092"
    assert options["--enrolment"] == "fed.example:9093"
    assert options["--dataset"] == "/data#episodes=0:50"
    assert options["--device"] == "cpu"


def test_the_metrics_are_published_to_this_machine_alone(site: Site) -> None:
    supernode = services(site)["supernode"]
    assert supernode["command"][-2:] == ["--metrics", "0.0.0.0:9095"]
    assert supernode["ports"] == ["127.0.0.1::9095"]
    assert "port supernode 9095\n" in compose.write(site).read_text()


def test_the_file_is_the_same_every_time_and_says_how_to_use_it(site: Site) -> None:
    first = compose.write(site).read_text()
    assert compose.write(site).read_text() == first
    assert f"docker compose -f {site.directory}/compose.yaml up --detach --wait" in first
    assert "&id" not in first
    assert yaml.safe_load(first)["name"] == "vlafleet-demo-lab-7"


def test_one_gpu_is_reserved_and_is_the_containers_first(site: Site) -> None:
    assert "deploy" not in services(site)["app"]
    found = services(replace(site, device="cuda:1"))
    (device,) = found["app"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["driver"] == "nvidia"
    assert device["device_ids"] == ["1"]
    assert "gpu" in device["capabilities"]
    assert found["supernode"]["command"][-4:-2] == ["--device", "cuda"]
    assert "deploy" not in found["supernode"]
    assert found["app"]["mem_limit"] == "${VLAFLEET_APP_MEMORY:-24g}"


def test_a_dataset_of_the_hub_is_fetched_by_a_service_that_sees_nothing_else(site: Site) -> None:
    assert services(site)["fetch"]["profiles"] == ["fetch"]
    found = services(replace(site, dataset="hf:owner/name#episodes=0:5"))
    fetch, app = found["fetch"], found["app"]
    assert "profiles" not in fetch
    assert fetch["networks"] == ["hub"]
    assert binds(fetch) == {"/fetched": f"{site.directory}/hub:rw"}
    assert fetch["environment"]["DATASET"] == "owner/name"
    assert app["depends_on"] == {"fetch": {"condition": "service_completed_successfully"}}
    # The app itself has no route to the hub, as ever.
    assert app["networks"] == ["inner"]
    assert app["environment"]["HF_HUB_OFFLINE"] == "1"
    assert "HF_TOKEN" not in app["environment"]
    source, mode = binds(app)["/data"].rsplit(":", 1)
    assert mode == "ro"
    assert Path(source).is_dir()
    assert found["supernode"]["command"][-5] == "/data#episodes=0:5"


def test_a_dollar_in_a_path_is_no_variable(site: Site) -> None:
    app = services(replace(site, dataset="/srv/$HOME"))["app"]
    assert binds(app)["/data"] == "/srv/$$HOME:ro"


@pytest.mark.parametrize("address", ["127.0.0.1:9092", "[::1]:9092"])
def test_a_loopback_address_is_refused(site: Site, address: str) -> None:
    for wrong in (replace(site, superlink=address), replace(site, enrolment=address)):
        with pytest.raises(ConfigError, match="is this machine itself, and another one in a"):
            compose.write(wrong)
        assert not (site.directory / "compose.yaml").exists()


def test_a_name_of_this_machine_is_led_to_it(site: Site) -> None:
    assert "extra_hosts" not in services(site)["supernode"]
    local = replace(site, superlink="localhost:9092", enrolment="localhost:9093")
    found = services(local)
    assert found["supernode"]["extra_hosts"] == ["localhost:host-gateway"]
    assert "extra_hosts" not in found["app"]


def test_files_stay_their_owners_alone(site: Site) -> None:
    key = site.identity / "tls.key"
    key.write_bytes(b"")
    key.chmod(0o600)
    outside = site.directory.parent / "outside"
    outside.touch()
    (site.identity / "link").symlink_to(outside)
    found = services(site)
    uid, gid = map(int, found["supernode"]["user"].split(":"))
    assert (uid, gid) == ((10001, 10001) if os.getuid() == 0 else (os.getuid(), os.getgid()))
    for path in (key, site.identity, site.state, site.cache, site.directory / "hub"):
        status = path.stat()
        assert (status.st_uid, status.st_gid) == (uid, gid), path
        assert not status.st_mode & 0o077, path
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    # What a link leads to is not given away.
    assert outside.stat().st_uid == os.getuid()


def test_the_check_runs_where_training_does(site: Site) -> None:
    command = compose.check_command(replace(site, device="cuda:1"))
    assert command[:2] == ["docker", "compose"]
    assert (site.directory / "compose.yaml").exists()
    app = command.index("app")
    assert command[app + 1 :] == [
        *("data", "check", "/data#episodes=0:50", "--json", "--device", "cuda")
    ]


@pytest.fixture
def docker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Put a docker of one's own making on PATH: the body of a shell script."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")

    def make(script: str) -> None:
        (folder / "docker").write_text(f"#!/bin/sh\n{script}\n")
        (folder / "docker").chmod(0o755)

    return make


def test_docker_that_is_missing_or_too_old_is_one_sentence(
    site: Site,
    docker: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    compose.write(site)
    docker("echo 2.25.9")
    with pytest.raises(ToolError, match=r"docker compose 2\.26 or newer is needed and 2\.25\.9 is"):
        compose.start(site)
    docker("echo v1.29.2")
    with pytest.raises(ToolError, match="is needed and v1"):
        compose.start(site)
    docker("echo 'docker: unknown command' >&2; exit 1")
    with pytest.raises(ToolError, match="is needed and none is here"):
        compose.start(site)
    docker('[ "$1" = compose ] && echo 2.26.1')
    with pytest.raises(ToolError, match="the Docker engine does not answer"):
        compose.start(site)
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with pytest.raises(ToolError, match="is needed and none is here"):
        compose.start(site)


def test_a_start_that_fails_says_composes_last_line(
    site: Site, docker: Callable[[str], None]
) -> None:
    compose.write(site)
    docker(
        'case "$*" in *version*) echo 2.40.0;; *" run "*) ;; '
        "*) echo starting >&2; echo 'container app is unhealthy' >&2; exit 1;; esac"
    )
    with pytest.raises(RunFailedError, match=r"up --detach .* failed: container app is unhealthy$"):
        compose.start(site)


def test_a_federation_that_containers_do_not_reach_is_one_sentence(
    site: Site, docker: Callable[[str], None]
) -> None:
    compose.write(site)
    docker(
        'case "$*" in *version*) echo 2.40.0;; *" run "*) echo \'fed.example:9092 (refused)\'; exit 15;; '
        "*) exit 1;; esac"
    )
    with pytest.raises(
        ConnectionRefusedByFleetError,
        match=r"does not reach fed\.example:9092 \(refused\): let the",
    ):
        compose.start(site)
    docker(
        "case \"$*\" in *version*) echo 2.40.0;; *) echo 'pull access denied' >&2; exit 1;; esac"
    )
    with pytest.raises(RunFailedError, match="cannot be started: pull access denied"):
        compose.start(site)


def test_what_was_never_written_does_not_run(site: Site, docker: Callable[[str], None]) -> None:
    docker("exit 1")
    assert compose.running(site) is False
    assert compose.stop(site) is False


def test_what_was_fetched_is_not_asked_for_again(site: Site, tmp_path: Path) -> None:
    """The script of the service as a shell runs it; instead of python and hf something that notes what it is told."""
    service = services(replace(site, dataset="hf:owner/name"))["fetch"]
    entrypoint = [word.replace("$$", "$") for word in service["entrypoint"]]
    entrypoint[2] = entrypoint[2].replace("/fetched", str(site.directory / "hub"))
    folder, told = tmp_path / "bin", tmp_path / "told"
    folder.mkdir()
    for name in ("python", "hf"):
        (folder / name).write_text(f'#!/bin/sh\necho {name} "$@" >> {told}\n')
        (folder / name).chmod(0o755)
    environment = {"PATH": f"{folder}:/usr/bin:/bin", "DATASET": "owner/name"}
    for _ in range(2):
        subprocess.run([*entrypoint, "lerobot/smolvla_base"], check=True, env=environment)
    model, dataset = told.read_text().splitlines()
    code = model.removeprefix("python -c ").removesuffix(" lerobot/smolvla_base")
    assert "resolve_model" in ast.unparse(ast.parse(code))
    place = site.directory / "hub" / "datasets" / "owner" / "name"
    assert dataset == (
        f"hf download owner/name --repo-type dataset --revision v3.0 --local-dir {place}"
    )
    # What failed is asked for again.
    (folder / "python").write_text("#!/bin/sh\nexit 3\n")
    failed = subprocess.run([*entrypoint, "other/model"], check=False, env=environment)
    assert failed.returncode == 3
    assert not list((site.directory / "hub" / "models").glob("*other*"))
