"""Super-resolution from video files to a component folder, measured on files that were never trained on."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from nd_jax.converters.component import save_component
from nd_jax.data.clips import read_video
from nd_jax.data.patches import PatchSource
from nd_jax.errors import UserError
from nd_jax.models.functional import Params
from nd_jax.models.quicksrnet import QuickSRNetConfig, definition, enlarge
from nd_jax.outputs import new_file
from nd_jax.recipes.feeds import Feed
from nd_jax.recipes.preset import Preset, UpscalerRun, as_settings
from nd_jax.recipes.upscaler import UpscalerRecipe, interpolated, reduced
from nd_jax.recipes.upscaler_start import fit_filters, has_room, linear_start
from nd_jax.training.checkpoint import load_tree
from nd_jax.training.cluster import once
from nd_jax.training.hooks import sharding_hooks
from nd_jax.training.loop import Outcome, train
from nd_jax.training.mesh import make_mesh
from nd_jax.workflow import process_batches

RESULT, FIGURES = "super_resolution", "upscaler.json"
FIT_PICTURES = 128
"""Patches that the linear start is fitted to."""
MEASURED_FRAMES = 12
"""Frames of each file that upscalers are compared on, evenly spread."""
SHORTER_SIDE = 192
"""Files are measured as they are and, where they are larger, once more reduced to this: native video is soft."""


@dataclass(frozen=True)
class Upscaled:
    """PSNR in dB (peak 255, mean over frames) of three ways to enlarge a clip that was reduced."""

    height: int
    width: int
    network: float
    bilinear: float
    bicubic: float

    @property
    def gain(self) -> float:
        """dB above the better of the two interpolations."""
        return self.network - max(self.bilinear, self.bicubic)


def measured_frames(path: Path, scale: float, *, shorter_side: int | None = None) -> np.ndarray:
    """Frames of a clip, uint8 [n, h, w, 3], cut to sides that can be reduced by ``scale`` without remainder."""
    video = read_video(path, shorter_side=shorter_side)
    chosen = video[np.linspace(0, len(video) - 1, min(MEASURED_FRAMES, len(video))).round().astype(int)]
    step = 6 if scale == 1.5 else 2 * int(scale)
    height, width = (side // step * step for side in chosen.shape[1:3])
    if not height or not width:
        raise UserError(f"video: {path} has frames of {chosen.shape[1:3]}, expected at least {step} pixels a side")
    return chosen[:, :height, :width]


def compare(config: QuickSRNetConfig, params: Params, frames: np.ndarray) -> Upscaled:
    """Reduce the frames, enlarge them in three ways, and compare with what they were."""
    scale, network = config.scaling_factor, definition(config)

    @jax.jit
    def enlarged(params: Params, image: jax.Array) -> dict[str, jax.Array]:
        small = reduced(image, scale)
        ways = {name: interpolated(small, scale, name) for name in ("bilinear", "bicubic")}
        return ways | {"network": enlarge(network, params, small, config)}

    found: dict[str, list[float]] = {}
    for frame in frames:
        for name, made in enlarged(params, frame[None].astype(np.float32) / 255).items():
            error = np.rint(np.asarray(made[0]) * 255) - frame
            found.setdefault(name, []).append(10 * np.log10(255**2 / max(np.mean(np.square(error)), 1e-10)))
    return Upscaled(*frames.shape[1:3], **{name: float(np.mean(each)) for name, each in found.items()})


def measure(config: QuickSRNetConfig, params: Params, videos: Sequence[Path]) -> dict[str, Upscaled]:
    """``compare`` for every file, by name and size."""
    found = {}
    for path in map(Path, videos):
        for side in (None, SHORTER_SIDE):
            frames = measured_frames(path, config.scaling_factor, shorter_side=side)
            found[f"{path.name} {frames.shape[1]}x{frames.shape[2]}"] = frames
    return {name: compare(config, params, frames) for name, frames in found.items()}


def first_parameters(run: UpscalerRun, source: PatchSource) -> tuple[Params, ...]:
    """What ``UpscalerRecipe.init`` begins with, if the recipe wants a linear start; else nothing."""
    if run.recipe.start != "linear" or not has_room(run.network):
        return ()
    pictures = np.stack([source[index]["image"] for index in range(min(FIT_PICTURES, len(source)))])
    fresh = definition(run.network).init(jax.random.key(run.loop.seed))
    return (linear_start(run.network, fresh, fit_filters(pictures, int(run.network.scaling_factor))),)


def train_upscaler(
    preset: Preset,
    name: str,
    run: UpscalerRun,
    out: Path,
    *,
    videos: Sequence[Path],
    held_out: Sequence[Path] = (),
    quiet: bool = False,
) -> tuple[Outcome, dict[str, Upscaled] | None]:
    """Train on ``videos`` without those named in ``held_out``, then measure on the latter.

    ``out`` receives ``super_resolution``, a component folder for a system, and ``upscaler.json`` if anything is held
    out. Returns how it ended and the figures (``None`` if it was interrupted). Raises UserError when no file remains.
    """
    banned = {Path(path).resolve() for path in held_out}
    used = [path for path in map(Path, videos) if path.resolve() not in banned]
    source = PatchSource(used, size=run.recipe.size, seed=run.loop.seed, most=run.recipe.most)
    mesh = make_mesh(run.loop.mesh)
    recipe = UpscalerRecipe(run.network, run.recipe, sharding_hooks(mesh))
    stream = process_batches(source, run.recipe.batch, run.loop.seed, keys=("image",))
    outcome = train(
        recipe,
        Feed(stream, recipe.batch_spec()),
        run.loop,
        out,
        preset=f"{preset.name}/{name}",
        settings=as_settings(run),
        pinned={"batch": run.recipe.batch},
        mesh=mesh,
        given=first_parameters(run, source),
        quiet=quiet,
    )
    if not outcome.finished:
        return outcome, None
    params = load_tree(out)
    once(lambda: save_component(out / RESULT, run.network, params, overwrite=True), "writing the network")
    figures = measure(run.network, params, held_out)

    def write() -> None:
        content = {each: {**dataclasses.asdict(value), "gain": value.gain} for each, value in figures.items()}
        with new_file(out / FIGURES, overwrite=True) as part:
            part.write_text(json.dumps(content, indent=2) + "\n")

    if figures:
        once(write, "writing the figures")
    return outcome, figures
