"""Generation: the recorded runs, how many programs it takes, and what a prompt and a seed fix."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_system

from nd_jax.errors import UserError
from nd_jax.generate import Generator, Noise, check_size, generate, generate_batches, needs_negative
from nd_jax.models.system import ADAPTER, DENOISER, T5, Conditions
from nd_jax.pyramid.sampler import SamplePlan
from nd_jax.system import load_system

SUBCASES = ("steps111", "steps222_cfg", "steps_mixed_cfg", "hybrid111", "hybrid_cfg", "image_only")
PROMPTS = ["a small red circle moves right on a white background", "", "a large blue cross rests on navy"]


def channels_last(x: np.ndarray) -> np.ndarray:
    return np.moveaxis(x, 1, -1)


# ---- the recorded runs


@pytest.fixture(scope="module")
def case(golden):
    return golden("generation")


@pytest.fixture(scope="module")
def recorded(case):
    """The checkpoint of the recorded runs at their size, and the conditions of both prompts."""
    system = load_system(case.folder / "checkpoint")
    generator = Generator(system, height=128, width=192, frames=25, text_length=10)
    inputs, _ = case.subcase("text")

    def conditions(side: str) -> Conditions:
        adapted = system.definitions[ADAPTER](system.params[ADAPTER], inputs[f"{side}/prompt_embeds"])
        return Conditions(adapted, jnp.asarray(inputs[f"{side}/attention_mask"], jnp.int32), inputs[f"{side}/pooled"])

    return generator, conditions("pos"), conditions("neg")


def test_prompt_embeddings_are_the_recorded_ones(case, recorded):
    generator, positive, negative = recorded
    system, (inputs, outputs) = generator.system, case.subcase("text")
    for side, adapted in (("pos", positive), ("neg", negative)):
        ids, mask = (jnp.asarray(inputs[f"{side}/{name}"], jnp.int32) for name in ("input_ids", "attention_mask"))
        embeds = jax.jit(system.definitions[T5])(system.params[T5], ids, mask).prompt_embeds
        np.testing.assert_allclose(embeds, inputs[f"{side}/prompt_embeds"], rtol=0, atol=5e-5)
        np.testing.assert_allclose(adapted.text, outputs[f"prompt_embeds_adapted_{side}"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", SUBCASES)
def test_recorded_runs(case, recorded, name):
    """Latents within 5e-4 and frames within one grey level, as golden/README.md has it."""
    generator, positive, negative = recorded
    inputs, outputs = case.subcase(name)
    about = case.meta["subcases"][name]
    blocks = [channels_last(inputs[key]) for key in sorted(key for key in inputs if key.startswith("block_noise/"))]
    noise = Noise(channels_last(inputs["initial_noise"]), blocks)
    plan = SamplePlan(
        about["num_inference_steps"],
        about["video_num_inference_steps"],
        about["guidance_scale"],
        about["video_guidance_scale"],
    )
    assert needs_negative(plan) == about["do_classifier_free_guidance"]
    first = None
    if about["has_image"]:
        first = generator.encode_first_frame(inputs["image_uint8"][None], channels_last(inputs["image_latent_noise"]))
    calls = []
    latents = generator.latents(
        positive, noise, plan, negative=negative, first_latent=first, trace=lambda call: calls.append(call)
    )
    assert len(calls) == about["n_dit_calls"]
    # runs of one to four latent frames share three programs with guidance and three without
    assert [stage.compilations for stage in generator._stages[needs_negative(plan), False]] == [1, 1, 1]
    np.testing.assert_allclose(latents, channels_last(outputs["latents"]), rtol=0, atol=5e-4)
    if "frames_uint8" in outputs:
        frames = generator.decode(latents)
        assert frames.shape == (1, *outputs["frames_uint8"].shape)
        assert np.abs(frames[0].astype(int) - outputs["frames_uint8"]).max() <= 1


# ---- a system of our own


def test_three_programs_for_any_number_of_frames(tiny, tiny_generator):
    """Whatever else the session's generator has compiled: none for the other lengths."""
    conditions, negative = tiny.conditions(PROMPTS[:2])[0], tiny.conditions(["", ""])[0]
    shapes, programs = [], [tiny_generator.compilations]
    for count in (3, 1, 2):
        noise = tiny_generator.noise(0, [0, 1], count)
        shapes.append(tiny_generator.latents(conditions, noise, tiny.sampling, negative=negative).shape)
        programs.append(tiny_generator.compilations)
    assert shapes == [(2, count, 8, 16, 4) for count in (3, 1, 2)]
    assert programs[1] - programs[0] <= 3
    assert programs[1] == programs[2] == programs[3]


def test_shorter_videos_are_the_beginning_of_longer_ones(tiny, tiny_generator):
    conditions, negative = tiny.conditions(PROMPTS[:2])[0], tiny.conditions(["", ""])[0]
    long, short = (
        tiny_generator.latents(conditions, tiny_generator.noise(0, [0, 1], count), tiny.sampling, negative=negative)
        for count in (3, 2)
    )
    np.testing.assert_array_equal(long[:, :2], short)


