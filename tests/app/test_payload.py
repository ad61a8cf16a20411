"""A payload arrives as it left, decodes a tensor at a time, or is refused with a reason."""

import dataclasses
import json
import math
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from app import payload
from app.codec import CODECS, Array, decode, encode
from app.manifest import PayloadError
from app.payload import Payload, Tensors, canonical_hash, pack, parse
from benchmarks.shapes import SHAPES, TENSORS, VALUES, derive

BASE, TARGET, FROZEN = "b" * 64, "c" * 64, "f" * 64

shapes = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)
values = st.floats(-1e3, 1e3, width=32)
tensors_of_any_shape = st.dictionaries(
    st.text(min_size=1, max_size=12), hnp.arrays(np.float32, shapes, elements=values), max_size=5
)
codecs = st.sampled_from(CODECS)


def sample() -> dict[str, Array]:
    return {
        "a.bias": np.array([1.5, -2.0], np.float32),
        "b.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
        "c.scale": np.array(7.0, np.float32),
    }


def update_of(tensors: Tensors, codec: str = "int8") -> Payload:
    return pack(
        sorted(tensors.items()), kind="update", codec=codec, base=BASE, target=None, frozen=FROZEN
    )


def model_of(
    tensors: Tensors, base: str | None = None, codec: str = "fp32", target: str | None = TARGET
) -> Payload:
    return pack(
        sorted(tensors.items()), kind="model", codec=codec, base=base, target=target, frozen=FROZEN
    )


def sent(original: Payload) -> Payload:
    """``original`` after its manifest went through JSON."""
    text = json.dumps(original.manifest())
    return parse(text, original.flat(), kind=original.kind)


@given(tensors_of_any_shape, codecs)
def test_what_is_packed_comes_back_as_its_codec_has_it(tensors: Tensors, codec: str) -> None:
    back = sent(update_of(tensors, codec))
    assert (back.kind, back.codec) == ("update", codec)
    assert (back.base, back.target, back.frozen, back.form) == (BASE, None, FROZEN, "delta")
    assert back == update_of(tensors, codec)
    assert [name for name, _ in back.items()] == sorted(tensors)
    for name, array in back.items():
        expected = decode(encode(tensors[name], codec), tensors[name].shape, codec)
        assert array.shape == tensors[name].shape
        assert array.tobytes() == expected.tobytes()
        assert back.tensor(name).tobytes() == array.tobytes()


@given(tensors_of_any_shape)
def test_a_full_model_comes_back_bit_for_bit(tensors: Tensors) -> None:
    back = sent(model_of(tensors))
    assert (back.base, back.target, back.form) == (None, TARGET, "full")
    assert {name: array.tobytes() for name, array in back.items()} == {
        name: array.tobytes() for name, array in tensors.items()
    }


def test_the_three_forms_of_a_model_lead_to_the_same_one() -> None:
    old = sample()
    _, change, _ = payload.encode_feedback(np.full((2, 3), 0.3, np.float32), None, "int8")
    new = {**old, "b.weight": old["b.weight"] + change}
    zeros = {name: np.zeros_like(array) for name, array in old.items()}
    difference = {**zeros, "b.weight": np.full((2, 3), 0.3, np.float32)}
    base, target = canonical_hash(old), canonical_hash(new)
    full = model_of(new, target=target)
    delta = model_of(difference, base, "int8", target)
    held = model_of({}, target, "int8", target)
    assert [model.form for model in (full, delta, held)] == ["full", "delta", "held"]
    assert held.nbytes == payload.wire_bytes(payload.to_records(held)) == 0
    for model, start in [(full, {}), (delta, old), (held, new)]:
        assert canonical_hash(dict(payload.apply(start, sent(model)))) == target


def test_a_model_that_did_not_change_is_still_a_delta() -> None:
    zeros = {name: np.zeros_like(array) for name, array in sample().items()}
    delta = model_of(zeros, BASE, "int4", target=BASE)
    assert delta.form == "delta"
    assert canonical_hash(dict(payload.apply(sample(), delta))) == canonical_hash(sample())


def test_exact_tensors_are_not_copied() -> None:
    original = update_of(sample(), "fp32")
    raw = np.frombuffer(original.flat(), np.uint8)
    for name in sample():
        array = sent(original).tensor(name)
        assert np.shares_memory(array, raw)
        assert not array.flags.writeable


