"""``nd-jax report steps`` and ``nd-jax combine``: few-step systems side by side, and parts put together."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tyro.conf import Positional

from nd_jax.commands.console import check_at_least, progress_bar
from nd_jax.errors import UserError
from nd_jax.weights import SHIPPED

if TYPE_CHECKING:
    from nd_jax.system import VideoSystem


def report_steps(
    row: Positional[tuple[str, ...]],
    out: Path = Path("ablation"),
    teacher: Path = Path(SHIPPED),
    hybrid: tuple[str, ...] = (),
    undistilled: bool = True,
    protocol: Literal["quick", "full"] = "quick",
    splits: tuple[str, ...] = ("seen", "heldout_combinations"),
    prompts: int | None = None,
    batch: int = 16,
    overwrite: bool = False,
) -> None:
    """What few-step systems cost and keep of their teacher: report.html with videos, ablation.md and ablation.json.

    Args:
        row: one or more NAME=FOLDER, systems in the order of the table, such as student=RUN/system; all others are
            compared with the first as well. NAME=FOLDER@2-2-1: sampled in these steps per stage.
        out: folder for the report.
        teacher: the guided many-step system that all others are compared with.
        hybrid: names of rows that are shown once more after first frames of the teacher.
        undistilled: also show the teacher at the first row's calls, on both step grids, and at its passes.
        protocol: quick: 36 prompts of each split, one video each. full: 144 prompts, three videos each.
        splits: of the protocol's.
        prompts: how many of each split; default: what the protocol says.
        batch: prompts at a time.
        overwrite: replace an existing report.
    """
    check_at_least(1, batch=batch, **({} if prompts is None else {"prompts": prompts}))
    given = named_folders(row)
    unknown = [name for name in hybrid if name not in given]
    if unknown:
        raise UserError(f"report steps: --hybrid {' '.join(unknown)}; expected some of {', '.join(given)}")
    import jax

    from nd_jax.protocol import ablation, ablation_report
    from nd_jax.protocol.definition import PROTOCOLS, chosen_splits
    from nd_jax.system import load_system

    ablation_report.check_outputs(out, overwrite=overwrite)
    # Systems of one size share their programs, and so does the same command run again.
    jax.config.update("jax_compilation_cache_dir", str((out / "compiled").absolute()))
    changes = {} if prompts is None else {"name": f"{protocol}, {prompts} prompts", "prompts": prompts}
    asked = dataclasses.replace(PROTOCOLS[protocol], **changes)
    guide = load_system(teacher)
    systems = {name: in_steps(load_system(folder), steps, name) for name, (folder, steps) in given.items()}
    entries = {"teacher": ablation.Entry(guide)}
    if undistilled:
        entries |= ablation.undistilled(guide, next(iter(systems.values())).sampling)
    entries |= {name: ablation.Entry(system) for name, system in systems.items()}
    entries |= {f"{name}, first frame given": ablation.Entry(systems[name], guide) for name in hybrid}
    ablation.check_latents(entries)
    rows = ablation.run_ablation(
        entries,
        asked,
        chosen_splits(asked, splits),
        batch=batch,
        progress=lambda name, total: progress_bar(name, total),
    )
    print(ablation_report.write_ablation(out, rows, next(iter(given))))


def named_folders(words: Sequence[str]) -> dict[str, tuple[Path, tuple[int, ...] | None]]:
    """NAME=FOLDER or NAME=FOLDER@2-2-1, each name once; folders and steps per stage. Raises UserError for anything
    else."""
    pairs = [word.partition("=") for word in words]
    names = [name for name, _, _ in pairs]
    if not pairs or not all(name and folder for name, _, folder in pairs) or len(set(names)) < len(names):
        raise UserError(f"report steps: {' '.join(words) or 'no rows'}; expected NAME=FOLDER ..., each name once")
    if "teacher" in names:
        raise UserError("report steps: a row named teacher; the teacher is --teacher, expected another name")
    return {name: _folder_and_steps(folder) for name, _, folder in pairs}


def _folder_and_steps(word: str) -> tuple[Path, tuple[int, ...] | None]:
    found = re.fullmatch(r"(.+)@([0-9]{1,4}(?:-[0-9]{1,4})*)", word)
    return (Path(found[1]), tuple(map(int, found[2].split("-")))) if found else (Path(word), None)


def in_steps(system: VideoSystem, steps: tuple[int, ...] | None, name: str) -> VideoSystem:
    """The system, sampled in so many steps per stage; None: as its folder says. Raises UserError for other than one
    count of at least 1 for each stage."""
    if steps is None:
        return system
    from nd_jax.commands.generate import changed_plan

    stages = system.schedule.stages
    try:
        plan = changed_plan(system.sampling, steps, None, None, None, None, stages)
    except UserError:
        shown = "-".join(map(str, steps))
        raise UserError(
            f"report steps: {name} in steps {shown}, expected {stages} numbers from 1 on, one for each stage, such as "
            "2-2-1"
        ) from None
    return dataclasses.replace(system, sampling=plan)


def combine(
    denoiser: Positional[Path],
    out: Path,
    text: Path | None = None,
    decoder: Path | None = None,
    overwrite: bool = False,
) -> None:
    """One system out of parts that were distilled apart; written in the official layout, and read back to be sure.

    Args:
        denoiser: system folder of a pruned or step-distilled denoiser, whose sampling plan and tokenizers are kept.
        out: new system folder.
        text: system folder of a run that distilled the text encoder.
        decoder: codec folder, or system with one, of a run that distilled the decoder.
        overwrite: replace an existing folder.
    """
    if text is None and decoder is None:
        raise UserError("combine: expected --text SYSTEM, --decoder FOLDER or both")
    from nd_jax.combine import combine as run
    from nd_jax.combine import write_combined
    from nd_jax.converters.component import load_component
    from nd_jax.converters.folders import load_folder
    from nd_jax.system import codec_folder, load_system

    system = load_system(denoiser)
    made = run(
        system,
        text=None if text is None else load_system(text),
        codec=None if decoder is None else load_component(codec_folder(decoder), "video_vae", dtype="fp32"),
    )
    write_combined(out, made, dict(load_folder(system.folder).tokenizers), overwrite=overwrite)
    print(out)
