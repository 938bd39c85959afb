"""What a text encoder is distilled from: the states that a system's denoiser reads of prompts.

``t = CE(T5(prompt))`` with Pyramid-Flow's teacher, CE being the denoiser's context embedder; a system with a context
adapter, or with a T5 as wide as its denoiser, teaches as well.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nd_jax.errors import UserError
from nd_jax.models import context_adapter, t5
from nd_jax.models.context_adapter import ContextAdapterConfig
from nd_jax.models.functional import Definition, Params
from nd_jax.models.hooks import NO_HOOKS, ShardingHooks
from nd_jax.models.mmdit import MMDiTConfig
from nd_jax.models.system import ADAPTER, DENOISER, T5, SystemConfig, whole_kernels
from nd_jax.models.t5 import T5Config

EMBEDDER = "context_embedder"
"""Key, beside the networks', of the denoiser's linear layer for text."""


def embed(embedder: Params, states: Float[Array, "n s d"]) -> Float[Array, "n s width"]:
    """The denoiser's context embedder, in float32."""
    return states.astype(jnp.float32) @ embedder["kernel"] + embedder["bias"]


def read_states(definition: Definition, params: Params, ids: Array, mask: Array, **options: Any) -> Array:
    """A T5's states [N, S, D], projected where it has a projection."""
    output = definition(params, ids, mask, **options)
    return output.last_hidden_state if output.prompt_embeds is None else output.prompt_embeds


class Teacher:
    """What a system's denoiser reads of prompts: its T5, its adapter if it has one, and its context embedder if any.

    Its parameters are a dict with the keys ``parts``.
    """

    def __init__(self, system: SystemConfig, dtype: Any = jnp.float32, hooks: ShardingHooks = NO_HOOKS):
        if system.text_encoder_3 is None:
            raise UserError(
                "text distillation: the teacher has no text_encoder_3; expected a system that reads prompts"
            )
        self.dtype, self.hooks = jnp.dtype(dtype), hooks
        self.definitions = {T5: t5.definition(system.text_encoder_3, dtype=dtype, hooks=hooks)}
        if system.context_adapter is not None:
            self.definitions[ADAPTER] = context_adapter.definition(system.context_adapter, dtype=dtype)
        self.embeds = system.diffusion_transformer.context_embedder
        self.parts = (*self.definitions, *((EMBEDDER,) if self.embeds else ()))

    def cast(self, params: Params) -> Params:
        """The parameters in the dtypes they are kept in. Raises UserError naming a part that is missing."""
        for name in self.parts:
            if name not in params:
                raise UserError(
                    f"text distillation: the teacher's {name} is not given; expected {', '.join(self.parts)}"
                )
        kept = {name: jax.tree.map(partial(jnp.asarray, dtype=self.dtype), params[name]) for name in self.definitions}
        if self.embeds:
            kept[EMBEDDER] = jax.tree.map(partial(jnp.asarray, dtype=jnp.float32), params[EMBEDDER])
        return kept

    def __call__(self, params: Params, ids: Int[Array, "n s"], mask: Int[Array, "n s"]) -> Float[Array, "n s width"]:
        read = {name: whole_kernels(params[name], self.dtype, self.hooks) for name in self.definitions}
        params = {**params, **read}
        states = read_states(self.definitions[T5], params[T5], ids, mask)
        if ADAPTER in self.definitions:
            states = self.definitions[ADAPTER](params[ADAPTER], states)
        return embed(params[EMBEDDER], states) if self.embeds else states.astype(jnp.float32)


def teacher_params(system: SystemConfig, params: Params) -> Params:
    """The parts of a system's parameters that ``Teacher`` reads."""
    found = {name: params[name] for name in (T5, ADAPTER) if name in params}
    if system.diffusion_transformer.context_embedder:
        found[EMBEDDER] = params[DENOISER][EMBEDDER]
    return found


def check_student(encoder: T5Config, adapter: ContextAdapterConfig, mode: str, denoiser: MMDiTConfig) -> None:
    """Raises UserError when encoder, adapter and denoiser do not fit each other, naming both sides."""
    if mode == "extend" and not denoiser.context_embedder:
        raise UserError("text distillation: mode 'extend' and a denoiser without context embedder; expected 'replace'")
    states = encoder.d_model if encoder.out_dim is None else encoder.out_dim
    wanted = denoiser.joint_attention_dim if mode == "extend" else denoiser.width
    for what, found, expected in (
        ("student's encoder gives", states, adapter.input_dims),
        ("adapter gives", adapter.output_dims, wanted),
    ):
        if found != expected:
            raise UserError(
                f"text distillation: the {what} {found} channels, mode {mode!r} expects {expected} after it; change "
                "the run's encoder or adapter"
            )
