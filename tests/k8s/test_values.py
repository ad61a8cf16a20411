"""Wrong values end ``helm template`` with one sentence that names the value; every sentence of the charts is met."""

import copy
import functools
import re
from typing import Any

import pytest

from tests.k8s.charts import CHARTS, ROOT, template

SUPERLINK: dict[str, Any] = {"federation": "acme"}
SITE: dict[str, Any] = {
    "site": "lab-7",
    "federation": "acme",
    "superlink": "fed.example.org:9092",
    "enrolment": "fed.example.org:9093",
    "identity": {"invitation": {"existingSecret": "invitation"}},
    "dataset": {"existingClaim": "recordings"},
}
SOUND = {"superlink": SUPERLINK, "site": SITE}
DIGEST = "sha256:" + 64 * "a"
THREE = {
    "certificates.existingSecrets": {"superlink": "a", "superexec": "b", "exporter": "c"},
    "certificates.revocationList.existingSecret": "d",
}

# What is changed in sound values (by dotted path; None takes a value out), and what the sentence says.
WRONG: list[tuple[str, dict[str, Any], str]] = [
    # What the schema says.
    ("superlink", {"fedaration": "acme"}, "'fedaration' not allowed"),
    ("superlink", {"superlink.imagee": {}}, "'imagee' not allowed"),
    ("superlink", {"superlink.service.port": "9092"}, "/superlink/service/port"),
    ("superlink", {"superlink.service.type": "Ingress"}, "/superlink/service/type"),
    ("superlink", {"logFormat": "xml"}, "/logFormat"),
    ("site", {"datasett": {}}, "'datasett' not allowed"),
    ("site", {"app.gpu.counts": 1}, "'counts' not allowed"),
    ("site", {"app.gpu.count": "one"}, "/app/gpu/count"),
    ("site", {"app.executor.type": "docker"}, "/app/executor/type"),
    ("site", {"dataset.episodes": 50}, "/dataset/episodes"),
    # What the SuperLink's chart says.
    ("superlink", {"federation": None}, "federation is missing"),
    ("superlink", {"federation": "Acme!"}, "is not allowed: use 1 to 63 lower-case"),
    ("superlink", {"fullnameOverride": "7up"}, "cannot begin the names of Services"),
    ("superlink", {"enrolment.siteLifetime": "a week"}, "is not a duration"),
    (
        "superlink",
        {"superlink.image": {"tag": "1", "digest": DIGEST}},
        'superlink.image: tag "1" and digest are both given',
    ),
    (
        "superlink",
        {"superexec.image": {"tag": "1", "digest": DIGEST}},
        'superexec.image: tag "1" and digest are both given',
    ),
    ("superlink", {"superlink.image.tag": "latest"}, "is another image tomorrow"),
    ("superlink", {"superlink.image.digest": "sha256:1"}, "is not a digest"),
    ("superlink", {"superlink.image.repository": "fleet:2"}, "ends with a tag or a digest"),
    ("superlink", {"superlink.address": "https://fed:9092"}, "is not host:port"),
    ("superlink", {"enrolment.address": "fed"}, "enrolment.address"),
    ("superlink", {"superlink.service.nodePort": 30092}, "has no port on the nodes"),
    (
        "superlink",
        {"superlink.service.externalTrafficPolicy": "Local"},
        "has no traffic from outside",
    ),
    ("superlink", {"superlink.service.loadBalancerClass": "x/y"}, "are for the type LoadBalancer"),
    ("superlink", {"networkPolicy.siteCidrs": ["everyone"]}, "is not a network"),
    ("superlink", {**THREE, "certificates.issuerRef.name": "ca"}, "are both given"),
    (
        "superlink",
        {**THREE, "certificates.existingSecrets": {"superlink": "a"}},
        "is missing: give the Secrets of superlink, superexec and exporter",
    ),
    (
        "superlink",
        {"certificates.revocationList.existingSecret": "d"},
        "own authority signs its list itself",
    ),
    (
        "superlink",
        {**THREE, "certificates.revocationList.existingSecret": None},
        "revocationList.existingSecret is missing",
    ),
    (
        "superlink",
        {"certificates.issuerRef.name": "ca"},
        "revocationList.existingSecret is missing",
    ),
    ("superlink", {**THREE, "enrolment.address": "fed:9093"}, "there is no enrolment service"),
    (
        "superlink",
        {**THREE, "serviceMonitor.enabled": True},
        "serviceMonitor.monitorSecret is missing",
    ),
    ("superlink", {"superexec.models": ["smolvla"]}, "is not owner/name of a model"),
    ("superlink", {"superexec.hub.enabled": True}, "superexec.hub.existingSecret is missing"),
    ("superlink", {"superexec.hub.existingSecret": "t"}, "but nothing uses the hub"),
    # What the site's chart says.
    ("site", {"fullnameOverride": "7up"}, "which no Service's may"),
    ("site", {"site": None}, "site is empty"),
    ("site", {"federation": None}, "federation is empty"),
    ("site", {"site": "Lab 7"}, "as a DNS label"),
    ("site", {"site": "superlink"}, "which is the SuperLink's own name"),
    ("site", {"superlink": None}, "superlink is empty"),
    ("site", {"superlink": "fed.example.org"}, 'superlink is "fed.example.org", which is not host'),
    ("site", {"enrolment": "fed:99999"}, 'enrolment is "fed:99999", which is not host:port'),
    ("site", {"enrolment": None}, "enrolment is empty"),
    ("site", {"identity.existingSecret": "a"}, "identity has two sources"),
    (
        "site",
        {"identity.existingSecret": "a", "identity.superexecSecret": "b"},
        "identity has two sources",
    ),
    ("site", {"identity": None}, "identity has no source"),
    ("site", {"identity": {"existingSecret": "a"}}, "identity has half a source"),
    ("site", {"identity": {"superexecSecret": "a"}}, "identity has half a source"),
    (
        "site",
        {"identity": {"existingSecret": "a", "superexecSecret": "a"}},
        "the app must not see the SuperNode's keys",
    ),
    ("site", {"dataset": None}, "dataset is not set"),
    ("site", {"dataset.hub": "acme/so101"}, "dataset is set 2 times"),
    ("site", {"dataset": {"hostPath": "/a", "subPath": "b"}}, "which is not set"),
    ("site", {"dataset.subPath": "../other"}, "without a leading slash"),
    ("site", {"dataset": {"hostPath": "recordings"}}, "as an absolute path"),
    ("site", {"dataset": {"hostPath": "/"}}, "as an absolute path"),
    ("site", {"dataset": {"hub": "so101"}}, 'dataset.hub is "so101", which is not owner/name'),
    ("site", {"dataset.episodes": "50"}, "give it as first:end"),
    ("site", {"dataset.episodes": "50:50"}, "in which no episode is"),
    ("site", {"app.image": {"tag": "1", "digest": DIGEST}}, "app.image has a tag and a digest"),
    (
        "site",
        {"supernode.image": {"tag": "1", "digest": DIGEST}},
        "supernode.image has a tag and a digest",
    ),
    ("site", {"app.image.tag": "latest"}, "which is another image tomorrow"),
    ("site", {"app.image.tag": DIGEST}, "a digest goes into app.image.digest"),
    ("site", {"app.image.digest": "1234"}, "which is not sha256:"),
    ("site", {"app.image.repository": "app:2"}, "without a tag"),
    ("site", {"app.models": ["smolvla"]}, 'app.models names "smolvla"'),
    ("site", {"app.gpu.resource": "gpu"}, "the name that the device plugin registers"),
    ("site", {"app.executor.type": "kubernetes"}, "app.executor.namespace is empty"),
    (
        "site",
        {"app.executor": {"type": "kubernetes", "namespace": "vlafleet"}},
        "the release's own",
    ),
    (
        "site",
        {"app.executor": {"type": "kubernetes", "namespace": "Tasks"}},
        "which no namespace can be called",
    ),
    ("site", {"app.executor.namespace": "tasks"}, 'app.executor.type is not "kubernetes"'),
    ("site", {"hub.existingSecret": "token"}, "and nothing is fetched"),
    ("site", {"metrics.podMonitor.enabled": True}, "needs metrics.enabled"),
    ("site", {"commonLabels": {"app.kubernetes.io/name": "x"}}, "which the chart sets itself"),
]


