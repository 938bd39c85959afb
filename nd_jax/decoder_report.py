"""Decoders on the same latents: what each keeps of the picture, and what it costs.

PSNR (dB, peak 255) and SSIM (scikit-image, per frame) against the clip; flicker as the protocol defines it, the mean
absolute difference of neighbouring frames in 8-bit levels, beside the clip's own; decode time, median of some runs
after a first one that compiles; peak memory as XLA's memory analysis of the compiled programs states it: arguments
(weights, latents, remembered frames), outputs and temporary buffers. Scratch space of library calls is not in it.
Streaming decodes one latent frame at a time and hands its frames out, so what it holds does not grow with the clip.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from nd_jax.models.causal_vae import definition, posterior
from nd_jax.models.codec_config import CodecConfig
from nd_jax.models.functional import Params, count_parameters
from nd_jax.outputs import new_file
from nd_jax.pixels import from_uint8, to_uint8
from nd_jax.recipes.decoder_distillation import DECODER, ENCODER
from nd_jax.report import Table


@dataclass(frozen=True)
class Quality:
    """Reconstructions of one set of clips, means over clips."""

    psnr: float
    ssim: float
    flicker: float
    flicker_of_clips: float
    streaming_difference: float
    """Largest difference between the whole decode and the streaming one, in units of [-1, 1]."""


@dataclass(frozen=True)
class Cost:
    """Of decoding one clip. Seconds; bytes as XLA's memory analysis of the compiled programs has them."""

    seconds: float
    streaming_seconds: float
    first_frame_seconds: float
    """Until the first frame is there, streaming."""
    memory: int
    streaming_memory: int
    weights: int
    """Bytes of the decoder's parameters, part of both."""


@dataclass(frozen=True)
class DecoderFigures:
    """One decoder: ``quality`` by the names of the sets of clips, ``cost`` for clips of the first set's size."""

    parameters: int
    quality: dict[str, Quality]
    cost: Cost
    device: str


def flicker(video: UInt8[np.ndarray, "t h w 3"]) -> float:
    """Mean absolute difference of neighbouring frames, 8-bit levels (255 minus VBench's temporal flickering)."""
    return float(np.abs(np.diff(video.astype(np.int16), axis=0)).mean()) if len(video) > 1 else 0.0


class DecoderPrograms:
    """A decoder compiled for clips of one size: all latents at once, a clip's first latent frame, each later one."""

    def __init__(self, config: CodecConfig, params: Params, latent: Float[Array, "1 t h w c"]):
        half = definition(config, half="decoder")
        self.params = {name: jax.tree.map(jnp.asarray, params[name]) for name in DECODER if name in params}
        one = latent[:, :1]
        whole = jax.jit(lambda params, latent: half.bind(params).decode(latent))
        start = jax.jit(lambda params, latent: half.bind(params).decode_chunk(latent))
        following = jax.jit(lambda params, latent, memory: half.bind(params).decode_chunk(latent, memory))
        self._whole = whole.lower(self.params, latent).compile()
        self._start = start.lower(self.params, one).compile()
        self._following = following.lower(self.params, one, self._start(self.params, one)[1]).compile()

    def whole(self, latent: Float[Array, "1 t h w c"]) -> Float[Array, "1 t2 h2 w2 3"]:
        """The clip, finished."""
        return jax.block_until_ready(self._whole(self.params, latent))

    def stream(self, latent: Float[Array, "1 t h w c"]) -> Iterator[Float[Array, "1 t2 h2 w2 3"]]:
        """The clip piece by piece, each finished before the next one begins."""
        video, memory = self._start(self.params, latent[:, :1])
        yield jax.block_until_ready(video)
        for frame in range(1, latent.shape[1]):
            video, memory = self._following(self.params, latent[:, frame : frame + 1], memory)
            yield jax.block_until_ready(video)

    def cost(self, latent: Float[Array, "1 t h w c"], *, repeats: int = 5) -> Cost:
        """Time and memory of decoding this clip."""
        return Cost(
            seconds=_median_seconds(lambda: self.whole(latent), repeats),
            streaming_seconds=_median_seconds(lambda: deque(self.stream(latent), maxlen=0), repeats),
            first_frame_seconds=_median_seconds(lambda: next(self.stream(latent)), repeats),
            memory=_bytes(self._whole),
            streaming_memory=max(_bytes(self._start), _bytes(self._following)),
            weights=sum(leaf.nbytes for leaf in jax.tree.leaves(self.params)),
        )

    def quality(self, latents: Float[np.ndarray, "n t2 h2 w2 c"], videos: UInt8[np.ndarray, "n t h w 3"]) -> Quality:
        """Means over clips; streaming is compared on the first."""
        rows, apart = [], 0.0
        for latent, video in zip(latents, videos, strict=True):
            latent = jnp.asarray(latent[None])
            whole = np.asarray(self.whole(latent))
            if not rows:
                apart = float(np.abs(np.concatenate(list(self.stream(latent)), axis=1) - whole).max())
            made = to_uint8(whole)[0]
            pairs = zip(video, made, strict=True)
            ssim = np.mean([structural_similarity(a, b, channel_axis=-1, data_range=255) for a, b in pairs])
            psnr = peak_signal_noise_ratio(video, made, data_range=255)
            rows.append((psnr, ssim, flicker(made), flicker(video)))
        return Quality(*map(float, np.mean(rows, axis=0)), apart)


