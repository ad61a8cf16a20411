"""The alert rules, Prometheus' and Alertmanager's configuration, and the runbook, by the programs that read them."""

import re
import stat
import subprocess
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from app import run_metrics
from superlink.metrics import RUN_STATUSES
from tests.monitoring.declared import declared, labels
from tests.monitoring.processes import running, wait_ready
from tests.monitoring.tools import prometheus_tools
from tests.tools import ROOT
from vlafleet import cli

PROMETHEUS = ROOT / "docker" / "prometheus"
ALERTMANAGER = ROOT / "docker" / "alertmanager"
RUNBOOK = (ROOT / "docs" / "runbook.md").read_text()
CASES = Path(__file__).with_name("alerts_test.yml")
RULES: list[dict[str, Any]] = [
    rule
    for group in yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())["groups"]
    for rule in group["rules"]
]
NAMES = list(dict.fromkeys(rule["alert"] for rule in RULES))
SECTIONS = {
    part.split("\n", 1)[0]: part.split("\n", 1)[1]
    for part in re.split(r"^## ", RUNBOOK, flags=re.M)[1:]
}
QUERIES = re.findall(r"^ask '(.+?)'", RUNBOOK, flags=re.M)
# What every target has, whatever it is of; "site" is also the label of a site's own target.
TARGET_LABELS = {"job", "instance", "site"}
# What a label may be asked for, where that is a closed set.
VALUES: Mapping[str, Mapping[str, Sequence[str]]] = {
    "vlafleet_runs": {"status": RUN_STATUSES},
    "vlafleet_rounds_total": {"result": run_metrics.RESULTS},
    "vlafleet_round_sites": {"state": run_metrics.STATES},
    "vlafleet_site_state": {"state": run_metrics.STATES},
    "vlafleet_site_drops_total": {"reason": run_metrics.DROPS},
}
# A sample's name with its matchers, and a matcher.
SELECTOR = re.compile(r"\b(vlafleet_[a-z_]+|up|ALERTS)\b(?:\{([^}]*)\})?")
MATCHER = re.compile(r'(\w+)\s*(?:=~|!~|!=|=)\s*"([^"]*)"')


