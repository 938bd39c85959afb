"""Blocks of the diffusion transformer: joint attention over text and image, with separate weights for each.

Image tokens of all groups lie side by side, [B, sum of lengths, D], so that projections and MLPs are one product;
text is [B*G, S, D], row ``b * G + g`` belonging to group ``g``. Only attention runs group by group.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from nd_jax.models.attention import attend
from nd_jax.models.gates import IMAGE, TEXT, BlockGates, gated_pieces, gated_stream
from nd_jax.models.hooks import NO_HOOKS, ShardingHooks
from nd_jax.models.norms import AdaLayerNorm, LayerNorm, NoNorm, RMSNorm, modulate
from nd_jax.models.positions import apply_rope

QK_NORMS = {"rms_norm": RMSNorm, "layer_norm": LayerNorm, None: NoNorm}
xavier = nnx.initializers.xavier_uniform()


@dataclass(frozen=True)
class Group:
    """What attention needs to know of one group: how many image tokens, how many of them at the end are the current
    clip's, and over text and image tokens [B or 1, S+L] the mask and the rotary tables."""

    length: int
    current: int
    mask: Bool[Array, "b l l"]
    cosines: Float[Array, "b l 1 r"]
    sines: Float[Array, "b l 1 r"]
    segments: Int[Array, "b l"] | None = None
    fixed: tuple[int, ...] | None = None
    """Every token's time, where it is known before compiling."""


def spread(rows: Float[Array, "b*g d"], lengths: Sequence[int]) -> Float[Array, "b l d"]:
    """One row per sample and group to one per image token (or a broadcastable one where there is a single group)."""
    rows = rows.reshape(-1, len(lengths), rows.shape[-1])
    if len(lengths) == 1:
        return rows
    parts = [jnp.broadcast_to(rows[:, i, None], (rows.shape[0], n, rows.shape[-1])) for i, n in enumerate(lengths)]
    return jnp.concatenate(parts, axis=1)


def cut(x: Float[Array, "b l ..."], lengths: Sequence[int]) -> list[Float[Array, "b n ..."]]:
    """Image tokens group by group."""
    return jnp.split(x, list(itertools.accumulate(lengths[:-1])), axis=1)


def trailing(x: Float[Array, "b l d"], lengths: Sequence[int], kept: Sequence[int]) -> Float[Array, "b k d"]:
    """The last ``kept`` of each group's image tokens."""
    pieces = zip(cut(x, lengths), lengths, kept, strict=True)
    return jnp.concatenate([jnp.split(piece, [n - k], axis=1)[1] for piece, n, k in pieces], axis=1)


def join(text: Sequence[Array], image: Sequence[Array], groups: Sequence[Group]) -> list[tuple[Array, ...]]:
    """Text [B*G, S, ...] put in front of image tokens [B, sum of lengths, ...]: one tuple of arrays per group."""
    pairs = []
    for t, x in zip(text, image, strict=True):
        rows = jnp.split(t.reshape(-1, len(groups), *t.shape[1:]), len(groups), axis=1)
        images = cut(x.astype(t.dtype), [group.length for group in groups])
        pairs.append([jnp.concatenate([r[:, 0], i], axis=1) for r, i in zip(rows, images, strict=True)])
    return list(zip(*pairs, strict=True))


class JointAttention(nnx.Module):
    """Projections and per-head q/k norms; ``to_*`` and ``norm_*`` act on image tokens, ``add_*`` on text."""

    def __init__(self, config, *, last: bool, dtype: jnp.dtype, rngs: nnx.Rngs):
        width, inner = config.width, config.heads * config.attention_head_dim

        def linear(inputs: int = width, outputs: int = inner):
            return nnx.Linear(inputs, outputs, kernel_init=xavier, dtype=dtype, rngs=rngs)

        self.to_q, self.to_k, self.to_v = linear(), linear(), linear()
        self.add_q_proj, self.add_k_proj, self.add_v_proj = linear(), linear(), linear()
        self.to_out = linear(inner, width)
        if not last:
            self.to_add_out = linear(inner, width)
        norm = QK_NORMS[config.qk_norm]
        self.norm_q, self.norm_k = (norm(config.attention_head_dim, rngs=rngs) for _ in range(2))
        self.norm_add_q, self.norm_add_k = (norm(config.attention_head_dim, rngs=rngs) for _ in range(2))
        self.channels = config.attention_head_dim

    def heads_of(self, x: Float[Array, "n l d"]) -> Float[Array, "n l h k"]:
        """Channels split into heads, as many as the arrays have."""
        return x.reshape(*x.shape[:-1], -1, self.channels)

    def image_queries(self, x: Float[Array, "b l d"]) -> Float[Array, "b l h k"]:
        """Normalised queries of image tokens."""
        return self.norm_q(self.heads_of(self.to_q(x)))

    def image_keys_values(self, x: Float[Array, "b l d"]) -> tuple[Float[Array, "b l h k"], Float[Array, "b l h k"]]:
        """Normalised keys, and values, of image tokens."""
        return self.norm_k(self.heads_of(self.to_k(x))), self.heads_of(self.to_v(x))

    def text_queries(self, x: Float[Array, "n s d"]) -> Float[Array, "n s h k"]:
        """Normalised queries of text tokens."""
        return self.norm_add_q(self.heads_of(self.add_q_proj(x)))

    def text_keys_values(self, x: Float[Array, "n s d"]) -> tuple[Float[Array, "n s h k"], Float[Array, "n s h k"]]:
        """Normalised keys, and values, of text tokens."""
        return self.norm_add_k(self.heads_of(self.add_k_proj(x))), self.heads_of(self.add_v_proj(x))


