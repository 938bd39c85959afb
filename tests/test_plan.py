"""nd-jax plan: what it counts, how it searches, what it refuses; and one real compilation for every generation."""

from __future__ import annotations

import dataclasses
import json
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_system

from nd_jax.commands.plan import cells, line
from nd_jax.errors import UserError
from nd_jax.models import clip, context_adapter, mmdit, t5
from nd_jax.planning import plan as planning
from nd_jax.planning.chips import parse_topology
from nd_jax.planning.compiled import DoesNotFit, read_program, topology_devices
from nd_jax.planning.demand import Demand, demand
from nd_jax.planning.plan import Settings, changed, largest_batch, plan_run
from nd_jax.planning.programs import Systems, plannable, recipe_program, text_teacher
from nd_jax.planning.splits import parse_split, recipe_split, rows_of, token_counts, usual_split
from nd_jax.planning.traced import traced_flops
from nd_jax.planning.useful import (
    adapter_flops,
    clip_flops,
    denoiser_flops,
    padded_tokens,
    real_tokens,
    t5_flops,
)
from nd_jax.pyramid.layout import Envelope, LayoutArrays
from nd_jax.recipes.preset import load_preset
from nd_jax.training.mesh import MeshConfig, make_mesh

CONFIG = tiny_system.CONFIG
ALONE = make_mesh(MeshConfig(), jax.devices()[:1])
TOKENS = [2920, 1000, 128]
COLUMNS = 28
"""Of the teacher: four for each of seven latent frames."""


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


# ---- formulas


@pytest.mark.parametrize("stage", [0, 2])
def test_the_denoisers_formula_is_what_it_multiplies(stage):
    network = dataclasses.replace(CONFIG.diffusion_transformer, context_embedder=True)
    envelope, rows = Envelope(stage, 3, 12, 8, 16, patch_size=1), 2
    clips = [array(rows, *clip, network.in_channels) for clip in envelope.clips]
    layout = LayoutArrays(array(rows, envelope.length, dtype=jnp.int32), array(rows, envelope.length, dtype=jnp.int32))
    inputs = array(rows, 12, network.joint_attention_dim), array(rows, network.pooled_projection_dim), array(rows)
    definition = mmdit.definition(network)
    found = traced_flops(
        lambda params, clips, *rest: definition(params, [clips], *rest[:-1], [rest[-1]]),
        *(definition.abstract(), clips, *inputs, layout),
    )
    tokens = padded_tokens(envelope).times(rows)
    # On a TPU rotary embedding is a product too: of keys and queries, in the last block of the current clip's queries.
    turned = 2 * (network.num_layers - 1) * tokens.image + tokens.image + tokens.current
    turning = 2 * turned * network.heads * network.attention_head_dim**2
    assert found == denoiser_flops(network, tokens, rows) + turning


def test_the_encoders_formulas_are_what_they_multiply():
    ids = array(3, 12, dtype=jnp.int32)
    for module, config, expected in (
        (t5, CONFIG.text_encoder_3, t5_flops(CONFIG.text_encoder_3, 3, 12)),
        (clip, CONFIG.text_encoder, clip_flops(CONFIG.text_encoder, 3, 12)),
    ):
        definition = module.definition(config)
        assert traced_flops(definition, definition.abstract(), ids) == expected
    adapter = CONFIG.context_adapter
    definition = context_adapter.definition(adapter)
    found = traced_flops(definition, definition.abstract(), array(3, 12, adapter.input_dims))
    assert found == adapter_flops(adapter, 36)


def test_real_tokens_by_hand():
    """Stage 0 of 2 x 4 latents, up to two units of history, patches of 1: a unit is 2 x 4 / 16 = one half... at 4 x 8
    latents it is 1 x 2 = 2 tokens; three text tokens, two of them real."""
    envelope = Envelope(0, 2, 3, 4, 8, patch_size=1)
    assert padded_tokens(envelope).image == 6
    for unit, image, pairs in (
        (0, 2, 4 * 4),  # text and frame 0 see each other
        (1, 4, 4 * 4 + 2 * 6),
        (2, 6, 4 * 4 + 2 * 6 + 2 * 8),
    ):
        tokens = real_tokens(envelope, 2, [unit])
        assert (tokens.image, tokens.text, tokens.current, tokens.pairs) == (image, 2, 2, pairs)
    mean = real_tokens(envelope, 2)
    assert (mean.image, mean.last_pairs) == (4, (2 * 4 + 2 * 6 + 2 * 8) / 3)


# ---- the preset


def flow(name: str = "teacher", **changes):
    preset = changed(load_preset("neodragon_320p"), name, Settings(changes=tuple(changes.items())))
    return preset, recipe_program(preset, name, ALONE).recipe


