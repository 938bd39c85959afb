"""The reconstruction losses: LPIPS from a weights file against plain numpy, and the loss that needs no weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file
from skimage.metrics import structural_similarity

from nd_jax.decoder_workflow import read_lpips
from nd_jax.errors import UserError
from nd_jax.recipes.multiscale import halve, multiscale_terms, similarity
from nd_jax.recipes.perceptual import SCALE, SHIFT, Lpips, lpips_params

VGG = {1: (0, 2), 2: (5, 7), 3: (10, 12, 14), 4: (17, 19, 21), 5: (24, 26, 28)}
ALEX = {1: (0,), 2: (3,), 3: (6,), 4: (8,), 5: (10,)}


def state_dict(slices: dict, kernels: dict[int, int], widths: tuple[int, ...] = (4, 3, 5, 4, 3)) -> dict:
    """Random weights with the names of the lpips package, narrower than the real ones."""
    rng, tensors, before = np.random.Generator(np.random.Philox(0)), {}, 3
    for (number, convs), width in zip(slices.items(), widths, strict=True):
        for conv in convs:
            shape = (width, before, *(kernels.get(conv, 3),) * 2)
            name = f"net.slice{number}.{conv}"
            tensors[f"{name}.weight"] = rng.standard_normal(shape).astype(np.float32) * np.prod(shape[1:]) ** -0.5
            tensors[f"{name}.bias"] = rng.standard_normal(width).astype(np.float32) * 0.1
            before = width
        tensors[f"lin{number - 1}.model.1.weight"] = rng.random((1, width, 1, 1), np.float32)
    return tensors | {"lins.0.model.1.weight": tensors["lin0.model.1.weight"]}


def plain_conv(x: np.ndarray, kernel: np.ndarray, stride: int, pad: int) -> np.ndarray:
    """[H, W, C] with a torch kernel [out, in, k, k], tap by tap."""
    size = kernel.shape[-1]
    x = np.pad(x, ((pad, pad), (pad, pad), (0, 0)))
    rows, columns = ((length - size) // stride + 1 for length in x.shape[:2])
    out = np.zeros((rows, columns, kernel.shape[0]))
    for i in range(size):
        for j in range(size):
            seen = x[i : i + stride * (rows - 1) + 1 : stride, j : j + stride * (columns - 1) + 1 : stride]
            out += seen @ kernel[:, :, i, j].T
    return out


def plain_pool(x: np.ndarray, window: int) -> np.ndarray:
    rows, columns = ((length - window) // 2 + 1 for length in x.shape[:2])
    each = [x[i : i + 2 * rows - 1 : 2, j : j + 2 * columns - 1 : 2] for i in range(window) for j in range(window)]
    return np.max(each, axis=0)


def plain_lpips(tensors: dict, slices: dict, pooled: set[int], window: int, special: dict, a, b) -> float:
    def features(x):
        x, found = (x - np.array(SHIFT)) / np.array(SCALE), []
        for number, convs in slices.items():
            x = plain_pool(x, window) if number in pooled else x
            for conv in convs:
                kernel = tensors[f"net.slice{number}.{conv}.weight"]
                x = plain_conv(x, kernel, *special.get(conv, (1, 1))) + tensors[f"net.slice{number}.{conv}.bias"]
                x = np.maximum(x, 0)
            found.append(x / (np.sqrt((x**2).sum(-1, keepdims=True)) + 1e-10))
        return found

    parts = zip(features(a), features(b), strict=True)
    return sum(
        (((one - other) ** 2) @ tensors[f"lin{k}.model.1.weight"].reshape(-1)).mean()
        for k, (one, other) in enumerate(parts)
    )


@pytest.mark.parametrize(
    ("slices", "kernels", "pooled", "window", "special"),
    [
        (VGG, {}, {2, 3, 4, 5}, 2, {}),
        (ALEX, {0: 11, 3: 5}, {2, 3}, 3, {0: (4, 2), 3: (1, 2)}),
    ],
    ids=["vgg16", "alexnet"],
)
def test_lpips_equals_plain_arithmetic(tmp_path, slices, kernels, pooled, window, special):
    tensors = state_dict(slices, kernels)
    save_file(tensors, tmp_path / "weights.safetensors")
    params = read_lpips(tmp_path / "weights.safetensors")
    a, b = np.random.Generator(np.random.Philox(1)).uniform(-1, 1, (2, 2, 33, 40, 3)).astype(np.float32)
    network = Lpips(params)
    found = jax.jit(network)(params, a, b)
    expected = [plain_lpips(tensors, slices, pooled, window, special, *pair) for pair in zip(a, b, strict=True)]
    np.testing.assert_allclose(found, expected, rtol=1e-3)
    assert min(expected) > 0.01
    np.testing.assert_allclose(network(params, a, a), 0, atol=1e-9)
    flat = jnp.zeros((1, 32, 32, 3))  # where a whole slice is dead, the gradient stays finite
    slopes = jax.grad(lambda x: network(params, x, flat + 0.5).sum())(flat)
    assert np.isfinite(slopes).all()
    with pytest.raises(UserError, match="sides of at least"):
        network.check_size(15, 64)


def test_lpips_files_that_do_not_fit(tmp_path):
    good = state_dict(VGG, {})
    name = "net.slice3.12.weight"
    bad = {
        "missing": ({k: v for k, v in good.items() if k != name}, name, "missing"),
        "surplus": (good | {"net.slice3.13.weight": good[name]}, "net.slice3.13.weight", "surplus"),
        "shape": (good | {name: good[name][:, :2]}, name, r"expected \[any, 5, 3, 3\]"),
        "rank": (good | {name: good[name][0]}, name, "has shape"),
        "nan": (good | {name: good[name] * np.nan}, name, "not finite"),
        "sign": (good | {"lin2.model.1.weight": -good["lin2.model.1.weight"]}, "lin2", "negative"),
        "colours": (
            good | {"scaling_layer.scale": np.zeros((1, 3, 1, 1), np.float32)},
            "scaling_layer.scale",
            "above 0",
        ),
        "other": ({"unet.weight": np.zeros(3, np.float32)}, "", "missing"),
    }
    for case, (tensors, where, told) in bad.items():
        path = tmp_path / f"{case}.safetensors"
        save_file(tensors, path)
        with pytest.raises(UserError, match=told) as caught:
            read_lpips(path)
        assert str(path) in str(caught.value)
        assert where in str(caught.value)
        assert "\n" not in str(caught.value)
    (tmp_path / "weights.pth").write_bytes(b"x")
    with pytest.raises(UserError, match="pickle"):
        read_lpips(tmp_path / "weights.pth")
    given = good | {"scaling_layer.shift": np.ones((1, 3, 1, 1), np.float32)}
    np.testing.assert_array_equal(lpips_params(given, "x")["colours"]["shift"]["scale"], 1)


# ---- the loss without weights


def pictures(seed: int, *shape: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(seed)).uniform(-1, 1, shape).astype(np.float32)


def test_terms_are_what_their_names_say():
    """Two scales by hand: bands, outlines, similarity and motion of the error."""
    made, video = pictures(0, 2, 3, 8, 12, 3), pictures(1, 2, 3, 8, 12, 3)
    terms = multiscale_terms(made, video, scales=2)
    error, over = made - video, (1, 2, 3, 4)
    small = error.reshape(2, 3, 4, 2, 6, 2, 3).mean((3, 5))
    bands = [np.abs(error - small.repeat(2, 2).repeat(2, 3)).mean(over), np.abs(small).mean(over)]
    np.testing.assert_allclose(terms["pyramid"], np.mean(bands, axis=0), rtol=1e-5)
    slopes = [sum(np.abs(np.diff(x, axis=axis)).mean(over) for axis in (2, 3)) for x in (error, small)]
    np.testing.assert_allclose(terms["gradient"], np.mean(slopes, axis=0), rtol=1e-5)
    np.testing.assert_allclose(terms["motion"], np.abs(np.diff(error, axis=1)).mean(over), rtol=1e-5)
    alike = [np.mean(similarity(*pair), axis=over) for pair in ((made, video), (halve(made), halve(video)))]
    np.testing.assert_allclose(terms["structure"], 1 - np.mean(alike, axis=0), rtol=1e-5)


def test_similarity_is_ssim_of_its_windows():
    """scikit-image computes one window of 4 x 4 around a centre with odd windows only, so compare by the formula."""
    a, b = pictures(2, 1, 1, 8, 8, 1), pictures(3, 1, 1, 8, 8, 1)
    found = np.asarray(similarity(a, b))[0, 0, :, :, 0]
    assert found.shape == (3, 3)
    x, y = a[0, 0, 2:6, 4:8, 0].astype(float), b[0, 0, 2:6, 4:8, 0].astype(float)
    both = ((x - x.mean()) * (y - y.mean())).mean()
    expected = (2 * x.mean() * y.mean() + 0.02**2) * (2 * both + 0.06**2)
    expected /= (x.mean() ** 2 + y.mean() ** 2 + 0.02**2) * (x.var() + y.var() + 0.06**2)
    np.testing.assert_allclose(found[1, 2], expected, rtol=1e-4)
    smooth = np.cumsum(np.cumsum(pictures(4, 1, 1, 32, 32, 1), axis=2), axis=3) / 40
    noisy = smooth + 0.1 * pictures(5, 1, 1, 32, 32, 1)
    judged = structural_similarity(smooth[0, 0, ..., 0], noisy[0, 0, ..., 0], data_range=2, win_size=5)
    assert abs(float(similarity(smooth, noisy).mean()) - judged) < 0.1


def test_equal_pictures_cost_nothing_and_small_ones_work():
    video = pictures(6, 2, 1, 6, 10, 3)
    terms = multiscale_terms(video, video, scales=5)
    np.testing.assert_allclose([value for term in terms.values() for value in term], 0, atol=1e-6)
    slopes = jax.grad(lambda x: sum(term.sum() for term in multiscale_terms(x, video).values()))(video * 0.5)
    assert np.isfinite(slopes).all()
    assert np.abs(slopes).max() > 0
