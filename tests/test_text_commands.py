"""Text distillation by the command line: prompts, computed targets, students, and what each of them refuses."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import text_teachers
from prompt_corpora import SECRET, write_packages

import nd_jax.text_workflow as workflow
from nd_jax import cli
from nd_jax.converters.folders import load_folder
from nd_jax.data import prompts
from nd_jax.data.text_features import FeatureSource, write_features
from nd_jax.errors import UserError
from nd_jax.models.system import ADAPTER, CLIP_1, DENOISER, T5
from nd_jax.system import load_system, save_system
from nd_jax.text_report import text_report
from nd_jax.text_student import held_out_prompts, start_networks
from nd_jax.training.paths import named_leaves

STUDENT = {
    "--encoder.vocab-size": 256,
    "--encoder.d-model": 16,
    "--encoder.d-kv": 8,
    "--encoder.d-ff": 16,
    "--encoder.num-heads": 2,
    "--encoder.out-dim": 12,
    "--adapter.input-dims": 12,
    "--adapter.output-dims": 16,
    "--adapter.layer-depths": 16,
    "--recipe.batch": 16,
    "--recipe.captions": 0,
    "--recipe.optim.warmup-steps": 1,
    "--loop.steps": 4,
    "--loop.save-every": 2,
}
"""A student for ``text_teachers.SYSTEM``, from the preset's, four steps long."""


def lines(count: int) -> str:
    source = text_teachers.prompts(count, empty=0.0)
    return "".join(source[n]["caption"] + "\n" for n in range(count))


def train(folder: Path, *more: object, **changes: object) -> list[object]:
    """Arguments that train into ``folder / "run"``; ``changes`` as in ``loop_steps=2``, more of any kind after them."""
    settings = STUDENT | {f"--{name.replace('_', '.', 1).replace('_', '-')}": value for name, value in changes.items()}
    options = [word for pair in settings.items() for word in pair]
    return ["train", "shapes_base", "text_student", "--out", folder / "run", *options, *more]


def do(*arguments: object) -> None:
    assert cli.main([str(argument) for argument in arguments]) == 0


@pytest.fixture(scope="module")
def made(tiny, tiny_folder, tmp_path_factory) -> SimpleNamespace:
    """A teacher's folder, a corpus with held-out prompts and the teacher's targets for it; read only."""
    folder = tmp_path_factory.mktemp("made")
    tokenizers = dict(load_folder(tiny_folder / "system").tokenizers)
    system = dataclasses.replace(tiny, config=text_teachers.SYSTEM, params=text_teachers.random_params())
    (folder / "a.txt").write_text(lines(60))
    save_system(folder / "teacher", system, tokenizers)
    save_system(folder / "half", system, tokenizers, dtype="bf16")
    do("data", "prompts", folder / "a.txt", "--held-out", 0.3, "--out", folder / "corpus")
    do("data", "features", folder / "teacher", "--prompts", folder / "corpus", "--out", folder / "features")
    names = ("teacher", "half", "corpus", "features")
    return SimpleNamespace(folder=folder, **{name: folder / name for name in names})


@pytest.fixture(scope="module")
def student(made, tmp_path_factory) -> Path:
    """The folder of a run with a live teacher."""
    folder = tmp_path_factory.mktemp("student")
    do(*train(folder, "--teacher", made.teacher, "--prompts", made.corpus))
    return folder / "run"


def same(one: dict, two: dict) -> bool:
    pairs = zip(named_leaves(one), named_leaves(two), strict=True)
    return all(a == b and np.array_equal(x, y) for (a, x), (b, y) in pairs)


# ---- prompts


