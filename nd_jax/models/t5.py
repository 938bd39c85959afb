"""T5 encoder (Raffel et al. 2020) with an optional projection: DT5, T5-XXL and anything between.

DT5 is the T5-base encoder followed by Linear, ReLU, Linear (both without bias) to T5-XXL's width.
No 1/sqrt(d) in the attention; one relative position table, stored with layer 0, serves every layer.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from nd_jax.errors import UserError
from nd_jax.models.activations import ACTIVATIONS, check_activation
from nd_jax.models.functional import Definition
from nd_jax.models.hooks import NO_HOOKS, ShardingHooks
from nd_jax.models.stacked import scan_stack, stack

_FEED_FORWARDS = {"gated-gelu": ("gelu_new", True), "gated-silu": ("silu", True), "relu": ("relu", False)}


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Shape of a T5 encoder, under the names of transformers' config.json.

    ``out_dim`` is the width after the projection; ``None`` means that there is no projection (plain T5 encoder).
    ``project_in_dim`` is its input width and has to equal ``d_model``.
    """

    vocab_size: int = 32128
    """Rows of the embedding table."""
    d_model: int = 768
    """Channels."""
    d_kv: int = 64
    """Channels of an attention head."""
    d_ff: int = 2048
    """Channels inside the feed-forward layers."""
    num_layers: int = 12
    num_heads: int = 12
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "gated-gelu"
    dense_act_fn: str = "gelu_new"
    is_gated_act: bool = True
    out_dim: int | None = 4096
    """Channels after the projection; None: no projection."""

    def __post_init__(self):
        check_activation("dense_act_fn", self.dense_act_fn)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], *, projection: bool | None = None) -> T5Config:
        """Read config.json of a T5 encoder, with or without projection.

        The reference reads the projection's output width from ``out_dim`` (default 4096) and ignores
        ``project_out_dim``. ``projection=None`` looks whether the config mentions a projection at all.

        Raises:
            UserError: for a feed forward or activation that is not supported, or a projection that does not fit.
        """
        feed_forward = config.get("feed_forward_proj", "relu")
        if feed_forward not in _FEED_FORWARDS:
            raise UserError(
                f"config key 'feed_forward_proj' is {feed_forward!r}; supported: {', '.join(_FEED_FORWARDS)}"
            )
        activation, gated = _FEED_FORWARDS[feed_forward]
        names = {field.name for field in dataclasses.fields(cls)} - {"out_dim"}
        known = {"dense_act_fn": activation, "is_gated_act": gated}
        known |= {key: value for key, value in config.items() if key in names}
        known["feed_forward_proj"] = feed_forward
        if projection is None:
            projection = not {"out_dim", "project_in_dim", "project_out_dim"}.isdisjoint(config)
        known["out_dim"] = config.get("out_dim", 4096) if projection else None
        result = cls(**known)
        if projection and config.get("project_in_dim", 768) != result.d_model:
            raise UserError(
                f"config key 'project_in_dim' is {config.get('project_in_dim', 768)}; "
                f"expected d_model, {result.d_model}"
            )
        return result

    def to_dict(self) -> dict[str, Any]:
        """Content of the official config.json."""
        values = dataclasses.asdict(self)
        if self.out_dim is None:
            del values["out_dim"]
        else:
            values |= {"project_in_dim": self.d_model, "project_out_dim": self.out_dim}
        values |= {
            "architectures": ["T5EncoderModel" if self.out_dim is None else "T5EncoderWithProjection"],
            "classifier_dropout": 0.0,
            "dropout_rate": 0.1,
            "eos_token_id": 1,
            "initializer_factor": 1.0,
            "is_encoder_decoder": self.out_dim is not None,
            "model_type": "t5",
            "num_decoder_layers": self.num_layers,
            "pad_token_id": 0,
            "use_cache": False,
        }
        return dict(sorted(values.items()))


def t5_xxl() -> T5Config:
    """The teacher's text encoder: T5 v1.1 XXL, 4.762 billion parameters."""
    return T5Config(d_model=4096, d_ff=10240, num_layers=24, num_heads=64, out_dim=None)


class T5Output(NamedTuple):
    """``last_hidden_state`` [B, S, d_model] after the final norm; ``prompt_embeds`` [B, S, out_dim] or ``None``."""

    last_hidden_state: jax.Array
    prompt_embeds: jax.Array | None


