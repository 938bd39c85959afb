"""Distil a text encoder in the denoiser's own space (Neodragon, arXiv 2511.06055, text-encoder distillation).

Target: what the teacher's denoiser reads of a prompt, ``t = CE(T5(prompt))``, from a live teacher of any size or
computed before. Student: ``CA(DT5(prompt))``. Loss, over valid tokens: ``1.0 MSE + 0.1 (1 - cos)``. Prompts only, no
videos. Both read the same token ids, so position n of one answers position n of the other.

Not distilled: the pooled CLIP towers. They are small, and the student's system keeps the teacher's.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nd_jax.errors import UserError
from nd_jax.models import context_adapter, t5
from nd_jax.models.context_adapter import ContextAdapterConfig
from nd_jax.models.functional import Params
from nd_jax.models.hooks import NO_HOOKS, ShardingHooks
from nd_jax.models.mmdit import MMDiTConfig
from nd_jax.models.system import ADAPTER, T5, SystemConfig, whole_kernels
from nd_jax.models.t5 import T5Config
from nd_jax.recipes.lora import LoraConfig, init_lora, merge_lora
from nd_jax.recipes.text_teacher import EMBEDDER, Teacher, check_student, embed, read_states
from nd_jax.training.optim import OptimConfig, make_optimizer, value_and_grad
from nd_jax.training.sharding import DEFAULT_TABLE, Rules
from nd_jax.training.state import TrainState

LORA = "lora"
"""Key of the low-rank factors beside the networks'."""
TEACHER, STUDENT = "teacher", "student"
"""Keys of the frozen parameters: all of the teacher's, and of the student's encoder where it is not trained."""
ENCODER = "encoder"
"""Optimizer group of the student's encoder; the adapter is in ``main``."""


