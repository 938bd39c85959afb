"""Initial weights with which a codec already passes a coarse picture through, so that minutes of training suffice.

Ours. Residual branches start at zero, as usual; on top of that, some channels carry the frame's colours linearly from
end to end: averaged down to 2 x 2 values per latent cell on the way in, copied back up on the way out, the last frame
of a cell's time span standing for all of it. Two things in the official architecture would stop them, and are undone:
the norm in front of the last convolution (two constant channels of opposite sign outweigh the rest, so that it divides
by nearly a constant) and its SiLU (``silu(x) - silu(-x) = x``, so every colour comes with its negative).
All other channels start as usual. The architecture does not change.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from nd_jax.errors import UserError
from nd_jax.models.causal_vae import NativeVAEConfig
from nd_jax.models.functional import Params

COLOURS = 3
CELL = 4 * COLOURS
"""Colours of 2 x 2 positions."""
CONSTANT = 6.0
"""Value of the two constant channels."""
LOGVAR = -6.0

Taps = Iterable[tuple[tuple[int, int], int, int, float]]
"""(row, column) of the kernel, input channel, output channel, weight; always at the present frame."""


def linear_start(config: NativeVAEConfig, params: Params) -> Params:
    """``params`` of a freshly initialised codec with the linear path put in. Traceable.

    Raises UserError for a configuration without room for it, saying what it needs.
    """
    narrow, wide = config.encoder_block_out_channels[-2:]
    last = config.decoder_block_out_channels[0]
    shortcut = any(
        a != b for a, b in zip(config.decoder_block_out_channels, config.decoder_block_out_channels[1:], strict=False)
    )
    fits = (
        config.encoder_norm_num_groups == config.decoder_norm_num_groups == 1
        and narrow >= CELL
        and wide >= 2 * CELL + 2
        and wide != narrow
        and last >= 2 * COLOURS + 2
        and shortcut
        and config.encoder_out_channels >= CELL
    )
    if not fits:
        raise UserError(
            "codec: linear start needs one norm group, at least 12 latent channels, encoder channels that end in at "
            "least 12 and then 26 or more, decoder channels of at least 8 that grow; set linear_start to false"
        )
    params = jax.tree.map(lambda leaf: leaf, params)  # new dicts: the caller's stay as they are
    _encoder(config, params["encoder"])
    _decoder(config, params["decoder"])
    eye = jnp.eye(2 * config.encoder_out_channels)
    params["quant_conv"]["kernel"] = eye[None, None, None]
    if "post_quant_conv" in params:
        params["post_quant_conv"]["kernel"] = jnp.eye(config.encoder_out_channels)[None, None, None]
    return params


def _encoder(config: NativeVAEConfig, encoder: Params) -> None:
    _set(encoder["conv_in"], _same(range(COLOURS)))
    blocks = [encoder["down_blocks"][str(i)] for i in range(len(encoder["down_blocks"]))]
    last_space = max(i for i, flag in enumerate(config.encoder_spatial_down_sample) if flag)
    signals = COLOURS
    for i, block in enumerate(blocks):
        _quiet(block["resnets"])
        if "conv_shortcut" in block["resnets"]["0"]:
            final = i == len(blocks) - 1
            _shortcut(block["resnets"]["0"]["conv_shortcut"], signals, with_opposites=final)
        for layer in block.get("downsamplers", {}).values():
            quarters = [((r, s), c) for r in (0, 1) for s in (0, 1) for c in range(COLOURS)]
            if i == last_space:  # the window of output y is rows 2y - 1 .. 2y + 1, so row 2y + r is tap 1 + r
                taps = [((1 + r, 1 + s), c, j, 1.0) for j, ((r, s), c) in enumerate(quarters)]
                signals = CELL
            else:
                taps = [((1 + r, 1 + s), c, c, 0.25) for (r, s), c in quarters]
            _set(layer["conv"], taps)
        for layer in block.get("temporal_downsamplers", {}).values():
            _set(layer["conv"], _same(range(signals)))
    _quiet_middle(encoder["mid_block"])
    latent = config.encoder_out_channels
    out = encoder["conv_out"]
    kernel, bias = 0.3 * out["kernel"], out["bias"]
    out["kernel"], out["bias"] = kernel.at[..., latent:].set(0.0), bias.at[latent:].set(LOGVAR)
    _set(out, _difference(CELL, config.encoder_block_out_channels[-1]))


def _decoder(config: NativeVAEConfig, decoder: Params) -> None:
    _set(decoder["conv_in"], _same(range(CELL)))
    _quiet_middle(decoder["mid_block"])
    blocks = [decoder["up_blocks"][str(i)] for i in range(len(decoder["up_blocks"]))]
    shortcuts = [i for i, block in enumerate(blocks) if "conv_shortcut" in block["resnets"]["0"]]
    width = config.decoder_block_out_channels[0]
    packed, carried = True, range(CELL)
    for i, block in enumerate(blocks):
        _quiet(block["resnets"])
        if i in shortcuts:
            final = i == shortcuts[-1]
            _shortcut(block["resnets"]["0"]["conv_shortcut"], len(carried), with_opposites=final)
            carried = range(width) if final else carried
        for layer in block.get("upsamplers", {}).values():  # output channels come as (channel, row, column)
            places = [(r, s) for r in (0, 1) for s in (0, 1)]
            if packed:
                packed, carried = False, range(COLOURS)
                pairs = [((2 * r + s) * COLOURS + c, 4 * c + 2 * r + s) for c in carried for r, s in places]
            else:
                pairs = [(c, 4 * c + 2 * r + s) for c in carried for r, s in places]
            _set(layer["conv"], [((1, 1), a, b, 1.0) for a, b in pairs])
        for layer in block.get("temporal_upsamplers", {}).values():  # (channel, frame)
            _set(layer["conv"], [((1, 1), c, 2 * c + f, 1.0) for c in carried for f in (0, 1)])
    _set(decoder["conv_out"], _difference(COLOURS, width))


def _set(layer: Params, taps: Taps) -> None:
    """Give the outputs named in ``taps`` these weights and no others."""
    taps = list(taps)
    outputs = jnp.array(sorted({b for _, _, b, _ in taps}))
    kernel = layer["kernel"].at[..., outputs].set(0.0)
    rows, columns, a, b, w = zip(*((r, s, a, b, w) for (r, s), a, b, w in taps), strict=True)
    layer["kernel"] = kernel.at[-1, jnp.array(rows), jnp.array(columns), jnp.array(a), jnp.array(b)].set(jnp.array(w))
    layer["bias"] = layer["bias"].at[outputs].set(0.0)


def _same(channels: Iterable[int]) -> list[Any]:
    """Every channel to itself, through the middle of a 3 x 3 kernel."""
    return [((1, 1), c, c, 1.0) for c in channels]


def _difference(count: int, channels: int) -> list[Any]:
    """What undoes norm and SiLU: channel j minus channel count + j, times what the norm divides by."""
    scale = CONSTANT * (2 / channels) ** 0.5
    return [((1, 1), j + side * count, j, scale * (1 - 2 * side)) for j in range(count) for side in (0, 1)]


def _shortcut(layer: Params, signals: int, *, with_opposites: bool) -> None:
    """Carry ``signals`` channels; with opposites also their negatives behind them, and two constants at the end."""
    taps = [((0, 0), c, c, 1.0) for c in range(signals)]
    if with_opposites:
        taps += [((0, 0), c, signals + c, -1.0) for c in range(signals)]
    _set(layer, taps)
    if with_opposites:
        layer["kernel"] = layer["kernel"].at[..., -2:].set(0.0)
        layer["bias"] = layer["bias"].at[-2:].set(jnp.array([CONSTANT, -CONSTANT]))


def _quiet(resnets: Params) -> None:
    """Residual branches that add nothing yet."""
    for block in resnets.values():
        block["conv2"] = jax.tree.map(jnp.zeros_like, block["conv2"])


def _quiet_middle(block: Params) -> None:
    _quiet(block["resnets"])
    for attention in block["attentions"].values():
        attention["to_out"] = jax.tree.map(jnp.zeros_like, attention["to_out"])
