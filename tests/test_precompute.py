"""Precomputed shards: the pipeline on a tiny folder and system, resumed; folders that are damaged, short or mixed."""

import json
import re
import shutil

import ml_dtypes
import numpy as np
import pytest
from folder_clips import ramp, write_clip

from nd_jax import cli
from nd_jax.commands import precompute as command
from nd_jax.data.captions_file import Skipped
from nd_jax.data.latent_shards import CLIPS, INFO, PLAN, PROMPTS, Example, pack, read_shard, write_shard
from nd_jax.data.pipeline import batches
from nd_jax.data.shard_sources import ShardedFeatureSource, ShardedLatentSource, open_latents
from nd_jax.errors import UserError
from nd_jax.precompute import begin, finish
from nd_jax.workflow import with_statistics

SHAPE = (2, 4, 4, 3)


def example(n: int, shape=SHAPE, captions: int = 1) -> Example:
    rng = np.random.Generator(np.random.Philox(n))
    tokens = [1 + n % 3 + k for k in range(captions)]
    return Example(
        f"{n}.mp4",
        tuple(f"clip {n}, caption {k}" for k in range(captions)),
        rng.standard_normal(shape, np.float32),
        ids=tuple(tuple(range(1, count + 1)) for count in tokens),
        features=tuple(rng.standard_normal((count, 5), np.float32) for count in tokens),
    )


def written(folder, shards, prompts=0):
    folder.mkdir()
    for index, examples in enumerate(shards):
        write_shard(folder, CLIPS, index, examples, text_length=6)
    if prompts:
        rows = [Example("", ("a prompt",), ids=((7,),), features=(np.full((1, 5), n),)) for n in range(prompts)]
        write_shard(folder, PROMPTS, 0, rows, text_length=6)
    counts = {CLIPS: len(shards), PROMPTS: int(prompts > 0)}
    (folder / PLAN).write_text(json.dumps({"digest": "a", "shards": counts}))
    records = {CLIPS: sum(map(len, shards)), PROMPTS: prompts}
    (folder / INFO).write_text(json.dumps({"records": records}))
    return folder


@pytest.fixture
def folder(tmp_path):
    return written(tmp_path / "latents", [[example(0), example(1)], [], [example(2, captions=2)]], prompts=2)


def low(array) -> np.ndarray:
    return np.asarray(array, ml_dtypes.bfloat16).astype(np.float32)


def test_latents_come_back_with_their_captions(folder):
    source = open_latents(folder)
    assert isinstance(source, ShardedLatentSource)
    assert source.latents.shape == (3, *SHAPE)
    assert len(source) == 6
    for index in range(6):
        np.testing.assert_array_equal(source[index]["latents"], low(example(index % 3).latents))
    assert [source[index]["caption"] for index in (2, 3, 5)] == [
        "clip 2, caption 0",
        "clip 0, caption 0",
        "clip 2, caption 1",
    ]
    assert list(source.captions)[1] == ["clip 1, caption 0"]
    np.testing.assert_array_equal(source.latents[1:3][1], low(example(2, captions=2).latents))
    assert open_latents(folder, units=1)[0]["latents"].shape == (1, 4, 4, 3)
    assert sum(not open_latents(folder, dropout=0.5)[n]["caption"] for n in range(6)) in (2, 3, 4)
    batch = next(batches(source, 2, keys=("latents",)))
    assert batch["latents"].shape == (2, *SHAPE)


def test_statistics_are_those_of_the_array(folder):
    import tiny_system

    table = open_latents(folder).latents
    config = tiny_system.CONFIG.causal_video_vae
    assert with_statistics(config, table, chunk=2) == with_statistics(config, table[0:3])


def test_features_of_captions_and_prompts(folder):
    source = ShardedFeatureSource(folder)
    assert (len(source), source.width, source.text_length) == (10, 5, 6)
    found = source[7]  # the second caption of clip 2
    expected = example(2, captions=2)
    assert found["t5_ids"].tolist() == [1, 2, 3, 4, 0, 0]
    assert found["t5_mask"].tolist() == [1, 1, 1, 1, 0, 0]
    np.testing.assert_array_equal(found["target"][:4], low(expected.features[1]))
    assert source[4]["target"][0].tolist() == [1.0] * 5


def cut(path, size=-1):
    path.write_bytes(path.read_bytes()[:size])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda f: (f / "clips-00000.array_record").unlink(), "clips-00000.array_record cannot be opened"),
        (lambda f: (f / "clips-00002.json").unlink(), "clips-00002.json cannot be opened"),
        (lambda f: cut(f / "clips-00002.array_record"), "expected"),
        (lambda f: (f / INFO).unlink(), "is not finished"),
        (lambda f: (f / PLAN).write_text('{"digest": "a", "shards": {"clips": -1, "prompts": 0}}'), "says"),
        (
            lambda f: (f / INFO).write_text('{"records": {"clips": 9, "prompts": 2}}'),
            "holds 3 records, info.json says 9",
        ),
        (
            lambda f: write_shard(f, CLIPS, 2, [example(2, (1, 4, 4, 3))], text_length=6),
            "mixes latents: 2x4x4x3 in clips-00000, 1x4x4x3 in clips-00002",
        ),
    ],
)
def test_missing_shards_and_mixed_shapes_are_one_line_and_exit_2(folder, tmp_path, capsys, change, told):
    change(folder)
    with pytest.raises(UserError, match=r"latents: ") as caught:
        open_latents(folder)
    assert told in str(caught.value)
    train = ("train", "shapes_tiny", "teacher", "--data", tmp_path, "--codec", tmp_path, "--out", tmp_path / "run")
    assert cli.main([*map(str, train), "--latents", str(folder)]) == 2
    err = capsys.readouterr().err
    assert told in err
    assert err.count("\n") == 1


