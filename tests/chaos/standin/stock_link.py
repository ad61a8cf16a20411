"""A link that nobody measures: Flower's own chunk size and concurrency, whatever the link."""

from types import SimpleNamespace


def settle(*_: object) -> tuple[None, SimpleNamespace]:
    """Return Flower's defaults."""
    return None, SimpleNamespace(chunk_bytes=5 << 20, concurrency=2)
