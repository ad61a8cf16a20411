"""SmolVLA as the federation uses it: found without the hub, loaded strictly, trained in float32, sent by name.

Nothing here imports torch or lerobot before :func:`load_policy`: the ServerApp reads names and hashes from the file.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from app import hub, tensorfile
from app.dataset_meta import JOINTS
from app.tensorfile import WEIGHTS, Lazy
from app.tiny_base import ensure_tiny_base
from certs.errors import ModelError

if TYPE_CHECKING:
    import torch
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy

# Dataset camera -> policy camera. A site without a side camera gives the policy a shorter prefix.
CAMERAS = {
    "observation.images.top": "observation.images.camera1",
    "observation.images.wrist": "observation.images.camera2",
    "observation.images.side": "observation.images.camera3",
}

# With train_expert_only, lerobot freezes the whole VLM and trains everything else: 155 of SmolVLA's 500 tensors.
_FROZEN_PREFIX = "model.vlm_with_expert.vlm."
# What SmolVLA reads from its VLM when the weights come from the policy's own file: configuration, tokenizer, processor.
_VLM_FILES = ["*.json", "*.txt", "*.jinja"]
# What a policy repository holds that loading needs; checkpoints of the optimiser and videos stay on the hub.
_POLICY_FILES = ["*.json", "*.safetensors"]

type Processors = tuple[Any, Any]
"""lerobot's pre- and post-processor pipelines."""


def resolve_model(name: str, models: Path) -> Path:
    """The directory of a model: ``tiny``, a directory, ``owner/name`` (hub cache) or ``hf:owner/name`` (hub).

    Only ``hf:`` may use the network; it fetches what is missing and then also the VLM's configuration.
    Raises ModelError when the model is not there or is not SmolVLA.
    """
    if name == "tiny":
        return ensure_tiny_base(models)
    repository = name.removeprefix("hf:")
    if Path(name).is_dir():
        base = Path(name)
    elif hub.is_repository(repository):
        base = _snapshot(repository, _POLICY_FILES, online=name.startswith("hf:"))
    else:
        raise ModelError(
            f"model {name!r} is neither 'tiny', a directory on this machine, 'owner/name' in the hub cache "
            "nor 'hf:owner/name'."
        )
    _check(base)
    vlm_directory(base, online=name.startswith("hf:"))
    return base


def trainable_names(base: Path) -> list[str]:
    """The names of the tensors that cross the wire, sorted."""
    found, _ = tensorfile.entries(base / WEIGHTS)
    return sorted(name for name in found if not name.startswith(_FROZEN_PREFIX))


def frozen_hash(base: Path, *, expert: bool = False) -> str:
    """sha256 over the frozen tensors (name, dtype, shape, bytes): sites that differ here train different models.

    ``expert``: over those of the action expert too, which are as frozen where only adapters of them are trained.
    """
    path = base / WEIGHTS
    found, _ = tensorfile.entries(path)
    digest = hashlib.sha256()
    for name in sorted(found):
        if expert or name.startswith(_FROZEN_PREFIX):
            entry = found[name]
            digest.update(json.dumps([name, entry.dtype, list(entry.shape)]).encode())
            for block in tensorfile.blocks(path, entry):
                digest.update(block)
    return digest.hexdigest()


def load_policy(base: Path, device: str) -> "SmolVLAPolicy":
    """SmolVLA from ``base``, strictly and without the hub: float32 masters to train, the VLM frozen.

    Raises ModelError when the file does not hold exactly this model's tensors.
    """
    import contextlib
    import io

    import torch
    from lerobot.configs.policies import PreTrainedConfig
    from lerobot.policies.smolvla import configuration_smolvla  # noqa: F401 (registers "smolvla")
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy

    _check(base)
    config = PreTrainedConfig.from_pretrained(
        base,
        cli_overrides=[
            # The policy's file holds the VLM's weights: loading them from the VLM too would only be overwritten.
            "--load_vlm_weights=false",
            f"--vlm_model_name={vlm_directory(base, online=False)}",
            # Fixed by the wire format: the VLM stays at home, all the rest travels.
            "--train_expert_only=true",
            "--freeze_vision_encoder=true",
            "--train_state_proj=true",
            f"--device={device}",
        ],
    )
    try:
        # lerobot prints what it loads; the caller's output is not lerobot's.
        with contextlib.redirect_stdout(io.StringIO()):
            policy = SmolVLAPolicy.from_pretrained(base, config=config, strict=True)
    except RuntimeError as error:
        raise ModelError(
            f"{base / WEIGHTS} does not hold the tensors its config.json describes "
            f"({str(error).splitlines()[0]}): fetch or export the model again."
        ) from error
    # AdamW on bfloat16 weights loses most updates: float32 masters. They are read anew, for lerobot rounds what it
    # loads to bfloat16, and a checkpoint's are float32.
    frozen, masters = _frozen_dtype(device), Lazy(base / WEIGHTS, trainable_names(base))
    for name, parameter in policy.named_parameters():
        if parameter.requires_grad:
            parameter.data = torch.tensor(masters[name], device=parameter.device)
        else:
            parameter.data = parameter.data.to(frozen)
    return policy


