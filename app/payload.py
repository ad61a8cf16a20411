"""What crosses the wire: named fp32 tensors as one flat run of bytes, and the manifest beside it.

A payload is either a whole ``model`` (SuperLink to site) or a ``delta`` (site to SuperLink: trained
minus base). Only trainable tensors travel. Flower handles one large array 2.5 to 3 times faster
than hundreds of small ones, so all tensors share a single flat uint8 array.

The manifest names what the bytes are and what they belong to. Every mismatch raises
``PayloadError``, whose ``reason`` is one of a few fixed words, fit for counting.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from certs.errors import ModelError

if TYPE_CHECKING:
    from flwr.app import RecordDict

type Tensors = dict[str, npt.NDArray[np.float32]]
type Kind = Literal["model", "delta"]
type Reason = Literal[
    "missing", "schema", "codec", "kind", "size", "checksum", "names", "dtype", "shape",
    "base", "frozen", "finite", "frames", "metrics",
]  # fmt: skip

# Raised when the manifest's meaning changes; a site with another version is refused by name.
SCHEMA = 1
# Little-endian on every machine: the bytes mean the same at both ends.
DTYPE = np.dtype("<f4")

# The records of a Flower message that hold a payload.
ARRAYS = "payload"
FLAT = "flat"
MANIFEST = "manifest"


class PayloadError(ModelError):
    """A payload is not what its manifest, or the federation's model, says it is."""

    def __init__(self, reason: Reason, sentence: str) -> None:
        super().__init__(sentence)
        self.reason: Reason = reason


@dataclass(frozen=True)
class Payload:
    """Checked tensors off the wire; they are views of the received bytes, not copies."""

    kind: Kind
    # Canonical hash of the trainable tensors this is (model), or is a change to (delta).
    base: str
    # Hash of the frozen tensors the sender has.
    frozen: str
    tensors: Tensors


