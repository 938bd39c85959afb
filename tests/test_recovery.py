"""Feature matching after pruning: every term by hand, what is trained and what is frozen, and the chain of stages."""

from __future__ import annotations

import dataclasses
import os
import signal
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_system
import training_toy as toy
from jax.sharding import Mesh
from test_recipes_flow import HEIGHT, SCHEDULE, STATS, UNITS, WIDTH, make_batch, one_row

from nd_jax import cli, workflow
from nd_jax.converters.component import save_component
from nd_jax.data.latents import write_latents
from nd_jax.errors import UserError
from nd_jax.models.mmdit import definition
from nd_jax.models.system import CODEC, DENOISER, TEXT_PARTS, TextTokens, encode_text
from nd_jax.pyramid.layout import exact_layout
from nd_jax.recipes.flow_matching import FlowRecipeConfig
from nd_jax.recipes.preset import FlowRun, Preset, RecoveryRun, load_preset
from nd_jax.recipes.pruning import remove_blocks
from nd_jax.recipes.recovery import RecoveryRecipe, RecoveryRecipeConfig, matched_blocks, row_mean, token_errors
from nd_jax.recovery_workflow import check_pair, recover
from nd_jax.system import TOKENIZERS, latent_stats
from nd_jax.training.checkpoint import load_tree
from nd_jax.training.hooks import sharding_hooks
from nd_jax.training.loop import Every, LoopConfig, train
from nd_jax.training.mesh import MeshConfig, make_mesh
from nd_jax.training.metrics import read_metrics
from nd_jax.training.optim import OptimConfig
from nd_jax.training.paths import named_leaves
from nd_jax.training.program import Program
from nd_jax.training.sharding import Rules
from nd_jax.workflow import without_blocks

LAYERS = 5
DROP, KEPT = (1, 3), (0, 2, 4)
TEACHER_CONFIG = dataclasses.replace(tiny_system.CONFIG.diffusion_transformer, num_layers=LAYERS)
STUDENT = dataclasses.replace(
    tiny_system.CONFIG, diffusion_transformer=dataclasses.replace(TEACHER_CONFIG, num_layers=len(KEPT))
)
TEACHER = tiny_system.random_params(definition(TEACHER_CONFIG), seed=9)
RECIPE = RecoveryRecipeConfig(
    batch=2,
    stage_mix=(1, 0, 1),
    image_weight=0.5,
    text_weight=2.0,
    teacher_weight=0.25,
    data_weight=1.5,
    optim=OptimConfig(learning_rate=3e-3, warmup_steps=1, schedule="constant"),
)


def student() -> dict:
    """What is left of the teacher, moved a little, and text encoders."""
    _, left, kept = remove_blocks(TEACHER_CONFIG, TEACHER, DROP)
    assert kept == KEPT
    moved = jax.tree.map(lambda x: np.asarray(x) * np.float32(1.05), left)
    text = {name: params for name, params in tiny_system.random_system_params().items() if name in TEXT_PARTS}
    return {**text, DENOISER: moved}


def recipe(mesh: Mesh | None = None, kept=KEPT, **changes) -> RecoveryRecipe:
    return RecoveryRecipe(
        STUDENT,
        dataclasses.replace(RECIPE, **changes),
        kept=kept,
        schedule=SCHEDULE,
        stats=STATS,
        sizes=[(UNITS, HEIGHT, WIDTH)],
        text_length=tiny_system.TEXT_LENGTH,
        clip_length=tiny_system.TEXT_LENGTH,
        hooks=None if mesh is None else sharding_hooks(mesh, Rules(minimum=0)),
    )


# ---- the loss


def test_partners_of_every_block():
    """Of 24 blocks with six removed: the same block, or the one before the next that was kept."""
    assert matched_blocks((0, 2, 3, 7), "simple") == (0, 2, 3)
    assert matched_blocks((0, 2, 3, 7), "next") == (1, 2, 6)
    whole = tuple(range(24))
    assert matched_blocks(whole, "simple") == matched_blocks(whole, "next") == whole[:-1]


