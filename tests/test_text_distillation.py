"""The text-distillation recipe: what its loss adds up, its modes, its state on many devices and after a resume."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import text_teachers
from text_teachers import CONFIG, SYSTEM, batch, recipe, student_params

from nd_jax.errors import UserError
from nd_jax.models import context_adapter, t5
from nd_jax.models.functional import count_parameters
from nd_jax.models.mmdit import MMDiTConfig
from nd_jax.models.system import ADAPTER, T5
from nd_jax.models.t5 import t5_xxl
from nd_jax.recipes.lora import LoraConfig, init_lora, merge_lora
from nd_jax.recipes.preset import load_preset
from nd_jax.recipes.text_distillation import LORA, STUDENT, TEACHER, TextDistillRecipe, token_distances
from nd_jax.recipes.text_teacher import EMBEDDER, teacher_params
from nd_jax.training.mesh import MeshConfig, make_mesh
from nd_jax.training.paths import named_leaves
from nd_jax.training.program import Program

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def teacher():
    return teacher_params(SYSTEM, text_teachers.random_params())


def test_distances_are_what_they_say():
    rng = np.random.Generator(np.random.Philox(0))
    found, wanted = rng.standard_normal((2, 3, 4, 8), np.float32)
    squared, angle = token_distances(found, wanted)
    np.testing.assert_allclose(squared, np.mean((found - wanted) ** 2, -1), rtol=1e-5)
    cosine = (found * wanted).sum(-1) / np.linalg.norm(found, axis=-1) / np.linalg.norm(wanted, axis=-1)
    np.testing.assert_allclose(angle, 1 - cosine, atol=1e-6)
    gradient = jax.grad(lambda x: sum(map(jnp.sum, token_distances(x, wanted))))(jnp.zeros_like(wanted))
    assert np.isfinite(gradient).all()


def test_loss_is_over_valid_tokens_with_its_weights(teacher):
    """Against numpy, from the two networks' own outputs; what stands at padding changes nothing."""
    made = recipe(mse=2.0, cosine=0.5)
    state = jax.jit(made.init)(KEY, teacher, student_params())
    data = batch()
    padded = dict(data, t5_ids=np.where(data["t5_mask"] > 0, data["t5_ids"], 7).astype(np.int32))
    step = jax.jit(lambda state, data: made.step(state, data)[1])
    metrics, other = step(state, data), step(state, padded)
    wanted = made.teacher(state.frozen[TEACHER], data["t5_ids"], data["t5_mask"])
    found = made.student(state.params, state.frozen, data["t5_ids"], data["t5_mask"])
    squared, angle = (np.asarray(x)[data["t5_mask"] > 0].mean() for x in token_distances(found, wanted))
    np.testing.assert_allclose(metrics["term"]["mse"], squared, rtol=1e-5)
    np.testing.assert_allclose(metrics["term"]["cosine"], angle, rtol=1e-4)
    np.testing.assert_allclose(metrics["loss"], 2 * squared + 0.5 * angle, rtol=1e-5)
    power = np.square(np.asarray(wanted)[data["t5_mask"] > 0]).mean()
    np.testing.assert_allclose(metrics["relative"], squared / power, rtol=1e-5)
    np.testing.assert_allclose(other["loss"], metrics["loss"], rtol=1e-6)


@pytest.mark.parametrize("mode", ["replace", "extend"])
@pytest.mark.parametrize("encoder", ["frozen", "trained", "lora"])
def test_modes_train_what_they_say_and_learn(mode, encoder, teacher):
    made = recipe(mode=mode, encoder=encoder)
    first = jax.jit(made.init)(KEY, teacher, student_params(mode))
    trained = {"frozen": set(), "trained": {T5}, "lora": {LORA}}[encoder] | {ADAPTER}
    assert set(first.params) == set(first.ema) == trained
    kept = set() if encoder == "trained" else {STUDENT}
    assert set(first.frozen) == {TEACHER} | kept
    assert set(first.frozen[TEACHER]) == {T5, EMBEDDER}
    step, data, state, losses = jax.jit(made.step), batch(), first, []
    for _ in range(25):
        state, metrics = step(state, data)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.8 * losses[0]
    for name, leaf in named_leaves(first.params):
        moved = not np.array_equal(leaf, dict(named_leaves(state.params))[name])
        assert moved or name.endswith("embedding"), name
    jax.tree.map(np.testing.assert_array_equal, first.frozen, state.frozen)
    before, after = (made.networks(x.params, x.frozen)[T5] for x in (first, state))
    query = "encoder/block/layer/0/SelfAttention/q/kernel"
    same = np.array_equal(dict(named_leaves(before))[query], dict(named_leaves(after))[query])
    assert same == (encoder == "frozen")


def test_fresh_factors_change_nothing_and_only_what_matches_is_adapted():
    encoder = student_params()[T5]
    config = LoraConfig(rank=2, alpha=4.0, pattern="SelfAttention/[qv]/kernel$")
    lora = init_lora(config, encoder, KEY)
    names = [name for name, _ in named_leaves(lora)]
    assert {name.split("/")[-3] for name in names} == {"q", "v"}
    jax.tree.map(np.testing.assert_array_equal, merge_lora(config, encoder, lora), encoder)
    lora = jax.tree.map(jnp.ones_like, lora)
    merged, plain = (dict(named_leaves(x)) for x in (merge_lora(config, encoder, lora), encoder))
    for name, leaf in plain.items():
        change = 2 * 2.0 if "/q/" in name or "/v/" in name else 0.0  # alpha / rank times rank ones
        np.testing.assert_allclose(merged[name], leaf + change, rtol=1e-6)


