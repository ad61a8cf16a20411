"""SmolVLA with its frozen part taken out: what it sees and reads becomes keys and values once, then only is looked at.

Image and language tokens attend to nothing but each other. With a frozen VLM their keys and values in every layer are
constants of the frame (:class:`Prefix`), 94 % of a training step's arithmetic. What remains of lerobot's forward pass
is the state token, whose embedding is trained, through the VLM, and the action expert: :func:`flow_losses` and
:func:`denoise` give what lerobot's do, gradients included (lerobot 0.6.1, ``lerobot.policies.smolvla``).
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own name for it)
from lerobot.policies.common.flow_matching import euler_integrate
from lerobot.policies.common.vla_utils import create_sinusoidal_pos_embedding, pad_vector
from lerobot.utils.constants import OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS
from torch import Tensor

if TYPE_CHECKING:
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy

# The wavelength that lerobot's apply_rope has as its default and that SmolVLA never changes.
_MAX_WAVELENGTH = 10_000

type _Rotation = tuple[Tensor, Tensor]
"""Cosines and sines [B, L, 1, head_dim / 2] in float32."""


@dataclass(frozen=True)
class Prefix:
    """What the expert attends to of a batch's images and task sentences, in the VLM's dtype.

    ``kv`` [B, layers, 2, P, kv_heads, head_dim]: keys after RoPE, then values; finite where ``mask`` is false, too.
    ``mask`` [B, P]: true where the token is real.
    """

    kv: Tensor
    mask: Tensor


def unfit(policy: "SmolVLAPolicy") -> str | None:
    """Why this policy's prefix is not a constant of the frame, as the end of a sentence; None where it is one."""
    if not policy.config.train_expert_only:
        return "train_expert_only is false"
    for name, parameter in policy.model.vlm_with_expert.vlm.named_parameters():
        if parameter.requires_grad:
            return f"the VLM's {name} is trained"
    return None


def embed_images(policy: "SmolVLAPolicy", batch: dict[str, Any]) -> Tensor:
    """The image tokens [B, I, hidden] of all cameras in the batch, scaled as lerobot's embed_prefix does.

    ``batch`` comes from the preprocessor. Cameras that it lacks have no tokens: lerobot's stand-ins for them are never
    attended to.
    """
    model = policy.model
    present = sum(key in batch for key in policy.config.image_features)
    found = []
    with _frozen(policy):
        images, _ = policy.prepare_images(batch)
        for image in images[:present]:
            embedded = model.vlm_with_expert.embed_image(image)
            # In the images' dtype, as lerobot rounds it; the words' scale below it does not round.
            embedded = embedded * embedded.new_full((), math.sqrt(embedded.shape[-1]))
            if model.add_image_special_tokens:
                start, end = (
                    model.vlm_with_expert.embed_language_tokens(tokens.to(image.device))
                    .to(embedded.dtype)
                    .expand(len(image), -1, -1)
                    for tokens in (model.global_image_start_token, model.image_end_token)
                )
                embedded = torch.cat((start, embedded, end), 1)
            found.append(embedded)
        return torch.cat(found, 1)


def from_embeddings(
    policy: "SmolVLAPolicy", embeddings: Tensor, tokens: Tensor, token_mask: Tensor
) -> Prefix:
    """The prefix of embedded images [B, I, hidden] and a task's tokens [B, T], of which ``token_mask`` are real."""
    vlm = policy.model.vlm_with_expert
    with _frozen(policy):
        language = vlm.embed_language_tokens(tokens)
        x = torch.cat((embeddings, language * math.sqrt(language.shape[-1])), 1)
        mask = torch.cat((token_mask.new_ones(embeddings.shape[:2]), token_mask), 1)
        text = vlm.get_vlm_model().text_model
        head_dim = text.layers[0].self_attn.head_dim
        rotation = _rotation(mask.cumsum(1) - 1, head_dim)
        kv = x.new_empty(
            (len(x), len(text.layers), 2, x.shape[1], vlm.num_key_value_heads, head_dim)
        )
        for index, layer in enumerate(text.layers):
            q, kv[:, index, 0], kv[:, index, 1] = _project(layer, x, rotation)
            # The last layer's output is read by nobody: only its keys and values are.
            if index + 1 < len(text.layers):
                # Padding attends as well, for a query without keys would give NaN; it is attended to by nobody.
                attended = _attend(q, kv[:, index, 0], kv[:, index, 1], mask[:, None, None])
                x = _finish(layer, attended, x)
        return Prefix(kv, mask)


