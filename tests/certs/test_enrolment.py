"""An application proves that its keys are the applicant's; nothing of it can be altered on the way."""

import base64
import dataclasses
import json
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from certs.enrolment import (
    Application,
    Membership,
    fingerprint_of,
    public_node_key,
    requested_key,
    signing_request,
)
from certs.errors import CertificateError
from certs.roles import Role

P256 = ec.SECP256R1()
KEYS = [ec.generate_private_key(P256) for _ in range(3)]
OTHERS = [ec.generate_private_key(P256) for _ in range(3)]
APPLICATION = Application.make("demo", "lab-7", *KEYS)
OTHER = Application.make("demo", "lab-8", *OTHERS)
FIELDS = [field.name for field in dataclasses.fields(Application)]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=40),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from([*FIELDS, "x"]), inner)
    ),
    max_leaves=8,
)


def test_the_keys_of_an_application_are_the_applicants() -> None:
    proven = APPLICATION.keys()
    assert list(map(fingerprint_of, proven)) == [fingerprint_of(key.public_key()) for key in KEYS]


def test_it_survives_json() -> None:
    assert Application.from_json(json.loads(json.dumps(APPLICATION.to_json()))) == APPLICATION


def test_no_private_key_is_in_it() -> None:
    said = json.dumps(APPLICATION.to_json()) + repr(APPLICATION)
    assert "PRIVATE" not in said
    for key in KEYS:
        secret = key.private_numbers().private_value
        assert str(secret) not in said
        assert f"{secret:x}" not in said


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_of_another_application_is_noticed(name: str) -> None:
    altered = dataclasses.replace(
        APPLICATION, **{name: getattr(OTHER, name) + ("x" if name == "federation" else "")}
    )
    assert altered != APPLICATION
    with pytest.raises(CertificateError):
        altered.keys()


@given(st.sampled_from(FIELDS), st.data())
@settings(max_examples=400, deadline=None)
def test_an_altered_character_is_noticed(name: str, data: st.DataObject) -> None:
    text = getattr(APPLICATION, name)
    at = data.draw(st.integers(0, len(text) - 1))
    other = data.draw(st.characters(codec="utf-8") | st.sampled_from("ABCabc019+/=\n"))
    assume(other != text[at])
    altered = dataclasses.replace(APPLICATION, **{name: text[:at] + other + text[at + 1 :]})
    try:
        keys = altered.keys()
    except CertificateError:
        return
    # Only the signature's own encoding has room: base64 of the same bytes.
    assert name == "proof"
    assert base64.b64decode(altered.proof) == base64.b64decode(APPLICATION.proof)
    assert [fingerprint_of(key) for key in keys] == [fingerprint_of(k.public_key()) for k in KEYS]


@given(st.sampled_from(FIELDS), st.text(max_size=200))
@settings(deadline=None)
def test_any_text_in_a_field_is_refused_with_one_kind_of_error(name: str, text: str) -> None:
    assume(text != getattr(APPLICATION, name))
    with pytest.raises(CertificateError):
        dataclasses.replace(APPLICATION, **{name: text}).keys()


@given(JSON)
@settings(deadline=None)
def test_any_json_is_refused_with_one_kind_of_error(record: Any) -> None:
    with pytest.raises(CertificateError):
        Application.from_json(record)
    with pytest.raises(CertificateError):
        Membership.from_json(record)


@pytest.mark.parametrize("name", FIELDS)
def test_a_missing_an_extra_and_a_field_of_another_type_are_refused(name: str) -> None:
    record: dict[str, Any] = APPLICATION.to_json()
    for altered in (
        {key: value for key, value in record.items() if key != name},
        {**record, "more": ""},
        {**record, name: 7},
        {**record, name: None},
    ):
        with pytest.raises(CertificateError):
            Application.from_json(altered)


@pytest.mark.parametrize(
    ("field", "value"), [("federation", "De mo"), ("site", "../x"), ("site", "superlink")]
)
def test_names_that_nobody_may_bear_are_refused(field: str, value: str) -> None:
    with pytest.raises(CertificateError, match=r"use 1 to 63|cannot be named"):
        Application.from_json({**APPLICATION.to_json(), field: value})


@pytest.mark.parametrize("same", [(0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 0, 0)])
def test_one_key_for_two_ends_is_refused(same: tuple[int, int, int]) -> None:
    application = Application.make("demo", "lab-7", *(KEYS[index] for index in same))
    with pytest.raises(CertificateError, match="one key for two ends"):
        application.keys()


def test_keys_on_another_curve_are_refused() -> None:
    weak = ec.generate_private_key(ec.SECP384R1())
    with pytest.raises(CertificateError, match="P-256"):
        requested_key(signing_request(weak, "demo", Role.SITE, "lab-7"))
    openssh = serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    for key in (weak.public_key(), ed25519.Ed25519PrivateKey.generate().public_key()):
        with pytest.raises(CertificateError, match="P-256"):
            public_node_key(key.public_bytes(*openssh).decode())


def test_a_compressed_point_is_refused() -> None:
    """Flower writes and reads them whole; cryptography's reader of OpenSSH keys has an error of its own for these."""
    algorithm, blob = APPLICATION.node_key.split()
    content = base64.b64decode(blob)
    point = content.index(b"\x00\x00\x00\x41\x04") + 4
    compressed = content[:point] + b"\x02" + content[point + 1 :]
    with pytest.raises(CertificateError, match="not an OpenSSH public key"):
        public_node_key(f"{algorithm} {base64.b64encode(compressed).decode()}")


def test_a_request_for_another_name_is_still_the_keys_own() -> None:
    """Who signs decides what a certificate says: a request's subject is not evidence of anything."""
    request = signing_request(KEYS[0], "other", Role.OPERATOR, "admin")
    assert fingerprint_of(requested_key(request)) == fingerprint_of(KEYS[0].public_key())


def test_a_membership_survives_json_and_ignores_what_a_newer_service_adds() -> None:
    membership = Membership("demo", "lab-7", "a", "b", "c", "host:1", "host:2")
    record = json.loads(json.dumps(membership.to_json()))
    assert Membership.from_json({**record, "later": 1}) == membership