@pytest.mark.parametrize("rank", [0, 16])
def test_factors_that_cannot_be(rank):
    with pytest.raises(UserError, match=f"rank {rank} for encoder/"):
        init_lora(LoraConfig(rank=rank), student_params()[T5], KEY)
    with pytest.raises(UserError, match="no kernel matches 'nowhere'"):
        init_lora(LoraConfig(pattern="nowhere"), student_params()[T5], KEY)


def test_accumulation_equals_the_big_batch(teacher):
    """Though parts of a batch have other numbers of valid tokens."""
    results = []
    for microbatches in (1, 4):
        made = recipe(microbatches=microbatches)
        state = jax.jit(made.init)(KEY, teacher, student_params())
        results.append(jax.jit(made.step)(state, batch())[1])
    assert len(set(batch()["t5_mask"].reshape(-1, 4, text_teachers.LENGTH).sum((0, 2)).tolist())) > 1
    for name, value in named_leaves(results[0]):
        np.testing.assert_allclose(dict(named_leaves(results[1]))[name], value, rtol=2e-5, atol=1e-7, err_msg=name)


def test_one_and_eight_devices_agree(teacher):
    results = []
    for sizes in ((1, 1), (2, 4)):
        made = recipe(encoder="lora")
        made.rules = dataclasses.replace(made.rules, minimum=0)
        mesh = make_mesh(MeshConfig(*sizes), jax.devices()[: sizes[0] * sizes[1]])
        program = Program(made, mesh, KEY, (teacher, student_params()))
        split = [leaf.sharding.spec for _, leaf in named_leaves(program.state) if "fsdp" in leaf.sharding.spec]
        assert len(split) > 10 or mesh.size == 1
        step, state = program.compile_step(), program.initial_state()
        for seed in range(3):
            state, packed = step(state, program.put(batch(seed)))
        results.append((np.asarray(packed), jax.tree.map(np.asarray, state.ema)))
    np.testing.assert_allclose(results[1][0], results[0][0], rtol=1e-4, atol=1e-6)
    for name, value in named_leaves(results[0][1]):
        np.testing.assert_allclose(dict(named_leaves(results[1][1]))[name], value, rtol=1e-4, atol=2e-6, err_msg=name)


def test_what_does_not_fit_is_refused(teacher):
    with pytest.raises(UserError, match=r"the adapter gives 16 channels, mode 'extend' expects 24"):
        recipe(mode="extend", adapter=text_teachers.adapter("replace"))
    other = dataclasses.replace(SYSTEM, text_encoder_3=dataclasses.replace(SYSTEM.text_encoder_3, vocab_size=300))
    with pytest.raises(UserError, match="256 embeddings and the teacher 300"):
        recipe(system=other)
    with pytest.raises(UserError, match="encoder is 'frozen' and starts from nothing"):
        recipe(encoder="frozen").init(KEY, teacher)
    with pytest.raises(UserError, match="teacher's context_embedder is not given"):
        recipe().init(KEY, {T5: teacher[T5]}, student_params())
    plain = dataclasses.replace(SYSTEM.diffusion_transformer, context_embedder=False)
    other = dataclasses.replace(SYSTEM, diffusion_transformer=plain)
    with pytest.raises(UserError, match="mode 'extend' and a denoiser without"):
        recipe(mode="extend", system=other)


def test_the_shapes_student_has_at_most_a_quarter_of_its_teachers_parameters():
    preset = load_preset("shapes_base")
    run = preset.run("text_student")
    denoiser = preset.system.diffusion_transformer
    whole = count_parameters(t5.definition(preset.system.text_encoder_3).abstract())
    whole += (denoiser.joint_attention_dim + 1) * denoiser.width
    own = count_parameters(t5.definition(run.encoder).abstract())
    own += count_parameters(context_adapter.definition(run.adapter).abstract())
    assert own <= whole / 4
    made = TextDistillRecipe(
        run.encoder, run.adapter, run.recipe, denoiser=denoiser, teacher=preset.system, text_length=36
    )
    assert made.config.cosine == CONFIG.cosine == 0.1


def test_the_full_size_step_lowers():
    """Of T5-XXL, in bfloat16, and the published student, on a mesh, without an array."""
    preset = load_preset("neodragon_320p")
    run = preset.run("text")
    system = dataclasses.replace(
        preset.system,
        text_encoder_3=t5_xxl(),
        context_adapter=None,
        diffusion_transformer=MMDiTConfig(num_layers=24, context_embedder=True),
    )
    made = TextDistillRecipe(
        run.encoder,
        run.adapter,
        run.recipe,
        denoiser=system.diffusion_transformer,
        teacher=system,
        text_length=preset.video.text_length,
    )
    teacher = {
        T5: t5.definition(t5_xxl()).abstract(),
        EMBEDDER: {
            "kernel": jax.ShapeDtypeStruct((4096, 1536), "float32"),
            "bias": jax.ShapeDtypeStruct((1536,), "float32"),
        },
    }
    program = Program(made, make_mesh(MeshConfig(data=2, fsdp=4)), KEY, (teacher, {T5: made.encoder.abstract()}))
    frozen = program.state.frozen
    assert count_parameters(frozen[TEACHER][T5]) == 4_762_310_656
    assert {leaf.dtype for leaf in jax.tree.leaves(frozen[TEACHER][T5])} == {jnp.dtype("bfloat16")}
    assert count_parameters(program.state.params) == 130_041_344
    share = sum(np.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(frozen)) / count_parameters(frozen)
    assert share < 0.251
    assert {"loss", "term/mse", "term/cosine"} <= set(program.metric_names)
    lowered = jax.jit(made.step).lower(program.state, program.batch)
    assert lowered.out_info[0].step.shape == ()
