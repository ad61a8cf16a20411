"""What is trained and crosses the wire, by name: the action expert's tensors, or low-rank adapters of them."""

from __future__ import annotations

from pathlib import Path

from app.config import RunConfig
from app.payload import Tensors
from app.policy import trainable_names
from app.tensorfile import WEIGHTS, Lazy


def initial(config: RunConfig, base: Path) -> Tensors:
    """The tensors that a run trains, as round 0 has them; the same bytes at the SuperLink and every site."""
    return Lazy(base / WEIGHTS, trainable_names(base))
