"""``nd-jax-runtime BUNDLE --prompt "..."``: a video from a bundle."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from .errors import BundleError


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    found = argparse.ArgumentParser("nd-jax-runtime", description="Make a video from a bundle of ONNX graphs.")
    found.add_argument("bundle", type=Path, help="folder made by `nd-jax npu build`")
    found.add_argument("--prompt", required=True)
    found.add_argument("--out", type=Path, default=Path("video.mp4"), help="mp4 file (default: %(default)s)")
    found.add_argument("--negative-prompt", default="", help="what guidance steers away from")
    found.add_argument("--image", type=Path, help="first frame, any size")
    found.add_argument("--seed", type=int, default=0, help="of the noise (default: %(default)s)")
    found.add_argument(
        "--upscale", action=argparse.BooleanOptionalAction, default=True,
        help="enlarge frames, where the bundle has super-resolution (default: yes)",
    )  # fmt: skip
    found.add_argument("--steps", type=int, nargs="+", help="steps per stage, lowest resolution first")
    found.add_argument("--guidance", type=float, help="0 or 1: none")
    found.add_argument("--precision", choices=("deployed", "fp32"), default="deployed")
    found.add_argument("--threads", type=int, default=0, help="0: onnxruntime's choice")
    found.add_argument("--overwrite", action="store_true", help="replace an existing file")
    return found


def run(options: argparse.Namespace) -> Path:
    """Make the video and write it. Raises BundleError for bad input."""
    import os

    from .pipeline import Pipeline
    from .sampler import Plan
    from .video import read_image, write_video

    if options.seed < 0:
        raise BundleError(f"--seed is {options.seed}; expected at least 0")
    if os.path.lexists(options.out) and not options.overwrite:
        raise BundleError(f"{options.out} exists; use --overwrite to replace it")
    pipeline = Pipeline(options.bundle, precision=options.precision, threads=options.threads)
    plan = pipeline.plan
    if options.steps is not None:
        plan = replace(plan, first_steps=tuple(options.steps), later_steps=tuple(options.steps))
    if options.guidance is not None:
        plan = replace(plan, first_guidance=options.guidance, later_guidance=options.guidance)
    plan = Plan.from_dict(vars(plan), len(pipeline.bundle["denoiser"]["stages"]))
    about = pipeline.bundle["video"]
    image = None if options.image is None else read_image(options.image, about["height"], about["width"])
    video = pipeline.video(
        options.prompt,
        negative_prompt=options.negative_prompt,
        seed=options.seed,
        image=image,
        plan=plan,
        upscale=options.upscale,
        progress=lambda done, total: print(f"latent frame {done} of {total}", file=sys.stderr),
    )
    return write_video(options.out, video, about["fps"], overwrite=options.overwrite)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 2 bad input."""
    try:
        print(run(parser().parse_args(arguments)))
    except (BundleError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0
