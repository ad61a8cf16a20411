"""An invitation: what a site operator needs to join, as one string to copy.

``vlafleet1.`` and base64url (RFC 4648, 5) of the fields and the first four bytes of their SHA-256. The checksum finds
what was cut or mistyped. It protects nothing: an invitation that was altered on purpose leads to a server whose
authority has another fingerprint, or names a secret that the federation does not know.
"""

import base64
import binascii
import hashlib
import re
import secrets
import struct
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Self

from certs.errors import CertificateError, InvitationError
from certs.roles import checked_name, checked_site

PREFIX = "vlafleet1."
# Seconds since 1970, the authority's SHA-256, the secret; federation, site and address follow, split by spaces.
_FIXED = struct.Struct(">Q32s16s")
_CHECKSUM_BYTES = 4
# No honest invitation comes near it: a host name has at most 253 characters.
_MAX_CHARACTERS = 1024
# A DNS name, an IPv4 address, or an IPv6 one in brackets; and a port.
_ADDRESS = re.compile(r"([A-Za-z0-9.-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\]):([0-9]{1,5})")


def new_secret() -> bytes:
    """Return a secret for one invitation: 128 bits cannot be guessed, however many are tried a second."""
    return secrets.token_bytes(16)


def is_address(text: str) -> bool:
    """Whether a text is ``host:port``: a DNS name, an IPv4 address, an IPv6 one in brackets; port 1 to 65535."""
    address = _ADDRESS.fullmatch(text)
    return address is not None and 0 < int(address[2]) < 65536


def secret_hash(secret: bytes) -> str:
    """Return what is kept of a secret: enough to recognise it, not to use it (SHA-256, hex)."""
    return hashlib.sha256(secret).hexdigest()


@dataclass(frozen=True)
class Invitation:
    """One site's way in.

    ``address`` is where the federation enrols (``host:port``), ``fingerprint`` the SHA-256 of its authority's
    certificate (DER, hex), ``expires`` whole seconds since 1970, ``secret`` 16 bytes.
    """

    federation: str
    site: str
    address: str
    fingerprint: str
    expires: int
    secret: bytes = field(repr=False)

    def __post_init__(self) -> None:
        try:
            checked_name(self.federation, "federation name")
            checked_site(self.site)
        except CertificateError as error:
            raise InvitationError(f"the invitation cannot be used: {error}") from error
        if not is_address(self.address):
            raise InvitationError(f"the invitation's address {self.address!r} is not host:port")
        if not re.fullmatch(r"[0-9a-f]{64}", self.fingerprint) or len(self.secret) != 16:
            raise InvitationError("the invitation's fingerprint or secret has the wrong length")
        # The year 9999, the last that a datetime holds.
        if not 0 < self.expires < 253402300800:
            raise InvitationError("the invitation's expiry is not a time")

    @property
    def expires_at(self) -> datetime:
        """When it stops to be worth anything."""
        return datetime.fromtimestamp(self.expires, UTC)

    def encode(self) -> str:
        """Return the string to copy."""
        data = _FIXED.pack(self.expires, bytes.fromhex(self.fingerprint), self.secret)
        data += f"{self.federation} {self.site} {self.address}".encode()
        data += hashlib.sha256(data).digest()[:_CHECKSUM_BYTES]
        return PREFIX + base64.urlsafe_b64encode(data).rstrip(b"=").decode()

    @classmethod
    def decode(cls, text: str) -> Self:
        """Read a copied string, white space aside; raise ``InvitationError`` unless it is whole."""
        text = "".join(text.split())
        if not text.startswith(PREFIX) or len(text) > _MAX_CHARACTERS:
            raise InvitationError(
                f"this is not an invitation: one begins with {PREFIX!r}; copy it again, whole"
            )
        body = text.removeprefix(PREFIX)
        damaged = InvitationError(
            "the invitation was cut or altered on its way: copy it again, whole"
        )
        try:
            data = base64.b64decode(body + "=" * (-len(body) % 4), altchars=b"-_", validate=True)
        except (binascii.Error, ValueError) as error:
            raise damaged from error
        data, checksum = data[:-_CHECKSUM_BYTES], data[-_CHECKSUM_BYTES:]
        if hashlib.sha256(data).digest()[:_CHECKSUM_BYTES] != checksum:
            raise damaged
        try:
            expires, fingerprint, secret = _FIXED.unpack_from(data)
            federation, site, address = data[_FIXED.size :].decode("ascii").split(" ")
        except (struct.error, ValueError) as error:
            raise damaged from error
        return cls(federation, site, address, fingerprint.hex(), expires, secret)
