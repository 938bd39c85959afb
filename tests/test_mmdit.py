"""What the diffusion transformer promises beyond the recordings: depths, patches, packing, hooks, errors."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import mmdit_golden
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from nd_jax.errors import UserError
from nd_jax.models import attention
from nd_jax.models.functional import count_parameters
from nd_jax.models.hooks import ShardingHooks
from nd_jax.models.mmdit import MMDiTConfig, definition, unstack
from nd_jax.models.positions import rope_tables

QUICK = {"xla_backend_optimization_level": 0}  # these programs run once: halve the time to compile them
SMALL = MMDiTConfig(
    sample_size=8,
    in_channels=4,
    num_layers=3,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=24,
    pooled_projection_dim=16,
    pos_embed_max_size=12,
)
TEXT = 5
CLIPS = (((2, 4, 8), (1, 4, 8)), ((1, 4, 8), (1, 8, 16)))


def draw_params(config: MMDiTConfig, seed: int = 0) -> dict:
    """Random parameters, zero nowhere."""
    rng = np.random.Generator(np.random.Philox(seed))
    return jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32) * 0.2, definition(config).abstract())


def draw_inputs(config: MMDiTConfig, clips=CLIPS[:1], batch: int = 2, seed: int = 1) -> tuple:
    """Positional arguments for groups of clips given as (frames, height, width), with padded text in odd rows."""
    rng = np.random.Generator(np.random.Philox(seed))
    rows = batch * len(clips)
    sample = [
        [rng.standard_normal((batch, *size, config.in_channels), np.float32) for size in group] for group in clips
    ]
    mask = np.ones((rows, TEXT), np.int32)
    mask[1::2, 3:] = 0
    layouts = [mmdit_golden.exact_layout(x, mask[g :: len(clips)], config.patch_size) for g, x in enumerate(sample)]
    width = config.joint_attention_dim if config.context_embedder else config.width
    text = rng.standard_normal((rows, TEXT, width), np.float32)
    pooled = rng.standard_normal((rows, config.pooled_projection_dim), np.float32)
    return sample, text, pooled, rng.uniform(0, 1000, rows).astype(np.float32), layouts


def run(config: MMDiTConfig, params: dict, inputs: tuple, *, dtype=jnp.float32, hooks=None, **options):
    *arrays, layouts = inputs
    network = definition(config, dtype=dtype, hooks=hooks)
    return jax.jit(lambda p, *a: network(p, *a, layouts, **options), compiler_options=QUICK)(params, *arrays)


def close(actual, expected, tolerance: float = 2e-5) -> bool:
    leaves = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    return all(x.shape == y.shape and np.abs(np.asarray(x) - np.asarray(y)).max() <= tolerance for x, y in leaves)


@pytest.mark.parametrize(
    ("layers", "context_embedder", "count"),
    [(18, False, 1_512_155_200), (24, False, 2_022_041_152), (24, True, 2_028_334_144)],
)
def test_full_size_parameter_counts(layers, context_embedder, count):
    config = MMDiTConfig(num_layers=layers, context_embedder=context_embedder)
    assert count_parameters(definition(config).abstract()) == count


def test_depth_is_read_from_the_parameters():
    params, inputs = draw_params(SMALL), draw_inputs(SMALL)
    other = replace(SMALL, num_layers=7)
    assert close(run(other, params, inputs), run(SMALL, params, inputs), 0)
    pruned = {**params, "blocks": jax.tree.map(lambda x: x[1:], params["blocks"])}
    predictions = run(SMALL, pruned, inputs)
    assert not close(predictions, run(SMALL, params, inputs), 1e-2)
    assert close(predictions, run(replace(SMALL, num_layers=2), pruned, inputs), 0)


def test_fresh_blocks_are_the_identity_at_every_depth():
    """adaLN-zero: a fresh network of any depth, one and no stacked blocks included, is its last block alone."""
    inputs, params = draw_inputs(SMALL), draw_params(SMALL)
    (alone,), states, influence = run(
        replace(SMALL, num_layers=1),
        {**params, "blocks": jax.tree.map(lambda x: x[:0], params["blocks"])},
        inputs,
        return_blocks=True,
        reducer=lambda image, *_: image.mean(),
    )
    assert states.image.shape == (0, 2, 24, 32)
    assert states.text.shape == (0, 2, TEXT, 32)
    assert influence.shape == (0,)
    for layers in (2, 3):
        fresh = jax.jit(definition(replace(SMALL, num_layers=layers)).init)(jax.random.key(0))
        assert close(run(SMALL, {**params, "blocks": fresh["blocks"]}, inputs), [alone])


def test_fresh_network_predicts_zero_and_can_learn():
    params, inputs = jax.jit(definition(SMALL).init)(jax.random.key(0)), draw_inputs(SMALL)
    assert close(run(SMALL, params, inputs), [np.zeros((2, 1, 4, 8, 4), np.float32)], 0)
    kernels = [x for path, x in jax.tree.leaves_with_path(params["blocks"]) if "kernel" in str(path)]
    assert sum(bool((x[0] != x[1]).any()) for x in kernels) == len(kernels) - 2  # all but the two modulations


def test_patch_size_one_equals_two_on_latents_folded_into_channels():
    coarse, fine = SMALL, replace(SMALL, patch_size=1, in_channels=16, sample_size=4)
    params, (sample, *rest) = draw_params(coarse), draw_inputs(coarse)

    def fold(x):
        b, t, h, w, c = x.shape
        x = x.reshape(b, t, h // 2, 2, w // 2, 2, c).transpose(0, 1, 2, 4, 3, 5, 6)
        return x.reshape(b, t, h // 2, w // 2, 4 * c)

    proj = params["pos_embed"]["proj"]
    folded = {**params, "pos_embed": {"proj": {**proj, "kernel": proj["kernel"].reshape(1, 1, 16, -1)}}}
    predictions = run(fine, folded, ([[fold(x) for x in clips] for clips in sample], *rest))
    assert close(predictions, [fold(np.asarray(x)) for x in run(coarse, params, (sample, *rest))])


def test_without_qk_norm_only_the_product_of_scales_matters():
    config, inputs = replace(SMALL, qk_norm=None), draw_inputs(SMALL)
    params = draw_params(config)
    assert not any("norm_q" in str(path) for path, _ in jax.tree.leaves_with_path(params))

    def scaled(factors):
        def scale(path, x):
            return x * next((f for name, f in factors.items() if name in str(path)), 1)

        return jax.tree.map_with_path(scale, params)

    expected = run(config, params, inputs)
    assert close(run(config, scaled({"q_proj": 2, "to_q": 2, "k_proj": 0.5, "to_k": 0.5}), inputs), expected)
    assert not close(run(config, scaled({"q_proj": 2, "to_q": 2}), inputs), expected, 1e-2)


def test_packed_groups_do_not_see_each_other():
    params, (sample, text, pooled, timestep, layouts) = draw_params(SMALL), draw_inputs(SMALL, CLIPS)
    packed = run(SMALL, params, (sample, text, pooled, timestep, layouts))
    for g in range(2):
        rows = slice(g, None, 2)
        alone = run(SMALL, params, ([sample[g]], text[rows], pooled[rows], timestep[rows], [layouts[g]]))
        assert close([packed[g]], alone)


def test_reducer_sees_what_return_blocks_returns():
    params, inputs = draw_params(SMALL), draw_inputs(SMALL, CLIPS)

    def changes(image_in, image_out, text_in, text_out):
        return {"image": jnp.abs(image_out - image_in).max(), "text": jnp.abs(text_out - text_in).max()}

    plain = run(SMALL, params, inputs)
    predictions, states, reduced = run(SMALL, params, inputs, return_blocks=True, reducer=changes)
    assert close(predictions, plain)
    assert states.image.shape == (2, 2, 24 + 40, 32)
    assert states.text.shape == (2, 4, TEXT, 32)
    assert states.last_image.shape == (2, 24 + 40, 32)
    for name in ("image", "text"):
        x = getattr(states, name)
        assert reduced[name].shape == (2,)
        assert close(reduced[name][1], jnp.abs(x[1] - x[0]).max())


def test_remat_changes_no_gradient():
    params, (*arrays, layouts) = draw_params(SMALL), draw_inputs(SMALL)
    network = definition(SMALL)

    def gradients(remat):
        loss = lambda p: jnp.square(network(p, *arrays, layouts, remat=remat)[0]).mean()  # noqa: E731
        return jax.jit(jax.grad(loss), compiler_options=QUICK)(params)

    expected = gradients(None)
    assert close(gradients("full"), expected)
    assert close(gradients("dots"), expected)


def test_unstacked_blocks_give_the_same():
    params, inputs = draw_params(SMALL), draw_inputs(SMALL)
    options = {"return_blocks": True, "reducer": lambda image, *_: image.mean()}
    separate = unstack(params)
    assert isinstance(jax.tree.leaves(separate["blocks"], is_leaf=lambda x: isinstance(x, tuple))[0], tuple)
    assert close(run(SMALL, separate, inputs, **options), run(SMALL, params, inputs, **options))


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))


def split(mesh, tree):
    """Every array split over its last axis, as far as that divides."""

    def put(x):
        spec = [None] * (x.ndim - 1) + (["fsdp"] if x.shape[-1] % 8 == 0 else [None])
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))

    return jax.tree.map(put, tree)


def test_hooks_shard_batch_and_weights_without_changing_the_result(mesh):
    names, dtypes, paths = [], [], []

    def activation(x, name):
        names.append(name)
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec("fsdp")))

    def weights(w, name):
        paths.append(name)
        dtypes.append(w.dtype)
        return jax.lax.with_sharding_constraint(w, NamedSharding(mesh, PartitionSpec()))

    params, inputs = draw_params(SMALL), draw_inputs(SMALL, batch=8)
    hooks = ShardingHooks(activation=activation, weights=weights)
    sharded = run(SMALL, split(mesh, params), inputs, hooks=hooks)
    assert close(sharded, run(SMALL, params, inputs))
    assert set(names) == {"image", "text", "projected", "heads", "seen", "whole"}
    assert {"attn/to_q/kernel", "ff/up/bias", "linear/kernel", "kernel"} <= set(paths)
    dtypes.clear()
    *arrays, layouts = inputs
    jax.eval_shape(lambda p: definition(SMALL, dtype=jnp.bfloat16, hooks=hooks)(p, *arrays, layouts), params)
    assert dtypes.count(jnp.bfloat16) == 1 + 14 + 11 + 2  # patches, a block, the last block, the head


def test_gathered_weights_are_not_kept_for_the_backward_pass(mesh):
    """The scan would stack them, and every device hold the whole network."""
    params, (*arrays, layouts) = split(mesh, draw_params(SMALL)), draw_inputs(SMALL)
    shape = params["blocks"]["ff"]["up"]["kernel"].shape
    whole = NamedSharding(mesh, PartitionSpec())
    hooks = ShardingHooks(weights=lambda w, name: jax.lax.with_sharding_constraint(w, whole))
    network = definition(SMALL, hooks=hooks)
    loss = lambda p: network(p, *arrays, layouts)[0].mean()  # noqa: E731
    kept = jax.jit(lambda p: jax.tree.leaves(jax.vjp(loss, p)[1]), compiler_options=QUICK)(params)
    kernels = [x for x in kept if x.shape == shape]
    assert kernels
    assert not any(x.sharding.is_fully_replicated for x in kernels)


@pytest.mark.parametrize("masked", [False, True])
def test_heads_one_by_one_equal_heads_together(monkeypatch, masked):
    rng = np.random.Generator(np.random.Philox(3))
    q, k, v = (rng.standard_normal((2, n, 3, 8), np.float32) for n in (5, 9, 9))
    mask = (rng.uniform(size=(2, 5, 9)) < 0.5) | (np.arange(9) == 0) if masked else np.ones((1, 5, 9), bool)

    def outputs():
        loss = lambda *x: jnp.square(attention.attend(*x, mask)).sum()  # noqa: E731
        return attention.attend(q, k, v, mask), jax.grad(loss, argnums=(0, 1, 2))(q, k, v)

    together = outputs()
    jax.clear_caches()
    monkeypatch.setattr(attention, "IN_CACHE", 0)
    assert close(outputs(), together, 1e-5)
    weights = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None])
    assert close(together[0].reshape(weights.shape), weights, 1e-5)


def test_rotary_tables_are_exact_far_from_zero():
    times = np.array([[0, 7, 199, 1000, 4095]], np.int32)
    angles = times[..., None] * 10000.0 ** -(np.arange(0, 64, 2) / 64)
    cosines, sines = rope_tables(times, 64)
    assert close((cosines, sines), (np.cos(angles), np.sin(angles)), 5e-7)


def test_config_reads_official_files_and_refuses_what_it_lacks():
    official = replace(SMALL, context_embedder=True, qk_norm=None).to_dict()
    assert MMDiTConfig.from_dict(official).to_dict() == official
    loose = {**official, "use_t5_mask": False, "use_temporal_causal": False, "interp_condition_pos": False}
    assert MMDiTConfig.from_dict(loose).to_dict() == official  # the teacher's loader overrides its file
    student = SMALL.to_dict()
    assert not MMDiTConfig.from_dict({**student, "use_temporal_causal": False}).use_temporal_causal
    for key, value in (
        ("_class_name", "FluxTransformer"),
        ("pos_embed_type", "rope"),
        ("use_t5_mask", False),
        ("qk_norm", "l2"),
        ("num_layers", 0),
        ("attention_head_dim", 7),
        ("patch_size", "2"),
    ):
        with pytest.raises(UserError, match=str(value)):
            MMDiTConfig.from_dict({**student, key: value})
    with pytest.raises(UserError, match="1152"):
        MMDiTConfig.from_dict({**official, "caption_projection_dim": 1152})


def test_inputs_that_do_not_fit_are_refused():
    params, (sample, text, pooled, timestep, layouts) = draw_params(SMALL), draw_inputs(SMALL)
    call = partial(definition(SMALL), params)
    short = SimpleNamespace(times=layouts[0].times[:, 1:], segments=layouts[0].segments)
    for arguments, message in (
        ((sample, text[..., :-1], pooled, timestep, layouts), "text has shape"),
        ((sample, text, pooled[:1], timestep, layouts), "pooled has shape"),
        ((sample, text, pooled, timestep[:, None], layouts), "timestep has shape"),
        ((sample, text, pooled, timestep, layouts * 2), "2 layouts"),
        (([[sample[0][0], sample[0][1][:, :, :3]]], text, pooled, timestep, layouts), "multiples of 2"),
        (([[sample[0][0][:1], sample[0][1]]], text, pooled, timestep, layouts), r"expected \[2, T"),
        ((sample, text, pooled, timestep, [short]), "layout times of group 0"),
    ):
        with pytest.raises(UserError, match=message):
            call(*arguments)
    with pytest.raises(UserError, match="remat is 'some'"):
        call(sample, text, pooled, timestep, layouts, remat="some")
