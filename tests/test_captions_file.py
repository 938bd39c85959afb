"""Captions of a folder: what is read, and what is named and left out."""

import json

import pytest

from nd_jax.data import captions_file
from nd_jax.data.captions_file import Skipped, captions_path, check_caption, clean, read_captions, read_sidecar
from nd_jax.errors import UserError

CLIPS = ["a.mp4", "sub/b.webm", "caf\u00e9.mp4", "c,d.mp4"]


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_captions_of_several_lines_and_lists(tmp_path):
    rows = [
        {"file": "a.mp4", "caption": "one"},
        {"file": "./sub/b.webm", "caption": ["two", "  three\n lines "]},
        {"file": "a.mp4", "caption": "four", "more": 1},
        {"file": "cafe\u0301.mp4", "caption": "decomposed name"},
    ]
    text = "\ufeff" + "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    found, problems = read_captions(write(tmp_path / "captions.jsonl", text), CLIPS)
    assert found == {
        "a.mp4": ["one", "four"],
        "sub/b.webm": ["two", "three lines"],
        "caf\u00e9.mp4": ["decomposed name"],
    }
    assert problems == []


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not JSON"),
        ("[" * 60_000, "not JSON"),
        ("[1]", "expected {"),
        ('{"file": "a.mp4"}', "expected {"),
        ('{"caption": "x"}', "expected {"),
        ('{"file": 3, "caption": "x"}', "names no file"),
        ('{"file": "", "caption": "x"}', "names no file"),
        ('{"file": "../a.mp4", "caption": "x"}', "leaves the folder"),
        ('{"file": "sub/../a.mp4", "caption": "x"}', "leaves the folder"),
        ('{"file": "/etc/a.mp4", "caption": "x"}', "leaves the folder"),
        ('{"file": "z.mp4", "caption": "x"}', "z.mp4 is not a video file"),
        ('{"file": "a.mp4\\u0000", "caption": "x"}', "is not a video file"),
        ('{"file": "a.mp4", "caption": ""}', "empty"),
        ('{"file": "a.mp4", "caption": "\\u0007 \\u202e"}', "empty"),
        ('{"file": "a.mp4", "caption": null}', "null, expected text"),
        ('{"file": "a.mp4", "caption": [["x"]]}', "expected text"),
        ('{"file": "a.mp4", "caption": "good"}', "already"),
        ('{"file": "a.mp4", "caption": "' + "x" * 2001 + '"}', "2001 characters"),
        ('{"file": "a.mp4", "caption": "' + "x" * 70_000 + '"}', "more than 65536 bytes"),
        (b'{"file": "a.mp4", "caption": "\xff"}', "not UTF-8"),
    ],
)
def test_unusable_lines_are_named(tmp_path, line, reason):
    good = b'{"file": "a.mp4", "caption": "good"}\n'
    line = line if isinstance(line, bytes) else line.encode()
    last = b'{"file": "sub/b.webm", "caption": "last"}'
    found, problems = read_captions(write(tmp_path / "x.jsonl", good + line + b"\n" + last), CLIPS)
    assert found == {"a.mp4": ["good"], "sub/b.webm": ["last"]}
    (problem,) = problems
    assert problem.file == "x.jsonl:2"
    assert reason in problem.reason
    assert len(problem.reason) < 300


def test_csv_with_quotes_and_other_columns(tmp_path):
    text = 'id, File ,caption\r\n1,a.mp4,"red, and ""blue"""\r\n2,"c,d.mp4","two\r\nlines"\r\n\r\n'
    found, problems = read_captions(write(tmp_path / "captions.csv", text), CLIPS)
    assert found == {"a.mp4": ['red, and "blue"'], "c,d.mp4": ["two lines"]}
    assert problems == []


