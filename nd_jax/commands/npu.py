"""``nd-jax npu build``, ``calibrate``, ``run``, ``inspect`` and ``judge``: graphs for phones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from nd_jax.commands.console import check_at_least, progress_bar, say, warn
from nd_jax.errors import UserError
from nd_jax.weights import SHIPPED


@contextmanager
def runtime_errors() -> Iterator[None]:
    """The runtime's errors as ours."""
    from nd_jax.converters.runtime.errors import BundleError

    try:
        yield
    except BundleError as error:
        raise UserError(str(error)) from None
    except ModuleNotFoundError as error:
        if error.name not in ("onnx", "onnxruntime"):
            raise
        raise UserError(f"npu: the package {error.name} is missing: pip install 'nd-jax[npu]'") from None


def calibration_prompts(path: Path | None, size: tuple[int, int], count: int) -> list[str]:
    """Distinct prompts from a file, or captions of the shapes world for a system of its size.

    Raises UserError where there are fewer than ``count``.
    """
    from nd_jax.commands.generate import read_prompts
    from nd_jax.data.source import prompts as world_prompts
    from nd_jax.data.world import world_named

    world = world_named("64x64")
    if path is not None:
        found = list(dict.fromkeys(line for line in read_prompts((), path) if line.strip()))
    elif size == (world.height, world.width):
        found = list(dict.fromkeys(world_prompts(world, "seen", 2 * count, seed=4711)[0]))
    else:
        raise UserError(f"npu: expected --prompts FILE with at least {count} lines: calibration needs prompts")
    if len(found) < count:
        raise UserError(f"npu: {len(found)} different prompts; calibration needs at least {count}: 3 in 4 for ranges")
    return found[:count]


def npu_build(
    checkpoint: Path = Path(SHIPPED),
    out: Path = Path("bundle"),
    mode: Literal["monolithic", "hybrid"] | None = None,
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
    float_only: bool = False,
    calibration: Path | None = None,
    prompts: Path | None = None,
    videos: int = 16,
    samples: int = 24,
    overrides: Path | None = None,
    rounding: Literal["nearest", "adaround", "seqmse"] = "nearest",
    rounding_graphs: tuple[str, ...] = ("decoder", "decoder_first", "upscaler"),
    rounding_iterations: int = 10_000,
    super_resolution: Path | None = None,
    seed: int = 1,
    check: bool = True,
    overwrite: bool = False,
) -> None:
    """A checkpoint as a bundle: ONNX graphs (float32 and W8A16), host tables, tokenizers, manifest.

    Args:
        checkpoint: official-layout folder, or shapes_base, the small system that comes with the package.
        out: folder for the bundle.
        mode: which denoiser, where the folder has both.
        height: pixels; default: what the folder is meant for.
        width: pixels.
        frames: 1 + 8k.
        float_only: no quantised graphs.
        calibration: folder written by `npu calibrate` for the same checkpoint and size; default: record now.
        prompts: text file with one prompt per line to record with; default for shapes systems: captions.
        videos: prompts to record, three in four for ranges and the rest for figures.
        samples: recorded runs of each graph that are kept.
        overrides: JSON file, graph -> pattern of weight names -> "int8" or "int16".
        rounding: how 8-bit weights are found; adaround and seqmse are AIMET's (extra aimet) and slow.
        rounding_graphs: graphs that they are used for; the denoiser's stages share their weights and are left alone.
        rounding_iterations: of AdaRound, for every layer.
        super_resolution: folder of a QuickSRNet; default: the hybrid folder's own, if there is one.
        seed: of the recorded videos' noise.
        check: compare every graph with the JAX network, and stop below 100 dB.
        overwrite: replace an existing bundle.
    """
    from nd_jax.outputs import check_new

    check_at_least(0, seed=seed)
    check_at_least(8, videos=videos)
    check_at_least(4, samples=samples)
    check_at_least(1, rounding_iterations=rounding_iterations)
    check_new(out, overwrite=overwrite)
    with runtime_errors():
        from nd_jax.converters.bundle.rounding import Rounding
        from nd_jax.npu_workflow import build_bundle, quantised, read_overrides
    from nd_jax.system import load_system

    given = read_overrides(overrides)
    system = load_system(checkpoint, mode=mode, dtype=None)
    size = (height or system.video.height, width or system.video.width)
    then = None
    if not float_only:
        lines = [] if calibration else calibration_prompts(prompts, size, videos)
        learned = None if rounding == "nearest" else Rounding(rounding, rounding_graphs, rounding_iterations)
        then = quantised(calibration, lines, samples=samples, seed=seed, overrides=given, rounding=learned, say=say)
    with runtime_errors():
        print(
            build_bundle(
                system,
                out,
                check=check,
                overwrite=overwrite,
                then=then,
                say=say,
                super_resolution=super_resolution,
                height=height,
                width=width,
                frames=frames,
            )
        )


