"""What the exporter asks the SuperLink, with its own certificate: who is online, and who is revoked."""

from __future__ import annotations

import logging
import ssl
import threading
import time
from typing import Any

import httpx

from certs.contexts import client_context
from certs.enrolment import CRL_PATH, SITES_PATH
from certs.errors import CertificateError, first_line
from certs.identity import Identity
from certs.revocations import Revocations

_log = logging.getLogger("vlafleet.exporter")

# It is asked for its sites at most so often, however many watch; it writes heartbeats every 20 s.
_NODES_SECONDS = 2.0
# Whoever is revoked is out within this and what the SuperLink itself takes.
_LIST_SECONDS = 1.0
_TIMEOUT_SECONDS = 3.0
# What asking raises, and what reading an answer does that is not the SuperLink's.
_SILENT = (httpx.HTTPError, httpx.InvalidURL, ssl.SSLError)
_ODD = (ValueError, KeyError, TypeError)


class SuperLink:
    """The SuperLink at ``address`` (``host:port``); safe for threads."""

    def __init__(self, identity: Identity, address: str) -> None:
        self._client = httpx.Client(
            base_url=f"https://{address}", verify=client_context(identity), timeout=_TIMEOUT_SECONDS
        )
        self._address = address
        self._lock = threading.Lock()
        self._nodes: list[dict[str, Any]] | None = None
        self._good_until = 0.0
        # What each path failed with last: an outage is said once.
        self._said: dict[str, str] = {}

    def nodes(self) -> list[dict[str, Any]] | None:
        """Return its SuperNodes (``superlink/sites.py``), seconds old at most; None when it does not say."""
        with self._lock:
            if time.monotonic() >= self._good_until:
                self._nodes = self._ask_nodes()
                self._good_until = time.monotonic() + _NODES_SECONDS
            return self._nodes

    def follow(self, revocations: Revocations) -> None:
        """Take its revocation list over, now and from a thread; while it is away the last one stays in force."""
        self.take_list(revocations)
        threading.Thread(
            target=self._follow, args=(revocations,), name="revocations", daemon=True
        ).start()

    def take_list(self, revocations: Revocations) -> None:
        """Put its revocation list in force, if that is newer."""
        try:
            revocations.take(self._get(CRL_PATH).content)
        except (*_SILENT, CertificateError) as error:
            self._say(CRL_PATH, f"who is revoked stays as it was: {first_line(error)}")
        else:
            self._say(CRL_PATH, "")

    def _follow(self, revocations: Revocations) -> None:
        while True:
            time.sleep(_LIST_SECONDS)
            try:
                self.take_list(revocations)
            except Exception:  # noqa: BLE001 - a thread that ends would leave the revoked in
                _log.exception("the revocation list is not followed")

    def _ask_nodes(self) -> list[dict[str, Any]] | None:
        try:
            nodes: list[dict[str, Any]] = self._get(SITES_PATH).json()["sites"]
        except (*_SILENT, *_ODD) as error:
            self._say(SITES_PATH, f"who is online is not known: {first_line(error)}")
            return None
        self._say(SITES_PATH, "")
        return nodes

    def _get(self, path: str) -> httpx.Response:
        return self._client.get(path).raise_for_status()

    def _say(self, path: str, sentence: str) -> None:
        if sentence and sentence != self._said.get(path):
            _log.warning("SuperLink %s: %s", self._address, sentence)
        self._said[path] = sentence
