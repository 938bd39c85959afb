"""Reading compiled programs: operations, trip counts, bytes on the wire and in memory, against numbers made by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from nd_jax.planning.bounds import Bounds, bounds, extents
from nd_jax.planning.chips import parse_topology
from nd_jax.planning.compiled import needed_gib
from nd_jax.planning.hlo import parse, trip_count
from nd_jax.planning.hlo_flops import program_flops
from nd_jax.planning.hlo_memory import program_bytes
from nd_jax.planning.hlo_wire import Collective, by_kind, collectives
from nd_jax.planning.traced import traced_flops
from nd_jax.training.mesh import MeshConfig, make_mesh

MESH = make_mesh(MeshConfig(data=2, fsdp=4))


def array(*shape, dtype=jnp.float32, spec=None):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=None if spec is None else NamedSharding(MESH, spec))


def compiled(function, *arguments, **options):
    return parse(jax.jit(function, **options).lower(*arguments).compile().as_text())


# ---- operations


def test_a_product_in_a_loop_counts_as_often_as_it_runs():
    def function(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    given, unknown = (array(8, 16), array(7, 16, 16)), []
    assert program_flops(compiled(function, *given), unknown) == 7 * 2 * 8 * 16 * 16
    assert not unknown
    assert traced_flops(function, *given) == 7 * 2 * 8 * 16 * 16


def test_loops_in_loops_and_gradients():
    def function(x, w):
        def outer(x, _):
            return jax.lax.fori_loop(0, 3, lambda _, x: jnp.tanh(x @ w), x), None

        return jax.lax.scan(outer, x, None, length=5)[0].sum()

    given, one = (array(8, 16), array(16, 16)), 2 * 8 * 16 * 16
    assert program_flops(compiled(function, *given)) == 15 * one
    gradient = jax.grad(function, argnums=(0, 1))
    assert traced_flops(gradient, *given) == 3 * 15 * one
    assert program_flops(compiled(gradient, *given)) == 3 * 15 * one


@pytest.mark.parametrize("turned", [False, True])
def test_of_branches_the_largest_counts(turned):
    """As in progressive distillation, whose teacher is guided in the first round only: twice the work of the rest."""

    def function(x, w, many):
        few, most = (lambda: jnp.tanh(x @ w)), (lambda: jnp.tanh(jnp.tanh(jnp.tanh(x @ w) @ w) @ w))
        return jax.lax.cond(many, *((few, most) if turned else (most, few)))

    given = array(8, 16), array(16, 16), jax.ShapeDtypeStruct((), bool)
    unknown, one = [], 2 * 8 * 16 * 16
    assert program_flops(compiled(function, *given), unknown) == 3 * one
    assert traced_flops(function, *given) == 3 * one
    assert not unknown


def test_recomputation_is_counted():
    def function(w, x):
        body = jax.checkpoint(lambda x: jnp.tanh(jnp.tanh(x @ w) @ w))
        return jax.lax.scan(lambda x, _: (body(x), None), x, None, length=4)[0].sum()

    one = 2 * 8 * 16 * 16
    given = array(16, 16), array(8, 16)
    # Forward 2, again only the first product and the second's argument, backward 4; no gradient of x is asked for,
    # but all but the first layer need it.
    found = program_flops(compiled(jax.grad(function), *given))
    assert found == traced_flops(jax.grad(function), *given)
    assert found >= 4 * (2 + 1 + 3) * one


@pytest.mark.parametrize(("stride", "padding", "pairs"), [(1, "VALID", 6 * 3), (1, "SAME", 8 * 3 - 2), (2, "VALID", 9)])
def test_convolutions_count_only_what_meets_data(stride, padding, pairs):
    def function(x, k):
        return jax.lax.conv_general_dilated(x, k, (stride,), padding, dimension_numbers=("NWC", "WIO", "NWC"))

    found = program_flops(compiled(function, array(2, 8, 4), array(3, 4, 5)))
    assert found == 2 * pairs * 2 * 4 * 5


# ruff: disable[E501]
TPU = """
HloModule jit_step

%fused (param_0: bf16[24,160,64]) -> f32[24,160,32] {
  %param_0 = bf16[24,160,64]{2,1,0:T(8,128)(2,1)S(1)} parameter(0)
  %param_1 = bf16[24,32,64]{2,1,0:T(8,128)(2,1)} parameter(1)
  ROOT %convolution-base-dilated.5 = f32[24,160,32]{1,2,0:T(8,128)} convolution(%param_0, %param_1), window={size=24 stride=23 lhs_dilate=24}, dim_labels=0bf_0oi->0bf, metadata={op_name="a(b)"}
}

