"""Splash attention against dense attention under the same layouts, in interpret mode: values and gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters import partial_eval
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from test_mesh_axes import EVERYTHING, NETWORK, make_batch
from test_mesh_axes import recipe as make_recipe

from nd_jax.errors import UserError
from nd_jax.models.attention import Placed, attend, causal_mask
from nd_jax.models.kernel_work import scope
from nd_jax.models.mmdit import definition
from nd_jax.models.splash import splash_attention, visited_pairs
from nd_jax.models.system import DENOISER
from nd_jax.planning.hlo import parse
from nd_jax.planning.hlo_flops import kernels_flops, program_flops
from nd_jax.planning.traced import traced_flops
from nd_jax.pyramid.layout import Envelope, layout_arrays
from nd_jax.training.hooks import sharding_hooks, splash_on
from nd_jax.training.mesh import MeshConfig, make_mesh

TEXT = 10
MASK = np.array([[1] * 4 + [0] * 6, [1] * 10], np.int32)


def layouts():
    """Of stages 0 and 2 at units 2 and 1, 2 rows, one of them with padded text."""
    pairs = [(Envelope(0, 2, TEXT, 8, 16, 1), 2), (Envelope(2, 1, TEXT, 8, 16, 1), 1)]
    return [layout_arrays(envelope, unit, MASK) for envelope, unit in pairs]


def placed(groups, counts):
    """The last tokens of every group."""
    parts = [slice(len(group.fixed) - n, None) for group, n in zip(groups, counts, strict=True)]
    pairs = list(zip(groups, parts, strict=True))
    segments = jnp.concatenate([jnp.asarray(group.segments)[:, part] for group, part in pairs], axis=1)
    return Placed(places([group.fixed[part] for group, part in pairs]), segments)


def places(times):
    """Group and time of every token, from the times of each group."""
    return np.array([(group, time) for group, each in enumerate(times) for time in each], np.int32)


def test_fixed_times_are_the_layouts_times():
    for layout in layouts():
        assert layout.fixed == tuple(np.asarray(layout.times[0]).tolist())
    assert layout_arrays(Envelope(0, 2, TEXT, 8, 16, 1), jnp.int32(2), MASK).fixed is None


@pytest.mark.parametrize("last", [False, True])
def test_kernel_and_dense_attention_agree(last):
    """Of all groups in one sequence; with ``last`` only the last tokens of each group ask, as in the last block."""
    groups, heads, dim = layouts(), 2, 8
    lengths = [layout.times.shape[1] for layout in groups]
    asking = tuple(n // 3 if last else n for n in lengths)
    rng = np.random.Generator(np.random.Philox(5))
    q = rng.standard_normal((2, sum(asking), heads, dim), np.float32)
    k, v = (rng.standard_normal((2, sum(lengths), heads, dim), np.float32) for _ in range(2))
    weight = rng.standard_normal((2, sum(asking), heads * dim), np.float32)

    def dense(q, k, v):
        out, asked, start = [], 0, 0
        for layout, n, length in zip(groups, asking, lengths, strict=True):
            mask = causal_mask(layout.times, layout.segments)[:, -n:]
            keys = slice(start, start + length)
            out.append(attend(q[:, asked : asked + n], k[:, keys], v[:, keys], mask))
            asked, start = asked + n, start + length
        return jnp.concatenate(out, axis=1)

    def sparse(q, k, v):
        asked, known = (placed(groups, counts) for counts in (asking, lengths))
        return splash_attention(q, k, v, asked, known, interpret=True)

    def both(attention):
        out, pull = jax.vjp(attention, q, k, v)
        return (out, *pull(weight))

    for found, expected in zip(jax.jit(lambda: both(sparse))(), jax.jit(lambda: both(dense))(), strict=True):
        np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-5)


def test_tiles_between_groups_and_of_the_future_are_skipped():
    early, late = (0,) * 600, (0,) * 512 + (1,) * 512
    alone, both, whole = places([late]), places([early, late]), places([(0,) * 1624])
    assert visited_pairs(alone, alone) < 1152 * 1152
    assert visited_pairs(both, both) < visited_pairs(whole, whole)


@pytest.mark.heavy
def test_a_training_step_is_the_same_with_the_kernel():
    """Loss and gradients of exact layouts, on one device and on four with tokens split, dense and splash."""

    def gradients(mesh: Mesh, attention: str):
        made = make_recipe(mesh, batch=24, every_unit=True)
        hooks = sharding_hooks(mesh, EVERYTHING, attention=attention)
        made.definitions[DENOISER] = definition(NETWORK, hooks=hooks)
        params = jax.jit(made.init)(jax.random.key(0)).params
        # A fresh network's gates are closed and hide attention.
        params[DENOISER] = jax.tree.map(lambda x: x + 0.05, params[DENOISER])
        batch = make_batch(made.batch_spec())
        groups = len(made.columns)
        examples = {n: x.reshape(-1, groups, *x.shape[1:]) for n, x in batch.items()} | made.draws(jax.random.key(1))
        return jax.jit(made._grads)(params, examples)

    alone = make_mesh(MeshConfig(), jax.devices()[:1])
    expected = jax.device_get(gradients(alone, "dense"))
    for mesh in (alone, make_mesh(MeshConfig(fsdp=2, context=2), jax.devices()[:4])):
        found = jax.device_get(gradients(mesh, "splash"))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4), found, expected)


def test_the_kernel_needs_exact_layouts():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with pytest.raises(UserError, match=r"expected --recipe\.every-unit with it"):
        make_recipe(mesh, attention="splash")
    made = make_recipe(mesh, every_unit=True, batch=24)
    assert made.columns == (0, 2) * 3
    assert made.column_units == ((0,),) * 2 + ((1,),) * 2 + ((2,),) * 2
    drawn = jax.eval_shape(made.draws, jax.random.key(0))
    assert [envelope.units for envelope in made.envelopes] == [0, 0, 1, 1, 2, 2]
    assert drawn["unit"].shape == (4, 6)
    drawn = jax.jit(lambda key: made.draws(key)["unit"])(jax.random.key(0))
    np.testing.assert_array_equal(drawn, [[0, 0, 1, 1, 2, 2]] * 4)


@pytest.mark.parametrize(("remat", "forward"), [("none", 1), ("dots", 1), ("full", 2)])
def test_what_is_kept_of_the_kernel(remat, forward):
    """Its forward pass runs again in the backward pass only where nothing is kept. Programs of both kinds of block."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    made = make_recipe(mesh, batch=6, every_unit=True, remat=remat)
    made.definitions[DENOISER] = definition(NETWORK, hooks=sharding_hooks(mesh, attention="splash"))
    params = jax.eval_shape(made.init, jax.random.key(0)).params
    batch = jax.eval_shape(lambda: {name: jnp.zeros(x.shape, x.dtype) for name, x in made.batch_spec().items()})

    def gradients(params, batch):
        examples = {name: x.reshape(1, 6, *x.shape[1:]) for name, x in batch.items()} | made.draws(jax.random.key(1))
        return made._grads(params, examples)

    traced = jax.make_jaxpr(gradients)(params, batch).jaxpr
    found, _ = partial_eval.dce_jaxpr(traced, [True] * len(traced.outvars))  # as a compiler drops what nobody reads
    assert str(found).count("= pallas_call[") == 2 * (forward + 2)


