"""A tiny stand-in for lerobot/smolvla_base: the same classes and files, a few hundred thousand weights, made offline.

Laptops, tests and the demo train it through exactly the code that trains the real model. ``vlm/`` plays the part of
``HuggingFaceTB/SmolVLM2-500M-Video-Instruct`` and ``base/`` the part of ``lerobot/smolvla_base``.
"""

import contextlib
import fcntl
import hashlib
import io
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
    from transformers import PreTrainedTokenizerFast

# The weights of every site must be the same bytes, so the seed is part of the model, not a setting.
_SEED = 0

# 64x64 pixels in 16x16 patches, pixel-shuffled by 2: 4 tokens a camera where the real model has 64.
_IMAGE = 64
_PATCH = 16
_SHUFFLE = 2
# Four layers hold two self-attention and two cross-attention layers of the expert, as the real model alternates them.
_LAYERS = 4

# SmolVLM's special tokens: start, end (which also pads), unknown; and those its processor asks for by name.
_CONTROLS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
_TOKENS = {
    "image_token": "<image>",
    "fake_image_token": "<fake_token_around_image>",
    "global_image_token": "<global-img>",
    "end_of_utterance_token": "<end_of_utterance>",
}
# Task sentences must fit the policy's 48 tokens: a few merges over such words keep them under it.
_CORPUS = (
    "Pick up the cube and place it in the box.\n",
    "Grasp the brick and put it in the bin.\n",
)
_VOCABULARY = 384


