"""Encoded datasets: every clip's latents and captions, computed once, so that training need not run the codec.

A folder of three files: ``latents.npy`` float32 [N, U, h, w, C] as the codec gives them (not normalised),
``captions.json`` (a list of captions for every clip) and ``info.json`` (the number of clips, a CRC-32 of each of the
other two, and remarks for people).
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from nd_jax.checked_files import CONFIG_LIMIT, read_bytes, read_json, regular_file, shown
from nd_jax.errors import UserError
from nd_jax.outputs import new_folder

TABLE, CAPTIONS, INFO = "latents.npy", "captions.json", "info.json"
CAPTIONS_LIMIT = 1 << 30
"""Bytes of captions.json."""
READ_LIMIT = 1 << 32
"""Bytes of latents up to which opening a folder compares their CRC-32 (seconds); later ones only have to be finite."""
REMEDY = "make the folder again with nd-jax data latents, or copy it again"


def write_latents(
    folder: str | Path,
    batches: Iterable[Float[np.ndarray, "b u h w c"]],
    captions: Sequence[Sequence[str]],
    *,
    info: dict[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write latents, batch after batch of clips, into ``folder``; it appears whole or not at all.

    ``captions[n]`` are the captions of clip n. Raises UserError for an existing folder without ``overwrite``, for
    latents that are not finite, and when clips and captions do not agree in number.
    """
    with new_folder(folder, overwrite=overwrite) as part:
        table, count = None, 0
        for latents in batches:
            if count + len(latents) > len(captions):
                raise UserError(f"latents: more clips than the {len(captions)} lists of captions")
            if table is None:
                shape = (len(captions), *latents.shape[1:])
                table = np.lib.format.open_memmap(part / TABLE, "w+", np.float32, shape)
            check_finite(latents, f"clip {count} and later ones")
            table[count : count + len(latents)] = latents
            count += len(latents)
        if table is None or count != len(captions):
            raise UserError(f"latents: {count} clips for {len(captions)} lists of captions, expected as many, not none")
        table.flush()
        (part / CAPTIONS).write_text(json.dumps([list(texts) for texts in captions]), encoding="utf-8")
        sums = {name: _checksum(part / name) for name in (TABLE, CAPTIONS)}
        (part / INFO).write_text(json.dumps({**(info or {}), "clips": count, "crc32": sums}, indent=2))
    return Path(folder)


class LatentSource:
    """Random access to a folder of ``write_latents``: ``source[i]`` is ``{"latents": [U, h, w, C], "caption": str}``.

    Every clip appears once with each of its captions; a share ``dropout`` of the examples, spread evenly, has the empty
    caption instead, which is what guidance subtracts. ``units`` keeps the first so many latent frames of every clip.
    Raises UserError for a folder that does not hold what was written there, and at clips that are not finite.
    """

    def __init__(self, folder: str | Path, *, dropout: float = 0.0, units: int | None = None):
        self.folder = Path(folder)
        self.latents = _open_table(self.folder / TABLE)
        self.captions = _read_captions(self.folder / CAPTIONS)
        if len(self.captions) != len(self.latents):
            raise UserError(
                f"latents: {folder} has {len(self.latents)} clips and captions for {len(self.captions)}; {REMEDY}"
            )
        _compare(self.folder, len(self.latents), self.latents.nbytes)
        if not 0 <= dropout < 1:
            raise UserError(f"latents: caption dropout {dropout}, expected at least 0 and below 1")
        self.latents = self.latents[:, :units]
        self.variants = len(self.captions[0])
        self.dropout = dropout

    def __len__(self) -> int:
        return len(self.latents) * self.variants

    def __getitem__(self, index: int) -> dict[str, Any]:
        variant, clip = divmod(int(index), len(self.latents))
        # The golden ratio's multiples are spread evenly over [0, 1): any stretch of examples has its share.
        dropped = (index * 0.6180339887498949) % 1 < self.dropout
        latents = np.array(self.latents[clip])
        check_finite(latents, f"clip {clip} of {self.folder}")
        return {"latents": latents, "caption": "" if dropped else self.captions[clip][variant]}


def check_finite(latents: np.ndarray, where: str) -> None:
    """Raises UserError if there is NaN or infinity in ``latents``."""
    if not np.isfinite(latents).all():
        raise UserError(
            f"latents: {where}: a number is NaN or infinite, expected finite ones: look at the codec; {REMEDY}"
        )


def _open_table(path: Path) -> np.memmap:
    """latents.npy, as long as its header says. Never unpickles."""
    if not path.exists():
        raise UserError(f"latents: {path} is missing, expected a folder of nd-jax data latents; {REMEDY}")
    regular_file(path, "latents: table")
    try:
        with np.errstate(over="ignore"):  # of an absurd shape's size
            table = np.lib.format.open_memmap(path, "r")
    except Exception as error:  # a header is a Python literal: numpy raises almost anything
        raise UserError(f"latents: {path} cannot be read ({shown(str(error), 200)}); {REMEDY}") from error
    if table.ndim != 5 or table.dtype != np.float32 or not table.size:
        raise UserError(
            f"latents: {path} holds {table.dtype} {list(table.shape)}, expected float32 [N, U, h, w, C], none of them "
            f"0; {REMEDY}"
        )
    size, expected = path.stat().st_size, table.offset + table.nbytes
    if size != expected:
        raise UserError(f"latents: {path} has {size} bytes, expected {expected} for {len(table)} clips; {REMEDY}")
    return table


def _read_captions(path: Path) -> list[list[str]]:
    try:
        captions = json.loads(read_bytes(path, CAPTIONS_LIMIT, "latents: captions").decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"latents: {path} is not valid JSON ({shown(str(error))}); {REMEDY}") from None
    if not isinstance(captions, list) or not all(
        isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts) for texts in captions
    ):
        raise UserError(f"latents: {path}: expected a list of captions, at least one, for each of the clips; {REMEDY}")
    counts = sorted(set(map(len, captions)))
    if len(counts) > 1:
        told = f"{counts[0]} to {counts[-1]}"
        raise UserError(f"latents: {path}: {told} captions a clip, expected as many of each; {REMEDY}")
    return captions


def _compare(folder: Path, clips: int, size: int) -> None:
    """Hold a folder to its info.json; those of older versions have no checksums."""
    info = read_json(folder / INFO, CONFIG_LIMIT, "latents: description")
    if info.get("clips") != clips:
        raise UserError(f"latents: {folder} holds {clips} clips, {INFO} says {shown(info.get('clips'))}; {REMEDY}")
    sums = info.get("crc32", {})
    if not isinstance(sums, dict):
        raise UserError(f"latents: {folder / INFO}: crc32 is {shown(sums)}, expected one for each file; {REMEDY}")
    for name in sums.keys() & ({TABLE, CAPTIONS} if size <= READ_LIMIT else {CAPTIONS}):
        if _checksum(folder / name) != sums[name]:
            raise UserError(
                f"latents: {folder / name} was changed since it was written (its CRC-32 is another one than in {INFO});"
                f" {REMEDY}"
            )


def _checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            value = zlib.crc32(chunk, value)
    return value
