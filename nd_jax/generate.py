"""Prompt to video: text encoders, the pyramidal sampler around the denoiser, and the streaming codec.

The denoiser is three compiled programs, one per stage, whatever the number of frames: the layouts have room for the
longest history and the unit index is data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from nd_jax.errors import UserError
from nd_jax.models.causal_vae import posterior
from nd_jax.models.gates import Gates
from nd_jax.models.system import CODEC, DENOISER, Conditions
from nd_jax.pixels import from_uint8, to_uint8
from nd_jax.pyramid.layout import REAL, envelopes, layout_arrays, legal_multiple
from nd_jax.pyramid.noise import block_noise_source, draw_initial_noise, draw_noise, fresh_noise_source
from nd_jax.pyramid.sampler import CountingJit, SamplePlan, guide, sample, twice
from nd_jax.recipes.pruning import influence_reducer
from nd_jax.system import VideoSystem

PIXEL_LIMIT = 1 << 27
"""Largest number of pixels (frames x height x width) of one video."""


@dataclass(frozen=True)
class Noise:
    """All random numbers of a batch: initial noise [B, U, h, w, C] at full size, block noise by (unit, stage), the
    posterior's noise of a given first frame [B, 1, h, w, C], and fresh noise by (unit, stage, step)."""

    initial: Float[np.ndarray, "b u h w c"]
    block: Sequence[Array] | Callable[[int, int], Array]
    first: Float[np.ndarray, "b 1 h w c"] | None = None
    fresh: Callable[[int, int, int], Array] | None = None


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
        config, schedule = system.config, system.schedule
        codec, patch = config.causal_video_vae, config.diffusion_transformer.patch_size
        self.system, self.height, self.width = system, height, width
        self.latent_frames = check_size(height, width, frames, codec, patch, schedule.stages)
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
            (guided, influence): [
                CountingJit(partial(_denoise, denoiser, envelope, guided=guided, influence=influence))
                for envelope in self.envelopes
            ]
            for guided in (False, True)
            for influence in (False, True)
        }
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

    def stage_programs(self, *, guided: bool) -> list[CountingJit]:
        """The denoiser of every stage, as ``latents`` runs it: of (params, conditions, *sampler's inputs, kept=)."""
        return self._stages[guided, False]

    def noise(self, seed: int, samples: Sequence[int | str], latent_frames: int | None = None) -> Noise:
        """Named noise: sample n of a seed is the same whatever else is in the batch, and in every runtime."""
        count = self.latent_frames if latent_frames is None else latent_frames
        size = (self.envelopes[-1].height, self.envelopes[-1].width)
        return Noise(
            draw_initial_noise(seed, samples, count, *size, self.channels),
            block_noise_source(seed, samples, self.envelopes, self.channels, self.system.schedule.gamma),
            np.stack([draw_noise(seed, f"{n}/first", (1, *size, self.channels)) for n in samples]),
            fresh_noise_source(seed, samples, self.envelopes, self.channels),
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
        kept: Int[Array, " k"] | None = None,
        gates: Gates | None = None,
    ) -> Float[Array, "b u h w c"] | tuple[Array, Array]:
        """Normalised latents for B prompts.

        ``negative`` (B rows) is needed when the plan has guidance. ``first_latent`` is a given, normalised unit 0. With
        ``influence`` also the sums that ``BlockInfluence.from_sums`` reads, over every denoiser call: [stages, blocks,
        2, 2]. With ``kept`` only these blocks run (and the last one), with ``gates`` pieces of them count for nothing;
        which ones is data, so nothing compiles again.
        """
        guided = needs_negative(plan)
        plan, conditions = with_negative(plan, conditions, negative)
        params, sums = self.system.on_device[DENOISER], [0.0] * len(self.envelopes)
        stages = self._stages[guided, influence]

        def velocity(stage: int):
            def run(*inputs):
                found, summed = stages[stage](params, conditions, *inputs, kept=kept, gates=gates)
                if influence:
                    sums[stage] += summed
                return found

            return run

        latents = sample(
            velocity,
            self.envelopes,
            self.system.schedule,
            plan,
            noise.initial,
            noise.block,
            fresh_noise=noise.fresh,
            first_latent=first_latent,
            trace=trace,
        )
        return (latents, jnp.stack(sums)) if influence else latents

    def encode_first_frame(
        self, image: UInt8[np.ndarray, "b h w 3"], noise: Float[np.ndarray, "b 1 h w c"]
    ) -> Float[Array, "b 1 h w c"]:
        """Normalised latent of given first frames: a posterior sample, as the official pipeline takes it."""
        code = self._encode(self.system.on_device[CODEC], jnp.asarray(from_uint8(image))[:, None])
        return self.system.stats.normalise(code.sample(noise))

    def decode(self, latents: Float[Array, "b u h w c"]) -> UInt8[np.ndarray, "b t h w 3"]:
        """Frames of normalised latents, one latent frame at a time; memory does not grow with the video's length."""
        params, raw = self.system.on_device[CODEC], self.system.stats.denormalise(latents)
        frames, past = self._first_chunk(params, raw[:, :1])
        video = [to_uint8(frames)]
        for unit in range(1, raw.shape[1]):
            frames, past = self._next_chunk(params, raw[:, unit : unit + 1], past)
            video.append(to_uint8(frames))
        return np.concatenate(video, axis=1)


