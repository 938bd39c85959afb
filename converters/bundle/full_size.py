"""Graphs of a configuration without any numbers: what splitting conditioning and attention is worth at full size."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from nd_jax.converters.bundle.analysis import Counts, of_graph
from nd_jax.converters.graphs.conditioning import conditioning_graph
from nd_jax.converters.graphs.mmdit import stage_graph
from nd_jax.converters.graphs.taehv import decoder_graph
from nd_jax.models import causal_vae, mmdit
from nd_jax.models.causal_vae import AsymmetricVAEConfig
from nd_jax.models.mmdit import MMDiTConfig
from nd_jax.pyramid.layout import Envelope, envelopes


class DenoiserCosts(NamedTuple):
    """Counts of the conditioning graph and of every stage, its attention split by query clip or masked as a whole."""

    conditioning: Counts
    split: list[Counts]
    whole: list[Counts]

    def calls(self, units: int = 6) -> int:
        """Denoiser calls of a video with one step per stage, the first frame given."""
        return units * len(self.split)

    def lines(self) -> list[str]:
        """For people; 8-bit weights and 16-bit values."""
        kept, apart = self.split[0].parameters, self.conditioning.parameters
        told = [
            f"weights per denoiser call: {(kept + apart) / 1e9:.3f} G with conditioning, {kept / 1e9:.3f} G without",
            f"conditioning: {apart / 1e9:.3f} G weights, {apart / (kept + apart):.1%}, read {len(self.split)} times a "
            f"video instead of {self.calls()}: {apart * self.calls() / 1e9:.1f} GB of reading become "
            f"{apart * len(self.split) / 1e9:.1f} GB",
        ]
        for stage, (a, b) in enumerate(zip(self.split, self.whole, strict=True)):
            told.append(
                f"stage {stage}: {a.macs / 1e9:.0f} GMAC, values moved {a.value_bytes / 1e6:.0f} MB, of them scores "
                f"{a.attention_bytes / 1e6:.0f} MB; with one mask {b.macs / 1e9:.0f} GMAC, "
                f"{b.value_bytes / 1e6:.0f} MB, {b.attention_bytes / 1e6:.0f} MB"
            )
        return told


def denoiser_costs(config: MMDiTConfig | None = None, layouts: tuple[Envelope, ...] | None = None) -> DenoiserCosts:
    """Of a configuration (default: the full-size student, 49 frames of 320x512)."""
    config = MMDiTConfig() if config is None else config
    layouts = envelopes(6, 128, 40, 64) if layouts is None else layouts
    params = mmdit.definition(config).abstract()
    split, whole = (
        [of_graph(stage_graph(config, params, each, "stage", split=kind)) for each in layouts] for kind in (True, False)
    )
    return DenoiserCosts(of_graph(conditioning_graph(config, params)), split, whole)


def decoder_costs(config: AsymmetricVAEConfig | None = None, height: int = 40, width: int = 64) -> Counts:
    """Of one latent frame through the tiny decoder."""
    config = AsymmetricVAEConfig() if config is None else config
    params = causal_vae.definition(config, half="decoder").abstract()
    return of_graph(decoder_graph(config, params, height, width))


def layout_bytes(counts: Counts) -> int:
    """Bytes of layout copies that remain where the compiler works channels-last."""
    return int(np.sum([size for _, size in counts.layout.values()], dtype=np.int64)) - counts.boundary_bytes
