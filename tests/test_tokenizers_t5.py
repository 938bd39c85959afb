"""T5's tokenizer in the published form: a SentencePiece model trained here, 100 extra ids, and what both readers of it
(the library's and the phone runtime's) make of awkward texts."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import sentencepiece

from nd_jax.converters.runtime.tokens import Tokenizer
from nd_jax.data.captions import corpus
from nd_jax.data.tokenizers import TextTokenizer

EXTRA = [f"<extra_id_{n}>" for n in range(100)]
TEXTS = [
    "a small red circle moves right",
    "",
    " two   spaces\tand\nlines ",
    "Capitals ARE kept; don't 12.5%",
    "ﬁne ligature, number signs № and ①",  # normalised by NFKC
    "naïve café",
    "日本語",  # no such pieces: unknown
    "x" * 80,
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """As the official folders have it: pieces with case, <pad> 0, </s> 1, <unk> 2, extra ids behind the pieces."""
    lines, written = [*corpus(count=300), *(line.upper() for line in corpus(count=60))], io.BytesIO()
    lines += ["naïve café, fine; don't stop at 12.5% of No numbers like No1"] * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=written,
        model_type="unigram",
        vocab_size=300,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        pad_piece="<pad>",
        eos_piece="</s>",
        unk_piece="<unk>",
        normalization_rule_name="nmt_nfkc",
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("t5") / "tokenizer_3"
    path.mkdir()
    (path / "spiece.model").write_bytes(written.getvalue())
    marks = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    config = {"tokenizer_class": "T5Tokenizer", **marks, "extra_ids": 100, "additional_special_tokens": EXTRA}
    config |= {"legacy": True, "clean_up_tokenization_spaces": True, "model_max_length": 512}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    (path / "special_tokens_map.json").write_text(json.dumps({**marks, "additional_special_tokens": EXTRA}))
    return path


@pytest.fixture(scope="module")
def model(folder):
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model"))


def test_extra_ids_come_behind_the_pieces(folder, model):
    tokenizer = TextTokenizer.from_folder(folder)
    assert tokenizer.kind == "t5"
    assert tokenizer.max_length == 512
    assert tokenizer.vocab_size == model.vocab_size() + 100


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_the_models_own_with_an_end_mark(folder, model, text):
    found = TextTokenizer.from_folder(folder, max_length=128)([text])
    expected = [*model.encode(text), 1]
    assert found.ids[0].tolist() == expected + [0] * (128 - len(expected))
    assert found.mask[0].tolist() == [1] * len(expected) + [0] * (128 - len(expected))
    assert not found.warnings


def test_normalisation_and_unknown_pieces(folder, model):
    tokenizer = TextTokenizer.from_folder(folder, max_length=64)
    ligature, plain, japanese = tokenizer(["ﬁne №①", "fine No1", "日本語"]).ids
    np.testing.assert_array_equal(ligature, plain)
    assert 2 in japanese
    assert 2 not in plain
    upper, lower = tokenizer(["RED", "red"]).ids
    assert not np.array_equal(upper, lower), "case is kept"


def test_long_texts_keep_their_end_mark(folder, model):
    tokenizer = TextTokenizer.from_folder(folder, max_length=8)
    found = tokenizer(["a small red circle moves right on a white background, slowly"])
    whole = model.encode("a small red circle moves right on a white background, slowly")
    assert found.ids[0].tolist() == [*whole[:7], 1]
    assert found.mask[0].tolist() == [1] * 8
    assert len(found.warnings) == 1


class Bundle:
    """As much of a bundle as the runtime's tokenizer reads."""

    def __init__(self, folder):
        self.folder, self.files = folder.parent, {}

    def file(self, name):
        return self.folder / name


def test_the_runtime_reads_the_same(folder, model):
    probe = {"text": "red", "ids": TextTokenizer.from_folder(folder, max_length=24)(["red"]).ids[0].tolist()}
    entry = {"tokenizer": "tokenizer_3", "kind": "t5", "length": 24, "probe": probe}
    runtime, library = Tokenizer(Bundle(folder), entry), TextTokenizer.from_folder(folder, max_length=24)
    texts = TEXTS
    expected = library(texts)
    for row, text in enumerate(texts):
        ids, mask = runtime(text)
        assert ids.tolist() == expected.ids[row].tolist(), text
        assert mask.tolist() == expected.mask[row].tolist(), text