def test_a_corpus_of_files_and_packages(run, refused, secret, tmp_path):
    (tmp_path / "a.txt").write_text(lines(30) + f"{SECRET.upper()}\n" + lines(2) + "x" * 3000)
    (tmp_path / "b.jsonl").write_text('{"prompt": "one"}\n{"caption": "two"}\n{"text": "three"}\n[\n')
    packages = write_packages(tmp_path / "packages")
    out = tmp_path / "out"
    words = ("data", "prompts", tmp_path / "a.txt", tmp_path / "b.jsonl", "--out", out, "--held-out", 0.2)
    code, printed, err = run(*words, "--packages", 40, "--package-folder", packages, "--seed", 3)
    assert (code, printed) == (0, f"{out}\n"), err
    record = json.loads((out / "dataset.json").read_text())
    counts = record["counts"]
    assert counts["train"] + counts["held_out"] == 72 - (record["duplicates"] - 2)
    assert f"left out: {record['duplicates']} whose words came before" in err
    assert f"{counts['train']} prompts to train on, {counts['held_out']} held out" in err
    assert "warning: left out: 1 that evaluation uses" in err
    assert f"warning: 3 lines were skipped; all are in {out / 'skipped.jsonl'}" in err
    assert "  a.txt:34: the caption has 3000 characters" in err
    skipped = [json.loads(line)["file"] for line in (out / "skipped.jsonl").read_text().splitlines()]
    assert skipped == ["a.txt:34", "b.jsonl:3", "b.jsonl:4"]
    train_split = prompts.open_split(out)
    sources = {train_split[n]["source"] for n in range(len(train_split))}
    assert sources == {b"a.txt", b"b.jsonl", b"packages"}
    refused(*words, told=(str(out), "--overwrite"))
    code, _, err = run(*words, "--overwrite", "--held-out", 0)
    assert (code, len(prompts.open_split(out))) == (0, 32)
    assert "warning: the report on a student wants at least 3 held-out prompts" in err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), ("FILE ...", "--packages N")),
        (("a.csv",), ("a.csv", "expected .txt or .jsonl")),
        (("none.txt",), ("none.txt", "cannot be opened")),
        (("folder.txt",), ("folder.txt", "not a regular file")),
        (("lost.txt",), ("lost.txt", "cannot be opened")),
        (("secret.txt",), ("none are left to train on", "2 are for evaluation only")),
        (("binary.txt",), ("none are left to train on", "1 unusable")),
        (("good.txt", "--held-out", "1"), ("a share of 1.0 held out", "below 1")),
        (("good.txt", "--held-out", "nan"), ("a share of nan held out",)),
        (("good.txt", "--packages", "-1"), ("--packages is -1", "at least 0")),
        (("good.txt", "--seed", "-1"), ("--seed is -1", "at least 0")),
        (("good.txt", "--package-folder", "folder.txt"), ("--package-folder", "--packages N")),
        (("--packages", "3", "--package-folder", "folder.txt"), ("clip-interrogator", "not installed in folder.txt")),
    ],
)
def test_no_corpus_of_bad_input(refused, secret, monkeypatch, tmp_path, words, told):
    (tmp_path / "good.txt").write_text(lines(5))
    (tmp_path / "secret.txt").write_text(f"{SECRET}\n{SECRET.lower()}\n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\n")
    (tmp_path / "folder.txt").mkdir()
    (tmp_path / "lost.txt").symlink_to(tmp_path / "nowhere.txt")
    (tmp_path / "a.csv").write_text("a")
    before = sorted(tmp_path.iterdir())
    monkeypatch.chdir(tmp_path)
    refused("data", "prompts", *words, "--out", "out", told=told)
    assert sorted(tmp_path.iterdir()) == before


# ---- computed targets


