"""Training examples: the golden exact construction, and the padded envelope equal to it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nd_jax.pyramid.columns import column, column_stages, interleave
from nd_jax.pyramid.examples import exact_example, flow_example, history_noise_shapes
from nd_jax.pyramid.layout import Envelope, history_plan, unit_frames
from nd_jax.pyramid.normalise import PYRAMID_FLOW
from nd_jax.pyramid.resample import noise_at_level
from nd_jax.pyramid.schedule import Schedule
from nd_jax.pyramid.targets import flow_loss, noisy_clip, per_sample_loss, table_entry

TOLERANCE = 1e-6
TEMPORAL = ["temporal_111", "temporal_345", "temporal_524", "temporal_ratio121", "temporal_fpu2"]
SCHEDULE = Schedule()


def last(x):
    return np.moveaxis(x, 1, -1)


class Column:
    """The golden inputs and outputs of one column, channels last."""

    def __init__(self, case, name, index):
        facts = case.meta["subcases"][name]
        inputs, self.expected = case.subcase(name)
        owner, _ = case.subcase(facts["latents_of"])
        stages = column_stages(facts["sample_ratios"])
        self.index, self.stage = index, stages[index]
        pick = lambda x: last(column(x, index, len(stages)))  # noqa: E731
        self.pyramid = [pick(owner[f"latents_pyramid/{level}"]) for level in range(3)]
        self.noise = pick(inputs["noise"])
        self.uniform, self.corrupt_uniform = inputs[f"col{index}/u"], inputs[f"col{index}/corrupt_u"]
        newest_first = [last(inputs[key]) for key in sorted(inputs) if key.startswith(f"col{index}/cond_noise/")]
        self.history_noise = newest_first[::-1]
        if "units_per_stage" in facts:
            self.units, self.frames = facts["units_per_stage"][self.stage], facts["frame_per_unit"]

    def check(self, noisy, target, timestep):
        np.testing.assert_allclose(noisy, last(self.noisy(-1)), rtol=0, atol=TOLERANCE)
        np.testing.assert_allclose(target, last(self.expected[f"targets/{self.index}"]), rtol=0, atol=TOLERANCE)
        np.testing.assert_allclose(timestep, self.expected[f"timesteps/{self.index}"], rtol=0, atol=1e-4)

    def noisy(self, clip):
        keys = sorted(key for key in self.expected if key.startswith(f"noisy/{self.index}/"))
        return self.expected[keys[clip]]


def columns(case, name):
    return [Column(case, name, i) for i in range(len(column_stages(case.meta["subcases"][name]["sample_ratios"])))]


@pytest.fixture(scope="module")
def case(golden):
    return golden("training")


@pytest.mark.parametrize("name", ["image", "full_sequence"])
def test_noise_without_history(case, name):
    for col in columns(case, name):
        eps = noise_at_level(col.noise, col.stage, 3)
        lower = col.pyramid[col.stage - 1] if col.stage else None
        out = noisy_clip(SCHEDULE, col.stage, col.pyramid[col.stage], lower, eps, col.uniform)
        col.check(out.noisy, out.target, out.timestep)
        np.testing.assert_allclose(out.local, col.expected[f"ratios/{col.index}"].ravel(), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", TEMPORAL)
def test_temporal_pyramid(case, name):
    timesteps = []
    for col in columns(case, name):
        out = exact_example(
            SCHEDULE,
            col.pyramid,
            col.stage,
            col.units,
            uniform=col.uniform,
            noise=col.noise,
            corrupt_uniform=col.corrupt_uniform,
            history_noise=col.history_noise,
            corrupt_ratio=case.config["corrupt_ratio"],
            frames_per_unit=col.frames,
        )
        col.check(out.clips[-1], out.target, out.timestep)
        for i, clip in enumerate(out.clips):
            np.testing.assert_allclose(clip, last(col.noisy(i)), rtol=0, atol=TOLERANCE)
        entries = table_entry(col.uniform, SCHEDULE)
        np.testing.assert_array_equal(entries, col.expected[f"col{col.index}/index"])
        timesteps.append(out.timestep)
    np.testing.assert_allclose(interleave(timesteps), col.expected["timesteps_flat"], rtol=0, atol=1e-4)


def pack_history_noise(envelope, unit, exact_noise):
    """Noise for the envelope's slots from noise for the exact clips (oldest first), both in order of time."""
    batch, channels = exact_noise[0].shape[0] if exact_noise else 1, exact_noise[0].shape[-1] if exact_noise else 4
    packed = [np.full(shape, 7.0, np.float32) for shape in history_noise_shapes(envelope, batch, channels)]
    times = [t + (unit - 1) * envelope.frames_per_unit + 1 for t in envelope.frame_times()[:-1]]
    flat = [noise[:, i] for noise in exact_noise for i in range(noise.shape[1])]
    for frame, value in enumerate(flat):
        for slot, slot_times in zip(packed, times, strict=True):
            slot[:, slot_times == frame] = value[:, None] if (slot_times == frame).any() else 0
    return packed


