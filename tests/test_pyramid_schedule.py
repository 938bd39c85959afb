"""Schedule tables, step grids, the Euler step, rounding through bf16, and what the schedule refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nd_jax.errors import UserError
from nd_jax.pyramid.schedule import Schedule, euler_step, rounded

CONFIGS = ("default", "stages2_gamma_half", "stages3_gamma_fifth", "stages1", "custom_range")


@pytest.mark.parametrize("name", CONFIGS)
def test_tables_match_the_reference(golden, name):
    case = golden("scheduler")
    _, expected = case.subcase(name)
    schedule = Schedule.from_dict(case.config[name])
    for key in ("start_sigmas", "end_sigmas", "orig_start_sigmas", "timestep_ratios", "sigmas", "sigmas_per_stage"):
        if key in expected:
            np.testing.assert_allclose(getattr(schedule, key), expected[key], rtol=0, atol=1e-6, err_msg=key)
    for key in ("timesteps", "timesteps_per_stage", "timestep_per_stage_range"):
        if key in expected:
            np.testing.assert_allclose(getattr(schedule, key), expected[key], rtol=0, atol=1e-3, err_msg=key)
    table = schedule.timesteps_per_stage
    np.testing.assert_allclose(table[:, [0, -1]], expected["timesteps_first_last"], rtol=0, atol=1e-3)
    np.testing.assert_allclose(schedule.sigmas_per_stage[:, [0, -1]], expected["sigmas_first_last"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", CONFIGS)
def test_official_steps_match_the_reference(golden, name):
    case = golden("scheduler")
    _, expected = case.subcase(name)
    schedule = Schedule.from_dict(case.config[name])
    for stage in range(schedule.stages):
        for n in case.meta["subcases"][name]["steps"]:
            timesteps, sigmas = schedule.steps(stage, n)
            prefix = f"stage{stage}/steps{n}"
            np.testing.assert_allclose(timesteps, expected[f"{prefix}/timesteps"], rtol=0, atol=1e-3)
            np.testing.assert_allclose(sigmas, expected[f"{prefix}/sigmas"], rtol=0, atol=1e-6)


def test_steps_through_bf16_are_exact(golden):
    _, expected = golden("scheduler").subcase("default")
    schedule = Schedule()
    keys = [key for key in expected if key.endswith("_through_bf16")]
    assert len(keys) == 30
    for key in keys:
        stage, steps, name = key.split("/")
        timesteps, sigmas = schedule.steps(int(stage[5:]), int(steps[5:]))
        values = timesteps if name.startswith("timesteps") else sigmas
        np.testing.assert_array_equal(jax.jit(lambda x: rounded(x, jnp.bfloat16))(values), expected[key], err_msg=key)
        np.testing.assert_array_equal(values.astype(jnp.bfloat16).astype(np.float32), expected[key], err_msg=key)


@pytest.mark.parametrize("compiled", [False, True])
def test_euler_step(golden, compiled):
    inputs, expected = golden("scheduler").subcase("step")
    step = jax.jit(euler_step) if compiled else euler_step
    out = step(inputs["sample"], inputs["model_output"], inputs["sigma"], inputs["sigma_next"])
    np.testing.assert_allclose(out, expected["prev_sample"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("compiled", [False, True])
def test_euler_step_in_bf16_is_exact(golden, compiled):
    inputs, expected = golden("scheduler").subcase("step_bf16")
    inputs = {name: jnp.asarray(value, jnp.bfloat16) for name, value in inputs.items()}
    step = jax.jit(euler_step) if compiled else euler_step
    out = step(inputs["sample"], inputs["model_output"], inputs["sigma"], inputs["sigma_next"])
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out.astype(jnp.float32), expected["prev_sample"])


def test_plain_steps_are_even_and_end_clean():
    schedule = Schedule()
    timesteps, sigmas = schedule.steps(1, 4, grid="plain")
    np.testing.assert_allclose(sigmas, [1, 0.75, 0.5, 0.25, 0], atol=1e-12)
    np.testing.assert_allclose(timesteps, [744, 654.5, 565, 475.5], atol=1e-9)


def test_timestep_is_linear_through_the_table():
    schedule = Schedule(stages=4, gamma=0.2)
    for stage in range(4):
        at = schedule.timestep(stage, schedule.sigmas_per_stage[stage])
        np.testing.assert_allclose(at, schedule.timesteps_per_stage[stage], atol=1e-3)


def test_stage_constants_and_global_noise():
    schedule = Schedule()
    np.testing.assert_allclose(schedule.start_sigmas, [1, 0.8, 0.5], atol=1e-3)
    np.testing.assert_allclose(schedule.end_sigmas, [2 / 3, 1 / 3, 0], atol=1e-3)
    assert schedule.global_sigma(1, 1.0) == schedule.start_sigmas[1]
    assert schedule.global_sigma(1, 0.0) == schedule.end_sigmas[1]
    assert hash(schedule) == hash(Schedule(stage_range=[0, 1 / 3, 2 / 3, 1]))


@pytest.mark.parametrize(
    "arguments",
    [
        {"stages": 0},
        {"gamma": 0},
        {"gamma": float("nan")},
        {"stage_range": (0, 0.5, 1)},
        {"stage_range": (0, 0.5, 0.2, 1)},
        {"stage_range": (0, 0.5, 0.5001, 1)},
        {"stage_range": (0.1, 0.5, 0.7, 1)},
    ],
)
def test_impossible_schedules_are_refused(arguments):
    with pytest.raises(UserError, match="schedule: "):
        Schedule(**arguments)


@pytest.mark.parametrize("arguments", [(3, 1), (-1, 1), (0, 0), (0, 2, "fancy")])
def test_impossible_steps_are_refused(arguments):
    with pytest.raises(UserError, match="schedule: "):
        Schedule().steps(*arguments)
