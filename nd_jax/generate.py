"""Prompt to video: text encoders, the pyramidal sampler around the denoiser, and the streaming codec.

The denoiser is three compiled programs, one per stage, whatever the number of frames: the layouts have room for the
longest history and the unit index is data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from nd_jax.errors import UserError
from nd_jax.models.causal_vae import posterior
from nd_jax.models.functional import Params
from nd_jax.models.system import CODEC, DENOISER, Conditions
from nd_jax.pixels import from_uint8, to_uint8
from nd_jax.pyramid.layout import envelopes, layout_arrays, legal_multiple
from nd_jax.pyramid.noise import block_noise_source, draw_initial_noise, draw_noise
from nd_jax.pyramid.sampler import CountingJit, SamplePlan, guide, sample, twice
from nd_jax.recipes.preset import SamplingConfig
from nd_jax.recipes.pruning import influence_reducer
from nd_jax.system import VideoSystem

PIXEL_LIMIT = 1 << 27
"""Largest number of pixels (frames x height x width) of one video."""


@dataclass(frozen=True)
class Noise:
    """All random numbers of a batch: initial noise [B, U, h, w, C] at full size, block noise by (unit, stage), and the
    posterior's noise of a given first frame [B, 1, h, w, C]."""

    initial: Float[np.ndarray, "b u h w c"]
    block: Sequence[Array] | Callable[[int, int], Array]
    first: Float[np.ndarray, "b 1 h w c"] | None = None


def sample_plan(config: SamplingConfig) -> SamplePlan:
    """The sampler's plan for a preset's or folder's settings."""
    return SamplePlan(config.first_steps, config.later_steps, config.first_guidance, config.later_guidance, config.grid)


def needs_negative(plan: SamplePlan) -> bool:
    """Whether guidance does anything: at scales 0 and 1 only the prompt's own velocity counts."""
    return not {plan.first_guidance, plan.later_guidance} <= {0.0, 1.0}


