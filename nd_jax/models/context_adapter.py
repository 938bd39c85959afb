"""ContextAdapter: a multilayer perceptron with skips from its input, from distilled-T5 width to the denoiser's.

Takes the place of the denoiser's context embedder (Neodragon, arXiv 2511.06055, text-encoder distillation).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from nd_jax.errors import UserError
from nd_jax.models.activations import ACTIVATIONS, check_activation
from nd_jax.models.functional import Definition


@dataclasses.dataclass(frozen=True)
class ContextAdapterConfig:
    """Shape of a ContextAdapter, under the names of the official config.json.

    ``layer_depths[k]`` is the width of hidden layer k; ``skips[k]`` says whether the input is put in front of
    its output (channels: input, then hidden) for the layer after it; the last one feeds the output layer.
    ``pre_activation`` puts the activation before a hidden layer's matrix, on all it reads, instead of after it; the
    output layer reads what it is given in both orders.
    """

    input_dims: int = 4096
    """Channels in."""
    output_dims: int = 1536
    """Channels out."""
    layer_depths: tuple[int, ...] = (4096, 4096, 4096, 4096)
    """Channels of every hidden layer."""
    skips: tuple[bool, ...] = (True, True, True, True)
    """Whether the input is put in front of each hidden layer's output."""
    activation_fn: str = "gelu"
    out_activation_fn: str = "linear"
    pre_activation: bool = False
    use_biases: bool = True

    def __post_init__(self):
        check_activation("activation_fn", self.activation_fn)
        check_activation("out_activation_fn", self.out_activation_fn)
        if len(self.skips) != len(self.layer_depths):
            raise UserError(
                f"config key 'skips' has {len(self.skips)} entries; expected one per entry of "
                f"'layer_depths' ({len(self.layer_depths)})"
            )

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> ContextAdapterConfig:
        """Read the official config.json. Raises ``UserError`` for values that are not supported."""
        known = {field.name: config[field.name] for field in dataclasses.fields(cls) if field.name in config}
        for key in ("layer_depths", "skips"):
            if key in known:
                known[key] = tuple(known[key])
        return cls(**known)

    def to_dict(self) -> dict[str, Any]:
        """Content of the official config.json."""
        values = dataclasses.asdict(self)
        values |= {"layer_depths": list(self.layer_depths), "skips": list(self.skips)}
        return {"_class_name": "ContextAdapter", "_diffusers_version": "0.34.0"} | dict(sorted(values.items()))


class ContextAdapter(nnx.Module):
    """``y = adapter(x)``: [..., input_dims] -> [..., output_dims]."""

    def __init__(self, config: ContextAdapterConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.config = config

        def linear(width_in: int, width_out: int) -> nnx.Linear:
            # Uniform in +-1/sqrt(fan in), as PyTorch initialises a linear layer.
            kernel_init = jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
            return nnx.Linear(
                width_in, width_out, use_bias=config.use_biases, kernel_init=kernel_init, dtype=dtype, rngs=rngs
            )

        width, layers = config.input_dims, []
        for depth, skip in zip(config.layer_depths, config.skips, strict=True):
            layers.append(linear(width, depth))
            width = depth + (config.input_dims if skip else 0)
        self.network_layers = nnx.List(layers)
        self.output_layer = linear(width, config.output_dims)

    def __call__(self, x: Float[Array, "... input_dims"]) -> Float[Array, "... output_dims"]:
        config = self.config
        activation = ACTIVATIONS[config.activation_fn]
        hidden = x
        for layer, skip in zip(self.network_layers, config.skips, strict=True):
            hidden = layer(activation(hidden)) if config.pre_activation else activation(layer(hidden))
            if skip:
                hidden = jnp.concatenate([x.astype(hidden.dtype), hidden], axis=-1)
        return ACTIVATIONS[config.out_activation_fn](self.output_layer(hidden))


def definition(config: ContextAdapterConfig, *, dtype: Any = jnp.float32) -> Definition:
    """Structure of a ContextAdapter that computes in ``dtype``."""
    return Definition(lambda rngs: ContextAdapter(config, dtype=dtype, rngs=rngs))