def trainable_tensors(policy: "SmolVLAPolicy") -> "dict[str, torch.Tensor]":
    """The live trainable parameters by name, sorted by name."""
    return {
        name: parameter
        for name, parameter in sorted(policy.named_parameters(), key=lambda item: item[0])
        if parameter.requires_grad
    }


def load_processors(
    base: Path, policy: "SmolVLAPolicy", normalisation: Mapping[str, Mapping[str, NDArray[Any]]]
) -> Processors:
    """The base's own pre- and post-processor with the run's pooled mean and std put in."""
    import torch
    from lerobot.policies.factory import make_pre_post_processors

    statistics = {
        key: {
            name: torch.from_numpy(np.array(values, np.float32)) for name, values in moments.items()
        }
        for key, moments in normalisation.items()
    }
    config = policy.config
    mapping = config.normalization_mapping
    pre, post = make_pre_post_processors(
        config,
        pretrained_path=str(base),
        preprocessor_overrides={
            "rename_observations_processor": {"rename_map": CAMERAS},
            # The name baked into the file is the hub's.
            "tokenizer_processor": {"tokenizer_name": config.vlm_model_name},
            "device_processor": {"device": config.device},
            "normalizer_processor": {
                "features": {**config.input_features, **config.output_features},
                "norm_map": mapping,
                "stats": statistics,
            },
        },
        postprocessor_overrides={
            "unnormalizer_processor": {
                "features": config.output_features,
                "norm_map": mapping,
                "stats": statistics,
            },
        },
    )
    return pre, post


def _frozen_dtype(device: str) -> "torch.dtype":
    """The stored bfloat16 values, computed with in bfloat16 on a GPU and in float32 on a CPU.

    Measured on the tiny model: without bfloat16 instructions a CPU's forward pass takes 2.3 times as long in bfloat16,
    with them 1.2 times; and its loss is 0.8 % off, where float32 agrees to 2e-7 between CPUs and batch sizes.
    """
    import torch

    return torch.float32 if device == "cpu" else torch.bfloat16


def _snapshot(repository: str, patterns: list[str], *, online: bool) -> Path:
    """The cached snapshot of a hub repository; ``online`` first fetches what is missing."""
    try:
        return hub.snapshot(repository, patterns, kind="model", online=online)
    except hub.NotInReachError as error:
        if online:
            raise ModelError(
                f"model 'hf:{repository}' could not be fetched from the hub ({error}): "
                "check the name, the network, and HF_TOKEN if it is private."
            ) from error
        raise ModelError(
            f"model {repository!r} is neither a directory nor in this machine's hub cache: "
            f"give its path, or 'hf:{repository}' to fetch it."
        ) from error


def vlm_beside(base: Path) -> Path | None:
    """The VLM's directory beside ``base``, as the tiny base has it; None where there is none."""
    beside = base.parent / "vlm"
    return beside.resolve() if (beside / "config.json").is_file() else None


def vlm_directory(base: Path, *, online: bool) -> Path:
    """The directory with the VLM's configuration and processor: beside the base, as config.json says, or cached."""
    if beside := vlm_beside(base):
        return beside
    name = str(_config(base).get("vlm_model_name"))
    if Path(name).is_dir():
        return Path(name)
    if not hub.is_repository(name):
        raise ModelError(
            f"{base / 'config.json'} names the VLM {name!r}, which is not on this machine: "
            f"put its configuration and tokenizer into {base.parent / 'vlm'}."
        )
    return _snapshot(name, _VLM_FILES, online=online)


def _check(base: Path) -> None:
    """Refuse what is not SmolVLA for six joints and the federation's cameras."""
    config = _config(base)
    if config.get("type") != "smolvla":
        raise ModelError(
            f"{base / 'config.json'} describes a {config.get('type')!r} policy: the federation trains 'smolvla'."
        )
    inputs, outputs = config.get("input_features") or {}, config.get("output_features") or {}
    for key, features in (("observation.state", inputs), ("action", outputs)):
        shape = (features.get(key) or {}).get("shape")
        if shape != [len(JOINTS)]:
            raise ModelError(
                f"{base / 'config.json'} gives {key} the shape {shape}: "
                f"the federation's arms have {len(JOINTS)} joints."
            )
    missing = [camera for camera in list(CAMERAS.values())[:2] if camera not in inputs]
    if missing:
        raise ModelError(
            f"{base / 'config.json'} has no {' and no '.join(missing)}: "
            "the federation feeds the top camera to camera1 and the wrist camera to camera2."
        )
    tensorfile.entries(base / WEIGHTS)


def _config(base: Path) -> dict[str, Any]:
    path = base / "config.json"
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise ModelError(
            f"{base} holds no config.json: give the directory of a saved SmolVLA policy."
        ) from None
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{path} cannot be read ({error}): fetch or export the model again."
        ) from error
    if not isinstance(config, dict):
        raise ModelError(f"{path} is not a JSON object: fetch or export the model again.")
    return config