class Generator:
    """A system at one size, ready to run; programs are compiled once and kept.

    Args:
        system: networks and tokenizers.
        height, width: pixels.
        frames: largest number of frames, 1 + 8k; shorter videos use the same programs.
        text_length: tokens of the text sequence that the denoiser reads.

    Raises:
        UserError: for a size that does not fit the pyramid or a number of frames that does not fit the codec, naming
            the nearest legal one.
    """

    def __init__(self, system: VideoSystem, *, height: int, width: int, frames: int, text_length: int | None = None):
        self.system, self.frames = system, frames
        config, schedule = system.config, system.schedule
        codec, patch = config.causal_video_vae, config.diffusion_transformer.patch_size
        self.latent_frames = check_size(height, width, frames, codec, patch, schedule.stages)
        self.height, self.width = height, width
        space = codec.space_scale
        self.envelopes = envelopes(
            max(self.latent_frames - 1, 1),
            system.video.text_length if text_length is None else text_length,
            height // space,
            width // space,
            patch_size=patch,
            stages=schedule.stages,
        )
        denoiser, codec_network = system.definitions[DENOISER], system.definitions[CODEC]
        self._stages = {
            guided: [CountingJit(partial(_velocity, denoiser, envelope, guided=guided)) for envelope in self.envelopes]
            for guided in (False, True)
        }
        self._influence = [CountingJit(partial(_influence, denoiser, envelope)) for envelope in self.envelopes]
        self._first_chunk = CountingJit(lambda params, z: codec_network.bind(params).decode_chunk(z))
        self._next_chunk = CountingJit(lambda params, z, past: codec_network.bind(params).decode_chunk(z, past))
        self._encode = CountingJit(lambda params, video: posterior(codec_network.bind(params).encode(video)))

    @property
    def channels(self) -> int:
        return self.system.config.diffusion_transformer.in_channels

    @property
    def compilations(self) -> int:
        """Denoiser programs compiled so far."""
        return sum(stage.compilations for stages in self._stages.values() for stage in stages)

    def noise(self, seed: int, samples: Sequence[int | str], latent_frames: int | None = None) -> Noise:
        """Named noise: sample n of a seed is the same whatever else is in the batch, and in every runtime."""
        count = self.latent_frames if latent_frames is None else latent_frames
        size = (self.envelopes[-1].height, self.envelopes[-1].width)
        return Noise(
            draw_initial_noise(seed, samples, count, *size, self.channels),
            block_noise_source(seed, samples, self.envelopes, self.channels, self.system.schedule.gamma),
            np.stack([draw_noise(seed, f"{n}/first", (1, *size, self.channels)) for n in samples]),
        )

    def latents(
        self,
        conditions: Conditions,
        noise: Noise,
        plan: SamplePlan,
        *,
        negative: Conditions | None = None,
        first_latent: Float[Array, "b 1 h w c"] | None = None,
        trace: Callable | None = None,
        influence: bool = False,
    ) -> Float[Array, "b u h w c"] | tuple[Array, Array]:
        """Normalised latents for B prompts.

        ``negative`` (B rows) is needed when the plan has guidance. ``first_latent`` is a given, normalised unit 0. With
        ``influence`` also the sums that ``BlockInfluence.from_sums`` reads, over every denoiser call.
        """
        guided = needs_negative(plan)
        if guided:
            plan = replace(plan, first_guidance=plan.first_guidance or 1.0, later_guidance=plan.later_guidance or 1.0)
            if negative is None:
                raise UserError("generate: guidance needs a negative prompt; give one (it may be empty)")
            conditions = Conditions(*(jnp.concatenate(pair) for pair in zip(negative, conditions, strict=True)))
        params, sums = self.system.params[DENOISER], []

        def velocity(stage: int):
            def run(z, timestep, history, unit_index, guidance):
                if influence:
                    args = (twice(z), twice(timestep), tuple(map(twice, history))) if guided else (z, timestep, history)
                    sums.append(self._influence[stage](params, conditions, *args, unit_index))
                return self._stages[guided][stage](params, conditions, z, timestep, history, unit_index, guidance)

            return run

        latents = sample(
            velocity,
            self.envelopes,
            self.system.schedule,
            plan,
            noise.initial,
            noise.block,
            first_latent=first_latent,
            trace=trace,
        )
        return (latents, sum(sums)) if influence else latents

    def encode_first_frame(
        self, image: UInt8[np.ndarray, "b h w 3"], noise: Float[np.ndarray, "b 1 h w c"]
    ) -> Float[Array, "b 1 h w c"]:
        """Normalised latent of given first frames: a posterior sample, as the official pipeline takes it."""
        code = self._encode(self.system.params[CODEC], jnp.asarray(from_uint8(image))[:, None])
        return self.system.stats.normalise(code.sample(noise))

    def decode(self, latents: Float[Array, "b u h w c"]) -> UInt8[np.ndarray, "b t h w 3"]:
        """Frames of normalised latents, one latent frame at a time; memory does not grow with the video's length."""
        params, raw = self.system.params[CODEC], self.system.stats.denormalise(latents)
        frames, past = self._first_chunk(params, raw[:, :1])
        video = [to_uint8(frames)]
        for unit in range(1, raw.shape[1]):
            frames, past = self._next_chunk(params, raw[:, unit : unit + 1], past)
            video.append(to_uint8(frames))
        return np.concatenate(video, axis=1)


def _velocity(denoiser, envelope, params: Params, conditions: Conditions, z, timestep, history, unit, scale, *, guided):
    """One stage's velocity. With guidance, conditions have the negative rows first and everything else is doubled."""
    if guided:
        z, timestep, history = twice(z), twice(timestep), tuple(map(twice, history))
    layout = layout_arrays(envelope, unit, conditions.mask)
    (velocity,) = denoiser(params, [(*history, z)], conditions.text, conditions.pooled, timestep, [layout])
    return guide(velocity, scale) if guided else velocity


