"""Who may ask the API server for what: tokens, Roles and what they are for. A sentence for each fault."""

import itertools
from collections.abc import Iterator
from typing import Any

from tests.k8s.object_checks import name_of
from tests.k8s.objects import Template, namespace_of, of_kind, pod_templates
from tests.k8s.pod_checks import Check, Container, option
from tests.k8s.renders import Rendered

# What a process asks of the API server: resource, verb and, where it is about a certain one, its name.
Right = tuple[str, str, str | None]
TOKEN = "/var/run/secrets/kubernetes.io/serviceaccount"
# Flower's executor, measured against the real client (tests/app).
EXECUTOR = {
    (resource, verb, None)
    for resource in ("pods", "secrets")
    for verb in ("create", "list", "delete")
}


def asks(container: Container) -> dict[str | None, set[Right]]:
    """Return what a container's command asks of the API server, by the namespace it asks in (None: its own)."""
    arguments = container.get("args", [])
    first = arguments[:2]
    secrets = [
        value.rpartition("=")[2]
        for name, value in itertools.pairwise(arguments)
        if name == "--secret"
    ]
    if first == ["certs", "cluster"]:
        return {None: _stores(secrets, create=True)}
    if first == ["certs", "store"]:
        return {None: _stores([arguments[3]], create=False)}
    if first == ["site", "enrol"]:
        own, superexec = option(container, "--secret"), option(container, "--superexec-secret")
        assert own is not None, arguments
        assert superexec is not None, arguments
        elsewhere = option(container, "--superexec-namespace")
        if elsewhere is None:
            return {None: _stores([own, superexec], create=True)}
        return {None: _stores([own], create=True), elsewhere: _stores([superexec], create=True)}
    if first == ["superexec", "--identity"] and "--kubernetes" in arguments:
        return {None: set(EXECUTOR)}
    return {}


def _stores(secrets: list[str], *, create: bool) -> set[Right]:
    made: set[Right] = {("secrets", "create", None)} if create else set()
    return made | {("secrets", verb, name) for verb in ("get", "update") for name in secrets}


def needed(pod: Template) -> dict[str, set[Right]]:
    """Return what a pod's containers ask of the API server, by namespace."""
    rights: dict[str, set[Right]] = {}
    for container in pod.all_containers:
        for namespace, asked in asks(container).items():
            rights.setdefault(namespace or pod.namespace, set()).update(asked)
    return rights


def granted(rendered: Rendered, account: str, home: str) -> dict[str, set[Right]]:
    """Return what the RoleBindings give to a service account, by namespace."""
    rights: dict[str, set[Right]] = {}
    roles = {
        (namespace_of(role), name_of(role)): role for role in of_kind(rendered.manifests, "Role")
    }
    for binding in of_kind(rendered.manifests, "RoleBinding"):
        namespace = namespace_of(binding)
        for subject in binding["subjects"]:
            if (subject["name"], subject.get("namespace")) == (account, home):
                role = roles.get((namespace, binding["roleRef"]["name"]), {"rules": []})
                rights.setdefault(namespace, set()).update(_rights(role))
    return rights


def _rights(role: dict[str, Any]) -> Iterator[Right]:
    for rule in role["rules"]:
        assert rule["apiGroups"] == [""], rule
        yield from itertools.product(
            rule["resources"], rule["verbs"], rule.get("resourceNames") or [None]
        )


def rights(rendered: Rendered) -> Iterator[str]:
    """A pod's account may do what its commands ask for, and nothing else; nothing is granted across the cluster."""
    used: dict[tuple[str, str], bool] = {}
    for pod in pod_templates(rendered.manifests):
        account = pod.spec.get("serviceAccountName", "default")
        want, have = needed(pod), granted(rendered, account, pod.namespace)
        used[pod.namespace, account] = used.get((pod.namespace, account), False) or bool(want)
        for namespace in sorted({*want, *have}):
            for right in sorted(want.get(namespace, set()) - have.get(namespace, set()), key=str):
                yield f"{pod} may not {_words(right)} in {namespace}"
            for right in sorted(have.get(namespace, set()) - want.get(namespace, set()), key=str):
                yield f"{pod} may {_words(right)} in {namespace}, and never does"
    for binding in of_kind(rendered.manifests, "RoleBinding"):
        for subject in binding["subjects"]:
            if not used.get((subject.get("namespace"), subject["name"])):
                yield f"RoleBinding {name_of(binding)}: no pod is {subject}"
    for kind in ("ClusterRole", "ClusterRoleBinding"):
        yield from (f"{kind} {name_of(found)}" for found in of_kind(rendered.manifests, kind))


def _words(right: Right) -> str:
    resource, verb, name = right
    return f"{verb} {resource} {name or ''}".strip()


def tokens(rendered: Rendered) -> Iterator[str]:
    """A token is in those containers alone that ask the API server, for an hour; no account mounts one by itself."""
    for account in of_kind(rendered.manifests, "ServiceAccount"):
        if account.get("automountServiceAccountToken", True):
            yield f"ServiceAccount {name_of(account)} mounts its token by itself"
    for pod in pod_templates(rendered.manifests):
        if pod.spec.get("automountServiceAccountToken", True):
            yield f"{pod} mounts its account's token into every container"
        volumes = {
            volume["name"]: source["serviceAccountToken"]
            for volume in pod.spec.get("volumes", [])
            for source in volume.get("projected", {}).get("sources", [])
            if "serviceAccountToken" in source
        }
        for name, token in volumes.items():
            if token.get("expirationSeconds", 3600) > 3600 or token.get("path") != "token":
                yield f"{pod}: the token of {name} is {token}"
            if "audience" in token:
                yield f"{pod}: the token of {name} is not for the API server"
        for container in pod.all_containers:
            has = {
                mount["mountPath"]
                for mount in container.get("volumeMounts", [])
                if mount["name"] in volumes
            }
            if has != ({TOKEN} if asks(container) else set()):
                yield f"{pod} {container['name']} has a token at {sorted(has)}"


CHECKS: tuple[Check, ...] = (rights, tokens)
