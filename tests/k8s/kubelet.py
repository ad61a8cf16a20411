"""A small kubelet: runs the pods that the charts render, in Docker, as Kubernetes would.

A pod is a pause container, whose network (and, where they are shared, processes) its containers join. Images, commands,
arguments, environment, users, capabilities, volumes and probes are those of the pod's spec, and nothing besides.
"""

import re
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from tests.k8s.container_options import expand, in_bytes, limits, require_known, security
from tests.k8s.engine import Engine
from tests.k8s.objects import namespace_of, of_kind, selects
from tests.k8s.pod_files import Files, MissingError, archive, files
from tests.k8s.wiring import Cluster, Link, Pod, Wiring

# What the pause containers run, and what prepares volumes: any of the project's images would do.
_IMAGE = "vlafleet-superlink:0.1.0"
_TOKENS = "/var/run/secrets/kubernetes.io/serviceaccount"
# Documentation's addresses (RFC 5737): a Service that the pod cannot reach has one all the same.
_UNREACHABLE = "192.0.2.1"
_ATTEMPTS = 6
_SERVED = ("emptyDir", "secret", "configMap", "projected", "downwardAPI")

# Reads the files of volumes on standard input. Those of claims are the pod's group's, as fsGroup has it: with
# OnRootMismatch only where their root is not yet.
_PREPARE = """
set -eu
cd /v
group=$1 policy=$2; shift 2
for claim in "$@"; do
  [ -n "$group" ] || continue
  if [ "$policy" != OnRootMismatch ] || [ "$(stat -c %g "$claim")" != "$group" ]; then
    chgrp -R "$group" "$claim"
    find "$claim" -type d -exec chmod ug+rwx,g+s {} +
    find "$claim" -type f -exec chmod ug+rw {} +
  fi
done
tar -xf -
"""
# The kubelet makes what a subPath leads to, like the volume's root.
_SUBPATH = 'cd /v; [ -e "$1" ] || { mkdir -p "$1" && chmod --reference="${1%%/*}" "$1"; }'


