"""report.html, summary.json (every figure) and readings.json (every video's reading) of systems under a protocol."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

from nd_jax.data.video_out import write_video
from nd_jax.outputs import check_new_file, new_file
from nd_jax.protocol import tables
from nd_jax.protocol.definition import SPLITS, prompt_list
from nd_jax.protocol.figures import as_json, compare, system_figures
from nd_jax.protocol.readings import FILE, ProtocolResult, write_readings
from nd_jax.report import Gallery, write_report

REPORT, SUMMARY = "report.html", "summary.json"


def check_outputs(out: Path, *, overwrite: bool) -> None:
    """Raises UserError for a file of ``write_protocol`` that exists already, unless it may be replaced."""
    for name in (REPORT, SUMMARY, FILE):
        check_new_file(out / name, overwrite=overwrite)


def write_protocol(out: Path, results: Mapping[str, ProtocolResult]) -> Path:
    """All three files, and the videos that the report shows. The first system is the baseline of the others.

    Returns the report's path. Raises UserError where the systems were not asked the same.
    """
    baseline, *others = results
    protocol = results[baseline].protocol
    systems = {name: system_figures(result) for name, result in results.items()}
    comparisons = {name: compare(results[name], results[baseline]) for name in others}
    sections = [
        tables.accuracy_table(systems),
        *tables.comparison_tables(comparisons, baseline),
        *tables.templates_table(systems),
        *tables.codec_tables(systems),
        *tables.motion_tables(systems),
        tables.controls_table(systems),
        *galleries(out / "videos", results),
        tables.prompts_table(results),
    ]
    summary = {
        "protocol": dataclasses.asdict(protocol),
        "baseline": baseline,
        "systems": {name: {"about": results[name].about, **as_json(systems[name])} for name in results},
        "comparisons": as_json(comparisons),
    }
    with new_file(out / SUMMARY, overwrite=True) as part:
        part.write_text(json.dumps(summary, indent=2, allow_nan=False), encoding="utf-8")
    write_readings(out / FILE, results)
    lead = (
        f"The {protocol.name} protocol: {protocol.prompts} prompts of each split, sampling seeds "
        f"{', '.join(map(str, protocol.sampling_seeds))}; 95 % intervals from {protocol.resamples} bootstrap resamples."
    )
    return write_report(out / REPORT, "nd-jax evaluation", lead, sections, f"Prompt seed {protocol.prompt_seed}.")


def galleries(folder: Path, results: Mapping[str, ProtocolResult]) -> list[Gallery]:
    """The first videos of every split, one column per system that made some in this run."""
    shown = [name for name, result in results.items() if result.samples]
    found = []
    for split in SPLITS:
        here = {name: results[name].samples[split] for name in shown if split in results[name].samples}
        if not here:
            continue
        captions = prompt_list(results[shown[0]].protocol, split).captions
        rows = []
        for n, caption in enumerate(captions[: min(map(len, here.values()))]):
            paths = [folder / f"{split}-{n}-{place}.mp4" for place in range(len(here))]
            for path, videos in zip(paths, here.values(), strict=True):
                write_video(path, videos[n], enlarge=2, overwrite=True)
            rows.append((caption, paths))
        found.append(Gallery(f"Videos: {split}", list(here), rows))
    return found
