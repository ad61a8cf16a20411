"""The trainable tensors of lerobot/smolvla_base by name and shape: what a federation of the real model sends.

``SHAPES`` is written out so that a benchmark or test needs neither torch nor the weights. ``derive`` builds the
architecture from lerobot's own classes on torch's meta device, without weights; run this file to compare the two.
"""

import contextlib
import io
import json
import math
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy

# Tensors and values that training changes, of 500 tensors and 450,046,176 values in all.
TENSORS, VALUES = 155, 99_880_992

_EXPERT = "model.vlm_with_expert.lm_expert"
_LAYERS = 16
# The expert is three quarters as wide as the VLM's 960; 15 query and 5 key heads of 64.
_WIDTH, _QUERY, _KEY, _INNER = 720, 960, 320, 2048


def _layer(number: int) -> dict[str, tuple[int, ...]]:
    # Every second layer attends to the VLM's keys and values, which are projected once more.
    source = _WIDTH if number % 2 == 0 else _KEY
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm": (_WIDTH,),
        "mlp.down_proj": (_WIDTH, _INNER),
        "mlp.gate_proj": (_INNER, _WIDTH),
        "mlp.up_proj": (_INNER, _WIDTH),
        "post_attention_layernorm": (_WIDTH,),
        "self_attn.k_proj": (_KEY, source),
        "self_attn.o_proj": (_WIDTH, _QUERY),
        "self_attn.q_proj": (_QUERY, _WIDTH),
        "self_attn.v_proj": (_KEY, source),
    }
    return {f"{_EXPERT}.layers.{number}.{name}.weight": shape for name, shape in shapes.items()}


def _linear(name: str, outputs: int, inputs: int) -> dict[str, tuple[int, ...]]:
    return {f"model.{name}.weight": (outputs, inputs), f"model.{name}.bias": (outputs,)}


# In order of name. States and actions are padded to 32 values.
SHAPES: dict[str, tuple[int, ...]] = dict(
    sorted(
        {
            **{name: shape for number in range(_LAYERS) for name, shape in _layer(number).items()},
            f"{_EXPERT}.norm.weight": (_WIDTH,),
            **_linear("state_proj", 960, 32),
            **_linear("action_in_proj", _WIDTH, 32),
            **_linear("action_out_proj", 32, _WIDTH),
            **_linear("action_time_mlp_in", _WIDTH, 2 * _WIDTH),
            **_linear("action_time_mlp_out", _WIDTH, _WIDTH),
        }.items()
    )
)


def derive() -> dict[str, tuple[int, ...]]:
    """The trainable tensors of SmolVLA as lerobot builds it over SmolVLM2-500M's configuration."""
    import torch

    from app.tiny_base import ensure_tiny_base

    with tempfile.TemporaryDirectory() as place:
        vlm = ensure_tiny_base(Path(place)).parent / "vlm"
        with torch.device("meta"):
            policy = smolvla(vlm)
    return {
        name: tuple(parameter.shape)
        for name, parameter in sorted(policy.named_parameters())
        if parameter.requires_grad
    }


def smolvla(vlm: Path) -> "SmolVLAPolicy":
    """SmolVLA in its real size on torch's default device, its values whatever they are.

    The tiny model's tokenizer and processor in ``vlm`` have no weights, and stand in for the real ones; its
    configuration is changed.
    """
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy

    from app.tiny_base import base_config

    _resize(vlm / "config.json")
    config = base_config(vlm, _LAYERS)
    with contextlib.redirect_stdout(io.StringIO()):
        return SmolVLAPolicy(config)


def real_size(models: Path) -> Path:
    """The directory of a base of the real size with random values, generated below ``models`` (2 GB) if need be."""
    import torch

    from app.tiny_base import ensure_tiny_base

    tiny, target = ensure_tiny_base(models), models / "real"
    if not target.exists():
        work = models / ".real"
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(tiny.parent, work)
        with torch.device("meta"):
            policy = smolvla(work / "vlm")
        # The real model's file holds bfloat16 too.
        policy.to(torch.bfloat16).to_empty(device="cpu")
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in policy.parameters():
                if parameter.ndim == 1:
                    parameter.fill_(1.0)
                else:
                    # Variance 1/fan-in: activations stay of order 1.
                    deviation = parameter[0].numel() ** -0.5
                    parameter.normal_(0, deviation, generator=generator)
        policy.config.vlm_model_name = str(target.resolve() / "vlm")
        policy.save_pretrained(work / "base")
        for file in (work / "base").glob("policy_*.json"):
            named = str(tiny.parent.resolve() / "vlm")
            file.write_text(file.read_text().replace(named, policy.config.vlm_model_name))
        work.rename(target)
    return target / "base"


def _resize(path: Path) -> None:
    """Give a VLM's configuration the sizes of HuggingFaceTB/SmolVLM2-500M-Video-Instruct."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config["scale_factor"] = 4
    config["text_config"] |= {
        "hidden_size": 960, "intermediate_size": 2560, "num_attention_heads": 15,
        "num_key_value_heads": 5, "head_dim": 64, "num_hidden_layers": 32, "vocab_size": 49280,
    }  # fmt: skip
    config["vision_config"] |= {
        "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12,
        "num_hidden_layers": 12, "image_size": 512, "patch_size": 16,
    }  # fmt: skip
    path.write_text(json.dumps(config), encoding="utf-8")


def main() -> None:
    """Compare the list with lerobot's architecture."""
    assert derive() == SHAPES
    assert (len(SHAPES), sum(map(math.prod, SHAPES.values()))) == (TENSORS, VALUES)
    print(f"{TENSORS} tensors, {VALUES:,} values: as lerobot builds them")


if __name__ == "__main__":
    main()