def changed(chart: str, changes: dict[str, Any]) -> dict[str, Any]:
    """Return a chart's sound values with some of them changed."""
    values = copy.deepcopy(SOUND[chart])
    for path, value in changes.items():
        *way, last = path.split(".")
        place = values
        for step in way:
            place = place.setdefault(step, {})
        if value is None:
            place.pop(last, None)
        else:
            place[last] = value
    return values


@functools.cache
def said(number: int) -> str:
    """Return what Helm says of a row of the table; an empty text where it renders."""
    chart, changes, _ = WRONG[number]
    done = template(chart, changed(chart, changes))
    return re.sub(r"(?m)^level=.*\n", "", done.stderr).strip() if done.returncode else ""


@pytest.mark.parametrize("chart", CHARTS)
def test_the_values_that_the_table_changes_are_sound(chart: str) -> None:
    done = template(chart, SOUND[chart])
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(number, id=f"{chart}-{'-'.join(changes)}-{number}")
        for number, (chart, changes, _) in enumerate(WRONG)
    ],
)
def test_a_wrong_value_ends_with_a_sentence(number: int) -> None:
    output = said(number)
    assert WRONG[number][2] in output
    # Of the template's own, one line; of the schema's, one for what is wrong.
    assert "nil pointer" not in output
    assert len(output.splitlines()) <= 4, output


@pytest.mark.parametrize("chart", CHARTS)
def test_every_sentence_of_the_chart_is_met(chart: str) -> None:
    """A condition in a template that no value meets is one that may never hold."""
    outputs = "\n".join(said(number) for number, row in enumerate(WRONG) if row[0] == chart)
    unmet = [one for one in sentences(chart) if not re.search(as_pattern(one), outputs)]
    assert unmet == []


def sentences(chart: str) -> list[str]:
    """Return what the templates of a chart fail with, formats as they are written."""
    texts = [path.read_text() for path in (ROOT / "k8s" / chart / "templates").rglob("*.*")]
    found = [
        sentence.replace('\\"', '"')
        for text in texts
        for sentence in re.findall(r'\{\{-? *fail \(?(?:printf )?"((?:[^"\\]|\\.)*)"', text)
    ]
    assert sum(
        len(re.findall(r"\bfail ", re.sub(r"\{\{/\*.*?\*/\}\}", "", text, flags=re.S)))
        for text in texts
    ) == len(found)
    return found


def as_pattern(sentence: str) -> str:
    """Return a pattern for what a format of printf makes."""
    return ".*".join(map(re.escape, re.split(r"%[sdqv]", sentence)))
