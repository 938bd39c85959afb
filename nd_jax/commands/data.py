"""``nd-jax data prepare`` and ``nd-jax data latents``."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from tyro.conf import Positional

from nd_jax.commands.console import check_at_least, console, progress_bar, say, warn
from nd_jax.outputs import check_new, new_folder


def data_prepare(
    preset: Positional[str],
    out: Path,
    clips: int = 2048,
    seed: int = 0,
    world: str | None = None,
    overwrite: bool = False,
) -> None:
    """Draw the captioned shapes dataset of a preset, and train its tokenizers.

    Args:
        preset: name of a preset with a shapes world, such as shapes_tiny.
        out: folder for the dataset; its tokenizers are in out/tokenizers.
        clips: clips in the training split; about 4 ms and 20 kB each.
        seed: of everything that is drawn.
        world: another world than the preset's, such as two_objects.
        overwrite: replace an existing dataset.
    """
    check_at_least(1, clips=clips)
    check_at_least(0, seed=seed)
    check_new(out, overwrite=overwrite)
    from nd_jax.data.captions import corpus
    from nd_jax.datasets import prepare_data, prepare_tokenizers
    from nd_jax.recipes.preset import load_preset

    chosen = load_preset(preset)
    if world is not None:
        chosen = dataclasses.replace(chosen, world=world)
    with new_folder(out, overwrite=overwrite) as part, console.status(f"drawing {clips} clips"):
        prepare_data(chosen, part, clips=clips, seed=seed)
        prepare_tokenizers(chosen, corpus(seed=seed), part / "tokenizers")
    say(f"{clips} clips and three tokenizers")
    print(out)


def data_latents(
    data: Path,
    codec: Path,
    out: Path,
    frames: int | None = None,
    bucket: str | None = None,
    seed: int = 0,
    plain: bool = False,
    overwrite: bool = False,
) -> None:
    """Encode a prepared dataset with a trained codec, once.

    Args:
        data: folder of `nd-jax data prepare` or `nd-jax data videos`.
        codec: component folder of a codec, such as RUN/codec, or a system that has one, such as shapes_base.
        out: folder for the latents and their captions.
        frames: encode only so many frames of every clip, from its start; 1 + 8k.
        bucket: size HEIGHTxWIDTH of your own clips, if the dataset has several.
        seed: of the captions of drawn shapes.
        plain: word all captions alike, as shapes_tiny does in the demonstration.
        overwrite: replace an existing folder.
    """
    check_at_least(0, seed=seed)
    check_new(out, overwrite=overwrite)
    from nd_jax.data.buckets import parse_size
    from nd_jax.datasets import open_data, shapes_captions
    from nd_jax.system import codec_folder
    from nd_jax.video_folders import encode_batch, folder_captions, has_changed, is_own_clips
    from nd_jax.workflow import encode_clips

    size = None if bucket is None else parse_size(bucket)
    clips = open_data(data, size=size)
    if is_own_clips(data):
        captions = folder_captions(clips)
        if has_changed(data):
            warn(f"the clips that {data} was made from have changed since; nd-jax data videos makes it anew")
    else:
        captions = shapes_captions(clips, seed=seed, plain=plain)
    with progress_bar("encoding clips", len(clips)) as progress:
        batch = encode_batch(clips)
        options = {"frames": frames, "batch": batch, "overwrite": overwrite, "progress": progress}
        encode_clips(codec_folder(codec), clips, captions, out, **options)
    print(out)
