"""The pyramidal video diffusion transformer (MMDiT).

One call denoises the current clip of each group, given its history clips, text, pooled text and timestep. A group is
one resolution of the pyramid: one group at inference, one per stage ("column") in packed training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from nd_jax.errors import UserError
from nd_jax.models.attention import SEEN, causal_mask
from nd_jax.models.embeddings import PatchEmbed, TimeTextEmbed
from nd_jax.models.functional import Definition, Params
from nd_jax.models.gates import BlockGates, Gates, of_last
from nd_jax.models.hooks import ShardingHooks
from nd_jax.models.mmdit_block import Block, Group, Inside, LastBlock, Tokens, spread, trailing, xavier
from nd_jax.models.mmdit_config import MMDiTConfig
from nd_jax.models.norms import AdaLayerNorm, modulate
from nd_jax.models.positions import rope_tables, spatial_positions
from nd_jax.models.stacked import run_chosen, stack

__all__ = ["BlockStates", "Layout", "MMDiT", "MMDiTConfig", "definition", "unstack"]


class Layout(Protocol):
    """Times and segments of one group's tokens, text first; anything with these two arrays will do.

    Queries read keys of their own segment and, in a causal network, of no later time. Real tokens are segment 1,
    padded text 0, padded image tokens 2. A layout may also have ``fixed``, its times as numbers of Python, the same in
    every row: attention can then skip what the mask rules out.
    """

    times: Int[Array, "b l"]
    segments: Int[Array, "b l"]


class BlockStates(NamedTuple):
    """Tokens after every block: the stacked ones [K, ...], and the last block's image tokens (it has no text)."""

    image: Float[Array, "k b l d"]
    text: Float[Array, "k n s d"]
    last_image: Float[Array, "b l d"]


Known = tuple
"""A list of stacked blocks [k], image and text tokens after each of them ([k, B, L, D], [k, B*G, S, D]), and with gates
those too."""


