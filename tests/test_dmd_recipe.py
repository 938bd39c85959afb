"""The distribution-matching recipe: a whole step by hand, what it trains, how it spreads, resumes and lowers."""

from __future__ import annotations

import dataclasses
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_system
import training_toy as toy
from jax.sharding import Mesh
from test_recipes_flow import HEIGHT, SCHEDULE, STATS, UNITS, WIDTH, given, make_batch, one_row

from nd_jax.errors import UserError
from nd_jax.models.mmdit import definition
from nd_jax.models.system import DENOISER, TEXT_PARTS, Conditions, TextTokens
from nd_jax.recipes.dmd import NEGATIVE, DmdRecipe, DmdState
from nd_jax.recipes.dmd_config import DmdRecipeConfig
from nd_jax.recipes.preset import load_preset
from nd_jax.system import latent_stats
from nd_jax.training.hooks import sharding_hooks
from nd_jax.training.loop import Every, LoopConfig, train
from nd_jax.training.mesh import MeshConfig, make_mesh
from nd_jax.training.optim import OptimConfig
from nd_jax.training.paths import named_leaves
from nd_jax.training.program import Program
from nd_jax.training.sharding import Rules

# Adam whose steps are the gradient times 0.05, so that a step tells gradients.
LINEAR = OptimConfig(
    learning_rate=0.05e6, eps=1e6, b1=0.0, schedule="constant", warmup_steps=1, weight_decay=0.0, clip_norm=None
)
RECIPE = DmdRecipeConfig(
    batch=16,
    stage_mix=(0, 1, 0),
    cauchy_weight=0.5,
    renew=True,
    optim=LINEAR,
    fake_optim=LINEAR,
)


def empty_prompt(text: int = tiny_system.TEXT_LENGTH, clip: int = tiny_system.TEXT_LENGTH) -> TextTokens:
    ids = np.zeros((1, text), np.int32), np.eye(1, text, dtype=np.int32), *np.zeros((2, 1, clip), np.int32)
    return TextTokens(*ids)


def recipe(mesh: Mesh | None = None, negative: TextTokens | None = None, **changes) -> DmdRecipe:
    return DmdRecipe(
        tiny_system.CONFIG,
        dataclasses.replace(RECIPE, **changes),
        negative=negative or empty_prompt(),
        schedule=SCHEDULE,
        stats=STATS,
        sizes=[(UNITS, HEIGHT, WIDTH)],
        text_length=tiny_system.TEXT_LENGTH,
        clip_length=tiny_system.TEXT_LENGTH,
        hooks=None if mesh is None else sharding_hooks(mesh, Rules(minimum=0)),
    )


# ---- a whole step by hand

WEIGHTS = ("noisy", "time", "prompt")


def linear(params, clips, text, pooled, timesteps, layouts, remat="none"):
    """A denoiser of three numbers: ``v = a z + b t / 1000 + c mean(pooled)``."""
    a, b, c = (params[name]["kernel"] for name in WEIGHTS)
    rows = (b * timesteps / 1000 + c * pooled.mean(-1)).reshape(-1, len(clips))
    return [a * column[-1] + rows[:, g].reshape(-1, 1, 1, 1, 1) for g, column in enumerate(clips)]


def numbers(*values: float) -> dict:
    return {DENOISER: {name: {"kernel": jnp.float32(value)} for name, value in zip(WEIGHTS, values, strict=True)}}


