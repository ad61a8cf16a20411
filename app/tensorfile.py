"""safetensors files without torch: the ServerApp starts in a second and copies frozen tensors as bytes.

The format is 8 bytes of header length, a JSON header, and the tensors' bytes
(https://huggingface.co/docs/safetensors). A test reads and writes it against the library.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from app.payload import Tensors
from certs.errors import ModelError

# What lerobot and transformers call the file of a saved policy's weights.
WEIGHTS = "model.safetensors"
# Beside it where adapters are trained: what of the weights is not the base's.
ADAPTERS = "adapters.safetensors"
# The library's own cap: a longer header means that this is another kind of file.
_MAX_HEADER = 100_000_000
# Bytes copied at a time: large enough for the disk, small enough for memory.
_BLOCK = 1 << 22
_SIZES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "I16": 2, "I8": 1, "U8": 1}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: its type in safetensors' words, and where its bytes are."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


def entries(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """The tensors of a safetensors file and its metadata; ``ModelError`` when it is not one."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header: dict[str, Any] = json.loads(file.read(length)) if length < _MAX_HEADER else {}
        metadata = header.pop("__metadata__", {})
        found = {}
        for name, entry in header.items():
            first, last = entry["data_offsets"]
            shape = tuple(entry["shape"])
            if last - first != math.prod(shape) * _SIZES[entry["dtype"]]:
                raise ValueError(f"the size of {name} is wrong")
            found[name] = Entry(entry["dtype"], shape, 8 + length + first, last - first)
        end = max((entry.start + entry.size for entry in found.values()), default=-1)
        if end != path.stat().st_size:
            raise ValueError("it is cut short or empty")
    except FileNotFoundError:
        raise ModelError(
            f"{path.parent} holds no {path.name}: fetch or export the model again."
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{path} is not a complete safetensors file ({error}): fetch or export the model again."
        ) from error
    return found, metadata


def blocks(path: Path, entry: Entry) -> Iterator[bytes]:
    """The bytes of one tensor of a file, a few megabytes at a time."""
    left = entry.size
    with path.open("rb") as file:
        file.seek(entry.start)
        while left > 0 and (block := file.read(min(left, _BLOCK))):
            left -= len(block)
            yield block


class Lazy(Mapping[str, np.ndarray[Any, np.dtype[np.float32]]]):
    """Named tensors of a file as float32, read anew at each access: memory is one tensor's worth.

    bfloat16 and float16 widen without loss. The file stays readable when its directory is removed
    meanwhile. ``ModelError`` when a tensor is not there.
    """

    def __init__(self, path: Path, names: Iterable[str]) -> None:
        self._path = path
        found, _ = entries(path)
        self._entries = {}
        for name in names:
            if name not in found:
                raise ModelError(f"{path} has no tensor {name}: it is not the federation's model.")
            self._entries[name] = found[name]
        self._file = path.open("rb")

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor, without reading it."""
        return {name: entry.shape for name, entry in self._entries.items()}

    def __getitem__(self, name: str) -> np.ndarray[Any, np.dtype[np.float32]]:
        entry = self._entries[name]
        raw = os.pread(self._file.fileno(), entry.size, entry.start)
        if len(raw) != entry.size:
            raise ModelError(f"{self._path} was cut short while it was read: restore it.")
        return _widen(name, entry.dtype, raw).reshape(entry.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    # Mapping's own would read every tensor.
    def __contains__(self, name: object) -> bool:
        return name in self._entries


def read(path: Path, names: Iterable[str]) -> Tensors:
    """The named tensors as float32, all in memory."""
    return dict(Lazy(path, names))


def _widen(name: str, dtype: str, raw: bytes) -> np.ndarray[Any, np.dtype[np.float32]]:
    if dtype == "BF16":
        # bfloat16 is the upper half of a float32.
        return (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
    if dtype == "F16":
        return np.frombuffer(raw, "<f2").astype(np.float32)
    if dtype == "F32":
        return np.frombuffer(raw, "<f4").astype(np.float32, copy=False)
    raise ModelError(f"Tensor {name} is stored as {dtype}: a trainable tensor is F32, BF16 or F16.")


class Writer:
    """A safetensors file whose float32 tensors are put in one by one, in any order.

    Every other tensor of ``base`` but ``drop`` is copied as it is. The file is complete, and on
    disk, when :meth:`close` returns.
    """

    def __init__(
        self,
        path: Path,
        shapes: Mapping[str, tuple[int, ...]],
        *,
        base: Path | None = None,
        drop: Iterable[str] = (),
    ) -> None:
        others, metadata = entries(base) if base else ({}, {"format": "pt"})
        dropped = set(drop)
        self._base = base
        self._kept = {n: e for n, e in others.items() if n not in shapes and n not in dropped}
        self._missing = set(shapes)
        kinds = {name: ("F32", shape, 4 * math.prod(shape)) for name, shape in shapes.items()}
        kinds |= {name: (e.dtype, e.shape, e.size) for name, e in self._kept.items()}
        header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
        end = 0
        # Widest type first, as the library writes it: every tensor then starts aligned to its type.
        for name in sorted(kinds, key=lambda name: (-_SIZES[kinds[name][0]], name)):
            dtype, shape, size = kinds[name]
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
            end += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._header, self._first = header, 8 + len(text)
        self._file = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)

    def put(self, name: str, array: np.ndarray[Any, np.dtype[np.float32]]) -> None:
        """Write one of the tensors that were announced; its shape must be the announced one."""
        if list(array.shape) != self._header[name]["shape"]:
            raise ValueError(f"{name} has the shape {array.shape}, not the announced one")
        self._seek(name)
        self._file.write(np.ascontiguousarray(array, "<f4").reshape(-1).view(np.uint8).data)
        self._missing.discard(name)

    def close(self) -> None:
        """Copy the base's tensors and sync; ``ValueError`` when an announced tensor was not put."""
        with self._file:
            if self._missing:
                raise ValueError(f"{min(self._missing)} was announced and not written")
            for name, entry in self._kept.items():
                self._seek(name)
                for block in blocks(self._base, entry) if self._base else ():
                    self._file.write(block)
            self._file.flush()
            os.fsync(self._file.fileno())

    def _seek(self, name: str) -> None:
        self._file.seek(self._first + self._header[name]["data_offsets"][0])


def write(
    path: Path,
    tensors: Mapping[str, np.ndarray[Any, np.dtype[np.float32]]],
    *,
    base: Path | None = None,
    drop: Iterable[str] = (),
) -> None:
    """Write float32 ``tensors``, and every other tensor of ``base`` but ``drop`` as it is; fsynced."""
    shapes = {name: tuple(array.shape) for name, array in tensors.items()}
    writer = Writer(path, shapes, base=base, drop=drop)
    for name in tensors:
        writer.put(name, tensors[name])
    writer.close()