class MMDiT(nnx.Module):
    """Structure of the network. Build it through ``definition``."""

    def __init__(self, config: MMDiTConfig, *, dtype: jnp.dtype, hooks: ShardingHooks, rngs: nnx.Rngs):
        width, patch = config.width, config.patch_size
        self.config, self.dtype, self.hooks = config, dtype, hooks
        self.pos_embed = PatchEmbed(config.in_channels, width, patch, dtype=dtype, rngs=rngs)
        self.time_text_embed = TimeTextEmbed(config.pooled_projection_dim, width, rngs=rngs)
        if config.context_embedder:
            self.context_embedder = nnx.Linear(
                config.joint_attention_dim, width, kernel_init=xavier, dtype=dtype, rngs=rngs
            )
        self.blocks = stack(lambda rngs: Block(config, dtype=dtype, rngs=rngs), config.num_layers - 1, rngs)
        self.last_block = LastBlock(config, dtype=dtype, rngs=rngs)
        self.norm_out = AdaLayerNorm(width, 2, dtype=dtype, rngs=rngs)
        self.proj_out = nnx.Linear(
            width, patch * patch * config.in_channels, kernel_init=nnx.initializers.zeros, dtype=dtype, rngs=rngs
        )

    def __call__(
        self,
        sample: Sequence[Sequence[Float[Array, "b t h w c"]]],
        text: Float[Array, "b*g s d"],
        pooled: Float[Array, "b*g p"],
        timestep: Float[Array, " b*g"],
        layouts: Sequence[Layout],
        *,
        return_blocks: bool = False,
        reducer: Callable[..., Any] | None = None,
        remat: str | None = None,
        kept: Int[Array, " k"] | None = None,
        known: Known | None = None,
        gates: Gates | None = None,
        inner: Callable[[dict[str, Array]], Any] | None = None,
    ) -> Any:
        """Predict the velocity of each group's current clip.

        Args:
            sample: per group its clips, oldest first, the last one current; latents [B, T, H, W, C].
            text: embeddings, row ``b * G + g`` for group ``g``; width ``joint_attention_dim`` if the network has a
                context embedder, inner width otherwise.
            pooled: pooled text embeddings, same rows.
            timestep: 0 to 1000, same rows.
            layouts: per group the times and segments of its S + L tokens.
            return_blocks: also return every block's tokens.
            reducer: ``reducer(image_in, image_out, text_in, text_out)`` is run in every block but the last, image
                [B, sum L, D] and text [B*G, S, D]; its results come back stacked on a leading axis.
            remat: "none", "full" (keep block inputs only) or "dots" (keep the results of dense products and of
                attention kernels).
            kept: run these stacked blocks only, in this order. Data, not structure: every selection of so many blocks
                is the same program. Needs stacked parameters, not ``unstack``'s.
            known: what another call with the same inputs has found of other ``kept`` blocks. Those with which both
                lists start are not run again, and lists may be filled up with -1, so that selections of any length are
                the same program. No gradient.
            gates: on what the blocks add (see ``gates.Gates``), data too; also with ``kept`` and ``known``, which then
                has the gates it was found with as its last part. Needs stacked parameters.
            inner: ``inner(inside)`` is run in every block on its inner activations by name (see ``Inside``); its
            results
                come back as the pair (stacked blocks', last block's).

        Returns:
            Predictions [B, T, H, W, C], one per group; with ``return_blocks``, ``reducer`` and/or ``inner`` a tuple
            ``(predictions[, BlockStates][, reduced][, inner's])``; with ``known`` ``(predictions, known of these
            blocks)``.

        Raises:
            UserError: inputs whose sizes do not fit each other or the network.
        """
        sample = [clips if isinstance(clips, Sequence) else [clips] for clips in sample]
        self._check(sample, text, pooled, timestep, layouts)
        image, tokens = self._tokens(sample, layouts)
        text = text.astype(self.dtype)
        if self.config.context_embedder:
            text = self._ready(self.context_embedder)(text)
        conditioning = self._ready(self.time_text_embed, jnp.float32)(timestep, pooled).astype(self.dtype)

        graphdef, stacked = nnx.split(self.blocks)

        def body(carry, layer, gate=None):
            image, text = (self.hooks.constrain(x, name) for x, name in zip(carry, ("image", "text"), strict=True))
            block = self._ready(nnx.merge(graphdef, layer))
            inside = Inside(gate, {} if inner else None)
            new_image, new_text = block(image, text, conditioning, tokens, self.hooks, inside)
            out = (
                (new_image, new_text) if return_blocks else None,
                reducer(image, new_image, text, new_text) if reducer else None,
                inner(inside.noted) if inner else None,
            )
            return (new_image, new_text), out

        def chosen(carry, index):
            def pick(w):
                return jax.lax.dynamic_index_in_dim(w, index, keepdims=False)

            return body(carry, jax.tree.map(pick, stacked), None if gates is None else BlockGates(*map(pick, gates)))

        if gates is not None and kept is None:
            kept = jnp.arange(len(gates.stream))
        if known is not None:
            if kept is None or return_blocks or reducer or inner:
                raise UserError("MMDiT: known tokens go with kept blocks, and with neither return_blocks nor reducers")
            carry, known = _run_known(chosen, (image, text), kept, known, gates)
            out = None, None, None
        elif kept is None:
            carry, out = over_layers(self._remat(body, remat, looped=True), (image, text), stacked)
        else:
            carry, out = jax.lax.scan(self._remat(chosen, remat, looped=True), (image, text), kept)
        (image, text), (states, reduced, noted) = carry, out
        image, text = self.hooks.constrain(image, "image"), self.hooks.constrain(text, "text")
        graphdef, state = nnx.split(self.last_block)

        def last(image, text, state):
            block = self._ready(nnx.merge(graphdef, state))
            inside = Inside(of_last(gates), {} if inner else None)
            image = block(image, text, conditioning, tokens, self.hooks, inside, history=return_blocks)
            return image, inner(inside.noted) if inner else None

        image, last_noted = self._remat(last, remat, looped=False)(image, text, state)
        image = self.hooks.constrain(image, "image")
        predictions = self._predict(image, conditioning, tokens, sample, history=return_blocks)
        extras = ([BlockStates(*states, image)] if return_blocks else []) + ([reduced] if reducer else [])
        extras += ([(noted, last_noted)] if inner else []) + ([] if known is None else [known])
        return (predictions, *extras) if extras else predictions

    def _remat(self, body: Callable, remat: str | None, *, looped: bool) -> Callable:
        """``body`` keeping for the backward pass what ``remat`` says, but never a gathered weight.

        In a loop the compiler cannot undo this by merging equal expressions; outside it has to be prevented.
        """
        policies = jax.checkpoint_policies
        policy = {
            "none": all_but_gathered,
            "full": policies.nothing_saveable,
            "dots": policies.save_from_both_policies(dense_products, policies.save_only_these_names(SEEN)),
        }.get(remat or "none")
        if policy is None:
            raise UserError(f"MMDiT: remat is {remat!r}; supported: 'none', 'full', 'dots'")
        if remat in (None, "none") and self.hooks.weights is None:
            return body
        return jax.checkpoint(body, prevent_cse=not looped, policy=policy)

    def _ready(self, module: nnx.Module, dtype: jnp.dtype | None = None) -> nnx.Module:
        """The module with its kernels in the compute dtype and every weight passed through the sharding hook."""

        def ready(path, w):
            w = w.astype(dtype or self.dtype) if path[-1] == "kernel" else w
            return self.hooks.gather(w, "/".join(map(str, path)))

        graphdef, state = nnx.split(module)
        flat = [(path, leaf.replace(ready(path, leaf.get_value()))) for path, leaf in nnx.to_flat_state(state)]
        return nnx.merge(graphdef, nnx.from_flat_state(flat))

    def _tokens(self, sample, layouts) -> tuple[Float[Array, "b l d"], Tokens]:
        """Patches with positions, all groups side by side, and what attention needs to know of each group."""
        config, embed = self.config, self._ready(self.pos_embed)
        tokens, groups, times = [], [], []
        for clips, layout in zip(sample, layouts, strict=True):
            patched = [embed(clip) for clip in clips]
            target = patched[-1].shape[2:4]
            length = 0
            for x in patched:
                size = x.shape[2:4]
                positions = spatial_positions(
                    *(config.width, config.pos_embed_max_size, config.base_size, size),
                    target if config.interp_condition_pos else size,
                )
                x = (x + positions).astype(self.dtype)
                tokens.append(x.reshape(x.shape[0], -1, config.width))
                length += tokens[-1].shape[1]
            mask = causal_mask(layout.times, layout.segments, causal=config.use_temporal_causal)
            times.append(layout.times[:, layout.times.shape[1] - length :])
            fixed = getattr(layout, "fixed", None) if config.use_temporal_causal else None
            groups.append(Group(length, tokens[-1].shape[1], mask, layout.segments, fixed))
        rows = max(len(each) for each in times)
        times = jnp.concatenate([jnp.broadcast_to(each, (rows, each.shape[1])) for each in times], axis=1)
        tables = (x[:, :, None] for x in rope_tables(times, config.attention_head_dim))
        return self.hooks.constrain(jnp.concatenate(tokens, axis=1), "whole"), Tokens(groups, *tables)

    def _predict(self, image, conditioning, tokens, sample, *, history: bool) -> list[Float[Array, "b t h w c"]]:
        """Norm, project and unpatchify the current clips' tokens."""
        if history:
            image = trailing(image, tokens.lengths, tokens.current, self.hooks)
        lengths = tokens.current
        scale, shift = (spread(m, lengths) for m in self._ready(self.norm_out)(conditioning))
        out = self.hooks.constrain(self._ready(self.proj_out)(modulate(image, shift, scale)), "whole")
        predictions, start, p = [], 0, self.config.patch_size
        for clips, n in zip(sample, lengths, strict=True):
            b, t, height, width, c = clips[-1].shape
            x = out[:, start : start + n].reshape(b, t, height // p, width // p, p, p, c)
            predictions.append(x.transpose(0, 1, 2, 4, 3, 5, 6).reshape(b, t, height, width, c))
            start += n
        return predictions

    def _check(self, sample, text, pooled, timestep, layouts) -> None:
        """Raise UserError where the inputs do not fit each other or the network."""
        config, p = self.config, self.config.patch_size
        if len(sample) != len(layouts) or not all(sample) or not sample:
            raise UserError(f"MMDiT: {len(sample)} groups of clips and {len(layouts)} layouts; expected one each")
        batch = sample[0][-1].shape[0]
        rows = batch * len(sample)
        text_width = config.joint_attention_dim if config.context_embedder else config.width
        for name, x, shape in (
            ("text", text, (rows, text.shape[1], text_width)),
            ("pooled", pooled, (rows, config.pooled_projection_dim)),
            ("timestep", timestep, (rows,)),
        ):
            if x.shape != shape:
                raise UserError(f"MMDiT: {name} has shape {x.shape}; expected {shape} for {len(sample)} groups")
        for g, (clips, layout) in enumerate(zip(sample, layouts, strict=True)):
            tokens = text.shape[1]
            for clip in clips:
                shaped = clip.ndim == 5 and clip.shape[::4] == (batch, config.in_channels)
                if not shaped or any(n % p for n in clip.shape[2:4]):
                    raise UserError(
                        f"MMDiT: a clip of group {g} has shape {clip.shape}; "
                        f"expected [{batch}, T, H, W, {config.in_channels}] with H and W multiples of {p}"
                    )
                tokens += clip.shape[1] * (clip.shape[2] // p) * (clip.shape[3] // p)
            for name in ("times", "segments"):
                shape = getattr(layout, name).shape
                if shape not in ((1, tokens), (batch, tokens)):
                    raise UserError(
                        f"MMDiT: layout {name} of group {g} has shape {shape}; "
                        f"expected [1 or {batch}, {tokens}], text first"
                    )


def dense_products(primitive: Any, *avals: Any, **params: Any) -> bool:
    """Remat policy: keep the layers' products, none of which names a precision. Those that do only move numbers."""
    kept = jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *avals, **params)
    return kept and params.get("precision") is None


def all_but_gathered(primitive: Any, *_: Any, **__: Any) -> bool:
    """Remat policy: keep every value except what a gather (or another change of sharding) makes."""
    return primitive.name not in ("sharding_constraint", "reshard", "all_gather")


def _run_known(step: Callable, carry: Any, kept: Int[Array, " k"], known: Known, gates: Gates | None) -> tuple:
    """``run_chosen``, where places with other gates than before have to run again."""
    if gates is None:
        return run_chosen(step, carry, kept, known)
    before, states, old = known
    blocks = len(gates.stream)
    equal = [(one == other)[:blocks].reshape(blocks, -1).all(axis=1) for one, other in zip(gates, old, strict=True)]
    same = jnp.stack(equal).all(axis=0)
    carry, (kept, states) = run_chosen(step, carry, kept, (before, states), same[jnp.maximum(kept, 0)])
    return carry, (kept, states, gates)


def over_layers(body: Callable, carry: Any, state: Any) -> tuple[Any, Any]:
    """``lax.scan`` over stacked arrays, or a Python loop where each array comes as a tuple of layers (``unstack``)."""
    flat = nnx.to_flat_state(state)
    if not isinstance(flat[0][1].get_value(), tuple):
        return jax.lax.scan(body, carry, state)
    outs = []
    for i in range(len(flat[0][1].get_value())):
        layer = nnx.from_flat_state([(path, leaf.replace(leaf.get_value()[i])) for path, leaf in flat])
        carry, out = body(carry, layer)
        outs.append(out)
    return carry, jax.tree.map(lambda *layers: jnp.stack(layers), *outs)


def unstack(params: Params) -> Params:
    """The parameters with each stacked array cut into a tuple of layers; the network takes either form.

    For inference on a CPU: a scan there copies each layer's weights out of the stack, which costs a quarter of the
    time on short sequences. The price is a program, and a compilation, that grow with the depth.
    """
    depth = len(jax.tree.leaves(params["blocks"])[0])
    if not depth:
        return params
    return {**params, "blocks": jax.tree.map(lambda w: tuple(w[i] for i in range(depth)), params["blocks"])}


def definition(
    config: MMDiTConfig, *, dtype: jnp.dtype = jnp.float32, hooks: ShardingHooks | None = None
) -> Definition:
    """The network without its numbers.

    Args:
        config: sizes; the depth that runs is read from the parameters' leading axis.
        dtype: compute dtype. Norms, softmax, rotary and timestep embeddings are float32 in any case.
        hooks: sharding constraints, set by training; none by default.
    """
    return Definition(lambda rngs: MMDiT(config, dtype=dtype, hooks=hooks or ShardingHooks(), rngs=rngs))
