"""Second stage of recovery after pruning: match the teacher's tokens at every kept block (paper, block pruning).

``loss = image * MSE(image tokens) + text * (1 - cos(text tokens)) + teacher * MSE(velocity, the teacher's) + data *
MSE(velocity, target)``, on the batches, packing and draws of flow matching. Both denoisers read the same inputs and
conditions; padded tokens never count, and every sample counts the same at any resolution. The paper gives no weights:
those here are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from nd_jax.errors import UserError
from nd_jax.models.functional import Params
from nd_jax.models.mmdit import BlockStates
from nd_jax.models.system import DENOISER, SystemConfig
from nd_jax.pyramid.layout import REAL, Envelope
from nd_jax.pyramid.targets import per_sample_loss
from nd_jax.recipes.flow_matching import FlowRecipe, FlowRecipeConfig
from nd_jax.recipes.packed import Packed
from nd_jax.recipes.pruning import cosine_distance
from nd_jax.training.paths import map_named
from nd_jax.training.state import TrainState

Mapping = Literal["simple", "next"]


@dataclass(frozen=True)
class RecoveryRecipeConfig(FlowRecipeConfig):
    """What a feature-matching run does besides flow matching."""

    train_text: bool = False
    """Stays off: teacher and student read the same text."""
    image_weight: float = 1.0
    """Of the squared error of image tokens, mean over blocks."""
    text_weight: float = 1.0
    """Of the cosine distance of text tokens, mean over blocks. With both at 0 no blocks are matched."""
    teacher_weight: float = 1.0
    """Of the squared distance to the teacher's velocity."""
    data_weight: float = 1.0
    """Of the flow-matching loss, the squared distance to the data's velocity."""
    mapping: Mapping = "simple"
    """What a student's block should give: what the same block gives in the teacher, or (next) what the teacher's next
    kept block receives, so that a block makes up for the removed ones behind it."""
    normalise: bool = False
    """Divide every image token's error by the mean square of the teacher's token, so that the few tokens with massive
    activations do not outweigh all others."""


def matched_blocks(kept: Sequence[int], mapping: Mapping) -> tuple[int, ...]:
    """For each of the student's blocks but the last, the teacher's block whose output it should match.

    ``kept`` are the original indices of the student's blocks, the last block included (its partner is the last one).
    """
    return tuple(kept[:-1]) if mapping == "simple" else tuple(k - 1 for k in kept[1:])


def token_errors(student: Float[Array, "... d"], teacher: Float[Array, "... d"], normalise: bool) -> Float[Array, ...]:
    """Mean squared error of every token in float32, relative to the teacher's mean square if ``normalise``."""
    student, teacher = student.astype(jnp.float32), teacher.astype(jnp.float32)
    error = jnp.mean(jnp.square(student - teacher), axis=-1)
    return error / jnp.maximum(jnp.mean(jnp.square(teacher), axis=-1), 1e-6) if normalise else error


def row_mean(values: Float[Array, "... l"], weight: Float[Array, "... l"]) -> Float[Array, ...]:
    """Mean over the tokens that weigh something; 0 where none does."""
    return jnp.sum(values * weight, axis=-1) / jnp.maximum(jnp.sum(weight, axis=-1), 1.0)


def image_mismatch(
    student: BlockStates, teacher: BlockStates, packed: Packed, envelopes: Sequence[Envelope], normalise: bool
) -> Float[Array, ""]:
    """Error of image tokens, mean over all blocks; of the last block only those that leave the network count."""
    blocks = token_errors(student.image, teacher.image, normalise)
    last = token_errors(student.last_image, teacher.last_image, normalise)
    means, start = [], 0
    for envelope, layout in zip(envelopes, packed.layouts, strict=True):
        end = start + envelope.image_length
        frames, height, width = envelope.clips[-1]
        current = frames * height * width // envelope.patch_size**2
        real = (layout.segments[:, envelope.text_length :] == REAL).astype(jnp.float32)
        inner = row_mean(blocks[:, :, start:end], real)
        outer = row_mean(last[:, end - current : end], real[:, -current:])
        means.append(jnp.mean(jnp.concatenate([inner, outer[None]])))
        start = end
    return jnp.mean(jnp.stack(means))


