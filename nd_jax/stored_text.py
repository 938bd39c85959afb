"""Text features computed once: what a system's text encoders give, and whether stored ones are still that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from nd_jax.data.shard_sources import ShardedLatentSource
from nd_jax.data.tokenizers import TextTokenizer
from nd_jax.errors import UserError
from nd_jax.models.functional import Params
from nd_jax.models.system import CLIP_1, CLIP_2, DENOISER, T5, TEXT_PARTS, SystemConfig, TextTokens, encode_text
from nd_jax.recipes.text_teacher import EMBEDDER, Teacher, embed, teacher_params
from nd_jax.system import TOKENIZERS
from nd_jax.training.mesh import MeshConfig, make_mesh
from nd_jax.training.sharding import Rules, param_shardings

TOLERANCES = {"float32": 1e-4, "bfloat16": 2e-2}
"""Norm of the difference, relative to the features': rounding and other batch sizes stay far below, other encoders do
not."""


class TextReader:
    """A system's text encoders on a mesh, parameters split over it: ids, states and pooled vectors of prompts.

    ``embedded``: states as the denoiser's blocks read them, behind its context embedder if it has one. Systems without
    CLIP towers or their tokenizers give no pooled vectors.
    """

    def __init__(
        self,
        system: SystemConfig,
        params: Mapping[str, Params],
        tokenizers: Mapping[str, TextTokenizer],
        mesh: Mesh,
        *,
        embedded: bool = False,
    ):
        self.embedded = embedded and system.diffusion_transformer.context_embedder
        self.towers = set(TOKENIZERS) <= set(tokenizers) and {CLIP_1, CLIP_2, T5} <= set(params)
        self._tokenizers, self._teacher = tokenizers, Teacher(system)
        self._teacher.embeds = self.embedded
        self._definitions = system.definitions()
        given = {name: params[name] for name in TEXT_PARTS if name in params}
        if self.embedded:
            given |= {EMBEDDER: teacher_params(system, {DENOISER: params[DENOISER]})[EMBEDDER]}
        self._params = jax.device_put(given, param_shardings(given, Rules(), mesh))
        self._read = jax.jit(self._features)

    def _features(self, params: Params, tokens: dict[str, Array]) -> tuple[Array, Array | None]:
        if not self.towers:
            return self._teacher(params, tokens["t5_ids"], tokens["t5_mask"]), None
        found = encode_text(self._definitions, params, TextTokens(*(tokens[name] for name in TextTokens._fields)))
        return embed(params[EMBEDDER], found.text) if self.embedded else found.text, found.pooled

    def __call__(
        self, texts: Sequence[str], rows: int
    ) -> list[tuple[tuple[int, ...], Float[np.ndarray, "tokens d"], Float[np.ndarray, " p"] | None]]:
        """Of every prompt its valid T5 ids, their states and its pooled vector; read in batches of ``rows``."""
        found = []
        for start in range(0, len(texts), rows):
            some = list(texts[start : start + rows])
            padded = [*some, *[""] * (rows - len(some))]  # the last batch keeps its shape
            tokens = {}
            for name, tokenizer in self._tokenizers.items():
                tokens[f"{name}_ids"], tokens[f"{name}_mask"], _ = tokenizer(padded)
            states, pooled = jax.device_get(self._read(self._params, jax.tree.map(jnp.asarray, tokens)))
            for row in range(len(some)):
                valid = np.asarray(tokens["t5_mask"][row]) > 0
                ids = tuple(np.asarray(tokens["t5_ids"][row])[valid].tolist())
                found.append((ids, states[row][valid], None if pooled is None else pooled[row]))
        return found


def check_stored(
    source: ShardedLatentSource,
    system: SystemConfig,
    params: Mapping[str, Params],
    tokenizers: Mapping[str, TextTokenizer],
) -> None:
    """Raises UserError unless the text encoders say of one caption and of the empty prompt what is stored of them."""
    missing = [name for name in (CLIP_1, CLIP_2, T5) if name not in params]
    if missing:
        raise UserError(
            f"{source.folder}: stored text stands for encoders that are not given ({', '.join(missing)}); expected "
            "--start SYSTEM with them, or --recipe.text live"
        )
    network = system.diffusion_transformer
    width = network.joint_attention_dim if network.context_embedder else network.width
    shard = source.text
    if shard.embedded:
        raise UserError(
            f"{source.folder} holds text behind the denoiser's own embedding, which training moves; precompute it "
            "again with --text encoder, or leave --recipe.text live"
        )
    if (shard.width, shard.pooled) != (width, network.pooled_projection_dim):
        raise UserError(
            f"{source.folder} holds text of {shard.width} and {shard.pooled} channels, the denoiser reads {width} and "
            f"{network.pooled_projection_dim}; precompute it again with --teacher of this system"
        )
    devices = jax.local_devices()
    read = TextReader(system, params, tokenizers, make_mesh(MeshConfig(fsdp=len(devices)), devices))
    for name, example in (("its first caption", source.first), ("the empty prompt", source.empty)):
        ((ids, text, pooled),) = read([example.captions[0]], 1)
        if ids != tuple(example.ids[0]):
            raise UserError(
                f"{source.folder}: the tokenizer reads {name} otherwise than the one that its text was made with; "
                "precompute it again with --teacher of this system"
            )
        for stored, live in ((example.features[0], text), (example.pooled[0], pooled)):
            error = difference(stored, live)
            if not error <= TOLERANCES[shard.text_dtype]:
                raise UserError(
                    f"{source.folder} holds text of other encoders: {name} differs by {error:.1e} of its size, more "
                    f"than {TOLERANCES[shard.text_dtype]:.0e}; precompute it again with --teacher of this system"
                )


def difference(stored: Any, live: Any) -> float:
    """Norm of the difference over that of ``live``."""
    stored, live = (np.asarray(x, np.float64) for x in (stored, live))
    return float(np.linalg.norm(stored - live) / max(np.linalg.norm(live), 1e-12))
