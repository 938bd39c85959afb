"""What distribution matching is compared with: progressive distillation, mean flows and an adversary, by hand."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_system
from test_dmd_recipe import empty_prompt, linear, make_batch, numbers
from test_recipes_flow import HEIGHT, SCHEDULE, STATS, UNITS, WIDTH

from nd_jax.errors import UserError
from nd_jax.models.system import DENOISER, Conditions
from nd_jax.pyramid.targets import per_row
from nd_jax.recipes.adversarial import AdversarialConfig, AdversarialRecipe, hinge, init_head, logits
from nd_jax.recipes.few_step import NEGATIVE
from nd_jax.recipes.mean_flow import MeanFlowConfig, MeanFlowRecipe, interval_end
from nd_jax.recipes.progressive import ProgressiveConfig, ProgressiveRecipe
from nd_jax.training.optim import OptimConfig
from nd_jax.training.state import TrainState

BATCH = 12
PLAIN = OptimConfig(learning_rate=1e-3, schedule="constant", warmup_steps=1, weight_decay=0.0)


def make(kind, config, **changes):
    return kind(
        tiny_system.CONFIG,
        dataclasses.replace(config, **{"batch": BATCH, "stage_mix": (1, 1, 1), "optim": PLAIN, **changes}),
        negative=empty_prompt(),
        schedule=SCHEDULE,
        stats=STATS,
        sizes=[(UNITS, HEIGHT, WIDTH)],
        text_length=tiny_system.TEXT_LENGTH,
        clip_length=tiny_system.TEXT_LENGTH,
    )


def prepared(made, denoiser=linear):
    """The recipe with a denoiser of three numbers, and conditions for its batch and for the empty prompt."""
    rng = np.random.Generator(np.random.Philox(1))
    text, mask = np.zeros((BATCH, made.lengths[0], 2), np.float32), np.ones((BATCH, made.lengths[0]), np.int32)
    pooled = rng.standard_normal((BATCH, 5)).astype(np.float32)
    made.definitions[DENOISER] = denoiser
    made.encode = lambda params, examples: Conditions(text, mask, pooled)
    empty = {"text": text[:1], "mask": mask[:1], "pooled": np.full((1, 5), 0.7, np.float32)}
    return pooled.reshape(BATCH // 3, 3, 5), empty


def state_of(made, student, teacher, empty, key: int = 0) -> TrainState:
    state = TrainState.create(numbers(*student), made.optimizer, jax.random.key(key), ema=True)
    return state.replace(frozen=numbers(*teacher) | {NEGATIVE: empty})


# ---- progressive


def test_the_target_is_where_the_teachers_steps_lead():
    """On ``v = a z + b t / 1000 + c mean(pooled)``, guided: step after step in float64."""
    made = make(ProgressiveRecipe, ProgressiveConfig(steps=(1, 2, 1), teacher_steps=3, simulated=0.5))
    pooled, empty = prepared(made)
    guidance = {"first": made.config.first_guidance, "later": made.config.later_guidance}
    state = state_of(made, (0.2, -0.4, 0.3), (0.9, -0.3, 0.6), empty)

    @jax.jit
    def run(state, batch):
        examples, _ = made.prepare(state, batch)
        examples |= made.draws(state.step_key())
        rows = len(examples["unit"])
        examples |= {"factor": jnp.ones(rows), "guided": jnp.ones(rows, bool)}
        return examples, made.targets(examples, state.params[DENOISER], state.frozen)

    examples, found = jax.device_get(run(state, make_batch(BATCH)))
    a, b, c = 0.9, -0.3, 0.6
    for group, stage in enumerate(made.columns):
        first, last = SCHEDULE.timestep_borders[stage].astype(np.float64)
        for row in range(BATCH // 3):
            z, s, n = np.float64(found["input"][group][row]), float(examples["local"][row, group]), (1, 2, 1)[stage]
            w = guidance["later" if examples["unit"][row, group] else "first"]
            prompt = 0.7 + w * (pooled[row, group].mean() - 0.7)
            begun = z
            for _ in range(3):
                z = z - (a * z + b * (last + s * (first - last)) / 1000 + c * prompt) / (3 * n)
                s -= 1 / (3 * n)
            np.testing.assert_allclose(found["target"][group][row], (begun - z) * n, rtol=1e-4, atol=1e-4)
    before = made.loss(state.params, examples | found)[0]
    exact = [jnp.mean(jnp.square(v)) for v in found["target"]]
    assert 0 < float(before) < 2 * max(map(float, exact))


def test_rounds_halve_the_steps_and_change_the_teacher():
    """Levels of four, two and one steps; from the second round on the averaged student is the teacher, unguided."""
    options = {"steps": (1, 1, 1), "rounds": 3, "round_steps": 2}
    made = make(ProgressiveRecipe, ProgressiveConfig(**options, ema_decay=0.5))
    _, empty = prepared(made)
    state = state_of(made, (0.2, -0.4, 0.3), (0.9, -0.3, 0.6), empty)
    step, batch = jax.jit(made.step), make_batch(BATCH)
    seen = []
    targets = made.targets
    for _ in range(5):
        before = state
        state, metrics = step(state, batch)
        seen.append(int(metrics["round"]))
        kept = float(state.frozen[DENOISER]["noisy"]["kernel"]) == np.float32(0.9)
        assert kept == (before.step < 2)
        if before.step in (2, 4):
            np.testing.assert_allclose(
                state.frozen[DENOISER]["noisy"]["kernel"], before.ema[DENOISER]["noisy"]["kernel"], rtol=1e-6
            )
    assert seen == [0, 0, 1, 1, 2]
    examples, _ = made.prepare(state, batch)
    examples |= made.draws(state.step_key())
    rows = len(examples["unit"])
    asked = examples | {"factor": jnp.full(rows, 2), "guided": jnp.zeros(rows, bool)}
    unguided = targets(asked, state.params[DENOISER], state.frozen)["target"]
    other = targets(asked | {"guided": jnp.ones(rows, bool)}, state.params[DENOISER], state.frozen)["target"]
    assert np.abs(unguided[0] - other[0]).max() > 0.1


# ---- mean flow


@pytest.mark.parametrize(("difference", "tolerance"), [(0.0, 2e-3), (0.02, 6e-3)])
def test_the_average_velocity_of_a_known_flow_is_a_fixed_point(difference, tolerance):
    """``dz/ds = a z`` has ``u = z (1 - exp(-a (s - r))) / (s - r)``: the identity gives it back, and not another."""
    options = {"steps": (1, 2, 1), "first_guidance": 1.0, "later_guidance": 1.0, "difference": difference}
    made, rate = make(MeanFlowRecipe, MeanFlowConfig(**options)), 0.8

    def denoiser(params, clips, text, pooled, timesteps, layouts, remat="none"):
        answers, times = [], timesteps.reshape(-1, len(clips))
        for group, (stage, column) in enumerate(zip(made.columns, clips, strict=True)):
            first, last = SCHEDULE.timestep_borders[stage]
            s = (times[:, group] - last) / (first - last)
            span = per_row(s - interval_end(s, (1, 2, 1)[stage]), column[-1])
            average = -jnp.expm1(-rate * span) / span
            answers.append(jnp.where(params["average"], average, rate) * column[-1])
        return answers

    _, empty = prepared(made, denoiser)
    examples, _ = made.prepare(state_of(made, (0, 0, 0), (0, 0, 0), empty), make_batch(BATCH))
    drawn = jax.jit(made.draws)(jax.random.key(3))
    drawn["local"] = jnp.clip(drawn["local"], 0.1, 1)
    starts = np.asarray([drawn["local"][:, g] for g in range(3)])
    assert (starts == 1).any()
    assert len(np.unique(starts)) > 5
    examples |= drawn
    frozen = {DENOISER: {"average": jnp.array(False)}, NEGATIVE: empty}
    for average, right in ((True, True), (False, False)):
        student = {"average": jnp.array(average)}
        found = jax.jit(made.targets)(examples, student, frozen)
        packed = made.scene(examples)
        for goal, answer in zip(found["target"], made.velocity(student, packed), strict=True):
            assert np.allclose(goal, answer, rtol=1e-3, atol=tolerance) == right


def test_an_interval_ends_where_its_step_does():
    local = np.array([1.0, 0.75, 0.51, 0.5, 0.25, 1e-6], np.float32)
    np.testing.assert_allclose(interval_end(local, 1), 0)
    np.testing.assert_allclose(interval_end(local, 2), [0.5, 0.5, 0.5, 0, 0, 0])
    np.testing.assert_allclose(interval_end(local, 4), [0.75, 0.5, 0.5, 0.25, 0, 0])


# ---- adversarial


def test_the_head_learns_and_the_student_follows_it():
    """Descent on the hinge loss parts the logits; descent on the generator's loss raises those of predictions."""
    rng = np.random.Generator(np.random.Philox(2))
    head = init_head(jax.random.key(0), 2, 6, 8)
    real, made = (jnp.asarray(rng.standard_normal((2, 5, 4, 6)).astype(np.float32)) for _ in range(2))

    def loss(head):
        return hinge(logits(head, real)[None], logits(head, made)[None])

    def gap(head):
        return float(jnp.mean(logits(head, real)) - jnp.mean(logits(head, made)))

    grads = jax.grad(loss)(head)
    better = jax.tree.map(lambda p, g: p - 0.1 * g, head, grads)
    assert gap(better) > gap(head)
    up = jax.grad(lambda x: -jnp.mean(logits(better, x)))(made)
    assert float(jnp.mean(logits(better, made - 0.1 * up))) > float(jnp.mean(logits(better, made)))
    far = jnp.array([[3.0]])
    assert float(hinge(far, -far)) == 0
    assert float(hinge(-far, far)) == 8


