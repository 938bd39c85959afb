"""Small tokenizers trained on captions: official-looking folders that load offline, and a loader that is wary."""

import itertools
import json
import pickle
import shutil
import socket
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import sentencepiece
from transformers import AutoTokenizer, CLIPTokenizer, T5Tokenizer

from nd_jax.data import captions
from nd_jax.data.tokenizers import TextTokenizer, load_tokenizers, train_clip_tokenizer, train_tokenizers
from nd_jax.data.world import ATTRIBUTES, WORLDS, sample_labels
from nd_jax.errors import UserError

TEXTS = [
    "a small red circle moves up on a black background",
    "A Huge CRIMSON disc, gliding -- to the upper-left!!",
    "  two   spaces\tand a tab ",
    "don't stop: 12 ducks' café №½ ﬁ",
    "日本 🎈",
    "",
]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    sizes = train_tokenizers(folder, captions.corpus(count=1500))
    assert set(sizes) == {"tokenizer", "tokenizer_2", "tokenizer_3"}
    return folder


@pytest.fixture(scope="module")
def loaded(root):
    return load_tokenizers(root)


def test_training_is_reproducible(root, tmp_path):
    train_tokenizers(tmp_path, captions.corpus(count=1500))
    files = sorted(path.relative_to(root) for path in root.rglob("*") if path.is_file())
    assert [str(path) for path in files if path.parent.name == "tokenizer_3"] == [
        "tokenizer_3/special_tokens_map.json",
        "tokenizer_3/spiece.model",
        "tokenizer_3/tokenizer_config.json",
    ]
    assert len(files) == 11
    for path in files:
        assert (root / path).read_bytes() == (tmp_path / path).read_bytes(), path


