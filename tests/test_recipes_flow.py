"""The flow-matching recipe: its loss against one computed row by row, its draws, and how it spreads and learns."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_system
from jax.sharding import Mesh

from nd_jax.data.latents import LatentSource, write_latents
from nd_jax.errors import UserError
from nd_jax.models.system import CODEC, DENOISER, TEXT_PARTS, TextTokens, encode_text
from nd_jax.pyramid.layout import exact_layout
from nd_jax.pyramid.normalise import LatentStats
from nd_jax.pyramid.schedule import Schedule
from nd_jax.recipes.feeds import MixedFeed
from nd_jax.recipes.flow_matching import FlowRecipe, FlowRecipeConfig
from nd_jax.training.hooks import sharding_hooks
from nd_jax.training.mesh import MeshConfig, make_mesh
from nd_jax.training.optim import FROZEN, OptimConfig
from nd_jax.training.paths import named_leaves
from nd_jax.training.program import Program
from nd_jax.training.sharding import Rules

UNITS, HEIGHT, WIDTH, CHANNELS = 3, 4, 8, 4
STATS = LatentStats(shift=0.1, scale=0.5, video_shift=(0.0, 0.1, 0.2, 0.3), video_scale=0.8)
SCHEDULE = Schedule()
CONFIG = FlowRecipeConfig(
    batch=32, stage_mix=(1, 0, 1), optim=OptimConfig(learning_rate=3e-3, warmup_steps=1, schedule="constant")
)


def recipe(mesh: Mesh | None = None, **changes) -> FlowRecipe:
    return FlowRecipe(
        tiny_system.CONFIG,
        dataclasses.replace(CONFIG, **changes),
        schedule=SCHEDULE,
        stats=STATS,
        sizes=[(UNITS, HEIGHT, WIDTH)],
        text_length=tiny_system.TEXT_LENGTH,
        clip_length=tiny_system.TEXT_LENGTH,
        hooks=None if mesh is None else sharding_hooks(mesh, Rules(minimum=0)),
    )


def make_batch(count: int = CONFIG.batch) -> dict[str, np.ndarray]:
    rng = np.random.Generator(np.random.Philox(3))
    length, real = tiny_system.TEXT_LENGTH, rng.integers(2, tiny_system.TEXT_LENGTH, (count, 1))
    ids = {f"{name}_ids": rng.integers(3, 200, (count, length), np.int32) for name in ("t5", "clip", "clip_2")}
    latents = rng.standard_normal((count, UNITS, HEIGHT, WIDTH, CHANNELS), np.float32)
    return {"latents": latents, "t5_mask": (np.arange(length) < real).astype(np.int32), **ids}


def given() -> dict:
    return {name: params for name, params in tiny_system.random_system_params().items() if name != CODEC}


@pytest.fixture(scope="module")
def gradients():
    """Function of (parameters, batch, key) on one device: gradients and metrics."""
    made = recipe()
    return jax.jit(lambda params, batch, key: made._grads(params, examples_of(made, batch, key)))


def examples_of(made: FlowRecipe, batch: dict, key: jax.Array) -> dict:
    """What ``step`` hands to the loss."""
    groups = len(made.columns)
    return {name: x.reshape(-1, groups, *x.shape[1:]) for name, x in batch.items()} | made.draws(key)


# ---- the loss


def halved(x: np.ndarray) -> np.ndarray:
    """[T, H, W, C] at half the resolution: what bilinear interpolation by two comes to."""
    t, h, w, c = x.shape
    return x.reshape(t, h // 2, 2, w // 2, 2, c).mean((2, 4))


def at_level(x: np.ndarray, level: int, noise: bool = False) -> np.ndarray:
    for _ in range(2 - level):
        x = halved(x) * (2 if noise else 1)
    return x


def one_row(examples: dict, row: int, group: int, stage: int) -> tuple[list[np.ndarray], np.ndarray, float]:
    """Clips, target and timestep of one row by the formulas of arXiv 2410.05954, with nothing padded."""
    latents, unit = examples["latents"][row, group].astype(np.float64), int(examples["unit"][row, group])
    clean = np.empty_like(latents)
    clean[:1] = (latents[:1] - STATS.shift) * STATS.scale
    clean[1:] = (latents[1:] - np.array(STATS.video_shift)) * STATS.video_scale
    noise = at_level(examples["noise"][group][row].astype(np.float64), stage, noise=True)
    end = at_level(clean[unit : unit + 1], stage)
    start = noise
    if stage:
        sigma = SCHEDULE.start_sigmas[stage]
        start = sigma * noise + (1 - sigma) * at_level(clean[unit : unit + 1], stage - 1).repeat(2, 1).repeat(2, 2)
    if stage < 2:
        end = SCHEDULE.end_sigmas[stage] * noise + (1 - SCHEDULE.end_sigmas[stage]) * end
    entry = int(examples["uniform"][row, group] * 1000)
    local = SCHEDULE.sigmas_per_stage[stage][entry]
    # the unit before stands at the stage's resolution, the one before that one level lower, the rest at the lowest
    back, clips = list(range(1, unit + 1)), []
    alone = back[: max(stage, 1)]
    groups = ([back[len(alone) :]] if back[len(alone) :] else []) + [[b] for b in reversed(alone)]
    for members in groups:
        level = 0 if len(members) > 1 or members[0] > len(alone) else max(stage - members[0] + 1, 0)
        clips.append(at_level(clean[[unit - b for b in sorted(members, reverse=True)]], level))
    strength = examples["corrupt"][row, group] * CONFIG.corrupt_ratio
    noises = [np.asarray(n[row]) for n in examples["history"][group]]
    noises = [n[-clip.shape[0] :] for n, clip in zip(noises[len(noises) - len(clips) :], clips, strict=True)]
    clips = [strength * n + (1 - strength) * clip for n, clip in zip(noises, clips, strict=True)]
    current = local * start + (1 - local) * end
    return [*clips, current], start - end, float(SCHEDULE.timesteps_per_stage[stage][entry])


def test_loss_is_that_of_every_row_on_its_own():
    """Padded, packed and batched against exact, alone and by hand; both the mean and each stage's."""
    made, params, batch = recipe(batch=3, stage_mix=(1, 1, 1)), given(), make_batch(3)
    draws = jax.device_get(made.draws(jax.random.key(7))) | {"unit": np.array([[2, 0, 2]], np.int32)}
    examples = {name: x[None] for name, x in batch.items()} | draws
    loss, by_stage = jax.jit(made.loss)(params, examples)

    tokens = TextTokens(*(batch[name] for name in TextTokens._fields))
    conditions = jax.jit(lambda params: encode_text(made.definitions, params, tokens))(params)
    denoise, losses = jax.jit(made.definitions[DENOISER]), []
    for row, stage in enumerate(made.columns):
        clips, target, timestep = one_row(examples, 0, row, stage)
        layout = exact_layout([clip.shape[:3] for clip in clips], batch["t5_mask"][row : row + 1], 1)
        clips = [clip[None].astype(np.float32) for clip in clips]
        text, pooled = conditions.text[row : row + 1], conditions.pooled[row : row + 1]
        (answer,) = denoise(params[DENOISER], [clips], text, pooled, jnp.full(1, timestep, jnp.float32), [layout])
        losses.append(np.square(np.asarray(answer[0], np.float64) - target).mean())
    np.testing.assert_allclose(loss, np.mean(losses), rtol=1e-5)
    for stage, expected in enumerate(losses):
        np.testing.assert_allclose(by_stage[f"stage_{stage}"], expected, rtol=1e-5)


