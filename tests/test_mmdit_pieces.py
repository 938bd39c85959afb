"""The parts of the diffusion transformer, each against its own recording."""

from __future__ import annotations

import jax.numpy as jnp
import mmdit_golden
import numpy as np
import pytest

from nd_jax.errors import UserError
from nd_jax.models.attention import causal_mask
from nd_jax.models.embeddings import PatchEmbed, TimeTextEmbed, sinusoid
from nd_jax.models.functional import Definition
from nd_jax.models.mmdit import MMDiTConfig
from nd_jax.models.mmdit_block import spread
from nd_jax.models.norms import AdaLayerNorm, RMSNorm, modulate
from nd_jax.models.positions import _by_product, apply_rope, axis_table, rope_tables, spatial_positions, table

POSITIONS = 1e-6
EMBEDDINGS = 2e-4
NORMS = 1e-5
TOKENS = 1e-4


@pytest.fixture(scope="module")
def pieces(golden):
    return golden("mmdit_pieces")


def error(actual, expected) -> float:
    assert actual.shape == expected.shape
    return float(np.abs(np.asarray(actual, np.float64) - expected).max())


def test_position_table(pieces):
    _, outputs = pieces.subcase("pos_embed_table")
    assert np.array_equal(table(64, 24, 8), outputs["table"])
    axis = axis_table(32, 24, 8)
    raw = outputs["raw_float64"].reshape(24, 24, 64)
    assert error(np.broadcast_to(axis[None], (24, 24, 32)), raw[..., :32]) <= POSITIONS
    assert error(np.broadcast_to(axis[:, None], (24, 24, 32)), raw[..., 32:]) <= POSITIONS


