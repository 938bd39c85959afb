"""The protocol: right on ground truth, at chance on what knows nothing of its prompts, the same for every system."""

from __future__ import annotations

import dataclasses

import numpy as np
import protocol_videos
import pytest
from protocol_videos import Drawn

from nd_jax.data import captions as words
from nd_jax.data.judge import permutation_chance
from nd_jax.data.source import ShapesSource
from nd_jax.data.world import ATTRIBUTES, held_out_triples, world_named
from nd_jax.data.world import SPLITS as SOURCES
from nd_jax.errors import UserError
from nd_jax.protocol.definition import FULL, PROTOCOLS, QUICK, SPLITS, TEMPLATES, Protocol, chosen_splits, prompt_list
from nd_jax.protocol.figures import as_json, chance, compare, split_figures, system_figures, template_difference
from nd_jax.protocol.readings import Measured, ProtocolResult, SplitReadings, flicker, measure, stack
from nd_jax.protocol.run import CONTROLS, clips_to_do, run_protocol
from nd_jax.protocol.statistics import by_attribute, estimate, mean, per_prompt, quotient, quotient_of_means

SMALL = Protocol("small", prompts=18, sampling_seeds=(0, 1), resamples=500)


# ---- prompts


def test_what_is_fixed():
    assert FULL.sampling_seeds == (0, 1, 2)
    assert set(PROTOCOLS) == {"quick", "full"}
    for protocol in PROTOCOLS.values():
        assert protocol.prompts % 9 == 0, "some motions would be asked for more often than others"
        assert protocol.prompt_seed == FULL.prompt_seed
    assert {split.world_name for split in SPLITS.values()} == {"64x64", "64x128", "two_objects"}
    short, long = (prompt_list(dataclasses.replace(QUICK, prompts=count), "two_objects") for count in (9, 18))
    assert short.captions == long.captions[:9]
    np.testing.assert_array_equal(short.labels, long.labels[:9])


def test_prompts_are_of_their_split():
    triples = held_out_triples()
    for name, split in SPLITS.items():
        prompts = prompt_list(QUICK, name)
        assert len(set(prompts.captions)) == QUICK.prompts
        held_out = [tuple(row[[0, 1, 3]].tolist()) in triples for row in prompts.labels.reshape(-1, 5)]
        assert set(held_out) == {split.source == "heldout_combinations"}
        assert prompts.labels.shape == (QUICK.prompts, split.world.objects, 5)


def test_nothing_is_drawn_as_training_draws_it():
    """No generator of the evaluation has the key of one that training uses, whatever training's seed; held-out
    templates have words in an order that training's never have."""
    ours = {split.source for split in SPLITS.values()}
    assert "train" not in ours
    assert ours < set(SOURCES)
    one = world_named("64x64")
    for source in sorted(ours):
        for seed in (0, FULL.prompt_seed):
            evaluation, training = (ShapesSource(one, split, 40, seed) for split in (source, "train"))
            assert not np.array_equal(evaluation.labels, training.labels)
            pairs = [
                (each._random(n, purpose).random(4))
                for each in (evaluation, training)
                for n in range(5)
                for purpose in (0, 1)
            ]
            assert len({tuple(draw) for draw in pairs}) == 20
    for objects in (1, 2):
        assert not set(words.templates(objects, held_out=True)) & set(words.templates(objects, held_out=False))
    # With every slot blanked out, a template cannot be mistaken for another.
    skeletons = [
        {
            words.fill(template, prompt_list(QUICK, "seen").labels[0], lambda options: options[0])
            for template in words.templates(1, held_out=held_out)
        }
        for held_out in (True, False)
    ]
    assert not skeletons[0] & skeletons[1]


def test_telegram_style_is_no_held_out_template():
    """What text encoders are pre-trained on beside the templates never spells a caption of the held-out ones."""
    rng = np.random.Generator(np.random.Philox(7))
    for name in ("heldout_templates", "two_objects"):
        labels, held_out = prompt_list(QUICK, name).labels, set()
        for row in labels:
            held_out |= {words.caption(row, rng, held_out=True) for _ in range(10)}
        assert not held_out & {words.loose_caption(row, rng) for row in labels for _ in range(50)}