def ensure_tiny_base(models: Path) -> Path:
    """Generate ``models/tiny/{vlm,base}`` if it is not there, and return ``models/tiny/base``.

    Safe under concurrent callers: one generates under a lock, the directory appears in one rename.
    """
    target = models / "tiny"
    base = target / "base"
    if base.is_dir():
        return base
    models.mkdir(parents=True, exist_ok=True)
    with (models / ".tiny.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not base.is_dir():
            work = Path(tempfile.mkdtemp(prefix=".tiny-", dir=models))
            try:
                _generate(work, target.resolve())
                # mkdtemp and safetensors write for their owner alone; a site's containers run under other users.
                for path in (work, *work.rglob("*")):
                    path.chmod(0o755 if path.is_dir() else 0o644)
                work.rename(target)
            finally:
                shutil.rmtree(work, ignore_errors=True)
    return base


def _generate(work: Path, target: Path) -> None:
    """Write ``work/{vlm,base}`` such that every path inside names ``target``, where it will stand."""
    import torch
    from lerobot.policies.factory import make_pre_post_processors
    from safetensors.torch import save_model

    # lerobot prints what it loads; the caller's output is not lerobot's.
    with contextlib.redirect_stdout(io.StringIO()), torch.random.fork_rng(devices=[]):
        policy = _policy(_save_vlm(work / "vlm"))
        # The file of the real model holds bfloat16 too.
        policy.to(torch.bfloat16)
        _fill(policy)
        # Neutral statistics: a run puts its pooled ones in.
        neutral = {"mean": torch.zeros(6), "std": torch.ones(6)}
        pre, post = make_pre_post_processors(
            policy.config, dataset_stats={"observation.state": neutral, "action": neutral}
        )

    vlm = str(target / "vlm")
    policy.config.vlm_model_name = vlm
    for step in pre.steps:
        if hasattr(step, "tokenizer_name"):
            step.tokenizer_name = vlm
    # transformers reads "format" to know which library wrote the file.
    save_model(
        policy.model.vlm_with_expert.vlm,
        str(work / "vlm" / "model.safetensors"),
        metadata={"format": "pt"},
    )
    for part in (policy, pre, post):
        part.save_pretrained(work / "base")


def _tokenizer() -> "PreTrainedTokenizerFast":
    """A byte-level BPE tokenizer with SmolVLM's special tokens; training it has no random part."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GPT2TokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        special_tokens=[*_CONTROLS, *_TOKENS.values()],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # BPE merges only pairs it has seen at least twice.
    tokenizer.train_from_iterator(_CORPUS * 2, trainer)
    start, end, unknown = _CONTROLS
    return GPT2TokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=start,
        eos_token=end,
        pad_token=end,
        unk_token=unknown,
        extra_special_tokens=_TOKENS,
        model_max_length=8192,
    )


def _save_vlm(folder: Path) -> Path:
    """Write the configuration, tokenizer and processor that SmolVLA builds its VLM from."""
    from transformers import (
        SmolVLMConfig,
        SmolVLMImageProcessor,
        SmolVLMProcessor,
        SmolVLMVideoProcessor,
    )

    tokenizer = _tokenizer()
    config = SmolVLMConfig(
        text_config={
            "model_type": "llama",
            "hidden_size": 64,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "intermediate_size": 128,
            "num_hidden_layers": _LAYERS,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "dtype": "bfloat16",
        },
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": _IMAGE,
            "patch_size": _PATCH,
            "dtype": "bfloat16",
        },
        scale_factor=_SHUFFLE,
        image_token_id=tokenizer.convert_tokens_to_ids(_TOKENS["image_token"]),
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    config.architectures = ["SmolVLMForConditionalGeneration"]
    size = {"longest_edge": _IMAGE}
    SmolVLMProcessor(
        image_processor=SmolVLMImageProcessor(size=size, max_image_size=size),
        tokenizer=tokenizer,
        video_processor=SmolVLMVideoProcessor(),
        image_seq_len=(_IMAGE // _PATCH // _SHUFFLE) ** 2,
    ).save_pretrained(folder)
    config.save_pretrained(folder)
    return folder


def base_config(vlm: Path, layers: int, **settings: Any) -> "SmolVLAConfig":
    """The features and switches of lerobot/smolvla_base over the VLM in ``vlm``, of which it uses ``layers``."""
    from lerobot.configs import FeatureType, PolicyFeature
    from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig

    cameras = {
        f"observation.images.camera{number}": PolicyFeature(FeatureType.VISUAL, (3, 256, 256))
        for number in (1, 2, 3)
    }
    return SmolVLAConfig(
        vlm_model_name=str(vlm),
        load_vlm_weights=False,
        num_vlm_layers=layers,
        num_expert_layers=0,
        prefix_length=0,
        pad_language_to="max_length",
        input_features={"observation.state": PolicyFeature(FeatureType.STATE, (6,)), **cameras},
        output_features={"action": PolicyFeature(FeatureType.ACTION, (6,))},
        device="cpu",
        push_to_hub=False,
        **settings,
    )


def _policy(vlm: Path) -> Any:
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy

    config = base_config(vlm, _LAYERS, resize_imgs_with_padding=(_IMAGE, _IMAGE))
    policy = SmolVLAPolicy(config)
    # As the real base says: its VLM directory holds weights.
    config.load_vlm_weights = True
    return policy


def _fill(policy: Any) -> None:
    """Give every tensor its initial values, the same bytes on every machine.

    torch's normal sampler differs in the last bits between instruction sets; a uniform draw is an exact function of
    the random integers. Each tensor has its own stream, named by the tensor, so the order does not matter.
    """
    import torch

    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            parameter.copy_(_initial(name, parameter))


def _initial(name: str, parameter: "torch.Tensor") -> "torch.Tensor":
    """Norm scales 1, biases 0, weights and embeddings uniform with variance 1/fan-in (LeCun et al. 1998)."""
    import numpy as np
    import torch

    if parameter.ndim == 1:
        return torch.full_like(parameter, 0.0 if name.endswith("bias") else 1.0)
    digest = hashlib.sha256(f"{_SEED}/{name}".encode()).digest()
    uniform = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:8], "little"))).random(
        parameter.shape, dtype=np.float32
    )
    fan_in = parameter[0].numel()
    # A uniform variable on [-a, a] has variance a^2/3.
    return torch.from_numpy((uniform * 2 - 1) * np.float32((3 / fan_in) ** 0.5))
