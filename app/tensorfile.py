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


def read(path: Path, names: Iterable[str]) -> Tensors:
    """The named tensors as float32; bfloat16 and float16 widen without loss."""
    found, _ = entries(path)
    tensors: Tensors = {}
    with path.open("rb") as file:
        for name in names:
            if name not in found:
                raise ModelError(f"{path} has no tensor {name}: it is not the federation's model.")
            entry = found[name]
            file.seek(entry.start)
            tensors[name] = _widen(name, entry.dtype, file.read(entry.size)).reshape(entry.shape)
    return tensors


def _widen(name: str, dtype: str, raw: bytes) -> np.ndarray[Any, np.dtype[np.float32]]:
    if dtype == "BF16":
        # bfloat16 is the upper half of a float32.
        return (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
    if dtype in ("F32", "F16"):
        return np.frombuffer(raw, "<f4" if dtype == "F32" else "<f2").astype(np.float32)
    raise ModelError(f"Tensor {name} is stored as {dtype}: a trainable tensor is F32, BF16 or F16.")


def write(
    path: Path, tensors: Tensors, *, base: Path | None = None, drop: Iterable[str] = ()
) -> None:
    """Write float32 ``tensors``, and every other tensor of ``base`` but ``drop`` as it is; fsynced."""
    others, metadata = entries(base) if base else ({}, {"format": "pt"})
    kept = {n: entry for n, entry in others.items() if n not in tensors and n not in set(drop)}
    kinds = {name: ("F32", array.shape, array.nbytes) for name, array in tensors.items()}
    kinds |= {name: (entry.dtype, entry.shape, entry.size) for name, entry in kept.items()}
    # Widest type first, as the library writes it: every tensor then starts aligned to its type.
    order = sorted(kinds, key=lambda name: (-_SIZES[kinds[name][0]], name))
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name in order:
        dtype, shape, size = kinds[name]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as target:
        target.write(len(text).to_bytes(8, "little"))
        target.write(text)
        for name in order:
            for block in _bytes(name, tensors, kept, base):
                target.write(block)
        target.flush()
        os.fsync(target.fileno())


def _bytes(
    name: str, tensors: Tensors, kept: Mapping[str, Entry], base: Path | None
) -> Iterator[bytes | memoryview]:
    if name in tensors:
        array = np.ascontiguousarray(tensors[name], "<f4")
        yield array.reshape(-1).view(np.uint8).data
    elif base:
        yield from blocks(base, kept[name])
