"""The pods that rendered objects make, and what is in them: what every check of the charts walks through."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tests.k8s.charts import NAMESPACE, Manifest


@dataclass(frozen=True)
class Template:
    """A pod template of a workload (or a pod of its own): where it is, its labels, its spec."""

    kind: str
    name: str
    namespace: str
    labels: dict[str, str]
    spec: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.kind} {self.namespace}/{self.name}"

    @property
    def all_containers(self) -> list[dict[str, Any]]:
        """The containers, those that run first included."""
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]


def namespace_of(manifest: Manifest) -> str:
    """Return the namespace an object goes to: its own, or the release's."""
    namespace: str = manifest["metadata"].get("namespace", NAMESPACE)
    return namespace


def of_kind(manifests: list[Manifest], kind: str) -> list[Manifest]:
    """Return the objects of a kind."""
    return [manifest for manifest in manifests if manifest["kind"] == kind]


def pod_templates(manifests: list[Manifest]) -> Iterator[Template]:
    """Yield the pods that the objects make."""
    for manifest in manifests:
        kind, metadata = manifest["kind"], manifest["metadata"]
        match kind:
            case "Pod":
                pod = manifest
            case "StatefulSet" | "Deployment" | "DaemonSet" | "ReplicaSet" | "Job":
                pod = manifest["spec"]["template"]
            case "CronJob":
                pod = manifest["spec"]["jobTemplate"]["spec"]["template"]
            case _:
                continue
        labels = pod.get("metadata", {}).get("labels", {})
        yield Template(kind, metadata["name"], namespace_of(manifest), labels, pod["spec"])


def selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    """Tell whether a label selector (matchLabels, matchExpressions) takes these labels; an empty one takes all."""
    if unknown := set(selector) - {"matchLabels", "matchExpressions"}:
        raise ValueError(f"a label selector has no {sorted(unknown)}")
    wanted = selector.get("matchLabels") or {}
    expressions = selector.get("matchExpressions") or []
    return all(labels.get(key) == value for key, value in wanted.items()) and all(
        _holds(expression, labels) for expression in expressions
    )


def _holds(expression: dict[str, Any], labels: dict[str, str]) -> bool:
    """Tell whether one expression of a selector holds; NotIn holds where the label is missing, as in Kubernetes."""
    value = labels.get(expression["key"])
    match expression["operator"]:
        case "In":
            return value in expression["values"]
        case "NotIn":
            return value not in expression["values"]
        case "Exists":
            return value is not None
        case "DoesNotExist":
            return value is None
        case other:
            raise ValueError(f"a label selector has no operator {other}")
