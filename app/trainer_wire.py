"""What a ClientApp and its site's trainer say to each other, over a Unix socket that only their user may use.

A frame is four bytes of length and a JSON object. The flat bytes of a payload travel beside it as a sealed memfd
(memfd_create(2)): the other side maps them, nothing is copied, and the sender cannot change what was checked.
"""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import socket
import struct
from collections.abc import Mapping
from typing import Any

from app import payload as payloads
from app.payload import Payload
from certs.errors import RunFailedError

_LENGTH = struct.Struct(">I")
# What one system call is asked for; a socket's buffer holds less.
_PART = 1 << 20
_PEER = struct.Struct("3i")  # struct ucred of unix(7): pid, uid, gid
# The manifest of SmolVLA's 500 trainable tensors takes 80 kB, the statistics of a dataset less.
MAX_HEADER = 16 << 20
# Five times SmolVLA's trainable tensors in float32.
MAX_PAYLOAD = 2 << 30
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


def same_user(connection: socket.socket) -> bool:
    """Whether the process at the other end runs as this process's user, as the kernel says (``SO_PEERCRED``)."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
    return bool(_PEER.unpack(raw)[1] == os.getuid())


def send(
    connection: socket.socket, header: Mapping[str, Any], payload: Payload | None = None
) -> None:
    """Send one frame; ``OSError`` when the other side is gone, ``RunFailedError`` when it is too large."""
    manifest = payload.manifest() if payload else None
    try:
        text = json.dumps({**header, "payload": manifest}).encode()
    except TypeError as error:
        raise RunFailedError(
            f"A message for the trainer, or from it, cannot be said in JSON ({error})."
        ) from error
    if len(text) > MAX_HEADER:
        raise RunFailedError(
            f"A message for the trainer, or from it, has {len(text)} bytes of JSON, above {MAX_HEADER}."
        )
    if payload is None or not payload.nbytes:
        connection.sendall(_LENGTH.pack(len(text)))
    else:
        descriptor = _sealed(payload)
        try:
            # Four bytes always fit into the socket's buffer, and the descriptor goes with them.
            socket.send_fds(connection, [_LENGTH.pack(len(text))], [descriptor])
        finally:
            os.close(descriptor)
    connection.sendall(text)


def receive(connection: socket.socket) -> tuple[dict[str, Any], Payload | None]:
    """The next frame and its payload, whose checksum is not computed again.

    ``EOFError`` when the other side has closed, ``RunFailedError`` when this is no frame, ``OSError`` as it comes.
    """
    descriptors: list[int] = []
    try:
        (length,) = _LENGTH.unpack(_exactly(connection, _LENGTH.size, descriptors))
        if length > MAX_HEADER:
            raise RunFailedError(f"A frame announces {length} bytes, above {MAX_HEADER}.")
        text = _exactly(connection, length, descriptors)
        try:
            header = json.loads(text)
            manifest = header.pop("payload")
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise RunFailedError("A frame is not the JSON object it should be.") from error
        if manifest is None:
            return header, None
        return header, payloads.restore(manifest, _mapped(descriptors))
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _exactly(connection: socket.socket, size: int, descriptors: list[int]) -> bytes:
    """``size`` bytes; descriptors that come with them are added to ``descriptors``, to be closed."""
    data = bytearray()
    while len(data) < size:
        part, came, flags, _ = socket.recv_fds(connection, min(size - len(data), _PART), 1)
        descriptors += came
        if flags & socket.MSG_CTRUNC or len(descriptors) > 1:
            raise RunFailedError("A frame brings more than one file.")
        if not part:
            raise EOFError
        data += part
    return bytes(data)


def _sealed(payload: Payload) -> int:
    """A memfd with the payload's flat bytes that nobody can change any more."""
    descriptor = os.memfd_create("vlafleet-payload", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        with os.fdopen(descriptor, "wb", closefd=False) as file:
            file.write(payload.flat())
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _mapped(descriptors: list[int]) -> memoryview:
    """The bytes of the memfd that came, or none: a model that the site holds has no bytes."""
    if not descriptors:
        return memoryview(b"")
    try:
        seals = fcntl.fcntl(descriptors[0], fcntl.F_GET_SEALS)
    except OSError:  # no memfd
        seals = 0
    size = os.fstat(descriptors[0]).st_size
    if seals & _SEALS != _SEALS or not 0 < size <= MAX_PAYLOAD:
        raise RunFailedError(
            f"The payload's {size} bytes are not sealed, or are not between 1 and {MAX_PAYLOAD}."
        )
    # Private, because kernels before 6.7 refuse to share a mapping of what is sealed; it is read only, so nothing is
    # ever copied.
    return memoryview(mmap.mmap(descriptors[0], size, mmap.MAP_PRIVATE, mmap.PROT_READ))
