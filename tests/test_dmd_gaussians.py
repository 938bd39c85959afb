"""Distribution matching where the optimum is known: Gaussian blocks of 2x2 pixels, whose true velocity has a formula.

The student is a small network that answers with a velocity, as in the recipe; its clean predictions should come to be
distributed like the data at every stage. Mistakes that a loss curve does not show must not.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nd_jax.pyramid.clean import clean_prediction, renewed_step, renoised
from nd_jax.pyramid.resample import halve
from nd_jax.pyramid.schedule import Schedule, euler_step
from nd_jax.pyramid.targets import NoisyClip, per_row, per_sample_loss, stage_pair
from nd_jax.recipes.dmd_loss import error_weights, even_levels, matching_loss, mean_size

PYRAMID, PLAIN = Schedule(), Schedule(stages=1)
BLOCK, WIDTH, BATCH, STEPS, SAMPLES = (1, 2, 2, 1), 32, 128, 800, 2000
RIGHT, FLIPPED, SWAPPED, MISTIMED = range(4)


@dataclass(frozen=True)
class Blocks:
    """Blocks of 2x2 pixels around one of several equally likely means, with deviation ``spread`` per pixel, as clean
    latents of a stage of ``schedule``."""

    means: tuple[float, ...]
    spread: float
    stage: int
    schedule: Schedule = PYRAMID

    def draw(self, key: jax.Array, count: int) -> jax.Array:
        pick, normal = jax.random.split(key)
        centre = jax.random.choice(pick, jnp.array(self.means), (count,))
        noise = jax.random.normal(normal, (count, *BLOCK))
        return per_row(centre, noise) + self.spread * noise

    def velocity(self, noisy: jax.Array, timestep: jax.Array) -> jax.Array:
        """``E[y_start - y_end | z_s]``. In each mode, a block's mean and the rest are Gaussian by themselves."""
        first, last = self.schedule.timestep_borders[self.stage]
        local = per_row((timestep - last) / (first - last), noisy)
        start, end = (float(sigmas[self.stage]) for sigmas in (self.schedule.start_sigmas, self.schedule.end_sigmas))
        sigma = self.schedule.global_sigma(self.stage, local)
        block = noisy.mean((1, 2, 3, 4), keepdims=True)
        # shares of the clean mean and the clean rest in z_s, and in the velocity
        mean, rest = local * (1 - start) + (1 - local) * (1 - end), (1 - local) * (1 - end)
        mean_v, rest_v = (1 - start) - (1 - end), -(1 - end)
        variance = [share**2 * self.spread**2 + sigma**2 for share in (mean, rest)]
        gain = [
            (share_v * share * self.spread**2 + (start - end) * sigma) / v
            for share_v, share, v in zip((mean_v, rest_v), (mean, rest), variance, strict=True)
        ]
        centres = jnp.array(self.means)
        distance = block[..., None] - mean[..., None] * centres
        chance = jax.nn.softmax(-0.5 * distance**2 / (variance[0][..., None] / 4))
        inner = jnp.sum(chance * (mean_v * centres + gain[0][..., None] * distance), axis=-1)
        return inner + gain[1] * (noisy - block)

    def start(self, data: jax.Array, noise: jax.Array) -> jax.Array:
        """What a one-step student begins with."""
        return stage_pair(self.schedule, self.stage, data, halve(data), noise)[0]

    def renoised(self, clean: jax.Array, noise: jax.Array, local: jax.Array) -> NoisyClip:
        return renoised(self.schedule, self.stage, clean, noise, local)


PROBLEMS = {
    "one mode, lowest stage": Blocks((1.5,), 0.5, 0),
    "one mode, middle stage": Blocks((1.5,), 0.5, 1),
    "one mode, last stage": Blocks((1.5,), 0.5, 2),
    "two modes, middle stage": Blocks((-1.0, 1.0), 0.3, 1),
    "two modes, the only stage": Blocks((-1.0, 1.0), 0.3, 0, PLAIN),
}
"""Two modes at the lowest of three stages would ask for more patience: its flow is never less than two thirds noise."""


