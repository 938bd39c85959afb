"""The diffusion transformer against recordings of the official one: predictions, block states, loss, gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import mmdit_golden
import numpy as np
import pytest
from safetensors.numpy import load_file

from nd_jax.models.mmdit import definition

TOLERANCE = 1e-4
GRADIENT_TOLERANCE = 1e-5
SINGLE = ("a_single_t1", "a_single_t3", "a_bare_tensor")
INFERENCE = tuple(f"b_unit{unit}_stage{stage}" for unit in (1, 2, 4) for stage in (0, 1, 2))
SUBCASES = {
    "mmdit": (*SINGLE, *INFERENCE, "c_training"),
    "mmdit_teacher_pyramid_flow": ("b_unit3_stage0", "b_unit3_stage1", "b_unit3_stage2"),
    "mmdit_variant_layer_norm_qk": ("b_unit3_stage1", "b_unit3_stage2"),
    "mmdit_variant_no_causal": ("b_unit3_stage1", "b_unit3_stage2"),
    "mmdit_variant_no_interp": ("b_unit3_stage1", "b_unit3_stage2"),
}
ALL = [(case, name) for case, names in SUBCASES.items() for name in names]
BFLOAT16_TOLERANCE = 0.06
BFLOAT16 = [("mmdit", "c_training"), *((case, names[-1]) for case, names in SUBCASES.items() if case != "mmdit")]


def run(case, name: str, *, dtype=jnp.float32, **options):
    """Network outputs and recorded outputs of one subcase."""
    config, params = mmdit_golden.load(case)
    inputs, outputs = case.subcase(name)
    *arrays, layouts = mmdit_golden.call_arguments(inputs, config.patch_size)
    network = definition(config, dtype=dtype)
    return jax.jit(lambda p, *a: network(p, *a, layouts, **options))(params, *arrays), outputs


def largest_error(actual, expected) -> float:
    assert actual.shape == expected.shape
    return float(np.abs(np.asarray(actual, np.float32) - expected).max())


def prediction_errors(predictions, outputs) -> list[float]:
    expected = mmdit_golden.sequence(outputs, "pred")
    return [largest_error(x, mmdit_golden.channels_last(y)) for x, y in zip(predictions, expected, strict=True)]


@pytest.mark.parametrize(("case", "name"), ALL)
def test_predictions(golden, case, name):
    predictions, outputs = run(golden(case), name)
    assert max(prediction_errors(predictions, outputs)) <= TOLERANCE


@pytest.mark.parametrize("name", ["b_unit2_stage2", "c_training"])
def test_block_states(golden, name):
    (predictions, states), outputs = run(golden("mmdit"), name, return_blocks=True)
    assert max(prediction_errors(predictions, outputs)) <= TOLERANCE
    assert len(states.image) == len(states.text) == 2
    for k in range(2):
        assert largest_error(states.image[k], outputs[f"blocks/{k}/image"]) <= TOLERANCE
        assert largest_error(states.text[k], outputs[f"blocks/{k}/text"]) <= TOLERANCE
    assert largest_error(states.last_image, outputs["blocks/2/image"]) <= TOLERANCE


def test_training_loss_and_gradients(golden):
    case = golden("mmdit")
    config, params = mmdit_golden.load(case)
    *arrays, layouts = mmdit_golden.call_arguments(case.subcase("c_training")[0], config.patch_size)
    inputs, outputs = case.subcase("c_training_grads")
    targets = [mmdit_golden.channels_last(x) for x in mmdit_golden.sequence(inputs, "target")]
    network = definition(config)

    def loss(params):
        predictions = network(params, *arrays, layouts)
        errors = [jnp.square(x - y).mean(axis=(1, 2, 3, 4)) for x, y in zip(predictions, targets, strict=True)]
        per_sample = jnp.concatenate(errors)
        return per_sample.mean(), per_sample

    (value, per_sample), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    assert largest_error(value, outputs["loss"]) <= GRADIENT_TOLERANCE
    assert largest_error(per_sample, outputs["loss_per_sample"]) <= GRADIENT_TOLERANCE

    torch_named = {name[len("grad/") :]: x for name, x in outputs.items() if name.startswith("grad/")}
    assert len(torch_named) > 50
    for name, expected in torch_named.items():
        actual = mmdit_golden.torch_view(gradients, name, config.num_layers)
        assert largest_error(actual, expected) <= GRADIENT_TOLERANCE
    for name, expected in outputs.items():
        if name.startswith("grad_norm/"):
            actual = mmdit_golden.torch_view(gradients, name[len("grad_norm/") :], config.num_layers)
            assert abs(np.linalg.norm(actual) - expected) <= GRADIENT_TOLERANCE


@pytest.mark.parametrize(("case", "name"), BFLOAT16)
def test_bfloat16_stays_near(golden, case, name):
    predictions, outputs = run(golden(case), name, dtype=jnp.bfloat16)
    assert all(x.dtype == jnp.bfloat16 for x in predictions)
    assert TOLERANCE < max(prediction_errors(predictions, outputs)) <= BFLOAT16_TOLERANCE


@pytest.mark.parametrize("case", SUBCASES)
def test_position_table_is_the_stored_one(golden, case):
    config, _ = mmdit_golden.load(golden(case))
    stored = load_file(golden(case).folder / "weights.safetensors")["pos_embed.pos_embed"]
    assert config.position_table().dtype == stored.dtype
    assert config.position_table().shape == stored.shape
    assert config.position_table().tobytes() == stored.tobytes()


@pytest.mark.parametrize("case", SUBCASES)
def test_golden_tree_is_the_networks(golden, case):
    config, params = mmdit_golden.load(golden(case))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, definition(config).abstract())
    assert config.to_dict() == golden(case).config