def blocky(x: np.ndarray) -> np.ndarray:
    """[T, H, W, C] with every 2x2 block at its mean: down and up again."""
    t, h, w, c = x.shape
    return x.reshape(t, h // 2, 2, w // 2, 2, c).mean((2, 4)).repeat(2, 1).repeat(2, 2)


class ByHand:
    """One row of a batch, in float64 and by the formulas of the paper."""

    def __init__(self, examples: dict, row: int, group: int, stage: int, pooled: np.ndarray, config: DmdRecipeConfig):
        self.stage, self.prompt = stage, pooled[row, group].mean()
        self.start, self.end = SCHEDULE.start_sigmas[stage], SCHEDULE.end_sigmas[stage]
        first, last = SCHEDULE.timestep_borders[stage].astype(np.float64)
        self.time = lambda s: (last + s * (first - last)) / 1000
        self.local = float(examples["local"][row, group])
        self.level = float(examples["level"][row, group])
        self.unit = int(examples["unit"][row, group])
        self.fresh = np.float64(examples["fresh"][group][row])
        self.again = np.float64(examples["again"][group][row]) if config.renew else None
        self.simulated = bool(examples["simulated"][row, group])
        self.steps, self.config = config.steps[stage], config
        tabled = examples | {"uniform": 1 - examples["local"]}
        clips, self.target, _ = one_row(tabled, row, group, stage)
        self.noisy = clips[-1]
        # Without noise it is s (1 - start) Up(Down(z)) + (1 - s) (1 - end) z, and the target its derivative by s.
        still, slope, _ = one_row(tabled | {"noise": [0 * each for each in examples["noise"]]}, row, group, stage)
        self.truth = (still[-1] - self.local * slope) / (1 - self.end)

        frames = np.float64(STATS.normalise(jnp.asarray(examples["latents"][row, group])))
        for _ in range(SCHEDULE.stages - 1 - stage):
            frames = blocky(frames)[:, ::2, ::2]
        self.before = frames[max(self.unit - 1, 0)]

    def features(self, noisy: np.ndarray, s: float, prompt: float | None = None) -> list[np.ndarray]:
        """Derivatives of the velocity by the three numbers."""
        ones = np.ones_like(noisy)
        return [noisy, self.time(s) * ones, (self.prompt if prompt is None else prompt) * ones]

    def answer(self, values, noisy: np.ndarray, s: float, prompt: float | None = None) -> np.ndarray:
        return sum(v * f for v, f in zip(values, self.features(noisy, s, prompt), strict=True))

    def input(self, student) -> np.ndarray:
        if not self.simulated or self.steps == 1:
            return self.noisy
        z, steps = self.noisy + (1 - self.local) * self.target, self.steps
        for index in range(round((1 - self.local) * steps)):
            s, after = 1 - index / steps, 1 - (index + 1) / steps
            v = self.answer(student, z, s)
            z = (
                self.renoised(self.predicted(z, v, s), after, self.again[index])[0]
                if self.config.renew
                else z - v / steps
            )
        return z

    def sharpened(self, x: np.ndarray) -> np.ndarray:
        c = self.end * (1 - self.start) / (self.start - self.end)
        return (x + c * blocky(x)) / (1 + c) if c else x

    def scale(self, s: float) -> float:
        return (s * self.start + (1 - s) * self.end) / (self.start - self.end)

    def predicted(self, noisy: np.ndarray, velocity: np.ndarray, s: float) -> np.ndarray:
        return self.sharpened(noisy - self.scale(s) * velocity)

    def clean(self, student) -> np.ndarray:
        noisy = self.input(student)
        return self.predicted(noisy, self.answer(student, noisy, self.local), self.local)

    def renoised(self, clean: np.ndarray, tau: float, noise: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        noise = self.fresh if noise is None else noise
        start = (1 - self.start) * blocky(clean) + self.start * noise if self.stage else noise
        end = (1 - self.end) * clean + self.end * noise
        return tau * start + (1 - tau) * end, start - end

    def fake_gradient(self, student, fake) -> np.ndarray:
        tau = 1 - self.level
        noisy, target = self.renoised(self.clean(student), tau)
        error = self.answer(fake, noisy, tau) - target
        return np.array([2 * (error * f).mean() for f in self.features(noisy, tau)])

    def judged(self, student, fake, teacher, empty: float) -> tuple[np.ndarray, float]:
        """``v_teacher - v_fake``, and the teacher's error."""
        tau = (int(self.level * 4) + 1) / 4
        noisy, target = self.renoised(self.clean(student), tau)
        without = self.answer(teacher, noisy, tau, empty)
        strength = self.config.later_guidance if self.unit else self.config.first_guidance
        known = without + strength * (self.answer(teacher, noisy, tau) - without)
        return known - self.answer(fake, noisy, tau), np.abs(known - target).mean()

    def student_gradient(self, student, direction: np.ndarray, weight: float) -> np.ndarray:
        error = self.clean(student) - self.truth
        pull = weight * direction / error.size
        pull = pull + self.config.cauchy_weight * error / (1 + np.square(error).sum())
        parts = self.features(self.input(student), self.local)
        return np.array([(pull * self.sharpened(-self.scale(self.local) * part)).sum() for part in parts])


@pytest.mark.parametrize(
    ("renew", "guidance", "shared"), [(False, (3.0, 2.0), False), (True, (1.0, 1.0), False), (False, (1.0, 1.0), True)]
)
def test_a_step_is_the_one_computed_by_hand(renew, guidance, shared):
    """All stages, data and own steps, with guidance for first and later units and without: both networks' gradients.

    In two microbatches but for the last: the student must see the fake that was just updated, and weights are those of
    the whole batch.
    """
    guided = {"first_guidance": guidance[0], "later_guidance": guidance[1]}
    stages = {"batch": 24, "stage_mix": (1, 1, 1), "steps": (4, 2, 1), "microbatches": 1 if shared else 2}
    made = recipe(**stages, **guided, simulated=0.5, renew=renew, fake_updates=1, shared=shared)
    rng = np.random.Generator(np.random.Philox(1))
    rows, groups = 8, 3
    pooled = rng.standard_normal((rows, groups, 5)).astype(np.float32)
    text = np.zeros((rows * groups, tiny_system.TEXT_LENGTH, 2), np.float32)
    mask = np.ones(text.shape[:2], np.int32)
    made.definitions[DENOISER] = linear
    made.encode = lambda params, examples: Conditions(text, mask, pooled.reshape(-1, 5))
    empty = {"text": text[:1], "mask": mask[:1], "pooled": np.full((1, 5), 0.7, np.float32)}
    student, fake, teacher = (0.2, -0.4, 0.3), (0.5, 0.1, -0.2), (0.9, -0.3, 0.6)
    state = DmdState.create(numbers(*student), made.optimizer, jax.random.key(4), frozen=None)
    start = numbers(*fake)
    state = state.replace(
        frozen=numbers(*teacher) | {NEGATIVE: empty}, fake=start, fake_opt_state=made.fake_optimizer.init(start)
    )
    batch = make_batch(24)
    after, metrics = jax.jit(made.step)(state, batch)

    latents = {"latents": batch["latents"].reshape(rows, groups, UNITS, HEIGHT, WIDTH, -1)}
    draw = jax.jit(made.draws)
    drawn = [jax.device_get(draw(key)) for key in jax.random.split(state.step_key(), 2)]
    if shared:
        drawn[0] = drawn[1] | {name: drawn[0][name] for name in ("level", "fresh")}
    for each in drawn:
        assert 0 < each["simulated"].mean() < 1
        assert {float(s) for s in each["local"][:, 1]} == {0.5, 1.0}
        assert len(set(each["local"][:, 0])) > 2
    scenes = [
        [
            ByHand(latents | each, row, group, group, pooled, made.config)
            for row in range(rows)
            for group in range(groups)
        ]
        for each in drawn
    ]
    moved = np.array(fake) - 0.05 * np.mean([row.fake_gradient(student, fake) for row in scenes[0]], axis=0)
    judged = [row.judged(student, moved, teacher, 0.7) for row in scenes[1]]
    errors = np.array([error for _, error in judged])
    weights = 1 / np.maximum(errors, 0.1 * errors.mean())
    weights /= weights.mean() * errors.mean()
    gradient = np.mean(
        [row.student_gradient(student, d, w) for row, (d, _), w in zip(scenes[1], judged, weights, strict=True)], axis=0
    )

    def values(params: dict) -> list[float]:
        return [float(params[DENOISER][name]["kernel"]) for name in WEIGHTS]

    np.testing.assert_allclose(np.array(fake) - values(after.fake), np.array(fake) - moved, rtol=1e-3)
    np.testing.assert_allclose(np.array(student) - values(after.params), 0.05 * gradient, rtol=1e-3, atol=1e-6)
    assert np.abs(gradient).min() > 0.01
    for stage in range(groups):
        np.testing.assert_allclose(metrics["teacher_error"][f"stage_{stage}"], errors[stage::3].mean(), rtol=1e-4)
        later = [row for row in scenes[1][stage::3] if row.unit]
        changes = [[np.abs(x - row.before).mean() for x in (row.clean(student), row.truth)] for row in later]
        np.testing.assert_allclose(metrics["motion"][f"stage_{stage}"], np.divide(*np.sum(changes, axis=0)), rtol=1e-4)
    pulls = [w * np.abs(d).mean() for (d, _), w in zip(judged, weights, strict=True)]
    np.testing.assert_allclose(metrics["pull"]["matching"], np.mean(pulls), rtol=1e-4)
    errors = [row.clean(student) - row.truth for row in scenes[1]]
    pulls = [np.abs(e).mean() * e.size / (1 + np.square(e).sum()) for e in errors]
    np.testing.assert_allclose(metrics["pull"]["cauchy"], 0.5 * np.mean(pulls), rtol=1e-4)
    np.testing.assert_allclose(metrics["weight"]["max"], weights.max(), rtol=1e-4)


# ---- the loop


class Batches:
    """An endless stream that can be saved: one batch, turned a little every step."""

    def __init__(self, count: int = RECIPE.batch):
        self.batch, self.at = make_batch(count), 0

    def __next__(self) -> dict:
        self.at += 1
        return {name: np.roll(x, self.at, axis=0) for name, x in self.batch.items()}

    def get_state(self) -> int:
        return self.at

    def set_state(self, state: int) -> None:
        self.at = state


ONE = make_mesh(MeshConfig(), jax.devices()[:1])


@pytest.fixture(scope="module")
def go(tmp_path_factory):
    """Function (folder, callback) -> outcome of three steps on one device; compiled once."""

    def run(folder, callback=lambda step, state: None):
        config = LoopConfig(steps=3, save_every=0, seed=2)
        options = {"preset": "tiny/student", "given": (given(),), "mesh": ONE, "quiet": True}
        return train(recipe(), Batches(), config, folder, callbacks=[Every(1, callback)], **options)

    with toy.compiled_once(tmp_path_factory.mktemp("compiled")):
        yield run


@pytest.fixture(scope="module")
def whole(go, tmp_path_factory):
    """A run that nothing interrupts, and its state after each step."""
    states = {}
    outcome = go(tmp_path_factory.mktemp("whole"), lambda step, state: states.__setitem__(step, toy.numbers(state)))
    return outcome, states


@pytest.mark.heavy
def test_interruption_cannot_be_seen(go, whole, tmp_path):
    """Ctrl-C after the second step; both networks, both optimizers and the average go on as if nothing had been."""

    def strike(step, state):
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    outcome = go(tmp_path / "struck", strike)
    assert (outcome.reason, outcome.step) == ("SIGINT", 2)
    outcome = go(tmp_path / "struck")
    assert (outcome.finished, outcome.step, outcome.step_compilations) == (True, 3, 1)
    toy.assert_same(toy.numbers(outcome.state), whole[1][3])


def test_one_program_and_two_networks_that_learn(whole):
    """Everything of student and fake moves but what no gradient reaches; text and teacher stay."""
    outcome, states = whole
    assert (outcome.step_compilations, outcome.other_compilations) == (1, 0)
    first, last = states[1], states[3]
    moved = {name for name in first if (first[name] != last[name]).any()}
    parts = {name.split("/", 2)[0] for name in moved}
    assert parts == {"step", "params", "ema", "fake", "opt_state", "fake_opt_state"}
    assert not [name for name in moved if any(part in name.split("/") for part in TEXT_PARTS)]
    for root in ("params", "fake"):
        still = {name for name in first if name.startswith(f"{root}/{DENOISER}/")} - moved
        assert all("last_block/attn/" in name and "add" in name for name in still), still


@pytest.mark.heavy
def test_eight_devices_in_two_passes_agree_with_one(whole):
    """All networks split four ways, examples eight ways, and the batch in two microbatches: the same step."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    made = recipe(mesh, microbatches=2)
    made.rules = dataclasses.replace(made.rules, minimum=1000)
    program = Program(made, mesh, jax.random.key(2), (given(),))
    state = program.state
    for tree in (state.params, state.fake, state.frozen, state.ema):
        assert not tree[DENOISER]["blocks"]["ff"]["up"]["kernel"].sharding.is_fully_replicated
    before = program.initial_state()
    start = toy.numbers(before)
    after, _ = program.compile_step()(before, program.put(next(Batches())))
    found, expected = toy.numbers(after), whole[1][1]
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if name.startswith(("params/", "fake/")):
            change = value - start[name]
            tolerance = 1e-4 * np.abs(change).max() + 1e-6
            np.testing.assert_allclose(found[name] - start[name], change, rtol=5e-3, atol=tolerance, err_msg=name)


# ---- the state and the settings


def test_the_state_holds_three_denoisers():
    """The student may be smaller than its teacher; only student and fake have moments, only the student an average."""
    made = recipe(dtype="bfloat16")
    deeper = definition(dataclasses.replace(tiny_system.CONFIG.diffusion_transformer, num_layers=5)).abstract()
    state = jax.eval_shape(made.init, jax.random.key(0), given(), deeper)
    kernels = {name: leaf for name, leaf in named_leaves(state) if name.endswith("blocks/ff/up/kernel")}
    depths = {"params": 2, "ema": 2, "fake": 2, "frozen": 4, "opt_state": 2, "fake_opt_state": 2}
    assert {name.split("/")[0]: leaf.shape[0] for name, leaf in kernels.items()} == depths
    assert {leaf.dtype.name for name, leaf in kernels.items() if name.startswith("frozen")} == {"bfloat16"}
    assert {leaf.dtype.name for name, leaf in kernels.items() if not name.startswith("frozen")} == {"float32"}
    assert set(state.frozen) == {DENOISER, NEGATIVE}
    assert set(state.frozen[NEGATIVE]) == set(Conditions._fields)
    assert set(state.params) == {DENOISER, *TEXT_PARTS}
    with pytest.raises(UserError, match="a student without diffusion_transformer"):
        jax.eval_shape(made.init, jax.random.key(0), {})


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"train_text": True}, "--recipe.train-text"),
        ({"steps": (1, 1)}, "expected at least 1 for each of the 3 stages"),
        ({"steps": (1, 0, 1)}, "expected at least 1 for each of the 3 stages"),
        ({"fake_updates": 0}, "fake_updates is 0"),
        ({"levels": 0}, "levels is 0"),
        ({"simulated": 1.5}, "simulated 1.5"),
        ({"own_history": -0.5}, "own history -0.5"),
        ({"own_ramp": -1}, "growing for -1"),
        ({"videos": False}, "expected --recipe.own-history 1"),
        ({"weight_floor": 0.0}, "weight floor 0.0"),
        ({"cauchy_weight": -1.0}, "cauchy weight is -1.0"),
        ({"renew": True, "exact": False}, "leave --recipe.exact on"),
        ({"negative": empty_prompt(text=3)}, "expected one row of 12 and 12 tokens"),
    ],
)
def test_settings_that_cannot_be(changes, told):
    with pytest.raises(UserError, match=told):
        recipe(**changes)


# ---- full size


@pytest.mark.heavy
def test_the_paper_step_lowers_at_full_size():
    """Student and fake of 18 blocks, teacher of 24, 4-4-4 steps, by shapes alone: nothing is allocated or compiled."""
    preset = load_preset("neodragon_320p")
    network = preset.system.diffusion_transformer
    system = dataclasses.replace(preset.system, diffusion_transformer=dataclasses.replace(network, num_layers=18))
    config = DmdRecipeConfig(
        batch=64,
        stage_mix=(1, 2, 1),
        steps=(4, 4, 4),
        simulated=0.5,
        renew=True,
        own_history=0.5,
        microbatches=2,
        remat="full",
        dtype="bfloat16",
    )
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    made = DmdRecipe(
        system,
        config,
        negative=empty_prompt(preset.video.text_length, preset.video.clip_length),
        schedule=preset.schedule,
        stats=latent_stats(preset.system.causal_video_vae),
        sizes=[preset.latent_size],
        text_length=preset.video.text_length,
        clip_length=preset.video.clip_length,
        hooks=sharding_hooks(mesh),
    )
    student = {name: made.definitions[name].abstract() for name in (*TEXT_PARTS, DENOISER)}
    program = Program(made, mesh, jax.random.key(0), (student, definition(network).abstract()))
    step = jax.jit(made.step, donate_argnums=0).lower(program.state, program.batch)
    assert "while" in step.as_text(), "blocks run in a loop"
    names = ("params", "fake", "frozen", "ema")
    kernels = [getattr(program.state, name)[DENOISER]["blocks"]["ff"]["up"]["kernel"] for name in names]
    assert [kernel.shape[0] for kernel in kernels] == [17, 17, 23, 17]
    assert not any(kernel.sharding.is_fully_replicated for kernel in kernels)
