"""Precomputing what training reads: a folder of clips and prompts cut into shards, and a shard encoded by one worker.

What runs the workers is not here (``precompute_beam``). ``begin`` writes what each shard is made of into the folder
``todo``, so that a worker needs a shard's number only; ``encode_shard`` makes one, and ``finish`` closes the folder.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nd_jax.checked_files import read_json
from nd_jax.data.captions_file import Skipped, captions_path, read_captions, write_skipped
from nd_jax.data.folder_listing import listing_of, scan
from nd_jax.data.latent_shards import (
    CLIPS,
    EMPTY,
    INFO,
    KINDS,
    PLAN,
    Shard,
    is_finished,
    read_plan,
    read_shard,
    shard_name,
    write_shard,
)
from nd_jax.data.video_folder import held_out, told_reasons
from nd_jax.errors import UserError
from nd_jax.outputs import check_new, new_file
from nd_jax.precompute_networks import Encoder, Job
from nd_jax.system import codec_folder
from nd_jax.weights import shipped_folder

TODO = "todo"
WORK_LIMIT = 1 << 28
"""Bytes of what one shard is made of."""
Place = tuple[str, int]
"""A shard: its kind and number."""


def begin(
    job: Job,
    *,
    captions: Path | None = None,
    prompts: Sequence[str] = (),
    shard_size: int = 64,
    overwrite: bool = False,
) -> tuple[list[Place], list[Skipped]]:
    """The shards that are still to be made, and files and caption lines that cannot be used.

    A folder that was begun with the same settings and the same clips goes on. Raises UserError for one that was begun
    with others, and for a folder without clips.
    """
    names, skipped = scan(job.folder)
    captions = captions or captions_path(job.folder)
    texts, problems = ({}, []) if captions is None else read_captions(captions, names)
    if not names:
        raise UserError(f"{job.folder} holds no video files; expected some")
    if not (codec_folder(job.codec) / "config.json").is_file():
        raise UserError(f"data precompute: {job.codec} holds no codec; expected its folder, or a system's")
    if job.teacher is not None and not shipped_folder(job.teacher).is_dir():
        raise UserError(f"data precompute: {job.teacher} is no folder; expected a system whose text is read")
    parts = [("clips", [{"file": name, "captions": texts.get(name)} for name in names]), ("prompts", list(prompts))]
    parts += [] if job.teacher is None else [(EMPTY, [""])]
    works = {
        (kind, index): rows[start : start + shard_size]
        for kind, rows in parts
        for index, start in enumerate(range(0, len(rows), shard_size))
    }
    plan = {
        "digest": _digest(job, listing_of(job.folder, captions), prompts, shard_size),
        "shards": {kind: sum(name == kind for name, _ in works) for kind in KINDS},
    }
    _open(job.out, plan, overwrite=overwrite)
    left = [place for place in works if not is_finished(job.out, *place)]
    for place in left:
        with new_file(_work(job.out, place), overwrite=True) as part:
            part.write_text(json.dumps({"rows": works[place]}), encoding="utf-8")
        _failure(job.out, place).unlink(missing_ok=True)
    return left, skipped + problems


def _open(out: Path, plan: dict[str, Any], *, overwrite: bool) -> None:
    if overwrite and out.exists():
        check_new(out, overwrite=True)
        shutil.rmtree(out)
    if (out / PLAN).is_file():
        if read_plan(out) != plan:
            raise UserError(
                f"{out} was begun with other settings, clips or networks; give the same ones to go on, name another "
                "folder, or pass --overwrite to begin anew"
            )
    else:
        check_new(out, overwrite=False)
        (out / TODO).mkdir(parents=True)
        with new_file(out / PLAN, overwrite=False) as part:
            part.write_text(json.dumps(plan))
    (out / TODO).mkdir(exist_ok=True)


def _digest(job: Job, listing: str, prompts: Sequence[str], shard_size: int) -> str:
    """Of everything that a shard's content depends on; networks by their files' names, sizes and times."""
    networks = [codec_folder(job.codec), *([] if job.teacher is None else [shipped_folder(job.teacher)])]
    files = [
        [path.relative_to(folder).as_posix(), path.stat().st_size, path.stat().st_mtime_ns]
        for folder in networks
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    ]
    rows = [dataclasses.asdict(job.options), listing, list(prompts), shard_size, files, job.teacher is None]
    rows += [job.text, job.text_dtype]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def _work(out: Path, place: Place) -> Path:
    return out / TODO / f"{shard_name(*place)}.json"


def _failure(out: Path, place: Place) -> Path:
    return out / TODO / f"{shard_name(*place)}.failed"


def encode_shard(job: Job, place: Place, encoder: Encoder) -> Shard:
    """Make one shard. Clips that cannot be used are listed in it, with reasons."""
    rows = read_json(_work(job.out, place), WORK_LIMIT, "precompute: what a shard is made of")["rows"]
    skipped: list[Skipped] = []
    text = {"text_length": encoder.text_length, "text_dtype": job.text_dtype, "embedded": encoder.embedded}
    if place[0] != CLIPS:
        return write_shard(job.out, *place, encoder.prompts(rows), **text)
    used = [row for row in rows if not held_out(row["file"], job.options)]
    examples = encoder.clips(used, skipped)
    counts = {"clips": len(used), "held_out": len(rows) - len(used)}
    return write_shard(job.out, *place, examples, skipped=skipped, **text, **counts)


def note_failure(job: Job, place: Place, reason: str) -> None:
    """Leave word of why a shard could not be made: the one who waits may be on another machine."""
    with new_file(_failure(job.out, place), overwrite=True) as part:
        part.write_text(reason, encoding="utf-8")


def finish(job: Job, skipped: Sequence[Skipped]) -> dict[str, Any]:
    """Close the folder: ``info.json`` and ``skipped.jsonl``. Raises UserError naming a shard that is not there."""
    plan, shards = read_plan(job.out), {}
    for kind in KINDS:
        for index in range(plan["shards"][kind]):
            if (reason := _failure(job.out, (kind, index))).is_file():
                told = reason.read_text(encoding="utf-8")
                raise UserError(f"data precompute: {shard_name(kind, index)} was not made: {told}")
            shards[kind, index] = read_shard(job.out, kind, index)
    listed = [*skipped, *(each for shard in shards.values() for each in shard.skipped)]
    records = {kind: sum(shard.records for place, shard in shards.items() if place[0] == kind) for kind in KINDS}
    if not records[CLIPS]:
        raise UserError(f"{job.folder}: no clip can be used: {told_reasons(listed) or 'all are held out'}")
    info = {
        "records": records,
        "shards": sum(kind != EMPTY for kind, _ in shards),
        "clips": sum(shard.clips for shard in shards.values()),
        "held_out": sum(shard.held_out for shard in shards.values()),
        "skipped": len(listed),
        "shape": next(shard.shape for shard in shards.values() if shard.shape),
        "dtype": "bfloat16",
    }
    write_skipped(job.out, listed)
    with new_file(job.out / INFO, overwrite=True) as part:
        part.write_text(json.dumps(info, indent=2) + "\n")
    shutil.rmtree(job.out / TODO, ignore_errors=True)
    return info
