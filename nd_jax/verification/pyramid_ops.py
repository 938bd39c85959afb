"""Pyramid operations: resampling, stage jump, history, latent scaling, pixels. Recognised by the arrays they have."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from nd_jax.pixels import from_uint8, to_uint8
from nd_jax.pyramid.history import unit_history
from nd_jax.pyramid.normalise import LatentStats
from nd_jax.pyramid.renoise import block_covariance, renoise
from nd_jax.pyramid.resample import halve_noise, latent_pyramid
from nd_jax.pyramid.sampler import twice
from nd_jax.verification.cases import Case, Outputs, Subcase
from nd_jax.verification.layouts import from_torch, to_torch


def recompute(case: Case) -> Callable[[Subcase], Outputs]:
    """The function returned recomputes one subcase."""

    def stages(subcase: Subcase) -> int:
        return subcase.about.get("num_stages", case.config.get("num_stages"))

    def scaling(subcase: Subcase) -> Outputs:
        # The reference scales clips of several frames in place, so that the caller's latents change, too.
        latents = from_torch(subcase.input("latents"))
        scaled = LatentStats.from_dict(case.config["vae_factors"]).denormalise(latents)
        yield "vae_input", to_torch(scaled)
        yield "latents_after_call", to_torch(scaled if latents.shape[1] > 1 else latents)
        yield "video_bt_hwc", scaled.reshape(-1, *scaled.shape[2:])

    def outputs(subcase: Subcase) -> Outputs:
        inputs, about = subcase.inputs, subcase.about
        if "x" in inputs:
            x = from_torch(inputs["x"])
            for level, latents in enumerate(latent_pyramid(x, stages(subcase))):
                yield f"pyramid/{level}", to_torch(latents)
            for _ in range(about.get("times", 0)):
                x = halve_noise(x)
            yield "y", to_torch(x)
        elif "block_noise" in inputs:
            latents, noise = from_torch(subcase.input("latents")), from_torch(inputs["block_noise"])
            yield "y", to_torch(renoise(latents, noise, subcase.parameter("orig_sigma", float), about["gamma"]))
        elif "latents" in inputs:
            yield from scaling(subcase)
        elif units := subcase.input_list("units"):
            for stage, clips in enumerate(unit_history([from_torch(unit) for unit in units], stages(subcase))):
                for index, clip in enumerate(clips):
                    yield f"past/{stage}/{index}", to_torch(twice(clip) if about.get("cfg") else clip)
        elif "images" in inputs:
            yield "uint8", to_uint8(inputs["images"])
        elif "uint8" in inputs:
            yield "images", from_uint8(inputs["uint8"])[None]
        elif "gamma" in about:
            covariance = block_covariance(about["gamma"])
            yield "covariance", jnp.asarray(covariance)
            yield "eigenvalues", np.linalg.eigvalsh(covariance)[::-1]

    return outputs
