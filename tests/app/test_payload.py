"""A payload arrives as it left, or is refused with a reason."""

import json
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from app import payload
from app.payload import PayloadError, Tensors, canonical_hash, pack, unpack

BASE, FROZEN = "b" * 64, "f" * 64

shapes = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)
tensors_of_any_shape = st.dictionaries(
    st.text(min_size=1, max_size=12), hnp.arrays(np.float32, shapes), max_size=5
)


def sample() -> Tensors:
    return {
        "b.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
        "a.bias": np.array([1.5, -2.0], np.float32),
        "c.scale": np.array(7.0, np.float32),
    }


def packed(**changes: Any) -> tuple[dict[str, Any], bytes]:
    manifest, flat = pack(sample(), kind="delta", base=BASE, frozen=FROZEN)
    return {**manifest, **changes}, flat


@given(tensors_of_any_shape)
def test_what_is_packed_comes_back_bit_for_bit(tensors: Tensors) -> None:
    manifest, flat = pack(tensors, kind="model", base=BASE, frozen=FROZEN)
    back = unpack(json.loads(json.dumps(manifest)), flat, kind="model")
    assert (back.kind, back.base, back.frozen) == ("model", BASE, FROZEN)
    assert list(back.tensors) == sorted(tensors)
    for name, array in tensors.items():
        assert back.tensors[name].shape == array.shape
        assert back.tensors[name].tobytes() == array.tobytes()


def test_unpacking_copies_nothing() -> None:
    manifest, flat = packed()
    raw = np.frombuffer(flat, np.uint8)
    for array in unpack(manifest, flat, kind="delta").tensors.values():
        assert np.shares_memory(array, raw)
        assert not array.flags.writeable


def test_the_wire_carries_four_bytes_a_value_and_nothing_else() -> None:
    manifest, flat = packed()
    records = payload.to_records(manifest, flat)
    values = sum(array.size for array in sample().values())
    assert payload.wire_bytes(records) == values * 4
    assert len(list(records.array_records["payload"])) == 1


def test_it_survives_flowers_own_encoding() -> None:
    from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
    from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

    records = payload.to_records(*packed())
    objects = get_all_nested_objects(records)
    contents = {name: item.deflate() for name, item in objects.items()}
    back = inflate_object_from_contents(records.object_id, contents)
    assert isinstance(back, RecordDict)
    for name, array in payload.from_records(back, kind="delta").tensors.items():
        assert np.array_equal(array, sample()[name])


def test_a_strided_tensor_is_sent_in_its_logical_order() -> None:
    turned = np.arange(6, dtype=np.float32).reshape(2, 3).T
    manifest, flat = pack({"w": turned}, kind="model", base=BASE, frozen=FROZEN)
    assert np.array_equal(unpack(manifest, flat, kind="model").tensors["w"], turned)


def test_only_float32_is_sent() -> None:
    with pytest.raises(PayloadError, match="float64") as caught:
        pack({"w": np.zeros(2)}, kind="model", base=BASE, frozen=FROZEN)  # type: ignore[dict-item]
    assert caught.value.reason == "dtype"


def entries(**changes: Any) -> list[dict[str, Any]]:
    manifest, _ = packed()
    first, *rest = manifest["tensors"]
    return [{**first, **changes}, *rest]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"schema": 2}, "schema"),
        ({"tensors": None}, "schema"),
        ({"tensors": [{"name": "a.bias"}]}, "schema"),
        ({"codec": "int8"}, "codec"),
        ({"kind": "model"}, "kind"),
        ({"bytes": 3}, "size"),
        ({"sha256": "0" * 64}, "checksum"),
        ({"tensors": []}, "size"),
        ({"tensors": entries(dtype="float16")}, "dtype"),
        ({"tensors": entries(name="z")}, "names"),
        ({"tensors": entries(name="b.weight")}, "names"),
        ({"tensors": entries(offset=4)}, "size"),
        ({"tensors": entries(shape=[-2])}, "shape"),
        ({"tensors": entries(shape=[2.0])}, "shape"),
        ({"tensors": entries(shape=[1000])}, "size"),
        ({"tensors": entries(shape=[1])}, "size"),
    ],
)
def test_every_mismatch_has_its_reason(changes: dict[str, Any], reason: str) -> None:
    manifest, flat = packed(**changes)
    with pytest.raises(PayloadError) as caught:
        unpack(manifest, flat, kind="delta")
    assert caught.value.reason == reason


def test_one_flipped_bit_is_noticed() -> None:
    manifest, flat = packed()
    damaged = bytearray(flat)
    damaged[5] ^= 1
    with pytest.raises(PayloadError) as caught:
        unpack(manifest, bytes(damaged), kind="delta")
    assert caught.value.reason == "checksum"


@pytest.mark.parametrize(
    ("records", "reason"),
    [
        (RecordDict(), "missing"),
        (RecordDict({"payload": ArrayRecord(), "manifest": ConfigRecord()}), "missing"),
        (
            RecordDict(
                {
                    "payload": payload.to_records({}, b"")["payload"],
                    "manifest": ConfigRecord({"json": "{"}),
                }
            ),
            "schema",
        ),
        (payload.to_records({}, b""), "schema"),
    ],
)
def test_a_message_without_a_sound_payload_is_refused(records: RecordDict, reason: str) -> None:
    with pytest.raises(PayloadError) as caught:
        payload.from_records(records, kind="delta")
    assert caught.value.reason == reason


def test_a_payload_of_another_model_is_refused() -> None:
    like = sample()
    payload.check_tensors(like, like)
    without = {name: array for name, array in like.items() if name != "a.bias"}
    for tensors, reason in [
        (without, "names"),
        ({**like, "extra": like["a.bias"]}, "names"),
        ({**like, "a.bias": np.zeros(3, np.float32)}, "shape"),
    ]:
        with pytest.raises(PayloadError) as caught:
            payload.check_tensors(tensors, like)
        assert caught.value.reason == reason


@given(tensors_of_any_shape)
def test_the_hash_does_not_depend_on_order_or_strides(tensors: Tensors) -> None:
    other = {name: np.asfortranarray(tensors[name]) for name in reversed(tensors)}
    assert canonical_hash(other) == canonical_hash(tensors)


def test_the_hash_sees_name_dtype_shape_and_bytes() -> None:
    array = np.arange(4, dtype=np.float32)
    variants: list[dict[str, Any]] = [
        {"w": array},
        {"v": array},
        {"w": array.reshape(2, 2)},
        {"w": array.view(np.int32)},
        {"w": array + 1},
        {"w": array[:2], "x": array[2:]},
        {},
    ]
    assert len({canonical_hash(tensors) for tensors in variants}) == len(variants)
