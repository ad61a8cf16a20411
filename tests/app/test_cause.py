"""Why a site failed, in a word that both sides know."""

from typing import get_args

import pytest
from flwr.common.constant import ErrorCode

from app import cause
from app.manifest import PayloadError, Reason
from certs.errors import (
    CertificateError,
    ConfigError,
    DatasetError,
    FleetError,
    ModelError,
    RunFailedError,
    StorageError,
    ToolError,
)

WORDS = {
    DatasetError: "dataset",
    ModelError: "model",
    StorageError: "storage",
    ConfigError: "config",
    RunFailedError: "run",
    CertificateError: "certificate",
    # Not one of those that a site's work raises.
    ToolError: "unexpected",
    FleetError: "unexpected",
    ValueError: "unexpected",
}


@pytest.mark.parametrize("kind", WORDS)
def test_a_class_of_errors_has_its_word(kind: type[Exception]) -> None:
    error = kind("It went wrong.")
    assert cause.of(error) == WORDS[kind]
    assert cause.told(cause.code(error)) == WORDS[kind]


@pytest.mark.parametrize("reason", get_args(Reason.__value__))
def test_a_refused_payload_has_its_own(reason: Reason) -> None:
    error = PayloadError(reason, "It is refused.")
    assert cause.of(error) == reason
    assert cause.told(cause.code(error)) == reason


def test_codes_are_apart_from_each_other_and_from_flowers() -> None:
    flowers = [code for code in vars(ErrorCode).values() if isinstance(code, int)]
    assert len(flowers) > 5
    ours = {number for number in range(1000) if cause.told(number) != "unexpected"}
    assert not ours & set(flowers)
    assert len(ours) == len(set(cause.WORDS)) - 1
    # What no release knows, and what a hostile site may send.
    for number in (*flowers, -1, 99, 10_000, 1 << 62):
        assert cause.told(number) == "unexpected"


def test_the_codes_of_this_release_are_those_of_every_later_one() -> None:
    """A site of another release says what it says: words are only ever added."""
    known = {100: "unexpected", 101: "dataset", 104: "config", 107: "missing", 119: "finite"}
    assert {number: cause.told(number) for number in known} == known