# ---- the draws


def test_draws_depend_on_the_key_alone():
    made = recipe()
    draw = jax.jit(made.draws)
    first, again, other = (jax.device_get(draw(jax.random.key(n))) for n in (0, 0, 1))
    for one, two in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(one, two)
    assert all((one != two).any() for one, two in zip(jax.tree.leaves(first), jax.tree.leaves(other), strict=True))
    assert all(leaf.shape[0] == CONFIG.batch // 2 for leaf in jax.tree.leaves(first))
    clips = [[clip.shape[1:4] for clip in column] for column in first["history"]]
    assert clips == [list(envelope.clips[:-1]) for envelope in made.envelopes]


def test_units_are_balanced_or_free():
    """With a long history at the top stage goes a short one below, so that every update costs the same."""
    many = {"batch": 4 * 500, "stage_mix": (1, 2, 1)}

    def units(**changes) -> np.ndarray:
        made = recipe(**many, **changes)
        return np.asarray(jax.jit(lambda key: made.draws(key)["unit"])(jax.random.key(0)))

    unit, free = units(), units(balanced=False)
    assert (unit[:, :3] + unit[:, 3:] == UNITS - 1).all()
    assert (free[:, 0] != free[:, 1]).any()
    for drawn in (unit[:, 3], free.ravel()):
        share = np.bincount(drawn, minlength=UNITS) / drawn.size
        np.testing.assert_allclose(share, 1 / UNITS, atol=0.07)


def test_columns_follow_the_stage_mix():
    assert recipe(stage_mix=(1, 2, 1)).columns == (0, 1, 1, 2)
    assert [envelope.stage for envelope in recipe(stage_mix=(3, 0, 1)).envelopes] == [0, 0, 0, 2]
    for changes in ({"stage_mix": (1, 1)}, {"batch": 31}, {"batch": 6, "microbatches": 2}, {"microbatches": 0}):
        with pytest.raises(UserError, match="flow matching"):
            recipe(**changes)


# ---- learning


NOT_READ = {f"last_block/attn/{name}" for name in ("add_q_proj/kernel", "add_q_proj/bias", "norm_add_q/scale")}
"""The last block answers for image tokens only: its text tokens ask nothing."""


def test_a_few_steps_reduce_the_loss(gradients):
    batch, params, losses = make_batch(), given(), []
    for step in range(15):
        grads, metrics = jax.device_get(gradients(params, batch, jax.random.key(step % 3)))
        norm = np.sqrt(sum(np.sum(x * x) for x in jax.tree.leaves(grads)))
        params = jax.tree.map(lambda p, g, scale=0.3 / norm: p - scale * g, params, grads)
        losses.append(float(metrics["loss"]))
    assert np.mean(losses[-3:]) < 0.8 * np.mean(losses[:3]), losses
    np.testing.assert_allclose(metrics["loss"], (metrics["stage_0"] + metrics["stage_2"]) / 2, rtol=1e-5)
    untouched = {name for name, g in named_leaves(grads[DENOISER]) if not np.any(g)}
    assert untouched == NOT_READ
    assert all(np.any(g) for name in TEXT_PARTS for g in jax.tree.leaves(grads[name])), "a text encoder was not trained"


def test_eight_devices_in_two_passes_agree_with_one(gradients):
    """Parameters split four ways and examples eight ways, gradients accumulated over two microbatches."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    made = recipe(mesh, microbatches=2)
    made.rules = dataclasses.replace(made.rules, minimum=1000)  # the tiny network's larger matrices
    program, batch = Program(made, mesh, jax.random.key(0), (given(),)), make_batch()
    places = jax.tree.map(lambda leaf: leaf.sharding, program.state.params)
    split = {name for name, place in named_leaves(places) if not place.is_fully_replicated}
    assert {f"{DENOISER}/blocks/{name}/kernel" for name in ("ff/up", "ff/down", "norm1/linear")} <= split
    spread = jax.jit(
        lambda params, batch, key: made._grads(params, examples_of(made, batch, key)), out_shardings=(places, None)
    )
    key = jax.random.key(5)
    grads, metrics = spread(jax.device_put(given(), places), program.put(batch), key)
    expected, numbers = gradients(given(), batch, key)
    for name, value in numbers.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)
    for (name, one), other in zip(named_leaves(expected), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-3, atol=1e-5 * np.abs(one).max() + 1e-7, err_msg=name)


def test_a_step_keeps_the_state_in_form_and_names_its_metrics():
    """Traced, not run: the loop's own tests run steps."""
    program = Program(recipe(), make_mesh(MeshConfig(), jax.devices()[:1]), jax.random.key(0), (given(),))
    parts = {f"optim/grad_norm_of/{part}" for part in (DENOISER, *TEXT_PARTS)}
    assert {"loss", "flow/stage_0", "flow/stage_2", "optim/grad_norm", "optim/learning_rate"} | parts == set(
        program.metric_names
    )
    state = program.state
    assert set(state.params) == set(state.ema) == {DENOISER, *TEXT_PARTS}


def test_frozen_text_stays_as_it_is():
    """No update, no moments and no share in the clipping norm; the denoiser trains on."""
    made = recipe(train_text=False)
    labels = made.rules.labels(given())
    assert {name for name in labels if set(jax.tree.leaves(labels[name])) == {FROZEN}} == set(TEXT_PARTS)
    assert FROZEN not in jax.tree.leaves(labels[DENOISER])
    small = {
        "text_encoder_3": {"shared": {"embedding": jnp.ones((3, 4))}},
        DENOISER: {"blocks": {"ff": {"up": {"kernel": jnp.ones((2, 3, 4))}}}},
    }
    optimizer = made.optimizer
    grads = jax.tree.map(lambda x: 5 * x, small)
    params, state, metrics = optimizer.apply(grads, optimizer.init(small), small)
    np.testing.assert_array_equal(params["text_encoder_3"]["shared"]["embedding"], 1)
    assert (params[DENOISER]["blocks"]["ff"]["up"]["kernel"] < 1).all()
    moments = [leaf.shape for _, leaf in named_leaves(state) if leaf.ndim]
    assert moments == [(2, 3, 4)] * 2
    np.testing.assert_allclose(metrics["grad_norm"], 5 * np.sqrt(24), rtol=1e-6)

    made = recipe(train_text=False, batch=2)
    examples = jax.eval_shape(lambda: examples_of(made, make_batch(2), jax.random.key(0)))
    jaxpr = jax.make_jaxpr(lambda params, rest: jax.grad(made.loss, has_aux=True)(params, rest)[0])(given(), examples)
    outputs = dict(zip([name for name, _ in named_leaves(given())], jaxpr.jaxpr.outvars, strict=True))
    producers = {var: each.primitive.name for each in jaxpr.jaxpr.eqns for var in each.outvars}
    zeros = {name for name, var in outputs.items() if producers.get(var) in (None, "broadcast_in_dim")}
    wasted = {name for name in outputs if name.split("/")[0] in TEXT_PARTS} - zeros
    assert not wasted, "work goes into gradients that nobody uses"
    assert {name for name in zeros if name.startswith(DENOISER)} == {f"{DENOISER}/{name}" for name in NOT_READ}


def test_a_run_without_given_parameters_begins_afresh():
    made = recipe()
    state = jax.eval_shape(made.init, jax.random.key(0))
    assert set(state.params) == {DENOISER, *TEXT_PARTS}
    assert jax.tree.structure(state.params) == jax.tree.structure(given())
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state.ema))
    assert made.batch_spec()["latents"].shape == (32, UNITS, HEIGHT, WIDTH, CHANNELS)
    assert set(make_batch()) == set(made.batch_spec())


