"""``nd-jax prune correlate``."""

from __future__ import annotations

from pathlib import Path

from tyro.conf import Positional, UseAppendAction

from nd_jax.commands.console import check_at_least, say
from nd_jax.commands.prune import Mode, calibration_prompts


def prune_correlate(
    checkpoint: Positional[Path],
    sweep: Path,
    preset: str,
    latents: UseAppendAction[tuple[Path, ...]],
    out: Path,
    run: str = "recovery",
    candidates: int = 20,
    steps: int = 250,
    count: int | None = None,
    judge: int = 0,
    mode: Mode | None = None,
    prompts: int = 16,
    plain: bool = False,
    prompt_file: Path | None = None,
    seed: int = 1,
    batch: int = 8,
    keep: bool = False,
) -> None:
    """Train some of a sweep's candidates alike, and see which cheap scores foretold how well they do then.

    The best set found, the choices of other scores, and others of all ranks are cut out of the checkpoint, trained, and
    compared with it on prompts of their own. Run again, it goes on with those that are missing.

    Args:
        checkpoint: official-layout folder that was swept.
        sweep: folder of nd-jax prune sweep, of blocks.
        preset: the preset whose run trains them.
        latents: latents folder, of nd-jax data latents.
        out: folder for recovered.json and report.html.
        run: the preset's run: flow matching, or recovery in two stages.
        candidates: how many to train.
        steps: updates of each (of each stage).
        count: blocks that they drop; default: as many as most of the sweep's candidates.
        judge: prompts whose videos are judged after training (shapes videos only); 0: none.
        mode: which denoiser, where the folder has both.
        prompts: prompts on which they are compared; a multiple of batch.
        plain: word the shapes world's prompts all alike.
        prompt_file: text file with one prompt per line; default: prompts of the shapes world.
        seed: of these prompts and their noise; another one than the sweep's.
        batch: videos at a time.
        keep: keep the runs' folders.
    """
    check_at_least(1, prompts=prompts, batch=batch, steps=steps)
    check_at_least(3, candidates=candidates)
    check_at_least(0, seed=seed, judge=judge)
    from collections import Counter

    import numpy as np

    from nd_jax.converters.folders import load_folder
    from nd_jax.data.source import prompts as world_prompts
    from nd_jax.data.world import world_named
    from nd_jax.errors import UserError
    from nd_jax.influence import generator_of
    from nd_jax.models.system import CODEC
    from nd_jax.recipes.preset import load_preset
    from nd_jax.sweep.calibration import record
    from nd_jax.sweep.cheap import read_scores
    from nd_jax.sweep.correlate import correlation, foretold, sections, write_correlation
    from nd_jax.sweep.recover import Distance, judge_with, recovered_all, spread_choice, trainer
    from nd_jax.sweep.table import open_table
    from nd_jax.sweep.workflow import SCORES, TABLE, denoiser_digest
    from nd_jax.system import load_system

    if out.exists() and not out.is_dir():
        raise UserError(f"output {out} is a file, expected a folder")
    chosen_preset, system = load_preset(preset), load_system(checkpoint, mode=mode, dtype=None)
    table = open_table(sweep / TABLE)
    if table.settings.get("units") != "blocks" or table.settings.get("denoiser") != denoiser_digest(system):
        raise UserError(
            f"correlate: {sweep} is no sweep of the blocks of {checkpoint}; name the checkpoint it was made of"
        )
    system = load_system(checkpoint, mode=mode)  # in float32: shipped weights are float16, in which nothing trains
    if count is None:
        sizes = Counter(len(drop) for drop in table.rows if len(drop) > 2) or Counter(len(drop) for drop in table.rows)
        count = max(sizes, key=lambda size: (sizes[size], size))
    cheap = read_scores(sweep / SCORES, table.units)
    chosen = cheap.choices(count)
    drops = spread_choice(table, chosen, count, candidates)
    folder, generator, world = load_folder(system.folder), generator_of(system), world_named("64x64")
    if judge and (generator.height, generator.width) != (world.height, world.width):
        raise UserError(f"correlate: the judge reads videos of {world.height}x{world.width}; leave --judge out")
    captions = calibration_prompts(prompt_file, prompts, seed=seed, plain=plain)
    calibration = record(generator, captions, seed=seed, batch=batch, steps=2)
    judged = None
    if judge:
        asked, labels = world_prompts(world, "train", judge, seed=seed + 1, plain=plain)
        judged = judge_with(generator, asked, labels, world, seed=seed, batch=batch)
    given = {"latents": list(latents), "codec_folder": folder.components[CODEC], "tokenizers": dict(folder.tokenizers)}
    train = trainer(chosen_preset, run, system, steps=steps, compiled=out / "compiled", **given)
    settings = {
        **{name: table.settings[name] for name in ("denoiser", "sampling")},
        **{"preset": preset, "run": run, "steps": steps, "judge": judge, "seed": seed, "prompts": captions},
        "latents": [str(path.resolve()) for path in latents],
    }
    out.mkdir(parents=True, exist_ok=True)
    distance = Distance(system, generator.envelopes, calibration)
    found = recovered_all(system, drops, out, settings, train, distance, judged, keep=keep, told=say)
    if len(found) < 3:
        raise UserError(f"correlate: {len(found)} of {len(drops)} candidates are trained; run again to go on")
    page = sections(table, cheap.scores, chosen, found, len(captions))
    say(f"report: {write_correlation(out / 'report.html', str(checkpoint), steps, page)}")
    after = np.array([each.after.mean() for each in found.values()])
    for name, values in foretold(table, cheap.scores, list(found)).items():
        rho, low, high = correlation(values, after)
        print(f"{name}: {rho:.2f} ({low:.2f} to {high:.2f})")
