"""Pieces of the denoiser: positions, rotary embedding, timesteps, masks, norms. Recognised by the arrays they have."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from nd_jax.models import mmdit
from nd_jax.models.attention import causal_mask
from nd_jax.models.embeddings import PatchEmbed, TimeTextEmbed, sinusoid
from nd_jax.models.functional import Definition
from nd_jax.models.mmdit_block import spread
from nd_jax.models.norms import AdaLayerNorm, LayerNorm, RMSNorm, modulate
from nd_jax.models.positions import apply_rope, axis_table, rope_tables, spatial_positions, table
from nd_jax.verification.cases import Case, Outputs, Subcase
from nd_jax.verification.samples import clips_of, layouts_of
from nd_jax.verification.weights import load, parts_in, same_weights


def rotation(times: Any, head_dim: int, theta: float = 10000.0) -> Float[Array, "b l half 2 2"]:
    """Rotary tables as the matrices that the reference keeps: [[cos, -sin], [sin, cos]]."""
    cosines, sines = rope_tables(jnp.asarray(times), head_dim, theta)
    return jnp.stack([jnp.stack([cosines, -sines], -1), jnp.stack([sines, cosines], -1)], -2)


def positions(subcase: Subcase, config: mmdit.MMDiTConfig) -> Outputs:
    """The whole table, or the crop for a clip of one size while a clip of another is current."""
    about, grid = subcase.about, config.pos_embed_max_size
    if "height" in subcase.inputs:
        size, current = (
            tuple(int(subcase.input(name)) // config.patch_size for name in names)
            for names in (("height", "width"), ("ori_height", "ori_width"))
        )
        target = current if about.get("interp", True) else size
        yield "pos", spatial_positions(config.width, grid, config.base_size, size, target).reshape(1, -1, config.width)
        return
    width, grid = about.get("embed_dim", config.width), about.get("grid", grid)
    base_size = about.get("base_size", config.base_size)
    if "row" in subcase.inputs:
        yield "values", table(width, grid, base_size)[0, subcase.input("row")]
        return
    axis = axis_table(width // 2, grid, base_size)
    half = (grid, grid, width // 2)
    raw = np.concatenate([np.broadcast_to(axis[None], half), np.broadcast_to(axis[:, None], half)], axis=-1)
    yield "table", table(width, grid, base_size)
    yield "raw_float64", raw.reshape(-1, width)


def rope(subcase: Subcase) -> Outputs:
    """Rotary matrices of times ``ids``, or queries and keys rotated by them."""
    times, theta = subcase.input("ids")[..., 0], float(subcase.about.get("theta", 10000))
    if "q" in subcase.inputs:
        q, k = jnp.asarray(subcase.input("q")), jnp.asarray(subcase.input("k"))
        cosines, sines = (x[:, :, None] for x in rope_tables(jnp.asarray(times), q.shape[-1], theta))
        yield from (("q", apply_rope(q, cosines, sines)), ("k", apply_rope(k, cosines, sines)))
        return
    recorded = subcase.outputs.get("rope", subcase.outputs.get("module"))
    matrices = rotation(times, 2 * recorded.shape[-3], theta)
    yield from (("rope", matrices), ("module", matrices[:, :, None]))


def norms(subcase: Subcase) -> Outputs:
    """RMS norm, layer norm with weights, adaLN-zero (also in stages) and adaLN-continuous, with given weights."""
    x = jnp.asarray(subcase.input("x"))
    width, eps = x.shape[-1], subcase.about.get("eps", 1e-6)
    if "weight" in subcase.inputs:
        norm = LayerNorm if "bias" in subcase.inputs else RMSNorm
        names = {"scale": "weight", "bias": "bias"} if norm is LayerNorm else {"scale": "weight"}
        params = {name: jnp.asarray(subcase.input(torch)) for name, torch in names.items()}
        yield "y", Definition(lambda rngs: norm(width, eps=eps, rngs=rngs))(params, x)
        return
    kernel, bias = jnp.asarray(subcase.input("linear_weight")).T, jnp.asarray(subcase.input("linear_bias"))
    ada = Definition(lambda rngs: AdaLayerNorm(width, kernel.shape[1] // width, dtype=jnp.float32, rngs=rngs))
    chunks = ada({"linear": {"kernel": kernel, "bias": bias}}, jnp.asarray(subcase.input("emb")))
    lengths = subcase.about.get("hidden_length", [x.shape[1]])
    if len(chunks) == 2:
        scale, shift = (spread(chunk, lengths) for chunk in chunks)
        yield "x", modulate(x, shift, scale, eps)
        return
    shift, scale, gate, *mlp = (spread(chunk, lengths) for chunk in chunks)
    yield "x", modulate(x, shift, scale, eps)
    for name, value in zip(("gate_msa", "shift_mlp", "scale_mlp", "gate_mlp"), (gate, *mlp), strict=True):
        yield name, value[:, 0] if len(lengths) == 1 else value


class Pieces:
    """The parts of a case's denoiser that have weights of their own; loaded when first needed."""

    def __init__(self, case: Case, config: mmdit.MMDiTConfig):
        self.case, self.config = case, config

    def module(self, part: str, build: Callable[[nnx.Rngs], nnx.Module]) -> nnx.Module | None:
        """The network's submodule ``part``, built by ``build``, with its weights; ``None`` if nobody has them.

        A case of pieces may hold only some weights; the rest is in another case of the same network.
        """
        others = (case for case in self.case.same_config() if same_weights(self.case, case))
        for case in itertools.chain([self.case], others):
            if part in parts_in(case, "mmdit", self.config):
                return Definition(build).bind(load(case, "mmdit", self.config, parts=[part])[part])
        return None

    def timestep(self, subcase: Subcase) -> Outputs:
        """The sinusoidal embedding and the conditioning vector made from it."""
        timestep, pooled = jnp.asarray(subcase.input("timestep")), jnp.asarray(subcase.input("pooled"))
        yield "sinusoid", sinusoid(timestep)
        config = self.config
        embed = self.module(
            "time_text_embed", lambda rngs: TimeTextEmbed(config.pooled_projection_dim, config.width, rngs=rngs)
        )
        if embed is not None:
            yield "temb", embed(timestep, pooled)

    def tokens(self, clips: list[Float[Array, "b t h w c"]]) -> Float[Array, "b l d"] | None:
        """Patches of all clips with their positions, oldest clip first."""
        config, tokens = self.config, []
        embed = self.module(
            "pos_embed",
            lambda rngs: PatchEmbed(config.in_channels, config.width, config.patch_size, dtype=jnp.float32, rngs=rngs),
        )
        if embed is None:
            return None
        patched = [embed(clip) for clip in clips]
        for x in patched:
            size = x.shape[2:4]
            target = patched[-1].shape[2:4] if config.interp_condition_pos else size
            where = spatial_positions(config.width, config.pos_embed_max_size, config.base_size, size, target)
            tokens.append((x + where).reshape(x.shape[0], -1, config.width))
        return jnp.concatenate(tokens, axis=1)

    def merged(self, subcase: Subcase) -> Outputs:
        """Tokens of all clips with their positions, and per group the attention mask and the times."""
        sample, text_mask = clips_of(subcase), subcase.input("encoder_attention_mask")
        for group, layout in enumerate(layouts_of(sample, text_mask, self.config.patch_size)):
            tokens = self.tokens(sample[group])
            if tokens is not None:
                yield f"tokens/{group}", tokens
            mask = causal_mask(layout.times, layout.segments, causal=self.config.use_temporal_causal)
            yield f"attention_mask/{group}", mask[:, None]
            yield f"rope/{group}", rotation(layout.times, self.config.attention_head_dim)[:, :, None]
            yield f"rope_ids/{group}", layout.times[:, text_mask.shape[1] :, None]

    def __call__(self, subcase: Subcase) -> Outputs:
        """One subcase."""
        if "ids" in subcase.inputs:
            return rope(subcase)
        if "timestep" in subcase.inputs:
            return self.timestep(subcase)
        if "encoder_attention_mask" in subcase.inputs:
            return self.merged(subcase)
        if "x" in subcase.inputs:
            return norms(subcase)
        return positions(subcase, self.config)
