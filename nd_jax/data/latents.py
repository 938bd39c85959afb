"""Encoded datasets: every clip's latents and captions, computed once, so that training need not run the codec.

A folder of three files: ``latents.npy`` float32 [N, U, h, w, C] as the codec gives them (not normalised),
``captions.json`` (a list of captions for every clip) and ``info.json`` (for people).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from nd_jax.errors import UserError
from nd_jax.outputs import new_folder


def write_latents(
    folder: str | Path,
    batches: Iterable[Float[np.ndarray, "b u h w c"]],
    captions: Sequence[Sequence[str]],
    *,
    info: dict[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write latents, batch after batch of clips, into ``folder``; it appears whole or not at all.

    ``captions[n]`` are the captions of clip n. Raises UserError for an existing folder without ``overwrite`` and when
    clips and captions do not agree in number.
    """
    with new_folder(folder, overwrite=overwrite) as part:
        table, count = None, 0
        for latents in batches:
            if count + len(latents) > len(captions):
                raise UserError(f"latents: more clips than the {len(captions)} lists of captions")
            if table is None:
                shape = (len(captions), *latents.shape[1:])
                table = np.lib.format.open_memmap(part / "latents.npy", "w+", np.float32, shape)
            table[count : count + len(latents)] = latents
            count += len(latents)
        if table is None or count != len(captions):
            raise UserError(f"latents: {count} clips for {len(captions)} lists of captions, expected as many, not none")
        table.flush()
        (part / "captions.json").write_text(json.dumps([list(texts) for texts in captions]), encoding="utf-8")
        (part / "info.json").write_text(json.dumps({"clips": count, **(info or {})}, indent=2))
    return Path(folder)


class LatentSource:
    """Random access to a folder of ``write_latents``: ``source[i]`` is ``{"latents": [U, h, w, C], "caption": str}``.

    Every clip appears once with each of its captions; a share ``dropout`` of the examples, spread evenly, has the empty
    caption instead, which is what guidance subtracts. Raises UserError for a folder that does not hold latents.
    """

    def __init__(self, folder: str | Path, *, dropout: float = 0.0):
        folder = Path(folder)
        try:
            self.latents = np.load(folder / "latents.npy", mmap_mode="r", allow_pickle=False)
            self.captions = json.loads((folder / "captions.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"latents: {folder} cannot be read ({error}); make it with nd-jax data latents") from None
        strings = isinstance(self.captions, list) and all(
            isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts)
            for texts in self.captions
        )
        if self.latents.ndim != 5 or self.latents.dtype != np.float32 or not self.latents.size or not strings:
            raise UserError(
                f"latents: {folder} holds {self.latents.dtype} {list(self.latents.shape)}, expected float32 "
                "[N, U, h, w, C], none of them 0, and a list of captions for each of the N clips"
            )
        if len(self.captions) != len(self.latents):
            raise UserError(
                f"latents: {folder} has {len(self.latents)} clips and captions for {len(self.captions)}; make it again"
            )
        if not 0 <= dropout < 1:
            raise UserError(f"latents: caption dropout {dropout}, expected at least 0 and below 1")
        self.variants = min(map(len, self.captions))
        self.dropout = dropout

    def __len__(self) -> int:
        return len(self.latents) * self.variants

    def __getitem__(self, index: int) -> dict[str, Any]:
        variant, clip = divmod(int(index), len(self.latents))
        # The golden ratio's multiples are spread evenly over [0, 1): any stretch of examples has its share.
        dropped = (index * 0.6180339887498949) % 1 < self.dropout
        return {"latents": np.array(self.latents[clip]), "caption": "" if dropped else self.captions[clip][variant]}
