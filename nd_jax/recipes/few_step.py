"""What all ways of distilling steps share: a frozen guided teacher, a student with a few steps in each stage, and where
its inputs and histories come from (data, its own earlier steps, its own videos)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from nd_jax.errors import UserError
from nd_jax.models.functional import Params
from nd_jax.models.system import DENOISER, Conditions, SystemConfig, TextTokens, encode_text
from nd_jax.pyramid.targets import NoisyClip, per_row
from nd_jax.recipes.dmd_loss import few_step_levels, guided
from nd_jax.recipes.few_step_config import FewStepConfig, check_few_steps
from nd_jax.recipes.flow_matching import FlowRecipe, normals
from nd_jax.recipes.own_steps import own_steps
from nd_jax.recipes.packed import Packed
from nd_jax.recipes.recovery import at_rest
from nd_jax.recipes.rollouts import Rollout, motion_by_unit, roll_out
from nd_jax.training.optim import FROZEN
from nd_jax.training.sharding import DEFAULT_TABLE, Rule
from nd_jax.training.state import TrainState

NEGATIVE = "negative"
"""Part of the frozen state: the conditions of the empty prompt."""
ROLLOUT_KEY = 1 << 20
"""Folded into a step's key for rollouts; no step has so many draws."""


class FewStepRecipe(FlowRecipe):
    """Base of the recipes, on the batches of flow matching. Subclasses have ``name``, ``config`` and ``step``.

    ``negative`` are the tokens of one prompt, [1, S] and [1, S2]: the empty one, as the teacher was trained with. With
    stored text it is that prompt's conditions.
    ``init(key, student, teacher)`` takes the student's networks and the teacher's denoiser (default: the student's).
    The teacher may have more blocks. It rests in the compute dtype.

    History is the data's, corrupted as in flow matching, or the student's own (``own_history``): then one video is
    rolled out for each row and size, and all columns of the row train on it with its prompt, unit and stage by unit and
    stage. Such rows have no data: what compares with data leaves them out.

    Raises UserError for settings that cannot be, and for a student without denoiser.
    """

    config: FewStepConfig
    name = "steps"
    renoises = False
    """Whether ``draws`` has fresh noise for putting clean predictions back on the flow."""

    def __init__(
        self,
        system: SystemConfig,
        config: FewStepConfig,
        *,
        negative: TextTokens | Conditions,
        table: tuple[Rule, ...] = DEFAULT_TABLE,
        **options: Any,
    ):
        super().__init__(system, config, table=(Rule(rf"^{NEGATIVE}/", whole=True, label=FROZEN), *table), **options)
        check_few_steps(config, self.schedule.stages, self.name)
        shapes = tuple(np.shape(ids) for ids in negative)
        text, clip = self.lengths
        width, pooled = self.text_widths
        wanted = ((1, text, width), (1, text), (1, pooled)) if self.stored else ((1, text),) * 2 + ((1, clip),) * 2
        if shapes != wanted:
            raise UserError(
                f"{self.name}: negative prompt of shapes {shapes}; expected one row of {text} and {clip} tokens, "
                f"shaped {wanted}"
            )
        self.negative = negative
        self.column_steps = [config.steps[stage] for stage in self.columns]
        rows, hooks = config.batch // len(self.columns), options.get("hooks")
        spread = hooks is not None and hooks.activation is not None
        # Only the first rows are ever the student's own; spread over devices, all are made, since these must divide.
        self.own_rows = math.ceil(rows * config.own_history)
        self.rolled_rows = rows if spread else self.own_rows

    def batch_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        spec = super().batch_spec()
        return spec if self.config.videos else {name: x for name, x in spec.items() if name not in self.latent_names}

    def init(self, key: jax.Array, student: Params, teacher: Params | None = None) -> TrainState:
        if DENOISER not in student:
            raise UserError(f"{self.name}: a student without {DENOISER}; expected a trained system to begin with")
        state = super().init(key, student)
        if self.stored:
            negative = Conditions(*(jnp.asarray(x, x.dtype if x.ndim == 2 else self.dtype) for x in self.negative))
            negative = negative._replace(pooled=negative.pooled.astype(self.dtype))
        else:
            negative = encode_text(self.definitions, state.params, self.negative)
        resting = at_rest(state.params[DENOISER] if teacher is None else teacher, jnp.dtype(self.config.dtype))
        return state.replace(frozen={DENOISER: resting, NEGATIVE: negative._asdict()})

    def draws(self, key: jax.Array) -> dict[str, Any]:
        """All randomness of one update: besides flow matching's, ``local`` (the level of the student's input),
        ``level`` in [0, 1) (for a comparison) and ``simulated`` as [B, G]; if the recipe renoises, per column ``fresh``
        noise [B, 1, h_i, w_i, C] of the stage's own size; with ``renew`` also noise ``again`` for own steps, [B, most
        steps - 1, 1, h_i, w_i, C]."""
        key, uniform_key, normal_key = jax.random.split(key, 3)
        drawn = super().draws(key)
        level, simulated = jax.random.uniform(uniform_key, (2, *drawn["uniform"].shape))
        local = [few_step_levels(drawn["uniform"][:, group], n) for group, n in enumerate(self.column_steps)]
        drawn |= {"local": jnp.stack(local, axis=1), "level": level, "simulated": simulated < self.config.simulated}
        channels = self.system.diffusion_transformer.in_channels
        shapes = [(*envelope.clips[-1], channels) for envelope in self.envelopes]
        fresh = shapes if self.renoises else []
        again = [(max(self.column_steps) - 1, *shape) for shape in shapes] if self.config.renew else []
        arrays = normals(normal_key, level.shape[0], fresh + again) if fresh + again else []
        return drawn | {"fresh": arrays[: len(fresh)], "again": arrays[len(fresh) :]}

    # ---- a step's examples

    def prepare(self, state: TrainState, batch: dict[str, Array]) -> tuple[dict[str, Any], dict[str, Any]]:
        """A batch dealt into columns with its conditions and, if the student makes histories, ``own`` [B] and
        ``rolled``, one ``Rollout`` per size; without draws. And what there is to log of the rollouts."""
        rows = self.config.batch // len(self.columns)
        examples = {name: x.reshape(rows, -1, *x.shape[1:]) for name, x in batch.items()}
        conditions = self.encode(state.params, examples)._asdict()
        examples |= {name: x.reshape(rows, -1, *x.shape[1:]) for name, x in conditions.items()}
        if not self.config.videos:
            for index, name in enumerate(self.latent_names):
                shape = (rows, self.column_sizes.count(index), *self.sizes[index])
                examples[name] = jnp.zeros((*shape, self.system.diffusion_transformer.in_channels))
        return self.with_own(state, examples) if self.own_rows else (examples, {})

    def own_share(self, step: Array) -> Float[Array, ""]:
        """Of all rows, at an update."""
        config = self.config
        return config.own_history * jnp.clip((step + 1 - config.own_after) / max(config.own_ramp, 1), 0, 1)

    def with_own(self, state: TrainState, examples: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        rows, made = len(examples["t5_mask"]), self.rolled_rows
        own_key, *keys = jax.random.split(jax.random.fold_in(state.step_key(), ROLLOUT_KEY), 1 + len(self.sizes))
        own = jax.random.uniform(own_key, (rows,)) * self.own_rows < self.own_share(state.step) * rows
        own &= jnp.arange(rows) < self.own_rows
        firsts = [self.column_sizes.index(size) for size in range(len(self.sizes))]
        for name in Conditions._fields:  # all columns of a size read the prompt of the first
            shared = jnp.stack([examples[name][:, firsts[size]] for size in self.column_sizes], axis=1)
            examples = examples | {name: jnp.where(per_row(own, shared), shared, examples[name])}

        def roll() -> list[Rollout]:
            student = state.params[DENOISER]
            found = []
            for size, key in enumerate(keys):
                conditions = Conditions(*(examples[name][:made, firsts[size]] for name in Conditions._fields))
                rollout = roll_out(
                    lambda *inputs: self.definitions[DENOISER](student, *inputs),
                    self.size_envelopes[size],
                    self.schedule,
                    self.config.steps,
                    conditions,
                    key,
                    channels=self.system.diffusion_transformer.in_channels,
                    renew=self.config.renew,
                )
                found.append(rollout.padded(rows))
            return found

        shapes = jax.eval_shape(roll)
        rolled = jax.lax.cond(jnp.any(own), roll, lambda: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes))
        data = super().column_latents(examples) if self.config.videos else None
        told = {"share": jnp.mean(own.astype(jnp.float32))}
        for size, rollout in enumerate(rolled):
            moved = motion_by_unit(rollout.units[:made], None if data is None else data[firsts[size]][:made])
            told |= moved if len(rolled) == 1 else {f"size_{size}": moved}
        return examples | {"own": own, "rolled": rolled}, {"rollout": told}

    def column_latents(self, examples: dict[str, Any]) -> list[Float[Array, "b u h w c"]]:
        """Every column's clean latents, normalised: the data's or the student's own."""
        latents = super().column_latents(examples)
        if "own" not in examples:
            return latents
        rolled = [examples["rolled"][size].units for size in self.column_sizes]
        return [jnp.where(per_row(examples["own"], z), mine, z) for mine, z in zip(rolled, latents, strict=True)]

    def data_latents(self, examples: dict[str, Any]) -> list[Float[Array, "b u h w c"]]:
        """The data's, also where the student makes its own."""
        return super().column_latents(examples)

    def from_data(self, examples: dict[str, Any]) -> Float[Array, " b"]:
        """1 for rows of data, 0 for the student's own."""
        if "own" in examples:
            return 1 - examples["own"].astype(jnp.float32)
        return jnp.ones(len(examples["unit"]))

    def scene(self, examples: dict[str, Any]) -> Packed:
        """``assemble`` for examples that hold conditions as [B, G, ...]. Own histories are not corrupted."""
        rows = [examples[name].reshape(-1, *examples[name].shape[2:]) for name in Conditions._fields]
        if "own" in examples:
            examples = examples | {"corrupt": examples["corrupt"] * self.from_data(examples)[:, None]}
        return self.assemble(Conditions(*rows), examples)

    def inputs(self, student: Params, examples: dict[str, Any]) -> Packed:
        """What the student is asked: data at the drawn level, or where its own steps from the stage's start led, or its
        own video's way."""
        packed = self.scene(examples)
        chosen = [each.clips[-1] for each in packed.examples]
        if max(self.column_steps) > 1 and self.config.simulated:
            noise = examples["again"] if self.config.renew else None
            own = own_steps(
                lambda asked: self.velocity(student, asked),
                packed,
                self.schedule,
                self.columns,
                self.column_steps,
                noise,
            )
            simulated = jnp.moveaxis(examples["simulated"], 1, 0)
            chosen = [jnp.where(per_row(pick, z), z, x) for pick, z, x in zip(simulated, own, chosen, strict=True)]
        if "own" in examples:
            for group, (stage, size) in enumerate(zip(self.columns, self.column_sizes, strict=True)):
                unit, local = examples["unit"][:, group], examples["local"][:, group]
                mine = examples["rolled"][size].input(stage, unit, local)
                chosen[group] = jnp.where(per_row(examples["own"], mine), mine, chosen[group])
        return packed.with_inputs(chosen)

    # ---- the networks' answers

    def velocity(self, denoiser: Params, packed: Packed, remat: str = "none") -> list[Float[Array, "b t h w c"]]:
        """A denoiser's float32 answer for every column."""
        answers = self.definitions[DENOISER](denoiser, *packed.inputs, remat=remat)
        return [answer.astype(jnp.float32) for answer in answers]

    def teacher_velocity(
        self, frozen: Params, examples: dict[str, Any], clips: Sequence[NoisyClip]
    ) -> list[Float[Array, "b t h w c"]]:
        """The teacher's guided velocity. Each row and its twin with the empty prompt are neighbours, on one device."""
        first, later = self.config.first_guidance, self.config.later_guidance
        if first == later == 1:
            return self.velocity(frozen[DENOISER], self.scene(examples).at(clips))
        pairs, clips = jax.tree.map(lambda x: jnp.repeat(x, 2, axis=0), (examples, list(clips)))
        empty = jnp.arange(len(pairs["unit"])) % 2 == 0
        pairs |= {name: jnp.where(per_row(empty, pairs[name]), x, pairs[name]) for name, x in frozen[NEGATIVE].items()}
        answers = self.velocity(frozen[DENOISER], self.scene(pairs).at(clips))
        guidance = jnp.where(examples["unit"] == 0, first, later)
        answers = [answer.reshape(-1, 2, *answer.shape[1:]) for answer in answers]
        return [guided(v[:, 0], v[:, 1], guidance[:, group]) for group, v in enumerate(answers)]

    def advanced(self, state: TrainState, grads: Params) -> tuple[TrainState, dict[str, Any]]:
        """The state after the student's update, from its denoiser's gradient; the optimizer's metrics."""
        # The optimizer expects a gradient for everything in params; frozen text has none.
        grads = jax.tree.map(jnp.zeros_like, state.params) | grads
        return state.advance(grads, self.optimizer, ema_decay=self.config.ema_decay)
