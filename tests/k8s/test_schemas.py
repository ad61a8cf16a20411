"""Every object against the API's own schemas: Kubernetes 1.27 to the newest at hand, and the custom resources'."""

import functools
import json
import unittest.mock
from typing import Any

import pytest
from kubernetes_validate import utils  # type: ignore[import-untyped]

from tests.k8s.charts import CHARTS, Manifest, ci_values
from tests.k8s.mutations import GONE, Fault
from tests.k8s.renders import rendered
from tests.k8s.test_rendered import BASES

# Their schemas come with typed models of the operators' own definitions.
CUSTOM = {"cert-manager.io/v1", "monitoring.coreos.com/v1"}
VERSIONS = [
    version
    for version in dict.fromkeys(map(utils.major_minor, utils.all_versions()))
    if tuple(map(int, version.split("."))) >= (1, 27)
]


# It reads 2 MB of definitions for each object otherwise.
_schema = functools.cache(utils.schema_contents)


def wrong(manifest: Manifest, version: str) -> str | None:
    """Return what the schema of a version of Kubernetes has against an object."""
    try:
        with unittest.mock.patch.object(utils, "schema_contents", _schema):
            utils.validate(manifest, version, strict=True)
    except utils.ValidationError as error:
        path = ".".join(map(str, error.absolute_path))
        return f"{manifest['kind']} {manifest['metadata']['name']}: {path}: {error.message}"
    return None


@functools.cache
def objects() -> list[Manifest]:
    """Return every object of every render, the same ones once."""
    found = {
        json.dumps(manifest, sort_keys=True): manifest
        for chart in CHARTS
        for path in ci_values(chart)
        for manifest in rendered(chart, path).manifests
    }
    return list(found.values())


@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_takes_every_object(version: str) -> None:
    builtin = [one for one in objects() if one["apiVersion"] not in CUSTOM]
    assert builtin
    assert [found for one in builtin if (found := wrong(one, version))] == []


def test_the_schemas_reach_from_1_27_to_the_newest() -> None:
    assert VERSIONS[0] == "1.27"
    assert VERSIONS[-1] == utils.major_minor(utils.latest_version())


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (Fault("StatefulSet/fed-superlink", "spec.template.spec.enableServiceLink", True), "Link"),
        (Fault("StatefulSet/fed-superlink", "spec.serviceNames", "x"), "serviceNames"),
        (Fault("StatefulSet/fed-superlink", "spec.selector", GONE), "selector"),
        (Fault("Service/fed-superlink", "spec.ports.0.port", "9092"), "9092"),
        (Fault("PersistentVolumeClaim/fed-superlink", "spec.accessModes", "x"), "accessModes"),
    ],
    ids=lambda value: value.path if isinstance(value, Fault) else value,
)
def test_the_schema_sees_a_misspelt_field(fault: Fault, says: str) -> None:
    (changed,) = (
        one
        for one in fault.put_into(rendered(*BASES["fed"]).manifests)
        if f"{one['kind']}/{one['metadata']['name']}" == fault.target
    )
    for version in (VERSIONS[0], VERSIONS[-1]):
        assert says in str(wrong(changed, version))


def unread(manifest: Manifest) -> tuple[Any, Any]:
    """Return a custom resource and what the operator's own model reads of it: the same, where every field is known."""
    from cloudcoil.models.cert_manager import v1 as cert_manager
    from cloudcoil.models.prometheus_operator import v1 as prometheus_operator

    models: dict[str, Any] = {
        "Certificate": cert_manager.Certificate,
        "ServiceMonitor": prometheus_operator.ServiceMonitor,
        "PodMonitor": prometheus_operator.PodMonitor,
        "PrometheusRule": prometheus_operator.PrometheusRule,
    }
    read = models[manifest["kind"]].model_validate(manifest)
    return manifest, read.model_dump(mode="json", by_alias=True, exclude_unset=True)


def test_the_operators_know_every_field_of_their_resources() -> None:
    custom = [one for one in objects() if one["apiVersion"] in CUSTOM]
    kinds = {one["kind"] for one in custom}
    assert kinds == {"Certificate", "ServiceMonitor", "PodMonitor", "PrometheusRule"}
    for one in custom:
        given, known = unread(one)
        assert known == given


@pytest.mark.parametrize(
    ("api", "kind", "spec", "misspelt"),
    [
        (
            "monitoring.coreos.com/v1",
            "ServiceMonitor",
            {"selector": {}, "endpoints": [{"port": "tls"}]},
            {"selector": {}, "endpoints": [{"port": "tls", "tlsConfi": {}}]},
        ),
        (
            "monitoring.coreos.com/v1",
            "PrometheusRule",
            {"groups": [{"name": "a", "rules": [{"alert": "A", "expr": "up"}]}]},
            {"groups": [{"name": "a", "rules": [{"alert": "A", "expr": "up", "fur": "1m"}]}]},
        ),
        (
            "cert-manager.io/v1",
            "Certificate",
            {"secretName": "s", "issuerRef": {"name": "i"}},
            {"secretName": "s", "issuerRef": {"name": "i"}, "uri": ["spiffe://a"]},
        ),
    ],
    ids=["ServiceMonitor", "PrometheusRule", "Certificate"],
)
def test_the_models_see_a_misspelt_field(
    api: str, kind: str, spec: dict[str, Any], misspelt: dict[str, Any]
) -> None:
    def read_as_given(spec: dict[str, Any]) -> bool:
        manifest = {"apiVersion": api, "kind": kind, "metadata": {"name": "x"}, "spec": spec}
        given, known = unread(manifest)
        return bool(given == known)

    assert read_as_given(spec)
    assert not read_as_given(misspelt)
