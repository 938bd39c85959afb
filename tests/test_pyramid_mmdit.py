"""The pyramid and the denoiser together: padding changes nothing, training and sampling equal the reference."""

import json
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import mmdit_golden
import numpy as np
import pytest
from mmdit_golden import channels_last
from safetensors.numpy import load_file

from nd_jax.models.mmdit import MMDiTConfig, definition
from nd_jax.pyramid.columns import column_stages
from nd_jax.pyramid.history import history_slots, unit_history
from nd_jax.pyramid.layout import Envelope, envelopes, exact_layout, layout_arrays
from nd_jax.pyramid.sampler import CountingJit, SamplePlan, guide, sample, twice
from nd_jax.pyramid.schedule import Schedule
from nd_jax.pyramid.targets import flow_loss

UNITS = 6
TRAINING = ["image", "full_sequence"] + [f"temporal_{kind}" for kind in ("111", "345", "524", "ratio121", "fpu2")]
QUICK = {"xla_backend_optimization_level": 0}  # these programs run once: halve the time to compile them


@pytest.fixture(scope="module")
def network(golden):
    config, params = mmdit_golden.load(golden("mmdit"))
    return SimpleNamespace(config=config, params=params, apply=definition(config))


def snr_db(exact, other):
    """Signal to noise in dB, the exact prediction being the signal."""
    exact, other = np.asarray(exact, np.float64), np.asarray(other, np.float64)
    return 10 * np.log10(np.sum(exact**2) / max(np.sum((exact - other) ** 2), 1e-300))


@pytest.mark.parametrize(
    ("stage", "height", "width", "units"),
    [(0, 8, 16, range(7)), (1, 8, 16, range(7)), (2, 8, 16, range(7)), (2, 16, 8, (2, 6))],
)
def test_padded_envelope_predicts_what_the_exact_layout_does(network, stage, height, width, units):
    """Units 0 .. 6 side by side in one traced batch, with text padded from not at all to entirely."""
    rng = np.random.Generator(np.random.Philox(8))
    draw = lambda *shape: rng.standard_normal(shape, dtype=np.float32)  # noqa: E731
    config, rows, length = network.config, UNITS + 1, 6
    envelope = Envelope(stage, UNITS, length, height, width, config.patch_size)
    latents = draw(rows, UNITS, height, width, config.in_channels)
    z = draw(rows, 1, *envelope.size(stage), config.in_channels)
    text, pooled = draw(rows, length, config.width), draw(rows, config.pooled_projection_dim)
    timestep = np.linspace(1000, 1, rows, dtype=np.float32)
    text_mask = (np.arange(length) < np.arange(length, length - rows, -1)[:, None]).astype(np.int32)

    @partial(jax.jit, compiler_options=QUICK)
    def padded(unit_index):
        clips = [*history_slots(envelope, latents, unit_index), z]
        layout = layout_arrays(envelope, unit_index, text_mask)
        return network.apply(network.params, [clips], text, pooled, timestep, [layout])[0]

    together = padded(jnp.arange(rows))
    run = jax.jit(network.apply, compiler_options=QUICK)
    for unit in units:
        row = slice(unit, unit + 1)
        clips = [*unit_history([latents[row, u : u + 1] for u in range(unit)], 3)[stage], z[row]]
        layout = exact_layout([clip.shape[1:4] for clip in clips], text_mask[row], config.patch_size)
        (exact,) = run(network.params, [clips], text[row], pooled[row], timestep[row], [layout])
        assert snr_db(exact, together[row]) >= 110


