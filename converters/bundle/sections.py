"""The parts of a manifest that say how a video is made: layouts, schedule, constants, order of loading."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from nd_jax.converters.graphs.attention import WHOLE_MASK, query_groups
from nd_jax.converters.graphs.host import MASKED
from nd_jax.converters.graphs.parts import CONDITIONING, DECODER, ENCODER, FIRST_DECODER, TEXT, stage_name
from nd_jax.converters.graphs.picture_parts import IMAGE_DECODER, TOWERS, UNET, UPSCALER
from nd_jax.converters.graphs.text_attention import HIDDEN
from nd_jax.models.causal_vae import NativeVAEConfig
from nd_jax.models.clip import LEGACY_EOS
from nd_jax.models.embeddings import TIMESTEP_CHANNELS
from nd_jax.models.system import CLIP_1, CLIP_2, T5, SystemConfig
from nd_jax.pyramid.clean import oversharpening
from nd_jax.pyramid.layout import Envelope
from nd_jax.pyramid.normalise import LatentStats
from nd_jax.pyramid.renoise import jump_coefficients
from nd_jax.pyramid.schedule import Schedule

TOKENIZERS = {T5: ("tokenizer_3", "t5"), CLIP_1: ("tokenizer", "clip"), CLIP_2: ("tokenizer_2", "clip")}


def stage_section(schedule: Schedule, envelope: Envelope, *, causal: bool, split: bool) -> dict[str, Any]:
    """Everything the host needs to know of one stage. ``slots`` are (level, oldest and newest unit counted back)."""
    stage = envelope.stage
    table = schedule.timesteps_per_stage[stage]
    clean = 1 - float(schedule.orig_start_sigmas[stage])
    return {
        "graph": stage_name(stage),
        "positions": f"positions/{stage}",
        "clips": [list(clip) for clip in envelope.clips],
        "slots": [list(slot) for slot in envelope.slots],
        "groups": [group._asdict() for group in query_groups(envelope, causal=causal, split=split)],
        "timesteps": {
            "first": float(table[0]),
            "last": float(table[-1]),
            "end": float(schedule.timestep_borders[stage, 1]),
            "sigma_last": float(schedule.sigmas_per_stage[stage, -1]),
        },
        "jump": list(jump_coefficients(clean, schedule.gamma)) if stage else None,
        "start_sigma": float(schedule.start_sigmas[stage]),
        "end_sigma": float(schedule.end_sigmas[stage]),
        "excess": oversharpening(schedule, stage),
    }


def denoiser_section(
    config: SystemConfig, schedule: Schedule, envelopes: Sequence[Envelope], graphs: Mapping[str, Any]
) -> dict[str, Any]:
    """``graphs``: the manifest's entries by name."""
    network = config.diffusion_transformer
    causal = network.use_temporal_causal
    return {
        "conditioning": CONDITIONING,
        "timestep_channels": TIMESTEP_CHANNELS,
        "patch": network.patch_size,
        "head_channels": network.attention_head_dim,
        "theta": 10000.0,
        "masked": MASKED,
        "causal": causal,
        "gamma": schedule.gamma,
        "stages": [
            stage_section(
                schedule,
                envelope,
                causal=causal,
                split=WHOLE_MASK not in graphs[stage_name(envelope.stage)]["inputs"],
            )
            for envelope in envelopes
        ],
    }


def text_section(
    config: SystemConfig, lengths: Mapping[str, int], probes: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """``lengths`` and ``probes`` by text encoder."""

    def entry(name: str) -> dict[str, Any]:
        tokenizer, kind = TOKENIZERS[name]
        return {
            "graph": name,
            "tokenizer": tokenizer,
            "kind": kind,
            "length": lengths[name],
            "table": f"{name}/embedding",
            "probe": dict(probes[name]),
        }

    towers = []
    for name in (CLIP_1, CLIP_2):
        eos = getattr(config, name).eos_token_id
        towers.append(entry(name) | {"positions": f"{name}/positions", "eos": None if eos == LEGACY_EOS else eos})
    adapted = config.context_adapter is not None or config.diffusion_transformer.context_embedder
    return {"t5": entry(T5), "clip": towers, "adapter": TEXT if adapted else None, "hidden": HIDDEN}


def latent_section(config: SystemConfig, stats: LatentStats, frames: int) -> dict[str, Any]:
    return {"channels": config.causal_video_vae.encoder_out_channels, "frames": frames, **stats.to_dict()}


def codec_section(config: SystemConfig) -> dict[str, Any]:
    codec = config.causal_video_vae
    native = isinstance(codec, NativeVAEConfig)
    return {
        "encoder": ENCODER,
        "decoder": DECODER,
        "first_decoder": FIRST_DECODER if native else None,
        "drop_first": 0 if native else codec.frames_per_latent - 1,
    }


def loading_section(graphs: Sequence[str], text: Sequence[str]) -> list[dict[str, Any]]:
    """The order of loading: what is not needed any more leaves before the next graphs come."""
    stages = [name for name in graphs if name.startswith("denoiser_")]
    steps = {"text": list(text)}
    if UNET in graphs:
        steps["picture_text"] = [name for name in graphs if name in TOWERS]
        steps |= {"picture": [UNET], "picture_decode": [IMAGE_DECODER]}
    steps |= {"first_frame": [ENCODER], "conditioning": [CONDITIONING], "denoise": stages}
    steps["decode"] = [name for name in graphs if name in (DECODER, FIRST_DECODER, UPSCALER)]
    return [{"step": name, "load": loaded, "unload": loaded} for name, loaded in steps.items()]


def sampling_section(plan: Any) -> dict[str, Any]:
    return {key: list(x) if isinstance(x, tuple) else x for key, x in dataclasses.asdict(plan).items()}
