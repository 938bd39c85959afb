"""Text networks: equal to the recorded reference, right sizes, right switches."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN

from nd_jax.errors import UserError
from nd_jax.models import clip, context_adapter, t5
from nd_jax.models.functional import count_parameters
from nd_jax.verification.cases import Case
from nd_jax.verification.rows import Status
from nd_jax.verify import verify_case

CASES = sorted(path.name for pattern in ("dt5_*", "context_adapter*", "clip_text_*") for path in GOLDEN.glob(pattern))

T5_SMALL = t5.T5Config(vocab_size=50, d_model=16, d_kv=4, d_ff=24, num_layers=3, num_heads=2, out_dim=12)
CLIP_SMALL = clip.CLIPTextConfig(
    vocab_size=50, hidden_size=16, intermediate_size=24, projection_dim=12, num_hidden_layers=3, num_attention_heads=2
)


@pytest.mark.parametrize("name", CASES)
def test_golden(name):
    rows = list(verify_case(Case(GOLDEN / name, GOLDEN)))
    assert rows
    assert [row for row in rows if row.status is not Status.PASS] == []


@pytest.mark.parametrize(
    ("definition", "expected"),
    [
        (t5.definition(t5.T5Config()), 129_551_488),
        (
            t5.definition(t5.T5Config(d_ff=3072, feed_forward_proj="relu", dense_act_fn="relu", is_gated_act=False)),
            129_551_488,
        ),
        (t5.definition(t5.t5_xxl()), 4_762_310_656),
        (context_adapter.definition(context_adapter.ContextAdapterConfig()), 130_041_344),
        (clip.definition(clip.clip_l()), 123_650_304),
        (clip.definition(clip.clip_bigg()), 694_659_840),
    ],
    ids=["dt5", "dt5-relu", "t5-xxl", "context-adapter", "clip-l", "clip-bigg"],
)
def test_full_size_counts(definition, expected):
    assert count_parameters(definition.abstract()) == expected


def test_t5_padding_is_not_read():
    definition = t5.definition(T5_SMALL)
    params = definition.init(jax.random.key(0))
    ids = np.arange(1, 11).reshape(1, 10)
    mask = np.array([[1] * 6 + [0] * 4])
    other = np.where(mask, ids, 40 - ids)
    states = [definition(params, x, mask).prompt_embeds[:, :6] for x in (ids, other)]
    np.testing.assert_array_equal(*states)
    assert not np.allclose(definition(params, other).prompt_embeds[:, :6], states[0], atol=1e-4)


def test_t5_remat_changes_nothing_and_gradients_flow():
    definition = t5.definition(T5_SMALL)
    params = definition.init(jax.random.key(0))
    ids = np.arange(12).reshape(2, 6)

    def loss(params, remat):
        return jnp.square(definition(params, ids, remat=remat).prompt_embeds).mean()

    plain, again = (jax.grad(loss)(params, remat) for remat in (False, True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), plain, again)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(plain))


def test_depth_is_read_from_the_arrays():
    definition = t5.definition(T5_SMALL)
    params = definition.init(jax.random.key(0))
    shorter = params | {
        "encoder": params["encoder"] | {"block": jax.tree.map(lambda x: x[:2], params["encoder"]["block"])}
    }
    two = t5.definition(dataclasses.replace(T5_SMALL, num_layers=2))
    ids = np.arange(6).reshape(1, 6)
    np.testing.assert_array_equal(definition(shorter, ids).prompt_embeds, two(shorter, ids).prompt_embeds)
    assert not np.allclose(definition(shorter, ids).prompt_embeds, definition(params, ids).prompt_embeds, atol=1e-3)


def test_stacked_layers_differ_at_initialisation():
    kernels = t5.definition(T5_SMALL).init(jax.random.key(0))["encoder"]["block"]["layer"]["0"]["SelfAttention"]["q"]
    assert np.abs(kernels["kernel"][0] - kernels["kernel"][1]).max() > 0


def test_bfloat16_computes_in_bfloat16_with_float32_parameters():
    for definition in (t5.definition(T5_SMALL, dtype=jnp.bfloat16), clip.definition(CLIP_SMALL, dtype=jnp.bfloat16)):
        params = definition.init(jax.random.key(0))
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
        hidden = definition(params, np.arange(6).reshape(1, 6)).last_hidden_state
        assert hidden.dtype == jnp.bfloat16
        assert np.isfinite(np.asarray(hidden, np.float32)).all()


def test_t5_without_projection():
    config = t5.T5Config.from_dict(T5_SMALL.to_dict(), projection=False)
    definition = t5.definition(config)
    params = definition.init(jax.random.key(0))
    assert "final_projection" not in params
    assert definition(params, np.zeros((1, 4), int)).prompt_embeds is None


def test_clip_pooling_rules_differ_where_ids_lie_above_eos():
    ids = np.array([[3, 9, 30, 20, 20], [3, 20, 1, 1, 1]])
    assert clip.pooled_position(ids, clip.LEGACY_EOS).tolist() == [2, 1]
    assert clip.pooled_position(ids, 20).tolist() == [3, 1]


def test_clip_is_causal():
    definition = clip.definition(CLIP_SMALL)
    params = definition.init(jax.random.key(0))
    ids = np.arange(1, 9).reshape(1, 8)
    other = ids.copy()
    other[0, 5:] += 20
    a, b = (definition(params, x).last_hidden_state for x in (ids, other))
    np.testing.assert_array_equal(a[:, :5], b[:, :5])
    assert np.abs(a[:, 5:] - b[:, 5:]).max() > 1e-3


def test_clip_hidden_states_only_on_request():
    definition = clip.definition(dataclasses.replace(CLIP_SMALL, with_projection=False))
    params = definition.init(jax.random.key(0))
    ids = np.arange(8).reshape(1, 8)
    short, long = definition(params, ids), definition(params, ids, return_hidden_states=True)
    assert short.hidden_states is None
    assert short.text_embeds is None
    assert long.hidden_states.shape == (4, 1, 8, 16)
    np.testing.assert_allclose(long.hidden_states[-2], short.penultimate_hidden_state, atol=1e-6)


def test_clip_refuses_more_tokens_than_it_has_positions():
    definition = clip.definition(CLIP_SMALL)
    with pytest.raises(UserError, match="78 tokens; expected at most 77"):
        definition(definition.init(jax.random.key(0)), np.zeros((1, 78), int))


@pytest.mark.parametrize(
    ("read", "config", "message"),
    [
        (t5.T5Config.from_dict, {"feed_forward_proj": "gated-tanh"}, "feed_forward_proj.*gated-tanh.*supported"),
        (t5.T5Config.from_dict, {"dense_act_fn": "cube"}, "dense_act_fn.*cube.*supported"),
        (t5.T5Config.from_dict, {"d_model": 512, "project_in_dim": 768}, "project_in_dim.*768.*512"),
        (context_adapter.ContextAdapterConfig.from_dict, {"activation_fn": "cube"}, "activation_fn.*cube.*supported"),
        (context_adapter.ContextAdapterConfig.from_dict, {"skips": [True]}, "skips.*1 entries.*4"),
        (clip.CLIPTextConfig.from_dict, {"hidden_act": "cube"}, "hidden_act.*cube.*supported"),
        (clip.CLIPTextConfig.from_dict, {"hidden_size": 100}, "hidden_size.*100.*12"),
    ],
)
def test_unsupported_configs_are_named(read, config, message):
    with pytest.raises(UserError, match=message):
        read(config)


@pytest.mark.parametrize("name", CASES)
def test_config_survives_its_own_json(name, golden):
    read = {"dt5": t5.T5Config, "con": context_adapter.ContextAdapterConfig, "cli": clip.CLIPTextConfig}[
        name[:3]
    ].from_dict
    config, given = read(golden(name).config), golden(name).config
    written = config.to_dict()
    assert read(written) == config
    ignored = {"transformers_version", "_attn_implementation_autoset"}
    assert {key: written.get(key) for key in given if key not in ignored} == {
        key: value for key, value in given.items() if key not in ignored
    }