def relative_position_bucket(
    relative_position: Int[np.ndarray, "*shape"], num_buckets: int = 32, max_distance: int = 128
) -> Int[np.ndarray, "*shape"]:
    """Bucket of ``key position - query position`` in an encoder (T5, section 2.1).

    Half of the buckets serve each sign. Of those, half hold one distance each; the others grow logarithmically up
    to ``max_distance``, beyond which everything shares the last one. The logarithm is taken in float32.
    """
    relative_position = np.asarray(relative_position)
    half = num_buckets // 2
    exact = half // 2
    distance = np.abs(relative_position)
    growth = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact)) / np.float32(
        np.log(max_distance / exact)
    )
    large = np.minimum(exact + (growth * np.float32(half - exact)).astype(np.int32), half - 1)
    return np.where(relative_position > 0, half, 0) + np.where(distance < exact, distance, large)


def _linear(width_in: int, width_out: int, std: float, dtype: Any, rngs: nnx.Rngs) -> nnx.Linear:
    kernel_init = jax.nn.initializers.normal(std)
    return nnx.Linear(width_in, width_out, use_bias=False, kernel_init=kernel_init, dtype=dtype, rngs=rngs)


class T5LayerNorm(nnx.Module):
    """Root-mean-square norm without bias, computed in float32."""

    def __init__(self, width: int, epsilon: float, dtype: Any):
        self.scale = nnx.Param(jnp.ones(width))
        self.epsilon, self.dtype = epsilon, dtype

    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon)
        return (x * self.scale.astype(jnp.float32)).astype(self.dtype)


class SelfAttention(nnx.Module):
    """Unscaled multi-head attention plus a position bias; softmax in float32."""

    def __init__(self, config: T5Config, dtype: Any, rngs: nnx.Rngs):
        inner = config.num_heads * config.d_kv
        self.q = _linear(config.d_model, inner, (config.d_model * config.d_kv) ** -0.5, dtype, rngs)
        self.k = _linear(config.d_model, inner, config.d_model**-0.5, dtype, rngs)
        self.v = _linear(config.d_model, inner, config.d_model**-0.5, dtype, rngs)
        self.o = _linear(inner, config.d_model, inner**-0.5, dtype, rngs)
        self.heads = config.num_heads

    def __call__(self, x: Float[Array, "b s d"], bias: Float[Array, "b h s s"]) -> Float[Array, "b s d"]:
        query, key, value = (layer(x).reshape(*x.shape[:2], self.heads, -1) for layer in (self.q, self.k, self.v))
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32) + bias
        weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
        return self.o(jnp.einsum("bhqk,bkhd->bqhd", weights, value).reshape(*x.shape[:2], -1))


class AttentionLayer(nnx.Module):
    """Pre-norm residual attention."""

    def __init__(self, config: T5Config, dtype: Any, rngs: nnx.Rngs):
        self.SelfAttention = SelfAttention(config, dtype, rngs)
        self.layer_norm = T5LayerNorm(config.d_model, config.layer_norm_epsilon, dtype)

    def __call__(self, x: Float[Array, "b s d"], bias: Float[Array, "b h s s"]) -> Float[Array, "b s d"]:
        return x + self.SelfAttention(self.layer_norm(x), bias)