def test_tensors_are_consumed_one_at_a_time() -> None:
    alive = 0

    def one_by_one() -> Iterator[tuple[str, Array]]:
        nonlocal alive
        for number in range(4):
            alive += 1
            yield f"{number}", np.zeros(3, np.float32)
            assert alive == number + 1

    packed = pack(one_by_one(), kind="update", codec="int8", base=BASE, target=None, frozen=FROZEN)
    assert list(packed.shapes) == ["0", "1", "2", "3"]


def test_encoded_parts_make_the_same_payload() -> None:
    parts = [(name, array.shape, encode(array, "int4")) for name, array in sample().items()]
    made = payload.pack_encoded(
        parts, kind="update", codec="int4", base=BASE, target=None, frozen=FROZEN
    )
    assert made == update_of(sample(), "int4")
    assert made.flat() == update_of(sample(), "int4").flat()


# --- Flower's messages ---------------------------------------------------------------------------


def through_flower(records: RecordDict) -> RecordDict:
    from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
    from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

    objects = get_all_nested_objects(records)
    contents = {name: item.deflate() for name, item in objects.items()}
    back = inflate_object_from_contents(records.object_id, contents)
    assert isinstance(back, RecordDict)
    return back


@pytest.mark.parametrize(
    "original",
    [*(update_of(sample(), codec) for codec in CODECS), model_of({}, TARGET, "int8")],
    ids=[*CODECS, "held"],
)
def test_it_survives_flowers_own_encoding(original: Payload) -> None:
    back = payload.from_records(through_flower(payload.to_records(original)), kind=original.kind)
    assert back == original
    assert back.flat() == original.flat()


def test_the_wire_carries_one_array_and_nothing_but_the_encoded_bytes() -> None:
    records = payload.to_records(update_of(sample(), "int8"))
    # Nine values, two rows, a bias and a scalar.
    assert payload.wire_bytes(records) == 9 + 4 * (2 + 1 + 1)
    assert len(list(records.array_records["payload"])) == 1


def test_a_message_is_never_held_decoded() -> None:
    """Through Flower, from encoded bytes to the last decoded tensor, peak memory stays below one decoded update."""
    rng = np.random.default_rng(0)
    # Sixteen tensors of 2 MB: each small beside the update, as the real model's are.
    tensors = {f"{i:02}": rng.normal(size=(512, 1024)).astype(np.float32) for i in range(16)}
    decoded = sum(array.nbytes for array in tensors.values())
    records = payload.to_records(update_of(tensors))
    tracemalloc.start()
    try:
        back = payload.from_records(through_flower(records), kind="update")
        squares = sum(float(np.vdot(array, array)) for _, array in back.items())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert squares > 0
    # Flower holds up to three encoded copies, a quarter each: what came, its chunks, and the whole.
    assert peak < decoded


# --- the real model ------------------------------------------------------------------------------


def test_the_listed_shapes_are_those_of_the_real_model() -> None:
    assert derive() == SHAPES
    assert (len(SHAPES), sum(map(math.prod, SHAPES.values()))) == (TENSORS, VALUES)
    assert list(SHAPES) == sorted(SHAPES)


@pytest.mark.parametrize(("codec", "megabytes"), [("int8", 100.5), ("int4", 52.0)])
def test_an_update_of_the_real_model_fits(codec: str, megabytes: float) -> None:
    zeros = ((name, np.zeros(shape, np.float32)) for name, shape in SHAPES.items())
    packed = pack(zeros, kind="update", codec=codec, base=BASE, target=None, frozen=FROZEN)
    records = payload.to_records(packed)
    manifest = len(str(records.config_records["manifest"]["json"]))
    assert payload.wire_bytes(records) + manifest <= megabytes * 1e6


# --- files ---------------------------------------------------------------------------------------


@given(tensors=tensors_of_any_shape, codec=codecs)
def test_a_payload_in_a_file_reads_as_the_one_in_memory(
    tmp_path_factory: pytest.TempPathFactory, tensors: Tensors, codec: str
) -> None:
    original = update_of(tensors, codec)
    path = tmp_path_factory.mktemp("payload") / "update"
    original.write(path)
    back = Payload.open(path)
    assert back == original
    assert back.flat() == original.flat()
    for name, array in back.items():
        assert array.tobytes() == original.tensor(name).tobytes()


