"""The report of an ablation of step distillation: report.html, ablation.md, ablation.json and readings.json."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nd_jax.outputs import check_new_file, new_file
from nd_jax.protocol import tables
from nd_jax.protocol.ablation import Row, figures
from nd_jax.protocol.figures import as_json, compare, system_figures
from nd_jax.protocol.readings import FILE, ProtocolResult, write_readings
from nd_jax.protocol.report import galleries
from nd_jax.protocol.statistics import Estimate
from nd_jax.report import Table, write_report

REPORT, MARKDOWN, SUMMARY = "report.html", "ablation.md", "ablation.json"


def steps_of(about: Mapping[str, Any]) -> str:
    """``8-8-8 / 4-4-4``: first and later frames."""
    plan = about["sampling"]
    parts = ["-".join(map(str, plan[name])) for name in ("first_steps", "later_steps")]
    if about["first_frames"] != "its own":
        return f"given / {parts[1]}"
    return parts[0] if parts[0] == parts[1] else " / ".join(parts)


def ablation_table(found: Mapping[str, Mapping[str, Any]], split: str) -> Table:
    """One row per system, relative to the first."""

    def row(name: str, each: Mapping[str, Any]) -> list[str]:
        return [
            name,
            steps_of(each),
            f"{each['denoiser_parameters'] / 1e6:.2f} M",
            f"{each['parameters'] / 1e6:.2f} M",
            f"{each['calls']} ({each['passes']})",
            f"{each['cpu_seconds']:.2f}",
            tables.with_interval(each["accuracy"], tables.percent),
            tables.with_interval(each["accuracy_of_teacher"], tables.percent),
            tables.with_interval(each["motion_of_drawn"], tables.percent),
            tables.with_interval(each["motion_of_teacher"], tables.percent),
            tables.with_interval(each["speed_by_unit_of_teacher"][-1], tables.percent),
        ]

    columns = ["system", "steps", "denoiser", "all networks", "calls (passes)", "CPU s / video", "accuracy [95 %]"]
    columns += ["of teacher", "motion of drawn", "motion of teacher", "last unit's motion of teacher"]
    note = (
        "Calls of the denoiser for one video; guidance takes two passes through the network for a call. Processor "
        "time is that of text encoders, denoiser and decoder over all threads, compiled. Accuracy is judged, and "
        "compared prompt by prompt with the same noise. Motion: length of the displacement of objects that are asked "
        "to move; of the last unit, speed in the direction asked for. 'given': first frames are the guided teacher's, "
        "and their calls count; their time as well, but not their networks."
    )
    return Table(f"Few steps: {split}", columns, [row(*each) for each in found.items()], note)


def units_tables(found: Mapping[str, Mapping[str, Any]], split: str) -> list[Table]:
    """Closed-loop accuracy and speed by unit, in itself and against the teacher's."""
    history = "Every unit after the first has the system's own earlier units as its history"

    def table(title: str, figure: str, shown: Callable[[float], str], note: str) -> Table:
        def cell(level: Estimate, share: Estimate) -> str:
            return f"{shown(level.value)} ({tables.percent(share.value)})"

        rows = [[name, *map(cell, each[figure], each[f"{figure}_of_teacher"])] for name, each in found.items()]
        columns = ["system", *(f"unit {unit}" for unit in range(1, len(rows[0])))]
        return Table(f"{title} by latent unit: {split}", columns, rows, note)

    return [
        table(
            "Accuracy",
            "accuracy_by_unit",
            tables.percent,
            f"Attributes read right from the frames of one unit, and their share of the teacher's. {history}.",
        ),
        table(
            "Motion",
            "speed_by_unit",
            tables.number,
            "Speed in the direction asked for, in pixels over a full clip, and its share of the teacher's. "
            f"{history}; an object that is not found stands still.",
        ),
    ]


def markdown(shown: Sequence[Table]) -> str:
    """Tables as text."""
    parts = []
    for table in shown:
        lines = [f"## {table.title}", "", _line(table.columns), _line(["---"] * len(table.columns))]
        parts.append("\n".join([*lines, *map(_line, table.rows), "", table.note]).rstrip())
    return "\n\n".join(parts) + "\n"


def _line(cells: Sequence[object]) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def check_outputs(out: Path, *, overwrite: bool) -> None:
    """Raises UserError for a file that exists already, unless it may be replaced."""
    for name in (REPORT, MARKDOWN, SUMMARY, FILE):
        check_new_file(out / name, overwrite=overwrite)


def write_ablation(out: Path, rows: Mapping[str, Row], student: str | None = None) -> Path:
    """report.html, ablation.md, ablation.json and readings.json. Returns the report's path.

    ``student`` names the row that all others are compared with as well.
    """
    baseline, *_ = rows
    results = {name: row.result for name, row in rows.items()}
    protocol, systems = rows[baseline].result.protocol, {name: system_figures(each) for name, each in results.items()}
    splits = list(rows[baseline].result.splits)
    found = {split: figures(rows, split) for split in splits}
    main = [
        table for split in splits for table in (ablation_table(found[split], split), *units_tables(found[split], split))
    ]
    detail: list[Table] = [
        tables.accuracy_table(systems),
        *_comparisons(results, baseline),
        *(_comparisons(results, student) if student else []),
        *tables.motion_tables(systems),
    ]
    out.mkdir(parents=True, exist_ok=True)
    summary = {"protocol": dataclasses.asdict(protocol), "teacher": baseline, "splits": as_json(found)}
    with new_file(out / SUMMARY, overwrite=True) as part:
        part.write_text(json.dumps(summary, indent=2, allow_nan=False), encoding="utf-8")
    with new_file(out / MARKDOWN, overwrite=True) as part:
        part.write_text(markdown([*main, *detail]), encoding="utf-8")
    write_readings(out / FILE, results)
    lead = (
        f"The {protocol.name} protocol: {protocol.prompts} prompts of each split, sampling seeds "
        f"{', '.join(map(str, protocol.sampling_seeds))}; 95 % intervals resample prompts. Relative figures are to "
        f"{baseline}."
    )
    sections = [*main, *galleries(out / "videos", results), *detail, tables.prompts_table(results)]
    return write_report(out / REPORT, "nd-jax: few steps", lead, sections, f"Prompt seed {protocol.prompt_seed}.")


def _comparisons(results: Mapping[str, ProtocolResult], baseline: str) -> list[Table]:
    others = {name: compare(each, results[baseline]) for name, each in results.items() if name != baseline}
    title = f"Compared prompt by prompt with {baseline}"
    return [dataclasses.replace(table, title=title) for table in tables.comparison_tables(others, baseline)]
