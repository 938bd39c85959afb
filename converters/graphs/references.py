"""What the JAX networks answer, in the form of the graphs' inputs and outputs: the other side of every parity figure.

Each function returns one from a random generator to (inputs, outputs) by name. Parameters may be of any dtype; they
are computed with in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nd_jax.converters.graphs import host
from nd_jax.converters.graphs import t5 as t5_graphs
from nd_jax.converters.graphs.conditioning import subtree
from nd_jax.converters.graphs.mmdit import modulations
from nd_jax.converters.graphs.text_attention import HIDDEN
from nd_jax.models import causal_vae, context_adapter, mmdit
from nd_jax.models import clip as clip_network
from nd_jax.models import t5 as t5_network
from nd_jax.models.embeddings import sinusoid
from nd_jax.models.mmdit import MMDiTConfig
from nd_jax.pyramid.layout import REAL, Envelope, LayoutArrays, layout_arrays

Arrays = dict[str, np.ndarray]
Sample = Callable[[np.random.Generator], tuple[Arrays, Arrays]]


def wide(params: Mapping[str, Any]) -> dict[str, Any]:
    """A tree in float32."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), dict(params))


def draw(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape, np.float32)


def some(rng: np.random.Generator, length: int) -> np.ndarray:
    """A mask [1, length] whose first tokens, at least one, are real."""
    return (np.arange(length) < rng.integers(1, length + 1))[None].astype(np.int32)


def t5(config: Any, params: Mapping[str, Any], length: int) -> Sample:
    def sample(rng: np.random.Generator) -> tuple[Arrays, Arrays]:
        ids, mask = rng.integers(0, config.vocab_size, (1, length)), some(rng, length)
        found = jax.jit(t5_network.definition(config))(wide(params), jnp.asarray(ids), jnp.asarray(mask))
        states = found.last_hidden_state if found.prompt_embeds is None else found.prompt_embeds
        bias = np.where(mask > 0, 0, HIDDEN)[None].astype(np.float32)
        return {"embeddings": t5_graphs.embedding_table(params)[ids[0]], "bias": bias}, {"states": np.array(states[0])}

    return sample


def clip(
    config: Any, params: Mapping[str, Any], length: int, *, penultimate: bool = False, pooled: bool = True
) -> Sample:
    def sample(rng: np.random.Generator) -> tuple[Arrays, Arrays]:
        ids = rng.integers(0, config.vocab_size, (1, length))
        found = jax.jit(clip_network.definition(config))(wide(params), jnp.asarray(ids))
        tables = params["text_model"]["embeddings"]
        token, position = (np.asarray(tables[f"{each}_embedding"]["embedding"], np.float32) for each in
                           ("token", "position"))  # fmt: skip
        inputs = {"embeddings": token[ids[0]] + position[:length]}
        outputs = {"penultimate": np.asarray(found.penultimate_hidden_state)[0]} if penultimate else {}
        if pooled:
            inputs["selector"] = np.eye(length, dtype=np.float32)[np.asarray(found.pooled_position)]
            last = found.text_embeds if config.with_projection else found.pooled_output
            outputs["text_embeds" if config.with_projection else "pooled"] = np.asarray(last)
        return inputs, outputs

    return sample


def adapter(config: Any, params: Mapping[str, Any], length: int) -> Sample:
    def sample(rng: np.random.Generator) -> tuple[Arrays, Arrays]:
        states = draw(rng, length, config.input_dims)
        found = jax.jit(context_adapter.definition(config))(wide(params), states)
        return {"states": states}, {"text": np.asarray(found)}

    return sample


def embedder(params: Mapping[str, Any], length: int) -> Sample:
    def sample(rng: np.random.Generator) -> tuple[Arrays, Arrays]:
        tree = wide(params["context_embedder"])
        states = draw(rng, length, tree["kernel"].shape[0])
        return {"states": states}, {"text": np.asarray(states @ tree["kernel"] + tree["bias"])}

    return sample


def vectors(config: MMDiTConfig, params: Mapping[str, Any], timestep: np.ndarray, pooled: np.ndarray) -> Arrays:
    """Every vector of ``modulations`` [1, D], scales with their 1 added."""
    network = mmdit.definition(config)
    embedding = jax.nn.silu(network.bind(params).time_text_embed(jnp.asarray(timestep), jnp.asarray(pooled)))
    found = {}
    for norm, chunks in modulations(params):
        tree = subtree(params, norm)["linear"]
        out = embedding @ jnp.asarray(np.asarray(tree["kernel"])) + jnp.asarray(np.asarray(tree["bias"]))
        for chunk, part in zip(chunks, jnp.split(out, len(chunks), axis=-1), strict=True):
            found[f"{norm}/{chunk}"] = np.asarray(part) + np.float32(chunk.endswith("scale"))
    return found


def conditioning(config: MMDiTConfig, params: Mapping[str, Any]) -> Sample:
    def sample(rng: np.random.Generator) -> tuple[Arrays, Arrays]:
        timestep, pooled = rng.uniform(0, 1000, 1).astype(np.float32), draw(rng, 1, config.pooled_projection_dim)
        inputs = {"sinusoid": np.asarray(sinusoid(jnp.asarray(timestep))), "pooled": pooled}
        return inputs, vectors(config, wide(params), timestep, pooled)

    return sample


