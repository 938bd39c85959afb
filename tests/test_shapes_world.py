"""The shapes world's scenes, drawings and captions."""

import itertools
import zlib

import numpy as np
import pytest

from nd_jax.data import captions
from nd_jax.data.draw import coverage, draw
from nd_jax.data.source import ShapesSource, prompts
from nd_jax.data.world import (
    ATTRIBUTES,
    BACKGROUNDS,
    COLOURS,
    DISPLACEMENT,
    MOTIONS,
    SHAPES,
    SIZES,
    WORLDS,
    Scene,
    World,
    combinations,
    sample_labels,
    sample_scene,
    world_named,
)
from nd_jax.errors import UserError

WORLD = WORLDS["64x64"]


def philox(*key):
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


def test_held_out_combinations_are_whole_and_every_pair_is_seen():
    seen, held_out = combinations(False), combinations(True)
    total = np.prod([len(values) for values in ATTRIBUTES.values()])
    assert len(seen) + len(held_out) == total
    assert len(held_out) / total >= 0.15
    assert not {tuple(row) for row in seen.tolist()} & {tuple(row) for row in held_out.tolist()}
    sizes = [len(values) for values in ATTRIBUTES.values()]
    for a, b in itertools.combinations(range(5), 2):
        assert len(np.unique(seen[:, [a, b]], axis=0)) == sizes[a] * sizes[b]
    # the split is by (colour, shape, motion), so that no size or background gives a held-out triple away
    triples = [{tuple(row) for row in rows[:, [0, 1, 3]].tolist()} for rows in (seen, held_out)]
    assert not triples[0] & triples[1]


@pytest.mark.parametrize("name", WORLDS)
def test_labels_are_balanced_and_a_longer_list_starts_with_the_shorter(name):
    world = WORLDS[name]
    labels = sample_labels(world, 900, held_out=False, seed=4)
    np.testing.assert_array_equal(labels[:70], sample_labels(world, 70, held_out=False, seed=4))
    assert not np.array_equal(labels, sample_labels(world, 900, held_out=False, seed=5))
    assert (np.bincount(labels[:, 0, 3]) == 100).all()
    for column, values in enumerate(ATTRIBUTES.values()):
        shares = np.bincount(labels[:, :, column].ravel(), minlength=len(values)) / labels[:, :, 0].size
        assert abs(shares - 1 / len(values)).max() < 0.06
    assert (labels[:, :, 4] == labels[:, :1, 4]).all()


@pytest.mark.parametrize("name", WORLDS)
def test_every_start_allows_every_direction(name):
    world = WORLDS[name]
    labels = sample_labels(world, 200, held_out=False, seed=0)
    for index, row in enumerate(labels):
        scene = sample_scene(world, row, philox(index))
        radius = np.array(list(SIZES.values()))[row[:, 2]][:, None] / 2 + DISPLACEMENT[1]
        assert (scene.starts - radius >= 0).all()
        assert (scene.starts + radius <= [world.height, world.region_width]).all()
        assert (DISPLACEMENT[0] <= scene.displacements).all()
        assert (scene.displacements <= DISPLACEMENT[1]).all()


def test_starts_do_not_depend_on_the_motion():
    row = sample_labels(WORLD, 1, held_out=False, seed=0)[0]
    scenes = []
    for motion in range(len(MOTIONS)):
        row[0, 3] = motion
        scenes.append(sample_scene(WORLD, row, philox(9)))
    assert all(np.array_equal(scene.starts, scenes[0].starts) for scene in scenes)
    first_frames = [draw(WORLD, scene)[0] for scene in scenes]
    assert all(np.array_equal(frame, first_frames[0]) for frame in first_frames)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", SIZES.values())
def test_coverage_has_the_right_area_and_box(shape, size):
    rng = philox(3)
    y, x = 32 + rng.random(8), 30 + rng.random(8)
    cover = coverage(shape, y, x, size, 64, 64)
    area = {"circle": np.pi / 4, "square": 1, "triangle": 0.5, "cross": 2 * 0.4 - 0.16}[shape] * size**2
    np.testing.assert_allclose(cover.sum((1, 2)), area, rtol=0.01)
    assert cover.min() == 0
    assert 0.99 < cover.max() <= 1 + 1e-6
    for frame in range(8):
        rows, columns = np.flatnonzero(cover[frame].max(1) > 0.01), np.flatnonzero(cover[frame].max(0) > 0.01)
        assert abs(rows[-1] + 1 - rows[0] - size) <= 2
        assert abs(columns[-1] + 1 - columns[0] - size) <= 2
        assert abs((columns[-1] + 1 + columns[0]) / 2 - x[frame]) <= 1


