"""Tokenizers: train small ones on captions, write them as official-looking folders, load any such folder.

A T5 folder holds ``spiece.model`` (SentencePiece unigram; <pad> 0, </s> 1, <unk> 2), a CLIP folder ``vocab.json`` and
``merges.txt`` (byte-level BPE with ``</w>``; <|startoftext|> and <|endoftext|> have the two largest ids, as in the
published vocabulary, because CLIP pools at the largest id). Both carry ``tokenizer_config.json`` and
``special_tokens_map.json`` and load in transformers, here and in the official pipelines.
"""

from __future__ import annotations

import functools
import io
import json
import os
import string
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from nd_jax.errors import UserError

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns that PyTorch is missing; that is on purpose

CLIP_START, CLIP_END = "<|startoftext|>", "<|endoftext|>"
_CLIP_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_UNSAFE = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".py", ".pyc", ".so", ".npy")


class Tokens(NamedTuple):
    """Token ids and validity (1 real, 0 padding), and one line of warning for every text that was cut."""

    ids: Int[np.ndarray, "batch length"]
    mask: Int[np.ndarray, "batch length"]
    warnings: list[str]


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def train_t5_tokenizer(lines: Iterable[str], folder: str | Path, *, vocab_size: int = 512, max_length: int = 24) -> int:
    """Train a SentencePiece unigram model and write a T5Tokenizer folder. Returns the number of ids.

    The same lines give the same bytes. All printable ASCII is covered and case is folded, so that a prompt typed by
    hand is spelled with known pieces. ``max_length`` becomes the folder's default length. Raises UserError when the
    vocabulary is larger than the corpus can fill, or too small for its characters.
    """
    import sentencepiece

    lines = list(lines)
    # Candidates for pieces are substrings shared by two distinct words: show every word in two more spellings.
    words = sorted({word.strip(",.:") for line in lines for word in line.split()})
    lines += [f"{word} {word}, {word}." for word in words]
    written = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=written,
            model_type="unigram",
            vocab_size=vocab_size,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            pad_piece="<pad>",
            eos_piece="</s>",
            unk_piece="<unk>",
            normalization_rule_name="nmt_nfkc_cf",
            required_chars="".join(sorted(set(string.printable.lower()) - set(string.whitespace))),
            character_coverage=1.0,
            hard_vocab_limit=False,
            num_threads=1,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise UserError(f"T5 tokenizer: vocabulary of {vocab_size} pieces does not fit the corpus: {error}") from error
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spiece.model").write_bytes(written.getvalue())
    special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    _write_json(folder / "special_tokens_map.json", special)
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "T5Tokenizer",
            **special,
            "extra_ids": 0,
            "additional_special_tokens": [],
            "legacy": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": max_length,
        },
    )
    return sentencepiece.SentencePieceProcessor(model_proto=written.getvalue()).vocab_size()


