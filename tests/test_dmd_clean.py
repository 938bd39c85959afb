"""The clean prediction of pyramidal DMD: what the true velocity leads back to, and how it is put back on the flow."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from nd_jax.pyramid.clean import clean_prediction, oversharpening, renoised
from nd_jax.pyramid.resample import double, halve, latent_pyramid, noise_at_level
from nd_jax.pyramid.schedule import Schedule
from nd_jax.pyramid.targets import blend, stage_pair

SCHEDULE = Schedule()
SCHEDULES = {
    "three equal": SCHEDULE,
    "four": Schedule(stages=4),
    "two uneven": Schedule(stages=2, stage_range=(0, 0.7, 1)),
    "one": Schedule(stages=1),
}
LOCAL = np.array([1.0, 0.75, 0.31, 0.001], np.float32)


def flow(schedule: Schedule, stage: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Clean latents of a stage, noisy ones at ``LOCAL`` and the true velocity."""
    rng = np.random.Generator(np.random.Philox(stage))
    latents, noise = rng.standard_normal((2, len(LOCAL), 1, 16, 32, 3), np.float32)
    levels = latent_pyramid(jnp.asarray(latents), schedule.stages)
    eps = noise_at_level(jnp.asarray(noise), stage, schedule.stages)
    start, end = stage_pair(schedule, stage, levels[stage], levels[stage - 1] if stage else None, eps)
    return levels[stage], blend(start, end, jnp.asarray(LOCAL)), start - end


@pytest.mark.parametrize(
    ("name", "stage"), [(name, stage) for name, each in SCHEDULES.items() for stage in range(each.stages)]
)
def test_the_true_velocity_returns_the_clean_latent(name, stage):
    schedule = SCHEDULES[name]
    clean, noisy, velocity = flow(schedule, stage)
    found = clean_prediction(schedule, stage, noisy, velocity, LOCAL)
    np.testing.assert_allclose(found, clean, rtol=0, atol=2e-5)
    raw = clean_prediction(schedule, stage, noisy, velocity, LOCAL, exact=False)
    c = oversharpening(schedule, stage)
    np.testing.assert_allclose(raw, (1 + c) * clean - c * double(halve(clean)), rtol=0, atol=2e-5)
    inner = 0 < stage < schedule.stages - 1
    assert (np.abs(raw - clean).max() > 0.1) == inner, "only inner stages are oversharpened"


def test_oversharpening_of_the_paper():
    """1/7 but for the tables, whose borders lie on whole timesteps."""
    np.testing.assert_allclose([oversharpening(SCHEDULE, stage) for stage in range(3)], [0, 1 / 7, 0], atol=3e-4)


@pytest.mark.parametrize("stage", range(3))
def test_renoising_is_the_flow_of_the_prediction(stage):
    """By the formulas of the paper, and hence of the clean latent itself where the prediction is right."""
    clean, _, _ = flow(SCHEDULE, stage)
    eps = np.random.Generator(np.random.Philox(9)).standard_normal(clean.shape, np.float32)
    start, end = SCHEDULE.start_sigmas[stage], SCHEDULE.end_sigmas[stage]
    y_start = (1 - start) * double(halve(clean)) + start * eps
    y_end = (1 - end) * clean + end * eps
    found = renoised(SCHEDULE, stage, clean, eps, LOCAL)
    local = LOCAL.reshape(-1, 1, 1, 1, 1)
    np.testing.assert_allclose(found.noisy, (1 - local) * y_end + local * y_start, atol=1e-6)
    np.testing.assert_allclose(found.target, y_start - y_end, atol=1e-6)
    first, last = SCHEDULE.timestep_borders[stage]
    np.testing.assert_allclose(found.timestep, last + LOCAL * (first - last), rtol=1e-6)
    again = clean_prediction(SCHEDULE, stage, found.noisy, found.target, LOCAL)
    np.testing.assert_allclose(again, clean, rtol=0, atol=2e-5)