def compare_decoders(
    codecs: Mapping[str, tuple[CodecConfig, Params]],
    clips: Mapping[str, UInt8[np.ndarray, "n t h w 3"]],
    *,
    repeats: int = 5,
) -> dict[str, DecoderFigures]:
    """Measure decoders of codecs that share one encoder (the first one's is run) on sets of clips, each of one size.

    Costs are those of a clip of the first set.
    """
    latents = {name: encode(*next(iter(codecs.values())), videos) for name, videos in clips.items()}
    found = {}
    for title, (config, params) in codecs.items():
        programs, quality = {}, {}
        for name, videos in clips.items():
            first = jnp.asarray(latents[name][:1])
            if first.shape not in programs:
                programs[first.shape] = DecoderPrograms(config, params, first)
            quality[name] = programs[first.shape].quality(latents[name], videos)
        first = jnp.asarray(next(iter(latents.values()))[:1])
        program = programs[first.shape]
        cost = program.cost(first, repeats=repeats)
        found[title] = DecoderFigures(count_parameters(program.params), quality, cost, jax.devices()[0].device_kind)
    return found


def encode(config: CodecConfig, params: Params, videos: UInt8[np.ndarray, "n t h w 3"]) -> np.ndarray:
    """Posterior means [n, t', h', w', c], clip by clip."""
    half = definition(config, half="encoder")
    run = jax.jit(lambda params, video: posterior(half.bind(params).encode(video)).mean)
    parts = {name: params[name] for name in ENCODER}
    return np.concatenate([np.asarray(run(parts, jnp.asarray(from_uint8(video[None])))) for video in videos])


def _median_seconds(run: Callable[[], Any], repeats: int) -> float:
    run()
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def _bytes(program: jax.stages.Compiled) -> int:
    found = program.memory_analysis()
    return found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes


COLUMNS = (
    "decoder",
    "clips",
    "PSNR (dB)",
    "SSIM",
    "flicker (clips' own)",
    "parameters",
    "s / clip",
    "streaming",
    "MB",
    "streaming MB",
)


def decoder_table(figures: Mapping[str, DecoderFigures], title: str = "Decoders on the same latents") -> Table:
    """A row for every decoder and set of clips; costs stand in the first row of a decoder."""
    rows: list[Sequence[object]] = []
    for name, each in figures.items():
        cost = each.cost
        costs = [
            f"{each.parameters / 1e6:.3f} M",
            f"{cost.seconds:.3f}",
            f"{cost.streaming_seconds:.3f}",
            f"{cost.memory / 1e6:.1f}",
            f"{cost.streaming_memory / 1e6:.1f}",
        ]
        for clips, found in each.quality.items():
            flickers = f"{found.flicker:.2f} ({found.flicker_of_clips:.2f})"
            rows.append([name, clips, f"{found.psnr:.2f}", f"{found.ssim:.3f}", flickers, *costs])
            name, costs = "", [""] * len(costs)
    return Table(
        title,
        COLUMNS,
        rows,
        note="Flicker: mean absolute difference of neighbouring frames in 8-bit levels. Memory: XLA's analysis of the "
        "compiled programs (weights, latents, outputs, temporary buffers); streaming: one latent frame at a time.",
    )


def write_figures(path: str | Path, figures: Mapping[str, DecoderFigures]) -> Path:
    """The figures of several decoders as JSON."""
    content = {name: dataclasses.asdict(each) for name, each in figures.items()}
    with new_file(path, overwrite=True) as part:
        part.write_text(json.dumps(content, indent=2) + "\n")
    return Path(path)