def stage(config: MMDiTConfig, params: Mapping[str, Any], envelope: Envelope, *, split: bool = True) -> Sample:
    def sample(rng: np.random.Generator) -> tuple[Arrays, Arrays]:
        tree, unit = wide(params), int(rng.integers(0, envelope.units + 1))
        mask, timestep = some(rng, envelope.text_length), rng.uniform(0, 1000, 1).astype(np.float32)
        pooled, layout = draw(rng, 1, config.pooled_projection_dim), layout_arrays(envelope, unit, jnp.asarray(mask))
        clips = [draw(rng, 1, *clip, config.in_channels) for clip in envelope.clips]
        text = draw(rng, 1, envelope.text_length, config.width)
        embedded = text
        if config.context_embedder:  # the graph takes text behind it: find states that lead there
            layer = {key: np.asarray(value, np.float64) for key, value in tree["context_embedder"].items()}
            states = draw(rng, 1, envelope.text_length, config.joint_attention_dim)
            embedded, text = (states @ layer["kernel"] + layer["bias"]).astype(np.float32), states
        run = jax.jit(lambda p, *args: mmdit.definition(config)(p, [args[0]], *args[1:4], [args[4]]))
        velocity = run(tree, clips, text, pooled, timestep, layout)[0]
        inputs = stage_inputs(config, tree, envelope, layout, clips, embedded, timestep, pooled, split=split)
        return inputs, {"velocity": patches(config, velocity)}

    return sample


def stage_inputs(
    config: MMDiTConfig,
    params: Mapping[str, Any],
    envelope: Envelope,
    layout: LayoutArrays,
    clips: Sequence[np.ndarray],
    text: np.ndarray,
    timestep: np.ndarray,
    pooled: np.ndarray,
    *,
    split: bool = True,
) -> Arrays:
    """A stage graph's inputs for what the JAX network is given; text [1, S, D] is at the denoiser's width."""
    times, segments = np.asarray(layout.times[0]), np.asarray(layout.segments[0])
    cosines, sines = host.rotary(times, config.attention_head_dim)
    return {
        "patches": host.to_patches([clip[0] for clip in clips], config.patch_size),
        "positions": host.position_table(config, envelope),
        "text": text[0],
        "cosines": cosines,
        "sines": sines,
        **host.biases(envelope, times, segments == REAL, causal=config.use_temporal_causal, split=split),
        **vectors(config, params, timestep, pooled),
    }


def patches(config: MMDiTConfig, velocity: Any) -> np.ndarray:
    """A velocity [1, T, H, W, C] as a stage graph gives it."""
    return host.to_patches([np.asarray(velocity)[0]], config.patch_size)


def encoder(config: Any, params: Mapping[str, Any], height: int, width: int) -> Sample:
    network = causal_vae.definition(config, half="encoder")

    def sample(rng: np.random.Generator) -> tuple[Arrays, Arrays]:
        image = rng.uniform(-1, 1, (1, height, width, 3)).astype(np.float32)
        tree = wide({key: params[key] for key in ("encoder", "quant_conv")})
        moments = jax.jit(lambda p, x: network.bind(p).encode(x))(tree, image[:, None])
        mean, logvar = np.split(np.asarray(moments)[:, 0], 2, axis=-1)
        return {"image": image}, {"mean": mean, "logvar": logvar}

    return sample


def decoder(config: Any, params: Mapping[str, Any], height: int, width: int, *, first: bool) -> Sample:
    """The first latent frame of a clip, or one after two others; the state is the JAX network's own."""
    network = causal_vae.definition(config, half="decoder")
    native = isinstance(config, causal_vae.NativeVAEConfig)

    @jax.jit
    def chunk(tree, latent, state):
        bound = network.bind(tree)
        if native:
            return bound.decode_chunk(latent, state)
        start = bound.decoder.start(1, height, width) if state is None else state
        return bound.decoder.stream(bound._post_quant(latent, None), start)

    def sample(rng: np.random.Generator) -> tuple[Arrays, Arrays]:
        tree = wide({key: params[key] for key in ("decoder", "post_quant_conv") if key in params})
        state, inputs, frames = None, {}, None
        for _ in range(1 if first else 3):
            latent = draw(rng, 1, 1, height, width, config.encoder_out_channels)
            inputs = {"latent": latent[:, 0]}
            if state is not None:
                inputs |= {f"state/{k}": x for k, x in enumerate(one_by_one(state))}
            frames, state = chunk(tree, latent, state)
        video = np.asarray(frames)
        outputs = {f"frame/{k}": video[:, k] for k in range(video.shape[1])}
        return inputs, outputs | {f"next/{k}": x for k, x in enumerate(one_by_one(state))}

    return sample


def one_by_one(state: tuple[jax.Array, ...]) -> list[np.ndarray]:
    """Remembered frames [1, n, h, w, C] as single frames [1, h, w, C]."""
    return [np.asarray(x[:, k]) for x in state for k in range(x.shape[1])]
