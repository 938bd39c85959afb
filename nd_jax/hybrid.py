"""Hybrid generation, whole (paper, figure 2): prompt to enlarged video, with one network in memory at a time.

Every network does its work for all prompts before the next one is loaded; what lies between two parts is small and on
the host. Compiled programs are kept, so that a second call only loads weights again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from nd_jax import first_frame
from nd_jax.data.video_out import open_video
from nd_jax.errors import UserError
from nd_jax.generate import Generator, check_size
from nd_jax.meter import Meter
from nd_jax.models import causal_vae, clip, context_adapter, quicksrnet, safety_checker, t5
from nd_jax.models.causal_vae import posterior
from nd_jax.models.functional import Params
from nd_jax.models.system import CLIP_1, CLIP_2, CODEC, DENOISER, T5, Conditions, SystemConfig
from nd_jax.parts import Parts
from nd_jax.pixels import from_uint8, round_to_uint8, to_uint8
from nd_jax.pyramid.noise import draw_noise
from nd_jax.pyramid.sampler import HYBRID, SamplePlan
from nd_jax.pyramid.schedule import Schedule
from nd_jax.recipes.preset import VideoConfig
from nd_jax.system import VideoSystem, latent_stats

UPSCALER, CHECKER = "super_resolution", "safety_checker"
CHECK_EVERY = 8
"""Frames between two that the safety checker sees; the first one is always seen."""


@dataclass(frozen=True)
class Made:
    """A finished video: its file (``None`` if the safety checker withheld it), its first frame and some others."""

    file: Path | None
    frames: list[UInt8[np.ndarray, "h w 3"]]


@dataclass
class HybridPipeline:
    """The networks of an official hybrid folder as one program.

    ``denoiser`` and ``adapter`` are their names there. ``compute`` is what networks compute in; in what dtype their
    parameters are kept is the ``parts``' business. Raises UserError, before any weights are read, if something is
    missing or does not fit.
    """

    parts: Parts
    video: VideoConfig
    denoiser: str = "diffusion_transformer_320p"
    adapter: str = "context_adapter"
    plan: SamplePlan = HYBRID
    schedule: Schedule = field(default_factory=Schedule)
    compute: Any = jnp.float32
    safety: bool = True
    meter: Meter = field(default_factory=Meter)

    def __post_init__(self):
        needed = (self.denoiser, CODEC, T5, self.adapter, CLIP_1, CLIP_2, *first_frame.NAMES)
        if missing := [name for name in needed if not self.parts.has(name)]:
            raise UserError(f"hybrid generation needs {', '.join(missing)}; expected these folders beside the others")
        self.system = VideoSystem(
            SystemConfig(self.parts.config(self.denoiser), self.parts.config(CODEC)),
            {},
            {},
            self.video,
            self.plan,
            self.schedule,
            mode="hybrid",
            compute=self.compute,
        )
        size = self.video.height, self.video.width
        config = self.system.config
        check_size(
            *size,
            self.video.frames,
            config.causal_video_vae,
            config.diffusion_transformer.patch_size,
            self.schedule.stages,
        )
        first_frame.check(self.parts, *size)
        self._generator = Generator(self.system, height=size[0], width=size[1], frames=self.video.frames)
        self._programs = first_frame.Programs()
        self._names: list[int | str] = []  # of the noise of the prompts at hand
        self._checker: Params | None = None  # kept while pictures come, and dropped before large networks do

    @property
    def compilations(self) -> int:
        """Programs compiled so far."""
        return self._programs.compilations + self._generator.compilations

    @property
    def checks(self) -> bool:
        """Whether pictures are checked."""
        return self.safety and self.parts.has(CHECKER)

    def generate(
        self,
        prompts: Sequence[str],
        files: Sequence[Path],
        *,
        seed: int = 0,
        samples: Sequence[int | str] | None = None,
        overwrite: bool = False,
    ) -> Iterator[Made]:
        """One video after the other, each in its file when it is yielded. A prompt with the name of its noise (default:
        its place) and a seed always gives the same."""
        rows, self._names = range(len(prompts)), list(range(len(prompts)) if samples is None else samples)
        with self.meter.part("text: DT5, context adapter"):
            states = self._sequence(prompts)
        with self.meter.part("text: CLIP, pooled"):
            pooled = self._pooled(prompts)
        conditions = [Conditions(*each, row) for each, row in zip(states, pooled, strict=True)]
        with self.meter.part("first frame: CLIP states"):
            texts = first_frame.read_prompts(self.parts, prompts, self._programs, self.compute)
        with self.meter.part("first frame: UNet"):
            size = self.video.height, self.video.width
            latents = first_frame.sample_latents(
                self.parts, texts, self._names, seed, size, self._programs, self.compute
            )
        with self.meter.part("first frame: image decoder"):
            pictures = first_frame.decode(self.parts, latents, self._programs, self.compute)
        pictures = [first_frame.fit(picture, size) for picture in pictures]
        with self.meter.part("safety checker, first frame"):
            unsafe = self._unsafe(pictures)
            self._checker = None
        kept = [n for n in rows if not unsafe[n]]
        with self.meter.part("video encoder, first frame"):
            first = self._encode({n: pictures[n] for n in kept}, seed)
        with self.meter.part("denoiser"):
            videos = self._sample({n: conditions[n] for n in kept}, first, seed)
        with self.meter.part("decoder, super-resolution"):
            finished = {n: self._write(videos.pop(n), files[n], overwrite=overwrite) for n in kept}
            self._checker = None
        for n in rows:
            yield finished.get(n, Made(None, [pictures[n]]))

    def _sequence(self, prompts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Text states of the denoiser's width and their masks, each of one prompt."""
        reader = self.parts.tokenizer("tokenizer_3", self.video.text_length)
        run = self._program(T5, t5)
        tokens, params = [reader([prompt]) for prompt in prompts], self.parts.load(T5)
        states = [run(params, each.ids, each.mask) for each in tokens]
        states = [each.last_hidden_state if each.prompt_embeds is None else each.prompt_embeds for each in states]
        del params
        adapt, params = self._program(self.adapter, context_adapter), self.parts.load(self.adapter)
        return [(np.asarray(adapt(params, each)), row.mask) for each, row in zip(states, tokens, strict=True)]

    def _pooled(self, prompts: Sequence[str]) -> list[np.ndarray]:
        """Both towers' projected states side by side."""
        rows: list[list[np.ndarray]] = [[] for _ in prompts]
        for name, tokenizer in ((CLIP_1, "tokenizer"), (CLIP_2, "tokenizer_2")):
            length = min(self.video.clip_length, self.parts.config(name).max_position_embeddings)
            reader, run = self.parts.tokenizer(tokenizer, length), self._program(name, clip)
            params = self.parts.load(name)
            for row, prompt in zip(rows, prompts, strict=True):
                row.append(np.asarray(run(params, reader([prompt]).ids).text_embeds))
            del params
        return [np.concatenate(row, axis=-1) for row in rows]

    def _program(self, name: str, network: Any) -> Callable:
        return self._programs(name, lambda: network.definition(self.parts.config(name), dtype=self.compute))

    def _encode(self, pictures: dict[int, np.ndarray], seed: int) -> dict[int, np.ndarray]:
        """Normalised posterior samples of the first frames."""
        if not pictures:
            return {}
        codec = self.system.config.causal_video_vae
        network = causal_vae.definition(codec, half="encoder", dtype=self.compute)
        run = self._programs("encoder", lambda: lambda params, x: posterior(network.bind(params).encode(x)))
        params, stats, found = self.parts.load(CODEC, ("encoder", "quant_conv")), latent_stats(codec), {}
        for n, picture in pictures.items():
            code = run(params, from_uint8(picture)[None, None])
            noise = draw_noise(seed, f"{self._names[n]}/first", code.mean.shape[1:])
            found[n] = np.asarray(stats.normalise(code.sample(noise[None])))
        return found

    def _sample(
        self, conditions: dict[int, Conditions], first: dict[int, np.ndarray], seed: int
    ) -> dict[int, np.ndarray]:
        """Latents of whole videos, from their first frames' on."""
        if not conditions:
            return {}
        generator = self._generator
        self.system.on_device = {DENOISER: self.parts.load(self.denoiser)}  # in place of what it would copy itself
        try:
            return {
                n: np.asarray(
                    generator.latents(
                        Conditions(*map(jnp.asarray, each)),
                        generator.noise(seed, [self._names[n]]),
                        self.plan,
                        first_latent=jnp.asarray(first[n]),
                    )
                )
                for n, each in conditions.items()
            }
        finally:
            del self.system.on_device

    def frames(self, latents: Float[np.ndarray, "1 u h w c"]) -> Iterator[Float[Array, "t h w 3"]]:
        """Decoded frames in [-1, 1], latent frame by latent frame; memory does not grow with the video's length."""
        codec = self.system.config.causal_video_vae
        network = causal_vae.definition(codec, half="decoder", dtype=self.compute)
        begin = self._programs("decoder 0", lambda: lambda params, z: network.bind(params).decode_chunk(z))
        go_on = self._programs("decoder", lambda: lambda params, z, past: network.bind(params).decode_chunk(z, past))
        wanted = [name for name in ("decoder", "post_quant_conv") if name in network.abstract()]
        params, raw = self.parts.load(CODEC, wanted), latent_stats(codec).denormalise(jnp.asarray(latents))
        video, past = begin(params, raw[:, :1])
        yield video[0]
        for unit in range(1, raw.shape[1]):
            video, past = go_on(params, raw[:, unit : unit + 1], past)
            yield video[0]

    def _write(self, latents: np.ndarray, file: Path, *, overwrite: bool) -> Made:
        """Decode, enlarge, check and write, piece by piece."""
        finish, factor = to_uint8, 1
        if self.parts.has(UPSCALER):
            config = self.parts.config(UPSCALER)
            network, factor = quicksrnet.definition(config, dtype=self.compute), config.scaling_factor
            run = self._programs(UPSCALER, lambda: lambda params, x: quicksrnet.enlarge(network, params, x, config))
            finish = partial(_enlarged, run, self.parts.load(UPSCALER))
        height, width = round(self.video.height * factor), round(self.video.width * factor)
        shown: list[np.ndarray] = []
        try:
            with open_video(file, height, width, fps=self.video.fps, overwrite=overwrite) as add:
                count = 0
                for piece in self.frames(latents):
                    large = np.stack([finish(frame) for frame in piece])
                    seen = [k for k in range(len(large)) if (count + k) % CHECK_EVERY == 0]
                    shown += [large[k] for k in seen]
                    if any(self._unsafe([large[k] for k in seen])):
                        raise _Withheld
                    add(large)
                    count += len(large)
        except _Withheld:
            return Made(None, shown[:1])
        return Made(file, shown)

    def _unsafe(self, pictures: Sequence[np.ndarray]) -> list[bool]:
        """What the checker says of each picture; nothing is unsafe where it is off."""
        if not self.checks or not pictures:
            return [False] * len(pictures)
        config = self.parts.config(CHECKER)
        run = self._program(CHECKER, safety_checker)
        shape = safety_checker.prepare
        prepared = self._programs("prepare", lambda: lambda x: shape(x, config.image_size))
        if self._checker is None:
            self._checker = self.parts.load(CHECKER)
        return [bool(run(self._checker, prepared(picture[None] / np.float32(255))).unsafe[0]) for picture in pictures]


class _Withheld(Exception):
    """The checker met something in a video that is being written."""


def _enlarged(run: Callable, params: Any, frame: Float[Array, "h w 3"]) -> UInt8[np.ndarray, "h2 w2 3"]:
    """A decoded frame through super-resolution, which works on [0, 1]; rounded."""
    large = run(params, jnp.clip(frame[None] / 2 + 0.5, 0, 1))
    return round_to_uint8(np.asarray(large[0], np.float32) * 2 - 1)
