"""Training cases: noise construction, targets, timesteps and loss of pyramidal flow matching; the length table."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from nd_jax.pyramid.columns import column, column_stages, interleave
from nd_jax.pyramid.examples import FlowExample, exact_example
from nd_jax.pyramid.lengths import balanced_lengths
from nd_jax.pyramid.normalise import PYRAMID_FLOW
from nd_jax.pyramid.resample import noise_at_level
from nd_jax.pyramid.schedule import Schedule
from nd_jax.pyramid.targets import flow_loss, noisy_clip, table_entry
from nd_jax.verification.cases import Case, Outputs, Subcase
from nd_jax.verification.layouts import from_torch, to_torch
from nd_jax.verification.mmdit import Denoiser, predictions
from nd_jax.verification.weights import read_config


def lengths(subcase: Subcase) -> Outputs:
    """``[rank][call - 1]`` -> units per stage, for settings written as ``name=value,...``."""
    for output, recorded in subcase.outputs.items():
        settings = dict(re.findall(r"(\w+)=(\w+)", output))
        ranks, calls, stages = recorded.shape
        rows = [
            [
                balanced_lengths(
                    rank,
                    call,
                    max_length=int(settings["max_temporal_length"]),
                    sync_group=int(settings["video_sync_group"]),
                    max_units=None if settings["max_units"] == "None" else int(settings["max_units"]),
                    stages=stages,
                )
                for call in range(1, calls + 1)
            ]
            for rank in range(ranks)
        ]
        yield output, np.asarray(rows)


class Training:
    """The case's schedule and denoiser."""

    def __init__(self, case: Case):
        config = case.config
        self.schedule = Schedule.from_dict(config | {"stages": len(config["stages"])})
        self.ratio = config["corrupt_ratio"]
        owner = case.sibling(case.meta["weights_of_case"]) if "weights_of_case" in case.meta else case
        self.denoiser = Denoiser(owner, read_config(owner, "mmdit", config["dit"]))

    def example(self, subcase: Subcase, index: int, stage: int, columns: int) -> FlowExample:
        """One column: with ``units_per_stage`` a unit and its history, otherwise the whole clip at once."""
        pyramid = [column(from_torch(level), index, columns) for level in subcase.input_list("latents_pyramid")]
        noise = column(from_torch(subcase.input("noise")), index, columns)
        uniform = subcase.input(f"col{index}/u")
        units = subcase.about.get("units_per_stage")
        if units is None:
            eps = noise_at_level(noise, stage, self.schedule.stages)
            clip = noisy_clip(self.schedule, stage, pyramid[stage], pyramid[stage - 1] if stage else None, eps, uniform)
            valid = np.ones((1, eps.shape[1]))
            return FlowExample((clip.noisy,), clip.target, clip.timestep, clip.local, valid, pyramid[stage])
        newest_first = [from_torch(noise) for noise in subcase.input_list(f"col{index}/cond_noise")]
        return exact_example(
            self.schedule,
            pyramid,
            stage,
            units[stage],
            uniform=uniform,
            noise=noise,
            corrupt_uniform=subcase.input(f"col{index}/corrupt_u"),
            history_noise=newest_first[::-1],
            corrupt_ratio=self.ratio,
            frames_per_unit=subcase.about.get("frame_per_unit", 1),
        )

    def __call__(self, subcase: Subcase) -> Outputs:
        stages = column_stages(subcase.about.get("sample_ratios", [1] * self.schedule.stages))
        examples = [self.example(subcase, index, stage, len(stages)) for index, stage in enumerate(stages)]
        for index, example in enumerate(examples):
            for clip, noisy in enumerate(example.clips):
                yield f"noisy/{index}/{clip}", to_torch(noisy)
            yield f"ratios/{index}", example.local.reshape(-1, 1, 1, 1, 1)
            yield f"timesteps/{index}", example.timestep
            yield f"targets/{index}", to_torch(example.target)
            yield f"col{index}/index", table_entry(subcase.input(f"col{index}/u"), self.schedule)
        timesteps = interleave([example.timestep for example in examples])
        yield "timesteps_flat", timesteps
        values = self.denoiser(subcase, [list(example.clips) for example in examples], timesteps)
        yield from predictions(values)
        yield "loss", flow_loss(values, [example.target for example in examples])


def recompute(case: Case) -> Callable[[Subcase], Outputs]:
    """Load the denoiser once; the function returned recomputes one subcase."""
    training = Training(case)

    def outputs(subcase: Subcase) -> Outputs:
        if "latent" in subcase.inputs:
            yield "y", to_torch(PYRAMID_FLOW.normalise(from_torch(subcase.input("latent"))))
        elif subcase.inputs:
            yield from training(subcase)
        else:
            yield from lengths(subcase)

    return outputs
