"""The sampling loop against the recorded calls of the official one: a denoiser that plays back what was recorded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nd_jax.errors import UserError
from nd_jax.pyramid.history import unit_history
from nd_jax.pyramid.layout import envelopes, history_plan, unit_frames
from nd_jax.pyramid.resample import latent_pyramid
from nd_jax.pyramid.sampler import Call, CountingJit, SamplePlan, guide, sample, twice
from nd_jax.pyramid.schedule import Schedule

CASES = ["steps111", "steps222_cfg", "steps_mixed_cfg", "hybrid111", "hybrid_cfg", "image_only"]


def last(x):
    return np.moveaxis(x, 1, -1)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("spare", [0, 2])
def test_loop_matches_the_reference(golden, name, spare):
    """Order of calls, timesteps, sigmas, samples, history, guidance and jumps; also with room for more units."""
    case = golden("generation")
    facts, (inputs, expected) = case.meta["subcases"][name], case.subcase(name)
    latents = last(expected["latents"])
    stages = envelopes(facts["num_latent_units"] - 1 + spare, 10, *latents.shape[2:4])
    units = [latents[:, u : u + 1] for u in range(latents.shape[1])]
    calls: list[Call] = []

    def velocity(stage):
        def denoise(z, timestep, history, unit_index, guidance):
            n, unit = len(calls), int(unit_index)
            later = unit > 0
            assert guidance == np.float32(facts["video_guidance_scale" if later else "guidance_scale"])
            shapes = [[1, *shape[1:]] for shape in facts["dit_sample_shapes"][n]]
            assert list(np.moveaxis(z, -1, 1).shape) == shapes[-1]
            frames = [clip[:, t] for clip in history for t in range(clip.shape[1])]
            exact = [clip[:, t] for clip in unit_history(units[:unit], 3)[stage] for t in range(clip.shape[1])]
            assert sum(shape[2] for shape in shapes[:-1]) == len(exact)
            assert len(history_plan(stage, unit)) == len(shapes) - 1
            for empty in frames[: len(frames) - len(exact)]:
                np.testing.assert_array_equal(empty, 0)
            for mine, theirs in zip(frames[len(frames) - len(exact) :], exact, strict=True):
                np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-5)
            return jnp.asarray(last(expected[f"trace/{n:03d}/velocity_after_guidance"]))

        return denoise

    plan = SamplePlan(
        facts["num_inference_steps"],
        facts["video_num_inference_steps"],
        facts["guidance_scale"],
        facts["video_guidance_scale"],
    )
    block_noise = [last(inputs[key]) for key in sorted(inputs) if key.startswith("block_noise/")]
    out = sample(
        velocity,
        stages,
        Schedule(),
        plan,
        last(inputs["initial_noise"]),
        block_noise,
        first_latent=units[0] if facts["has_image"] else None,
        trace=calls.append,
    )
    np.testing.assert_allclose(out, latents, rtol=0, atol=1e-5)
    assert len(calls) == facts["n_dit_calls"]
    for n, call in enumerate(calls):
        recorded = {key.split("/")[-1]: expected[key] for key in expected if key.startswith(f"trace/{n:03d}/")}
        np.testing.assert_allclose(call.timestep, recorded["timestep"][:1], rtol=0, atol=1e-3)
        np.testing.assert_allclose(call.sigma, recorded["sigma"], rtol=0, atol=1e-6)
        np.testing.assert_allclose(call.sigma_next, recorded["sigma_next"], rtol=0, atol=1e-6)
        np.testing.assert_allclose(call.sample_before, last(recorded["sample_before"]), rtol=0, atol=1e-5)


def test_guidance_puts_negative_rows_first():
    v = jnp.stack([jnp.full((1, 1, 1, 1), 1.0), jnp.full((1, 1, 1, 1), 3.0)])
    np.testing.assert_allclose(guide(v, 2.5), 1 + 2.5 * 2)
    np.testing.assert_array_equal(twice(jnp.arange(2)), [0, 1, 0, 1])


def exact_denoiser(stages, schedule, clean):
    """The velocity of a straight flow to known latents, so that sampling must arrive at them."""
    f = stages[0].frames_per_unit

    def build(stage):
        def denoise(z, timestep, history, unit_index, guidance):
            unit = clean[:, unit_frames(int(unit_index), f)]
            end = jnp.pad(unit, ((0, 0), (f - unit.shape[1], 0), (0, 0), (0, 0), (0, 0)))
            t_start, t_end = schedule.timestep_borders[stage]
            return (z - latent_pyramid(end, 3)[stage]) / ((timestep[0] - t_end) / (t_start - t_end))

        return denoise

    return [build(stage) for stage in range(3)].__getitem__


@pytest.mark.parametrize("frames_per_unit", [1, 2])
@pytest.mark.parametrize(("grid", "renew"), [("plain", False), ("official", False), ("plain", True)])
def test_an_exact_denoiser_arrives(frames_per_unit, grid, renew):
    rng = np.random.Generator(np.random.Philox(6))
    frames = 1 + 2 * frames_per_unit
    clean, noise = rng.standard_normal((2, 2, frames, 8, 8, 3), dtype=np.float32)
    stages, schedule = envelopes(3, 0, 8, 8, frames_per_unit=frames_per_unit), Schedule()
    draws = lambda unit, stage: rng.standard_normal(  # noqa: E731
        (2, 1 if unit == 0 else frames_per_unit, *stages[0].size(stage), 3), dtype=np.float32
    )
    plan, asked = SamplePlan((2, 1, 3), (1, 2, 2), grid=grid, renew=renew), []

    def fresh(*place: int) -> np.ndarray:
        asked.append(place)
        return draws(*place[:2])

    out = sample(exact_denoiser(stages, schedule, clean), stages, schedule, plan, noise, draws, fresh_noise=fresh)
    counts = [(unit, stage, n) for unit in range(3) for stage, n in enumerate((1, 2, 2) if unit else (2, 1, 3))]
    places = [(unit, stage, step) for unit, stage, n in counts for step in range(n - (stage == 2))]
    assert asked == (places if renew else []), "the last step of all needs none"
    np.testing.assert_allclose(out, clean, rtol=0, atol=1e-4)


def test_a_plan_that_renews_needs_noise():
    plan, stages = SamplePlan((1, 1, 1), (1, 1, 1), renew=True), envelopes(1, 0, 8, 8)
    with pytest.raises(UserError, match="no fresh_noise"):
        sample(lambda _: None, stages, Schedule(), plan, np.ones((1, 1, 8, 8, 1), np.float32), [])


def test_three_programs_for_any_number_of_frames():
    stages, schedule = envelopes(4, 0, 8, 8), Schedule()
    programs = [
        CountingJit(lambda z, t, h, u, g: g * z + u + sum(jnp.mean(clip) for clip in h) + t[0]) for _ in range(3)
    ]
    block = lambda unit, stage: np.zeros((1, 1, *stages[0].size(stage), 2), np.float32)  # noqa: E731
    for frames in (1, 3, 5):
        plan = SamplePlan((1, 2, 1), (2, 1, 1), 3.0, float(frames))
        sample(programs.__getitem__, stages, schedule, plan, np.ones((1, frames, 8, 8, 2), np.float32), block)
    assert [program.compilations for program in programs] == [1, 1, 1]


def test_slice_0_of_the_noise_is_not_used_with_a_first_frame():
    noise = np.ones((1, 2, 8, 8, 1), np.float32)
    noise[:, 0] = np.nan
    stages = envelopes(1, 0, 8, 8)
    first = np.full((1, 1, 8, 8, 1), 5.0, np.float32)
    seen = []

    def denoise(z, timestep, history, unit_index, guidance):
        seen.append((int(unit_index), float(guidance), [float(clip.mean()) for clip in history]))
        return z

    block = lambda unit, stage: np.zeros((1, 1, *stages[0].size(stage), 1), np.float32)  # noqa: E731
    plan = SamplePlan((5, 5, 5), (1, 1, 1), 7.0, 2.0)
    out = sample(lambda _: denoise, stages, Schedule(), plan, noise, block, first_latent=first)
    np.testing.assert_array_equal(out[:, :1], first)
    assert np.isfinite(out).all()
    assert seen == [(1, 2.0, [5.0])] * 3


def test_bf16_latents_round_what_the_network_is_told():
    calls = []
    stages = envelopes(0, 0, 8, 8)
    block = lambda unit, stage: np.zeros((1, 1, *stages[0].size(stage), 1), np.float32)  # noqa: E731
    plan = SamplePlan((1, 4, 1), (1, 1, 1))
    noise = jnp.ones((1, 1, 8, 8, 1), jnp.bfloat16)
    out = sample(lambda _: lambda z, *_: z, stages, Schedule(), plan, noise, block, trace=calls.append)
    assert out.dtype == jnp.bfloat16
    assert [float(call.timestep[0]) for call in calls if call.stage == 1] == [744, 624, 506, 386]
    assert calls[0].timestep.dtype == jnp.float32


def test_bad_input_is_refused():
    stages, schedule, plan = envelopes(2, 0, 8, 8), Schedule(), SamplePlan((1, 1, 1), (1, 1, 1))
    denoise = lambda _: lambda z, *_: z  # noqa: E731
    noise = np.zeros((1, 2, 8, 8, 1), np.float32)
    run = lambda **kw: sample(  # noqa: E731
        **{
            "velocity": denoise,
            "envelopes": stages,
            "schedule": schedule,
            "plan": plan,
            "initial_noise": noise,
            "block_noise": [],
            **kw,
        }
    )
    with pytest.raises(UserError, match="unit 0, stage 1: missing"):
        run()
    with pytest.raises(UserError, match="4 latent frames, expected 1"):
        run(initial_noise=np.zeros((1, 4, 8, 8, 1), np.float32))
    with pytest.raises(UserError, match=r"expected \[B, T, 8, 8, C"):
        run(initial_noise=np.zeros((1, 2, 8, 16, 1), np.float32))
    with pytest.raises(UserError, match="one envelope for each of the 3 stages"):
        run(envelopes=stages[:2])
    with pytest.raises(UserError, match="expected 3 numbers"):
        run(plan=SamplePlan((1, 1), (1, 1, 1)))
    with pytest.raises(UserError, match="first-frame latent"):
        run(first_latent=np.zeros((1, 2, 8, 8, 1), np.float32))
    with pytest.raises(UserError, match="first_steps"):
        SamplePlan((1, 0, 1), (1, 1, 1))
    with pytest.raises(UserError, match="unknown step grid 'odd'"):
        SamplePlan((1, 1, 1), (1, 1, 1), grid="odd")


def test_loop_is_traceable_in_its_pieces():
    """Euler, jump and history run compiled; the loop leaves nothing but device arrays in between."""
    stages = envelopes(1, 0, 8, 8)
    kinds = []
    block = lambda unit, stage: np.zeros((1, 1, *stages[0].size(stage), 1), np.float32)  # noqa: E731

    def denoise(z, timestep, history, unit_index, guidance):
        kinds.append(all(isinstance(x, jax.Array) for x in (z, timestep, *history)))
        return z

    plan = SamplePlan((1, 1, 1), (1, 1, 1))
    sample(lambda _: denoise, stages, Schedule(), plan, np.zeros((1, 2, 8, 8, 1), np.float32), block)
    assert kinds == [True] * 6