def test_folders_load_in_transformers_without_a_network(root, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    for name, kind in (("tokenizer", CLIPTokenizer), ("tokenizer_2", CLIPTokenizer), ("tokenizer_3", T5Tokenizer)):
        assert isinstance(AutoTokenizer.from_pretrained(root / name, local_files_only=True), kind)
        assert TextTokenizer.from_folder(root / name).kind == ("t5" if kind is T5Tokenizer else "clip")


def test_t5_ids_are_sentencepiece_ids_with_an_end_mark(root, loaded):
    model = sentencepiece.SentencePieceProcessor(model_file=str(root / "tokenizer_3" / "spiece.model"))
    assert [model.pad_id(), model.eos_id(), model.unk_id(), model.bos_id()] == [0, 1, 2, -1]
    assert loaded["tokenizer_3"].vocab_size == model.vocab_size()
    tokens = TextTokenizer.from_folder(root / "tokenizer_3", max_length=64)(TEXTS)
    for text, ids, mask in zip(TEXTS, *tokens[:2], strict=True):
        expected = [*model.encode(text), 1]
        assert ids.tolist() == expected + [0] * (64 - len(expected))
        assert mask.tolist() == [1] * len(expected) + [0] * (64 - len(expected))
    assert not {2} & set(tokens.ids[:3].ravel().tolist()), "plain ASCII has no unknown pieces"


def test_clip_marks_have_the_largest_ids_and_padding_is_as_published(loaded):
    for name, pad in (("tokenizer", None), ("tokenizer_2", 0)):
        tokenizer = loaded[name]
        start, end = tokenizer.vocab_size - 2, tokenizer.vocab_size - 1
        tokens = tokenizer(TEXTS)
        assert tokens.ids.dtype == tokens.mask.dtype == np.int32
        assert (tokens.ids[:, 0] == start).all()
        lengths = tokens.mask.sum(1)
        assert lengths[-1] == 2
        for row, length in enumerate(lengths):
            assert tokens.ids[row].argmax() == length - 1  # pooled where the first end mark is
            assert (tokens.ids[row, length:] == (end if pad is None else pad)).all()
            assert (tokens.ids[row, 1 : length - 1] < start).all()


def test_clip_vocabulary_has_the_published_layout(root):
    vocab = json.loads((root / "tokenizer" / "vocab.json").read_text())
    lines = (root / "tokenizer" / "merges.txt").read_text().splitlines()
    assert lines[0].startswith("#version")
    names = sorted(vocab, key=vocab.get)
    assert names[0] == "!"
    assert names[256] == "!</w>"
    assert [name + "</w>" for name in names[:256]] == names[256:512]
    assert names[512:-2] == ["".join(line.split(" ")) for line in lines[1:]]
    assert names[-2:] == ["<|startoftext|>", "<|endoftext|>"]
    assert list(vocab.values()) == list(range(len(vocab)))


@pytest.mark.parametrize(("world", "length"), [("64x64", 24), ("two_objects", 40)])
def test_every_caption_fits(loaded, root, world, length):
    t5 = TextTokenizer.from_folder(root / "tokenizer_3", max_length=length)
    clip = TextTokenizer.from_folder(root / "tokenizer", max_length=length)
    longest = {name: max(options, key=lambda text: len(text.split())) for name, options in captions.WORDS.items()}
    per_attribute = [max(values, key=lambda v: len(longest.get(v, v).split())) for values in ATTRIBUTES.values()]
    row = [values.index(value) for values, value in zip(ATTRIBUTES.values(), per_attribute, strict=True)]
    texts = []
    for held_out, motion in itertools.product((False, True), range(len(ATTRIBUTES["motion"]))):
        row[3] = motion
        labels = np.array([row] * WORLDS[world].objects)
        texts += [
            captions.fill(template, labels, lambda options: max(options, key=lambda text: len(text.split())))
            for template in captions.templates(len(labels), held_out=held_out)
        ]
    for tokenizer in (t5, clip):
        assert tokenizer(texts).warnings == []


def test_captions_of_different_meaning_have_different_ids(loaded):
    labels = sample_labels(WORLDS["64x64"], 400, held_out=False, seed=0)
    plain = {captions.plain_caption(row) for row in labels}
    ids = loaded["tokenizer_3"](sorted(plain)).ids
    assert len(np.unique(ids, axis=0)) == len(plain) == 400


@pytest.mark.parametrize("name", ["tokenizer", "tokenizer_3"])
def test_long_prompts_are_cut_and_the_loss_is_shown(root, name):
    tokenizer = TextTokenizer.from_folder(root / name, max_length=8)
    marks = 2 if name == "tokenizer" else 1
    words = ["a", "red", "ball", "moves", "up", "on", "black", "background"]
    exact = " ".join(words[: 8 - marks])
    tokens = tokenizer([exact, " ".join(words) + "\nquickly", ""])
    assert len(tokens.warnings) == 1
    assert tokens.warnings[0].endswith(f"{' '.join(words[8 - marks :])} quickly'")
    assert "\n" not in tokens.warnings[0]
    np.testing.assert_array_equal(tokens.ids[0], tokens.ids[1])  # cut where the exact one ends, end mark kept
    assert tokens.mask[0].all()
    assert tokens.mask[2].sum() == marks


def test_lists_only_and_empty_lists(loaded):
    assert loaded["tokenizer_3"]([]).ids.shape == (0, 24)
    np.testing.assert_array_equal(loaded["tokenizer_3"]([b"a red ball"]).ids, loaded["tokenizer_3"](["a red ball"]).ids)
    with pytest.raises(UserError, match="list"):
        loaded["tokenizer_3"]("a red ball")


def test_a_tokenizer_crosses_processes(loaded):
    for tokenizer in loaded.values():
        copy = pickle.loads(pickle.dumps(tokenizer))
        np.testing.assert_array_equal(copy(TEXTS).ids, tokenizer(TEXTS).ids)


def spoil_link(folder):
    (folder / "spiece.model").rename(folder.parent / "elsewhere")
    (folder / "spiece.model").symlink_to(folder.parent / "elsewhere")


def spoil_config(folder, **changes):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


SPOILS = {
    "symbolic link": spoil_link,
    "hold code": lambda folder: (folder / "weights.pkl").write_bytes(b"cos\nsystem\n"),
    "expected only": lambda folder: (folder / "tokenization_mine.py").write_text("raise SystemExit"),
    "auto_map": lambda folder: spoil_config(folder, auto_map={"AutoTokenizer": "tokenization_mine.Mine"}),
    "not JSON": lambda folder: (folder / "tokenizer_config.json").write_text("{"),
    "an object": lambda folder: (folder / "tokenizer_config.json").write_text("[]"),
    "neither": lambda folder: (folder / "spiece.model").unlink(),
    "does not load": lambda folder: (folder / "spiece.model").write_bytes(b"not a model"),
    "at least 2": lambda folder: spoil_config(folder, model_max_length=1),
    "is not a folder": shutil.rmtree,
}


@pytest.mark.parametrize("words", SPOILS)
def test_folders_that_cannot_be_trusted_are_refused(root, tmp_path, words):
    folder = tmp_path / "tokenizer_3"
    shutil.copytree(root / "tokenizer_3", folder)
    SPOILS[words](folder)
    with pytest.raises(UserError, match=words) as caught:
        TextTokenizer.from_folder(folder)
    assert "\n" not in str(caught.value)


def test_vocabularies_that_cannot_be_are_refused(tmp_path):
    with pytest.raises(UserError, match="514"):
        train_clip_tokenizer(["a"], tmp_path, vocab_size=300)
    with pytest.raises(UserError, match="does not fit"):
        train_tokenizers(tmp_path, ["a red ball"], t5_vocab=20)


def test_threads_may_share_a_tokenizer(root):
    """Texts that fit and texts that are cut, from two threads at once: the library keeps its lengths as state."""
    tokenizer = TextTokenizer.from_folder(root / "tokenizer_3", max_length=6)
    short, long = ["a ball"] * 8, ["a small red ball moves up and left over a black background"] * 8
    expected = [tokenizer(texts).ids for texts in (short, long)]
    with ThreadPoolExecutor(2) as pool:
        made = list(pool.map(lambda n: tokenizer((short, long)[n % 2]).ids, range(200)))
    for n, ids in enumerate(made):
        np.testing.assert_array_equal(ids, expected[n % 2])