# ---- the data


@pytest.fixture
def encoded(tmp_path):
    rng = np.random.Generator(np.random.Philox(0))
    latents = rng.standard_normal((30, 2, 4, 4, 3), np.float32)
    captions = [[f"clip {n} wording {k}" for k in range(4)] for n in range(30)]
    return write_latents(tmp_path / "latents", [latents[:16], latents[16:]], captions), latents


def test_caption_dropout_has_its_share(encoded):
    """Spread evenly over clips and wordings, the same ones every time."""
    folder, latents = encoded
    whole = LatentSource(folder)
    assert len(whole) == 120
    assert {whole[n]["caption"] for n in range(120)} == {f"clip {n} wording {k}" for n in range(30) for k in range(4)}
    np.testing.assert_array_equal(whole[31]["latents"], latents[1])
    for share in (0.1, 0.3):
        source = LatentSource(folder, dropout=share)
        dropped = np.array([source[n]["caption"] == "" for n in range(120)])
        assert abs(dropped.mean() - share) < 0.02
        assert all(abs(part.mean() - share) < 0.08 for part in dropped.reshape(4, 30))
        assert [LatentSource(folder, dropout=share)[n]["caption"] == "" for n in range(120)] == dropped.tolist()


def test_latents_that_cannot_be_used(encoded, tmp_path):
    folder, latents = encoded
    with pytest.raises(UserError, match="--overwrite"):
        write_latents(folder, [latents], [["a"]] * 30)
    for captions, told in (([["a"]] * 29, "more clips"), ([["a"]] * 31, "31 lists"), ([], "more clips")):
        with pytest.raises(UserError, match=told):
            write_latents(tmp_path / "bad", [latents], captions)
    with pytest.raises(UserError, match="not none"):
        write_latents(tmp_path / "bad", [], [])
    assert [path.name for path in tmp_path.iterdir()] == ["latents"]
    with pytest.raises(UserError, match="dropout"):
        LatentSource(folder, dropout=1.0)
    for content in ([["a"]] * 29, [[]] * 30, {"a": 1}, [[1]] * 30):
        (folder / "captions.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match="latents"):
            LatentSource(folder)
    np.save(folder / "latents.npy", np.array([{}]), allow_pickle=True)
    with pytest.raises(UserError, match="cannot be read"):
        LatentSource(folder)
    with pytest.raises(UserError, match="nd-jax data latents"):
        LatentSource(tmp_path)


# ---- several sizes in one step


def test_sizes_trained_together_are_those_trained_apart():
    """The joint loss of two sizes is the mean of their own, weighted by columns, with the same rows and draws."""
    sizes = [(UNITS, HEIGHT, WIDTH), (UNITS - 1, HEIGHT, HEIGHT)]
    shared = {"schedule": SCHEDULE, "stats": STATS}
    shared |= {"text_length": tiny_system.TEXT_LENGTH, "clip_length": tiny_system.TEXT_LENGTH}
    joint_config = dataclasses.replace(CONFIG, batch=6, size_mix=(2, 1))
    joint = FlowRecipe(tiny_system.CONFIG, joint_config, sizes=sizes, **shared)
    assert joint.columns == (0, 2, 0, 2, 0, 2)
    assert joint.column_sizes == (0, 0, 0, 0, 1, 1)
    rng = np.random.Generator(np.random.Philox(5))
    batch = make_batch(6)
    del batch["latents"]
    for index, (size, count) in enumerate(zip(sizes, (4, 2), strict=True)):
        batch[f"latents_{index}"] = rng.standard_normal((count, *size, CHANNELS), np.float32)
    assert {name: x.shape for name, x in batch.items()} == {n: s.shape for n, s in joint.batch_spec().items()}
    draws = jax.device_get(joint.draws(jax.random.key(1)))
    params, losses = given(), []
    whole, _ = jax.jit(joint.loss)(params, {name: x[None] for name, x in batch.items()} | draws)

    for index, (start, stop) in enumerate(((0, 4), (4, 6))):
        config = dataclasses.replace(CONFIG, batch=2)
        alone = FlowRecipe(tiny_system.CONFIG, config, sizes=[sizes[index]], **shared)
        for first in range(start, stop, 2):
            rows = slice(first, first + 2)
            part = {name: x[rows][None] for name, x in batch.items() if not name.startswith("latents")}
            part["latents"] = batch[f"latents_{index}"][first - start : first - start + 2][None]
            part |= {name: draws[name][:, rows] for name in ("unit", "uniform", "corrupt")}
            part |= {name: draws[name][rows] for name in ("noise", "history")}
            losses.append(jax.jit(alone.loss)(params, part)[0])
    np.testing.assert_allclose(whole, np.mean(losses), rtol=1e-5)


def test_first_frames_alone_train_as_images():
    made = recipe(units=1, batch=4)
    assert all(envelope.clips == ((1, *envelope.size(envelope.stage)),) for envelope in made.envelopes)
    assert made.batch_spec()["latents"].shape == (4, 1, HEIGHT, WIDTH, CHANNELS)
    assert not np.asarray(made.draws(jax.random.key(0))["unit"]).any()
    with pytest.raises(UserError, match=r"size mix \(1, 1\) for latents of 3x4x8; expected a share"):
        recipe(size_mix=(1, 1))


def test_mixed_feed_deals_rows_to_columns_and_resumes():
    """Row r of the joint batch: first the columns of iterator 0, then those of iterator 1."""

    class Counting:
        def __init__(self, count, start):
            self.count, self.at = count, start

        def __next__(self):
            values = np.arange(self.at, self.at + self.count, dtype=np.int32)
            self.at += self.count
            return {"latents": values, "t5_ids": values[:, None], "caption": ["" for _ in values]}

        def get_state(self):
            return self.at

        def set_state(self, state):
            self.at = state

    feed = MixedFeed([Counting(4, 0), Counting(2, 100)], (2, 1), ("latents_0", "latents_1", "t5_ids"))
    batch = next(feed)
    assert batch["latents_0"].tolist() == [0, 1, 2, 3]
    assert batch["latents_1"].tolist() == [100, 101]
    assert batch["t5_ids"][:, 0].tolist() == [0, 1, 100, 2, 3, 101]
    state = json.loads(json.dumps(feed.get_state()))
    expected = next(feed)
    feed.set_state(state)
    np.testing.assert_array_equal(next(feed)["t5_ids"], expected["t5_ids"])
