"""The compose file of a site in containers.

Two containers, as in the repository's ``compose.yaml``. The SuperNode holds the site's keys, talks to the federation
and sees no data. The app trains: it sees the data, and has neither the site's keys nor a route but to the SuperNode.
"""

import contextlib
import ipaddress
import os
import socket
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import yaml

from certs.errors import ConfigError, StorageError
from certs.files import write_atomic
from supernode.site import Site, make_private

Service = dict[str, Any]

# The images' own user, for a site that root set up.
_IMAGE_USER = 10001
# The SuperNode's Runtime API; the port is in no other container's network.
_PORT = 9094
# The site's metrics without TLS: published to this machine alone, at a port that is free.
_METRICS_PORT = 9095
_HOME = "/home/vlafleet"

# A probe is a quarter of a CPU second of Python, hence every 30 s; every second only until the first success.
_PROBE: Final = {
    "test": ["CMD", "vlafleet", "health", "--identity", "/identity"],
    "interval": "30s",
    "timeout": "10s",
    "retries": 3,
    "start_period": "90s",
    "start_interval": "1s",
}
# "internal" has no route out. inhibit_ipv4 takes this machine's own address off the bridge too, so that code in a
# container cannot reach services of the machine it runs on.
_INTERNAL: Final = {
    "internal": True,
    "driver_opts": {"com.docker.network.bridge.inhibit_ipv4": "true"},
}

_HEADER: Final = """\
# The site {name} of the federation {federation}, written by 'vlafleet site join': run that again to change it.
#   docker compose -f {path} up --detach --wait
#   docker compose -f {path} logs --follow
#   docker compose -f {path} down
# The site's metrics, for a Prometheus of the lab's own, are at the address that this prints, path /metrics:
#   docker compose -f {path} port supernode {metrics}
# A run of another model than the tiny one needs it fetched once, by the one service with a route to the hub:
#   docker compose -f {path} run --rm fetch lerobot/smolvla_base
"""

_RESOLVE: Final = (
    "import sys, pathlib; from app.policy import resolve_model; "
    'resolve_model("hf:" + sys.argv[1], pathlib.Path("/tmp"))'
)
# What is there is not asked for again, so the site restarts without the hub. As docker/fetch.sh.
_FETCH: Final = f"""\
for model in "$$@"; do
  stamp=/fetched/models/.complete-$$(printf '%s' "$$model" | tr / -)
  if [ ! -e "$$stamp" ]; then
    python -c '{_RESOLVE}' "$$model"
    touch "$$stamp"
  fi
done
if [ -n "$$DATASET" ] && [ ! -e "/fetched/datasets/$$DATASET/.complete" ]; then
  # The tag says the layout: LeRobot names its dataset revisions after the format's version.
  hf download "$$DATASET" --repo-type dataset --revision v3.0 --local-dir "/fetched/datasets/$$DATASET"
  touch "/fetched/datasets/$$DATASET/.complete"
fi
"""


def place(site: Site) -> Path:
    """Where the site's compose file lies."""
    return site.directory / "compose.yaml"


class _Dumper(yaml.SafeDumper):
    """For people to read: no anchors, texts of several lines as they are, lists of words in a line."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", data, "|" if "\n" in data else None)

    def represent_list(self, data: Iterable[Any]) -> yaml.SequenceNode:
        items = list(data)
        words = all(isinstance(item, str) and "\n" not in item for item in items)
        return self.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=words)


_Dumper.add_representer(str, _Dumper.represent_str)
_Dumper.add_representer(list, _Dumper.represent_list)


def write(site: Site) -> Path:
    """Write the site's ``compose.yaml`` and make what it mounts; return its path.

    The containers run as this user; where that is root, as the images' own user, who is then given the site's files.
    Raises ``ConfigError`` for an address no container can reach, ``StorageError`` for what cannot be made.
    """
    path = place(site)
    content = document(site, *_owner())
    for directory in (site.state, site.cache, _hub(site), _models(site), _hub_dataset(site)):
        if directory:
            make_private(directory)
    _give(site)
    header = _HEADER.format(
        name=site.name, federation=site.federation, path=path, metrics=_METRICS_PORT
    )
    text = yaml.dump(content, Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True)
    write_atomic(path, (header + text).encode())
    return path


def document(site: Site, uid: int, gid: int) -> dict[str, Any]:
    """Return the compose file's content for containers that run as ``uid`` and ``gid``."""
    networks: dict[str, Any] = {"uplink": {}, "inner": _INTERNAL, "hub": {}}
    return {
        # A lab may be of several federations, under one name.
        "name": f"vlafleet-{site.federation}-{site.name}",
        "services": {
            "supernode": _supernode(site, uid, gid),
            "app": _app(site, uid, gid),
            "fetch": _fetch(site, uid, gid),
        },
        "networks": networks,
    }


