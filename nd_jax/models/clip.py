"""CLIP text tower (Radford et al. 2021): pooled and per-token states, with or without the final projection."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from nd_jax.errors import UserError
from nd_jax.models.activations import ACTIVATIONS, check_activation
from nd_jax.models.functional import Definition
from nd_jax.models.hooks import NO_HOOKS, ShardingHooks
from nd_jax.models.stacked import scan_stack, stack

LEGACY_EOS = 2  # in the published configs; the tokenizers' real end-of-text id is the largest in the vocabulary


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig:
    """Shape of a CLIP text tower, under the names of transformers' config.json.

    ``with_projection`` distinguishes CLIPTextModelWithProjection (which has ``text_projection``) from CLIPTextModel.
    """

    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    projection_dim: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    bos_token_id: int = 0
    eos_token_id: int = LEGACY_EOS
    pad_token_id: int = 1
    with_projection: bool = True

    def __post_init__(self):
        check_activation("hidden_act", self.hidden_act)
        if self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"config key 'hidden_size' is {self.hidden_size}; "
                f"expected a multiple of 'num_attention_heads', {self.num_attention_heads}"
            )

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], *, with_projection: bool | None = None) -> CLIPTextConfig:
        """Read the official config.json; ``with_projection=None`` asks its ``architectures`` (default: with).

        Raises:
            UserError: for values that are not supported.
        """
        known = {field.name: config[field.name] for field in dataclasses.fields(cls) if field.name in config}
        if with_projection is None:
            with_projection = list(config.get("architectures") or []) != ["CLIPTextModel"]
        return cls(**known | {"with_projection": with_projection})

    def to_dict(self) -> dict[str, Any]:
        """Content of the official config.json."""
        values = dataclasses.asdict(self)
        del values["with_projection"]
        values |= {
            "architectures": ["CLIPTextModelWithProjection" if self.with_projection else "CLIPTextModel"],
            "attention_dropout": 0.0,
            "initializer_factor": 1.0,
            "initializer_range": 0.02,
            "model_type": "clip_text_model",
        }
        return dict(sorted(values.items()))


def clip_l() -> CLIPTextConfig:
    """CLIP-L: 123,650,304 parameters with its projection."""
    return CLIPTextConfig()


def clip_bigg() -> CLIPTextConfig:
    """OpenCLIP bigG: 694,659,840 parameters with its projection."""
    return CLIPTextConfig(
        hidden_size=1280,
        intermediate_size=5120,
        projection_dim=1280,
        num_hidden_layers=32,
        num_attention_heads=20,
        hidden_act="gelu",
    )


class CLIPTextOutput(NamedTuple):
    """What the tower offers; B prompts, S tokens, D hidden size, P projection size.

    ``last_hidden_state`` [B, S, D] after the final norm; ``penultimate_hidden_state`` [B, S, D] as SDXL reads it
    (output of the last-but-one layer, no norm); ``pooled_output`` [B, D]; ``pooled_position`` int32 [B];
    ``text_embeds`` [B, P] or ``None`` without projection; ``hidden_states`` [layers + 1, B, S, D] (embeddings first,
    no final norm), only if asked for.
    """

    last_hidden_state: jax.Array
    penultimate_hidden_state: jax.Array
    pooled_output: jax.Array
    pooled_position: jax.Array
    text_embeds: jax.Array | None
    hidden_states: jax.Array | None


def pooled_position(input_ids: Int[Array, "b s"], eos_token_id: int) -> Int[Array, " b"]:
    """Where the pooled state is read: the first position of ``eos_token_id``, or, for the legacy id 2 of the
    published configs, the first position of the row's largest id. They differ when added tokens lie above eos."""
    if eos_token_id == LEGACY_EOS:
        return jnp.argmax(input_ids, axis=-1)
    return jnp.argmax(input_ids == eos_token_id, axis=-1)


def _linear(width_in: int, width_out: int, std: float, dtype: Any, rngs: nnx.Rngs, bias: bool = True) -> nnx.Linear:
    kernel_init = jax.nn.initializers.normal(std)
    return nnx.Linear(width_in, width_out, use_bias=bias, kernel_init=kernel_init, dtype=dtype, rngs=rngs)


