"""``nd-jax data precompute``: clips and prompts to shards of latents and text features, as an Apache Beam pipeline."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from nd_jax.commands.console import check_at_least, say, tell_skipped
from nd_jax.errors import UserError


def data_precompute(
    preset: Positional[str],
    folder: Positional[Path],
    codec: Path,
    out: Path,
    teacher: Path | None = None,
    prompts: tuple[Path, ...] = (),
    captions: Path | None = None,
    size: str | None = None,
    frames: int | None = None,
    fps: float | None = None,
    windows: int = 1,
    heldout: float = 0.1,
    seed: int = 0,
    shard_size: int = 64,
    batch: int = 8,
    text: Literal["denoiser", "encoder"] = "denoiser",
    text_dtype: Literal["bfloat16", "float32"] = "bfloat16",
    beam: tuple[str, ...] = (),
    overwrite: bool = False,
) -> None:
    """Encode a folder of captioned clips once, in shards, on one machine or on many (pip install 'nd-jax[beam]').

    Run the same command again after an interruption: finished shards are kept. Clips that cannot be used are listed
    with reasons in OUT/skipped.jsonl. OUT serves as --latents of training and, with --teacher, as --features of text
    distillation, and in place of the text encoders of training with --recipe.text stored.

    Args:
        preset: name of the preset to train, which gives size, length and rate.
        folder: folder with clips, captions as for `nd-jax data videos`.
        codec: component folder of a codec, or a system that has one.
        out: folder for the shards; on many machines, one that all of them share, as are the others.
        teacher: system whose text features are wanted as well.
        prompts: folders of `nd-jax data prompts`, for text features without clips; needs --teacher.
        captions: captions file in another place or of another name, .jsonl or .csv.
        size: HEIGHTxWIDTH in pixels (default: the preset's).
        frames: frames of a window, 1 + 8k (default: the preset's).
        fps: frames a second that every clip is brought to (default: the preset's).
        windows: most windows from one clip; they do not overlap.
        heldout: share of the clips that is left out, the same ones as with `nd-jax data videos`.
        seed: of the choice of held-out clips.
        shard_size: clips, or prompts, of a shard.
        batch: windows, or prompts, that a worker encodes at once.
        text: features as the denoiser's blocks read them, for text distillation, or as the encoders give them, for
            training denoisers; the same but for denoisers that embed text themselves.
        text_dtype: of text features on disk.
        beam: Beam's options without their dashes, such as runner=DataflowRunner project=p; default: this machine.
        overwrite: begin anew.
    """
    check_at_least(1, windows=windows, shard_size=shard_size, batch=batch)
    check_at_least(0, seed=seed)
    if prompts and teacher is None:
        raise UserError("data precompute: --prompts needs --teacher SYSTEM, whose text features are computed")
    if not 0 <= heldout < 1:
        raise UserError(f"--heldout is {heldout:g}, expected at least 0 and below 1")
    check_beam()
    from nd_jax.data import prompts as prompt_data
    from nd_jax.data.buckets import parse_size
    from nd_jax.data.captions_file import SKIPPED
    from nd_jax.data.prompt_source import PromptSource
    from nd_jax.data.video_folder import FolderOptions
    from nd_jax.datasets import tfds_quiet
    from nd_jax.precompute import begin, finish
    from nd_jax.precompute_beam import run_pipeline
    from nd_jax.precompute_networks import Job
    from nd_jax.recipes.preset import load_preset
    from nd_jax.video_folders import check_sizes

    chosen = load_preset(preset)
    video = chosen.video
    options = FolderOptions(
        sizes=((video.height, video.width) if size is None else parse_size(size),),
        frames=video.frames if frames is None else frames,
        fps=video.fps if fps is None else fps,
        windows=windows,
        heldout=heldout,
        seed=seed,
    )
    check_sizes(chosen, options)
    texts: list[str] = []
    if prompts:
        with tfds_quiet():
            source = PromptSource([prompt_data.open_split(each, "train") for each in prompts])
        texts = [source[index]["caption"] for index in range(len(source))]
    job = Job(folder.absolute(), out.absolute(), codec, teacher, options, batch, text, text_dtype)
    left, skipped = begin(job, captions=captions, prompts=texts, shard_size=shard_size, overwrite=overwrite)
    say(f"{len(left)} shards to make")
    if left:
        run_pipeline(job, left, [f"--{word.lstrip('-')}" for word in beam])
    info = finish(job, skipped)
    records = info["records"]
    say(
        f"{records['clips']} windows of {info['clips']} clips and {records['prompts']} prompts in {info['shards']} "
        f"shards; {info['held_out']} clips held out"
    )
    tell_skipped(read_skipped(out / SKIPPED), "clips and caption lines", out / SKIPPED)
    print(out)


def read_skipped(path: Path) -> list:
    """What ``skipped.jsonl`` lists."""
    import json

    from nd_jax.data.captions_file import Skipped

    return [Skipped(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def check_beam() -> None:
    """Raises UserError without Apache Beam, saying which extra to install."""
    if importlib.util.find_spec("apache_beam") is None:
        raise UserError(
            "data precompute runs on Apache Beam, which is not installed; install nd-jax with the extra beam: pip "
            "install 'nd-jax[beam]' (nd-jax data latents does the same for small datasets without it)"
        )