def test_reworded_prompts_differ_in_the_template_only():
    held_out, reworded = (prompt_list(QUICK, name) for name in TEMPLATES)
    np.testing.assert_array_equal(held_out.labels, reworded.labels)
    assert not set(held_out.captions) & set(reworded.captions)
    assert held_out.captions == tuple(held_out.source.caption(n) for n in range(QUICK.prompts))
    for ours, theirs, (labels,) in zip(held_out.captions, reworded.captions, held_out.labels, strict=True):
        for attribute in ("colour", "shape", "size", "background"):
            value = ATTRIBUTES[attribute][labels[tuple(ATTRIBUTES).index(attribute)]]
            spoken = max((word for word in words.WORDS[value] if f" {word}" in f" {ours}"), key=len)
            assert spoken in theirs, (ours, theirs)


def test_plain_prompts_have_no_templates():
    plain = dataclasses.replace(QUICK, plain=True)
    assert not set(chosen_splits(plain)) & set(TEMPLATES)
    assert prompt_list(plain, "seen").captions[0] == words.plain_caption(prompt_list(QUICK, "seen").labels[0])
    usual = chosen_splits(QUICK)
    assert usual == tuple(name for name in SPLITS if name not in ("wide", "wide_heldout"))
    assert chosen_splits(QUICK, ("wide", "seen")) == ("seen", "wide"), "those that are named"
    assert chosen_splits(QUICK, ("two_objects", "seen")) == ("seen", "two_objects")
    for protocol, names, told in (
        (plain, ("heldout_templates",), "plain"),
        (QUICK, ("unseen",), "'unseen'"),
        (QUICK, (), "none"),
    ):
        with pytest.raises(UserError, match=told):
            chosen_splits(protocol, names)


@pytest.mark.parametrize(
    "change",
    [
        {"prompts": 0},
        {"prompts": 2.0},
        {"prompt_seed": -1},
        {"sampling_seeds": ()},
        {"sampling_seeds": (0, 0)},
        {"sampling_seeds": [0]},
        {"sampling_seeds": (-1,)},
        {"resamples": 1},
        {"plain": 1},
    ],
)
def test_protocols_that_are_none(change):
    with pytest.raises(UserError, match=rf"protocol: .*{next(iter(change)).split('_')[0]}.*expected"):
        Protocol(**change)


# ---- intervals


