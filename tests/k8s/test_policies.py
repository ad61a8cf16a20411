"""The tests' reading of NetworkPolicies, held against the rules of networking.k8s.io/v1 one by one."""

from typing import Any

import pytest

from tests.k8s.policies import Network, Peer, outside, pod_peers

HERE = {"role": "db"}
DB = Peer("db", "here", HERE, {"sql": (6379, "TCP")}, "10.1.0.1")
WEB = Peer("web", "here", {"role": "web", "tier": "front"}, {}, "10.1.0.2")
ALIEN = Peer("web", "there", {"role": "web"}, {}, "10.2.0.1")
INTERNET = outside("203.0.113.9")
EVERYONE = [WEB, ALIEN, INTERNET]
NAMESPACES = {"there": {"team": "other"}}


def policy(namespace: str = "here", **spec: Any) -> dict[str, Any]:
    """A policy of a namespace on the pods of role db, unless the spec says otherwise."""
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": "p", "namespace": namespace},
        "spec": {"podSelector": {"matchLabels": HERE}, **spec},
    }


def ingress(*rules: dict[str, Any]) -> dict[str, Any]:
    return policy(policyTypes=["Ingress"], ingress=list(rules))


def reach_db(*policies: dict[str, Any], port: int = 6379, protocol: str = "TCP") -> list[str]:
    """Who of everyone reaches the port of db, as namespace/name."""
    network = Network(policies, NAMESPACES)
    return [
        f"{peer.namespace}/{peer.name}"
        for peer in EVERYONE
        if network.reaches(peer, DB, port, protocol)
    ]


W, A, OUT = "here/web", "there/web", "/203.0.113.9"


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        pytest.param({}, [W, A, OUT], id="an empty rule takes everyone"),
        pytest.param({"from": []}, [W, A, OUT], id="an empty from takes everyone"),
        pytest.param({"from": [{"podSelector": {}}]}, [W], id="podSelector is of the namespace"),
        pytest.param(
            {"from": [{"podSelector": {"matchLabels": {"role": "x"}}}]}, [], id="other labels"
        ),
        pytest.param({"from": [{"namespaceSelector": {}}]}, [W, A], id="all namespaces"),
        pytest.param(
            {"from": [{"namespaceSelector": {"matchLabels": {"team": "other"}}}]},
            [A],
            id="a namespace by its label",
        ),
        pytest.param(
            {
                "from": [
                    {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "here"}}}
                ]
            },
            [W],
            id="a namespace by its name",
        ),
        pytest.param(
            {
                "from": [
                    {
                        "namespaceSelector": {},
                        "podSelector": {"matchLabels": {"tier": "front"}},
                    }
                ]
            },
            [W],
            id="both selectors of one peer must hold",
        ),
        pytest.param(
            {
                "from": [
                    {"namespaceSelector": {"matchLabels": {"team": "other"}}},
                    {"podSelector": {"matchLabels": {"tier": "front"}}},
                ]
            },
            [W, A],
            id="two peers add up",
        ),
        pytest.param({"from": [{"ipBlock": {"cidr": "0.0.0.0/0"}}]}, [W, A, OUT], id="any address"),
        pytest.param(
            {"from": [{"ipBlock": {"cidr": "0.0.0.0/0", "except": ["10.0.0.0/8"]}}]},
            [OUT],
            id="a hole in a block",
        ),
        pytest.param({"from": [{"ipBlock": {"cidr": "::/0"}}]}, [], id="the other family"),
        pytest.param({"ports": [{"port": 6379}]}, [W, A, OUT], id="TCP unless said"),
        pytest.param({"ports": [{"port": 80}]}, [], id="another port"),
        pytest.param({"ports": [{"port": 6379, "protocol": "UDP"}]}, [], id="another protocol"),
        pytest.param({"ports": [{"protocol": "TCP"}]}, [W, A, OUT], id="every port of a protocol"),
        pytest.param({"ports": [{"port": "sql"}]}, [W, A, OUT], id="a named port of the target"),
        pytest.param({"ports": [{"port": "other"}]}, [], id="a name the target has not"),
        pytest.param({"ports": [{"port": 6000, "endPort": 7000}]}, [W, A, OUT], id="a range"),
        pytest.param({"ports": [{"port": 6380, "endPort": 7000}]}, [], id="outside the range"),
        pytest.param(
            {
                "from": [
                    {
                        "podSelector": {
                            "matchExpressions": [
                                {"key": "tier", "operator": "In", "values": ["front", "x"]},
                                {"key": "role", "operator": "Exists"},
                                {"key": "gone", "operator": "DoesNotExist"},
                                {"key": "gone", "operator": "NotIn", "values": ["y"]},
                            ]
                        }
                    }
                ]
            },
            [W],
            id="expressions that hold",
        ),
        pytest.param(
            {
                "from": [
                    {
                        "podSelector": {
                            "matchExpressions": [
                                {"key": "tier", "operator": "NotIn", "values": ["front"]}
                            ]
                        }
                    }
                ]
            },
            [],
            id="an expression that does not",
        ),
    ],
)
def test_an_ingress_rule_takes_whom_it_names(rule: dict[str, Any], expected: list[str]) -> None:
    assert reach_db(ingress(rule)) == expected