def text_mismatch(student: BlockStates, teacher: BlockStates, packed: Packed) -> Float[Array, ""]:
    """Cosine distance of text tokens, mean over all blocks but the last, which has none."""
    distance = cosine_distance(student.text, teacher.text)
    return jnp.mean(row_mean(distance, packed.conditions.mask.astype(jnp.float32)))


def at_rest(params: Params, dtype: jnp.dtype) -> Params:
    """A frozen denoiser's parameters with those kernels in the compute dtype that the network casts to it anyway:
    the same answers from half the memory."""

    def lower(path: str, leaf: Array) -> Array:
        cast = path.endswith("kernel") and not path.startswith("time_text_embed/")
        return leaf.astype(dtype) if cast else leaf

    return map_named(lower, params)


class RecoveryRecipe(FlowRecipe):
    """Feature matching for the loop. ``system`` is the student's; ``kept`` are its blocks' original indices.

    ``init(key, student, teacher)`` takes the student's networks and the teacher's denoiser. That one is part of the
    state (``frozen``), so that a run resumes without its folder, but has no moments and no average.
    Raises UserError for depths that do not fit ``kept``, and for weights that leave nothing to train on.
    """

    config: RecoveryRecipeConfig

    def __init__(self, system: SystemConfig, config: RecoveryRecipeConfig, *, kept: Sequence[int], **options: Any):
        super().__init__(system, config, **options)
        weights = (config.image_weight, config.text_weight, config.teacher_weight, config.data_weight)
        if min(weights) < 0 or not any(weights):
            raise UserError(f"recovery: weights {weights} of image, text, teacher and data; expected one above 0")
        if config.train_text:
            raise UserError("recovery: --recipe.train-text is on; teacher and student read the same frozen text")
        if len(kept) != system.diffusion_transformer.num_layers or list(kept) != sorted(set(kept)):
            raise UserError(
                f"recovery: kept blocks {tuple(kept)} for a student of {system.diffusion_transformer.num_layers} "
                "blocks; expected as many ascending numbers"
            )
        self.kept, self.partners = tuple(kept), matched_blocks(kept, config.mapping)

    def init(self, key: jax.Array, student: Params, teacher: Params) -> TrainState:
        depth = len(jax.tree.leaves(teacher["blocks"])[0])
        if depth != self.kept[-1]:
            raise UserError(
                f"recovery: a teacher of {depth + 1} blocks, the student was cut out of one of {self.kept[-1] + 1}; "
                "expected the system that was pruned"
            )
        frozen = {DENOISER: at_rest(teacher, jnp.dtype(self.config.dtype))}
        return super().init(key, student).replace(frozen=frozen)

    def loss(self, params: Params, examples: dict[str, Any], frozen: Params) -> tuple[Array, dict[str, Any]]:
        """The weighted sum, and every term; ``examples`` are those of ``pack``."""
        config, packed = self.config, self.pack(params, examples)
        deep = bool(config.image_weight or config.text_weight)

        def run(denoiser: Params, remat: str) -> tuple[list[Array], BlockStates | None]:
            found = self.definitions[DENOISER](denoiser, *packed.inputs, return_blocks=deep, remat=remat)
            return found if deep else (found, None)

        wanted, teacher = run(frozen[DENOISER], "none")
        answers, student = run(params[DENOISER], config.remat)
        data, by_stage = self.velocity_error(answers, packed)
        apart = [per_sample_loss(*pair) for pair in zip(answers, wanted, strict=True)]
        terms = {"data": data, "teacher": jnp.mean(jnp.stack(apart))}
        if deep:
            partners = jnp.array(self.partners, jnp.int32)
            teacher = teacher._replace(image=teacher.image[partners], text=teacher.text[partners])
            terms["image"] = image_mismatch(student, teacher, packed, self.envelopes, config.normalise)
            terms["text"] = text_mismatch(student, teacher, packed)
        loss = sum(getattr(config, f"{name}_weight") * value for name, value in terms.items())
        return loss, {"match": terms, "flow": by_stage}

    def step(self, state: TrainState, batch: dict[str, Array]) -> tuple[TrainState, dict]:
        grads, metrics = self._grads(state.params, self.examples(state, batch), state.frozen)
        state, optim_metrics = state.advance(grads, self.optimizer, ema_decay=self.config.ema_decay)
        return state, {**metrics, "optim": optim_metrics}