def test_a_payload_in_a_file_is_not_read_before_it_is_needed(tmp_path: Path) -> None:
    array = np.ones((1000, 1000), np.float32)
    path = tmp_path / "update"
    update_of({"a": array, "b": array}, "fp32").write(path)
    tracemalloc.start()
    try:
        back = Payload.open(path)
        assert tracemalloc.get_traced_memory()[1] < 100_000
        assert np.array_equal(back.tensor("b"), array)
        assert tracemalloc.get_traced_memory()[1] < 1.5 * array.nbytes
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda data: data[:-1], "size"),
        (lambda data: data + b"x", "size"),
        (lambda data: data[:0], "schema"),
        (lambda data: data[:20], "schema"),
        (lambda data: b"\xff" * 8 + data[8:], "schema"),
        (lambda data: data[:8] + b"\xff" + data[9:], "schema"),
    ],
)
def test_a_damaged_file_is_refused(
    tmp_path: Path, damage: Callable[[bytes], bytes], reason: str
) -> None:
    path = tmp_path / "update"
    update_of(sample()).write(path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(PayloadError) as caught:
        Payload.open(path)
    assert caught.value.reason == reason


def test_a_file_that_is_cut_after_it_was_opened_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "update"
    update_of(sample()).write(path)
    back = Payload.open(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(PayloadError, match="cut short"):
        list(back.items())


# --- refusals ------------------------------------------------------------------------------------


def test_only_finite_float32_in_order_of_name_is_sent() -> None:
    zeros = np.zeros(2, np.float32)
    wrong: list[tuple[list[tuple[str, Any]], str]] = [
        ([("w", np.zeros(2))], "dtype"),
        ([("w", np.array([1, np.nan], np.float32))], "finite"),
        ([("w", zeros), ("a", zeros)], "names"),
        ([("w", zeros), ("w", zeros)], "names"),
    ]
    for tensors, reason in wrong:
        with pytest.raises(PayloadError) as caught:
            pack(tensors, kind="update", codec="int8", base=BASE, target=None, frozen=FROZEN)
        assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("about", "reason"),
    [
        ({"kind": "model", "codec": "int8", "base": None, "target": TARGET}, "codec"),
        ({"kind": "model", "codec": "fp32", "base": None, "target": None}, "target"),
        ({"kind": "update", "codec": "int8", "base": None, "target": None}, "base"),
        ({"kind": "update", "codec": "int8", "base": BASE, "target": TARGET}, "base"),
        ({"kind": "update", "codec": "int2", "base": BASE, "target": None}, "finite"),
    ],
)
def test_what_contradicts_itself_is_not_packed(about: dict[str, Any], reason: str) -> None:
    with pytest.raises(PayloadError) as caught:
        pack(sample().items(), frozen=FROZEN, **about)
    assert caught.value.reason == reason


def entries(**changes: Any) -> list[dict[str, Any]]:
    first, *rest = update_of(sample()).manifest()["tensors"]
    return [{**first, **changes}, *rest]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"schema": 1}, "schema"),
        ({"tensors": None}, "schema"),
        ({"tensors": [{"name": "a.bias"}]}, "schema"),
        ({"frozen": None}, "schema"),
        ({"base": 7}, "schema"),
        ({"codec": "int2"}, "codec"),
        ({"codec": ["int8"]}, "codec"),
        ({"codec": "int4"}, "size"),
        ({"kind": "model", "target": TARGET}, "kind"),
        ({"kind": "delta"}, "kind"),
        ({"kind": "model", "base": None, "target": TARGET}, "codec"),
        ({"kind": "model", "target": TARGET, "tensors": [], "bytes": 0}, "base"),
        ({"base": None}, "base"),
        ({"target": TARGET}, "base"),
        ({"bytes": 3}, "size"),
        ({"bytes": 25.0}, "size"),
        ({"sha256": "0" * 64}, "checksum"),
        ({"tensors": []}, "size"),
        ({"tensors": entries(dtype="float16")}, "dtype"),
        ({"tensors": entries(name="z")}, "names"),
        ({"tensors": entries(name="b.weight")}, "names"),
        ({"tensors": entries(name=1)}, "schema"),
        ({"tensors": entries(offset=4)}, "size"),
        ({"tensors": entries(offset=-1)}, "size"),
        ({"tensors": entries(size=7)}, "size"),
        ({"tensors": entries(size=6.0)}, "size"),
        ({"tensors": entries(shape=[-2])}, "shape"),
        ({"tensors": entries(shape=[2.0])}, "shape"),
        ({"tensors": entries(shape=[1000])}, "size"),
        ({"tensors": entries(shape=[1])}, "size"),
        ({"tensors": entries(shape=7)}, "schema"),
    ],
)
def test_every_mismatch_has_its_reason(changes: dict[str, Any], reason: str) -> None:
    original = update_of(sample())
    with pytest.raises(PayloadError) as caught:
        parse({**original.manifest(), **changes}, original.flat(), kind="update")
    assert caught.value.reason == reason