@pytest.fixture(scope="module")
def videos(tiny, tiny_generator):
    return generate(tiny, PROMPTS, seed=3, batch=2, generator=tiny_generator)


def test_videos_have_the_size_asked_for(videos):
    assert videos.shape == (3, 17, 64, 128, 3)
    assert videos.dtype == np.uint8
    assert all(video.std() > 5 for video in videos), "a video is blank"


def test_prompt_and_seed_fix_the_video_whatever_the_batch(tiny, tiny_generator, videos):
    """Bit for bit in a batch of the same size, to rounding in another."""
    again = list(generate_batches(tiny, PROMPTS, seed=3, batch=2, generator=tiny_generator))
    assert [len(part) for part in again] == [2, 1]
    np.testing.assert_array_equal(np.concatenate(again), videos)
    other = generate(tiny, [PROMPTS[0], PROMPTS[2]], seed=3, batch=2, generator=tiny_generator)
    np.testing.assert_array_equal(other[0], videos[0])

    pair, one = tiny_generator.noise(3, [0, 1]), tiny_generator.noise(3, [1])
    np.testing.assert_array_equal(one.initial[0], pair.initial[1])
    np.testing.assert_array_equal(one.block(1, 2)[0], pair.block(1, 2)[1])
    np.testing.assert_array_equal(one.fresh(1, 2, 0)[0], pair.fresh(1, 2, 0)[1])
    np.testing.assert_array_equal(one.first[0], pair.first[1])
    whole, alone = (velocity_of(tiny, tiny_generator, pair.initial, rows) for rows in (slice(0, 2), slice(1, 2)))
    np.testing.assert_allclose(alone[0], whole[1], rtol=0, atol=1e-4)


def test_fresh_noise_belongs_to_every_place_where_it_is_used(tiny, tiny_generator):
    """A plan that renews its noise draws it from the seed, unlike anywhere else, and makes another video."""
    noise, (conditions, _) = tiny_generator.noise(3, [0]), tiny.conditions(PROMPTS[:1])
    draws = {place: noise.fresh(*place) for place in ((1, 1, 0), (1, 1, 1), (1, 2, 0), (2, 1, 0), (0, 1, 0))}
    assert all(draw.shape == (1, 1, *tiny_generator.envelopes[0].size(place[1]), 4) for place, draw in draws.items())
    numbers = [draw.ravel()[:8].tobytes() for draw in [*draws.values(), noise.block(1, 1), noise.block(1, 2)]]
    assert len(set(numbers)) == len(numbers)
    plan = SamplePlan((1, 1, 1), (1, 1, 1), grid="plain")
    plain, renewed, again = (
        np.asarray(tiny_generator.latents(conditions, noise, dataclasses.replace(plan, renew=renew)))
        for renew in (False, True, True)
    )
    np.testing.assert_array_equal(again, renewed)
    assert (renewed != plain).any()
    assert np.isfinite(renewed).all()


def velocity_of(tiny, generator, z: np.ndarray, rows: slice, negative: Conditions | None = None, scale: float = 1.0):
    """One call of the top stage for some of two prompts, with a made-up history."""
    envelope = generator.envelopes[2]
    history = tuple(np.repeat(z[rows, :1, :h, :w], t, axis=1) for t, h, w in envelope.clips[:-1])
    conditions = Conditions(*(x[rows] for x in tiny.conditions(PROMPTS[:2])[0]))
    if negative is not None:
        conditions = Conditions(*(jnp.concatenate(pair) for pair in zip(negative, conditions, strict=True)))
    program = generator._stages[negative is not None, False][2]
    z = z[rows, :1]
    times = np.full(len(z), 500, np.float32)
    return program(tiny.on_device[DENOISER], conditions, z, times, history, np.int32(1), np.float32(scale))[0]


def test_seed_prompt_and_place_all_matter(tiny, tiny_generator, videos):
    other_seed = generate(tiny, PROMPTS[:2], seed=4, batch=2, generator=tiny_generator)
    other_place = generate(tiny, [PROMPTS[1], PROMPTS[0]], seed=3, batch=2, generator=tiny_generator)
    assert (other_seed[0] != videos[0]).mean() > 0.5
    assert (other_place[1] != videos[0]).mean() > 0.5
    assert (other_place[0] != videos[0]).mean() > 0.01, "the prompt is not heard"


def test_guidance_of_one_is_no_guidance(tiny, tiny_generator):
    """Scales 0 and 1 need no negative prompt and no doubled batch; next to a guided unit, 0 means 1."""
    plans = {
        scales: dataclasses.replace(tiny.sampling, first_guidance=scales[0], later_guidance=scales[1])
        for scales in ((0.0, 1.0), (1.0, 1.0), (0.0, 3.0), (1.0, 3.0))
    }
    assert [needs_negative(plan) for plan in plans.values()] == [False, False, True, True]
    conditions, negative = tiny.conditions(PROMPTS[:2])[0], tiny.conditions(["", ""])[0]
    noise = tiny_generator.noise(0, [0, 1], 2)
    made = [
        tiny_generator.latents(conditions, noise, plans[scales], negative=negative)
        for scales in ((0.0, 3.0), (1.0, 3.0))
    ]
    np.testing.assert_array_equal(*made)
    with pytest.raises(UserError, match="negative prompt"):
        tiny_generator.latents(conditions, noise, plans[1.0, 3.0])

    both, z = slice(0, 2), noise.initial
    alone, *guided = (
        velocity_of(tiny, tiny_generator, z, both, *given)
        for given in ((), (negative, 1.0), (negative, 0.0), (negative, 3.0))
    )
    np.testing.assert_allclose(guided[0], alone, rtol=0, atol=1e-4)
    np.testing.assert_allclose(guided[2], guided[1] + 3 * (guided[0] - guided[1]), rtol=0, atol=1e-4)
    assert np.abs(guided[2] - alone).max() > 1e-3


