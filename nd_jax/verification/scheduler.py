"""Scheduler cases: tables of every configuration, step grids, one Euler step."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from nd_jax.pyramid.schedule import Schedule, euler_step
from nd_jax.verification.cases import Case, Outputs, Subcase

GRID = re.compile(r"stage(\d+)/steps(\d+)/(timesteps|sigmas)(_through_bf16)?")


def first_and_last(table: np.ndarray) -> np.ndarray:
    return np.stack([table[:, 0], table[:, -1]], axis=1)


def tables(schedule: Schedule) -> dict[str, Any]:
    """Every table that cases record, by the name they use."""
    names = (
        *("start_sigmas", "end_sigmas", "orig_start_sigmas", "timestep_ratios", "timestep_per_stage_range"),
        *("timesteps", "sigmas", "timesteps_per_stage", "sigmas_per_stage"),
    )
    return {name: getattr(schedule, name) for name in names} | {
        "timesteps_first_last": first_and_last(schedule.timesteps_per_stage),
        "sigmas_first_last": first_and_last(schedule.sigmas_per_stage),
    }


def step(subcase: Subcase) -> Any:
    """One Euler step, in bf16 where the subcase says so (its inputs are stored widened)."""
    dtype = jnp.bfloat16 if "bf16" in subcase.name or "bf16" in str(subcase.about.get("note")) else jnp.float32
    sample, velocity = (jnp.asarray(subcase.input(name), dtype) for name in ("sample", "model_output"))
    return euler_step(sample, velocity, subcase.input("sigma"), subcase.input("sigma_next")).astype(jnp.float32)


def recompute(case: Case) -> Callable[[Subcase], Outputs]:
    """The function returned recomputes one subcase: a configuration's tables, or a step."""

    def outputs(subcase: Subcase) -> Outputs:
        if "model_output" in subcase.inputs:
            yield "prev_sample", step(subcase)
            return
        schedule = Schedule.from_dict(case.config[subcase.name])
        yield from tables(schedule).items()
        for output in subcase.outputs:
            if match := GRID.fullmatch(output):
                stage, count, name, through_bf16 = match.groups()
                values = dict(zip(("timesteps", "sigmas"), schedule.steps(int(stage), int(count)), strict=True))[name]
                yield output, values.astype(ml_dtypes.bfloat16) if through_bf16 else values

    return outputs