def train_clip_tokenizer(
    lines: Iterable[str], folder: str | Path, *, vocab_size: int = 1024, max_length: int = 32, pad_token: str = CLIP_END
) -> int:
    """Train a byte-level BPE and write a CLIPTokenizer folder. Returns the number of ids, 514 without any merge.

    Ids: 256 bytes, the same 256 ending a word, the merges by rank, then start and end of text. CLIP-L pads with the
    end token; CLIP-bigG with "!" (``pad_token``). Raises UserError for a vocabulary below 514.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    if vocab_size < 514:
        raise UserError(
            f"CLIP tokenizer: vocabulary of {vocab_size}, expected at least 514 (two ids per byte, 2 marks)"
        )
    byte_symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    symbols = byte_symbols + [symbol + "</w>" for symbol in byte_symbols]
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_CLIP_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    learner.train_from_iterator(
        list(lines),
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            initial_alphabet=byte_symbols,
            end_of_word_suffix="</w>",
            show_progress=False,
        ),
    )
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]][: vocab_size - 514]
    names = [*symbols, *(left + right for left, right in merges), CLIP_START, CLIP_END]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    vocab = {name: index for index, name in enumerate(names)}
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    body = "".join(f"{left} {right}\n" for left, right in merges)
    (folder / "merges.txt").write_text("#version: 0.2\n" + body, encoding="utf-8")
    special = {"bos_token": CLIP_START, "eos_token": CLIP_END, "unk_token": CLIP_END, "pad_token": pad_token}
    _write_json(folder / "special_tokens_map.json", special)
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "CLIPTokenizer",
            **special,
            "add_prefix_space": False,
            "do_lower_case": True,
            "errors": "replace",
            "model_max_length": max_length,
        },
    )
    return len(names)


def _check_folder(folder: Path) -> dict:
    """The folder's tokenizer_config.json, after refusing whatever could run code or reach outside the folder."""
    if not folder.is_dir():
        raise UserError(f"tokenizer: {folder} is not a folder, expected one with spiece.model or vocab.json")
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            raise UserError(f"tokenizer: {path} is a symbolic link, expected a plain file: copy the folder with cp -rL")
        if path.suffix.lower() in _UNSAFE:
            raise UserError(f"tokenizer: {path} can hold code, expected only text and spiece.model: remove it")
    config_path = folder / "tokenizer_config.json"
    try:
        config = json.loads(config_path.read_text(encoding="utf-8")) if config_path.exists() else {}
    except ValueError as error:
        raise UserError(f"tokenizer: {config_path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"tokenizer: {config_path} holds a {type(config).__name__}, expected an object")
    if "auto_map" in config:
        raise UserError(
            f"tokenizer: {config_path} asks for code of its own (auto_map), expected a T5 or CLIP tokenizer"
        )
    return config


class TextTokenizer:
    """Turns texts into fixed-length ids and masks. Make one with `from_folder`; it may cross processes."""

    def __init__(self, tokenizer, kind: str, max_length: int, folder: Path):
        self._tokenizer = tokenizer
        self.kind = kind  # "t5" or "clip"
        self.max_length = max_length
        self.folder = folder
        self._one_at_a_time = threading.Lock()  # padding and truncation are state of the library's tokenizer

    def __reduce__(self):  # data workers load the folder again: the library's CLIP tokenizer cannot be copied
        return functools.partial(TextTokenizer.from_folder, max_length=self.max_length), (self.folder,)

    @classmethod
    def from_folder(cls, folder: str | Path, *, max_length: int | None = None) -> TextTokenizer:
        """Load a T5 or CLIP tokenizer folder from disk; no network, no remote code.

        ``max_length`` counts the marks (T5 adds one, CLIP two); the default is the folder's ``model_max_length``, or
        128 for T5 and 77 for CLIP where it names none. Raises UserError for links, files that could hold code, folders
        of another kind and files that do not load.
        """
        from transformers import CLIPTokenizer, T5Tokenizer

        folder = Path(folder)
        config = _check_folder(folder)
        if (folder / "spiece.model").is_file():
            kind, loader, usual = "t5", T5Tokenizer, 128
        elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            kind, loader, usual = "clip", CLIPTokenizer, 77
        else:
            raise UserError(f"tokenizer: {folder} has neither spiece.model (T5) nor vocab.json and merges.txt (CLIP)")
        try:
            tokenizer = loader.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        except Exception as error:  # whatever the library meets in a broken file, the file is at fault
            raise UserError(f"tokenizer: {folder} does not load as a {kind} tokenizer: {error}") from error
        length = config.get("model_max_length") if max_length is None else max_length
        if max_length is None and (not isinstance(length, int) or length > 100_000):
            length = usual
        if length < 2:
            raise UserError(f"tokenizer: max_length is {length}, expected at least 2 (room for the marks)")
        return cls(tokenizer, kind, length, folder.absolute())

    @property
    def vocab_size(self) -> int:
        """Number of ids, hence the least number of rows of an embedding table."""
        return len(self._tokenizer)

    def __call__(self, texts: Sequence[str | bytes]) -> Tokens:
        """Ids and mask, int32 [batch, max_length]. Empty texts are allowed and hold only the marks.

        A text that is too long is cut, keeping its end mark; the warning shows what was lost.
        """
        if isinstance(texts, str | bytes):
            raise UserError("tokenizer: got one text, expected a list of texts")
        texts = [text.decode() if isinstance(text, bytes) else text for text in texts]
        ids = np.zeros((len(texts), self.max_length), np.int32)
        mask = np.zeros_like(ids)
        if not texts:
            return Tokens(ids, mask, [])
        with self._one_at_a_time:
            encoded = self._tokenizer(
                texts,
                padding="max_length",
                truncation=True,
                max_length=self.max_length,
                return_attention_mask=True,
                return_offsets_mapping=True,
            )
            ids[:], mask[:] = encoded["input_ids"], encoded["attention_mask"]
            full = mask.all(axis=1)
            warnings = [self._lost(texts[row]) for row in np.flatnonzero(full)]
        return Tokens(ids, mask, [warning for warning in warnings if warning])

    def _lost(self, text: str) -> str:
        """One line about the end of the text that does not fit, or nothing when all of it does."""
        whole = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        room = self.max_length - (1 if self.kind == "t5" else 2)
        if len(whole) <= room:
            return ""
        lost = " ".join(text[whole[room][0] :].split())
        return f"prompt cut to {self.max_length} tokens ({self.kind}); this was lost: {lost!r}"


def train_tokenizers(
    folder: str | Path,
    lines: Iterable[str],
    *,
    t5_length: int = 24,
    clip_length: int = 24,
    t5_vocab: int = 512,
    clip_vocab: int = 1024,
) -> dict[str, int]:
    """Write ``tokenizer``, ``tokenizer_2`` (CLIP, padded with the end mark and with "!") and ``tokenizer_3`` (T5).

    The layout is that of an official checkpoint folder. Returns the number of ids of each.
    """
    folder, lines = Path(folder), list(lines)
    clip = {"vocab_size": clip_vocab, "max_length": clip_length}
    return {
        "tokenizer": train_clip_tokenizer(lines, folder / "tokenizer", **clip),
        "tokenizer_2": train_clip_tokenizer(lines, folder / "tokenizer_2", pad_token="!", **clip),
        "tokenizer_3": train_t5_tokenizer(lines, folder / "tokenizer_3", vocab_size=t5_vocab, max_length=t5_length),
    }


def load_tokenizers(folder: str | Path, **max_lengths: int) -> dict[str, TextTokenizer]:
    """The tokenizers of a checkpoint folder by folder name; ``tokenizer_3=128`` sets one's length."""
    names = ("tokenizer", "tokenizer_2", "tokenizer_3")
    return {name: TextTokenizer.from_folder(Path(folder) / name, max_length=max_lengths.get(name)) for name in names}
