"""The super-resolution recipe: patches, what it starts as, what it learns, and the command from files to a folder."""

import json

import jax
import numpy as np
import pytest
from tiny_system import random_params

from nd_jax.converters.component import load_component
from nd_jax.data.patches import PatchSource
from nd_jax.data.video_out import write_video
from nd_jax.errors import UserError
from nd_jax.models.quicksrnet import QuickSRNetConfig, definition
from nd_jax.recipes.upscaler import UpscalerRecipe, UpscalerRecipeConfig, interpolated, reduced
from nd_jax.recipes.upscaler_start import fit_filters, has_room, linear_start
from nd_jax.training.optim import OptimConfig
from nd_jax.upscaler_workflow import compare


def texture(size: int, seed: int) -> np.ndarray:
    """Oriented stripes with sharp edges, [size, size, 3] uint8."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size]
    angle, period = rng.uniform(0, np.pi), rng.uniform(9, 15)
    bright = np.sin((x * np.cos(angle) + y * np.sin(angle)) * 2 * np.pi / period) > 0
    colours = rng.integers(20, 236, (2, 3))
    return np.where(bright[..., None], *colours).astype(np.uint8)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    return [
        write_video(folder / f"{n}.mp4", np.stack([texture(64, 10 * n + k) for k in range(4)]), fps=8) for n in range(2)
    ]


def test_patches_are_boxes_of_their_files(videos):
    source = PatchSource(videos, size=24, count=40, seed=3, every=1)
    assert len(source) == 40
    taken = [source[n]["image"] for n in range(40)]
    assert all(patch.shape == (24, 24, 3) and patch.dtype == np.uint8 for patch in taken)
    again = PatchSource(videos, size=24, count=40, seed=3, every=1)
    np.testing.assert_array_equal(again[7]["image"], taken[7])
    assert not np.array_equal(PatchSource(videos, size=24, seed=4, every=1)[7]["image"], taken[7])
    native = PatchSource(videos, size=24, most=1.0, every=1)
    frames = source.clips[0]
    patch = native[0]["image"]
    windows = np.lib.stride_tricks.sliding_window_view(frames, (24, 24), axis=(1, 2)).transpose(0, 1, 2, 4, 5, 3)
    both = (windows == patch).all((3, 4, 5)) | (windows == patch[:, ::-1]).all((3, 4, 5))
    assert both.any()  # at most 1 the pixels are the file's own
    with pytest.raises(IndexError):
        source[40]
    with pytest.raises(UserError, match="at least 80"):
        PatchSource(videos, size=80)
    with pytest.raises(UserError, match="no video files"):
        PatchSource([], size=8)


def test_reduction_is_antialiased():
    """A pattern finer than the small picture can show becomes grey there instead of a coarser pattern."""
    fine = np.broadcast_to((np.arange(32) % 2)[None, None, :, None], (1, 32, 32, 3)).astype(np.float32)
    small = np.asarray(reduced(fine, 2))[0, 4:-4, 4:-4]
    assert np.ptp(small) < 1e-5
    assert np.abs(small - 0.5).max() < 0.01
    assert interpolated(small[None], 2, "bicubic").shape == (1, 16, 16, 3)


@pytest.mark.parametrize(
    "network", [QuickSRNetConfig(28, 1), QuickSRNetConfig(30, 2, 2, True), QuickSRNetConfig(27, 0, 3)]
)
def test_linear_start_is_the_fitted_filter(network):
    factor = int(network.scaling_factor)
    pictures = np.stack([texture(24, k) for k in range(3)])
    filters = fit_filters(pictures, factor)
    assert filters.shape == (5, 5, factor**2)
    np.testing.assert_allclose(filters.sum((0, 1)), 1, atol=0.05)  # grey stays grey
    params = linear_start(network, random_params(definition(network)), filters)
    small = np.asarray(reduced(pictures.astype(np.float32) / 255, factor))
    made = np.asarray(definition(network)(params, small))
    for y, x, phase in ((3, 4, 0), (4, 3, factor**2 - 1), (2, 2, 1)):
        row, column = divmod(phase, factor)
        window = small[:, y - 2 : y + 3, x - 2 : x + 3]
        expected = np.clip(np.einsum("nhwc,hw->nc", window, filters[..., phase]), 0, 1)
        np.testing.assert_allclose(made[:, factor * y + row, factor * x + column], expected, atol=2e-5)
    assert has_room(network)
    assert not has_room(QuickSRNetConfig(26, 1))
    assert not has_room(QuickSRNetConfig(32, 1, 1.5, True))


def test_fit_is_the_best_linear_filter():
    """No other filter has a smaller error on the pictures it was fitted to; bicubic interpolation is one of them."""
    pictures = np.stack([texture(32, k) for k in range(4)])
    network = QuickSRNetConfig(27, 0)
    filters = fit_filters(pictures, 2)
    fresh = definition(network).init(jax.random.key(0))
    small = reduced(pictures.astype(np.float32) / 255, 2)

    def error(filters):
        made = definition(network)(linear_start(network, fresh, filters), small)
        inside = np.s_[:, 6:-6, 6:-6]
        return float(np.square(np.asarray(made)[inside] - pictures[inside] / 255).mean())

    best = error(filters)
    rng = np.random.default_rng(0)
    assert all(best < error(filters + 0.05 * rng.standard_normal(filters.shape, np.float32)) for _ in range(4))
    bicubic = np.asarray(interpolated(small, 2, "bicubic"))[:, 6:-6, 6:-6]
    assert best < np.square(bicubic - pictures[:, 6:-6, 6:-6] / 255).mean()


def test_training_goes_on_from_there():
    network = QuickSRNetConfig(27, 1)
    optim = OptimConfig(learning_rate=1e-3, warmup_steps=5, decay_steps=60, weight_decay=0.0)
    settings = UpscalerRecipeConfig(batch=4, size=32, absolute=0.0, squared=1.0, ema_decay=0.9, optim=optim)
    recipe = UpscalerRecipe(network, settings)
    pictures = np.stack([texture(32, k) for k in range(4)])
    state = recipe.init(
        jax.random.key(0), linear_start(network, definition(network).init(jax.random.key(0)), fit_filters(pictures, 2))
    )
    before, step = compare(network, state.params, pictures), jax.jit(recipe.step)
    for _ in range(60):
        state, metrics = step(state, {"image": pictures})
    after = compare(network, state.ema, pictures)
    assert np.isfinite(metrics["loss"])
    assert (after.height, after.width) == (32, 32)
    assert after.network > before.network + 0.2
    assert after.gain == after.network - max(after.bilinear, after.bicubic)
    assert after.bicubic == before.bicubic


def test_loss_is_the_weighted_sum_and_the_start_is_nearest():
    config = QuickSRNetConfig(8, 0)
    weights = UpscalerRecipeConfig(batch=1, size=8, absolute=2.0, squared=3.0)
    recipe = UpscalerRecipe(config, weights)
    image = texture(8, 1)[None]
    loss, terms = recipe.loss(recipe.init(jax.random.key(0)).params, {"image": image})
    pixels = image.astype(np.float32) / 255
    nearest = np.asarray(reduced(pixels, 2)).repeat(2, 1).repeat(2, 2)
    assert float(terms["absolute"]) == pytest.approx(np.abs(nearest - pixels).mean(), rel=1e-5)
    assert float(terms["squared"]) == pytest.approx(np.square(nearest - pixels).mean(), rel=1e-5)
    assert float(loss) == pytest.approx(float(2 * terms["absolute"] + 3 * terms["squared"]), rel=1e-5)


@pytest.mark.parametrize(
    ("network", "change", "told"),
    [
        (QuickSRNetConfig(8, 0), {"size": 30}, "multiple of 4: try 32"),
        (QuickSRNetConfig(8, 0, 1.5, True), {"size": 32}, "multiple of 6"),
        (QuickSRNetConfig(8, 0), {"absolute": 0.0}, "weights"),
    ],
)
def test_settings_that_make_no_sense(network, change, told):
    with pytest.raises(UserError, match=told):
        UpscalerRecipe(network, UpscalerRecipeConfig(**change))


def test_the_command(tmp_path, videos, run, refused):
    out = tmp_path / "out"
    options = ["--loop.steps", 2, "--recipe.size", 24, "--recipe.batch", 8, "--network.num-channels", 4]
    start = ["train", "shapes_base", "upscaler", "--out", out]
    code, printed, err = run(*start, "--videos", *videos, "--held-out", videos[1], *options)
    assert code == 0, err
    assert printed.strip() == str(out / "super_resolution")
    assert "1.mp4 64x64: " in err
    assert "bicubic" in err
    config, params = load_component(out / "super_resolution")
    assert config == QuickSRNetConfig(4, 5)
    assert params["conv_last"]["kernel"].shape == (3, 3, 4, 12)
    (found,) = json.loads((out / "upscaler.json").read_text()).values()
    assert found["gain"] == pytest.approx(found["network"] - max(found["bilinear"], found["bicubic"]))
    refused(
        *["train", "shapes_base", "upscaler", "--out", tmp_path / "b"],
        *["--videos", videos[1], "--held-out", videos[1]],
        told="no video files to train on",
    )
