"""Handing the authority's revocation list to the SuperLink."""

import http.client
import json
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509

from certs.authority import Authority
from certs.contexts import client_context
from certs.enrolment import CRL_PATH
from certs.files import read
from certs.identity import Identity
from certs.roles import SUPERLINK_NAME, Role
from superlink.refused import Refused

# The SuperLink writes one file; one that takes longer does not work.
_TIMEOUT_SECONDS = 5.0
# A list is good for 30 days (CRL_LIFETIME). Signed daily, a SuperLink that misses some never holds a stale one.
_SIGN_EVERY = timedelta(days=1)


class Publisher:
    """Keeps the SuperLink at ``host:port`` in possession of the list that lies in the authority's directory."""

    def __init__(self, authority: Path, identity: Identity, superlink: str) -> None:
        self._authority = authority
        self._address = superlink
        server = (identity.peer.federation, Role.SUPERLINK, SUPERLINK_NAME)
        self._context = client_context(identity, server)
        self._lock = threading.Lock()
        self._taken: bytes | None = None

    def publish(self) -> None:
        """Send the list unless the SuperLink has it; raise ``Refused`` when it does not take it."""
        with self._lock:
            crl = read(Authority.load(self._authority).crl, "revocation list")
            if crl != self._taken:
                self._send(crl)
                self._taken = crl

    def sign_again(self) -> None:
        """Sign the list anew when it is a day old."""
        authority = Authority.load(self._authority)
        crl = x509.load_pem_x509_crl(read(authority.crl, "revocation list"))
        if datetime.now(UTC) - crl.last_update_utc >= _SIGN_EVERY:
            authority.renew_crl()

    def _send(self, crl: bytes) -> None:
        host, _, port = self._address.rpartition(":")
        try:
            connection = http.client.HTTPSConnection(
                host.strip("[]"), int(port), timeout=_TIMEOUT_SECONDS, context=self._context
            )
            try:
                connection.request("PUT", CRL_PATH, body=crl)
                response = connection.getresponse()
                status, body = response.status, response.read(1024)
            finally:
                connection.close()
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise Refused(
                "unavailable",
                f"the SuperLink at {self._address} does not take the revocation list: {error}",
            ) from error
        if status != http.client.NO_CONTENT:
            raise Refused(
                "unavailable",
                f"the SuperLink at {self._address} refuses the revocation list ({status}): "
                f"{_detail(body)}",
            )


def _detail(body: bytes) -> str:
    try:
        return str(json.loads(body)["detail"])
    except (ValueError, KeyError, TypeError):
        return "it does not say why"
