"""What the SuperLink says of this site: whether it takes the certificate, and whether it sees the SuperNode online."""

import ssl
from dataclasses import dataclass

import httpx

from certs.contexts import client_context
from certs.enrolment import SITES_PATH
from certs.errors import CertificateError, ConnectionRefusedByFleetError, first_line
from certs.identity import Identity
from certs.roles import Role
from supernode.site import Site

_TIMEOUT = httpx.Timeout(10.0, connect=5.0)


class RefusedError(ConnectionRefusedByFleetError):
    """The SuperLink answers, and does not take this site's certificate."""


@dataclass(frozen=True)
class Presence:
    """One look: Flower's status (registered, online, offline), seconds since 1970 of the last heartbeat."""

    status: str
    last_heartbeat: float | None


def presence(site: Site) -> Presence:
    """Ask the SuperLink; raise ``RefusedError`` when it refuses the site, or ``ConnectionRefusedByFleetError``."""
    identity = Identity.load(site.identity, Role.SITE)
    unanswered = f"the SuperLink at {site.superlink} cannot be reached"
    try:
        with httpx.Client(
            base_url=f"https://{site.superlink}", verify=client_context(identity), timeout=_TIMEOUT
        ) as client:
            answer = client.get(SITES_PATH)
    except (httpx.ReadError, httpx.WriteError, httpx.RemoteProtocolError) as error:
        # In TLS 1.3 the client's handshake is over before the server has looked at its certificate.
        raise RefusedError(
            f"the SuperLink at {site.superlink} ends the connection of {site.name}: {first_line(error)}"
        ) from error
    except (httpx.HTTPError, httpx.InvalidURL, ssl.SSLError, OverflowError, UnicodeError) as error:
        raise ConnectionRefusedByFleetError(f"{unanswered}: {first_line(error)}") from error
    if answer.is_client_error:
        raise RefusedError(f"the SuperLink at {site.superlink} answers {answer.status_code}")
    try:
        for entry in answer.json()["sites"]:
            # A site that was revoked and came back has a node of each time; Flower forgets none.
            if entry["name"] == site.name and entry["status"] != "unregistered":
                heartbeat = entry["last_heartbeat"]
                return Presence(str(entry["status"]), heartbeat and float(heartbeat))
    except (ValueError, KeyError, TypeError) as error:
        raise ConnectionRefusedByFleetError(
            f"{unanswered}: it answers {answer.status_code} without a list of sites"
        ) from error
    raise RefusedError(f"the SuperLink at {site.superlink} has no SuperNode of {site.name}")


def is_refused(site: Site) -> bool:
    """Whether the SuperLink refuses the site's certificate, twice in a row; one that cannot be asked does not."""
    for _ in range(2):
        try:
            presence(site)
        except RefusedError:
            continue
        except (ConnectionRefusedByFleetError, CertificateError):
            return False
        else:
            return False
    return True
