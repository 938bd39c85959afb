"""All four mesh axes: one update of flow matching on meshes of 4 and 8 devices equals the one on a single device."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_mmdit
import tiny_system
from jax.sharding import PartitionSpec as P

from nd_jax.errors import UserError
from nd_jax.models.hooks import NO_HOOKS
from nd_jax.models.mmdit import MMDiTConfig, definition
from nd_jax.models.system import DENOISER
from nd_jax.pyramid.normalise import LatentStats
from nd_jax.pyramid.schedule import Schedule
from nd_jax.recipes.flow_matching import FlowRecipe, FlowRecipeConfig
from nd_jax.training.hooks import sharding_hooks
from nd_jax.training.mesh import MeshConfig, make_mesh
from nd_jax.training.optim import OptimConfig
from nd_jax.training.paths import named_leaves
from nd_jax.training.program import Program
from nd_jax.training.sharding import DEFAULT_RULES, Rules

NETWORK = dataclasses.replace(
    tiny_system.CONFIG.diffusion_transformer, num_attention_heads=4, attention_head_dim=4, num_layers=2
)
SYSTEM = dataclasses.replace(tiny_system.CONFIG, diffusion_transformer=NETWORK)
CONFIG = FlowRecipeConfig(
    batch=8,
    stage_mix=(1, 0, 1),
    train_text=False,
    remat="full",
    # Of a large epsilon, so that the first update is not the mere sign of the gradient.
    optim=OptimConfig(learning_rate=1e-2, warmup_steps=1, schedule="constant", eps=1e-2),
)
EVERYTHING = Rules(minimum=0)


def recipe(mesh, **changes):
    return FlowRecipe(
        SYSTEM,
        dataclasses.replace(CONFIG, **changes),
        schedule=Schedule(),
        stats=LatentStats(shift=0.1, scale=0.5, video_shift=(0.0, 0.1, 0.2, 0.3), video_scale=0.8),
        sizes=[(3, 4, 8)],
        text_length=tiny_system.TEXT_LENGTH,
        clip_length=tiny_system.TEXT_LENGTH,
        hooks=sharding_hooks(mesh, EVERYTHING),
        table=EVERYTHING.table,
    )


def make_batch(spec):
    rng = np.random.Generator(np.random.Philox(1))
    batch = {name: rng.integers(3, 200, s.shape, np.int32) for name, s in spec.items() if name != "latents"}
    batch["t5_mask"] = (np.arange(tiny_system.TEXT_LENGTH) < rng.integers(2, 12, (len(batch["t5_ids"]), 1))).astype(
        np.int32
    )
    return batch | {"latents": rng.standard_normal(spec["latents"].shape, np.float32)}


def one_update(sizes: MeshConfig, devices: int, **changes):
    """Parameters, averages, moments and metrics after an update, and where the parameters lie."""
    mesh = make_mesh(sizes, jax.devices()[:devices])
    made = recipe(mesh, **changes)
    made.rules = dataclasses.replace(made.rules, minimum=0)
    text = {k: v for k, v in tiny_system.random_system_params().items() if k.startswith(("text", "context"))}
    denoiser = definition(NETWORK).init(jax.random.key(4))
    program = Program(made, mesh, jax.random.key(0), (text | {DENOISER: denoiser},))
    state, metrics = program.compile_step()(program.initial_state(), program.put(make_batch(made.batch_spec())))
    numbers = {name: np.asarray(x) for name, x in named_leaves((state.params, state.ema, state.opt_state))}
    return numbers | {"metrics": np.asarray(metrics)}, dict(named_leaves(program.state.params))


@pytest.fixture(scope="module")
def alone():
    return one_update(MeshConfig(), 1)[0]


@pytest.mark.parametrize(
    ("sizes", "devices", "up", "down"),
    [
        pytest.param(
            *(MeshConfig(fsdp=2, context=2), 4),
            *(P(None, "fsdp", None), P(None, ("fsdp", "context"), None)),
            marks=pytest.mark.heavy,
        ),
        pytest.param(
            *(MeshConfig(data=2, fsdp=1, tensor=2), 4),
            *(P(None, None, "tensor"), P(None, "tensor", None)),
            marks=pytest.mark.heavy,
        ),
        (MeshConfig(fsdp=2, tensor=2, context=2), 8, P(None, "fsdp", "tensor"), P(None, "tensor", ("fsdp", "context"))),
    ],
)
def test_an_update_is_the_same_on_any_mesh(alone, sizes, devices, up, down):
    numbers, params = one_update(sizes, devices)
    assert params["diffusion_transformer/blocks/ff/up/kernel"].sharding.spec == up
    if down is not None:
        assert params["diffusion_transformer/blocks/ff/down/kernel"].sharding.spec == down
    assert numbers.keys() == alone.keys()
    for name, value in alone.items():
        np.testing.assert_allclose(numbers[name], value, rtol=2e-3, atol=2e-5, err_msg=name)
    assert numbers["metrics"].all()


def test_heads_of_zeros_fill_up_and_change_nothing(monkeypatch):
    """Six heads over tensor=2 and context=2: three in each half of the layer, a fourth made up for attention."""
    network = MMDiTConfig(8, 2, 4, 2, 4, 6, joint_attention_dim=24, pooled_projection_dim=16, pos_embed_max_size=12)
    monkeypatch.setattr(test_mmdit, "TEXT", 6)
    params = test_mmdit.draw_params(network)
    *arrays, layouts = test_mmdit.draw_inputs(network)
    seen = []

    def answers(hooks):
        def loss(params, arrays):
            answer = definition(network, hooks=hooks)(params, *arrays, layouts)[0]
            return jnp.mean(jnp.square(answer)), answer

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(params, arrays)

    hooks = sharding_hooks(make_mesh(MeshConfig(fsdp=2, tensor=2, context=2)), EVERYTHING)

    def noted(x, name):
        seen.append((name, x.shape))
        return hooks.activation(x, name)

    found, expected = answers(dataclasses.replace(hooks, activation=noted)), answers(NO_HOOKS)
    for (name, a), (_, b) in zip(named_leaves(found), named_leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5 * np.abs(b).max(), err_msg=name)
    assert {shape[2] for name, shape in seen if name == "heads"} == {8}
    assert {shape[2] for name, shape in seen if name == "seen"} == {24, 32}


def test_what_does_not_divide_is_told_by_axis():
    x = jax.ShapeDtypeStruct((8, 10, 6, 4), jnp.float32)
    hooks = sharding_hooks(make_mesh(MeshConfig(fsdp=2, tensor=4)))
    with pytest.raises(UserError, match=r"6 heads do not divide by mesh axes tensor=4"):
        jax.eval_shape(lambda x: hooks.constrain(x, "heads"), x)
    hooks = sharding_hooks(make_mesh(MeshConfig(fsdp=2, context=4)))
    with pytest.raises(UserError, match=r"'image' \[8, 10, 24\]: 10 tokens do not divide by mesh axes context=4"):
        jax.eval_shape(lambda x: hooks.constrain(x.reshape(8, 10, 24), "image"), x)
    with pytest.raises(UserError, match=r"to_q/kernel \[2, 6, 6\]: dimension 2 .* tensor=4"):
        DEFAULT_RULES.spec("blocks/attn/to_q/kernel", (2, 6, 6), make_mesh(MeshConfig(fsdp=2, tensor=4)))


def test_a_single_line_of_a_picture_for_each_device_is_refused():
    hooks = sharding_hooks(make_mesh(MeshConfig(fsdp=2, context=4)))
    few, enough = (jax.ShapeDtypeStruct((8, 3, lines, 6, 4), jnp.float32) for lines in (4, 8))
    assert jax.eval_shape(lambda x: hooks.constrain(x, "pixels"), enough).shape == enough.shape
    told = r"'pixels' \[8, 3, 4, 6, 4\]: 4 lines over mesh axis context=4 are one for each device.* smaller context"
    with pytest.raises(UserError, match=told):
        jax.eval_shape(lambda x: hooks.constrain(x, "pixels"), few)
