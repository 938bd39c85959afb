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
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from nd_jax.models.attention import Placed, attend
from nd_jax.models.gates import IMAGE, TEXT, BlockGates, gated_pieces, gated_stream
from nd_jax.models.hooks import NO_HOOKS, ShardingHooks
from nd_jax.models.norms import AdaLayerNorm, LayerNorm, NoNorm, RMSNorm, modulate
from nd_jax.models.positions import apply_rope

QK_NORMS = {"rms_norm": RMSNorm, "layer_norm": LayerNorm, None: NoNorm}
xavier = nnx.initializers.xavier_uniform()


@dataclass(frozen=True)
class Group:
    """What attention needs to know of one group: how many image tokens, how many of them at the end are the current
    clip's, and the mask over text and image tokens [B or 1, S+L]."""

    length: int
    current: int
    mask: Bool[Array, "b l l"]
    segments: Int[Array, "b l"] | None = None
    fixed: tuple[int, ...] | None = None
    """Every token's time, where it is known before compiling."""


@dataclass(frozen=True)
class Tokens:
    """All groups of a call, and the rotary tables of their image tokens side by side. Text stands at time 0, where
    nothing turns."""

    groups: Sequence[Group]
    cosines: Float[Array, "b l 1 r"]
    sines: Float[Array, "b l 1 r"]

    @property
    def lengths(self) -> list[int]:
        """Image tokens of every group."""
        return [group.length for group in self.groups]

    @property
    def current(self) -> list[int]:
        """Those of the current clips."""
        return [group.current for group in self.groups]

    def turn(self, x: Float[Array, "b l h k"], kept: Sequence[int], dtype: jnp.dtype) -> Float[Array, "b l h k"]:
        """Queries or keys of each group's last ``kept`` image tokens, with their rotary embedding."""
        tables = (trailing(table, self.lengths, kept) for table in (self.cosines, self.sines))
        return apply_rope(x, *tables).astype(dtype)


def spread(rows: Float[Array, "b*g d"], lengths: Sequence[int]) -> Float[Array, "b l d"]:
    """One row per sample and group to one per image token (or a broadcastable one where there is a single group)."""
    rows = rows.reshape(-1, len(lengths), rows.shape[-1])
    if len(lengths) == 1:
        return rows

    def by_pieces(rows: Array) -> Array:
        shapes = [(rows.shape[0], n, rows.shape[-1]) for n in lengths]
        return jnp.concatenate([jnp.broadcast_to(rows[:, i, None], each) for i, each in enumerate(shapes)], axis=1)

    def by_product(rows: Array) -> Array:
        chosen = np.repeat(np.eye(len(lengths), dtype=np.float32), lengths, axis=0)
        chosen = jnp.asarray(chosen, rows.dtype)
        return jnp.einsum("lg,bgd->bld", chosen, rows, precision=jax.lax.Precision.HIGHEST)

    # Dozens of groups are as many copies, and as many sums backward; a TPU has products for both.
    return jax.lax.platform_dependent(rows, tpu=by_product, default=by_pieces)


def cut(x: Float[Array, "b l ..."], lengths: Sequence[int]) -> list[Float[Array, "b n ..."]]:
    """Image tokens group by group."""
    return jnp.split(x, list(itertools.accumulate(lengths[:-1])), axis=1)


def trailing(
    x: Float[Array, "b l d"], lengths: Sequence[int], kept: Sequence[int], hooks: ShardingHooks = NO_HOOKS
) -> Float[Array, "b k d"]:
    """The last ``kept`` of each group's image tokens."""
    if list(kept) == list(lengths):
        return x
    pieces = zip(cut(hooks.constrain(x, "whole"), lengths), lengths, kept, strict=True)
    x = jnp.concatenate([jnp.split(piece, [n - k], axis=1)[1] for piece, n, k in pieces], axis=1)
    return hooks.constrain(hooks.constrain(x, "whole"), "image")


