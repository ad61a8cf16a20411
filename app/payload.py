"""What crosses the wire: named float32 tensors, encoded into one run of bytes, and the manifest beside it.

A ``model`` goes from the SuperLink to a site, in one of three forms: ``full`` (exact, needs nothing
at the site), ``delta`` (a change of a model that the site holds) or ``held`` (no tensors: the site
holds this very model). An ``update`` comes back: trained minus base. Only trainable tensors travel.
Flower handles one large array 2.5 to 3 times faster than hundreds of small ones, so all tensors
share a single flat uint8 array; a tensor is decoded when it is asked for, so that memory is the
encoded bytes and one tensor.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Buffer, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from app import codec as codecs
from app.codec import Array
from app.manifest import Entry, Kind, Manifest, PayloadError, read

if TYPE_CHECKING:
    from flwr.app import RecordDict

__all__ = [
    "Payload", "PayloadError", "Tensors", "apply", "canonical_hash", "check_tensors",
    "encode_feedback", "from_records", "pack", "pack_encoded", "parse", "restore", "to_records",
    "wire_bytes",
]  # fmt: skip

# May be lazy: it is read name by name, and never held whole.
type Tensors = Mapping[str, Array]
type Shapes = Mapping[str, tuple[int, ...]]

# The records of a Flower message that hold a payload.
ARRAYS = "payload"
FLAT = "flat"
MANIFEST = "manifest"

# A payload's file starts with the length of its manifest.
_LENGTH = 8


@dataclass(frozen=True)
class _File:
    """Flat bytes in a file. They are read, not mapped: mapped pages count as memory of the process."""

    path: Path
    start: int

    def read(self, offset: int, size: int) -> bytes:
        with self.path.open("rb") as file:
            data = os.pread(file.fileno(), size, self.start + offset)
        if len(data) != size:
            raise PayloadError("size", f"{self.path} is cut short: restore it, or remove it.")
        return data


@dataclass(frozen=True)
class Payload(Manifest):
    """Encoded tensors whose manifest was checked; ``pack``, ``parse``, ``restore`` or ``open`` makes one."""

    _source: Buffer | _File = field(repr=False, compare=False)

    def tensor(self, name: str) -> Array:
        """The decoded tensor; ``PayloadError`` when it is not there or its scales are damaged."""
        entry = self._named.get(name)
        if entry is None:
            raise PayloadError("names", f"The payload has no tensor {name}.")
        try:
            return codecs.decode(self._bytes(entry), entry.shape, self.codec)
        except (ValueError, OverflowError) as error:
            raise PayloadError("finite", f"Tensor {name} cannot be decoded: {error}.") from error

    def items(self) -> Iterator[tuple[str, Array]]:
        """Each tensor with its name, in order of name, decoded when its turn comes."""
        for entry in self.entries:
            yield entry.name, self.tensor(entry.name)

    def flat(self) -> bytes:
        """All encoded bytes; read from its file where the payload has one."""
        if isinstance(self._source, _File):
            return self._source.read(0, self.nbytes)
        return bytes(self._source)  # bytes themselves are not copied

    def write(self, path: Path) -> None:
        """Write manifest and bytes to a file that ``open`` reads; ``OSError`` as it comes."""
        text = json.dumps(self.manifest()).encode()
        with path.open("wb") as file:
            file.write(len(text).to_bytes(_LENGTH, "little"))
            file.write(text)
            file.write(self.flat())

    @classmethod
    def open(cls, path: Path) -> Payload:
        """A payload that reads each tensor from its file when asked for it.

        The checksum is not computed again. ``PayloadError`` when it is no payload's file.
        """
        with path.open("rb") as file:
            length = int.from_bytes(file.read(_LENGTH), "little")
            size = os.fstat(file.fileno()).st_size - _LENGTH - length
            # A length beyond the end is no length: this is another kind of file.
            text = file.read(length) if size >= 0 else b""
        return _payload(text, _File(path, _LENGTH + length), size)

    @cached_property
    def _named(self) -> dict[str, Entry]:
        return {entry.name: entry for entry in self.entries}

    def _bytes(self, entry: Entry) -> bytes | memoryview:
        if isinstance(self._source, _File):
            return self._source.read(entry.offset, entry.size)
        return memoryview(self._source)[entry.offset : entry.offset + entry.size]


def canonical_hash(tensors: Mapping[str, npt.NDArray[Any]]) -> str:
    """sha256 over name, dtype, shape and little-endian bytes of each tensor, in order of name."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        array = np.ascontiguousarray(given := tensors[name])
        array = array.astype(array.dtype.newbyteorder("<"), copy=False)
        # The lengths fix where the header and the bytes end: two different sets of tensors can
        # never feed the digest the same stream.
        header = json.dumps([name, array.dtype.name, list(given.shape)]).encode()
        digest.update(len(header).to_bytes(8, "little"))
        digest.update(header)
        digest.update(array.nbytes.to_bytes(8, "little"))
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def pack(
    tensors: Iterable[tuple[str, Array]],
    *,
    kind: Kind,
    codec: str,
    base: str | None,
    target: str | None,
    frozen: str,
) -> Payload:
    """A payload of ``tensors`` (float32, in order of name), which are consumed one at a time."""
    return pack_encoded(
        ((name, array.shape, _encode(name, array, codec)) for name, array in tensors),
        kind=kind,
        codec=codec,
        base=base,
        target=target,
        frozen=frozen,
    )