def test_without_a_policy_for_it_a_pod_is_open() -> None:
    assert reach_db() == [W, A, OUT]
    assert reach_db(policy(namespace="there", policyTypes=["Ingress"])) == [W, A, OUT]
    assert reach_db(policy(podSelector={"matchLabels": {"role": "x"}})) == [W, A, OUT]
    assert reach_db(policy(policyTypes=["Egress"])) == [W, A, OUT]


def test_a_policy_without_rules_denies_and_policies_add_up() -> None:
    deny = policy(podSelector={}, policyTypes=["Ingress", "Egress"])
    assert reach_db(deny) == []
    # Web is under the denial too: what it may be told is one thing, what it may ask another.
    allow = ingress({"from": [{"podSelector": {}}, {"ipBlock": {"cidr": "203.0.113.0/24"}}]})
    assert reach_db(deny, allow) == [OUT]
    out = policy(
        podSelector={"matchLabels": {"role": "web"}},
        policyTypes=["Egress"],
        egress=[{"to": [{"podSelector": {"matchLabels": HERE}}], "ports": [{"port": "sql"}]}],
    )
    assert reach_db(deny, allow, out) == [W, OUT]
    assert reach_db(deny, allow, out, port=80) == [OUT]


def test_egress_is_about_whom_a_pod_asks() -> None:
    network = Network([policy(egress=[{"to": [{"namespaceSelector": {}}]}])], NAMESPACES)
    assert network.reaches(DB, ALIEN, 80)
    assert not network.reaches(DB, INTERNET, 80)
    # The rule names no policyTypes: its egress makes it one of both, and it lets nobody in.
    assert not network.reaches(WEB, DB, 6379)
    assert network.isolated(DB, "Egress")
    assert not network.isolated(WEB, "Egress")


def test_an_empty_egress_without_policy_types_is_about_ingress_alone() -> None:
    network = Network([policy(egress=[])])
    assert network.reaches(DB, INTERNET, 443)
    assert not network.reaches(INTERNET, DB, 6379)


def test_a_pod_without_an_address_is_in_no_block_and_reaches_itself() -> None:
    network = Network([ingress({"from": [{"ipBlock": {"cidr": "0.0.0.0/0"}}]})])
    assert not network.reaches(Peer("w", "here"), DB, 6379)
    assert network.reaches(DB, DB, 6379)


@pytest.mark.parametrize(
    "peer",
    [{}, {"ipBlock": {"cidr": "0.0.0.0/0"}, "podSelector": {}}, {"podSelektor": {}}],
    ids=["nothing", "both", "misspelt"],
)
def test_a_peer_that_kubernetes_refuses_is_refused(peer: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="ipBlock"):
        reach_db(ingress({"from": [peer]}))


def test_the_pods_of_objects_are_peers_with_their_named_ports() -> None:
    spec = {"containers": [{"name": "c", "ports": [{"name": "grpc", "containerPort": 9092}]}]}
    template = {"metadata": {"labels": {"a": "b"}}, "spec": spec}
    job = {"kind": "Job", "metadata": {"name": "j"}, "spec": {"template": template}}
    cron = {
        "kind": "CronJob",
        "metadata": {"name": "c", "namespace": "x"},
        "spec": {"jobTemplate": {"spec": {"template": template}}},
    }
    ports = {"grpc": (9092, "TCP")}
    assert pod_peers([job, cron, {"kind": "Service", "metadata": {"name": "s"}}]) == [
        Peer("j", "vlafleet", {"a": "b"}, ports),
        Peer("c", "x", {"a": "b"}, ports),
    ]