def npu_calibrate(
    bundle: Path = Path("bundle"),
    out: Path = Path("calibration"),
    prompts: Path | None = None,
    videos: int = 16,
    samples: int = 24,
    seed: int = 1,
    overwrite: bool = False,
) -> None:
    """Record what the pipeline feeds every graph of a bundle, in float32: ranges and test vectors.

    Args:
        bundle: folder written by `npu build` (with --float-only, for example).
        out: folder for the recordings.
        prompts: text file with one prompt per line; default for shapes systems: captions.
        videos: prompts to record, three in four for ranges and the rest for figures.
        samples: recorded runs of each graph that are kept.
        seed: of the videos' noise.
        overwrite: replace existing recordings.
    """
    check_at_least(0, seed=seed)
    check_at_least(8, videos=videos)
    check_at_least(4, samples=samples)
    from nd_jax.npu_workflow import record_bundle
    from nd_jax.outputs import new_folder

    with runtime_errors():
        from nd_jax.converters.runtime.manifest import Bundle

        opened = Bundle(bundle)
        lines = calibration_prompts(prompts, (opened["video"]["height"], opened["video"]["width"]), videos)
        with new_folder(out, overwrite=overwrite) as folder, progress_bar("videos", videos) as progress:
            record_bundle(opened, folder, lines, samples=samples, seed=seed, progress=progress)
    print(out)


def npu_run(
    prompt: str,
    bundle: Path = Path("bundle"),
    out: Path = Path("video.mp4"),
    negative_prompt: str = "",
    image: Path | None = None,
    seed: int = 0,
    steps: tuple[int, ...] | None = None,
    guidance: float | None = None,
    upscale: bool = True,
    precision: Literal["deployed", "fp32"] = "deployed",
    threads: int = 0,
    overwrite: bool = False,
) -> None:
    """A video from a bundle, by the runtime that phones' hosts have: numpy and onnxruntime, no JAX.

    Args:
        prompt: what to show.
        bundle: folder written by `npu build`.
        out: mp4 file.
        negative_prompt: what guidance steers away from.
        image: first frame, any size; default: one that a hybrid bundle makes itself.
        seed: of the noise.
        steps: steps per stage, lowest resolution first; default: what the bundle is made for.
        guidance: v_uncond + w (v_cond - v_uncond); 0 or 1: none.
        upscale: enlarge frames, where the bundle has super-resolution.
        precision: "deployed" (W8A16 where the bundle has it) or "fp32".
        threads: of onnxruntime; 0: its own choice.
        overwrite: replace an existing file.
    """
    check_at_least(0, seed=seed, threads=threads)
    import argparse

    options = argparse.Namespace(
        prompt=prompt,
        bundle=bundle,
        out=out,
        negative_prompt=negative_prompt,
        image=image,
        seed=seed,
        steps=steps,
        guidance=guidance,
        upscale=upscale,
        precision=precision,
        threads=threads,
        overwrite=overwrite,
    )
    with runtime_errors():
        from nd_jax.converters.runtime.cli import run

        print(run(options))


def npu_inspect(
    bundle: Path = Path("bundle"),
    target: tuple[str, ...] = (),
    names: Sequence[str] = (),
    details: bool = False,
    full_size: bool = False,
    json: Path | None = None,
) -> None:
    """What is in a bundle: per graph operators, weights, MACs, bytes, SNR, a latency estimate; resident bytes.

    Args:
        bundle: folder written by `npu build`.
        target: targets to estimate for; default: all that are known.
        names: graphs to show operators, inputs, outputs and ranges of; default: none.
        details: show them of all graphs.
        full_size: the paper's pipeline instead of a bundle: 49 frames of 320x512, counted from shapes alone.
        json: file for the same figures; an existing one is replaced.
    """
    import json as reader

    from nd_jax.outputs import new_file

    with runtime_errors():
        from nd_jax.converters.bundle.inspect import facts, of_bundle, of_full_size, report
        from nd_jax.converters.runtime.manifest import Bundle

        if full_size:
            subject = of_full_size()
        else:
            opened = Bundle(bundle)
            opened.check_all()
            subject = of_bundle(opened)
        for line in report(subject, target, names, details=details):
            print(line)
        if json is not None:
            with new_file(json, overwrite=True) as part:
                part.write_text(reader.dumps(facts(subject, target), indent=1) + "\n")


def npu_judge(
    bundle: Path = Path("bundle"),
    checkpoint: Path = Path(SHIPPED),
    prompts: int = 100,
    record: Path | None = None,
    seed: int = 0,
    precision: Literal["deployed", "fp32"] = "deployed",
    threads: int = 0,
) -> None:
    """Judged accuracy of a shapes bundle beside its checkpoint's in JAX: same prompts, same noise.

    Args:
        bundle: folder written by `npu build`.
        checkpoint: what it was made from.
        prompts: captions, one video each.
        record: JSON file that keeps what has been judged; the same command goes on where it ends.
        seed: of captions and noise.
        precision: "deployed" (W8A16 where the bundle has it) or "fp32".
        threads: of onnxruntime; 0: its own choice.
    """
    check_at_least(2, prompts=prompts)
    check_at_least(0, seed=seed, threads=threads)
    from nd_jax.npu_judge import judge_bundle
    from nd_jax.system import load_system

    with runtime_errors(), progress_bar("videos", prompts) as progress:
        found = judge_bundle(
            bundle,
            load_system(checkpoint),
            prompts,
            seed=seed,
            threads=threads,
            precision=precision,
            file=record,
            progress=progress,
        )
    for line in found.lines():
        print(line)
    if found.low < -0.02:
        warn("the interval reaches more than 2 points below the checkpoint")