def _hardened(image: str, uid: int, gid: int, *, tmp: str, home: str) -> Service:
    return {
        "image": f"${{VLAFLEET_{image.upper()}_IMAGE:-vlafleet-{image}:{version('vlafleet')}}}",
        "init": True,
        "user": f"{uid}:{gid}",
        # The image knows no other user than its own; torch asks for a name.
        "environment": {
            "HOME": _HOME,
            "USER": "vlafleet",
            "VLAFLEET_LOG_FORMAT": "${VLAFLEET_LOG_FORMAT:-text}",
        },
        "read_only": True,
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges:true"],
        "tmpfs": [
            f"/tmp:size={tmp},mode=1777",  # noqa: S108
            f"{_HOME}:size={home},uid={uid},gid={gid},mode=0700",
        ],
        "logging": {"driver": "json-file", "options": {"max-size": "10m", "max-file": "3"}},
    }


def _supernode(site: Site, uid: int, gid: int) -> Service:
    service = _hardened("supernode", uid, gid, tmp="64m", home="64m")
    if hosts := _this_machine(site):
        service["extra_hosts"] = [f"{host}:host-gateway" for host in hosts]
    return {
        **service,
        "command": [
            *("supernode", "--identity", "/identity"),
            *("--superlink", site.superlink, "--enrolment", site.enrolment),
            *("--host", "0.0.0.0", "--port", str(_PORT)),  # noqa: S104
            *("--dataset", dataset(site), "--device", device(site)),
            *("--metrics", f"0.0.0.0:{_METRICS_PORT}"),
        ],
        "ports": [f"127.0.0.1::{_METRICS_PORT}"],
        # Its certificate answers at the site's name.
        "networks": {"uplink": {}, "inner": {"aliases": [site.name]}},
        # Writable: it renews its certificate.
        "volumes": [_bind(site.identity, "/identity")],
        "mem_limit": "2g",
        "pids_limit": 256,
        # A SuperNode that was refused, or whose main loop ended, exits, in part with status 0.
        "restart": "always",
        "stop_grace_period": "15s",
        "healthcheck": _PROBE,
    }