class DenseReluDense(nnx.Module):
    """Feed forward: ``wo(act(wi x))``, or ``wo(act(wi_0 x) * wi_1 x)`` when gated."""

    def __init__(self, config: T5Config, dtype: Any, rngs: nnx.Rngs):
        std = config.d_model**-0.5
        if config.is_gated_act:
            self.wi_0 = _linear(config.d_model, config.d_ff, std, dtype, rngs)
            self.wi_1 = _linear(config.d_model, config.d_ff, std, dtype, rngs)
        else:
            self.wi = _linear(config.d_model, config.d_ff, std, dtype, rngs)
        self.wo = _linear(config.d_ff, config.d_model, config.d_ff**-0.5, dtype, rngs)
        self.activation, self.gated = ACTIVATIONS[config.dense_act_fn], config.is_gated_act

    def __call__(self, x: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
        hidden = self.activation(self.wi_0(x)) * self.wi_1(x) if self.gated else self.activation(self.wi(x))
        return self.wo(hidden)


class FeedForwardLayer(nnx.Module):
    """Pre-norm residual feed forward."""

    def __init__(self, config: T5Config, dtype: Any, rngs: nnx.Rngs):
        self.DenseReluDense = DenseReluDense(config, dtype, rngs)
        self.layer_norm = T5LayerNorm(config.d_model, config.layer_norm_epsilon, dtype)

    def __call__(self, x: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
        return x + self.DenseReluDense(self.layer_norm(x))


class T5Block(nnx.Module):
    """Attention, then feed forward."""

    def __init__(self, config: T5Config, dtype: Any, rngs: nnx.Rngs):
        self.layer = nnx.List([AttentionLayer(config, dtype, rngs), FeedForwardLayer(config, dtype, rngs)])

    def __call__(self, x: Float[Array, "b s d"], bias: Float[Array, "b h s s"]) -> Float[Array, "b s d"]:
        return self.layer[1](self.layer[0](x, bias))


class T5Stack(nnx.Module):
    """The blocks (stacked on a layer axis), their common position bias and the final norm."""

    def __init__(self, config: T5Config, dtype: Any, rngs: nnx.Rngs, hooks: ShardingHooks = NO_HOOKS):
        self.config, self.dtype, self.hooks = config, dtype, hooks
        self.block = stack(lambda keys: T5Block(config, dtype, keys), config.num_layers, rngs)
        self.relative_attention_bias = nnx.Embed(
            config.relative_attention_num_buckets,
            config.num_heads,
            embedding_init=jax.nn.initializers.normal(config.d_model**-0.5),
            rngs=rngs,
        )
        self.final_layer_norm = T5LayerNorm(config.d_model, config.layer_norm_epsilon, dtype)

    def position_bias(self, length: int) -> Float[Array, "1 h s s"]:
        """Additive attention bias by bucketed distance, float32."""
        positions = np.arange(length)
        buckets = relative_position_bucket(
            positions[None, :] - positions[:, None],
            self.config.relative_attention_num_buckets,
            self.config.relative_attention_max_distance,
        )
        table = self.relative_attention_bias.embedding.astype(jnp.float32)
        return table[buckets].transpose(2, 0, 1)[None]

    def __call__(
        self, x: Float[Array, "b s d"], attention_mask: Int[Array, "b s"] | None = None, *, remat: bool = False
    ) -> Float[Array, "b s d"]:
        bias = self.position_bias(x.shape[1])
        if attention_mask is not None:
            bias = jnp.where(attention_mask[:, None, None, :] > 0, bias, jnp.finfo(jnp.float32).min)
        options = {"remat": remat, "hooks": self.hooks, "dtype": self.dtype}
        x, _ = scan_stack(self.block, lambda block, x: (block(x, bias), None), x, **options)
        return self.final_layer_norm(x)


class T5Encoder(nnx.Module):
    """``t5(input_ids, attention_mask)``: token ids [B, S] to hidden states and, if configured, their projection.

    ``attention_mask`` [B, S] is 1 at tokens that may be read; ``None`` means all. Padded positions are computed too.
    """

    def __init__(self, config: T5Config, *, dtype: Any = jnp.float32, hooks: ShardingHooks = NO_HOOKS, rngs: nnx.Rngs):
        self.config = config
        self.shared = nnx.Embed(
            config.vocab_size, config.d_model, embedding_init=jax.nn.initializers.normal(1.0), dtype=dtype, rngs=rngs
        )
        self.encoder = T5Stack(config, dtype, rngs, hooks)
        if config.out_dim is not None:
            widths = (config.d_model, config.out_dim, config.out_dim)
            self.final_projection = nnx.List(
                [_linear(a, b, (3 * a) ** -0.5, dtype, rngs) for a, b in itertools.pairwise(widths)]
            )

    def __call__(
        self, input_ids: Int[Array, "b s"], attention_mask: Int[Array, "b s"] | None = None, *, remat: bool = False
    ) -> T5Output:
        hidden = self.encoder(self.shared(input_ids), attention_mask, remat=remat)
        if self.config.out_dim is None:
            return T5Output(hidden, None)
        first, second = self.final_projection
        return T5Output(hidden, second(jax.nn.relu(first(hidden))))


def definition(config: T5Config, *, dtype: Any = jnp.float32, hooks: ShardingHooks | None = None) -> Definition:
    """Structure of a T5 encoder that computes in ``dtype`` (norms, softmax and position bias in float32)."""
    return Definition(lambda rngs: T5Encoder(config, dtype=dtype, hooks=hooks or NO_HOOKS, rngs=rngs))
