"""What a library says becomes part of a sentence, even when it says nothing."""

import pytest

from certs.errors import first_line


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError("  broken pipe.\nlong story"), "broken pipe"),
        (ValueError("cannot parse:"), "cannot parse"),
        (ConnectionError(), "ConnectionError"),
        (TimeoutError("\n"), "TimeoutError"),
    ],
)
def test_one_line(error: Exception, words: str) -> None:
    assert first_line(error) == words
