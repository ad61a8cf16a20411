"""A loader for tests, with its prefixes in memory."""

from pathlib import Path
from typing import Any

from app.frames import Frames
from app.loader import Loader


def loader_of(
    policy: Any, processors: Any, frames: Frames, folder: Path, augment: Any = None
) -> Loader:
    """A loader of all ``frames``; where they are augmented nothing can be kept."""
    from app.prefix_cache import PrefixCache

    cache = PrefixCache.open(
        policy,
        processors,
        frames,
        range(len(frames)),
        choice="memory",
        # Part of a file's key; nothing goes to a file here.
        frozen="",
        folder=folder,
        augment=augment,
        progress=lambda *_: None,
    )
    return Loader(policy, processors, frames, cache)