class FeedForward(nnx.Module):
    """Linear to the hidden channels (four times the width, unless narrowed), tanh GELU, linear back."""

    def __init__(self, width: int, hidden: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.up = nnx.Linear(width, hidden, kernel_init=xavier, dtype=dtype, rngs=rngs)
        self.down = nnx.Linear(hidden, width, kernel_init=xavier, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b l d"], inside: Inside, stream: int) -> Float[Array, "b l d"]:
        """Token-wise."""
        hidden = jax.checkpoint(jax.nn.gelu)(self.up(x))
        return self.down(inside.hidden(hidden, stream))


@dataclass
class Inside:
    """What happens to a block's inner activations: they are gated, and noted in ``noted`` by name where it is given:
    what attention has seen, "image_seen" and "text_seen", and hidden channels of the MLPs, "image_hidden" and
    "text_hidden"."""

    gates: BlockGates | None = None
    noted: dict[str, Array] | None = None

    def seen(self, x: Float[Array, "b l d"], stream: int) -> Float[Array, "b l d"]:
        """Head by head."""
        return self._note(x if self.gates is None else gated_pieces(x, self.gates.heads), stream, "seen")

    def hidden(self, x: Float[Array, "b l f"], stream: int) -> Float[Array, "b l f"]:
        """Slice by slice."""
        gates = self.gates
        return self._note(x if gates is None else gated_pieces(x, gates.mlp[:, stream]), stream, "hidden")

    def added(self, x: Float[Array, "b l d"], stream: int) -> Float[Array, "b l d"]:
        """What a branch adds to a stream."""
        return gated_stream(x, self.gates, stream)

    def _note(self, x: Array, stream: int, what: str) -> Array:
        if self.noted is not None:
            self.noted[f"{('image', 'text')[stream]}_{what}"] = x
        return x


class Block(nnx.Module):
    """adaLN-zero, joint attention, adaLN-zero, feed forward, for image and text (SD3, arXiv 2403.03206, figure 2)."""

    def __init__(self, config, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.norm1 = AdaLayerNorm(config.width, 6, dtype=dtype, rngs=rngs)
        self.norm1_context = AdaLayerNorm(config.width, 6, dtype=dtype, rngs=rngs)
        self.attn = JointAttention(config, last=False, dtype=dtype, rngs=rngs)
        self.ff = FeedForward(config.width, config.mlp_channels, dtype=dtype, rngs=rngs)
        self.ff_context = FeedForward(config.width, config.text_mlp_channels, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        image: Float[Array, "b l d"],
        text: Float[Array, "n s d"],
        conditioning: Float[Array, "n d"],
        groups: Sequence[Group],
        hooks: ShardingHooks = NO_HOOKS,
        inside: Inside | None = None,
    ) -> tuple[Float[Array, "b l d"], Float[Array, "n s d"]]:
        """Image and text tokens after the block, in the dtype they came in."""
        inside = inside or Inside()
        lengths = [group.length for group in groups]
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = (spread(m, lengths) for m in self.norm1(conditioning))
        x = modulate(image, shift, scale)
        image_heads = self.attn.image_queries(x), *self.attn.image_keys_values(x)
        context = [m[:, None] for m in self.norm1_context(conditioning)]
        y = modulate(text, context[0], context[1])
        text_heads = self.attn.text_queries(y), *self.attn.text_keys_values(y)
        channels = math.prod(image_heads[0].shape[2:])
        image_heads, text_heads = ([hooks.spread_heads(x) for x in each] for each in (image_heads, text_heads))

        seen = attend_all(join(text_heads, image_heads, groups), groups, image.dtype, hooks)
        seen = [jnp.split(x, [text.shape[1]], axis=1) for x in seen]
        image_seen = hooks.own_heads(jnp.concatenate([x for _, x in seen], axis=1), channels)
        text_seen = jnp.stack([x for x, _ in seen], axis=1).reshape(*text.shape[:2], -1)
        text_seen = hooks.own_heads(text_seen, channels)

        image = image + inside.added(gate * self.attn.to_out(inside.seen(image_seen, IMAGE)), IMAGE)
        x = self.ff(modulate(image, mlp_shift, mlp_scale), inside, IMAGE)
        image = image + inside.added(mlp_gate * x, IMAGE)
        text = text + inside.added(context[2] * self.attn.to_add_out(inside.seen(text_seen, TEXT)), TEXT)
        y = self.ff_context(modulate(text, context[3], context[4]), inside, TEXT)
        return image, text + inside.added(context[5] * y, TEXT)


class LastBlock(nnx.Module):
    """The block that updates image tokens only: text gives keys and values, and ends here."""

    def __init__(self, config, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.norm1 = AdaLayerNorm(config.width, 6, dtype=dtype, rngs=rngs)
        self.norm1_context = AdaLayerNorm(config.width, 2, dtype=dtype, rngs=rngs)
        self.attn = JointAttention(config, last=True, dtype=dtype, rngs=rngs)
        self.ff = FeedForward(config.width, config.mlp_channels, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        image: Float[Array, "b l d"],
        text: Float[Array, "n s d"],
        conditioning: Float[Array, "n d"],
        groups: Sequence[Group],
        hooks: ShardingHooks = NO_HOOKS,
        inside: Inside | None = None,
        *,
        history: bool = False,
    ) -> Float[Array, "b c d"]:
        """The current clips' tokens after the block, group after group; with ``history`` all image tokens.

        History leaves the network here, so unless asked for only its keys and values are computed.
        """
        inside, lengths = inside or Inside(), [group.length for group in groups]
        kept = lengths if history else [group.current for group in groups]
        modulation = self.norm1(conditioning)
        x = modulate(image, *(spread(m, lengths) for m in modulation[:2]))
        scale, shift = (m[:, None] for m in self.norm1_context(conditioning))
        y = modulate(text, shift, scale)

        queries = self.attn.image_queries(trailing(x, lengths, kept))
        channels, queries = math.prod(queries.shape[2:]), hooks.spread_heads(queries)
        image_heads, text_heads = self.attn.image_keys_values(x), self.attn.text_keys_values(y)
        image_heads, text_heads = ([hooks.spread_heads(x) for x in each] for each in (image_heads, text_heads))
        joined = join(text_heads, image_heads, groups)
        asked = [(q, *keys_values) for q, keys_values in zip(cut(queries, kept), joined, strict=True)]
        seen = attend_all(asked, groups, image.dtype, hooks)

        _, _, gate, mlp_shift, mlp_scale, mlp_gate = (spread(m, kept) for m in modulation)
        seen = hooks.own_heads(jnp.concatenate(seen, axis=1), channels)
        image = trailing(image, lengths, kept) + gate * self.attn.to_out(inside.seen(seen, IMAGE))
        return image + mlp_gate * self.ff(modulate(image, mlp_shift, mlp_scale), inside, IMAGE)


def attend_all(
    heads: Sequence[tuple[Array, Array, Array]], groups: Sequence[Group], dtype: jnp.dtype, hooks: ShardingHooks
) -> list[Float[Array, "b q d"]]:
    """Attention of every group: one by one, or all at once where the hooks offer it and the layouts are exact."""
    if hooks.attention is None or any(group.fixed is None for group in groups):
        return [joint_attention(*each, group, dtype) for each, group in zip(heads, groups, strict=True)]
    turned = [turn(q, k, group, dtype) for (q, k, _), group in zip(heads, groups, strict=True)]
    q, k, v = (
        jnp.concatenate(parts, axis=1)
        for parts in ([q for q, _ in turned], [k for _, k in turned], [v for *_, v in heads])
    )
    rows = max(group.segments.shape[0] for group in groups)
    segments = [jnp.broadcast_to(g.segments, (rows, g.segments.shape[1])) for g in groups]
    asking = tuple(q.shape[1] for q, _ in turned)
    times = tuple(group.fixed for group in groups)
    return cut(hooks.attention(q, k, v, times, asking, jnp.concatenate(segments, axis=1)), asking)


def turn(q: Float[Array, "b q h k"], k: Float[Array, "b l h k"], group: Group, dtype: jnp.dtype) -> tuple[Array, Array]:
    """Queries and keys with their rotary embedding; ``q`` may be the last tokens only."""
    n = q.shape[1]
    q = apply_rope(q, group.cosines[:, -n:], group.sines[:, -n:]).astype(dtype)
    return q, apply_rope(k, group.cosines, group.sines).astype(dtype)


def joint_attention(
    q: Float[Array, "b q h k"], k: Float[Array, "b l h k"], v: Float[Array, "b l h k"], group: Group, dtype: jnp.dtype
) -> Float[Array, "b q d"]:
    """Attention of one group over text and image tokens; ``q`` may be the last of them only."""
    n = q.shape[1]
    return attend(*turn(q, k, group, dtype), v, group.mask[:, -n:])