@pytest.fixture(scope="session")
def tool() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run one of the monitoring programs."""
    directory = prometheus_tools()

    def run(program: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(directory / program), *map(str, arguments)],
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )

    return run


def test_promtool_accepts_the_rules_and_the_configuration(
    tool: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    rules = tool("promtool", "check", "rules", "--lint-fatal", PROMETHEUS / "alerts.yml")
    assert rules.returncode == 0, rules.stdout + rules.stderr
    # The certificates are the container's.
    config = tool("promtool", "check", "config", "--syntax-only", PROMETHEUS / "prometheus.yml")
    assert config.returncode == 0, config.stdout + config.stderr


def test_every_alert_fires_in_its_time_and_only_then(
    tool: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    result = tool("promtool", "test", "rules", CASES)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_cases_see_each_rule_fire_and_each_alert_hold_back() -> None:
    seen: dict[str, set[str]] = {}
    quiet: set[str] = set()
    for case in yaml.safe_load(CASES.read_text())["tests"]:
        for check in case.get("alert_rule_test", []):
            if not check.get("exp_alerts"):
                quiet.add(check["alertname"])
            for alert in check.get("exp_alerts", []):
                seen.setdefault(check["alertname"], set()).add(alert["exp_labels"]["severity"])
    assert seen == {
        name: {rule["labels"]["severity"] for rule in RULES if rule["alert"] == name}
        for name in NAMES
    }
    assert quiet == set(NAMES)


@pytest.mark.parametrize(
    "expression", [*(rule["expr"] for rule in RULES), *QUERIES], ids=lambda text: text[:40]
)
def test_a_query_asks_for_what_is_declared(expression: str) -> None:
    asked = SELECTOR.findall(expression)
    assert asked
    for name, matchers in asked:
        if name in ("up", "ALERTS"):
            continue
        assert name in labels(), f"nothing tells {name}"
        for label, value in MATCHER.findall(matchers):
            assert label in labels()[name] | TARGET_LABELS, f"{name} has no label {label}"
            known = VALUES.get(name, {})
            assert label not in known or set(value.split("|")) <= set(known[label]), (name, value)
    for by in re.findall(r"\b(?:by|on) \(([^)]*)\)", expression):
        every = set().union(*(labels().get(name, set()) for name, _ in asked))
        assert set(filter(None, re.split(r"[,\s]+", by))) <= every | TARGET_LABELS | {"name"}


def test_the_runbook_s_queries_are_promql(
    tool: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    rules = [{"record": f"query_{n}", "expr": query} for n, query in enumerate(QUERIES)]
    assert len(rules) > len(NAMES)
    (tmp_path / "queries.yml").write_text(
        yaml.safe_dump({"groups": [{"name": "runbook", "rules": rules}]})
    )
    result = tool("promtool", "check", "rules", tmp_path / "queries.yml")
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    "rule", RULES, ids=lambda rule: f"{rule['alert']}-{rule['labels']['severity']}"
)
def test_an_alert_says_what_is_wrong_and_leads_to_its_section(rule: dict[str, Any]) -> None:
    assert rule["labels"] in ({"severity": "page"}, {"severity": "ticket"})
    assert rule["annotations"].keys() == {"summary", "description", "runbook_url"}
    assert rule["annotations"]["runbook_url"] == f"docs/runbook.md#{rule['alert'].lower()}"
    section = SECTIONS[rule["alert"]]
    # A page says so, and so does a ticket.
    assert f"{rule['labels']['severity'].capitalize()}:" in section.split("**What it means.**")[0]
    parts = re.findall(r"^\*\*(.+?)\.\*\*", section, flags=re.M)
    assert parts == [
        "What it means", "Likely causes", "What to look at", "What to do", "When to leave it",
    ]  # fmt: skip
    # What to look at is a command, not advice.
    assert re.search(r"^```sh\n(?:ask|vlafleet|docker|df) ", section, flags=re.M)


def test_the_runbook_has_no_section_without_an_alert_and_no_dead_link() -> None:
    assert SECTIONS.keys() == {"First look", *NAMES, "Exit codes"}
    anchors = {re.sub(r"[^\w-]", "", title.lower().replace(" ", "-")) for title in SECTIONS}
    for page, anchor in re.findall(r"\]\(([\w.-]*)(?:#([\w-]+))?\)", RUNBOOK):
        if not page:
            assert anchor in anchors, anchor
            continue
        text = (ROOT / "docs" / page).read_text()
        titles = re.findall(r"^#+ (.+)$", text, flags=re.M)
        assert not anchor or anchor in {title.lower().replace(" ", "-") for title in titles}, page


def test_the_runbook_s_commands_exist() -> None:
    import typer.main

    commands = re.findall(r"(?:^|`|/tmp )vlafleet ((?:[a-z]+ ?)+)", RUNBOOK, flags=re.M)
    assert len(commands) > len(NAMES)
    for words in commands:
        group: Any = typer.main.get_command(cli)
        for word in words.split():
            if word == "flwr":  # its own commands are Flower's
                break
            if not hasattr(group, "commands"):
                break
            assert word in group.commands, words
            group = group.commands[word]
    services = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    used = re.findall(r"docker compose (?:exec|restart|top|ps) ([a-z][a-z-]+)", RUNBOOK)
    assert set(used) <= services.keys(), set(used) - services.keys()


def test_what_a_site_shows_gets_in_and_nothing_that_speaks_for_others() -> None:
    jobs = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())["scrape_configs"]
    (site,) = (job for job in jobs if job["job_name"] == "site")
    (keep,) = site["metric_relabel_configs"]
    own = {metric.shown for metric in declared()["Site exporter"]}
    assert all(re.fullmatch(keep["regex"], name) for name in own)
    others = {
        metric.shown
        for title in ("Exporter", "SuperLink", "Enrolment service")
        for metric in declared()[title]
    } - own
    assert others
    assert not [name for name in others if re.fullmatch(keep["regex"], name)]
    # It answers for itself alone, so nothing of it may wake anybody.
    for rule in RULES:
        if rule["labels"]["severity"] == "page":
            for name, matchers in SELECTOR.findall(rule["expr"]):
                assert name not in own or 'job!="site"' in matchers, rule["alert"]


@pytest.mark.parametrize(
    ("webhook", "told"),
    [
        ("ftp://secret.example", "begins with http:// or https://"),
        ("https://secret.example/a'b", "a quote or a space"),
        ("https://secret.example/a\n  - b", "a quote or a space"),
    ],
)
def test_a_webhook_that_is_none_is_refused_and_not_repeated(
    webhook: str, told: str, tmp_path: Path
) -> None:
    result = _start(tmp_path, webhook, "--version")
    assert result.returncode == 17
    assert told in result.stderr
    assert "secret" not in result.stdout + result.stderr


@pytest.mark.parametrize("webhook", ["", "https://alerts.example/x?token=a&b={{c}}#d"])
def test_alertmanager_accepts_its_configuration(
    webhook: str, tool: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    result = _start(tmp_path, webhook, "--version")
    assert result.returncode == 0, result.stderr
    assert "token" not in result.stderr
    config = tmp_path / "alertmanager.yml"
    assert stat.S_IMODE(config.stat().st_mode) == 0o600
    checked = tool("amtool", "check-config", config)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    (receiver,) = yaml.safe_load(config.read_text())["receivers"]
    assert [hook["url"] for hook in receiver.get("webhook_configs", [])] == [webhook][
        : bool(webhook)
    ]


def test_the_cause_is_told_without_what_follows_from_it(
    free_port: Callable[[], int], tmp_path: Path
) -> None:
    address = f"127.0.0.1:{free_port()}"
    following = {
        # Each alert, and whether another one holds it back.
        ("SiteOffline", "ticket", "lab-7"): False,
        ("TrainerRestarting", "ticket", "lab-7"): True,
        ("ExporterDown", "ticket", "lab-7"): True,
        ("TrainerRestarting", "ticket", "lab-8"): False,
        ("SiteDropsOut", "ticket", "lab-8"): True,
        ("SiteDropsOut", "ticket", "lab-9"): False,
        ("RoundStalled", "page", ""): False,
        ("CheckpointOld", "page", ""): True,
        ("CertificateExpiring", "page", ""): False,
        ("CertificateExpiring", "ticket", ""): True,
        ("RenewalFailing", "ticket", ""): False,
    }
    command = [
        "sh", str(ALERTMANAGER / "start.sh"), f"--web.listen-address={address}",
        "--cluster.listen-address=", f"--storage.path={tmp_path / 'data'}",
    ]  # fmt: skip
    log = tmp_path / "alertmanager.log"
    with running(log, command, PATH=f"{prometheus_tools()}:/usr/bin:/bin", TMPDIR=str(tmp_path)):
        wait_ready(f"http://{address}/-/ready", log)
        assert _held_back(address, list(following)) == following
        # Without the SuperLink nothing is known of sites or rounds; of certificates all the same.
        down = ("ExporterDown", "page", "")
        blind = {("SiteOffline", "ticket", "lab-7"), ("SiteDropsOut", "ticket", "lab-9")}
        blind |= {("RoundStalled", "page", "")}
        found = _held_back(address, [down])
        assert found == {**following, **dict.fromkeys(blind, True), down: False}


def _start(directory: Path, webhook: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", str(ALERTMANAGER / "start.sh"), *options],
        env={
            "PATH": f"{prometheus_tools()}:/usr/bin:/bin",
            "TMPDIR": str(directory),
            "VLAFLEET_ALERT_WEBHOOK": webhook,
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def _held_back(
    address: str, alerts: list[tuple[str, str, str]]
) -> dict[tuple[str, str, str], bool]:
    """Send alerts (name, severity, site); return all that Alertmanager has, and whether another inhibits them."""
    now = datetime.now(UTC).isoformat()
    sent = []
    for name, severity, site in alerts:
        said = {"alertname": name, "severity": severity, **({"site": site} if site else {})}
        said |= {"job": "site" if site else "superlink"} if name == "ExporterDown" else {}
        sent.append({"labels": said, "startsAt": now})
    httpx.post(f"http://{address}/api/v2/alerts", json=sent, timeout=30).raise_for_status()
    found = httpx.get(f"http://{address}/api/v2/alerts", timeout=30).json()
    return {
        (
            alert["labels"]["alertname"],
            alert["labels"]["severity"],
            alert["labels"].get("site", ""),
        ): bool(alert["status"]["inhibitedBy"])
        for alert in found
    }