def test_an_adversarial_step_moves_predictions_to_what_the_head_calls_data():
    """With a head that likes one direction of the tokens: the student's predictions go there, by the recipe's step."""
    config = AdversarialConfig(
        cauchy_weight=0.0, features=1, hidden=4, head_optim=dataclasses.replace(PLAIN, learning_rate=0.0)
    )
    made = make(AdversarialRecipe, config, optim=dataclasses.replace(PLAIN, learning_rate=1e-2))
    _, empty = prepared(made)

    def tokens(frozen, packed):  # the picture's own values stand in for the teacher's features
        found = [each.clips[-1] for each in packed.examples]
        return [x.reshape(1, len(x), -1, x.shape[-1]) for x in found]

    made.tokens = tokens
    # A constant beside every value keeps the head's normalisation from hiding the mean.
    head = {"in": {"kernel": jnp.ones((1, 4, 4)), "bias": jnp.zeros((1, 4))}, "out": {"kernel": jnp.ones((1, 4, 1))}}
    state = made_state(made, empty, head)
    step, batch = jax.jit(made.step), make_batch(BATCH)
    opinions = []
    for _ in range(6):
        state, metrics = step(state, batch)
        opinions.append(float(metrics["student"]["generator"]))
    changed = [float(state.params[DENOISER][name]["kernel"]) for name in ("noisy", "time", "prompt")]
    assert changed[1] < -0.4, "a smaller velocity at all times gives larger predictions, which this head likes"
    np.testing.assert_array_equal(state.head["in"]["kernel"], head["in"]["kernel"])
    assert np.isfinite(opinions).all()


