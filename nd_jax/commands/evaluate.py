"""``nd-jax evaluate``: generate, judge, report."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from nd_jax.commands.console import check_at_least, progress_bar
from nd_jax.errors import UserError
from nd_jax.outputs import check_new_file


def evaluate(
    checkpoint: Positional[tuple[Path, ...]],
    out: Path = Path("evaluation"),
    prompts: int = 48,
    split: Literal["seen", "heldout_combinations", "heldout_templates"] = "seen",
    plain: bool = False,
    seed: int = 0,
    batch: int = 16,
    overwrite: bool = False,
) -> None:
    """Generate from prompts of the shapes world, judge, and write report.html and summary.json.

    Args:
        checkpoint: one or more official-layout folders; the first is the baseline of the others.
        out: folder for the report.
        prompts: how many.
        split: which prompts.
        plain: word all prompts alike, for systems that were trained on plain captions only.
        seed: of prompts and noise.
        batch: prompts at a time.
        overwrite: replace an existing report.
    """
    check_at_least(1, prompts=prompts, batch=batch)
    check_at_least(0, seed=seed)
    check_new_file(out / "report.html", overwrite=overwrite)
    if not checkpoint or len(set(checkpoint)) < len(checkpoint):
        raise UserError("evaluate: expected one or more checkpoint folders, each once")
    from nd_jax.data.world import world_named
    from nd_jax.evaluate import evaluate_system
    from nd_jax.evaluation_report import write_evaluation
    from nd_jax.system import load_system

    world, judged = world_named("64x64"), {}
    for path in checkpoint:
        system = load_system(path)
        with progress_bar(str(path), prompts) as progress:
            judged[str(path)] = evaluate_system(
                system, world, split=split, plain=plain, count=prompts, seed=seed, batch=batch, progress=progress
            )
    print(write_evaluation(out, world, split, seed, judged, plain=plain))