def _layer_norm(config: CLIPTextConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
    # The fast variance E[x^2] - E[x]^2 loses digits that golden parity needs.
    return nnx.LayerNorm(
        config.hidden_size, epsilon=config.layer_norm_eps, use_fast_variance=False, dtype=jnp.float32, rngs=rngs
    )


class CLIPAttention(nnx.Module):
    """Multi-head self attention under a boolean mask; softmax in float32."""

    def __init__(self, config: CLIPTextConfig, dtype: Any, rngs: nnx.Rngs):
        width = config.hidden_size
        std = (2 * width * config.num_hidden_layers) ** -0.5
        self.q_proj, self.k_proj, self.v_proj = (_linear(width, width, std, dtype, rngs) for _ in range(3))
        self.out_proj = _linear(width, width, width**-0.5, dtype, rngs)
        self.heads = config.num_attention_heads

    def __call__(self, x: Float[Array, "b s d"], mask: Array) -> Float[Array, "b s d"]:
        query, key, value = (
            layer(x).reshape(*x.shape[:2], self.heads, -1) for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        query = query * query.shape[-1] ** -0.5
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32)
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
        return self.out_proj(jnp.einsum("bhqk,bkhd->bqhd", weights, value).reshape(x.shape))


class CLIPMLP(nnx.Module):
    """Two linear layers around the activation."""

    def __init__(self, config: CLIPTextConfig, dtype: Any, rngs: nnx.Rngs):
        width, inner = config.hidden_size, config.intermediate_size
        self.fc1 = _linear(width, inner, (2 * width) ** -0.5, dtype, rngs)
        self.fc2 = _linear(inner, width, (2 * width * config.num_hidden_layers) ** -0.5, dtype, rngs)
        self.activation = ACTIVATIONS[config.hidden_act]

    def __call__(self, x: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
        return self.fc2(self.activation(self.fc1(x)))


class CLIPLayer(nnx.Module):
    """Pre-norm residual attention and MLP."""

    def __init__(self, config: CLIPTextConfig, dtype: Any, rngs: nnx.Rngs):
        self.self_attn = CLIPAttention(config, dtype, rngs)
        self.layer_norm1 = _layer_norm(config, rngs)
        self.mlp = CLIPMLP(config, dtype, rngs)
        self.layer_norm2 = _layer_norm(config, rngs)
        self.dtype = dtype

    def __call__(self, x: Float[Array, "b s d"], mask: Array) -> Float[Array, "b s d"]:
        x = x + self.self_attn(self.layer_norm1(x).astype(self.dtype), mask)
        return x + self.mlp(self.layer_norm2(x).astype(self.dtype))


class CLIPEmbeddings(nnx.Module):
    """Token plus learned absolute position embedding."""

    def __init__(self, config: CLIPTextConfig, dtype: Any, rngs: nnx.Rngs):
        init = jax.nn.initializers.normal(0.02)
        self.token_embedding = nnx.Embed(
            config.vocab_size, config.hidden_size, embedding_init=init, dtype=dtype, rngs=rngs
        )
        self.position_embedding = nnx.Embed(
            config.max_position_embeddings, config.hidden_size, embedding_init=init, dtype=dtype, rngs=rngs
        )

    def __call__(self, input_ids: Int[Array, "b s"]) -> Float[Array, "b s d"]:
        return self.token_embedding(input_ids) + self.position_embedding(jnp.arange(input_ids.shape[1]))


class CLIPEncoder(nnx.Module):
    """The layers, stacked on a layer axis."""

    def __init__(self, config: CLIPTextConfig, dtype: Any, rngs: nnx.Rngs):
        self.layers = stack(lambda keys: CLIPLayer(config, dtype, keys), config.num_hidden_layers, rngs)


class CLIPTextTransformer(nnx.Module):
    """Embeddings, layers and final norm."""

    def __init__(self, config: CLIPTextConfig, dtype: Any, rngs: nnx.Rngs):
        self.embeddings = CLIPEmbeddings(config, dtype, rngs)
        self.encoder = CLIPEncoder(config, dtype, rngs)
        self.final_layer_norm = _layer_norm(config, rngs)


class CLIPText(nnx.Module):
    """``clip(input_ids, attention_mask)``: token ids [B, S] to a ``CLIPTextOutput``.

    The causal mask always applies; ``attention_mask`` [B, S] (1 = may be read) additionally hides padding, which the
    pipelines do not do.
    """

    def __init__(
        self, config: CLIPTextConfig, *, dtype: Any = jnp.float32, hooks: ShardingHooks = NO_HOOKS, rngs: nnx.Rngs
    ):
        self.config, self.dtype, self.hooks = config, dtype, hooks
        self.text_model = CLIPTextTransformer(config, dtype, rngs)
        if config.with_projection:
            std = config.hidden_size**-0.5
            self.text_projection = _linear(config.hidden_size, config.projection_dim, std, dtype, rngs, bias=False)

    def __call__(
        self,
        input_ids: Int[Array, "b s"],
        attention_mask: Int[Array, "b s"] | None = None,
        *,
        return_hidden_states: bool = False,
    ) -> CLIPTextOutput:
        length = input_ids.shape[1]
        if length > self.config.max_position_embeddings:
            raise UserError(
                f"CLIP was given {length} tokens; expected at most {self.config.max_position_embeddings}; "
                "truncate the prompt first"
            )
        mask = jnp.tril(jnp.ones((length, length), bool))[None, None]
        if attention_mask is not None:
            mask = mask & (attention_mask[:, None, None, :] > 0)
        embedded = self.text_model.embeddings(input_ids)

        def step(layer: CLIPLayer, carry: tuple[jax.Array, jax.Array]):
            x, _ = carry
            return (layer(x, mask), x), (x if return_hidden_states else None)

        (hidden, penultimate), inner = scan_stack(
            self.text_model.encoder.layers, step, (embedded, embedded), hooks=self.hooks, dtype=self.dtype
        )
        last = self.text_model.final_layer_norm(hidden).astype(self.dtype)
        position = pooled_position(input_ids, self.config.eos_token_id)
        pooled = jnp.take_along_axis(last, position[:, None, None], axis=1)[:, 0]
        return CLIPTextOutput(
            last_hidden_state=last,
            penultimate_hidden_state=penultimate,
            pooled_output=pooled,
            pooled_position=position,
            text_embeds=self.text_projection(pooled) if self.config.with_projection else None,
            hidden_states=jnp.concatenate([inner, hidden[None]]) if return_hidden_states else None,
        )


def definition(config: CLIPTextConfig, *, dtype: Any = jnp.float32, hooks: ShardingHooks | None = None) -> Definition:
    """Structure of a CLIP text tower that computes in ``dtype`` (norms and softmax in float32)."""
    return Definition(lambda rngs: CLIPText(config, dtype=dtype, hooks=hooks or NO_HOOKS, rngs=rngs))
