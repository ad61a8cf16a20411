"""What the tests of joining share."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.joining import Fleet, joinable


@pytest.fixture
def fleet(
    tmp_path: Path, free_port: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Fleet]:
    """A federation that a site can join: its enrolment service, and a SuperLink."""
    with joinable(tmp_path, free_port, monkeypatch.setattr) as made:
        yield made
