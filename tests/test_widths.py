"""Narrower blocks: exact where nothing is fitted, nearer to the whole network where it is, and all the way to a
graph."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest
import tiny_system
from test_sweep_units import CONFIG, SLICES, calibration, exact, generator, system, without  # noqa: F401

from nd_jax.converters.folders import load_folder
from nd_jax.errors import UserError
from nd_jax.models.functional import count_parameters
from nd_jax.models.mmdit import MMDiTConfig, definition
from nd_jax.models.system import DENOISER
from nd_jax.pyramid.layout import Envelope
from nd_jax.recipes.widths import Kept, fitted, highest, narrow
from nd_jax.recovery_workflow import check_pair
from nd_jax.sweep.moments import inner_moments
from nd_jax.sweep.units import Units
from nd_jax.system import load_system, save_system
from nd_jax.width_workflow import Importances, Sizes, importances, width_costs, within

DEPTH, HIDDEN = CONFIG.num_layers, 4 * CONFIG.width
EACH = HIDDEN // SLICES


def kept_of(heads, slices) -> Kept:
    """Every block the same: these heads, and these slices of both MLPs."""
    channels = np.concatenate([np.arange(n * EACH, (n + 1) * EACH) for n in slices])
    return Kept(np.tile(heads, (DEPTH, 1)), np.tile(channels, (DEPTH, 1)), np.tile(channels, (DEPTH - 1, 1)))


def test_a_fitted_layer_gives_what_it_gave():
    """Channels that are sums of others, and one that is constant, are made up for exactly; without moments nothing
    is."""
    rng = np.random.Generator(np.random.Philox(0))
    x = rng.normal(size=(400, 6))
    x[:, 4], x[:, 5] = x[:, 0] - 2 * x[:, 1], 3.0
    layer = {"kernel": rng.normal(size=(6, 5)).astype(np.float32), "bias": rng.normal(size=5).astype(np.float32)}
    a = np.concatenate([x, np.ones((400, 1))], axis=1)
    keep = np.array([0, 1, 2, 3])
    truth = x @ layer["kernel"] + layer["bias"]
    found = fitted(layer, keep, a.T @ a / 400, 1e-9)
    np.testing.assert_allclose(x[:, keep] @ found["kernel"] + found["bias"], truth, atol=1e-4)
    plain = fitted(layer, keep, None, 0)
    np.testing.assert_array_equal(plain["kernel"], layer["kernel"][keep])
    assert np.abs(x[:, keep] @ plain["kernel"] + plain["bias"] - truth).max() > 1
    stiff = fitted(layer, keep, a.T @ a / 400, 1e9)
    np.testing.assert_allclose(stiff["kernel"], plain["kernel"], atol=1e-6)
    np.testing.assert_array_equal(highest(np.array([[3.0, 1.0, 2.0], [0.0, 5.0, 4.0]]), 2), [[0, 2], [1, 2]])
    with pytest.raises(UserError, match="0 of 3 heads"):
        highest(np.zeros((1, 3)), 0)


def test_narrow_blocks_are_the_gated_ones(system, generator, calibration):  # noqa: F811
    """The arrays shrink, and the network does what it does with those gates closed."""
    params = system.params[DENOISER]
    smaller, made = narrow(CONFIG, params, kept_of([1], [0, 2, 3]))
    assert (smaller.heads, smaller.mlp_channels, smaller.text_mlp_channels) == (1, 3 * EACH, 3 * EACH)
    assert not smaller.official
    assert CONFIG.official
    shapes = jax.tree.map(lambda x: x.shape, definition(smaller).abstract())
    assert jax.tree.map(np.shape, made) == shapes
    heads = without(params, Units(CONFIG, "heads"), tuple(range(0, 2 * DEPTH, 2)))
    mlp = Units(CONFIG, "mlp", SLICES)
    both = without(heads, mlp, [k for k, place in enumerate(mlp.places) if place[2] == 1], stacked=False)
    np.testing.assert_allclose(
        exact(system, generator, calibration, made), exact(system, generator, calibration, both), rtol=0, atol=1e-5
    )


def test_fitting_brings_the_velocity_nearer(system, generator, calibration):  # noqa: F811
    moments = inner_moments(system, generator.envelopes, calibration)
    assert len(moments) == DEPTH
    assert set(moments[0]) == {"image_seen", "text_seen", "image_hidden", "text_hidden"}
    assert set(moments[-1]) == {"image_seen", "image_hidden"}
    for each in (x for block in moments for x in block.values()):
        np.testing.assert_allclose(each[-1, -1], len(calibration.calls), rtol=1e-5)
        np.testing.assert_allclose(each, each.T, rtol=1e-4, atol=1e-6)
    kept, params = kept_of([0, 1], [0, 1, 3]), system.params[DENOISER]
    whole = exact(system, generator, calibration, params)
    errors = [
        np.square(exact(system, generator, calibration, narrow(CONFIG, params, kept, given)[1]) - whole).mean()
        for given in (None, moments)
    ]
    assert errors[1] < 0.7 * errors[0]


@pytest.mark.heavy
def test_sizes_for_a_budget(generator):  # noqa: F811
    """The costs are the networks' own; of what fits, the least important goes."""
    cost = width_costs(generator)
    whole = cost((2, HIDDEN, HIDDEN))
    smaller = dataclasses.replace(CONFIG, kept_heads=1, mlp_width=3 * EACH, text_mlp_width=EACH)
    assert whole.parameters == count_parameters(definition(CONFIG).abstract())
    assert cost((1, 3 * EACH, EACH)).parameters == count_parameters(definition(smaller).abstract())
    worth = Importances(np.ones((DEPTH, 2)), np.ones((DEPTH, HIDDEN)), np.full((DEPTH - 1, HIDDEN), 1e-6))
    heads, mlp, text = within("parameters", cost((2, HIDDEN, HIDDEN // 2)).parameters)(generator, worth)
    assert (heads, mlp, text) == (2, HIDDEN, HIDDEN // 2), "the text's channels are worth nothing"
    for budget in (1, whole.parameters):
        with pytest.raises(UserError, match="budget of"):
            within("parameters", budget)(generator, worth)
    assert Sizes(heads=1).of(CONFIG) == (1, HIDDEN, HIDDEN)
    with pytest.raises(UserError, match="--mlp 1000, expected 1 to"):
        Sizes(mlp=1000).of(CONFIG)

    def by_place(units):
        return np.arange(len(units), dtype=float)

    scores = importances(CONFIG, by_place)
    assert scores.heads.shape == (DEPTH, 2)
    assert scores.mlp.shape == (DEPTH, HIDDEN)
    assert scores.text_mlp.shape == (DEPTH - 1, HIDDEN)
    assert (np.diff(scores.mlp[0]) > 0).all()


def test_config_and_folder(system, tmp_path):  # noqa: F811
    """Only narrowed networks have our keys; they come back from a folder, and recover with the teacher they came
    from."""
    assert not set(CONFIG.to_dict()) & {"kept_heads", "mlp_width", "text_mlp_width"}
    smaller, made = narrow(CONFIG, system.params[DENOISER], kept_of([1], [0, 2]))
    assert MMDiTConfig.from_dict(json.loads(json.dumps(smaller.to_dict()))) == smaller
    for change in ({"kept_heads": 3}, {"mlp_width": 0}, {"text_mlp_width": "8"}):
        with pytest.raises(UserError, match=next(iter(change))):
            dataclasses.replace(CONFIG, **change)
    changes = {
        "config": dataclasses.replace(system.config, diffusion_transformer=smaller),
        "params": {**system.params, DENOISER: made},
        "kept_blocks": tuple(range(DEPTH)),
    }
    save_system(tmp_path / "narrow", dataclasses.replace(system, **changes), load_folder(system.folder).tokenizers)
    loaded = load_system(tmp_path / "narrow")
    assert loaded.config.diffusion_transformer == smaller
    for one, other in zip(jax.tree.leaves(loaded.params[DENOISER]), jax.tree.leaves(made), strict=True):
        assert one.shape == other.shape
    np.testing.assert_array_equal(
        loaded.params[DENOISER]["blocks"]["ff"]["up"]["kernel"], made["blocks"]["ff"]["up"]["kernel"]
    )
    check_pair(loaded, system)


def test_graphs_have_every_blocks_own_width(tmp_path):
    """A denoiser whose blocks differ in heads and hidden channels, against JAX."""
    pytest.importorskip("onnxruntime")
    from nd_jax.converters.graphs import references
    from nd_jax.converters.graphs.mmdit import stage_graph
    from nd_jax.converters.graphs.parity import check_part, save_part
    from nd_jax.converters.graphs.parts import Part

    params = tiny_system.random_params(definition(CONFIG), seed=9)
    heads, mlp = Units(CONFIG, "heads"), Units(CONFIG, "mlp", SLICES)
    cut = without(params, heads, (0, 3))  # one head of block 0 and one of block 1
    cut = without(cut, mlp, (1, 9, 10, 20, 26), stacked=False)
    envelope = Envelope(0, 1, tiny_system.TEXT_LENGTH, 8, 8, patch_size=1, stages=1)
    graph = stage_graph(CONFIG, cut, envelope, "narrow")
    kernel = cut["blocks"]["attn"]["to_q"]["kernel"]
    assert [k.shape[1] for k in kernel] == [CONFIG.attention_head_dim] * 2 + [CONFIG.width]
    part = Part("narrow", graph, "w8a16", "narrow", references.stage(CONFIG, cut, envelope))
    assert check_part(part, save_part(part, tmp_path)) >= 100


def test_the_command(system, tmp_path, run, refused):  # noqa: F811
    source = tmp_path / "source"
    save_system(source, system, load_folder(system.folder).tokenizers)
    base = ("prune", "widths", source, "--out", tmp_path / "out", "--prompts", 2, "--batch", 2, "--probes", 1)
    refused(*base, told="expected --heads, --mlp and --text-mlp, or one --budget")
    refused(*base, "--heads", 9, told="--heads 9, expected 1 to 2")
    refused(*base, "--heads", 1, "--budget-macs", 1, told="or one --budget")
    code, out, told = run(*base, "--heads", 1, "--mlp", 40)
    assert code == 0, told
    assert "official PyTorch classes cannot load" in told.replace("\n", " ")
    loaded = load_system(out.strip())
    made = loaded.config.diffusion_transformer
    assert (made.heads, made.mlp_channels, made.text_mlp_channels) == (1, 40, HIDDEN)
    assert f"{count_parameters(loaded.params[DENOISER])} parameters" in told
    assert loaded.kept_blocks == tuple(range(DEPTH))
