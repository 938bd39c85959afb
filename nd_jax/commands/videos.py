"""``nd-jax data videos`` and ``nd-jax data reconstruct``: users' own clips."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tyro.conf import Positional

from nd_jax.commands.console import check_at_least, progress_bar, say, tell_skipped, warn
from nd_jax.outputs import check_new, new_folder


def data_videos(
    preset: Positional[str],
    folder: Positional[Path],
    out: Path,
    captions: Path | None = None,
    buckets: tuple[str, ...] = (),
    frames: int | None = None,
    fps: float | None = None,
    windows: int = 1,
    heldout: float = 0.1,
    heldout_names: tuple[str, ...] = (),
    seed: int = 0,
    enlarge: float = 2.0,
    slowest: float = 8.0,
    most_seconds: float = 600,
    most_frames: int = 36_000,
    most_pixels: int = 4096 * 4096,
    most_bytes: int = 4 << 30,
    overwrite: bool = False,
) -> None:
    """Make a dataset of your own captioned clips, and train its tokenizers.

    Captions come from FOLDER/captions.jsonl ({"file": ..., "caption": ...} a line; several captions a clip are fine),
    FOLDER/captions.csv (columns file and caption), or a text file beside each clip (a.mp4, a.txt). Sound is ignored.
    Clips that cannot be used are listed with reasons in OUT/skipped.jsonl.

    Args:
        preset: name of the preset to train, such as shapes_base.
        folder: folder with clips (mp4, webm, mov, mkv, avi), subfolders included.
        out: folder for the dataset; its tokenizers are in out/tokenizers.
        captions: captions file in another place or of another name, .jsonl or .csv.
        buckets: sizes HEIGHTxWIDTH in pixels; each clip goes to the one of nearest shape (default: the preset's size).
        frames: frames of a window, 1 + 8k (default: the preset's).
        fps: frames a second that every clip is brought to (default: the preset's).
        windows: most windows from one clip; they do not overlap.
        heldout: share of the clips that is held out; which, depends on seed and name only.
        heldout_names: clips to hold out instead, named as in captions files.
        seed: of the choice of held-out clips.
        enlarge: skip clips that would have to be enlarged by more than this.
        slowest: skip clips with fewer frames a second than this.
        most_seconds: skip clips that last longer.
        most_frames: skip clips with more frames.
        most_pixels: skip clips whose frames have more pixels.
        most_bytes: skip larger files.
        overwrite: replace an existing dataset.
    """
    check_at_least(1, windows=windows, most_frames=most_frames, most_pixels=most_pixels, most_bytes=most_bytes)
    check_at_least(0, seed=seed)
    check_new(out, overwrite=overwrite)
    from nd_jax.data.buckets import parse_size
    from nd_jax.data.captions_file import SKIPPED
    from nd_jax.data.clips import Limits
    from nd_jax.data.video_folder import FolderOptions
    from nd_jax.recipes.preset import load_preset
    from nd_jax.video_folders import cut_captions, prepare_folder

    chosen = load_preset(preset)
    video = chosen.video
    options = FolderOptions(
        sizes=tuple(map(parse_size, dict.fromkeys(buckets))) or ((video.height, video.width),),
        frames=video.frames if frames is None else frames,
        fps=video.fps if fps is None else fps,
        windows=windows,
        heldout=heldout,
        heldout_names=heldout_names,
        seed=seed,
        enlarge=enlarge,
        slowest=slowest,
        limits=Limits(frames=most_frames, seconds=most_seconds, pixels=most_pixels, file_bytes=most_bytes),
    )
    with new_folder(out, overwrite=overwrite) as part, progress_bar("clips", 0) as bar:
        found = prepare_folder(
            chosen, folder, part, options, captions=captions, progress=lambda what, *done: bar(*done, what)
        )
        texts = [text for clip in found.clips for text in clip.captions]
        cut = cut_captions(part, texts)
    _tell(found, out / SKIPPED)
    if cut:
        warn(f"{cut} captions are longer than the preset's {video.text_length} tokens; their ends are not read")
    print(out)


def _tell(found: Any, listed: Path) -> None:
    """What became of the clips, and the first few that were skipped."""
    from nd_jax.data.buckets import size_name
    from nd_jax.data.video_folder import SPLITS

    for size in found.options.sizes:
        clips = found.of_size(size)
        train, heldout = ([len(clip.picks) for clip in clips if clip.split == split] for split in SPLITS)
        say(
            f"{size_name(size)}: {len(train)} clips to train on ({sum(train)} windows), {len(heldout)} held out "
            f"({sum(heldout)} windows)"
        )
    tell_skipped(found.skipped, "clips and caption lines", listed)


def data_reconstruct(
    data: Path, codec: Path, bucket: str | None = None, split: str = "heldout", most: int = 32
) -> None:
    """PSNR and SSIM of a codec on held-out clips of a dataset of `nd-jax data videos`.

    Args:
        data: the dataset's folder.
        codec: component folder of a codec, such as RUN/codec, or a system that has one, such as shapes_base.
        bucket: size HEIGHTxWIDTH, if the dataset has several.
        split: heldout or train.
        most: windows at most.
    """
    check_at_least(1, most=most)
    from nd_jax.data.buckets import parse_size
    from nd_jax.data.captions_file import clean
    from nd_jax.system import codec_folder
    from nd_jax.video_folders import codec_on_folder

    size = None if bucket is None else parse_size(bucket)
    found = codec_on_folder(codec_folder(codec), data, size=size, split=split, most=most)
    for name, psnr in zip(found.names, found.psnr, strict=True):
        print(f"{psnr:6.2f} dB  {clean(name)}")
    print(f"{found.whole.psnr:6.2f} dB, SSIM {found.whole.ssim:.3f}: mean of {len(found.names)} windows")