def canonical_hash(tensors: Mapping[str, npt.NDArray[Any]]) -> str:
    """sha256 over name, dtype, shape and little-endian bytes of each tensor, in order of name."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        array = np.ascontiguousarray(tensors[name])
        array = array.astype(array.dtype.newbyteorder("<"), copy=False)
        # The lengths fix where the header and the bytes end: two different sets of tensors can
        # never feed the digest the same stream.
        header = json.dumps([name, array.dtype.name, list(array.shape)]).encode()
        digest.update(len(header).to_bytes(8, "little"))
        digest.update(header)
        digest.update(array.nbytes.to_bytes(8, "little"))
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def pack(
    tensors: Mapping[str, npt.NDArray[np.float32]], *, kind: Kind, base: str, frozen: str
) -> tuple[dict[str, Any], bytes]:
    """The manifest of ``tensors`` (fp32), and their bytes in order of name."""
    offset, entries, parts = 0, [], []
    for name in sorted(tensors):
        array = tensors[name]
        if array.dtype != DTYPE:
            raise PayloadError("dtype", f"Tensor {name} is {array.dtype}: only float32 is sent.")
        entries.append(
            {"name": name, "shape": list(array.shape), "dtype": "float32", "offset": offset}
        )
        parts.append(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        offset += array.nbytes
    flat = b"".join(parts)
    manifest = {
        "schema": SCHEMA,
        "kind": kind,
        "codec": "fp32",
        "base": base,
        "frozen": frozen,
        "bytes": len(flat),
        "sha256": hashlib.sha256(flat).hexdigest(),
        "tensors": entries,
    }
    return manifest, flat


def unpack(manifest: Mapping[str, Any], buffer: bytes, *, kind: Kind) -> Payload:
    """The tensors in ``buffer``, without copying; ``PayloadError`` on any mismatch."""
    try:
        return _unpack(manifest, buffer, kind)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise PayloadError(
            "schema", f"The manifest is malformed ({type(error).__name__}: {error})."
        ) from error


def _unpack(manifest: Mapping[str, Any], buffer: bytes, kind: Kind) -> Payload:
    if manifest["schema"] != SCHEMA:
        raise PayloadError(
            "schema",
            f"The manifest has version {manifest['schema']}, this side speaks version {SCHEMA}: "
            "run the same release of vlafleet everywhere.",
        )
    if manifest["codec"] != "fp32":
        raise PayloadError("codec", f"The codec {manifest['codec']!r} is unknown: use 'fp32'.")
    if manifest["kind"] != kind:
        raise PayloadError("kind", f"A {kind} was expected and a {manifest['kind']} came.")
    if manifest["bytes"] != len(buffer):
        raise PayloadError(
            "size", f"The manifest announces {manifest['bytes']} bytes and {len(buffer)} came."
        )
    if hashlib.sha256(buffer).hexdigest() != manifest["sha256"]:
        raise PayloadError("checksum", "The bytes do not have the checksum of their manifest.")
    flat = np.frombuffer(buffer, np.uint8)
    tensors: Tensors = {}
    end, previous = 0, ""
    for entry in manifest["tensors"]:
        name, shape = entry["name"], tuple(entry["shape"])
        if entry["dtype"] != "float32":
            raise PayloadError("dtype", f"Tensor {name} is {entry['dtype']}: float32 is accepted.")
        if not isinstance(name, str) or name in tensors or name < previous:
            raise PayloadError("names", f"Tensor names are not sorted or not unique at {name!r}.")
        if not all(type(size) is int and size >= 0 for size in shape):
            raise PayloadError("shape", f"Tensor {name} has the shape {list(shape)}.")
        if entry["offset"] != end:
            raise PayloadError("size", f"Tensor {name} does not start where the one before ends.")
        end += math.prod(shape) * DTYPE.itemsize
        if end > len(flat):
            raise PayloadError("size", f"Tensor {name} ends beyond the bytes that came.")
        tensors[name] = flat[entry["offset"] : end].view(DTYPE).reshape(shape)
        previous = name
    if end != len(flat):
        raise PayloadError("size", f"{len(flat) - end} bytes belong to no tensor.")
    return Payload(kind, str(manifest["base"]), str(manifest["frozen"]), tensors)


def check_tensors(tensors: Mapping[str, npt.NDArray[Any]], like: Mapping[str, Any]) -> None:
    """Names and shapes of ``tensors`` equal those of ``like``; else ``PayloadError``."""
    if tensors.keys() != like.keys():
        missing = sorted(like.keys() - tensors.keys())
        foreign = sorted(tensors.keys() - like.keys())
        what = f"{missing[0]} is missing" if missing else f"{foreign[0]} is not one of them"
        raise PayloadError("names", f"The tensors are not the model's trainable tensors: {what}.")
    for name, array in tensors.items():
        if array.shape != tuple(like[name].shape):
            raise PayloadError(
                "shape",
                f"Tensor {name} has the shape {list(array.shape)}, the model's has "
                f"{list(like[name].shape)}.",
            )


def to_records(manifest: Mapping[str, Any], flat: bytes) -> RecordDict:
    """The two records of a Flower message that carry a payload."""
    from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

    # "raw" rather than Flower's npy: it spares a copy of the whole model at either end.
    array = Array("uint8", (len(flat),), "raw", flat)
    return RecordDict(
        {
            ARRAYS: ArrayRecord({FLAT: array}),
            MANIFEST: ConfigRecord({"json": json.dumps(manifest)}),
        }
    )


def from_records(records: RecordDict, *, kind: Kind) -> Payload:
    """The payload in a Flower message; ``PayloadError`` when there is none, or a damaged one."""
    try:
        text = records.config_records[MANIFEST]["json"]
        buffer = records.array_records[ARRAYS][FLAT].data
    except KeyError as error:
        raise PayloadError("missing", f"The message carries no payload (no {error}).") from error
    try:
        manifest = json.loads(str(text))
    except ValueError as error:
        raise PayloadError("schema", f"The manifest is not JSON ({error}).") from error
    return unpack(manifest, buffer, kind=kind)


def wire_bytes(records: RecordDict) -> int:
    """Bytes of tensors in a Flower message; 0 without a payload."""
    return sum(
        len(array.data) for record in records.array_records.values() for array in record.values()
    )