def join(
    text: Float[Array, "n s h k"], image: Float[Array, "b l h k"], lengths: Sequence[int]
) -> list[Float[Array, "b l h k"]]:
    """Text [B*G, S, ...] put in front of the image tokens of its group: one array per group."""
    rows = jnp.split(text.reshape(-1, len(lengths), *text.shape[1:]), len(lengths), axis=1)
    return [jnp.concatenate([r[:, 0], x], axis=1) for r, x in zip(rows, cut(image, lengths), strict=True)]


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
        tokens: Tokens,
        hooks: ShardingHooks = NO_HOOKS,
        inside: Inside | None = None,
    ) -> tuple[Float[Array, "b l d"], Float[Array, "n s d"]]:
        """Image and text tokens after the block, in the dtype they came in."""
        inside, lengths = inside or Inside(), tokens.lengths
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = (spread(m, lengths) for m in self.norm1(conditioning))
        x = modulate(image, shift, scale)
        queries, (keys, values) = self.attn.image_queries(x), self.attn.image_keys_values(x)
        image_heads = [tokens.turn(heads, lengths, image.dtype) for heads in (queries, keys)] + [values]
        context = [m[:, None] for m in self.norm1_context(conditioning)]
        y = modulate(text, context[0], context[1])
        text_heads = [x.astype(image.dtype) for x in (self.attn.text_queries(y), *self.attn.text_keys_values(y))]
        channels = math.prod(queries.shape[2:])
        image_heads, text_heads = ([hooks.spread_heads(x) for x in each] for each in (image_heads, text_heads))
        text_seen, image_seen = attend_all(text_heads, image_heads, tokens.groups, lengths, hooks)
        text_seen, image_seen = hooks.own_heads(text_seen, channels), hooks.own_heads(image_seen, channels)

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
        tokens: Tokens,
        hooks: ShardingHooks = NO_HOOKS,
        inside: Inside | None = None,
        *,
        history: bool = False,
    ) -> Float[Array, "b c d"]:
        """The current clips' tokens after the block, group after group; with ``history`` all image tokens.

        History leaves the network here, so unless asked for only its keys and values are computed.
        """
        inside, lengths, dtype = inside or Inside(), tokens.lengths, image.dtype
        kept = lengths if history else tokens.current
        modulation = self.norm1(conditioning)
        x = modulate(image, *(spread(m, lengths) for m in modulation[:2]))
        scale, shift = (m[:, None] for m in self.norm1_context(conditioning))
        y = modulate(text, shift, scale)

        queries = self.attn.image_queries(trailing(x, lengths, kept, hooks))
        keys, values = self.attn.image_keys_values(x)
        channels = math.prod(queries.shape[2:])
        image_heads = tokens.turn(queries, kept, dtype), tokens.turn(keys, lengths, dtype), values
        text_heads = [x.astype(dtype) for x in self.attn.text_keys_values(y)]
        image_heads, text_heads = ([hooks.spread_heads(x) for x in each] for each in (image_heads, text_heads))
        _, seen = attend_all([None, *text_heads], image_heads, tokens.groups, kept, hooks)

        _, _, gate, mlp_shift, mlp_scale, mlp_gate = (spread(m, kept) for m in modulation)
        seen = hooks.own_heads(seen, channels)
        image = trailing(image, lengths, kept, hooks) + gate * self.attn.to_out(inside.seen(seen, IMAGE))
        return image + mlp_gate * self.ff(modulate(image, mlp_shift, mlp_scale), inside, IMAGE)


Heads = Sequence[Float[Array, "b l h k"] | None]
"""Queries, keys and values; without queries nobody asks."""


def attend_all(
    text: Heads, image: Heads, groups: Sequence[Group], kept: Sequence[int], hooks: ShardingHooks
) -> tuple[Float[Array, "n s d"] | None, Float[Array, "b k d"]]:
    """What text and each group's last ``kept`` image tokens see of their group: group by group, or all at once where
    the hooks offer it and the layouts are exact."""
    exact = hooks.attention is not None and all(group.fixed is not None for group in groups)
    return (_at_once if exact else _group_by_group)(text, image, groups, kept, hooks)


def _group_by_group(text: Heads, image: Heads, groups: Sequence[Group], kept: Sequence[int], _: ShardingHooks) -> tuple:
    lengths, length = [group.length for group in groups], text[1].shape[1]
    keys, values = (join(t, x, lengths) for t, x in zip(text[1:], image[1:], strict=True))
    queries = cut(image[0], kept) if text[0] is None else join(text[0], image[0], kept)
    seen = [
        attend(q, k, v, group.mask[:, -q.shape[1] :])
        for q, k, v, group in zip(queries, keys, values, groups, strict=True)
    ]
    if text[0] is None:
        return None, jnp.concatenate(seen, axis=1)
    parts = [jnp.split(x, [length], axis=1) for x in seen]
    text_seen = jnp.stack([x for x, _ in parts], axis=1).reshape(*text[0].shape[:2], -1)
    return text_seen, jnp.concatenate([x for _, x in parts], axis=1)


def _at_once(text: Heads, image: Heads, groups: Sequence[Group], kept: Sequence[int], hooks: ShardingHooks) -> tuple:
    """One sequence: the text of all groups, then all image tokens, so that nothing is cut or moved."""
    length, count = text[1].shape[1], len(groups)
    rows = max(group.segments.shape[0] for group in groups)

    def placed(chosen: Sequence[slice]) -> Placed:
        """Some tokens of every group."""
        pairs = list(zip(groups, chosen, strict=True))
        places = [(index, time) for index, (group, part) in enumerate(pairs) for time in group.fixed[part]]
        ids = [jnp.broadcast_to(x := group.segments[:, part], (rows, x.shape[1])) for group, part in pairs]
        return Placed(np.array(places, np.int32), jnp.concatenate(ids, axis=1))

    def flat(x: Float[Array, "n s h k"]) -> Float[Array, "b l h k"]:
        return x.reshape(-1, count * length, *x.shape[2:])

    front = placed([slice(length)] * count)
    asked = placed([slice(len(group.fixed) - n, None) for group, n in zip(groups, kept, strict=True)])
    known = front + placed([slice(length, None)] * count)
    keys, values = (jnp.concatenate([flat(t), x], axis=1) for t, x in zip(text[1:], image[1:], strict=True))
    if text[0] is None:
        return None, hooks.attention(image[0], keys, values, asked, known)
    seen = hooks.attention(jnp.concatenate([flat(text[0]), image[0]], axis=1), keys, values, front + asked, known)
    text_seen, image_seen = jnp.split(seen, [count * length], axis=1)
    return text_seen.reshape(*text[0].shape[:2], -1), image_seen