def test_targets_are_computed_once(run, refused, made, tmp_path):
    """Of a folder's training prompts and of captions, in the dtype asked for, also with half-precision weights."""
    out = tmp_path / "features"
    words = ("data", "features", made.half, "--prompts", made.corpus, "--out", out, "--batch", 16)
    code, printed, err = run(*words, "--captions", 30, "--dtype", "bfloat16")
    assert (code, printed) == (0, f"{out}\n"), err
    count = len(prompts.open_split(made.corpus))
    assert err == f"{count + 30} prompts\n"
    found, expected = FeatureSource(out), FeatureSource(made.features)
    assert (len(found), len(expected)) == (count + 30, count)
    for index in range(count):
        np.testing.assert_array_equal(found[index]["t5_ids"], expected[index]["t5_ids"])
        np.testing.assert_allclose(found[index]["target"], expected[index]["target"], rtol=0.1, atol=0.1)
    tokens = sum(found[n]["t5_mask"].sum() for n in range(len(found)))
    assert (out / "targets.bin").stat().st_size == 2 * 16 * tokens
    refused(*words, told=(str(out), "--overwrite"))
    assert run(*words, "--overwrite")[0] == 0
    assert len(FeatureSource(out)) == count


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("teacher",), ("--prompts FOLDER", "--captions N")),
        (("teacher", "--captions", "-1"), ("--captions is -1",)),
        (("teacher", "--captions", "1"), ("1 captions from 2 worlds",)),
        (("teacher", "--captions", "9", "--batch", "0"), ("--batch is 0",)),
        (("teacher", "--captions", "9", "--dtype", "int8"), ("--dtype", "int8", "bfloat16")),
        (("nowhere", "--captions", "9"), ("nowhere", "does not exist")),
        (("corpus", "--captions", "9"), ("corpus", "not a checkpoint folder")),
        (("teacher/text_encoder", "--captions", "9"), ("text_encoder", "diffusion_transformer")),
        (("teacher", "--prompts", "nowhere"), ("nowhere holds no prompts", "nd-jax data prompts")),
        (("teacher", "--prompts", "teacher"), ("teacher holds no prompts", "nd-jax data prompts")),
        (("teacher", "--prompts", "linked"), ("linked", "is a symbolic link")),
        (("teacher", "--prompts", "damaged"), ("damaged", "is not valid JSON")),
        (("teacher", "--prompts", "videos"), ("another dataset than prompts",)),
        (("teacher", "--prompts", "short"), ("short", "is damaged", "prepare it again")),
        (("deaf", "--captions", "9"), ("deaf has no text_encoder_3 and no tokenizer_3",)),
    ],
)
def test_no_targets_of_bad_input(refused, made, monkeypatch, tmp_path, words, told):
    for name in ("linked", "damaged", "videos", "short"):
        shutil.copytree(made.corpus, tmp_path / name)
    for name in ("teacher", "deaf"):
        shutil.copytree(made.teacher, tmp_path / name)
    for name in ("text_encoder_3", "tokenizer_3"):
        shutil.rmtree(tmp_path / "deaf" / name)
    shutil.copytree(made.corpus, tmp_path / "corpus")
    (tmp_path / "linked" / "dataset.json").unlink()
    (tmp_path / "linked" / "dataset.json").symlink_to(made.corpus / "dataset.json")
    (tmp_path / "damaged" / "dataset.json").write_text('{"kind": ')
    (tmp_path / "videos" / "dataset.json").write_text('{"kind": "videos"}')
    (records,) = (tmp_path / "short").rglob("*-train.*")
    records.write_bytes(records.read_bytes()[:-100])
    before = sorted(tmp_path.iterdir())
    monkeypatch.chdir(tmp_path)
    refused("data", "features", *words, "--out", "out", told=told)
    assert sorted(tmp_path.iterdir()) == before


# ---- students


def test_the_student_that_comes_out(made, student):
    """A system that takes the teacher's place, and the figures of both on the corpus's held-out prompts."""
    before, after = load_system(made.teacher), load_system(student / "system")
    assert after.config.text_encoder_3 == text_teachers.ENCODER
    assert after.config.context_adapter == text_teachers.adapter()
    assert set(after.tokenizers) == {"t5", "clip", "clip_2"}
    assert same(after.params[CLIP_1], before.params[CLIP_1])
    assert same(after.params[DENOISER]["blocks"], before.params[DENOISER]["blocks"])
    report = json.loads((student / "text.json").read_text())
    source = prompts.open_split(made.corpus, "held_out")
    texts = [source[n]["caption"].decode() for n in range(len(source))]
    expected = text_report(before, after, texts)
    assert report == pytest.approx(expected)
    assert (report["prompts"], report["pooled_towers"]) == (len(texts), "kept")


