"""Pyramidal flow matching (arXiv 2410.05954): the teacher's training and the first stage of recovery after pruning.

One packed forward trains all stages: the batch is dealt into columns, each of which trains one stage, and a column's
rows may stand at different units of their videos. Text encoders are trained along or frozen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from nd_jax.errors import UserError
from nd_jax.models.functional import Params
from nd_jax.models.hooks import NO_HOOKS, ShardingHooks
from nd_jax.models.system import (
    CODEC,
    DENOISER,
    TEXT_PARTS,
    Conditions,
    SystemConfig,
    TextTokens,
    encode_text,
    init_system,
)
from nd_jax.pyramid.columns import column_stages
from nd_jax.pyramid.examples import flow_example, history_noise_shapes
from nd_jax.pyramid.layout import Envelope, envelopes, layout_arrays
from nd_jax.pyramid.normalise import LatentStats
from nd_jax.pyramid.schedule import Schedule
from nd_jax.pyramid.targets import per_sample_loss
from nd_jax.recipes.packed import Packed
from nd_jax.training.optim import FROZEN, OptimConfig, make_optimizer, value_and_grad
from nd_jax.training.sharding import DEFAULT_TABLE, Rule, Rules
from nd_jax.training.state import TrainState


@dataclass(frozen=True)
class FlowRecipeConfig:
    """What a flow-matching run does besides its optimizer (arXiv 2410.05954; the published numbers as defaults)."""

    batch: int = 64
    """Videos per update, of all sizes together; a multiple of the sum of ``stage_mix`` times that of ``size_mix``."""
    stage_mix: tuple[int, ...] = (1, 2, 1)
    """Shares of the batch that train each stage, lowest resolution first."""
    size_mix: tuple[int, ...] = (1,)
    """Shares of the batch that come from each of the sizes that are trained together."""
    units: int | None = None
    """Train on the first so many latent frames of every video; 1 trains on first frames, as images. None: all."""
    corrupt_ratio: float = 1 / 3
    """Largest noise strength in the history."""
    caption_dropout: float = 0.1
    """Share of prompts replaced by the empty one, for guidance."""
    every_unit: bool = False
    """Deal the batch over units too: a column for every stage and latent frame, whose layout then is exact. No image
    token is padding, no unit is drawn, and the batch has to be a multiple of so many more columns: for pods."""
    balanced: bool = True
    """Rows that train the top stage at unit u go with rows that train the others at unit U - 1 - u, so that every
    update sees equally long histories. Otherwise units are drawn independently."""
    train_text: bool = True
    """Train the text encoders along with the denoiser."""
    text: Literal["live", "stored"] = "live"
    """Run the text encoders at every step, or read what they gave from shards of `nd-jax data precompute --teacher`:
    the encoders then are no part of the run's state. Needs --recipe.no-train-text."""
    attention: Literal["auto", "dense", "splash"] = "auto"
    """Dense, or the splash kernel, which needs ``every_unit``; auto: the kernel on TPUs, where layouts are exact."""
    microbatches: int = 1
    """Passes per update; each needs 1 / microbatches of the memory."""
    remat: Literal["none", "full", "dots"] = "none"
    """What the backward pass recomputes: nothing, every block, or all but the results of dense products."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype; norms, softmax, rotary embeddings, timesteps and losses are float32 in any case."""
    ema_decay: float = 0.999
    """Of the averaged parameters, which are the result."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(b2=0.95, weight_decay=1e-4, warmup_steps=1000))


def _units(count: int, apart: bool) -> list[tuple[int, ...]]:
    """The units that a column may train: all of them, or one each."""
    return [(unit,) for unit in range(count)] if apart else [tuple(range(count))]


def normals(key: jax.Array, rows: int, shapes: Sequence[tuple[int, ...]]) -> list[Float[Array, "b ..."]]:
    """Standard normal arrays [rows, *shape], all from one call: each further one costs a second of compile time on a
    CPU."""
    ends = np.cumsum([math.prod(shape) for shape in shapes])
    parts = jnp.split(jax.random.normal(key, (rows, ends[-1])), ends[:-1], axis=1)
    return [part.reshape(rows, *shape) for part, shape in zip(parts, shapes, strict=True)]


class FlowRecipe:
    """The flow-matching recipe for the loop.

    ``sizes`` are the latent frames, heights and widths that are trained together, with shares ``size_mix``.
    Batches: ``latents`` float32 [N, U, h, w, C] as the codec gives them (with several sizes: ``latents_0`` [N_0, ...],
    ``latents_1``, ...), and the prompts' ids, ``t5_ids``/``t5_mask`` [N, S], ``clip_ids``, ``clip_2_ids`` [N, S2],
    int32; with stored text instead of ids ``text`` [N, S, D] and ``pooled`` [N, P], float32. Row n trains the stage of
    column ``n % G``; the first G_0 columns belong to size 0, and so on.
    ``init`` takes a system's parameters, or some of its networks'; fresh ones for the rest.
    """

    def __init__(
        self,
        system: SystemConfig,
        config: FlowRecipeConfig,
        *,
        schedule: Schedule,
        stats: LatentStats,
        sizes: Sequence[tuple[int, int, int]],
        text_length: int,
        clip_length: int,
        hooks: ShardingHooks | None = None,
        table: tuple[Rule, ...] = DEFAULT_TABLE,
    ):
        self.system, self.config, self.schedule, self.stats = system, config, schedule, stats
        most = config.units or max(units for units, _, _ in sizes)
        self.sizes = tuple((min(units, most), height, width) for units, height, width in sizes)
        if len(config.size_mix) != len(self.sizes) or min(config.size_mix) < 1:
            told = ", ".join("x".join(map(str, size)) for size in self.sizes)
            raise UserError(
                f"flow matching: size mix {config.size_mix} for latents of {told}; expected a share of at least 1 each"
            )
        self.lengths = (text_length, clip_length)
        stages = column_stages(config.stage_mix)
        dealt = [
            (stage, index, units)
            for index, share in enumerate(config.size_mix)
            for _ in range(share)
            for units in _units(self.sizes[index][0], config.every_unit)
            for stage in stages
        ]
        self.columns = tuple(stage for stage, _, _ in dealt)
        self.column_sizes = tuple(size for _, size, _ in dealt)
        self.column_units = tuple(units for _, _, units in dealt)
        if len(config.stage_mix) != schedule.stages or config.batch % len(self.columns):
            raise UserError(
                f"flow matching: batch {config.batch}, stage mix {config.stage_mix}, size mix {config.size_mix}; "
                f"expected one share for each of the {schedule.stages} stages and a batch that is a multiple of "
                f"{len(self.columns)}, the columns they make"
            )
        rows = config.batch // len(self.columns)
        if config.microbatches < 1 or rows % config.microbatches:
            raise UserError(
                f"flow matching: {config.microbatches} microbatches, {rows} rows a column; expected a divisor of {rows}"
            )
        if config.attention == "splash" and not config.every_unit:
            raise UserError(
                "flow matching: --recipe.attention splash reads a mask that is known before compiling; expected "
                "--recipe.every-unit with it"
            )
        self.stored = config.text == "stored"
        if self.stored and config.train_text:
            raise UserError(
                "flow matching: --recipe.text stored is text of frozen encoders; expected --recipe.no-train-text too"
            )
        dtype = jnp.dtype(config.dtype)
        self.hooks, self.dtype = hooks or NO_HOOKS, dtype
        self.definitions = system.definitions(dtype, hooks)
        frozen = () if config.train_text else (Rule(rf"^({'|'.join(TEXT_PARTS)})/", label=FROZEN),)
        self.rules = Rules(frozen + table)
        self.optimizer = make_optimizer(config.optim, self.rules)
        patch = system.diffusion_transformer.patch_size
        self.size_envelopes = [
            envelopes(units - 1, text_length, height, width, patch_size=patch, stages=schedule.stages)
            for units, height, width in self.sizes
        ]
        self.envelopes = [
            Envelope(stage, max(units), text_length, *self.sizes[size][1:], patch, stages=schedule.stages)
            for stage, size, units in dealt
        ]
        self._grads = value_and_grad(self.loss, config.microbatches)

    @property
    def latent_names(self) -> tuple[str, ...]:
        """The batch's leaf of each size."""
        several = len(self.sizes) > 1
        return tuple(f"latents_{index}" if several else "latents" for index in range(len(self.sizes)))

    def batch_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        n, (text, clip) = self.config.batch, self.lengths
        rows, channels = n // len(self.columns), self.system.diffusion_transformer.in_channels
        shapes = [(rows * self.column_sizes.count(index), *size, channels) for index, size in enumerate(self.sizes)]
        latents = {
            name: jax.ShapeDtypeStruct(shape, jnp.float32)
            for name, shape in zip(self.latent_names, shapes, strict=True)
        }
        ids = {"t5_ids": text, "t5_mask": text, "clip_ids": clip, "clip_2_ids": clip}
        features = {}
        if self.stored:
            ids, (width, pooled) = {"t5_mask": text}, self.text_widths
            features = {"text": (n, text, width), "pooled": (n, pooled)}
        latents |= {name: jax.ShapeDtypeStruct((n, length), jnp.int32) for name, length in ids.items()}
        return latents | {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in features.items()}

    @property
    def text_widths(self) -> tuple[int, int]:
        """Channels of the states and of the pooled vector that the denoiser reads of a prompt."""
        network = self.system.diffusion_transformer
        width = network.joint_attention_dim if network.context_embedder else network.width
        return width, network.pooled_projection_dim

    def init(self, key: jax.Array, *given: Params) -> TrainState:
        without = (CODEC, *TEXT_PARTS) if self.stored else (CODEC,)
        parts = tuple(name for name in self.definitions if name not in without)
        known = {name: params for name, params in given[0].items() if name in parts} if given else {}
        params = known | init_system(self.definitions, key, tuple(name for name in parts if name not in known))
        return TrainState.create(params, self.optimizer, jax.random.fold_in(key, 1), ema=True)

    def draws(self, key: jax.Array) -> dict[str, Any]:
        """All randomness of one update; every array starts with [B] = batch / columns.

        Per column: ``unit`` int32 and ``uniform``, ``corrupt`` in [0, 1) as [B, G]; ``noise``, one [B, 1, h, w, C] per
        column; ``history``, one tuple of arrays per column.
        """
        groups, channels = len(self.columns), self.system.diffusion_transformer.in_channels
        rows, stages = self.config.batch // groups, self.schedule.stages
        uniform_key, normal_key = jax.random.split(key)
        for_units, uniform, corrupt = jnp.moveaxis(jax.random.uniform(uniform_key, (rows, groups, 3)), -1, 0)
        if self.config.balanced:
            is_top = jnp.array([stage == stages - 1 for stage in self.columns])
            for_units = jnp.where(is_top, for_units[:, :1], 1 - for_units[:, :1])
        first, counts = (jnp.array([f(units) for units in self.column_units]) for f in (min, len))
        unit = first + jnp.minimum(jnp.floor(for_units * counts), counts - 1).astype(jnp.int32)
        shapes = [(1, envelope.height, envelope.width, channels) for envelope in self.envelopes]
        shapes += [shape[1:] for envelope in self.envelopes for shape in history_noise_shapes(envelope, rows, channels)]
        arrays = normals(normal_key, rows, shapes)
        noise, remaining = arrays[:groups], iter(arrays[groups:])
        history = [tuple(next(remaining) for _ in envelope.clips[:-1]) for envelope in self.envelopes]
        return {"unit": unit, "uniform": uniform, "corrupt": corrupt, "noise": noise, "history": history}

    def pack(self, params: Params, examples: dict[str, Any]) -> Packed:
        """What the denoiser is asked, and what it should answer.

        ``examples`` holds the batch as [B, G, ...] (latents [B, G of their size, ...]) and the arrays of ``draws``.
        """
        return self.assemble(self.encode(params, examples), examples)

    def encode(self, params: Params, examples: dict[str, Any]) -> Conditions:
        """The prompts' conditions, rows ``b * G + g``."""
        if self.stored:
            text, mask, pooled = (examples[name] for name in ("text", "t5_mask", "pooled"))
            rows = [x.reshape(-1, *x.shape[2:]) for x in (text, mask, pooled)]
            return Conditions(rows[0].astype(self.dtype), rows[1], rows[2].astype(self.dtype))
        tokens = TextTokens(*(examples[name].reshape(-1, examples[name].shape[-1]) for name in TextTokens._fields))
        if not self.config.train_text:
            params = {name: jax.lax.stop_gradient(p) if name in TEXT_PARTS else p for name, p in params.items()}
        return encode_text(self.definitions, params, tokens, hooks=self.hooks, dtype=self.dtype)

    def assemble(self, conditions: Conditions, examples: dict[str, Any]) -> Packed:
        """``pack`` for encoded prompts. Where ``examples`` has ``local`` [B, G], the local noise is that."""
        groups, built = len(self.columns), []
        latents = self.column_latents(examples)
        for group, envelope in enumerate(self.envelopes):
            units = self.column_units[group]
            unit = examples["unit"][:, group]
            example = flow_example(
                envelope,
                self.schedule,
                latents[group],
                unit,
                uniform=examples["uniform"][:, group],
                local=examples["local"][:, group] if "local" in examples else None,
                noise=examples["noise"][group],
                corrupt_uniform=examples["corrupt"][:, group],
                history_noise=examples["history"][group],
                corrupt_ratio=self.config.corrupt_ratio,
            )
            built.append(
                (
                    example,
                    layout_arrays(envelope, units[0] if len(units) == 1 else unit, conditions.mask[group::groups]),
                )
            )
        return Packed([example for example, _ in built], [layout for _, layout in built], conditions)

    def column_latents(self, examples: dict[str, Any]) -> list[Float[Array, "b u h w c"]]:
        """Every column's clean latents, normalised."""
        latents = [column for name in self.latent_names for column in jnp.moveaxis(examples[name], 1, 0)]
        return [self.stats.normalise(column) for column in latents]

    def velocity_error(
        self, predictions: Sequence[Array], packed: Packed
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """Mean squared velocity error over all rows, and each stage's mean."""
        losses = [per_sample_loss(p, example.target) for p, example in zip(predictions, packed.examples, strict=True)]
        return jnp.mean(jnp.stack(losses)), self.stage_means(losses)

    def stage_means(self, values: Sequence[Float[Array, " b"]]) -> dict[str, Float[Array, ""]]:
        """Each stage's mean of what every column's samples came to, by name."""
        return {
            f"stage_{stage}": jnp.mean(jnp.stack([x for x, s in zip(values, self.columns, strict=True) if s == stage]))
            for stage in sorted(set(self.columns))
        }

    def loss(self, params: Params, examples: dict[str, Any]) -> tuple[Array, dict[str, Array]]:
        """``velocity_error`` of the denoiser; ``examples`` are those of ``pack``."""
        packed = self.pack(params, examples)
        predictions = self.definitions[DENOISER](params[DENOISER], *packed.inputs, remat=self.config.remat)
        return self.velocity_error(predictions, packed)

    def examples(self, state: TrainState, batch: dict[str, Array]) -> dict[str, Any]:
        """A batch dealt into columns, and this step's draws."""
        rows = self.config.batch // len(self.columns)
        return {name: x.reshape(rows, -1, *x.shape[1:]) for name, x in batch.items()} | self.draws(state.step_key())

    def step(self, state: TrainState, batch: dict[str, Array]) -> tuple[TrainState, dict]:
        grads, metrics = self._grads(state.params, self.examples(state, batch))
        state, optim_metrics = state.advance(grads, self.optimizer, ema_decay=self.config.ema_decay)
        return state, {"loss": metrics.pop("loss"), "flow": metrics, "optim": optim_metrics}
