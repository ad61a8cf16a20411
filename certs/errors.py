"""Errors an operator can act on: one sentence and one exit code per class.

The codes are documented in ``docs/exit-codes.md``; a test keeps the two in step. They start at 10 so that they
never collide with 1 (a crash) and 2 (wrong usage, from the command line parser).
"""


def first_line(error: Exception) -> str:
    """Return what a library's exception says, cut to one line for a sentence of ours; its class if it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")


class FleetError(Exception):
    """A failure whose message says what was wrong, where, and what to do."""

    exit_code = 1


class CertificateError(FleetError):
    """A certificate, key or revocation list is missing, unreadable, expired or for another purpose."""

    exit_code = 10


class UnknownSiteError(FleetError):
    """A site was named that the federation does not know."""

    exit_code = 11


class DatasetError(FleetError):
    """A dataset is missing, is not LeRobot v3.0, or breaks the federation's contract."""

    exit_code = 12


class AddressError(FleetError):
    """An address cannot be listened on: it is malformed or already in use."""

    exit_code = 13


class ToolError(FleetError):
    """A program the command needs (Docker, Python 3.12, an OpenGL library) is missing."""

    exit_code = 14


class ConnectionRefusedByFleetError(FleetError):
    """The SuperLink cannot be reached, or refuses this certificate."""

    exit_code = 15


class RunFailedError(FleetError):
    """A run ended without the rounds it was asked for."""

    exit_code = 16


class ConfigError(FleetError):
    """A configuration key is unknown, unused, or has a value of the wrong type or range."""

    exit_code = 17


class ModelError(FleetError):
    """A model is missing, incomplete, or not the model the federation trains."""

    exit_code = 18


class StorageError(FleetError):
    """A directory that must hold state or results cannot be written."""

    exit_code = 19


class InvitationError(FleetError):
    """An invitation is damaged, expired, used, cancelled, or of another federation."""

    exit_code = 20


class ClockError(FleetError):
    """This machine's clock is too far from the SuperLink's."""

    exit_code = 21


class HardwareError(FleetError):
    """The GPU, its driver or its memory does not suffice for what is asked of the site."""

    exit_code = 22
