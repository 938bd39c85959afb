"""The networks of one video system side by side: three text encoders, an adapter, a denoiser and a codec.

Parameters of a system are one dict keyed by the names below, which are also the folder names of an official checkpoint
(the denoiser's folder name differs between the hybrid and the monolithic release).
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nd_jax.models import causal_vae, clip, context_adapter, mmdit, t5
from nd_jax.models.causal_vae import AsymmetricVAEConfig, NativeVAEConfig
from nd_jax.models.clip import CLIPTextConfig
from nd_jax.models.context_adapter import ContextAdapterConfig
from nd_jax.models.functional import Definition, Params
from nd_jax.models.hooks import NO_HOOKS, ShardingHooks
from nd_jax.models.mmdit import MMDiTConfig
from nd_jax.models.t5 import T5Config

CLIP_1, CLIP_2, T5, ADAPTER, DENOISER, CODEC = (
    "text_encoder",
    "text_encoder_2",
    "text_encoder_3",
    "context_adapter",
    "diffusion_transformer",
    "causal_video_vae",
)
TEXT_PARTS = (CLIP_1, CLIP_2, T5, ADAPTER)


@dataclasses.dataclass(frozen=True)
class SystemConfig:
    """Shapes of the networks that a system has; ``None`` for the others.

    ``context_adapter`` is absent where the denoiser embeds the T5 states itself.
    """

    diffusion_transformer: MMDiTConfig
    causal_video_vae: AsymmetricVAEConfig | NativeVAEConfig
    text_encoder: CLIPTextConfig | None = None
    text_encoder_2: CLIPTextConfig | None = None
    text_encoder_3: T5Config | None = None
    context_adapter: ContextAdapterConfig | None = None

    def definitions(self, dtype=jnp.float32, hooks: ShardingHooks | None = None) -> dict[str, Definition]:
        """A ``Definition`` per network that this system has; ``hooks`` go to text encoders and denoiser."""
        makers = {CLIP_1: clip, CLIP_2: clip, T5: t5, ADAPTER: context_adapter, DENOISER: mmdit, CODEC: causal_vae}
        configs = {name: getattr(self, name) for name in makers}
        options = {name: {"hooks": hooks} for name in (CLIP_1, CLIP_2, T5, DENOISER)}
        return {
            name: makers[name].definition(config, dtype=dtype, **options.get(name, {}))
            for name, config in configs.items()
            if config is not None
        }


class TextTokens(NamedTuple):
    """Token ids of N prompts: T5 ids and mask [N, S], CLIP ids [N, 77 or less] for each tower; all int32."""

    t5_ids: Int[Array, "n s"]
    t5_mask: Int[Array, "n s"]
    clip_ids: Int[Array, "n c"]
    clip_2_ids: Int[Array, "n c2"]


class Conditions(NamedTuple):
    """What the denoiser reads of N prompts: states [N, S, D], their validity [N, S] (int32), pooled [N, P]."""

    text: Float[Array, "n s d"]
    mask: Int[Array, "n s"]
    pooled: Float[Array, "n p"]


def whole_kernels(params: Params, dtype: Any, hooks: ShardingHooks) -> Params:
    """A network's parameters with those kernels passed through ``hooks`` that are no part of a stack, in ``dtype``:
    matrices and convolutions."""
    if hooks.weights is None:
        return params

    def ready(path: tuple, w: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        alone = w.ndim in (2, 4, 5) and name.endswith("kernel")
        return hooks.gather(w.astype(dtype), name) if alone else w

    return jax.tree_util.tree_map_with_path(ready, params)


def encode_text(
    definitions: dict[str, Definition],
    params: Params,
    tokens: TextTokens,
    *,
    hooks: ShardingHooks = NO_HOOKS,
    dtype: Any = jnp.float32,
) -> Conditions:
    """Prompt tokens to conditions (paper, figure 2): DT5 and adapter for the sequence, both CLIP towers pooled.

    The pooled vector is the concatenation of both towers' projected states, first tower first. ``hooks`` and ``dtype``
    are those the networks were defined with.
    """
    params = {name: whole_kernels(params[name], dtype, hooks) for name in TEXT_PARTS if name in params}
    encoded = definitions[T5](params[T5], tokens.t5_ids, tokens.t5_mask)
    text = encoded.last_hidden_state if encoded.prompt_embeds is None else encoded.prompt_embeds
    if ADAPTER in definitions:
        text = definitions[ADAPTER](params[ADAPTER], text)
    first = definitions[CLIP_1](params[CLIP_1], tokens.clip_ids).text_embeds
    second = definitions[CLIP_2](params[CLIP_2], tokens.clip_2_ids).text_embeds
    return Conditions(text, tokens.t5_mask, jnp.concatenate([first, second], axis=-1))


def init_system(definitions: dict[str, Definition], key: jax.Array, parts: tuple[str, ...] | None = None) -> Params:
    """Fresh parameters for ``parts`` (default: all networks), one key each."""
    names = [name for name in definitions if parts is None or name in parts]
    return {name: definitions[name].init(jax.random.fold_in(key, index)) for index, name in enumerate(names)}