def test_massive_activations_do_not_outweigh_the_rest():
    """One token a thousand times as large, off by the same share as the others."""
    rng = np.random.Generator(np.random.Philox(0))
    teacher = rng.standard_normal((3, 8)).astype(np.float32)
    teacher[1] *= 1000
    plain, relative = (np.asarray(token_errors(1.1 * teacher, teacher, normalise)) for normalise in (False, True))
    assert plain[1] > 1e5 * plain[0]
    np.testing.assert_allclose(relative, 0.01, rtol=1e-4)
    np.testing.assert_allclose(row_mean(jnp.array([[1.0, 2.0, 9.0]] * 2), jnp.array([[1, 1, 0], [0, 0, 0]])), [1.5, 0])


@pytest.mark.parametrize(("mapping", "partners", "normalise"), [("simple", (0, 2), False), ("next", (1, 3), True)])
def test_every_term_is_that_of_every_row_on_its_own(mapping, partners, normalise):
    """Padded, packed and batched against exact, alone and by hand; neither padded text nor padded history counts."""
    made, batch, params = recipe(mapping=mapping, normalise=normalise), make_batch(2), student()
    draws = jax.device_get(made.draws(jax.random.key(7))) | {"unit": np.array([[2, 1]], np.int32)}
    examples = {name: x[None] for name, x in batch.items()} | draws
    loss, metrics = jax.jit(made.loss)(params, examples, {DENOISER: TEACHER})

    tokens = TextTokens(*(batch[name] for name in TextTokens._fields))
    conditions = jax.jit(lambda params: encode_text(made.definitions, params, tokens))(params)
    denoise = jax.jit(partial(made.definitions[DENOISER], return_blocks=True))
    found: dict[str, list[float]] = {name: [] for name in ("image", "text", "teacher", "data")}
    for row, stage in enumerate(made.columns):
        clips, target, timestep = one_row(examples, 0, row, stage)
        mask = batch["t5_mask"][row] > 0
        layout = exact_layout([clip.shape[:3] for clip in clips], batch["t5_mask"][row : row + 1], 1)
        clips = [clip[None].astype(np.float32) for clip in clips]
        inputs = [clips], conditions.text[row : row + 1], conditions.pooled[row : row + 1], jnp.full(1, timestep)
        (own, states), (wanted, teacher) = (
            jax.device_get(denoise(p, *inputs, [layout])) for p in (params[DENOISER], TEACHER)
        )
        current = clips[-1].shape[2] * clips[-1].shape[3]
        pairs = [(states.image[k, 0], teacher.image[partner, 0]) for k, partner in enumerate(partners)]
        pairs.append((states.last_image[0, -current:], teacher.last_image[0, -current:]))
        squares = [np.square(a - b).mean(-1) / ((b * b).mean(-1) if normalise else 1) for a, b in pairs]
        found["image"].append(np.mean([each.mean() for each in squares]))
        cosines = []
        for k, partner in enumerate(partners):
            a, b = states.text[k, 0][mask], teacher.text[partner, 0][mask]
            cosines.append(1 - (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1))
        found["text"].append(np.mean(cosines))
        found["teacher"].append(np.square(own[0] - wanted[0]).mean())
        found["data"].append(np.square(own[0][0] - target).mean())
    for name, values in found.items():
        np.testing.assert_allclose(metrics["match"][name], np.mean(values), rtol=2e-4, err_msg=name)
    weights = {"image": 0.5, "text": 2.0, "teacher": 0.25, "data": 1.5}
    np.testing.assert_allclose(loss, sum(w * np.mean(found[name]) for name, w in weights.items()), rtol=2e-4)
    for stage, value in zip((0, 2), found["data"], strict=True):
        np.testing.assert_allclose(metrics["flow"][f"stage_{stage}"], value, rtol=2e-4)


# ---- the state


