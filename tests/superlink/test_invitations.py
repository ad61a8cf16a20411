"""The store of invitations: who may come in with which secret, and what a file that leaks is worth."""

import json
import threading
from pathlib import Path

import pytest

from certs.errors import CertificateError, InvitationError, StorageError
from certs.invitation import secret_hash
from superlink.invitations import MAX_SECONDS, Invitations
from superlink.refused import Refused
from tests.clock import Clock

KEYS, OTHER_KEYS = "a" * 64, "b" * 64
DAY = 24 * 3600


@pytest.fixture
def clock() -> Clock:
    return Clock(1_800_000_000.0)


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> Invitations:
    return Invitations(tmp_path / "invitations.json", clock)


def refused(store: Invitations, secret: bytes, site: str, keys: str = KEYS) -> str:
    with pytest.raises(Refused) as caught:
        store.require(secret, site, keys)
    assert caught.value.detail.endswith(("one", "name", "you"))
    return caught.value.code


def states(store: Invitations) -> list[tuple[str, str]]:
    return [(str(entry["site"]), str(entry["state"])) for entry in store.listed()]


def test_one_way_in_until_it_is_used(store: Invitations) -> None:
    secret, entry = store.create("site-a", 3600)
    assert entry.expires - entry.created == 3600
    assert entry.id == secret_hash(secret)[:8]
    found = store.require(secret, "site-a", KEYS)
    assert states(store) == [("site-a", "open")]
    store.use(found, KEYS)
    assert states(store) == [("site-a", "used")]
    # The answer may have been lost on its way.
    assert store.require(secret, "site-a", KEYS).used_by == KEYS
    assert refused(store, secret, "site-a", OTHER_KEYS) == "used"


def test_whatever_does_not_fit_is_refused(store: Invitations, clock: Clock) -> None:
    secret, _ = store.create("site-a", 3600)
    assert refused(store, bytes(16), "site-a") == "unknown"
    assert refused(store, secret[:15] + bytes([secret[15] ^ 1]), "site-a") == "unknown"
    assert refused(store, secret, "site-b") == "site"
    clock.now += 3599
    store.require(secret, "site-a", KEYS)
    clock.now += 1
    assert refused(store, secret, "site-a") == "expired"
    assert states(store) == [("site-a", "expired")]


def test_an_expired_one_does_not_even_help_its_user(store: Invitations, clock: Clock) -> None:
    secret, entry = store.create("site-a", 60)
    store.use(entry, KEYS)
    clock.now += 60
    assert refused(store, secret, "site-a") == "expired"


def test_a_new_one_ends_the_one_before(store: Invitations) -> None:
    first, _ = store.create("site-a", 3600)
    other, _ = store.create("site-b", 3600)
    second, _ = store.create("site-a", 3600)
    assert refused(store, first, "site-a") == "cancelled"
    store.require(other, "site-b", KEYS)
    store.require(second, "site-a", KEYS)
    assert states(store) == [("site-a", "cancelled"), ("site-b", "open"), ("site-a", "open")]


def test_cancelling_ends_a_used_one_too(store: Invitations) -> None:
    """An evicted site must not come back with the invitation that it came in with."""
    secret, entry = store.create("site-a", 3600)
    store.use(entry, KEYS)
    assert store.cancel("site-a") == 0
    assert refused(store, secret, "site-a") == "cancelled"
    assert states(store) == [("site-a", "used")]
    open_secret, _ = store.create("site-a", 3600)
    assert store.cancel("site-a") == 1
    assert refused(store, open_secret, "site-a") == "cancelled"
    assert store.cancel("nobody") == 0


@pytest.mark.parametrize("seconds", [-1, 0, 59, MAX_SECONDS + 1, 10**18])
def test_lifetimes_have_bounds(store: Invitations, seconds: int) -> None:
    with pytest.raises(InvitationError, match="1 minute to 7 days"):
        store.create("site-a", seconds)
    assert store.listed() == []


def test_names_are_checked(store: Invitations) -> None:
    for name in ("superlink", "Site", "../x", ""):
        with pytest.raises(CertificateError, match="name"):
            store.create(name, 3600)


def test_the_file_outlives_the_process_and_holds_no_secret(
    store: Invitations, clock: Clock
) -> None:
    path = store._path
    secret, entry = store.create("site-a", 3600)
    store.use(entry, KEYS)
    assert path.stat().st_mode & 0o777 == 0o600
    text = path.read_text()
    assert secret.hex() not in text
    assert [set(each) for each in json.loads(text)["invitations"]] == [
        {"secret_hash", "site", "created", "expires", "used_by", "cancelled"}
    ]
    again = Invitations(path, clock)
    assert again.require(secret, "site-a", KEYS).used_by == KEYS
    assert refused(again, secret, "site-a", OTHER_KEYS) == "used"


def test_old_ones_are_forgotten(store: Invitations, clock: Clock) -> None:
    store.create("site-a", 60)
    clock.now += 30 * DAY
    store.create("site-b", 60)
    assert [site for site, _ in states(store)] == ["site-a", "site-b"]
    clock.now += 61
    store.create("site-c", 60)
    assert [site for site, _ in states(store)] == ["site-b", "site-c"]


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "{}", '{"invitations": [{}]}', "\xff", '{"invitations": [1]}'),
        '{"invitations": [{"secret_hash": 1, "site": "a", "created": 1, "expires": 2}]}',
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "invitations.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(StorageError, match=r"invitations\.json are damaged"):
        Invitations(path)


def test_a_file_that_cannot_be_written_changes_nothing(store: Invitations) -> None:
    secret, entry = store.create("site-a", 3600)
    store._path.unlink()
    store._path.mkdir()
    with pytest.raises(CertificateError, match="cannot be written"):
        store.use(entry, KEYS)
    assert store.require(secret, "site-a", OTHER_KEYS).used_by is None


def test_threads_lose_nothing(store: Invitations) -> None:
    def invite(number: int) -> None:
        secret, entry = store.create(f"site-{number}", 3600)
        store.use(entry, f"{number:064x}")
        assert store.require(secret, f"site-{number}", f"{number:064x}") is not None

    threads = [threading.Thread(target=invite, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    again = Invitations(store._path, store._clock)
    assert sorted(states(again)) == sorted((f"site-{number}", "used") for number in range(16))
