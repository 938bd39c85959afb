"""``nd-jax plan PRESET``: what every run would need on a TPU slice, from programs compiled for it here."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, UseAppendAction, arg

from nd_jax.commands.console import check_at_least, console, say
from nd_jax.errors import UserError


def plan(
    preset: Positional[str],
    topology: UseAppendAction[tuple[str, ...]] = (),
    run: UseAppendAction[tuple[str, ...]] = (),
    batch: str | None = None,
    mesh: str | None = None,
    efficiency: float = 0.75,
    text_tokens: int | None = None,
    removed: int = 6,
    every_unit: bool | None = None,
    stored_text: bool = False,
    remat: Literal["none", "full", "dots"] | None = None,
    microbatches: int | None = None,
    effort: Literal["O0", "O1", "O2", "O3"] | None = None,
    checkpoint: Path | None = None,
    json_file: Annotated[Path | None, arg(name="json")] = None,
    overwrite: bool = False,
) -> None:
    """What every run of a preset needs on a TPU slice: memory, operations, bytes on the wire, and bounds of its speed.
    Compiles the real programs with libtpu (pip install 'nd-jax[tpu]'); no TPU is needed, minutes of processor time are.

    Args:
        preset: its name.
        topology: generation and shape of a slice, such as v5p:4x4x8; give it several times for several.
        run: only these runs, generate for sampling, and sweep for prune sweep's step; default: all but the last.
        batch: examples per step of the whole slice instead of the preset's, or auto for the largest that fits.
        mesh: axis sizes such as fsdp=32,context=4; default: the batch over all chips, what it leaves over tokens.
        efficiency: share of their peak that matrix units are taken to reach, for the derated bound.
        text_tokens: real tokens of a prompt; default: all that fit.
        removed: blocks that the pruned student lacks.
        every_unit: exact layouts, a column for every stage and latent frame, or not, instead of the preset's choice
            (--recipe.every-unit of training).
        stored_text: text features come with the latents (--recipe.text stored of training).
        remat: what the backward pass recomputes instead of the preset's choice (--recipe.remat of training).
        microbatches: passes per update instead of the preset's (--recipe.microbatches of training).
        effort: how hard the compiler optimises (JAX's jax_optimization_level). O1 takes less than half of the time.
        checkpoint: folder of a training run that would go on; refused if it belongs to another preset.
        json_file: file for everything, as JSON.
        overwrite: replace an existing file.
    """
    import jax

    from nd_jax.outputs import check_new_file, new_file
    from nd_jax.planning.chips import parse_topology
    from nd_jax.planning.compiled import check_libtpu
    from nd_jax.planning.plan import GENERATE, SWEEP, Settings, largest_batch, plan_run
    from nd_jax.planning.programs import plannable
    from nd_jax.planning.splits import parse_split
    from nd_jax.recipes.preset import load_preset

    chosen, slices = load_preset(preset), [parse_topology(name) for name in topology]
    if not slices:
        raise UserError("plan: expected --topology, such as --topology v5p:4x4x8")
    if not 0 < efficiency <= 1:
        raise UserError(f"--efficiency is {efficiency}, expected more than 0 and at most 1")
    count = None if batch in (None, "auto") else _number(batch)
    check_at_least(0, removed=removed)
    if microbatches is not None:
        check_at_least(1, microbatches=microbatches)
    known = [*plannable(chosen), GENERATE]
    for name in run:
        if name not in (*known, SWEEP):
            raise UserError(f"plan: no run {name!r} of {preset} to plan, expected one of {', '.join([*known, SWEEP])}")
    if checkpoint is not None:
        check_checkpoint(checkpoint, preset)
    if json_file is not None:
        check_new_file(json_file, overwrite=overwrite)
    split = None if mesh is None else parse_split(mesh)
    check_libtpu()
    if effort is not None:
        jax.config.update("jax_optimization_level", effort)
    settings = Settings(
        batch=count,
        mesh=split,
        efficiency=efficiency,
        text_tokens=text_tokens,
        removed=removed,
    )
    text = "stored" if stored_text else None
    asked = {"every_unit": every_unit, "text": text, "remat": remat, "microbatches": microbatches}
    wanted = {field: value for field, value in asked.items() if value is not None}
    plans: list[dict[str, Any]] = []
    for each in slices:
        for name in run or known:
            say(f"{preset} {name}: compiling for {each.name}")
            fixed = name in (GENERATE, SWEEP)
            recipe = None if fixed else chosen.run(name).recipe  # text distillation has another kind of remat
            changes = tuple(
                (field, value) for field, value in wanted.items() if type(getattr(recipe, field, None)) is type(value)
            )
            here = Settings(**vars(settings) | {"changes": changes})
            if batch == "auto" and not fixed:
                plans.append(largest_batch(chosen, name, each, here, say=say))
            else:
                plans.append(plan_run(chosen, name, each, here))
            plans[-1]["effort"] = effort or "default"
            print(line(plans[-1]), flush=True)
    if json_file is not None:
        with new_file(json_file, overwrite=overwrite) as part:
            part.write_text(json.dumps({"plans": plans}, indent=2) + "\n")
    table(plans)


def _number(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise UserError(f"--batch is {text!r}, expected a number of at least 1, or auto")
    return int(text)


def check_checkpoint(folder: Path, preset: str) -> None:
    """Raises UserError when a training run's newest checkpoint belongs to another preset."""
    from nd_jax.training.checkpoint import read_record

    found = str(read_record(folder)["identity"]["preset"])
    if found.partition("/")[0] != preset:
        raise UserError(
            f"checkpoint {folder} belongs to preset {found.partition('/')[0]!r}, the plan is for {preset!r}; "
            "plan the preset it was written with"
        )


def line(plan: Mapping[str, Any]) -> str:
    """One plan in one line."""
    low, high = plan["step_seconds"]
    memory = f"{plan['peak_gib']:.2f} of {plan['hbm_gib']:.2f} GiB, " if "peak_gib" in plan else ""
    rate = plan.get("candidates_per_second")
    many = "" if rate is None else f", {rate[1]:.1f} to {rate[0]:.1f} candidates/s of {plan['layers']} layers"
    return (
        f"{plan['run']} on {plan['topology']}: batch {plan['batch']}, {memory}{short(low)} to {short(high)} s, "
        f"MFU {plan['mfu'][1]:.0%} to {plan['mfu'][0]:.0%} (a bound; limited by {plan['limit']}){many}"
    )


def table(plans: list[dict[str, Any]]) -> None:
    """All plans side by side, for people."""
    from rich.table import Table

    shown = Table(title="bounds from compiled programs: everything overlapped .. nothing", title_justify="left")
    for name in ("run", "slice", "mesh", "batch", "GiB args/temp/peak/HBM", "TFLOP (analytic)", "GB on the wire"):
        shown.add_column(name)
    for name in ("seconds", "MFU", "derated", "videos/s", "chip hours"):
        shown.add_column(name)
    for plan in plans:
        shown.add_row(*cells(plan))
    console.print(shown)


def cells(plan: Mapping[str, Any]) -> list[str]:
    """A plan as the table's row; the analytic operations are those of the whole slice."""

    def span(pair: Any, show: Callable[[float], str]) -> str:
        low, high = sorted(pair)
        return f"{show(low)} .. {show(high)}"

    axes = " ".join(f"{axis}={size}" for axis, size in plan["mesh"].items() if size > 1) or "1"
    row = [plan["run"], plan["topology"], axes, str(plan["batch"])]
    if "peak_gib" in plan:
        row.append(" / ".join(f"{plan[name]:.2f}" for name in ("argument_gib", "temporary_gib", "peak_gib", "hbm_gib")))
        row.append(f"{short(plan['flops_compiled'] / 1e12)} ({short(plan['flops_analytic'] / 1e12)})")
        row.append(" ".join(f"{kind} {short(value / 1e9)}" for kind, value in plan["wire_bytes"].items()) or "-")
    else:
        row += ["-", f"({short(plan['flops_analytic'] / 1e12)})", "-"]
    row += [span(plan["step_seconds"], short), span(plan["mfu"], "{:.0%}".format)]
    row += [span(plan["mfu_derated"], "{:.0%}".format), span(plan["videos_per_second"], short)]
    row.append(span(plan["chip_hours"], short) if "chip_hours" in plan else "-")
    return row


def short(value: float) -> str:
    """Three digits that count: a step of an upscaler takes microseconds, one of a denoiser seconds."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