def readings_of(right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(read, labels) of one object where ``right`` [seeds, n, 5] says which attributes are."""
    labels = np.zeros((right.shape[1], 1, 5), int)
    return np.where(right[:, :, None], 0, 1), labels


def test_seeds_of_a_prompt_stay_together():
    """Three copies of every video add nothing: the interval stays, where a bootstrap over videos would narrow it."""
    rng = np.random.Generator(np.random.Philox(3))
    right = rng.random((1, 60, 5)) < 0.7
    width = {}
    for name, each in (("one", right), ("copies", right.repeat(3, axis=0))):
        found = by_attribute(mean, per_prompt(*readings_of(each)), resamples=2000)
        assert found["mean"].value == pytest.approx(right.mean())
        assert found["shape"].value == pytest.approx(right[0, :, 1].mean())
        assert found["mean"].low < found["mean"].value < found["mean"].high
        width[name] = found["mean"].high - found["mean"].low
    naive = estimate(mean, right.repeat(3, axis=0).mean(-1).ravel(), resamples=2000)
    assert width["copies"] == width["one"]
    assert width["copies"] > 1.5 * (naive.high - naive.low)
    # 95 % of a normal mean is 1.96 standard errors either way.
    expected = 2 * 1.96 * right.mean((0, 2)).std() / 60**0.5
    assert width["one"] == pytest.approx(expected, rel=0.1)


def test_ratios_are_of_means_and_paired():
    x, y = np.array([1.0, 2.0, 3.0, 4.0]), np.array([2.0, 4.0, 6.0, 8.0])
    found = estimate(quotient, x, y, resamples=200)
    assert tuple(found) == (0.5, 0.5, 0.5), "the pairs were torn apart"
    ones = np.ones(4)
    assert estimate(quotient_of_means, x, ones, 2 * y, 2 * ones, resamples=200).value == 0.5
    assert estimate(quotient_of_means, x, ones, y, 2 * ones, resamples=200).value == 1.0


def test_nothing_to_measure_is_said():
    nothing = estimate(quotient, np.zeros(4), np.zeros(4), resamples=200)
    assert np.isnan(nothing).all()
    assert np.isnan(estimate(quotient, np.zeros(4), np.array([0, 0, 0, 1.0]), resamples=200).high)
    assert nothing.summary() == {"value": None, "interval_95": [None, None]}
    assert np.isnan(estimate(mean, np.zeros(0), resamples=200)).all()
    assert tuple(estimate(mean, np.array([0.25]), resamples=200)) == (0.25, 0.25, 0.25)


# ---- chance


def test_chance_of_several_seeds_is_that_of_the_prompts():
    """Copies of every video change neither the mean nor the error; other videos make the error smaller."""
    rng = np.random.Generator(np.random.Philox(5))
    read, labels = rng.integers(0, 3, (1, 40, 2, 5)), rng.integers(0, 3, (40, 2, 5))
    once, thrice = (permutation_chance(each, labels) for each in (read, read.repeat(3, axis=0)))
    for name, moments in once.items():
        np.testing.assert_allclose(thrice[name], moments)
    others = permutation_chance(rng.integers(0, 3, (9, 40, 2, 5)), labels)
    assert others["mean"][1] < 0.5 * once["mean"][1]


def test_knowing_a_little_is_not_chance():
    rng = np.random.Generator(np.random.Philox(6))
    labels = rng.integers(0, 3, (60, 1, 5))
    blind = rng.integers(0, 3, (3, 60, 1, 5))
    assert chance(blind, labels).at_chance
    peeking = np.where(rng.random(blind.shape) < 0.15, labels, blind)
    found = chance(peeking, labels)
    assert not found.at_chance
    assert found.deviation["mean"] > 3
    constant = chance(np.zeros((1, 60, 1, 5), int), labels)  # the same whatever the order
    assert constant.at_chance
    assert constant.deviation["mean"] == 0


# ---- motion and flicker


def test_flicker_is_by_part_of_the_frame():
    world = world_named("two_objects")
    video = np.zeros((5, 64, 128, 3), np.uint8)
    video[1::2, :, 64:] = 10
    np.testing.assert_allclose(flicker(video, world), [0, 10])
    video[:, :, :64] = 255 * (np.arange(5) % 2)[:, None, None, None]
    np.testing.assert_allclose(flicker(video, world), [255, 10])


def made_up(protocol: Protocol, split: str, travel: float, flickers: float = 0.0) -> SplitReadings:
    """All right, 13 px in truth, ``travel`` px in the videos (by seed: 1 px more for each), none read in prompt 1."""
    labels = prompt_list(protocol, split).labels
    moves = labels[..., 3] != 0
    truth = Measured(labels, np.stack([13.0 * moves, 0 * moves], -1), 0.0 * moves)
    codec = truth._replace(flicker=0.5 + truth.flicker)
    parts = []
    for seed in range(len(protocol.sampling_seeds)):
        far = np.where(moves, travel + seed, 0.25)
        parts.append(Measured(labels.copy(), np.stack([0 * far, far], -1), np.full(moves.shape, flickers)))
    made = stack(parts)
    made.labels[:, 1, :, 3] = -1
    made.displacement[:, 1] = 0
    return SplitReadings(made, truth, codec, 0)


@pytest.mark.parametrize("split", ["seen", "two_objects"])
def test_travel_and_flicker_of_made_up_readings(split):
    labels = prompt_list(SMALL, split).labels
    found = split_figures(made_up(SMALL, split, 9.9, 2.0), SMALL, split)
    assert found.travel.truth.value == pytest.approx(13)
    assert found.travel.made.value == pytest.approx(10.4)
    assert found.travel_of_truth.value == pytest.approx(0.8)
    assert found.still_travel.made.value == pytest.approx(0.25)
    assert (found.still_travel.truth.value, found.flicker.truth.value) == (0, 0)
    assert (found.flicker.made.value, found.flicker.codec.value) == (2.0, 0.5)
    moves = labels[..., 3] != 0
    assert found.unread == pytest.approx(moves[1].sum() / moves.sum())
    assert found.accuracy["motion"].value == pytest.approx(1 - 1 / 18)
    assert found.accuracy["colour"].value == 1
    assert found.codec_accuracy["mean"].value == 1


def test_splits_without_stillness_have_no_flicker():
    one = dataclasses.replace(SMALL, prompts=1)
    labels = prompt_list(one, "seen").labels
    readings = made_up(SMALL, "seen", 9.9)
    cut = SplitReadings(
        Measured(*(part[:, :1] for part in readings.made)),
        *(Measured(*(part[:1] for part in each)) for each in (readings.truth, readings.codec)),
        0,
    )
    found = as_json(split_figures(cut, one, "seen"))
    still = labels[0, 0, 3] == 0
    assert (found["flicker"]["made"]["value"] is None) != still
    assert (found["travel_of_truth"]["value"] is None) == still


# ---- comparisons


def result_of(readings: dict[str, SplitReadings], protocol: Protocol = SMALL) -> ProtocolResult:
    return ProtocolResult(protocol, readings, {}, {"denoiser_parameters": 1, "seconds_per_video": 1.0})


def test_paired_differences():
    """A system that loses the colours of the first half of the prompts, beside one that does not."""
    better = made_up(SMALL, "seen", 13.0)
    labels = better.made.labels.copy()
    labels[:, :9, :, 0] += 1
    worse = dataclasses.replace(better, made=better.made._replace(labels=labels))
    teacher, student = result_of({"seen": better}), result_of({"seen": worse, "two_objects": better})
    assert set(compare(student, teacher)) == {"seen"}
    found = compare(student, teacher)["seen"]
    assert found.difference["colour"].value == -0.5
    assert found.difference["colour"].low < -0.5 < found.difference["colour"].high < 0
    assert tuple(found.difference["shape"]) == (0, 0, 0), "equal in every prompt: the difference is sure"
    assert found.difference["motion"] == (0, 0, 0), "both miss the same prompt: nothing is left of it in a pair"
    assert found.difference["mean"].value == pytest.approx(-0.1)
    assert found.share["colour"].value == 0.5
    assert compare(teacher, teacher)["seen"].share["mean"] == (1, 1, 1)
    other = result_of({"seen": better}, dataclasses.replace(SMALL, sampling_seeds=(0, 2)))
    with pytest.raises(UserError, match=r"sampling_seeds=\(0, 1\).*expected.*\(0, 2\)"):
        compare(student, other)
    renamed = result_of({"seen": better}, dataclasses.replace(SMALL, name="other", resamples=200))
    assert compare(student, renamed)["seen"].difference["colour"].value == -0.5


def test_template_difference_is_paired():
    held_out, reworded = (made_up(SMALL, name, 13.0) for name in TEMPLATES)
    held_out.made.labels[:, 0, :, 1] = -1
    found = template_difference(result_of(dict(zip(TEMPLATES, (held_out, reworded), strict=True))))
    assert found["shape"].value == pytest.approx(-1 / 18)
    assert found["motion"] == (0, 0, 0)
    assert template_difference(result_of({"seen": reworded})) is None


# ---- whole runs


@pytest.fixture(scope="module")
def truth():
    """(videos, result, progress) of ground truth under a small protocol, on one split of each world."""
    videos, seen = Drawn(SMALL), []
    result = run_protocol(
        protocol_videos.system(),
        SMALL,
        splits=("two_objects", "seen"),
        videos=videos,
        progress=lambda done, total: seen.append((done, total)),
        warn=seen.append,
    )
    return videos, result, seen


def test_ground_truth_is_right_and_moves_as_it_should(truth):
    for name, found in system_figures(truth[1]).splits.items():
        assert min(each.value for each in found.accuracy.values()) >= 0.99, name
        assert found.of_codec["mean"].value == pytest.approx(1, abs=0.01)
        assert found.travel_of_truth.value == pytest.approx(1, abs=1e-6)
        assert 12.5 < found.travel.truth.value < 13.5
        assert found.still_travel.made.value < 0.1
        assert found.flicker.made.value == 0
        assert found.unread == 0


def test_controls_are_at_chance(truth):
    figures = system_figures(truth[1])
    assert set(figures.controls) == set(CONTROLS)
    for found in (*figures.controls.values(), *(each.shuffled for each in figures.splits.values())):
        assert found.at_chance
        assert found.score["mean"] < 0.6
        assert 0.15 < found.expected["mean"][0] < 0.35
    labels = prompt_list(SMALL, "seen").labels
    assert not chance(truth[1].splits["seen"].made.labels, labels).at_chance, "ground truth does not pass for chance"


def test_what_was_asked_of_the_system(truth):
    """Every prompt once from every seed, in both worlds; progress counts all of it; cut prompts are told."""
    videos, result, seen = truth
    one, two = SPLITS["seen"].world, SPLITS["two_objects"].world
    assert videos.worlds == [one, two]
    expected = [(18, one, s, None) for s in (0, 1)] + [(18, two, s, None) for s in (0, 1)]
    assert videos.calls == expected + [(18, one, s, control) for control in CONTROLS for s in (0, 1)]
    told = [each for each in seen if isinstance(each, str)]
    assert len(told) == 2
    assert [split.cut for split in result.splits.values()] == [1, 1]
    counts = [each for each in seen if not isinstance(each, str)]
    total = clips_to_do(SMALL, ("seen", "two_objects"))
    assert counts == [(n + 1, total) for n in range(total)]
    assert {name: len(kept) for name, kept in result.samples.items()} == {"seen": 4, "two_objects": 4}
    assert result.splits["two_objects"].made.labels.shape == (2, 18, 2, 5)


def test_a_codec_that_loses_colours_is_seen(truth):
    """Grey reconstructions: the share of the codec exceeds one where the codec fails and the system does not."""
    few = dataclasses.replace(SMALL, prompts=9, sampling_seeds=(0,))
    grey = Drawn(few, codec=lambda clip: clip[..., ::-1])
    found = system_figures(run_protocol(protocol_videos.system(), few, splits=("seen",), controls=(), videos=grey))
    figures = found.splits["seen"]
    assert figures.codec_accuracy["colour"].value < 0.7
    assert figures.of_codec["colour"].value == pytest.approx(1 / figures.codec_accuracy["colour"].value)
    assert found.controls == {}
    assert found.templates is None


def test_refused_before_anything_is_made():
    system, few = protocol_videos.system(), dataclasses.replace(SMALL, prompts=9)
    videos = Drawn(few)
    for options, told in (
        ({"splits": ("all",)}, "'all'"),
        ({"controls": ("luck",)}, "luck"),
        ({"batch": 0}, "batch 0"),
    ):
        with pytest.raises(UserError, match=told):
            run_protocol(system, few, videos=videos, **options)
    videos.frames = 1
    with pytest.raises(UserError, match="1 frame"):
        run_protocol(system, few, videos=videos)
    narrow = dataclasses.replace(system, schedule=dataclasses.replace(system.schedule, stages=5, stage_range=None))
    with pytest.raises(UserError, match="64x64 does not fit"):
        run_protocol(narrow, few, splits=("seen",))
    assert videos.calls == []


def test_measured_pixels(truth):
    """One drawn clip through ``measure``: what the figures above are made of."""
    prompts, world = prompt_list(SMALL, "seen"), SPLITS["seen"].world
    found = measure(prompts.clip(0, 33), world)
    np.testing.assert_array_equal(found.labels, prompts.labels[0])
    np.testing.assert_array_equal(found.labels, truth[1].splits["seen"].truth.labels[0])
    assert found.readable.all()
    assert found.travel.shape == found.flicker.shape == (1,)
