"""First-frame UNet cases: whole passes with activations, one attention layer, and a latent-consistency walk."""

from __future__ import annotations

from collections.abc import Callable

import jax

from nd_jax.models import unet
from nd_jax.models.embeddings import sinusoid
from nd_jax.pyramid.lcm import LCMSchedule, lcm_sample
from nd_jax.verification.cases import Case, Outputs, Subcase
from nd_jax.verification.layouts import from_torch, to_torch
from nd_jax.verification.weights import load, read_config


def recompute(case: Case) -> Callable[[Subcase], Outputs]:
    """Load the weights once; the function returned recomputes one subcase."""
    config = read_config(case, "unet")
    params, network = load(case, "unet", config), unet.definition(config, dtype=case.dtype)

    @jax.jit
    def run(params, sample, *conditions):
        seen: dict[str, jax.Array] = {}
        return network.bind(params)(sample, *conditions, activations=seen), seen

    def conditions(subcase: Subcase) -> list:
        found = [subcase.input(name) for name in ("encoder_hidden_states", "text_embeds", "time_ids")]
        return [*found, subcase.inputs.get("timestep_cond")]

    def passes(subcase: Subcase) -> Outputs:
        given = conditions(subcase)
        noise, seen = run(params, from_torch(subcase.input("sample")), subcase.input("timestep"), *given)
        yield "noise_pred", to_torch(noise)
        for name, value in seen.items():
            yield f"act/{name}", to_torch(value) if value.ndim == 4 else value
        yield "time_sinusoid", sinusoid(subcase.input("timestep"), config.block_out_channels[0])
        yield "time_ids_sinusoid", unet.size_sinusoids(subcase.input("time_ids"), config.addition_time_embed_dim)
        if "guidance_minus_one" in subcase.inputs:
            guidance = subcase.inputs["guidance_minus_one"] + 1
            yield "timestep_cond", unet.guidance_embedding(guidance, config.time_cond_proj_dim)

    def attention(subcase: Subcase) -> Outputs:
        _, level, _, layer = subcase.parameter("module", str).split(".")
        hidden, text = from_torch(subcase.input("hidden_states")), subcase.input("encoder_hidden_states")
        attend = jax.jit(
            lambda params: network.bind(params).down_blocks[int(level)].attentions[int(layer)](hidden, text)
        )
        yield "hidden_states", to_torch(attend(params))

    def walk(subcase: Subcase) -> Outputs:
        given = conditions(subcase)
        settings = subcase.parameter("scheduler", dict)
        found: list[tuple[str, jax.Array]] = []

        def note(index, noise_pred, step):
            named = {"noise_pred": noise_pred, "denoised": step.denoised, "prev_sample": step.prev_sample}
            found.extend((f"step/{index}/{name}", to_torch(value)) for name, value in named.items())

        latent = lcm_sample(
            LCMSchedule.from_dict(settings),
            lambda sample, timestep: run(params, sample, jax.numpy.full(len(sample), timestep), *given)[0],
            from_torch(subcase.input("initial_noise")),
            [from_torch(noise) for noise in subcase.input_list("step_noise")],
            subcase.parameter("timesteps", list),
            note,
        )
        yield from found
        yield "latent", to_torch(latent)

    def outputs(subcase: Subcase) -> Outputs:
        if "initial_noise" in subcase.inputs:
            return walk(subcase)
        return attention(subcase) if "module" in subcase.about else passes(subcase)

    return outputs
