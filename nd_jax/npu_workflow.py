"""From a checkpoint to a bundle of ONNX graphs: the steps behind ``nd-jax npu``."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from nd_jax.checked_files import read_json
from nd_jax.converters.bundle.build import PROBE, Source, write_float_bundle
from nd_jax.converters.bundle.calibration import (
    SPLITS,
    Calibration,
    open_calibration,
    record,
    write_calibration,
)
from nd_jax.converters.bundle.deploy import deploy
from nd_jax.converters.bundle.quantise import WEIGHT_TYPES
from nd_jax.converters.bundle.rounding import Rounding, check_aimet
from nd_jax.converters.bundle.writer import BundleWriter
from nd_jax.converters.hexagon import vectors
from nd_jax.converters.runtime.manifest import Bundle
from nd_jax.converters.runtime.pipeline import Pipeline
from nd_jax.errors import UserError
from nd_jax.generate import check_size
from nd_jax.models.system import CLIP_1, CLIP_2, T5
from nd_jax.npu_picture import picture_and_upscaler
from nd_jax.outputs import new_folder
from nd_jax.pyramid.layout import envelopes
from nd_jax.system import VideoSystem

ENCODERS = {T5: "t5", CLIP_1: "clip", CLIP_2: "clip_2"}
"""Names of a system's tokenizers by text encoder."""


def bundle_source(system: VideoSystem, *, super_resolution: Path | None = None, **video: int | None) -> Source:
    """What a system's bundle is made from, at its own size or another one (height, width, frames). A hybrid folder's
    first-frame networks and super-resolution come along; another one's folder may be named.

    Raises UserError for sizes that do not fit, and for a system that cannot read prompts.
    """
    config = system.config
    missing = [name for name, tokenizer in ENCODERS.items() if tokenizer not in system.tokenizers]
    if missing:
        raise UserError(f"{system.folder}: no tokenizer for {', '.join(missing)}; a bundle reads prompts: add it")
    size = dataclasses.replace(system.video, **{key: value for key, value in video.items() if value is not None})
    codec, patch = config.causal_video_vae, config.diffusion_transformer.patch_size
    frames = check_size(size.height, size.width, size.frames, codec, patch, system.schedule.stages)
    space = codec.space_scale
    layouts = envelopes(
        max(frames - 1, 1),
        size.text_length,
        size.height // space,
        size.width // space,
        patch_size=patch,
        stages=system.schedule.stages,
    )
    tokenizers = {name: system.tokenizers[tokenizer] for name, tokenizer in ENCODERS.items()}
    return Source(
        config=config,
        params=system.params,
        stats=system.stats,
        schedule=system.schedule,
        plan=system.sampling,
        envelopes=layouts,
        latent_frames=frames,
        video={key: getattr(size, key) for key in ("height", "width", "frames", "fps")},
        tokenizers={name: tokenizer.folder for name, tokenizer in tokenizers.items()},
        lengths={name: tokenizer.max_length for name, tokenizer in tokenizers.items()},
        probes={name: tokenizer([PROBE]).ids[0].tolist() for name, tokenizer in tokenizers.items()},
        about={"mode": system.mode, "blocks": config.diffusion_transformer.num_layers},
        **picture_and_upscaler(system, size.height, size.width, super_resolution),
    )


def build_bundle(
    system: VideoSystem,
    out: Path,
    *,
    check: bool = True,
    overwrite: bool = False,
    then: Callable[[BundleWriter], None] | None = None,
    say: Callable[[str], None] = lambda line: None,
    super_resolution: Path | None = None,
    **video: int | None,
) -> Path:
    """Write a bundle under ``out``, whole or not at all.

    Args:
        system: with text encoders and tokenizers.
        check: compare every graph with JAX.
        overwrite: replace an existing bundle.
        then: what else to put into the folder before it is finished (calibration, quantisation).
        say: receives one line for every graph.
        super_resolution: folder of a network that enlarges frames.
        video: another height, width or frames than the system's.
    """
    source = bundle_source(system, super_resolution=super_resolution, **video)
    with new_folder(out, overwrite=overwrite) as folder:
        writer = write_float_bundle(folder, source, check=check, say=say)
        if then is not None:
            writer.finish()
            then(writer)
        writer.finish()
    return Path(out)


def record_bundle(
    bundle: Bundle,
    folder: Path,
    prompts: Sequence[str],
    *,
    samples: int,
    seed: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Record a bundle's float32 graphs at work into an existing folder: three prompts in four for the calibration
    split, the rest for the test split, each with noise of its own."""
    pipeline, first = Pipeline(bundle, precision="fp32"), len(prompts) * 3 // 4
    parts = {"calibration": prompts[:first], "test": prompts[first:]}
    counts, recorders, done = {"calibration": samples, "test": max(4, samples // 3)}, {}, 0
    for split, lines in parts.items():
        recorders[split] = record(
            pipeline,
            lines,
            counts[split],
            seed=seed + SPLITS.index(split),
            progress=lambda count, _, done=done: progress(done + count, len(prompts)),
        )
        done += len(lines)
    write_calibration(folder, recorders, parts, {"seed": seed, "samples": samples})


def quantised(
    calibration: Path | None,
    prompts: Sequence[str],
    *,
    samples: int,
    seed: int,
    overrides: Mapping[str, Mapping[str, str]],
    rounding: Rounding | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Callable[[BundleWriter], None]:
    """What ``build_bundle`` does with the float32 bundle: record (unless recordings are given), quantise, measure.

    Raises UserError, before anything is built, where ``rounding`` needs a package that is missing.
    """
    if rounding is not None:
        check_aimet()

    def then(writer: BundleWriter) -> None:
        graphs = writer.content["graphs"]
        if calibration is not None:
            deploy_recorded(writer, open_calibration(calibration, graphs), overrides, say, rounding)
            return
        with tempfile.TemporaryDirectory() as temporary:
            record_bundle(Bundle(writer.folder), Path(temporary), prompts, samples=samples, seed=seed)
            deploy_recorded(writer, open_calibration(Path(temporary), graphs), overrides, say, rounding)

    return then


def deploy_recorded(
    writer: BundleWriter,
    calibration: Calibration,
    overrides: Mapping[str, Mapping[str, str]],
    say: Callable[[str], None],
    rounding: Rounding | None,
) -> None:
    """Quantise and measure, and keep a few runs of the test split in the bundle, for emulators and devices."""
    deploy(writer, calibration, overrides, say, rounding)
    writer.content[vectors.KEY] = vectors.write_vectors(writer.folder, vectors.from_calibration(calibration))


def read_overrides(path: Path | None) -> Mapping[str, Mapping[str, str]]:
    """Exceptions from 8 bits by graph and pattern of weight names. Raises UserError for other content."""
    if path is None:
        return {}
    content = read_json(path, what="overrides")
    for graph, patterns in content.items():
        if not isinstance(patterns, dict) or not set(patterns.values()) <= set(WEIGHT_TYPES):
            raise UserError(
                f"{path}: {graph!r}: expected an object from patterns of weight names to {' or '.join(WEIGHT_TYPES)}"
            )
    return content
