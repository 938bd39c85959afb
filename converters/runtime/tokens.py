"""Prompts to ids: SentencePiece for T5, byte-level BPE for CLIP, from the official files in the bundle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from .errors import BundleError
from .manifest import Bundle

CLIP_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class Tokenizer:
    """Fixed-length ids of a text. ``entry`` is an encoder's entry in the manifest: tokenizer folder, kind, length, and
    a probe (a text and its ids) that shows whether files and libraries are those of the build."""

    def __init__(self, bundle: Bundle, entry: Mapping[str, Any]):
        self.folder, self.length, self.kind = entry["tokenizer"], entry["length"], entry["kind"]
        try:
            self._encode, self.pad = (_t5 if self.kind == "t5" else _clip)(bundle, self.folder)
        except BundleError:
            raise
        except Exception as error:  # whatever the library meets in a broken file, the file is at fault
            raise BundleError(f"tokenizer {bundle.folder / self.folder} does not load ({error})") from None
        probe = entry["probe"]
        if self(probe["text"])[0].tolist() != probe["ids"]:
            raise BundleError(
                f"tokenizer {bundle.folder / self.folder} gives other ids than when the bundle was built; expected the "
                "tokenizer of the checkpoint"
            )

    def __call__(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Ids and mask (1 real, 0 padding), int32 [length]; a text that is too long is cut, keeping its end mark."""
        ids = self._encode(text)
        if len(ids) > self.length:
            ids = [*ids[: self.length - 1], ids[-1]]
        mask = np.arange(self.length) < len(ids)
        return np.array(ids + [self.pad] * (self.length - len(ids)), np.int32), mask.astype(np.int32)


def _t5(bundle: Bundle, folder: str):
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_proto=bundle.file(f"{folder}/spiece.model").read_bytes())
    return lambda text: [*model.encode(text), model.eos_id()], max(model.pad_id(), 0)


def _read(bundle: Bundle, name: str) -> Any:
    return json.loads(bundle.file(name).read_text(encoding="utf-8")) if name in bundle.files else {}


def _clip(bundle: Bundle, folder: str):
    from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

    vocabulary = _read(bundle, f"{folder}/vocab.json")
    lines = bundle.file(f"{folder}/merges.txt").read_text(encoding="utf-8").splitlines()
    merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    marks = _read(bundle, f"{folder}/special_tokens_map.json") | {
        key: value for key, value in _read(bundle, f"{folder}/tokenizer_config.json").items() if key.endswith("_token")
    }

    def mark(key: str, default: str) -> str:
        value = marks.get(key, default)
        return value["content"] if isinstance(value, dict) else value or default

    start, end = mark("bos_token", "<|startoftext|>"), mark("eos_token", "<|endoftext|>")
    unknown, pad = mark("unk_token", end), mark("pad_token", end)
    bpe = models.BPE(vocabulary, merges, unk_token=unknown, continuing_subword_prefix="", end_of_word_suffix="</w>")
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CLIP_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.add_special_tokens([AddedToken(each, normalized=False) for each in dict.fromkeys((start, end, pad))])

    def encode(text: str) -> list[int]:
        return [vocabulary[start], *tokenizer.encode(text, add_special_tokens=False).ids, vocabulary[end]]

    return encode, vocabulary[pad]
