"""A committed round on disk: a complete SmolVLA policy directory, written in one atomic step.

``SmolVLAPolicy.from_pretrained(path, strict=True)`` and ``lerobot-eval`` open it like any policy:
the base's configuration, all tensors with the round's trainable ones put in as float32, and the
base's processors with the run's pooled statistics and the federation's camera names.

The VLM's configuration and tokenizer are not copied. A hub name stays as the base has it; where
they lie on this machine (the tiny base), the checkpoint names their absolute path.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from app import tensorfile
from app.durable import point, sync, write_json
from app.payload import Tensors
from app.policy import CAMERAS, vlm_beside
from app.tensorfile import WEIGHTS
from certs.errors import ModelError

SCHEMA = 1
FEDERATION = "federation.json"
LATEST = "latest"
_PROCESSORS = ("policy_preprocessor", "policy_postprocessor")
_NORMALISERS = ("normalizer_processor", "unnormalizer_processor")


def write_checkpoint(
    checkpoints: Path,
    number: int,
    *,
    base: Path,
    tensors: Tensors,
    normalisation: Mapping[str, Mapping[str, np.ndarray[Any, Any]]],
    federation: Mapping[str, Any],
) -> Path:
    """Write ``checkpoints/round-NNNN`` and point ``checkpoints/latest`` at it; returns its path.

    ``federation`` (round, hash of the model, base, participants) goes into ``federation.json``. A
    crash at any moment leaves either the whole directory or none.
    """
    target = checkpoints / f"round-{number:04d}"
    work = checkpoints / f".round-{number:04d}.tmp"
    checkpoints.mkdir(parents=True, exist_ok=True)
    # Left by a process that died while it wrote.
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        vlm = vlm_beside(base)
        config = _json(base / "config.json")
        if vlm:
            config["vlm_model_name"] = str(vlm)
        write_json(work / "config.json", config)
        for name in _PROCESSORS:
            _processor(base, work, name, normalisation, vlm)
        tensorfile.write(work / WEIGHTS, tensors, base=base / WEIGHTS)
        write_json(work / FEDERATION, {"schema": SCHEMA, **federation})
        sync(work)
        work.rename(target)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    sync(checkpoints)
    point(checkpoints / LATEST, target.name)
    return target


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