def test_a_damaged_record_is_named(folder):
    path = folder / "clips-00000.array_record"
    content = bytearray(path.read_bytes())
    content[200] ^= 255  # within the first record
    path.write_bytes(content)
    source = open_latents(folder)
    assert source[1]["caption"] == "clip 1, caption 0"
    with pytest.raises(UserError, match=r"clips-00000\.array_record: record 0 is damaged") as caught:
        source[0]
    assert "\n" not in str(caught.value)


def test_a_record_of_another_shape_than_its_shard_says_is_refused(folder):
    shard = read_shard(folder, CLIPS, 0)
    from nd_jax.data.latent_shards import unpack

    assert unpack(pack(example(0)), shard, "here").name == "0.mp4"
    with pytest.raises(UserError, match=r"here has .* latents of another shape"):
        unpack(pack(example(0, (3, 4, 4, 3))), shard, "here")
    with pytest.raises(UserError, match="here is damaged"):
        unpack(b"\xff" * 40, shard, "here")
    with pytest.raises(UserError, match="not finite in bfloat16"):
        pack(Example("x", ("x",), np.full(SHAPE, 3.4e38, np.float32)))


def test_without_beam_it_says_which_extra(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    words = ("data", "precompute", "shapes_tiny", tmp_path, "--codec", tmp_path, "--out", tmp_path / "o")
    assert cli.main([*map(str, words)]) == 2
    assert "pip install 'nd-jax[beam]'" in capsys.readouterr().err


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Four clips with captions, one of them too short, another one damaged."""
    folder = tmp_path_factory.mktemp("clips")
    for n, name in enumerate("abcd"):
        pixels = ramp(5 if name == "c" else 10, 64, 64).copy()
        pixels[:, :16, :16] = 50 * n
        write_clip(folder / f"{name}.mp4", pixels)
        (folder / f"{name}.txt").write_text(f"a grey clip called {name}")
    (folder / "d.mp4").write_bytes((folder / "d.mp4").read_bytes()[:300])
    return folder


def test_the_pipeline_resumes_counts_and_lists_bad_clips(clips, tiny_folder, tmp_path, capsys, monkeypatch):
    pytest.importorskip("apache_beam")
    from nd_jax import precompute_beam

    system, out = tiny_folder / "system", tmp_path / "out"
    words = ("data", "precompute", "shapes_tiny", clips, "--codec", system, "--teacher", system, "--out", out)
    words = [*map(str, words), "--frames", "9", "--heldout", "0", "--shard-size", "2", "--batch", "2"]
    back, real = [], precompute_beam.encode_shard

    def interrupted(job, place, encoder):
        if place == (CLIPS, 1) and not back:
            raise RuntimeError("the machine went away")
        return real(job, place, encoder)

    monkeypatch.setattr(precompute_beam, "encode_shard", interrupted)
    code = cli.main(words)
    err = capsys.readouterr().err
    assert (code, "the machine went away" in err) == (2, True), err
    assert (out / "clips-00000.json").is_file()
    stamp = (out / "clips-00000.array_record").stat().st_mtime_ns
    with pytest.raises(UserError, match="is not finished"):
        open_latents(out)

    back.append(True)
    assert cli.main([*words, "--shard-size", "3"]) == 2
    assert "begun with other settings" in capsys.readouterr().err
    assert cli.main([*words, "--beam", "runner=DirectRunner"]) == 0
    err = capsys.readouterr().err
    assert re.search(r"[12] shards to make", err), "the empty prompt's may or may not have been made before"
    assert "2 windows of 4 clips and 0 prompts in 2 shards; 0 clips held out" in err
    assert (out / "clips-00000.array_record").stat().st_mtime_ns == stamp
    listed = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    assert [each["file"] for each in listed] == ["c.mp4", "d.mp4"]
    assert "expected at least 9" in listed[0]["reason"]
    assert "does not decode" in listed[1]["reason"]

    source, features = open_latents(out), ShardedFeatureSource(out)
    assert [source[n]["caption"] for n in range(2)] == ["a grey clip called a", "a grey clip called b"]
    assert source.latents.shape == (2, 2, 8, 8, 4)
    assert (len(features), features.width) == (2, 16)
    assert features[0]["t5_mask"].sum() > 3


def test_finishing_tells_of_a_shard_that_failed(clips, tmp_path, tiny_folder):
    from nd_jax.data.video_folder import FolderOptions
    from nd_jax.precompute import note_failure
    from nd_jax.precompute_networks import Job

    job = Job(clips, tmp_path / "out", tiny_folder / "system", None, FolderOptions(((64, 64),), 9))
    left, skipped = begin(job, shard_size=3)
    assert (left, skipped) == ([(CLIPS, 0), (CLIPS, 1)], [])
    note_failure(job, (CLIPS, 1), "no codec here")
    write_shard(job.out, CLIPS, 0, [], skipped=[Skipped("c.mp4", "short")])
    with pytest.raises(UserError, match="clips-00001 was not made: no codec here"):
        finish(job, [])
    assert begin(job, shard_size=3)[0] == [(CLIPS, 1)]
    write_shard(job.out, CLIPS, 1, [], skipped=[])
    with pytest.raises(UserError, match=r"no clip can be used: c\.mp4: short"):
        finish(job, [])
    shutil.rmtree(job.out)
