"""What an operator meets at the command line: harmless re-runs, one sentence and a code for bad input."""

import re
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from certs import errors
from certs.errors import FleetError
from tests.conftest import Vlafleet
from tests.federation import Running

ROOT = Path(__file__).parents[1]


def sentence(done: subprocess.CompletedProcess[str], code: int) -> str:
    """Assert that a command failed in one line with a code; return the line."""
    assert done.returncode == code, done
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("vlafleet: ")
    return str(lines[0])


def test_every_exit_code_is_documented() -> None:
    text = (ROOT / "docs" / "exit-codes.md").read_text()
    documented = {name: int(code) for code, name in re.findall(r"\| (\d+) \| `(\w+)` \|", text)}
    classes = [
        c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, FleetError)
    ]
    assert documented == {c.__name__: c.exit_code for c in classes if c is not FleetError}
    assert len(set(documented.values())) == len(documented)


def test_certs_from_nothing(tmp_path: Path, vlafleet: Vlafleet) -> None:
    pki = tmp_path / "pki"
    for _ in range(2):  # the second time nothing changes
        assert vlafleet("certs", "init", pki, "--federation", "lab").returncode == 0
        assert (
            vlafleet(
                "certs", "issue", pki, "superlink", "superlink", "--host", "localhost"
            ).returncode
            == 0
        )
        done = vlafleet("certs", "issue", pki, "site", "lab-1", "--out", tmp_path / "lab-1")
        assert done.returncode == 0
    assert done.stdout == f"kept: site lab-1 in {tmp_path / 'lab-1'}\n"
    assert (
        "spiffe://lab/site/lab-1"
        in vlafleet("certs", "inspect", tmp_path / "lab-1" / "tls.crt").stdout
    )
    assert "revoked 1 certificate(s)" in vlafleet("certs", "revoke", pki, "site", "lab-1").stdout
    published = pki / "superlink" / "superlink" / "crl.pem"
    assert published.read_bytes() == (pki / "ca" / "crl.pem").read_bytes()
    listed = vlafleet("certs", "list", pki).stdout
    assert re.search(r"site +lab-1 +revoked", listed)
    assert re.search(r"superlink +superlink +valid", listed)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (
            "certs issue {tmp}/none site lab-1",
            10,
            "the authority certificate {tmp}/none/ca/ca.crt cannot be read",
        ),
        ("certs issue {pki} site Lab_1", 10, "'Lab_1' is not allowed"),
        ("certs issue {pki} superlink other", 10, "the only superlink is named 'superlink'"),
        ("certs init {pki} --federation other", 10, "holds the authority of 'test'"),
        ("certs init /proc/none --federation lab", 10, "cannot be made"),
        ("certs inspect {tmp}/none.crt", 10, "cannot be read: No such file"),
        ("certs revoke {pki} site nobody", 10, "no certificate was issued to site 'nobody'"),
        (
            "superlink --identity {tmp}/none --state {tmp}/state",
            10,
            "{tmp}/none/tls.key cannot be read",
        ),
        (
            "superlink --identity {pki}/site/site-a --state {tmp}/state",
            10,
            "is the identity of site 'site-a'",
        ),
        (
            "superlink --identity {pki}/superlink/superlink --state {tmp}/s --port {used}",
            13,
            "port {used} on",
        ),
        (
            "superlink --identity {pki}/superlink/superlink --state {tmp}/s --host 192.0.2.1",
            13,
            "cannot listen on",
        ),
        (
            "superlink --identity {pki}/superlink/superlink --state /proc/none --port {free}",
            19,
            "cannot be written",
        ),
        (
            "superexec --identity {pki}/site/site-a --address localhost:1",
            10,
            "needs one of role superexec",
        ),
        (
            "superlink --identity {pki}/superlink/superlink --state {tmp}/s --port {free} --audit /proc/none/a",
            19,
            "the audit log /proc/none/a cannot be written",
        ),
        (
            "enrolment --identity {pki}/operator/admin --authority {pki}/ca --state {tmp}/s --superlink a:1",
            10,
            "needs one of role enrolment",
        ),
        (
            "enrolment --identity {pki}/enrolment/enrolment --authority {pki}/ca --state {tmp}/s --superlink a:1 "
            "--site-lifetime week",
            17,
            "'week' is not a duration: write a number and s, m, h or d",
        ),
        (
            "enrolment --identity {pki}/enrolment/enrolment --authority {tmp}/none --state {tmp}/s --superlink a:1",
            10,
            "cannot be read",
        ),
        (
            "site list --identity {pki}/operator/admin --enrolment localhost:{free}",
            15,
            "no enrolment service of this federation answers at localhost:{free}",
        ),
        (
            "site list --identity {pki}/operator/admin --enrolment nowhere",
            15,
            "check the address, and that 'vlafleet enrolment' runs",
        ),
        (
            "site list --identity {pki}/operator/admin --enrolment localhost:port",
            15,
            "the enrolment service at localhost:port did not answer",
        ),
        (
            "site list --identity {pki}/site/site-a --enrolment localhost:{free}",
            10,
            "needs one of role operator",
        ),
        (
            "site invite Lab_1 --identity {pki}/operator/admin --enrolment localhost:{free}",
            10,
            "site name 'Lab_1' is not allowed",
        ),
        (
            "site invite superlink --identity {pki}/operator/admin --enrolment localhost:{free}",
            10,
            "a site cannot be named 'superlink'",
        ),
        (
            "site invite lab-1 --valid soon --identity {pki}/operator/admin --enrolment localhost:{free}",
            17,
            "'soon' is not a duration",
        ),
        (
            "site cancel ../lab --identity {pki}/operator/admin --enrolment localhost:{free}",
            10,
            "site name '../lab' is not allowed",
        ),
        (
            "site revoke Lab --identity {pki}/operator/admin --enrolment localhost:{free}",
            10,
            "site name 'Lab' is not allowed",
        ),
        (
            "site approve {tmp}/none --identity {pki}/operator/admin --enrolment localhost:{free}",
            10,
            "the application {tmp}/none cannot be read: No such file",
        ),
        (
            "site approve {pki}/ca/ca.crt --identity {pki}/operator/admin --enrolment localhost:{free}",
            10,
            "is not an application to join (it is not JSON)",
        ),
        (
            "site approve /dev/zero --identity {pki}/operator/admin --enrolment localhost:{free}",
            10,
            "is not an application to join (it is too long)",
        ),
        (
            "site register lab-1 --key {pki}/ca/ca.crt --identity {pki}/operator/admin --superlink localhost:{free}",
            10,
            "is not an OpenSSH public key",
        ),
        (
            "run --identity {pki}/operator/admin --superlink localhost:{free}",
            15,
            "check the address",
        ),
        (
            "health --identity {pki}/superlink/superlink --address localhost:{free}",
            15,
            "does not answer",
        ),
        ("health --identity {pki}/superexec/site-b", 15, "has not answered yet"),
        (
            "demo --directory {tmp}/demo --data {tmp}/data --port {used}",
            13,
            "port {used} on 127.0.0.1 is in use",
        ),
    ],
)
def test_bad_input_is_one_sentence_and_a_code(
    arguments: str,
    code: int,
    words: str,
    pki: Path,
    tmp_path: Path,
    vlafleet: Vlafleet,
    free_port: Callable[[], int],
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        places = {
            "tmp": str(tmp_path),
            "pki": str(pki),
            "used": str(listener.getsockname()[1]),
            "free": str(free_port()),
        }
        done = vlafleet(
            *arguments.format(**places).split(), env={"PATH": "/usr/bin", "TMPDIR": str(tmp_path)}
        )
    assert words.format(**places) in sentence(done, code)
    assert not (tmp_path / "none").exists()
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("run_config", "words"),
    [
        (
            "local-stepz=2",
            "the unknown key 'local-stepz'; the keys are batch-size, codec, compile, cycle-rounds",
        ),
        ("rounds 5", "holds 'rounds'; write 'key=value key=value'"),
        (
            "rounds=five",
            "the run cannot be submitted: The provided configuration string is in an invalid format",
        ),
        ("none.toml", "the run cannot be submitted: [Errno 2] No such file or directory"),
    ],
)
@pytest.mark.parametrize("command", ["run", "demo"])
def test_wrong_run_config(
    command: str,
    run_config: str,
    words: str,
    pki: Path,
    tmp_path: Path,
    vlafleet: Vlafleet,
    free_port: Callable[[], int],
) -> None:
    """Flower passes a word without '=' over and refuses an unknown key without naming it."""
    port = free_port()
    places = {
        "run": ("--identity", pki / "operator" / "admin", "--superlink", f"localhost:{port}"),
        "demo": ("--directory", tmp_path / "demo", "--data", tmp_path / "data", "--port", port),
    }
    done = vlafleet(command, *places[command], "-c", run_config, cwd=ROOT)
    assert words in sentence(done, 17)
    assert list(tmp_path.iterdir()) == []


def test_unknown_site(superlink: Running, vlafleet: Vlafleet) -> None:
    from certs.roles import Role

    done = vlafleet(
        *("run", "--identity", superlink.identity(Role.OPERATOR, "admin")),
        *("--superlink", superlink.address, "--site", "nobody"),
    )
    assert "site 'nobody' is not registered" in sentence(done, 11)


def test_stock_flwr_command(superlink: Running, vlafleet: Vlafleet, tmp_path: Path) -> None:
    """'vlafleet flwr' is the stock command: same output, an operator's certificate."""
    import json
    import os

    from certs.roles import Role

    environment = {
        **os.environ,
        "VLAFLEET_IDENTITY": str(superlink.identity(Role.OPERATOR, "admin")),
        "VLAFLEET_SUPERLINK": superlink.address,
    }
    done = vlafleet("flwr", "supernode", "ls", "--format", "json", env=environment)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["nodes"]) == 2
    refused = vlafleet(
        "flwr",
        "ls",
        env={**environment, "VLAFLEET_IDENTITY": str(superlink.identity(Role.SITE, "site-a"))},
    )
    assert "needs one of role operator" in sentence(refused, 10)
