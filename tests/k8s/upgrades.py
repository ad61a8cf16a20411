"""What an upgrade may change: the API server's rules for objects that are there, and ours for what must not vanish.

``helm upgrade`` sends every object of the new render (server-side apply) and deletes those that are gone; the API
server refuses a change of what it holds to be fixed, and the release is left half upgraded.
"""

from collections.abc import Iterator
from typing import Any

from tests.k8s.charts import Manifest
from tests.k8s.objects import namespace_of
from tests.k8s.pod_checks import quantity

Key = tuple[str, str, str]
# The fields of a spec that may change; all others of these kinds are fixed.
CHANGEABLE = {
    "StatefulSet": {
        *("replicas", "ordinals", "template", "updateStrategy", "minReadySeconds"),
        *("persistentVolumeClaimRetentionPolicy", "revisionHistoryLimit"),
    },
    "PersistentVolumeClaim": {"resources", "volumeAttributesClassName"},
    "Job": {
        *("parallelism", "activeDeadlineSeconds", "backoffLimit", "ttlSecondsAfterFinished"),
        *("suspend", "podFailurePolicy"),
    },
}
# Whose names are a site's or a federation's own: what lives under them, or is addressed by them, must be found again.
LASTING = {"StatefulSet", "PersistentVolumeClaim", "Service", "ServiceAccount"}
# The kinds that the files of released versions hold; ConfigMaps, of ours, change freely.
COMPARED = {*CHANGEABLE, *LASTING, "RoleBinding", "Secret"}


def key(manifest: Manifest) -> Key:
    """Return what makes an object the same one: kind, namespace, name."""
    return manifest["kind"], namespace_of(manifest), manifest["metadata"]["name"]


def refused(old: list[Manifest], new: list[Manifest]) -> Iterator[str]:
    """Yield a sentence for each object that the API server would not change from its old form to its new one."""
    for who, before, now in _pairs(old, new):
        if now is None:
            continue
        yield from (f"{who}: {wrong}" for wrong in _fixed(before, now))


def lost(old: list[Manifest], new: list[Manifest]) -> Iterator[str]:
    """Yield a sentence for whatever lives, or is known by a name, that is there before an upgrade and not after it."""
    for who, before, now in _pairs(old, new):
        kind = before["kind"]
        if now is None:
            if kind in LASTING:
                yield f"{who} is gone"
        elif kind == "PersistentVolumeClaim" and _kept(before) and not _kept(now):
            yield f"{who} would go with the release"
        elif kind == "StatefulSet":
            yield from (f"{who}: {wrong}" for wrong in _other_volumes(before["spec"], now["spec"]))
        elif kind == "Service":
            ports = {port["name"]: port["port"] for port in now["spec"]["ports"]}
            for port in before["spec"]["ports"]:
                if ports.get(port["name"]) != port["port"]:
                    yield f"{who}: port {port['name']} moves from {port['port']}"
    for name in sorted(_mounted_secrets(old) - _mounted_secrets(new)):
        yield f"Secret {name} is read by nobody any more"


def _pairs(
    old: list[Manifest], new: list[Manifest]
) -> Iterator[tuple[str, Manifest, Manifest | None]]:
    """Yield each old object, who it is, and what becomes of it."""
    after = {key(manifest): manifest for manifest in new}
    for manifest in old:
        kind, namespace, name = key(manifest)
        yield f"{kind} {namespace}/{name}", manifest, after.get(key(manifest))


def _fixed(old: Manifest, new: Manifest) -> Iterator[str]:
    """Yield what changes of an object that is fixed."""
    kind, before, now = old["kind"], old.get("spec") or {}, new.get("spec") or {}
    for field in sorted(set(before) | set(now)) if kind in CHANGEABLE else []:
        if field not in CHANGEABLE[kind] and before.get(field) != now.get(field):
            yield f"{field} is fixed, and changes from {before.get(field)} to {now.get(field)}"
    match kind:
        case "PersistentVolumeClaim":
            sizes = [one["resources"]["requests"]["storage"] for one in (before, now)]
            if quantity(sizes[1]) < quantity(sizes[0]):
                yield f"a claim cannot shrink from {sizes[0]} to {sizes[1]}"
        case "Service":
            if (before.get("clusterIP") == "None") is not (now.get("clusterIP") == "None"):
                yield "a Service cannot become headless, or cease to be"
        case "RoleBinding":
            if old["roleRef"] != new["roleRef"]:
                yield "roleRef is fixed"
        case "ConfigMap" | "Secret":
            if old.get("immutable") and {**old, "metadata": 0} != {**new, "metadata": 0}:
                yield "it is immutable"
            if old.get("type") != new.get("type"):
                yield "its type is fixed"


def _kept(claim: Manifest) -> bool:
    annotations = claim["metadata"].get("annotations", {})
    return bool(annotations.get("helm.sh/resource-policy") == "keep")


def _other_volumes(before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    """Yield the claims that a workload's pod had and has no longer, and what it now looks for in another place."""

    def places(spec: dict[str, Any]) -> dict[tuple[str, str], set[tuple[str, str]]]:
        """Return, by (container, path), what is mounted: claim and subPath."""
        pod = spec["template"]["spec"]
        claims = {
            volume["name"]: volume["persistentVolumeClaim"]["claimName"]
            for volume in pod.get("volumes", [])
            if "persistentVolumeClaim" in volume
        }
        found: dict[tuple[str, str], set[tuple[str, str]]] = {}
        for container in [*pod.get("initContainers", []), *pod["containers"]]:
            for mount in container.get("volumeMounts", []):
                if mount["name"] in claims:
                    place = (container["name"], mount["mountPath"])
                    source = (claims[mount["name"]], mount.get("subPath", ""))
                    found.setdefault(place, set()).add(source)
        return found

    later = places(now)
    for (container, path), source in places(before).items():
        if later.get((container, path)) != source:
            yield f"{container} had {sorted(source)} at {path}, and now has {later.get((container, path))}"


def _mounted_secrets(manifests: list[Manifest]) -> set[str]:
    return {
        volume["secret"]["secretName"]
        for manifest in manifests
        if manifest["kind"] == "StatefulSet"
        for volume in manifest["spec"]["template"]["spec"].get("volumes", [])
        if "secret" in volume
    }