def network(key: jax.Array) -> dict:
    """A velocity of a block and its local noise; 0 at first."""
    one, two = jax.random.split(key)
    return {
        "in": jax.random.normal(one, (5, WIDTH)),
        "bias": jax.random.normal(two, (WIDTH,)),
        "middle": jax.random.normal(two, (WIDTH, WIDTH)) / np.sqrt(WIDTH),
        "out": jnp.zeros((WIDTH, 4)),
    }


def answer(params: dict, noisy: jax.Array, local: jax.Array) -> jax.Array:
    x = jnp.concatenate([noisy.reshape(-1, 4), local[:, None]], axis=1)
    x = jnp.tanh(jnp.tanh(x @ params["in"] + params["bias"]) @ params["middle"])
    return (x @ params["out"]).reshape(noisy.shape)


def generate(student: dict, blocks: Blocks, data: jax.Array, noise: jax.Array) -> jax.Array:
    """One step from the stage's start to the clean prediction."""
    start, ones = blocks.start(data, noise), jnp.ones(len(noise))
    return clean_prediction(blocks.schedule, blocks.stage, start, answer(student, start, ones), ones)


def train(blocks: Blocks, mistake: jax.Array, key: jax.Array) -> tuple[dict, dict]:
    """Two updates of the fake and one of the student, many times; the student before and after."""
    rates = [optax.cosine_decay_schedule(rate, STEPS * per) for rate, per in ((4e-3, 1), (8e-3, 2))]
    adam, fake_adam = (optax.adam(rate, b1=0.0 if n == 0 else 0.5, b2=0.99) for n, rate in enumerate(rates))

    def inputs(key):
        parts = jax.random.split(key, 4)
        noise, fresh = (jax.random.normal(part, (BATCH, *BLOCK)) for part in parts[:2])
        return blocks.draw(parts[2], BATCH), noise, fresh, jax.random.uniform(parts[3], (BATCH,))

    def fake_loss(fake, student, key):
        data, noise, fresh, uniform = inputs(key)
        clip = blocks.renoised(generate(student, blocks, data, noise), fresh, 1 - uniform)
        return per_sample_loss(answer(fake, clip.noisy, clip.local), clip.target).mean()

    def student_loss(student, fake, key):
        data, noise, fresh, uniform = inputs(key)
        clean = generate(student, blocks, data, noise)
        clip = blocks.renoised(jax.lax.stop_gradient(clean), fresh, even_levels(uniform, 4))
        other = blocks.schedule.timestep(blocks.stage, 1.25 - clip.local)  # the same four values, the other way round
        known = blocks.velocity(clip.noisy, jnp.where(mistake == MISTIMED, other, clip.timestep))
        found = answer(fake, clip.noisy, clip.local)
        teacher, fake = (jnp.where(mistake == SWAPPED, b, a) for a, b in ((known, found), (found, known)))
        weight = error_weights(mean_size(teacher - clip.target), "normalised")
        loss = matching_loss(clean, teacher, fake, weight).mean()
        return jnp.where(mistake == FLIPPED, -loss, loss)

    def step(carry, key):
        student, fake, moments, fake_moments = carry
        *fake_keys, student_key = jax.random.split(key, 3)
        for each in fake_keys:
            updates, fake_moments = fake_adam.update(jax.grad(fake_loss)(fake, student, each), fake_moments)
            fake = optax.apply_updates(fake, updates)
        updates, moments = adam.update(jax.grad(student_loss)(student, fake, student_key), moments)
        return (optax.apply_updates(student, updates), fake, moments, fake_moments), None

    born, key = jax.random.split(key)
    student, fake = network(born), network(key)
    carry = student, fake, adam.init(student), fake_adam.init(fake)
    return student, jax.lax.scan(step, carry, jax.random.split(key, STEPS))[0][0]


