"""The health probe's file: this process's contact, in a directory of its own."""

import tempfile
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import pytest

from certs.contact import contact_file, recorder, seconds_since_contact
from certs.errors import StorageError
from certs.roles import Peer, Role

NOW = datetime.now(UTC)
PEER = Peer("lab", Role.SITE, "site-a", 1, not_before=NOW, not_after=NOW)


@pytest.fixture(autouse=True)
def own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def test_only_answers_that_were_not_refused_count() -> None:
    note = recorder(PEER)
    assert seconds_since_contact(PEER) is None
    note(SimpleNamespace(is_success=False))
    assert seconds_since_contact(PEER) is None
    note(SimpleNamespace(is_success=True))
    since = seconds_since_contact(PEER)
    assert since is not None
    assert since < 60


def test_a_new_process_starts_without_the_last_ones_contact() -> None:
    recorder(PEER)(SimpleNamespace(is_success=True))
    assert seconds_since_contact(PEER) is not None
    recorder(PEER)
    assert seconds_since_contact(PEER) is None


def test_a_planted_link_is_not_followed(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    contact_file(PEER).parent.symlink_to(elsewhere)
    with pytest.raises(StorageError, match="belongs to somebody else"):
        recorder(PEER)
    assert list(elsewhere.iterdir()) == []