def _app(site: Site, uid: int, gid: int) -> Service:
    service = _hardened("app", uid, gid, tmp="512m", home="2g")
    service["environment"] |= {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": "/fetched/models"}
    if from_hub(site):
        service["depends_on"] = {"fetch": {"condition": "service_completed_successfully"}}
    if site.device != "cpu":
        number = site.device.partition(":")[2]
        gpu = {
            "driver": "nvidia",
            "device_ids": [number or "${VLAFLEET_GPU:-0}"],
            "capabilities": ["gpu", "compute", "utility"],
        }
        service["deploy"] = {"resources": {"reservations": {"devices": [gpu]}}}
    location = site.dataset.partition("#")[0]
    return {
        **service,
        "command": ["superexec", "--identity", "/identity", "--address", f"{site.name}:{_PORT}"],
        "networks": ["inner"],
        "volumes": [
            _bind(site.superexec, "/identity"),
            _bind(_hub_dataset(site) or Path(location), "/data", read_only=True),
            _bind(_models(site), "/fetched/models", read_only=True),
            _bind(site.state, "/var/lib/vlafleet/sites"),
            _bind(site.cache, "/var/lib/vlafleet/cache"),
        ],
        # The trainer measures what is free of it before it keeps a cache in memory.
        "mem_limit": f"${{VLAFLEET_APP_MEMORY:-{'6g' if site.device == 'cpu' else '24g'}}}",
        "pids_limit": 512,
        "restart": "always",
        "healthcheck": _PROBE,
    }


def _fetch(site: Site, uid: int, gid: int) -> Service:
    """The only service with a route to the hub; it ends by itself, and sees neither identity nor data of the site."""
    service = _hardened("app", uid, gid, tmp="512m", home="256m")
    if not from_hub(site):
        service["profiles"] = ["fetch"]
    service["environment"] |= {
        "HF_HUB_CACHE": "/fetched/models",
        "HF_TOKEN": None,
        "DATASET": _repository(site),
    }
    return {
        **service,
        "entrypoint": ["/bin/sh", "-euc", _FETCH, "fetch"],
        "command": [],
        "networks": ["hub"],
        "volumes": [_bind(_hub(site), "/fetched")],
        "mem_limit": "2g",
        "pids_limit": 256,
        "restart": "no",
    }


def _bind(source: Path, target: str, *, read_only: bool = False) -> Service:
    volume: Service = {
        "type": "bind",
        # A dollar would be taken for a variable.
        "source": str(source).replace("$", "$$"),
        "target": target,
        "bind": {"create_host_path": False},
    }
    return {**volume, "read_only": True} if read_only else volume


def dataset(site: Site) -> str:
    """The dataset as the containers see it."""
    _, mark, part = site.dataset.partition("#")
    return f"/data{mark}{part}"


def device(site: Site) -> str:
    """The device as the container sees it: of the GPUs it has the one."""
    return site.device.partition(":")[0]


def _repository(site: Site) -> str:
    """The hub's name of the dataset, empty when it is a directory of this machine."""
    location = site.dataset.partition("#")[0]
    return location.removeprefix("hf:") if location.startswith("hf:") else ""


def from_hub(site: Site) -> bool:
    """Whether the dataset has to be fetched before the site can start."""
    return bool(_repository(site))


def _hub(site: Site) -> Path:
    """What is fetched from the hub."""
    return site.directory / "hub"


def _models(site: Site) -> Path:
    return _hub(site) / "models"


def _hub_dataset(site: Site) -> Path | None:
    name = _repository(site)
    return _hub(site) / "datasets" / name if name else None


def _this_machine(site: Site) -> list[str]:
    """Return the federation's host names that mean this very machine, which in a container they would not.

    Raises ``ConfigError`` for a loopback address, which no entry in a hosts file can lead elsewhere.
    """
    found = []
    for address in dict.fromkeys((site.superlink, site.enrolment)):
        host = address.rpartition(":")[0].strip("[]")
        try:
            numeric = ipaddress.ip_address(host)
        except ValueError:
            if _is_loopback(host) and host not in found:
                found.append(host)
            continue
        if numeric.is_loopback:
            raise ConfigError(
                f"{address} is this machine itself, and another one in a container: ask for an invitation to "
                "a name of it ('vlafleet enrolment --advertise'), or join with --native"
            )
    return found


def _is_loopback(host: str) -> bool:
    try:
        answers = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:  # the preflight says so
        return False
    return all(ipaddress.ip_address(str(answer[4][0])).is_loopback for answer in answers)


def _owner() -> tuple[int, int]:
    """Who the containers run as."""
    uid, gid = os.getuid(), os.getgid()
    return (_IMAGE_USER, _IMAGE_USER) if uid == 0 else (uid, gid)


def _give(site: Site) -> None:
    """Give what is mounted to the containers' user; only root can, and only root has to."""
    if os.getuid() != 0:
        return
    uid, gid = _owner()
    try:
        for top in (site.identity, site.superexec, site.state, site.cache, _hub(site)):
            for path, _, files in os.walk(top):
                for name in (path, *(os.path.join(path, file) for file in files)):
                    # What runs already may remove a file meanwhile.
                    with contextlib.suppress(FileNotFoundError):
                        os.chown(name, uid, gid, follow_symlinks=False)
    except OSError as error:
        raise StorageError(
            f"{site.directory} cannot be given to user {uid}: {error.strerror}"
        ) from error
