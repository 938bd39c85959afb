"""``nd-jax prune importance`` and ``nd-jax prune apply``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from nd_jax.commands.console import check_at_least, progress_bar, say
from nd_jax.errors import UserError
from nd_jax.outputs import check_new, check_new_file, new_file

Mode = Literal["monolithic", "hybrid"]


def _influence(checkpoint: Path, mode: str | None, prompts: int, seed: int) -> tuple[Any, Any]:
    from nd_jax.data.source import prompts as world_prompts
    from nd_jax.data.world import world_named
    from nd_jax.influence import block_influence
    from nd_jax.system import load_system

    check_at_least(1, prompts=prompts)
    check_at_least(0, seed=seed)
    system = load_system(checkpoint, mode=mode, dtype=None)
    captions, _ = world_prompts(world_named("64x64"), "train", prompts, seed=seed)
    with progress_bar("block influence", prompts) as progress:
        return system, block_influence(system, captions, seed=seed, progress=progress)


def prune_importance(
    checkpoint: Positional[Path],
    mode: Mode | None = None,
    prompts: int = 16,
    seed: int = 0,
    out: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Block influence of a checkpoint's denoiser, over prompts, denoising steps and both guidance branches.

    Args:
        checkpoint: official-layout folder.
        mode: which denoiser, where the folder has both.
        prompts: prompts of the shapes world to average over.
        seed: of the prompts and their noise.
        out: also write the numbers to this JSON file.
        overwrite: replace that file.
    """
    if out is not None:
        check_new_file(out, overwrite=overwrite)
    _, influence = _influence(checkpoint, mode, prompts, seed)
    columns = {"image": influence.image.tolist(), "text": influence.text.tolist(), "score": influence.score.tolist()}
    print("block   image    text   score")
    for block, row in enumerate(zip(*columns.values(), strict=True)):
        print(f"{block:5d}" + "".join(f"  {value:.4f}" for value in row))
    if out is not None:
        with new_file(out, overwrite=overwrite) as part:
            part.write_text(json.dumps(columns, indent=2))


def prune_apply(
    checkpoint: Positional[Path],
    out: Path,
    drop: tuple[int, ...] = (),
    count: int | None = None,
    mode: Mode | None = None,
    prompts: int = 16,
    seed: int = 0,
    overwrite: bool = False,
) -> None:
    """Remove blocks from a checkpoint's denoiser: those named, or the least influential ones.

    Args:
        checkpoint: official-layout folder.
        out: folder for the smaller system.
        drop: indices of the blocks to remove.
        count: how many of the least influential blocks to remove, instead.
        mode: which denoiser, where the folder has both.
        prompts: prompts of the shapes world for the influence.
        seed: of the prompts and their noise.
        overwrite: replace an existing folder.
    """
    if bool(drop) == (count is not None):
        raise UserError("prune apply: expected either --drop INDEX ... or --count N")
    check_new(out, overwrite=overwrite)
    from nd_jax.converters.folders import load_folder
    from nd_jax.recipes.pruning import choose_blocks
    from nd_jax.system import load_system, save_system
    from nd_jax.workflow import without_blocks

    if drop:
        system = load_system(checkpoint, mode=mode, dtype=None)
    else:
        system, influence = _influence(checkpoint, mode, prompts, seed)
        drop = choose_blocks(influence.score, count)
    smaller, kept = without_blocks(system, drop)
    save_system(out, smaller, load_folder(checkpoint).tokenizers, dtype=None, overwrite=overwrite)
    say(f"removed {', '.join(map(str, drop)) or 'none'}; kept {', '.join(map(str, kept))}")
    print(out)
