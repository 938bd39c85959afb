"""Meshes, the rules table and the constraints inside networks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from nd_jax.errors import UserError
from nd_jax.training.hooks import sharding_hooks
from nd_jax.training.mesh import MeshConfig, make_mesh
from nd_jax.training.optim import OptimConfig, make_optimizer
from nd_jax.training.paths import named_leaves
from nd_jax.training.sharding import Rule, Rules, batch_shardings, state_shardings
from nd_jax.training.state import TrainState

MESH = make_mesh(MeshConfig(data=2, fsdp=4))


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def test_mesh_axes_are_auto_and_fill_the_devices():
    assert dict(MESH.shape) == {"data": 2, "fsdp": 4}
    assert set(MESH.axis_types) == {AxisType.Auto}
    assert dict(make_mesh(MeshConfig(), jax.devices()[:3]).shape) == {"data": 1, "fsdp": 3}


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (MeshConfig(data=3), "fsdp: 8 devices do not divide by data=3"),
        (MeshConfig(data=2, fsdp=2), "data=2 x fsdp=2 needs 4 devices, found 8"),
        (MeshConfig(data=0), "axis data: size 0"),
        (MeshConfig(data=-1, fsdp=-1), "data and fsdp are both -1"),
    ],
)
def test_mesh_sizes_that_do_not_fit_name_the_axis(config, told):
    with pytest.raises(UserError, match=told):
        make_mesh(config)


@pytest.mark.parametrize(
    ("path", "sizes", "expected"),
    [
        ("proj/kernel", (64, 1024), P(None, "fsdp")),  # the largest dimension
        ("proj/kernel", (64, 256), P("fsdp", None)),  # slices of 16 rows are whole tiles, of 64 lanes are not
        ("proj/kernel", (60, 256), P(None, "fsdp")),  # no whole tiles: the largest dimension
        ("proj/kernel", (256, 256), P("fsdp", None)),  # the first of equals
        ("proj/kernel", (513, 64), P(None, "fsdp")),  # the largest that divides
        ("proj/kernel", (513, 65), P(None, None)),  # nothing divides
        ("proj/kernel", (64, 64), P(None, None)),  # too small to be worth it
        ("blocks/proj/kernel", (512, 64, 512), P(None, None, "fsdp")),  # layers are never split, however many
        ("up_blocks/0/conv/kernel", (3, 3, 3, 64, 512), P(None, None, None, None, "fsdp")),
        ("blocks/0/kernel", (512, 64), P("fsdp", None)),  # a list of modules has no layers axis
        ("norm/scale", (65536,), P(None)),
    ],
)
def test_default_table(path, sizes, expected):
    assert Rules().spec(path, sizes, MESH) == expected


def test_first_matching_rule_decides_and_dims_count_from_the_end():
    rules = Rules((Rule(r"to_q/kernel$", (None, "data")), Rule(r"whole/", whole=True), Rule(r"kernel$")), minimum=0)
    assert rules.spec("blocks/to_q/kernel", (6, 32, 64), MESH) == P(None, "fsdp", "data")
    assert rules.spec("to_q/kernel", (32, 64), MESH) == P("fsdp", "data")
    assert rules.spec("whole/kernel", (32, 64), MESH) == P(None, None)
    assert rules.spec("kernel", (32, 64), MESH) == P("fsdp", None), "slices of whole tiles"
    assert rules.spec("kernel", (12, 64), MESH) == P(None, "fsdp")


def test_axes_the_mesh_lacks_are_skipped():
    rules = Rules((Rule("kernel$", (("fsdp", "tensor"), None)),))
    assert rules.spec("kernel", (32, 64), MESH) == P("fsdp", None)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Rule("a", ("fsdp", "fsdp")), "'fsdp' stands in more than one dimension"),
        (lambda: Rule("a", (("data", "fsdp"), "data")), "'data' stands in more than one dimension"),
        (lambda: Rule("a", ("model",)), "unknown mesh axis 'model', expected one of"),
        (lambda: Rules().spec("blocks/attn/gate", (6, 8), MESH), "blocks/attn/gate: no sharding rule"),
        (lambda: Rules((Rule("a", ("fsdp",)),)).spec("a", (6,), MESH), r"a \[6\]: .* fsdp=4"),
        (lambda: Rules((Rule("a", ("fsdp", None, None)),)).spec("a", (8, 8), MESH), "names 3 dimensions"),
    ],
)
def test_rules_that_cannot_be_kept_are_errors(make, told):
    with pytest.raises(UserError, match=told):
        make()


@pytest.mark.parametrize("frozen", [False, True])
def test_optimizer_and_ema_are_split_like_the_parameters(frozen):
    rules = Rules((Rule(r"text/", label="frozen" if frozen else "slow"), *Rules().table), minimum=0)
    optimizer = make_optimizer(OptimConfig(), rules)

    def init(key):
        params = {"blocks": {"kernel": jnp.zeros((3, 8, 16))}, "text": {"kernel": jnp.zeros((8, 4))}}
        return TrainState.create(params, optimizer, key, ema=True, frozen={"kernel": jnp.zeros((4, 64))})

    state = jax.eval_shape(init, jax.random.key(0))
    specs = {name: sharding.spec for name, sharding in named_leaves(state_shardings(state, rules, MESH))}
    stacked = [spec for name, spec in specs.items() if name.endswith("blocks/kernel")]
    assert stacked == [P(None, None, "fsdp")] * 4  # params, mu, nu, ema
    assert [spec for name, spec in specs.items() if name.endswith("text/kernel")] == [P("fsdp", None)] * (
        4 - 2 * frozen
    )
    assert specs["frozen/kernel"] == P(None, "fsdp")
    assert specs["step"] == specs["key"] == P()


def test_a_state_leaf_that_nothing_covers_is_an_error():
    with pytest.raises(UserError, match="statistics/mean: no sharding rule"):
        state_shardings({"params": {"kernel": shape(8, 8)}, "statistics": {"mean": shape(5)}}, Rules(), MESH)


def test_batches_split_over_both_axes_or_say_why_not():
    shardings = batch_shardings({"x": shape(16, 3), "scale": shape(), "shared": shape(1, 5)}, MESH)
    assert [shardings[name].spec for name in ("x", "scale", "shared")] == [P(("data", "fsdp")), P(), P()]
    with pytest.raises(UserError, match=r"video \[12, 3\]: .* data=2 x fsdp=4; use a multiple of 8"):
        batch_shardings({"video": shape(12, 3)}, MESH)


def test_hooks_gather_weights_and_send_gradients_back_in_slices():
    hooks = sharding_hooks(MESH, Rules(minimum=0))
    seen = []

    def loss(w, x):
        whole = hooks.gather(w)
        x = hooks.constrain(x @ whole, "x")
        jax.debug.inspect_array_sharding(whole, callback=lambda s: seen.append(("w", s.is_fully_replicated)))
        jax.debug.inspect_array_sharding(x, callback=lambda s: seen.append(("x", s.shard_shape(x.shape))))
        return jnp.sum(x**2)

    w = jax.device_put(np.ones((8, 16), np.float32), NamedSharding(MESH, P(None, "fsdp")))
    x = jax.device_put(np.ones((16, 8), np.float32), NamedSharding(MESH, P(("data", "fsdp"))))
    grad = jax.jit(jax.grad(loss))(w, x)
    assert dict(seen) == {"w": True, "x": (2, 16)}
    assert grad.sharding.spec == P(None, "fsdp")
    np.testing.assert_array_equal(np.asarray(grad), 16 * 16.0)
    with pytest.raises(UserError, match=r"activation 'x' \[4, 16\]"):
        jax.eval_shape(loss, w, x[:4])


def test_hooks_do_nothing_on_one_device():
    hooks = sharding_hooks(Mesh(np.array(jax.devices()[:1]), ("data",)))
    assert hooks.activation is None
    assert hooks.weights is None