def test_the_teacher_is_neither_trained_nor_averaged():
    """Traced, not run: the whole step, its metrics and what a checkpoint holds."""
    made = recipe()
    program = Program(made, make_mesh(MeshConfig(), jax.devices()[:1]), jax.random.key(0), (student(), TEACHER))
    terms = {f"match/{name}" for name in ("image", "text", "teacher", "data")}
    assert terms | {"loss", "flow/stage_0", "flow/stage_2", "optim/grad_norm"} <= set(program.metric_names)
    state = program.state
    assert set(state.params) == set(state.ema) == {DENOISER, *TEXT_PARTS}
    assert set(state.frozen) == {DENOISER}
    kernels = {name: leaf.shape[0] for name, leaf in named_leaves(state) if name.endswith("blocks/ff/up/kernel")}
    depths = {"frozen": LAYERS - 1, "params": 2, "ema": 2, "opt_state": 2}
    assert {name.split("/")[0] for name in kernels} == set(depths)
    assert all(depth == depths[name.split("/")[0]] for name, depth in kernels.items())
    assert not [name for name, _ in named_leaves(state.opt_state) if any(part in name for part in TEXT_PARTS)]

    alone = recipe(image_weight=0.0, text_weight=0.0)
    shapes = jax.eval_shape(lambda s: alone.step(s, made_batch(alone))[1], state)
    assert set(shapes["match"]) == {"teacher", "data"}


def made_batch(made: RecoveryRecipe) -> dict:
    return jax.tree.map(lambda spec: jnp.zeros(spec.shape, spec.dtype), made.batch_spec())


def test_a_frozen_teacher_rests_in_the_compute_dtype():
    """Only what the network casts anyway: timesteps are embedded in float32."""
    frozen = jax.eval_shape(recipe(dtype="bfloat16").init, jax.random.key(0), student(), TEACHER).frozen
    dtypes = {name: leaf.dtype for name, leaf in named_leaves(frozen[DENOISER])}
    halves = {name for name, dtype in dtypes.items() if dtype == jnp.bfloat16}
    assert {"blocks/attn/to_q/kernel", "pos_embed/proj/kernel", "proj_out/kernel"} & dtypes.keys() <= halves
    assert "blocks/ff/up/kernel" in halves
    assert not [name for name in halves if name.startswith("time_text_embed") or not name.endswith("kernel")]


@pytest.mark.heavy
def test_eight_devices_agree_with_one():
    """Student and teacher split four ways, examples eight ways."""
    mesh, batch, key = make_mesh(MeshConfig(data=2, fsdp=4)), make_batch(16), jax.random.key(5)
    answers = []
    for devices in (None, mesh):
        made = recipe(devices, batch=16, normalise=True)
        made.rules = dataclasses.replace(made.rules, minimum=1000)

        def grads(params, frozen, batch, key, made=made):
            rows = made.config.batch // len(made.columns)
            examples = {name: x.reshape(rows, -1, *x.shape[1:]) for name, x in batch.items()} | made.draws(key)
            return made._grads(params, examples, frozen)

        if devices is None:
            answers.append(jax.device_get(jax.jit(grads)(student(), {DENOISER: TEACHER}, batch, key)))
            continue
        program = Program(made, mesh, key, (student(), TEACHER))
        places = jax.tree.map(lambda leaf: leaf.sharding, (program.state.params, program.state.frozen))
        assert not places[1][DENOISER]["blocks"]["ff"]["up"]["kernel"].is_fully_replicated
        params, frozen = jax.device_put((student(), {DENOISER: TEACHER}), places)
        spread = jax.jit(grads, out_shardings=(places[0], None))
        answers.append(jax.device_get(spread(params, frozen, program.put(batch), key)))
    (expected, numbers), (found, others) = answers
    for (name, one), other in zip(named_leaves(numbers), jax.tree.leaves(others), strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-5, err_msg=name)
    assert all(np.any(g) for g in jax.tree.leaves(expected[DENOISER]["blocks"]))
    for (name, one), other in zip(named_leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-3, atol=1e-5 * np.abs(one).max() + 1e-7, err_msg=name)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"kept": (0, 2)}, "kept blocks"),
        ({"kept": (2, 0, 4)}, "ascending"),
        ({"train_text": True}, "--recipe.train-text"),
        ({"image_weight": -1.0}, "weights"),
        ({"image_weight": 0.0, "text_weight": 0.0, "teacher_weight": 0.0, "data_weight": 0.0}, "weights"),
    ],
)
def test_settings_that_cannot_be(changes, told):
    with pytest.raises(UserError, match=told):
        recipe(**changes)


