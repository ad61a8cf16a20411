"""compose.yaml and compose.gpu.yaml as compose renders them: least privilege, held service by service."""

import re
from collections.abc import Iterator
from typing import Any

import pytest

from tests.docker.compose_project import Project

pytestmark = pytest.mark.docker

Service = dict[str, Any]
Config = dict[str, Any]

# Services that end by themselves.
ONE_SHOT = {"pki", "register", "run", "fetch"}
OUR_IMAGES = {"vlafleet-superlink", "vlafleet-supernode", "vlafleet-app"}
# To the hub, and to the webhook of alerts.
ROUTES_OUT = {"hub": "fetch", "alerts-out": "alertmanager"}
PORT_NETWORKS = {"superlink-port", "enrolment-port", "prometheus-port", "grafana-port"}


@pytest.fixture(scope="module", params=["compose.yaml", "compose.gpu.yaml"])
def config(engine: None, request: pytest.FixtureRequest) -> Config:
    """The rendered configuration: the demo's, and with the GPU override on top."""
    files = dict.fromkeys(["compose.yaml", request.param])
    return Project("vlafleet", {}, tuple(files)).config()


def services(config: Config) -> Iterator[tuple[str, Service]]:
    yield from config["services"].items()


def networks(config: Config, service: str) -> set[str]:
    return set(config["services"][service].get("networks") or {})


def reach(config: Config, service: str) -> set[str]:
    """Every service that shares a network with one."""
    own = networks(config, service)
    return {
        name for name, _ in services(config) if name != service and networks(config, name) & own
    }


def identity(service: Service) -> list[str]:
    """What a service sees of the PKI volume."""
    return [
        (volume.get("volume") or {}).get("subpath", "everything")
        for volume in service.get("volumes", [])
        if volume.get("source") == "pki"
    ]


def test_every_service_is_hardened_and_limited(config: Config) -> None:
    for name, service in services(config):
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert "cap_add" not in service, name
        assert service.get("privileged", False) is False, name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert int(service["user"].split(":")[0]) > 0, name
        assert int(service["mem_limit"]) > 0, name
        assert service["pids_limit"] > 0, name
        assert service["init"] is True, name
        assert not {"pid", "ipc", "devices"} & service.keys(), name
        assert service.get("network_mode", "none") == "none", name


def test_long_running_services_have_a_probe_and_come_back(config: Config) -> None:
    for name, service in services(config):
        if name in ONE_SHOT:
            assert service["restart"] == "no", name
        else:
            assert service["restart"] == "always", name
            assert service["healthcheck"]["test"], name
            # Without it the engine probes a starting container every 5 s only.
            assert service["healthcheck"]["start_interval"] == "1s", name


def test_every_image_is_built_here_or_pinned(config: Config) -> None:
    for name, service in services(config):
        image, _, tag = service["image"].partition(":")
        if image in OUR_IMAGES:
            assert re.fullmatch(r"\d+\.\d+\.\d+", tag), name
            assert "build" in service, name
        else:
            assert re.search(r":[\w.-]+@sha256:[0-9a-f]{64}$", service["image"]), name


def test_no_two_services_share_an_identity(config: Config) -> None:
    seen: dict[str, str] = {}
    for name, service in services(config):
        for part in identity(service):
            if part == "everything":
                assert name == "pki"
                continue
            # The operator's is used to register sites and to submit a run; Prometheus' is renewed for it.
            assert part in {"operator/admin", "monitor/prometheus"} or part not in seen, (
                name,
                seen,
            )
            seen[part] = name
    assert seen["site/site-a"] == "site-a"
    assert seen["superexec/site-a"] == "site-a-app"
    assert seen["exporter/exporter"] == "exporter"
    # The authority's key: whoever signs, and nobody else.
    assert seen["ca"] == "enrolment"