def pack_encoded(
    parts: Iterable[tuple[str, tuple[int, ...], bytes]],
    *,
    kind: Kind,
    codec: str,
    base: str | None,
    target: str | None,
    frozen: str,
) -> Payload:
    """A payload of tensors that ``app.codec.encode`` has encoded: name, shape and bytes, in order of name."""
    # BytesIO hands over what it gathered without copying; a join would hold everything twice.
    flat, digest, entries, offset = io.BytesIO(), hashlib.sha256(), [], 0
    for name, shape, data in parts:
        entries.append(Entry(name, tuple(shape), offset, len(data)))
        flat.write(data)
        digest.update(data)
        offset += len(data)
    packed = Payload(
        kind, codec, base, target, frozen, digest.hexdigest(), tuple(entries), offset,
        flat.getvalue(),
    )  # fmt: skip
    packed.check()
    return packed


def encode_feedback(delta: Array, residual: Array | None, codec: str) -> tuple[bytes, Array, Array]:
    """``delta`` encoded with error feedback: the bytes, what they decode to, and the new residual.

    What the encoding leaves out is kept and added to the next round's delta, so that nothing is lost
    for good (Seide et al. 2014; Karimireddy et al. 2019, arXiv:1901.09847). ``ValueError`` when a
    value is not finite.
    """
    wanted = delta if residual is None else delta + residual
    data = codecs.encode(wanted, codec)
    decoded = codecs.decode(data, delta.shape, codec)
    return data, decoded, wanted - decoded


def apply(base: Tensors, payload: Payload) -> Iterator[tuple[str, Array]]:
    """The model that ``payload`` leads to, tensor by tensor in order of name.

    One fp32 addition a value, and no other arithmetic: SuperLink and sites get the same bits.
    """
    if payload.form == "held":
        for name in sorted(base):
            yield name, base[name]
        return
    for name, array in payload.items():
        yield name, array if payload.form == "full" else base[name] + array


def parse(manifest: Mapping[str, Any] | str, buffer: bytes, *, kind: Kind) -> Payload:
    """The payload whose flat bytes are ``buffer``, which is not copied; ``PayloadError`` on any mismatch."""
    payload = _payload(manifest, buffer, len(buffer))
    if payload.kind != kind:
        raise PayloadError("kind", f"A {kind} was expected and a {payload.kind} came.")
    if hashlib.sha256(buffer).hexdigest() != payload.sha256:
        raise PayloadError("checksum", "The bytes do not have the checksum of their manifest.")
    return payload


def restore(manifest: Mapping[str, Any], buffer: Buffer) -> Payload:
    """The payload whose flat bytes are ``buffer``, which is not copied.

    They came from a process of this machine: the checksum is not computed again. ``PayloadError`` when they are not
    what the manifest says.
    """
    return _payload(manifest, buffer, memoryview(buffer).nbytes)


def check_tensors(found: Shapes, like: Shapes) -> None:
    """Names and shapes ``found`` equal those of ``like``; else ``PayloadError``."""
    if found.keys() != like.keys():
        missing = sorted(like.keys() - found.keys())
        foreign = sorted(found.keys() - like.keys())
        what = f"{missing[0]} is missing" if missing else f"{foreign[0]} is not one of them"
        raise PayloadError("names", f"The tensors are not the model's trainable tensors: {what}.")
    for name, shape in found.items():
        if shape != tuple(like[name]):
            raise PayloadError(
                "shape",
                f"Tensor {name} has the shape {list(shape)}, the model's has {list(like[name])}.",
            )


def to_records(payload: Payload) -> RecordDict:
    """The two records of a Flower message that carry a payload."""
    from flwr.app import Array as FlowerArray
    from flwr.app import ArrayRecord, ConfigRecord, RecordDict

    # "raw" rather than Flower's npy: it spares a copy of the whole payload at either end.
    array = FlowerArray("uint8", (payload.nbytes,), "raw", payload.flat())
    return RecordDict(
        {
            ARRAYS: ArrayRecord({FLAT: array}),
            MANIFEST: ConfigRecord({"json": json.dumps(payload.manifest())}),
        }
    )


def from_records(records: RecordDict, *, kind: Kind) -> Payload:
    """The payload in a Flower message; ``PayloadError`` when there is none, or a damaged one."""
    # By key: what is read through Flower's typed views stays in memory until the next garbage
    # collection, a whole update at a time.
    content: Any = records
    try:
        text, buffer = content[MANIFEST]["json"], content[ARRAYS][FLAT].data
    except (KeyError, TypeError, AttributeError) as error:
        raise PayloadError("missing", f"The message carries no payload (no {error}).") from error
    return parse(str(text), buffer, kind=kind)


def wire_bytes(records: RecordDict) -> int:
    """Bytes of tensors in a Flower message; 0 without a payload."""
    from flwr.app import ArrayRecord

    arrays = [record for record in records.values() if isinstance(record, ArrayRecord)]
    return sum(len(array.data) for record in arrays for array in record.values())


def _encode(name: str, array: Array, codec: str) -> bytes:
    if array.dtype != np.float32:
        raise PayloadError("dtype", f"Tensor {name} is {array.dtype}: only float32 is sent.")
    try:
        return codecs.encode(array, codec)
    except ValueError as error:
        raise PayloadError("finite", f"Tensor {name} cannot be sent: {error}.") from error


def _payload(
    manifest: Mapping[str, Any] | str | bytes, source: Buffer | _File, size: int
) -> Payload:
    found = read(manifest)
    if found.nbytes != size:
        raise PayloadError("size", f"The manifest announces {found.nbytes} bytes and {size} came.")
    return Payload(**vars(found), _source=source)