def test_a_teacher_of_another_depth_is_refused():
    with pytest.raises(UserError, match="a teacher of 5 blocks, the student was cut out of one of 6"):
        jax.eval_shape(recipe(kept=(0, 2, 5)).init, jax.random.key(0), student(), TEACHER)


# ---- full size


def test_the_paper_step_lowers_at_full_size():
    """18 of 24 blocks over 60 000 steps, by shapes alone: nothing is allocated or compiled."""
    preset = load_preset("neodragon_320p")
    run, network = preset.run("recovery_2"), preset.system.diffusion_transformer
    assert (run.stage1.loop.steps, run.loop.steps) == (300, 60_000)
    small = dataclasses.replace(network, num_layers=18)
    system = dataclasses.replace(preset.system, diffusion_transformer=small)
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    made = RecoveryRecipe(
        system,
        run.recipe,
        kept=sorted(set(range(24)) - {2, 7, 9, 12, 15, 20}),
        schedule=preset.schedule,
        stats=latent_stats(preset.system.causal_video_vae),
        sizes=[preset.latent_size],
        text_length=preset.video.text_length,
        clip_length=preset.video.clip_length,
        hooks=sharding_hooks(mesh),
    )
    given = {name: made.definitions[name].abstract() for name in (*TEXT_PARTS, DENOISER)}
    program = Program(made, mesh, jax.random.key(0), (given, definition(network).abstract()))
    assert {"match/image", "match/text", "match/teacher", "match/data"} <= set(program.metric_names)
    step = jax.jit(made.step, donate_argnums=0).lower(program.state, program.batch)
    assert "while" in step.as_text(), "blocks run in a loop"
    assert program.state.frozen[DENOISER]["blocks"]["ff"]["up"]["kernel"].shape == (23, 1536, 6144)
    assert program.state.params[DENOISER]["blocks"]["ff"]["up"]["kernel"].shape == (17, 1536, 6144)


# ---- the chain


@pytest.fixture(scope="module")
def chain(tiny, tiny_folder, tmp_path_factory):
    """Function (folder) -> how two stages of three steps ended, on six tiny clips; programs compiled once."""
    folder = tmp_path_factory.mktemp("chain")
    rng = np.random.Generator(np.random.Philox(0))
    latents = rng.standard_normal((6, 2, 8, 8, 4), np.float32)
    write_latents(folder / "latents", [latents], [[f"a red ball {n}"] for n in range(6)])
    config = dataclasses.replace(tiny.config, diffusion_transformer=TEACHER_CONFIG)
    teacher = dataclasses.replace(tiny, config=config, params={**tiny.params, DENOISER: TEACHER})
    pruned, _ = without_blocks(teacher, DROP)
    save_component(folder / "codec", tiny.config.causal_video_vae, tiny.params[CODEC])
    loop = LoopConfig(steps=3, save_every=0, mesh=MeshConfig(data=1, fsdp=1))
    first = FlowRecipeConfig(batch=2, stage_mix=(1, 0, 1), train_text=False, optim=RECIPE.optim)
    run = RecoveryRun(FlowRun(first, loop), RECIPE, loop)
    preset = Preset("tiny", config, tiny_system.VIDEO, tiny_system.PLAN, {"recovery_2": run})
    options = {
        "latents": folder / "latents",
        "codec_folder": folder / "codec",
        "tokenizers": {name: tiny_folder / "tokenizers" / name for name in TOKENIZERS.values()},
        "quiet": True,
    }

    def go(out, **changes):
        return recover(preset, "recovery_2", run, out, start=pruned, teacher=teacher, **options | changes)

    one_device = make_mesh(MeshConfig(), jax.devices()[:1])
    with pytest.MonkeyPatch.context() as patch, toy.compiled_once(tmp_path_factory.mktemp("compiled")):
        patch.setattr(workflow, "make_mesh", lambda config: one_device)
        yield go


