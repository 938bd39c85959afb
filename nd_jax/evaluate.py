"""Generate, judge and count: what a system keeps of what its prompts ask for.

Judged accuracy is the share of attributes that the judge (no learned parts) reads from a video as the prompt names
them. Prompts and noise are paired: system A's video n and system B's start from the same noise.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, UInt8
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from nd_jax.data import judge
from nd_jax.data.source import prompts as world_prompts
from nd_jax.data.world import ATTRIBUTES, World
from nd_jax.errors import UserError
from nd_jax.generate import Generator, generate
from nd_jax.models.causal_vae import definition, posterior
from nd_jax.models.codec_config import CodecConfig
from nd_jax.models.functional import Definition, Params, count_parameters
from nd_jax.models.system import DENOISER
from nd_jax.pixels import from_uint8, to_uint8
from nd_jax.protocol.statistics import estimate, mean
from nd_jax.system import VideoSystem
from nd_jax.teacher_frames import teacher_frames


@dataclass(frozen=True)
class Judged:
    """A system's videos and how they were read. ``interval``: bootstrap 95 % of the mean accuracy, over prompts."""

    videos: UInt8[np.ndarray, "n t h w 3"]
    scores: judge.Scores
    interval: tuple[float, float]
    seconds: float
    """Wall-clock time per video, compilation included."""
    parameters: int
    """Of the denoiser."""

    def summary(self) -> dict[str, Any]:
        """JSON-ready figures."""
        return {
            "prompts": self.scores.count,
            "accuracy": self.scores.accuracy,
            "mean": self.scores.mean,
            "interval_95": list(self.interval),
            "chance": {name: mean for name, (mean, _) in self.scores.chance.items()},
            "chance_deviation": self.scores.chance["mean"][1],
            "seconds_per_video": self.seconds,
            "denoiser_parameters": self.parameters,
        }


def bootstrap_interval(right: np.ndarray) -> tuple[float, float]:
    """95 % interval of the mean of per-prompt accuracies [n], by resampling prompts (percentile method)."""
    found = estimate(mean, right, resamples=2000)
    return found.low, found.high


def judge_videos(
    videos: Sequence[np.ndarray], labels: Int[np.ndarray, "n objects 5"], world: World
) -> tuple[judge.Scores, tuple[float, float]]:
    """Scores of videos against the labels they should show, and the interval of the mean."""
    read = judge.read_labels(videos, world)
    return judge.score(read, labels), bootstrap_interval((read == labels).mean(axis=(1, 2)))


def evaluate_system(
    system: VideoSystem,
    world: World,
    *,
    split: str = "seen",
    plain: bool = False,
    count: int = 48,
    seed: int = 0,
    batch: int = 16,
    generator: Generator | None = None,
    teacher: VideoSystem | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Judged:
    """Generate from the first ``count`` prompts of a split and judge the videos.

    With a ``teacher`` the system continues that one's first frames (hybrid generation); their time counts.
    Raises UserError, before anything is generated, for a system whose videos are not of the world's size.
    """
    size = system.video if generator is None else generator
    if (size.height, size.width) != (world.height, world.width):
        raise UserError(
            f"{system.folder or 'evaluate'}: videos of {size.height}x{size.width}, the judge reads "
            f"{world.height}x{world.width} only"
        )
    captions, labels = world_prompts(world, split, count, seed=seed + 1, plain=plain)
    began, first = time.monotonic(), None
    if teacher is not None:
        first = teacher_frames(teacher, captions, height=size.height, width=size.width, seed=seed, batch=batch)
    videos = generate(
        system, captions, seed=seed, batch=batch, generator=generator, first_frames=first, progress=progress
    )
    seconds = (time.monotonic() - began) / count
    scores, interval = judge_videos(videos, labels, world)
    return Judged(videos, scores, interval, seconds, count_parameters(system.params[DENOISER]))


@dataclass(frozen=True)
class Reconstruction:
    """A codec on clips it was not trained on. PSNR in dB (peak 255) and SSIM, mean over clips."""

    videos: UInt8[np.ndarray, "n t h w 3"]
    psnr: float
    ssim: float


def codec_pass(codec: Definition) -> Callable[[Params, np.ndarray], np.ndarray]:
    """Function (parameters, clip) -> clip, uint8 [t, h, w, 3]: encoded (posterior mean) and decoded, compiled once for
    each size."""

    @jax.jit
    def through(params: Params, video: jax.Array) -> jax.Array:
        network = codec.bind(params)
        return network.decode(posterior(network.encode(video)).mean)

    return lambda params, clip: to_uint8(through(params, jnp.asarray(from_uint8(clip[None]))))[0]


def reconstruct(config: CodecConfig, params: Params, clips: UInt8[np.ndarray, "n t h w 3"]) -> Reconstruction:
    """Encode (posterior mean) and decode clips of one size, and compare."""
    through = codec_pass(definition(config))
    made = np.stack([through(params, clip) for clip in clips])
    psnr = [peak_signal_noise_ratio(a, b, data_range=255) for a, b in zip(clips, made, strict=True)]
    ssim = [
        structural_similarity(frame, other, channel_axis=-1, data_range=255)
        for clip, copy in zip(clips, made, strict=True)
        for frame, other in zip(clip[::8], copy[::8], strict=True)
    ]
    return Reconstruction(made, float(np.mean(psnr)), float(np.mean(ssim)))


def accuracy_row(name: str, judged: Judged, baseline: Judged | None = None) -> list[str]:
    """A row of the main table: parameters, accuracy by attribute, mean with interval, share of the baseline."""
    scores = judged.scores
    low, high = judged.interval
    kept = "" if baseline is None else f"{scores.mean / max(baseline.scores.mean, 1e-9):.1%}"
    return [
        name,
        f"{judged.parameters / 1e6:.2f} M",
        *(f"{scores.accuracy[attribute]:.0%}" for attribute in ATTRIBUTES),
        f"{scores.mean:.1%}  [{low:.1%}, {high:.1%}]",
        kept,
        f"{judged.seconds:.2f}",
    ]


ACCURACY_COLUMNS = [
    "system",
    "denoiser",
    *ATTRIBUTES,
    "mean [95 %]",
    "of teacher",
    "s / video",
]
