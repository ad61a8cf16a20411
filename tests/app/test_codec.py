"""A tensor comes back within its codec's error, and bytes no codec writes are refused."""

import math
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from app import codec
from app.codec import CODECS, Array, decode, encode, encoded_size

shapes = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=12)
# Every finite value there is, and the magnitudes updates really have.
values = st.one_of(
    st.floats(width=32, allow_nan=False, allow_infinity=False), st.floats(-0.125, 0.125, width=32)
)
tensors = hnp.arrays(np.float32, shapes, elements=values)
# More than one group of 128, the last one part full.
long_tensors = hnp.arrays(
    np.float32, st.integers(1, 300).map(lambda count: (count,)), elements=values
)
quantised = st.sampled_from(("int8", "int4"))


def through(array: Array, name: str) -> Array:
    data = encode(array, name)
    assert len(data) == encoded_size(array.shape, name)
    back = decode(data, array.shape, name)
    assert back.dtype == np.float32
    assert back.shape == array.shape
    return back


def largest(rows: Any) -> Any:
    """The largest magnitude in each row, as float64."""
    return np.abs(rows.astype(np.float64)).max(axis=1)


def rows_of(array: Array) -> Array:
    return array.reshape(array.shape[0] if array.ndim > 1 else 1, -1)


def groups_of(array: Array) -> Array:
    flat = array.reshape(-1)
    return np.pad(flat, (0, -flat.size % 128)).reshape(-1, 128)


@given(tensors)
def test_fp32_is_exact(array: Array) -> None:
    assert through(array, "fp32").tobytes() == array.tobytes()


@given(tensors)
def test_bf16_keeps_eight_bits_of_each_value(array: Array) -> None:
    error = np.abs(through(array, "bf16").astype(np.float64) - array)
    # The smallest subnormal bfloat16 is 2^-133; half of it may be lost there.
    assert (error <= np.maximum(np.abs(array.astype(np.float64)) * 2.0**-8, 2.0**-134)).all()


@given(tensors)
def test_int8_errs_by_half_a_scale_of_its_row(array: Array) -> None:
    back = through(array, "int8")
    if not array.size:
        return
    rows = rows_of(array)
    error = largest(rows_of(back).astype(np.float64) - rows)
    # A row whose scale would be no normal number becomes zero; 1e-6: the scale's own rounding.
    zeroed = largest(rows) < 127 * 1.1755e-38
    assert (error <= np.where(zeroed, largest(rows), largest(rows) / 254 * (1 + 1e-6))).all()


@given(st.one_of(tensors, long_tensors))
def test_int4_errs_by_half_a_scale_of_its_group(array: Array) -> None:
    back = through(array, "int4")
    if not array.size:
        return
    groups = groups_of(array)
    error = largest(groups_of(back).astype(np.float64) - groups)
    zeroed = largest(groups) < 7 * 1.1755e-38
    # A scale is rounded up to a bfloat16, by less than 2^-7 of it.
    assert (error <= np.where(zeroed, largest(groups), largest(groups) / 14 * (1 + 2**-7))).all()


@given(st.one_of(tensors, long_tensors), st.sampled_from(CODECS))
def test_what_was_encoded_once_does_not_change_again(array: Array, name: str) -> None:
    once = through(array, name)
    assert np.isfinite(once).all()
    assert not once[array == 0].any()
    if name in {"fp32", "bf16"}:
        assert np.array_equal(through(once, name), once)


@given(tensors, st.sampled_from(CODECS))
def test_strides_do_not_matter(array: Array, name: str) -> None:
    assert encode(np.asfortranarray(array), name) == encode(array, name)
    turned = array.T
    assert encode(turned, name) == encode(np.ascontiguousarray(turned).reshape(turned.shape), name)


