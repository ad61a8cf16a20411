"""What the SuperLink's registry knows that Flower's Grid does not say: that a node will not come back."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import httpx

from app.rounds import bounded, one_line
from app.superexec import IDENTITY, RUNTIME
from certs.contexts import client_context
from certs.enrolment import SITES_PATH
from certs.identity import Identity
from certs.roles import Role

_log = logging.getLogger("flwr")

# A round waits for the answer, and does without it.
SECONDS = 2.0


def revoked(nodes: Collection[int]) -> set[int]:
    """Return which of these nodes were unregistered, as a site is whose certificates were revoked.

    One request to the SuperLink, which ends within ``SECONDS``. None of them when it fails, and where
    no SuperExec said whom to ask; never raises.
    """
    identity, address = os.environ.get(IDENTITY), os.environ.get(RUNTIME)
    if not nodes or not identity or not address:
        return set()
    try:
        return set(nodes) & bounded(lambda: _unregistered(Path(identity), address), SECONDS)
    except Exception as error:  # noqa: BLE001 - whatever went wrong, the round's own deadlines hold
        _say(one_line(error) or type(error).__name__)
        return set()


def _unregistered(identity: Path, address: str) -> set[int]:
    context = client_context(Identity.load(identity, Role.SUPEREXEC))
    with httpx.Client(verify=context, timeout=SECONDS) as client:
        answer = client.get(f"https://{address}{SITES_PATH}")
    sites: list[dict[str, Any]] = answer.raise_for_status().json()["sites"]
    return {int(site["node_id"]) for site in sites if site["status"] == "unregistered"}


@functools.cache
def _say(reason: str) -> None:
    """Log a reason once: it is asked every second while a site is away."""
    _log.warning("the SuperLink did not say whether missing sites were revoked: %s", reason)
