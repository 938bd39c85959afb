"""A folder of a user's clips, looked through before anything is written: what can be used, what cannot and why."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nd_jax.data.buckets import Size, enlargement, nearest_size, size_name
from nd_jax.data.captions_file import Skipped, captions_path, clean, read_captions, read_sidecar
from nd_jax.data.clips import FORMATS, Limits, check_window
from nd_jax.data.folder_listing import listing_of, scan, stamp
from nd_jax.data.timeline import read_timeline, resample, window_starts
from nd_jax.errors import UserError

SPLITS = ("train", "heldout")


@dataclass(frozen=True)
class FolderOptions:
    """What becomes of a folder's clips."""

    sizes: tuple[Size, ...]
    """(height, width) in pixels; every clip goes to the one of nearest aspect ratio."""
    frames: int
    """Of a window, 1 + 8k."""
    fps: float = 24
    """Frames a second that clips of any rate are brought to."""
    windows: int = 1
    """Most windows from one clip; they do not overlap."""
    heldout: float = 0.1
    """Share of the clips that is held out; which, depends on seed and name only."""
    heldout_names: tuple[str, ...] = ()
    """Clips to hold out instead, by name."""
    seed: int = 0
    enlarge: float = 2.0
    """Clips that would have to be enlarged by more than this are skipped."""
    slowest: float = 8.0
    """Clips with fewer frames a second than this are skipped."""
    limits: Limits = field(default_factory=lambda: Limits(frames=36_000))


@dataclass(frozen=True)
class Clip:
    """A clip that can be used: where it goes, and the frames of its windows by index."""

    name: str
    stamp: tuple[int, int]
    """Bytes, and time of last change in nanoseconds."""
    sha256: str
    size: Size
    split: str
    captions: tuple[str, ...]
    picks: tuple[tuple[int, ...], ...]
    starts: tuple[float, ...]
    """Seconds from the clip's first frame at which each window begins."""


@dataclass(frozen=True)
class Survey:
    """What ``survey`` found."""

    folder: Path
    options: FolderOptions
    clips: tuple[Clip, ...]
    skipped: tuple[Skipped, ...]
    listing: str
    """Digest of names, sizes and times of everything it looked at; see ``listing_of``."""
    captions: Path | None

    def of_size(self, size: Size) -> tuple[Clip, ...]:
        """The clips of one size, by name."""
        return tuple(clip for clip in self.clips if clip.size == size)

    def config_name(self, size: Size) -> str:
        """Name of a size's dataset. It changes with everything that changes a record: contents, captions, windows."""
        rows = [[c.name, c.sha256, c.split, c.captions, c.picks, c.starts] for c in self.of_size(size)]
        digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]
        return f"{size_name(size)}-{self.options.frames}f-{self.options.fps:g}fps-{digest}"


