"""What is said of a payload: which tensors its bytes are, how they are encoded, and what they belong to.

Every mismatch raises ``PayloadError``, whose ``reason`` is one of a few fixed words, fit for
counting.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from app.codec import CODECS, encoded_size
from certs.errors import ModelError

type Kind = Literal["model", "update"]
type Form = Literal["full", "delta", "held"]
type Reason = Literal[
    "missing", "schema", "codec", "kind", "size", "checksum", "names", "dtype", "shape",
    "base", "target", "frozen", "finite", "norm", "frames", "metrics",
]  # fmt: skip

# Raised when the manifest's meaning changes; a site with another version is refused by name.
SCHEMA = 2


class PayloadError(ModelError):
    """A payload is not what its manifest, or the federation's model, says it is, or cannot be made."""

    def __init__(self, reason: Reason, sentence: str) -> None:
        super().__init__(sentence)
        self.reason: Reason = reason


@dataclass(frozen=True)
class Entry:
    """One tensor of a payload, and where its encoded bytes are."""

    name: str
    shape: tuple[int, ...]
    offset: int
    size: int


@dataclass(frozen=True)
class Manifest:
    """The facts about a payload; ``check`` refuses those that contradict each other."""

    kind: Kind
    codec: str
    # Canonical hash of the trainable tensors this is a change of; null for a full model.
    base: str | None
    # Canonical hash of the trainable tensors this leads to; null for an update.
    target: str | None
    # Hash of the frozen tensors the sender has.
    frozen: str
    # Of the flat bytes.
    sha256: str
    # In order of name.
    entries: tuple[Entry, ...]
    nbytes: int

    @property
    def form(self) -> Form:
        """``full``, ``delta`` or ``held``; an update is a ``delta``."""
        if self.base is None:
            return "full"
        return "held" if self.base == self.target and not self.entries else "delta"

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor, in order of name."""
        return {entry.name: entry.shape for entry in self.entries}

    def manifest(self) -> dict[str, Any]:
        """The same in JSON's types."""
        return {
            "schema": SCHEMA,
            "kind": self.kind,
            "codec": self.codec,
            "base": self.base,
            "target": self.target,
            "frozen": self.frozen,
            "bytes": self.nbytes,
            "sha256": self.sha256,
            "tensors": [
                {**vars(entry), "shape": list(entry.shape), "dtype": "float32"}
                for entry in self.entries
            ],
        }

    def check(self) -> None:
        """Raise ``PayloadError`` at the first fact that another one contradicts."""
        if self.codec not in CODECS:
            known = ", ".join(CODECS)
            raise PayloadError("codec", f"The codec {self.codec!r} is unknown: use one of {known}.")
        if self.kind == "model":
            self._check_model()
        elif self.kind != "update":
            raise PayloadError("kind", f"The kind {self.kind!r} is unknown.")
        elif self.base is None or self.target is not None:
            raise PayloadError("base", "An update names the model it was made from, and no other.")
        end, previous = 0, ""
        for entry in self.entries:
            if entry.name <= previous:
                raise PayloadError(
                    "names", f"Tensor names are not sorted or not unique at {entry.name!r}."
                )
            self._check_place(entry, end)
            end += entry.size
            previous = entry.name
        if type(self.nbytes) is not int or self.nbytes != end:
            raise PayloadError("size", f"The tensors take {end} bytes of {self.nbytes}.")

    def _check_model(self) -> None:
        if self.target is None:
            raise PayloadError("target", "A model does not say which one it is.")
        if self.form == "full" and self.codec != "fp32":
            raise PayloadError("codec", f"A full model is exact, and not in {self.codec}.")
        if self.form == "delta" and not self.entries:
            raise PayloadError("base", "A model without tensors names two different models.")

    def _check_place(self, entry: Entry, end: int) -> None:
        name, shape = entry.name, entry.shape
        if not all(type(size) is int and size >= 0 for size in shape):
            raise PayloadError("shape", f"Tensor {name} has the shape {list(shape)}.")
        if type(entry.offset) is not int or entry.offset != end:
            raise PayloadError("size", f"Tensor {name} does not start where the one before ends.")
        size = encoded_size(shape, self.codec)
        if type(entry.size) is not int or entry.size != size:
            raise PayloadError(
                "size",
                f"Tensor {name} has {entry.size} bytes; in {self.codec} its shape takes {size}.",
            )


def read(manifest: Mapping[str, Any] | str | bytes) -> Manifest:
    """A checked manifest from JSON, or from what was JSON; ``PayloadError`` when it is none."""
    try:
        if isinstance(manifest, str | bytes):
            manifest = json.loads(manifest)
        return _read(manifest)
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise PayloadError(
            "schema", f"The manifest is malformed ({type(error).__name__}: {error})."
        ) from error


def _read(manifest: Any) -> Manifest:
    if manifest["schema"] != SCHEMA:
        raise PayloadError(
            "schema",
            f"The manifest has version {manifest['schema']}, this side speaks version {SCHEMA}: "
            "run the same release of vlafleet everywhere.",
        )
    entries = []
    for entry in manifest["tensors"]:
        name = _text(entry["name"])
        if entry["dtype"] != "float32":
            raise PayloadError("dtype", f"Tensor {name} is {entry['dtype']}: float32 is accepted.")
        entries.append(Entry(name, tuple(entry["shape"]), entry["offset"], entry["size"]))
    found = Manifest(
        kind=manifest["kind"],
        codec=manifest["codec"],
        base=None if manifest["base"] is None else _text(manifest["base"]),
        target=None if manifest["target"] is None else _text(manifest["target"]),
        frozen=_text(manifest["frozen"]),
        sha256=_text(manifest["sha256"]),
        entries=tuple(entries),
        nbytes=manifest["bytes"],
    )
    found.check()
    return found


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not a text")
    return value
