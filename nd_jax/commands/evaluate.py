"""``nd-jax evaluate``: generate, judge, report."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from nd_jax.commands.console import check_at_least, progress_bar, warn
from nd_jax.errors import UserError
from nd_jax.outputs import check_new_file

PROMPTS = 48
"""Without a protocol."""


def evaluate(
    checkpoint: Positional[tuple[Path, ...]],
    out: Path = Path("evaluation"),
    protocol: Literal["quick", "full"] | None = None,
    splits: tuple[str, ...] = (),
    controls: bool = True,
    prompts: int | None = None,
    split: Literal["seen", "heldout_combinations", "heldout_templates"] = "seen",
    plain: bool = False,
    seed: int = 0,
    batch: int = 16,
    first_frames: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Generate from prompts of the shapes world, judge, and write report.html and summary.json.

    With --protocol: the splits, seeds and controls that were fixed before training, and readings.json, which a later
    evaluation takes in place of a checkpoint. Without it: one split, once.

    Args:
        checkpoint: one or more official-layout folders; the first is the baseline of the others. With --protocol also
            a readings.json, whose systems are compared without generating again.
        out: folder for the report.
        protocol: quick: 36 prompts of each split, one video each. full: 144 prompts, three videos each.
        splits: only these splits of the protocol; default: all but those of shapes_wide.
        controls: with --protocol, also generate without prompts and with untrained text encoders.
        prompts: how many of each split; default: 48, or what the protocol says.
        split: which prompts; without --protocol only.
        plain: word all prompts alike, for systems that were trained on plain captions only.
        seed: of prompts and noise; without --protocol only.
        batch: prompts at a time.
        first_frames: system whose own first frames every checkpoint continues as well, on a line of its own (hybrid
            generation); without --protocol only.
        overwrite: replace an existing report.
    """
    check_at_least(1, batch=batch, **({} if prompts is None else {"prompts": prompts}))
    check_at_least(0, seed=seed)
    if not checkpoint or len(set(checkpoint)) < len(checkpoint):
        raise UserError("evaluate: expected one or more checkpoint folders, each once")
    if protocol is not None:
        if (split, seed) != ("seen", 0):
            raise UserError(
                "evaluate: a protocol has its own seeds and splits; use --splits, without --seed and --split"
            )
        if first_frames is not None:
            raise UserError("evaluate: --first-frames is for evaluation without a protocol")
        from nd_jax.protocol.definition import PROTOCOLS

        changes = {} if prompts is None else {"name": f"{protocol}, {prompts} prompts", "prompts": prompts}
        chosen = dataclasses.replace(PROTOCOLS[protocol], plain=plain, **changes)
        print(evaluate_protocol(checkpoint, out, chosen, splits, controls=controls, batch=batch, overwrite=overwrite))
        return
    if splits or not controls:
        raise UserError("evaluate: --splits and --no-controls belong to a protocol; add --protocol full")
    check_new_file(out / "report.html", overwrite=overwrite)
    from nd_jax.data.world import world_named
    from nd_jax.evaluate import evaluate_system
    from nd_jax.evaluation_report import write_evaluation
    from nd_jax.system import load_system

    world, judged, count = world_named("64x64"), {}, PROMPTS if prompts is None else prompts
    teacher = None if first_frames is None else load_system(first_frames)
    for path in checkpoint:
        system = load_system(path)
        for each in (None, teacher) if teacher is not None else (None,):
            name = str(path) if each is None else f"{path}, first frame by {first_frames}"
            with progress_bar(name, count) as progress:
                judged[name] = evaluate_system(
                    system,
                    world,
                    split=split,
                    plain=plain,
                    count=count,
                    seed=seed,
                    batch=batch,
                    teacher=each,
                    progress=progress,
                )
    print(write_evaluation(out, world, split, seed, judged, plain=plain))


def evaluate_protocol(
    given: Sequence[Path],
    out: Path,
    protocol: Any,
    splits: Sequence[str],
    *,
    controls: bool,
    batch: int,
    overwrite: bool,
) -> Path:
    """Run a ``Protocol`` on the checkpoints, read the readings, and write everything; returns the report's path.

    Raises UserError, before anything is generated, for readings of another protocol and for one name of two systems.
    """
    from nd_jax.protocol.definition import chosen_splits
    from nd_jax.protocol.readings import read_readings
    from nd_jax.protocol.report import check_outputs, write_protocol
    from nd_jax.protocol.run import CONTROLS, clips_to_do, run_protocol
    from nd_jax.system import load_system

    check_outputs(out, overwrite=overwrite)
    wanted, extra = chosen_splits(protocol, splits or None), CONTROLS if controls else ()
    parts = {path: read_readings(path) if path.suffix == ".json" else None for path in given}
    for path, found in parts.items():
        for result in (found or {}).values():
            protocol.check_same(result.protocol, str(path))
    names = [name for path, found in parts.items() for name in (found or [str(path)])]
    if len(set(names)) < len(names):
        raise UserError(f"evaluate: systems {', '.join(names)}; expected each once")
    results = {}
    for path, found in parts.items():
        if found is not None:
            results |= found
            continue
        system = load_system(path)
        with progress_bar(str(path), clips_to_do(protocol, wanted, extra)) as progress:
            results[str(path)] = run_protocol(
                system, protocol, splits=wanted, controls=extra, batch=batch, progress=progress, warn=warn
            )
    return write_protocol(out, results)