def compute(policy: "SmolVLAPolicy", batch: dict[str, Any]) -> Prefix:
    """The prefix of a batch from the preprocessor, without the language padding that no frame of it needs."""
    mask = batch[OBS_LANGUAGE_ATTENTION_MASK]
    used = mask.any(0)
    return from_embeddings(
        policy,
        embed_images(policy, batch),
        batch[OBS_LANGUAGE_TOKENS][:, used],
        mask[:, used],
    )


def flow_losses(
    policy: "SmolVLAPolicy",
    prefix: Prefix,
    state: Tensor,
    actions: Tensor,
    noise: Tensor,
    time: Tensor,
) -> Tensor:
    """lerobot's elementwise flow-matching losses [B, chunk, max_action_dim], with their gradients.

    ``state`` [B, 6] and ``actions`` [B, chunk, 6] are normalised; ``noise`` [B, chunk, max_action_dim], ``time`` [B].
    """
    context = _with_state(policy, prefix, state)
    actions = pad_vector(actions, policy.config.max_action_dim)
    at = time[:, None, None]
    velocity = _velocity(policy, context, at * noise + (1 - at) * actions, time)
    return F.mse_loss(noise - actions, velocity, reduction="none")


@torch.no_grad()
def denoise(policy: "SmolVLAPolicy", prefix: Prefix, state: Tensor, noise: Tensor) -> Tensor:
    """The action chunks [B, chunk, 6], normalised, that lerobot's sample_actions reaches from this noise.

    ``state`` [B, 6] is normalised, ``noise`` is [B, chunk, max_action_dim].
    """
    context = _with_state(policy, prefix, state)
    actions: Tensor = euler_integrate(
        lambda x, time: _velocity(policy, context, x, time), noise, policy.config.num_steps
    )
    return actions[:, :, : policy.config.action_feature.shape[0]]


@dataclass(frozen=True)
class _Context:
    """All that the actions attend to: a prefix and its state token.

    ``layers``: keys and values [B, P + 1, kv_heads, head_dim] of each VLM layer. ``mask`` [B, P + 1].
    """

    layers: list[tuple[Tensor, Tensor]]
    mask: Tensor


def _with_state(policy: "SmolVLAPolicy", prefix: Prefix, state: Tensor) -> _Context:
    """Take the state token, whose embedding is trained, through the VLM behind the prefix."""
    decoder = policy.model.vlm_with_expert.get_vlm_model().text_model.layers
    x = policy.model.state_proj(pad_vector(state, policy.config.max_state_dim))[:, None]
    rotation = _rotation(prefix.mask.sum(1, keepdim=True), decoder[0].self_attn.head_dim)
    mask = F.pad(prefix.mask, (0, 1), value=True)
    layers = []
    for index, layer in enumerate(decoder):
        q, k, v = _project(layer, x, rotation)
        k = torch.cat((prefix.kv[:, index, 0], k), 1)
        v = torch.cat((prefix.kv[:, index, 1], v), 1)
        layers.append((k, v))
        if index + 1 < len(decoder):
            x = _finish(layer, _attend(q, k, v, mask[:, None, None]), x)
    return _Context(layers, mask)