def _influence(denoiser, envelope, params: Params, conditions: Conditions, z, timestep, history, unit):
    """Block influence sums of one call, [blocks, 2, 2]; padding weighs nothing."""
    layout = layout_arrays(envelope, unit, conditions.mask)
    real = jnp.broadcast_to(layout.segments == 1, (z.shape[0], layout.segments.shape[1])).astype(jnp.float32)
    text_length = conditions.text.shape[1]
    reducer = influence_reducer(real[:, text_length:], real[:, :text_length])
    _, sums = denoiser(params, [(*history, z)], conditions.text, conditions.pooled, timestep, [layout], reducer=reducer)
    return sums


def check_size(height: int, width: int, frames: int, codec, patch: int, stages: int) -> int:
    """Number of latent frames. Raises UserError naming the nearest legal size or length."""
    multiple, time = codec.space_scale * legal_multiple(patch, stages), codec.time_scale
    if height < 1 or width < 1 or height % multiple or width % multiple:
        near = "x".join(str(max(1, round(side / multiple)) * multiple) for side in (height, width))
        raise UserError(
            f"size {height}x{width} does not fit the pyramid: expected multiples of {multiple}; the nearest is {near}"
        )
    if frames < 1 or (frames - 1) % time:
        near = max(0, round((frames - 1) / time)) * time + 1
        raise UserError(f"{frames} frames do not fit the codec: expected 1 + {time}k; the nearest is {near}")
    if frames * height * width > PIXEL_LIMIT:
        raise UserError(
            f"{frames} frames of {height}x{width} are {frames * height * width} pixels; expected at most {PIXEL_LIMIT}"
        )
    return 1 + (frames - 1) // time


def generate(
    system: VideoSystem,
    prompts: Sequence[str],
    *,
    seed: int = 0,
    plan: SamplePlan | None = None,
    negative_prompt: str = "",
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
    first_frames: UInt8[np.ndarray, "n h w 3"] | None = None,
    batch: int = 16,
    generator: Generator | None = None,
    warn: Callable[[str], None] = lambda line: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> UInt8[np.ndarray, "n t h w 3"]:
    """Videos for ``prompts``, uint8 [N, T, H, W, 3]. Prompt n with a seed always gives the same video.

    Sizes, length and plan default to what the system's folder asks for. ``first_frames`` (uint8, one per prompt)
    makes it hybrid generation. ``warn`` receives one line per prompt that was too long. Reuse ``generator`` to reuse
    its programs.
    """
    plan = sample_plan(system.sampling) if plan is None else plan
    if generator is None:
        video = system.video
        generator = Generator(
            system, height=height or video.height, width=width or video.width, frames=frames or video.frames
        )
    batch = min(batch, max(len(prompts), 1))
    guided = needs_negative(plan)
    videos = []
    for start in range(0, len(prompts), batch):
        chosen = list(prompts[start : start + batch])
        rows = [*range(start, start + len(chosen))]
        padding = batch - len(chosen)  # the last batch keeps its shape, so that nothing compiles again
        conditions, warnings = system.conditions(chosen + [""] * padding)
        for line in warnings:
            warn(line)
        negative = system.conditions([negative_prompt] * batch)[0] if guided else None
        noise = generator.noise(seed, rows + [f"padding-{i}" for i in range(padding)])
        first = None
        if first_frames is not None:
            given = np.concatenate([first_frames[rows], np.zeros((padding, *first_frames.shape[1:]), np.uint8)])
            first = generator.encode_first_frame(given, noise.first)
        latents = generator.latents(conditions, noise, plan, negative=negative, first_latent=first)
        videos.append(generator.decode(latents)[: len(chosen)])
        progress(min(start + batch, len(prompts)), len(prompts))
    return np.concatenate(videos)