def held_out(name: str, options: FolderOptions) -> bool:
    """Whether a clip is held out: by the list, or where a hash of seed and name falls into the first share.

    A clip never changes sides because others come or go.
    """
    if options.heldout_names:
        return name in options.heldout_names
    digest = hashlib.sha256(f"{options.seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < options.heldout * 2**64


def survey(
    folder: str | Path,
    options: FolderOptions,
    *,
    captions: str | Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Survey:
    """Look through every clip of a folder and its subfolders, in order of names; decodes all of them once.

    ``captions`` is a jsonl or csv file (see `captions_file`); by default the folder's captions.jsonl or captions.csv.
    A clip that it does not name may have a text file beside it, of the same name but for the suffix. Sound is ignored;
    a clip without caption is skipped. Raises UserError when nothing remains, and for options that make no sense.
    """
    folder = Path(folder)
    _check(options)
    names, skipped = scan(folder)
    if not names:
        told = f"; {skipped[0].file}: {skipped[0].reason}" if skipped else ""
        raise UserError(f"{folder} holds no video files, expected some of {', '.join(FORMATS)}{told}")
    unknown = sorted(set(options.heldout_names) - set(names))
    if unknown:
        raise UserError(f"{folder}: no clip {clean(unknown[0])!r} to hold out, expected names as in captions files")
    captions = Path(captions) if captions else captions_path(folder)
    listing = listing_of(folder, captions)
    texts, problems = ({}, []) if captions is None else read_captions(captions, names)
    clips, contents = [], {}
    for done, name in enumerate(names):
        progress(done, len(names))
        try:
            clip = survey_clip(folder, name, options, texts.get(name), contents)
        except UserError as error:
            skipped.append(Skipped(name, str(error).removeprefix(f"video: {folder / name} ")))
            continue
        contents[clip.sha256] = name
        clips.append(clip)
    progress(len(names), len(names))
    skipped = sorted(skipped, key=lambda each: each.file) + problems
    if not clips:
        raise UserError(f"{folder}: none of {len(names)} clips can be used: {told_reasons(skipped)}")
    if all(clip.split == "heldout" for clip in clips):
        raise UserError(
            f"{folder}: all {len(clips)} usable clips are held out, none is left to train on; hold out fewer"
        )
    return Survey(folder, options, tuple(clips), tuple(skipped), listing, captions)


def told_reasons(skipped: Sequence[Skipped], most: int = 3) -> str:
    """The first few with their reasons, and how many more there are."""
    first = "; ".join(f"{clean(each.file)}: {clean(each.reason)}" for each in skipped[:most])
    return first + (f"; and {len(skipped) - most} more" if len(skipped) > most else "")


def _check(options: FolderOptions) -> None:
    """Raises UserError for options that make no sense."""
    check_window(options.frames)
    if not options.sizes or min(min(size) for size in options.sizes) < 1:
        raise UserError("video folder: no sizes, expected at least one of at least 1x1")
    if not 0 < options.fps <= 1000 or options.windows < 1 or not options.enlarge > 0 or not options.slowest >= 0:
        raise UserError(
            f"video folder: {options.fps:g} frames a second, {options.windows} windows, enlarge {options.enlarge:g}, "
            f"slowest {options.slowest:g}; expected a rate up to 1000, at least one window and no negative numbers"
        )
    if not 0 <= options.heldout < 1:
        raise UserError(f"video folder: a share of {options.heldout:g} held out, expected at least 0 and below 1")


def survey_clip(
    folder: Path, name: str, options: FolderOptions, captions: list[str] | None, contents: dict[str, str]
) -> Clip:
    """Everything about one clip; ``contents`` names clips by the digest of what they hold, those seen before.

    Raises UserError with the reason why it cannot be used.
    """
    path = folder / name
    found, limits = stamp(path), options.limits
    if captions is None:
        sidecar = path.with_suffix(".txt")
        if not os.path.lexists(sidecar):
            raise UserError("no caption")
        captions = [read_sidecar(sidecar)]
    timeline = read_timeline(path, limits)
    rate = (len(timeline.times) - 1) / timeline.times[-1] if timeline.times[-1] else 0
    ticks = resample(timeline.times, timeline.end, options.fps)
    if len(ticks) < options.frames:
        raise UserError(
            f"lasts {timeline.end:.2f} s, {len(ticks)} frames at {options.fps:g} a second; expected at least "
            f"{options.frames}"
        )
    if options.frames > 1 and rate < options.slowest:
        raise UserError(f"has {rate:.3g} frames a second, expected at least {options.slowest:g}")
    size = nearest_size(timeline.size, options.sizes)
    growth = enlargement(timeline.size, size)
    if growth > options.enlarge:
        raise UserError(
            f"is {size_name(timeline.size)}, which would be enlarged {growth:.3g} times to cover {size_name(size)}; "
            f"expected at most {options.enlarge:g} times"
        )
    starts = window_starts(len(ticks), options.frames, options.windows)
    if len(starts) * options.frames * size[0] * size[1] * 3 > limits.total_bytes:
        raise UserError(f"needs more than {limits.total_bytes >> 20} MiB decoded: use fewer windows")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest in contents:
        raise UserError(f"has the same content as {contents[digest]}")
    picks = tuple(tuple(map(int, ticks[start : start + options.frames])) for start in starts)
    split = SPLITS[held_out(name, options)]
    seconds = tuple(round(start / options.fps, 6) for start in starts)
    return Clip(name, found, digest, size, split, tuple(captions), picks, seconds)
