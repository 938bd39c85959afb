"""The activation functions that checkpoint configs name."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import jax
import jax.numpy as jnp

from nd_jax.errors import UserError


def quick_gelu(x: jax.Array) -> jax.Array:
    """``x * sigmoid(1.702 x)``, the approximation CLIP-L was trained with."""
    return x * jax.nn.sigmoid(1.702 * x)


_exact_gelu = partial(jax.nn.gelu, approximate=False)
_tanh_gelu = partial(jax.nn.gelu, approximate=True)

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "linear": lambda x: x,
    "identity": lambda x: x,
    "relu": jax.nn.relu,
    "relu6": jax.nn.relu6,
    "leaky_relu": jax.nn.leaky_relu,
    "elu": jax.nn.elu,
    "gelu": _exact_gelu,
    "gelu_new": _tanh_gelu,
    "gelu_pytorch_tanh": _tanh_gelu,
    "quick_gelu": quick_gelu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "mish": jax.nn.mish,
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
    "softplus": jax.nn.softplus,
}


def check_activation(key: str, name: str, supported: Iterable[str] = tuple(ACTIVATIONS)) -> str:
    """``name`` if it is a known activation.

    Raises:
        UserError: naming the config's ``key``, the value and what is supported.
    """
    supported = tuple(supported)
    if name not in supported:
        raise UserError(f"config key {key!r} is {name!r}; supported: {', '.join(supported)}")
    return name
