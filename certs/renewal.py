"""Renewal: the next certificate for the present one, before it ends."""

import threading

from certs.identity import Identity


def renew(identity: Identity, address: str) -> Identity:
    """Renew once, now."""
    raise NotImplementedError


def follow(identity: Identity, address: str | None) -> threading.Thread:
    """Keep an identity's certificate current for as long as the process lives."""
    raise NotImplementedError
