"""The codec recipe: what its loss adds up, that it learns and repeats, and the steps around it."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_system

from nd_jax.converters.component import save_component
from nd_jax.data.latents import LatentSource
from nd_jax.data.windows import WindowSource
from nd_jax.errors import UserError
from nd_jax.evaluate import reconstruct
from nd_jax.models.causal_vae import posterior
from nd_jax.pixels import to_uint8
from nd_jax.recipes.codec import CodecRecipe, CodecRecipeConfig, reconstruction_losses
from nd_jax.training.mesh import MeshConfig, make_mesh
from nd_jax.training.optim import OptimConfig
from nd_jax.training.paths import named_leaves
from nd_jax.training.program import Program
from nd_jax.workflow import encode_clips

NETWORK = tiny_system.CONFIG.causal_video_vae
HEIGHT, WIDTH, FRAMES = 16, 24, 9
CONFIG = CodecRecipeConfig(
    batch=4,
    frames=FRAMES,
    kl=0.01,
    linear_start=False,
    optim=OptimConfig(learning_rate=1e-2, warmup_steps=1, schedule="constant"),
)


def clips(count: int, seed: int = 0) -> np.ndarray:
    """Smooth uint8 clips, [count, FRAMES, HEIGHT, WIDTH, 3]."""
    rng = np.random.Generator(np.random.Philox(seed))
    t, y, x = np.meshgrid(np.arange(FRAMES) / 9, np.arange(HEIGHT) / 16, np.arange(WIDTH) / 24, indexing="ij")
    wave = rng.normal(size=(count, 3, 4))
    phase = np.einsum("nck,kthw->nthwc", wave, np.stack([t, 2 * y, 2 * x, np.ones_like(t)]))
    return (127.5 + 100 * np.sin(phase)).astype(np.uint8)


@pytest.fixture(scope="module")
def params():
    return tiny_system.random_system_params()["causal_video_vae"]


@pytest.fixture(scope="module")
def program(params):
    """The recipe on one device, begun from given parameters."""
    recipe = CodecRecipe(NETWORK, CONFIG, HEIGHT, WIDTH)
    return Program(recipe, make_mesh(MeshConfig(), jax.devices()[:1]), jax.random.key(0), (params,))


@pytest.fixture(scope="module")
def trained(program):
    """Metrics of twelve steps, and of the first two once more; the last state."""
    names, step, batch = program.metric_names, program.compile_step(), program.put({"video": clips(4)})
    runs = []
    for count in (2, 12):
        state, rows = program.initial_state(), []
        for _ in range(count):
            state, packed = step(state, batch)
            rows.append(dict(zip(names, np.asarray(packed).tolist(), strict=True)))
        runs.append(rows)
    return runs, state


def test_terms_are_what_their_names_say():
    rng = np.random.Generator(np.random.Philox(0))
    made, video = rng.standard_normal((2, 3, 2, 4, 5, 3), np.float32)
    terms = reconstruction_losses(made, video)
    error = made - video
    rows, columns = error[:, :, 1:] - error[:, :, :-1], error[:, :, :, 1:] - error[:, :, :, :-1]
    np.testing.assert_allclose(terms["absolute"], np.abs(error).mean((1, 2, 3, 4)), rtol=1e-5)
    np.testing.assert_allclose(terms["squared"], (error**2).mean((1, 2, 3, 4)), rtol=1e-5)
    np.testing.assert_allclose(
        terms["edges"], np.abs(rows).mean((1, 2, 3, 4)) + np.abs(columns).mean((1, 2, 3, 4)), rtol=1e-5
    )


def test_loss_is_made_of_the_networks_own_answers(program, params, trained):
    """The first step's metrics, from encoder and decoder run by hand with the step's own noise."""
    recipe, video = program.recipe, clips(4)
    metrics = trained[0][0][0]
    noise = jax.random.normal(program.initial_state().step_key(), recipe.latent_shape())
    assert noise.shape == (4, 2, 2, 3, 4)
    pixels = video.astype(np.float32) / 127.5 - 1

    @jax.jit
    def through(params, pixels, noise):
        codec = recipe.codec.bind(params)
        code = posterior(codec.encode(pixels))
        return code, codec.decode(code.mean + jnp.exp(0.5 * code.logvar) * noise)

    code, made = through(params, pixels, noise)
    error = np.asarray(made) - pixels
    kl = 0.5 * (np.square(code.mean) + np.exp(code.logvar) - 1 - code.logvar).mean()
    expected = {"absolute": np.abs(error).mean(), "squared": np.square(error).mean(), "kl": kl}
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[f"term/{name}"], value, rtol=1e-4)
    total = expected["absolute"] + expected["squared"] + CONFIG.edges * metrics["term/edges"] + CONFIG.kl * kl
    np.testing.assert_allclose(metrics["loss"], total, rtol=1e-4)
    np.testing.assert_allclose(metrics["psnr"], 10 * np.log10(4 / expected["squared"]), rtol=1e-4)


def test_steps_repeat_and_reduce_the_loss(trained, params):
    (short, long), state = trained
    assert long[:2] == short
    losses = [row["loss"] for row in long]
    assert np.mean(losses[-3:]) < 0.9 * np.mean(losses[:3]), losses
    assert int(state.step) == 12
    changes = jax.tree.map(lambda new, old: np.abs(new - old).max(), state.params, params)
    still = {name for name, change in named_leaves(changes) if change < 1e-4}
    assert all(name.endswith("to_k/bias") for name in still), f"{still} were not trained"  # softmax cancels those
    ema, now, start = (np.asarray(jax.tree.leaves(tree)[0]) for tree in (state.ema, state.params, params))
    assert np.abs(ema - start).max() < np.abs(now - start).max()


def test_latents_and_batches_have_the_size_asked_for(program):
    recipe = program.recipe
    assert recipe.batch_spec()["video"].shape == (4, FRAMES, HEIGHT, WIDTH, 3)
    assert recipe.batch_spec()["video"].dtype == jnp.uint8
    wrong = CodecRecipe(NETWORK, dataclasses.replace(CONFIG, frames=12), HEIGHT, WIDTH)
    spec = wrong.batch_spec() | {"noise": jax.ShapeDtypeStruct(wrong.latent_shape(), jnp.float32)}
    with pytest.raises(UserError, match="nearest legal number is"):
        jax.eval_shape(wrong.loss, program.state.params, spec)


def test_windows_cover_every_clip():
    video = np.arange(33)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)
    source = WindowSource([{"video": video}, {"video": video + 100}], 9)
    assert len(source) == 2 * 4
    first = [int(source[index]["video"][0, 0, 0, 0]) for index in range(len(source))]
    assert first == [0, 100, 8, 108, 16, 116, 24, 124]
    assert all(source[index]["video"].shape == (9, 2, 2, 3) for index in range(len(source)))
    with pytest.raises(UserError, match="33 frames, expected at least 41"):
        WindowSource([{"video": video}], 41)


# ---- the steps around it


def test_reconstruction_is_measured(params):
    """PSNR and SSIM of what the codec makes, and perfect ones where it makes the same."""
    video = clips(2, seed=3)
    found = reconstruct(NETWORK, params, video)
    assert found.videos.shape == video.shape
    assert found.videos.dtype == np.uint8
    error = np.square(found.videos.astype(float) - video).mean((1, 2, 3, 4))
    np.testing.assert_allclose(found.psnr, (10 * np.log10(255**2 / error)).mean(), rtol=1e-6)
    assert -1 <= found.ssim < 1


def test_clips_are_encoded_once_and_in_order(params, tmp_path):
    """Posterior means, whatever the batch; the last batch is padded, and nothing of the padding is kept."""
    save_component(tmp_path / "codec", NETWORK, params)
    video, seen = clips(5), []
    source = [{"video": clip} for clip in video]
    captions = [[f"clip {n}"] for n in range(5)]
    folder = encode_clips(
        tmp_path / "codec", source, captions, tmp_path / "latents", batch=2, progress=lambda *at: seen.append(at)
    )
    assert seen == [(2, 5), (4, 5), (5, 5)]
    latents = LatentSource(folder)
    assert latents.latents.shape == (5, 2, 2, 3, 4)
    assert [latents[n]["caption"] for n in range(5)] == [f"clip {n}" for n in range(5)]
    codec = CodecRecipe(NETWORK, CONFIG, HEIGHT, WIDTH).codec
    encode = jax.jit(lambda params, x: posterior(codec.bind(params).encode(x)).mean)
    pixels = video[3:].astype(np.float32) / 127.5 - 1
    np.testing.assert_allclose(latents.latents[3:], encode(params, pixels), rtol=0, atol=1e-4)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(UserError, match="--overwrite"):
        encode_clips(tmp_path / "codec", source, captions, folder, overwrite=False)
    with pytest.raises(UserError, match="lists"):
        encode_clips(tmp_path / "codec", source, captions[:4], tmp_path / "other", batch=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_pixels_round_trip():
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, -1)
    np.testing.assert_array_equal(to_uint8(pixels), pixels)
    with pytest.raises(UserError, match="not finite"):
        to_uint8(np.full((1, 2, 2, 3), np.inf))
