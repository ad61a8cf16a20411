"""What every test may use: identities of a federation, free ports, the command as an operator runs it."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from certs.authority import Authority
from certs.identity import Identity, authority_directory, ensure_federation, identity_directory
from certs.roles import Role
from tests.federation import Running, running_superlink

# Set before anything imports torch or Flower: tiny models are slower on two threads, and no test asks the hub.
os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", FLWR_TELEMETRY_ENABLED="0")

Vlafleet = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PKI directory with every identity of the federation ``test`` (site-a, site-b)."""
    directory = tmp_path_factory.mktemp("pki")
    assert all(
        outcome == "issued"
        for outcome, _ in ensure_federation(directory, "test", ["site-a", "site-b"])
    )
    return directory


@pytest.fixture(scope="session")
def authority(pki: Path) -> Authority:
    """The authority of ``pki``."""
    return Authority.load(authority_directory(pki))


@pytest.fixture(scope="session")
def identity(pki: Path) -> Callable[[Role, str], Identity]:
    """Return the identity of a role and name in ``pki``."""
    return lambda role, name: Identity.load(identity_directory(pki, role, name), role)


@pytest.fixture(scope="session")
def free_port() -> Callable[[], int]:
    """Return a port that nothing listens on, and nothing on the four above; each call another."""
    # SuperLink, two sites, enrolment service, exporter: what a watched federation takes.
    together = 5
    given: set[int] = set()

    def is_free(port: int) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) != 0

    def pick() -> int:
        while True:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port: int = probe.getsockname()[1]
            apart = not given & set(range(port - together, port + together + 1))
            if apart and port < 65000 and all(map(is_free, range(port, port + together))):
                given.add(port)
                return port

    return pick


@pytest.fixture(scope="session")
def superlink(
    tmp_path_factory: pytest.TempPathFactory, free_port: Callable[[], int]
) -> Iterator[Running]:
    """A running SuperLink that knows site-a and site-b, with a PKI of its own."""
    with running_superlink(tmp_path_factory.mktemp("superlink"), free_port()) as running:
        yield running


@pytest.fixture(scope="session")
def vlafleet() -> Vlafleet:
    """Run the ``vlafleet`` command and return what it printed and its exit code."""

    def run(
        *arguments: object, timeout: float = 120, **options: object
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(  # type: ignore[call-overload,no-any-return]
            [sys.executable, "-m", "vlafleet", *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            **options,
        )

    return run