@pytest.mark.parametrize("name", TEMPORAL)
def test_padded_envelope_equals_the_golden_construction(case, name):
    for col in columns(case, name):
        f, unit = col.frames, col.units - 1
        envelope = Envelope(col.stage, 6, 10, 16, 24, frames_per_unit=f)
        clean = col.pyramid[-1]
        noise = np.zeros((clean.shape[0], f, *clean.shape[2:]), np.float32)
        now = col.noise[:, unit_frames(unit, f)]
        noise[:, f - now.shape[1] :] = now
        out = jax.jit(flow_example, static_argnums=(0, 1))(
            envelope,
            SCHEDULE,
            clean,
            jnp.full(clean.shape[0], unit),
            uniform=col.uniform,
            noise=noise,
            corrupt_uniform=col.corrupt_uniform,
            history_noise=pack_history_noise(envelope, unit, col.history_noise),
        )
        real = np.asarray(out.valid[0]) > 0
        assert real.sum() == now.shape[1]
        col.check(out.clips[-1][:, real], out.target[:, real], out.timestep)
        exact = [last(col.noisy(i)) for i in range(len(history_plan(col.stage, unit)))]
        frames = [clip[:, i] for clip in exact for i in range(clip.shape[1])]
        padded = [clip[:, i] for clip in out.clips[:-1] for i in range(clip.shape[1])]
        for padded_frame, frame in zip(padded[len(padded) - len(frames) :], frames, strict=True):
            np.testing.assert_allclose(padded_frame, frame, rtol=0, atol=TOLERANCE)


def test_units_may_differ_within_a_batch():
    rng = np.random.Generator(np.random.Philox(3))
    envelope = Envelope(2, 4, 0, 8, 16)
    draw = lambda *shape: rng.standard_normal(shape, dtype=np.float32)  # noqa: E731
    latents, noise = draw(5, 5, 8, 16, 2), draw(5, 1, 8, 16, 2)
    uniform = np.linspace(0, 0.99, 5, dtype=np.float32)
    history_noise = [draw(*shape) for shape in history_noise_shapes(envelope, 5, 2)]
    build = jax.jit(
        lambda z, u, n, e, h: flow_example(
            envelope, SCHEDULE, z, u, uniform=e, noise=n, corrupt_uniform=e, history_noise=h
        )
    )
    units = np.array([0, 1, 2, 3, 4])
    together = build(latents, units, noise, uniform, history_noise)
    for i in range(5):
        row = slice(i, i + 1)
        alone = build(latents[row], units[row], noise[row], uniform[row], [n[row] for n in history_noise])
        for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(a[row], b, atol=1e-6)


def test_target_is_what_undoes_the_noise():
    rng = np.random.Generator(np.random.Philox(4))
    z = rng.standard_normal((3, 1, 4, 4, 2), dtype=np.float32)
    lower = rng.standard_normal((3, 1, 2, 2, 2), dtype=np.float32)
    eps = rng.standard_normal(z.shape, dtype=np.float32)
    out = noisy_clip(SCHEDULE, 2, z, lower, eps, np.array([0.0, 0.3, 0.9], np.float32))
    local = out.local.reshape(-1, 1, 1, 1, 1)
    np.testing.assert_allclose(out.noisy - local * out.target, z, atol=1e-6)


def test_losses():
    a, b = np.zeros((2, 2, 1, 1, 2), np.float32), np.ones((2, 2, 1, 1, 2), np.float32)
    b[1, 0] = 3
    np.testing.assert_allclose(per_sample_loss(a, b), [1, 5])
    np.testing.assert_allclose(per_sample_loss(a, b, np.array([[0.0, 1.0]])), [1, 1])
    np.testing.assert_allclose(flow_loss([a, a[:1]], [b, b[:1]]), (1 + 5 + 1) / 3, rtol=1e-6)


def test_latent_normalisation(case):
    inputs, expected = case.subcase("latent_normalisation")
    out = PYRAMID_FLOW.normalise(last(inputs["latent"]))
    np.testing.assert_allclose(out, last(expected["y"]), rtol=0, atol=TOLERANCE)
