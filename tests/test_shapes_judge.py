"""The judge: right on ground truth, at chance where there is nothing to read, steady under a codec's softness."""

import itertools

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from nd_jax.data import judge
from nd_jax.data.source import ShapesSource
from nd_jax.data.world import ATTRIBUTES, CHANCE, WORLDS
from nd_jax.errors import UserError

COUNT = 126


@pytest.fixture(scope="module", params=list(WORLDS))
def drawn(request):
    """(world, labels, clips) of clips from training and from held-out combinations."""
    world = WORLDS[request.param]
    sources = [ShapesSource(world, split, COUNT // 2, seed=11) for split in ("seen", "heldout_combinations")]
    clips = [source.video(index) for source in sources for index in range(len(source))]
    return world, np.concatenate([source.labels for source in sources]), clips


@pytest.fixture(scope="module")
def readings(drawn):
    world, _, clips = drawn
    return judge.read_labels(clips, world)


def test_right_on_ground_truth(drawn, readings):
    scores = judge.score(readings, drawn[1])
    assert scores.count == COUNT
    assert min(scores.accuracy.values()) >= 0.99
    assert scores.all_right >= 0.99


def test_shuffled_captions_score_at_the_permutation_mean(drawn, readings):
    labels = drawn[1]
    rng = np.random.Generator(np.random.Philox(0))
    errors = []  # in standard errors, one row per shuffle
    for _ in range(100):
        scores = judge.score(readings, labels[rng.permutation(COUNT)])
        got = {**scores.accuracy, "mean": scores.mean}
        errors.append([(got[name] - mean) / deviation for name, (mean, deviation) in scores.chance.items()])
    errors = np.array(errors)
    assert abs(errors[0, -1]) <= 3  # one shuffle, the mean over attributes
    assert np.abs(errors.mean(0)).max() <= 4 / 100**0.5  # a hundred shuffles, the largest of six
    assert (np.abs(errors) > 3).mean() <= 0.01
    for name, level in CHANCE.items():
        assert abs(scores.chance[name][0] - level) < 0.06


def test_frame_0_alone_is_at_chance_on_motion_only(drawn):
    world, labels, clips = drawn
    scores = judge.score(judge.read_labels([clip[:1] for clip in clips], world), labels)
    deviation = (CHANCE["motion"] * (1 - CHANCE["motion"]) / labels[:, :, 0].size) ** 0.5
    assert abs(scores.accuracy["motion"] - CHANCE["motion"]) <= 3 * deviation
    assert min(scores.accuracy[name] for name in ("colour", "shape", "size", "background")) >= 0.99


def test_where_an_object_starts_does_not_tell_its_motion():
    """The best guess from the start alone: motion of the nearest start, and of a linear fit to it, are at chance."""
    source = ShapesSource(WORLDS["64x64"], "train", 900)
    world = source.world
    grid = np.arange(64) + 0.5
    starts = []
    for index in range(len(source)):
        frame = source.video(index)[0].astype(float)
        weight = np.abs(frame - frame[0, 0]).sum(-1)
        starts.append([weight.sum(1) @ grid / weight.sum(), weight.sum(0) @ grid / weight.sum()])
    starts, motion = np.array(starts), source.labels[:, 0, 3]
    distance = ((starts[:, None] - starts[None]) ** 2).sum(-1)
    np.fill_diagonal(distance, np.inf)
    nearest = (motion[distance.argmin(1)] == motion).mean()
    features = np.concatenate([starts, np.ones((900, 1))], axis=1)
    fit = np.linalg.lstsq(features[::2], np.eye(9)[motion[::2]], rcond=None)[0]
    linear = ((features[1::2] @ fit).argmax(1) == motion[1::2]).mean()
    assert world.frames == 33
    assert abs(nearest - 1 / 9) <= 3 * (8 / 81 / 900) ** 0.5
    assert abs(linear - 1 / 9) <= 3 * (8 / 81 / 450) ** 0.5


BLURS = {
    "soft": lambda clip: gaussian_filter(clip, (0, 1.5, 1.5, 0)),
    "soft in time": lambda clip: gaussian_filter(clip, (2, 1, 1, 0)),
    "quarter resolution": lambda clip: clip.reshape(33, 16, 4, -1, 4, 3).mean((2, 4)).repeat(4, 1).repeat(4, 2),
    "pale": lambda clip: clip * 0.7 + 40,
    "soft, pale and noisy": lambda clip: (
        gaussian_filter(clip, (0, 1.2, 1.2, 0)) * 0.85
        + 20
        + np.random.Generator(np.random.Philox(1)).normal(0, 8, clip.shape)
    ),
}


@pytest.mark.parametrize("blur", BLURS)
def test_steady_under_softness(drawn, blur):
    world, labels, clips = drawn
    if world == WORLDS["64x128"]:
        clips, labels = clips[:25], labels[:25]  # as the square one, only wider
    soft = [np.clip(BLURS[blur](clip.astype(np.float32)), 0, 255).astype(np.uint8) for clip in clips[::5]]
    accuracy = judge.score(judge.read_labels(soft, world), labels[::5]).accuracy
    least = 0.88 if blur == "quarter resolution" else 0.97
    assert min(accuracy.values()) >= least, accuracy


def test_floats_and_bytes_read_alike(drawn, readings):
    world, _, clips = drawn
    floats = [clip.astype(np.float32) / 127.5 - 1 for clip in clips[:10]]
    np.testing.assert_array_equal(judge.read_labels(floats, world), readings[:10])


def test_an_empty_or_broken_clip_reads_as_nothing():
    world = WORLDS["64x64"]
    for clip in (np.full((33, 64, 64, 3), 240, np.uint8), np.full((33, 64, 64, 3), np.nan, np.float32)):
        reading = judge.read(clip, world)
        assert (reading.labels[0, :4] == -1).all()
        assert judge.score(reading.labels[None], np.zeros((1, 1, 5), int)).accuracy["colour"] == 0
    noise = np.random.Generator(np.random.Philox(0)).uniform(-1, 1, (40, 33, 64, 64, 3))
    labels = ShapesSource(world, "seen", 40).labels
    scores = judge.score(judge.read_labels(noise, world), labels)
    assert scores.all_right <= 0.05
    assert abs(scores.mean - scores.chance["mean"][0]) <= 3 * max(scores.chance["mean"][1], 0.02)


def test_each_attribute_is_read_by_itself():
    """Changing one attribute of a scene changes that reading and no other."""
    from nd_jax.data.draw import draw
    from nd_jax.data.world import Scene

    world = WORLDS["64x64"]
    base = np.array([[2, 1, 1, 5, 2]], np.int32)
    for column, values in enumerate(ATTRIBUTES.values()):
        for index in range(len(values)):
            labels = base.copy()
            labels[0, column] = index
            clip = draw(world, Scene(labels, np.array([[32.3, 31.6]]), np.array([12.0])))
            np.testing.assert_array_equal(judge.read(clip, world).labels, labels)


def test_permutation_moments_are_exact():
    rng = np.random.Generator(np.random.Philox(2))
    read, wanted = rng.integers(0, 3, (5, 1, 5)), rng.integers(0, 3, (5, 1, 5))
    every = [judge.score(read, wanted[list(order)]) for order in itertools.permutations(range(5))]
    values = np.array([scores.accuracy["shape"] for scores in every])
    mean, deviation = every[0].chance["shape"]
    np.testing.assert_allclose([values.mean(), values.std()], [mean, deviation], atol=1e-12)


def test_bad_input_is_refused():
    world = WORLDS["64x64"]
    for make in (
        lambda: judge.read(np.zeros((33, 64, 64), np.uint8), world),
        lambda: judge.read(np.zeros((33, 64, 128, 3), np.uint8), world),
        lambda: judge.read(np.zeros((0, 64, 64, 3), np.uint8), world),
        lambda: judge.read(np.zeros((33, 64, 64, 3), np.int32), world),
        lambda: judge.score(np.zeros((0, 1, 5)), np.zeros((0, 1, 5))),
        lambda: judge.score(np.zeros((3, 1, 5)), np.zeros((2, 1, 5))),
    ):
        with pytest.raises(UserError, match="expected"):
            make()
