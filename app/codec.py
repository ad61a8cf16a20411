"""How one tensor becomes bytes: exact (fp32), halved (bf16), or quantised to 8 or 4 bits.

| codec | a value | scales | largest error |
|---|---|---|---|
| fp32 | 4 bytes | none | none |
| bf16 | 2 bytes | none | 2^-8 of the value |
| int8 | 1 byte | fp32, one a row of the first axis; one in all below two axes | 1/254 of the row's maximum |
| int4 | 1/2 byte | bf16, one for every 128 consecutive values | 1/14 of the group's maximum, and 1 % of that |

Scales come first, then the values, all little-endian. Quantisation is symmetric and rounds half to even: a tensor has
the same bytes on every machine, and a zero stays zero.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

type Array = npt.NDArray[np.float32]

CODECS = ("fp32", "bf16", "int8", "int4")

# Little-endian on every machine: the bytes mean the same at both ends.
_F4 = np.dtype("<f4")
_U2 = np.dtype("<u2")
# Values that share an int4 scale: scales add 1/64 byte a value, and an outlier coarsens 127 others.
_GROUP = 128
# The largest quantised values; their negatives are the smallest.
_INT8, _INT4 = 127, 7
# The largest scales whose multiples are all finite; int4's is a bfloat16. Only values within 1 %
# of float32's end (3.4e38) need more, and lose less than half a scale to it.
_MAX_SCALE8 = np.nextafter(np.finfo(np.float32).max / np.float32(_INT8), np.float32(0))
_MAX_SCALE4 = np.float32(2.0**125 * (1 + 18 / 128))
# The smallest normal float32. A smaller scale has too few bits to divide by: its row becomes zero.
_MIN_SCALE = np.finfo(np.float32).smallest_normal
# The infinity of bfloat16; the pattern below it is the largest finite value.
_BF16_INFINITY = 0x7F80

# The two values of every byte, low half first, in two's complement.
_PAIRS = np.array(
    [[(half ^ 8) - 8 for half in (byte & 15, byte >> 4)] for byte in range(256)], np.float32
)


def encode(array: Array, codec: str) -> bytes:
    """The bytes of a float32 tensor of any shape; ``ValueError`` when a value is not finite."""
    if not bool(np.isfinite(array).all()):
        raise ValueError("a value is not finite")
    flat = np.ascontiguousarray(array, _F4)
    if not flat.size:
        return b""
    match codec:
        case "fp32":
            return flat.tobytes()
        case "bf16":
            return _upper_halves(flat.reshape(-1)).tobytes()
        case "int8":
            return _encode8(flat.reshape(_rows(array.shape), -1))
        case "int4":
            return _encode4(flat.reshape(-1))
    raise ValueError(f"the codec {codec!r} is unknown")


def decode(data: bytes | memoryview, shape: tuple[int, ...], codec: str) -> Array:
    """The float32 tensor in ``data``, read-only where nothing had to be computed.

    ``ValueError`` when the size is not that of ``shape``, or a scale is not one ``encode`` writes.
    """
    if len(data) != encoded_size(shape, codec):
        raise ValueError(f"{len(data)} bytes are not a tensor of shape {list(shape)} in {codec}")
    if not len(data):
        return np.zeros(shape, _F4)
    match codec:
        case "fp32":
            values = np.frombuffer(data, _F4)
        case "bf16":
            values = _widen(np.frombuffer(data, _U2))
        case "int8":
            values = _decode8(data, _rows(shape))
        case _:
            values = _decode4(data, math.prod(shape))
    return values.reshape(shape)


def encoded_size(shape: tuple[int, ...], codec: str) -> int:
    """Bytes of a tensor of ``shape``; ``ValueError`` when the codec is unknown."""
    count = math.prod(shape)
    match codec:
        case "fp32":
            return count * _F4.itemsize
        case "bf16":
            return count * _U2.itemsize
        case "int8":
            return count + _rows(shape) * _F4.itemsize if count else 0
        case "int4":
            # Divisions rounded up: the last group and the last byte may be part full.
            return -(-count // 2) + -(-count // _GROUP) * _U2.itemsize
    raise ValueError(f"the codec {codec!r} is unknown")


def _rows(shape: tuple[int, ...]) -> int:
    """Rows that have their own int8 scale: a scale for each value of a bias would double it."""
    return shape[0] if len(shape) > 1 else 1


def _encode8(rows: Array) -> bytes:
    scales: Array = np.minimum(_largest(rows) / np.float32(_INT8), _MAX_SCALE8)
    scales[scales < _MIN_SCALE] = 0
    values: npt.NDArray[np.int8] = np.rint(rows / _divisors(scales)).astype(np.int8)
    return scales.astype(_F4).tobytes() + values.tobytes()


def _decode8(data: bytes | memoryview, rows: int) -> Array:
    scales = _checked(np.frombuffer(data, _F4, rows), _MAX_SCALE8)
    values = np.frombuffer(data, np.int8, offset=scales.nbytes).reshape(rows, -1)
    return values * scales[:, None]


def _encode4(flat: Array) -> bytes:
    groups = -(-flat.size // _GROUP)
    padded = np.zeros((groups, _GROUP), np.float32)
    padded.reshape(-1)[: flat.size] = flat
    scales = _largest(padded) / np.float32(_INT4)
    scales[scales < _MIN_SCALE] = 0
    # Up to the next bfloat16: one rounded down would push the group's maximum beyond 7.
    halves = ((scales.view(np.uint32) + 0xFFFF) >> 16).astype(_U2)
    scales = np.minimum(_widen(halves), _MAX_SCALE4)
    values: npt.NDArray[np.uint8] = (
        np.rint(padded / _divisors(scales)).astype(np.int8).reshape(-1, 2).view(np.uint8)
    )
    pairs = (values[:, 0] & 15) | (values[:, 1] << 4)
    return _upper_halves(scales).tobytes() + pairs[: -(-flat.size // 2)].tobytes()


def _decode4(data: bytes | memoryview, count: int) -> Array:
    groups = -(-count // _GROUP)
    halves = np.frombuffer(data, _U2, groups)
    scales = _checked(_widen(halves), _MAX_SCALE4)
    padded = np.zeros((groups * _GROUP // 2, 2), np.float32)
    pairs = np.frombuffer(data, np.uint8, offset=halves.nbytes)
    # "clip" spares a copy: no byte is beyond the table.
    np.take(_PAIRS, pairs, axis=0, out=padded[: len(pairs)], mode="clip")
    values = padded.reshape(groups, _GROUP)
    values *= scales[:, None]
    return values.reshape(-1)[:count]


def _largest(rows: Array) -> Array:
    """The largest magnitude in each row."""
    largest: Array = np.maximum(rows.max(axis=1), -rows.min(axis=1))
    return largest


def _divisors(scales: Array) -> Array:
    """A column to divide the rows by; a row without a scale rounds to zero whatever divides it."""
    return np.where(scales > 0, scales, np.float32(1))[:, None]


def _checked(scales: Array, largest: np.float32) -> Array:
    # A comparison with NaN is false: this refuses NaN and infinity as well.
    if not bool(((scales >= 0) & (scales <= largest)).all()):
        raise ValueError("a scale is negative, not finite, or too large")
    return scales


def _upper_halves(flat: Array) -> npt.NDArray[np.uint16]:
    """Each float32 rounded half to even to a bfloat16, which is its upper half."""
    bits = flat.view(np.uint32)
    halves = ((bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16).astype(_U2)
    # A finite value above bfloat16's largest becomes the largest.
    halves -= (halves & 0x7FFF) == _BF16_INFINITY
    return halves


def _widen(halves: npt.NDArray[np.uint16]) -> Array:
    return (halves.astype(np.uint32) << 16).view(np.float32)