def test_padding_of_the_full_size_layouts():
    """Drawn units leave a fifth of the image tokens empty; exact layouts none."""
    preset, drawn = flow(every_unit=False)
    needed = demand(preset, Systems.of(preset), drawn, 96)
    assert needed.image_share == pytest.approx((160 + 2 * 2680 / 7 + 1360) / (280 + 2 * 520 + 1600))
    assert needed.text_share == 0.75
    preset, exact = flow(batch=280)
    needed = demand(preset, Systems.of(preset), exact)
    assert (needed.image_share, needed.text_share) == (1.0, 1.0)
    assert needed.flops_share >= 0.9, "only keys that the mask hides are lost"
    assert needed.videos == 280


@pytest.mark.parametrize("name", load_preset("neodragon_320p").runs)
def test_every_run_divides_every_slice_at_the_presets_batch(name):
    """By axes that their programs can be split over: rows, then tokens or lines, then layers."""
    recipe = recipe_program(load_preset("neodragon_320p"), name, ALONE).recipe
    for slice_ in ("v5e:4x4", "v5p:4x4x8", "v6e:16x16"):
        topology = parse_topology(slice_)
        sizes = recipe_split(topology.chips, recipe)
        assert sizes.data * sizes.fsdp * sizes.tensor * sizes.context == topology.chips
        columns = len(getattr(recipe, "columns", (0,)))
        assert rows_of(recipe.config, columns) % (sizes.data * sizes.fsdp) == 0


def test_every_run_of_the_recipe_is_planned():
    preset = load_preset("neodragon_320p")
    assert plannable(preset) == list(preset.runs)
    assert text_teacher(preset).text_encoder_3.d_model == 4096
    with pytest.raises(UserError, match="run 'codec' of shapes_tiny is not planned"):
        recipe_program(load_preset("shapes_tiny"), "codec", ALONE)


def test_distillation_needs_more_than_training():
    preset, recipe = flow()
    systems = Systems.of(preset)
    training = demand(preset, systems, recipe).flops / recipe.config.batch
    _, student = flow("student")
    distillation = demand(preset, systems, student).flops / student.config.batch
    # Two updates of the fake of three passes each, then four of the student's and two of the larger teacher, by three.
    assert 2.9 < distillation / training < 3.6


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [
        ("progressive", 6.5 / 3, 7 / 3),  # three passes of a student as deep as its teacher, two guided ones of that
        ("mean_flow", 4.5 / 3, 5.5 / 3),  # four of the pruned student's, one guided one of the teacher's
        ("adversarial", 4.5 / 3, 5.5 / 3),  # three of either
    ],
)
def test_what_the_baselines_need(name, least, most):
    preset, recipe = flow()
    systems = Systems.of(preset)
    training = demand(preset, systems, recipe).flops / recipe.config.batch
    _, baseline = flow(name)
    assert least < demand(preset, systems, baseline).flops / baseline.config.batch / training < most


# ---- dividing a slice


@pytest.mark.parametrize(
    ("chips", "rows", "heads", "parts", "expected"),
    [
        (16, 64, 24, TOKENS, MeshConfig(fsdp=16)),
        (128, 64, 24, TOKENS, MeshConfig(data=4, fsdp=16, context=2)),
        (128, 16, 24, TOKENS, MeshConfig(fsdp=16, context=8)),
        (256, 16, 24, TOKENS, MeshConfig(fsdp=16, context=8, tensor=2)),
        (256, 1024, None, (), MeshConfig(data=16, fsdp=16)),
        (256, 64, None, [40], MeshConfig(data=4, fsdp=16, context=4)),
        (48, 16, 24, [1000, 125], MeshConfig(fsdp=16, tensor=3)),
    ],
)
def test_the_batch_comes_first_and_tokens_take_what_is_left(chips, rows, heads, parts, expected):
    assert usual_split(chips, rows, heads, parts) == expected


def test_a_recipe_tells_what_its_examples_are_made_of():
    """Of 40x64 latents in patches of 2: 280 + 2 x 520 + 1600 tokens with history, 40 + 2 x 160 + 640 without."""
    assert token_counts(flow(every_unit=False)[1]) == [2920, 1000, 128]


@pytest.mark.parametrize(
    ("rows", "heads", "parts", "told"),
    [
        (1, 24, TOKENS, "context=8 is all that divides 2920 and 1000 and 128 tokens, and 24 heads .* by tensor=32"),
        (4, 24, (), "data x fsdp=4 leaves 64 ways, but 24 heads do not divide by tensor=64"),
        (
            64,
            None,
            (),
            "data x fsdp=64 leaves 4 ways, but examples cannot be split further; use a batch of a multiple of 256",
        ),
        (16, None, [40], "context=8 is all that divides 40 tokens, and layers are not split"),
    ],
)
def test_what_cannot_be_divided_is_told(rows, heads, parts, told):
    with pytest.raises(UserError, match=told):
        usual_split(256, rows, heads, parts)