def wasserstein(one: np.ndarray, two: np.ndarray) -> float:
    """Largest 1-Wasserstein distance among a pixel, the block's mean and a difference of pixels."""
    views = [(x[:, 0, 0, 0, 0], x.mean((1, 2, 3, 4)), x[:, 0, 0, 0, 0] - x[:, 0, 1, 1, 0]) for x in (one, two)]
    return max(float(np.abs(np.sort(a) - np.sort(b)).mean()) for a, b in zip(*views, strict=True))


def test_the_velocity_is_that_of_the_data():
    """What is left of a sample's own velocity is uncorrelated with anything that can be read off its noisy latent."""
    for name, blocks in PROBLEMS.items():
        keys, count = jax.random.split(jax.random.key(3), 3), 40_000
        noise = jax.random.normal(keys[0], (count, *BLOCK))
        clip = blocks.renoised(blocks.draw(keys[1], count), noise, jax.random.uniform(keys[2], (count,)))
        left = np.asarray(clip.target - blocks.velocity(clip.noisy, clip.timestep))
        seen, local = np.asarray(clip.noisy), per_row(np.asarray(clip.local), left)
        mean = seen.mean((1, 2, 3, 4), keepdims=True)
        for feature in (1, local, mean, mean * local, np.tanh(2 * mean), mean**3, seen - mean, (seen - mean) * local):
            product = left * feature
            assert abs(product.mean()) < 5 * product.std() / np.sqrt(count), name


@cache
def students(name: str) -> tuple[dict, dict]:
    """Before training, and after it for every mistake."""
    trained = jax.jit(jax.vmap(lambda mistake: train(PROBLEMS[name], mistake, jax.random.key(0))))
    return trained(jnp.arange(4))


@pytest.mark.parametrize("name", PROBLEMS)
def test_only_the_right_rule_finds_the_data(name):
    """Distance of new samples from the data: small at the end, and not so after any of the mistakes."""
    blocks, (before, after) = PROBLEMS[name], students(name)
    keys = jax.random.split(jax.random.key(1), 3)
    data, inner = (np.asarray(blocks.draw(key, SAMPLES)) for key in keys[:2])
    noise = jax.random.normal(keys[2], (SAMPLES, *BLOCK))
    samples = jax.jit(jax.vmap(lambda student: generate(student, blocks, jnp.asarray(inner), noise)))
    begun = wasserstein(np.asarray(samples(before))[RIGHT], data)
    found = [wasserstein(each, data) for each in np.asarray(samples(after))]
    assert found[RIGHT] < 0.2 * begun, (begun, found)
    assert found[MISTIMED] > 3 * found[RIGHT], (begun, found)
    assert not min(found[FLIPPED], found[SWAPPED]) < 5 * begun, (begun, found)


@pytest.mark.parametrize("name", ["one mode, lowest stage", "one mode, middle stage"])
def test_what_goes_to_the_next_stage_needs_fresh_noise(name):
    """The clean predictions are right and made of the noise they began with: a stage's end must not keep that noise."""
    blocks, student = PROBLEMS[name], jax.tree.map(lambda x: x[RIGHT], students(name)[1])
    keys = jax.random.split(jax.random.key(2), 5)
    data, inner = (blocks.draw(key, SAMPLES) for key in keys[:2])
    begun, fresh, other = (jax.random.normal(key, (SAMPLES, *BLOCK)) for key in keys[2:])
    _, end = stage_pair(blocks.schedule, blocks.stage, data, halve(data), other)
    start = blocks.start(inner, begun)
    velocity = answer(student, start, jnp.ones(SAMPLES))
    renewed = renewed_step(start, velocity, fresh, 1.0, 0.0, blocks.schedule, blocks.stage)
    euler = euler_step(start, velocity, 1.0, 0.0)
    right, wrong = (wasserstein(np.asarray(x), np.asarray(end)) for x in (renewed, euler))
    assert right < 0.05, (right, wrong)
    assert wrong > 2 * right, (right, wrong)
