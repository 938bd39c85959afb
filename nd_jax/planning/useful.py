"""Operations that training cannot do without: forward passes over unpadded tokens, twice that again if trained.

The numerator of model FLOPs utilisation [PaLM, arXiv 2204.02311, appendix B]: nothing recomputed, no padding, and of
attention only the pairs that the mask allows. Closed formulas, independent of any program.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nd_jax.models.clip import CLIPTextConfig
from nd_jax.models.context_adapter import ContextAdapterConfig
from nd_jax.models.mmdit_config import MMDiTConfig
from nd_jax.models.t5 import T5Config
from nd_jax.pyramid.layout import PADDED_IMAGE, REAL, Envelope, layout_arrays


@dataclass(frozen=True)
class Tokens:
    """Means over the units that one column trains: image and text tokens, current image tokens, and pairs of a query
    and a key that attention multiplies, of all tokens and for current queries alone (the last block's)."""

    image: float
    text: float
    current: float
    pairs: float
    last_pairs: float

    def __add__(self, other: Tokens) -> Tokens:
        return Tokens(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))

    def times(self, count: float) -> Tokens:
        """Of ``count`` rows."""
        return Tokens(*(count * getattr(self, name) for name in self.__dataclass_fields__))


NOTHING = Tokens(0, 0, 0, 0, 0)


def padded_tokens(envelope: Envelope) -> Tokens:
    """What is computed for one row: every token, and every pair."""
    current = _current(envelope)
    length = envelope.length
    return Tokens(envelope.image_length, envelope.text_length, current, length**2, current * length)


def real_tokens(envelope: Envelope, text: int | None = None, units: Sequence[int] | None = None) -> Tokens:
    """What of it is data, with ``text`` real text tokens (default: all), mean over ``units`` (default: all of them)."""
    mask = np.arange(envelope.text_length)[None] < (envelope.text_length if text is None else text)
    current, rows = _current(envelope), []
    for unit in range(envelope.units + 1) if units is None else units:
        layout = layout_arrays(envelope, unit, mask.astype(np.int32))
        times, segments = np.asarray(layout.times[0]), np.asarray(layout.segments[0])
        real = segments == REAL
        allowed = (times[:, None] >= times[None]) & real[:, None] & real[None]
        image = int((segments[envelope.text_length :] != PADDED_IMAGE).sum())
        rows.append((image, int(mask.sum()), current, int(allowed.sum()), int(allowed[-current:].sum())))
    return Tokens(*np.mean(rows, axis=0).tolist())


def _current(envelope: Envelope) -> int:
    frames, height, width = envelope.clips[-1]
    return frames * height * width // envelope.patch_size**2


def denoiser_flops(config: MMDiTConfig, tokens: Tokens, rows: float) -> float:
    """One forward pass over ``tokens`` that belong to ``rows`` prompts (columns counted apart)."""
    d, blocks, inner = config.width, config.num_layers - 1, config.heads * config.attention_head_dim
    image, text = (8 * d * inner + 4 * d * hidden for hidden in (config.mlp_channels, config.text_mlp_channels))
    block = image * tokens.image + text * tokens.text + 4 * inner * tokens.pairs + 24 * d * d * rows
    # The last block: keys and values of all, the rest for current tokens; modulation of six and of two vectors.
    last = 4 * d * inner * (tokens.image + tokens.text) + 4 * inner * tokens.last_pairs
    last += (4 * d * inner + 4 * d * config.mlp_channels) * tokens.current
    last += 16 * d * d * rows
    patch = 2 * config.patch_size**2 * config.in_channels * d
    ends = patch * (tokens.image + tokens.current) + 4 * d * d * rows  # embedding, projection, final modulation
    ends += 2 * (256 * d + d * d + config.pooled_projection_dim * d + d * d) * rows  # timestep and pooled text
    if config.context_embedder:
        ends += 2 * config.joint_attention_dim * d * tokens.text
    return blocks * block + last + ends


def t5_flops(config: T5Config, prompts: float, length: float) -> float:
    """One forward pass over prompts of ``length`` tokens."""
    inner, tokens = config.num_heads * config.d_kv, prompts * length
    layer = 8 * config.d_model * inner + (6 if config.is_gated_act else 4) * config.d_model * config.d_ff
    layer += 4 * inner * length
    total = config.num_layers * layer * tokens
    if config.out_dim is not None:
        total += 2 * (config.d_model * config.out_dim + config.out_dim**2) * tokens
    return total


def clip_flops(config: CLIPTextConfig, prompts: float, length: float) -> float:
    """One forward pass over prompts of ``length`` tokens."""
    d = config.hidden_size
    layer = 8 * d * d + 4 * d * config.intermediate_size + 4 * d * length
    projection = 2 * d * config.projection_dim if config.with_projection else 0
    return prompts * (config.num_hidden_layers * layer * length + projection)


def adapter_flops(config: ContextAdapterConfig, tokens: float) -> float:
    """One forward pass over so many tokens."""
    width, products = config.input_dims, 0
    for depth, skip in zip(config.layer_depths, config.skips, strict=True):
        products += width * depth
        width = depth + (config.input_dims if skip else 0)
    return 2 * (products + width * config.output_dims) * tokens