def test_mesh_sizes_as_words():
    assert parse_split("fsdp=32,context=4") == MeshConfig(fsdp=32, context=4)
    assert parse_split("data=-1") == MeshConfig(data=-1, fsdp=1)
    with pytest.raises(UserError, match="'model=2' is no axis and size"):
        parse_split("model=2")


# ---- searching


def fake_plan(monkeypatch, base: float, each: float, breaks: float = 15.75):
    """A compiler whose programs take ``base`` GiB and ``each`` more for every row of a chip."""
    tried = []

    def run(preset, name, topology, settings):
        rows = settings.batch // (topology.chips * COLUMNS)
        tried.append(rows)
        used = base + each * rows
        if used > breaks:
            raise DoesNotFit("it", used, breaks)
        sizes = {"argument_gib": base, "temporary_gib": each * rows, "peak_gib": used, "hbm_gib": 15.75}
        return {"batch": settings.batch, "fits_with_spare": used <= 0.9 * 15.75, **sizes}

    monkeypatch.setattr(planning, "plan_run", run)
    return tried


def test_the_largest_batch_takes_three_compilations(monkeypatch):
    tried = fake_plan(monkeypatch, 2.0, 1.2)
    found = largest_batch(load_preset("neodragon_320p"), "teacher", parse_topology("v5e:4x4"))
    assert found["batch"] == 10 * 16 * COLUMNS  # 2 + 1.2 x 10 = 14 of 14.175
    assert tried == [1, 2, 10]


def test_a_batch_of_one_row_that_does_not_fit(monkeypatch):
    fake_plan(monkeypatch, 15.0, 1.2)
    with pytest.raises(DoesNotFit, match=r"16\.20 GiB a chip, 0\.45 GiB more than there is \(15\.75 GiB\)"):
        largest_batch(load_preset("neodragon_320p"), "teacher", parse_topology("v5e:4x4"))
    tried = fake_plan(monkeypatch, 2.0, 7.0)
    assert largest_batch(load_preset("neodragon_320p"), "teacher", parse_topology("v5e:4x4"))["batch"] == 16 * COLUMNS
    assert tried == [1, 2]


# ---- the command


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["neodragon_320p"], "expected --topology"),
        (["neodragon_320p", "--topology", "v4:2x2"], "unknown topology 'v4:2x2', expected one of v5e:2x2, v5e:4x4"),
        (["neodragon_320p", "--topology", "v5p:4x4"], "expected one of v5p:2x2x1"),
        (["neodragon_320p", "--topology", "v5e:4x4", "--run", "codec"], "no run 'codec' of neodragon_320p to plan"),
        (["neodragon_320p", "--topology", "v5e:4x4", "--batch", "many"], "expected a number of at least 1, or auto"),
        (["neodragon_320p", "--topology", "v5e:4x4", "--mesh", "x=1"], "'x=1' is no axis and size"),
        (["neodragon_320p", "--topology", "v5e:4x4", "--efficiency", "2"], "at most 1"),
        (["nowhere", "--topology", "v5e:4x4"], "unknown preset 'nowhere'"),
    ],
)
def test_bad_input_is_one_line(refused, words, told):
    refused("plan", *words, told=told)


