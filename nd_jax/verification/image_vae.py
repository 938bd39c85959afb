"""Image autoencoder cases: encode, decode, and decode as the first-frame generator does it, down to uint8."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from nd_jax.models import image_vae
from nd_jax.models.posterior import posterior
from nd_jax.pixels import round_to_uint8
from nd_jax.verification.cases import Case, Outputs, Subcase
from nd_jax.verification.layouts import from_torch, to_torch
from nd_jax.verification.weights import load, read_config


def recompute(case: Case) -> Callable[[Subcase], Outputs]:
    """Load the weights once; the function returned recomputes one subcase."""
    config = read_config(case, "image_vae")
    params, network = load(case, "image_vae", config), image_vae.definition(config, dtype=case.dtype)
    encode = jax.jit(lambda params, image: network.bind(params).encode(image))

    @jax.jit
    def decode(params, latent):
        seen: dict[str, jax.Array] = {}
        return network.bind(params).decode(latent, seen), seen

    def activations(latent: np.ndarray) -> dict[str, jax.Array]:
        """Outputs of the decoder's stages. They grow to 20, where the reference's own float32 rounding takes up most of
        the tolerance (1.6e-5 of 2e-5); so, unless bfloat16 is asked for, these are computed in float64."""
        latent = np.moveaxis(latent, 1, -1)
        if case.dtype != np.float32:
            return decode(params, jnp.asarray(latent))[1]
        with jax.enable_x64(True):
            exact, seen = image_vae.definition(config, dtype=jnp.float64), {}
            exact.bind(params).decode(jnp.asarray(latent, jnp.float64), seen)
            return seen

    def scaled(subcase: Subcase) -> Outputs:
        image, _ = decode(params, from_torch(subcase.inputs["scaled_latent"]) / config.scaling_factor)
        yield "image", to_torch(image)
        yield "image_0_1", to_torch(jnp.clip(image / 2 + 0.5, 0, 1))
        yield "image_uint8", round_to_uint8(np.asarray(image, np.float32))
        if "latent_for_act" in subcase.outputs:  # an input, though recorded among the outputs
            yield "latent_for_act", subcase.outputs["latent_for_act"]
            seen = activations(subcase.outputs["latent_for_act"])
            yield from ((f"act/{name}", np.moveaxis(np.asarray(value), -1, 1)) for name, value in seen.items())

    def outputs(subcase: Subcase) -> Outputs:
        if "image" in subcase.inputs:
            moments = encode(params, from_torch(subcase.inputs["image"]))
            code = posterior(moments)
            found = {"moments": moments, "mean": code.mean, "std": code.std}
            yield from ((name, to_torch(value)) for name, value in found.items())
        elif "scaled_latent" in subcase.inputs:
            yield from scaled(subcase)
        else:
            yield "image", to_torch(decode(params, from_torch(subcase.input("latent")))[0])

    return outputs