@pytest.mark.parametrize("name", TRAINING)
def test_training_predictions_and_loss(golden, network, name):
    case = golden("training")
    inputs, expected = case.subcase(name)
    groups = len(column_stages(case.meta["subcases"][name]["sample_ratios"]))
    clips = [[channels_last(x) for x in column] for column in mmdit_golden.sequence(expected, "noisy")]
    mask = inputs["encoder_attention_mask"]
    layouts = [exact_layout([x.shape[1:4] for x in clips[g]], mask[g::groups]) for g in range(groups)]
    rest = (inputs["encoder_hidden_states"], inputs["pooled_projections"], expected["timesteps_flat"], layouts)
    predictions = jax.jit(network.apply, compiler_options=QUICK)(network.params, clips, *rest)
    for g, prediction in enumerate(predictions):
        np.testing.assert_allclose(prediction, channels_last(expected[f"pred/{g}"]), rtol=0, atol=1e-4)
    targets = [channels_last(expected[f"targets/{g}"]) for g in range(groups)]
    np.testing.assert_allclose(flow_loss(predictions, targets), expected["loss"], rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def generator(golden):
    """The official checkpoint of the generation case as a function from subcase names to latents."""
    case = golden("generation")
    folder = case.folder / "checkpoint" / "diffusion_transformer_320p"
    config = MMDiTConfig.from_dict(json.loads((folder / "config.json").read_text()))
    params = mmdit_golden.from_torch(load_file(folder / "diffusion_pytorch_model.safetensors"), config.num_layers)
    network = definition(config)
    inputs, expected = case.subcase("text")
    text = [expected["prompt_embeds_adapted_neg"], expected["prompt_embeds_adapted_pos"]]
    mask = [inputs["neg/attention_mask"], inputs["pos/attention_mask"]]
    pooled = [inputs["neg/pooled"], inputs["pos/pooled"]]
    stages = envelopes(5, text[0].shape[1], 16, 24, patch_size=config.patch_size)

    def programs(guided):
        first = 0 if guided else 1
        texts, masks, pools = (np.concatenate(pair[first:]) for pair in (text, mask, pooled))
        rows = twice if guided else lambda x: x

        def program(envelope):
            @CountingJit
            def velocity(z, timestep, history, unit_index, guidance):
                clips = [rows(clip) for clip in (*history, z)]
                layout = layout_arrays(envelope, unit_index, masks)
                (v,) = network(params, [clips], texts, pools, rows(timestep), [layout])
                return guide(v, guidance) if guided else v

            return velocity

        return [program(envelope) for envelope in stages]

    kinds = {guided: programs(guided) for guided in (False, True)}

    def generate(name, trace):
        facts, (inputs, expected) = case.meta["subcases"][name], case.subcase(name)
        plan = SamplePlan(
            facts["num_inference_steps"],
            facts["video_num_inference_steps"],
            facts["guidance_scale"],
            facts["video_guidance_scale"],
        )
        latents = channels_last(expected["latents"])
        out = sample(
            kinds[facts["do_classifier_free_guidance"]].__getitem__,
            stages,
            Schedule(),
            plan,
            channels_last(inputs["initial_noise"]),
            [channels_last(inputs[key]) for key in sorted(inputs) if key.startswith("block_noise/")],
            first_latent=latents[:, :1] if facts["has_image"] else None,
            trace=trace,
        )
        return out, latents, expected

    return SimpleNamespace(generate=generate, kinds=kinds, case=case)


def test_generation_equals_the_reference_with_three_programs_each(generator):
    for name in ("steps111", "steps222_cfg", "steps_mixed_cfg", "hybrid111", "hybrid_cfg", "image_only"):
        calls = []
        out, latents, expected = generator.generate(name, calls.append)
        np.testing.assert_allclose(out, latents, rtol=0, atol=5e-4, err_msg=name)
        assert len(calls) == generator.case.meta["subcases"][name]["n_dit_calls"]
        for n, call in enumerate(calls):
            prefix = f"trace/{n:03d}"
            for found, key in ((call.velocity, "velocity_after_guidance"), (call.sample_before, "sample_before")):
                recorded = channels_last(expected[f"{prefix}/{key}"])
                np.testing.assert_allclose(found, recorded, rtol=0, atol=5e-4, err_msg=f"{name}/{prefix}/{key}")
    assert [p.compilations for kind in generator.kinds.values() for p in kind] == [1] * 6
