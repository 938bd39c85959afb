"""What must hold for the video codecs of any width, depth and choice of up- and downsampling."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nd_jax.errors import UserError
from nd_jax.models import causal_conv, streaming
from nd_jax.models.causal_vae import AsymmetricVAEConfig, NativeVAEConfig, config_from_dict, definition, posterior
from nd_jax.models.functional import count_parameters
from nd_jax.models.growth import grow
from nd_jax.models.taehv import TAEHVDecoder
from nd_jax.models.tiling import tiled

SMALL_ENCODER = {
    "encoder_out_channels": 3,
    "encoder_block_out_channels": (4, 8),
    "encoder_layers_per_block": (1, 1),
    "encoder_norm_num_groups": 2,
    "encoder_spatial_down_sample": (True, False),
    "encoder_temporal_down_sample": (True, True),
}
SMALL_NATIVE = NativeVAEConfig(
    **SMALL_ENCODER,
    decoder_in_channels=3,
    decoder_block_out_channels=(4, 6),
    decoder_layers_per_block=(1, 1),
    decoder_norm_num_groups=2,
    decoder_spatial_up_sample=(False, True),
    decoder_temporal_up_sample=(True, True),
)
SMALL_TINY = AsymmetricVAEConfig(**SMALL_ENCODER, decoder_num_features=(8, 6, 4, 4))


def noise(seed, *shape):
    return jnp.asarray(np.random.Generator(np.random.Philox(seed)).standard_normal(shape, np.float32))


def random_params(net, seed=0):
    """Parameters without symmetry: biases and norm scales are random too."""
    leaves, tree = jax.tree.flatten(net.abstract())
    return jax.tree.unflatten(tree, [noise(seed + i, *leaf.shape) * 0.2 for i, leaf in enumerate(leaves)])


@pytest.fixture(scope="module", params=[SMALL_NATIVE, SMALL_TINY], ids=["native", "tiny"])
def codec(request):
    net = definition(request.param)
    return net, random_params(net)


def test_full_size_parameter_counts():
    tiny, native = (definition(config).abstract() for config in (AsymmetricVAEConfig(), NativeVAEConfig()))
    assert count_parameters(tiny["decoder"]) == 9_910_147
    assert count_parameters(tiny) == 119_543_507
    assert count_parameters(native) == 335_402_067
    assert jax.tree.map(lambda leaf: leaf.shape, tiny["encoder"]) == jax.tree.map(
        lambda leaf: leaf.shape, native["encoder"]
    )


@pytest.mark.parametrize("case", ["vae_encoder", "native_vae"])
def test_config_survives_both_ways(golden, case):
    official = golden(case).config
    config = config_from_dict({**official, "unknown_key": 1})
    assert config.to_dict() == official
    assert type(config).from_dict(config.to_dict()) == config


def test_config_keeps_latent_statistics():
    statistics = ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    config = dataclasses.replace(SMALL_TINY, latents_mean=statistics, latents_std=statistics)
    assert config_from_dict(config.to_dict()) == config
    assert "latents_mean" not in SMALL_TINY.to_dict()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"encoder_act_fn": "gelu"}, "encoder_act_fn is 'gelu', only 'silu' is supported"),
        ({"encoder_block_dropout": [0.0, 0.1]}, "encoder_block_dropout"),
        ({"interpolate": True}, "interpolate is True"),
        ({"encoder_layers_per_block": [1]}, "encoder_layers_per_block has 1 entries, expected 2"),
        ({"decoder_norm_num_groups": 5}, "decoder_block_out_channels contains 4"),
        ({"decoder_in_channels": 5}, "decoder_in_channels is 5"),
        ({"_class_name": "AutoencoderKL"}, "_class_name is 'AutoencoderKL', expected one of"),
    ],
)
def test_unsupported_configs_are_refused(changed, message):
    with pytest.raises(UserError, match=message):
        config_from_dict({**SMALL_NATIVE.to_dict(), **changed})


@pytest.mark.parametrize(
    ("shape", "nearest"), [((1, 6, 8, 8, 3), "5"), ((1, 5, 8, 7, 3), "8x8"), ((1, 0, 8, 8, 3), "1")]
)
def test_sizes_that_do_not_fit_name_the_nearest(codec, shape, nearest):
    net, params = codec
    with pytest.raises(UserError, match=rf"nearest .* is {nearest}$"):
        net.bind(params).encode(jnp.zeros(shape))


def test_chunks_equal_the_whole_clip(codec):
    net, params = codec
    video, latent = noise(1, 2, 13, 8, 12, 3), noise(2, 2, 4, 4, 6, 3)
    whole = jax.jit(lambda p, x: net.bind(p).encode(x))(params, video)
    equal_in_float32(streaming.encode_stream(net, params, video, 4), whole)
    whole = jax.jit(lambda p, z: net.bind(p).decode(z))(params, latent)
    assert whole.shape == (2, 13 if isinstance(net.bind(params).config, NativeVAEConfig) else 25, *whole.shape[2:])
    equal_in_float32(jnp.concatenate(list(streaming.decode_stream(net, params, latent)), axis=1), whole)


def equal_in_float32(found, wanted):
    """Sums in another order differ by some units in the last place of the largest terms, not of each result."""
    np.testing.assert_allclose(found, wanted, rtol=0, atol=4e-6 * np.abs(wanted).max())


def test_the_future_does_not_reach_the_past(codec):
    net, params = codec
    latent = noise(3, 1, 3, 4, 4, 3)
    decode = jax.jit(lambda p, z: net.bind(p).decode(z))
    before, after = decode(params, latent), decode(params, latent.at[:, 2].add(1.0))
    changed = np.abs(np.asarray(after - before)).max((0, 2, 3, 4)) > 0
    past = (before.shape[1] + 1) // 2  # frames of the first two latents: 1 + n of 1 + 2n
    assert not changed[:past].any()
    assert changed[-1]


def tiny_decoder(space, time, **kw):
    config = dataclasses.replace(SMALL_TINY, decoder_space_upscale=space, decoder_time_upscale=time)
    net = definition(config, **kw)
    return net, random_params(net, 5)


@pytest.mark.parametrize("space", [(True, True, True), (False, True, False)])
@pytest.mark.parametrize("time", [(True, True, True), (True, False, False), (False, False, False)])
def test_tiny_decoder_streams_exactly(space, time):
    net, params = tiny_decoder(space, time)
    latent = noise(4, 1, 3, 3, 2, 3)
    whole = jax.jit(lambda p, z: net.bind(p).decode(z, drop_first=False))(params, latent)
    scale = float(jnp.abs(whole).max())

    @jax.jit
    def step(params, frame, memory):
        vae = net.bind(params)
        return vae.decoder.stream(vae.post_quant_conv(frame, causal_conv.Carry()), memory)

    memory = TAEHVDecoder.start(net.bind(params).decoder, 1, 3, 2)
    assert len(memory) == 9
    frames = []
    for t in range(3):
        video, memory = step(params, latent[:, t : t + 1], memory)
        assert video.shape == (1, 2 ** sum(time), 3 * 2 ** sum(space), 2 * 2 ** sum(space), 3)
        frames.append(video)
    assert step._cache_size() == 1
    np.testing.assert_allclose(jnp.concatenate(frames, axis=1), whole, rtol=0, atol=1e-6 * max(1.0, scale))


def test_streaming_memory_does_not_grow_with_the_clip():
    net, params = tiny_decoder((True,) * 3, (True,) * 3)

    def temporaries(method, length):
        latent = jax.ShapeDtypeStruct((1, length, 8, 8, 3), jnp.float32)
        program = jax.jit(lambda p, z: getattr(net.bind(p), method)(z)).lower(params, latent).compile()
        memory, video = program.memory_analysis(), 8 * length * 64 * 64 * 3 * 4
        return memory.temp_size_in_bytes - video  # the video itself may be held while it is put together

    assert temporaries("decode_chunk", 8) < 0.5 * temporaries("decode", 8)
    assert temporaries("decode_chunk", 8) - temporaries("decode_chunk", 4) < 8 * 4 * 64 * 64 * 3 * 4


@pytest.mark.parametrize(("space", "time"), list(itertools.product([1, 2], [1, 2])))
def test_growth_equals_its_three_steps(space, time):
    x, frames, kernel = noise(6, 2, 2, 3, 4, 5), noise(7, 5, 5 * time), noise(8, 3, 3, 5, 6)
    y = x.repeat(space, axis=2).repeat(space, axis=3)
    y = jnp.moveaxis((y @ frames).reshape(*y.shape[:-1], time, 5), -2, 2).reshape(2, 2 * time, *y.shape[2:])
    expected = causal_conv._conv_3d(y, kernel[None], (1, 1, 1))
    got = grow(x, frames, kernel, space, time, jnp.float32)
    np.testing.assert_allclose(got, expected, atol=1e-4)


@pytest.mark.parametrize("strides", [(1, 1, 1), (1, 2, 2), (2, 1, 1)])
@pytest.mark.parametrize(("inputs", "outputs"), [(2, 4), (4, 2)])
def test_convolution_by_frames_equals_three_dimensional(strides, inputs, outputs):
    x, kernel = noise(9, 2, 7, 6, 4, inputs), noise(10, 3, 3, 3, inputs, outputs)

    def value_and_gradients(run):
        y, pull = jax.vjp(lambda x, k: run(x, k, strides), x, kernel)
        return y, *pull(jnp.cos(y))

    got, expected = map(value_and_gradients, (causal_conv._conv_by_frames, causal_conv._conv_3d))
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4)


def test_other_platforms_get_the_three_dimensional_convolution():
    trace = jax.jit(lambda x, k: causal_conv.causal_conv(x, k, None)).trace(
        jnp.zeros((1, 4, 4, 4, 2)), jnp.zeros((3,) * 3 + (2, 2))
    )
    programs = {name: trace.lower(lowering_platforms=(name,)).as_text() for name in ("cpu", "tpu")}
    assert "[b, 0, 1, 2, f]" in programs["tpu"]
    assert "[b, 0, 1, 2, f]" not in programs["cpu"]


def test_single_frame_needs_only_the_last_time_slice():
    x, kernel = noise(11, 1, 1, 5, 6, 3), noise(12, 3, 3, 3, 3, 4)
    padded = jnp.pad(x, ((0, 0), (2, 0), (0, 0), (0, 0), (0, 0)))
    expected = causal_conv._conv_3d(padded, kernel, (1, 1, 1))
    np.testing.assert_allclose(causal_conv.causal_conv(x, kernel, None), expected, atol=1e-5)
    flops = jax.jit(lambda x, k: causal_conv.causal_conv(x, k, None)).lower(x, kernel).cost_analysis()["flops"]
    assert flops <= 2 * 9 * 3 * 4 * 30


def test_identity_tiles_give_the_picture_back():
    x = noise(13, 1, 2, 11, 14, 3)
    np.testing.assert_allclose(tiled(lambda tile: tile, x, 8, 8), x, atol=1e-6)


def test_posterior_moments():
    code = posterior(jnp.zeros((2, 1, 2, 2, 6)))
    np.testing.assert_array_equal(code.kl(), [0, 0])
    draws = posterior(jnp.full((1, 1, 1, 1, 2), 2.0)).sample(noise(14, 20_000, 1, 1, 1, 1))
    assert abs(float(draws.mean()) - 2) < 0.06
    assert abs(float(draws.std()) - np.e) < 0.06


def test_half_precision_stays_near():
    net, params = tiny_decoder((True,) * 3, (True,) * 3)
    half = definition(net.bind(params).config, dtype=jnp.bfloat16)
    latent = noise(15, 1, 2, 3, 2, 3)
    exact, rough = (jax.jit(lambda p, z, n=n: n.bind(p).decode(z))(params, latent) for n in (net, half))
    assert rough.dtype == jnp.bfloat16
    error = np.abs(np.asarray(rough, np.float32) - np.asarray(exact)).max() / np.abs(exact).max()
    assert 1e-5 < error < 0.05


def test_fresh_parameters_differ_by_seed_and_code_sensibly():
    net = definition(SMALL_NATIVE)
    video = noise(16, 1, 5, 8, 8, 3)
    outputs = []
    for seed in (0, 1):
        reconstruction, code = jax.jit(lambda key: net(net.init(key), video))(jax.random.key(seed))
        assert reconstruction.shape == video.shape
        assert 0.01 < float(code.mean.std()) < 10
        outputs.append(reconstruction)
    assert float(jnp.abs(outputs[0] - outputs[1]).max()) > 1e-3
