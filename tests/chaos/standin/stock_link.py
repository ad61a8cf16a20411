"""A link that nobody measures: Flower's own chunk size and concurrency, whatever the link."""

from types import SimpleNamespace


def settle(*_: object) -> SimpleNamespace:
    """Return Flower's defaults."""
    return SimpleNamespace(chunk_bytes=5 << 20, concurrency=2)