class Kubelet:
    """Runs pods; what is looked up of Secrets, ConfigMaps and tokens is given as functions."""

    def __init__(
        self,
        engine: Engine,
        wiring: Wiring,
        scratch: Path,
        *,
        secret: Callable[[str, str], Mapping[str, bytes] | None],
        token: Callable[[str, str], str],
        api: Pod,
    ) -> None:
        self._engine = engine
        self._wiring = wiring
        self._secret = secret
        self._token = token
        self._api = api
        # By each pod that runs, the networks that it is in.
        self._running: dict[Pod, set[str]] = {api: set()}
        # A pod that may not ask the DNS has one that does not answer.
        self._no_dns = scratch / "resolv.conf"
        self._no_dns.write_text("nameserver 127.0.0.1\n")
        self._no_dns.chmod(0o644)

    def start_all(self, pods: Iterable[Pod]) -> None:
        """Start pods in an order in which each finds the Secrets that it needs."""
        waiting = list(pods)
        self._wiring.pods += [pod for pod in waiting if pod not in self._wiring.pods]
        while waiting:
            missing = {}
            for pod in list(waiting):
                try:
                    self.start(pod)
                except MissingError as error:
                    missing[str(pod)] = str(error)
                else:
                    waiting.remove(pod)
            assert len(missing) < len(waiting) or not waiting, missing

    def start(self, pod: Pod) -> None:
        """Start a pod, its init containers to their ends; raise ``MissingError`` where something is not there yet."""
        self._begin(pod)
        for container in pod.spec["containers"]:
            restart = {"Always": "always", "OnFailure": "on-failure", "Never": "no"}
            policy = restart[pod.spec.get("restartPolicy", "Always")]
            self._run(pod, container, "--detach", "--restart", policy)

    def run(self, pod: Pod) -> str:
        """Run a pod to its end, as a Job does; return what its one container printed."""
        if pod not in self._wiring.pods:
            self._wiring.pods.append(pod)
        try:
            self._begin(pod)
            (container,) = pod.spec["containers"]
            self._to_the_end(pod, container)
        finally:
            self.delete(pod)
            self._wiring.pods.remove(pod)
        return pod.logs[container["name"]]

    def delete(self, pod: Pod) -> None:
        """End a pod: its containers are asked to stop, what is its own goes with it."""
        grace = str(pod.spec.get("terminationGracePeriodSeconds", 30))
        names = [self._container(pod, one["name"]) for one in pod.all_containers]
        self._engine("stop", "--time", grace, *names, check=False)
        self._engine("rm", "--force", *names, self._pause(pod), check=False)
        self._running.pop(pod, None)
        volumes = [self._volume(pod, one) for one in self._volumes(pod) if not _claim(one)]
        if volumes:
            self._engine("volume", "rm", "--force", *volumes, check=False)

    def execute(
        self, pod: Pod, container: str, *command: str, check: bool = True, timeout: float = 120
    ) -> str:
        """Run a command in a container, as ``kubectl exec`` does; return what it printed."""
        name = self._container(pod, container)
        done = self._engine("exec", name, *command, check=False, timeout=timeout)
        printed = done.stdout.decode()
        assert not check or done.returncode == 0, f"{printed}{done.stderr.decode()}"
        return printed if check else f"{printed}{done.stderr.decode()}"

    def probe(self, pod: Pod, container: Mapping[str, Any], kind: str) -> str | None:
        """Run a probe once; return why it failed, None where it passed."""
        command = container[kind]["exec"]["command"]  # there is no other way to ask over mutual TLS
        name = self._container(pod, container["name"])
        done = self._engine("exec", name, *command, check=False, timeout=60)
        return None if done.returncode == 0 else (done.stderr + done.stdout).decode()

    def wait_ready(self, pod: Pod, limit: float = 300) -> None:
        """Wait until every container's startup and readiness probes pass."""
        deadline = time.monotonic() + limit
        for container in pod.spec["containers"]:
            for kind in ("startupProbe", "readinessProbe"):
                while kind in container and (reason := self.probe(pod, container, kind)):
                    assert time.monotonic() < deadline, f"{pod}: {reason}{self.log(pod, container)}"
                    time.sleep(1)

    def log(self, pod: Pod, container: Mapping[str, Any]) -> str:
        """Return the last lines of what a container printed."""
        name = self._container(pod, container["name"])
        done = self._engine("logs", "--tail", "40", name, check=False)
        return (done.stdout + done.stderr).decode()

    def address(self, pod: Pod, asker: Pod) -> str | None:
        """Return a pod's address for another; None where neither may reach the other."""
        link = self._wiring.links(asker).get(pod)
        return link.address(pod) if link else None

    def links(self, pod: Pod) -> list[Link]:
        """Return the networks of a pod, one for each pod that it may talk with."""
        return list(self._wiring.links(pod).values())

    # What a pod is made of.

    def _begin(self, pod: Pod) -> None:
        require_known(pod.spec)
        held = self._held(pod)
        links = self._wiring.links(pod)
        self._make_volumes(pod)
        self._start_pause(pod, links)
        group = pod.spec.get("securityContext", {}).get("fsGroup")
        policy = pod.spec.get("securityContext", {}).get("fsGroupChangePolicy", "Always")
        claims = [one["name"] for one in self._volumes(pod) if _claim(one)]
        arguments = [str(group or ""), policy, *claims]
        self._as_root(pod, _PREPARE, *arguments, stdin=archive(held, group))
        for container in pod.spec.get("initContainers", []):
            self._to_the_end(pod, container)

    def _held(self, pod: Pod) -> dict[str, Files]:
        """Return what the volumes hold whose files are written here."""

        def find(kind: str, name: str) -> Mapping[str, bytes] | None:
            if kind == "Secret":
                return self._secret(pod.namespace, name)
            found = pod.cluster.get(kind, pod.namespace, name)
            return {key: text.encode() for key, text in found["data"].items()} if found else None

        account = pod.spec.get("serviceAccountName", "default")
        token = self._token(pod.namespace, account)
        return {
            volume["name"]: files(volume, find, token, pod.fields)
            for volume in self._volumes(pod)
            if set(volume) & set(_SERVED) - {"emptyDir"}
        }

    def _volumes(self, pod: Pod) -> list[dict[str, Any]]:
        """Return the pod's volumes, and that of its token where Kubernetes would mount one unasked."""
        volumes: list[dict[str, Any]] = list(pod.spec.get("volumes", []))
        if self._has_token(pod):
            sources = [
                {"serviceAccountToken": {"path": "token"}},
                {"configMap": {"name": "kube-root-ca.crt"}},
                {"downwardAPI": {"items": [_NAMESPACE_FILE]}},
            ]
            volumes.append({"name": "kube-api-access", "projected": {"sources": sources}})
        return volumes

    def _has_token(self, pod: Pod) -> bool:
        account = pod.cluster.get(
            "ServiceAccount", pod.namespace, pod.spec.get("serviceAccountName", "default")
        )
        own = (account or {}).get("automountServiceAccountToken", True)
        return bool(pod.spec.get("automountServiceAccountToken", own))

    def _make_volumes(self, pod: Pod) -> None:
        group = pod.spec.get("securityContext", {}).get("fsGroup")
        for volume in self._volumes(pod):
            options: tuple[str, ...] = ()
            if claim := _claim(volume):
                assert pod.cluster.get("PersistentVolumeClaim", pod.namespace, claim), claim
            elif "emptyDir" in volume:
                size = in_bytes((volume["emptyDir"] or {}).get("sizeLimit", "64Mi"))
                mode = f"size={size},mode=2777,gid={group}" if group else f"size={size},mode=0777"
                options = ("--opt", "type=tmpfs", "--opt", "device=tmpfs", "--opt", f"o={mode}")
            elif "hostPath" in volume:
                continue
            name = self._volume(pod, volume)
            self._engine("volume", "create", *self._engine.label, *options, name)

    def _volume(self, pod: Pod, volume: Mapping[str, Any]) -> str:
        if claim := _claim(volume):
            return self.claimed(pod.cluster, pod.namespace, claim)
        return self._engine.name(f"{pod}-{volume['name']}")

    def claimed(self, cluster: Cluster, namespace: str, claim: str) -> str:
        """Return the name of a claim's volume."""
        return self._engine.name(f"{cluster.name}-{namespace}-claim-{claim}")

    def fill(self, cluster: Cluster, namespace: str, claim: str, directory: Path) -> None:
        """Make a claim's volume and copy a directory's files into it, as whoever brings a dataset would."""
        volume = self.claimed(cluster, namespace, claim)
        self._engine("volume", "create", *self._engine.label, volume)
        self._engine(
            *("run", "--rm", *self._engine.label, "--network", "none", "--user", "0:0"),
            *("--volume", f"{directory}:/from:ro", "--volume", f"{volume}:/v"),
            *("--entrypoint", "cp", _IMAGE, "-rT", "/from", "/v"),
        )

    def _start_pause(self, pod: Pod, links: Mapping[Pod, Link]) -> None:
        networks = []
        for link in links.values():
            address, names = link.endpoint(pod)
            aliases = "".join(f",alias={name}" for name in names)
            networks += ["--network", f"name={link.network},ip={address}{aliases}"]
        mounts = [
            _mount(self._volume(pod, volume), f"/v/{volume['name']}")
            for volume in self._volumes(pod)
            if "hostPath" not in volume
        ]
        self._engine("rm", "--force", self._pause(pod), check=False)
        self._engine(
            *("run", "--detach", "--name", self._pause(pod), *self._engine.label),
            *("--hostname", pod.name, "--init", "--read-only", "--user", "65535:65535"),
            *("--security-opt", "no-new-privileges"),
            *(networks or ["--network", "none"]),
            *(option for mount in mounts for option in ("--mount", mount)),
            *("--entrypoint", "sleep", _IMAGE, "infinity"),
        )
        for other, link in links.items():
            if other in self._running and link.network not in self._running[other]:
                address, names = link.endpoint(other)
                named = [option for name in names for option in ("--alias", name)]
                self._engine(
                    *("network", "connect", "--ip", address, *named),
                    *(link.network, self._pause(other)),
                )
                self._running[other].add(link.network)
        self._running[pod] = {link.network for link in links.values()}

    def _as_root(self, pod: Pod, script: str, *arguments: str, stdin: bytes = b"") -> None:
        command = ["sh", "-c", script, "sh", *arguments]
        self._engine(
            "exec", "--interactive", "--user", "0:0", self._pause(pod), *command, stdin=stdin
        )

    def _to_the_end(self, pod: Pod, container: Mapping[str, Any]) -> None:
        """Run a container until it succeeds, as restartPolicy Always and OnFailure have it."""
        name = container["name"]
        for attempt in range(_ATTEMPTS):
            done = self._run(pod, container)
            printed = done.stdout.decode() + done.stderr.decode()
            self._engine("rm", "--force", self._container(pod, name))
            pod.logs[name] = printed
            if done.returncode == 0:
                return
            time.sleep(attempt)
        raise AssertionError(f"{pod}, {name}: {printed}")

    def _run(self, pod: Pod, container: Mapping[str, Any], *options: str) -> Any:
        environment = self._environment(pod, container)
        command = [expand(part, environment) for part in container.get("command", [])]
        arguments = [expand(part, environment) for part in container.get("args", [])]
        return self._engine(
            *("run", "--name", self._container(pod, container["name"]), *options),
            *(*self._engine.label, "--network", f"container:{self._pause(pod)}"),
            *self._process_namespace(pod),
            *security(pod.spec, container),
            *limits(container),
            *(part for mount in self._mounts(pod, container) for part in ("--mount", mount)),
            *(part for one in environment.items() for part in ("--env", "=".join(one))),
            *(("--entrypoint", command[0]) if command else ()),
            *(container["image"], *command[1:], *arguments),
            check="--detach" in options,
            timeout=600,
        )

    def _process_namespace(self, pod: Pod) -> list[str]:
        """Return how the container sees processes; one of its own is PID 1 in it, as in Kubernetes."""
        shared = pod.spec.get("shareProcessNamespace", False)
        return ["--pid", f"container:{self._pause(pod)}"] if shared else []

    def _mounts(self, pod: Pod, container: Mapping[str, Any]) -> list[str]:
        volumes = {volume["name"]: volume for volume in self._volumes(pod)}
        wanted = list(container.get("volumeMounts", []))
        if "kube-api-access" in volumes:
            wanted.append({"name": "kube-api-access", "mountPath": _TOKENS, "readOnly": True})
        found = []
        for mount in wanted:
            volume: Mapping[str, Any] = volumes[mount["name"]]
            path: str = mount.get("subPath", "")
            # What is not a claim's or an emptyDir's is read-only, whatever the mount says.
            read_only = mount.get("readOnly", False) or not (_claim(volume) or "emptyDir" in volume)
            if "hostPath" in volume:
                source = Path(volume["hostPath"]["path"], path)
                bind = f"type=bind,src={source},dst={mount['mountPath']}"
                found.append(f"{bind},readonly" if mount.get("readOnly", False) else bind)
                continue
            if path and _claim(volume):
                self._as_root(pod, _SUBPATH, f"{mount['name']}/{path}")
            found.append(
                _mount(self._volume(pod, volume), mount["mountPath"], path, read_only=read_only)
            )
        if not pod.resolves:
            found.append(f"type=bind,src={self._no_dns},dst=/etc/resolv.conf,readonly")
        return found

    def _environment(self, pod: Pod, container: Mapping[str, Any]) -> dict[str, str]:
        """Return a container's variables, each one's ``$(NAME)`` replaced by those before it."""
        found = self._service_variables(pod)
        for variable in container.get("env", []):
            name = variable["name"]
            if "valueFrom" not in variable:
                found[name] = expand(variable.get("value", ""), found)
                continue
            value = self._value(pod, variable["valueFrom"])
            if value is not None:
                found[name] = value
        return found

    def _value(self, pod: Pod, source: Mapping[str, Any]) -> str | None:
        if "fieldRef" in source:
            return pod.fields[source["fieldRef"]["fieldPath"]]
        wanted = source["secretKeyRef"]
        value = (self._secret(pod.namespace, wanted["name"]) or {}).get(wanted["key"])
        if value is None and not wanted.get("optional"):
            raise MissingError(f"key {wanted['key']} of Secret {wanted['name']}")
        return None if value is None else value.decode()

    def _service_variables(self, pod: Pod) -> dict[str, str]:
        """Return where the Services of the pod's namespace are: the API server always, the others where it is asked."""
        api = self.address(self._api, pod) or _UNREACHABLE
        (port,) = self._api.ports.values()
        found = {"KUBERNETES_SERVICE_HOST": api, "KUBERNETES_SERVICE_PORT": str(port)}
        if not pod.spec.get("enableServiceLinks", True):
            return found
        for service in of_kind(list(pod.cluster.objects.values()), "Service"):
            if namespace_of(service) != pod.namespace:
                continue
            name = re.sub("-", "_", service["metadata"]["name"]).upper()
            selector = {"matchLabels": service["spec"]["selector"]}
            behind = [
                one
                for one in self._wiring.pods
                if (one.cluster, one.namespace) == (pod.cluster, pod.namespace)
                and selects(selector, one.labels)
            ]
            address = next((self.address(one, pod) for one in behind if one is not pod), None)
            found[f"{name}_SERVICE_HOST"] = address or _UNREACHABLE
            found[f"{name}_SERVICE_PORT"] = str(service["spec"]["ports"][0]["port"])
        return found

    def _pause(self, pod: Pod) -> str:
        return self._engine.name(str(pod))

    def _container(self, pod: Pod, name: str) -> str:
        return self._engine.name(f"{pod}-{name}")


_NAMESPACE_FILE = {"path": "namespace", "fieldRef": {"fieldPath": "metadata.namespace"}}


def _claim(volume: Mapping[str, Any]) -> str:
    """Return the name of a volume's claim, nothing where it is of another kind."""
    claim: str = volume.get("persistentVolumeClaim", {}).get("claimName", "")
    return claim


def _mount(volume: str, target: str, subpath: str = "", *, read_only: bool = False) -> str:
    options = f"type=volume,src={volume},dst={target},volume-nocopy"
    options += f",volume-subpath={subpath}" if subpath else ""
    return f"{options},readonly" if read_only else options