def test_without_libtpu_it_says_what_to_install(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    refused("plan", "neodragon_320p", "--topology", "v5e:4x4", "--run", "teacher", told="pip install 'nd-jax[tpu]'")


def test_a_checkpoint_of_another_preset(refused, monkeypatch, tmp_path):
    from nd_jax.training import checkpoint

    monkeypatch.setattr(checkpoint, "read_record", lambda _: {"identity": {"preset": "shapes_base/teacher"}})
    words = ["neodragon_320p", "--topology", "v5e:4x4", "--checkpoint", tmp_path]
    refused("plan", *words, told="belongs to preset 'shapes_base', the plan is for 'neodragon_320p'")


def test_a_compiled_program_becomes_a_row():
    """A program for this machine's devices stands in for the slice's: one product, all of it useful."""
    devices = np.array([SimpleNamespace(coords=(i % 2, i // 2, 0)) for i in range(4)])
    mesh, topology = SimpleNamespace(size=4, devices=devices), parse_topology("v5e:2x2")
    program = jax.jit(lambda x, w: x @ w).lower(array(128, 256), array(256, 64))
    reading = read_program("a product", program.compile, topology, mesh)
    assert reading.flops == 2 * 128 * 256 * 64
    assert reading.argument == 4 * (128 * 256 + 256 * 64) / 2**30
    needed = Demand(4 * reading.flops / 2, 10, 8, 1.0, 0.5, None)
    plan = planning._told(reading, topology, Settings(efficiency=0.5), 4 * reading.flops, needed, 3600)
    plan |= {"run": "teacher", "topology": topology.name, "batch": 8, "mesh": {"data": 1, "fsdp": 4}}
    assert plan["flops_difference"] == 0
    assert plan["useful_of_compiled"] == 0.5
    low, high = plan["step_seconds"]
    assert low == max(plan["seconds"].values())
    assert high == pytest.approx(sum(plan["seconds"].values()))
    assert plan["mfu"][0] == pytest.approx(0.5 * plan["seconds"]["compute"] / low)
    assert plan["chip_hours"] == pytest.approx([4 * low, 4 * high])
    assert len(cells(plan)) == 12
    assert line(plan).startswith("teacher on v5e:2x2: batch 8, 0.00 of 15.75 GiB")
    json.dumps(plan)


# ---- real compilations


@pytest.mark.heavy
@pytest.mark.libtpu
@pytest.mark.parametrize("name", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_a_small_step_compiles_for_every_generation(name):
    """Recovery of a shapes system of three blocks: counts agree, memory is told, and bounds are in order."""
    pytest.importorskip("libtpu")
    preset = load_preset("shapes_base")
    network = dataclasses.replace(preset.system.diffusion_transformer, num_layers=3)
    preset = dataclasses.replace(preset, system=dataclasses.replace(preset.system, diffusion_transformer=network))
    topology = parse_topology(name)
    columns = len(recipe_program(preset, "recovery", ALONE, removed=1).recipe.columns)
    settings = Settings(batch=4 * columns, mesh=MeshConfig(fsdp=4), removed=1, changes=(("remat", "dots"),))
    found = json.loads(json.dumps(plan_run(preset, "recovery", topology, settings)))
    told = {"batch": 4 * columns, "remat": "dots", "microbatches": 1}
    assert {name: found["recipe"][name] for name in told} == told
    assert len(topology_devices(topology)) == topology.chips == 4
    assert found["flops_difference"] == pytest.approx(0, abs=0.1)
    assert 0 < found["peak_gib"] < found["hbm_gib"]
    assert found["unknown_loops"] == 0
    assert found["wire_bytes"]
    low, high = found["step_seconds"]
    assert 0 < low <= high
    assert found["fits_with_spare"]


# ---- sweeps


def test_the_full_size_sweep_step_is_lowered_for_a_mesh():
    """The largest stage, for eight devices: every one has the weights and its own candidates, and the work is that of
    as many layers as a candidate keeps."""
    from nd_jax.planning.sweeping import sweep_calls

    preset = load_preset("neodragon_320p")
    mesh = make_mesh(MeshConfig(data=-1, fsdp=1))
    layers, chunk = 18, 4
    options = {"layers": layers, "chunk": chunk, "prompts": 16, "batch": 8}
    calls = sweep_calls(preset, mesh, **options)
    assert [call.stage for call in calls] == [0, 1, 2]
    assert {call.times for call in calls} == {2 * preset.latent_size[0] * 2}
    call = calls[-1]
    lowered = jax.jit(call.function).lower(*call.arguments)
    (errors,) = jax.tree.leaves(lowered.out_info)
    assert errors.shape == (chunk * 8, 8)
    candidates = call.arguments[3].kept
    assert candidates.sharding.shard_shape(candidates.shape) == (
        chunk,
        preset.system.diffusion_transformer.num_layers - 1,
    )
    weights = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(call.arguments[0]))
    assert 3e9 < weights < 5e9, "two thousand million parameters in bfloat16"
    (single,) = sweep_calls(preset, ALONE, **options)[-1:]
    done = traced_flops(single.plain, *single.plain_arguments)
    network = dataclasses.replace(preset.system.diffusion_transformer, num_layers=layers)
    envelope, rows = single_envelope(preset), call.arguments[1].text.shape[0]
    expected = chunk * denoiser_flops(network, padded_tokens(envelope).times(rows), rows)
    np.testing.assert_allclose(done, expected, rtol=0.02)


def test_a_sweeps_line():
    plan = {"run": "sweep", "topology": "v5e:4x4", "batch": 8, "layers": 18, "mfu": [0.5, 0.25], "limit": "compute"}
    plan |= {"peak_gib": 9.0, "hbm_gib": 15.75, "step_seconds": [10.0, 20.0], "candidates_per_second": [51.2, 25.6]}
    assert line(plan).endswith("25.6 to 51.2 candidates/s of 18 layers")


def single_envelope(preset):
    from nd_jax.planning.programs import envelopes_of

    return envelopes_of(preset, preset.latent_size[0])[-1]
