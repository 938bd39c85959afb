"""The video codecs against the recorded official outputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from codec_weights import channels_first, channels_last, load_codec

from nd_jax.models.causal_vae import posterior
from nd_jax.models.streaming import decode_stream, decode_tiled, encode_stream, encode_tiled

TOLERANCE = {"vae_encoder": 2e-4, "native_vae": 5e-5, "vae_decoder": 1e-4, "vae_decoder_variant_partial_time": 1e-4}


@pytest.fixture(scope="module")
def codec(golden):
    loaded = {}

    def load(name):
        if name not in loaded:
            case = golden(name)
            loaded[name] = case, *load_codec(case)
        return loaded[name]

    return load


def run(net, params, function, *args):
    """``function(module, *args)``, compiled in a hurry."""
    program = jax.jit(lambda p, *a: function(net.bind(p), *a), compiler_options={"xla_backend_optimization_level": 0})
    return program(params, *args)


def compare(case, expected, got):
    assert expected
    for name, value in expected.items():
        assert got[name].shape == value.shape, name
        np.testing.assert_allclose(got[name], value, rtol=0, atol=TOLERANCE[case], err_msg=name)


def moments_and_posterior(moments):
    code = posterior(moments)
    named = {"moments": moments, "mean": code.mean, "logvar": code.logvar, "std": code.std}
    return {key: channels_first(value) for key, value in named.items()}


@pytest.mark.parametrize("name", ["T1", "T9", "T17", "T25"])
def test_encoder_plain(codec, name):
    case, net, params = codec("vae_encoder")
    inputs, outputs = case.subcase(name)
    moments = run(net, params, lambda vae, x: vae.encode(x), channels_last(inputs["video"]))
    compare("vae_encoder", outputs, moments_and_posterior(moments))


@pytest.mark.parametrize("window", [8, 16])
@pytest.mark.parametrize("name", ["T1", "T9", "T17", "T25"])
def test_encoder_in_chunks(codec, name, window):
    case, net, params = codec("vae_encoder")
    video = channels_last(case.subcase(name)[0]["video"])
    moments = encode_stream(net, params, video, window)
    compare("vae_encoder", case.subcase(f"{name}_chunk{window}")[1], {"moments": channels_first(moments)})


def test_encoder_sample(codec):
    case, net, params = codec("vae_encoder")
    inputs, outputs = case.subcase("sample_T1")
    moments = run(net, params, lambda vae, x: vae.encode(x), channels_last(inputs["video"]))
    latent = channels_first(posterior(moments).sample(channels_last(inputs["noise"])))
    compare("vae_encoder", outputs, {"latent": latent, "scaled_latent": (latent - 0.1490) * 0.5430})


def test_encoder_stages(codec):
    case, net, params = codec("vae_encoder")
    inputs, outputs = case.subcase("stages_T9")

    def run_stages(vae, video):
        stages = {}
        return {"moments": vae.encode(video, stages), **{f"act/{key}": value for key, value in stages.items()}}

    got = run(net, params, run_stages, channels_last(inputs["video"]))
    got = {key: channels_first(value) for key, value in got.items()}
    got["act/conv_in"] = got["act/conv_in"][:, :, :3]
    compare("vae_encoder", outputs, got)


def test_logvar_clamp(codec):
    inputs, outputs = codec("vae_encoder")[0].subcase("logvar_clamp")
    compare("vae_encoder", outputs, moments_and_posterior(channels_last(inputs["moments"])))


def test_encoder_tiled(codec):
    case, net, params = codec("vae_encoder")
    inputs, outputs = case.subcase("tiled_T1")
    tile = case.meta["subcases"]["tiled_T1"]["tile_sample_min_size"]
    moments = encode_tiled(net, params, channels_last(inputs["video"]), tile, 8)
    compare("vae_encoder", outputs, {"moments": channels_first(moments)})


@pytest.mark.parametrize("name", ["encode_T1", "encode_T2", "encode_T3"])
def test_native_encode(codec, name):
    case, net, params = codec("native_vae")
    inputs, outputs = case.subcase(name)
    moments = run(net, params, lambda vae, x: vae.encode(x), channels_last(inputs["video"]))
    compare("native_vae", outputs, {"moments": channels_first(moments)})


@pytest.mark.parametrize("name", ["decode_T1", "decode_T2", "decode_T3", "decode_T5_small", "decode_not_init"])
def test_native_decode(codec, name):
    case, net, params = codec("native_vae")
    inputs, outputs = case.subcase(name)
    drop_first = name != "decode_not_init"
    video = run(net, params, lambda vae, z: vae.decode(z, drop_first), channels_last(inputs["latent"]))
    compare("native_vae", outputs, {"video": channels_first(video)})


CHUNKED = ["T1_chunk1", "T2_chunk1", "T3_chunk1", "T3_chunk2", "T5_small_chunk1", "T5_small_chunk2", "T5_small_chunk3"]


@pytest.mark.parametrize("name", CHUNKED)
def test_native_decode_in_chunks(codec, name):
    case, net, params = codec("native_vae")
    facts = case.meta["subcases"][f"decode_{name}"]
    latent = channels_last(case.subcase(facts["input_of"])[0]["latent"])
    chunks = list(decode_stream(net, params, latent, facts["window_size"]))
    if "latent_frames_per_chunk" in facts:
        first, *later = facts["latent_frames_per_chunk"]
        assert [chunk.shape[1] for chunk in chunks] == [8 * first - 7, *(8 * n for n in later)]
    video = channels_first(jnp.concatenate(chunks, axis=1))
    got = {"video": video, "video_rows_0_8": video[:, :, :, :8], "frame_means": video.mean((3, 4))}
    compare("native_vae", case.subcase(f"decode_{name}")[1], got)


def test_native_decode_tiled(codec):
    case, net, params = codec("native_vae")
    inputs, outputs = case.subcase("decode_tiled_T1")
    tile = case.meta["subcases"]["decode_tiled_T1"]["tile_sample_min_size"]
    video = decode_tiled(net, params, channels_last(inputs["latent"]), tile, 8)
    compare("native_vae", outputs, {"video": channels_first(video)})


def test_native_decode_stages(codec):
    case, net, params = codec("native_vae")
    inputs, outputs = case.subcase("decode_stages_T2")

    def run_stages(vae, latent):
        stages = {}
        vae.decode(latent, activations=stages)
        return {f"act/{key}": value for key, value in stages.items()}

    got = run(net, params, run_stages, channels_last(inputs["latent"]))
    got = {key: channels_first(value) for key, value in got.items()}
    for name in ("act/up_2", "act/up_3", "act/conv_norm_out"):
        got[name] = got[name][:, :, :2]
    compare("native_vae", outputs, got)


def test_native_roundtrip(codec):
    case, net, params = codec("native_vae")
    inputs, outputs = case.subcase("roundtrip_T2")
    video, code = run(net, params, lambda vae, x: vae(x), channels_last(inputs["video"]))
    compare("native_vae", outputs, {"latent_mean": channels_first(code.mean), "video": channels_first(video)})


TINY = [("vae_decoder", "T1"), ("vae_decoder", "T3"), ("vae_decoder", "T7"), ("vae_decoder_variant_partial_time", "T3")]


@pytest.mark.parametrize(("case_name", "name"), TINY)
def test_tiny_decode(codec, case_name, name):
    case, net, params = codec(case_name)
    inputs, outputs = case.subcase(name)
    video = run(net, params, lambda vae, z: vae.decode(z), channels_last(inputs["latent"]))
    compare(case_name, outputs, {"video": channels_first(video)})


def test_tiny_decode_entries(codec):
    case, net, params = codec("vae_decoder")
    inputs, outputs = case.subcase("stages_T3")

    def run_stages(vae, latent):
        stages = {}
        return vae.decode(latent, activations=stages), stages

    video, stages = run(net, params, run_stages, channels_last(inputs["latent"]))
    got = {"video": channels_first(video), "post_quant": channels_first(stages.pop("post_quant_conv"))}
    for key, value in stages.items():
        folded = np.asarray(value).reshape(-1, *value.shape[2:])
        got[f"block/{key}"] = np.moveaxis(folded, -1, 1)
    compare("vae_decoder", outputs, got)


def test_tiny_decode_frame_by_frame(codec):
    case, net, params = codec("vae_decoder")
    latent = channels_last(case.subcase("stages_T3")[0]["latent"])
    video = jnp.concatenate(list(decode_stream(net, params, latent)), axis=1)
    compare("vae_decoder", case.subcase("stages_T3_sequential")[1], {"video": channels_first(video)})
