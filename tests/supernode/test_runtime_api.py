"""The SuperNode's own Runtime API: its site's SuperExec and nobody else; and a SuperNode that cannot start says why."""

from collections.abc import Callable
from pathlib import Path

import pytest

from certs.identity import Identity
from certs.roles import Role
from superlink.control import Control
from tests.conftest import Vlafleet
from tests.federation import Running
from tests.wire import ask, context

pytestmark = pytest.mark.federation

ACQUIRE = "/v1/runtime/acquire-task"


@pytest.fixture(scope="module")
def supernode(superlink: Running, free_port: Callable[[], int]) -> int:
    """The Runtime API port of site-a's SuperNode; the SuperLink's fixture ends it."""
    port = free_port()
    superlink.processes.start(
        "supernode-site-a",
        *("supernode", "--identity", str(superlink.identity(Role.SITE, "site-a"))),
        *("--superlink", superlink.address, "--dataset", "/nowhere", "--port", str(port)),
    )
    operator = Identity.load(superlink.identity(Role.OPERATOR, "admin"), Role.OPERATOR)
    with Control.connect(operator, superlink.address) as control:
        control.wait_online(["site-a"], 60)
    return port


def test_its_own_superexec_passes(superlink: Running, supernode: int) -> None:
    tls = context(superlink.authority, superlink.identity(Role.SUPEREXEC, "site-a"))
    answer = ask(supernode, ACQUIRE, tls)
    assert answer.status is not None
    assert not answer.refused, answer


@pytest.mark.parametrize(
    ("role", "name"),
    [
        (Role.SUPEREXEC, "site-b"),
        (Role.SUPEREXEC, "superlink"),
        (Role.SITE, "site-a"),
        (Role.SITE, "site-b"),
        (Role.OPERATOR, "admin"),
        (Role.MONITOR, "prometheus"),
        (Role.SUPERLINK, "superlink"),
    ],
)
@pytest.mark.parametrize(
    "path", [ACQUIRE, "/v1/runtime/pull-task-input", "/docs", "/openapi.json", "/health"]
)
def test_everybody_else_is_refused(
    superlink: Running, supernode: int, role: Role, name: str, path: str
) -> None:
    tls = context(superlink.authority, superlink.identity(role, name))
    method = "POST" if path.startswith("/v1/") else "GET"
    assert ask(supernode, path, tls, method=method).refused_by_guard


@pytest.mark.parametrize("path", [ACQUIRE, "/docs"])
def test_anonymous_and_plain_http_are_refused(
    superlink: Running, supernode: int, path: str
) -> None:
    assert ask(supernode, path, context(superlink.authority)).refused_by_tls
    assert ask(supernode, path, None).refused_by_tls


@pytest.mark.parametrize(
    ("command", "option", "expected"),
    [
        (("site", "register", "site-a", "--key", "{key}"), "--superlink", "superlink 'superlink'"),
        (("site", "list"), "--enrolment", "enrolment 'enrolment'"),
        (("site", "invite", "site-c"), "--enrolment", "enrolment 'enrolment'"),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, tuple) else "",
)
def test_a_site_cannot_pose_as_a_server_of_the_federation(
    superlink: Running,
    supernode: int,
    vlafleet: Vlafleet,
    command: tuple[str, ...],
    option: str,
    expected: str,
) -> None:
    """Its certificate also serves the Runtime API; a client that is led there must notice the role."""
    key = superlink.identity(Role.SITE, "site-a") / "node.pub"
    done = vlafleet(
        *(word.format(key=key) for word in command),
        *("--identity", superlink.identity(Role.OPERATOR, "admin")),
        *(option, f"localhost:{supernode}"),
    )
    assert done.returncode == 15
    assert f"the server is spiffe://test/site/site-a; expected {expected}" in done.stderr
    assert "Traceback" not in done.stderr


def test_port_in_use(superlink: Running, supernode: int, vlafleet: Vlafleet) -> None:
    done = vlafleet(
        *("supernode", "--identity", superlink.identity(Role.SITE, "site-b")),
        *("--superlink", superlink.address, "--dataset", "/nowhere", "--port", supernode),
    )
    assert done.returncode == 13
    assert done.stderr.strip().endswith(
        f"port {supernode} on 127.0.0.1 is in use by another process; stop it or choose another --port"
    )
    assert "Traceback" not in done.stderr


def test_missing_node_key(superlink: Running, tmp_path: Path, vlafleet: Vlafleet) -> None:
    import shutil

    copy = tmp_path / "id"
    shutil.copytree(superlink.identity(Role.SITE, "site-b"), copy)
    (copy / "node.key").unlink()
    done = vlafleet(
        "supernode", "--identity", copy, "--superlink", superlink.address, "--dataset", "/nowhere"
    )
    assert done.returncode == 10
    assert "the SuperNode key" in done.stderr
    assert "Traceback" not in done.stderr
