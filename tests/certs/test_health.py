"""The health probe asks a server over mutual TLS with the server's own identity."""

from collections.abc import Callable
from typing import Any

import pytest

from certs.errors import CertificateError, ConnectionRefusedByFleetError
from certs.guard import allow
from certs.health import check
from certs.identity import Identity
from certs.roles import Role
from tests.serving import echo, serving

Named = Callable[[Role, str], Identity]
SERVERS = [(Role.SUPERLINK, "superlink"), (Role.ENROLMENT, "enrolment")]


@pytest.mark.parametrize(("role", "name"), SERVERS)
def test_a_server_that_answers_is_healthy(identity: Named, role: Role, name: str) -> None:
    own = identity(role, name)
    rules: Any = {"/health": (allow(lambda peer: peer.role is role), echo)}
    with serving(own, rules=rules) as running:
        address = f"localhost:{running.port}"
        assert check(own.directory, address) == f"{role}: {address} answers"
    with pytest.raises(ConnectionRefusedByFleetError, match=f"^the {role} at {address} does not"):
        check(own.directory, address)


def test_a_server_that_refuses_is_not(identity: Named) -> None:
    own = identity(Role.ENROLMENT, "enrolment")
    with serving(own) as running:
        address = f"localhost:{running.port}"
        with pytest.raises(ConnectionRefusedByFleetError, match=f"at {address} answers 404"):
            check(own.directory, address)


@pytest.mark.parametrize(("asks", "answers"), [(SERVERS[0], SERVERS[1]), (SERVERS[1], SERVERS[0])])
def test_another_server_at_the_address_is_not_taken_for_it(
    identity: Named, asks: tuple[Role, str], answers: tuple[Role, str]
) -> None:
    with (
        serving(identity(*answers)) as running,
        pytest.raises(ConnectionRefusedByFleetError, match=f"expected {asks[0]} '{asks[1]}'"),
    ):
        check(identity(*asks).directory, f"localhost:{running.port}")


def test_who_has_no_port_is_not_probed(identity: Named) -> None:
    with pytest.raises(CertificateError, match="this command needs one of role superlink or"):
        check(identity(Role.OPERATOR, "admin").directory, "localhost:1")