def test_full_size_position_table_rows(pieces):
    inputs, outputs = pieces.subcase("pos_embed_default_rows")
    config = MMDiTConfig()
    axis = axis_table(config.width // 2, config.pos_embed_max_size, config.base_size).astype(np.float32)
    y, x = divmod(inputs["row"], config.pos_embed_max_size)
    assert np.array_equal(np.concatenate([axis[x], axis[y]], axis=-1), outputs["values"])


CROPS = ["16x24_of_16x24", "8x12_of_16x24", "4x6_of_16x24", "4x6_of_8x12", "4x6_of_4x6", "6x10_of_16x14"]


@pytest.mark.parametrize("name", [*(f"crop_{crop}" for crop in CROPS), "crop_nointerp_8x12_of_16x24"])
def test_position_crops(pieces, name):
    inputs, outputs = pieces.subcase(name)
    size = (int(inputs["height"]) // 2, int(inputs["width"]) // 2)
    target = (int(inputs["ori_height"]) // 2, int(inputs["ori_width"]) // 2)
    target = target if pieces.meta["subcases"][name]["interp"] else size
    positions = spatial_positions(64, 24, 8, size, target)
    assert positions.shape == (*size, 64)
    assert error(positions.reshape(1, -1, 64), outputs["pos"]) <= POSITIONS


def test_a_clip_larger_than_the_position_table_is_refused():
    with pytest.raises(UserError, match=r"30 patches.*only 24.*pos_embed_max_size"):
        spatial_positions(64, 24, 8, (4, 4), (30, 4))


@pytest.mark.parametrize("dim", [16, 64])
def test_rotary_tables(pieces, dim):
    inputs, outputs = pieces.subcase(f"rope_dim{dim}")
    cosines, sines = rope_tables(inputs["ids"][..., 0].astype(np.int32), dim)
    rotation = np.stack([np.stack([cosines, -sines], -1), np.stack([sines, cosines], -1)], -2)
    assert error(rotation, outputs["rope"]) <= POSITIONS


def test_rotation(pieces):
    inputs, outputs = pieces.subcase("apply_rope")
    cosines, sines = (x[:, :, None] for x in rope_tables(inputs["ids"][..., 0].astype(np.int32), 16))
    for name in ("q", "k"):
        assert error(apply_rope(inputs[name], cosines, sines), outputs[name]) <= NORMS
        assert error(_by_product(inputs[name], cosines, sines), outputs[name]) <= NORMS, "as TPUs do it"


def test_timestep_embedding(golden, pieces):
    inputs, outputs = pieces.subcase("timestep")
    assert error(sinusoid(inputs["timestep"]), outputs["sinusoid"]) <= EMBEDDINGS
    config, params = mmdit_golden.load(pieces)
    embed = Definition(lambda rngs: TimeTextEmbed(config.pooled_projection_dim, config.width, rngs=rngs))
    assert error(embed(params["time_text_embed"], inputs["timestep"], inputs["pooled"]), outputs["temb"]) <= EMBEDDINGS


@pytest.mark.parametrize("name", [*(f"merge_unit2_stage{stage}" for stage in range(3)), "merge_training"])
def test_tokens_and_masks(golden, pieces, name):
    inputs, outputs = pieces.subcase(name)
    config, params = mmdit_golden.load(golden("mmdit"))  # whose patch projection made these tokens
    sample = [[mmdit_golden.channels_last(x) for x in clips] for clips in mmdit_golden.sequence(inputs, "sample")]
    text_mask = inputs["encoder_attention_mask"]
    patches = Definition(
        lambda rngs: PatchEmbed(config.in_channels, config.width, config.patch_size, dtype=jnp.float32, rngs=rngs)
    )
    for g, clips in enumerate(sample):
        layout = mmdit_golden.exact_layout(clips, text_mask[g :: len(sample)], config.patch_size)
        mask = causal_mask(layout.times, layout.segments)
        assert np.array_equal(mask[:, None], outputs[f"attention_mask/{g}"])
        if f"rope_ids/{g}" in outputs:
            assert np.array_equal(layout.times[0, text_mask.shape[1] :], outputs[f"rope_ids/{g}"][0, :, 0])
        target = tuple(n // config.patch_size for n in clips[-1].shape[2:4])
        tokens = []
        for clip in clips:
            size = tuple(n // config.patch_size for n in clip.shape[2:4])
            positions = spatial_positions(config.width, config.pos_embed_max_size, config.base_size, size, target)
            embedded = patches(params["pos_embed"], clip) + positions
            tokens.append(embedded.reshape(len(clip), -1, config.width))
        assert error(jnp.concatenate(tokens, axis=1), outputs[f"tokens/{g}"]) <= TOKENS


def test_rms_norm_on_small_inputs(pieces):
    inputs, outputs = pieces.subcase("rms_norm_small")
    norm = Definition(lambda rngs: RMSNorm(32, rngs=rngs))
    assert error(norm({"scale": inputs["weight"]}, inputs["x"]), outputs["y"]) <= NORMS


def conditioned(inputs, chunks: int):
    """The modulation vectors of a recorded adaptive norm."""
    norm = Definition(lambda rngs: AdaLayerNorm(32, chunks, dtype=jnp.float32, rngs=rngs))
    linear = {"kernel": inputs["linear_weight"].T, "bias": inputs["linear_bias"]}
    return norm({"linear": linear}, inputs["emb"])


def test_ada_layer_norm_zero_on_small_inputs(pieces):
    inputs, outputs = pieces.subcase("ada_layer_norm_zero_small")
    shift, scale, *rest = conditioned(inputs, 6)
    assert error(modulate(inputs["x"], shift[:, None], scale[:, None]), outputs["x"]) <= NORMS
    for name, value in zip(("gate_msa", "shift_mlp", "scale_mlp", "gate_mlp"), rest, strict=True):
        assert error(value, outputs[name]) <= NORMS


def test_ada_layer_norm_zero_of_two_groups(pieces):
    inputs, outputs = pieces.subcase("ada_layer_norm_zero_stages")
    lengths = pieces.meta["subcases"]["ada_layer_norm_zero_stages"]["hidden_length"]
    shift, scale, *rest = (spread(x, lengths) for x in conditioned(inputs, 6))
    assert error(modulate(inputs["x"], shift, scale), outputs["x"]) <= NORMS
    for name, value in zip(("gate_msa", "shift_mlp", "scale_mlp", "gate_mlp"), rest, strict=True):
        assert error(value, outputs[name]) <= NORMS


def test_ada_layer_norm_continuous_on_small_inputs(pieces):
    inputs, outputs = pieces.subcase("ada_layer_norm_continuous_small")
    scale, shift = conditioned(inputs, 2)
    assert error(modulate(inputs["x"], shift[:, None], scale[:, None]), outputs["x"]) <= NORMS