def test_the_kernels_operations_are_counted_by_their_tiles():
    """In a trace, forward and backward, and per layer of a loop: two and seven products over the visited tiles."""
    tokens, (batch, heads, dim) = places([(0,) * 600 + (1,) * 500]), (3, 2, 8)
    one = 2 * batch * heads * dim * visited_pairs(tokens, tokens)
    array = jax.ShapeDtypeStruct((batch, 1100, heads, dim), jnp.float32)
    every = Placed(tokens, jnp.zeros((1, 1100), jnp.int32))

    def attention(q, k, v):
        return splash_attention(q, k, v, every, every)

    def layers(q, k, v):
        def body(x, _):
            return attention(x, k, v).reshape(x.shape), None

        return jax.lax.scan(body, q, None, length=4)[0].sum()

    assert traced_flops(attention, array, array, array) == 2 * one
    assert traced_flops(layers, array, array, array) == 4 * 2 * one
    outside = 2 * batch * heads * dim * 1152  # output times its gradient, a product beside the kernel
    assert traced_flops(jax.grad(layers), array, array, array) == 4 * ((2 + 7) * one + outside)


def test_the_kernels_operations_are_read_from_a_compiled_program():
    """The text of a custom call as a TPU compiler writes it: its name tells the tiles, other custom calls nothing."""
    name = f"jit(f)/transpose(jvp({scope(1000)}))/vmap(splash_mha_dkv_segmented_no_residuals)/pallas_call"
    call = 'custom-call(%p), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={\n'
    call += '"xprof_metadata":"{}"\n}}, metadata={op_name="'
    text = (
        "ENTRY %main (p: f32[8,8]) -> f32[8,8] {\n  %p = f32[8,8]{1,0} parameter(0)\n"
        f'  %a = f32[8,8]{{1,0}} {call}{name}"}}\n'
        f'  %b = f32[8,8]{{1,0}} {call}jit(f)/{scope(1000)}/splash_mha_fwd_segmented_residuals/pallas_call"}}\n'
        f'  %c = f32[8,8]{{1,0}} {call}jit(f)/other/pallas_call"}}\n'
        f'  %d = f32[8,8]{{1,0}} custom-call(%p), custom_call_target="x", metadata={{op_name="{name}"}}\n'
        "  ROOT %e = f32[8,8]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}\n}\n"
    )
    module = parse(text)
    assert kernels_flops(module) == 2 * 1000 * (4 + 2)
    assert program_flops(module) == 2 * 1000 * (4 + 2) + 2 * 8**3


@pytest.mark.heavy
@pytest.mark.libtpu
def test_a_compiler_keeps_the_name_that_tells_the_tiles():
    """The gradient of two layers on four chips that are not here: nine products a layer, split over the chips."""
    pytest.importorskip("libtpu")
    from nd_jax.planning.chips import parse_topology
    from nd_jax.planning.compiled import topology_devices

    mesh = make_mesh(MeshConfig(fsdp=4), topology_devices(parse_topology("v5e:2x2")))
    tokens, attention = places([(0,) * 300 + (1,) * 300]), splash_on(mesh)
    every = Placed(tokens, jnp.zeros((1, 600), jnp.int32))

    def layers(q, k, v):
        def body(x, _):
            return attention(x, k, v, every, every).reshape(x.shape), None

        return jax.lax.scan(body, q, None, length=2)[0].sum()

    array = jax.ShapeDtypeStruct((8, 600, 2, 64), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("fsdp")))
    program = jax.jit(jax.grad(layers, argnums=(0, 1, 2))).lower(array, array, array).compile()
    found = kernels_flops(parse(program.as_text()))
    assert found == 2 * (2 + 7) * 2 * (8 // 4) * 2 * 64 * visited_pairs(tokens, tokens)