def made_state(made, empty, head):
    from nd_jax.recipes.adversarial import AdversarialState

    state = state_of(made, (0.2, -0.4, 0.3), (0.9, -0.3, 0.6), empty)
    return AdversarialState(**vars(state), head=head, head_opt_state=made.head_optimizer.init(head))


@pytest.mark.parametrize(
    ("kind", "config", "told"),
    [
        (ProgressiveRecipe, ProgressiveConfig(teacher_steps=1), "1 teacher steps"),
        (ProgressiveRecipe, ProgressiveConfig(rounds=2), "2 rounds of 0 updates"),
        (ProgressiveRecipe, ProgressiveConfig(renew=True), "Euler steps"),
        (MeanFlowRecipe, MeanFlowConfig(own_history=0.5), "own history 0.5"),
        (MeanFlowRecipe, MeanFlowConfig(power=-1.0), "power -1.0"),
        (MeanFlowRecipe, MeanFlowConfig(difference=2.0), "difference 2.0"),
        (AdversarialRecipe, AdversarialConfig(own_history=0.5), "own history 0.5"),
        (AdversarialRecipe, AdversarialConfig(features=0), "features is 0"),
        (AdversarialRecipe, AdversarialConfig(train_text=True), "--recipe.train-text"),
    ],
)
def test_settings_that_cannot_be(kind, config, told):
    with pytest.raises(UserError, match=told):
        make(kind, config)