def test_unusable_csv_rows_are_named(tmp_path):
    rows = [
        b"file,caption",
        b"a.mp4,one",
        b"a.mp4",
        b"b.mp4,x,y",
        b"a.mp4,\xff",
        b"sub/b.webm,",
        b'a.mp4,"quote"x',
        b"a.mp4,two",
        b'a.mp4,"never closed',
    ]
    found, problems = read_captions(write(tmp_path / "captions.csv", b"\n".join(rows)), CLIPS)
    assert found == {"a.mp4": ["one", "two"]}
    told = {problem.file.split(":")[1]: problem.reason for problem in problems}
    assert told.keys() == {"3", "4", "5", "6", "7", "9"}
    assert "1 columns, expected 2" in told["3"]
    assert "3 columns" in told["4"]
    assert "UTF-8" in told["5"]
    assert "empty" in told["6"]
    assert "not CSV" in told["7"]
    assert "not CSV" in told["9"]


def test_files_that_cannot_be_read_at_all(tmp_path, monkeypatch):
    for name, content, told in (
        ("x.txt", "a", "expected .jsonl or .csv"),
        ("x.csv", "", "no header"),
        ("y.csv", "name,text\n", "file and caption"),
        ("z.csv", "file,caption\n".encode("utf-16"), "file and caption"),
    ):
        with pytest.raises(UserError, match=told):
            read_captions(write(tmp_path / name, content), CLIPS)
    with pytest.raises(UserError, match="does not exist"):
        read_captions(tmp_path / "none.jsonl", CLIPS)
    (tmp_path / "link.jsonl").symlink_to(write(tmp_path / "real.jsonl", "x\n" * 20))
    with pytest.raises(UserError, match="plain file"):
        read_captions(tmp_path / "link.jsonl", CLIPS)
    monkeypatch.setattr(captions_file, "MAX_PROBLEMS", 10)
    with pytest.raises(UserError, match="over 10 unusable lines"):
        read_captions(tmp_path / "real.jsonl", CLIPS)
    monkeypatch.setattr(captions_file, "MAX_BYTES", 10)
    with pytest.raises(UserError, match="more than"):
        read_captions(tmp_path / "real.jsonl", CLIPS)


def test_a_clip_has_only_so_many_captions(tmp_path, monkeypatch):
    monkeypatch.setattr(captions_file, "MAX_PER_CLIP", 2)
    path = write(tmp_path / "x.jsonl", json.dumps({"file": "a.mp4", "caption": ["1", "2", "3"]}))
    assert read_captions(path, CLIPS) == ({"a.mp4": ["1", "2"]}, [Skipped("x.jsonl:1", "a.mp4 has 2 captions already")])


def test_captions_are_cleaned():
    assert clean(" a\tb\x1b[31m\u202ec\ud800\u2028d ") == "a b [31m c d"
    assert clean("e\u0301") == "\u00e9"
    family = "\U0001f468\u200d\U0001f469"
    assert clean(family) == family
    with pytest.raises(UserError, match="expected text"):
        check_caption({"a": 1})


def test_the_file_of_a_folder(tmp_path):
    assert captions_path(tmp_path) is None
    csv = write(tmp_path / "captions.csv", "")
    assert captions_path(tmp_path) == csv
    write(tmp_path / "captions.jsonl", "")
    with pytest.raises(UserError, match="one of them"):
        captions_path(tmp_path)


def test_text_files_beside_clips(tmp_path):
    assert read_sidecar(write(tmp_path / "a.txt", "\ufeffa red\nball\n")) == "a red ball"
    (tmp_path / "link.txt").symlink_to(tmp_path / "a.txt")
    (tmp_path / "folder.txt").mkdir()
    write(tmp_path / "latin.txt", "p\u00e8re".encode("latin-1"))
    write(tmp_path / "empty.txt", " \n")
    write(tmp_path / "huge.txt", "x" * 70_000)
    for name, told in (
        ("link", "is a link"),
        ("folder", "cannot be read"),
        ("latin", "not UTF-8"),
        ("empty", "is empty"),
        ("huge", "more than 65536 bytes"),
    ):
        with pytest.raises(UserError, match=rf"{name}\.txt.*{told}"):
            read_sidecar(tmp_path / f"{name}.txt")
