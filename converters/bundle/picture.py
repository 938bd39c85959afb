"""The parts of a manifest that say how a first frame is made and how frames are enlarged, and their host tables."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from nd_jax.converters.bundle.sections import TOKENIZERS
from nd_jax.converters.bundle.writer import BundleWriter
from nd_jax.converters.folders import read_tokenizer
from nd_jax.converters.graphs.picture_parts import IMAGE_DECODER, TOWERS, UNET, UPSCALER, Picture
from nd_jax.models.clip import LEGACY_EOS
from nd_jax.models.embeddings import sinusoid
from nd_jax.models.quicksrnet import MARGIN, QuickSRNetConfig
from nd_jax.models.unet import guidance_embedding, size_sinusoids
from nd_jax.pyramid.lcm import LCMSchedule

FOLDERS = ("ssd_1b_tokenizer", "ssd_1b_tokenizer_2")


def tower_sections(picture: Picture, text: str) -> list[dict[str, Any]]:
    """An entry for each text tower, as the runtime reads them; ``text`` is what the probes' ids belong to."""
    found = []
    for name, config, folder, ids in zip(TOWERS, picture.towers, FOLDERS, picture.probes, strict=True):
        graph = picture.shared.get(name, name)
        eos = config.eos_token_id
        found.append(
            {
                "graph": graph,
                "tokenizer": TOKENIZERS[graph][0] if graph in TOKENIZERS else folder,
                "kind": "clip",
                "length": config.max_position_embeddings,
                "table": f"{graph}/embedding",
                "positions": f"{graph}/positions",
                "eos": None if eos == LEGACY_EOS else eos,
                "probe": {"text": text, "ids": ids},
            }
        )
    return found


def lcm_steps(count: int, schedule: LCMSchedule | None = None) -> list[dict[str, Any]]:
    """The numbers of every latent-consistency step, all of them exact in float32.

    From noise prediction e and sample x: ``clean = (x - noise e) / signal``, ``y = out clean + skip x``; then, except
    after the last step, ``next_signal y + next_noise`` times fresh noise.
    """
    schedule = LCMSchedule() if schedule is None else schedule
    timesteps, found = schedule.timesteps(count), []

    def level(timestep: int) -> tuple[float, float]:
        signal = schedule.alphas_cumprod[timestep]
        return float(np.sqrt(signal)), float(np.sqrt(1 - signal))

    for timestep, following in zip(timesteps, [*timesteps[1:], None], strict=True):
        (signal, noise), (skip, out) = level(timestep), map(np.float32, schedule.boundary_scalings(int(timestep)))
        step = {"timestep": int(timestep), "signal": signal, "noise": noise, "skip": float(skip), "out": float(out)}
        found.append(step | {"next": None if following is None else list(level(following))})
    return found


def write_picture(writer: BundleWriter, picture: Picture, text: str) -> None:
    """Add tables, tokenizers and the manifest's section of a picture whose graphs are written."""
    config, (height, width, channels) = picture.unet, picture.latent
    for name, folder, source in zip(TOWERS, FOLDERS, picture.tokenizers, strict=True):
        if name not in picture.shared:
            tables = picture.load(name)["text_model"]["embeddings"]
            writer.table(f"{name}/embedding", np.asarray(tables["token_embedding"]["embedding"], np.float32))
            writer.table(f"{name}/positions", np.asarray(tables["position_embedding"]["embedding"], np.float32))
            writer.tokenizer(folder, read_tokenizer(source))
    steps = lcm_steps(picture.steps)
    timesteps = jnp.asarray([step["timestep"] for step in steps], jnp.float32)
    writer.table("picture/times", np.asarray(sinusoid(timesteps, config.block_out_channels[0])))
    sizes = jnp.asarray([[picture.height, picture.width, 0, 0, picture.height, picture.width]], jnp.float32)
    writer.table("picture/sizes", np.asarray(size_sinusoids(sizes, config.addition_time_embed_dim)))
    guided = config.time_cond_proj_dim is not None
    if guided:  # guidance 0: a single pass, embedded as it is
        embedding = guidance_embedding(jnp.zeros(1), config.time_cond_proj_dim)
        writer.table("picture/guidance", np.asarray(embedding))
    writer.content["picture"] = {
        "text": tower_sections(picture, text),
        "unet": UNET,
        "decoder": IMAGE_DECODER,
        "latent": [height, width, channels],
        "scale": picture.decoder.scaling_factor,
        "times": "picture/times",
        "sizes": "picture/sizes",
        "guidance": "picture/guidance" if guided else None,
        "steps": steps,
    }


def upscaler_section(config: QuickSRNetConfig) -> dict[str, Any]:
    """``margin``: pixels by which a frame's edges are repeated before the graph, and cut off enlarged behind it."""
    return {"graph": UPSCALER, "margin": MARGIN, "factor": config.scaling_factor}