def test_an_interrupted_run_goes_on_by_the_same_command(run, monkeypatch, made, student, tmp_path):
    """Exit code 130 without a result; then the very bytes of a run that was not interrupted."""
    arguments = train(tmp_path, "--teacher", made.teacher, "--prompts", made.corpus)
    asked, real = [], workflow.Feed

    class Interrupting(real):
        def __next__(self):
            asked.append(1)
            if len(asked) == 3:
                os.kill(os.getpid(), signal.SIGINT)
            return super().__next__()

    monkeypatch.setattr(workflow, "Feed", Interrupting)
    code, printed, err = run(*arguments)
    assert (code, printed) == (130, ""), err
    assert "stopped at step 3 (SIGINT)" in err
    assert "run the same command again to continue" in err
    assert not (tmp_path / "run" / "system").exists()
    assert not (tmp_path / "run" / "text.json").exists()
    monkeypatch.setattr(workflow, "Feed", real)
    code, printed, err = run(*arguments)
    assert (code, printed) == (0, f"{tmp_path / 'run' / 'system'}\n"), err
    assert "held-out prompts: cosine " in err
    files = [path.relative_to(student) for path in (student / "system").rglob("*") if path.is_file()]
    for file in [*files, Path("text.json")]:
        assert (student / file).read_bytes() == (tmp_path / "run" / file).read_bytes(), file
    shutil.rmtree(tmp_path / "run" / "system")
    assert run(*arguments)[0] == 0, "a finished run writes its result again"
    assert load_system(tmp_path / "run" / "system").config.text_encoder_3 == text_teachers.ENCODER


def test_a_frozen_encoder_begins_with_what_it_is_given(made, student, tmp_path):
    """Of computed targets: the encoder stays, bit for bit; the adapter moves on from the start's. What is the teacher's
    stays in half precision."""
    start = load_system(student / "system")
    features = ("--teacher", made.half, "--features", made.features, "--held-out", made.corpus)
    given = {"recipe_encoder": "frozen", "loop_steps": 2}
    do(*train(tmp_path, *features, "--start", student / "system", **given))
    found = load_system(tmp_path / "run" / "system", dtype=None)
    dtypes = {name: {str(leaf.dtype) for _, leaf in named_leaves(params)} for name, params in found.params.items()}
    assert dtypes == {name: {"float32" if name in (T5, ADAPTER) else "bfloat16"} for name in found.params}
    assert same(found.params[T5], start.params[T5])
    assert not same(found.params[ADAPTER], start.params[ADAPTER])
    assert json.loads((tmp_path / "run" / "text.json").read_text())["pooled_towers"] == "kept"


def test_a_student_starts_from_a_system_or_one_network(made, student, tmp_path):
    """Of two adapters it takes the teacher's mode's; one that is shaped otherwise is refused by its fields."""
    run = workflow.TextDistillRun(encoder=text_teachers.ENCODER, adapter=text_teachers.adapter())
    system = student / "system"
    after, adapter = load_system(system), "context_adapter_multistep_t2v"
    for folder, names in ((system, {T5, ADAPTER}), (system / T5, {T5}), (system / adapter, {ADAPTER})):
        found = start_networks(folder, run, mode="monolithic")
        assert found.keys() == names
        assert all(same(found[name], after.params[name]) for name in names)
    shutil.copytree(system, tmp_path / "two")
    shutil.copytree(system / adapter, tmp_path / "two" / "context_adapter")
    assert start_networks(tmp_path / "two", run, mode="hybrid").keys() == {T5, ADAPTER}
    other = dataclasses.replace(run, adapter=text_teachers.adapter("extend"))
    with pytest.raises(UserError, match=rf"{adapter} has output_dims 16 \(the run: 24\).* set --adapter.output-dims,"):
        start_networks(system, other, mode="monolithic")


