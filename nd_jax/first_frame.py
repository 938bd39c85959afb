"""The first frame: SSD-1B (arXiv 2401.02677) with latent-consistency steps, and SDXL's image decoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from PIL import Image

from nd_jax.errors import UserError
from nd_jax.models import clip, image_vae, unet
from nd_jax.parts import Parts
from nd_jax.pixels import round_to_uint8
from nd_jax.pyramid.lcm import LCMSchedule, lcm_sample
from nd_jax.pyramid.noise import draw_noise
from nd_jax.pyramid.sampler import CountingJit

UNET, VAE = "ssd_1b_unet", "ssd_1b_vae"
TOWERS = {"ssd_1b_text_encoder": "ssd_1b_tokenizer", "ssd_1b_text_encoder_2": "ssd_1b_tokenizer_2"}
NAMES = (UNET, VAE, *TOWERS)
STEPS = 4
ENLARGED = 2
"""Pictures are made at twice the video's size and then reduced, as the official generator does it."""


class Programs:
    """Compiled functions by name, each made at its first use and kept."""

    def __init__(self):
        self._kept: dict[str, CountingJit] = {}

    def __call__(self, name: str, maker: Callable[[], Callable]) -> Callable:
        """The function called ``name``; ``maker`` gives what to compile, if it is not there yet."""
        if name not in self._kept:
            self._kept[name] = CountingJit(maker())
        return self._kept[name]

    @property
    def compilations(self) -> int:
        """How often anything was compiled."""
        return sum(each.compilations for each in self._kept.values())


class PictureText(NamedTuple):
    """What the UNet reads of one prompt: states of both towers side by side [1, S, D], pooled state [1, P]."""

    states: Float[Array, "1 s d"]
    pooled: Float[Array, "1 p"]


def check(parts: Parts, height: int, width: int) -> None:
    """Raises UserError, before anything is loaded, for networks that do not fit each other or the size."""
    network, vae = parts.config(UNET), parts.config(VAE)
    first, second = (parts.config(name) for name in TOWERS)
    pairs = (
        ("both text encoders' states", first.hidden_size + second.hidden_size, network.cross_attention_dim),
        ("second text encoder's projection", second.projection_dim, network.pooled_channels),
        ("image decoder's latents", vae.latent_channels, network.in_channels),
    )
    for what, found, expected in pairs:
        if found != expected:
            raise UserError(f"first frame: the {what} have {found} channels, {UNET} expects {expected}")
    if height * ENLARGED % vae.space_scale or width * ENLARGED % vae.space_scale:
        raise UserError(f"first frame: {height}x{width} pixels; {VAE} needs multiples of {vae.space_scale // ENLARGED}")


def read_prompts(parts: Parts, prompts: Sequence[str], programs: Programs, compute: Any) -> list[PictureText]:
    """Both towers, one after the other: the last-but-one states of each, and the second one's projected pooled state.

    No mask: padding is read as well, as SDXL does it.
    """
    states: list[list[Array]] = [[] for _ in prompts]
    pooled: list[Array] = []
    for name, tokenizer in TOWERS.items():
        config = parts.config(name)
        reader = parts.tokenizer(tokenizer, config.max_position_embeddings)
        run = programs(name, lambda config=config: clip.definition(config, dtype=compute))
        params = parts.load(name)
        for row, prompt in enumerate(prompts):
            found = run(params, reader([prompt]).ids)
            states[row].append(np.asarray(found.penultimate_hidden_state))
            if name == list(TOWERS)[-1]:
                pooled.append(np.asarray(found.text_embeds))
    return [PictureText(np.concatenate(each, axis=-1), row) for each, row in zip(states, pooled, strict=True)]


def sample_latents(
    parts: Parts,
    texts: Sequence[PictureText],
    samples: Sequence[int | str],
    seed: int,
    size: tuple[int, int],
    programs: Programs,
    compute: Any,
    *,
    steps: int = STEPS,
) -> list[Float[np.ndarray, "1 h w c"]]:
    """Clean latents of one picture for every prompt, from noise named ``SAMPLE/picture/STEP``."""
    config, scale = parts.config(UNET), parts.config(VAE).space_scale
    network = unet.definition(config, dtype=compute)
    run = programs(UNET, lambda: network)
    params, schedule = parts.load(UNET), LCMSchedule()
    height, width = (side * ENLARGED for side in size)
    time_ids = np.asarray([[height, width, 0, 0, height, width]], np.float32)
    guidance = None
    if config.time_cond_proj_dim is not None:  # guidance 0: a single pass, embedded as it is
        guidance = unet.guidance_embedding(jnp.zeros(1), config.time_cond_proj_dim)
    shape, made = (1, height // scale, width // scale, config.in_channels), []
    for sample, text in zip(samples, texts, strict=True):
        noise = [draw_noise(seed, f"{sample}/picture/{step}", shape) for step in range(steps)]

        def predict(latent: Array, timestep: int, text: PictureText = text) -> Array:
            now = jnp.full((1,), timestep, jnp.int32)
            return run(params, latent, now, text.states, text.pooled, time_ids, guidance).astype(jnp.float32)

        made.append(np.asarray(lcm_sample(schedule, predict, noise[0], noise[1:], schedule.timesteps(steps))))
    return made


def decode(
    parts: Parts, latents: Sequence[Float[np.ndarray, "1 h w c"]], programs: Programs, compute: Any
) -> list[UInt8[np.ndarray, "h w 3"]]:
    """Pictures of latents, at their full size."""
    network = image_vae.definition(parts.config(VAE), half="decoder", dtype=compute)
    run = programs(VAE, lambda: network)
    wanted = [name for name in ("decoder", "post_quant_conv") if name in network.abstract()]
    params = parts.load(VAE, wanted)
    return [round_to_uint8(np.asarray(run(params, latent), np.float32))[0] for latent in latents]


def fit(picture: UInt8[np.ndarray, "h w 3"], size: tuple[int, int]) -> UInt8[np.ndarray, "h w 3"]:
    """A picture resized (Lanczos) to the video's height and width."""
    return np.asarray(Image.fromarray(picture).resize((size[1], size[0]), Image.Resampling.LANCZOS))