def _velocity(policy: "SmolVLAPolicy", context: _Context, noisy: Tensor, time: Tensor) -> Tensor:
    """The expert's flow [B, chunk, max_action_dim] at ``noisy`` actions and ``time`` [B]."""
    vlm = policy.model.vlm_with_expert
    x = _embed_actions(policy.model, noisy, time)
    batch, chunk = x.shape[:2]
    head_dim = vlm.lm_expert.layers[0].self_attn.head_dim
    order = torch.arange(chunk, device=x.device)[None]
    # Actions count on from the context where they attend to themselves as well, from 0 where to the context alone.
    after = _rotation(context.mask.sum(1, keepdim=True) + order, head_dim)
    alone = _rotation(order, head_dim)
    before = context.mask[:, None, None]
    causal = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).tril()
    all_of_it = torch.cat((before.expand(-1, -1, chunk, -1), causal.expand(batch, 1, -1, -1)), 3)
    every = vlm.self_attn_every_n_layers
    _, layers = vlm.get_model_layers([vlm.get_vlm_model().text_model, vlm.lm_expert])
    for index, (layer, (known_k, known_v)) in enumerate(zip(layers, context.layers, strict=True)):
        # An expert with fewer layers than the VLM sits this one out.
        if layer is None:
            continue
        # lerobot's rule for which layers attend to the actions.
        if "cross" not in vlm.attention_mode or (every > 0 and index % every == 0):
            q, k, v = _project(layer, x, after)
            k, v = torch.cat((known_k, k), 1), torch.cat((known_v, v), 1)
            attended = _attend(q, k, v, all_of_it)
        else:
            attention = layer.self_attn
            q = _heads(attention.q_proj(_norm(layer.input_layernorm, x)), head_dim)
            k = _heads(attention.k_proj(known_k.flatten(2)), head_dim)
            v = _heads(attention.v_proj(known_v.flatten(2)), head_dim)
            attended = _attend(_rotate(q, alone), k, v, before)
        x = _finish(layer, attended, x)
    flow: Tensor = policy.model.action_out_proj(vlm.lm_expert.norm(x).float())
    return flow


def _embed_actions(model: Any, noisy: Tensor, time: Tensor) -> Tensor:
    """lerobot's embed_suffix [B, chunk, expert_hidden] without the masks that it copies to the device each time."""
    x = model.action_in_proj(noisy)
    config = model.config
    when = create_sinusoidal_pos_embedding(
        time, x.shape[-1], config.min_period, config.max_period, device=x.device
    )
    when = when.to(x.dtype)[:, None].expand_as(x)
    hidden = F.silu(model.action_time_mlp_in(torch.cat((x, when), 2)))
    embedded: Tensor = model.action_time_mlp_out(hidden)
    return embedded


def _project(layer: Any, x: Tensor, rotation: _Rotation) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys after RoPE, and values [B, L, heads, head_dim] of a decoder layer."""
    attention = layer.self_attn
    hidden = _norm(layer.input_layernorm, x)
    q, k, v = (
        _heads(projection(hidden), attention.head_dim)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    return _rotate(q, rotation), _rotate(k, rotation), v


def _finish(layer: Any, attended: Tensor, x: Tensor) -> Tensor:
    """The rest of a decoder layer behind its attention."""
    x = layer.self_attn.o_proj(attended) + x
    output: Tensor = layer.mlp(_norm(layer.post_attention_layernorm, x)) + x
    return output


def _norm(norm: Any, x: Tensor) -> Tensor:
    # Float32 scales give float32 under autocast, which each of the layers behind would cast anew.
    normed: Tensor = norm(x).to(x.dtype)
    return normed


def _heads(x: Tensor, head_dim: int) -> Tensor:
    """[B, L, heads * head_dim] as [B, L, heads, head_dim]."""
    return x.view(*x.shape[:-1], -1, head_dim)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention [B, Lq, heads * head_dim] of q [B, Lq, heads, head_dim] to k and v [B, Lk, kv_heads, head_dim]."""
    return (
        F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=mask,
            enable_gqa=True,
        )
        .transpose(1, 2)
        .flatten(2)
    )


def _rotation(positions: Tensor, head_dim: int) -> _Rotation:
    """RoPE's cosines and sines at positions [B, L], in lerobot's arithmetic (``apply_rope``), once for all layers."""
    half = torch.arange(head_dim // 2, dtype=torch.float32, device=positions.device)
    radians = positions[..., None].float() / _MAX_WAVELENGTH ** (2.0 / head_dim * half)
    radians = radians[..., None, :]
    return radians.cos(), radians.sin()


def _rotate(x: Tensor, rotation: _Rotation) -> Tensor:
    """Apply RoPE to x [B, L, heads, head_dim], in float32 as lerobot does, back in x's dtype."""
    cos, sin = rotation
    first, second = x.float().chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)


@contextmanager
def _frozen(policy: "SmolVLAPolicy") -> Iterator[None]:
    """Compute what never changes in one precision, whoever asks: training's autocast on a GPU, float32 on a CPU."""
    device = torch.device(policy.config.device)
    with (
        torch.no_grad(),
        torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"),
    ):
        yield