def test_the_bytes_are_these() -> None:
    """The format itself: what one release wrote, the next one reads."""
    array = np.array([[127.0, -1.5, 0.5], [0.0, 0.0, 0.0], [-254.0, 3.0, 2.0]], np.float32)
    assert encode(array, "fp32") == struct.pack("<9f", *array.reshape(-1))
    # Halves go to the even neighbour: -1.5 to -2, 0.5 to 0, and 3/2 to 2.
    assert encode(array, "int8") == struct.pack("<3f9b", 1, 0, 2, 127, -2, 0, 0, 0, 0, -127, 2, 1)
    # One scale, 254/7 = 36.29 rounded up to the bfloat16 36.5; then pairs, low half first.
    four = np.rint(array.reshape(-1) / 36.5).astype(int)
    assert list(four) == [3, 0, 0, 0, 0, 0, -7, 0, 0]
    assert encode(array, "int4") == bytes.fromhex("1242 03 00 00 09 00")
    one = np.array([1.0, -2.0, 1 + 2**-8, 1 + 3 * 2**-8], np.float32)
    assert encode(one, "bf16") == struct.pack("<4H", 0x3F80, 0xC000, 0x3F80, 0x3F82)


def test_only_tensors_of_two_axes_and_more_have_a_scale_a_row() -> None:
    assert encoded_size((6,), "int8") == 4 + 6
    assert encoded_size((), "int8") == 4 + 1
    assert encoded_size((2, 3), "int8") == 2 * 4 + 6
    assert encoded_size((2, 3, 4), "int8") == 2 * 4 + 24
    # A small row keeps its own precision beside a large one.
    array = np.array([[1000.0, -1000.0], [1.0, 0.5]], np.float32)
    assert np.allclose(decode(encode(array, "int8"), (2, 2), "int8")[1], [1, 0.5], atol=1 / 254)


def test_an_outlier_coarsens_its_group_alone() -> None:
    array = np.full(256, 0.01, np.float32)
    array[0] = 100
    back = decode(encode(array, "int4"), (256,), "int4")
    assert not back[1:128].any()
    assert np.allclose(back[128:], 0.01, rtol=2**-7)


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_refused(name: str, value: float) -> None:
    array = np.zeros((3, 5), np.float32)
    array[1, 2] = value
    with pytest.raises(ValueError, match="not finite"):
        encode(array, name)


@given(st.sampled_from(CODECS), st.integers(0, 40))
def test_a_wrong_number_of_bytes_is_refused(name: str, count: int) -> None:
    shape = (3, 5)
    if count != encoded_size(shape, name):
        with pytest.raises(ValueError, match="bytes"):
            decode(bytes(count), shape, name)


@pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf, -1.0, 3.4e38])
def test_a_scale_that_cannot_be_is_refused(scale: float) -> None:
    data = bytearray(encode(np.ones((2, 3), np.float32), "int8"))
    data[4:8] = struct.pack("<f", scale)
    with pytest.raises(ValueError, match="scale"):
        decode(bytes(data), (2, 3), "int8")
    data = bytearray(encode(np.ones(3, np.float32), "int4"))
    data[:2] = struct.pack("<f", scale)[2:]
    with pytest.raises(ValueError, match="scale"):
        decode(bytes(data), (3,), "int4")


def test_an_unknown_codec_is_refused() -> None:
    for attempt in (
        lambda: encode(np.zeros(1, np.float32), "int2"),
        lambda: decode(b"", (0,), "int2"),
        lambda: encoded_size((1,), "int2"),
    ):
        with pytest.raises(ValueError, match="'int2' is unknown"):
            attempt()


@given(quantised, st.binary(min_size=0, max_size=64), st.integers(0, 24))
def test_any_bytes_decode_or_are_refused(name: str, data: bytes, count: int) -> None:
    padded = (data * 64)[: encoded_size((count,), name)]
    try:
        back = decode(padded, (count,), name)
    except ValueError:
        return
    assert back.shape == (count,)


def test_the_run_config_offers_every_codec() -> None:
    from app.config import RunConfig

    assert RunConfig.__dataclass_fields__["codec"].metadata["choices"] == codec.CODECS
