"""Fixtures on real parts: the tiny SmolVLA, a LeRobot v3.0 dataset from lerobot's own recorder, a hub on loopback."""

import atexit
import io
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from app.dataset import SiteDataset, open_dataset
from certs import logs
from tests.hub import Hub, serving
from tests.recorder import record

# Before anything imports torch or huggingface_hub: one thread (tiny models get slower with more), no hub, own caches.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="vlafleet-test-hf-")
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models directory that holds the tiny base."""
    from app.tiny_base import ensure_tiny_base

    folder = tmp_path_factory.mktemp("models")
    ensure_tiny_base(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_base(models: Path) -> Path:
    return models / "tiny" / "base"


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four episodes of 30, 35, 40 and 45 frames."""
    return record(tmp_path_factory.mktemp("data") / "site")


@pytest.fixture(scope="module")
def dataset(tiny_dataset: Path) -> SiteDataset:
    """It, with one episode held out."""
    return open_dataset(str(tiny_dataset), held_out=0.25, seed=0)


@pytest.fixture(scope="module")
def policy(tiny_base: Path) -> Any:
    """The tiny SmolVLA, for tests that do not train it."""
    from app.policy import load_policy

    return load_policy(tiny_base, "cpu")


@pytest.fixture(scope="module")
def processors(tiny_base: Path, policy: Any, dataset: SiteDataset) -> Any:
    """Its pre- and post-processor, with the dataset's statistics."""
    from app.policy import load_processors
    from app.statistics import moments_of, normalisation

    return load_processors(tiny_base, policy, normalisation(moments_of(dataset)))


@pytest.fixture
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    with serving(tmp_path_factory.mktemp("hub")) as server:
        yield server


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], list[dict[str, Any]]]]:
    """The lines that Flower's logger has written as JSON so far."""
    monkeypatch.setattr(logs, "_bound", {})
    logger, written = logging.getLogger("flwr"), io.StringIO()
    handler = logging.StreamHandler(written)
    handler.setFormatter(logs._Json())
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield lambda: [json.loads(line) for line in written.getvalue().splitlines()]
    logger.removeHandler(handler)
    logger.setLevel(level)