def with_negative(
    plan: SamplePlan, conditions: Conditions, negative: Conditions | None
) -> tuple[SamplePlan, Conditions]:
    """Plan and conditions as the denoiser's programs want them: with guidance the negative rows first."""
    if not needs_negative(plan):
        return plan, conditions
    if negative is None:
        raise UserError("generate: guidance needs a negative prompt; give one (it may be empty)")
    plan = replace(plan, first_guidance=plan.first_guidance or 1.0, later_guidance=plan.later_guidance or 1.0)
    return plan, Conditions(*(jnp.concatenate(pair) for pair in zip(negative, conditions, strict=True)))


def _denoise(
    denoiser,
    envelope,
    params,
    conditions,
    z,
    timestep,
    history,
    unit,
    scale,
    *,
    guided,
    influence,
    kept=None,
    gates=None,
):
    """One stage's velocity; with ``influence`` also this call's sums, [blocks, 2, 2], where padding weighs nothing.

    With guidance, conditions have the negative rows first and everything else is doubled.
    """
    if guided:
        z, timestep, history = twice(z), twice(timestep), tuple(map(twice, history))
    layout, reducer, sums = layout_arrays(envelope, unit, conditions.mask), None, None
    if influence:
        real = jnp.broadcast_to(layout.segments == REAL, (len(z), envelope.length)).astype(jnp.float32)
        reducer = influence_reducer(real[:, envelope.text_length :], real[:, : envelope.text_length])
    inputs = [(*history, z)], conditions.text, conditions.pooled, timestep, [layout]
    found = denoiser(params, *inputs, reducer=reducer, kept=kept, gates=gates)
    if influence:
        found, sums = found
    return (guide(found[0], scale) if guided else found[0]), sums


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


def generate_batches(
    system: VideoSystem,
    prompts: Sequence[str],
    *,
    seed: int = 0,
    plan: SamplePlan | None = None,
    negative_prompt: str = "",
    first_frames: UInt8[np.ndarray, "n h w 3"] | None = None,
    first_latents: Callable[[Sequence[str], Sequence[int | str], int], Array] | None = None,
    batch: int = 16,
    generator: Generator | None = None,
    kept: Int[Array, " k"] | None = None,
    gates: Gates | None = None,
    samples: Sequence[int | str] | None = None,
    warn: Callable[[str], None] = lambda line: None,
) -> Iterator[UInt8[np.ndarray, "b t h w 3"]]:
    """Videos for ``prompts``, ``batch`` at a time. Prompt n with a seed always gives the same video.

    Args:
        plan: steps and guidance; default: what the system's folder asks for.
        negative_prompt: what guidance steers away from.
        first_frames: given first frames, one per prompt: hybrid generation.
        first_latents: function of (prompts, names of their samples, seed) that gives them as normalised latents
            [B, 1, h, w, C], instead; see ``first_unit``.
        generator: size, length and compiled programs; default: one for what the folder asks for.
        kept: the denoiser's blocks to run, besides the last one; default: all.
        gates: on what its blocks add; default: all open.
        samples: names of the prompts' noise; default: their places.
        warn: receives one line for every prompt that was too long.

    Raises:
        UserError: without prompts, for a batch below 1, and for whatever does not fit the system.
    """
    if not prompts or batch < 1:
        raise UserError(f"generate: {len(prompts)} prompts, {batch} at a time; expected at least one of each")
    plan = system.sampling if plan is None else plan
    if generator is None:
        video = system.video
        generator = Generator(system, height=video.height, width=video.width, frames=video.frames)
    batch = min(batch, len(prompts))
    negative = system.conditions([negative_prompt] * batch)[0] if needs_negative(plan) else None
    for start in range(0, len(prompts), batch):
        rows = range(start, min(start + batch, len(prompts)))
        padding = batch - len(rows)  # the last batch keeps its shape, so that nothing compiles again
        lines = [prompts[row] for row in rows] + [""] * padding
        conditions, warnings = system.conditions(lines)
        for line in warnings:
            warn(line)
        named = rows if samples is None else samples[rows.start : rows.stop]
        names = [*named, *(f"padding-{i}" for i in range(padding))]
        noise = generator.noise(seed, names)
        first = None if first_latents is None else first_latents(lines, names, seed)
        if first_frames is not None:
            given = np.pad(first_frames[rows.start : rows.stop], ((0, padding), (0, 0), (0, 0), (0, 0)), mode="edge")
            first = generator.encode_first_frame(given, noise.first)
        latents = generator.latents(
            conditions, noise, plan, negative=negative, first_latent=first, kept=kept, gates=gates
        )
        yield generator.decode(latents)[: len(rows)]


def first_unit(system: VideoSystem, *, height: int, width: int) -> Callable[..., Float[Array, "b 1 h w c"]]:
    """What ``generate_batches`` takes as ``first_latents``: a system's own first frames, by its plan and guidance. They
    are those of its videos with the same seed."""
    generator, plan = Generator(system, height=height, width=width, frames=1), system.sampling

    def make(prompts: Sequence[str], names: Sequence[int | str], seed: int) -> Float[Array, "b 1 h w c"]:
        conditions, _ = system.conditions(list(prompts))
        negative = system.conditions([""] * len(prompts))[0] if needs_negative(plan) else None
        return generator.latents(conditions, generator.noise(seed, names), plan, negative=negative)

    return make


def generate(
    system: VideoSystem,
    prompts: Sequence[str],
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
    **options: Any,
) -> UInt8[np.ndarray, "n t h w 3"]:
    """All videos for ``prompts`` in one array; ``options`` are those of ``generate_batches``."""
    videos = []
    for made in generate_batches(system, prompts, **options):
        videos.append(made)
        progress(sum(map(len, videos)), len(prompts))
    return np.concatenate(videos)
