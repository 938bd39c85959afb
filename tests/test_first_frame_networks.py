"""UNet, image VAE, latent-consistency walk and super-resolution: recorded outputs, sizes, names, switches."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN
from tiny_system import random_params

from nd_jax.converters.component import load_component, save_component
from nd_jax.converters.safetensors_io import read_tensors
from nd_jax.converters.safetensors_write import pending, write_checkpoint
from nd_jax.errors import UserError
from nd_jax.models import image_vae, quicksrnet, unet
from nd_jax.models.functional import count_parameters
from nd_jax.models.image_blocks import PixelAttention
from nd_jax.pixels import round_to_uint8
from nd_jax.pyramid.lcm import LCMSchedule
from nd_jax.verification.cases import Case
from nd_jax.verification.rows import Status
from nd_jax.verify import verify_case

PATTERNS = ("sdxl_unet*", "image_vae", "lcm_scheduler", "quicksrnet_*")
CASES = sorted(path.name for pattern in PATTERNS for path in GOLDEN.glob(pattern))


SLOW = ("sdxl_unet", "sdxl_unet_variant_symmetric")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.heavy if name in SLOW else ()) for name in CASES]
)
def test_golden(name):
    rows = list(verify_case(Case(GOLDEN / name, GOLDEN)))
    assert rows
    assert [row for row in rows if row.status is not Status.PASS] == []


@pytest.mark.heavy
@pytest.mark.parametrize("name", [name for name in CASES if name != "lcm_scheduler"])
def test_golden_in_bfloat16(name):
    rows = list(verify_case(Case(GOLDEN / name, GOLDEN, jnp.dtype("bfloat16"))))
    assert rows
    assert [row for row in rows if row.status is not Status.PASS] == []
    assert max(row.error for row in rows) > 1e-3  # it does compute in bfloat16


@pytest.mark.parametrize(
    ("definition", "expected"),
    [
        (unet.definition(unet.UNetConfig()), 1_331_334_404),
        (image_vae.definition(image_vae.ImageVAEConfig()), 83_653_863),
        (image_vae.definition(image_vae.ImageVAEConfig(), half="decoder"), 49_490_179 + 20),
        (quicksrnet.definition(quicksrnet.quicksrnet("small")), 22_860),
        (quicksrnet.definition(quicksrnet.quicksrnet("medium")), 50_604),
        (quicksrnet.definition(quicksrnet.quicksrnet("large")), 414_972),
    ],
    ids=["ssd-1b", "sdxl-vae", "sdxl-vae-decoder", "small", "medium", "large"],
)
def test_full_size_counts(definition, expected):
    assert count_parameters(definition.abstract()) == expected


def test_guidance_embedding_is_one_more_tensor():
    plain = count_parameters(unet.definition(unet.UNetConfig()).abstract())
    guided = unet.definition(unet.UNetConfig(time_cond_proj_dim=256)).abstract()
    assert count_parameters(guided) == plain + 256 * 320
    assert guided["time_embedding"]["cond_proj"]["kernel"].shape == (256, 320)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"attention_head_dim": [1, 2]}, "attention_head_dim"),
        ({"use_linear_projection": False}, "use_linear_projection"),
        ({"addition_embed_type": None}, "addition_embed_type"),
        ({"down_block_types": ["AttnDownBlock2D"] * 3}, "AttnDownBlock2D"),
        ({"transformer_layers_per_block": [1, [1, 2, 3], [2, 1]]}, r"\[1, 2, 3\]"),
        ({"transformer_layers_per_block": [1, [1, 10**9], [2, 1]]}, "1000 transformer blocks"),
        ({"reverse_transformer_layers_per_block": None}, "reverse_transformer_layers_per_block"),
        ({"attention_head_dim": [1, 2, 5]}, "number of heads"),
        ({"norm_num_groups": 5}, "norm_num_groups"),
    ],
)
def test_unet_configs_that_are_refused(change, told):
    config = json.loads((GOLDEN / "sdxl_unet" / "config.json").read_text())
    assert unet.UNetConfig.from_dict(config).norm_num_groups == 4
    with pytest.raises(UserError, match=told):
        unet.UNetConfig.from_dict(config | change)


def test_image_vae_under_old_names(tmp_path):
    folder = shutil.copytree(GOLDEN / "image_vae", tmp_path / "vae", ignore=shutil.ignore_patterns("*.npz", "meta*"))
    tensors = read_tensors(folder / "weights.safetensors")
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, array in tensors.items():
        for new, former in old.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{former}.")
        renamed[name] = array
    assert len(renamed.keys() - tensors.keys()) == 16
    (folder / "weights.safetensors").unlink()
    write_checkpoint(folder, "diffusion_pytorch_model", [pending(name, array) for name, array in renamed.items()])
    config, params = load_component(folder)
    save_component(tmp_path / "out", config, params)
    written = read_tensors(tmp_path / "out" / "diffusion_pytorch_model.safetensors")
    assert {name: array.tobytes() for name, array in written.items()} == {
        name: array.tobytes() for name, array in tensors.items()
    }


def test_attention_in_portions(monkeypatch):
    from nd_jax.models import image_blocks
    from nd_jax.models.functional import Definition

    network = Definition(lambda rngs: PixelAttention(8, 2, 1e-6, dtype=jnp.float32, rngs=rngs))
    params, x = random_params(network), np.random.default_rng(0).standard_normal((2, 6, 8, 8), np.float32)
    whole = network(params, x)
    monkeypatch.setattr(image_blocks, "QUERIES_AT_ONCE", 12)
    np.testing.assert_allclose(network(params, x), whole, atol=1e-5)
    assert "scan" in str(jax.make_jaxpr(network)(params, x))


def test_image_is_rounded_and_not_truncated():
    image = np.asarray([-2, -1, 2 * 0.499 / 255 - 1, 2 * 0.501 / 255 - 1, 2 * 254.6 / 255 - 1, 1, 2])
    np.testing.assert_array_equal(round_to_uint8(image), [0, 0, 0, 1, 255, 255, 255])
    with pytest.raises(UserError, match="not finite"):
        round_to_uint8(np.asarray([np.nan]))


def test_lcm_says_what_it_cannot_do():
    with pytest.raises(UserError, match="prediction_type"):
        LCMSchedule.from_dict({"prediction_type": "v_prediction"})
    with pytest.raises(UserError, match="5 steps out of 4"):
        LCMSchedule().timesteps(5)


@pytest.mark.parametrize("size", ["small", "medium", "large"])
def test_super_resolution_starts_as_nearest_upsampling(size):
    config = quicksrnet.quicksrnet(size)
    network = quicksrnet.definition(config)
    image = np.random.default_rng(1).random((1, 6, 8, 3), np.float32)
    params = quicksrnet.near_identity(config, random_params(network))
    np.testing.assert_allclose(network(params, image), image.repeat(2, 1).repeat(2, 2), atol=1e-6)
    grey = np.full((1, 16, 16, 3), 0.5, np.float32)
    features = np.clip(_conv(grey, params["cnn"]["0"]), 0, 1)[0, 8, 8]
    np.testing.assert_allclose(features, 0.5, atol=1e-5)
    last = params["anchor"]["net"] if config.use_ito_connection else params["conv_last"]
    assert np.count_nonzero(last["kernel"]) == 12
    assert all(
        np.count_nonzero(layer["kernel"][..., 3:]) > 27 for layer in params["cnn"].values()
    )  # the rest is random


def test_super_resolution_by_one_and_a_half():
    config = quicksrnet.QuickSRNetConfig(8, 2, 1.5, True)
    network = quicksrnet.definition(config)
    params = network.init(jax.random.key(0))
    assert network(params, np.zeros((1, 6, 8, 3), np.float32)).shape == (1, 9, 12, 3)
    with pytest.raises(UserError, match="even sides"):
        network(params, np.zeros((1, 5, 8, 3), np.float32))
    ramp = np.broadcast_to(np.linspace(0, 1, 8, dtype=np.float32)[None, None, :, None], (1, 6, 8, 3))
    made = np.asarray(network(quicksrnet.near_identity(config, params), ramp))
    np.testing.assert_allclose(made[0, 0, ::3, 0], ramp[0, 0, ::2, 0], atol=1e-6)
    with pytest.raises(UserError, match="use_ito_connection"):
        quicksrnet.near_identity(quicksrnet.QuickSRNetConfig(8, 2, 1.5, False), params)
    for bad in ({"scaling_factor": 5}, {"num_channels": 2}):
        with pytest.raises(UserError):
            quicksrnet.QuickSRNetConfig(**bad)


def test_super_resolution_sees_no_black_beyond_the_edge():
    """On a grey picture any network is grey up to its edge, and inside nothing changes."""
    config = quicksrnet.QuickSRNetConfig(6, 1)
    network, params = quicksrnet.definition(config), random_params(quicksrnet.definition(config))
    grey = np.full((1, 12, 10, 3), 0.5, np.float32)
    made = np.asarray(quicksrnet.enlarge(network, params, grey, config))
    assert made.shape == (1, 24, 20, 3)
    np.testing.assert_allclose(made, np.tile(made[:, 10:12, 10:12], (1, 12, 10, 1)), atol=1e-6)
    assert np.abs(np.asarray(network(params, grey)) - made).max() > 1e-3
    image = np.random.default_rng(3).random((1, 12, 12, 3), np.float32)
    inside = np.s_[:, 8:-8, 8:-8]
    np.testing.assert_allclose(
        quicksrnet.enlarge(network, params, image, config)[inside], network(params, image)[inside], atol=1e-6
    )
    odd = quicksrnet.QuickSRNetConfig(8, 0, 1.5, True)
    half = quicksrnet.definition(odd)
    assert quicksrnet.enlarge(half, random_params(half), image, odd).shape == (1, 18, 18, 3)


def test_super_resolution_layers_are_in_numeric_order():
    """Eleven layers and more: "10" must not come before "2"."""
    config = quicksrnet.quicksrnet("large")
    network = quicksrnet.definition(config)
    params = random_params(network)
    image = np.random.default_rng(2).random((1, 5, 7, 3), np.float32)
    x = jnp.asarray(image)
    for n in range(config.num_intermediate_layers + 1):
        layer = params["cnn"][str(2 * n)]
        x = jnp.clip(_conv(x, layer), 0, 1)
    x = jnp.clip(_conv(x, params["conv_last"]) + _conv(image, params["anchor"]["net"]), 0, 1)
    np.testing.assert_allclose(network(params, image), quicksrnet.depth_to_space(x, 2), atol=1e-6)


def _conv(x, layer):
    return (
        jax.lax.conv_general_dilated(x, layer["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        + layer["bias"]
    )