def test_a_given_first_frame_is_kept(tiny, tiny_generator):
    """Hybrid generation decodes to the codec's reconstruction of the given frame, followed by frames of its own."""
    image = np.random.Generator(np.random.Philox(5)).integers(0, 256, (2, 64, 128, 3), np.uint8)
    noise = tiny_generator.noise(0, [0, 1])
    first = tiny_generator.encode_first_frame(image, noise.first)
    assert first.shape == (2, 1, 8, 16, 4)
    made = generate(tiny, PROMPTS[:2], first_frames=image, batch=2, generator=tiny_generator)
    alone = tiny_generator.decode(first)
    assert alone.shape == (2, 1, 64, 128, 3)
    assert np.abs(made[:, :1].astype(int) - alone).max() <= 1


def test_prompts_that_are_cut_are_told(tiny):
    conditions, warnings = tiny.conditions(["red " * 30 + "zebra", "a red ball"])
    assert conditions.text.shape == (2, tiny_system.TEXT_LENGTH, 16)
    assert len(warnings) == 2
    assert all("zebra" in line and "cut to 12 tokens" in line for line in warnings)


@pytest.mark.parametrize(
    ("height", "width", "frames", "told"),
    [
        (70, 64, 9, "64x64"),
        (64, 100, 9, "64x96"),
        (0, 64, 9, "32x64"),
        (64, 64, 12, "nearest is 9"),
        (64, 64, 0, "nearest is 1"),
        (1 << 20, 1 << 20, 9, "pixels"),
    ],
)
def test_sizes_that_do_not_fit_name_the_nearest(tiny, height, width, frames, told):
    with pytest.raises(UserError, match=told):
        Generator(tiny, height=height, width=width, frames=frames)


def test_nearest_sizes_are_legal(tiny):
    codec = tiny.config.causal_video_vae
    assert check_size(64, 96, 9, codec, 1, 3) == 2
    assert check_size(320, 512, 49, codec, 2, 3) == 7


def test_nothing_to_do_is_an_error(tiny):
    with pytest.raises(UserError, match="at least one"):
        generate(tiny, [])
    with pytest.raises(UserError, match="at least one"):
        generate(tiny, PROMPTS, batch=0)


# ---- folders that do not make a system


def test_parts_that_do_not_fit_are_named(tiny_folder, tmp_path):
    import json
    import shutil

    folder = tmp_path / "system"
    shutil.copytree(tiny_folder / "system", folder)
    defaults = folder / "generation_config.json"
    for content, told in (
        ({"video": {"height": "big"}}, "video height is 'big'"),
        ({"video": {"text_length": 10**9}}, "text_length"),
        ({"sampling": {"first_steps": [0, 1, 1]}}, "first_steps"),
        ({"sampling": {"grid": "odd"}}, "grid"),
        ({"sampling": {"first_guidance": "high"}}, "real number"),
        ({"schedule": {"stages": 99}}, "stages"),
        ({"schedule": {"colour": 1}}, "colour"),
        ({"video": []}, "expected an object"),
    ):
        defaults.write_text(json.dumps(content))
        with pytest.raises(UserError, match=told):
            load_system(folder)
    defaults.unlink()
    assert load_system(folder).video.frames == 49  # the official default
    shutil.rmtree(folder / "tokenizer_2")
    with pytest.raises(UserError, match="tokenizer_2"):
        load_system(folder).tokens(["a ball"])
    big = json.loads((folder / "tokenizer" / "vocab.json").read_text())
    big |= {f"extra{n}": len(big) + n for n in range(100)}
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps(big))
    with pytest.raises(UserError, match="600 embeddings"):
        load_system(folder)
    shutil.rmtree(folder / "causal_video_vae")
    with pytest.raises(UserError, match="causal_video_vae"):
        load_system(folder)


def test_networks_of_different_systems_are_refused():
    from nd_jax.system import check_parts

    config = tiny_system.CONFIG
    wrong = {
        DENOISER: {"pooled_projection_dim": 24, "told": "CLIP"},
        T5: {"out_dim": 24, "told": "text_encoder_3's output"},
        ADAPTER: {"output_dims": 24, "told": "text states"},
    }
    check_parts(config, "here")
    for part, change in wrong.items():
        told = change.pop("told")
        other = dataclasses.replace(config, **{part: dataclasses.replace(getattr(config, part), **change)})
        with pytest.raises(UserError, match=told):
            check_parts(other, "here")