def accepted(text: str, flat: bytes) -> bool:
    """A SuperLink's checks of an update of ``sample`` in int8, short of its values."""
    try:
        update = parse(text, flat, kind="update")
        payload.check_tensors(update.shapes, {n: a.shape for n, a in sample().items()})
    except PayloadError:
        return False
    return (update.base, update.frozen, update.codec) == (BASE, FROZEN, "int8")


@given(codecs, st.data())
def test_any_flipped_bit_of_the_bytes_is_noticed(codec: str, data: st.DataObject) -> None:
    original = update_of(sample(), codec)
    bit = data.draw(st.integers(0, 8 * original.nbytes - 1))
    damaged = bytearray(original.flat())
    damaged[bit // 8] ^= 1 << bit % 8
    with pytest.raises(PayloadError) as caught:
        parse(original.manifest(), bytes(damaged), kind="update")
    assert caught.value.reason == "checksum"


@given(st.data())
def test_any_other_manifest_is_refused(data: st.DataObject) -> None:
    original = update_of(sample())
    manifest = original.manifest()
    assert accepted(json.dumps(manifest), original.flat())
    place: Any = manifest
    key = data.draw(st.sampled_from(sorted(manifest)))
    if key == "tensors" and data.draw(st.booleans()):
        place = data.draw(st.sampled_from(manifest["tensors"]))
        key = data.draw(st.sampled_from(sorted(place)))
    before = place[key]
    json_values = st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(-9, 99), st.floats(), st.text()),
        lambda children: st.lists(children, max_size=3),
        max_leaves=4,
    )
    place[key] = data.draw(json_values)
    # An equal manifest is no other one: 6 and 6.0 are not equal to the reader.
    if json.dumps(place[key]) != json.dumps(before):
        assert not accepted(json.dumps(manifest), original.flat())


@given(st.data())
def test_any_flipped_bit_of_the_manifest_is_refused(data: st.DataObject) -> None:
    original = update_of(sample())
    text = json.dumps(original.manifest())
    index = data.draw(st.integers(0, len(text) - 1))
    damaged = text[:index] + chr(ord(text[index]) ^ 1 << data.draw(st.integers(0, 6)))
    damaged += text[index + 1 :]
    # A flip may hit what carries no meaning (a blank); what is read as the same manifest is the same.
    try:
        same = json.dumps(json.loads(damaged)) == text
    except ValueError:
        same = False
    assert accepted(damaged, original.flat()) == same


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "7", "[" * 100_000])
def test_what_is_no_manifest_is_refused(text: str) -> None:
    with pytest.raises(PayloadError) as caught:
        parse(text, b"", kind="update")
    assert caught.value.reason == "schema"


@pytest.mark.parametrize(
    ("records", "reason"),
    [
        (RecordDict(), "missing"),
        (RecordDict({"payload": ArrayRecord(), "manifest": ConfigRecord()}), "missing"),
        (
            RecordDict(
                {
                    "payload": payload.to_records(update_of({}))["payload"],
                    "manifest": ConfigRecord({"json": "{"}),
                }
            ),
            "schema",
        ),
    ],
)
def test_a_message_without_a_sound_payload_is_refused(records: RecordDict, reason: str) -> None:
    with pytest.raises(PayloadError) as caught:
        payload.from_records(records, kind="update")
    assert caught.value.reason == reason


def test_damaged_scales_are_refused_when_they_are_read() -> None:
    flat = np.array([np.nan], "<f4").tobytes() + b"\x01\x02"
    damaged = payload.pack_encoded(
        [("w", (2,), flat)], kind="update", codec="int8", base=BASE, target=None, frozen=FROZEN
    )
    with pytest.raises(PayloadError, match="Tensor w") as caught:
        list(sent(damaged).items())
    assert caught.value.reason == "finite"


@pytest.mark.parametrize("shape", [[0, 2**70], [0] * 70])
def test_a_shape_no_tensor_has_is_refused_when_it_is_read(shape: list[int]) -> None:
    manifest = update_of({"w": np.zeros(0, np.float32)}).manifest()
    manifest["tensors"][0]["shape"] = shape
    with pytest.raises(PayloadError):
        parse(manifest, b"", kind="update").tensor("w")


