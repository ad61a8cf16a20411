"""Certificates that were issued some time ago."""

import contextlib
from collections.abc import Iterator
from datetime import datetime, timedelta, tzinfo
from unittest import mock


@contextlib.contextmanager
def ago(**span: float) -> Iterator[None]:
    """Let an authority believe that it is so much earlier (hours=1, days=8 ...)."""

    class Earlier(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]
            return datetime.now(tz) - timedelta(**span)

    with mock.patch("certs.authority.datetime", Earlier):
        yield