@pytest.mark.heavy
def test_interruptions_in_either_stage_cannot_be_seen(chain, tmp_path, monkeypatch):
    """Ctrl-C in the middle of each stage; the same command then goes on where it was."""
    outcome, system = chain(tmp_path / "whole")
    assert (outcome.finished, outcome.step) == (True, 3)
    assert system.kept_blocks == KEPT
    assert (tmp_path / "whole" / "stage1" / "system" / "pruning.json").exists()
    last = read_metrics(tmp_path / "whole" / "stage2")[-1]
    assert {"match/image", "match/text", "match/teacher", "match/data", "flow/stage_0"} <= last.keys()

    def strike(step, state):
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    struck = tmp_path / "struck"
    with monkeypatch.context() as patch:
        patch.setattr(workflow, "train", partial(train, callbacks=[Every(1, strike)]))
        outcome, nothing = chain(struck)
        assert (outcome.reason, outcome.step, nothing) == ("SIGINT", 2, None)
        assert not (struck / "stage2").exists()
        patch.setattr(workflow, "train", strike_in_second(strike))
        outcome, nothing = chain(struck)
        assert (outcome.reason, outcome.step, nothing) == ("SIGINT", 2, None)
        assert (struck / "stage1" / "system").exists()
    outcome, again = chain(struck)
    assert outcome.finished
    for stage in ("stage1", "stage2"):
        for part in ("params", "ema", "opt_state"):
            found, expected = (toy.numbers(load_tree(tmp_path / run / stage, part)) for run in ("struck", "whole"))
            toy.assert_same(found, expected)
    toy.assert_same(toy.numbers(again.params), toy.numbers(system.params))
    frozen = toy.numbers(load_tree(struck / "stage2", "frozen"))
    toy.assert_same(frozen, toy.numbers({DENOISER: TEACHER}))


def strike_in_second(strike):
    """``train`` that is struck in the second stage only."""

    def run(recipe, *arguments, **options):
        callbacks = [Every(1, strike)] if isinstance(recipe, RecoveryRecipe) else []
        return train(recipe, *arguments, callbacks=callbacks, **options)

    return run


def test_the_second_stage_alone(chain, tmp_path):
    """For the table: without the first stage it begins with the pruned blocks themselves."""
    outcome, system = chain(tmp_path / "alone", alone=True)
    assert outcome.finished
    assert system.kept_blocks == KEPT
    assert not (tmp_path / "alone" / "stage1").exists()


def test_systems_that_do_not_belong_together(tiny):
    pruned, _ = without_blocks(tiny, (1,))
    check_pair(pruned, tiny)
    with pytest.raises(UserError, match=r"pruning\.json is missing"):
        check_pair(dataclasses.replace(pruned, kept_blocks=None), tiny)
    with pytest.raises(UserError, match="a teacher of 2 blocks, the student was cut out of one of 3"):
        check_pair(pruned, pruned)
    text = {**tiny.params, "text_encoder": jax.tree.map(lambda x: x + 1, tiny.params["text_encoder"])}
    with pytest.raises(UserError, match="text_encoder is not the teacher's"):
        check_pair(pruned, dataclasses.replace(tiny, params=text))
    wider = dataclasses.replace(tiny.config.diffusion_transformer, patch_size=2)
    config = dataclasses.replace(tiny.config, diffusion_transformer=wider)
    with pytest.raises(UserError, match="diffusion_transformer is not the teacher's"):
        check_pair(pruned, dataclasses.replace(tiny, config=config))


def test_recovery_by_command(tiny_folder, tmp_path, capsys):
    """Both stages' settings are options; a folder that was not pruned is refused before anything runs."""
    system = str(tiny_folder / "system")
    train = ["train", "shapes_base", "recovery_2", "--out", str(tmp_path / "run"), "--teacher", system]
    train += ["--start", system, "--latents", str(tmp_path), "--recipe.mapping", "next", "--recipe.image-weight", "2"]
    assert cli.main([*train, "--stage1.loop.steps", "5", "--loop.steps", "7", "--alone"]) == 2
    assert "pruning.json is missing" in capsys.readouterr().err
    assert cli.main([*train, "--recipe.mapping", "other"]) == 2
    assert "--recipe.mapping" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