def test_draw_moves_the_object_along_the_line_and_keeps_colours():
    labels = np.array([[list(COLOURS).index("yellow"), 1, 0, list(MOTIONS).index("down left"), 4]], np.int32)
    video = draw(WORLD, Scene(labels, np.array([[30.0, 34.0]]), np.array([13.0])))
    assert video.shape == (33, 64, 64, 3)
    assert video.dtype == np.uint8
    assert tuple(video[0, 0, 0]) == BACKGROUNDS["navy"]
    assert tuple(video[0, 30, 34]) == COLOURS["yellow"]
    weight = np.abs(video.astype(float) - BACKGROUNDS["navy"]).sum(-1)
    grid = np.arange(64) + 0.5
    down = (weight.sum(2) @ grid) / weight.sum((1, 2))
    right = (weight.sum(1) @ grid) / weight.sum((1, 2))
    step = 13 / 2**0.5 * np.arange(33) / 32
    np.testing.assert_allclose(down, 30 + step, atol=0.02)
    np.testing.assert_allclose(right, 34 - step, atol=0.02)


def test_the_same_seed_gives_the_same_bytes():
    source = ShapesSource(WORLD, "train", 12, seed=7)
    again = ShapesSource(WORLD, "train", 500, seed=7)
    other = ShapesSource(WORLD, "train", 12, seed=8)
    for index in range(12):
        np.testing.assert_array_equal(source[index]["video"], again[index]["video"])
        assert source[index]["caption"] == again[index]["caption"]
    assert any(not np.array_equal(source[index]["video"], other[index]["video"]) for index in range(12))
    # recorded once: a change of palette, sampling or drawing must be a new version of the dataset
    assert source[3]["caption"] == "crimson box, huge, moving to the left, chalk white background"
    assert zlib.crc32(b"".join(source.video(index).tobytes() for index in range(12))) == 2470257524


def test_splits_hold_out_what_they_say():
    held_out = {tuple(row) for row in combinations(True).tolist()}
    for split in ("train", "seen", "heldout_combinations", "heldout_templates"):
        source = ShapesSource(WORLD, split, 60)
        assert all((tuple(row[0]) in held_out) == (split == "heldout_combinations") for row in source.labels.tolist())
    train, seen = ShapesSource(WORLD, "train", 60), ShapesSource(WORLD, "seen", 60)
    assert not np.array_equal(train.labels, seen.labels)


def test_prompts_match_the_source():
    texts, labels = prompts(WORLD, "heldout_templates", 5, seed=2)
    source = ShapesSource(WORLD, "heldout_templates", 5, seed=2)
    assert texts == [source[index]["caption"] for index in range(5)]
    np.testing.assert_array_equal(labels, source.labels)


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("objects", [1, 2])
def test_captions_name_every_attribute(objects, held_out):
    world = WORLD if objects == 1 else WORLDS["two_objects"]
    rng = philox(0)
    for row in sample_labels(world, 300, held_out=False, seed=1):
        text = f" {captions.caption(row, rng, held_out=held_out)} ".replace(",", " ").replace(":", " ")
        for labels in row.tolist():
            for (name, values), index in zip(ATTRIBUTES.items(), labels, strict=True):
                if name != "motion":
                    options = captions.WORDS[values[index]]
                elif index == 0:
                    options = captions.STILL["finite"] + captions.STILL["participle"]
                else:
                    options = captions.WHERE[values[index]]
                assert any(f" {option} " in text for option in options), (text, values[index])
        assert "{" not in text


def test_templates_are_many_and_the_held_out_ones_new_but_made_of_known_words():
    assert len(set(captions.TEMPLATES)) >= 20
    for objects in (1, 2):
        known, new = (captions.templates(objects, held_out=flag) for flag in (False, True))
        assert new
        assert not set(known) & set(new)
        words = {word.strip(",:") for template in known for word in template.split()}
        assert {word.strip(",:") for template in new for word in template.split()} <= words


def test_words_are_unambiguous():
    """No synonym belongs to two values of one attribute, so a caption means one thing."""
    for name, values in ATTRIBUTES.items():
        table = captions.WHERE if name == "motion" else captions.WORDS
        options = [option for value in values if value in table for option in table[value]]
        assert len(options) == len(set(options))


def test_worlds_refuse_what_does_not_fit():
    for make in (
        lambda: World(frames=32),
        lambda: World(height=48),
        lambda: World(width=100, objects=2),
        lambda: World(objects=3),
        lambda: world_named("128x128"),
        lambda: ShapesSource(WORLD, "validation", 3),
        lambda: ShapesSource(WORLD, "train", -1),
    ):
        with pytest.raises(UserError) as caught:
            make()
        assert "\n" not in str(caught.value)
        assert "expected" in str(caught.value)
    with pytest.raises(IndexError):
        ShapesSource(WORLD, "train", 3)[3]