@dataclass(frozen=True)
class TextDistillConfig:
    """What a text-distillation run does besides its optimizer; modes and loss weights are the published ones."""

    batch: int = 256
    """Prompts per update."""
    mode: Literal["replace", "extend"] = "replace"
    """The adapter takes the place of the denoiser's context embedder, or comes in front of it."""
    encoder: Literal["frozen", "trained", "lora"] = "frozen"
    """What happens to the student's T5 encoder; all but "trained" need the weights of one to start with."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Of the student's encoder, if ``encoder`` is "lora"."""
    mse: float = 1.0
    """Weight of the squared error, averaged over channels and valid tokens."""
    cosine: float = 0.1
    """Weight of 1 - cos, averaged over valid tokens. Without it training drifts, says the paper."""
    captions: int = 0
    """Captions of the shapes worlds to train on, beside any prompt folders."""
    loose: float = 0.4
    """Share of those captions that follow no template."""
    empty: float = 0.02
    """Share of prompts replaced by the empty one, which guidance reads."""
    microbatches: int = 1
    """Passes per update; each needs 1 / microbatches of the memory."""
    remat: bool = False
    """Recompute each layer of the student's encoder in the backward pass."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype of the student; norms, softmax and losses are float32 in any case."""
    teacher_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the frozen teacher, parameters and computation; its context embedder is float32 in any case."""
    ema_decay: float = 0.999
    """Of the averaged parameters, which are the result."""
    optim: OptimConfig = field(default_factory=OptimConfig)


def token_distances(
    found: Float[Array, "n s d"], wanted: Float[Array, "n s d"]
) -> tuple[Float[Array, "n s"], Float[Array, "n s"]]:
    """Per token: squared error averaged over channels, and 1 - cos, both float32. Differentiable at zero vectors."""
    found, wanted = found.astype(jnp.float32), wanted.astype(jnp.float32)

    def unit(x: Array) -> Array:
        return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), -1, keepdims=True) + 1e-12)

    return jnp.mean(jnp.square(found - wanted), -1), 1 - jnp.sum(unit(found) * unit(wanted), -1)


class TextDistillRecipe:
    """The recipe for the loop.

    Batches: ``t5_ids``, ``t5_mask`` int32 [N, S] and, without ``teacher``, ``target`` float32 [N, S, width].
    ``init`` takes the teacher's parameters (``Teacher.parts``; without ``teacher`` only ``EMBEDDER``, and only to
    extend) and those of the student's networks that do not start afresh, by the names ``T5`` and ``ADAPTER``.
    Raises UserError for networks that do not fit each other.
    """

    def __init__(
        self,
        encoder: T5Config,
        adapter: ContextAdapterConfig,
        config: TextDistillConfig,
        *,
        denoiser: MMDiTConfig,
        teacher: SystemConfig | None,
        text_length: int,
        hooks: ShardingHooks = NO_HOOKS,
    ):
        self.hooks, self.dtype = hooks, jnp.dtype(config.dtype)
        self.config, self.width, self.text_length = config, denoiser.width, text_length
        self.extends = config.mode == "extend"
        check_student(encoder, adapter, config.mode, denoiser)
        if teacher is not None and teacher.text_encoder_3 is not None:
            rows, ids = encoder.vocab_size, teacher.text_encoder_3.vocab_size
            if rows != ids:
                raise UserError(
                    f"text distillation: the student has {rows} embeddings and the teacher {ids}; expected as many, "
                    "for they share one tokenizer"
                )
        dtype = jnp.dtype(config.dtype)
        self.encoder = t5.definition(encoder, dtype=dtype, hooks=hooks)
        self.adapter = context_adapter.definition(adapter, dtype=dtype)
        self.teacher = None if teacher is None else Teacher(teacher, jnp.dtype(config.teacher_dtype), hooks)
        own = tuple(
            dataclasses.replace(rule, pattern=f"^({T5}|{LORA})/.*{rule.pattern}", label=ENCODER)
            for rule in DEFAULT_TABLE
        )
        self.rules = Rules(own + DEFAULT_TABLE)
        self.optimizer = make_optimizer(config.optim, self.rules)
        self._grads = value_and_grad(self.loss, config.microbatches)

    def batch_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        n, length = self.config.batch, self.text_length
        spec = {name: jax.ShapeDtypeStruct((n, length), jnp.int32) for name in ("t5_ids", "t5_mask")}
        if self.teacher is None:
            spec["target"] = jax.ShapeDtypeStruct((n, length, self.width), jnp.float32)
        return spec

    def check_start(self, student: Params) -> None:
        """Raises UserError when an encoder that is not trained as a whole has no weights to start from."""
        if self.config.encoder != "trained" and T5 not in student:
            raise UserError(
                f"text distillation: the student's encoder is {self.config.encoder!r} and starts from nothing; "
                "expected the weights of a distilled T5 (--start), or --recipe.encoder trained"
            )

    def init(self, key: jax.Array, teacher: Params | None = None, student: Params | None = None) -> TrainState:
        config, student = self.config, student or {}
        self.check_start(student)
        keys = jax.random.split(key, 4)
        encoder = student.get(T5) or self.encoder.init(keys[0])
        params = {ADAPTER: student.get(ADAPTER) or self.adapter.init(keys[1])}
        frozen: Params = {}
        if config.encoder == "trained":
            params[T5] = encoder
        else:
            frozen[STUDENT] = {T5: encoder}
        if config.encoder == "lora":
            params[LORA] = init_lora(config.lora, encoder, keys[2])
        if self.teacher is not None:
            frozen[TEACHER] = self.teacher.cast(teacher or {})
        elif self.extends:
            frozen[TEACHER] = {EMBEDDER: (teacher or {})[EMBEDDER]}
        return TrainState.create(params, self.optimizer, keys[3], ema=True, frozen=frozen or None)

    def networks(self, params: Params, frozen: Params | None) -> Params:
        """The student as two plain networks, ``T5`` and ``ADAPTER``: low-rank factors are merged."""
        encoder = params[T5] if T5 in params else frozen[STUDENT][T5]
        if LORA in params:
            encoder = merge_lora(self.config.lora, encoder, params[LORA])
        return {T5: encoder, ADAPTER: params[ADAPTER]}

    def student(
        self, params: Params, frozen: Params | None, ids: Int[Array, "n s"], mask: Int[Array, "n s"]
    ) -> Float[Array, "n s width"]:
        """What the denoiser would read of the prompts with the student in place."""
        networks = self.networks(params, frozen)
        networks = {name: whole_kernels(part, self.dtype, self.hooks) for name, part in networks.items()}
        states = read_states(self.encoder, networks[T5], ids, mask, remat=self.config.remat)
        states = self.adapter(networks[ADAPTER], states)
        return embed(frozen[TEACHER][EMBEDDER], states) if self.extends else states

    def loss(self, params: Params, examples: dict[str, Array], frozen: Params | None) -> tuple[Array, dict[str, Array]]:
        """The weighted sum of both terms, the terms, and the mean square of the target.

        ``examples`` is a batch with ``weight`` float32 [N, S], whose mean over prompts of the sum over tokens is 1.
        """
        ids, mask, weight = (examples[name] for name in ("t5_ids", "t5_mask", "weight"))
        wanted = examples["target"] if self.teacher is None else self.teacher(frozen[TEACHER], ids, mask)
        squared, angle = token_distances(self.student(params, frozen, ids, mask), wanted)

        def mean(x: Float[Array, "n s"]) -> Float[Array, ""]:
            return jnp.mean(jnp.sum(weight * x, axis=1))

        terms = {"mse": mean(squared), "cosine": mean(angle), "power": mean(jnp.mean(jnp.square(wanted), -1))}
        return self.config.mse * terms["mse"] + self.config.cosine * terms["cosine"], terms

    def step(self, state: TrainState, batch: dict[str, Array]) -> tuple[TrainState, dict]:
        """One update. ``relative`` is the squared error as a share of the target's mean square."""
        mask = batch["t5_mask"].astype(jnp.float32)
        weight = mask * (len(mask) / jnp.maximum(jnp.sum(mask), 1))
        grads, terms = self._grads(state.params, {**batch, "weight": weight}, state.frozen)
        state, optim_metrics = state.advance(grads, self.optimizer, ema_decay=self.config.ema_decay)
        loss, power = terms.pop("loss"), terms.pop("power")
        return state, {"loss": loss, "term": terms, "relative": terms["mse"] / power, "optim": optim_metrics}
