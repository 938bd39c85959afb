"""Datasets of users' own clips: prepare a surveyed folder once, then read its splits by index.

``dataset.json`` in the dataset's folder says what was prepared:

    kind: "videos"; folder, captions and listing: where from, and its digest (see ``folder_listing``);
    frames, fps; buckets: for each size its TFDS config and the number of windows in each split; skipped: a count.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nd_jax.data.buckets import Size, size_name
from nd_jax.data.checked_records import CheckedSource, checked_source, open_builder
from nd_jax.data.folder_listing import listing_of
from nd_jax.data.video_folder import SPLITS, Survey
from nd_jax.data.videos.videos_dataset_builder import Builder, VideosConfig
from nd_jax.errors import UserError

__all__ = ["KIND", "Builder", "VideosConfig", "bucket_of", "changed", "check_record", "open_split", "prepare"]

KIND = "videos"


def prepare(
    survey: Survey, data_dir: str | Path, *, progress: Callable[[int, int], None] = lambda done, total: None
) -> dict[str, Any]:
    """Write every size's clips into ``data_dir`` unless they are there already; returns the record for dataset.json.

    A clip's ``video`` is uint8 [T, H, W, 3]; ``caption`` is its first caption, ``captions`` all of them; ``file`` is
    its name and ``start`` where in it the window begins, in seconds. An interrupted run leaves nothing under the final
    name. Raises UserError for a file that was changed since the survey.
    """
    options, done, buckets = survey.options, 0, []

    def step() -> None:
        nonlocal done
        done += 1
        progress(done, len(survey.clips))

    for size in options.sizes:
        clips = survey.of_size(size)
        if not clips:
            continue
        name = survey.config_name(size)
        config = VideosConfig(
            name=name,
            size=size,
            frames=options.frames,
            folder=survey.folder,
            clips=clips,
            limits=options.limits,
            progress=step,
        )
        Builder(config=config, data_dir=str(data_dir)).download_and_prepare()
        counts = {split: sum(len(clip.picks) for clip in clips if clip.split == split) for split in SPLITS}
        buckets.append({"size": list(size), "config": name, "windows": counts})
    return {
        "kind": KIND,
        "folder": str(survey.folder.absolute()),
        "captions": None if survey.captions is None else str(survey.captions.absolute()),
        "listing": survey.listing,
        "frames": options.frames,
        "fps": options.fps,
        "buckets": buckets,
        "skipped": len(survey.skipped),
    }


def check_record(path: Path, record: Any) -> None:
    """Raises UserError unless a dataset.json holds what ``prepare`` puts there."""
    try:
        sound = record["kind"] == KIND and type(record["frames"]) is int and len(record["buckets"]) > 0
        sound &= all(isinstance(record[name], str) for name in ("folder", "listing"))
        sound &= record["captions"] is None or isinstance(record["captions"], str)
        for bucket in record["buckets"]:
            sound &= re.fullmatch(r"[\w.-]+", bucket["config"]) is not None and ".." not in bucket["config"]
            sound &= len(bucket["size"]) == 2 and all(type(side) is int and side > 0 for side in bucket["size"])
            sound &= bucket["windows"].keys() == set(SPLITS)
            sound &= all(type(count) is int and count >= 0 for count in bucket["windows"].values())
    except (TypeError, KeyError, AttributeError):
        sound = False
    if not sound:
        raise UserError(f"{path} is damaged; expected what nd-jax data videos wrote; make the dataset again")


def changed(record: Mapping[str, Any]) -> bool:
    """Whether the folder that the dataset was made from is there and looks different now."""
    folder, captions = Path(record["folder"]), record["captions"]
    return folder.is_dir() and listing_of(folder, Path(captions) if captions else None) != record["listing"]


def bucket_of(record: Mapping[str, Any], size: Size | None, *, prefer: Size | None = None) -> Mapping[str, Any]:
    """The record's bucket of a size; without one, that of size ``prefer`` or the only one there is.

    Raises UserError listing the sizes.
    """
    by_size = {tuple(bucket["size"]): bucket for bucket in record["buckets"]}
    told = ", ".join(map(size_name, by_size))
    if size is not None:
        if size not in by_size:
            raise UserError(f"no clips of {size_name(size)} in this dataset, expected one of {told}")
        return by_size[size]
    if prefer in by_size:
        return by_size[prefer]
    if len(by_size) > 1:
        raise UserError(f"this dataset has clips of {told}; choose one with --bucket")
    return next(iter(by_size.values()))


def open_split(data_dir: str | Path, record: Mapping[str, Any], bucket: Mapping[str, Any], split: str) -> CheckedSource:
    """A bucket's split by index, once it was found whole.

    Raises UserError for an empty split, and naming what is missing or damaged.
    """
    size, count = tuple(bucket["size"]), bucket["windows"].get(split)
    if not count:
        raise UserError(f"{data_dir}: no {split} clips of {size_name(size)} in this dataset")
    config = VideosConfig(name=bucket["config"], size=size, frames=record["frames"])
    source = checked_source(open_builder(Builder, data_dir, config), split)
    if len(source) != count:
        raise UserError(f"data: {data_dir} holds {len(source)} {split} windows, expected {count}; prepare it again")
    return source
