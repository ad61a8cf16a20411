"""A site's own directory: who it is, where its federation answers, what it trains on, and where its files lie.

``site.json`` says the first three; beside it are the identities of the SuperNode (``identity``) and the SuperExec
(``superexec``), and what the processes keep: ``sites``, ``cache``, ``logs``. Every directory is its owner's alone.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self, get_args

from certs.errors import CertificateError, ConfigError, StorageError
from certs.files import write_atomic
from certs.invitation import is_address
from certs.roles import checked_name, checked_site

# How a site's processes are run.
Mode = Literal["compose", "helm", "native"]

_DEVICE = re.compile(r"cpu|cuda(:[0-9]{1,2})?")


@dataclass(frozen=True)
class Site:
    """A site as its operator set it up.

    ``directory`` is absolute. ``superlink`` and ``enrolment`` are ``host:port``, empty while the site has applied on
    paper and is no member yet. ``dataset`` is an absolute path or ``hf:owner/name``, with an optional ``#`` part.
    Raises ``ConfigError`` for a value that cannot be.
    """

    directory: Path
    federation: str
    name: str
    superlink: str
    enrolment: str
    dataset: str
    device: str
    mode: Mode

    def __post_init__(self) -> None:
        try:
            checked_name(self.federation, "federation name")
            checked_site(self.name)
        except CertificateError as error:
            raise ConfigError(str(error)) from error
        for what, address in (("SuperLink", self.superlink), ("enrolment", self.enrolment)):
            if address and not is_address(address):
                raise ConfigError(f"the {what} address {address!r} is not host:port")
        if not self.dataset or not self.dataset.isprintable():
            raise ConfigError(f"the dataset {self.dataset!r} is neither a path nor hf:owner/name")
        if not _DEVICE.fullmatch(self.device):
            raise ConfigError(
                f"the device {self.device!r} is not known: use cpu, cuda, or cuda:N for one GPU of several"
            )
        if self.mode not in get_args(Mode):
            raise ConfigError(f"the mode {self.mode!r} is not one of {', '.join(get_args(Mode))}")

    @property
    def identity(self) -> Path:
        """The SuperNode's identity."""
        return self.directory / "identity"

    @property
    def superexec(self) -> Path:
        """The SuperExec's identity."""
        return self.directory / "superexec"

    @property
    def state(self) -> Path:
        """What the app keeps from round to round (its ``VLAFLEET_HOME/sites``): last model, moments, remainder."""
        return self.directory / "sites"

    @property
    def cache(self) -> Path:
        """What can be made again: datasets of the hub, the prefix cache."""
        return self.directory / "cache"

    @property
    def logs(self) -> Path:
        """The processes' logs."""
        return self.directory / "logs"

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Read a member's directory; raise ``ConfigError`` unless a join or an accept made it."""
        site = cls.find(directory)
        if site is None:
            raise ConfigError(
                f"{directory} is no site's directory: run 'vlafleet site join', or correct --directory"
            )
        if not site.superlink:
            raise ConfigError(
                f"the site in {directory} has applied and is no member yet: "
                "run 'vlafleet site accept' with the operator's answer"
            )
        return site

    @classmethod
    def find(cls, directory: Path) -> Self | None:
        """Read a directory, None when no site is in it; raise ``ConfigError`` when ``site.json`` is damaged."""
        path = directory / "site.json"
        names = {field.name for field in dataclasses.fields(cls)} - {"directory"}
        try:
            record = json.loads(path.read_bytes())
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
        except ValueError:
            record = None
        if (
            not isinstance(record, dict)
            or set(record) != names
            or any(not isinstance(value, str) for value in record.values())
        ):
            raise ConfigError(
                f"{path} is damaged: run 'vlafleet site join' again with a new invitation "
                "and another --directory"
            )
        return cls(directory.absolute(), **record)

    def save(self) -> None:
        """Write ``site.json`` in one step."""
        record = dataclasses.asdict(self)
        del record["directory"]
        path = self.directory / "site.json"
        write_atomic(path, json.dumps(record, indent=2).encode() + b"\n", private=True)

    def prepare(self) -> None:
        """Make the site's directories, mode 0700; raise ``StorageError`` when that fails."""
        for directory in (self.identity, self.superexec, self.state, self.cache, self.logs):
            make_private(directory)

    def require(self, federation: str, name: str) -> None:
        """Raise ``ConfigError`` unless this is the site ``name`` of ``federation``."""
        if (self.federation, self.name) != (federation, name):
            raise ConfigError(
                f"{self.directory} is the site {self.name!r} of the federation {self.federation!r}, "
                f"not {name!r} of {federation!r}: choose another --directory"
            )


def default_directory(name: str) -> Path:
    """Where the site ``name`` lies unless its operator says otherwise."""
    return Path(f"vlafleet-{name}")


def only_directory() -> Path:
    """Return the one site's directory that is here, or is this; raise ``ConfigError`` for none or several."""
    here = Path()
    found = [here] if (here / "site.json").exists() else []
    found = found or sorted(path.parent for path in here.glob("vlafleet-*/site.json"))
    if len(found) != 1:
        names = ", ".join(map(str, found)) or "none"
        raise ConfigError(
            f"there has to be one site's directory here, and there is {names}: name it with --directory"
        )
    return found[0]


def absolute_dataset(uri: str) -> str:
    """Return a dataset's URI as it reads from any directory: a relative path becomes absolute."""
    location, mark, part = uri.partition("#")
    if location and not location.startswith("hf:"):
        location = str(Path(location).expanduser().absolute())
    return location + mark + part


def make_private(directory: Path) -> None:
    """Ensure a directory that only its owner may enter; raise ``StorageError`` when that fails."""
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        directory.chmod(0o700)
    except OSError as error:
        raise StorageError(
            f"{directory} cannot be made: {error.strerror}; check its owner, or choose another --directory"
        ) from error


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold a site's directory, made where there is none; raise ``StorageError`` when another command holds it."""
    make_private(directory)
    path = directory / ".lock"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StorageError(f"{path} cannot be opened: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise StorageError(
            f"another 'vlafleet site' command is at work in {directory}: wait until it has ended"
        ) from error
    try:
        yield
    finally:
        os.close(descriptor)