%gather (param_2: bf16[1536,576]) -> bf16[1536,9216] {
  %param_2 = bf16[1536,576]{0,1:T(8,128)(2,1)S(1)} parameter(0)
  %all-gather.1 = bf16[1536,9216]{0,1:T(8,128)(2,1)} all-gather(%param_2), channel_id=9, replica_groups=mesh['axis_0'=1,'axis_1'=16] {'axis_1'}, dimensions={1}
  ROOT %custom-call.1 = (bf16[1536,576]{0,1}, bf16[1536,9216]{0,1}, u32[]{:S(2)}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart", backend_config={"odd": "
}
%not_a_computation = nonsense {
"}
}

%body (arg: (s32[], bf16[24,160,64], bf16[24,32,64])) -> (s32[], bf16[24,160,64], bf16[24,32,64]) {
  %arg = (s32[]{:T(128)}, bf16[24,160,64]{2,1,0}, bf16[24,32,64]{2,1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%arg), index=0
  %x = bf16[24,160,64]{2,1,0} get-tuple-element(%arg), index=1
  %y = bf16[24,32,64]{2,1,0} get-tuple-element(%arg), index=2
  %two = s32[]{:T(128)} constant(2)
  %next = s32[]{:T(128)} add(%i, %two)
  %product = f32[24,160,32]{1,2,0:T(8,128)} fusion(%x, %y), kind=kOutput, calls=%fused
  ROOT %out = (s32[]{:T(128)}, bf16[24,160,64]{2,1,0}, bf16[24,32,64]{2,1,0}) tuple(%next, %x, /*index=2*/%y)
}

%condition (arg.1: (s32[], bf16[24,160,64], bf16[24,32,64])) -> pred[] {
  %limit = s32[]{:T(128)} constant(23)
  %arg.1 = (s32[]{:T(128)}, bf16[24,160,64]{2,1,0}, bf16[24,32,64]{2,1,0}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%arg.1), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i.1, %limit), direction=LT
}

ENTRY %main (p: bf16[24,160,64], q: bf16[24,32,64], r: bf16[1536,576]) -> bf16[24,160,64] {
  %p = bf16[24,160,64]{2,1,0} parameter(0)
  %q = bf16[24,32,64]{2,1,0} parameter(1)
  %r = bf16[1536,576]{0,1} parameter(2)
  %one = s32[]{:T(128)} constant(1)
  %start = (s32[]{:T(128)}, bf16[24,160,64]{2,1,0}, bf16[24,32,64]{2,1,0}) tuple(%one, %p, %q)
  %loop = (s32[]{:T(128)}, bf16[24,160,64]{2,1,0}, bf16[24,32,64]{2,1,0}) while(%start), condition=%condition, body=%body
  %begin = (bf16[1536,576]{0,1}, bf16[1536,9216]{0,1}, u32[]{:S(2)}) fusion(%r), kind=kCustom, calls=%gather
  %finish = (bf16[1536,576]{0,1}, bf16[1536,9216]{0,1}, u32[]{:S(2)}) fusion(%r), kind=kCustom, calls=%gather
  %permute = (bf16[4,8]{1,0}, bf16[4,8]{1,0}, u32[]{:S(2)}) collective-permute-start(%s), channel_id=3, source_target_pairs={{0,1},{1,0}}
  %s = bf16[4,8]{1,0} constant({...})
  ROOT %done = bf16[24,160,64]{2,1,0} get-tuple-element(%loop), index=1
}
"""
# ruff: enable[E501]


def test_the_text_of_a_tpu_program():
    """Batched products as convolutions with holes, loops without a noted count, collectives in flight told twice."""
    module = parse(TPU)
    main = module.computations["main"]
    assert trip_count(module, main, main.operations["loop"]) == 11  # (23 - 1) / 2
    assert program_flops(module) == 11 * 2 * 24 * 160 * 32 * 64
    found = collectives(module, 16)
    assert by_kind(found) == {"all-gather": 1536 * 576 * 2 * 15, "collective-permute": 4 * 8 * 2}
    assert next(c for c in found if c.kind == "all-gather").members == tuple(range(16))


# ---- the wire


def test_all_gather_and_reduce_scatter_of_weights():
    """fsdp=4: every device receives the other three quarters; gradients come back in slices."""
    whole = NamedSharding(MESH, P())

    def function(x, w):
        return x @ jax.lax.with_sharding_constraint(w, whole)

    module = compiled(function, array(16, 64, spec=P(("data", "fsdp"))), array(64, 32, spec=P("fsdp", None)))
    found = collectives(module, 8)
    assert by_kind(found) == {"all-gather": 3 * 16 * 32 * 4}
    assert len(found[0].members) == 4


def test_all_reduce_in_a_loop():
    def function(x, w):
        def body(x, w):
            total = jax.lax.with_sharding_constraint(x @ w, NamedSharding(MESH, P("data", None)))
            return jax.lax.with_sharding_constraint(total, NamedSharding(MESH, P("data", "fsdp"))), None

        return jax.lax.scan(body, x, w)[0]

    module = compiled(
        function, array(8, 64, spec=P("data", "fsdp")), array(5, 64, 64, spec=P(None, "fsdp", None)), out_shardings=None
    )
    # Each device holds 4 x 64 sums of its part of the contraction.
    kinds = by_kind(collectives(module, 8))
    assert kinds.get("all-reduce", 0) + kinds.get("reduce-scatter", 0) > 0
    if "all-reduce" in kinds:
        assert kinds["all-reduce"] == pytest.approx(5 * 4 * 64 * 4 * 2 * 3 / 4)


def group_of(text: str) -> tuple[int, ...]:
    from nd_jax.planning.hlo_wire import group

    module = parse(
        f"ENTRY %m (a: f32[8]) -> f32[8] {{\n  %a = f32[8]{{0}} parameter(0)\n  ROOT %r = f32[8]{{0}} {text}\n}}\n"
    )
    return group(module.computations["m"].operations["r"], 8)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("all-reduce(%a), replica_groups={{0,2},{1,3}}, to_apply=%add", (0, 2)),
        ("all-reduce(%a), replica_groups=[2,4]<=[8], to_apply=%add", (0, 1, 2, 3)),
        ("all-reduce(%a), replica_groups=[4,2]<=[2,4]T(1,0), to_apply=%add", (0, 4)),
        ("all-reduce(%a), replica_groups=mesh['x'=2,'y'=4] {'x'}, to_apply=%add", (0, 4)),
        (
            "all-reduce(%a), replica_groups=mesh['x'=4,'y'=2], device_ids=([2,4]T(1,0)) {'x'}, to_apply=%add",
            (0, 1, 2, 3),
        ),
        ("all-reduce(%a), replica_groups={}, to_apply=%add", tuple(range(8))),
        ("collective-permute(%a), source_target_pairs={{3,1},{1,3}}", (3, 1)),
    ],
)
def test_groups_in_every_spelling(text, expected):
    assert group_of(text) == expected


# ---- memory


def test_bytes_of_a_product_are_its_operands_and_its_result():
    module = compiled(lambda x, w: x @ w, array(128, 256), array(256, 64))
    assert program_bytes(module) == 4 * (128 * 256 + 256 * 64 + 128 * 64)


def test_a_loop_reads_its_slice_and_not_the_whole_stack():
    def function(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    moved = program_bytes(compiled(function, array(64, 64), array(50, 64, 64)))
    assert 50 * 64 * 64 * 4 * 2 < moved < 50 * 64 * 64 * 4 * 12


def test_a_slice_is_read_and_not_what_it_is_cut_from():
    """Inside a fusion, in a fusion inside that, and where a TPU fetches it ahead into vector memory: its start names
    operand, slice, context."""
    array, part = "f32[100,8]{1,0}", "f32[10,8]{1,0}"
    text = f"""%cut (p: {array[:10]}) -> f32[10,8] {{
  %p = {array} parameter(0)
  %s = {part} slice(%p), slice={{[0:10], [0:8]}}
  ROOT %n = {part} negate(%s)
}}

%outer (q: {array[:10]}) -> f32[10,8] {{
  %q = {array} parameter(0)
  %c = {part} fusion(%q), kind=kLoop, calls=%cut
  ROOT %m = {part} negate(%c)
}}

ENTRY %main (x: f32[100,8]) -> f32[10,8] {{
  %x = {array} parameter(0)
  %f = {part} fusion(%x), kind=kLoop, calls=%cut
  %g = {part} fusion(%x), kind=kLoop, calls=%outer
  %start = (({array}), f32[10,8]{{1,0:S(1)}}, s32[]{{:S(2)}}) slice-start(%x), slice={{[0:10], [0:8]}}
  ROOT %done = f32[10,8]{{1,0:S(1)}} slice-done(%start)
}}
"""
    assert program_bytes(parse(text)) == 4 * 80 * (2 + 2 + 1), "read and written twice, then read into vector memory"


def test_what_a_compiler_refuses():
    assert needed_gib("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 31.26G of 15.75G hbm.") == 31.26
    assert needed_gib("Used 512.5M of 15.75G hbm") == pytest.approx(0.5005, abs=1e-4)
    assert needed_gib("something else") is None


# ---- slices and bounds


@pytest.mark.parametrize(
    ("name", "extent", "links"),
    [
        ("v5e:4x4", None, 2),  # no ring below sixteen
        ("v6e:16x16", None, 4),
        ("v6e:8x16", None, 3),
        ("v5p:4x4x8", None, 6),
        ("v5p:2x2x2", None, 3),
        ("v5p:4x4x8", (1, 1, 8), 2),  # along one whole ring
        ("v5p:4x4x8", (1, 1, 4), 1),  # along half of it
        ("v6e:16x16", (1, 1), 0),
    ],
)
def test_links_a_collective_can_use(name, extent, links):
    topology = parse_topology(name)
    assert topology.bandwidth(extent) == links * topology.chip.link_bandwidth


def test_bounds_add_up():
    topology = parse_topology("v5p:4x4x4")
    places = np.stack(np.unravel_index(np.arange(64), (4, 4, 4)), axis=1)
    assert extents((0, 1, 2, 3), places) == (1, 1, 4)
    found = [Collective("all-gather", 200e9, 1, (0, 1, 2, 3))]
    made = bounds(topology, 459e12 / 2, 2765e9 / 4, found, places)
    assert made == Bounds(0.5, 0.25, 1.0)
    assert (made.overlapped, made.serial, made.limit) == (1.0, 1.75, "wire")
    assert made.derated(0.5).compute == 1.0
    assert made.times(2) + made == Bounds(1.5, 0.75, 3.0)
