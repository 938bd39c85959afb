"""Latent-consistency scheduler cases: tables, timesteps, walks over recorded predictions, noising."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from nd_jax.pyramid.lcm import LCMSchedule
from nd_jax.verification.cases import Case, Outputs, Subcase
from nd_jax.verification.layouts import from_torch, to_torch

CHOSEN = re.compile(r"from_(\d+)_of_(\d+)")


def recompute(case: Case) -> Callable[[Subcase], Outputs]:
    """The function returned recomputes one subcase; there are no weights."""
    schedule = LCMSchedule.from_dict(case.config)

    def tables() -> Outputs:
        timesteps = schedule.timesteps(schedule.original_inference_steps)
        scalings = np.asarray([schedule.boundary_scalings(timestep) for timestep in timesteps])
        yield "betas", schedule.betas
        yield "alphas_cumprod", schedule.alphas_cumprod
        yield "final_alpha_cumprod", schedule.alphas_cumprod[0]
        yield "init_noise_sigma", np.asarray(1.0)
        yield "timesteps", timesteps
        yield "c_skip", scalings[:, 0]
        yield "c_out", scalings[:, 1]
        yield "alphas_cumprod_at_timesteps", schedule.alphas_cumprod[timesteps]

    def chosen(subcase: Subcase) -> Outputs:
        for name in subcase.outputs:
            if match := CHOSEN.fullmatch(name):
                yield name, schedule.timesteps(int(match[1]), int(match[2]))

    def walk(subcase: Subcase) -> Outputs:
        timesteps = subcase.parameter("timesteps", list)
        noises = [*map(from_torch, subcase.input_list("step_noise")), None]
        sample = from_torch(subcase.input("initial_sample"))
        for index, prediction in enumerate(map(from_torch, subcase.input_list("model_output"))):
            following = timesteps[index + 1] if index + 1 < len(timesteps) else None
            step = schedule.step(prediction, sample, timesteps[index], following, noises[index])
            for name, value in {"sample": sample, **step._asdict()}.items():
                yield f"step/{index}/{name}", to_torch(value)
            sample = step.prev_sample

    def outputs(subcase: Subcase) -> Outputs:
        if "initial_sample" in subcase.inputs:
            return walk(subcase)
        if "original" in subcase.inputs:
            original, noise = (from_torch(subcase.input(name)) for name in ("original", "noise"))
            noisy = schedule.add_noise(original, noise, subcase.input("timestep"))
            return iter([("noisy", to_torch(noisy))])
        return chosen(subcase) if any(map(CHOSEN.fullmatch, subcase.outputs)) else tables()

    return outputs
