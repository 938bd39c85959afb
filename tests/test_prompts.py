"""Prompt corpora: evaluation prompts refused, files and packages read, the TFDS builder and what trains on it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from prompt_corpora import METADATA, SECRET, write_packages

from nd_jax.data import prompts
from nd_jax.data.evaluation_prompts import HASHES, is_evaluation_prompt, normalise
from nd_jax.data.prompt_files import PromptFile
from nd_jax.data.prompt_packages import PackagePrompts
from nd_jax.data.prompt_source import PromptSource
from nd_jax.errors import UserError


def write_lines(path: Path, lines) -> PromptFile:
    path.write_text("\n".join(lines))
    return PromptFile(path)


def test_the_list_holds_hashes_only():
    assert len(HASHES) == 943
    assert all(len(each) == 16 and set(each) <= set("0123456789abcdef") for each in HASHES)
    assert not is_evaluation_prompt("")


def test_words_decide_what_is_an_evaluation_prompt(secret):
    for same in (
        SECRET.upper(),
        "a glass whale swimming over u\u0308mlaut city.",
        f"  {SECRET}, hyper quality, Ultra HD, 8K",
        f"{SECRET}, cinematic, realistic textures, high detail, natural colours",
    ):
        assert is_evaluation_prompt(same), same
    for other in ("a glass whale", f"{SECRET} at night", SECRET.replace("glass", "grass")):
        assert not is_evaluation_prompt(other), other
    assert normalise("It's 8-bit_art!") == "it s 8 bit art"


def test_files_of_lines_and_of_json(tmp_path):
    problems = []

    def problem(where, reason):
        problems.append((where, reason))

    lines = write_lines(tmp_path / "a.txt", ["\ufeffa dog  runs", "", "\ta cat\u0007 sits ", "x" * 3000])
    assert list(lines.prompts(problem)) == ["a dog runs", "a cat sits"]
    assert [where for where, _ in problems] == ["a.txt:4"]
    problems.clear()
    rows = ['{"prompt": "one"}', '{"caption": "two", "file": "x"}', "[1]", "{", '{"prompt": 3}', '{"prompt": ""}']
    rows.append('{"prompt": "a", "caption": "b"}')
    assert list(write_lines(tmp_path / "b.jsonl", rows).prompts(problem)) == ["one", "two"]
    assert [where for where, _ in problems] == [f"b.jsonl:{n}" for n in (3, 4, 5, 6, 7)]
    (tmp_path / "c.txt").write_bytes(b"good\n\xff\xfe\n")
    problems.clear()
    assert list(PromptFile(tmp_path / "c.txt").prompts(problem)) == ["good"]
    assert problems == [("c.txt:2", "the line is not UTF-8")]


def test_files_that_cannot_be_read(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"ends in '.csv', expected .txt or .jsonl"):
        PromptFile(tmp_path / "a.csv")
    with pytest.raises(UserError, match="cannot be opened"):
        PromptFile(tmp_path / "a.txt")
    monkeypatch.setattr("nd_jax.data.prompt_files.MAX_PROBLEMS", 3)
    bad = write_lines(tmp_path / "b.jsonl", ["{"] * 9)
    with pytest.raises(UserError, match="over 3 unusable lines"):
        list(bad.prompts(lambda where, reason: None))


def test_prompts_are_composed_of_packages_that_are_not_imported(tmp_path):
    made = PackagePrompts(400, seed=2, folder=write_packages(tmp_path))
    texts = list(made.prompts(lambda where, reason: None))
    assert texts == [PackagePrompts(400, seed=2, folder=tmp_path)[n] for n in range(400)]
    assert texts != [PackagePrompts(400, seed=3, folder=tmp_path)[n] for n in range(400)]
    sentences = [text for text in texts if text.startswith(("a photo of a", "many"))]
    possible = {f"a photo of a {c}." for c in made.classes} | {f"many {c}, {{so}} many" for c in made.classes}
    assert set(sentences) <= possible
    assert 60 < len(sentences) < 140
    assert any("medium" in text and "by artist" in text and "movement" in text and "flavor" in text for text in texts)
    assert any(text.startswith("negativ") for text in texts)
    digest = made.digest()
    (tmp_path / "clip_interrogator" / "data" / "mediums.txt").write_text("an etching\n")
    assert PackagePrompts(400, seed=2, folder=tmp_path).digest() != digest


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        ("open_clip/zero_shot_metadata.py", "x = 1", "does not hold ImageNet's sentences"),
        ("open_clip/zero_shot_metadata.py", "(", "does not hold ImageNet's sentences"),
        ("open_clip/zero_shot_metadata.py", METADATA.replace("{c}.", "{c}{c}."), "does not hold ImageNet's"),
        ("open_clip/zero_shot_metadata.py", METADATA.replace("'tench'", "open('x')"), "does not hold ImageNet's"),
        ("clip_interrogator/data/flavors.txt", "\n \n", "is empty, expected a phrase a line"),
        ("clip_interrogator/data/flavors.txt", None, "cannot be opened"),
        ("open_clip/__init__.py", None, "open-clip-torch==3.3.0 is not installed in"),
    ],
)
def test_packages_that_are_missing_or_others(tmp_path, file, content, told):
    path = write_packages(tmp_path) / file
    if content is not None:
        path.write_text(content)
    elif path.name == "__init__.py":
        path.parent.rename(tmp_path / "elsewhere")
    else:
        path.unlink()
    with pytest.raises(UserError, match=told):
        PackagePrompts(4, folder=tmp_path)


def test_a_corpus_leaves_out_evaluation_prompts_and_repeats(tmp_path, secret):
    first = write_lines(tmp_path / "a.txt", [f"prompt number {n}" for n in range(300)] + [SECRET, "x" * 3000])
    second = write_lines(tmp_path / "b.txt", ["PROMPT number 7!", "another prompt", SECRET.lower()])
    record, skipped = prompts.prepare([first, second], tmp_path / "out", held_out=0.2)
    counts = record["counts"]
    assert counts["train"] + counts["held_out"] == 301
    assert 30 < counts["held_out"] < 90
    assert (record["refused"], record["duplicates"], record["skipped"]) == (2, 1, 1)
    assert [each.file for each in skipped] == ["a.txt:302"]
    train, held_out = (prompts.open_split(tmp_path / "out", split) for split in ("train", "held_out"))
    texts = [{source[n]["caption"].decode() for n in range(len(source))} for source in (train, held_out)]
    assert not texts[0] & texts[1]
    assert texts[0] | texts[1] == {f"prompt number {n}" for n in range(300)} | {"another prompt"}
    assert {train[n]["source"] for n in range(len(train))} <= {b"a.txt", b"b.txt"}
    again, _ = prompts.prepare([second, first], tmp_path / "again", held_out=0.2)
    split = prompts.open_split(tmp_path / "again", "held_out")
    assert {normalise(split[n]["caption"].decode()) for n in range(len(split))} == set(map(normalise, texts[1]))
    assert again["config"] != record["config"]


def test_nothing_to_train_on(tmp_path, secret):
    only = write_lines(tmp_path / "a.txt", [SECRET, SECRET.lower()])
    with pytest.raises(UserError, match=r"none are left to train on \(2 are for evaluation only"):
        prompts.prepare([only], tmp_path / "out")
    with pytest.raises(UserError, match=r"a share of 1.0 held out"):
        prompts.prepare([only], tmp_path / "out", held_out=1.0)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"kind": "videos"}, "another dataset than prompts"),
        ({"config": "../../elsewhere"}, "is damaged"),
        ({"counts": 3}, "is damaged"),
        ({"counts": {"train": 4}}, "holds 5 train prompts, dataset.json says 4"),
        ({"counts": {}}, "no train prompts in this dataset"),
    ],
)
def test_records_that_lie(tmp_path, change, told):
    record, _ = prompts.prepare([write_lines(tmp_path / "a.txt", "abcde")], tmp_path, held_out=0.0)
    assert len(prompts.open_split(tmp_path)) == record["counts"]["train"] == 5
    (tmp_path / "dataset.json").write_text(json.dumps(record | change))
    with pytest.raises(UserError, match=told):
        prompts.open_split(tmp_path)


def test_no_corpus_at_all(tmp_path):
    with pytest.raises(UserError, match=r"holds no prompts \(dataset.json is missing\)"):
        prompts.open_split(tmp_path)


def test_training_reads_several_sources_and_some_empty_prompts(secret):
    one = [{"caption": f"one {n}".encode()} for n in range(30)]
    two = [{"caption": f"two {n}"} for n in range(170)]
    source = PromptSource([one, two], empty=0.1)
    texts = [source[n]["caption"] for n in range(len(source))]
    expected = np.array([f"one {n}" for n in range(30)] + [f"two {n}" for n in range(170)])
    changed = expected != np.array(texts)
    assert set(np.array(texts)[changed]) == {""}
    assert abs(changed.mean() - 0.1) < 0.02
    with pytest.raises(UserError, match="number 1: prompt 0 is one that VBench evaluates with"):
        PromptSource([one[:1], [{"caption": SECRET}]])[1]
    with pytest.raises(IndexError):
        source[200]
    for sources, empty in (([], 0.0), ([[]], 0.0), ([one], 1.0)):
        with pytest.raises(UserError, match=r"there are none|expected at least 0 and below 1"):
            PromptSource(sources, empty=empty)