def test_an_identity_is_written_by_its_holder_only(config: Config) -> None:
    """A process renews its own certificate; what it cannot renew it cannot write."""
    for name, service in services(config):
        for volume in service.get("volumes", []):
            if volume.get("source") == "pki" and name != "pki":
                holder = volume["target"] in {"/identity", "/ca"} and name != "prometheus"
                assert volume.get("read_only", False) is not holder, (name, volume["target"])


@pytest.mark.parametrize("site", ["site-a", "site-b"])
def test_a_site_reaches_the_federations_two_servers_and_nothing_else(
    config: Config, site: str
) -> None:
    app = f"{site}-app"
    # The app: its own SuperNode. The SuperNode: the SuperLink, who renews its certificate, and its app.
    assert reach(config, app) == {site}
    assert reach(config, site) == {"superlink", "enrolment", app}
    for network in networks(config, app) | networks(config, site):
        assert config["networks"][network]["internal"] is True
    # No key of the site and no other identity in the container that runs training code.
    assert identity(config["services"][app]) == [f"superexec/{site}"]


def test_data_is_seen_by_its_site_only_and_read_only(config: Config) -> None:
    sources: dict[str, list[str]] = {}
    for name, service in services(config):
        for volume in service.get("volumes", []):
            if volume["target"] == "/data":
                assert volume["read_only"] is True, name
                assert name in {"site-a-app", "site-b-app"}
                part = (volume.get("volume") or {}).get("subpath", "")
                sources.setdefault(f"{volume['source']}:{part}", []).append(name)
    assert sorted(sources.values()) == [["site-a-app"], ["site-b-app"]]


def test_only_what_has_no_identity_has_a_route_out(config: Config) -> None:
    for name, network in config["networks"].items():
        if name in PORT_NETWORKS:
            # Bridges for a published port: one service each, and without masquerading nothing gets out.
            options = network["driver_opts"]
            assert options["com.docker.network.bridge.enable_ip_masquerade"] == "false"
            assert sum(name in networks(config, service) for service, _ in services(config)) == 1
        elif name in ROUTES_OUT:
            assert [
                service for service, _ in services(config) if name in networks(config, service)
            ] == [ROUTES_OUT[name]]
            assert identity(config["services"][ROUTES_OUT[name]]) == []
        else:
            assert network["internal"] is True, name
            # Without an address of the host on the bridge, containers cannot talk to the host either.
            assert network["driver_opts"]["com.docker.network.bridge.inhibit_ipv4"] == "true", name
    if "fetch" in config["services"]:
        assert networks(config, "fetch") == {"hub"}


def test_ports_are_published_on_this_machine_only(config: Config) -> None:
    published = {
        name: [(port["host_ip"], port["target"]) for port in service["ports"]]
        for name, service in services(config)
        if service.get("ports")
    }
    assert published == {
        "superlink": [("127.0.0.1", 9092)],
        "enrolment": [("127.0.0.1", 9093)],
        "prometheus": [("127.0.0.1", 9090)],
        "alertmanager": [("127.0.0.1", 9093)],
        "grafana": [("127.0.0.1", 3000)],
    }


def test_the_hub_token_reaches_fetch_only(engine: None) -> None:
    files = ("compose.yaml", "compose.gpu.yaml")
    config = Project("vlafleet", {"HF_TOKEN": "hf_secret"}, files).config()
    holders = [name for name, service in services(config) if "hf_secret" in repr(service)]
    assert holders == ["fetch"]


def test_gpus_are_reserved_for_the_sites_apps(engine: None) -> None:
    config = Project("vlafleet", {}, ("compose.yaml", "compose.gpu.yaml")).config()
    reserved = {
        name: service["deploy"]["resources"]["reservations"]["devices"][0]
        for name, service in services(config)
        if "deploy" in service
    }
    assert reserved.keys() == {"site-a-app", "site-b-app"}
    for device in reserved.values():
        assert device["driver"] == "nvidia"
        assert "gpu" in device["capabilities"]
    for site in ("site-a", "site-b"):
        assert config["services"][site]["command"][-2:] == ["--device", "cuda"]
