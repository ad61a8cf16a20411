"""A container's spec as options of ``docker run``: environment, security contexts, limits."""

import re
from collections.abc import Mapping
from typing import Any

_UNITS = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "k": 10**3, "M": 10**6, "G": 10**9}
# What the tests' kubelet acts on, and what only a scheduler or a registry has to do with.
_CONTAINER = {
    *("name", "image", "command", "args", "env", "ports", "resources", "securityContext", "volumeMounts"),
    *("startupProbe", "readinessProbe", "livenessProbe", "imagePullPolicy", "terminationMessagePolicy"),
}  # fmt: skip
_POD = {
    *("containers", "initContainers", "volumes", "securityContext", "serviceAccountName", "restartPolicy"),
    *("automountServiceAccountToken", "enableServiceLinks", "shareProcessNamespace", "dnsPolicy", "dnsConfig"),
    *("terminationGracePeriodSeconds", "nodeSelector", "tolerations", "affinity", "topologySpreadConstraints"),
    *("priorityClassName", "imagePullSecrets"),
}  # fmt: skip


def require_known(pod: Mapping[str, Any]) -> None:
    """Fail for a field of a pod's spec that would be left out in silence."""
    unknown = set(pod) - _POD
    for container in [*pod.get("initContainers", []), *pod["containers"]]:
        unknown |= set(container) - _CONTAINER
    assert not unknown, f"the tests' kubelet knows no {sorted(unknown)}"


def expand(text: str, environment: Mapping[str, str]) -> str:
    """Replace ``$(NAME)`` as Kubernetes does: an unknown name stays, ``$$`` is a dollar."""

    def replaced(match: re.Match[str]) -> str:
        name = match.group(1)
        return "$" if name is None else environment.get(name, match.group(0))

    return re.sub(r"\$\$|\$\(([^)]*)\)", replaced, text)


def security(pod: Mapping[str, Any], container: Mapping[str, Any]) -> list[str]:
    """Return Docker's options for the security contexts; the container's own win over its pod's."""
    outer = pod.get("securityContext", {})
    context = {**outer, **container.get("securityContext", {})}
    options = []
    if "runAsUser" in context:
        options += ["--user", f"{context['runAsUser']}:{context.get('runAsGroup', 0)}"]
    groups = [*outer.get("supplementalGroups", []), *([outer["fsGroup"]] if "fsGroup" in outer else [])]  # fmt: skip
    options += [option for group in groups for option in ("--group-add", str(group))]
    if context.get("readOnlyRootFilesystem"):
        options += ["--read-only"]
    for capability in context.get("capabilities", {}).get("drop", []):
        options += ["--cap-drop", capability]
    for capability in context.get("capabilities", {}).get("add", []):
        options += ["--cap-add", capability]
    if not context.get("allowPrivilegeEscalation", True):
        options += ["--security-opt", "no-new-privileges"]
    if context.get("privileged"):
        options += ["--privileged"]
    # The container runtime's default profile is Docker's own; without a word Kubernetes confines nothing.
    if context.get("seccompProfile", {}).get("type") != "RuntimeDefault":
        options += ["--security-opt", "seccomp=unconfined"]
    return options


def limits(container: Mapping[str, Any]) -> list[str]:
    """Return Docker's options for the resources' limits; requests are a scheduler's."""
    wanted = container.get("resources", {}).get("limits", {})
    options = ["--memory", str(in_bytes(wanted["memory"]))] if "memory" in wanted else []
    # Without swap, as a node of Kubernetes has none.
    options += ["--memory-swap", options[1]] if options else []
    if "cpu" in wanted:
        cpu = str(wanted["cpu"])
        cores = int(cpu[:-1]) / 1000 if cpu.endswith("m") else float(cpu)
        options += ["--cpus", f"{cores:.3f}"]
    return options


def in_bytes(quantity: str | int) -> int:
    """Return a quantity of Kubernetes (``512Mi``) in bytes."""
    text = str(quantity)
    for unit, factor in _UNITS.items():
        if text.endswith(unit):
            return int(float(text.removesuffix(unit)) * factor)
    return int(text)
