"""Generation cases: prompt embeddings, the sampling loop call by call, first frames given as images, pixels."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from nd_jax.converters.folders import load_folder
from nd_jax.converters.kinds import kind_of
from nd_jax.errors import UserError
from nd_jax.models.causal_vae import posterior
from nd_jax.pixels import from_uint8, to_uint8
from nd_jax.pyramid.layout import Envelope, envelopes, layout_arrays
from nd_jax.pyramid.normalise import NEODRAGON
from nd_jax.pyramid.sampler import Call, SamplePlan, Velocity, guide, sample, twice
from nd_jax.pyramid.schedule import Schedule
from nd_jax.verification.cases import Case, Outputs, Subcase
from nd_jax.verification.layouts import from_torch, to_torch


class Pipeline:
    """The case's modules and schedule."""

    def __init__(self, case: Case):
        self.schedule = Schedule.from_dict(case.config["scheduler"])
        folder = load_folder(case.file("checkpoint"))

        def module(role: str) -> tuple[Any, Any, Any]:
            config, params = folder.load(folder.name_of(role), dtype="fp32")
            return config, kind_of(config).definition(config), params

        _, text_encoder, self.text_params = module("text_encoder_3")
        _, adapter, self.adapter_params = module("context_adapter")
        self.dit_config, self.dit, self.dit_params = module("diffusion_transformer")
        _, self.vae, self.vae_params = module("causal_video_vae")
        self.text_encoder, self.adapter = jax.jit(text_encoder), jax.jit(adapter)
        self._denoise = jax.jit(self.denoise, static_argnames=("envelope", "guided"))

    def prompts(self, subcase: Subcase) -> Outputs:
        """The text encoder against the recorded embeddings, and the adapter on top of those."""
        for side in ("pos", "neg"):
            if f"{side}/input_ids" in subcase.inputs:
                ids, mask = subcase.input(f"{side}/input_ids"), subcase.input(f"{side}/attention_mask")
                yield f"{side}/prompt_embeds", self.text_encoder(self.text_params, ids, mask).prompt_embeds
            embeds = subcase.input(f"{side}/prompt_embeds")
            yield f"prompt_embeds_adapted_{side}", self.adapter(self.adapter_params, embeds)

    def velocity(self, stages: tuple[Envelope, ...], prompt: Subcase, guided: bool) -> Callable[[int], Velocity]:
        """The denoiser of each stage: with guidance twice the rows, the negative prompt's first."""
        sides = ("neg", "pos") if guided else ("pos",)
        embeds, mask, pooled = (
            jnp.concatenate([jnp.asarray(prompt.input(f"{side}/{name}")) for side in sides])
            for name in ("prompt_embeds", "attention_mask", "pooled")
        )
        prompt_arrays = (self.adapter(self.adapter_params, embeds), mask, pooled)
        return lambda stage: partial(
            self._denoise, self.dit_params, prompt_arrays, envelope=stages[stage], guided=guided
        )

    def denoise(self, params, prompt, z, timestep, history, unit_index, guidance, *, envelope, guided):
        """Velocity at one stage; traced."""
        clips, (text, mask, pooled) = [*history, z], prompt
        if guided:
            clips, timestep = [twice(clip) for clip in clips], twice(timestep)
        layout = layout_arrays(envelope, unit_index, mask)
        (prediction,) = self.dit(params, [clips], text, pooled, timestep, [layout])
        return guide(prediction, guidance) if guided else prediction

    def first_latent(self, subcase: Subcase) -> Float[Array, "1 1 h w c"] | None:
        """The normalised posterior sample of the given image, if there is one."""
        if "image_uint8" not in subcase.inputs:
            return None
        image = jnp.asarray(from_uint8(subcase.input("image_uint8"))[None, None])
        encode = jax.jit(lambda params, video: posterior(self.vae.bind(params).encode(video)))
        code = encode(self.vae_params, image)
        return NEODRAGON.normalise(code.sample(from_torch(subcase.input("image_latent_noise"))))

    def frames(self, latents: Float[Array, "1 t h w c"]) -> np.ndarray:
        """uint8 [T, H, W, 3]."""
        decode = jax.jit(lambda params, latents: self.vae.bind(params).decode(latents))
        return to_uint8(decode(self.vae_params, NEODRAGON.denormalise(latents))[0])

    def __call__(self, subcase: Subcase, prompt: Subcase) -> Outputs:
        about = subcase.about
        initial = from_torch(subcase.input("initial_noise"))
        _, frames, height, width, _ = initial.shape
        per_unit = about.get("frames_per_unit", 1)
        guided = subcase.parameter("do_classifier_free_guidance", bool)
        stages = envelopes(
            (frames - 1) // per_unit,
            prompt.input("pos/prompt_embeds").shape[1],
            height,
            width,
            patch_size=self.dit_config.patch_size,
            frames_per_unit=per_unit,
            stages=self.schedule.stages,
        )
        plan = SamplePlan(
            tuple(subcase.parameter("num_inference_steps", list)),
            tuple(subcase.parameter("video_num_inference_steps", list)),
            float(subcase.parameter("guidance_scale", float, int)),
            float(subcase.parameter("video_guidance_scale", float, int)),
        )
        calls: list[Call] = []
        latents = sample(
            self.velocity(stages, prompt, guided),
            stages,
            self.schedule,
            plan,
            initial,
            [from_torch(noise) for noise in subcase.input_list("block_noise")],
            first_latent=self.first_latent(subcase),
            trace=calls.append,
        )
        yield "latents", to_torch(latents)
        for index, call in enumerate(calls):
            frames_now = slice(-1, None) if call.unit == 0 else slice(None)
            named = {
                "timestep": np.tile(call.timestep, 2 if guided else 1),
                "velocity_after_guidance": to_torch(call.velocity[:, frames_now]),
                "sample_before": to_torch(call.sample_before[:, frames_now]),
                "sigma": call.sigma,
                "sigma_next": call.sigma_next,
            }
            yield from ((f"trace/{index:03d}/{name}", value) for name, value in named.items())
        if "frames_uint8" in subcase.outputs:
            yield "frames_uint8", self.frames(latents)


def recompute(case: Case) -> Callable[[Subcase], Outputs]:
    """Load the modules once; the function returned recomputes one subcase."""
    pipeline = Pipeline(case)
    owners = [name.split("/")[0] for name in case.inputs if name.endswith("/pos/prompt_embeds")]
    if not owners:
        raise UserError(f"golden case {case.name}: no subcase has the prompt's embeddings, inputs pos/prompt_embeds")

    def outputs(subcase: Subcase) -> Outputs:
        if "pos/prompt_embeds" in subcase.inputs and "initial_noise" not in subcase.inputs:
            return pipeline.prompts(subcase)
        return pipeline(subcase, subcase if subcase.name in owners else Subcase(case, owners[0]))

    return outputs
