"""A committed round on disk: a complete SmolVLA policy directory, written in one atomic step.

``SmolVLAPolicy.from_pretrained(path, strict=True)`` and ``lerobot-eval`` open it like any policy:
the base's configuration, all tensors with the round's trainable ones put in as float32, and the
base's processors with the run's pooled statistics and the federation's camera names. With
exchange=lora the tensors are the base's with the round's adapters merged in, and the adapters
themselves, from which a run is resumed, lie beside them in ``adapters.safetensors``.

Beside the policy lies what the next round needs: ``federation.json``, the server optimiser's state,
and the broadcast that leads here from the round before. The latter two are as large as the model
and are kept in the newest checkpoint alone.

The VLM's configuration and tokenizer are not copied. A hub name stays as the base has it; where
they lie on this machine (the tiny base), the checkpoint names their absolute path.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from app import tensorfile, trainables
from app.durable import point, sync, write_json
from app.payload import Payload, Tensors, canonical_hash
from app.policy import CAMERAS, vlm_beside
from app.tensorfile import WEIGHTS, Lazy, Writer
from certs.errors import ModelError, StorageError

SCHEMA = 1
FEDERATION = "federation.json"
# The server's own state, and the payload that turns the round before into this one.
SERVER = "server.safetensors"
UPDATE = "update.payload"
LATEST = "latest"
BEST = "best"
_PROCESSORS = ("policy_preprocessor", "policy_postprocessor")
_NORMALISERS = ("normalizer_processor", "unnormalizer_processor")


class Checkpoint:
    """A round's directory under construction; it gets its name in :meth:`finish`.

    A crash at any moment leaves either the whole directory or none. ``shapes`` are those of the
    trainable tensors, ``states`` names the server's tensors of each of them; ``exchange`` is the
    run config's.
    """

    def __init__(
        self,
        checkpoints: Path,
        number: int,
        *,
        base: Path,
        shapes: Mapping[str, tuple[int, ...]],
        states: Sequence[str],
        normalisation: Mapping[str, Mapping[str, np.ndarray[Any, Any]]],
        exchange: str = "expert",
    ) -> None:
        self._base, self._shapes = base, dict(shapes)
        self._target = round_directory(checkpoints, number)
        self._work = checkpoints / f".{self._target.name}.tmp"
        checkpoints.mkdir(parents=True, exist_ok=True)
        # Left by a process that died while it wrote.
        shutil.rmtree(self._work, ignore_errors=True)
        self._work.mkdir()
        try:
            vlm = vlm_beside(base)
            config = _json(base / "config.json")
            if vlm:
                config["vlm_model_name"] = str(vlm)
            write_json(self._work / "config.json", config)
            for name in _PROCESSORS:
                _processor(base, self._work, name, normalisation, vlm)
            adapted = trainables.merged_shapes(base) if exchange == "lora" else shapes
            self._weights = Writer(self._work / WEIGHTS, adapted, base=base / WEIGHTS)
            self._file = self._work / trainables.FILES[exchange]
            self._trained = Writer(self._file, shapes) if exchange == "lora" else self._weights
            server = {
                f"{state}.{name}": shape for state in states for name, shape in shapes.items()
            }
            self._server = Writer(self._work / SERVER, server) if server else None
        except BaseException:
            shutil.rmtree(self._work, ignore_errors=True)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        shutil.rmtree(self._work, ignore_errors=True)

    def put(self, name: str, value: np.ndarray[Any, np.dtype[np.float32]], **states: Any) -> None:
        """Write a trainable tensor and the server's state of it."""
        self._trained.put(name, value)
        if self._server:
            for state, array in states.items():
                self._server.put(f"{state}.{name}", array)

    def finish(self, federation: Mapping[str, Any], update: Callable[[str], Payload] | None) -> str:
        """Give the directory its name, point ``latest`` at it; returns the model's canonical hash.

        ``federation`` (round, base, participants) goes into ``federation.json`` with the hash;
        ``update`` makes, from that hash, the broadcast that leads here from the round before.
        """
        self._trained.close()
        trained = Lazy(self._file, self._shapes)
        if self._trained is not self._weights:
            for name, value in trainables.merged(self._base, trained):
                self._weights.put(name, value)
            self._weights.close()
        if self._server:
            self._server.close()
        model = canonical_hash(trained)
        if update:
            update(model).write(self._work / UPDATE)
        write_json(self._work / FEDERATION, {"schema": SCHEMA, **federation, "model": model})
        sync(self._work)
        checkpoints = self._target.parent
        self._work.rename(self._target)
        sync(checkpoints)
        point(checkpoints / LATEST, self._target.name)
        for other in checkpoints.glob("round-*"):
            if other != self._target:
                for name in (SERVER, UPDATE):
                    (other / name).unlink(missing_ok=True)
        return model


def round_directory(checkpoints: Path, number: int) -> Path:
    """Where a round's checkpoint lies."""
    return checkpoints / f"round-{number:04d}"


def newest(checkpoints: Path) -> Path | None:
    """The checkpoint of the highest round; ``latest`` is set anew, should a crash have prevented it."""
    found = max(checkpoints.glob("round-[0-9]*"), key=lambda path: int(path.name[6:]), default=None)
    if found:
        point(checkpoints / LATEST, found.name)
    return found


def read_federation(checkpoint: Path) -> dict[str, Any]:
    """The ``federation.json`` of a checkpoint; ``StorageError`` when it cannot be used."""
    path = checkpoint / FEDERATION
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if content["schema"] != SCHEMA:
            raise ValueError(f"version {content['schema']}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StorageError(
            f"{path} cannot be read ({error}): restore the run's directory, or start a new run."
        ) from error
    return content


def _processor(
    base: Path,
    work: Path,
    name: str,
    normalisation: Mapping[str, Mapping[str, np.ndarray[Any, Any]]],
    vlm: Path | None,
) -> None:
    pipeline = _json(base / f"{name}.json")
    statistics: Tensors = {
        f"{feature}.{kind}": np.asarray(values, np.float32)
        for feature, kinds in normalisation.items()
        for kind, values in kinds.items()
    }
    try:
        for index, step in enumerate(pipeline["steps"]):
            kind, settings = step["registry_name"], step.setdefault("config", {})
            if kind == "rename_observations_processor":
                settings["rename_map"] = CAMERAS
            elif kind == "tokenizer_processor" and vlm:
                settings["tokenizer_name"] = str(vlm)
            elif kind in _NORMALISERS:
                state = step.get("state_file")
                source = base / state if state else None
                step["state_file"] = state or f"{name}_step_{index}_{kind}.safetensors"
                # The base's other statistics of these features (min, max) are not this run's.
                stale = [
                    key
                    for key in (tensorfile.entries(source)[0] if source else {})
                    if key.rsplit(".", 1)[0] in normalisation
                ]
                tensorfile.write(work / step["state_file"], statistics, base=source, drop=stale)
            elif "state_file" in step:
                shutil.copyfile(base / step["state_file"], work / step["state_file"])
    except (KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{base / name}.json is not a processor pipeline ({type(error).__name__}: {error}): "
            "fetch or export the model again."
        ) from error
    write_json(work / f"{name}.json", pipeline)


def _json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{path} cannot be read ({error}): fetch or export the model again."
        ) from error
    return content