def test_a_tensor_that_is_not_there_is_named() -> None:
    with pytest.raises(PayloadError, match=r"no tensor z\.bias"):
        update_of(sample()).tensor("z.bias")


def test_a_payload_of_another_model_is_refused() -> None:
    like = {name: array.shape for name, array in sample().items()}
    payload.check_tensors(update_of(sample()).shapes, like)
    without = {name: shape for name, shape in like.items() if name != "a.bias"}
    for found, reason in [
        (without, "names"),
        ({**like, "extra": (2,)}, "names"),
        ({**like, "a.bias": (3,)}, "shape"),
    ]:
        with pytest.raises(PayloadError) as caught:
            payload.check_tensors(found, like)
        assert caught.value.reason == reason


def test_a_payload_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        update_of(sample()).base = TARGET  # type: ignore[misc]


# --- error feedback ------------------------------------------------------------------------------


@given(
    codecs,
    st.integers(0, 2**32 - 1),
    st.integers(1, 12),
    hnp.array_shapes(min_dims=1, max_dims=2, max_side=40),
)
def test_error_feedback_loses_nothing(
    codec: str, seed: int, rounds: int, shape: tuple[int, ...]
) -> None:
    rng = np.random.default_rng(seed)
    residual: Array | None = None
    total, arrived = np.zeros(shape), np.zeros(shape)
    largest = 0.0
    for _ in range(rounds):
        delta = (rng.standard_t(3, shape) * 10.0 ** rng.integers(-6, 3)).astype(np.float32)
        data, decoded, residual = payload.encode_feedback(delta, residual, codec)
        assert np.array_equal(decode(data, shape, codec), decoded)
        total += delta
        arrived += decoded
        largest = max(largest, float(np.abs(delta).max()), float(np.abs(decoded).max()))
    assert residual is not None
    # Only the fp32 addition of delta and residual rounds, by half a unit in the last place (2^-24).
    allowed = rounds * 2 * largest * 2.0**-24
    assert np.abs(arrived + residual - total).max() <= allowed
    if codec == "fp32":
        assert not residual.any()


def test_without_error_feedback_small_values_would_never_arrive() -> None:
    delta = np.array([100.0, 0.3], np.float32)
    residual: Array | None = None
    arrived = np.zeros(2)
    for _ in range(10):
        _, decoded, residual = payload.encode_feedback(delta, residual, "int8")
        arrived += decoded
    assert not decode(encode(delta, "int8"), (2,), "int8")[1]
    # 3.0 within half a scale.
    assert abs(arrived[1] - 3.0) <= 100 / 254


# --- canonical hash ------------------------------------------------------------------------------


@given(tensors_of_any_shape)
def test_the_hash_does_not_depend_on_order_or_strides(tensors: Tensors) -> None:
    other = {name: np.array(tensors[name], order="F") for name in reversed(list(tensors))}
    assert canonical_hash(other) == canonical_hash(tensors)


@given(tensors_of_any_shape, tensors_of_any_shape)
def test_different_tensors_have_different_hashes(one: Tensors, other: Tensors) -> None:
    def content(tensors: Tensors) -> set[tuple[str, tuple[int, ...], bytes]]:
        return {(name, array.shape, array.tobytes()) for name, array in tensors.items()}

    assert (canonical_hash(one) == canonical_hash(other)) == (content(one) == content(other))


def test_the_hash_sees_name_dtype_shape_and_bytes() -> None:
    array = np.arange(4, dtype=np.float32)
    variants: list[dict[str, Any]] = [
        {"w": array},
        {"v": array},
        {"w": array.reshape(2, 2)},
        {"w": array.view(np.int32)},
        {"w": array + 1},
        {"w": array[:2], "x": array[2:]},
        {"w": array[:1]},
        {"w": array[0].reshape(())},
        {},
    ]
    assert len({canonical_hash(tensors) for tensors in variants}) == len(variants)


def test_the_hash_is_this() -> None:
    """Hashes are in manifests and checkpoints of earlier releases: the digest may not change."""
    tensors = {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.ones(1, np.float32)}
    digest = "b193e1cc1b42f19b02f6ffaa4d45a5981e334d0c40fd0eeff50be0e010f465a9"
    assert canonical_hash(tensors) == digest