def test_held_out_prompts_are_spread_over_folders_and_captions(made):
    run = workflow.TextDistillRun(recipe=dataclasses.replace(text_teachers.CONFIG, captions=100, empty=0.0))
    texts = held_out_prompts(run, [made.corpus], most=40)
    own = prompts.open_split(made.corpus, "held_out")
    from_corpus = set(texts) & {own[n]["caption"].decode() for n in range(len(own))}
    assert 4 <= len(from_corpus) <= 10
    assert len(texts) == len(set(texts)) >= 30


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--prompts corpus", ("--teacher", "required")),
        ("--teacher teacher", ("--prompts FOLDER", "--features FOLDER", "--recipe.captions N")),
        ("--teacher teacher --prompts corpus --features features", ("either --prompts or --features", "found both")),
        ("--teacher teacher --features features", ("--held-out FOLDER", "report")),
        ("--teacher nowhere --prompts corpus", ("nowhere", "does not exist")),
        ("--teacher deaf --prompts corpus", ("deaf has no text_encoder_3",)),
        ("--teacher deaf --features features --held-out corpus", ("deaf has no text_encoder_3",)),
        ("--teacher teacher --prompts all", ("all: no held_out prompts", "dataset.json")),
        ("--teacher teacher --prompts two", ("2 held-out prompts, expected at least 3", "larger --held-out")),
        ("--teacher teacher --prompts features", ("features holds no prompts",)),
        ("--teacher teacher --features corpus --held-out corpus", ("info.json", "cannot be opened")),
        ("--teacher teacher --features wide --held-out corpus", ("6 tokens x 4 channels", "expected 12 x 16")),
        ("--teacher teacher --features cut --held-out corpus", ("targets.bin", "bytes, expected")),
        ("--teacher teacher --features link --held-out corpus", ("targets.bin", "is a symbolic link")),
        ("--teacher teacher --prompts corpus --recipe.encoder frozen", ("'frozen' and starts from nothing", "--start")),
        (
            "--teacher teacher --prompts corpus --recipe.encoder lora --start half/context_adapter",
            ("half/context_adapter", "does not exist"),
        ),
        ("--teacher teacher --prompts corpus --start teacher", ("text_encoder_3 has d_model 24", "--encoder.d-model")),
        ("--teacher teacher --prompts corpus --start teacher/text_encoder", ("(clip)", "T5 or a context adapter")),
        ("--teacher teacher --prompts corpus --start corpus", ("corpus", "not a checkpoint folder")),
        ("--teacher teacher --prompts corpus --recipe.mode extend", ("gives 16 channels, mode 'extend' expects 24",)),
        ("--teacher teacher --prompts corpus --encoder.vocab-size 300", ("300 embeddings", "the teacher 256")),
        ("--teacher teacher --features features --held-out corpus --encoder.vocab-size 40", ("40 embeddings",)),
        ("--teacher teacher --prompts corpus --recipe.cosine much", ("--recipe.cosine", "much")),
    ],
)
def test_no_student_of_bad_input(refused, made, monkeypatch, tmp_path, words, told):
    for name in ("teacher", "half", "corpus", "features"):
        (tmp_path / name).symlink_to(made.folder / name)
    shutil.copytree(made.teacher, tmp_path / "deaf")
    shutil.rmtree(tmp_path / "deaf" / "text_encoder_3")
    (tmp_path / "few.txt").write_text(lines(8))
    if "all" in words.split() or "two" in words.split():
        do("data", "prompts", tmp_path / "few.txt", "--held-out", 0, "--out", tmp_path / "all")
        do("data", "prompts", tmp_path / "few.txt", "--held-out", 0.25, "--out", tmp_path / "two")
    ids = np.ones((3, 6), np.int32)
    write_features(tmp_path / "wide", [(ids, ids, np.zeros((3, 6, 4), np.float32))])
    for name in ("cut", "link"):
        shutil.copytree(made.features, tmp_path / name)
        (tmp_path / name / "targets.bin").unlink()
    (tmp_path / "cut" / "targets.bin").write_bytes(b"1234")
    (tmp_path / "link" / "targets.bin").symlink_to(made.features / "targets.bin")
    monkeypatch.chdir(tmp_path)
    refused(*train(Path("new"), *words.split()), told=told)
    assert not (tmp_path / "new").exists()


def test_outputs_that_are_not_ours_stay(refused, made, tmp_path):
    taken = tmp_path / "run" / "system"
    taken.mkdir(parents=True)
    (taken / "letter.txt").write_text("keep me")
    words = ("--teacher", made.teacher, "--prompts", made.corpus)
    refused(*train(tmp_path, *words), told=(str(taken), "not a folder written by nd-jax"))
    assert [path.name for path in tmp_path.rglob("*")] == ["run", "system", "letter.txt"]


def test_help_of_a_student(run):
    for preset, name in (("shapes_base", "text_student"), ("neodragon_320p", "text")):
        code, out, err = run("train", preset, name, "--help")
        assert (code, err) == (0, "")
        for told in ("--teacher PATH", "--features {None}|PATH", "--recipe.cosine FLOAT", "--encoder.d-model INT"):
            assert told in out
    assert "--data PATH" in run("train", "shapes_base", "text", "--help")[1], "that run pre-trains instead"
