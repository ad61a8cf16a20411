"""An invitation survives copying or is refused: whatever happens to the string, there is one kind of error."""

import base64
import hashlib
import string

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from certs.errors import InvitationError
from certs.invitation import PREFIX, Invitation, new_secret, secret_hash
from certs.roles import SUPERLINK_NAME

LABELS = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", fullmatch=True)
HOSTS = st.one_of(
    st.from_regex(r"[A-Za-z0-9.-]{1,253}", fullmatch=True),
    st.ip_addresses(v=4).map(str),
    st.ip_addresses(v=6).map(lambda address: f"[{address}]"),
)
INVITATIONS = st.builds(
    Invitation,
    federation=LABELS,
    site=LABELS.filter(lambda name: name != SUPERLINK_NAME),
    address=st.builds(lambda host, port: f"{host}:{port}", HOSTS, st.integers(1, 65535)),
    fingerprint=st.binary(min_size=32, max_size=32).map(bytes.hex),
    expires=st.integers(1, 253402300799),
    secret=st.binary(min_size=16, max_size=16),
)
EXAMPLE = Invitation("demo", "lab-7", "fleet.example.org:9093", "3f" * 32, 1_900_000_000, bytes(16))
# What a mail program, a terminal or a tired hand may put in.
CHARACTERS = st.one_of(
    st.sampled_from(string.ascii_letters + string.digits + "-_.=+/"), st.characters()
)


def refused_or(invitation: Invitation, text: str) -> None:
    """A string that is not the invitation's is refused, unless it decodes to the very same."""
    try:
        decoded = Invitation.decode(text)
    except InvitationError as error:
        said = str(error)
    else:
        said = ""
        assert decoded == invitation
    assert "\n" not in said
    assert len(text) < 40 or text not in said


@given(INVITATIONS)
@settings(deadline=None)
def test_round_trip(invitation: Invitation) -> None:
    text = invitation.encode()
    assert text.startswith(PREFIX)
    assert text.isascii()
    assert Invitation.decode(text) == invitation
    assert invitation.expires_at.timestamp() == invitation.expires


@given(
    INVITATIONS, st.lists(st.tuples(st.integers(0, 1000), st.sampled_from(" \t\r\n")), max_size=9)
)
@settings(deadline=None)
def test_white_space_of_a_copy_is_ignored(
    invitation: Invitation, spaces: list[tuple[int, str]]
) -> None:
    text = invitation.encode()
    for at, space in spaces:
        text = text[: at % len(text)] + space + text[at % len(text) :]
    assert Invitation.decode(f"  {text}\n") == invitation


@given(INVITATIONS, st.data())
@settings(max_examples=400, deadline=None)
def test_a_changed_character_is_noticed(invitation: Invitation, data: st.DataObject) -> None:
    text = invitation.encode()
    at = data.draw(st.integers(0, len(text) - 1))
    other = data.draw(CHARACTERS)
    assume(other != text[at])
    refused_or(invitation, text[:at] + other + text[at + 1 :])


@given(INVITATIONS, st.data())
@settings(max_examples=400, deadline=None)
def test_a_cut_a_swap_or_an_insertion_is_noticed(
    invitation: Invitation, data: st.DataObject
) -> None:
    text = invitation.encode()
    first, second = sorted(
        (data.draw(st.integers(0, len(text))), data.draw(st.integers(0, len(text))))
    )
    refused_or(invitation, text[:first] + text[second:])
    refused_or(invitation, text[:first] + data.draw(CHARACTERS) + text[first:])
    refused_or(invitation, text[:first] + text[second:] + text[first:second])
    if second < len(text) - 1:
        swapped = list(text)
        swapped[second], swapped[second + 1] = swapped[second + 1], swapped[second]
        refused_or(invitation, "".join(swapped))


def test_every_single_change_of_one_invitation_is_noticed() -> None:
    """Exhaustive, where the properties above sample: each place, each character of the alphabet."""
    text = EXAMPLE.encode()
    for at, now in enumerate(text):
        for other in string.ascii_letters + string.digits + "-_.=":
            if other != now:
                refused_or(EXAMPLE, text[:at] + other + text[at + 1 :])
        with pytest.raises(InvitationError):
            Invitation.decode(text[:at])


@given(
    st.one_of(st.text(), st.text().map(PREFIX.__add__), st.binary().map(lambda b: PREFIX + b.hex()))
)
@settings(deadline=None)
def test_any_text_is_refused_with_one_kind_of_error(text: str) -> None:
    with pytest.raises(InvitationError):
        Invitation.decode(text)


@given(st.binary(max_size=300))
@settings(deadline=None)
def test_any_content_with_a_right_checksum_is_refused_or_whole(content: bytes) -> None:
    """The checksum protects nothing; whoever computes it still gets one kind of error."""
    data = content + hashlib.sha256(content).digest()[:4]
    text = PREFIX + base64.urlsafe_b64encode(data).rstrip(b"=").decode()
    try:
        decoded = Invitation.decode(text)
    except InvitationError:
        return
    assert decoded.encode() == text


def sealed(content: bytes) -> str:
    """An invitation whose content is this, with a right checksum."""
    data = content + hashlib.sha256(content).digest()[:4]
    return PREFIX + base64.urlsafe_b64encode(data).rstrip(b"=").decode()


@pytest.mark.parametrize(
    "words",
    [
        b"demo lab-7",
        b"demo lab-7 fleet:9093 more",
        b"demo lab-7  fleet:9093",
        b"Demo lab-7 fleet:9093",
        b"demo ../7 fleet:9093",
        b"demo superlink fleet:9093",
        b"demo lab-7 fleet:0",
        b"demo lab-7 fleet:65536",
        b"demo lab-7 fleet",
        b"demo lab-7 fleet:9093/path",
        b"demo lab-7 user@fleet:9093",
        b"demo lab-7 fl\xc3\xa9et:9093",
        b"",
    ],
)
def test_words_that_cannot_be_are_refused(words: bytes) -> None:
    fixed = (1_900_000_000).to_bytes(8) + bytes(32) + bytes(16)
    assert Invitation.decode(sealed(fixed + b"demo lab-7 fleet:9093")).site == "lab-7"
    with pytest.raises(InvitationError):
        Invitation.decode(sealed(fixed + words))


@pytest.mark.parametrize("expires", [0, 253402300800, (1 << 64) - 1])
def test_an_expiry_that_is_no_time_is_refused(expires: int) -> None:
    fixed = expires.to_bytes(8) + bytes(32) + bytes(16)
    with pytest.raises(InvitationError, match="expiry"):
        Invitation.decode(sealed(fixed + b"demo lab-7 fleet:9093"))


@given(INVITATIONS)
@settings(deadline=None)
def test_the_secret_is_in_no_text_but_the_invitation(invitation: Invitation) -> None:
    assume(len(set(invitation.secret)) > 4)  # zeros are everywhere
    for said in (repr(invitation), str(invitation), f"{invitation}"):
        assert invitation.secret.hex() not in said
        assert repr(invitation.secret) not in said
        assert base64.urlsafe_b64encode(invitation.secret).decode().rstrip("=") not in said


def test_secrets_are_long_and_never_the_same() -> None:
    secrets = {new_secret() for _ in range(1000)}
    assert len(secrets) == 1000
    assert {len(secret) for secret in secrets} == {16}
    assert len({secret_hash(secret) for secret in secrets}) == 1000
